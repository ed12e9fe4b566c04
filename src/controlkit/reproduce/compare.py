"""The paper's comparison with earlier methods: the same hints through each, side by side, with the fidelity of each.

Those of label maps (PITI, Taming Transformers, LDM, and T2I-Adapter, which is later than the paper) beside ControlNet
on label maps, and Sketch-Guided Diffusion, at its two strengths, beside ControlNet on edges.

    controlkit reproduce fig-compare --opponents runs/opponents --out runs/fig-compare

Cost: 1.5 minutes on one thread (an AMD EPYC with AVX-512 BF16) with four opponents.
Expected (32 scenes): mean IoU of PITI 0.31, VQGAN 0.19 and LDM 0.56 (those two of half their operations), T2I-Adapter
0.37, ControlNet 0.45, seg as shipped 0.53, floor 0.23, ceiling 0.58; F1 of Sketch-Guided Diffusion 0.67, at twice the
strength 0.72, ControlNet 0.63, canny as shipped 0.79, floor 0.25, ceiling 0.88. The paper has pictures, no numbers.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from controlkit.backbones import Backbone
from controlkit.measure import Figure, mean_figure
from controlkit.reproduce.entrants import (
    NO_CONTROL,
    SHIPPED,
    Plan,
    Table,
    Trial,
    advice,
    entrant,
    pixels_of,
    write_report,
)
from controlkit.reproduce.rows import SystemRow

GROUPS: dict[str, tuple[tuple[str, float], ...]] = {
    "seg": (
        (NO_CONTROL, 1.0),
        ("piti", 1.0),
        ("taming", 1.0),
        ("ldm-scratch", 1.0),
        ("t2i-adapter", 1.0),
        ("controlnet", 1.0),
        (SHIPPED, 1.0),
    ),
    "canny": (
        (NO_CONTROL, 1.0),
        ("sketch-guided", 1.0),
        ("sketch-guided", 2.0),
        ("controlnet", 1.0),
        (SHIPPED, 1.0),
    ),
}
"""By kind of hints: the systems, each with the scale of its control."""
ORDER = [f"{name}, {kind}" for kind, group in GROUPS.items() for name, _ in group]
HEAD = ("system", "hints", "fidelity", "ceiling", "training")


@dataclass(frozen=True)
class Row(SystemRow):
    """A system on one kind of hints: its fidelity with the ceiling, or a note on why there is none."""

    scale: float
    ours: Figure | None = None
    ceiling: Figure | None = None

    def words(self) -> tuple[str, ...]:
        """The row's cells, as in ``HEAD``."""
        ours = str(self.ours) if self.ours else self.note
        return self.title, self.kind, ours, str(self.ceiling) if self.ours else "", self.cost


@dataclass(frozen=True)
class Comparison(Table):
    """All rows; the first one of each kind of hints is the floor."""

    rows: Sequence[Row]

    def notes(self) -> str:
        """The words on fidelity and its floor."""
        return f"Fidelity: mean IoU of seg, F1 of canny; the floor is {NO_CONTROL}."


def make_comparison(
    base: Backbone, plan: Plan, out: Path, on_row: Callable[[str], None] = lambda name: None
) -> Comparison:
    """Make the comparison and write it into a folder: ``fig-compare.json``, ``.md``, and a ``.png`` of each kind.

    ``on_row`` and errors: as with ``make_table2``.
    """
    rows: list[Row] = []
    began, facts = time.perf_counter(), dict[str, Any]()
    sheets: dict[str, dict[str, Sequence[np.ndarray]]] = {}
    for kind, group in GROUPS.items():
        trial = Trial.of(kind, base, plan)
        facts, ceiling = trial.facts(), trial.ceiling()
        sheets[kind] = {"hint": trial.shown()}
        for name, scale in group:
            on_row(f"{name}, {kind}")
            one = entrant(name, kind, base, plan.opponents)
            title = one.title if scale == 1.0 else f"x{scale:g}: {one.title}"
            row = Row(name, title, scale, kind=kind, cost=one.cost, note=one.note)
            if one.make:
                control = trial.evaluation.control.model_copy(update={"scale": scale})
                made = pixels_of(one.make, replace(trial.evaluation, control=control).requests("controlled"))
                row = replace(row, ours=mean_figure(trial.scores(made)), ceiling=ceiling)
                sheets[kind][title] = made
            rows.append(row)
    facts["seconds"] = round(time.perf_counter() - began)
    found = Comparison(rows, facts, advice(rows, plan.opponents))
    return write_report(out, "fig-compare", found, HEAD, sheets, plan.opponents)
