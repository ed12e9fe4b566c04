"""Rows of systems in a report: made now, or kept of an earlier report in the same folder, where weights are gone since.

Opponents take hours to train and their weights are kept by nobody, so a report is gathered over several runs: a system
without weights keeps the row and the pictures that an earlier run with the same settings made of it.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from controlkit.errors import UserError, one_line
from controlkit.files import inside, read_json
from controlkit.images import read_picture, write_png

FORMAT = 1
"""Raised when a report's file changes so that rows of an earlier one cannot be kept."""
FREE = {"seconds"}
"""Settings that may differ between rows of one report."""


@dataclass(frozen=True)
class SystemRow:
    """A row of a report: a system, on hints of a kind."""

    name: str
    title: str
    """Its first cell, and the title of its pictures."""
    kind: str = field(default="", kw_only=True)
    """The ending of the name of the sheet that shows it."""
    cost: str = field(default="", kw_only=True)
    """The training's cost in words."""
    note: str = field(default="", kw_only=True)
    """The reason why nothing was measured; "" where it was."""

    def words(self) -> Sequence[str]:
        """Its cells, as the report's head has them."""
        raise NotImplementedError


@dataclass(frozen=True)
class Kept(SystemRow):
    """A row of an earlier report: its cells, and all that the file has of it."""

    cells: Sequence[str]
    facts: Mapping[str, Any]

    def words(self) -> tuple[str, ...]:
        """The cells as they were; the last one, on the training, says when the row was made and by which version."""
        made = "made before, {date}, version {controlkit}".format(**self.facts["made"])
        return *self.cells[:-1], "; ".join(filter(None, (self.cells[-1], made)))


_Cell = Annotated[str, Field(max_length=3000)]


class _Made(BaseModel):
    date: str = Field(max_length=40)
    controlkit: str = Field(max_length=40)


class _HeldRow(BaseModel):
    """A row in a report's file: what is asked of it before it is kept."""

    name: str = Field(max_length=300)
    title: _Cell
    kind: str = Field("", max_length=100)
    cost: _Cell = ""
    note: _Cell = ""
    cells: list[_Cell] = Field(min_length=1)
    made: _Made


class _Held(BaseModel):
    """A report's file, as ``write_report`` writes it; each has other keys besides."""

    model_config = ConfigDict(extra="ignore")

    format: Literal[1]
    head: list[_Cell]
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = Field(max_length=10_000)


@dataclass(frozen=True)
class Earlier:
    """The report that a folder holds from an earlier run, as far as its rows may be kept. ``why_not``: a sentence on
    why they may not; "" where they may, or there are none."""

    out: Path
    report: str
    rows: Mapping[tuple[str, str], Kept] = field(default_factory=dict)
    """By title and kind; those that were measured."""
    why_not: str = ""

    @classmethod
    def read(cls, out: Path, report: str, head: Sequence[str], settings: Mapping[str, Any]) -> "Earlier":
        """Read what is there; a file of other settings, or that cannot be read, is put aside as ``NAME-earlier.json``.

        Raises ``Invalid`` where the file is a link out of the folder.
        """
        path = inside(out, out / f"{report}.json")
        if not path.is_file():
            return cls(out, report)
        try:
            held = _Held.model_validate(read_json(path))
            if not (why_not := _differing(held, head, settings)):
                found = (_kept(facts, len(head)) for facts in held.rows)
                return cls(out, report, {(row.title, row.kind): row for row in found if not row.note})
        except (UserError, ValueError):
            why_not = "was written by another version, or is damaged"
        os.replace(path, inside(out, out / f"{report}-earlier.json"))
        words = f"The {report}.json that was here {why_not}: it is {report}-earlier.json now; none of its rows is used."
        return cls(out, report, why_not=words)

    def filled(self, rows: Sequence[Any]) -> list[Any]:
        """The rows, with those kept in the place of those that have a note."""
        return [self.rows.get((row.title, row.kind), row) if is_open(row) else row for row in rows]

    def columns(
        self, kind: str, columns: Mapping[str, Sequence[np.ndarray]], rows: Sequence[Any]
    ) -> dict[str, Sequence[np.ndarray]]:
        """The columns of the sheet of a kind, with the pictures of kept rows at their rows' places."""
        own = [row for row in rows if isinstance(row, SystemRow) and row.kind == kind]
        count = min(map(len, columns.values()))
        found = {title: column for title, column in columns.items() if title not in {row.title for row in own}}
        for row in own:
            made = columns.get(row.title, [])
            if isinstance(row, Kept):
                made = read_strip(strip_path(self.out, self.report, kind, row.title), count)
            if len(made):
                found[row.title] = made
        return found


def is_open(row: Any) -> bool:
    """Whether a row is one of a system of which nothing was measured."""
    return isinstance(row, SystemRow) and bool(row.note)


def _kept(facts: Mapping[str, Any], width: int) -> Kept:
    row = _HeldRow.model_validate(facts)
    if len(row.cells) != width:
        raise ValueError(f"a row has {len(row.cells)} cells")
    return Kept(row.name, row.title, row.cells, facts, kind=row.kind, cost=row.cost, note=row.note)


def _differing(held: _Held, head: Sequence[str], settings: Mapping[str, Any]) -> str:
    """How a report's settings differ from these, in words; "" where they do not."""
    if held.head != list(head):
        return "has other columns"
    here = json.loads(json.dumps(settings))
    names = dict.fromkeys([*here, *held.settings])
    pairs = {name: (held.settings.get(name), here.get(name)) for name in names if name not in FREE}
    changed = [f"{name} {before}, now {now}" for name, (before, now) in pairs.items() if before != now]
    return f"had other settings ({one_line(', '.join(changed))})" if changed else ""


# --- the pictures of rows, by which a sheet is put together again ---------------------------------------------------


def strip_path(out: Path, report: str, kind: str, title: str) -> Path:
    """The file with a row's pictures, one below the other."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{kind} {title}".lower()).strip("-")
    return out / f"{report}-rows" / f"{name[:150]}.png"


def write_strip(path: Path, pictures: Sequence[np.ndarray]) -> None:
    """Write pictures of one size, uint8 (H, W, 3), one below the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, np.concatenate(pictures))


def read_strip(path: Path, count: int) -> list[np.ndarray]:
    """The pictures of a strip that holds so many; none where there is no such file, or it cannot hold them."""
    with suppress(UserError):
        strip = read_picture(inside(path.parents[1], path))
        if len(strip) % count == 0:
            return list(strip.reshape(count, -1, *strip.shape[1:]))
    return []
