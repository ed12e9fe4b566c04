"""A data set examined before anything trains on it.

``examine`` opens every picture and yields a ``Finding`` a row; ``Report`` adds them up. A set whose report has a fatal
problem must not be trained on.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np

from controlkit.annotators import annotate, grounds_of, is_empty, kind_or_bare, parts_of
from controlkit.data.layouts.rows import Held, Listing, Problem, Row, unequal
from controlkit.data.opened import open_row
from controlkit.data.pairs import inverted, rules_of, too_few
from controlkit.data.workers import parallel_map, ranges_of
from controlkit.errors import Mismatch, one_line
from controlkit.images import HintSpec, fit

_SHOWN = 8  # rows on the sheet
_SIDE = 128  # of a picture on it
_ENLARGED = 1.5  # times, from which on a picture's enlarging is noted


@dataclass(frozen=True)
class Finding:
    """The facts about one row: its pictures' sizes, and what is wrong with them."""

    row: Row
    problems: tuple[Problem, ...] = ()
    picture_size: tuple[int, int] | None = None  # height, width
    digests: tuple[str, ...] = ()  # of the picture's file, and of its pixels at the size trained at
    cut: float | None = None  # the share of the picture that is cropped away there
    hint_light: float | None = None  # mean grey, 0 to 1
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
    cut: list[float] = field(default_factory=list)
    shown: list[tuple[np.ndarray, ...]] = field(default_factory=list)

    @property
    def may_train(self) -> bool:
        """Whether nothing fatal was found, and something to train on."""
        return self.rows > 0 and not any(problem.fatal for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        """Plain values, without pictures."""
        sizes = {f"{width}x{height}": count for (height, width), count in self.sizes.most_common()}
        words = self.words or [0]
        counted = {"least": min(words), "median": int(np.median(words)), "most": max(words)}
        return {
            "layout": self.layout,
            "rows": self.rows,
            "with_hints": self.hints,
            "may_train": self.may_train,
            "picture_sizes": sizes,
            "caption_words": counted | {"none": self.words.count(0)},
            "cropped_away": {"mean": round(float(np.mean(self.cut)), 4), "most": max(self.cut)} if self.cut else None,
            "hint_mean_grey": round(float(np.mean(self.hint_light)), 4) if self.hint_light else None,
            "problems": [{"kind": p.kind, "where": p.where, "words": p.words, "fatal": p.fatal} for p in self.problems],
        }


def examine(
    listing: Listing, contract: HintSpec | None = None, workers: int = 1, size: int | None = None
) -> Iterator[Finding]:
    """Open every row's pictures, by ``workers`` processes; findings in the set's order.

    ``contract``: of the hints, to compare the set's own with, or to make some for the contact sheet. ``size``: side in
    pixels that training brings pictures to; None to look at them only as they are.
    """
    rows = listing.rows
    shown = set(np.linspace(0, len(rows) - 1, _SHOWN).astype(int).tolist()) if rows else set()
    yield from parallel_map(partial(_findings, rows, contract, shown, size), ranges_of(len(rows)), workers)


def _findings(
    rows: Sequence[Row], contract: HintSpec | None, shown: set[int], size: int | None, places: range
) -> Iterator[Finding]:
    """The findings of the rows at these places; those in ``shown`` with their pictures."""
    for place in places:
        row = rows[place]
        opened = open_row(row, grounds_of(contract))
        picture, problems = opened.picture, opened.problems
        hints = []  # as pictures
        for held, hint, rule in zip(row.hints, opened.hints, _rules(row, contract, problems), strict=True):
            if hint is not None:
                problems += _against(held, hint, rule, size) if rule else ()
                hints.append((rule or HintSpec("")).picture(hint)[..., :3])
        digests, cut = [opened.digest], None
        if picture is not None and size:
            digests.append(hashlib.sha256(fit(picture, (size, size)).tobytes()).hexdigest())
            height, width = picture.shape[:2]
            cut = round(1 - min(height, width) / max(height, width), 4)
            if (times := size / min(height, width)) > _ENLARGED:
                words = f"is {width}x{height}: enlarged {times:.1f} times to {size} pixels, so not sharp"
                problems.append(Problem("enlarged", row.picture.name, words, fatal=False))
        made = hints
        if picture is not None and not row.hints and place in shown and contract:
            made = [annotate(picture, p)[..., :3] for p in parts_of(contract) if kind_or_bare(p.annotator).is_made_here]
        yield Finding(
            row,
            tuple(problems),
            None if picture is None else picture.shape[:2],
            tuple(digests),
            cut,
            float(hints[0].mean()) / 255 if hints else None,
            tuple(f"{hint.shape[-1]} channels of {hint.dtype}" for hint in opened.hints if hint is not None),
            tuple(one for one in (picture, *made) if one is not None) if place in shown else (),
        )


def _rules(row: Row, contract: HintSpec | None, problems: list[Problem]) -> list[HintSpec | None]:
    """The contract that each hint of a row is compared with."""
    try:
        return [*rules_of(contract, len(row.hints))] if contract else [None] * len(row.hints)
    except Mismatch as error:
        problems.append(Problem("other hints", row.picture.name, str(error)))
        return [None] * len(row.hints)


def add_up(
    listing: Listing,
    findings: Iterable[Finding],
    contract: HintSpec | None = None,
    unread: Callable[[str], str] = lambda prompt: "",
) -> Report:
    """The report of a set, from ``examine``'s findings.

    ``unread``: the end of a prompt that a base does not read (``Backbone.cut_words``).
    """
    lengths = [len(row.prompt.split()) for row in listing.rows]
    report = Report(listing.layout, len(listing.rows), list(listing.problems), lengths, Counter())
    seen: dict[str, str] = {}
    kinds: dict[int, Counter[str]] = {}
    for finding in findings:
        name = finding.row.picture.name
        report.problems += finding.problems
        report.hints += bool(finding.row.hints)
        if finding.picture_size:
            report.sizes[finding.picture_size] += 1
        if finding.hint_light is not None:
            report.hint_light.append(finding.hint_light)
        for place, kind in enumerate(finding.hint_kinds):
            kinds.setdefault(place, Counter())[kind] += 1
        if finding.shown:
            report.shown.append(finding.shown)
        if finding.cut is not None:
            report.cut.append(finding.cut)
        for digest, words in zip(finding.digests, ("", "at the size trained at "), strict=False):
            if digest in seen:
                words = f"is {words}the very picture {seen[digest]}"
                report.problems.append(Problem("duplicate", name, words, fatal=False))
                break
        seen |= {digest: name for digest in finding.digests if digest and digest not in seen}
        if rest := unread(finding.row.prompt):
            count, start = len(rest.split()), one_line(" ".join(rest.split()[:5]))[:60]
            words = f'has a longer caption than the base reads: not its last {count} words, from "{start}" on'
            report.problems.append(Problem("long caption", name, words, fatal=False))
    report.problems += [*_of_the_set(listing, report, kinds)]
    parts = parts_of(contract) if contract and not report.hints else []
    if unmade := [part.annotator for part in parts if not kind_or_bare(part.annotator).is_made_here]:
        words = f'nothing here makes hints of "{unmade[0]}": give them as files, or name another annotator'
        report.problems.append(Problem("no hints", listing.layout, words))
    if contract and report.may_train and (dark := inverted(listing.rows, contract)):
        report.problems.append(Problem("hints inverted", listing.layout, dark))
    return report


def _of_the_set(listing: Listing, report: Report, kinds: Mapping[int, Counter[str]]) -> Iterator[Problem]:
    """Problems of the set as a whole; ``kinds``: at each place of a row's hints, how many are arrays of which kind."""
    where, rows, none = listing.layout, report.rows, report.words.count(0)
    if rows and none == rows:
        yield Problem("no captions", where, "no picture has one: prompts will mean little", fatal=False)
    elif none and not any(problem.kind == "no caption" for problem in report.problems):
        yield Problem("no caption", where, f"{none} of {rows} pictures have none", fatal=False)
    if words := unequal(listing.rows):
        yield Problem("missing hint", where, words)
    for counted in kinds.values():
        if len(counted) > 1:
            each = ", ".join(f"{n} have {kind}" for kind, n in counted.most_common())
            yield Problem("kinds differ", where, f"hints are of several kinds: {each}; one run reads one")
    if not any(problem.fatal for problem in report.problems) and (words := too_few(rows)):
        yield Problem("too few", where, words)


def _against(held: Held, hint: np.ndarray, contract: HintSpec, size: int | None) -> Iterator[Problem]:
    """Problems of a hint that is not as its contract says."""
    if words := contract.fault(hint):
        yield Problem("not as agreed", held.name, words)
    elif is_empty(hint, contract):
        yield Problem("empty hint", held.name, "is all one value: it controls nothing", fatal=False)
    elif size and is_empty(fit(hint, (size, size), contract.resize), contract):
        words = f"is all one value once it has {size} pixels: it controls nothing"
        yield Problem("empty hint", held.name, words, fatal=False)
    elif kind_or_bare(contract.annotator).lines and _colour(contract.picture(hint)[..., :3]) > 8:
        yield Problem("colours in a hint", held.name, f"has colours; {contract.annotator} has greys alone", fatal=False)


def _colour(picture: np.ndarray) -> float:
    """How far a picture's channels are apart on average, in grey levels; by planes, which is twenty times as fast."""
    red, green, blue = np.moveaxis(picture, -1, 0)
    most, least = (pick(pick(red, green), blue) for pick in (np.maximum, np.minimum))
    return float((most - least).mean())


def sheet_rows(report: Report) -> list[list[np.ndarray]]:
    """Pictures above, their hints below, for a contact sheet; hints that training will make are made."""
    columns = [[fit(one, (_SIDE, _SIDE)) for one in shown] for shown in report.shown]
    blank = np.full((_SIDE, _SIDE, 3), 255, np.uint8)
    return [list(row) for row in zip_longest(*columns, fillvalue=blank)]
