"""The learning rate of every step, and the time a run may take."""

import math
import time
from collections.abc import Callable
from functools import lru_cache

import torch
from diffusers.optimization import get_scheduler

from controlkit.train.parts import RatePlan


def learning_rate(plan: RatePlan, step: int, spent: float = 0.0) -> float:
    """Compute the learning rate of a step, counted from 0.

    ``constant`` rises over ``warmup`` steps and falls over ``cooldown``, never to zero. The others are diffusers'
    schedules; the first step of their warm-up has a rate of 0. ``spent``: the share of ``max_minutes`` that has passed;
    the fall at the end goes by it where it is further along than the steps are.
    """
    at = max(step, min(int(spent * plan.steps), plan.steps - 1))
    if plan.schedule == "constant":
        rise = (step + 1) / (plan.warmup + 1)
        fall = (plan.steps - at) / (plan.cooldown + 1)
        return plan.lr * min(1.0, rise, fall)
    return plan.lr * _factor(plan)(step if step < plan.warmup else at)


@lru_cache(maxsize=4)
def _factor(plan: RatePlan) -> Callable[[int], float]:
    """diffusers' function from a step to the share of the rate, taken from a scheduler that schedules nothing."""
    nothing = torch.optim.SGD([torch.zeros(())], lr=plan.lr)
    steps = {"num_warmup_steps": plan.warmup, "num_training_steps": plan.steps}
    return get_scheduler(plan.schedule, nothing, **steps, num_cycles=plan.cycles, power=plan.power).lr_lambdas[0]


class Clock:
    """A run's wall clock and its budget of ``minutes``, or None, over interruptions."""

    def __init__(self, minutes: float | None) -> None:
        self._limit = math.inf if minutes is None else 60 * minutes
        self._began = time.monotonic()
        self.last_step = self.evaluation = 0.0
        """Seconds that the last step, and the last evaluation, took: the estimates for the next."""

    def restore(self, seconds: float, last_step: float) -> None:
        """Add the time of a checkpoint's ``facts()``."""
        self._began -= seconds
        self.last_step = last_step

    @property
    def share(self) -> float:
        """The share of the budget for steps that has passed; 0 without one."""
        return self._seconds / max(self._limit - self.evaluation, 1e-9)

    @property
    def over(self) -> bool:
        """Whether one more step, and an evaluation of what comes of it, would end after the budget."""
        return self._seconds + self.last_step + self.evaluation > self._limit

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def stepped(self, started: float) -> float:
        """Note and return the seconds of a step that began at ``started``, a ``time.perf_counter()``."""
        self.last_step = time.perf_counter() - started
        return self.last_step

    def facts(self) -> dict[str, str]:
        """The clock's values for a checkpoint."""
        return {"seconds": f"{self._seconds:.3f}", "last_step": f"{self.last_step:.3f}"}
