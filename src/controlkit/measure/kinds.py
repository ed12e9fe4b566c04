"""Kinds of hints as measuring sees them: the metric, the known truth, and whether an annotator makes them.

Of several hints that are channels of one, the first decides.
"""

from collections.abc import Callable

import numpy as np

from controlkit.annotators import ANNOTATORS, METRIC_OF, parts_of
from controlkit.data import TRUTHS
from controlkit.errors import Unsupported, nearest
from controlkit.images import HintSpec
from controlkit.measure.metrics import METRICS, Metric
from controlkit.mini.observer import Truth


def metric_of(spec: HintSpec) -> Metric:
    """The metric of fidelity to such hints, whether or not anything here makes them; ``Unsupported`` if none."""
    name = parts_of(spec)[0].annotator
    if not name:
        raise Unsupported(f"No annotator of these hints is named: expected one of {', '.join(METRIC_OF)}.")
    if name not in METRIC_OF:
        raise Unsupported(f'Obedience to hints named "{name}" is not measured: {nearest(name, METRIC_OF)}')
    return METRICS[METRIC_OF[name]]


def truth_of(spec: HintSpec) -> Callable[[Truth], np.ndarray] | None:
    """The function that draws such hints from the truth about a picture; None for hints made of the picture itself."""
    return TRUTHS.get(parts_of(spec)[0].annotator)


def is_made_here(spec: HintSpec) -> bool:
    """Whether an annotator here makes such hints of a picture."""
    return parts_of(spec)[0].annotator in ANNOTATORS
