"""Controls that a report trains in its own folder, by recipes, and measures at some of their checkpoints.

The same command goes on after an interruption: a run from its last checkpoint, exactly; and what was measured is read.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from controlkit.errors import Invalid, Mismatch, first_fault, one_line
from controlkit.files import inside, read_json, write_atomic
from controlkit.formats import SavedControl, load_control
from controlkit.measure import Figure, Quality, ceiling_of, evaluate, world_of
from controlkit.reproduce.entrants import SHOWN, KeepsFirst, Plan, Trial, pixels_of
from controlkit.reproduce.rows import read_strip, write_strip
from controlkit.sample import maker
from controlkit.train import EvaluationSummary, train_control
from controlkit.train.checkpoints import checkpoints_in
from controlkit.train.recipe import Recipe
from controlkit.train.records import read_log

MEASURED = "measured.json"
LEAST = 0.1
"""Below this share of their full length trainings show that the machinery works, and nothing of the paper's."""
PAPER_RECIPE: Mapping[str, Any] = {"optimizer": "adamw", "lr": 5e-4, "batch": 32, "warmup": 50}
"""The paper's, at the rate that suits ``mini``: AdamW at a constant rate, half of the prompts dropped."""
OUR_RECIPE: Mapping[str, Any] = {"optimizer": "muon", "lr": 2.5e-3, "batch": 48, "noises_per_pair": 3, "warmup": 50}
"""Muon, three noises of each pair in a batch, and a rate that falls from the warm-up on."""
_WANTED = {"fidelity", "floor", "ceiling", "obedience"}
_FIGURES = (*sorted(_WANTED), "floor_no_control", "floor_shuffled", "clip_score", "clip_score_no_control")
_FIGURES += ("clip_score_truth", "fid", "fid_no_control")


@dataclass(frozen=True)
class Measured:
    """A checkpoint: ``measure.evaluate``'s figures of it. ``quality_kept``: None where quality is not judged."""

    step: int
    figures: Mapping[str, Figure]
    is_meaningful: bool
    quality_kept: bool | None

    @classmethod
    def of(cls, step: int, report: Mapping[str, Any]) -> "Measured":
        """Take what a report needs out of that of ``measure.evaluate``."""
        figures = {name: Figure(**report[name]) for name in _FIGURES if name in report}
        return cls(step, figures, report["is_meaningful"], report.get("quality_kept"))

    def summary(self) -> EvaluationSummary:
        """The evaluation in short, as a run takes it (``train.found_step``)."""
        obedience = self.figures["obedience"]
        return EvaluationSummary(self.step, obedience.low, self.is_meaningful, obedience.mean)

    def words(self, name: str) -> str:
        """A figure with two digits after the point, or "-" where it was not measured."""
        return f"{self.figures[name].mean:.2f}" if name in self.figures else "-"


class _Held(BaseModel):
    """The file of what was measured in a run's folder."""

    model_config = ConfigDict(extra="forbid")

    settings: dict[str, Any]
    measured: list[Measured]


def read_measured(run: Path, settings: Mapping[str, Any]) -> list[Measured]:
    """The measurements in a run's folder, so far; ``settings``: of the run and of the measuring, as JSON.

    Raises ``Mismatch`` where it was measured with others, ``Invalid`` for a file that is none of these.
    """
    path = inside(run, run / MEASURED)
    if not path.is_file():
        return []
    try:
        held = TypeAdapter(_Held).validate_python(read_json(path))
        if not all(one.figures.keys() >= _WANTED for one in held.measured):
            raise Invalid(f"{path} lacks figures: delete {run}, and it is trained anew.")
    except ValidationError as error:
        reason = one_line(first_fault(error, "it", _Held.model_fields)).removeprefix("it: ")
        raise Invalid(f"{path} holds nothing that was measured ({reason}) Delete {run}: it is trained anew.") from error
    if changed := [key for key in settings if held.settings.get(key) != settings[key]]:
        raise Mismatch(
            f"{run} was measured with other settings: {changed[0]} is {settings[changed[0]]!r} and was "
            f"{one_line(repr(held.settings.get(changed[0])))[:200]}. Give those, or another --out."
        )
    return held.measured


