"""Section 4.3, a depth ControlNet trained at small scale beside the large depth model of Stable Diffusion 2.

The paper trains a depth ControlNet on 200,000 pictures on one GPU in five days; Stability AI's depth model took a
cluster and more than 12 million. Users who were taught with 100 pictures of each tell them apart with a precision of
0.52 ± 0.17: not at all. Here the large model is the base tuned whole with three times the operations on more scenes
(``depth2img``), and a classifier on the referee's features takes the users' place. Floor: two sets of the large model,
of different seeds; ceiling: the large model's and the true pictures. Which one is more faithful stands beside it.

    controlkit reproduce fig-depth --opponents runs/opponents --out runs/fig-depth
    controlkit reproduce fig-depth --quick --out runs/fig-depth      # a trial of the machinery, in minutes

Opponents that are not in the folder (``depth2img``, ``controlnet-depth``) are trained below ``--out``; run the same
command again to go on after an interruption.

Cost: 3.5 hours on one thread with both trainings, by the seconds of a step (2 cores of an AMD EPYC, AVX2).
Expected: no whole run yet. Paper: a precision of 0.52 ± 0.17.
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
_FOLDS = 5
_PENALTY = 1.0
"""Of the classifier: the weight of its squared coefficients beside the summed loss (features are standardised)."""
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
    """The share of pictures that a classifier gives to the right one of the two; 0.5 is chance."""
    spread: float | None = None
    """The standard deviation of that over the classifier's folds."""
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
        """Whether they are told apart, which is more faithful, and the meaning of floor and ceiling."""
        words = [self.length]
        for row in (row for row in self.rows if row.name in (SMALL, SHIPPED) and row.difference):
            words.append(f"{row.title}: {_verdict(row)}.")
        ends = f"Told apart by a classifier, {_FOLDS} folds of scenes. Floor: large model, other seeds; ceiling: truth."
        return " ".join(filter(None, [*words, self.unjudged or ends]))


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
    facts = {**trial.facts(), "metric": metric_of(trial.evaluation.spec).name, "share": plan.share}
    facts |= {"ceiling of depth RMSE": round(trial.ceiling().mean, 4), "classifier": f"{_FOLDS} folds"}
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
    """How well a classifier tells two systems apart by features (N, C) of their pictures of the same N scenes, 0 to 1.

    A logistic regression is fitted on all scenes but those of a fold, and asked about both pictures of each in that
    fold, so that no scene tells anything. Returns the share of right answers with its interval over scenes, and its
    standard deviation over folds.
    """
    count = len(one)
    folds = numpy_rng("folds", count).permutation(count) % min(_FOLDS, count)
    right = np.zeros(count)
    for fold in range(int(folds.max()) + 1):
        seen, asked = torch.from_numpy(folds != fold), torch.from_numpy(folds == fold)
        logits = _fitted(torch.cat([one[seen], other[seen]]), int(seen.sum()))
        answers = torch.stack([logits(one[asked]) > 0, logits(other[asked]) <= 0]).double().mean(0)
        right[folds == fold] = answers.numpy()
    spread = np.std([right[folds == fold].mean() for fold in range(int(folds.max()) + 1)])
    return mean_figure(right), float(spread)


def _fitted(features: Tensor, positive: int) -> Callable[[Tensor], Tensor]:
    """A logistic regression of whether a row (of features (M, C)) is among the first ``positive``; gives logits."""
    features = features.double()
    mean, deviation = features.mean(0), features.std(0).clamp(min=1e-6)
    x, y = (features - mean) / deviation, (torch.arange(len(features)) < positive).double()
    weights = torch.zeros(x.shape[1] + 1, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(x @ weights[1:] + weights[0], y, reduction="sum")
        value = value + _PENALTY / 2 * weights[1:].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    fitted = weights.detach()
    return lambda rows: (rows.double() - mean) / deviation @ fitted[1:] + fitted[0]
