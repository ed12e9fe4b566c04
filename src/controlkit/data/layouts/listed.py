"""Sets with a listing: the original's ``prompt.json``, ``metadata`` files, SimpleTuner's backends."""

import csv
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from controlkit.data.layouts.folders import caption_beside, paired, words_of
from controlkit.data.layouts.rows import (
    HINT_SUFFIXES,
    MOST_COLUMNS,
    MOST_TEXT,
    SUFFIXES,
    Names,
    Problem,
    Row,
    file_at,
    inside,
    is_there,
    one_of,
    parts_of_text,
    text_of,
    too_many,
    wording,
)
from controlkit.data.layouts.tree import Tree, tree_of
from controlkit.errors import Invalid, nearest, one_line
from controlkit.files import parse_json

_BACKENDS = 32
"""Of SimpleTuner's, each of which is a folder to look through."""


def prompt_json(tree: Tree, problems: list[Problem], names: Names) -> list[Row] | None:
    """The original repository's ``prompt.json``."""
    folder, listing = tree.root, tree.root / "prompt.json"
    if not listing.is_file():
        return None
    rows = []
    for where, values in _json_lines(listing, parts_of_text(listing, problems, folder, "\n"), problems):
        if too_many(problems, listing):
            break
        if absent := [key for key in ("source", "target", "prompt") if not isinstance(values.get(key), str)]:
            words = f'lacks "{absent[0]}"; expected "source", "target" and "prompt" in a JSON object a line'
            problems.append(Problem("unreadable line", where, words))
            continue
        hint, picture = (inside(folder, values[key], problems) for key in ("source", "target"))
        if hint and picture:
            rows.append(Row(picture, values["prompt"], (hint,)))
    problems += _unnamed(tree, folder, rows, problems)
    return rows


def metadata(tree: Tree, problems: list[Problem], names: Names) -> list[Row] | None:
    """``metadata.jsonl``, ``.csv`` or ``.json`` (a list), in the folder itself or in ``train/``; paths from where it
    lies."""
    suffixes = (".jsonl", ".csv", ".json")
    places = [base / f"metadata{suffix}" for base in (tree.root, tree.root / "train") for suffix in suffixes]
    listing = next((path for path in places if path.is_file()), None)
    if listing is None:
        return None
    parts = parts_of_text(listing, problems, tree.root, {".jsonl": "\n", ".csv": ""}.get(listing.suffix))
    entries: Iterator[tuple[str, dict[str, Any]]]
    if listing.suffix == ".json":
        first = next(parts, "")
        if not first.lstrip().startswith("[") and not problems:
            return None  # a JSON object of that name is about something else
        entries = _json_list(listing, first, parts, problems)
    elif listing.suffix == ".csv":
        entries = _csv_lines(listing, parts, names, problems)
    else:
        entries = _json_lines(listing, parts, problems)
    rows = []
    for number, (where, values) in enumerate(entries):
        if too_many(problems, listing):
            break
        if not number:
            names.check(list(values), where)
        named = one_of(values, names.image)
        hinted = [values[name] for name in names.hints([key for key in values if values[key] not in (None, "")])]
        if not isinstance(named, str):
            words = f"names no picture; expected one of {', '.join(names.image)}"
            problems.append(Problem("unreadable line", where, words))
            continue
        picture = inside(listing.parent, named, problems)
        others = [inside(listing.parent, name, problems) for name in hinted]
        if picture and all(others):
            rows.append(Row(picture, wording(one_of(values, names.caption), number), tuple(filter(None, others))))
    problems += _unnamed(tree, listing.parent, rows, problems)
    return rows


def _unnamed(tree: Tree, folder: Path, rows: Sequence[Row], problems: Sequence[Problem]) -> list[Problem]:
    """Pictures beside a listing that it does not name; none where it is broken, and may have meant to."""
    if any(problem.fatal for problem in problems):
        return []
    named = {held.name for row in rows for held in (row.picture, *row.hints)}
    extra = [path for path in map(str, tree.under(folder, HINT_SUFFIXES)) if path not in named]
    more = f", and {len(extra) - 1} more like it" if len(extra) > 1 else ""
    return (
        [Problem("extra file", extra[0], f"is not named by the listing{more}: not read", fatal=False)] if extra else []
    )


