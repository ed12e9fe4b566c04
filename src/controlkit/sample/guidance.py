"""Guidance: how the predictions with and without the prompt become one.

Classifier-free guidance (Ho and Salimans, 2022), with the spread kept (Lin et al., 2023), or adaptive projected
guidance (Sadat et al., ICLR 2025).
"""

import torch
from torch import Tensor

from controlkit.backbones.noise import NoiseProcess
from controlkit.sample.prepare import SamplingSettings
from controlkit.sample.preview import clean_latents, prediction_of

_MOMENTUM = -0.5
_RADIUS = 15 / 256
"""Settings of the paper for SDXL: the longest update, 15, as a share of the length of its noise, so that it serves any
size; for SD 2.1 the paper has the same share, 7.5 of 128."""


class Guide:
    """Guidance over the steps of one batch."""

    def __init__(self, settings: SamplingSettings, noise: NoiseProcess) -> None:
        self.settings, self._noise = settings, noise
        self._average: Tensor | float = 0.0

    def __call__(self, prediction: Tensor, read: Tensor, timestep: Tensor) -> Tensor:
        """The guided prediction (B, C, h, w).

        Args:
            prediction: the unconditional ones, then those of each prompt that is joined, B each.
            read: the noisy latents (B, C, h, w) they were made of.
        """
        if not self.settings.is_guided:
            return prediction
        unconditional, *parts = prediction.chunk(1 + len(self.settings.weights))
        away = [weight * (part - unconditional) for weight, part in zip(self.settings.weights, parts, strict=True)]
        conditional = unconditional + sum(away[1:], away[0])
        if self.settings.guider == "apg":
            guided = self._projected(conditional, unconditional, read, timestep)
        else:
            guided = unconditional + self.settings.guidance * (conditional - unconditional)
        if not self.settings.guidance_rescale:
            return guided
        spread = [one.std((1, 2, 3), keepdim=True) for one in (conditional, guided)]
        return torch.lerp(guided, guided * (spread[0] / spread[1]), self.settings.guidance_rescale)

    def _projected(self, conditional: Tensor, unconditional: Tensor, read: Tensor, timestep: Tensor) -> Tensor:
        """Of the update of the clean latents only what is orthogonal to them, which does not oversaturate them."""
        known, other = (clean_latents(self._noise, read, one, timestep) for one in (conditional, unconditional))
        update = known - other + _MOMENTUM * self._average
        self._average = update
        length = update.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        longest = _RADIUS * known[0].numel() ** 0.5
        update = update * (longest / length).clamp(max=1).nan_to_num(1.0)
        along = known / known.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        update = update - (update * along).sum((1, 2, 3), keepdim=True) * along
        return prediction_of(self._noise, read, known + (self.settings.guidance - 1) * update, timestep)
