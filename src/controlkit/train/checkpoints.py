"""A run's folder: its lock, its recipe, its checkpoints, and its log, cut back to a checkpoint's step."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from filelock import FileLock, Timeout
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from controlkit.backbones import Backbone
from controlkit.data import FolderPairs
from controlkit.errors import Invalid, Mismatch, NotFound, OutOfRoom, Unsupported, first_fault, one_line
from controlkit.files import inside, mark_output, read_json, scratch_folder, sweep, write_atomic
from controlkit.formats import SavedControl, save_control, write_tensors
from controlkit.hub import is_sealed, seal
from controlkit.precision import faster_format, settle_format
from controlkit.tensors import open_safetensors
from controlkit.train.parts import RatePlan
from controlkit.train.ranks import Ranks
from controlkit.train.recipe import FORMATS, Recipe, read_recipe
from controlkit.train.records import EvaluationSummary, best_of, read_log, summary_of
from controlkit.train.state import TrainState

_LAYOUT = "5"
"""Raised when a run that an earlier version began could not be resumed exactly."""


STATE = "state.safetensors"
"""The file in a checkpoint that holds all that a step changes."""


def checkpoints_in(out: Path) -> list[Path]:
    """List a run's checkpoints, the oldest first. What has another name is none, and is left alone."""
    folder = out / "checkpoints"
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{7,9}", path.name))


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
    target = folder / f"step-{step:07d}"
    try:
        with scratch_folder(folder) as scratch:
            made = scratch / target.name
            for name, control in controls.items():
                save_control(made / "control" / name, control, base)
            facts = {"layout": _LAYOUT, "step": str(step), "base_digest": base.digest, **more}
            write_tensors(made / STATE, state, facts)  # tensor by tensor: not all of it a second time
            if target.exists():
                shutil.rmtree(target)
            os.replace(made, target)
    except OSError as error:
        held = [p.name for p in checkpoints_in(out)]
        raise OutOfRoom(
            f"The checkpoint of step {step} could not be written ({error.strerror or error}). "
            f"Kept: {', '.join(held) or 'none'}. Make room, then run the same command to go on."
        ) from error
    for old in checkpoints_in(out)[: -keep if keep else 0]:
        shutil.rmtree(old, ignore_errors=True)  # a file that is open elsewhere is deleted another time


