"""Obedience: fidelity on a scale from no control (0) to the most that the VAE lets through (1).

- **floor**: the better fidelity of two: without control, and with hints shuffled between the pictures;
- **ceiling**: the fidelity of the VAE's reconstructions of the true pictures;
- **obedience** = (fidelity - floor) / (ceiling - floor), also for metrics that are errors, where less is better.

A measure of this project (docs/decisions.md). Intervals are 95%, by the percentile bootstrap (Efron and Tibshirani,
1993, Chapter 13) over the pictures; paired: each draw takes the same pictures under every condition.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from controlkit.errors import Invalid
from controlkit.measure.metrics import METRICS
from controlkit.seeds import numpy_rng

RESAMPLES = 1000
FOUND = 0.25
"""Control is found when the lower bound of obedience is at least this, in two successive evaluations."""


@dataclass(frozen=True)
class Figure:
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Obedience:
    """Obedience with the figures it is computed from, in the unit of ``metric``, a name in ``METRICS``."""

    fidelity: Figure
    floor: Figure
    floor_no_control: Figure
    floor_shuffled: Figure
    ceiling: Figure
    obedience: Figure
    metric: str = "edge_f1"

    @property
    def is_meaningful(self) -> bool:
        """Whether floor and ceiling lie far enough apart, and the ceiling high enough, for obedience to mean much."""
        return METRICS[self.metric].is_meaningful(self.floor.mean, self.ceiling.mean)


def obedience_in(report: Mapping[str, Any]) -> Obedience:
    """The obedience in a report of ``evaluate``, with the figures it is computed from."""
    figures = {field.name: report[field.name] for field in fields(Obedience) if field.name != "metric"}
    return Obedience(**{name: Figure(**ends) for name, ends in figures.items()}, metric=report["metric"])


def resampled(count: int) -> np.ndarray:
    """Rows of each bootstrap draw, (RESAMPLES, count); the same for the same count."""
    return numpy_rng("bootstrap", count).integers(count, size=(RESAMPLES, count))


def mean_figure(values: np.ndarray) -> Figure:
    """The mean of values (N,) with its bootstrap interval."""
    low, high = np.quantile(values[resampled(len(values))].mean(1), [0.025, 0.975])
    return Figure(float(values.mean()), float(low), float(high))


def obedience(
    controlled: np.ndarray, no_control: np.ndarray, shuffled: np.ndarray, ceiling: np.ndarray, metric: str = "edge_f1"
) -> Obedience:
    """Obedience from each picture's fidelity under the four conditions, each (N,).

    A picture that is NaN under any condition is left out of all four; ``Invalid`` if none is left. The better floor is
    taken: the higher one, or the lower one where ``metric`` is an error.
    """
    table = np.stack([controlled, no_control, shuffled, ceiling])
    table = table[:, ~np.isnan(table).any(0)]
    if table.shape[1] == 0:
        raise Invalid(
            f"Nothing can be measured on these {len(controlled)} pairs: in each, hint and output are both empty "
            "under some condition. Take pairs with something in their hints, or other annotator options."
        )

    sign = 1 if METRICS[metric].higher_is_better else -1

    def figures(rows: np.ndarray) -> np.ndarray:
        """(6, ...) of rows (4, ..., N): fidelity, floor, no control, shuffled, ceiling, obedience."""
        got, without, mixed, top = sign * rows.mean(-1)
        floor = np.maximum(without, mixed)
        scores = sign * np.stack([got, floor, without, mixed, top])
        return np.stack([*scores, (got - floor) / np.maximum(top - floor, 1e-6)])

    samples = figures(table[:, resampled(table.shape[1])])
    low, high = np.quantile(samples, [0.025, 0.975], axis=1)
    got, floor, without, mixed, top, share = (
        Figure(*map(float, row)) for row in zip(figures(table), low, high, strict=True)
    )
    return Obedience(got, floor, without, mixed, top, share, metric)
