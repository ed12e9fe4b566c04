"""Figure 4: sudden convergence. Pictures are good at every step of a training, and control comes all at once.

The paper shows the pictures of one training: it does not follow the edges at step 6,100, and does at step 6,133. Here a
control learns the edges of the original tutorial's circles, by the paper's recipe and by ours, each from three seeds,
and obedience, CLIP-score and FID are measured at every checkpoint.

    controlkit reproduce fig-convergence --out runs/fig-convergence
    controlkit reproduce fig-convergence --quick --out runs/fig-convergence      # a trial of the machinery, in minutes

Run the same command again to go on after an interruption. ``fig-convergence.html`` has the curves.

Cost: 55 minutes on one thread, beside another program (an AMD EPYC with AVX-512 BF16, bfloat16), of them 44 for steps;
``--quick`` 3 minutes (2 cores of an AMD EPYC, AVX2).
Expected (16 scenes): by the paper's recipe control is found at steps 600 and 675 and, from the third seed, not yet at
900, where it begins; by ours at 175, 200 and 225. From one checkpoint to the next obedience rises by 42 to 76% of all
there is. Quality is kept at every checkpoint of all six: FID 30.5 to 33.6, without control 31.4. Paper: control by step
6,133, and pictures are good at every step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from controlkit.backbones import Backbone
from controlkit.files import write_atomic
from controlkit.measure import FOUND
from controlkit.pages import Chart, Section, render
from controlkit.reproduce.entrants import Plan, Table, Trial, write_report
from controlkit.reproduce.trained import (
    OUR_RECIPE,
    PAPER_RECIPE,
    Examiner,
    Measured,
    cost_of,
    on_length,
    run_folder,
    shown_at,
    steps_of,
)
from controlkit.train import found_step
from controlkit.train.recipe import Recipe, parse_recipe

KIND, SOURCE = "canny", "fill50k"
SEEDS = (0, 1, 2)
_PICTURES = 4000
"""Circles to train on."""


@dataclass(frozen=True)
class Way:
    """A recipe: its full length, the steps from checkpoint to checkpoint, and its settings."""

    title: str
    steps: int
    every: int
    settings: Mapping[str, Any]
    hint_cfg_scale: float = 1.0
    falls: bool = False
    """Whether the learning rate falls from the warm-up on."""

    def recipe(self, base: Backbone, plan: Plan, seed: int) -> Recipe:
        """The recipe of a training from a seed."""
        steps = steps_of(self.steps, plan)
        warmup = min(self.settings["warmup"], steps // 10)
        pairs = steps * self.settings["batch"] // self.settings.get("noises_per_pair", 1)
        rates = {"steps": steps, "warmup": warmup, "cooldown": steps - warmup if self.falls else 0, "seed": seed}
        control = {"annotator": KIND, "hint_cfg_scale": self.hint_cfg_scale}
        data = {"source": SOURCE, "count": min(_PICTURES, pairs)}  # none that no step would see
        values = {**self.settings, **rates, "base": base.name, "control": control, "data": data}
        return parse_recipe({**values, "checkpoint_every": self.every, "evaluation": {"every": 0}})


WAYS = {
    "paper": Way("the paper's recipe", 900, 75, PAPER_RECIPE),
    "ours": Way("our recipe", 400, 25, OUR_RECIPE, hint_cfg_scale=2.75, falls=True),
}
ORDER = tuple(f"{way}, seed {seed}" for way in WAYS for seed in SEEDS)
HEAD = (
    "recipe",
    "seed",
    "control found at step",
    "largest rise between checkpoints",
    "last obedience",
    "quality kept",
    "FID at all checkpoints",
    "training",
)


@dataclass(frozen=True)
class Row:
    """A training: what was measured at each of its checkpoints."""

    way: str
    title: str
    seed: int
    points: Sequence[Measured]
    cost: str

    @property
    def found(self) -> int | None:
        """The step at which control was found (``train.found_step``)."""
        return found_step([one.summary() for one in self.points])

    @property
    def sudden(self) -> tuple[float, int, int] | None:
        """The largest rise of obedience from one checkpoint to the next, as a share of all there is, and their steps.

        From 0 at step 0 on. None where obedience is not above 0 at any.
        """
        curve = [(0, 0.0), *((one.step, one.figures["obedience"].mean) for one in self.points)]
        top = max(value for _, value in curve)
        rises = [((after - before) / top, first, last) for (first, before), (last, after) in pairwise(curve) if top > 0]
        return max(rises, default=None)

    def words(self) -> tuple[str, ...]:
        """The row's cells, as in ``HEAD``."""
        obeyed = "{0.mean:.2f} [{0.low:.2f}, {0.high:.2f}]".format(self.points[-1].figures["obedience"])
        rise = "{:.0%}, step {} to {}".format(*self.sudden) if self.sudden else "-"
        judged = [one.quality_kept for one in self.points if one.quality_kept is not None]
        kept = f"at {sum(judged)} of {len(judged)}" if judged else "-"
        fids = [one.figures["fid"].mean for one in self.points if "fid" in one.figures]
        range_ = f"{min(fids):.1f} to {max(fids):.1f}" if fids else "-"
        found = str(self.found) if self.found is not None else "not found"
        return self.title, str(self.seed), found, rise, obeyed, kept, range_, self.cost


