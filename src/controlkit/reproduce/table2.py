"""Table 2: how well label maps are found again in pictures that were made of them, as IoU.

The paper makes pictures of ADE20K's label maps and segments them with OneFormer. Here the maps are those of held-out
scenes, and the observer of their world segments. Floor and ceiling stand beside the rows.

    controlkit reproduce table2 --opponents runs/opponents --out runs/table2

Cost: 1.5 minutes on one thread (an AMD EPYC with AVX-512 BF16) with five opponents.
Expected (64 scenes): IoU of the truth 0.59 ± 0.16, ControlNet 0.46 ± 0.12, lite 0.41, PITI 0.31, LDM 0.57, VQGAN 0.19
(those two of half their operations), the shipped control 0.53; floor 0.21, ceiling 0.58. The paper: truth
0.58 ± 0.10, ControlNet 0.35 ± 0.14, lite 0.32, LDM 0.31, PITI 0.26, VQGAN 0.21.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from controlkit.backbones import Backbone
from controlkit.measure import Figure, Way, mean_figure
from controlkit.reproduce.entrants import (
    SHIPPED,
    Entrant,
    Plan,
    Table,
    Trial,
    advice,
    entrant,
    pixels_of,
    write_report,
)
from controlkit.reproduce.order import order_words, ranks
from controlkit.reproduce.rows import SystemRow

KIND = "seg"
TRUTH = "truth"
PAPER = {
    TRUTH: (0.58, 0.10),
    "taming": (0.21, 0.15),
    "ldm-scratch": (0.31, 0.09),
    "piti": (0.26, 0.16),
    "lite": (0.32, 0.12),
    "controlnet": (0.35, 0.14),
}
"""The paper's mean and spread over pictures, by row."""
ORDER = (*PAPER, SHIPPED)


@dataclass(frozen=True)
class Row(SystemRow):
    """A row: ours and the paper's, or a note on why there is none of ours."""

    ours: Figure | None = None
    """Mean IoU with its 95% interval."""
    spread: float | None = None
    """The standard deviation over pictures, as the paper gives it."""
    paper: tuple[float, float] | None = None

    def words(self) -> tuple[str, str, str, str, str]:
        """Title, ours with its spread, the interval, the paper's, the cost."""
        ours, interval = self.note, ""
        if self.ours and self.spread is not None:
            ours = f"{self.ours.mean:.2f} ± {self.spread:.2f}"
            interval = f"{self.ours.low:.2f} to {self.ours.high:.2f}"
        paper = "{:.2f} ± {:.2f}".format(*self.paper) if self.paper else "-"
        return self.title, ours, interval, paper, self.cost


HEAD = ("system", "ours: IoU ± spread", "95% interval of the mean", "paper", "training")


@dataclass(frozen=True)
class Table2(Table):
    """The whole table. ``floor``: of the base without control, and of hints shuffled between pictures (the shipped
    control's). ``ceiling``: of the true pictures as the VAE gives them back."""

    rows: Sequence[Row]
    floor: Mapping[str, Figure]
    ceiling: Figure

    def notes(self) -> str:
        """The words on the paper's order, floor and ceiling."""
        floors = "; ".join(f"{name} {figure}" for name, figure in self.floor.items())
        systems = ranks(self.rows, lambda facts: (facts["paper"][0], facts["ours"]), leave_out=(TRUTH,))
        order = order_words("IoU", systems, higher_is_better=True)
        return " ".join(filter(None, (order, f"Floor: {floors}. Ceiling: {self.ceiling}.")))


def make_table2(base: Backbone, plan: Plan, out: Path, on_row: Callable[[str], None] = lambda name: None) -> Table2:
    """Make the table and write it into a folder: ``table2.json``, ``table2.md``, ``table2.png``.

    ``on_row`` is told each row's name before it is made. A row whose opponent is not in ``plan.opponents`` says so.
    Raises as ``load_baseline`` does for a folder that cannot be read.
    """
    trial = Trial.of(KIND, base, plan)
    columns: dict[str, Sequence[np.ndarray]] = {"label map": trial.shown()}
    rows = []
    for name in ORDER:
        on_row(name)
        if name == TRUTH:
            one, made = Entrant(name, "Ground truth", None), trial.truth
        else:
            one = entrant(name, KIND, base, plan.opponents)
            made = pixels_of(one.make, trial.evaluation.requests("controlled")) if one.make else []
        row = Row(name, one.title, paper=PAPER.get(name), cost=one.cost, note=one.note)
        if made:
            columns[one.title], scores = made, trial.scores(made)
            row = replace(row, ours=mean_figure(scores), spread=float(scores.std()))
        rows.append(row)
    on_row("floor")
    floor, ceiling = _floor(trial), trial.ceiling()
    table = Table2(rows, trial.facts(), advice(rows, plan.opponents), floor=floor, ceiling=ceiling)
    return write_report(out, "table2", table, HEAD, {"": columns}, plan.opponents)


def _floor(trial: Trial) -> dict[str, Figure]:
    """The fidelity of the base alone, and of the shipped control with hints that are others'."""
    ways: dict[str, Way] = {"no control": "no_control", "hints shuffled": "shuffled"}
    make = entrant(SHIPPED, KIND, trial.base, None).make
    assert make is not None
    return {
        name: mean_figure(trial.scores(pixels_of(make, trial.evaluation.requests(way)))) for name, way in ways.items()
    }
