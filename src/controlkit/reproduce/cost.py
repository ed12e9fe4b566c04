"""The cost of training a branch, against fine-tuning the base without one (Section 3.3).

The paper: on one A100, Stable Diffusion with ControlNet takes some 23% more memory and 34% more time an iteration than
without; it does not say what is trained without. Here a step of the locked base with a branch stands beside one of the
base fine-tuned whole, and between them a prediction without training, the floor. Operations and the memory that a step
holds are counted, the same on every machine, also at Stable Diffusion 1.5's size; seconds are measured here, in turns.

    controlkit reproduce cost --out runs/cost

Cost: 0.4 minutes (one thread of an AMD EPYC with AVX-512 BF16, beside other work).
Expected: a step with a branch, beside fine-tuning: at Stable Diffusion 1.5's size operations -6% and memory -15% (9,061
GFLOP and 27.9 GB for 4 pictures); on `mini` operations +77%, memory -5%, time +45%, as its hint encoder reads 128
pixels for a small base. The paper's +23% and +34% cannot be beside fine-tuning of the whole base in float32.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from controlkit.backbones import ActiveControl, Backbone
from controlkit.backbones.memory import bytes_of
from controlkit.backbones.random import random_base
from controlkit.controls import new_control
from controlkit.precision import autocast, training_attention
from controlkit.reproduce.entrants import Plan, Table, write_report
from controlkit.seeds import torch_rng
from controlkit.train.optimizers import Optimizer, state_bytes

BATCH = 4
FULL_SIZE = "sd15"
"""The family of the paper's base, at whose size steps are counted without weights."""
PAPER = "memory +23%, time +34%"
FLOOR, TUNED, BRANCH = "prediction", "fine-tuning", "branch"
TITLES = {
    FLOOR: "a prediction, nothing trained",
    TUNED: "the base fine-tuned, no branch",
    BRANCH: "ControlNet, the base locked",
}
ORDER = (*TITLES, *(f"{name}, {FULL_SIZE}" for name in TITLES))
HEAD = (
    "step",
    "base",
    "trained",
    "GFLOP",
    "of fine-tuning",
    "GB held",
    "of fine-tuning",
    "seconds",
    "of fine-tuning",
    "paper",
)


@dataclass(frozen=True)
class Held:
    """Bytes that a step holds at its end: weights, their gradients, AdamW's moments, and what backward reads."""

    weights: int
    gradients: int
    moments: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.moments + self.activations


@dataclass(frozen=True)
class Row:
    """A step on a base: its parameters that learn, operations, memory, and seconds where they were measured.

    ``shares``: of the fine-tuning's, by ``flops``, ``held`` and ``seconds``.
    """

    name: str
    title: str
    base: str
    trained: int
    flops: float
    held: Held
    seconds: float | None = None
    shares: Mapping[str, float] = field(default_factory=dict)

    def words(self) -> tuple[str, ...]:
        """The row's cells, as in ``HEAD``."""
        shares = {name: f"{value - 1:+.0%}" for name, value in self.shares.items()}
        cells = {
            "flops": f"{self.flops / 1e9:,.0f}",
            "held": f"{self.held.total / 1e9:.3g}",
            "seconds": f"{self.seconds:.3f}" if self.seconds else "-",
        }
        measured = [word for name in cells for word in (cells[name], shares.get(name, "-"))]
        return self.title, self.base, f"{self.trained / 1e6:,.1f}M", *measured, PAPER if self.name == BRANCH else "-"


@dataclass(frozen=True)
class Cost(Table):
    """All steps, on the base and at full size."""

    rows: Sequence[Row]

    def notes(self) -> str:
        """The branch's cost beside the paper's, and the reason why they differ."""
        found = []
        for row in self.rows:
            if row.name == BRANCH:
                words = [f"{name} {value - 1:+.0%}" for name, value in row.shares.items()]
                found.append(f"{row.base}: {', '.join(words)}")
        return (
            f"A step with a branch, beside fine-tuning the whole base: {'; '.join(found)} (paper: {PAPER}, beside a "
            "training that it does not describe). Fine-tuning computes gradients of all weights and holds AdamW's "
            "moments of them; the branch's are of the copy alone. Floor: a prediction. Ceiling: fine-tuning. Held: "
            "weights, gradients, moments and what the backward pass reads, in float32, attention as plain products, "
            "without checkpointing; text encoder and VAE are left out, as both steps can do without them (cached)."
        )


def make_cost(base: Backbone, plan: Plan, out: Path, on_row: Callable[[str], None] = lambda name: None) -> Cost:
    """Make the table and write it into a folder: ``cost.json`` and ``cost.md``.

    ``on_row``: as with ``make_table2``. ``plan.steps``: how many steps of each kind are timed.
    """
    rows = _rows(base, _Steps(base), on_row, plan.steps)
    full = random_base(FULL_SIZE, torch.float32, "meta")
    rows += _rows(full, _Steps(full), lambda name: on_row(f"{name}, {FULL_SIZE}"))
    facts = {"base": base.name, "batch": BATCH, "pixels": f"{base.size}, {full.size}", "timed steps": plan.steps}
    table = Cost(rows, facts | {"threads": torch.get_num_threads(), "device": base.device.type}, "")
    return write_report(out, "cost", table, HEAD, {})


