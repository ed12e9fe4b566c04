"""The curve of a training: its losses thinned to a file small enough to keep, and as a page to look at."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from controlkit.baselines.saved import About, read_about
from controlkit.baselines.table import opponent
from controlkit.baselines.training import LOG
from controlkit.files import write_atomic
from controlkit.pages import Chart, Section, Table, render
from controlkit.train.records import read_log

_POINTS = 200
"""Of a curve, at most: each is the mean of as many steps."""


@dataclass(frozen=True)
class Curve:
    """The losses of a training so far: by stage, (last step, mean loss) of equal spans of steps."""

    about: About
    stages: Mapping[str, list[tuple[int, float]]]

    @classmethod
    def of(cls, out: Path) -> "Curve":
        """Read it off a folder's log."""
        stages: dict[str, list[tuple[int, float]]] = {}
        for line in filter(lambda line: math.isfinite(line["loss"]), read_log(out / LOG)):
            stages.setdefault(str(line.get("stage", "")), []).append((line["step"], line["loss"]))
        thinned = {}
        for name, points in stages.items():
            parts = np.array_split(np.array(points), min(len(points), _POINTS))
            thinned[name] = [(int(part[-1, 0]), float(part[:, 1].mean())) for part in parts]
        return cls(read_about(out), thinned)

    def facts(self) -> dict[str, Any]:
        """Plain values for JSON: the record, and the points."""
        rounded = {name: [[step, round(loss, 5)] for step, loss in points] for name, points in self.stages.items()}
        return self.about.model_dump() | {"curve": rounded}

    def page(self) -> str:
        """An HTML page."""
        row, about = opponent(self.about.name), self.about
        table = Table(
            ("", ""),
            [
                ("rate", f"{about.settings.rate:g}"),
                ("batch", str(about.settings.batch)),
                ("parameters", f"{about.parameters:,}"),
                ("cost", about.cost()),
            ],
        )
        charts = [Chart(f"loss, {name}", points, wide=True) for name, points in self.stages.items()]
        return render(row.title, row.title, [f"{row.words} {row.source}.", table, Section("Training", charts=charts)])


def write_curve(out: Path) -> Curve:
    """Write ``OUT/curve.json`` and ``OUT/curve.html``."""
    curve = Curve.of(out)
    write_atomic(out / "curve.json", (json.dumps(curve.facts()) + "\n").encode())
    write_atomic(out / "curve.html", curve.page().encode())
    return curve
