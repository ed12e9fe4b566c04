"""All that a training step changes, and how: the branch, an unfrozen base, the optimizer, the weights' average."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from controlkit.backbones import Backbone
from controlkit.branch import ControlNetwork
from controlkit.train.optimizers import EMA, Optimizer
from controlkit.train.parts import LearningPlan
from controlkit.train.ranks import Ranks

if TYPE_CHECKING:
    from controlkit.train.sharding import Shards


@dataclass(frozen=True)
class TrainState:
    """All that a step changes. With ``shards``, all processes have to call ``result`` and ``state``."""

    branch: ControlNetwork
    base: Backbone
    """The base to train on: the run's, or one with a denoiser of its own that is unfrozen at some step."""
    learning: nn.Module
    """Holds the trained parameters: the branch, and such a denoiser."""
    optimizer: Optimizer
    average: EMA | None = None
    shards: "Shards | None" = None
    scaler: torch.amp.GradScaler | None = None
    """Scales the loss, so that its gradients fit into float16."""

    @classmethod
    def of(cls, plan: LearningPlan, branch: ControlNetwork, base: Backbone, ranks: Ranks) -> "TrainState":
        """Make the state of a run's start. Raises ``NotFound`` where the optimizer's library is not installed."""
        learning: nn.Module = branch
        if plan.unfreeze_after:
            learning = nn.ModuleDict({"branch": branch, "unet": base.denoiser.requires_grad_(True)})
        average = EMA(branch, plan.ema) if plan.ema else None
        shards = None
        if ranks.sharded:
            from controlkit.train.sharding import Shards

            shards = Shards(branch, [average.module] if average else [], base.device, ranks.count)
        optimizer = Optimizer(learning, plan.optimizer, plan.betas, plan.weight_decay, plan.epsilon)
        scaler = torch.amp.GradScaler(base.device.type) if plan.precision == "fp16" else None
        return cls(branch, base, learning, optimizer, average, shards, scaler)

    def result(self) -> ControlNetwork:
        """The control to measure and save, with whole weights."""
        module = self.average.module if self.average else self.branch
        return self.shards.gather(module) if self.shards else module  # type: ignore[return-value]

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to the parameters' gradients."""
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def clip(self, most: float) -> Tensor:
        """Scale the gradients down to an L2 norm of at most ``most``; returns the norm they had, () on the device."""
        if self.scaler:
            self.scaler.unscale_(self.optimizer)  # type: ignore[arg-type]  # it asks for param_groups alone
        norm = nn.utils.get_total_norm([p.grad for p in self.learning.parameters() if p.grad is not None])
        if self.shards:
            norm = self.shards.whole({"norm": norm}, keep=True)["norm"].to(norm.device)
        nn.utils.clip_grads_with_norm_(self.learning.parameters(), most, norm)
        return norm

    @property
    def skips_overflow(self) -> bool:
        """Whether a step with infinite gradients is skipped, because the loss is scaled and can be scaled less."""
        return self.scaler is not None and self.scaler.get_scale() > 1

    def step(self, rate: float, number: int) -> None:
        """Update the weights with their gradients at this learning rate; ``number``: of the step, from 1."""
        if self.scaler:
            self.scaler.step(self.optimizer, rate)  # type: ignore[arg-type]
            self.scaler.update()
            self.learning.zero_grad()
        else:
            self.optimizer.step(rate)
        if self.average:
            self.average.update(self.branch, number)

    def state(self, keep: bool = True) -> dict[str, Tensor]:
        """Collect everything as whole tensors by name; empty where not ``keep``."""
        parts = {"optimizer": self.optimizer.state(), "learning": self.learning.state_dict()}
        if self.average:
            parts["average"] = self.average.module.state_dict()
        if self.scaler:
            parts["scaler"] = {n: torch.tensor(v) for n, v in self.scaler.state_dict().items()}
        found = {f"{part}.{name}": value.contiguous() for part, held in parts.items() for name, value in held.items()}
        return self.shards.whole(found, keep) if self.shards else found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore the tensors of ``state()``, written by any number of processes."""
        state = self.shards.parts(state) if self.shards else state

        def part(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}

        self.learning.load_state_dict(part("learning"))
        self.optimizer.restore(part("optimizer"))
        if self.average:
            self.average.module.load_state_dict(part("average"))
        if self.scaler:
            self.scaler.load_state_dict({name: value.item() for name, value in part("scaler").items()})
