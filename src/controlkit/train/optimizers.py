"""Optimizers: AdamW, Muon, AdamW in 8 bits, Adafactor, Prodigy; and the weights' average over steps (EMA)."""

import copy
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

from controlkit.errors import NotFound

OptimizerName = Literal["adamw", "muon", "adamw8bit", "adafactor", "prodigy"]

_EDGES = ("embed", "conv_in", "conv_out.")
"""Parts of the names of first and last layers, which AdamW updates: Muon is for the matrices in between."""

_ESTIMATE = ("d", "d_max", "d_numerator", "k")
"""Prodigy's state of all weights together: its estimate of the distance to the solution, and the step."""

_ALL = "all"
"""Stands in the names of a state's values that belong to no single weight."""

_ALIKE = {"exp_avg", "exp_avg_sq", "momentum_buffer"}
"""Parts of a state that are as large as their parameter."""
_CONSTANT = ("qmap1", "qmap2")
"""The levels of 8-bit numbers, one tensor that bitsandbytes shares among all weights."""


class Optimizer:
    """One of five optimizers, by name:

    - ``adamw``: torch's, fused.
    - ``muon``: Muon (Jordan et al., 2024) for weight matrices, a convolution's taken as (out, in x k x k); AdamW for
      vectors, embeddings, first and last convolution. Its updates are scaled to AdamW's root mean square.
    - ``adamw8bit``: bitsandbytes' AdamW (Dettmers et al., 2021).
    - ``adafactor``: torch's (Shazeer and Stern, 2018), convolutions taken as for Muon. A rate is relative to a weight's
      size, and falls as one over the root of the step where that is less.
    - ``prodigy``: Prodigy (Mishchenko and Defazio, 2023), which finds the rate itself: the given one is a factor.

    ``betas`` and ``epsilon`` are AdamW's and Prodigy's; Adafactor has none, Muon's momentum is torch's own.
    Raises ``NotFound`` where the library of an optimizer is not installed.
    """

    def __init__(
        self,
        module: nn.Module,
        name: OptimizerName = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        epsilon: float = 1e-8,
    ) -> None:
        named, matrices = _matrices(module, name)
        # torch's Muon takes matrices alone, its Adafactor factors the last two sizes, which of a convolution are its
        # kernel's: parameters that share the convolutions' memory, which has to lie in rows for that.
        for n in matrices:
            named[n].data = named[n].data.contiguous()
        self._views = [(named[n], nn.Parameter(named[n].detach().view(len(named[n]), -1))) for n in matrices]
        views = [view for _, view in self._views]
        self._all = list(named.values())
        rest = [p for n, p in named.items() if n not in set(matrices)]
        adam: dict[str, Any] = {"betas": betas, "eps": epsilon}
        self._parts: list[torch.optim.Optimizer]
        if name == "adafactor":
            self._parts = [torch.optim.Adafactor(views + rest, lr=0.0)]
        elif name == "adamw8bit":
            self._parts = [_library("bitsandbytes").optim.AdamW8bit(rest, lr=0.0, **adam)]
        elif name == "prodigy":
            advised = {"safeguard_warmup": True, "use_bias_correction": True}  # for diffusion, by its authors
            self._parts = [_library("prodigyopt").Prodigy(rest, **adam, **advised)]
        else:
            self._parts = [torch.optim.AdamW(rest, lr=0.0, **adam, fused=True)]
            if views:
                self._parts.append(torch.optim.Muon(views, lr=0.0, adjust_lr_fn="match_rms_adamw"))
        for part in self._parts:
            for group in part.param_groups:
                group["weight_decay"] = weight_decay

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameters whose gradients ``step`` uses, in the form of torch's optimizers."""
        return [{"params": self._all}]

    def step(self, rate: float) -> None:
        """Make a step at this learning rate; the gradients are then None."""
        for parameter, view in self._views:
            view.grad = None if parameter.grad is None else parameter.grad.reshape(view.shape)
            parameter.grad = None
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """The optimizer's state as tensors by name, for ``restore``. Whole numbers are int64 tensors of shape ()."""
        kept: dict[str, Tensor] = {}
        for number, part in enumerate(self._parts):
            for index, parameter in enumerate(_parameters(part)):
                for name, value in part.state.get(parameter, {}).items():
                    held = value if isinstance(value, Tensor) else torch.tensor(value)
                    kept[f"{number}.{index}.{name}"] = held.clone() if name in _CONSTANT else held
            group = part.param_groups[0]
            for name in _ESTIMATE if _ESTIMATE[-1] in group else ():
                kept[f"{number}.{_ALL}.{name}"] = torch.tensor(group[name], dtype=torch.float64)
        return kept

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Set the state to what ``state()`` returned; ``ValueError`` where that was of other parameters."""
        held: list[dict[int, dict[str, Any]]] = [{} for _ in self._parts]
        for key, value in state.items():
            number, index, name = key.split(".", 2)
            if index == _ALL:
                for group in self._parts[int(number)].param_groups:
                    group[name] = type(group[name])(value.item())
            else:
                whole = value.dtype == torch.int64 and not value.ndim
                held[int(number)].setdefault(int(index), {})[name] = value.item() if whole else value
        for part, kept in zip(self._parts, held, strict=True):
            for place, values in kept.items():
                shapes = {value.shape for name, value in values.items() if name in _ALIKE}
                if shapes - {_parameters(part)[place].shape} or not values.keys() >= kept[min(kept)].keys() & _ALIKE:
                    raise ValueError(f"the optimizer's state of parameter {place} is of another one")
            part.load_state_dict({"state": kept, "param_groups": part.state_dict()["param_groups"]})


def _matrices(module: nn.Module, name: OptimizerName) -> tuple[dict[str, nn.Parameter], list[str]]:
    """The trained parameters by name; and the names of those this optimizer takes as matrices."""
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if name == "muon":
        return named, [n for n, p in named.items() if p.ndim >= 2 and not any(e in n for e in _EDGES)]
    return named, [n for n, p in named.items() if name == "adafactor" and p.ndim > 2]


def state_bytes(module: nn.Module, name: OptimizerName) -> int:
    """Estimate an optimizer's memory in bytes from a module's weights, without making it."""
    named, matrices = _matrices(module, name)
    total = 0
    for n, p in named.items():
        size = p.numel() * p.element_size()
        if name == "adafactor":
            total += size if p.ndim < 2 else (len(p) + p.numel() // len(p)) * p.element_size()
        elif name == "adamw8bit" and p.numel() >= 4096:  # smaller tensors keep float32
            total += 2 * (p.numel() + 4 * -(-p.numel() // 256))  # a code each, and a scale for every 256
        elif name == "prodigy":
            total += (4 if p.any() else 3) * size  # AdamW's two, one more, and the beginning where it was not zero
        else:
            total += size if n in matrices else 2 * size
    return total


def _parameters(part: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in part.param_groups for parameter in group["params"]]


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise NotFound(
            f"This optimizer is {name}'s. Install it with: pip install 'controlkit[optimizers]', or take optimizer: "
            "adamw."
        ) from error


class EMA:
    """An exponential average of a module's weights over steps, as a module of its own.

    torch's ``AveragedModel`` forgets the first weights, and computes its decay on the device, in float32.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Add the weights after ``step`` steps; the decay is at most (1 + step) / (10 + step), to forget the start."""
        keep = min(self.decay, (1 + step) / (10 + step))
        state = self.module.state_dict()
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                state[name].lerp_(value, 1 - keep)
            else:
                state[name].copy_(value)