@dataclass(frozen=True)
class Convergence(Table):
    """All trainings, with floor and ceiling in each checkpoint's figures."""

    rows: Sequence[Row]
    length: str = field(default="", kw_only=True)
    """A sentence on the trainings, if they are shorter than they should be."""

    def notes(self) -> str:
        """Floor, ceiling, the quality of no control; the paper's."""
        one = self.rows[0].points[-1]
        ends = {name: one.words(name) for name in ("floor", "ceiling", "clip_score_no_control", "fid_no_control")}
        words = (
            "Edge F1: floor {floor}, ceiling {ceiling}. Without control: CLIP-score {clip_score_no_control}, FID "
            "{fid_no_control}.".format(**ends),
            f"Found: the first of two checkpoints with a lower bound of at least {FOUND}. Paper: control comes at "
            "once, within 10,000 steps (in its example by step 6,133), and pictures are good at every step.",
        )
        return " ".join(filter(None, (self.length, *words)))

    def page(self) -> str:
        """The curves as an HTML page."""
        sections = []
        for row in self.rows:
            found = f"control found at step {row.found}" if row.found is not None else "control not found"
            charts = [_chart(row.points, name) for name in ("obedience", "fid") if name in row.points[0].figures]
            sections.append(Section(f"{row.title}, seed {row.seed}: {found}", charts=charts))
        return render("Sudden convergence", "Sudden convergence (Figure 4)", [self.caption(), *sections])


def _chart(points: Sequence[Measured], name: str) -> Chart:
    figures = [(one.step, one.figures[name]) for one in points]
    band = [(step, figure.low, figure.high) for step, figure in figures]
    line = [(step, figure.mean) for step, figure in figures]
    if name == "obedience":
        return Chart("obedience", line, band, wide=True, scale=(0, 1), marks=[(FOUND, "found")])
    plain = points[0].figures["fid_no_control"].mean
    return Chart("FID", line, band, wide=True, scale=(0,), marks=[(plain, "no control")])


def make_convergence(
    base: Backbone, plan: Plan, out: Path, on_row: Callable[[str], None] = lambda name: None
) -> Convergence:
    """Make the figure and write it into a folder: ``fig-convergence.json``, ``.md``, ``.html`` with the curves, and a
    ``.png`` of each recipe with pictures at its checkpoints. Trains there, or goes on.

    ``on_row`` and errors: as with ``make_scale``.
    """
    trial = Trial.of(KIND, base, plan, SOURCE)
    examiner = Examiner(trial, plan)
    rows, sheets = [], dict[str, dict[str, Sequence[np.ndarray]]]()
    for name, way in WAYS.items():
        for seed in SEEDS:
            on_row(f"{name}, seed {seed}")
            recipe, run = way.recipe(base, plan, seed), run_folder(out, "fig-convergence", plan, name, seed)
            marks = range(way.every, recipe.steps, way.every)
            points = examiner.follow(recipe, run, marks, f"{way.title}, seed {seed}")
            rows.append(Row(name, way.title, seed, points, cost_of(run)))
            if seed == SEEDS[0]:
                made = {f"step {one.step}": shown_at(run, one.step, plan.num) for one in points}
                sheets[name] = {"hint": trial.shown(), **{step: shown for step, shown in made.items() if shown}}
    facts = {**trial.facts(), "training seeds": list(SEEDS), "share": plan.share}
    table = Convergence(rows, facts, "", length=on_length(plan))
    table = write_report(out, "fig-convergence", table, HEAD, sheets)
    write_atomic(out / "fig-convergence.html", table.page().encode())
    return table
