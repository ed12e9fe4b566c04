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
    deep: float = 0.0
    """The share of the schedule that the decoder's deeper levels, computed at one step, serve at most; 0: they are
    computed at every step."""

    def fresh(self, steps: int, span: range) -> set[int]:
        """The steps in ``span``, of a run of so many, that compute all anew; the first always does."""
        last = span.start + max(round(self.first * steps), 1) - 1
        every = _steps(self.serves, steps)
        return {step for step in span if step <= last or (step - last) % every == 0}

    def whole(self, steps: int, span: range) -> set[int]:
        """The steps that run the whole decoder: those that compute all, and as many of the others as ``deep`` asks."""
        every, since, found = _steps(self.deep, steps), 0, set[int]()
        fresh = self.fresh(steps, span)
        for step in span:
            since = 0 if step in fresh else since + 1
            if since % every == 0:
                found.add(step)
        return found


def _steps(share: float, steps: int) -> int:
    return max(int(share * steps + 1e-6), 1)


PACES = {"fast": Pace(0.15), "turbo": Pace(0.25, deep=0.15)}
"""By ``Request.speed``. Shares of the schedule and not numbers of steps, as features change with the noise: runs of few
steps reuse less, or nothing."""
