"""Figure 6: a pose and a depth map at once, their residuals summed, with no weighting (Section 3.4).

The paper shows pictures. Here each hint's obedience under both controls stands beside its obedience under its own
control alone, and under the other one alone, on scenes with a person.

    controlkit reproduce fig-compose --out runs/fig-compose

Cost: `--quick` 2.2 minutes of CPU time (one thread of an AMD EPYC, AVX2, beside other work), the whole some 8.
Expected (`--quick`, 16 scenes): obedience of pose 0.85 [0.71, 0.97] alone, 0.93 [0.86, 0.98] under both; of depth 0.95
[0.87, 1.06] and 0.83 [0.75, 0.92]: 110% and 87% of alone, quality kept. Depth alone gives the pose, too, 0.87. The
paper has pictures, no numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from controlkit.annotators import contract
from controlkit.backbones import Backbone
from controlkit.measure import EvaluationPlan
from controlkit.reproduce.conditions import HEAD, Bench, Conditions, Row, Under, share_of, shipped
from controlkit.reproduce.entrants import Plan, Trial, pixels_of, write_report
from controlkit.sample import ControlRequest

KINDS = ("pose", "depth")
BOTH = "pose and depth"
ORDER = [f"{condition}, {kind}" for kind in KINDS for condition in (*KINDS, BOTH)]

__all__ = ["HEAD", "ORDER", "make_compose"]


def make_compose(
    base: Backbone, plan: Plan, out: Path, on_row: Callable[[str], None] = lambda name: None
) -> Conditions:
    """Make the figure and write it into a folder: ``fig-compose.json``, ``.md`` and ``.png``.

    ``on_row``: as with ``make_table2``. Its rows for one kind of hints are measured by these, whatever acts.
    """
    trial = Trial.of(KINDS[0], base, plan)
    plans = {kind: _plan_of(trial, kind) for kind in KINDS}
    acting = {**{kind: [plans[kind]] for kind in KINDS}, BOTH: [*plans.values()]}
    bench = Bench(trial, shipped(base, *KINDS))
    rows: list[Row] = []
    for kind, own in plans.items():
        found = []
        for condition, controls in acting.items():
            on_row(f"{condition}, {kind}")
            title = f"{condition} alone" if len(controls) == 1 else f"{condition}, no weighting"
            found.append(bench.row(condition, title, _under(own, controls)))
        rows += [bench.floor_row(own), *found]
    shown: dict[str, Sequence[np.ndarray]] = {f"{kind}, hint": _hints(own) for kind, own in plans.items()}
    some = plans[KINDS[0]]
    shown["no control"] = pixels_of(bench.make, some.requests("no_control"))
    shown |= {condition: bench.pictures(_under(some, controls)) for condition, controls in acting.items()}
    table = Conditions(rows, trial.facts(), "", finding=_finding(rows))
    return write_report(out, "fig-compose", table, HEAD, {"": shown})


def _plan_of(trial: Trial, kind: str) -> EvaluationPlan:
    """The trial's plan for another kind of hints of the same scenes."""
    return replace(trial.evaluation, control=ControlRequest(name=kind), spec=contract(kind))


def _under(own: EvaluationPlan, controls: Sequence[EvaluationPlan]) -> Under:
    fields = (own.control, own.spec, own.pairs, own.steps, own.guidance, own.first_seed)
    return Under(*fields, controls=controls)


def _hints(plan: EvaluationPlan) -> list[np.ndarray]:
    return [plan.spec.picture(hint) for hint in plan.hints]


def _finding(rows: Sequence[Row]) -> str:
    """Sentences on each hint's obedience under both controls as a share of that under its own alone, and on OKS."""
    words, beside = [], list[str]()
    for kind in KINDS:
        own = {row.name: row for row in rows if row.kind == kind}
        words.append(f"{kind} {share_of(own[BOTH], own[kind])}")
        beside += _beside(kind, own[kind], own[BOTH])
    return " ".join([f"Obedience under both at once, as a share of that alone: {', '.join(words)}.", *beside])


def _beside(kind: str, alone: Row, both: Row) -> list[str]:
    """A sentence on each metric beside the first one of such hints, under their own control and under both."""
    found = []
    for metric, one in both.beside.items():
        figures = alone.beside[metric]["fidelity"], one["fidelity"], one["floor"], one["ceiling"]
        means = [f"{figure['mean']:.2f}" for figure in figures]
        found.append("{} of {}: {} alone, {} under both (floor {}, ceiling {}).".format(metric.upper(), kind, *means))
    return found
