"""Table 3: FID, CLIP-score and aesthetic rating of pictures made of label maps, with fidelity beside them.

The paper's are by Inception, CLIP and LAION's head on ADE20K. Here they are the referee's of the embedded world, on
held-out scenes. FID alone says nothing of control: that of no control is the best one in the paper.

    controlkit reproduce table3 --opponents runs/opponents --out runs/table3

Cost: 3 minutes on one thread (an AMD EPYC with AVX-512 BF16) with five opponents.
Expected (64 scenes): FID 11.6 without control, ControlNet 10.8, lite 11.3, PITI 12.4, LDM 18.4, VQGAN 23.9 (those two
of half their operations), 10.5 under the shipped control; obedience of those with control 0.67, 0.52, 0.25, 0.96,
-0.07 and 0.86. The paper's FID: no control 6.09, ControlNet 15.27, lite 17.92, PITI 19.74, LDM 25.35, VQGAN 26.28.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from controlkit.backbones import Backbone
from controlkit.measure import evaluate_base
from controlkit.reproduce.entrants import (
    NO_CONTROL,
    SHIPPED,
    KeepsFirst,
    Plan,
    Table,
    Trial,
    advice,
    entrant,
    write_report,
)
from controlkit.reproduce.order import order_words, ranks
from controlkit.reproduce.rows import SystemRow
from controlkit.reproduce.table2 import KIND

FIGURES = ("fid", "clip_score", "aesthetic")
PAPER = {
    NO_CONTROL: (6.09, 0.26, 6.32),
    "taming": (26.28, 0.17, 5.14),
    "ldm-scratch": (25.35, 0.18, 5.15),
    "piti": (19.74, 0.20, 5.77),
    "lite": (17.92, 0.26, 6.30),
    "controlnet": (15.27, 0.26, 6.31),
}
"""The paper's FID, CLIP-score and CLIP-aesthetic, by row."""
ORDER = (*PAPER, SHIPPED)
HEAD = ("system", "FID", "CLIP-score", "aesthetic", "obedience", "paper: FID, CLIP-score, aesthetic", "training")


@dataclass(frozen=True)
class Row(SystemRow):
    """A row: ``measure.evaluate``'s report, or a note on why there is none."""

    report: Mapping[str, Any] | None = None
    paper: tuple[float, float, float] | None = None

    def words(self) -> tuple[str, ...]:
        """The row's cells, as in ``HEAD``."""
        paper = "{:.2f}, {:.2f}, {:.2f}".format(*self.paper) if self.paper else "-"
        if self.report is None:
            return self.title, self.note, "", "", "", paper, self.cost
        report = self.report
        ours = [f"{report[name]['mean']:.2f}" if name in report else "-" for name in FIGURES]
        return self.title, *ours, "{mean:.2f} [{low:.2f}, {high:.2f}]".format(**report["obedience"]), paper, self.cost


@dataclass(frozen=True)
class Table3(Table):
    """The whole table; each report has its own floor and ceiling."""

    rows: Sequence[Row]

    def notes(self) -> str:
        """The paper's order, floor and ceiling, and the reasons why figures are missing, if any are."""
        reports = [row.report for row in self.rows if isinstance(row, Row) and row.report]  # kept ones have their cells
        ends = [f"{reports[0][name]['mean']:.3f}" for name in ("floor_no_control", "ceiling")]
        words = (
            "Obedience: 0 is the better one of no control (mean IoU {}) and the same system with hints of others, 1 is "
            "the true pictures out of the VAE ({}).".format(*ends)
        )
        systems = ranks(self.rows, lambda facts: (facts["paper"][0], facts["report"]["fid"]), leave_out=(NO_CONTROL,))
        order = order_words("FID", systems, higher_is_better=False)
        return " ".join(
            [*filter(None, [order]), words, *sorted({note for report in reports for note in report.get("notes", ())})]
        )


def make_table3(base: Backbone, plan: Plan, out: Path, on_row: Callable[[str], None] = lambda name: None) -> Table3:
    """Make the table and write it into a folder: ``table3.json``, ``table3.md``, ``table3.png``.

    ``on_row`` and errors: as with ``make_table2``.
    """
    trial = Trial.of(KIND, base, plan)
    columns: dict[str, Sequence[np.ndarray]] = {"label map": trial.shown()}
    plain: list[np.ndarray] = []
    rows = []
    for name in ORDER:
        on_row(name)
        one = entrant(name, KIND, base, plan.opponents)
        report = None
        if one.make:
            make = KeepsFirst(one.make)
            report = evaluate_base(base, make, trial.evaluation, trial.real, no_control=plain or None)
            columns[one.title] = make.pictures
            if name == NO_CONTROL:
                plain = make.pictures
        rows.append(Row(name, one.title, report, PAPER.get(name), cost=one.cost, note=one.note))
    facts = trial.facts() | {"pictures for FID": len(trial.real)}
    table = Table3(rows, facts, advice(rows, plan.opponents))
    return write_report(out, "table3", table, HEAD, {"": columns}, plan.opponents)
