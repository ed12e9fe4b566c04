"""The processes of a run that several do together (``accelerate launch``, ``torchrun``), of which this is one.

Each computes its own part of every batch; gradients are the mean over all, so that two processes with a batch of B do
what one does with 2B. The first writes files and evaluates; the others wait for it.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

_PATIENCE = timedelta(hours=6)
"""How long the others wait while the first evaluates or builds a cache; the usual ten minutes are too short."""


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and says."""
        return self.index == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            torch.distributed.barrier()

    def mean(self, values: Iterable[Tensor]) -> None:
        """Replace each value by its mean over the processes."""
        if self.count > 1:
            held = list(values)
            flat = torch.cat([value.reshape(-1).float() for value in held])
            torch.distributed.all_reduce(flat)
            flat /= self.count
            for value, mean in zip(held, flat.split([value.numel() for value in held]), strict=True):
                value.copy_(mean.view_as(value))

    def mean_gradients(self, module: nn.Module) -> None:
        """Replace the gradients by their mean over the processes, in one message."""
        self.mean(p.grad for p in module.parameters() if p.grad is not None)

    def any(self, value: bool, device: torch.device) -> bool:
        """Whether it is so for any of them."""
        if self.count == 1:
            return value
        flag = torch.tensor(float(value), device=device)
        torch.distributed.all_reduce(flag)
        return bool(flag.item())

    def told(self, value: Any) -> Any:
        """What the first has, to all."""
        if self.count == 1:
            return value
        held = [value]
        torch.distributed.broadcast_object_list(held)
        return held[0]


def ranks(cpu: bool) -> Ranks:
    """The processes that were started together; one, alone, where nothing started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Ranks()
    from accelerate import PartialState

    state = PartialState(cpu=cpu, timeout=_PATIENCE)
    return Ranks(state.process_index, state.num_processes)
