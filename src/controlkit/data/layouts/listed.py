"""Sets with a listing: the original's ``prompt.json``, ``metadata`` files, SimpleTuner's backends."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from controlkit.data.layouts.folders import caption_beside, paired, pictures_in, words_of
from controlkit.data.layouts.rows import (
    HINT_SUFFIXES,
    Names,
    Problem,
    Row,
    file_at,
    inside,
    one_of,
    text_of,
    wording,
)
from controlkit.errors import Invalid, nearest


def prompt_json(folder: Path, problems: list[Problem], names: Names) -> list[Row] | None:
    """The original repository's ``prompt.json``."""
    listing = folder / "prompt.json"
    if not listing.is_file():
        return None
    rows = []
    for where, values in _json_lines(listing, problems):
        if absent := [key for key in ("source", "target", "prompt") if not isinstance(values.get(key), str)]:
            words = f'lacks "{absent[0]}"; expected "source", "target" and "prompt" in a JSON object a line'
            problems.append(Problem("unreadable line", where, words))
            continue
        hint, picture = (inside(folder, values[key], problems) for key in ("source", "target"))
        if hint and picture:
            rows.append(Row(picture, values["prompt"], (hint,)))
    problems += _unnamed(folder, rows, problems)
    return rows


def metadata(folder: Path, problems: list[Problem], names: Names) -> list[Row] | None:
    """``metadata.jsonl``, ``.csv`` or ``.json`` (a list), in the folder itself or in ``train/``; paths from where it
    lies."""
    suffixes = (".jsonl", ".csv", ".json")
    places = [base / f"metadata{suffix}" for base in (folder, folder / "train") for suffix in suffixes]
    listing = next((path for path in places if path.is_file()), None)
    if listing is None or (listing.suffix == ".json" and not listing.read_bytes().lstrip().startswith(b"[")):
        return None  # a JSON object of that name is about something else
    rows = []
    for number, (where, values) in enumerate(_entries(listing, problems)):
        if not number:
            names.check(list(values), where)
        named = one_of(values, names.image)
        hinted = [str(values[name]) for name in names.hints([key for key in values if values[key] not in (None, "")])]
        if not isinstance(named, str):
            words = f"names no picture; expected one of {', '.join(names.image)}"
            problems.append(Problem("unreadable line", where, words))
            continue
        picture = inside(listing.parent, named, problems)
        others = [inside(listing.parent, name, problems) for name in hinted]
        if picture and all(others):
            rows.append(Row(picture, wording(one_of(values, names.caption), number), tuple(filter(None, others))))
    problems += _unnamed(listing.parent, rows, problems)
    if hints := sum(bool(row.hints) for row in rows):
        for row in rows:
            if not row.hints:
                problems.append(Problem("missing hint", row.picture.name, f"has no hint, and {hints} others have"))
        rows = [row for row in rows if row.hints]
    return rows


def _unnamed(folder: Path, rows: Sequence[Row], problems: Sequence[Problem]) -> list[Problem]:
    """Pictures beside a listing that it does not name; none where it is broken, and may have meant to."""
    if any(problem.fatal for problem in problems):
        return []
    named = {held.name for row in rows for held in (row.picture, *row.hints)}
    extra = [path for path in map(str, pictures_in(folder, HINT_SUFFIXES)) if path not in named]
    more = f", and {len(extra) - 1} more like it" if len(extra) > 1 else ""
    return (
        [Problem("extra file", extra[0], f"is not named by the listing{more}: not read", fatal=False)] if extra else []
    )


