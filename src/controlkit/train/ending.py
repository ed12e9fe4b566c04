"""How a run ended: why, what was found, and what to do next. A value, a file in the run's folder, and words."""

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from controlkit.errors import Invalid, first_fault, one_line
from controlkit.files import inside, read_json, write_atomic
from controlkit.measure import Verdict
from controlkit.train.recipe import Recipe

Reason = Literal["steps", "max_minutes", "target", "patience", "interruption", "divergence"]

Sentence = Annotated[str, Field(max_length=3000)]
"""As long as a command with two paths may be; a file may hold more."""
ENDING = "ending.json"
"""The file in a run's folder; it is not there while the run goes on."""


@dataclass(frozen=True)
class Ending:
    """The end of a run after ``step`` steps, those in its log. ``why``: a sentence on the reason.

    ``verdict``: on the control that it ended with; None where it was not measured (an interruption, a divergence).
    ``next``: the command to type now.
    """

    step: int
    reason: Reason
    why: Sentence
    verdict: Verdict | None
    next: Sentence

    def lines(self) -> list[str]:
        """Tell it to the user."""
        return [self.why, *([str(self.verdict)] if self.verdict else []), f"Next: {self.next}"]

    def write(self, out: Path) -> None:
        """Write it into the run's folder, with its words for other programs."""
        write_atomic(out / ENDING, (json.dumps(asdict(self) | {"words": self.lines()}, indent=2) + "\n").encode())


def read_ending(out: Path) -> Ending | None:
    """The ending of the run in ``out``; None where it goes on, or was killed. ``Invalid`` for a damaged file."""
    path = out / ENDING
    if not inside(out, path).is_file():
        return None
    try:
        return TypeAdapter(Ending).validate_python(read_json(path))
    except ValidationError as error:
        reason = first_fault(error, "it", ()).removeprefix("it: ").rstrip(".")
        raise Invalid(f"{path} does not say how a run ended ({one_line(reason)}): delete it and run again.") from error


def why_ended(reason: Reason, step: int, recipe: Recipe, best: int | None = None) -> str:
    """A sentence on why a run ended after ``step`` steps; ``best``: the step of its best evaluation."""
    patience, target = recipe.evaluation.patience, recipe.evaluation.target
    return {
        "steps": f"Ended after all {recipe.steps:,} steps.",
        "max_minutes": f"Ended at step {step:,} of {recipe.steps:,}: max_minutes is {recipe.max_minutes or 0:g}.",
        "target": f"Ended at step {step:,} of {recipe.steps:,}: obedience's lower bound reached the target, {target}.",
        "patience": f"Ended at step {step:,} of {recipe.steps:,}: {patience} evaluations in a row were no better than "
        f"that of step {best}.",
        "interruption": f"Stopped at step {step:,} of {recipe.steps:,}; run again to go on.",
        "divergence": "",
    }[reason]


def train_command(out: Path, *changes: str) -> str:
    """The command that goes on with the run in ``out``, with these values changed."""
    options = [word for change in changes for word in ("--set", change)]
    return shlex.join(["controlkit", "train", str(out / "recipe.yaml"), *options, "--out", str(out)])


def next_command(out: Path, recipe: Recipe, reason: Reason, verdict: Verdict, best: int | None, step: int) -> str:
    """The command that is worth typing after a run: to use its control, to train on, or to look closer."""
    base = ["--base", recipe.base] if recipe.base != "mini" else []
    vae = ["--vae", recipe.vae] if recipe.vae else []
    folder = out / "best" if best not in (None, step) and (out / "best").is_dir() else out
    if verdict.finding == "found" and verdict.quality_kept is not False:
        control = out / "control"
        if recipe.control.hints_as == "branches":
            control /= recipe.control.annotators[0]
        return shlex.join(["controlkit", "generate", "a prompt", "--control", f"{control}=picture.png", *base, *vae])
    if verdict.finding == "not found":
        longer = {"max_minutes": f"max_minutes={2 * (recipe.max_minutes or 0):g}", "patience": "evaluation.patience=0"}
        return train_command(out, longer.get(reason, f"steps={2 * recipe.steps}"))
    if recipe.control.types:
        return shlex.join(["controlkit", "evaluate", f"{out}:{recipe.control.types[0]}", *base, *vae])
    if verdict.finding == "found" or not recipe.evaluation.every:
        return shlex.join(["controlkit", "evaluate", str(folder), *base, *vae])
    return shlex.join(["controlkit", "watch", str(out), "--html", "run.html", "--once"])
