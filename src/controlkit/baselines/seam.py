"""The seam of the opponents: each learns from pairs with hints, and makes the pictures of requests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from controlkit.backbones import Backbone
from controlkit.data import Cached, Pair
from controlkit.images import HintSpec, to_tensor
from controlkit.sample import Picture, Request
from controlkit.seeds import torch_rng
from controlkit.train import Batch, BatchPlan, draw_batch
from controlkit.train.step import chosen_pairs


@dataclass(frozen=True)
class Material:
    """The pairs that an opponent learns from, with latents, texts and hints computed of them once."""

    base: Backbone
    spec: HintSpec
    pairs: Sequence[Pair]
    cached: Cached
    batch: int
    """Rows of a batch."""
    seed: int = 0
    hint_dropout: float = 0.1
    """The share of hints replaced by nothing, by opponents whose guidance has a half without the hint."""

    def drawn(self, step: int, prompt_dropout: float = 0.1) -> Batch:
        """The latents, noise, timesteps, texts and hints of a step; each draw is keyed by (seed, step, sample).

        ``prompt_dropout``: the share of prompts replaced by the empty one; a tenth, as Stable Diffusion was trained.
        """
        return draw_batch(self.base, self.cached, self._plan(prompt_dropout), step)

    def pictures(self, step: int) -> Tensor:
        """The same step's pictures (B, 3, H, W) in [-1, 1]."""
        chosen = chosen_pairs(self._plan(0.0), len(self.cached), range(self.batch), step)
        rows = to_tensor([self.pairs[chosen[place]].picture for place in range(self.batch)])
        return rows.to(self.base.device)

    def _plan(self, prompt_dropout: float) -> BatchPlan:
        return BatchPlan({"": self.spec}, 0.0, self.batch, 1, prompt_dropout, self.seed)

    def some_absent(self, hints: Tensor, step: int) -> Tensor:
        """Hints (B, channels, H, W), ``hint_dropout`` of them all zeros."""
        drawn = torch.rand(len(hints), generator=torch_rng("absent", self.seed, step))
        return hints * (drawn >= self.hint_dropout).to(hints)[:, None, None, None]


class Baseline(nn.Module):
    """An opponent: a maker of pictures with weights of its own beside a base's, which stay as they are.

    Where a request has no hint, it makes its picture of a hint that is all zeros. ``state_dict`` holds all that it has
    learnt; the base is no part of it.
    """

    stages: ClassVar[Mapping[str, float]] = {"all": 1.0}
    """The stages of its training in order, each with its share of the steps; none where there is nothing to learn."""

    def __init__(self, base: Backbone, spec: HintSpec) -> None:
        super().__init__()
        self.base, self.spec = base, spec

    def learning(self, stage: str) -> nn.Module:
        """The part of it that learns in a stage."""
        return self

    def loss(self, material: Material, step: int, stage: str) -> Tensor:
        """The loss () of a step's batch; it depends on the arguments and the weights alone."""
        raise NotImplementedError

    def make(self, requests: Sequence[Request]) -> list[Picture]:
        """The pictures of requests, in their order (``sample.Maker``); raises as ``sample.prepare`` does."""
        raise NotImplementedError

    def begin(self, stage: str) -> nn.Module:
        """Have a stage's part learn, and no other; returns it, in training mode."""
        self.eval().requires_grad_(False)
        return self.learning(stage).train().requires_grad_(True)


def stage_at(stages: Mapping[str, float], progress: float) -> str:
    """The stage at a share of the training, 0 to 1."""
    end = 0.0
    for name, share in stages.items():
        end += share
        if progress < end:
            return name
    return list(stages)[-1]
