"""Sampling for opponents that predict noise in their own way: requests in batches, guidance, the steps."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import takewhile

import torch
from torch import Tensor

from controlkit.backbones import Backbone, TextEmbedding
from controlkit.errors import Unsupported
from controlkit.images import HintSpec, to_pictures
from controlkit.sample import Picture, Prepared, Request, hint_of, prepare
from controlkit.sample.guidance import Guide
from controlkit.sample.texts import Said

Predict = Callable[[Tensor, Tensor, TextEmbedding], Tensor]
"""(noisy latents (B, C, h, w), timesteps (B,), texts) -> the predictions: with guidance of the halves without the
prompt or hint first, then of those with them."""
Nudge = Callable[[Tensor, Tensor, Tensor, Tensor, TextEmbedding], Tensor]
"""(latents as the base read them, timesteps (B,), latents before the step, latents after it, texts) -> latents
(B, C, h, w) to go on with."""

_LEFT_OUT = ("edit", "hires", "tile")
AT_ONCE = 16
"""Pictures made together."""


def batches(base: Backbone, requests: Sequence[Request]) -> Iterator[tuple[list[Request], list[Prepared]]]:
    """Neighbours that can be made together: the requests, and the same made ready without their controls.

    ``Unsupported`` for a request that changes a picture, has a second pass or asks for tiles.
    """
    for request in requests:
        if asked := [name for name in _LEFT_OUT if getattr(request, name)]:
            raise Unsupported(f"The paper's opponents make plain pictures: leave out {asked[0]}.")
    ready = prepare(base, [one.model_copy(update={"controls": ()}) for one in requests])
    while ready:
        alike = list(takewhile(ready[0].is_like, ready[:AT_ONCE]))
        yield list(requests[: len(alike)]), alike
        requests, ready = requests[len(alike) :], ready[len(alike) :]


def hints_of(base: Backbone, requests: Sequence[Request], spec: HintSpec, size: tuple[int, int]) -> Tensor:
    """Hints (B, channels, *size) of requests as their contract says; zeros where a request has no control."""
    absent = torch.zeros(1, spec.channels, *size)
    rows = [spec.tensor(hint_of(one.controls[0], spec, size), size) if one.controls else absent for one in requests]
    return torch.cat(rows).to(base.device, base.dtype)


def size_of(prepared: Prepared) -> tuple[int, int]:
    """(height, width) of the picture to be made, in pixels."""
    assert prepared.settings.size is not None  # prepare has filled it in
    return prepared.settings.size


def halves(x: Tensor, rows: int) -> Tensor:
    """Rows (B, ...) repeated to a multiple of them: one B for each half of guidance."""
    return x.repeat(rows // len(x), *[1] * (x.dim() - 1))


@torch.no_grad()
def sampled(
    base: Backbone,
    requests: Sequence[Request],
    alike: Sequence[Prepared],
    predict: Predict,
    nudge: Nudge | None = None,
) -> list[Picture]:
    """Pictures of one batch, from the noise of their seeds, by the base's schedule; ``nudge`` acts after each step."""
    settings, size = alike[0].settings, size_of(alike[0])
    text = Said(base, [one.script for one in alike], settings.is_guided, size)
    noise = [torch.randn(base.latent_shape(size), generator=_seeded(one.seed)) for one in requests]
    sampler, guide = base.noise.sampler(settings.steps, settings.scheduler), Guide(settings, base.noise)
    sampler.begin(0)
    x = sampler.start(torch.stack(noise).to(base.device))
    for step, timestep in enumerate(sampler.timesteps):
        read, t = sampler.scaled(x, timestep), timestep.to(x.device).expand(len(x))
        with base.autocast():
            prediction = guide(predict(read.to(base.dtype), t, text.at(step)).float(), read, timestep)
            after = sampler.step(prediction, timestep, x)
            x = nudge(read.to(base.dtype), t, x, after, text.at(step)) if nudge else after
    with base.inference():
        pixels = to_pictures(base.decode_latents(x))
    return [Picture(request, one, latents) for request, one, latents in zip(requests, pixels, x, strict=True)]


def unprompted(alike: Sequence[Prepared]) -> list[Prepared]:
    """The same without prompts that are joined: for opponents that read none."""
    return [replace(one, settings=replace(one.settings, weights=(1.0,))) for one in alike]


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
