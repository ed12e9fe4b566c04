"""Controlled sampling: guidance and the loop over timesteps, as an iterator of finished pictures.

The hint is encoded once a picture; a control whose strength is zero on a step is not run on it; both halves of
classifier-free guidance go through in one batch, after the hint was read once for both.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from controlkit.backbones import UNetBase
from controlkit.branch import ControlBranch, add_residuals
from controlkit.errors import UserError
from controlkit.images import Hint, to_pictures
from controlkit.precision import autocast

PLAIN_PROMPT = "a high-quality, detailed, and professional image"
"""The paper's prompt for no prompt ("insufficient prompt", Section 4.2)."""


@dataclass(frozen=True)
class Control:
    """A control in use. ``start`` and ``end`` are shares of the steps, as elsewhere in the field."""

    branch: ControlBranch
    hint: Hint
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class Settings:
    """How to sample. ``size`` is (height, width) in pixels; None is the base's own."""

    steps: int = 20
    guidance: float = 4.0
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Job:
    """One picture to make: ``hints`` holds one hint picture, uint8 (H, W, 3), for each control."""

    prompt: str
    seed: int
    hints: tuple[np.ndarray, ...] = ()
    negative: str = ""


@dataclass(frozen=True)
class Picture:
    """A finished picture, uint8 (H, W, 3), with its job and final latents (C, h, w)."""

    job: Job
    pixels: np.ndarray
    latents: Tensor


def picture_size(base: UNetBase, settings: Settings) -> tuple[int, int]:
    """The size to make, checked against what the base can make."""
    height, width = settings.size or (base.size, base.size)
    if height % base.multiple or width % base.multiple or min(height, width) <= 0:
        good = [max(round(side / base.multiple), 1) * base.multiple for side in (height, width)]
        raise UserError(
            f'The base "{base.name}" makes pictures with sides that {base.multiple} divides; got {width}x{height}. '
            f"The nearest is {good[1]}x{good[0]}."
        )
    return height, width


def strength_table(controls: Sequence[Control], rows: int, taps: int, steps: int) -> Tensor:
    """The strength of every control on every row, tap and step: (control, row, tap, step, 1, 1).

    One formula serves all: guess mode, weights by resolution, start and end, region masks are ways to fill it.
    """
    table = torch.zeros(len(controls), rows, taps, steps, 1, 1)
    at = torch.arange(steps) / steps
    for i, control in enumerate(controls):
        active = (at >= control.start) & (at + 1 / steps <= control.end + 1e-6)
        table[i] = control.scale * active.float().view(1, 1, -1, 1, 1)
    return table


def _strength_at(strength: Tensor, tap: int, step: int, size: tuple[int, int]) -> Tensor:
    """The strength of one control at a tap and step, (row, 1, h, w), brought to the tap's size if it is a map."""
    value = strength[:, tap, step][:, None]
    return value if value.shape[-2:] == (1, 1) else F.interpolate(value, size, mode="area")


@torch.no_grad()
def denoise(
    base: UNetBase,
    latents: Tensor,
    text: Tensor,
    hints: Sequence[Tensor],
    controls: Sequence[Control],
    settings: Settings,
    strength: Tensor | None = None,
) -> Iterator[Tensor]:
    """The sampling loop; yields the latents after each step.

    Args:
        latents: starting noise (B, C, h, w), standard normal.
        text: prompt embeddings, (2B, L, D) with guidance (unconditional rows first), else (B, L, D).
        hints: one tensor a control, (B, channels, H, W) in its contract's range.
        strength: broadcastable to (control, row, tap, step, h, w); default from each control's scale, start and end.
    """
    count = latents.shape[0]
    rows = text.shape[0]
    scheduler = type(base.scheduler).from_config(base.scheduler.config)
    scheduler.set_timesteps(settings.steps)
    x = latents * scheduler.init_noise_sigma
    if strength is None:
        strength = strength_table(controls, rows, len(base.taps), settings.steps)
    full = (len(controls), rows, len(base.taps), settings.steps)
    strength = strength.expand(*full, *strength.shape[-2:]).to(x.device)
    used = strength.ne(0).any(-1).any(-1).any(1).any(1).tolist()  # (control, step): one host sync, before the loop
    with autocast(x.device.type):
        features = [
            c.branch.encode_hint(h).repeat(rows // count, 1, 1, 1) for c, h in zip(controls, hints, strict=True)
        ]
        for step, timestep in enumerate(scheduler.timesteps):
            scaled = scheduler.scale_model_input(x, timestep)
            both = scaled.repeat(rows // count, 1, 1, 1)
            t = timestep.to(x.device).expand(rows)
            parts: list[tuple[dict[str, Tensor], dict[str, Tensor | float]]] = []
            for i, control in enumerate(controls):
                if used[i][step]:
                    residuals = control.branch(both, t, text, features[i])
                    scales: dict[str, Tensor | float] = {
                        tap.name: _strength_at(strength[i], k, step, residuals[tap.name].shape[-2:])
                        for k, tap in enumerate(base.taps)
                        if tap.name in residuals
                    }
                    parts.append((residuals, scales))
            prediction = base.decode_noise(base.encode_noise(both, t, text), add_residuals(parts)).float()
            if rows > count:
                unconditional, conditional = prediction.chunk(2)
                prediction = unconditional + settings.guidance * (conditional - unconditional)
            x = scheduler.step(prediction, timestep, x).prev_sample
            yield x


def generate(
    base: UNetBase,
    jobs: Sequence[Job],
    controls: Sequence[Control] = (),
    settings: Settings | None = None,
    batch: int = 16,
    on_step: Callable[[int], None] = lambda pictures: None,
) -> Iterator[Picture]:
    """Make the jobs' pictures, in order, ``batch`` at a time.

    The starting noise of a job depends on its seed alone, as ``torch.Generator().manual_seed(seed)`` gives it.
    ``on_step(n)`` is called after each step with the number of pictures it advanced.
    """
    settings = settings or Settings()
    most = base.scheduler.config.num_train_timesteps
    if not 1 <= settings.steps <= most:
        raise UserError(f'Sampling takes 1 to {most} steps on the base "{base.name}"; got {settings.steps}.')
    height, width = picture_size(base, settings)
    channels = base.unet.config.in_channels
    shape = (1, channels, height // base.stride, width // base.stride)
    for first in range(0, len(jobs), batch):
        chunk = jobs[first : first + batch]
        draws = [torch.randn(shape, generator=torch.Generator().manual_seed(job.seed)) for job in chunk]
        final = noise = torch.cat(draws).to(base.device)
        prompts = [job.prompt for job in chunk]
        if settings.guidance != 1.0:
            prompts = [job.negative for job in chunk] + prompts
        text = base.encode_text(prompts)
        hints = [
            torch.cat([control.hint.tensor(job.hints[i], (height, width)) for job in chunk]).to(base.device)
            for i, control in enumerate(controls)
        ]
        for latents in denoise(base, noise, text, hints, controls, settings):
            final = latents
            on_step(len(chunk))
        with autocast(base.device.type):
            decoded = base.decode_latents(final)
        for job, pixels, latents in zip(chunk, to_pictures(decoded), final, strict=True):
            yield Picture(job, pixels, latents)
