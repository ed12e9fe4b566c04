"""A run looked at while it goes on, or afterwards: its log as lines for a terminal, or as one HTML file.

Everything is read from the run's folder; nothing is computed anew, and the run is not touched.
"""

import base64
import html
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from rich.color import Color
from rich.style import Style
from rich.text import Text

from controlkit.errors import UserError

BARS = "▁▂▃▄▅▆▇█"
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Run:
    """What a run's folder says: the log's lines, the steps it is to have, and its newest sheet of samples."""

    folder: Path
    records: list[dict[str, Any]]
    steps: int
    sheet: Path | None

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return self.records[-1]["step"] if self.records else 0

    @property
    def ended(self) -> bool:
        """Whether its result is there, and of its last step: a run may have been made longer."""
        result, log = self.folder / "control", self.folder / "log.jsonl"
        if not result.is_dir() or not log.is_file():
            return result.is_dir()
        return self.step >= self.steps or result.stat().st_mtime_ns >= log.stat().st_mtime_ns

    @property
    def pace(self) -> float:
        """Seconds a step, the median of the last hundred."""
        return statistics.median(record["seconds"] for record in self.records[-100:]) if self.records else 0.0

    def loss(self) -> Points:
        """The loss, averaged over a fiftieth of the run at a time: a step's own says little."""
        width = max(len(self.records) // 50, 1)
        parts = [self.records[i : i + width] for i in range(0, len(self.records), width)]
        return [(part[-1]["step"], statistics.fmean(one["loss"] for one in part)) for part in parts]

    def relative(self) -> dict[str, Points]:
        """By type of hint: the loss relative to no control, over the whole schedule."""
        found: dict[str, Points] = {}
        for record in self.records:
            for kind, quarters in record.get("relative_loss", {}).items():
                found.setdefault(kind, []).append((record["step"], statistics.fmean(quarters)))
        return found

    def series(self, key: str) -> dict[str, Points]:
        """By name, what the evaluations said under ``key``: ``colour_drift``, or ``residuals`` by tap."""
        found: dict[str, Points] = {}
        for record in self.records:
            for name, value in record.get(key, {}).items():
                found.setdefault(name, []).append((record["step"], value))
        return found

    def obedience(self) -> list[tuple[float, float, float, float]]:
        """Step, mean, and the interval's ends, of each evaluation."""
        return [(r["step"], r["obedience"], *r["obedience_interval"]) for r in self.records if "obedience" in r]

    @property
    def verdict(self) -> str:
        """What the last evaluation said of control."""
        return next((r["verdict"] for r in reversed(self.records) if r.get("verdict")), "")


def read_run(folder: Path) -> Run:
    """A run's folder as it is now; a line that is being written is left for the next time."""
    recipe, log = folder / "recipe.yaml", folder / "log.jsonl"
    if not recipe.is_file():
        raise UserError(f"{folder} holds no run: expected the folder given to `controlkit train --out`.")
    records = []
    for line in log.read_text().splitlines() if log.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    sheets = sorted((folder / "samples").glob("*.png"))
    steps = int(yaml.safe_load(recipe.read_text())["steps"])
    return Run(folder, records, steps, sheets[-1] if sheets else None)


def bars(values: Sequence[float], width: int = 40) -> str:
    """Values as a row of bars between the least and the greatest of them."""
    shown = [values[i * len(values) // width] for i in range(width)] if len(values) > width else list(values)
    low, high = min(shown), max(shown)
    return "".join(BARS[int((value - low) / (high - low or 1) * (len(BARS) - 1) + 0.5)] for value in shown)


def lines(run: Run) -> list[str]:
    """The run in lines of text."""
    if not run.records:
        return [f"{run.folder}: no step yet"]
    left = (run.steps - run.step) * run.pace / 60
    state = "ended" if run.ended else f"{run.pace:.2f} s a step, {left:.0f} min left"
    said = [f"{run.folder}: step {run.step} of {run.steps}, {state}"]
    loss = [y for _, y in run.loss()]
    said.append(f"{'loss':12} {loss[-1]:7.4f}  {bars(loss)}")
    for kind, points in run.relative().items():
        values = [y for _, y in points]
        said.append(f"{kind or 'relative':12} {values[-1]:7.3f}  {bars(values)}  of the loss without control")
    if measured := run.obedience():
        _, mean, low, high = measured[-1]
        said.append(f"{'obedience':12} {mean:7.3f}  {bars([one[1] for one in measured])}  [{low:.3f}, {high:.3f}]")
    if drift := run.series("colour_drift"):
        name, points = max(drift.items(), key=lambda one: abs(one[1][-1][1]))
        values = [y for _, y in points]
        said.append(f"{'colour drift':12} {values[-1]:+7.3f}  {bars(values)}  {name}, which drifted furthest")
    if residuals := run.series("residuals"):
        values = [points[-1][1] for points in residuals.values()]
        said.append(f"{'residuals':12} {max(values):7.3f}  {bars(values)}  of what they are added to, tap by tap")
    return [*said, run.verdict] if run.verdict else said


def blocks(picture: np.ndarray, width: int, height: int) -> Text:
    """A picture for a terminal, two of its pixels a character, in at most so many characters: what does not fit below
    is left out."""
    width = min(width, picture.shape[1])
    rows = round(picture.shape[0] * width / picture.shape[1])
    small = cv2.resize(picture[..., :3], (width, rows), interpolation=cv2.INTER_AREA)[: 2 * height]
    text = Text()
    for upper, lower in zip(small[:-1:2], small[1::2], strict=False):
        for over, under in zip(upper.tolist(), lower.tolist(), strict=True):
            text.append("▀", Style(color=Color.from_rgb(*over), bgcolor=Color.from_rgb(*under)))
        text.append("\n")
    return text


# --- the page -----------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --faint: #767676; --rule: #ddd; --line: #24527a; --ground: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --faint: #9a9a9a; --rule: #3a3a3a; --line: #7fb2e0; --ground: #161616 }
}
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 980px; padding: 0 1rem; color: var(--ink);
  background: var(--ground) }
h1 { font-size: 1.2rem } h2 { font-size: 1rem; margin: 1.6rem 0 .4rem }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 14px }
svg { width: 100%; height: auto; display: block } svg text { font: 11px system-ui, sans-serif; fill: var(--faint) }
img { max-width: 100% } p { color: var(--faint) }
"""


def _chart(title: str, points: Points, band: Sequence[tuple[float, float, float]] = (), wide: bool = False) -> str:
    """One line over the steps, with its last value; ``band`` is (step, low, high)."""
    width, height, left, top, foot = (720, 200, 44, 20, 18) if wide else (240, 120, 40, 20, 16)
    ys = [y for _, y in points] + [y for _, *ends in band for y in ends]
    low, high = min(ys), max(ys)
    high = high if high > low else low + 1e-3
    last = max(points[-1][0], 1)

    def at(x: float, y: float) -> str:
        return (
            f"{left + x / last * (width - left - 8):.1f},{top + (high - y) / (high - low) * (height - top - foot):.1f}"
        )

    shape = ""
    if band:
        outline = [at(x, b) for x, _, b in band] + [at(x, a) for x, a, _ in reversed(band)]
        shape = f'<polygon points="{" ".join(outline)}" fill="var(--line)" opacity=".18"/>'
    line = " ".join(at(x, y) for x, y in points)
    dot = at(*points[-1]).split(",")
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}: {points[-1][1]:.4g}">'
        f'<text x="{left}" y="12" style="fill:var(--ink)">{html.escape(title)} {points[-1][1]:.4g}</text>'
        f'<line x1="{left}" y1="{height - foot}" x2="{width - 8}" y2="{height - foot}" stroke="var(--rule)"/>'
        f'<text x="0" y="{top + 8}">{high:.3g}</text><text x="0" y="{height - foot}">{low:.3g}</text>'
        f'<text x="{width - 8}" y="{height - 4}" text-anchor="end">step {last:.0f}</text>{shape}'
        f'<polyline points="{line}" fill="none" stroke="var(--line)" stroke-width="1.6"/>'
        f'<circle cx="{dot[0]}" cy="{dot[1]}" r="2.6" fill="var(--line)"/></svg>'
    )


_TOLD = {
    "colour_drift": "Colour drift from the base without control, in shares of the full range (0 is none)",
    "residuals": "Residuals by tap, relative to what they are added to (0 at birth)",
}


def page(run: Run, facts: Mapping[str, Any] | None = None) -> str:
    """The run as one HTML file, pictures included; ``facts`` stand beneath its title."""
    said = html.escape(lines(run)[0])
    body = [f"<h1>{said}</h1>"]
    if run.verdict:
        body.append(f"<p>{html.escape(run.verdict)}</p>")
    if facts:
        body.append(f"<p>{html.escape(', '.join(f'{name} {value}' for name, value in facts.items()))}</p>")
    if run.records:
        if measured := run.obedience():
            band = [(step, low, high) for step, _, low, high in measured]
            body.append("<h2>Obedience: 0 is no control, 1 all the VAE lets through</h2>")
            body.append(_chart("obedience", [(step, mean) for step, mean, *_ in measured], band, wide=True))
        if relative := run.relative():
            body.append("<h2>Held-out loss, relative to the base without control (1 is none)</h2><div class=charts>")
            body += [_chart(kind or "all", points) for kind, points in relative.items()]
            body.append("</div>")
        for key, words in _TOLD.items():
            if found := run.series(key):
                body.append(f"<h2>{words}</h2><div class=charts>")
                body += [_chart(name, points) for name, points in found.items()]
                body.append("</div>")
        body.append("<h2>Training loss</h2>")
        body.append(_chart("loss", run.loss(), wide=True))
    if run.sheet:
        data = base64.b64encode(run.sheet.read_bytes()).decode()
        body.append(f"<h2>Samples, {html.escape(run.sheet.stem)}</h2>")
        body.append(f'<img alt="hint, truth, controlled, no control" src="data:image/png;base64,{data}">')
    title = html.escape(str(run.folder))
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f"{head}{''.join(body)}</html>\n"
