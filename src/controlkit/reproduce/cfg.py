"""Figure 5: classifier-free guidance without a prompt, and the paper's weighting of it by resolution (Section 3.4).

Without a prompt both halves of guidance differ by the hint alone. With the hint in both, guidance has no effect; with
the hint in the conditional half it multiplies the control, too much, as the paper says; its weights, 1 at the finest
resolution to 8 at the coarsest, are to give the control of the one and the pictures of the other. The paper shows one
picture of each; here each way has its obedience and its quality. The released code's guess mode stands beside them.

    controlkit reproduce fig-cfg --out runs/fig-cfg

Cost: `--quick` 2.3 minutes of CPU time (one thread of an AMD EPYC, AVX2, beside other work), the whole some 10.
Expected (`--quick`, 16 scenes; floor 0.17, ceiling 0.89 in F1): obedience, and FID, with the hint in both halves 0.72
[0.67, 0.78] and 22, in the conditional half 0.93 [0.90, 0.97] and 39, weighted 0.88 [0.82, 0.93] and 42, in guess mode
0.48 and 22, as shipped 0.91 and 28; without control FID is 51. So control is stronger in the conditional half, as in
the paper, but the weights do not win back the quality here: of `mini`'s three resolutions the coarsest is weighted four
times.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from controlkit.backbones import Backbone
from controlkit.reproduce.conditions import HEAD, NO_CONTROL, Bench, Conditions, Row, shipped, used
from controlkit.reproduce.entrants import Plan, Trial, write_report

KINDS = ("canny",)
"""As in the paper."""
WAYS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "both-halves": ("hint in both halves (no guidance)", {"hint_cfg_scale": 1.0}),
    "cond-only": ("conditional half, no weights", {"cond_only": True}),
    "cfg-weights": ("conditional half, paper's weights", {"cfg_weights": True}),
    "guess": ("conditional half, guess mode", {"guess": True}),
    "as-shipped": ("hint counted as shipped", {}),
}
"""The ways in which guidance counts a hint: the words for each, and the control's settings."""
ORDER = [f"{way}, {kind}" for kind in KINDS for way in WAYS]

__all__ = ["HEAD", "ORDER", "make_cfg"]


def make_cfg(base: Backbone, plan: Plan, out: Path, on_row: Callable[[str], None] = lambda name: None) -> Conditions:
    """Make the figure and write it into a folder: ``fig-cfg.json``, ``.md``, and a ``.png`` of each kind of hints.

    ``on_row``: as with ``make_table2``. CLIP-score and FID are judged by the captions that were not told.
    """
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    sheets: dict[str, dict[str, Sequence[np.ndarray]]] = {}
    for kind in KINDS:
        trial = Trial.of(kind, base, plan)
        bench, silence = Bench(trial, shipped(base, kind)), [""] * plan.num
        sheets[kind] = {"hint": trial.shown()}
        found = []
        for way, (title, settings) in WAYS.items():
            on_row(f"{way}, {kind}")
            asked = used(trial.evaluation, **settings)
            found.append(bench.row(way, title, asked, silence))
            sheets[kind][way] = bench.pictures(asked, silence)
        rows += [bench.floor_row(trial.evaluation, silence), *found]
        facts = trial.facts() | {"prompt": "none"}
    table = Conditions(rows, facts, "", finding=_finding(rows))
    return write_report(out, "fig-cfg", table, HEAD, sheets)


def _finding(rows: Sequence[Row]) -> str:
    """Sentences on the weighting between the two ways that it is to be better than."""
    words = []
    for kind in KINDS:
        own = {row.name: row for row in rows if row.kind == kind and row.name != NO_CONTROL}
        both, bare, weighted = (_both(own[name]) for name in ("both-halves", "cond-only", "cfg-weights"))
        words.append(f"{kind}: hint in both halves {both}, in the conditional half {bare}, weighted {weighted}.")
    return " ".join(["Obedience (and FID) without a prompt,", *words])


def _both(row: Row) -> str:
    fid = f" ({row.figures['fid']['mean']:.1f})" if "fid" in row.figures else ""
    return f"{row.figures['obedience']['mean']:.2f}{fid}"
