"""Controlled sampling: guidance and the loop over timesteps, as an iterator of steps and finished pictures.

The hint is encoded once a picture; a control whose scale is zero on a step is not run on it; both halves of
classifier-free guidance go through in one batch, after the hint was read once for both.
"""

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from controlkit.backbones import ActiveControl, Backbone, TextEmbedding
from controlkit.backbones.noise import Noises
from controlkit.errors import Invalid, OutOfRoom
from controlkit.formats import SavedControl
from controlkit.images import to_pictures
from controlkit.sample.memory import settle, settle_lower
from controlkit.sample.prepare import Prepared, PreparedControl, SamplingSettings, picture_size, prepare
from controlkit.sample.preview import Previewer, clean_latents
from controlkit.sample.request import Picture, Request, Step
from controlkit.sample.scales import scale_table
from controlkit.sample.texts import Said

HintTensors = Tensor | Mapping[str, Tensor]
"""A control's hints (B, channels, H, W) as its network reads them; a Union's by type."""
Maker = Callable[[Sequence[Request]], Iterable[Picture]]
"""Anything that makes the pictures of requests, in their order."""


@dataclass(frozen=True)
class Denoised:
    """The result of one step of ``denoise``; latents are (B, C, h, w)."""

    step: int
    """Its number, from 0."""
    latents: Tensor
    """After the step."""
    read: Tensor
    """The noisy latents that the base read."""
    prediction: Tensor
    """Its prediction for them, with guidance."""
    timestep: Tensor


class Steering(NamedTuple):
    """One control of a batch of B pictures."""

    control: PreparedControl
    hints: HintTensors
    """In its contracts' ranges."""
    region: Tensor | None = None
    """Where it acts, (B, 1, H, W) in [0, 1], of any size; None is everywhere."""
    scales: Tensor | None = None
    """Broadcastable to (row, tap, step, h, w), taps as the base's; by default ``scale_table``'s."""


def _for_rows(features: HintTensors, times: int) -> HintTensors:
    """Features of B pictures for ``times`` x B rows: read once, used for both halves of guidance."""
    if isinstance(features, Tensor):
        return features.repeat(times, *[1] * (features.dim() - 1))
    return {name: one.repeat(times, *[1] * (one.dim() - 1)) for name, one in features.items()}


def _encoded(control: PreparedControl, hints: HintTensors) -> HintTensors:
    """The features of hints, read once for all steps."""
    return control.network.encode_hint(hints, *([control.strengths] if control.strengths else []))


def _guided(prediction: Tensor, settings: SamplingSettings) -> Tensor:
    """The prediction (B, C, h, w) of guidance, given the unconditional ones, then of each prompt that is joined."""
    unconditional, *parts = prediction.chunk(1 + len(settings.weights))
    away = [weight * (part - unconditional) for weight, part in zip(settings.weights, parts, strict=True)]
    together = sum(away[1:], away[0])
    guided = unconditional + settings.guidance * together
    if not settings.guidance_rescale:
        return guided
    spread = [one.std((1, 2, 3), keepdim=True) for one in (unconditional + together, guided)]
    return torch.lerp(guided, guided * (spread[0] / spread[1]), settings.guidance_rescale)


