"""Obedience and colours on held-out pairs while a run goes on, and sheets of samples.

With several processes each measures its share of the pairs, and all get the whole result: that of a single process but
for rounding, which depends on how many pictures are made at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from controlkit.backbones import Backbone
from controlkit.branch import ControlNetwork
from controlkit.data import Pair, hint_for_pair
from controlkit.errors import Invalid
from controlkit.images import HintSpec, fit, grid, read_hint, write_png
from controlkit.measure import (
    COLOURS,
    WAYS,
    Obedience,
    Referee,
    Way,
    ceiling_pictures,
    colours,
    fidelity,
    metric_of,
    obedience,
    three_ways,
    unmeasurable,
)
from controlkit.sample import Control, Job, SamplingSettings, generate
from controlkit.train.ranks import Ranks
from controlkit.train.recipe import EvaluationRecipe, Recipe

SHOWN = 8
"""Pairs on a sheet of samples."""
QUALITY = ("clip_score", "clip_score_no_control")
SEEDS = 4
"""Pictures of each hint of one's own."""


def own_hints(plan: EvaluationRecipe, spec: HintSpec) -> list[tuple[str, np.ndarray]]:
    """Read (prompt, hint) of each of the user's own hints. Raises ``NotFound``, or ``Invalid`` for another file."""
    found = []
    for prompt, path in plan.own():
        hint = read_hint(Path(path), spec.mask_value is not None)
        if words := spec.fault(hint):
            raise Invalid(f"{path} {words}.")
        found.append((prompt, hint))
    return found


@dataclass(frozen=True)
class Measured:
    """What an evaluation found.

    ``drift``: by name of ``COLOURS`` the mean over the pairs of what a picture has under control less what it has
    without, same seed and prompt; near 0 nothing drifted. ``quality``: the CLIP-score with control and without, of the
    shipped base, the one world that the referee knows.
    """

    obedience: Obedience | None
    drift: dict[str, float]
    quality: dict[str, float]


class Evaluator:
    """Obedience on held-out hints, where it can be measured, and pictures of them; what does not depend on the branch
    is made once, by the ``locked`` base where ``base`` learns, too."""

    def __init__(
        self,
        base: Backbone,
        pairs: Sequence[Pair],
        contract: HintSpec,
        recipe: Recipe,
        out: Path,
        together: Ranks | None = None,
        locked: Backbone | None = None,
    ) -> None:
        self.base, self.locked, self.contract, self.out = base, locked or base, contract, out
        self.ranks = together or Ranks()
        self.pairs = [pairs[i] for i in range(len(pairs))]
        self.own = self.ranks.share(len(self.pairs))
        self.measures = not unmeasurable(contract, self.pairs)
        self.hints = [hint_for_pair(pair, contract) for pair in self.pairs]
        self.settings = SamplingSettings(recipe.evaluation.steps, recipe.evaluation.guidance)
        self.hint_cfg_scale = recipe.control.hint_cfg_scale
        self.shown = own_hints(recipe.evaluation, contract) if self.ranks.first else []
        self.referee = Referee(device=base.device.type) if base.name == "mini" else None
        self._without: list[np.ndarray] | None = None
        self._fixed: list[np.ndarray] = []
        """Fidelity of the pictures without control, and of the ceiling."""

    @property
    def _wanted(self) -> list[Way]:
        """How the next evaluation makes pictures: without control once, with others' hints to measure against."""
        left = {"no_control"} if self._without is not None else set()
        left |= set() if self.measures else {"shuffled"}
        return [way for way in WAYS if way not in left]

    @property
    def work(self) -> int:
        """Picture-steps this process's next evaluation takes."""
        pictures = len(self.own) * len(self._wanted) + len(self.shown) * SEEDS
        return pictures * self.settings.steps

    def measure(self, branch: ControlNetwork, step: int, on_advance: Callable[[int], None]) -> Measured:
        """What comes of a branch; sheets of samples are written besides."""
        branch.eval()
        control = Control(branch, self.contract, hint_cfg_scale=self.hint_cfg_scale)
        made = three_ways(
            self.base,
            control,
            self.pairs,
            self.hints,
            self.settings,
            on_step=on_advance,
            wanted=self._wanted,
            plain=self.locked,
            rows=self.own,
        )
        if self.shown:
            self._write_own(control, step, on_advance)
        branch.train()
        without = made["no_control"] if self._without is None else self._without
        scores = self._scores(made, without) if self.measures else []
        self._without = without
        drift = [colours(got) - colours(plain) for got, plain in zip(made["controlled"], without, strict=True)]
        quality = [self._clip_scores(pictures) for pictures in (made["controlled"], without)] if self.referee else []
        seen = [pair for i, *pair in zip(self.own, made["controlled"], without, strict=True) if i < SHOWN]
        parts = self.ranks.gather((scores, drift, quality, seen))
        if self.ranks.first:
            self._write_sheet([two for *_, seen in parts for two in seen], step)
        measured = None
        if self.measures:
            got, shuffled, no_control, top = np.concatenate([scores for scores, *_ in parts], 1)
            measured = obedience(got, no_control, shuffled, top, metric_of(self.contract).name)
        drifted = np.mean([row for _, rows, *_ in parts for row in rows], 0)
        told = np.concatenate([both for _, _, both, _ in parts], 1).mean(1) if self.referee else []
        return Measured(
            measured,
            dict(zip(COLOURS, drifted.tolist(), strict=True)),
            {name: float(score) for name, score in zip(QUALITY, told, strict=False)},
        )

    def _scores(self, made: Mapping[Way, list[np.ndarray]], without: list[np.ndarray]) -> list[np.ndarray]:
        """Fidelity under control, with others' hints, without control, and of the ceiling."""
        hints = [self.hints[i] for i in self.own]
        if self._without is None:
            ceiling = ceiling_pictures(self.base, [self.pairs[i].picture for i in self.own])
            self._fixed = [fidelity(p, hints, self.contract) for p in (without, ceiling)]
        return [*(fidelity(made[way], hints, self.contract) for way in ("controlled", "shuffled")), *self._fixed]

    def _clip_scores(self, pictures: list[np.ndarray]) -> np.ndarray:
        if not (self.referee and pictures):
            return np.empty(0)
        return self.referee.clip_scores(pictures, [self.pairs[i].prompt for i in self.own])

    def _write_own(self, control: Control, step: int, on_advance: Callable[[int], None]) -> None:
        jobs = [Job(prompt, seed, (hint,)) for prompt, hint in self.shown for seed in range(SEEDS)]
        pixels = (p.pixels for p in generate(self.base, jobs, [control], self.settings, on_step=on_advance))
        size = (self.base.size, self.base.size)
        rows = [
            [fit(self.contract.picture(hint), size, self.contract.resize), *islice(pixels, SEEDS)]
            for _, hint in self.shown
        ]
        write_png(self.out / "samples" / f"own-step-{step:07d}.png", grid(rows))

    def _write_sheet(self, made: list[list[np.ndarray]], step: int) -> None:
        """``made``: of the first few pairs, with control and without."""
        rows = [
            [self.contract.picture(hint), pair.picture, *two]
            for hint, pair, two in zip(self.hints, self.pairs, made, strict=False)
        ]
        sheet = grid(rows, ["hint", "truth", "controlled", "no control"])
        write_png(self.out / "samples" / f"step-{step:07d}.png", sheet)
