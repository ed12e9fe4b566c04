"""Controlled sampling: guidance and the loop over timesteps, as an iterator of finished pictures.

The hint is encoded once a picture; a control whose strength is zero on a step is not run on it; both halves of
classifier-free guidance go through in one batch, after the hint was read once for both.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from controlkit.annotators import contract
from controlkit.backbones import ActiveControl, Backbone, TextEmbedding
from controlkit.branch import ControlNetwork, Tap
from controlkit.errors import UserError
from controlkit.formats import SavedControl
from controlkit.images import HintSpec, to_pictures

PLAIN_PROMPT = "a high-quality, detailed, and professional image"
"""The paper's prompt for no prompt ("insufficient prompt", Section 4.2)."""


@dataclass(frozen=True)
class Control:
    """A control in use. ``start`` and ``end`` are shares of the steps, as elsewhere in the field.

    ``guess``: the paper's guess mode, for use without a prompt. The control speaks to the conditional half alone, and
    the less the finer the resolution (a tenth at the finest, all of it at the middle).
    """

    branch: ControlNetwork
    hint: HintSpec
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False
    hints: Mapping[str, HintSpec] = field(default_factory=dict)
    """A Union's contracts by type; what a type's name means everywhere, where it has none."""
    hint_cfg_scale: float = 1.0
    """How many times guidance counts the hint, at most as many as the prompt (``SamplingSettings.guidance``).

    1 is as released: both halves of guidance hear the control, so that the difference it is made of is the prompt's.
    The paper's other way, control in the conditional half alone (Section 3.4), counts a hint as often as the prompt.
    Between them the unconditional half hears a share of it.
    """

    @classmethod
    def of(
        cls, saved: SavedControl, scale: float = 1.0, guess: bool = False, hint_cfg_scale: float | None = None
    ) -> "Control":
        """A control that was read, in use; counted by guidance as it says itself, unless told."""
        counted = saved.hint_cfg_scale if hint_cfg_scale is None else hint_cfg_scale
        return cls(saved.branch, saved.hint, scale, guess=guess, hints=saved.hints, hint_cfg_scale=counted)

    def unconditional_share(self, guidance: float) -> float:
        """The share of its strength that guidance's unconditional half hears.

        With share u, a residual's first-order effect r comes out of u r + guidance (r - u r) as r (guidance - u
        (guidance - 1)): u is what makes that ``self.hint_cfg_scale`` times r.
        """
        if self.guess or self.branch.pools:
            return 0.0
        return max(guidance - self.hint_cfg_scale, 0.0) / (guidance - 1) if guidance > 1 else 1.0


@dataclass(frozen=True)
class SamplingSettings:
    """How to sample. ``size`` is (height, width) in pixels; None is the base's own."""

    steps: int = 20
    guidance: float = 4.0
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Job:
    """One picture to make.

    ``hints`` holds one hint for each control, a picture, uint8 (H, W, 3), or an array as ``HintSpec.tensor`` reads it; for
    a Union control, its hint pictures by type.
    ``negative``: what to keep away from; None is no prompt at all (for SDXL not the same as an empty one).
    """

    prompt: str
    seed: int
    hints: tuple[np.ndarray | Mapping[str, np.ndarray], ...] = ()
    negative: str | None = None


@dataclass(frozen=True)
class Picture:
    """A finished picture, uint8 (H, W, 3), with its job and final latents (C, h, w)."""

    job: Job
    pixels: np.ndarray
    latents: Tensor


def picture_size(base: Backbone, settings: SamplingSettings) -> tuple[int, int]:
    """The size to make, checked against what the base can make."""
    height, width = settings.size or (base.size, base.size)
    if height % base.multiple or width % base.multiple or min(height, width) <= 0:
        good = [max(round(side / base.multiple), 1) * base.multiple for side in (height, width)]
        raise UserError(
            f'The base "{base.name}" makes pictures with sides that {base.multiple} divides; got {width}x{height}. '
            f"The nearest is {good[1]}x{good[0]}."
        )
    return height, width


def strength_table(
    controls: Sequence[Control], taps: Sequence[Tap], rows: int, unconditional: int, settings: SamplingSettings
) -> Tensor:
    """The strength of every control on every row, tap and step: (control, row, tap, step, 1, 1).

    One formula serves all: guess mode, guidance by the hint, weights by resolution, start and end, region masks are
    ways to fill it. The first ``unconditional`` rows are guidance's unconditional half.
    """
    steps = settings.steps
    table = torch.zeros(len(controls), rows, len(taps), steps, 1, 1)
    index = {tap.name: k for k, tap in enumerate(taps)}
    at = torch.arange(steps) / steps
    for i, control in enumerate(controls):
        active = (at >= control.start) & (at + 1 / steps <= control.end + 1e-6)
        own = [tap.name for tap in control.branch.taps]
        # A pooled control gives colours, not places: the same at every resolution, as released (version 1.1, shuffle).
        weights = (
            torch.logspace(-1, 0, len(own)) if control.guess and not control.branch.pools else torch.ones(len(own))
        )
        for name, weight in zip(own, weights.tolist(), strict=True):
            table[i, :, index[name]] = weight * control.scale * active.float().view(-1, 1, 1)
        table[i, :unconditional] *= control.unconditional_share(settings.guidance)
    return table


HintTensors = Tensor | Mapping[str, Tensor]
"""A control's hints as its branch reads them; a Union's by type."""


