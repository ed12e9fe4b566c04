"""What is measured while a run goes on: the loss relative to no control, and obedience."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from controlkit.adapter import Branch
from controlkit.backbones import UNetBase
from controlkit.data import (
    Pair,
    build_cache,
    hint_of,
    open_store,
)
from controlkit.images import Hint, grid, write_png
from controlkit.measure import (
    Obedience,
    ceiling_pictures,
    check_findable,
    fidelity,
    metric_of,
    obedience,
    three_ways,
)
from controlkit.precision import autocast
from controlkit.recipe import Recipe
from controlkit.sample import Control, Settings
from controlkit.train.step import Batch, controlled, draw_batch, hint_features_of, target_of


class Evaluator:
    """Obedience on held-out hints; what does not depend on the branch is made once, by the ``locked`` base."""

    def __init__(
        self, base: UNetBase, locked: UNetBase, pairs: Sequence[Pair], contract: Hint, recipe: Recipe, out: Path
    ) -> None:
        self.base, self.locked, self.contract, self.out = base, locked, contract, out
        self.pairs = [pairs[i] for i in range(len(pairs))]
        check_findable(contract, self.pairs)
        self.hints = [hint_of(pair, contract) for pair in self.pairs]
        self.settings = Settings(recipe.evaluation.steps, recipe.evaluation.guidance)
        self.guidance = recipe.control.guidance
        self._fixed: tuple[list[np.ndarray], np.ndarray, np.ndarray] | None = None

    @property
    def work(self) -> int:
        """Picture-steps the next evaluation takes; the first one also samples without control."""
        return len(self.pairs) * self.settings.steps * (3 if self._fixed is None else 2)

    def measure(self, branch: Branch, step: int, on_advance: Callable[[int], None]) -> Obedience:
        branch.eval()
        control = Control(branch, self.contract, guidance=self.guidance)
        first = self._fixed is None
        made = three_ways(
            self.base,
            control,
            self.pairs,
            self.hints,
            self.settings,
            on_step=on_advance,
            skip_no_control=not first,
            plain=self.locked,
        )
        if self._fixed is None:
            ceiling = ceiling_pictures(self.base, [pair.picture for pair in self.pairs])
            scores = [fidelity(p, self.hints, self.contract) for p in (made["no_control"], ceiling)]
            self._fixed = (made["no_control"], scores[0], scores[1])
        without, no_control, ceiling_score = self._fixed
        scored = [fidelity(made[name], self.hints, self.contract) for name in ("controlled", "shuffled")]
        shown = [
            [self.contract.picture(hint), pair.picture, got, plain]
            for hint, pair, got, plain in zip(self.hints, self.pairs, made["controlled"], without, strict=True)
        ]
        sheet = grid(shown[:8], ["hint", "truth", "controlled", "no control"])
        write_png(self.out / "samples" / f"step-{step:07d}.png", sheet)
        branch.train()
        return obedience(scored[0], no_control, scored[1], ceiling_score, metric_of(self.contract).name)


class Gauge:
    """The loss on held-out pairs relative to the base without control, with the same noise each time."""

    QUARTERS = 4

    def __init__(
        self, base: UNetBase, pairs: Sequence[Pair], contracts: Mapping[str, Hint], recipe: Recipe, out: Path
    ) -> None:
        with open_store() if recipe.data.cache else nullcontext() as store:
            path = out / f"heldout-{base.digest}.safetensors"
            [cached] = build_cache(base, pairs, contracts, path, store=store)
        fixed = {"batch": self.QUARTERS * len(cached), "draws": self.QUARTERS, "accumulate": 1, "prompt_dropout": 0.0}
        asked = recipe.model_copy(update=fixed)
        parts = -(-len(cached) // 8)
        self.base = base
        self.batches = [draw_batch(base, cached, contracts, asked, 0, part, parts) for part in range(parts)]
        self.without = [self._errors(batch, None) for batch in self.batches]

    @torch.no_grad()
    def _errors(self, batch: Batch, branch: Branch | None) -> Tensor:
        """The squared error of each pair (P, quarters); ``branch`` None: without control."""
        z = self.base.scheduler.add_noise(batch.latents, batch.noise, batch.t)
        with autocast(self.base.device.type):
            if branch is None:
                prediction = self.base.decode_noise(self.base.encode_noise(z, batch.t, batch.text))
            else:
                prediction = controlled(self.base, branch, z, batch.t, batch.text, hint_features_of(branch, batch))
        off = (prediction.float() - target_of(self.base, batch)).square().mean((1, 2, 3))
        return off.view(-1, self.QUARTERS).cpu()

    def measure(self, branch: Branch) -> dict[str, list[float]]:
        """By type of hint: under control / without, in each quarter of the schedule."""
        branch.eval()
        sums: dict[str, list[Tensor]] = {}
        for batch, without in zip(self.batches, self.without, strict=True):
            counts = [len(hint) for hint in batch.hints.values()]
            parts = (errors.split(counts) for errors in (self._errors(batch, branch), without))
            for kind, under, plain in zip(batch.hints, *parts, strict=True):
                sums.setdefault(kind, []).append(torch.stack([under.sum(0), plain.sum(0)]))
        branch.train()
        found = {kind: torch.stack(of_kind).sum(0) for kind, of_kind in sums.items()}
        return {kind: (under / plain).tolist() for kind, (under, plain) in sorted(found.items())}
