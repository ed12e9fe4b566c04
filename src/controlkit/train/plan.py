"""An estimate of what a run will need, made before it starts: memory by part, and the time of a step.

Weights, gradients, optimizer and data are counted. What a part of a batch needs beside them is measured on zeros: first
with 2 and 4 pairs, from which the whole is estimated, then with all of them, where that fits.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from controlkit.backbones import Backbone, TextEmbedding, recomputed
from controlkit.backbones.memory import Held, Meter, bytes_of
from controlkit.data.cache import AT_ONCE
from controlkit.precision import autocast, training_attention
from controlkit.train.optimizers import state_bytes
from controlkit.train.parts import BatchPlan, Resolved
from controlkit.train.state import TrainState
from controlkit.train.step import Batch, objective

_MAPPED = "cached pairs"
"""Mapped from their file: in memory only where there is room."""


@dataclass(frozen=True)
class Plan:
    """An estimate. ``parts``: bytes of the device's memory in a step, by what they are for. ``caching``: the most while
    latents are made. ``free``: bytes the device had left. ``seconds``: of a step; None where its parts do not fit.
    ``minutes``: the run's budget, if it has one."""

    parts: Mapping[str, int]
    caching: int
    free: int
    seconds: float | None
    steps: int
    minutes: float | None = None

    @property
    def peak(self) -> int:
        """The most bytes that will be held at once, without evaluations."""
        return max(sum(self.parts.values()), self.caching)

    def lines(self) -> list[str]:
        """Describe it for the user: a table of the memory by part, and the time."""
        width = max(map(len, self.parts))
        rows = [f"  {name:<{width}}  {format_bytes(size):>8}" for name, size in self.parts.items()]
        lines = [f"estimated memory: {format_bytes(self.peak)}; in a step", *rows]
        if self.caching == self.peak:
            lines.append(f"  and while latents are made, the most: {format_bytes(self.caching)}")
        if self.seconds is None:
            advice = "raise gradient_accumulation, or set gradient_checkpointing: true"
            return [*lines, f"That does not fit in the {format_bytes(self.free)} left here: {advice}."]
        whole, budget = self.seconds * self.steps, 60 * (self.minutes or math.inf)
        if budget < whole:
            made = f"max_minutes, enough for at most {max(int(budget / self.seconds), 1):,} of {self.steps:,} steps"
            return [*lines, f"estimated time: {_span(budget)} ({made}), {self.seconds:.2g} s a step"]
        return [
            *lines,
            f"estimated time: {_span(whole)}, {self.seconds:.2g} s a step; caching and evaluations take more",
        ]


def _span(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.1f} minutes"


def estimate(plan: Resolved, base: Backbone, state: TrainState, pairs: int, meter: Meter, processes: int = 1) -> Plan:
    """Estimate what a run on ``pairs`` pairs needs; ``meter`` was made before ``state``. Leaves no gradients.

    Where the base is unfrozen at some step, the estimate is of the steps after it.
    """
    batches, compute = plan.batches, plan.compute
    parts = {"base": bytes_of(base.networks().values()), "branch": bytes_of([state.branch])}
    if state.base is not base:
        parts["base's copy that learns"] = bytes_of([state.base.denoiser])
    if state.average:
        parts["average of the weights"] = bytes_of([state.average.module])
    here = sum(parts.values())
    learning = sum(p.numel() * p.element_size() for p in state.learning.parameters() if p.requires_grad)
    parts["gradients"] = learning
    parts[f"optimizer ({plan.learning.optimizer})"] = state_bytes(state.learning, plan.learning.optimizer)
    if base.device.type == "cpu":
        parts[_MAPPED] = _cached_bytes(base, batches, pairs)
    count = batches.pairs // compute.gradient_accumulation // processes
    work = partial(_micro_batch, batches, compute.gradient_checkpointing, state)
    held = 0 if compute.gradient_accumulation > 1 else learning  # of one part: the most is held before gradients are
    free = needed = meter.free()
    seconds = None
    with suppress(torch.OutOfMemoryError):  # the run will take more parts; an estimate must not end it
        needed = peak_of(work, count) - held
        if sum(parts.values()) - parts.get(_MAPPED, 0) - here + needed < free:
            for _ in range(2):  # the first time kernels are chosen, and on some machines made
                started = time.perf_counter()
                work(count)
                if base.device.type == "cuda":
                    torch.cuda.synchronize(base.device)
                seconds = compute.gradient_accumulation * (time.perf_counter() - started)
            needed = meter.peak() - here - held
    state.learning.zero_grad()
    parts["micro-batch: features, libraries"] = max(needed, 0)
    caching = here + peak_of(partial(_encode, base), min(AT_ONCE, pairs))
    return Plan(parts, caching, free, seconds, plan.rates.steps, plan.rates.max_minutes)


