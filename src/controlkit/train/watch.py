"""A run's log, during the run or afterwards, as lines for a terminal or as one HTML file.

Everything is read from the run's folder. The run is not touched.
"""

import base64
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from rich.color import Color
from rich.style import Style
from rich.text import Text

from controlkit.errors import NotFound
from controlkit.pages import Chart, Figure, Section, render

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 40
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class RunLog:
    """A run as its folder shows it: the log's records, the recipe's number of steps, the newest sheet of samples."""

    folder: Path
    records: list[dict[str, Any]]
    steps: int
    sheet: Path | None

    @property
    def step(self) -> int:
        """The last step in the log; 0 where it is empty."""
        return self.records[-1]["step"] if self.records else 0

    @property
    def ended(self) -> bool:
        """Whether the control of the last step is written. A run that was made longer has an older control."""
        result, log = self.folder / "control", self.folder / "log.jsonl"
        if not result.is_dir() or not log.is_file():
            return result.is_dir()
        return self.step >= self.steps or result.stat().st_mtime_ns >= log.stat().st_mtime_ns

    @property
    def pace(self) -> float:
        """Seconds a step: the median of the last hundred steps."""
        return statistics.median(record["seconds"] for record in self.records[-100:]) if self.records else 0.0

    def loss(self) -> Points:
        """(step, loss), averaged over fiftieths of the run, because the loss of one step is mostly noise."""
        width = max(len(self.records) // 50, 1)
        parts = [self.records[i : i + width] for i in range(0, len(self.records), width)]
        return [(part[-1]["step"], statistics.fmean(one["loss"] for one in part)) for part in parts]

    def series(self, key: str) -> dict[str, Points]:
        """By name: (step, value) of the evaluations' ``key``, of a list of values their mean.

        ``key``: ``colour_drift``, ``residuals`` by tap, or ``relative_loss`` by type of hint: the held-out loss divided
        by the loss without control, in quarters of the schedule.
        """
        found: dict[str, Points] = {}
        for record in self.records:
            for name, value in record.get(key, {}).items():
                mean = statistics.fmean(value) if isinstance(value, list) else value
                found.setdefault(name, []).append((record["step"], mean))
        return found

    def obedience(self) -> list[tuple[float, float, float, float]]:
        """(step, mean, low, high) of each evaluation: obedience and its 95% interval."""
        return [(r["step"], r["obedience"], *r["obedience_interval"]) for r in self.records if "obedience" in r]

    @property
    def verdict(self) -> str:
        """The sentence of the last evaluation about control; empty before the first."""
        return next((r["verdict"] for r in reversed(self.records) if r.get("verdict")), "")


def read_run(folder: Path) -> RunLog:
    """Read a run's folder as it is, without a last line that is half written. ``NotFound`` where there is no run."""
    recipe, log = folder / "recipe.yaml", folder / "log.jsonl"
    if not recipe.is_file():
        raise NotFound(f"{folder} holds no run: expected the folder given to `controlkit train --out`.")
    records = []
    for line in log.read_text().splitlines() if log.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    sheets = sorted((folder / "samples").glob("*.png"))
    steps = int(yaml.safe_load(recipe.read_text())["steps"])
    return RunLog(folder, records, steps, sheets[-1] if sheets else None)


def bars(values: Sequence[float]) -> str:
    """Draw values as a row of at most ``WIDTH`` block characters, from the least value (low) to the greatest (full)."""
    shown = [values[i * len(values) // WIDTH] for i in range(WIDTH)] if len(values) > WIDTH else values
    low, high = min(shown), max(shown)
    return "".join(BARS[int((value - low) / (high - low or 1) * (len(BARS) - 1) + 0.5)] for value in shown)


def _line(name: str, value: float, values: Sequence[float], words: str = "", form: str = "7.3f") -> str:
    return f"{name:12} {value:{form}}  {bars(values)}" + (f"  {words}" if words else "")


def lines(run: RunLog) -> list[str]:
    """Describe the run in lines of text: step, time left, loss, obedience and the last verdict."""
    if not run.records:
        return [f"{run.folder}: no step yet"]
    left = (run.steps - run.step) * run.pace / 60
    state = "ended" if run.ended else f"{run.pace:.2f} s a step, {left:.0f} min left"
    text = [f"{run.folder}: step {run.step} of {run.steps}, {state}"]
    loss = [y for _, y in run.loss()]
    text.append(_line("loss", loss[-1], loss, form="7.4f"))
    for kind, points in run.series("relative_loss").items():
        values = [y for _, y in points]
        text.append(_line(kind or "relative", values[-1], values, "of the loss without control"))
    if measured := run.obedience():
        _, mean, low, high = measured[-1]
        text.append(_line("obedience", mean, [one[1] for one in measured], f"[{low:.3f}, {high:.3f}]"))
    if drift := run.series("colour_drift"):
        name, points = max(drift.items(), key=lambda one: abs(one[1][-1][1]))
        values = [y for _, y in points]
        text.append(_line("colour drift", values[-1], values, f"{name}, which drifted furthest", "+7.3f"))
    if residuals := run.series("residuals"):
        values = [points[-1][1] for points in residuals.values()]
        text.append(_line("residuals", max(values), values, "of what they are added to, tap by tap"))
    return [*text, run.verdict] if run.verdict else text


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


_TITLES = {
    "relative_loss": "Held-out loss, relative to the base without control (1 is none)",
    "colour_drift": "Colour drift from the base without control, in shares of the full range (0 is none)",
    "residuals": "Residuals by tap, relative to the features they are added to (0 at the start)",
}


def page(run: RunLog) -> str:
    """The run as one HTML file, pictures included."""
    body: list[str | Section] = [run.verdict] if run.verdict else []
    if measured := run.obedience():
        band = [(step, low, high) for step, _, low, high in measured]
        chart = Chart("obedience", [(step, mean) for step, mean, *_ in measured], band, wide=True)
        body.append(Section("Obedience: 0 is no control, 1 is all the VAE lets through", charts=[chart]))
    for key, title in _TITLES.items():
        if found := run.series(key):
            body.append(Section(title, charts=[Chart(name or "all", points) for name, points in found.items()]))
    if run.records:
        body.append(Section("Training loss", charts=[Chart("loss", run.loss(), wide=True)]))
    if run.sheet:
        data = base64.b64encode(run.sheet.read_bytes()).decode()
        sheet = Figure(f"data:image/png;base64,{data}", "hint, truth, controlled, no control")
        body.append(Section(f"Samples, {run.sheet.stem}", sheet=sheet))
    return render(str(run.folder), lines(run)[0], body)
