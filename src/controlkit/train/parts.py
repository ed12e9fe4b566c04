"""The parts of a recipe, one for each room that needs it: a recipe is resolved once (``setup.resolve``)."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from controlkit.images import HintSpec
from controlkit.train.optimizers import OptimizerName
from controlkit.train.recipe import ControlRecipe, DataRecipe, Recipe, ScheduleName

Part = TypeVar("Part")


def _taken(kind: type[Part], recipe: Recipe, **more: Any) -> Part:
    """A part whose fields, but those of ``more``, are the recipe's settings of the same names."""
    names = [field.name for field in fields(kind) if field.name not in more]  # type: ignore[arg-type]
    return kind(**{name: getattr(recipe, name) for name in names}, **more)


@dataclass(frozen=True)
class DataPlan:
    """The pairs to train on and to hold out (``setup.training_pairs``)."""

    data: DataRecipe
    control: ControlRecipe
    specs: Mapping[str, HintSpec]
    heldout: int
    """Pairs to hold out."""
    seed: int


@dataclass(frozen=True)
class BatchPlan:
    """How batches are drawn (``step.draw_batch``); settings as in ``Recipe``."""

    specs: Mapping[str, HintSpec]
    """By type of hint, or under ""."""
    flip: float
    batch: int
    noises_per_pair: int
    prompt_dropout: float
    seed: int

    @classmethod
    def of(cls, recipe: Recipe, specs: Mapping[str, HintSpec]) -> "BatchPlan":
        """Take the recipe's settings."""
        return _taken(cls, recipe, specs=specs, flip=recipe.data.flip)

    @property
    def pairs(self) -> int:
        """Pairs in a batch."""
        return self.batch // self.noises_per_pair


@dataclass(frozen=True)
class RatePlan:
    """The learning rate of every step (``schedule.learning_rate``); settings as in ``Recipe``."""

    lr: float
    schedule: ScheduleName
    steps: int
    warmup: int
    cooldown: int
    cycles: int
    power: float
    max_minutes: float | None

    @classmethod
    def of(cls, recipe: Recipe) -> "RatePlan":
        """Take the recipe's settings."""
        return _taken(cls, recipe)


@dataclass(frozen=True)
class LearningPlan:
    """The weights that are trained and how they are updated (``state.TrainState``); settings as in ``Recipe``."""

    optimizer: OptimizerName
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    max_grad_norm: float
    ema: float
    unfreeze_after: int | None
    precision: str


@dataclass(frozen=True)
class ComputePlan:
    """How a batch's gradients are computed (``gradients.Gradients``); settings as in ``Recipe``."""

    gradient_accumulation: int
    gradient_checkpointing: bool
    compile: bool


@dataclass(frozen=True)
class Resolved:
    """A recipe in parts. ``recipe``: the whole, which is recorded beside what comes of it."""

    recipe: Recipe
    data: DataPlan
    batches: BatchPlan
    rates: RatePlan
    learning: LearningPlan
    compute: ComputePlan

    @classmethod
    def of(cls, recipe: Recipe, specs: Mapping[str, HintSpec]) -> "Resolved":
        """Take a recipe apart; ``specs``: its hints' contracts."""
        return cls(
            recipe,
            DataPlan(recipe.data, recipe.control, specs, recipe.evaluation.num, recipe.seed),
            BatchPlan.of(recipe, specs),
            RatePlan.of(recipe),
            _taken(LearningPlan, recipe),
            _taken(ComputePlan, recipe),
        )

    @property
    def specs(self) -> Mapping[str, HintSpec]:
        """The hints' contracts: by type for a Union, else one under ""."""
        return self.batches.specs
