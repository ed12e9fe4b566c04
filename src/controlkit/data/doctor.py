"""A data set examined before anything trains on it.

``examine`` opens every picture and yields a ``Finding`` a row; ``Report`` adds them up. A set whose report has a fatal
problem must not be trained on.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from controlkit.annotators import annotate, grounds_of, is_empty, kind_or_bare, parts_of
from controlkit.data.layouts.rows import Held, Listing, Problem, Row
from controlkit.data.pairs import MOST_PIXELS, out_of_place, turned_over
from controlkit.data.workers import parallel_map, ranges_of
from controlkit.errors import UserError
from controlkit.images import Ground, HintSpec, decode_hint, decode_picture, fit, picture_error

_SHOWN = 8  # rows on the sheet


@dataclass(frozen=True)
class Finding:
    """The facts about one row: its pictures' sizes, and what is wrong with them."""

    row: Row
    problems: tuple[Problem, ...] = ()
    picture_size: tuple[int, int] | None = None  # height, width
    hint_size: tuple[int, int] | None = None
    digest: str = ""
    hint_light: float = float("nan")  # mean grey, 0 to 1
    hint_kinds: tuple[str, ...] = ()  # what arrays they are, such as "3 channels of uint8"
    shown: tuple[np.ndarray, ...] = field(default=(), repr=False)  # picture and hints, where they belong on the sheet


