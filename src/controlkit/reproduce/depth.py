"""Section 4.3, a depth ControlNet trained at small scale beside the large depth model of Stable Diffusion 2.

The paper trains a depth ControlNet on 200,000 pictures on one GPU in five days; Stability AI's depth model took a
cluster and more than 12 million. 12 users who were taught with 100 pictures of each tell them apart with a precision of
0.52 ± 0.17: not at all. Here the large model is the base tuned whole with three times the operations on more scenes
(``depth2img``), and 12 classifiers of the referee's features take the users' place: of a scene's two pictures each says
which one is the large model's. How much that can show stands beside it: the large model with other seeds, which nobody
tells apart (floor), and true pictures and those without control, which differ (ceiling). So does fidelity.

    controlkit reproduce fig-depth --opponents runs/opponents --out runs/fig-depth
    controlkit reproduce fig-depth --quick --out runs/fig-depth      # a trial of the machinery, in minutes

Opponents that are not in the folder (``depth2img``, ``controlnet-depth``) are trained below ``--out``; run the same
command again to go on after an interruption.

Cost: 2 minutes with both at hand; half an hour and ten minutes on one thread for ``recipes/opponents.py
--factor 0.5 --share 0.25 --only depth2img`` and ``--only controlnet --hint depth --scenes 1000`` (an AMD EPYC with
AVX-512 BF16, bfloat16).
Expected (half of the operations): depth RMSE of the large model 0.078, ControlNet 0.090, depth as shipped
0.073, no control 0.165, true pictures 0.066. ControlNet is told from the large model in 0.85 ± 0.05, the shipped
control in 0.88, true pictures in 0.90, the large model with other seeds in 0.52: so it is told apart here. With 64
scenes in place of 192 that floor is 0.67, and between other pairs of seeds 0.45 to 0.60. Paper: 0.52 ± 0.17.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from controlkit.backbones import Backbone
from controlkit.baselines import Settings, opponent, train_baseline
from controlkit.measure import Figure, mean_figure, metric_of, unjudgeable, world_of
from controlkit.reproduce.entrants import (
    NO_CONTROL,
    SHIPPED,
    Entrant,
    Plan,
    Table,
    Trial,
    entrant,
    pixels_of,
    write_report,
)
from controlkit.reproduce.trained import on_length, run_folder
from controlkit.sample import Maker
from controlkit.seeds import numpy_rng

KIND = "depth"
LARGE, SMALL, TRUTH, AGAIN = "depth2img", "controlnet", "truth", "again"
ORDER = (LARGE, SMALL, SHIPPED, NO_CONTROL, TRUTH, AGAIN)
SCENES = {LARGE: 6000, SMALL: 1000}
"""Scenes that each is trained on, where it is trained here."""
PAPER = (0.52, 0.17)
HEAD = ("system", "depth RMSE", "less the large model's", "told apart from it", "paper: precision", "training")
_TURNS, _PARTS = 3, 4
RATERS = _TURNS * _PARTS
"""As many as in the paper. In each turn the scenes are parted anew; a rater is asked about one part, and taught with
the others."""
_PENALTY = 1.0
"""The weight of a rater's squared coefficients beside the summed loss (differences are scaled to a deviation of 1)."""
_FEWEST = 40
"""Scenes to train on, at least."""


@dataclass(frozen=True)
class Row:
    """A system beside the large model: fidelity, the paired difference, and how well both are told apart."""

    name: str
    title: str
    fidelity: Figure
    difference: Figure | None = None
    """Its RMSE less that of the large model on the same scenes; above 0 it is the less faithful one."""
    told: Figure | None = None
    """The share of scenes in which the large model's picture is told from this system's; 0.5 is chance."""
    spread: float | None = None
    """The standard deviation of that over raters."""
    cost: str = ""

    def words(self) -> tuple[str, ...]:
        """The row's cells, as in ``HEAD``."""
        less = self.difference
        difference = f"{less.mean:+.3f} [{less.low:+.3f}, {less.high:+.3f}]" if less else "-"
        told = "-"
        if self.told and self.spread is not None:
            told = f"{self.told.mean:.2f} ± {self.spread:.2f} [{self.told.low:.2f}, {self.told.high:.2f}]"
        paper = "{:.2f} ± {:.2f}".format(*PAPER) if self.name == SMALL else "-"
        return self.title, str(self.fidelity), difference, told, paper, self.cost


