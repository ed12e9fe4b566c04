"""The processes of a run (``accelerate launch``, ``torchrun``), of which this is one.

Each computes its own part of every batch; gradients are the mean over all, so that two processes with a batch of B do
what one does with 2B. Each evaluates its share of the held-out pairs. The first writes files.

Gradients are averaged here and not by ``DistributedDataParallel``: it would have to wrap the branch, whose hint encoder
is called by itself, and a process that runs out of memory in a backward pass would leave the others waiting in it.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from controlkit.errors import Unsupported

_PATIENCE = timedelta(hours=6)
"""How long the others wait while the first builds a cache; torch's ten minutes are too short."""


@contextmanager
def _among_all() -> Iterator[None]:
    """Around what all processes take part in: ``Unsupported`` where one of them has ended."""
    try:
        yield
    except RuntimeError as error:
        raise Unsupported(
            f"Another process of the run has ended, or cannot be reached ({str(error).splitlines()[0]}). Nothing up to "
            "the last checkpoint is lost: run the same command to go on from there."
        ) from error


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those of the run."""

    index: int = 0
    count: int = 1
    sharded: bool = False
    """Whether weights, gradients and optimizer state are sharded over them (FSDP2)."""
    notes: tuple[str, ...] = ()
    """Sentences for the user on how they were started."""
    talk: Any = None
    """The group for messages between CPUs, which notice a killed process at once; a GPU's collectives would wait."""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.index == 0

    def wait(self) -> None:
        """Wait until all processes are here."""
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
        """Replace the gradients by their mean over the processes, in one message; FSDP has averaged sharded ones."""
        if not self.sharded:
            self.mean(p.grad for p in module.parameters() if p.grad is not None)

    def any(self, value: bool) -> bool:
        """Whether ``value`` is true in any process."""
        if self.count == 1:
            return value
        flag = torch.tensor(float(value))
        with _among_all():
            torch.distributed.all_reduce(flag, group=self.talk)
        return bool(flag.item())

    def broadcast(self, value: Any) -> Any:
        """Give the first process's ``value`` to all."""
        if self.count == 1:
            return value
        held = [value]
        with _among_all():
            torch.distributed.broadcast_object_list(held, group=self.talk)
        return held[0]

    def gather(self, value: Any) -> list[Any]:
        """Give every process's ``value``, in their order, to all."""
        held = [value] * self.count
        if self.count > 1:
            with _among_all():
                torch.distributed.all_gather_object(held, value, self.talk)
        return held

    def share(self, count: int) -> range:
        """This process's share of ``count`` things: a range as long as the others', give or take one; perhaps empty."""
        return range(self.index * count // self.count, (self.index + 1) * count // self.count)


_DEEPSPEED, _FSDP = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"
"""What ``accelerate launch --use_deepspeed`` and ``--use_fsdp`` set."""


def connect_ranks(cpu: bool) -> Ranks:
    """Connect the processes that a launcher started; a single one where none did.

    Raises ``Unsupported`` where there are more processes than GPUs.
    """
    notes = []
    if deepspeed := _asked(_DEEPSPEED):
        notes.append(
            "DeepSpeed was asked for, which is accepted and untested: its stages and offloading are not used. Each "
            "process holds all weights, and gradients are averaged. To shard the weights, launch with --use_fsdp."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Ranks(notes=tuple(notes))
    from accelerate import PartialState

    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not cpu and torch.cuda.is_available() and beside > torch.cuda.device_count():
        raise Unsupported(
            f"{beside} processes were started on a machine with {torch.cuda.device_count()} GPUs, and each needs its "
            "own: start as many (--num_processes)."
        )
    if deepspeed:
        del os.environ[_DEEPSPEED]  # or accelerate would have DeepSpeed itself connect the processes
    state = PartialState(cpu=cpu, timeout=_PATIENCE)
    if deepspeed:
        os.environ[_DEEPSPEED] = "true"
    talk = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
    ranks = Ranks(state.process_index, state.num_processes, notes=tuple(notes), talk=talk)
    if deepspeed or not _asked(_FSDP):
        return ranks
    notes.append(
        f"The branch is sharded over {ranks.count} processes (FSDP2, layer by layer); the launcher's other FSDP "
        "settings are not used."
    )
    return replace(ranks, sharded=True, notes=tuple(notes))


def _asked(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1", "yes")