def _json_list(
    listing: Path, text: str, more: Iterator[str], problems: list[Problem]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON list, which begins with ``text`` and goes on with ``more``, and where each stands.

    One is read at a time, so that a list of a hundred megabytes is not held as a whole, and none is larger than a part.
    """
    decoder, at, place, ended = json.JSONDecoder(), text.index("[") + 1 if "[" in text else 0, 0, not text
    while not ended or at < len(text):
        if not ended and len(text) - at < MOST_TEXT:
            part = next(more, "")
            text, at, ended = text[at:] + part, 0, not part
        at = _blank(text, at)
        if text[at : at + 1] == "]" and _blank(text, at + 1) == len(text):
            return
        where = f"{listing}, entry {place}"
        try:
            if place and text[at : at + 1] != ",":
                raise ValueError("a comma, or the end of the list, is missing")
            at = _blank(text, at + 1) if place else at
            _, end = decoder.raw_decode(text, at)
            values = parse_json(text[at:end], where, finite=False, halves=True)
        except (ValueError, RecursionError) as error:
            words = f"is no JSON ({one_line(error)}): expected a list of JSON objects, written whole"
            problems.append(Problem("unreadable file", where, words))
            return
        at, place = end, place + 1
        if isinstance(values, dict):
            yield where, values
        else:
            words = f"holds a {type(values).__name__}; expected a list of JSON objects"
            problems.append(Problem("unreadable line", where, words))
            if too_many(problems, listing):
                return
    if text:
        problems.append(Problem("unreadable file", str(listing), "is no JSON: the list has no end"))


def _blank(text: str, at: int) -> int:
    """Where blanks that begin here end."""
    found = re.compile(r"\s*").match(text, at)
    return found.end() if found else at


def _csv_lines(
    listing: Path, parts: Iterator[str], names: Names, problems: list[Problem]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table whose fields are parted by commas, semicolons or tabs, as its first line shows."""
    first = next(parts, "")
    parted = (mark for mark in ",;\t" if set(names.image) & {field.strip(' "\r\n') for field in first.split(mark)})
    lines = csv.DictReader(chain([first], parts), delimiter=next(parted, ","))
    try:
        columns = len(lines.fieldnames or ())
    except csv.Error:
        columns = MOST_COLUMNS + 1
    if columns > MOST_COLUMNS:
        words = f"does not begin with a line of at most {MOST_COLUMNS:,} names of columns"
        problems.append(Problem("unreadable file", str(listing), words))
        return
    while True:
        where = f"{listing}, line {lines.line_num + 1}"
        try:
            values = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            problems.append(Problem("unreadable line", where, f"is no line of a table ({one_line(error)})"))
            return
        if None in values:  # where the rest of a line goes
            words = "has more fields than the first line: a caption with commas stands in quotes"
            problems.append(Problem("unreadable line", f"{listing}, line {lines.line_num}", words))
            if too_many(problems, listing):
                return
        else:
            yield f"{listing}, line {lines.line_num}", values


def _json_lines(path: Path, lines: Iterator[str], problems: list[Problem]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON lines, and where each stands."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                values = parse_json(line, where, finite=False, halves=True)
                reason = f"holds a {type(values).__name__}"
            except Invalid as error:
                values, reason = None, str(error).removeprefix(f"{where} ").partition(": expected")[0]
            if isinstance(values, dict):
                yield where, values
            else:
                problems.append(Problem("unreadable line", where, f"{reason}; expected a JSON object a line"))
                if too_many(problems, path):
                    return


def simpletuner(tree: Tree, problems: list[Problem], names: Names) -> list[Row] | None:
    """``multidatabackend.json``: backends of pictures with ``conditioning_data``, the id of a backend of hints.

    ``Invalid`` for a file that cannot be read, or an unknown caption strategy or id.
    """
    path = tree.root / "multidatabackend.json"
    if not path.is_file():
        return None
    broken: list[Problem] = []
    text = text_of(path, broken, tree.root)
    if broken:
        raise Invalid(f"{broken[0]}.")
    listed = parse_json(text, str(path))
    try:
        backends = {str(one["id"]): one for one in listed if not one.get("disabled")}
        if len(backends) > _BACKENDS:
            raise Invalid(f"{path} has {len(backends):,} backends: expected at most {_BACKENDS}.")
        local = [one for one in backends.values() if "instance_data_dir" in one]
        for one in backends.values():
            problems += _left_out(str(path), one)
        pictures = [one for one in local if one.get("dataset_type", "image") == "image"]
    except (KeyError, TypeError, AttributeError) as error:
        raise Invalid(
            f"{path} cannot be read ({one_line(repr(error))}): expected a list of backends, each with an id."
        ) from error
    trees: dict[Path, Tree] = {}

    def place(backend: Mapping[str, Any]) -> tuple[Tree, Path]:
        return _place(tree, trees, str(backend["instance_data_dir"]), problems)

    rows: list[Row] = []
    for backend in pictures:
        strategy = str(backend.get("caption_strategy", "filename"))
        prompt_of = _prompts(backend, problems, tree.root)
        if strategy not in prompt_of:
            unread = one_line(strategy)
            raise Invalid(f'{path}: caption_strategy is "{unread}": {nearest(unread, prompt_of)}')
        named_hints = backend.get("conditioning_data")
        others = [str(other) for other in (named_hints if isinstance(named_hints, list) else [named_hints])]
        if named_hints is None:
            here, folder = place(backend)
            said, named = prompt_of[strategy], strategy == "filename"
            rows += [Row(file_at(p), said(p) or "", named=named) for p in here.under(folder, SUFFIXES)]
        elif unknown := [other for other in others if "instance_data_dir" not in backends.get(other, {})]:
            known = [one_line(name)[:20] for name, one in backends.items() if "instance_data_dir" in one]
            unread = one_line(unknown[0])
            raise Invalid(f'{path}: conditioning_data is "{unread}": {nearest(unread, known)}')
        else:
            hints = [place(backends[other]) for other in others]
            rows += paired(*place(backend), hints, prompt_of[strategy], problems)
    return rows


def _place(tree: Tree, trees: dict[Path, Tree], name: str, problems: list[Problem]) -> tuple[Tree, Path]:
    """The folder of a backend, which lies in the set's, and its files; those of ``trees`` are walked already."""
    root = Path(os.path.abspath(tree.root))  # noqa: PTH100  # "..", without following links
    if not is_there(root / name, folder=True):
        name = name.replace("\\", "/")  # of a listing made on Windows
    folder = Path(os.path.abspath(root / name))  # noqa: PTH100
    if not folder.is_relative_to(root):
        words = f"lies outside {tree.root}: files are read from inside alone. Move it there, or put a link to it there"
        problems.append(Problem("path escapes", one_line(folder), words))
        return Tree(folder), folder
    folder = tree.root / folder.relative_to(root)
    if folder not in trees and is_there(folder, folder=True):
        trees[folder] = tree_of(folder)
        tree.files += trees[folder].files
        for reason, paths in trees[folder].left_out.items():
            tree.left_out[reason] = sorted({*tree.left_out.get(reason, ()), *paths})
    elif folder not in trees:
        problems.append(Problem("missing folder", one_line(folder), "is named by the data set and is not there"))
    return trees.get(folder) or Tree(folder), folder


def _prompts(
    backend: Mapping[str, Any], problems: list[Problem], home: Path
) -> dict[str, Callable[[Path], str | None]]:
    """Functions that make a picture's prompt, by caption strategy."""
    return {
        "filename": words_of,
        "textfile": lambda picture: caption_beside(picture, problems, home),
        "instanceprompt": lambda picture: str(backend.get("instance_prompt", "")),
    }


def _left_out(where: str, backend: Mapping[str, Any]) -> Iterator[Problem]:
    """Settings of a backend that are not read though they would change the training data."""
    name = f"{where}, {one_line(backend['id'])}"
    if backend.get("dataset_type", "image") not in ("image", "conditioning"):
        return  # caches of text and latents
    if "instance_data_dir" not in backend:
        kind = one_line(backend.get("type", "unknown"))
        words = f"is of type {kind} without instance_data_dir: its pictures are left out"
        yield Problem("other backend", name, words, fatal=False)
    instead = {
        "repeats": "its pictures come as often as others",
        "conditioning": "name a backend of hints by conditioning_data, or an annotator",
    }
    for key, words in instead.items():
        if backend.get(key):
            yield Problem("setting not read", name, f"{key} is not read: {words}", fatal=False)