@dataclass(frozen=True)
class Depth(Table):
    """All systems beside the large one."""

    rows: Sequence[Row]
    length: str = field(default="", kw_only=True)
    """A sentence on the trainings, if they are shorter than they should be."""
    unjudged: str = field(default="", kw_only=True)
    """A sentence on why nothing is told apart; "" where it is."""

    def notes(self) -> str:
        """Whether they are told apart, which is more faithful; floor and ceiling of telling apart."""
        rows, words = {row.name: row for row in self.rows}, [self.length]
        words += [f"{rows[name].title}: {_verdict(rows[name])}." for name in (SMALL, SHIPPED)]
        ends = {name: rows[name].told for name in (AGAIN, TRUTH, NO_CONTROL)}
        told = ", ".join(f"{rows[name].title} {figure.mean:.2f}" for name, figure in ends.items() if figure)
        asked = (
            f"Told apart: which of a scene's two pictures is the large model's, by {RATERS} raters, each on scenes "
            f"that it was not taught with; 0.5 is chance. Floor and ceilings: {told}."
        )
        truth = rows[TRUTH].told
        blind = "They do not tell true pictures either, so they say nothing here." if truth and truth.low <= 0.5 else ""
        return " ".join(filter(None, [*words, self.unjudged or asked, blind]))


def _verdict(row: Row) -> str:
    """Whether a system is told apart from the large one, and which is more faithful, in words."""
    assert row.difference
    more = "more faithful" if row.difference.high < 0 else "less faithful" if row.difference.low > 0 else "as faithful"
    faith = f"{more} {'as' if more.startswith('as') else 'than'} the large model, by the interval"
    if row.told is None:
        return faith
    return f"{'told apart from' if row.told.low > 0.5 else 'not told apart from'} the large model; {faith}"


def make_depth(base: Backbone, plan: Plan, out: Path, on_row: Callable[[str], None] = lambda name: None) -> Depth:
    """Make the figure and write it into a folder: ``fig-depth.json``, ``.md`` and ``.png``; trains there, or goes on.

    ``on_row``: as with ``make_table2``. Raises as ``train_baseline`` and ``load_baseline`` do; ``KeyboardInterrupt``
    where ``plan.stopping`` asks for it.
    """
    trial, rows = Trial.of(KIND, base, plan), list[Row]()
    other = replace(trial.evaluation, first_seed=plan.num)
    systems = {name: _system(name, base, plan, out, on_row) for name in (LARGE, SMALL, SHIPPED, NO_CONTROL)}
    made = {name: pixels_of(_make(one), trial.evaluation.requests("controlled")) for name, one in systems.items()}
    on_row(TRUTH)
    made[TRUTH] = trial.truth
    on_row(AGAIN)
    made[AGAIN] = pixels_of(_make(systems[LARGE]), other.requests("controlled"))
    titles = {name: one.title for name, one in systems.items()}
    titles |= {TRUTH: "true pictures", AGAIN: f"{titles[LARGE]}, other seeds"}
    scores = {name: trial.scores(pictures) for name, pictures in made.items()}
    features, unjudged = _features(trial, made)
    for name in ORDER:
        row = Row(name, titles[name], mean_figure(scores[name]), cost=systems[name].cost if name in systems else "")
        if name != LARGE:
            row = replace(row, difference=mean_figure(scores[name] - scores[LARGE]))
            if features:
                told, spread = told_apart(features[name], features[LARGE])
                row = replace(row, told=told, spread=spread)
        rows.append(row)
    ceiling = round(trial.ceiling().mean, 4)
    facts = {**trial.facts(), "metric": metric_of(trial.evaluation.spec).name, "share": plan.share}
    facts |= {"ceiling of depth RMSE": ceiling, "raters": RATERS}
    table = Depth(rows, facts, "", length=on_length(plan), unjudged=unjudged)
    columns = {"depth": trial.shown(), **{titles[name]: made[name] for name in ORDER}}
    return write_report(out, "fig-depth", table, HEAD, {"": columns})


