"""Fidelity: each output is annotated again and compared with its hint, by the metric of such hints."""

from collections.abc import Callable, Iterable

import numpy as np

from controlkit.annotators import annotate, parts_of
from controlkit.data import Pair
from controlkit.errors import Unsupported, UserError
from controlkit.images import HintSpec
from controlkit.measure.metrics import METRICS, first_kind, metric_of
from controlkit.measure.world import EMBEDDED

Finder = Callable[[np.ndarray], np.ndarray]
"""Annotates an output again: a picture, uint8 (H, W, 3), to the hint picture found in it."""


def finder_of(spec: HintSpec) -> Finder:
    """The function that annotates outputs again for such hints; ``Unsupported`` if there is none here.

    Depth, normals, labels and poses are read off by the observer of the embedded world, which knows no other pictures.
    """
    if not metric_of(spec).annotates:
        return lambda picture: picture
    kind = first_kind(spec)
    if draw := kind.truth:
        observer = EMBEDDED.observer()
        return lambda picture: draw(observer.observe([picture])[0])
    if not kind.is_made_here:
        raise Unsupported(
            f'Nothing here finds "{kind.name}" in a picture: give a `finder`, a function from a picture to it.'
        )
    if missing := kind.lacks():
        raise Unsupported(missing)
    first = parts_of(spec)[0]
    return lambda picture: annotate(picture, first)


def check_findable(spec: HintSpec, pairs: Iterable[Pair]) -> None:
    """Raise ``Unsupported`` if such hints need pictures of the embedded scenes, and some pair has another."""
    kind = first_kind(spec)
    if kind.truth and any(pair.truth is None for pair in pairs):
        raise Unsupported(f'"{kind.name}" can be found again in the embedded scenes alone: measure on scenes.')


def unmeasurable(spec: HintSpec, pairs: Iterable[Pair]) -> str:
    """The reason why obedience to such hints cannot be measured on these pairs, as a sentence; "" where it can."""
    try:
        check_findable(spec, pairs)
        finder_of(spec)
    except UserError as error:
        return str(error)
    return ""


def fidelity(
    pictures: Iterable[np.ndarray], hints: Iterable[np.ndarray], spec: HintSpec, finder: Finder | None = None
) -> np.ndarray:
    """The metric of each picture, uint8 (H, W, 3), annotated again, against its hint, (N,); NaN where there is none.

    ``finder``: for hints that nothing here makes, such as a network that estimates depth.
    """
    return fidelities(pictures, hints, spec, finder)[metric_of(spec).name]


def fidelities(
    pictures: Iterable[np.ndarray], hints: Iterable[np.ndarray], spec: HintSpec, finder: Finder | None = None
) -> dict[str, np.ndarray]:
    """``fidelity`` by the metric of such hints and by the one beside it, if there is one, by name; (N,) each."""
    metric, finder = metric_of(spec), finder or finder_of(spec)
    metrics = [metric, *([METRICS[metric.beside]] if metric.beside else [])]
    pairs = ((finder(picture), spec.picture(hint)) for picture, hint in zip(pictures, hints, strict=True))
    rows = [[one.function(found, wanted) for one in metrics] for found, wanted in pairs]
    return {one.name: np.array([row[i] for row in rows]) for i, one in enumerate(metrics)}
