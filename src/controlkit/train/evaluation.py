"""Obedience and colours on held-out pairs while a run goes on, and sheets of samples.

With several processes each measures its share of the pairs, and all get the whole result: that of a single process but
for rounding, which depends on how many pictures are made at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from controlkit.annotators import grounds_of
from controlkit.backbones import Backbone
from controlkit.branch import ControlNetwork
from controlkit.errors import Invalid
from controlkit.formats import SavedControl
from controlkit.images import HintSpec, fit, grid, read_hint, write_png
from controlkit.measure import (
    COLOURS,
    WAYS,
    EvaluationPlan,
    Maker,
    Way,
    ceiling_of,
    colours,
    fidelity,
    metric_of,
    obedience,
    three_ways,
    unjudgeable,
    unmeasurable,
    world_of,
)
from controlkit.sample import Request, maker
from controlkit.train.ranks import Ranks
from controlkit.train.recipe import EvaluationRecipe
from controlkit.train.records import QUALITY, Record

SHOWN = 8
"""Pairs on a sheet of samples."""
SEEDS = 4
"""Pictures of each hint of one's own."""
CONTROL = "trained"
"""The name of the control that learns, in requests."""


def own_hints(plan: EvaluationRecipe, spec: HintSpec) -> list[tuple[str, np.ndarray]]:
    """Read (prompt, hint) of each of the user's own hints. Raises ``NotFound``, or ``Invalid`` for another file."""
    found = []
    for prompt, path in plan.own():
        hint = read_hint(Path(path), grounds_of(spec)[0])
        if words := spec.fault(hint):
            raise Invalid(f"{path} {words}.")
        found.append((prompt, hint))
    return found


