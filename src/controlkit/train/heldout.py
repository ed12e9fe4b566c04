"""The loss on held-out pairs, relative to the base without control.

With several processes each measures its share of the pairs, and all get the whole result: that of a single process but
for rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from controlkit.backbones import Backbone
from controlkit.branch import ControlNetwork
from controlkit.data import Cached
from controlkit.errors import OutOfRoom
from controlkit.precision import autocast
from controlkit.train.parts import BatchPlan
from controlkit.train.ranks import Ranks
from controlkit.train.step import Batch, controlled, draw_batch, hint_features_of, residual_sizes

Found = TypeVar("Found")


class HeldoutLoss:
    """The loss on held-out pairs relative to the ``frozen`` base without control, with the same noise each time; and
    the size of the residuals.
    """

    QUARTERS = 4

    def __init__(self, base: Backbone, frozen: Backbone, cached: Cached, plan: BatchPlan, ranks: Ranks) -> None:
        self.base, self.frozen, self.ranks = base, frozen, ranks
        fixed = replace(plan, batch=self.QUARTERS * len(cached), noises_per_pair=self.QUARTERS, prompt_dropout=0.0)
        self._draw = partial(draw_batch, base, cached, fixed, 0)
        self._pairs, self._most = len(cached), 8  # held out; computed at once
        self._begin()

    def _begin(self) -> None:
        parts = -(-self._pairs // self._most)
        self.batches = [self._draw(part, parts) for part in self.ranks.share(parts)]
        self._without: dict[int, Tensor] = {}

    def _each(self, compute: Callable[[int], Found]) -> list[Found]:
        """Compute something of each batch; where memory runs out, of batches half as large from then on."""
        while True:
            found: list[Found] = []
            full: torch.OutOfMemoryError | None = None
            try:
                found = [compute(place) for place in range(len(self.batches))]
            except torch.OutOfMemoryError as error:
                full = error
            if not self.ranks.any(full is not None):
                return found
            if self._most == 1:
                raise OutOfRoom(
                    "Memory does not hold a held-out pair with four noises: set evaluation.every: 0, or use a smaller "
                    "base or size."
                ) from full
            self._most //= 2
            self._begin()

    def _noisy(self, batch: Batch) -> Tensor:
        return self.base.noise.add(batch.latents, batch.noise, batch.t)

    @torch.no_grad()
    def _errors(self, batch: Batch, branch: ControlNetwork | None) -> Tensor:
        """Compute the squared error of each pair (P, quarters); ``branch`` None: without control."""
        z = self._noisy(batch)
        with autocast(self.base.device.type):
            if branch is None:
                prediction = self.frozen.predict(z, batch.t, batch.text)
            else:
                features = hint_features_of(self.base, branch, batch)
                prediction = controlled(self.base, branch, z, batch.t, batch.text, features)
        target = self.base.noise.target(batch.latents, batch.noise, batch.t)
        return (prediction.float() - target).square().mean((1, 2, 3)).view(-1, self.QUARTERS).cpu()

    def _summed(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Add up by name the parts of all processes, in the same order however many processes there are."""
        held: dict[str, list[Tensor]] = {}
        for part in (part for rank in self.ranks.gather(list(parts)) for part in rank):
            for name, value in part.items():
                held.setdefault(name, []).append(value)
        return {name: torch.stack(values).sum(0) for name, values in held.items()}

    def measure(self, branch: ControlNetwork) -> dict[str, list[float]]:
        """Measure by type of hint: the error under control / without, in each quarter of the schedule."""

        def summed(place: int) -> dict[str, Tensor]:
            batch = self.batches[place]
            if place not in self._without:
                self._without[place] = self._errors(batch, None)
            counts = [len(hint) for hint in batch.hints.values()]
            parts = (errors.split(counts) for errors in (self._errors(batch, branch), self._without[place]))
            kinds = zip(batch.hints, *parts, strict=True)
            return {kind: torch.stack([under.sum(0), plain.sum(0)]) for kind, under, plain in kinds}

        sums = self._summed(self._each(summed))
        return {kind: (under / plain).tolist() for kind, (under, plain) in sorted(sums.items())}

    def residuals(self, branch: ControlNetwork) -> dict[str, float]:
        """Measure by tap, in order: the root mean square of its residual relative to that of the feature it is added
        to, with the same noise."""

        def sizes(place: int) -> dict[str, Tensor]:
            batch = self.batches[place]
            with autocast(self.base.device.type):
                return residual_sizes(self.base, branch, self._noisy(batch), batch)

        sums = self._summed(self._each(sizes))
        return {name: float((own / plain).sqrt()) for name, (own, plain) in sums.items()}