def peak_of(work: Callable[[int], Any], count: int) -> int:
    """Estimate the most bytes of tensors that ``work(count)`` makes and holds, from ``work(2)`` and ``work(4)``.

    After each operation the held bytes grow linearly with the count. Memory inside kernels is not measured.
    """
    few = _held_bytes(work, min(count, 2))
    if count <= 2:
        return max(few)
    more = _held_bytes(work, min(count, 4))
    if count <= 4:
        return max(more)
    steps = (count - 2) / 2
    if len(few) != len(more):  # other operations: from their maxima
        few, more = [max(few)], [max(more)]
    return int(max(a + steps * (b - a) for a, b in zip(few, more, strict=True)))


def _held_bytes(work: Callable[[int], Any], count: int) -> list[int]:
    with Held() as held:
        work(count)
    return held.after


def _micro_batch(plan: BatchPlan, checkpointing: bool, state: TrainState, pairs: int) -> None:
    """Run forward and backward pass of ``pairs`` pairs of zeros; of a Union its types in turn."""
    base, branch = state.base, state.branch
    rows, side, device = pairs * plan.noises_per_pair, base.size // base.stride, base.device
    latents = torch.zeros(rows, base.latent_channels, side, side, device=device)
    text = base.encode_text([""]).to(device, torch.float32)
    kinds = list(plan.specs)
    hints = {}
    for place, kind in enumerate(kinds):
        if own := len(range(place, pairs, len(kinds))):
            hints[kind] = torch.zeros(own, plan.specs[kind].channels, base.size, base.size, device=device)
    times = torch.zeros(rows, dtype=torch.long, device=device)
    batch = Batch(latents, torch.zeros_like(latents), times, text[[0] * rows], hints, plan.noises_per_pair)
    attention = partial(training_attention, device.type)
    state.learning.zero_grad()
    with recomputed(branch, base.denoiser, within=attention) if checkpointing else nullcontext():
        with autocast(device.type), attention():
            loss = objective(base, branch, batch)
        loss.backward()


def _encode(base: Backbone, pictures: int) -> None:
    with base.autocast():
        base.encode_moments(torch.zeros(pictures, 3, base.size, base.size, device=base.device))


def _cached_bytes(base: Backbone, plan: BatchPlan, pairs: int) -> int:
    """Estimate the cache's bytes, as if no two pairs had the same prompt."""
    side = base.size // base.stride
    pairs *= 2 if plan.flip else 1
    masked = any(spec.mask_value is not None for spec in plan.specs.values())
    channels = max(3, *(spec.channels for spec in plan.specs.values())) + masked
    text: TextEmbedding = base.encode_text([""])
    words = sum(value.numel() for value in text.tensors().values())
    return pairs * (2 * 2 * base.latent_channels * side**2 + channels * base.size**2 + 2 * words + 16)


def format_bytes(size: int) -> str:
    """Write a number of bytes in MB or GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e10 else f"{size / 1e6:.0f} MB"
