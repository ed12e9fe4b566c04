"""Opponents that read the hint beside the noisy latents, as further channels of a denoiser that is trained whole.

``LatentDiffusion``: from nothing, on the label map (Rombach et al., CVPR 2022, Section 4.3.1). ``DepthToImage``: the
base tuned, with depth in one more channel whose weights are zero at first (Stable Diffusion 2's depth model).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from controlkit.backbones import Backbone, TextEmbedding
from controlkit.baselines.sampling import batches, halves, hints_of, sampled, size_of, unprompted
from controlkit.baselines.seam import Baseline, Material
from controlkit.images import HintSpec
from controlkit.sample import Picture, Prepared, Request


class ReadsBeside(Baseline):
    """A denoiser of its own that reads a hint's channels after the latents."""

    reads_prompts = True
    """Whether it is told the prompt; else the empty one, and guidance leads away from the hint of zeros."""
    own: Backbone

    def beside(self, hints: Tensor) -> Tensor:
        """The channels (B, k, h, w) that the denoiser reads of hints (B, channels, H, W)."""
        raise NotImplementedError

    def loss(self, material: Material, step: int, stage: str) -> Tensor:
        """The mean squared error of the prediction."""
        batch, noise = material.drawn(step), self.base.noise
        z = noise.add(batch.latents, batch.noise, batch.t)
        hints, text = batch.hints[""], batch.text
        if not self.reads_prompts:
            hints, text = material.some_absent(hints, step), self._silence(len(hints))
        prediction = self.own.predict(torch.cat([z, self.beside(hints)], 1), batch.t, text)
        return F.mse_loss(prediction.float(), noise.target(batch.latents, batch.noise, batch.t))

    def make(self, requests: Sequence[Request]) -> list[Picture]:
        """Pictures by guidance: away from the empty prompt under the same hint, or without prompts from no hint."""
        made: list[Picture] = []
        for asked, ready in batches(self.base, requests):
            alike: list[Prepared] = ready if self.reads_prompts else unprompted(ready)
            hints = hints_of(self.base, asked, self.spec, size_of(alike[0]))
            with torch.no_grad():
                shown = self.beside(hints)
                if not self.reads_prompts and alike[0].settings.is_guided:
                    shown = torch.cat([self.beside(torch.zeros_like(hints)), shown])

            def predict(x: Tensor, t: Tensor, text: TextEmbedding, shown: Tensor = shown) -> Tensor:
                told = text if self.reads_prompts else self._silence(len(shown))
                rows = len(told)
                return self.own.predict(torch.cat([halves(x, rows), halves(shown, rows)], 1), halves(t, rows), told)

            made += sampled(self.own, asked, alike, predict)
        return made

    def _silence(self, rows: int) -> TextEmbedding:
        return self.base.encode_text([""])[torch.zeros(rows, dtype=torch.long)]


class LatentDiffusion(ReadsBeside):
    """LDM from nothing: a denoiser of the base's shape with weights drawn anew, in the base's latents.

    The map is folded to the latents' size, so that no pixel of it is lost as in LDM's rescaling, and mixed by a
    learned 1x1 convolution.
    """

    reads_prompts = False

    def __init__(self, base: Backbone, spec: HintSpec) -> None:
        super().__init__(base, spec)
        channels = base.latent_channels
        seed = int(torch.randint(2**31, ()))  # of the draw that the caller seeded
        self.own = base.reading_more(channels).untrained(seed)
        self.denoiser = self.own.denoiser
        self.folded = nn.Conv2d(spec.channels * base.stride**2, channels, 1).to(base.device)

    def beside(self, hints: Tensor) -> Tensor:
        """As many channels as the latents have."""
        return self.folded(F.pixel_unshuffle(hints, self.base.stride))


class DepthToImage(ReadsBeside):
    """The base tuned whole, with its prompts; depth in [-1, 1] is one more channel."""

    def __init__(self, base: Backbone, spec: HintSpec) -> None:
        super().__init__(base, spec)
        self.own = base.reading_more(1)
        self.denoiser = self.own.denoiser

    def beside(self, hints: Tensor) -> Tensor:
        """The grey of the hint at the latents' size (B, 1, h, w)."""
        grey = F.avg_pool2d(hints.mean(1, keepdim=True), self.base.stride)
        low, high = self.spec.low, self.spec.high
        return 2 * (grey - low) / ((high - low) or 1) - 1
