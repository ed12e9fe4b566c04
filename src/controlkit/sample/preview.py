"""Rough pictures of unfinished latents, without the base's decoder."""

import itertools
from functools import cached_property

import torch
from torch import Tensor

from controlkit.backbones import Backbone
from controlkit.backbones.noise import NoiseProcess


def clean_latents(noise: NoiseProcess, x: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
    """The latents (B, C, h, w) that a prediction at timestep t stands for, given the noisy ones it was made of.

    Noisy latents and target are linear in latents and noise, x = a z + b e and p = c z + d e; solved for z.
    """
    one, zero, at = x.new_ones(1, 1, 1, 1), x.new_zeros(1, 1, 1, 1), t.to(x.device).long().view(1)
    a, b = noise.add(one, zero, at), noise.add(zero, one, at)
    c, d = noise.target(one, zero, at), noise.target(zero, one, at)
    return ((d * x - b * prediction) / (a * d - b * c)).nan_to_num()


class Previewer:
    """Latents to colours by the linear map that fits the base's own latents of plain pictures best."""

    def __init__(self, base: Backbone) -> None:
        self.base = base

    @cached_property
    def colours(self) -> Tensor:
        """(C + 1, 3): the map of a latent, and of 1; fitted on first use to 27 plain pictures, by least squares."""
        plain = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=3)))
        pixels = plain[..., None, None].expand(-1, -1, self.base.multiple, self.base.multiple).to(self.base.device)
        with torch.no_grad(), self.base.autocast():
            latents = self.base.mean_latents(self.base.encode_moments(pixels)).float().mean((2, 3)).cpu()
        return torch.linalg.lstsq(torch.cat([latents, torch.ones(len(plain), 1)], 1), plain).solution

    def __call__(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, h, w) in about [-1, 1] of latents (B, C, h, w)."""
        rows = latents.detach().float().cpu().movedim(1, -1)
        return (rows @ self.colours[:-1] + self.colours[-1]).movedim(-1, 1)