@dataclass(frozen=True)
class Examiner:
    """A trial with what does not depend on the control: pictures without it, the ceiling, the referee."""

    trial: Trial
    plan: Plan

    @cached_property
    def plain(self) -> list[np.ndarray]:
        """The pictures without control."""
        return pixels_of(maker(self.trial.base), self.trial.evaluation.requests("no_control"))

    @cached_property
    def _quality(self) -> Quality | None:
        world = world_of(self.trial.base)
        return Quality(world.referee(self.trial.base.device.type), self.trial.real) if world else None

    @cached_property
    def _rebuilt(self) -> list[np.ndarray]:
        return ceiling_of(self.trial.base)(self.trial.truth)

    def report(self, saved: SavedControl) -> tuple[dict[str, Any], list[np.ndarray]]:
        """``measure.evaluate``'s report on a control, and its pictures."""
        make = KeepsFirst(maker(self.trial.base, {self.trial.evaluation.control.name: saved}))
        rebuilt = self._rebuilt
        report = evaluate(make, self.trial.evaluation, lambda _: rebuilt, self._quality, no_control=self.plain)
        return report, make.pictures

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """The settings that a run and its measuring depend on, as JSON."""
        facts = {name: value for name, value in self.trial.facts().items() if name != "seconds"}
        return json.loads(json.dumps(facts | {"recipe": recipe.model_dump()}))

    def follow(self, recipe: Recipe, run: Path, marks: Iterable[int], title: str) -> list[Measured]:
        """Train a control in the folder ``run``, or go on, and measure it at the steps ``marks`` and at its end.

        A checkpoint has to be due at each of them. ``KeyboardInterrupt`` where the plan is to stop. Raises as
        ``train_control`` and ``read_measured`` do.
        """
        settings, due = self.settings(recipe), {*marks, recipe.steps}
        found = {one.step: one for one in read_measured(run, settings)}

        def measure(step: int) -> None:
            if step not in due or step in found:
                return
            self.plan.on_step(f"{title}: measuring step {step:,}")
            [folder] = [path for path in checkpoints_in(run) if path.name == f"step-{step:07d}"]
            report, made = self.report(load_control(str(folder / "control"), self.trial.base))
            found[step] = Measured.of(step, report)
            write_strip(pictures_at(run, step), made[:SHOWN])
            held = {"settings": settings, "measured": [asdict(one) for one in found.values()]}
            write_atomic(run / MEASURED, (json.dumps(held, indent=1) + "\n").encode())

        for path in checkpoints_in(run)[-1:]:
            measure(int(path.name.removeprefix("step-")))
        if recipe.steps not in found:
            for record in train_control(recipe, run, self.trial.base, stopping=self.plan.stopping):
                self.plan.on_step(f"{title}: step {record.step:,} of {recipe.steps:,}, loss {record.loss:.3f}")
                measure(record.step)
            if recipe.steps not in found:
                raise KeyboardInterrupt
        return [found[step] for step in sorted(found)]


def pictures_at(run: Path, step: int) -> Path:
    """The file with the first pictures under control at a step."""
    return run / "pictures" / f"step-{step:07d}.png"


def shown_at(run: Path, step: int, count: int) -> list[np.ndarray]:
    """The first ``count`` pictures under control at a step; none where they are gone."""
    return read_strip(pictures_at(run, step), min(count, SHOWN))


def run_folder(out: Path, report: str, plan: Plan, *names: Any) -> Path:
    """The folder of one of a report's trainings; trainings of another length have another."""
    return out / f"{report}-runs" / f"share-{plan.share:g}" / "-".join(map(str, names))


def steps_of(full: int, plan: Plan) -> int:
    """The steps of a training of so many in full."""
    return max(round(plan.share * full), 2)


def cost_of(run: Path) -> str:
    """The cost of a run in words: steps and hours."""
    log: Sequence[Mapping[str, Any]] = read_log(run / "log.jsonl")
    return f"{len(log):,} steps, {sum(line['seconds'] for line in log) / 3600:.2f} hours"


def on_length(plan: Plan) -> str:
    """A sentence on how long the trainings of a plan are; "" for their full length."""
    if plan.share >= 1:
        return ""
    words = f"Trainings have {plan.share:.3g} of their full length"
    trial = ", so this is a trial of the machinery: it says nothing about the paper" if plan.share < LEAST else ""
    return f"{words}{trial}."
