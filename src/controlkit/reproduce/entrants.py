"""The systems that a table compares: opponents out of a folder, and the shipped control."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from controlkit.backbones import Backbone
from controlkit.baselines import OPPONENTS, load_baseline
from controlkit.baselines.saved import ABOUT
from controlkit.files import mark_output, write_atomic
from controlkit.images import grid, write_png
from controlkit.sample import Maker, load, maker

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


QUICK = {"num": 16, "steps": 10}


@dataclass(frozen=True)
class Entrant:
    """A system: its title, what makes its pictures and what it cost; or, without a maker, a note on what is missing."""

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
    folder = opponents / name if opponents else None
    if folder is None or not (folder / ABOUT).is_file():
        where = f"{opponents or 'runs/opponents'}/{name}"
        return Entrant(
            name, row.title, None, note=f"no weights given: `controlkit baseline train {name} --out {where}`"
        )
    baseline, about = load_baseline(folder, base)
    return Entrant(name, row.title, baseline.make, about.cost())


def write_report(
    out: Path, name: str, facts: Mapping[str, Any], text: str, columns: Mapping[str, Sequence[np.ndarray]]
) -> None:
    """Write a table into a folder as JSON, as Markdown, and as a sheet of the first pictures of each column."""
    mark_output(out, f"reproduce {name}")
    write_atomic(out / f"{name}.json", (json.dumps(facts, indent=2) + "\n").encode())
    write_atomic(out / f"{name}.md", text.encode())
    rows = [list(row) for row in zip(*(made[:_SHOWN] for made in columns.values()), strict=True)]
    write_png(out / f"{name}.png", grid(rows, list(columns)))


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