def load_checkpoint(folder: Path, state: TrainState, base: Backbone) -> dict[str, Any]:
    """Restore ``state`` from a checkpoint; returns its facts, ``step`` among them.

    Raises ``Invalid`` where it cannot be read, ``Unsupported`` where an earlier version wrote it, ``Mismatch`` where it
    was trained on other weights of the base.
    """
    facts = read_facts(folder)
    if facts["base_digest"] != base.digest:
        raise Mismatch(
            f'{folder} was trained on other weights of "{base.name}" ({one_line(facts["base_digest"])}, now '
            f"{base.digest}): use those weights, or give another --out."
        )
    try:
        with open_safetensors(folder / STATE) as file:
            state.restore({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as e:
        raise _damaged(folder, e) from e  # what a tensor too few, or one of another shape, leads to
    return facts


def _damaged(folder: Path, reason: object) -> Invalid:
    return Invalid(
        f"{folder / STATE} cannot be read ({one_line(reason)}). Delete {folder} and run again: the run resumes from "
        "the one before."
    )


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts of a checkpoint: ``step``, ``base_digest``, and the clock's ``seconds`` and ``last_step``.

    Raises ``Invalid`` where they cannot be read, ``Unsupported`` where an earlier version wrote them.
    """
    try:
        if not (folder / STATE).is_file():  # nor a pipe, which would be waited for
            raise FileNotFoundError("it is no file")
        with open_safetensors(folder / STATE) as file:
            told: dict[str, Any] = file.metadata() or {}
        facts = (
            told | {"step": int(told["step"])} | {name: float(told.get(name, 0)) for name in ("seconds", "last_step")}
        )
        if facts["step"] != _step_of(folder) or not all(0 <= facts[name] < 1e10 for name in ("seconds", "last_step")):
            raise ValueError("its step and times are of no run")
        facts["base_digest"]
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _damaged(folder, error) from error
    if facts.get("layout") != _LAYOUT:
        raise Unsupported(f"{folder} was written by an earlier version and cannot be resumed: give another --out.")
    return facts


def _evaluations(lines: Sequence[Mapping[str, Any]]) -> list[EvaluationSummary]:
    """The evaluations in a log's lines."""
    return [seen for line in lines if (seen := summary_of(line))]


def cut_log(path: Path, step: int) -> tuple[list[EvaluationSummary], list[float], int]:
    """Cut the log back to a checkpoint's step; returns its evaluations and losses, and the last step it had before."""
    lines = read_log(path)
    kept = [line for line in lines if line["step"] <= step]
    write_atomic(path, "".join(f"{json.dumps(line)}\n" for line in kept).encode())
    return _evaluations(kept), [line["loss"] for line in kept], lines[-1]["step"] if lines else 0


def check_folder(recipe: Recipe, out: Path) -> list[str]:
    """Check that ``out`` can be this recipe's folder; returns notes on what of the recipe is new to a run there.

    Rates and length (``RatePlan``) may differ: steps that were made stay as they are. What changes no step may differ,
    too (``_lasting``). Raises ``Mismatch`` for another recipe's folder, ``Invalid`` for a file.
    """
    if out.exists() and not out.is_dir():
        raise Invalid(f"{out} is a file; expected a folder, or a name for a new one.")
    _check_entries(out)
    before = _begun_recipe(out)
    if before is None:
        return []
    if changed := _changes(_lasting(before), _lasting(recipe)):
        raise Mismatch(
            f"{out} holds a run of another recipe: {'; '.join(changed)}. Run with these as they were to go on (rates, "
            f"steps and max_minutes may change), or give another --out: with control.start_from={out / 'control'} it "
            "begins with what this run has learnt, once that has ended."
        )
    made = checkpoints_in(out)
    if not made or not (changed := _changes(_rates(before), _rates(recipe))):
        return []
    longer = {"steps", "max_minutes"} >= {change.split(" ")[0] for change in changed} and _endless(before)
    mixed = "" if longer else ". The steps before had the former rates, so no single recipe describes this run"
    return [f"{'; '.join(changed)}: from step {_step_of(made[-1])} on{mixed}"]


_FILES = ("recipe.yaml", "log.jsonl", "machine.json", "ending.json", "tracking.json", "rows.txt", ".lock")
_FOLDERS = ("checkpoints", "samples", "control", "best", "tensorboard")


def _check_entries(out: Path) -> None:
    """Refuse files where a run has folders, and the other way round; and what a stranger's run links to."""
    for names, of_kind, kind in ((_FILES, Path.is_file, "a file"), (_FOLDERS, Path.is_dir, "a folder")):
        for path in (out / name for name in names):
            if (path.exists() or path.is_symlink()) and not of_kind(path):
                raise Invalid(f"{path} is in the way: a run has {kind} of that name. Move it, or give another --out.")
    for name in _FILES:
        inside(out, out / name)
    if (out / "recipe.yaml").exists() and not is_sealed(_begun(out).get("seal"), str(out.resolve())):
        for name in _FOLDERS:  # which a run writes into, or empties; links of one's own, to another disk, are welcome
            inside(out, out / name)


def _begun_recipe(out: Path) -> Recipe | None:
    path = out / "recipe.yaml"
    return read_recipe(path) if path.is_file() else None


def _endless(recipe: Recipe) -> bool:
    """Whether the learning rate does not depend on the run's length."""
    return recipe.schedule in ("constant", "constant_with_warmup") and not recipe.cooldown


def _rates(recipe: Recipe) -> dict[str, Any]:
    """The settings that may be others from a checkpoint on."""
    return asdict(RatePlan.of(recipe))


def _lasting(recipe: Recipe) -> dict[str, Any]:
    """The settings, by their names with dots, that a run keeps from its first step to its last."""
    values = recipe.model_dump()
    inner = {name: values.pop(name) for name in ("control", "data", "evaluation")}
    values |= {f"{name}.{key}": value for name, section in inner.items() for key, value in section.items()}
    free = {"keep", "checkpoint_every", "tracking", *_rates(recipe)}
    free |= {f"evaluation.{name}" for name in ("every", "patience", "target", "hints", "prompts")}
    return {name: value for name, value in values.items() if name not in free}


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The settings that differ, in words, each with its value now and before."""
    return [f"{key} is {value!r} and was {before[key]!r}" for key, value in after.items() if before[key] != value]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def go_back(out: Path, step: int) -> None:
    """Have the run in ``out`` go on from the checkpoint of a step: later ones are deleted, and a later ``OUT/best``.

    Raises ``NotFound`` where there is no such checkpoint, ``Unsupported`` where another process holds the folder, and
    ``Invalid`` where something of a run is a link out of it.
    """
    _check_entries(out)
    steps = {_step_of(path): path for path in checkpoints_in(out)}
    if step not in steps:
        held = ", ".join(map(str, steps)) or "none"
        raise NotFound(f"{out} has no checkpoint of step {step}: those it has are of steps {held}.")
    with sole_owner(out):
        best = best_of(_evaluations(read_log(out / "log.jsonl")))
        later = [path for number, path in steps.items() if number > step]
        for path in [*later, *([out / "best"] if best and best.step > step else [])]:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def sole_owner(out: Path) -> Iterator[None]:
    """Lock the run's folder; ``Unsupported`` if another process holds it. A killed process's lock is free.

    ``Invalid`` where the lock is a link, or cannot be written.
    """
    lock = FileLock(out / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise Unsupported(f"Another process is training in {out}: wait until it ends, or give another --out.") from None
    except OSError as error:
        raise Invalid(f"{out / '.lock'} cannot be locked ({error.strerror}): delete it.") from error
    try:
        yield
    finally:
        lock.release()


def begin_folder(recipe: Recipe, out: Path, device_type: str, ranks: Ranks, folders: Sequence[FolderPairs] = ()) -> str:
    """Delete files that a kill left half written, write the recipe, and use the run's thread count and number format.

    A run is exact to the bit in one layout, processes times threads, and in one format, whatever this machine would
    choose now. Another layout uses what this machine has; returns a note on it, or "". ``folders``: pairs trained on
    and held out; ``Mismatch`` where the run began with others, for held-out pairs may then have been trained on.
    """
    mark_output(out, "train")
    path = out / "machine.json"
    begun = _begun(out)
    digest, rows = "".join(folder.digest() for folder in folders), [row for one in folders for row in one.lines()]
    if begun.get("rows", digest) != digest:
        raise Mismatch(
            f"{recipe.data.source} has other pictures or captions than when the run in {out} began"
            f"{_differing_rows(out / _ROWS, rows)}. Put them back as they were, or give another --out (with "
            f"control.start_from={out / 'control'} to use what this run has learnt)."
        )
    sweep(out)
    if rows and not (out / _ROWS).is_file():
        write_atomic(out / _ROWS, "".join(f"{row}\n" for row in rows).encode())
    before, made = _begun_recipe(out), checkpoints_in(out)
    if before and made and _rates(before) != _rates(recipe):
        shutil.copyfile(out / "recipe.yaml", out / f"recipe-to-{made[-1].name}.yaml")
    write_atomic(out / "recipe.yaml", yaml.safe_dump(recipe.model_dump(), sort_keys=False).encode())
    here = {"threads": torch.get_num_threads(), "processes": ranks.count}
    kept = here | {name: begun[name] for name in here if name in begun}
    note = ""
    if begun and (kept["processes"] != ranks.count or kept["threads"] * ranks.beside > _cores()):
        note = (
            f"begun in {kept['processes']} process(es) of {kept['threads']} thread(s), going on in {ranks.count} of "
            f"{here['threads']}: from here on not equal to the bit to what it would have been"
        )
        kept = here
    asked = begun.get("format") or FORMATS.get(recipe.precision) or faster_format(device_type)
    if begun != (settings := kept | {"format": asked, "rows": digest, "seal": seal(str(out.resolve()))}):
        write_atomic(path, (json.dumps(settings) + "\n").encode())
    keep_format(out, device_type)
    return note


class _Machine(BaseModel):
    """The beginning of a run, as ``machine.json`` tells it."""

    threads: int = Field(ge=1, le=4096, strict=True)
    processes: int = Field(ge=1, le=10**6, strict=True)
    format: Literal["bfloat16", "float16", "float32"]
    rows: str


def _begun(out: Path) -> dict[str, Any]:
    """How the run in ``out`` began: ``_Machine``'s values, those that are known. ``Invalid`` for others."""
    path = out / "machine.json"
    if not path.is_file():
        return {}
    held = read_json(path)
    try:
        _Machine.model_validate({"threads": 1, "processes": 1, "format": "float32", "rows": ""} | held)
    except (ValidationError, TypeError) as error:
        found = first_fault(error, "it", ()) if isinstance(error, ValidationError) else f"a {type(held).__name__}"
        raise Invalid(f"{path} does not say how the run began ({one_line(found).rstrip('.')}): delete it.") from error
    return dict(held)


_ROWS = "rows.txt"
"""The file in a run's folder that lists the rows of a folder's data set, a line each."""


def _differing_rows(path: Path, rows: Sequence[str]) -> str:
    """Which rows differ from those in a file, in words; "" where there is no such file."""
    if not path.is_file():
        return ""
    before = path.read_text(encoding="utf-8", errors="replace").splitlines()
    parts = [("gone or with another caption", set(before) - set(rows)), ("new", set(rows) - set(before))]
    named = [f"{what}: {one_line(', '.join(sorted(of)[:3]))}{_and_more(len(of) - 3)}" for what, of in parts if of]
    return f" ({'; '.join(named) or 'in another order'})"


def _and_more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_format(out: Path, device_type: str) -> None:
    """Use the thread count and number format that the run in ``out`` has."""
    begun = _begun(out)
    if begun["threads"] != torch.get_num_threads():
        torch.set_num_threads(begun["threads"])
    settle_format(device_type, begun["format"])
