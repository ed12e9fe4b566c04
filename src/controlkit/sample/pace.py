"""Which steps of a run compute all, and which reuse what an earlier one computed (``Request.speed``)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """Which steps compute all anew."""

    serves: float
    """The share of the schedule that what one step computed serves at most."""
    first: float = 0.1
    """The share of the schedule, from the first step that is made, in which all steps compute anew."""
    halves: bool = True
    """Whether the others leave the unconditional half out."""


PACES = {"fast": Pace(0.15), "turbo": Pace(0.25)}
"""By ``Request.speed``. Shares of the schedule and not numbers of steps, as features change with the noise: runs of few
steps reuse less, or nothing."""


def fresh_steps(pace: Pace, steps: int, span: range) -> set[int]:
    """The steps in ``span``, of a run of so many, that compute all anew; the first always does."""
    every = max(int(pace.serves * steps + 1e-6), 1)
    last = span.start + max(round(pace.first * steps), 1) - 1
    return {step for step in span if step <= last or (step - last) % every == 0}
