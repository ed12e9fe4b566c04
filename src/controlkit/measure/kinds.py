"""The kind and the metric of hints; of several that are channels of one, the first decides."""

from controlkit.annotators import HintKind, kind_or_bare, names_of, parts_of
from controlkit.errors import Unsupported, nearest
from controlkit.images import HintSpec
from controlkit.measure.metrics import METRICS, Metric


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
