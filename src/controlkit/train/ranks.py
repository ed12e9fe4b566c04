"""The processes of a run (``accelerate launch``, ``torchrun``), of which this is one.

Each computes its own part of every batch; gradients are the mean over all, so that two processes with a batch of B do
what one does with 2B. Each evaluates its share of the held-out pairs. The first writes files.

Gradients are averaged here and not by ``DistributedDataParallel``: it would have to wrap the branch, whose hint encoder
is called by itself, and a process that runs out of memory in a backward pass would leave the others waiting in it.
"""

import os
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from controlkit.errors import Unsupported
from controlkit.files import SCRATCH

_PATIENCE = timedelta(hours=6)
"""How long the others wait while the first builds a cache; torch's ten minutes are too short."""
_SEEN = 30.0
"""Seconds after which a file written on one machine is seen on another, if their folder is the same."""


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
    beside: int = 1
    """How many of them are on this machine."""
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

    def check_shared(self, folder: Path) -> None:
        """Raise ``Unsupported``, in all processes, where one of them does not see the first one's ``folder``."""
        if self.count == 1:
            return
        mark = folder / f"{SCRATCH}seen-{self.broadcast(uuid.uuid4().hex)}"
        if self.first:
            mark.touch()
        self.wait()
        until = time.monotonic() + _SEEN
        while not mark.exists() and time.monotonic() < until:
            time.sleep(0.2)
        blind = [name for name in self.gather("" if mark.exists() else socket.gethostname()) if name]
        if self.first:
            mark.unlink()
        if blind:
            raise Unsupported(
                f"{folder} is not the same folder on every machine of this run: what the first process writes there is "
                f"not seen on {blind[0]}. Give an --out on a disk that all of them share."
            )

    def share(self, count: int) -> range:
        """This process's share of ``count`` things: a range as long as the others', give or take one; perhaps empty."""
        return range(self.index * count // self.count, (self.index + 1) * count // self.count)


_DEEPSPEED, _FSDP = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"
"""What ``accelerate launch --use_deepspeed`` and ``--use_fsdp`` set."""
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_PLACES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""What torchrun and MPI's launchers set: how many processes there are, and which this one is."""
_TORCHRUN = "Start several with: torchrun --nproc_per_node 2 -m controlkit train ..."


def _number(names: Iterable[str]) -> int:
    """The greatest of the numbers in these environment variables; 1 where there are none."""
    values = [os.environ.get(name, "") for name in names]
    return max([1, *(int(value) for value in values if value.isdecimal())])


def _check_alone() -> None:
    """Raise ``Unsupported`` where a launcher was asked for several processes, and this one knows of no other."""
    # accelerate gives an address to meet at only where it was asked for several; without GPUs it starts one.
    asked = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if asked and "WORLD_SIZE" not in os.environ:
        raise Unsupported(
            "`accelerate launch` was asked for several processes and has started this one alone, as it does on a "
            f"machine without GPUs. {_TORCHRUN}. Start one with --num_processes 1 --num_machines 1."
        )
    if (tasks := _number(["SLURM_STEP_NUM_TASKS"])) > 1 and "WORLD_SIZE" not in os.environ:
        raise Unsupported(
            f"srun has started {tasks} tasks that do not know of each other. {_TORCHRUN}, from one task a machine."
        )


def connect_ranks(cpu: bool) -> Ranks:
    """Connect the processes that a launcher started; a single one where none did.

    Raises ``Unsupported`` where there are more processes than GPUs, or the launcher's other processes are not found.
    """
    notes = []
    if deepspeed := _asked(_DEEPSPEED):
        notes.append(
            "DeepSpeed was asked for, which is accepted and untested: its stages and offloading are not used. Each "
            "process holds all weights, and gradients are averaged. To shard the weights, launch with --use_fsdp."
        )
    count = _number(_COUNTS)
    if count < 2:
        _check_alone()
        return Ranks(notes=tuple(notes))
    if not any(name in os.environ for name in _PLACES):  # it would wait for the others for hours
        raise Unsupported(
            f"The environment says that {count} processes take part ({' or '.join(_COUNTS)}), and not which of them "
            f"this one is (RANK). {_TORCHRUN}; or unset that variable to train in one."
        )
    from accelerate import PartialState

    beside = _number(["LOCAL_WORLD_SIZE"])
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
    if state.num_processes != count:
        raise Unsupported(
            f"The environment says that {count} processes take part, and {state.num_processes} found each other "
            f"(LOCAL_RANK is {os.environ.get('LOCAL_RANK', 'not set')}). {_TORCHRUN}."
        )
    talk = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
    ranks = Ranks(state.process_index, state.num_processes, beside=beside, notes=tuple(notes), talk=talk)
    if deepspeed or not _asked(_FSDP):
        return ranks
    notes.append(
        f"The branch is sharded over {ranks.count} processes (FSDP2, layer by layer); the launcher's other FSDP "
        "settings are not used."
    )
    return replace(ranks, sharded=True, notes=tuple(notes))


def _asked(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1", "yes")
