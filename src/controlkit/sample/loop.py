"""Controlled sampling: guidance and the loop over timesteps, as an iterator of steps and finished pictures.

The hint is encoded once a picture. A control whose scale is zero on a step is not run on it, nor on the unconditional
half of classifier-free guidance where it is zero there. Both halves go through in one batch, in which what does not
depend on the prompt is computed once.
"""

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from controlkit.backbones import Backbone, TextEmbedding
from controlkit.backbones.noise import Noises, Sampler
from controlkit.branch import in_rows
from controlkit.errors import Invalid, OutOfRoom
from controlkit.formats import SavedControl
from controlkit.images import stretch, to_pictures, to_tensor
from controlkit.sample.acting import Acting, HintTensors, Steering
from controlkit.sample.guidance import Guide
from controlkit.sample.memory import settle, settle_lower
from controlkit.sample.prepare import Prepared, PreparedControl, SamplingSettings, picture_size, prepare
from controlkit.sample.preview import LinearPreviewer, Previewer, clean_latents
from controlkit.sample.request import Picture, Request, Step
from controlkit.sample.reuse import Predict, Reusing
from controlkit.sample.texts import Said
from controlkit.sample.tiles import blended, tiles_of
from controlkit.sample.together import Ask, Batch, relayed, side_by_side

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


class Start(NamedTuple):
    """The start of a batch of B pictures."""

    latents: Tensor
    """(B, C, h, w). Standard normal noise; but where no picture is changed, before a later step than 0, noisy latents
    as they are there: an earlier run's after the step before, or a picture's with that much noise."""
    noises: Noises = None
    """Of each picture, what the scheduler draws noise from, if it draws any."""
    edited: Tensor | None = None
    """(B, C, h, w): latents of pictures that are changed."""
    mask: Tensor | None = None
    """(B, 1, h, w): 1 where they are made anew, 0 where they are kept; None is 1 everywhere."""
    beside: Tensor | None = None
    """(B, C + 1, h, w): what an inpainting base reads after the noisy latents (``Backbone.inpaints``)."""

    def begun(self, sampler: Sampler, step: int) -> Tensor:
        """The noisy latents before a step, with which sampling begins."""
        if self.edited is not None and (step or self.mask is None):
            return sampler.noised(self.edited, self.latents, step)
        return self.latents if step else sampler.start(self.latents)

    def kept(self, sampler: Sampler, x: Tensor, step: int) -> Tensor:
        """Latents x before a step, or after the last, with what is kept in its place; an inpainting base sees to it."""
        if self.edited is None or self.mask is None or self.beside is not None:
            return x
        return torch.where(self.mask > 0, x, sampler.noised(self.edited, self.latents, step))


def denoise(
    base: Backbone,
    start: Tensor | Start,
    text: TextEmbedding | Said,
    controls: Sequence[Steering],
    settings: SamplingSettings,
    span: range | None = None,
) -> Iterator[Denoised]:
    """The sampling loop; yields after each step.

    Args:
        start: or its latents alone.
        text: of B prompts for each of ``settings.weights``; with guidance, B unconditional ones before them.
        span: the steps to make, of 0 to ``settings.steps`` - 1; by default all that are not skipped.
    """
    yield from side_by_side(base, [denoising(base, start, text, controls, settings, span)])


@torch.no_grad()
def denoising(
    base: Backbone,
    start: Tensor | Start,
    text: TextEmbedding | Said,
    controls: Sequence[Steering],
    settings: SamplingSettings,
    span: range | None = None,
) -> Batch[None]:
    """The same as a batch that asks for its predictions, to be run beside others."""
    start = Start(start) if isinstance(start, Tensor) else start
    count = len(start.latents)
    rows = count if base.shares_rows else len(text)  # of all but the text
    sampler = base.noise.sampler(settings.steps, settings.scheduler, start.noises)
    span = range(settings.skipped, len(sampler.timesteps)) if span is None else span
    sampler.begin(span.start)
    x = start.begun(sampler, span.start)
    guide = Guide(settings, base.noise)
    predict = _predictor(base, controls, settings, count, span, (x.shape[-2], x.shape[-1]))
    for step in span:
        timestep = sampler.timesteps[step]
        read = sampler.scaled(x, timestep)
        t = timestep.to(x.device).expand(rows)
        with base.inference():  # not around a yield: whoever iterates computes in his own number format
            whole = read if start.beside is None else torch.cat([read, start.beside], 1)
            found = predict(in_rows(whole, rows).to(base.dtype), t, text.at(step), step)
        answer = (yield found) if isinstance(found, Ask) else found
        with base.inference():
            prediction = guide(answer.float(), read, timestep)
            x = start.kept(sampler, sampler.step(prediction, timestep, x), step + 1)
        yield Denoised(step, x, read, prediction, timestep)


