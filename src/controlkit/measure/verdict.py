"""The verdict on a control: found, not found, or not to be measured; and whether quality was kept."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from controlkit.measure.metrics import METRICS
from controlkit.measure.obedience import FOUND, Obedience

Finding = Literal["found", "not found", "cannot be measured"]

_HEADS: dict[Finding, str] = {
    "found": "Control found",
    "not found": "No control found",
    "cannot be measured": "It cannot be measured whether there is control",
}
_QUALITY = {True: "quality kept", False: "quality fell", None: "quality not measured"}


@dataclass(frozen=True)
class Verdict:
    """The finding on a control. ``why``: the figures it rests on, or what stands in the way; no full stop.

    ``quality_kept``: None where nothing here may judge it.
    """

    finding: Finding
    why: Annotated[str, Field(max_length=3000)]
    quality_kept: bool | None = None

    def __str__(self) -> str:
        measured = f"; {_QUALITY[self.quality_kept]}" if self.finding != "cannot be measured" else ""
        return f"{_HEADS[self.finding]}: {self.why}{measured}."


def verdict_on(
    first: Obedience, quality_kept: bool | None, again: Callable[[], Obedience | None] = lambda: None
) -> Verdict:
    """Judge a control by an evaluation and, where that finds control, a second one.

    ``again`` measures the same control once more with other seeds; it is called only where that decides something.
    None: it was not measured again, which is said and finds no control.
    """
    if reason := meaningless(first):
        return Verdict("cannot be measured", reason, quality_kept)
    asked = f"the lower bound has to be at least {FOUND}"
    if first.obedience.low < FOUND:
        return Verdict("not found", f"obedience {first.obedience}, and {asked}", quality_kept)
    second = again()
    if second is None:
        return Verdict("not found", f"obedience {first.obedience}, which no second evaluation confirms", quality_kept)
    figures = f"obedience {first.obedience}, and {second.obedience} with other seeds"
    if meaningless(second) or second.obedience.low < FOUND:
        return Verdict("not found", f"{figures}; {asked} in both", quality_kept)
    return Verdict("found", figures, quality_kept)


def meaningless(measured: Obedience) -> str:
    """The reason why this obedience means nothing, and what to do about it; "" where it means something."""
    metric, floor, ceiling = METRICS[measured.metric], measured.floor.mean, measured.ceiling.mean
    if metric.is_meaningful(floor, ceiling):
        return ""
    figures = (
        f"{metric.name} is {floor:.3f} without the right hint (floor), {ceiling:.3f} of the true pictures (ceiling)"
    )
    if metric.higher_is_better and ceiling < metric.least_ceiling:
        return (
            f"{figures}; a ceiling under {metric.least_ceiling} means that the base's VAE, or its size, does not let "
            "through what the hints show: use larger pictures, coarser hints, or another VAE"
        )
    return (
        f"{figures}, too close together: the hints show little that the prompts do not, or nearly the same in every "
        "picture. Measure on more pictures, on others that differ more, or with hints that show more"
    )
