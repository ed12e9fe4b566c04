"""Training an opponent: one loop for all of them, an iterator of records, with checkpoints and exact resume.

Runs with the same threads yield the same weights, interrupted or not; but with ``Settings.minutes`` the clock decides
where a stage and the training end.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from controlkit.annotators import contract
from controlkit.backbones import Backbone
from controlkit.baselines.saved import ABOUT, About, Settings, put, read_about, save_baseline, write_about
from controlkit.baselines.seam import Baseline, Material, stage_at
from controlkit.baselines.table import opponent
from controlkit.data import ScenePairs, build_cache, open_store
from controlkit.errors import Invalid, Mismatch, one_line
from controlkit.files import inside, mark_output, sweep, write_atomic
from controlkit.formats import write_tensors
from controlkit.precision import autocast, training_attention
from controlkit.tensors import open_safetensors
from controlkit.train import learning_rate
from controlkit.train.checkpoints import STATE, sole_owner
from controlkit.train.optimizers import Optimizer
from controlkit.train.parts import RatePlan
from controlkit.train.records import read_log
from controlkit.train.schedule import Clock

LOG = "log.jsonl"
_LONGEST_GRADIENT = 1.0
"""Gradients with a greater L2 norm are scaled down to it."""


class Diverged(Invalid):
    """A training whose loss is no number any more."""


@dataclass(frozen=True)
class Learnt:
    """One step of a training, a line of its log."""

    step: int
    loss: float
    seconds: float
    stage: str
    rate: float
    """The learning rate."""
    flops: float
    """Floating point operations of the step, forward and backward."""
    share: float
    """How far the training is, 0 to 1."""


def material_of(baseline: Baseline, settings: Settings, folder: Path) -> Material:
    """Scenes that controls are trained on, with what steps need of them, computed once and kept in ``folder``."""
    pairs = ScenePairs(baseline.base.size, settings.scenes, settings.seed)
    with open_store() as store:
        [cached] = build_cache(
            baseline.base, pairs, {"": baseline.spec}, folder / f"pairs-{baseline.base.digest}.safetensors", store=store
        )
    return Material(baseline.base, baseline.spec, pairs, cached, settings.batch, settings.seed)


def train_baseline(
    name: str,
    base: Backbone,
    settings: Settings,
    out: Path,
    hint: str = "",
    stopping: Callable[[], bool] = lambda: False,
    material: Material | None = None,
) -> Iterator[Learnt]:
    """Train an opponent, or go on, yielding a record a step; ``OUT`` then holds what ``load_baseline`` reads.

    Args:
        hint: the kind of hints; "" is the opponent's own.
        stopping: asked after every step; where true, a checkpoint is written and the iterator ends.
        material: pairs of one's own in place of scenes.

    Raises ``Mismatch`` for a folder of other settings, ``Unsupported`` where another process trains there, ``Diverged``
    where the loss is no number.
    """
    row = opponent(name)
    about = About(name=name, hint=hint or row.hint, base=base.name, base_digest=base.digest, settings=settings)
    contract(about.hint)
    _check_begun(out, about)
    mark_output(out, "baseline train")
    with sole_owner(out):
        sweep(out)
        if not (out / ABOUT).exists():
            write_about(out, about)
        baseline = row.new(base, hint, settings.seed)
        if baseline.stages:
            training = _Training(baseline, material or material_of(baseline, settings, out), about, out)
            while not training.ended:
                yield training.step()
                if stopping():
                    break
            training.save()
            about = training.about()
            if not training.ended:
                write_about(out, about)
                return
        save_baseline(out, baseline.eval().requires_grad_(False), about)


def _check_begun(out: Path, about: About) -> None:
    """Refuse a folder in which a training with other settings began, whose length alone may be another, or whose files
    are links out of it."""
    for name in (ABOUT, STATE, LOG):
        inside(out, out / name)
    if not (out / ABOUT).is_file():
        return
    free = {"steps", "minutes", "pflop", "checkpoint_every"}
    before, now = (one.settings.model_dump(exclude=free) | _identity(one) for one in (read_about(out), about))
    changed = [f"{key} is {now[key]!r} and was {before[key]!r}" for key in now if now[key] != before[key]]
    if changed:
        raise Mismatch(f"{out} holds another training: {'; '.join(changed)}. Give another --out.")


def _identity(about: About) -> dict[str, Any]:
    return about.model_dump(include={"name", "hint", "base", "base_digest"})


class _Training:
    """A training between two steps. ``done``: steps made."""

    def __init__(self, baseline: Baseline, material: Material, about: About, out: Path) -> None:
        self.baseline, self.material, self.out = baseline, material, out
        self._about, self.settings = about, about.settings
        self.clock = Clock(self.settings.minutes)
        self.done, self.spent, self.stage = 0, 0.0, ""
        if (out / STATE).is_file():
            self._restore()
        else:
            self._enter(stage_at(baseline.stages, 0.0))
        self._cut_log()

    @property
    def ended(self) -> bool:
        """Whether steps, time or operations have run out."""
        return self.done >= self.settings.steps or self.clock.over or self._share >= 1

    @property
    def _share(self) -> float:
        """The share that has passed of the time or of the operations, whichever is further."""
        return max(self.clock.share, self.spent / (1e15 * (self.settings.pflop or math.inf)))

    def step(self) -> Learnt:
        """Make a step and write its record."""
        started = time.perf_counter()
        self._enter(stage_at(self.baseline.stages, self._progress))
        rate = learning_rate(self._rates, self.done, min(self._share, 1.0))
        loss = self._backward()
        if not math.isfinite(value := loss.item()):
            raise Diverged(f"The loss of step {self.done + 1} is no number: take a lower rate, in another folder.")
        nn.utils.clip_grad_norm_(self.learning.parameters(), _LONGEST_GRADIENT)
        self.optimizer.step(rate)
        self.done += 1
        self.spent += self.flops
        seconds = round(self.clock.stepped(started), 4)
        record = Learnt(self.done, value, seconds, self.stage, rate, self.flops, round(self._progress, 5))
        with (self.out / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(asdict(record)) + "\n")
        if self.done % self.settings.checkpoint_every == 0:
            self.save()
        return record

    def about(self) -> About:
        """The record of what was trained so far."""
        size = sum(parameter.numel() for parameter in self.baseline.parameters())
        cost = {"step": self.done, "seconds": round(float(self.clock.facts()["seconds"]), 1), "flops": self.spent}
        return self._about.model_copy(update={**cost, "parameters": size})

    def save(self) -> None:
        """Write all that a step changes, in place of the checkpoint before."""
        held = {f"baseline.{name}": value for name, value in self.baseline.state_dict().items()}
        held |= {f"optimizer.{name}": value for name, value in self.optimizer.state().items()}
        facts = {"step": str(self.done), "stage": self.stage, "spent": repr(self.spent), **self.clock.facts()}
        write_tensors(self.out / STATE, held, facts)

    @property
    def _progress(self) -> float:
        return min(max(self.done / self.settings.steps, self._share), 1.0)

    @property
    def _rates(self) -> RatePlan:
        settings = self.settings
        cooldown = int(settings.cooldown * settings.steps)
        warmup = min(settings.warmup, settings.steps // 10)
        return RatePlan(settings.rate, "constant", settings.steps, warmup, cooldown, 1, 1.0, settings.minutes)

    def _enter(self, stage: str) -> None:
        """Have a stage's part learn, by an optimizer of its own; nothing where it does already."""
        if stage != self.stage:
            self.stage, self.learning = stage, self.baseline.begin(stage)
            self.optimizer = Optimizer(self.learning, "muon")
            self.flops = self._measured_flops()

    def _backward(self) -> Tensor:
        """Compute the gradients of the next step; returns its loss."""
        kind = self.baseline.base.device.type
        with autocast(kind), training_attention(kind):
            loss = self.baseline.loss(self.material, self.done, self.stage)
        loss.backward()
        return loss.detach()

    def _measured_flops(self) -> float:
        """The operations of a step, counted in one that changes nothing."""
        self.learning.eval()  # what keeps means of what it sees must not see this twice
        counter = FlopCounterMode(display=False)
        with counter:
            self._backward()
        self.learning.zero_grad()
        self.learning.train()
        return float(counter.get_total_flops())

    def _restore(self) -> None:
        path = self.out / STATE
        try:
            with open_safetensors(path) as file:
                facts: Mapping[str, str] = file.metadata() or {}
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            step, spent, seconds, last = (float(facts[key]) for key in ("step", "spent", "seconds", "last_step"))
            if facts["stage"] not in self.baseline.stages or not all(
                0 <= x < 1e30 for x in (step, spent, seconds, last)
            ):
                raise ValueError("its stage, step or times are of no training")
            self._enter(facts["stage"])
            parts = {part: _within(held, part) for part in ("baseline", "optimizer")}
            put(self.baseline, parts["baseline"], path)
            self.optimizer.restore(parts["optimizer"])
        except (SafetensorError, OSError, KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise Invalid(
                f"{path} cannot be read ({one_line(error)}): delete it, and the training begins anew."
            ) from error
        self.done, self.spent = int(step), spent
        self.clock.restore(seconds, last)

    def _cut_log(self) -> None:
        """Cut the log back to the step that the training goes on from."""
        kept = [line for line in read_log(self.out / LOG) if line["step"] <= self.done]
        write_atomic(self.out / LOG, "".join(f"{json.dumps(line)}\n" for line in kept).encode())


def _within(held: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): value for name, value in held.items() if name.startswith(f"{part}.")}
