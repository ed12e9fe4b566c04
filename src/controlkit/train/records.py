"""The records of a run's steps, and what its evaluations show of control."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from controlkit.errors import Invalid, first_fault, one_line
from controlkit.files import inside, read_bytes
from controlkit.measure import FOUND, Obedience, clip_score_kept
from controlkit.train.recipe import EvaluationRecipe

_MAIN = ("fidelity", "floor", "ceiling", "obedience")
_RELATIVE, _RESIDUAL, _LOSS, _STEPS = 2.0, 1000.0, 3.0, 8
"""A run has diverged above these: loss relative to no control, residual relative to its feature, mean loss of so many
steps relative to that of the first steps."""
QUALITY = ("clip_score", "clip_score_no_control", "clip_score_truth")


@dataclass(frozen=True)
class Record:
    """One step of a run, a line of ``log.jsonl``. ``evaluation`` and ``verdict`` are None on steps without one."""

    step: int
    loss: float
    seconds: float
    evaluation: Obedience | None = None
    verdict: str | None = None
    relative: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """By type of hint, or under "": the loss on held-out pairs relative to the base without control, with the same
    noise each time, in each quarter of the schedule from the least noise on. 1 is no control."""
    residuals: Mapping[str, float] = field(default_factory=dict)
    """By tap: the root mean square of its residual relative to that of the feature it is added to; 0 at the start."""
    drift: Mapping[str, float] = field(default_factory=dict)
    """By name of ``measure.COLOURS``: the mean over the pairs of a picture's value under control less that without,
    same seed and prompt, as a share of the full range; empty for a Union."""
    quality: Mapping[str, float] = field(default_factory=dict)
    """The CLIP-score with control, without, and of the true pictures; empty where no referee may judge."""

    def figures(self) -> dict[str, float]:
        """Its numbers by name, for curves; of the quarters of the schedule their mean."""
        found = {"loss": self.loss}
        if self.evaluation is not None:
            found |= {name: getattr(self.evaluation, name).mean for name in _MAIN}
        found |= {f"relative_loss/{kind or 'all'}": sum(parts) / len(parts) for kind, parts in self.relative.items()}
        found |= {f"colour_drift/{name}": value for name, value in self.drift.items()}
        found |= self.quality
        return found | {f"residuals/{tap}": value for tap, value in self.residuals.items()}

    def to_json(self) -> str:
        """Write the log's line: means of the figures, and the interval of obedience."""
        line: dict[str, Any] = {"step": self.step, "loss": self.loss, "seconds": round(self.seconds, 3)}
        if self.evaluation is not None:
            for name in _MAIN:
                line[name] = round(getattr(self.evaluation, name).mean, 5)
            line["obedience_interval"] = [self.evaluation.obedience.low, self.evaluation.obedience.high]
            line["is_meaningful"] = self.evaluation.is_meaningful
            line["verdict"] = self.verdict
        if self.drift:
            line["colour_drift"] = {name: round(x, 4) for name, x in self.drift.items()}
        if self.quality:
            line["quality"] = {name: round(x, 4) for name, x in self.quality.items()}
        if self.residuals:
            line["residuals"] = {name: round(x, 5) for name, x in self.residuals.items()}
        if self.relative:
            line["relative_loss"] = {kind: [round(x, 4) for x in quarters] for kind, quarters in self.relative.items()}
        return json.dumps(line)


_Value = Annotated[float, Field(ge=-1e30, le=1e30)]
_Values = dict[str, float]  # of which those that are not finite are not drawn


class _Line(BaseModel):
    """A line of a log, as ``Record.to_json`` writes it; other versions have other keys, too.

    Strict: what reads the line takes it as it is, so that a number in quotes is none.
    """

    model_config = ConfigDict(strict=True)

    step: int = Field(ge=0, le=10**9)
    loss: float
    seconds: float = Field(ge=0, le=1e9)
    fidelity: _Value = 0.0
    floor: _Value = 0.0
    ceiling: _Value = 0.0
    obedience: _Value = 0.0
    obedience_interval: Annotated[list[_Value], Field(min_length=2, max_length=2)] = [0.0, 0.0]
    is_meaningful: bool = False
    verdict: str | None = None
    colour_drift: _Values = {}
    quality: _Values = {}
    residuals: _Values = {}
    relative_loss: dict[str, Annotated[list[float], Field(min_length=1)]] = {}

    @model_validator(mode="after")
    def _whole_evaluation(self) -> "_Line":
        for group in ({"obedience", "obedience_interval", "is_meaningful"}, {"fidelity", "floor", "ceiling"}):
            if 0 < len(group & self.model_fields_set) < len(group):
                raise ValueError("it has a part of an evaluation")
        return self


_LONGEST = 2**27
"""Bytes of a log: those of a million steps are fewer."""


def _is_plain(held: Any) -> bool:
    """Whether this is the line of a step without an evaluation, as nearly all are: quicker than a model's answer."""
    if not isinstance(held, dict) or held.keys() != {"step", "loss", "seconds"}:
        return False
    step, loss, seconds = held.values()
    return type(step) is int and type(loss) is type(seconds) is float and 0 <= step <= 10**9 and 0 <= seconds <= 1e9


