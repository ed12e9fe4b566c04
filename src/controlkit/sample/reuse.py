"""Steps that are made of what an earlier step left: ``speed`` fast and turbo.

From one step to the next the features of a U-Net's encoder and the residuals of its controls change little, those of
its decoder much (Faster Diffusion: Li et al., NeurIPS 2024). So the decoder runs at every step, with the step's own
time, and the rest at some. And the difference that the prompt makes changes little, too: where a step reuses,
only the conditional half is predicted, and the last step's difference stands in for the other.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from controlkit.backbones import Backbone, TextEmbedding
from controlkit.backbones.protocol import Half
from controlkit.sample.acting import Acting
from controlkit.sample.prepare import SamplingSettings

Predict = Callable[[Tensor, Tensor, TextEmbedding, int], Tensor]
"""(noisy latents, timesteps, text, step) -> the prediction (rows, C, h, w), under the controls there."""


class Reusing:
    """Predictions over the steps of one batch, in order (``Predict``)."""

    def __init__(
        self,
        base: Backbone,
        acting: Acting,
        settings: SamplingSettings,
        count: int,
        span: range,
    ) -> None:
        self._base, self._acting = base, acting
        pace = settings.pace
        assert pace is not None
        self._fresh = pace.fresh(settings.steps, span) | acting.changed
        self._whole = pace.whole(settings.steps, span)
        self._unconditional = count if settings.is_guided and pace.halves else 0
        self._half: Half | None = None
        self._text: TextEmbedding | None = None
        self._deep = self._difference = torch.zeros(())

    def __call__(self, x: Tensor, t: Tensor, text: TextEmbedding, step: int) -> Tensor:
        """The prediction (rows, C, h, w) at a step."""
        if self._half is None or step in self._fresh or text is not self._text:
            half = self._base.first_half(x, t, text, self._acting.at(step))
            whole, deep = self._base.second_half(half, t, text)
            self._half, self._deep, self._text = half.of_rows(self._unconditional), deep[self._unconditional :], text
            if self._unconditional:
                unconditional, first, *_ = whole.split(self._unconditional)
                self._difference = first - unconditional
            return whole
        left = None if step in self._whole else self._deep
        conditional, self._deep = self._base.second_half(self._half, t, text[self._unconditional :], left)
        if not self._unconditional:
            return conditional
        return torch.cat([conditional[: self._unconditional] - self._difference, conditional])
