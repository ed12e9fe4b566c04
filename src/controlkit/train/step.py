"""One step of training: its random draws, and the objective (the paper's equation 5)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from controlkit.backbones import ActiveControl, Backbone, TextEmbedding
from controlkit.branch import ControlNetwork
from controlkit.data import Cached
from controlkit.seeds import numpy_rng, torch_rng
from controlkit.train.parts import BatchPlan


@dataclass(frozen=True)
class Batch:
    """A step's draws for B rows: latents z_0, noise, timesteps, text and hints."""

    latents: Tensor  # (B, C, h, w)
    noise: Tensor  # (B, C, h, w)
    t: Tensor  # (B,)
    text: TextEmbedding
    hints: Mapping[str, Tensor]  # by type, or under "": (pairs of that type, channels, H, W), in its contract's range
    noises_per_pair: int = 1  # rows of a pair, one after the other


def draw_batch(
    base: Backbone, cached: Cached, plan: BatchPlan, step: int, part: int = 0, parts: int = 1, turn: int | None = None
) -> Batch:
    """Draw the batch of a step, or one of its equal ``parts``; every draw is keyed by (seed, step, sample).

    ``turn``: how many batches of these pairs came before, where other steps take theirs from other buckets.
    Pairs of one type of hint stand together, in the order of ``plan.specs``. The rows of one pair take their timesteps
    from equal shares of the schedule, one each.
    """
    names = list(plan.specs)
    own = range(part * plan.pairs // parts, (part + 1) * plan.pairs // parts)
    chosen = chosen_pairs(plan, len(cached), own, step if turn is None else turn)
    total = base.noise.count
    shares = [total * i // plan.noises_per_pair for i in range(plan.noises_per_pair + 1)]
    latents, noise, times, rows = [], [], [], []
    hints: dict[str, list[Tensor]] = {}
    for place in sorted(own, key=lambda place: int(cached.kinds[chosen[place]])):
        index = row = chosen[place]
        if cached.mirrors is not None:
            turned = float(torch.rand((), generator=torch_rng("flip", plan.seed, step, place))) < plan.flip
            row = int(cached.mirrors[index]) if turned else index
        moments = cached.moments[row].float()
        shape = (moments.shape[0] // 2, *moments.shape[1:])
        for i in range(plan.noises_per_pair):
            generator = torch_rng("noise", plan.seed, step, place * plan.noises_per_pair + i)
            latents.append(base.draw_latents(moments[None], torch.randn(shape, generator=generator))[0])
            noise.append(torch.randn(shape, generator=generator))
            times.append(int(torch.randint(shares[i], shares[i + 1], (), generator=generator)))
            dropped = float(torch.rand((), generator=generator)) < plan.prompt_dropout
            rows.append(0 if dropped else int(cached.prompt_rows[index]))
        picture, name = cached.hints[row].numpy(), names[int(cached.kinds[index])]
        hints.setdefault(name, []).append(plan.specs[name].tensor(picture, picture.shape[:2]))
    text = cached.text[rows].to(torch.device("cpu"), torch.float32).tensors()
    return Batch(
        _sent(torch.stack(latents), base.device),
        _sent(torch.stack(noise), base.device),
        _sent(torch.tensor(times), base.device),
        TextEmbedding(**{name: _sent(value, base.device) for name, value in text.items()}),
        {name: _sent(torch.cat(of_type), base.device) for name, of_type in hints.items()},
        plan.noises_per_pair,
    )


def chosen_pairs(plan: BatchPlan, count: int, places: range, turn: int) -> dict[int, int]:
    """The pair at each of a batch's places, of ``count`` pairs in shuffled epochs."""
    order: dict[int, np.ndarray] = {}
    chosen = {}
    for place in places:
        epoch, visit = divmod(turn * plan.pairs + place, count)
        if epoch not in order:
            order[epoch] = numpy_rng("order", plan.seed, epoch).permutation(count)
        chosen[place] = int(order[epoch][visit])
    return chosen


def _sent(value: Tensor, device: torch.device) -> Tensor:
    """``value`` on the device; copied to a GPU from pinned memory, so that the copy does not wait for queued work."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def hint_features_of(base: Backbone, branch: ControlNetwork, batch: Batch) -> Any:
    """Encode a batch's hints: features (B, ...), of a Union type after type; a mapping of such for several branches."""
    read = branch.encode_rows({kind: base.hint_input(hint) for kind, hint in batch.hints.items()})
    return tree_map(lambda feature: feature.repeat_interleave(batch.noises_per_pair, 0), read)


def controlled(
    base: Backbone, branch: ControlNetwork, z: Tensor, t: Tensor, text: TextEmbedding, features: Any
) -> Tensor:
    """Predict under control, (B, C, h, w) as ``z``: the part of a step that can be compiled."""
    return base.predict(z, t, text, [ActiveControl(branch, features)])


@torch.no_grad()
def residual_sizes(base: Backbone, branch: ControlNetwork, z: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Measure residuals: by tap, the sums of squares (2,) float64 of what the control adds to the feature and of that
    feature."""
    control = ActiveControl(branch, hint_features_of(base, branch, batch))
    effect = base.control_effect(z, batch.t, batch.text, control)
    return {name: torch.stack([x.double().square().sum() for x in both]).cpu() for name, both in effect.items()}


def objective(
    base: Backbone, branch: ControlNetwork, batch: Batch, predict: Callable[..., Tensor] = controlled
) -> Tensor:
    """Compute the paper's equation (5): the mean squared error of the prediction, given z_t, t, prompt and hint; ().

    ``predict``: ``controlled``, or that function compiled.
    """
    z = base.noise.add(batch.latents, batch.noise, batch.t)
    prediction = predict(base, branch, z, batch.t, batch.text, hint_features_of(base, branch, batch))
    return F.mse_loss(prediction.float(), base.noise.target(batch.latents, batch.noise, batch.t))