def _entries(listing: Path, problems: list[Problem]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The values a listing has for each picture, and where they stand."""
    if listing.suffix == ".jsonl":
        yield from _json_lines(listing, problems)
    elif listing.suffix == ".csv":
        lines = csv.DictReader(io.StringIO(text_of(listing, problems), newline=""))
        for values in lines:
            where = f"{listing}, line {lines.line_num}"
            if None in values:  # where the rest of a line goes
                words = "has more fields than the first line: a caption with commas stands in quotes"
                problems.append(Problem("unreadable line", where, words))
            else:
                yield where, values
    else:
        try:
            listed = json.loads(text_of(listing, problems) or "[]")
        except ValueError as error:
            problems.append(Problem("unreadable file", str(listing), f"is no JSON ({error})"))
            return
        for place, values in enumerate(listed):
            if isinstance(values, dict):
                yield f"{listing}, entry {place}", values
            else:
                words = f"holds a {type(values).__name__}; expected a list of JSON objects"
                problems.append(Problem("unreadable line", f"{listing}, entry {place}", words))


def _json_lines(path: Path, problems: list[Problem]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON lines, and where each stands."""
    for number, line in enumerate(text_of(path, problems).split("\n"), 1):  # captions may hold other ends of lines
        if line.strip():
            where = f"{path}, line {number}"
            try:
                values = json.loads(line)
                reason = f"holds a {type(values).__name__}"
            except ValueError as error:
                values, reason = None, f"is no JSON ({error})"
            if isinstance(values, dict):
                yield where, values
            else:
                problems.append(Problem("unreadable line", where, f"{reason}; expected a JSON object a line"))


def simpletuner(folder: Path, problems: list[Problem], names: Names) -> list[Row] | None:
    """``multidatabackend.json``: backends of pictures with ``conditioning_data``, the id of a backend of hints.

    ``Invalid`` for a file that cannot be read, or an unknown caption strategy or id.
    """
    path = folder / "multidatabackend.json"
    if not path.is_file():
        return None
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        backends = {one["id"]: one for one in listed if not one.get("disabled")}
        local = [one for one in backends.values() if "instance_data_dir" in one]
        for one in backends.values():
            problems += _left_out(str(path), one)
        pictures = [one for one in local if one.get("dataset_type", "image") == "image"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Invalid(f"{path} cannot be read ({error!r}): expected a list of backends, each with an id.") from error

    def place(backend: Mapping[str, Any]) -> Path:
        return folder / str(backend["instance_data_dir"])

    rows: list[Row] = []
    for backend in pictures:
        strategy = backend.get("caption_strategy", "filename")
        prompts: dict[str, Callable[[Path], str | None]] = {
            "filename": words_of,
            "textfile": lambda picture: caption_beside(picture, problems),
            "instanceprompt": partial(_fixed_prompt, str(backend.get("instance_prompt", ""))),
        }
        if strategy not in prompts:
            raise Invalid(f'{path}: caption_strategy is "{strategy}": {nearest(strategy, prompts)}')
        named_hints = backend.get("conditioning_data")
        others = named_hints if isinstance(named_hints, list) else [named_hints]
        if named_hints is None:
            named = strategy == "filename"
            rows += [Row(file_at(p), prompts[strategy](p) or "", named=named) for p in pictures_in(place(backend))]
        elif unknown := [other for other in others if other not in backends]:
            raise Invalid(f'{path}: conditioning_data is "{unknown[0]}": {nearest(str(unknown[0]), backends)}')
        else:
            hints = [place(backends[other]) for other in others]
            rows += paired(place(backend), hints, prompts[strategy], problems)
    return rows


def _fixed_prompt(prompt: str, path: Path) -> str:
    return prompt


def _left_out(where: str, backend: Mapping[str, Any]) -> Iterator[Problem]:
    """Settings of a backend that are not read though they would change the training data."""
    name = f"{where}, {backend['id']}"
    if backend.get("dataset_type", "image") not in ("image", "conditioning"):
        return  # caches of text and latents
    if "instance_data_dir" not in backend:
        words = f"is of type {backend.get('type', 'unknown')} without instance_data_dir: its pictures are left out"
        yield Problem("other backend", name, words, fatal=False)
    instead = {
        "repeats": "its pictures come as often as others",
        "conditioning": "name a backend of hints by conditioning_data, or an annotator",
    }
    for key, words in instead.items():
        if backend.get(key):
            yield Problem("setting not read", name, f"{key} is not read: {words}", fatal=False)
