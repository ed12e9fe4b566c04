"""Opponents on disk: a folder with ``baseline.json``, which says what it is, and its weights."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from controlkit.backbones import Backbone
from controlkit.baselines.seam import Baseline
from controlkit.baselines.table import opponent
from controlkit.errors import Invalid, Mismatch, NotFound, first_fault
from controlkit.files import inside, read_json, write_atomic
from controlkit.formats import WEIGHTS, write_tensors
from controlkit.tensors import open_tensors

ABOUT = "baseline.json"


class Settings(BaseModel):
    """The settings of a training. ``rate``: the learning rate, reached after ``warmup`` steps; it falls over the last
    ``cooldown`` share of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(6000, ge=1, le=10**8)
    minutes: float | None = Field(None, gt=0, le=1e6)
    pflop: float | None = Field(None, gt=0, le=1e9)
    """The most floating point operations to spend, in 1e15."""
    batch: int = Field(16, ge=1, le=4096)
    rate: float = Field(3e-4, gt=0, le=1)
    warmup: int = Field(100, ge=0, le=10**6)
    cooldown: float = Field(0.3, ge=0, le=1)
    scenes: int = Field(6000, ge=8, le=10**6)
    """Scenes to train on."""
    seed: int = Field(0, ge=0, lt=2**63)
    checkpoint_every: int = Field(200, ge=1, le=10**6)


class About(BaseModel):
    """The record of an opponent: what it is, what it was trained on and by, and what that cost."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(max_length=100)
    hint: str = Field(max_length=100)
    base: str = Field(max_length=300)
    base_digest: str = Field(max_length=100)
    settings: Settings = Settings()
    step: int = Field(0, ge=0, le=10**9)
    seconds: float = Field(0.0, ge=0, le=1e10)
    flops: float = Field(0.0, ge=0, le=1e30)
    """Floating point operations of all steps, forward and backward."""
    parameters: int = Field(0, ge=0, le=10**13)
    strength: float | None = Field(None, ge=0, le=100)
    """The strength of guidance that its pictures are made with; None: the request's."""

    def cost(self) -> str:
        """The training's cost in words: steps, hours, operations."""
        return f"{self.step:,} steps, {self.seconds / 3600:.2f} hours, {self.flops / 1e15:.3g} PFLOP"


def save_baseline(folder: Path, baseline: Baseline, about: About) -> None:
    """Write an opponent into a folder: the weights first, each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    if learnt := baseline.state_dict():
        write_tensors(folder / WEIGHTS, learnt, {"controlkit.baseline": about.name})
    write_about(folder, about)


def write_about(folder: Path, about: About) -> None:
    """Write an opponent's record alone."""
    write_atomic(folder / ABOUT, (json.dumps(about.model_dump(), indent=2) + "\n").encode())


def read_about(folder: Path) -> About:
    """The record in a folder; ``NotFound`` where there is none, ``Invalid`` where it is none, or a link out."""
    path = inside(folder, folder / ABOUT)
    if not path.is_file():
        raise NotFound(f"{folder} holds no opponent: expected {ABOUT}, as `controlkit baseline train` writes it.")
    held: Any = read_json(path)
    try:
        about = About.model_validate(held)
    except ValidationError as error:
        raise Invalid(first_fault(error, str(path), About.model_fields)) from error
    opponent(about.name)
    return about


def load_baseline(folder: Path, base: Backbone) -> tuple[Baseline, About]:
    """The opponent in a folder, on a base, and its record.

    Raises as ``read_about``; ``NotFound`` where its training has not ended, ``Mismatch`` where it is of another base.
    """
    about = read_about(folder)
    if about.base_digest != base.digest:
        raise Mismatch(f'{folder} was trained on other weights than those of "{base.name}": use the base it names.')
    baseline = opponent(about.name).new(base, about.hint)
    if not baseline.state_dict():
        return baseline, about
    if not (folder / WEIGHTS).is_file():
        raise NotFound(f"{folder} has no weights yet: run its `controlkit baseline train` again until it ends.")
    weights = inside(folder, folder / WEIGHTS)
    put(baseline, open_tensors(weights).read(), weights)
    return baseline, about


def put(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Put tensors from a file into a module; ``Mismatch`` where names or shapes are others."""
    own = module.state_dict()
    odd = sorted(own.keys() ^ tensors.keys()) or [name for name in own if own[name].shape != tensors[name].shape]
    if odd:
        raise Mismatch(f"{path} holds other weights than this opponent's ({odd[0]}): it is of another base or hint.")
    module.load_state_dict(tensors)