@dataclass
class Report:
    """All findings of a set, added up."""

    layout: str
    rows: int
    problems: list[Problem]
    words: list[int]
    sizes: Counter[tuple[int, int]]
    hints: int = 0
    hint_light: list[float] = field(default_factory=list)
    shown: list[tuple[np.ndarray, ...]] = field(default_factory=list)

    @property
    def may_train(self) -> bool:
        """Whether nothing fatal was found, and something to train on."""
        return self.rows > 0 and not any(problem.fatal for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        """Plain values, without pictures."""
        sizes = {f"{width}x{height}": count for (height, width), count in self.sizes.most_common()}
        words = {
            name: int(value)
            for name, value in zip(("least", "median", "most"), _least_median_most(self.words), strict=True)
        }
        return {
            "layout": self.layout,
            "rows": self.rows,
            "with_hints": self.hints,
            "may_train": self.may_train,
            "picture_sizes": sizes,
            "caption_words": words | {"none": self.words.count(0)},
            "hint_mean_grey": round(float(np.mean(self.hint_light)), 4) if self.hint_light else None,
            "problems": [{"kind": p.kind, "where": p.where, "words": p.words, "fatal": p.fatal} for p in self.problems],
        }


def _least_median_most(values: Sequence[int]) -> tuple[float, float, float]:
    return (min(values), float(np.median(values)), max(values)) if values else (0, 0, 0)


def examine(listing: Listing, contract: HintSpec | None = None, workers: int = 1) -> Iterator[Finding]:
    """Open every row's pictures, by ``workers`` processes; findings in the set's order.

    ``contract``: of the hints, to compare the set's own with, or to make some for the contact sheet.
    """
    rows = listing.rows
    shown = set(np.linspace(0, len(rows) - 1, _SHOWN).astype(int).tolist()) if rows else set()
    yield from parallel_map(partial(_findings, rows, contract, shown), ranges_of(len(rows)), workers)


def _findings(rows: Sequence[Row], contract: HintSpec | None, shown: set[int], places: range) -> Iterator[Finding]:
    """The findings of the rows at these places; those in ``shown`` with their pictures."""
    for place in places:
        row = rows[place]
        problems: list[Problem] = []
        picture, data = _opened(row.picture, problems)
        rules = _rules(row, contract, problems)
        grounds = [grounds_of(rule)[0] for rule in rules]
        read = [_opened(held, problems, True, ground)[0] for held, ground in zip(row.hints, grounds, strict=True)]
        hints = []  # as pictures
        for held, hint, rule in zip(row.hints, read, rules, strict=True):
            if hint is None:
                continue
            problems += _beside(held, picture, hint) if picture is not None else ()
            problems += _against(held, hint, rule) if rule else ()
            hints.append((rule or HintSpec("")).picture(hint)[..., :3])
        made = hints
        if picture is not None and not row.hints and place in shown and contract:
            made = [annotate(picture, p)[..., :3] for p in parts_of(contract) if kind_or_bare(p.annotator).is_made_here]
        yield Finding(
            row,
            tuple(problems),
            None if picture is None else picture.shape[:2],
            hints[0].shape[:2] if hints else None,
            hashlib.sha256(data).hexdigest() if data else "",
            float(hints[0].mean()) / 255 if hints else float("nan"),
            tuple(f"{hint.shape[-1]} channels of {hint.dtype}" for hint in read if hint is not None),
            tuple(one for one in (picture, *made) if one is not None) if place in shown else (),
        )


def _rules(row: Row, contract: HintSpec | None, problems: list[Problem]) -> list[HintSpec | None]:
    """The contract that each hint of a row is compared with."""
    parts = parts_of(contract) if contract else []
    if contract and len(row.hints) > 1 and len(row.hints) != len(parts):
        words = f"has {len(row.hints)} hints, and {contract.annotator} names {len(parts)}: name all, as canny+depth"
        problems.append(Problem("other hints", row.picture.name, words))
        return [None] * len(row.hints)
    return [contract] * len(row.hints) if len(row.hints) < 2 else [*parts] or [None] * len(row.hints)


def add_up(listing: Listing, findings: Iterator[Finding], contract: HintSpec | None = None) -> Report:
    """The report of a set, from ``examine``'s findings."""
    words = [len(row.prompt.split()) for row in listing.rows]
    report = Report(listing.layout, len(listing.rows), list(listing.problems), words, Counter())
    seen: dict[str, str] = {}
    kinds: dict[int, Counter[str]] = {}
    for finding in findings:
        name = finding.row.picture.name
        report.problems += finding.problems
        report.hints += finding.row.hint is not None
        if finding.picture_size:
            report.sizes[finding.picture_size] += 1
        if finding.hint_size:
            report.hint_light.append(finding.hint_light)
        for place, kind in enumerate(finding.hint_kinds):
            kinds.setdefault(place, Counter())[kind] += 1
        if finding.shown:
            report.shown.append(finding.shown)
        if finding.digest in seen:
            report.problems.append(
                Problem("duplicate", name, f"is the very picture {seen[finding.digest]}", fatal=False)
            )
        elif finding.digest:
            seen[finding.digest] = name
    report.problems += [*_of_the_set(listing, report, kinds)]
    if contract and (dark := turned_over(contract, report.hint_light)):
        report.problems.append(Problem("hints inverted", listing.layout, dark))
    return report


def _of_the_set(listing: Listing, report: Report, kinds: Mapping[int, Counter[str]]) -> Iterator[Problem]:
    """Problems of the set as a whole; ``kinds``: at each place of a row's hints, how many are arrays of which kind."""
    where, rows, none = listing.layout, report.rows, report.words.count(0)
    if rows and none == rows:
        yield Problem("no captions", where, "no picture has one: prompts will mean little", fatal=False)
    elif none and not any(problem.kind == "no caption" for problem in report.problems):
        yield Problem("no caption", where, f"{none} of {rows} pictures have none", fatal=False)
    if 0 < report.hints < rows:
        yield Problem("missing hint", where, f"{rows - report.hints} of {rows} rows have no hint")
    if len({len(row.hints) for row in listing.rows if row.hints}) > 1:
        yield Problem("missing hint", where, "some rows have more hints than others")
    for counted in kinds.values():
        if len(counted) > 1:
            each = ", ".join(f"{n} have {kind}" for kind, n in counted.most_common())
            yield Problem("kinds differ", where, f"hints are of several kinds: {each}; one run reads one")
    if not rows and not report.problems:
        yield Problem("empty", where, "there is nothing in it")


def _opened(
    held: Held, problems: list[Problem], is_hint: bool = False, ground: Ground = "white"
) -> tuple[np.ndarray | None, bytes]:
    """A picture or hint as training will read it, or None with the reason among ``problems``; and its file's bytes."""
    try:
        data = held.read()
    except OSError as error:
        problems.append(Problem("unreadable file", held.name, f"cannot be read ({error.strerror or error})"))
        return None, b""
    if not data:
        problems.append(Problem("empty file", held.name, "has no bytes: write it anew, or take it out"))
        return None, b""
    if (is_hint and held.name.lower().endswith(".npy")) or data.startswith(b"\x93NUMPY"):
        return _opened_array(held, data, problems, is_hint), data
    try:
        with Image.open(io.BytesIO(data)) as opened:  # the header alone
            width, height = opened.size
            mode = opened.mode
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        kind = "huge picture" if isinstance(error, Image.DecompressionBombError) else "unreadable picture"
        problems.append(Problem(kind, held.name, f"{picture_error(error)}: write it anew, or take it out"))
        return None, data
    if width * height > MOST_PIXELS:
        problems.append(Problem("huge picture", held.name, f"is {width}x{height}: more than {MOST_PIXELS:,} pixels"))
        return None, data
    try:
        picture = (decode_hint if is_hint else decode_picture)(data, held.name, ground)
    except UserError as error:
        problems.append(Problem("unreadable picture", held.name, str(error).removeprefix(f"{held.name} ")))
        return None, data
    read_as = {
        "P": ("palette", "has a palette: read as its colours, not as numbers of labels"),
        "CMYK": ("CMYK", "is in CMYK: read as RGB without its profile, colours may shift"),
        "I;16": ("16 bits", "has 16 bits a sample: read as 8"),
    }
    mode = "I;16" if mode.startswith("I;16") else mode
    if mode in read_as and picture.dtype == np.uint8:
        kind, words = read_as[mode]
        problems.append(Problem(kind, held.name, words, fatal=False))
    return picture, data


def _opened_array(held: Held, data: bytes, problems: list[Problem], is_hint: bool) -> np.ndarray | None:
    try:
        if is_hint and data.startswith(b"\x93NUMPY"):
            return decode_hint(data, held.name)
        words = "is an array: pictures are read from PNG, JPEG or WebP files" if not is_hint else "is no .npy file"
    except UserError as error:
        words = str(error).removeprefix(f"{held.name} ")
    problems.append(Problem("unreadable array", held.name, words))
    return None


def _beside(held: Held, picture: np.ndarray, hint: np.ndarray) -> Iterator[Problem]:
    """Problems of a hint's size compared with its picture's."""
    if words := out_of_place(picture, hint):
        yield Problem("sizes differ", held.name, words)
    elif picture.shape[:2] != hint.shape[:2]:
        (height, width), (high, wide) = picture.shape[:2], hint.shape[:2]
        words = f"is {wide}x{high}, its picture {width}x{height}: it will be scaled"
        yield Problem("sizes differ", held.name, words, fatal=False)


def _against(held: Held, hint: np.ndarray, contract: HintSpec) -> Iterator[Problem]:
    """Problems of a hint that is not as its contract says."""
    if words := contract.fault(hint):
        yield Problem("not as agreed", held.name, words)
    elif is_empty(hint, contract):
        yield Problem("empty hint", held.name, "is all one value: it controls nothing", fatal=False)
    elif kind_or_bare(contract.annotator).lines and _colour(contract.picture(hint)[..., :3]) > 8:
        yield Problem("colours in a hint", held.name, f"has colours; {contract.annotator} has greys alone", fatal=False)


def _colour(picture: np.ndarray) -> float:
    """How far a picture's channels are apart on average, in grey levels; by planes, which is twenty times as fast."""
    red, green, blue = np.moveaxis(picture, -1, 0)
    most, least = (pick(pick(red, green), blue) for pick in (np.maximum, np.minimum))
    return float((most - least).mean())


def sheet_rows(report: Report, side: int = 128) -> list[list[np.ndarray]]:
    """Pictures above, their hints below, for a contact sheet; hints that training will make are made."""
    columns = [[fit(one, (side, side)) for one in shown] for shown in report.shown]
    depth = max((len(column) for column in columns), default=0)
    blank = np.full((side, side, 3), 255, np.uint8)
    return [[column[k] if k < len(column) else blank for column in columns] for k in range(depth)]