def _predictor(
    base: Backbone,
    controls: Sequence[Steering],
    settings: SamplingSettings,
    count: int,
    span: range,
    size: tuple[int, int],
) -> Predict | Callable[[Tensor, Tensor, TextEmbedding, int], Ask]:
    """The prediction for ``count`` pictures of ``size`` (height, width in latents), in tiles or as one: asked for."""

    def acting(controls: Sequence[Steering]) -> Acting:
        return Acting(base, controls, settings, count, span)

    if settings.tile is None or settings.tile // base.stride >= max(size):
        whole = acting(controls)
        if settings.pace:
            return Reusing(base, whole, settings, count, span)
        return lambda x, t, text, step: Ask(x, t, text, whole.at(step), count)

    def one_of(controls: Sequence[Steering]) -> Predict:
        part = acting(controls)
        if settings.pace:
            return Reusing(base, part, settings, count, span)
        return lambda x, t, text, step: base.predict(x, t, text, part.at(step))

    tiles = tiles_of(size, settings.tile // base.stride)
    parts = [one_of([one.part(tile, base.stride, size) for one in controls]) for tile in tiles]
    return lambda x, t, text, step: blended(tiles, x, lambda i, part: parts[i](part, t, text, step))


def _hint_tensors(base: Backbone, controls: Sequence[PreparedControl], size: tuple[int, int]) -> HintTensors:
    """The hints (B, channels, *size) of one control of several pictures, in the base's type; one, if all are equal."""

    def read(kind: str) -> Tensor:
        pixels = torch.cat([control.specs[kind].tensor(control.hints[kind], size) for control in controls])
        return base.hint_input(pixels.to(base.device, base.dtype))

    first, *others = controls
    if all(np.array_equal(one.hints[kind], hint) for one in others for kind, hint in first.hints.items()):
        controls = [first]
    with base.inference():  # for a base whose hints are latents
        return {kind: read(kind) for kind in first.hints} if first.network.hint_types else read("")


def _region(column: Sequence[PreparedControl], size: tuple[int, int]) -> Tensor | None:
    """Where a control acts in each picture (B, 1, *size); None where it is everywhere in all of them."""
    if all(control.region is None for control in column):
        return None
    whole = np.ones(size, np.float32)
    maps = [whole if control.region is None else control.region for control in column]
    return torch.from_numpy(np.stack(maps)[:, None])


def generate(
    base: Backbone,
    requests: Sequence[Request] | Sequence[Prepared],
    batch: int = 16,
    previewer: Previewer | None = None,
    mixed: bool = False,
) -> Generator[Step | Picture, None, None]:
    """Make pictures, in the order of the requests: a ``Step`` for each step of a batch, then its ``Picture`` records.

    Neighbours that share all but prompts, seeds and hints are made together, ``batch`` at most; where memory runs out,
    half as many from then on. ``mixed``: those that share their size and controls alone share the base's predictions,
    too; a picture's last bits then depend on the others, and are not repeated by making it again. ``previewer`` shows
    unfinished latents, by default the linear map. Close the iterator to cancel: nothing is computed after the step last
    yielded. Requests are prepared here, their notes given as warnings; see ``prepare`` for what it raises.
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
    return _generate(base, prepared, batch, previewer or LinearPreviewer(base), mixed)


def _generate(
    base: Backbone, prepared: list[Prepared], batch: int, previewer: Previewer, mixed: bool
) -> Generator[Step | Picture, None, None]:
    batch = settle(base, prepared, batch)
    while prepared:
        some = list(takewhile(prepared[0].goes_with if mixed else prepared[0].is_like, prepared[:batch]))
        try:
            made = yield from _some_batches(base, some, previewer)
        except torch.OutOfMemoryError as error:
            if len(some) == 1 and settle_lower(base, prepared):
                continue
            if len(some) == 1:
                raise OutOfRoom(
                    f"The device's memory does not hold one picture of this size ({str(error).splitlines()[0]}). "
                    "Take a smaller size, weights of half precision, or another device."
                ) from error
            batch = len(some) // 2
            continue
        yield from made
        prepared = prepared[len(some) :]


def _some_batches(
    base: Backbone, some: Sequence[Prepared], previewer: Previewer
) -> Generator[Step, None, list[Picture]]:
    """Pictures made together in batches of those alike, side by side; in their order."""
    alike: list[list[int]] = []
    for place, one in enumerate(some):
        batch = next((batch for batch in alike if some[batch[0]].is_like(one)), None)
        if batch is None:
            alike.append(batch := [])
        batch.append(place)
    batches = [_one_batch(base, [some[i] for i in places], previewer, (places, len(some))) for places in alike]
    made = yield from side_by_side(base, batches)
    found = zip(chain.from_iterable(alike), chain.from_iterable(made), strict=True)
    return [picture for _, picture in sorted(found, key=lambda pair: pair[0])]


def _one_batch(
    base: Backbone, alike: Sequence[Prepared], previewer: Previewer, among: tuple[Sequence[int], int], before: int = 0
) -> Batch[list[Picture]]:
    """Pictures that are alike, of all their passes.

    ``among``: their places, and how many pictures are made beside each other. ``before``: steps of the passes before.
    """
    settings, final = alike[0].settings, torch.zeros(0)
    size = picture_size(base, settings.size)
    start = _start(base, alike, size)
    text = Said(base, [one.script for one in alike], settings.is_guided, size, settings.skipped)
    columns = zip(*(one.controls for one in alike), strict=True)
    controls = [Steering(column[0], _hint_tensors(base, column, size), _region(column, size)) for column in columns]

    def step_of(done: Denoised) -> Step:
        nonlocal final
        final = done.latents
        number = before + done.step - settings.skipped + 1
        return Step(number, before + alike[0].steps, *among, lambda: _preview(base, previewer, done))

    yield from relayed(denoising(base, start, text, controls, settings), step_of)
    made = _pictures(base, alike, final) if settings.made else _unchanged(alike, start)
    if not alike[0].second:
        return made
    seconds = []
    for one, picture in zip(alike, made, strict=True):
        assert one.second is not None and one.second.canvas is not None
        enlarged = stretch(picture.pixels, one.second.canvas.pixels.shape[:2])
        reading = tuple(control.reading(enlarged) for control in one.second.controls)
        seconds.append(replace(one.second, canvas=replace(one.second.canvas, pixels=enlarged), controls=reading))
    larger = yield from _one_batch(base, seconds, previewer, among, before + settings.made)
    return [replace(picture, request=one.request) for one, picture in zip(alike, larger, strict=True)]


def _preview(base: Backbone, previewer: Previewer, done: Denoised) -> list[np.ndarray]:
    """Rough pictures of a step."""
    return to_pictures(previewer(clean_latents(base.noise, done.read, done.prediction, done.timestep)))


def _start(base: Backbone, alike: Sequence[Prepared], size: tuple[int, int]) -> Start:
    """The noise of pictures to be made together, and the latents of those that are changed."""
    shape = base.latent_shape(size)
    noises = [torch.Generator().manual_seed(one.request.seed) for one in alike]  # which schedulers draw more from
    noise = torch.stack([_noise(one.request, shape, rng) for one, rng in zip(alike, noises, strict=True)])
    noise = noise.to(base.device)
    canvases = [one.canvas for one in alike if one.canvas]
    if not canvases:
        return Start(noise, noises)
    pixels = to_tensor([canvas.pixels for canvas in canvases]).to(base.device)
    with base.inference():
        edited = base.mean_latents(base.encode_moments(pixels)).float()
    masks = [canvas.mask for canvas in canvases if canvas.mask is not None]
    if not masks:
        return Start(noise, noises, edited)
    anew = torch.from_numpy(np.stack(masks)[:, None]).to(base.device, torch.float32)
    mask = F.adaptive_max_pool2d(anew, noise.shape[-2:])  # a latent is made anew where any of its pixels is
    if not base.inpaints:
        return Start(noise, noises, edited, mask)
    with base.inference():
        seen = base.mean_latents(base.encode_moments(pixels * (1 - anew))).float()
    return Start(noise, noises, edited, mask, torch.cat([mask, seen], 1))


def _noise(request: Request, shape: tuple[int, int, int], rng: torch.Generator) -> Tensor:
    """The standard normal noise (C, h, w) of a request, turned towards its variation's."""
    noise = torch.randn(shape, generator=rng)
    if not request.variation:
        return noise
    other = torch.randn(shape, generator=torch.Generator().manual_seed(request.variation_seed))
    return turned(noise, other, request.variation)


def turned(noise: Tensor, other: Tensor, share: float) -> Tensor:
    """Noise (C, h, w) turned towards another by a share of the angle between them, column by column, as A1111 does.

    Unlike a mean, that keeps its spread.
    """
    cosine = (F.normalize(noise, dim=1) * F.normalize(other, dim=1)).sum(1, keepdim=True)
    if cosine.mean() > 0.9995:
        return torch.lerp(noise, other, share)
    angle = cosine.clamp(-1, 1).acos()
    return (((1 - share) * angle).sin() * noise + (share * angle).sin() * other) / angle.sin()


def _unchanged(alike: Sequence[Prepared], start: Start) -> list[Picture]:
    """The pictures that are to be changed, as they are: no step was asked for."""
    assert start.edited is not None
    kept = [(one, one.canvas, latents) for one, latents in zip(alike, start.edited, strict=True) if one.canvas]
    return [Picture(one.request, canvas.finished(canvas.pixels), latents) for one, canvas, latents in kept]


def _pictures(base: Backbone, alike: Sequence[Prepared], final: Tensor) -> list[Picture]:
    """The pictures of final latents (B, C, h, w), pasted into those that are changed."""
    with base.inference():
        decoded = base.decode_latents(final)
    for one, *values in zip(alike, final, decoded, strict=True):
        if not all(value.isfinite().all() for value in values):
            raise Invalid(
                f"The picture of seed {one.request.seed} is none: its numbers are not finite. Take a lower guidance or "
                "scale, weights in fp32 (half precision overflows first), or an earlier checkpoint of a control or "
                "base whose training went astray."
            )
    made = zip(alike, to_pictures(decoded), final, strict=True)
    return [
        Picture(one.request, one.canvas.finished(pixels) if one.canvas else pixels, latents)
        for one, pixels, latents in made
    ]


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
