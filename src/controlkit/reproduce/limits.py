"""The paper's limitation: where a hint is read as another thing than is meant, a strong prompt does not mend it.

Here the hint (edges) is of a scene, and the prompt is the scene's own with one solid exchanged: a box in the hint, a
ball in the words. Which of the two is drawn is read off the pictures by the observer, and the referee chooses between
the two captions. A strong prompt is told with that word emphasised, and the hint's solid as the negative prompt. Floor:
no control, where the prompt is all there is; ceiling: the hint with its own prompt.

    controlkit reproduce fig-limits --out runs/fig-limits

Cost: `--quick` 1.8 minutes of CPU time (one thread of an AMD EPYC, AVX2, beside other work).
Expected (64 scenes): the prompt's solid is drawn in 20% [11%, 31%] under the hint (19% with its own prompt), with
a strong prompt in 34% [23%, 45%], in mode "prompt" in 45% [34%, 58%], without control in 72% [59%, 81%]: a strong
prompt mends little, as in the paper. The observer finds the true solid in 80% of the true pictures; the referee tells
their captions apart in 61% [50%, 73%], hardly.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from controlkit.backbones import Backbone
from controlkit.data import Pair
from controlkit.errors import Invalid
from controlkit.measure import EMBEDDED, EvaluationPlan, Figure, mean_figure, world_of
from controlkit.mini.scenes import CLASSES, SOLIDS
from controlkit.reproduce.conditions import Remembered, shipped, used
from controlkit.reproduce.entrants import Plan, Table, Trial, pixels_of, write_report
from controlkit.sample import Maker, Request

KIND = "canny"
HEAD = (
    "condition",
    "drawn as the hint shows",
    "as the prompt says",
    "neither",
    "hint's caption chosen",
    "fidelity to the hint",
)
EMPHASIS = 1.5
"""The weight of the exchanged word in a strong prompt."""
_LOOKED_AT = 2
"""Scenes looked at for each that is measured, as not each has a solid that can be exchanged."""
_LEAST = 0.005
"""The share of a picture's pixels that a solid must have, to be there."""


@dataclass(frozen=True)
class Condition:
    """How pictures are made: with the exchanged prompt or the own one, plain or strong, at a scale of the control."""

    title: str
    scale: float
    exchanged: bool = True
    strong: bool = False
    mode: str = "balanced"


CONDITIONS = {
    "floor": Condition("no control, exchanged prompt", 0.0),
    "floor-strong": Condition("no control, strong prompt", 0.0, strong=True),
    "half-strong": Condition("scale 0.5, strong prompt", 0.5, strong=True),
    "plain": Condition("scale 1, exchanged prompt", 1.0),
    "strong": Condition("scale 1, strong prompt", 1.0, strong=True),
    "prompt-mode": Condition('scale 1, strong prompt, mode "prompt"', 1.0, strong=True, mode="prompt"),
    "ceiling": Condition("scale 1, the hint's own prompt", 1.0, exchanged=False),
}
TRUTH = "truth"
ORDER = (*CONDITIONS, TRUTH)


@dataclass(frozen=True)
class Exchange:
    """A scene whose prompt is told with another solid: the two captions, and the solids' names."""

    pair: Pair
    own: str
    other: str
    shown: str
    said: str

    @classmethod
    def of(cls, pair: Pair) -> "Exchange | None":
        """The exchange of the first solid in a scene's caption; None where it has none, or two of that kind."""
        if pair.truth is None:
            return None
        own = pair.truth.captions[0]
        named = [word for word in re.findall(r"\w+", own) if word in SOLIDS]
        if not named or named.count(named[0]) > 1:
            return None
        at = SOLIDS.index(named[0])
        said = next(name for name in (*SOLIDS[at + 1 :], *SOLIDS) if name not in named)
        if (pair.truth.labels == CLASSES.index(named[0])).mean() < _LEAST:
            return None
        return cls(pair, own, re.sub(rf"\b{named[0]}\b", said, own), named[0], said)

    def asked(self, request: Request, condition: Condition) -> Request:
        """A request under a condition."""
        if not condition.strong:
            return request.model_copy(update={"prompt": self.other if condition.exchanged else self.own})
        stressed = re.sub(rf"\b{self.said}\b", f"({self.said}:{EMPHASIS})", self.other)
        changes = {"prompt": stressed, "negative_prompt": f"a {self.shown}", "dialect": "a1111"}
        return request.model_copy(update=changes)


@dataclass(frozen=True)
class Row:
    """A condition: the shares of pictures in which each solid is drawn, with 95% intervals, and fidelity."""

    name: str
    title: str
    shown: Figure
    said: Figure
    neither: Figure
    fidelity: Figure
    chosen: Figure | None = None
    """The share in which the referee chooses the hint's caption over the prompt's; None where there is no referee."""

    def words(self) -> tuple[str, ...]:
        """The row's cells, as in ``HEAD``."""
        shares = [_percent(one) if one else "-" for one in (self.shown, self.said, self.neither, self.chosen)]
        return self.title, *shares, str(self.fidelity)


