"""Figure 10: how a control grows with the number of pictures that it is trained on; few of them do not collapse it.

The paper trains on 1,000, 50,000 and 3 million pictures and shows a lion of each: that of 1,000 is recognised, and the
more pictures, the better. Here edges are learnt from 100 to 100,000 emoji, each with an own ground and place, in
equally many steps, and measured on concepts that no control has seen.

    controlkit reproduce fig-scale --out runs/fig-scale
    controlkit reproduce fig-scale --quick --out runs/fig-scale      # a trial of the machinery, in minutes

Run the same command again to go on after an interruption. Emoji are fetched by npm, once.

Cost: about 45 minutes on one thread without pauses (AMD EPYC with AVX-512 BF16, bfloat16), of them 28 for steps;
``--quick`` 3.2 minutes of CPU time (AVX2).
Expected: of 100, 1,000, 10,000 and 100,000 pictures (800 steps each, 32 scenes) obedience is 0.52, 0.76, 0.75, 0.76
(+- 0.04), CLIP-score 0.60, 0.72, 0.73, 0.72 (without control 0.71), FID 53.1, 40.9, 41.2, 41.3 (41.5). So 1,000
pictures do not collapse, as in the paper, and more add nothing in so few steps; 100, each seen 128 times, follow the
edges and lose their colours. In 200 steps (``--share 0.25``) 100 do not collapse, either: 0.53, 0.71, 41.7, and 1,000
0.54, 0.72, 41.1. Paper: no collapse with 1,000 pictures, and better pictures with more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from controlkit.backbones import Backbone
from controlkit.data import EmojiPairs
from controlkit.reproduce.entrants import Plan, Table, Trial, write_report
from controlkit.reproduce.trained import (
    OUR_RECIPE,
    Examiner,
    Measured,
    cost_of,
    on_length,
    run_folder,
    shown_at,
    steps_of,
)
from controlkit.train.recipe import Recipe, parse_recipe

KIND, SOURCE = "canny", "emoji"
COUNTS = (100, 1_000, 10_000, 100_000)
"""Pictures to train on."""
ORDER = tuple(f"{count:,} pictures" for count in COUNTS)
FULL = 800
"""Steps of each training."""
HEAD = ("trained on", "each seen", "obedience", "fidelity", "CLIP-score", "FID", "collapsed", "training")
_COLLAPSED = {True: "no", False: "yes", None: "-"}


@dataclass(frozen=True)
class Row:
    """A number of pictures: the control that was trained on them."""

    title: str
    count: int
    visits: float
    """How often each picture was seen."""
    measured: Measured
    cost: str

    def words(self) -> tuple[str, ...]:
        """The row's cells, as in ``HEAD``."""
        one, share = self.measured, f"{100 * self.visits:.2g}% of them once"
        seen = f"{self.visits:.3g} times" if self.visits >= 1 else share
        obeyed = "{0.mean:.2f} [{0.low:.2f}, {0.high:.2f}]".format(one.figures["obedience"])
        quality = (one.words("clip_score"), one.words("fid"), _COLLAPSED[one.quality_kept])
        return self.title, seen, obeyed, one.words("fidelity"), *quality, self.cost


@dataclass(frozen=True)
class Scale(Table):
    """All sizes of the training set."""

    rows: Sequence[Row]
    length: str = field(default="", kw_only=True)
    """A sentence on the trainings, if they are shorter than they should be."""

    def notes(self) -> str:
        """Floor, ceiling and the quality of no control; what a collapse is."""
        one = self.rows[-1].measured
        ends = {name: one.words(name) for name in ("floor", "ceiling", "clip_score_no_control", "fid_no_control")}
        return " ".join(
            filter(
                None,
                (
                    self.length,
                    "Fidelity (edge F1): floor {floor}, ceiling {ceiling}. Without control: CLIP-score "
                    "{clip_score_no_control}, FID {fid_no_control}.".format(**ends),
                    "Collapsed: CLIP-score below 95% or FID above 110% of that without control. Paper: 1,000 pictures "
                    "do not collapse, and control grows with their number.",
                ),
            )
        )


def recipe_of(base: Backbone, count: int, emoji: int, plan: Plan) -> Recipe:
    """The recipe of the training on ``count`` pictures, of so many emoji. Pictures that no step sees are not made."""
    steps = steps_of(FULL, plan)
    pairs = steps * OUR_RECIPE["batch"] // OUR_RECIPE["noises_per_pair"]
    variants = -(-min(count, pairs) // emoji)
    data = {"source": SOURCE, "count": max(min(count, pairs) // variants, 1), "variants": variants}
    warmup = min(OUR_RECIPE["warmup"], steps // 10)
    rates = {"steps": steps, "warmup": warmup, "cooldown": steps - warmup, "checkpoint_every": 50}
    control = {"annotator": KIND, "hint_cfg_scale": 2.0}
    values: Mapping[str, Any] = {**OUR_RECIPE, **rates, "base": base.name, "control": control, "data": data}
    return parse_recipe({**values, "evaluation": {"every": 0}})


def make_scale(base: Backbone, plan: Plan, out: Path, on_row: Callable[[str], None] = lambda name: None) -> Scale:
    """Make the figure and write it into a folder: ``fig-scale.json``, ``.md`` and ``.png``; trains there, or goes on.

    ``on_row``: as with ``make_table2``. Raises as ``train_control`` does; ``KeyboardInterrupt`` where ``plan.stopping``
    asks for it.
    """
    emoji = EmojiPairs(base.size, "control")  # which stay in memory meanwhile, so that trainings need not read them
    trial = Trial.of(KIND, base, plan, SOURCE)
    examiner = Examiner(trial, plan)
    rows, columns = [], dict[str, Sequence[np.ndarray]]()
    columns |= {"hint": trial.shown(), "no control": examiner.plain}
    for count, title in zip(COUNTS, ORDER, strict=True):
        on_row(title)
        recipe, run = recipe_of(base, count, len(emoji), plan), run_folder(out, "fig-scale", plan, count)
        measured = examiner.follow(recipe, run, (), title)[-1]
        visits = recipe.steps * recipe.batch / recipe.noises_per_pair / count
        rows.append(Row(title, count, visits, measured, cost_of(run)))
        columns[title] = shown_at(run, recipe.steps, plan.num)
    facts = {**trial.facts(), "training seed": 0, "share": plan.share}
    table = Scale(rows, facts, "", length=on_length(plan))
    return write_report(out, "fig-scale", table, HEAD, {"": {name: made for name, made in columns.items() if made}})
