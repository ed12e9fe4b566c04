"""The processes of a run that several do together (``accelerate launch``, ``torchrun``), of which this is one.

Each computes its own part of every batch; gradients are the mean over all, so that two processes with a batch of B do
what one does with 2B. Each evaluates its share of the held-out pairs. The first writes files.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from controlkit.errors import UserError

_PATIENCE = timedelta(hours=6)
"""How long the others wait while the first builds a cache; the usual ten minutes are too short."""


@contextmanager
def _among_all() -> Iterator[None]:
    """Where all have to be there. One that was killed closes its connections, and the others' next word finds none."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            f"Another process of the run has ended, or cannot be reached ({str(error).splitlines()[0]}). Nothing up to "
            "the last checkpoint is lost: run the same command to go on from there."
        ) from error


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    index: int = 0
    count: int = 1
    sharded: bool = False
    """Whether weights, gradients and what the optimizer remembers are shared out over them (FSDP2)."""
    notes: tuple[str, ...] = ()
    """What there is to know of how they were started."""
    talk: Any = None
    """The group in which words are passed, by the CPU: one that was killed is missed there at once, where a GPU's
    collectives would wait for it."""

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and says."""
        return self.index == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            with _among_all():
                torch.distributed.barrier(self.talk)

    def mean(self, values: Iterable[Tensor]) -> None:
        """Replace each value by its mean over the processes."""
        if self.count > 1:
            held = list(values)
            flat = torch.cat([value.reshape(-1).float() for value in held])
            with _among_all():
                torch.distributed.all_reduce(flat)
            flat /= self.count
            for value, mean in zip(held, flat.split([value.numel() for value in held]), strict=True):
                value.copy_(mean.view_as(value))

    def mean_gradients(self, module: nn.Module) -> None:
        """Replace the gradients by their mean over the processes, in one message; of sharded ones that is done."""
        if not self.sharded:
            self.mean(p.grad for p in module.parameters() if p.grad is not None)

    def any(self, value: bool) -> bool:
        """Whether it is so for any of them."""
        if self.count == 1:
            return value
        flag = torch.tensor(float(value))
        with _among_all():
            torch.distributed.all_reduce(flag, group=self.talk)
        return bool(flag.item())

    def broadcast(self, value: Any) -> Any:
        """What the first has, to all."""
        if self.count == 1:
            return value
        held = [value]
        with _among_all():
            torch.distributed.broadcast_object_list(held, group=self.talk)
        return held[0]

    def gathered(self, value: Any) -> list[Any]:
        """What each has, in the processes' order, to all."""
        held = [value] * self.count
        if self.count > 1:
            with _among_all():
                torch.distributed.all_gather_object(held, value, self.talk)
        return held

    def share(self, count: int) -> range:
        """Which of ``count`` things are this one's: as many in a row as the others', give or take one, or none."""
        return range(self.index * count // self.count, (self.index + 1) * count // self.count)


_DEEPSPEED, _FSDP = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"
"""What ``accelerate launch --use_deepspeed`` and ``--use_fsdp`` set."""


def ranks(cpu: bool) -> Ranks:
    """The processes that were started together; one, alone, where nothing started several."""
    notes = []
    if deepspeed := _asked(_DEEPSPEED):
        notes.append(
            "DeepSpeed was asked for, which is accepted and untested: its stages and offloading are not used. Each "
            "process holds all weights, and gradients are averaged. To share weights out, launch with --use_fsdp."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Ranks(notes=tuple(notes))
    from accelerate import PartialState

    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not cpu and torch.cuda.is_available() and beside > torch.cuda.device_count():
        raise UserError(
            f"{beside} processes were started on a machine with {torch.cuda.device_count()} GPUs, and each needs its "
            "own: start as many (--num_processes)."
        )
    if deepspeed:
        del os.environ[_DEEPSPEED]  # or accelerate would have DeepSpeed itself connect the processes
    state = PartialState(cpu=cpu, timeout=_PATIENCE)
    if deepspeed:
        os.environ[_DEEPSPEED] = "true"
    talk = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
    together = Ranks(state.process_index, state.num_processes, notes=tuple(notes), talk=talk)
    if deepspeed or not _asked(_FSDP):
        return together
    notes.append(
        f"The branch is shared out over {together.count} processes (FSDP2, layer by layer); of the launcher's other "
        "FSDP settings none is used."
    )
    return replace(together, sharded=True, notes=tuple(notes))


def _asked(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1", "yes")