def _make(one: Entrant) -> Maker:
    assert one.make
    return one.make


def _system(name: str, base: Backbone, plan: Plan, out: Path, on_row: Callable[[str], None]) -> Entrant:
    """A system out of the opponents' folder, or trained here where it is not there."""
    on_row(name)
    if (one := entrant(name, KIND, base, plan.opponents)).make:
        return one
    row, folder = opponent(name), run_folder(out, "fig-depth", plan, name if name == LARGE else f"{name}-{KIND}")
    scenes = max(round(SCENES[name] * min(plan.share, 1.0)), _FEWEST)
    length: dict[str, Any] = {"steps": 10**6, "pflop": row.pflop * plan.share, "checkpoint_every": 50}
    settings = Settings(**length, batch=row.batch, rate=row.rates[1], scenes=scenes)
    done = 1.0  # of a training that has ended there are no records
    for record in train_baseline(name, base, settings, folder, KIND, plan.stopping):
        plan.on_step(f"{row.title}: step {record.step:,}, {record.share:.0%}, loss {record.loss:.3f}")
        done = record.share
    if done < 1:
        raise KeyboardInterrupt
    return entrant(name, KIND, base, folder.parent)


def _features(trial: Trial, made: dict[str, list[np.ndarray]]) -> tuple[dict[str, Tensor], str]:
    """The referee's features (N, C) of each system's pictures; or none, and a sentence on why."""
    world = world_of(trial.base)
    referee = world.referee(trial.base.device.type) if world else None
    reason = unjudgeable(referee, trial.evaluation.pairs)
    if reason or referee is None:
        return {}, reason
    return {name: referee.features(pictures).cpu() for name, pictures in made.items()}, ""


# --- the users' place -------------------------------------------------------------------------------------------------


def told_apart(one: Tensor, other: Tensor) -> tuple[Figure, float]:
    """How well two systems' pictures of the same N scenes are told apart by their features, (N, C) each, 0 to 1.

    A rater gives each picture a logit, linear in its features, and takes the picture with the higher one for that of
    the first system. Returns the share of right answers with its interval over scenes, and its standard deviation over
    ``RATERS``. Only the difference of a scene's two pictures counts, so that the scene itself tells nothing.
    """
    difference = (one - other).double()
    count, parts = len(difference), min(_PARTS, len(difference))
    right, shares = np.zeros((_TURNS, count)), []
    for turn, answers in enumerate(right):
        part_of = numpy_rng("raters", turn, count).permutation(count) % parts
        for part in range(parts):
            asked = part_of == part
            known = torch.from_numpy(~asked)
            logits = (difference[~known] @ _taught(difference[known])).numpy()
            answers[asked] = (np.sign(logits) + 1) / 2  # what looks the same is guessed
            shares.append(answers[asked].mean())
    return mean_figure(right.mean(0)), float(np.std(shares))


def _taught(difference: Tensor) -> Tensor:
    """The coefficients (C,) of a logistic regression without a constant, by which differences (N, C) are above 0."""
    scale = difference.square().mean(0).sqrt().clamp(min=1e-9)
    weights = torch.zeros(difference.shape[1], dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.softplus(-(difference / scale) @ weights).sum() + _PENALTY / 2 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach() / scale