def _for_rows(features: HintTensors, times: int) -> HintTensors:
    """Features of B pictures for ``times`` x B rows: read once, used for both halves of guidance."""
    if isinstance(features, Tensor):
        return features.repeat(times, *[1] * (features.dim() - 1))
    return {name: one.repeat(times, *[1] * (one.dim() - 1)) for name, one in features.items()}


@torch.no_grad()
def denoise(
    base: Backbone,
    latents: Tensor,
    text: TextEmbedding,
    hints: Sequence[HintTensors],
    controls: Sequence[Control],
    settings: SamplingSettings,
    strength: Tensor | None = None,
) -> Iterator[Tensor]:
    """The sampling loop; yields the latents after each step.

    Args:
        latents: starting noise (B, C, h, w), standard normal.
        text: of 2B prompts with guidance (unconditional rows first), else of B.
        hints: one for each control, (B, channels, H, W) in its contract's range; a Union's by type.
        strength: broadcastable to (control, row, tap, step, h, w), taps as the base's; default from each control's
            scale, start, end, guess mode and guidance.
    """
    count, rows = len(latents), len(text)
    sampler = base.noise.sampler(settings.steps)
    x = sampler.start(latents)
    if strength is None:
        strength = strength_table(controls, base.taps, rows, rows - count, settings)
    full = (len(controls), rows, len(base.taps), settings.steps)
    strength = strength.expand(*full, *strength.shape[-2:]).to(x.device)
    used = strength.ne(0).any(-1).any(-1).any(1).any(1).tolist()  # (control, step): one host sync, before the loop
    with base.autocast():
        features = [
            _for_rows(c.branch.encode_hint(h), rows // count) if any(at) else {}
            for c, h, at in zip(controls, hints, used, strict=True)
        ]
        for step, timestep in enumerate(sampler.timesteps):
            both = sampler.scaled(x, timestep).repeat(rows // count, 1, 1, 1).to(base.dtype)
            t = timestep.to(x.device).expand(rows)
            parts = []
            for i, control in enumerate(controls):
                if used[i][step]:
                    at = {tap.name: strength[i, :, k, step][:, None] for k, tap in enumerate(base.taps)}
                    parts.append(ActiveControl(control.branch, features[i], at))
            prediction = base.predict(both, t, text, parts).float()
            if rows > count:
                unconditional, conditional = prediction.chunk(2)
                prediction = unconditional + settings.guidance * (conditional - unconditional)
            x = sampler.step(prediction, timestep, x)
            yield x


def _hint_tensors(base: Backbone, control: Control, given: Sequence, size: tuple[int, int]) -> HintTensors:
    """A control's hints of several jobs, (B, channels, *size), in the base's type."""

    def read(pictures: Sequence[np.ndarray], hint: HintSpec) -> Tensor:
        pixels = torch.cat([hint.tensor(picture, size) for picture in pictures]).to(base.device, base.dtype)
        return base.hint_input(pixels)

    if not isinstance(given[0], Mapping):
        return read(given, control.hint)
    if any(one.keys() != given[0].keys() for one in given):
        raise UserError("The pictures of one batch have hints of different types: expected the same types for all.")
    return {
        name: read(
            [one[name] for one in given],
            control.hints.get(name) or control.hint.made_by(contract(name, foreign=True)),
        )
        for name in given[0]
    }


def generate(
    base: Backbone,
    jobs: Sequence[Job],
    controls: Sequence[Control] = (),
    settings: SamplingSettings | None = None,
    batch: int = 16,
    on_step: Callable[[int], None] = lambda pictures: None,
) -> Iterator[Picture]:
    """Make the jobs' pictures, in order, ``batch`` at a time; half as many from then on where memory runs out.

    The starting noise of a job depends on its seed alone, as ``torch.Generator().manual_seed(seed)`` gives it.
    ``on_step(n)`` is called after each step with the number of pictures it advanced.
    """
    settings = settings or SamplingSettings()
    most = base.noise.count
    if not 1 <= settings.steps <= most:
        raise UserError(f'Sampling takes 1 to {most} steps on the base "{base.name}"; got {settings.steps}.')
    height, width = picture_size(base, settings)
    first = 0
    while first < len(jobs):
        chunk = jobs[first : first + batch]
        try:
            made = _together(base, chunk, controls, settings, (height, width), on_step)
        except torch.OutOfMemoryError:
            if len(chunk) == 1:
                raise
            batch = len(chunk) // 2
            continue
        yield from made
        first += len(chunk)


def _together(
    base: Backbone,
    jobs: Sequence[Job],
    controls: Sequence[Control],
    settings: SamplingSettings,
    size: tuple[int, int],
    on_step: Callable[[int], None],
) -> list[Picture]:
    """The pictures of these jobs, made as one batch."""
    shape = (1, *base.latent_shape(size))
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(job.seed)) for job in jobs]
    final = noise = torch.cat(draws).to(base.device)
    prompts: list[str | None] = [job.prompt for job in jobs]
    if settings.guidance != 1.0:
        prompts = [job.negative for job in jobs] + prompts
    text = base.encode_text(prompts, size)
    hints = [_hint_tensors(base, control, [job.hints[i] for job in jobs], size) for i, control in enumerate(controls)]
    for latents in denoise(base, noise, text, hints, controls, settings):
        final = latents
        on_step(len(jobs))
    with base.autocast():
        decoded = base.decode_latents(final)
    return [Picture(*made) for made in zip(jobs, to_pictures(decoded), final, strict=True)]