class Evaluator:
    """Obedience on held-out hints, where it can be measured, and pictures of them.

    What does not depend on the branch is made once, by the ``frozen`` base where ``base`` learns, too. ``shown``:
    (prompt, hint) of the user's own hints. ``out``: the run's folder; None for no sheets.
    """

    def __init__(
        self,
        base: Backbone,
        frozen: Backbone,
        plan: EvaluationPlan,
        shown: Sequence[tuple[str, np.ndarray]],
        out: Path | None,
        ranks: Ranks,
    ) -> None:
        self.base, self.frozen, self.plan, self.out, self.ranks = base, frozen, plan, out, ranks
        self.own = ranks.share(len(plan.pairs))
        self.measures = not unmeasurable(plan.spec, plan.pairs)
        self.shown = shown if ranks.first else []
        world = world_of(base)
        referee = world.referee(base.device.type) if world else None
        self.unjudged = unjudgeable(referee, plan.pairs)
        """The reason why quality is not measured, as a sentence; "" where it is."""
        self.referee = None if self.unjudged else referee
        self._without: list[np.ndarray] | None = None
        self._fixed: list[np.ndarray] = []
        """Fidelity of the pictures without control, and of the ceiling."""

    @property
    def _ways(self) -> list[Way]:
        """How the next evaluation makes pictures: without control once, with others' hints to measure against."""
        needed = {"controlled": True, "shuffled": self.measures, "no_control": self._without is None}
        return [way for way in WAYS if needed[way]]

    @property
    def work(self) -> int:
        """Picture-steps this process's next evaluation takes."""
        pictures = len(self.own) * len(self._ways) + len(self.shown) * SEEDS
        return pictures * self.plan.steps

    def _maker(self, branch: ControlNetwork, on_advance: Callable[[int], None]) -> Maker:
        """Makes pictures under control by the base that learns, and those without by the frozen one."""
        loaded = {CONTROL: SavedControl(branch, self.plan.spec)}
        controlled, plain = (maker(base, loaded, on_step=on_advance) for base in (self.base, self.frozen))
        return lambda requests: (controlled if any(one.controls for one in requests) else plain)(requests)

    def measure(self, branch: ControlNetwork, record: Record, on_advance: Callable[[int], None]) -> Record:
        """Add to a step's record what a branch shows that is set to ``eval()``, and write sheets of samples."""
        make = self._maker(branch, on_advance)
        made = three_ways(make, self.plan, self._ways, self.own)
        if self.shown:
            self._write_own(make, record.step)
        without = made["no_control"] if self._without is None else self._without
        scores = self._scores(made, without) if self.measures else []
        self._without = without
        drift = [colours(got) - colours(plain) for got, plain in zip(made["controlled"], without, strict=True)]
        truth = [self.plan.pairs[i].picture for i in self.own]
        quality = [self._clip_scores(shown) for shown in (made["controlled"], without, truth)] if self.referee else []
        sheet = [pair for i, *pair in zip(self.own, made["controlled"], without, strict=True) if i < SHOWN]
        parts = self.ranks.gather((scores, drift, quality, sheet))
        if self.ranks.first:
            self._write_sheet([two for *_, sheet in parts for two in sheet], record.step)
        if self.measures:
            got, shuffled, no_control, top = np.concatenate([scores for scores, *_ in parts], 1)
            obeyed = obedience(got, no_control, shuffled, top, metric_of(self.plan.spec).name)
            record = replace(record, evaluation=obeyed)
        drifted = np.mean([row for _, rows, *_ in parts for row in rows], 0)
        clip_scores = np.concatenate([three for _, _, three, _ in parts], 1).mean(1) if self.referee else []
        return replace(
            record,
            drift=dict(zip(COLOURS, drifted.tolist(), strict=True)),
            quality={name: float(score) for name, score in zip(QUALITY, clip_scores, strict=False)},
        )

    def _scores(self, made: Mapping[Way, list[np.ndarray]], without: list[np.ndarray]) -> list[np.ndarray]:
        """Fidelity under control, with others' hints, without control, and of the ceiling."""
        hints, spec = [self.plan.hints[i] for i in self.own], self.plan.spec
        if self._without is None:
            ceiling = ceiling_of(self.base)([self.plan.pairs[i].picture for i in self.own])
            self._fixed = [fidelity(p, hints, spec) for p in (without, ceiling)]
        return [*(fidelity(made[way], hints, spec) for way in ("controlled", "shuffled")), *self._fixed]

    def _clip_scores(self, pictures: list[np.ndarray]) -> np.ndarray:
        if not (self.referee and pictures):
            return np.empty(0)
        return self.referee.clip_scores(pictures, [self.plan.pairs[i].prompt for i in self.own])

    def _write_own(self, make: Maker, step: int) -> None:
        """A row for each hint of one's own: the hint, and a picture for each of ``SEEDS`` seeds."""
        steps, guidance, control = self.plan.steps, self.plan.guidance, self.plan.with_hint
        requests = [
            Request(prompt=prompt, seed=seed, steps=steps, guidance=guidance, controls=(control(hint),))
            for prompt, hint in self.shown
            for seed in range(SEEDS)
        ]
        pixels = (picture.pixels for picture in make(requests))
        size, spec = (self.base.size, self.base.size), self.plan.spec
        rows = [[fit(spec.picture(hint), size, spec.resize), *islice(pixels, SEEDS)] for _, hint in self.shown]
        self._write(f"own-step-{step:07d}.png", grid(rows))

    def _write_sheet(self, made: list[list[np.ndarray]], step: int) -> None:
        """``made``: of the first few pairs, with control and without."""
        rows = [
            [self.plan.spec.picture(hint), pair.picture, *two]
            for hint, pair, two in zip(self.plan.hints, self.plan.pairs, made, strict=False)
        ]
        sheet = grid(rows, ["hint", "truth", "controlled", "no control"])
        self._write(f"step-{step:07d}.png", sheet)

    def _write(self, name: str, sheet: np.ndarray) -> None:
        if self.out:
            write_png(self.out / "samples" / name, sheet)
