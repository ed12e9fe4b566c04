"""Figure 8: the ablation under four prompts: none, one that says too little, one that conflicts, and a perfect one.

The paper shows pictures: ControlNet obeys under all four; without zero convolutions, or as ControlNet-lite, control is
lost where the prompt says nothing. Here each cell has the fidelity to the label map beside its picture.

    controlkit reproduce fig8 --opponents runs/opponents --out runs/fig8

Cost: 2 minutes on one thread (an AMD EPYC with AVX-512 BF16) with three opponents.
Expected (32 scenes): IoU without a prompt, where it says too little, where it conflicts and with a perfect one:
ControlNet 0.43, 0.43, 0.34, 0.45; Gaussian joins 0.41, 0.41, 0.33, 0.43; lite 0.39, 0.40, 0.31, 0.40; the shipped
control 0.52, 0.51, 0.44, 0.53; ceiling 0.58. The paper has pictures, no numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from controlkit.backbones import Backbone
from controlkit.data import Pair
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
from controlkit.reproduce.table2 import KIND
from controlkit.sample import PLAIN_PROMPT

ORDER = (NO_CONTROL, "controlnet", "gaussian", "lite", SHIPPED)


def _rotated(pairs: Sequence[Pair]) -> list[str]:
    """Each pair's prompt is another pair's."""
    half = max(len(pairs) // 2, 1)
    return [pair.prompt for pair in [*pairs[half:], *pairs[:half]]]


PROMPTS: dict[str, Callable[[Sequence[Pair]], list[str]]] = {
    "none": lambda pairs: [""] * len(pairs),
    "insufficient": lambda pairs: [PLAIN_PROMPT] * len(pairs),
    "conflicting": _rotated,
    "perfect": lambda pairs: [pair.prompt for pair in pairs],
}
"""The prompts of each setting, for held-out pairs."""
HEAD = ("system", *(f"prompt: {name}" for name in PROMPTS), "training")


@dataclass(frozen=True)
class Row(SystemRow):
    """A system: its fidelity (mean IoU, 95% interval) by prompt, or a note on why there is none."""

    ours: Mapping[str, Figure]

    def words(self) -> tuple[str, ...]:
        """The row's cells, as in ``HEAD``."""
        if not self.ours:
            return self.title, self.note, *[""] * (len(PROMPTS) - 1), self.cost
        cells = [f"{one.mean:.2f} [{one.low:.2f}, {one.high:.2f}]" for one in self.ours.values()]
        return self.title, *cells, self.cost


@dataclass(frozen=True)
class Figure8(Table):
    """The figure in numbers. The first row is the floor; ``ceiling``: of the true pictures out of the VAE."""

    rows: Sequence[Row]
    ceiling: Figure

    def notes(self) -> str:
        """The words on floor and ceiling."""
        return f"Mean IoU; floor: the first row. Ceiling: {self.ceiling}."


def make_fig8(base: Backbone, plan: Plan, out: Path, on_row: Callable[[str], None] = lambda name: None) -> Figure8:
    """Make the figure and write it into a folder: ``fig8.json``, ``fig8.md``, and ``fig8.png``, a prompt a row.

    ``on_row`` and errors: as with ``make_table2``.
    """
    trial = Trial.of(KIND, base, plan)
    truth = trial.evaluation.pairs
    shown: dict[str, list[np.ndarray]] = {"label map": trial.shown(1) * len(PROMPTS)}
    rows = []
    for name in ORDER:
        on_row(name)
        one = entrant(name, KIND, base, plan.opponents)
        figures = {}
        for setting, prompts in PROMPTS.items() if one.make else ():
            told = [replace(pair, prompt=prompt) for pair, prompt in zip(truth, prompts(truth), strict=True)]
            assert one.make is not None
            made = pixels_of(one.make, replace(trial.evaluation, pairs=told).requests("controlled"))
            figures[setting] = mean_figure(trial.scores(made))
            shown.setdefault(one.title, []).append(made[0])
        rows.append(Row(name, one.title, figures, cost=one.cost, note=one.note))
    ceiling = trial.ceiling()
    figure = Figure8(rows, trial.facts(), advice(rows, plan.opponents), ceiling=ceiling)
    return write_report(out, "fig8", figure, HEAD, {"": shown}, plan.opponents)
