"""One step of training: its draws, and the objective (equation 5)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from controlkit.backbones import ActiveControl, Backbone, TextEmbedding
from controlkit.branch import ControlNetwork
from controlkit.data import (
    Cached,
)
from controlkit.images import HintSpec
from controlkit.seeds import numpy_rng, torch_rng
from controlkit.train.recipe import Recipe


@dataclass(frozen=True)
class Batch:
    """One step's draws: latents z_0, noise, timesteps, text and hints."""

    latents: Tensor  # (B, C, h, w)
    noise: Tensor  # (B, C, h, w)
    t: Tensor  # (B,)
    text: TextEmbedding
    hints: Mapping[str, Tensor]  # by type, or under "": (pairs of that type, channels, H, W), in its contract's range
    draws: int = 1  # rows of a pair, one after the other


def draw_batch(
    base: Backbone,
    cached: Cached,
    contracts: Mapping[str, HintSpec],
    recipe: Recipe,
    step: int,
    part: int = 0,
    parts: int = 1,
    turn: int | None = None,
) -> Batch:
    """The batch of a step, or one of several equal parts of it: shuffled epochs, with noise, timestep, prompt dropout
    and mirroring keyed by (seed, step, sample).

    ``turn``: how many batches of these pairs came before, where other steps take theirs from other buckets.
    Pairs of one type of hint stand together, in the contracts' order. Of several draws of a pair each has its timestep
    from a share of the schedule of its own.
    """
    names = list(contracts)
    count = recipe.batch // recipe.noises_per_pair
    own = range(part * count // parts, (part + 1) * count // parts)
    order: dict[int, np.ndarray] = {}
    chosen = {}
    for place in own:
        number = (step if turn is None else turn) * count + place
        epoch, visit = divmod(number, len(cached))
        if epoch not in order:
            order[epoch] = numpy_rng("order", recipe.seed, epoch).permutation(len(cached))
        chosen[place] = int(order[epoch][visit])
    places = sorted(own, key=lambda place: int(cached.kinds[chosen[place]]))

    total = base.noise.count
    shares = [total * draw // recipe.noises_per_pair for draw in range(recipe.noises_per_pair + 1)]
    latents, noise, times, rows = [], [], [], []
    hints: dict[str, list[Tensor]] = {}
    for place in places:
        index = row = chosen[place]
        if cached.mirrors is not None:
            turned = float(torch.rand((), generator=torch_rng("flip", recipe.seed, step, place))) < recipe.data.flip
            row = int(cached.mirrors[index]) if turned else index
        moments = cached.moments[row].float()
        shape = (moments.shape[0] // 2, *moments.shape[1:])
        for draw in range(recipe.noises_per_pair):
            generator = torch_rng("noise", recipe.seed, step, place * recipe.noises_per_pair + draw)
            latents.append(base.draw_latents(moments[None], torch.randn(shape, generator=generator))[0])
            noise.append(torch.randn(shape, generator=generator))
            times.append(int(torch.randint(shares[draw], shares[draw + 1], (), generator=generator)))
            dropped = float(torch.rand((), generator=generator)) < recipe.prompt_dropout
            rows.append(0 if dropped else int(cached.prompt_rows[index]))
        picture, name = cached.hints[row].numpy(), names[int(cached.kinds[index])]
        hints.setdefault(name, []).append(contracts[name].tensor(picture, picture.shape[:2]))
    text = cached.text[rows].to(torch.device("cpu"), torch.float32).tensors()
    return Batch(
        _sent(torch.stack(latents), base.device),
        _sent(torch.stack(noise), base.device),
        _sent(torch.tensor(times), base.device),
        TextEmbedding(**{name: _sent(value, base.device) for name, value in text.items()}),
        {name: _sent(torch.cat(of_type), base.device) for name, of_type in hints.items()},
        recipe.noises_per_pair,
    )


def _sent(value: Tensor, device: torch.device) -> Tensor:
    """To the device; to a GPU from pinned memory, or the copy would wait for all that is queued there."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def hint_features_of(base: Backbone, branch: ControlNetwork, batch: Batch) -> Any:
    """The features of a batch's hints, row after row; a Union's types one after the other."""
    read = branch.encode_rows({kind: base.hint_input(hint) for kind, hint in batch.hints.items()})
    if isinstance(read, Tensor):
        return read.repeat_interleave(batch.draws, 0)
    return {name: feature.repeat_interleave(batch.draws, 0) for name, feature in read.items()}


def controlled(
    base: Backbone, branch: ControlNetwork, z: Tensor, t: Tensor, text: TextEmbedding, features: Any
) -> Tensor:
    """The base's prediction under control: what a step spends its time on, apart from reading hints."""
    return base.predict(z, t, text, [ActiveControl(branch, features)])


@torch.no_grad()
def residual_sizes(base: Backbone, branch: ControlNetwork, z: Tensor, batch: Batch) -> dict[str, Tensor]:
    """By tap of a skip or the middle, the sums of squares of what the control adds to its feature, there or before, and
    of that feature, (2,) float64."""
    control = ActiveControl(branch, hint_features_of(base, branch, batch))
    effect = base.control_effect(z, batch.t, batch.text, control)
    return {name: torch.stack([x.double().square().sum() for x in both]).cpu() for name, both in effect.items()}


def objective(
    base: Backbone, branch: ControlNetwork, batch: Batch, predict: Callable[..., Tensor] = controlled
) -> Tensor:
    """Equation (5): the mean squared error of the prediction, given z_t, t, the prompt and the hint.

    ``predict`` is ``controlled``, or that compiled.
    """
    z = base.noise.add(batch.latents, batch.noise, batch.t)
    prediction = predict(base, branch, z, batch.t, batch.text, hint_features_of(base, branch, batch))
    return F.mse_loss(prediction.float(), base.noise.target(batch.latents, batch.noise, batch.t))