@torch.no_grad()
def denoise(
    base: Backbone,
    latents: Tensor,
    text: TextEmbedding | Said,
    controls: Sequence[Steering],
    settings: SamplingSettings,
    span: range | None = None,
    noises: Noises = None,
) -> Iterator[Denoised]:
    """The sampling loop; yields after each step.

    Args:
        latents: (B, C, h, w). Before step 0, standard normal noise; before a later one, noisy latents as they are
            there: an earlier run's after the step before, or a picture's with that much noise added.
        text: of B prompts for each of ``settings.weights``; with guidance, B unconditional ones before them.
        span: the steps to make, of 0 to ``settings.steps`` - 1; all by default.
        noises: of each picture, what the scheduler draws noise from, if it draws any.
    """
    count, rows = len(latents), len(text)
    sampler = base.noise.sampler(settings.steps, settings.scheduler, noises)
    span = range(len(sampler.timesteps)) if span is None else span
    x = latents if span.start else sampler.start(latents)
    active_at = _active(base, controls, settings, count, span)
    for step in span:
        timestep = sampler.timesteps[step]
        read = sampler.scaled(x, timestep)
        t = timestep.to(x.device).expand(rows)
        active = active_at(step)
        with base.autocast():  # not around the yield: whoever iterates computes in his own number format
            both = read.repeat(rows // count, 1, 1, 1).to(base.dtype)
            prediction = base.predict(both, t, text.at(step), active).float()
            if settings.is_guided:
                prediction = _guided(prediction, settings)
            x = sampler.step(prediction, timestep, x)
        yield Denoised(step, x, read, prediction, timestep)


def _active(
    base: Backbone, controls: Sequence[Steering], settings: SamplingSettings, count: int, span: range
) -> Callable[[int], list[ActiveControl]]:
    """The controls that act at a step, each with its scales there; hints are read now, once for all steps."""
    times = len(settings.weights) + settings.is_guided
    unconditional = count if settings.is_guided else 0
    table = scale_table([one.control for one in controls], base.taps, times * count, unconditional, settings)
    full = (times * count, len(base.taps), settings.steps)
    given = [own if one.scales is None else one.scales for one, own in zip(controls, table, strict=True)]
    scales = [one.expand(*full, *one.shape[-2:]).to(base.device) for one in given]
    used = [one.ne(0).any(-1).any(-1).any(0).any(0).tolist() for one in scales]  # by step: no host sync in the loop
    base.bring("denoiser")  # and the controls with it
    with base.autocast():
        features = [
            _for_rows(_encoded(one.control, one.hints), times) if any(used[i][k] for k in span) else {}
            for i, one in enumerate(controls)
        ]
    everywhere = torch.ones(1, device=base.device)
    where = [
        everywhere if one.region is None else one.region.to(base.device).repeat(times, 1, 1, 1) for one in controls
    ]

    def at(step: int) -> list[ActiveControl]:
        found = []
        for i, one in enumerate(controls):
            if used[i][step]:
                taps = {tap.name: scales[i][:, k, step][:, None] * where[i] for k, tap in enumerate(base.taps)}
                found.append(ActiveControl(one.control.network, features[i], taps))
        return found

    return at


def _hint_tensors(base: Backbone, controls: Sequence[PreparedControl], size: tuple[int, int]) -> HintTensors:
    """The hints (B, channels, *size) of one control of several pictures, in the base's type."""

    def read(kind: str) -> Tensor:
        pixels = torch.cat([control.specs[kind].tensor(control.hints[kind], size) for control in controls])
        return base.hint_input(pixels.to(base.device, base.dtype))

    first = controls[0]
    with base.autocast():  # for a base whose hints are latents
        return {kind: read(kind) for kind in first.hints} if first.network.hint_types else read("")


def _region(column: Sequence[PreparedControl], size: tuple[int, int]) -> Tensor | None:
    """Where a control acts in each picture (B, 1, *size); None where it is everywhere in all of them."""
    if all(control.region is None for control in column):
        return None
    whole = np.ones(size, np.float32)
    maps = [whole if control.region is None else control.region for control in column]
    return torch.from_numpy(np.stack(maps)[:, None])


def generate(
    base: Backbone, requests: Sequence[Request] | Sequence[Prepared], batch: int = 16
) -> Generator[Step | Picture, None, None]:
    """Make pictures, in the order of the requests: a ``Step`` for each step of a batch, then its ``Picture`` records.

    Neighbours that share all but prompts, seeds and hints are made together, ``batch`` at most; where memory runs out,
    half as many from then on. Close the iterator to cancel: nothing is computed after the step last yielded. Requests
    are prepared here, their notes given as warnings; see ``prepare`` for what it raises.
    """
    plain = [one for one in requests if isinstance(one, Request)]
    prepared = [one for one in requests if isinstance(one, Prepared)]
    if len(plain) < len(requests) and len(prepared) < len(requests):
        kinds = ", ".join(sorted({type(one).__name__ for one in requests}))
        raise Invalid(f"Expected Requests, or the results of prepare, and got {kinds}: give one kind of them.")
    if plain:
        prepared = prepare(base, plain)
        for note in dict.fromkeys(note for one in prepared for note in one.notes):
            warnings.warn(note, stacklevel=2)
    return _generate(base, prepared, batch)


def _generate(base: Backbone, prepared: list[Prepared], batch: int) -> Generator[Step | Picture, None, None]:
    previewer = Previewer(base)
    batch = settle(base, prepared, batch)
    while prepared:
        alike = list(takewhile(prepared[0].is_like, prepared[:batch]))
        try:
            made = yield from _one_batch(base, alike, previewer)
        except torch.OutOfMemoryError as error:
            if len(alike) == 1 and settle_lower(base, prepared):
                continue
            if len(alike) == 1:
                raise OutOfRoom(
                    f"The device's memory does not hold one picture of this size ({str(error).splitlines()[0]}). "
                    "Take a smaller size, weights of half precision, or another device."
                ) from error
            batch = len(alike) // 2
            continue
        yield from made
        prepared = prepared[len(alike) :]


def _one_batch(base: Backbone, alike: Sequence[Prepared], previewer: Previewer) -> Generator[Step, None, list[Picture]]:
    settings = alike[0].settings
    size = picture_size(base, settings.size)
    shape = (1, *base.latent_shape(size))
    seeds = [one.request.seed for one in alike]
    noises = [torch.Generator().manual_seed(seed) for seed in seeds]  # which schedulers draw more from, as elsewhere
    final = torch.cat([torch.randn(shape, generator=generator) for generator in noises])
    final = noise = final.to(base.device)
    text = Said(base, [one.script for one in alike], settings.is_guided, size)
    columns = zip(*(one.controls for one in alike), strict=True)
    controls = [Steering(column[0], _hint_tensors(base, column, size), _region(column, size)) for column in columns]
    for done in denoise(base, noise, text, controls, settings, noises=noises):

        def preview(done: Denoised = done) -> list:
            return to_pictures(previewer(clean_latents(base.noise, done.read, done.prediction, done.timestep)))

        final = done.latents
        yield Step(done.step + 1, settings.steps, len(alike), preview)
    with base.autocast():
        decoded = base.decode_latents(final)
    for one, *values in zip(alike, final, decoded, strict=True):
        if not all(value.isfinite().all() for value in values):
            raise Invalid(
                f"The picture of seed {one.request.seed} is none: its numbers are not finite. Take a lower guidance or "
                "scale, weights in fp32 (half precision overflows first), or an earlier checkpoint of a control or "
                "base whose training went astray."
            )
    made = zip(alike, to_pictures(decoded), final, strict=True)
    return [Picture(one.request, pixels, latents) for one, pixels, latents in made]


def pictures(
    records: Iterable[Step | Picture], on_step: Callable[[int], None] = lambda count: None
) -> Iterator[Picture]:
    """The pictures among ``generate``'s records; ``on_step`` is called for each step, with the pictures it advanced."""
    for record in records:
        if isinstance(record, Picture):
            yield record
        else:
            on_step(record.count)


def maker(
    base: Backbone,
    loaded: Mapping[str, SavedControl] | None = None,
    batch: int = 16,
    on_step: Callable[[int], None] = lambda count: None,
) -> Maker:
    """A maker of pictures on a base. ``loaded``: controls in memory, by the names that requests use."""
    return lambda requests: pictures(generate(base, prepare(base, requests, loaded), batch), on_step)