class _Steps:
    """The three steps on a base, with latents, texts and hints drawn at random: their losses, and what learns."""

    def __init__(self, base: Backbone) -> None:
        self._base, device = base, base.device
        self._own = base.with_own_denoiser()
        self.learning: dict[str, nn.Module | None] = {
            FLOOR: None,
            TUNED: self._own.denoiser.train().requires_grad_(True),
            BRANCH: new_control(base).train().requires_grad_(True),
        }
        shape = (BATCH, *base.latent_shape((base.size, base.size)))
        generator = torch_rng("cost")
        self._z, self._target = (torch.randn(shape, generator=generator, device="cpu").to(device) for _ in range(2))
        self._hints = torch.rand(BATCH, 3, base.size, base.size, generator=generator, device="cpu").to(device)
        self._t = torch.full((BATCH,), base.noise.count // 2, device=device)
        with torch.no_grad():
            self._text = base.encode_text([""] * BATCH)

    def held(self, name: str) -> list[nn.Module]:
        """The networks whose weights a step needs."""
        branch = self.learning[BRANCH]
        assert branch is not None
        return [self._base.denoiser, branch] if name == BRANCH else [self._base.denoiser]

    def loss(self, name: str) -> Tensor:
        """A step's loss (); its gradients are not computed yet."""
        kind = self._base.device.type
        plain = kind == "meta"
        with nullcontext() if plain else autocast(kind), nullcontext() if plain else training_attention(kind):
            with torch.set_grad_enabled(name != FLOOR):
                return F.mse_loss(self._prediction(name).float(), self._target)

    def _prediction(self, name: str) -> Tensor:
        read = self._z, self._t, self._text
        if name != BRANCH:
            return (self._own if name == TUNED else self._base).predict(*read)
        branch: Any = self.learning[BRANCH]
        return self._base.predict(
            *read, [ActiveControl(branch, branch.encode_hint(self._base.hint_input(self._hints)))]
        )


def _rows(base: Backbone, steps: _Steps, on_row: Callable[[str], None], timed: int = 0) -> list[Row]:
    """The rows of a base: counted, and where ``timed`` is not 0, the median time of so many steps of each in turns."""
    rows = []
    for name, title in TITLES.items():
        on_row(name)
        learning = steps.learning[name]
        flops, held = _counted(steps, name)
        trained = sum(parameter.numel() for parameter in learning.parameters()) if learning else 0
        rows.append(Row(name, title, base.name, trained, flops, held))
    if timed:
        seconds = _timed(steps, timed)
        rows = [replace(row, seconds=seconds[row.name]) for row in rows]
    [whole] = (row for row in rows if row.name == TUNED)
    return [replace(row, shares=_shares(row, whole)) for row in rows]


def _shares(row: Row, whole: Row) -> dict[str, float]:
    shares = {"flops": row.flops / whole.flops, "held": row.held.total / whole.held.total}
    if row.seconds and whole.seconds:
        shares["seconds"] = row.seconds / whole.seconds
    return shares


def _counted(steps: _Steps, name: str) -> tuple[float, Held]:
    """The operations of a step, forward and backward, and what it holds."""
    learning, networks = steps.learning[name], steps.held(name)
    weights = {StorageWeakRef(one.untyped_storage()) for network in networks for one in network.parameters()}
    if learning is not None:
        weights |= {StorageWeakRef(one.untyped_storage()) for one in learning.parameters()}
    kept: dict[StorageWeakRef, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if (known := StorageWeakRef(storage)) not in weights:
            kept[known] = storage.nbytes()
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = steps.loss(name)
        if learning is not None:
            loss.backward()
    gradients = 0
    if learning is not None:
        gradients = sum(one.numel() * one.element_size() for one in learning.parameters())
        learning.zero_grad()
    moments = state_bytes(learning, "adamw") if learning is not None else 0
    held = Held(bytes_of(networks), gradients, moments, sum(kept.values()))
    return float(counter.get_total_flops()), held


def _timed(steps: _Steps, count: int) -> dict[str, float]:
    """Median seconds of ``count`` steps of each kind, with the optimizer's, made in turns after one that warms up."""
    optimizers = {name: Optimizer(one) for name, one in steps.learning.items() if one is not None}
    taken: dict[str, list[float]] = {name: [] for name in TITLES}
    for _ in range(count + 1):
        for name, own in taken.items():
            began = time.perf_counter()
            loss = steps.loss(name)
            if name in optimizers:
                loss.backward()
                optimizers[name].step(0.0)
            loss.item()  # waits for a GPU
            own.append(time.perf_counter() - began)
    return {name: float(np.median(own[1:])) for name, own in taken.items()}
