"""Opponents that are controls of a base that stays as it is: ControlNet, its ablations, T2I-Adapter; and no control."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from controlkit.backbones import Backbone
from controlkit.baselines.seam import Baseline, Material
from controlkit.branch import ControlSpec
from controlkit.controls import new_control
from controlkit.formats import SavedControl
from controlkit.images import HintSpec
from controlkit.sample import Picture, Request, maker
from controlkit.train import Batch, objective

PROMPT_DROPOUT = 0.5
"""The share of prompts that the paper replaces by the empty one (Section 3.3)."""


class NoControl(Baseline):
    """The base alone: it makes the pictures of prompts, whatever the hint."""

    stages = {}  # noqa: RUF012  # there is nothing to learn

    def make(self, requests: Sequence[Request]) -> list[Picture]:
        """The requests' pictures without their controls; each keeps its whole request."""
        bare = [request.model_copy(update={"controls": ()}) for request in requests]
        made = maker(self.base)(bare)
        return [Picture(request, one.pixels, one.latents) for request, one in zip(requests, made, strict=True)]


class Controlled(Baseline):
    """A control by the paper's objective (equation 5), in the same loop as its opponents."""

    def __init__(self, base: Backbone, spec: HintSpec, control: ControlSpec) -> None:
        super().__init__(base, spec)
        self.branch = new_control(base, control, spec.channels)

    def loss(self, material: Material, step: int, stage: str) -> Tensor:
        """The mean squared error of the prediction under control."""
        return objective(self.base, self.branch, self.drawn(material, step))

    def drawn(self, material: Material, step: int) -> Batch:
        """A step's batch, with half of the prompts left out."""
        return material.drawn(step, PROMPT_DROPOUT)

    def make(self, requests: Sequence[Request]) -> list[Picture]:
        """Pictures under the control, by whatever name the requests call it."""
        saved = SavedControl(self.branch, self.spec)
        return list(maker(self.base, {c.name: saved for one in requests for c in one.controls})(requests))


class Adapter(Controlled):
    """A T2I-Adapter, trained more often at noisy timesteps, t = (1 - (u / T)^3) T of a uniform u, as published."""

    def drawn(self, material: Material, step: int) -> Batch:
        """A step's batch, with all prompts."""
        batch, count = material.drawn(step, 0.0), self.base.noise.count
        cubic = (count * (1 - (batch.t / count) ** 3)).long().clamp(max=count - 1)
        return replace(batch, t=cubic)
