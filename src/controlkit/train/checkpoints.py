"""A run's folder: its lock, its recipe, its checkpoints, and its log, cut back to a checkpoint's step."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from controlkit.backbones import Backbone
from controlkit.errors import Invalid, Mismatch, OutOfRoom, Unsupported
from controlkit.files import SCRATCH, write_atomic
from controlkit.formats import SavedControl, save_control, write_tensors
from controlkit.precision import faster_format, settle_format
from controlkit.train.recipe import FORMATS, Recipe, read_recipe
from controlkit.train.records import EvaluationSummary, summary_of
from controlkit.train.state import TrainState

_LAYOUT = "5"
"""Raised when a run that an earlier version began could not be resumed exactly."""


def checkpoints_in(out: Path) -> list[Path]:
    """List a run's checkpoints, the oldest first."""
    return sorted((out / "checkpoints").glob("step-*"))


def save_checkpoint(
    out: Path,
    step: int,
    controls: Mapping[str, SavedControl],
    base: Backbone,
    state: Mapping[str, Tensor],
    keep: int | None,
    more: Mapping[str, str],
) -> None:
    """Write a checkpoint, whole or not at all; then delete the oldest beyond ``keep`` (None: none).

    ``controls``: by the name of their folder in ``control``; under "" the one that is that folder itself.
    ``more``: facts that ``load_checkpoint`` returns. Raises ``OutOfRoom`` where it cannot be written.
    """
    folder = out / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix=SCRATCH))
    try:
        for name, control in controls.items():
            save_control(scratch / "control" / name, control, base)
        facts = {"layout": _LAYOUT, "step": str(step), "base_digest": base.digest, **more}
        write_tensors(scratch / "state.safetensors", state, facts)  # tensor by tensor: not all of it a second time
        scratch.chmod(0o755)
        target = folder / f"step-{step:07d}"
        if target.exists():
            shutil.rmtree(target)
        os.replace(scratch, target)
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        held = [p.name for p in checkpoints_in(out)]
        raise OutOfRoom(
            f"The checkpoint of step {step} could not be written ({error.strerror or error}). "
            f"Kept: {', '.join(held) or 'none'}. Make room, then run the same command to go on."
        ) from error
    for old in checkpoints_in(out)[: -keep if keep else 0]:
        shutil.rmtree(old, ignore_errors=True)  # a file that is open elsewhere is deleted another time


def load_checkpoint(folder: Path, state: TrainState, base: Backbone) -> dict[str, str]:
    """Restore ``state`` from a checkpoint; returns its facts, ``step`` among them.

    Raises ``Invalid`` where it cannot be read, ``Unsupported`` where an earlier version wrote it, ``Mismatch`` where it
    was trained on other weights of the base.
    """
    path = folder / "state.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            facts: dict[str, str] = file.metadata()
    except (SafetensorError, OSError) as error:
        raise Invalid(
            f"{path} cannot be read ({error}). Delete {folder} and run again: the run resumes from the one before."
        ) from error
    if facts.get("layout") != _LAYOUT:
        raise Unsupported(f"{folder} was written by an earlier version and cannot be resumed: give another --out.")
    if facts["base_digest"] != base.digest:
        raise Mismatch(
            f'{folder} was trained on other weights of "{base.name}" ({facts["base_digest"]}, now {base.digest}): '
            "use those weights, or give another --out."
        )
    state.restore(load_file(path))
    return facts


def cut_log(path: Path, step: int) -> tuple[list[EvaluationSummary], int]:
    """Cut the log back to a checkpoint's step; returns the evaluations it still has, and the last step it had."""
    lines = []
    evaluations = []
    logged = 0
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            break  # the line a kill cut short
        logged = record["step"]
        if logged > step:
            continue
        lines.append(line)
        if seen := summary_of(record):
            evaluations.append(seen)
    write_atomic(path, "".join(f"{line}\n" for line in lines).encode())
    return evaluations, logged


def check_folder(recipe: Recipe, out: Path) -> None:
    """Check that ``out`` can be this recipe's folder: ``Mismatch`` for another recipe's, ``Invalid`` for a file.

    Settings that change no step already made may differ (``_lasting``).
    """
    path = out / "recipe.yaml"
    both = (read_recipe(path) if path.is_file() else recipe, recipe)
    endless = all(_endless(one) for one in both)
    before, after = (_lasting(one, endless) for one in both)
    if changed := [key for key, value in after.items() if before[key] != value]:
        longer = " A run can be made longer where its rate does not come down (no cooldown, schedule: constant)."
        raise Mismatch(
            f"{out} holds a run of another recipe (it differs in {', '.join(changed)}): give another --out, "
            f"or run with the recipe as it was to resume.{longer if {'steps', 'max_minutes'} & {*changed} else ''}"
        )
    if out.exists() and not out.is_dir():
        raise Invalid(f"{out} is a file; expected a folder, or a name for a new one.")


def _endless(recipe: Recipe) -> bool:
    """Whether the learning rate does not depend on the run's length."""
    return recipe.schedule in ("constant", "constant_with_warmup") and not recipe.cooldown


def _lasting(recipe: Recipe, endless: bool) -> dict[str, Any]:
    """The settings that a run keeps from its first step to its last: without its length where it is ``endless``."""
    values = recipe.model_dump(exclude={"keep": True, "checkpoint_every": True, "tracking": True,
                                        "evaluation": {"every", "patience", "target"}})  # fmt: skip
    if endless:
        del values["steps"], values["max_minutes"]
    return values


@contextmanager
def sole_owner(out: Path) -> Iterator[None]:
    """Lock the run's folder; ``Unsupported`` if another process holds it. A killed process's lock is free."""
    lock = FileLock(out / ".lock", timeout=0)
    try:
        with lock:
            yield
    except Timeout:
        raise Unsupported(f"Another process is training in {out}: wait until it ends, or give another --out.") from None


def begin_folder(recipe: Recipe, out: Path, device_type: str, rows: str = "") -> None:
    """Delete files that a kill left half written, write the recipe, and use the run's thread count and number format.

    A run is exact to the bit with one thread count and one format, whatever this machine would choose now. ``rows``: a
    digest of the data set's rows; ``Mismatch`` where the run began with others, for held-out pairs may then have been
    trained on.
    """
    path = out / "machine.json"
    begun = json.loads(path.read_text()) if path.is_file() else None
    if begun and begun.get("rows", rows) != rows:
        raise Mismatch(
            f"{recipe.data.source} has other names or captions than when the run in {out} began: put them back as they "
            "were, or give another --out (with control.start_from to use what this run has learnt)."
        )
    own = out.glob(".tmp??????")  # safetensors' name for a file that it is writing
    for stale in sorted([*out.rglob(f"{SCRATCH}*"), *own]):  # what a kill left half written
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
    write_atomic(out / "recipe.yaml", yaml.safe_dump(recipe.model_dump(), sort_keys=False).encode())
    if not begun:
        asked = FORMATS.get(recipe.precision) or faster_format(device_type)
        begun = {"threads": torch.get_num_threads(), "format": asked, "rows": rows}
        write_atomic(path, (json.dumps(begun) + "\n").encode())
    keep_format(out, device_type)


def keep_format(out: Path, device_type: str) -> None:
    """Use the thread count and number format that the run in ``out`` began with."""
    begun = json.loads((out / "machine.json").read_text())
    if begun["threads"] != torch.get_num_threads():
        torch.set_num_threads(begun["threads"])
    settle_format(device_type, begun["format"])
