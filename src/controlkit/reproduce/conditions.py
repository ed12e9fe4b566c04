"""Conditions: the same hints made in several ways, each measured between one floor and one ceiling."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from controlkit.backbones import Backbone
from controlkit.measure import EvaluationPlan, Figure, Quality, Way, ceiling_of, evaluate, world_of
from controlkit.reproduce.entrants import Table, Trial
from controlkit.sample import Maker, Picture, Request, load, maker

FIGURES = ("obedience", "fidelity", "floor", "ceiling", "clip_score", "fid", "aesthetic")
HEAD = ("condition", "hints", "obedience", "fidelity", "floor", "ceiling", "CLIP-score", "FID", "aesthetic", "quality")
NO_CONTROL = "no control"
_QUALITY = {True: "kept", False: "fell", None: "-"}


def shipped(base: Backbone, *kinds: str) -> Maker:
    """The maker with the shipped controls of these kinds; raises as ``sample.load`` does."""
    return maker(base, {kind: load(kind, base)[0] for kind in kinds})


def told(make: Maker, prompts: Sequence[str], first_seed: int = 0) -> Maker:
    """A maker that reads other prompts than requests have: the first for ``first_seed``, and so on."""

    def told_make(requests: Sequence[Request]) -> list[Picture]:
        return list(make([one.model_copy(update={"prompt": prompts[one.seed - first_seed]}) for one in requests]))

    return told_make


class RememberedQuality(Quality):
    """A quality that judges the same pictures once: conditions share those without control."""

    @cached_property
    def _known(self) -> dict[tuple[Any, ...], dict[str, Figure]]:
        return {}

    def figures(self, pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> dict[str, Figure]:
        """As ``Quality.figures``; of pictures that stay in memory, which a ``Remembered`` keeps."""
        key = (*map(id, pictures), *prompts)
        if key not in self._known:
            self._known[key] = super().figures(pictures, prompts)
        return self._known[key]


class Remembered:
    """A maker that makes each request once; asked again, it gives the same picture."""

    def __init__(self, make: Maker) -> None:
        self._make, self._made = make, dict[Request, Picture]()

    def __call__(self, requests: Sequence[Request]) -> list[Picture]:
        """The requests' pictures, in their order."""
        if new := [one for one in dict.fromkeys(requests) if one not in self._made]:
            self._made |= zip(new, self._make(new), strict=True)
        return [self._made[one] for one in requests]


@dataclass(frozen=True, eq=False)
class Under(EvaluationPlan):
    """Pictures under the controls of several plans at once, or of others, measured by this one's hints."""

    controls: Sequence[EvaluationPlan] = ()
    """The plans whose controls act, on the same pairs."""

    def requests(self, way: Way, rows: Sequence[int] | None = None) -> list[Request]:
        """The requests of one way, each with all controls; shuffled, each pair has the hints of one other pair."""
        columns = zip(*(one.requests(way, rows) for one in self.controls), strict=True)
        acting = [tuple(control for request in row for control in request.controls) for row in columns]
        own = super().requests(way, rows)
        return [one.model_copy(update={"controls": controls}) for one, controls in zip(own, acting, strict=True)]


@dataclass(frozen=True)
class Row:
    """A condition: its ``FIGURES``, those that could be measured, each with ``mean``, ``low`` and ``high``."""

    name: str
    title: str
    kind: str
    """The kind of hints that its fidelity is measured by."""
    figures: Mapping[str, Mapping[str, float]]
    quality_kept: bool | None = None
    beside: Mapping[str, Any] = field(default_factory=dict)
    """Its ``Obedience`` by a second metric of such hints, by its name."""

    def words(self) -> tuple[str, ...]:
        """The row's cells, as in ``HEAD``."""
        means = {name: f"{figure['mean']:.3g}" for name, figure in self.figures.items()}
        if "obedience" in self.figures:
            means["obedience"] = "{mean:.2f} [{low:.2f}, {high:.2f}]".format(**self.figures["obedience"])
        return self.title, self.kind, *(means.get(name, "-") for name in FIGURES), _QUALITY[self.quality_kept]


@dataclass(frozen=True)
class Conditions(Table):
    """Conditions as rows, each with its own floor, the better of no control and hints shuffled, and its ceiling."""

    rows: Sequence[Row]
    finding: str = ""
    """Sentences on what the rows show."""

    def notes(self) -> str:
        """The finding; the meaning of floor and ceiling."""
        floors = "Floor: the better of no control and hints shuffled; ceiling: the true pictures out of the VAE."
        return " ".join(filter(None, (self.finding, floors)))


@dataclass(eq=False)
class Bench:
    """A trial whose pictures are made once, and the referee of its world with the true pictures read once."""

    trial: Trial
    make: Maker
    quality: Quality | None = field(init=False)

    def __post_init__(self) -> None:
        world, device = world_of(self.trial.base), self.trial.base.device.type
        self.make = Remembered(self.make)
        self.quality = RememberedQuality(world.referee(device), self.trial.real) if world else None

    def row(self, name: str, title: str, plan: EvaluationPlan, prompts: Sequence[str] | None = None) -> Row:
        """Measure a plan as a condition. ``prompts``: those told in place of the pairs', by which quality is judged."""
        report = self.report(plan, prompts)
        kept, beside = report.get("quality_kept"), report.get("beside", {})
        return Row(name, title, plan.control.name, _chosen(report, FIGURES), kept, beside)

    def floor_row(self, plan: EvaluationPlan, prompts: Sequence[str] | None = None) -> Row:
        """The condition without control, of the same pairs and settings."""
        report = self.report(plan, prompts)
        plain = {name: f"{name}_no_control" for name in ("clip_score", "fid", "aesthetic")}
        figures = {name: report[key] for name, key in plain.items() if key in report}
        figures |= {"fidelity": report["floor_no_control"], "ceiling": report["ceiling"]}
        return Row(NO_CONTROL, NO_CONTROL, plan.control.name, figures)

    def report(self, plan: EvaluationPlan, prompts: Sequence[str] | None = None) -> dict[str, Any]:
        """``measure.evaluate``'s report."""
        make = self.make if prompts is None else told(self.make, prompts, plan.first_seed)
        return evaluate(make, plan, ceiling_of(self.trial.base), self.quality)

    def pictures(self, plan: EvaluationPlan, prompts: Sequence[str] | None = None) -> list[np.ndarray]:
        """The pictures under control."""
        make = self.make if prompts is None else told(self.make, prompts, plan.first_seed)
        return [picture.pixels for picture in make(plan.requests("controlled"))]


def used(plan: EvaluationPlan, **settings: Any) -> EvaluationPlan:
    """The same plan with other settings of its control."""
    return replace(plan, control=plan.control.model_copy(update=settings))


def share_of(row: Row, other: Row) -> str:
    """A row's obedience as a share of another's, in words."""
    own, others = (one.figures["obedience"]["mean"] for one in (row, other))
    return f"{own / others:.0%}" if others else "-"


def _chosen(report: Mapping[str, Any], names: Sequence[str]) -> dict[str, Mapping[str, float]]:
    return {name: report[name] for name in names if name in report}
