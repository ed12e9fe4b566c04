"""Kinds of hints as measuring sees them: the metric, the known truth, and whether an annotator makes them.

Of several hints that are channels of one, the first decides.
"""

from collections.abc import Callable

import numpy as np

from controlkit.annotators import HintKind, kind_or_bare, names_of, parts_of
from controlkit.errors import Unsupported, nearest
from controlkit.images import HintSpec
from controlkit.measure.metrics import METRICS, Metric
from controlkit.mini.truth import Truth


def first_kind(spec: HintSpec) -> HintKind:
    """The kind of these hints, or of the first of several."""
    return kind_or_bare(parts_of(spec)[0].annotator)


def metric_of(spec: HintSpec) -> Metric:
    """The metric of fidelity to such hints, whether or not anything here makes them; ``Unsupported`` if none."""
    kind = first_kind(spec)
    measured = names_of(lambda kind: kind.metric)
    if not kind.name:
        raise Unsupported(f"No annotator of these hints is named: expected one of {', '.join(measured)}.")
    if not kind.metric:
        raise Unsupported(f'Obedience to hints named "{kind.name}" is not measured: {nearest(kind.name, measured)}')
    return METRICS[kind.metric]


def truth_of(spec: HintSpec) -> Callable[[Truth], np.ndarray] | None:
    """The function that draws such hints from the truth about a picture; None for hints made of the picture itself."""
    return first_kind(spec).truth


def is_made_here(spec: HintSpec) -> bool:
    """Whether an annotator here makes such hints of a picture."""
    return first_kind(spec).is_made_here
