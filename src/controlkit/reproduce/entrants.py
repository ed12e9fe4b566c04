"""The systems that a table compares: opponents out of a folder, and the shipped control."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from controlkit.annotators import contract
from controlkit.backbones import Backbone
from controlkit.baselines import OPPONENTS, load_baseline
from controlkit.baselines.saved import ABOUT, read_about
from controlkit.data import evaluation_pairs
from controlkit.files import mark_output, write_atomic
from controlkit.images import grid, write_png
from controlkit.measure import EMBEDDED, EvaluationPlan, Figure, ceiling_of, fidelity, first_kind, mean_figure
from controlkit.sample import ControlRequest, Maker, Request, load, maker

SHIPPED = "shipped"
_SHOWN = 6
"""Pictures of each system on a sheet."""


@dataclass(frozen=True)
class Plan:
    """A reproduction to make, on ``num`` held-out scenes, seeds 0 to ``num`` - 1."""

    num: int = 64
    steps: int = 20
    guidance: float = 4.0
    opponents: Path | None = None
    """A folder with trained opponents in folders of their names."""


NO_WEIGHTS = "no weights"
QUICK = {"num": 16, "steps": 10}


@dataclass(frozen=True)
class Trial:
    """Held-out scenes with hints of a kind, the same for all systems, and real pictures for FID."""

    base: Backbone
    evaluation: EvaluationPlan
    real: Sequence[np.ndarray]

    @classmethod
    def of(cls, kind: str, base: Backbone, plan: Plan) -> "Trial":
        """The trial that a plan asks for, on a base; ``Invalid`` for more scenes than there are."""
        asked, spec = ControlRequest(name=kind), contract(kind)
        person = first_kind(spec).needs_person
        pairs, real = evaluation_pairs(EMBEDDED.scenes, base.size, plan.num, person)
        return cls(base, EvaluationPlan(asked, spec, list(pairs), plan.steps, plan.guidance), real)

    @property
    def truth(self) -> list[np.ndarray]:
        """The true pictures."""
        return [pair.picture for pair in self.evaluation.pairs]

    def shown(self, count: int = _SHOWN) -> list[np.ndarray]:
        """The first hints, as pictures."""
        return [self.evaluation.spec.picture(hint) for hint in self.evaluation.hints[:count]]

    def scores(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """The fidelity of each picture to its hint, (N,)."""
        return fidelity(pictures, self.evaluation.hints, self.evaluation.spec)

    def ceiling(self) -> Figure:
        """The fidelity of the true pictures as the base's VAE gives them back."""
        return mean_figure(self.scores(ceiling_of(self.base)(self.truth)))

    def facts(self) -> dict[str, Any]:
        """The settings, for a caption."""
        one = self.evaluation
        facts = {"base": self.base.name, "scenes": len(one.pairs), "steps": one.steps, "guidance": one.guidance}
        return facts | {"seeds": f"{one.first_seed}-{one.first_seed + len(one.pairs) - 1}"}


def pixels_of(make: Maker, requests: Sequence[Request]) -> list[np.ndarray]:
    """The pictures of requests, without their facts."""
    return [picture.pixels for picture in make(requests)]


@dataclass(frozen=True)
class Entrant:
    """A system: its title, what makes its pictures and what it cost; or, without a maker, a note on why."""

    name: str
    title: str
    make: Maker | None
    cost: str = ""
    note: str = ""


def entrant(name: str, kind: str, base: Backbone, opponents: Path | None) -> Entrant:
    """The system of a name: an opponent out of a folder, or ``SHIPPED``, the shipped control of a kind of hints.

    Raises as ``load_baseline`` does.
    """
    if name == SHIPPED:
        saved, _ = load(kind, base)
        return Entrant(name, f"{kind}, as shipped", maker(base, {kind: saved}))
    row = OPPONENTS[name]
    if not row.learns:
        return Entrant(name, row.title, row.new(base, kind).make)
    folder = _folder_of(name, kind, opponents)
    if folder is None:
        return Entrant(name, row.title, None, note=NO_WEIGHTS)
    baseline, about = load_baseline(folder, base)
    return Entrant(name, row.title, baseline.make, about.cost())


def _folder_of(name: str, kind: str, opponents: Path | None) -> Path | None:
    """The folder of an opponent that was trained on hints of a kind, `NAME-KIND` or `NAME`; None if there is none."""
    folders = [opponents / f"{name}-{kind}", opponents / name] if opponents else []
    trained = (one for one in folders if (one / ABOUT).is_file() and read_about(one).hint == kind)
    return next(trained, None)


def advice(names: Sequence[str], opponents: Path | None) -> str:
    """A sentence on how to train the opponents of these names, which have no weights; "" where there are none."""
    if not names:
        return ""
    where = opponents or "runs/opponents"
    commands = ", ".join(f"`controlkit baseline train {name} --out {where}/{name}`" for name in dict.fromkeys(names))
    return f"Opponents without weights are trained by: {commands}; then `--opponents {where}`."


class Cells(Protocol):
    """A row of a table."""

    def words(self) -> Sequence[str]:
        """Its cells, as the table's head has them."""


@dataclass(frozen=True)
class Table:
    """A table or figure of the paper as it was made here: rows, and the settings that all of them share."""

    rows: Sequence[Cells]
    settings: Mapping[str, Any]
    advice: str
    """On the rows without weights."""

    def notes(self) -> str:
        """Sentences between the rows and the settings, such as on floor and ceiling."""
        return ""

    def caption(self) -> str:
        """Notes, settings and advice in words."""
        used = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        return " ".join(filter(None, (self.notes(), f"Settings: {used}.", self.advice)))


def write_report(
    out: Path, name: str, table: Table, head: Sequence[str], sheets: Mapping[str, Mapping[str, Sequence[np.ndarray]]]
) -> None:
    """Write a table into a folder as JSON, as Markdown, and as sheets of the first pictures of each column.

    ``sheets``: columns by title, of each sheet by the ending of its name, "" or a kind of hints.
    """
    mark_output(out, f"reproduce {name}")
    lines = [head, ["---"] * len(head), *(row.words() for row in table.rows)]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{table.caption()}\n"
    write_atomic(out / f"{name}.json", (json.dumps(asdict(table), indent=2) + "\n").encode())
    write_atomic(out / f"{name}.md", text.encode())
    for kind, columns in sheets.items():
        rows = [list(row) for row in zip(*(made[:_SHOWN] for made in columns.values()), strict=True)]
        write_png(out / f"{name}{kind and '-'}{kind}.png", grid(rows, list(columns)))
