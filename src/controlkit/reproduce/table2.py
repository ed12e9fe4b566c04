"""Table 2: how well label maps are found again in pictures that were made of them, as IoU.

The paper makes pictures of ADE20K's label maps and segments them with OneFormer. Here the maps are those of held-out
scenes, and the observer of their world segments. Floor and ceiling stand beside the rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from controlkit.annotators import contract
from controlkit.backbones import Backbone
from controlkit.measure import EMBEDDED, EvaluationPlan, Figure, ceiling_of, fidelity, mean_figure
from controlkit.reproduce.entrants import SHIPPED, Entrant, Plan, entrant, markdown, write_report
from controlkit.sample import ControlRequest

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
class Row:
    """A row: ours and the paper's, or a note on why there is none of ours."""

    name: str
    title: str
    ours: Figure | None = None
    """Mean IoU with its 95% interval."""
    spread: float | None = None
    """The standard deviation over pictures, as the paper gives it."""
    paper: tuple[float, float] | None = None
    cost: str = ""
    note: str = ""

    def words(self) -> tuple[str, str, str, str, str]:
        """Title, ours with its spread, the interval, the paper's, the cost."""
        ours, interval = self.note, ""
        if self.ours and self.spread is not None:
            ours, interval = f"{self.ours.mean:.2f} ± {self.spread:.2f}", f"{self.ours.low:.2f} to {self.ours.high:.2f}"
        paper = "{:.2f} ± {:.2f}".format(*self.paper) if self.paper else "-"
        return self.title, ours, interval, paper, self.cost


HEAD = ("system", "ours: IoU ± spread", "95% interval of the mean", "paper", "training")


@dataclass(frozen=True)
class Table2:
    """The whole table. ``floor``: of the base without control, and of hints shuffled between pictures (the shipped
    control's). ``ceiling``: of the true pictures as the VAE gives them back."""

    rows: Sequence[Row]
    floor: Mapping[str, Figure]
    ceiling: Figure
    settings: Mapping[str, Any]

    def caption(self) -> str:
        """Floor, ceiling and settings in words."""
        floors = "; ".join(f"{name} {figure}" for name, figure in self.floor.items())
        used = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        return f"Floor: {floors}. Ceiling: {self.ceiling}. Settings: {used}."

    def markdown(self) -> str:
        """The table to read."""
        return f"{markdown(HEAD, [row.words() for row in self.rows])}\n{self.caption()}\n"


def make_table2(base: Backbone, plan: Plan, out: Path, on_row: Callable[[str], None] = lambda name: None) -> Table2:
    """Make the table and write it into a folder: ``table2.json``, ``table2.md``, ``table2.png``.

    ``on_row`` is told each row's name before it is made. A row whose opponent is not in ``plan.opponents`` says so.
    Raises as ``load_baseline`` does for a folder that cannot be read.
    """
    spec = contract(KIND)
    pairs, _ = EMBEDDED.heldout(spec, base.size, plan.num)
    evaluation = EvaluationPlan(ControlRequest(name=KIND), spec, pairs, plan.steps, plan.guidance)
    truth = [pair.picture for pair in pairs]
    columns: dict[str, list[np.ndarray]] = {"label map": [spec.picture(hint) for hint in evaluation.hints]}

    def scored(made: Sequence[np.ndarray]) -> np.ndarray:
        return fidelity(made, evaluation.hints, spec)

    rows = []
    for name in ORDER:
        on_row(name)
        if name == TRUTH:
            one, made = Entrant(name, "Ground truth", None), truth
        else:
            one = entrant(name, KIND, base, plan.opponents)
            made = [picture.pixels for picture in one.make(evaluation.requests("controlled"))] if one.make else []
        row = Row(name, one.title, paper=PAPER.get(name), cost=one.cost, note=one.note)
        if made:
            columns[one.title] = made
            row = replace(row, ours=mean_figure(scores := scored(made)), spread=float(scores.std()))
        rows.append(row)
    on_row("floor")
    make = entrant(SHIPPED, KIND, base, None).make
    assert make is not None
    floor = {
        name: mean_figure(scored([picture.pixels for picture in make(evaluation.requests(way))]))
        for name, way in {"no control": "no_control", "hints shuffled": "shuffled"}.items()  # type: ignore[arg-type]
    }
    facts = {"base": base.name, "scenes": len(pairs), "steps": plan.steps, "guidance": plan.guidance}
    facts["seeds"] = f"0-{len(pairs) - 1}"
    table = Table2(rows, floor, mean_figure(scored(ceiling_of(base)(truth))), facts)
    write_report(out, "table2", asdict(table), table.markdown(), columns)
    return table
