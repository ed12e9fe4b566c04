"""The systems that a table compares, opponents out of a folder and the shipped control; the table, and its files."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from controlkit import __version__
from controlkit.annotators import contract
from controlkit.backbones import Backbone
from controlkit.baselines import OPPONENTS, load_baseline
from controlkit.baselines.saved import ABOUT, read_about
from controlkit.data import evaluation_pairs
from controlkit.files import mark_output, write_atomic
from controlkit.formats import WEIGHTS
from controlkit.images import grid, write_png
from controlkit.measure import EMBEDDED, EvaluationPlan, Figure, ceiling_of, fidelity, first_kind, mean_figure
from controlkit.measure.bench import machine
from controlkit.reproduce.rows import FORMAT, Earlier, Kept, SystemRow, is_open, strip_path, write_strip
from controlkit.sample import ControlRequest, Maker, Picture, Request, load, maker

NO_CONTROL, SHIPPED = "no-control", "shipped"
SHOWN = 6
"""Pictures of each system on a sheet."""


@dataclass(frozen=True)
class Plan:
    """A reproduction to make, on ``num`` held-out scenes, seeds 0 to ``num`` - 1."""

    num: int = 64
    steps: int = 20
    guidance: float = 4.0
    opponents: Path | None = None
    """A folder with trained opponents in folders of their names."""
    share: float = 1.0
    """The share of its full length that each training of the report has, above 0."""
    on_step: Callable[[str], None] = field(default=lambda words: None, compare=False)
    """Told how far a training of the report is."""
    stopping: Callable[[], bool] = field(default=lambda: False, compare=False)
    """Asked after each step of a training; where true, that is saved, and a ``KeyboardInterrupt`` ends the report."""


NO_WEIGHTS = "no weights"
QUICK: dict[str, Any] = {"num": 16, "steps": 10}


@dataclass(frozen=True)
class Trial:
    """Held-out scenes with hints of a kind, the same for all systems, and real pictures for FID."""

    base: Backbone
    evaluation: EvaluationPlan
    real: Sequence[np.ndarray]
    began: float = field(default_factory=time.perf_counter)

    @classmethod
    def of(cls, kind: str, base: Backbone, plan: Plan, source: str = EMBEDDED.scenes) -> "Trial":
        """The trial that a plan asks for, on a base; ``Invalid`` for more scenes than there are.

        ``source``: ``evaluation_pairs``'.
        """
        asked, spec = ControlRequest(name=kind), contract(kind)
        person = first_kind(spec).needs_person
        pairs, real = evaluation_pairs(source, base.size, plan.num, person)
        return cls(base, EvaluationPlan(asked, spec, list(pairs), plan.steps, plan.guidance), real)

    @property
    def truth(self) -> list[np.ndarray]:
        """The true pictures."""
        return [pair.picture for pair in self.evaluation.pairs]

    def shown(self, count: int = SHOWN) -> list[np.ndarray]:
        """The first hints, as pictures."""
        return [self.evaluation.spec.picture(hint) for hint in self.evaluation.hints[:count]]

    def scores(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """The fidelity of each picture to its hint, (N,)."""
        return fidelity(pictures, self.evaluation.hints, self.evaluation.spec)

    def ceiling(self) -> Figure:
        """The fidelity of the true pictures as the base's VAE gives them back."""
        return mean_figure(self.scores(ceiling_of(self.base)(self.truth)))

    def facts(self) -> dict[str, Any]:
        """The settings, for a caption, and the seconds so far: to be asked when all is measured."""
        one = self.evaluation
        facts: dict[str, Any] = {"base": f"{self.base.name} ({self.base.digest})", "scenes": len(one.pairs)}
        facts |= {"steps": one.steps, "guidance": one.guidance}
        facts |= {"seeds": f"{one.first_seed}-{one.first_seed + len(one.pairs) - 1}"}
        return facts | {"seconds": round(time.perf_counter() - self.began)}


def pixels_of(make: Maker, requests: Sequence[Request]) -> list[np.ndarray]:
    """The pictures of requests, without their facts."""
    return [picture.pixels for picture in make(requests)]


class KeepsFirst:
    """A maker that keeps the pictures of its first call, and of no later one."""

    def __init__(self, make: Maker) -> None:
        self.make, self.pictures = make, list[np.ndarray]()

    def __call__(self, requests: Sequence[Request]) -> list[Picture]:
        """The pictures of requests, as the maker makes them."""
        made = list(self.make(requests))
        self.pictures = self.pictures or [picture.pixels for picture in made]
        return made


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
    if folder is None or not (folder / WEIGHTS).exists():
        return Entrant(name, row.title, None, note="training has not ended" if folder else NO_WEIGHTS)
    baseline, about = load_baseline(folder, base)
    if about.strength is None:
        return Entrant(name, row.title, baseline.make, about.cost())
    make = partial(_guided, baseline.make, about.strength)
    return Entrant(name, row.title, make, f"{about.cost()}; guidance {about.strength:g}")


def _guided(make: Maker, strength: float, requests: Sequence[Request]) -> list[Picture]:
    """The pictures of requests, with a maker's own strength of guidance."""
    return list(make([request.model_copy(update={"guidance": strength}) for request in requests]))


