"""Sketch-Guided Diffusion: a frozen base led by gradients (Voynov, Aberman and Cohen-Or, 2022, arXiv 2211.13752).

A small network reads, pixel by pixel, the latents of the edges off the base's features (their Section 3.1). While
pictures are made, noisy latents are moved to where it reads the edges that are wanted (Section 3.2).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from controlkit.backbones import Backbone, TextEmbedding
from controlkit.baselines.sampling import batches, halves, hints_of, sampled, size_of
from controlkit.baselines.seam import Baseline, Material
from controlkit.errors import Unsupported
from controlkit.images import HintSpec
from controlkit.sample import Picture, Request

BETA = 1.6
"""The guidance's strength at a control's scale of 1: their default; the paper also compares with 3.2, twice as much."""
LAST = 0.5
"""Latents are moved down to this share of the timesteps, and left alone below."""
WIDTHS = (512, 256, 128, 64)
_WAVES = 4


class EdgePredictor(nn.Module):
    """A perceptron for each place: features of the base and the timestep to the latents of the edges.

    Args:
        features: their channels together.  channels: of the latents.
        count: timesteps of the base's noise process.
    """

    def __init__(self, features: int, channels: int, count: int) -> None:
        super().__init__()
        self.count = count
        layers: list[nn.Module] = []
        before = features + 2 * _WAVES
        for width in WIDTHS:
            layers += [nn.Conv2d(before, width, 1), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(before, channels, 1))

    def forward(self, features: Sequence[Tensor], t: Tensor, size: tuple[int, int]) -> Tensor:
        """Latents (B, C, *size) of edges, of features (B, c, h, w) of any sizes at timesteps t (B,)."""
        grown = [F.interpolate(one.float(), size, mode="bilinear") for one in features]
        turns = 2 * math.pi * (t.float() / self.count)[:, None] * 2.0 ** torch.arange(_WAVES, device=t.device)
        waves = torch.cat([turns.sin(), turns.cos()], 1)[:, :, None, None].expand(-1, -1, *size)
        return self.layers(torch.cat([*grown, waves], 1))


class SketchGuided(Baseline):
    """The edge predictor; a control's scale is the strength of guidance, in units of ``BETA``."""

    def __init__(self, base: Backbone, spec: HintSpec) -> None:
        super().__init__(base, spec)
        if spec.channels != 3:
            raise Unsupported(f"Sketch guidance reads pictures of edges; these hints have {spec.channels} channels.")
        blank = torch.zeros(1, *base.latent_shape((base.multiple, base.multiple)), device=base.device, dtype=base.dtype)
        with torch.no_grad():
            _, seen = base.features(blank, torch.zeros(1, device=base.device), base.encode_text([""]))
        channels = sum(one.shape[1] for one in seen)
        self.predictor = EdgePredictor(channels, base.latent_channels, base.noise.count).to(base.device)

    def edges(self, z: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        """Latents of the edges that are read off noisy latents z (B, C, h, w)."""
        _, seen = self.base.features(z, t, text)
        return self.predictor(seen, t, (z.shape[-2], z.shape[-1]))

    def wanted(self, hints: Tensor) -> Tensor:
        """Latents (B, C, h, w) of pictures of edges, hints (B, 3, H, W)."""
        low, high = self.spec.low, self.spec.high
        return self.base.mean_latents(self.base.encode_moments(2 * (hints - low) / (high - low) - 1)).float()

    def loss(self, material: Material, step: int, stage: str) -> Tensor:
        """The mean squared error of the edges' latents, of noisy latents at any timestep."""
        batch = material.drawn(step)
        z = self.base.noise.add(batch.latents, batch.noise, batch.t)
        with torch.no_grad():
            _, seen = self.base.features(z, batch.t, batch.text)
            wanted = self.wanted(batch.hints[""])
        return F.mse_loss(self.predictor(seen, batch.t, (z.shape[-2], z.shape[-1])), wanted)

    def make(self, requests: Sequence[Request]) -> list[Picture]:
        """Pictures of the base by its guidance, and moved towards the hint's edges where a request has one."""
        made: list[Picture] = []
        for asked, alike in batches(self.base, requests):
            with torch.no_grad():
                wanted = self.wanted(hints_of(self.base, asked, self.spec, size_of(alike[0])))
            scales = [BETA * one.controls[0].scale if one.controls else 0.0 for one in asked]
            beta = wanted.new_tensor(scales)[:, None, None, None]

            def nudge(
                read: Tensor, t: Tensor, before: Tensor, after: Tensor, text: TextEmbedding,
                wanted: Tensor = wanted, beta: Tensor = beta,
            ) -> Tensor:  # fmt: skip
                if not beta.any() or t[0] <= LAST * self.base.noise.count:
                    return after
                return after - beta * self.move(read, t, text[-len(read) :], wanted, before - after)

            made += sampled(self.base, asked, alike, self._predict, nudge)
        return made

    def move(self, read: Tensor, t: Tensor, text: TextEmbedding, wanted: Tensor, stride: Tensor) -> Tensor:
        """The direction (B, C, h, w) away from the wanted edges at noisy latents, as long as the step ``stride``."""
        with torch.enable_grad():
            z = read.detach().requires_grad_(True)
            distance = (self.edges(z, t, text) - wanted).square().mean((1, 2, 3)).sum()
            [slope] = torch.autograd.grad(distance, z)
        lengths = [one.float().flatten(1).norm(dim=1)[:, None, None, None] for one in (stride, slope)]
        return slope.float() * (lengths[0] / lengths[1].clamp(min=1e-12))

    def _predict(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        return self.base.predict(halves(x, len(text)), halves(t, len(text)), text)
