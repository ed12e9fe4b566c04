"""Opponents that are controls of a base that stays as it is: ControlNet, its ablations, T2I-Adapter; and no control."""

from collections.abc import Sequence

from torch import Tensor

from controlkit.backbones import Backbone
from controlkit.baselines.seam import Baseline, Material
from controlkit.branch import ControlSpec
from controlkit.controls import new_control
from controlkit.formats import SavedControl
from controlkit.images import HintSpec
from controlkit.sample import Picture, Request, maker
from controlkit.train import objective


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
        return objective(self.base, self.branch, material.drawn(step))

    def make(self, requests: Sequence[Request]) -> list[Picture]:
        """Pictures under the control, by whatever name the requests call it."""
        saved = SavedControl(self.branch, self.spec)
        return list(maker(self.base, {c.name: saved for one in requests for c in one.controls})(requests))
