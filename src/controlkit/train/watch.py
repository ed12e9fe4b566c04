"""A run's log, during the run or afterwards, as lines for a terminal or as one HTML file.

Everything is read from the run's folder. The run is not touched.
"""

import base64
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pydantic import BaseModel, Field, ValidationError
from rich.color import Color
from rich.style import Style
from rich.text import Text
from safetensors import SafetensorError

from controlkit.errors import Invalid, NotFound, printable
from controlkit.files import inside, parse_yaml, read_text
from controlkit.images import png_bytes, read_picture
from controlkit.measure import FOUND
from controlkit.pages import Chart, Figure, Section, Table, render
from controlkit.tensors import open_safetensors
from controlkit.train.checkpoints import STATE, checkpoints_in
from controlkit.train.ending import Ending, read_ending
from controlkit.train.recipe import Recipe
from controlkit.train.records import read_log

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 40
QUIET = 60
"""Seconds without a word, at least, after which a run that no process holds counts as stopped."""
Row = tuple[float, float, float, float]
"""A step, a value, and the ends of a range about it."""


@dataclass(frozen=True)
class RunLog:
    """A run as its folder shows it: the log's records, the recipe's settings, the newest sheets of samples.

    ``ending``: what the run wrote of its end, if that was at the last step.
    """

    folder: Path
    records: list[dict[str, Any]]
    recipe: Mapping[str, Any]
    sheets: Sequence[Path]
    ending: Ending | None = None

    @property
    def step(self) -> int:
        """The last step in the log; 0 where it is empty."""
        return self.records[-1]["step"] if self.records else 0

    @property
    def ended(self) -> bool:
        """Whether the control of the last step is written. A run that was made longer has an older control."""
        if self.ending:
            return self.ending.reason != "interruption"
        result, log = self.folder / "control", self.folder / "log.jsonl"
        if not result.is_dir() or not log.is_file():
            return result.is_dir()
        return self.step >= self.recipe["steps"] or result.stat().st_mtime_ns >= log.stat().st_mtime_ns

    @property
    def pace(self) -> float:
        """Seconds a step: the median of the last hundred steps."""
        return statistics.median(record["seconds"] for record in self.records[-100:]) if self.records else 0.0

    @cached_property
    def silence(self) -> float:
        """Seconds since something of the run was written."""
        files = [self.folder / name for name in ("log.jsonl", "recipe.yaml", "samples", "checkpoints")]
        return time.time() - max(map(_written, files))

    @property
    def stopped(self) -> bool:
        """Whether no process trains in the folder any more, though the run has not ended."""
        silent = bool(self.ending) or self.silence > max(QUIET, 20 * self.pace)
        return not self.ended and silent and not _is_locked(self.folder / ".lock")

    @property
    def left(self) -> float:
        """Seconds that are left, by the steps or, if that is sooner, by ``max_minutes``; without evaluations."""
        steps = (self.recipe["steps"] - self.step) * self.pace
        limit = self.recipe.get("max_minutes")
        return min(steps, max(60 * limit - self._spent, 0)) if limit else steps

    @property
    def _spent(self) -> float:
        """Seconds that the run's clock shows: those in its last checkpoint, and those since then."""
        log = _written(self.folder / "log.jsonl")
        for state in (folder / STATE for folder in checkpoints_in(self.folder)[-1:] if (folder / STATE).is_file()):
            with suppress(SafetensorError, OSError, KeyError, ValueError), open_safetensors(state) as file:
                return max(float((file.metadata() or {})["seconds"]), 0) + max(log - _written(state), 0)
        return log - _written(self.folder / "machine.json")

    def loss(self) -> list[Row]:
        """The loss, averaged over fiftieths of the run, because the loss of one step is mostly noise."""
        records = [record for record in self.records if math.isfinite(record["loss"])]
        width = max(len(records) // 50, 1)
        parts = [records[i : i + width] for i in range(0, len(records), width)]
        means = [(part[-1]["step"], statistics.fmean(one["loss"] for one in part)) for part in parts]
        return [(step, mean, mean, mean) for step, mean in means]

    def obedience(self) -> list[Row]:
        """Obedience, with the ends of its 95% interval."""
        return [(r["step"], r["obedience"], *r["obedience_interval"]) for r in self.records if "obedience" in r]

    def fidelity(self) -> list[Row]:
        """Fidelity in its metric's unit, with floor and ceiling, the less first."""
        measured = [record for record in self.records if "fidelity" in record]
        return [(r["step"], r["fidelity"], *sorted((r["floor"], r["ceiling"]))) for r in measured]

    def series(self, key: str) -> dict[str, list[Row]]:
        """By name: the evaluations' ``key``, of a list of values their mean, the least and the greatest.

        ``key``: ``colour_drift``, ``quality`` (``_QUALITY``), ``residuals`` by tap, or ``relative_loss`` by type of
        hint: the held-out loss divided by the loss without control, in quarters of the schedule.
        """
        found: dict[str, list[Row]] = {}
        for record in self.records:
            for name, value in record.get(key, {}).items():
                values = value if isinstance(value, list) else [value]
                if all(map(math.isfinite, values)):
                    row = (record["step"], statistics.fmean(values), min(values), max(values))
                    found.setdefault(name, []).append(row)
        return dict(zip(_QUALITY, found.values(), strict=False)) if key == "quality" else found

    @property
    def verdict(self) -> str:
        """The words about control at the run's end; before it those of the last evaluation, if any."""
        if self.ending:
            return "\n".join(map(printable, self.ending.lines()))
        return printable(next((r["verdict"] for r in reversed(self.records) if r.get("verdict")), ""))

    @property
    def state(self) -> str:
        """Where the run stands, in words."""
        if self.stopped:
            return f"stopped: no process has trained in it for {self.silence / 60:.0f} min; run it again to go on"
        if not self.records:
            return "no step yet"
        if self.ended:
            return f"ended ({self.ending.reason})" if self.ending else "ended"
        return f"{self.pace:.2f} s a step, {self.left / 60:.0f} min left"


class _Evaluation(BaseModel):
    target: float | None = Field(None, ge=0, le=1, strict=True)


class _Settings(BaseModel):
    """The settings that are read of a run's recipe, which another version may have written; others are only shown."""

    steps: int = Field(ge=0, le=10**9, strict=True)
    max_minutes: float | None = Field(None, gt=0, le=1e7, strict=True)
    evaluation: _Evaluation = _Evaluation()


def _written(path: Path) -> float:
    """The time at which something was written last; 0 where it is not there."""
    return path.stat().st_mtime if path.exists() else 0.0


def _is_locked(lock: Path) -> bool:
    """Whether a process of this machine, or of one that shares its file system, trains in the folder of the lock.

    Asked by a shared lock, which is given back at once. Where locks are of another kind than Unix's: no.
    """
    try:
        import fcntl

        file = os.open(lock, os.O_RDONLY | os.O_NONBLOCK)  # of a pipe, too, without waiting
    except (ImportError, OSError):
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False


def read_run(folder: Path) -> RunLog:
    """Read a run's folder as it is, without a last line that is half written. ``NotFound`` where there is no run."""
    recipe, log = folder / "recipe.yaml", folder / "log.jsonl"
    if not recipe.is_file():
        raise NotFound(f"{folder} holds no run: expected the folder given to `controlkit train --out`.")
    settings = parse_yaml(read_text(inside(folder, recipe)), str(recipe))
    try:
        _Settings.model_validate(settings)
    except ValidationError as error:
        raise Invalid(f"{recipe} is no recipe that a run wrote: expected its settings, `steps` among them.") from error
    records = read_log(log)
    newest = [sorted((folder / "samples").glob(f"{kind}-{'[0-9]' * 7}.png"))[-1:] for kind in _SHEETS]
    ending = read_ending(folder)
    if ending and records and ending.step != records[-1]["step"]:
        ending = None  # of before the run was made longer
    return RunLog(folder, records, settings, [inside(folder, sheet) for sheets in newest for sheet in sheets], ending)


def bars(values: Sequence[float], *scale: float) -> str:
    """Draw values as a row of at most ``WIDTH`` block characters, from the least value (low) to the greatest (full).

    ``scale``: values that the axis has at least.
    """
    shown = [values[i * len(values) // WIDTH] for i in range(WIDTH)] if len(values) > WIDTH else values
    low, high = min(*shown, *scale, math.inf), max(*shown, *scale, -math.inf)
    return "".join(BARS[int((value - low) / (high - low or 1) * (len(BARS) - 1) + 0.5)] for value in shown)


def _line(name: str, values: Sequence[float], words: str = "", form: str = "7.3f", scale: Sequence[float] = ()) -> str:
    return f"{name:12} {values[-1]:{form}}  {bars(values, *scale)}" + (f"  {words}" if words else "")


def lines(run: RunLog) -> list[str]:
    """Describe the run in lines of text: step, time left, loss, obedience, quality and the last verdict."""
    text = [f"{run.folder}: step {run.step} of {run.recipe['steps']}, {run.state}"]
    if rows := run.loss():
        text.append(_line("loss", _values(rows), form="7.4f"))
    for kind, rows in run.series("relative_loss").items():
        text.append(_line(kind or "relative", _values(rows), "of the loss without control", scale=(1,)))
    if rows := run.obedience():
        text.append(_line("obedience", _values(rows), f"[{rows[-1][2]:.3f}, {rows[-1][3]:.3f}]", scale=(0, 1)))
    if quality := run.series("quality"):
        named = [f"{rows[-1][1]:.3f} {name}" for name, rows in quality.items()]
        text.append(_line("CLIP-score", _values(next(iter(quality.values()))), ", ".join(named[1:]), scale=(0, 1)))
    if drift := run.series("colour_drift"):
        name, rows = max(drift.items(), key=lambda one: abs(one[1][-1][1]))
        text.append(_line("colour drift", _values(rows), f"{name}, which drifted furthest", "+7.3f"))
    if residuals := run.series("residuals"):
        values = [rows[-1][1] for rows in residuals.values()]
        row = f"{'residuals':12} {max(values):7.3f}  {bars(values)}"
        text.append(f"{row}  of what they are added to at most, tap by tap")
    return [*text, *run.verdict.splitlines()]


def _values(rows: Sequence[Row]) -> list[float]:
    return [mean for _, mean, *_ in rows]


def blocks(picture: np.ndarray, width: int, height: int) -> Text:
    """Draw a picture, uint8 (H, W, 3), for a terminal: two pixels a character, at most ``width`` x ``height`` of them.

    The picture is made narrower to fit, and cut off below.
    """
    width = min(width, picture.shape[1])
    rows = round(picture.shape[0] * width / picture.shape[1])
    small = cv2.resize(picture[..., :3], (width, rows), interpolation=cv2.INTER_AREA)[: 2 * height]
    text = Text()
    for upper, lower in zip(small[:-1:2], small[1::2], strict=False):
        for over, under in zip(upper.tolist(), lower.tolist(), strict=True):
            text.append("▀", Style(color=Color.from_rgb(*over), bgcolor=Color.from_rgb(*under)))
        text.append("\n")
    return text


_QUALITY = ("under control", "without control", "of the true pictures")
"""Whose CLIP-score it is, in the log's order."""

_SECTIONS = {
    "relative_loss": (
        "Held-out loss, relative to no control; shaded: quarters of the schedule",
        (0.9, 1),
    ),
    "quality": ("CLIP-score", (0, 1)),
    "colour_drift": ("Colour drift from the base without control, in shares of the full range", (-0.1, 0, 0.1)),
    "residuals": ("Residuals by tap, relative to the features they are added to", (0, 1)),
}
"""The log's keys -> a heading, and the values that the axes have at least."""

_SHEETS = {
    "step": "Samples: hint, truth, controlled, no control",
    "own-step": "Your own hints: the hint, and four seeds",
}


def page(run: RunLog, refresh: float | None = None) -> str:
    """The run as one HTML file, pictures included; ``refresh``: as ``render``'s, while the run goes on."""
    body: list[str | Section | Table] = list(run.verdict.splitlines())
    if rows := run.obedience():
        target = run.recipe.get("evaluation", {}).get("target")
        marks = [(FOUND, "found: the interval above it, twice"), *([(target, "target")] if target else [])]
        chart = _chart("obedience", rows, wide=True, scale=(0, 1), marks=marks)
        body.append(Section("Obedience: 0 is no control, 1 is all the VAE lets through", charts=[chart]))
    if rows := run.fidelity():
        is_share = all(0 <= end <= 1 for _, *values in rows for end in values)
        chart = _chart("fidelity", rows, wide=True, scale=(0, 1) if is_share else ())
        body.append(Section("Fidelity, between floor and ceiling", charts=[chart]))
    for key, (title, scale) in _SECTIONS.items():
        if found := run.series(key):
            charts = [_chart(name or "all", rows, scale=scale) for name, rows in found.items()]
            body.append(Section(title, charts=charts))
    if rows := run.loss():
        body.append(Section("Training loss", charts=[_chart("loss", rows, wide=True, scale=(0,))]))
    for sheet in run.sheets:
        data = base64.b64encode(png_bytes(read_picture(sheet))).decode()  # its pixels, and nothing else that it holds
        kind, _, step = sheet.stem.rpartition("-")
        title = f"{_SHEETS[kind]}; step {int(step)}"
        body.append(Section(title, sheet=Figure(f"data:image/png;base64,{data}", title)))
    body.append(Table(["setting", "value"], _settings(run.recipe)))
    over = run.ended or run.stopped
    return render(str(run.folder), lines(run)[0], body, None if over else refresh)


def _chart(title: str, rows: Sequence[Row], **more: Any) -> Chart:
    band = [(step, low, high) for step, _, low, high in rows] if any(low < high for *_, low, high in rows) else []
    return Chart(title, [(step, mean) for step, mean, *_ in rows], band, **more)


def _settings(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The settings by which a run can be told from others: the main ones, and what is not as by default."""
    usual, main = (
        _flat(Recipe().model_dump(mode="json")),
        ("base", "control.annotator", "data.source", "steps", "batch", "lr"),
    )
    return [(k, str(v)) for k, v in _flat(recipe).items() if k in main or v != usual.get(k)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