def _values(lines: list[str]) -> Iterator[Any]:
    """The values of lines of JSON, up to the first line that is none."""
    try:
        held = json.loads(f"[{','.join(lines)}]")  # all at once takes half the time
    except (ValueError, RecursionError):
        held = []
    if len(held) == len(lines):
        yield from held
        return
    for line in lines:
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            return


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; none where there is no log. What a kill or a full disk cut short ends it.

    Raises ``Invalid`` for a line that is whole and that no run wrote, or a link out of the run's folder.
    """
    if not inside(path.parent, path).is_file():
        return []
    found = list[dict[str, Any]]()
    for number, held in enumerate(_values(read_bytes(path, _LONGEST).decode(errors="replace").splitlines()), 1):
        try:
            if not _is_plain(held):
                _Line.model_validate(held)
        except ValidationError as error:
            fault = first_fault(error, "it", _Line.model_fields) if isinstance(held, dict) else type(held).__name__
            reason = one_line(fault).removeprefix("it: ").rstrip(".")
            raise Invalid(f"{path}, line {number}, is none that a run wrote ({reason}): delete it.") from error
        found.append(held)
    return found


@dataclass(frozen=True)
class EvaluationSummary:
    """An evaluation in short: obedience's lower bound and mean, whether it is meaningful, and the mean loss relative to
    no control; NaN where not measured. ``quality_kept``: by the CLIP-score, or not
    judged."""

    step: int
    low: float = math.nan
    is_meaningful: bool = False
    mean: float = math.nan
    relative: float = math.nan
    quality_kept: bool = True

    @property
    def control(self) -> bool:
        """Whether control was measured."""
        return self.is_meaningful and self.low >= FOUND


def summary_of(line: Mapping[str, Any]) -> EvaluationSummary | None:
    """Summarise the evaluation in a line of the log; None for a step without one."""
    quarters = [loss for kind in line.get("relative_loss", {}).values() for loss in kind]
    relative = sum(quarters) / len(quarters) if quarters else math.nan
    if "obedience" in line:
        quality = line.get("quality")
        kept = not quality or clip_score_kept(*(quality.get(name, math.inf) for name in QUALITY))
        return EvaluationSummary(
            line["step"], line["obedience_interval"][0], line["is_meaningful"], line["obedience"], relative, kept
        )
    return EvaluationSummary(line["step"], relative=relative) if quarters else None


def found_step(evaluations: Sequence[EvaluationSummary]) -> int | None:
    """Find the step of the first of two successive evaluations with a lower bound of at least ``FOUND``."""
    return next((a.step for a, b in itertools.pairwise(evaluations) if a.control and b.control), None)


def best_of(evaluations: Sequence[EvaluationSummary]) -> EvaluationSummary | None:
    """Choose the meaningful evaluation with the highest mean obedience, the first of equals; those with control and
    kept quality come before others. Where obedience is not measured: the one with the least relative loss."""
    if all(math.isnan(one.mean) for one in evaluations):
        return min(evaluations, key=lambda one: one.relative, default=None)
    meaningful = [one for one in evaluations if one.is_meaningful]
    return max(meaningful, key=lambda one: (one.quality_kept and one.control, one.mean), default=None)


def should_stop(
    plan: EvaluationRecipe, evaluations: Sequence[EvaluationSummary]
) -> Literal["target", "patience"] | None:
    """Why a run ends before its last step: it reached its target, or has not improved for its patience."""
    best = best_of(evaluations)
    if best is None:
        return None
    if plan.target is not None and any(
        one.is_meaningful and one.quality_kept and one.low >= plan.target for one in evaluations
    ):
        return "target"
    return "patience" if 0 < plan.patience <= sum(one.step > best.step for one in evaluations) else None


def divergence(record: Record, losses: Sequence[float]) -> str:
    """The figure that shows that a run has diverged, in words; "" where none does.

    ``record``: of its last step; ``losses``: of all its steps. The first steps' loss is the base's own, and that of a
    network that predicts nothing is near 1: a run is above both.
    """
    for name, quarters in record.relative.items():
        if not (mean := sum(quarters) / len(quarters)) <= _RELATIVE:
            return f"the loss relative to no control{f' ({name})' if name else ''} is {mean:.3g}, and 1 is no control"
    for tap, size in record.residuals.items():
        if not size <= _RESIDUAL:
            return f"the residual at {tap} is {size:.3g} times what it is added to"
    first, last = (sum(part) / _STEPS for part in (losses[:_STEPS], losses[-_STEPS:]))
    if len(losses) >= 2 * _STEPS and last > max(_LOSS * first, 1):
        return f"the loss of the last {_STEPS} steps is {last:.3g}, and that of the first was {first:.3g}"
    return ""


def verdict(evaluations: Sequence[EvaluationSummary], reason: str = "") -> str:
    """Describe whether control was found (the paper's sudden convergence, Section 3.3 and Figure 4).

    ``reason``: why the last obedience means nothing (``measure.meaningless``).
    """
    if (step := found_step(evaluations)) is not None:
        return f"control found at step {step}"
    if evaluations and evaluations[-1].control:
        return f"control perhaps found at step {evaluations[-1].step}, if a second evaluation confirms it"
    if evaluations and not evaluations[-1].is_meaningful:
        return f"it cannot be measured whether there is control: {reason}"
    return "no control yet"
