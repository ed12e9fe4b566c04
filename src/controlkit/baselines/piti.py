"""PITI: a pretrained base told by a condition encoder in the place of its text (Wang et al., 2022, arXiv 2205.12952).

The encoder learns to speak to the frozen base first, then both are tuned together (Section 3.2 there). Prompts are not
read. Left out: the adversarial tuning of their upsampler, as a latent base has none, and their normalised guidance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from controlkit.backbones import Backbone, TextEmbedding
from controlkit.baselines.sampling import batches, halves, hints_of, sampled, size_of, unprompted
from controlkit.baselines.seam import Baseline, Material
from controlkit.branch import in_rows
from controlkit.images import HintSpec
from controlkit.sample import Picture, Request

HEADS, LAYERS = 4, 4


class ConditionEncoder(nn.Module):
    """A hint's patches as words of the base's text space: a small vision transformer.

    Args:
        channels: of the hint.  width: of the text space.  patch: pixels a side.
        grid: patches a side of the pictures that positions are learnt for; those of others are interpolated.
    """

    def __init__(self, channels: int, width: int, patch: int, grid: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.places = nn.Parameter(0.02 * torch.randn(1, width, grid, grid))
        heads = HEADS if width % HEADS == 0 else 1
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, hint: Tensor) -> Tensor:
        """Words (B, h x w / patch^2, width) of hints (B, channels, h, w)."""
        feature = self.patches(hint)
        places: Tensor = self.places
        if feature.shape[-2:] != places.shape[-2:]:
            places = F.interpolate(places, feature.shape[-2:], mode="bilinear")
        return self.layers((feature + places).flatten(2).transpose(1, 2))


class Piti(Baseline):
    """The encoder, and a copy of the base's denoiser that is tuned with it."""

    stages: ClassVar[Mapping[str, float]] = {"encoder": 0.5, "all": 0.5}

    def __init__(self, base: Backbone, spec: HintSpec) -> None:
        super().__init__(base, spec)
        patch = 2 * base.stride
        width = base.text_shapes()["tokens"][-1]
        self.encoder = ConditionEncoder(spec.channels, width, patch, base.size // patch).to(base.device)
        self.own = base.with_own_denoiser()
        self.denoiser = self.own.denoiser
        self._silence = base.encode_text([""])

    def learning(self, stage: str) -> nn.Module:
        """The encoder alone, then all."""
        return self.encoder if stage == "encoder" else self

    def words(self, hints: Tensor) -> TextEmbedding:
        """The texts that hints (B, channels, H, W) are to the base: all but the words as of the empty prompt."""
        words = self.encoder(hints)
        silent = {name: in_rows(value, len(hints)) for name, value in self._silence.tensors().items()}
        return replace(TextEmbedding(**silent), tokens=words).of_size((hints.shape[-2], hints.shape[-1]))

    def loss(self, material: Material, step: int, stage: str) -> Tensor:
        """The mean squared error of the prediction, told by the hint."""
        batch, noise = material.drawn(step), self.base.noise
        z = noise.add(batch.latents, batch.noise, batch.t)
        told = self.words(material.some_absent(batch.hints[""], step))
        return F.mse_loss(self.own.predict(z, batch.t, told).float(), noise.target(batch.latents, batch.noise, batch.t))

    def make(self, requests: Sequence[Request]) -> list[Picture]:
        """Pictures by guidance away from the hint of zeros."""
        made: list[Picture] = []
        for asked, ready in batches(self.base, requests):
            alike = unprompted(ready)
            hints = hints_of(self.base, asked, self.spec, size_of(alike[0]))
            guided = alike[0].settings.is_guided
            with torch.no_grad():
                told = self.words(torch.cat([torch.zeros_like(hints), hints]) if guided else hints)

            def predict(x: Tensor, t: Tensor, text: TextEmbedding, told: TextEmbedding = told) -> Tensor:
                return self.own.predict(halves(x, len(told)), halves(t, len(told)), told)

            made += sampled(self.own, asked, alike, predict)
        return made
