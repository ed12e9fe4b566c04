"""The learning rate of every step, and the time a run may take."""

import math
import time
from collections.abc import Mapping

from controlkit.train.recipe import POLYNOMIAL_END, Recipe


def learning_rate(recipe: Recipe, step: int, spent: float = 0.0) -> float:
    """The rate of a step (from 0).

    ``constant`` rises over ``warmup`` steps and falls over ``cooldown``, never to zero. The others are those of
    diffusers' ``get_scheduler`` to the number, the first step of whose warm-up has a rate of 0.

    ``spent``: the share of the run's ``max_minutes`` that has passed. Where that is further along than the steps are, what
    comes down at the end goes by it, so that it is down when time is; warm-up always goes by steps.
    """
    at = max(step, min(int(spent * recipe.steps), recipe.steps - 1))
    if recipe.schedule == "constant":
        rise = (step + 1) / (recipe.warmup + 1)
        fall = (recipe.steps - at) / (recipe.cooldown + 1)
        return recipe.lr * min(1.0, rise, fall)
    if step < recipe.warmup:
        return recipe.lr * step / recipe.warmup
    done = (at - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    match recipe.schedule:
        case "linear":
            return recipe.lr * (1 - done)
        case "cosine":
            return recipe.lr * (1 + math.cos(math.pi * done)) / 2
        case "cosine_with_restarts":
            return recipe.lr * (1 + math.cos(math.pi * (recipe.cycles * done % 1))) / 2
        case "polynomial":
            return (recipe.lr - POLYNOMIAL_END) * (1 - done) ** recipe.power + POLYNOMIAL_END
    return recipe.lr


class Clock:
    """A run's wall clock against its budget, over interruptions.

    ``minutes``: the budget, or None; ``facts``: what ``facts()`` told when the run was last kept.
    """

    def __init__(self, minutes: float | None, facts: Mapping[str, str] | None = None) -> None:
        facts = facts or {}
        self._limit = math.inf if minutes is None else 60 * minutes
        self._began = time.monotonic() - float(facts.get("seconds", 0))
        self.last_step = float(facts.get("last_step", 0))
        """Seconds the step before took: the next is taken to need as many."""

    @property
    def share(self) -> float:
        """How much of the budget has passed; 0 without one."""
        return self._seconds / self._limit

    @property
    def over(self) -> bool:
        """Whether a step more would end after the budget."""
        return self._seconds + self.last_step > self._limit

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def stepped(self, started: float) -> float:
        """The seconds of a step that began at this ``time.perf_counter()``, kept in mind."""
        self.last_step = time.perf_counter() - started
        return self.last_step

    def facts(self) -> dict[str, str]:
        """What a checkpoint keeps of it."""
        return {"seconds": f"{self._seconds:.3f}", "last_step": f"{self.last_step:.3f}"}
