"""The gradients of a step's batch."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from controlkit.data import Cached, turn_at
from controlkit.errors import OutOfRoom
from controlkit.precision import autocast, training_attention
from controlkit.train.parts import BatchPlan, ComputePlan
from controlkit.train.ranks import Ranks
from controlkit.train.state import TrainState
from controlkit.train.step import Batch, controlled, draw_batch, objective


class Gradients:
    """Computes a batch's gradients: of this process's equal parts of it, one by one, then the mean over all processes.

    Where memory runs out, in more parts from then on; ``on_stage`` gets a sentence.
    """

    def __init__(
        self,
        state: TrainState,
        cached: Sequence[Cached],
        plan: BatchPlan,
        compute: ComputePlan,
        ranks: Ranks,
        on_stage: Callable[[str, int], None],
    ) -> None:
        self.state, self.cached, self.plan, self.ranks, self.on_stage = state, cached, plan, ranks, on_stage
        self.parts = compute.gradient_accumulation
        self.predict = torch.compile(controlled) if compute.compile else controlled
        self.attention = partial(training_attention, state.base.device.type)
        # At first what lies before zero joins has no gradient: the second step shows it.
        self._unchecked = 2 if compute.compile and not state.shards else 0

    def of(self, step: int) -> torch.Tensor:
        """Compute the gradients of a step's batch; returns its loss, () on the device, without waiting for it.

        Raises ``OutOfRoom`` where memory does not hold the smallest part.
        """
        while True:
            full: torch.OutOfMemoryError | None = None
            loss = torch.zeros((), device=self.state.base.device)
            try:
                loss = self._own(step)
            except torch.OutOfMemoryError as error:
                if self.state.shards:  # the others wait for this one's weights: the step cannot be repeated
                    raise OutOfRoom(
                        f"Memory does not hold a part of the batch ({str(error).splitlines()[0]}). Set "
                        "gradient_checkpointing: true or a greater gradient_accumulation (the batch is now in "
                        f"{self.parts} parts), or use more processes."
                    ) from error
                full = error
            if not self.ranks.any(full is not None):
                break
            self._take_more_parts(step, full)
        self.ranks.mean([loss])
        self.ranks.mean_gradients(self.state.learning)
        return loss

    def check_again(self) -> None:
        """Check a compiled step's gradients once more: the base's weights, which are trained now, are new to it."""
        self._unchecked += not self.state.shards

    def _own(self, step: int) -> torch.Tensor:
        """Add the gradients of this process's parts; returns their part of the loss."""
        state, total = self.state, torch.zeros((), device=self.state.base.device)
        which, turn = turn_at([len(one) for one in self.cached], self.plan.pairs, step, self.plan.seed)
        parts, first = self.parts * self.ranks.count, self.ranks.index * self.parts
        for part in range(first, first + self.parts):
            batch = draw_batch(state.base, self.cached[which], self.plan, step, part, parts, turn)
            if part == first and self._unchecked and self.predict is not controlled:
                self._check_compiled(batch)
            with autocast(total.device.type), self.attention():
                compute = partial(objective, state.base, state.branch, batch, self.predict)
                loss = (state.shards.within(compute) if state.shards else compute()) / self.parts
            state.backward(loss)
            total += loss.detach()
        return total

    def _check_compiled(self, batch: Batch) -> None:
        """Stop compiling where that loses gradients: with torch 2.13 on a CPU they were zero at all levels but the
        finest, while the loss was right (docs/decisions.md)."""
        found = []
        for predict in (controlled, self.predict):
            with autocast(self.state.base.device.type), self.attention():
                loss = objective(self.state.base, self.state.branch, batch, predict)
            loss.backward()
            named = self.state.learning.named_parameters()
            found.append({name: p.grad.detach().clone() for name, p in named if p.grad is not None})
            self.state.learning.zero_grad()
        plain, compiled = found
        lost = [name for name, grad in plain.items() if grad.any() and not (name in compiled and compiled[name].any())]
        self._unchecked -= 1
        if lost:  # each process by itself: their gradients are right either way
            self.predict = controlled
            reason = f"compiled, {len(lost)} of {len(plain)} weights have no gradient here ({lost[0]})"
            self.on_stage(f"not compiled: {reason}", 0)

    def _take_more_parts(self, step: int, error: torch.OutOfMemoryError | None) -> None:
        """Split the batch further. ``error``: None where another process ran out of memory."""
        self.state.learning.zero_grad()
        pairs = self.plan.pairs // self.ranks.count
        more = next((count for count in range(2 * self.parts, pairs + 1) if pairs % count == 0), None)
        if more is None:
            reason = str(error).splitlines()[0] if error else "of another process"
            raise OutOfRoom(
                f"Memory does not hold even {pairs // self.parts} pair and its noises ({reason}). Set "
                "gradient_checkpointing: true, noises_per_pair: 1, or use a smaller base or size."
            ) from error
        self.parts = more
        self.on_stage(
            f"out of memory: step {step + 1} and the rest in {more} parts, the batch is still {self.plan.batch}", 0
        )
