"""How weights are moved: AdamW, or Muon for matrices with AdamW for the rest; and their average over steps."""

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

OptimizerName = Literal["adamw", "muon"]

_EDGES = ("embed", "conv_in", "conv_out.")
"""In names of what meets tokens, timesteps, latents and types: not Muon's, which is for the matrices in between."""


class Optimizer:
    """AdamW; by the name ``muon``, Muon (Jordan et al., 2024) for weight matrices, a convolution's taken as
    (out, in x k x k).

    What meets tokens, timesteps and latents (embeddings, first and last convolution) stays with AdamW, as do vectors.
    Rates are AdamW's: Muon's updates are scaled to the same root mean square.
    """

    def __init__(
        self,
        module: nn.Module,
        name: OptimizerName = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
    ) -> None:
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        inner = [n for n, p in named.items() if name == "muon" and p.ndim >= 2 and not any(e in n for e in _EDGES)]
        # torch's Muon takes matrices alone: parameters that share the convolutions' memory.
        self._views = [(named[n], nn.Parameter(named[n].detach().view(len(named[n]), -1))) for n in inner]
        rest = [p for n, p in named.items() if n not in set(inner)]
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=0.0, betas=betas, weight_decay=weight_decay, fused=True)
        ]
        if self._views:
            views = [view for _, view in self._views]
            self._parts.append(
                torch.optim.Muon(views, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            )

    def step(self, rate: float) -> None:
        """One step at this learning rate; gradients are used up."""
        for parameter, view in self._views:
            view.grad = None if parameter.grad is None else parameter.grad.reshape(view.shape)
            parameter.grad = None
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """All it remembers, as tensors by name; ``restore`` takes it."""
        return {
            f"{number}.{index}.{name}": value
            for number, part in enumerate(self._parts)
            for index, kept in part.state_dict()["state"].items()
            for name, value in kept.items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a ``state``."""
        held: list[dict[int, dict[str, Any]]] = [{} for _ in self._parts]
        for key, value in state.items():
            number, index, name = key.split(".", 2)
            held[int(number)].setdefault(int(index), {})[name] = value
        for part, kept in zip(self._parts, held, strict=True):
            part.load_state_dict({"state": kept, "param_groups": part.state_dict()["param_groups"]})


class Average:
    """An exponential average of a module's weights over steps (EMA), as a module of its own."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after ``step`` steps; the first steps weigh more, so that the start is forgotten."""
        keep = min(self.decay, (1 + step) / (10 + step))
        state = self.module.state_dict()
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                state[name].lerp_(value, 1 - keep)
            else:
                state[name].copy_(value)
