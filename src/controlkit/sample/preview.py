"""Rough pictures of unfinished latents, without the base's decoder."""

from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from controlkit.backbones import Backbone
from controlkit.backbones.noise import NoiseProcess
from controlkit.seeds import torch_rng


def clean_latents(noise: NoiseProcess, x: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
    """The latents (B, C, h, w) that a prediction at timestep t stands for, given the noisy ones it was made of.

    Noisy latents and target are linear in latents and noise, x = a z + b e and p = c z + d e; solved for z.
    """
    a, b, c, d = _factors(noise, x, t)
    return ((d * x - b * prediction) / (a * d - b * c)).nan_to_num()


def prediction_of(noise: NoiseProcess, x: Tensor, latents: Tensor, t: Tensor) -> Tensor:
    """The prediction (B, C, h, w) that stands for ``latents`` in noisy ones x: ``clean_latents`` undone."""
    a, b, c, d = _factors(noise, x, t)
    return c * latents + d * (x - a * latents) / b


def _factors(noise: NoiseProcess, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    one, zero, at = x.new_ones(1, 1, 1, 1), x.new_zeros(1, 1, 1, 1), t.to(x.device).view(1)
    noisy, target = ((function(one, zero, at), function(zero, one, at)) for function in (noise.add, noise.target))
    return *noisy, *target


Previewer = Callable[[Tensor], Tensor]
"""From a base's latents (B, C, h, w) to pictures (B, 3, H, W) in about [-1, 1], of any size."""


class LinearPreviewer:
    """Latents to colours by the linear map that fits the base's own latents of simple pictures best."""

    def __init__(self, base: Backbone) -> None:
        self.base = base

    @cached_property
    def colours(self) -> Tensor:
        """(C + 1, 3): the map of a latent, and of 1; fitted on first use to 20 pictures of 1 to 64 coloured fields.

        By least squares, between latents and the mean colours of their places. Pictures of one colour are not enough:
        the latents of flat pictures lie apart.
        """
        side, rng = 2 * self.base.multiple, torch_rng("preview")
        fields = [torch.rand(4, 3, count, count, generator=rng) * 2 - 1 for count in (1, 2, 3, 5, 8)]
        pixels = torch.cat([F.interpolate(one, (side, side)) for one in fields]).to(self.base.device)
        with torch.no_grad(), self.base.autocast():
            latents = self.base.mean_latents(self.base.encode_moments(pixels)).float()
        wanted = F.adaptive_avg_pool2d(pixels, (latents.shape[-2], latents.shape[-1]))
        x, y = (one.cpu().movedim(1, -1).flatten(0, -2) for one in (latents, wanted))
        return torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution

    def __call__(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, h, w) in about [-1, 1] of latents (B, C, h, w)."""
        rows = latents.detach().float().cpu().movedim(1, -1)
        return (rows @ self.colours[:-1] + self.colours[-1]).movedim(-1, 1)