@dataclass(frozen=True)
class Limits(Table):
    """All conditions, and the true pictures: how well the observer and the referee tell the solids apart."""

    rows: Sequence[Row]

    def notes(self) -> str:
        """How often a strong prompt changes what is drawn, beside what it does without control."""
        rows = {row.name: row for row in self.rows}
        said = {name: _percent(rows[name].said) for name in ("plain", "strong", "floor-strong", "prompt-mode")}
        return (
            f"The prompt's solid is drawn in {said['plain']} under the hint, with a strong prompt in {said['strong']}, "
            f'in mode "prompt" in {said["prompt-mode"]}, and without control in {said["floor-strong"]} (floor of the '
            "hint). Ceiling: the hint with its own prompt. Last row: true pictures, which the judges should know."
            f"{self._of_the_referee(rows[TRUTH].chosen)}"
        )

    @staticmethod
    def _of_the_referee(true: Figure | None) -> str:
        """A sentence on a referee that cannot tell the captions of true pictures apart; "" where it can."""
        if true is None or true.low > 0.5:
            return ""
        return f" The referee cannot tell the captions apart (true pictures: {_percent(true)}): look at the others."


def make_limits(base: Backbone, plan: Plan, out: Path, on_row: Callable[[str], None] = lambda name: None) -> Limits:
    """Make the figure and write it into a folder: ``fig-limits.json``, ``.md`` and ``.png``.

    ``on_row``: as with ``make_table2``. ``Invalid`` where no scene has a solid that can be exchanged.
    """
    trial = Trial.of(KIND, base, replace(plan, num=_LOOKED_AT * plan.num))
    exchanges = [found for pair in trial.evaluation.pairs if (found := Exchange.of(pair))][: plan.num]
    if not exchanges:
        raise Invalid(f"None of these {_LOOKED_AT * plan.num} scenes has a solid to exchange: take a larger --num.")
    chosen = replace(trial.evaluation, pairs=[one.pair for one in exchanges])
    trial = replace(trial, evaluation=chosen)
    make = Remembered(shipped(base, KIND))
    made: dict[str, list[np.ndarray]] = {}
    for name, condition in CONDITIONS.items():
        on_row(name)
        made[name] = _made(make, chosen, exchanges, condition)
    on_row(TRUTH)
    titles = {name: condition.title for name, condition in CONDITIONS.items()} | {TRUTH: "true pictures"}
    made[TRUTH] = trial.truth
    rows = [_row(name, titles[name], pictures, exchanges, trial) for name, pictures in made.items()]
    facts: dict[str, Any] = trial.facts() | {"emphasis": EMPHASIS}
    table = Limits(rows, facts, "")
    return write_report(out, "fig-limits", table, HEAD, {"": {"hint": trial.shown(), **made}})


def _made(make: Maker, plan: EvaluationPlan, exchanges: Sequence[Exchange], condition: Condition) -> list[np.ndarray]:
    way = used(plan, scale=condition.scale, mode=condition.mode)
    requests = way.requests("controlled" if condition.scale else "no_control")
    asked = [one.asked(request, condition) for one, request in zip(exchanges, requests, strict=True)]
    return pixels_of(make, asked)


def _row(name: str, title: str, pictures: Sequence[np.ndarray], exchanges: Sequence[Exchange], trial: Trial) -> Row:
    """A condition's shares, as the observer and the referee read its pictures."""
    drawn = [_drawn(labels, one) for labels, one in zip(_labels(pictures), exchanges, strict=True)]
    shares = {word: mean_figure(np.array([float(one == word) for one in drawn])) for word in ("shown", "said", "")}
    row = Row(name, title, shares["shown"], shares["said"], shares[""], mean_figure(trial.scores(pictures)))
    if world := world_of(trial.base):
        picked = world.referee(trial.base.device.type).choose(pictures, [(one.own, one.other) for one in exchanges])
        row = replace(row, chosen=mean_figure((picked == 0).astype(float)))
    return row


def _labels(pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [found.labels for found in EMBEDDED.observer().observe(pictures)]


def _drawn(labels: np.ndarray, exchange: Exchange) -> str:
    """The solid, "shown" or "said", that takes more of a picture's labels (H, W); "" where both are absent."""
    share: Mapping[str, float] = {
        word: float((labels == CLASSES.index(getattr(exchange, word))).mean()) for word in ("shown", "said")
    }
    most = max(share, key=lambda word: share[word])
    return most if share[most] >= _LEAST else ""


def _percent(figure: Figure) -> str:
    return f"{figure.mean:.0%} [{figure.low:.0%}, {figure.high:.0%}]"