def _folder_of(name: str, kind: str, opponents: Path | None) -> Path | None:
    """The folder of an opponent that was trained on hints of a kind, `NAME-KIND` or `NAME`; None if there is none."""
    folders = [opponents / f"{name}-{kind}", opponents / name] if opponents else []
    trained = (one for one in folders if (one / ABOUT).is_file() and read_about(one).hint == kind)
    return next(trained, None)


def advice(rows: Sequence[SystemRow], opponents: Path | None) -> str:
    """A sentence on how to train the opponents of rows that are open; "" where there are none."""
    commands = dict.fromkeys(training(row.name, row.kind, opponents) for row in rows if is_open(row))
    where = opponents or "runs/opponents"
    words = f"Opponents without weights are trained by: {', '.join(commands)}; then `--opponents {where}`."
    return words if commands else ""


def training(name: str, kind: str, opponents: Path | None) -> str:
    """The command that trains an opponent on hints of a kind, "" for its own kind, where reports look for it."""
    row = replace(OPPONENTS[name], hint=kind or OPPONENTS[name].hint)
    words = f" --hint {kind}" if row.folder != name else ""
    return f"`controlkit baseline train {name}{words} --out {opponents or 'runs/opponents'}/{row.folder}`"


class Cells(Protocol):
    """A row of a table."""

    def words(self) -> Sequence[str]:
        """Its cells, as the table's head has them."""


def stamp() -> dict[str, Any]:
    """The date, the versions, and the machine, for a report's file."""
    facts = machine("cuda" if torch.cuda.is_available() else "cpu")
    return {"date": datetime.now(UTC).date().isoformat(), "controlkit": __version__, **facts}


@dataclass(frozen=True)
class Table:
    """A table or figure of the paper as it was made here: rows, and the settings that all of them share."""

    rows: Sequence[Cells]
    settings: Mapping[str, Any]
    advice: str
    """On the rows without weights."""
    gathered: str = field(default="", kw_only=True)
    """On the rows of an earlier run: that there are some, or why not."""
    made: Mapping[str, Any] = field(default_factory=stamp, kw_only=True)

    def notes(self) -> str:
        """Sentences between the rows and the settings, such as on floor and ceiling."""
        return ""

    def caption(self) -> str:
        """Notes, settings, versions and advice in words."""
        used = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        with_what = f"Made {self.made['date']}, controlkit {self.made['controlkit']}, torch {self.made['torch']}."
        return " ".join(filter(None, (self.notes(), f"Settings: {used}.", with_what, self.gathered, self.advice)))


AnyTable = TypeVar("AnyTable", bound=Table)
Sheets = Mapping[str, Mapping[str, Sequence[np.ndarray]]]
"""The columns of each sheet by their titles; sheets by the ending of their names, "" or a kind of hints."""


def write_report(
    out: Path, name: str, table: AnyTable, head: Sequence[str], sheets: Sheets, opponents: Path | None = None
) -> AnyTable:
    """Write a table into a folder as JSON, as Markdown, and as sheets of the first pictures of each column.

    Returns it as it was written: where the folder holds an earlier one with the same settings, systems without weights
    have its rows and pictures. ``opponents``: the plan's, for the advice on those that are still without.
    """
    mark_output(out, f"reproduce {name}")
    sheets = {kind: {title: made[:SHOWN] for title, made in columns.items()} for kind, columns in sheets.items()}
    if any(map(is_open, table.rows)):
        table, sheets = _gathered(Earlier.read(out, name, head, table.settings), table, sheets, opponents)
    lines = [head, ["---"] * len(head), *(row.words() for row in table.rows)]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{table.caption()}\n"
    write_atomic(out / f"{name}.json", (json.dumps(_facts(table, head), indent=2) + "\n").encode())
    write_atomic(out / f"{name}.md", text.encode())
    for kind, columns in sheets.items():
        sheet = grid([list(row) for row in zip(*columns.values(), strict=True)], list(columns))
        write_png(out / f"{name}{kind and '-'}{kind}.png", sheet)
        for row in table.rows:
            if isinstance(row, SystemRow) and row.kind == kind and row.title in columns and not isinstance(row, Kept):
                write_strip(strip_path(out, name, kind, row.title), columns[row.title])
    return table


def _gathered(earlier: Earlier, table: AnyTable, sheets: Sheets, opponents: Path | None) -> tuple[AnyTable, Sheets]:
    """A table and its sheets with what an earlier report has of the systems that are without weights."""
    rows, words = earlier.filled(table.rows), earlier.why_not
    if any(isinstance(row, Kept) for row in rows):
        words = "Rows that were made before are of earlier runs with these settings, by weights that are not here now."
        table = replace(table, advice=advice(rows, opponents))
    sheets = {kind: earlier.columns(kind, columns, rows) for kind, columns in sheets.items()}
    return replace(table, rows=rows, gathered=words), sheets


def _facts(table: Table, head: Sequence[str]) -> dict[str, Any]:
    """A table as JSON; each row with its cells and with when and by which version it was made."""
    facts = asdict(table)
    made = {key: table.made[key] for key in ("date", "controlkit")}
    rows = [
        dict(row.facts) if isinstance(row, Kept) else values | {"cells": list(row.words()), "made": made}
        for row, values in zip(table.rows, facts["rows"], strict=True)
    ]
    return {"format": FORMAT, "head": list(head), **facts, "rows": rows}
