"""Jobs: many pictures to make, as requests in a file's lines or as a folder's pictures, and how they are grouped."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from controlkit.decoding import picture_suffixes
from controlkit.errors import Invalid, NotFound, UserError, one_line
from controlkit.files import inside, is_leftover, parse_json, read_text
from controlkit.sample.request import Request

EACH = Path("<each picture>")
"""In a template: the place of the picture that each job has for itself."""
BATCH = 16
"""Pictures made together, at most."""

_MOST_JOBS = 100_000
_LONGEST_LINE = 2**24
_LONGEST_PROMPT = 2**17
_LONGEST_NAME = 200
_OWN = {"prompt": "", "negative_prompt": None, "seed": 0, "variation": 0.0, "variation_seed": 0}
"""What pictures that are made together may each have of their own, beside their files."""
_FORBIDDEN = set('/\\:*?"<>|')
"""Letters that some system's names of files cannot have."""


@dataclass(frozen=True)
class Job:
    """One picture to make."""

    name: str
    """Of its file, without the ending."""
    where: str
    """The line or the picture that it comes from, for errors."""
    text: str
    """Its request as JSON, with paths that begin at the root; pictures within it take room only while it is used."""

    @property
    def request(self) -> Request:
        """Its request, read anew each time."""
        return Request.from_json(self.text)


class Faults:
    """Errors of several jobs: all are looked for, then the first is raised, with the number of the others."""

    def __init__(self) -> None:
        self.found: list[tuple[str, UserError]] = []

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """Within it an error is kept, with the place of the job."""
        try:
            yield
        except UserError as error:
            self.found.append((where, error))

    def settle(self) -> None:
        """Raise the first, if there is any."""
        if not self.found:
            return
        (where, error), *others = self.found
        more = f" Errors besides this one: {len(others)}, the next at {others[0][0]}." if others else ""
        raise type(error)(f"{where}: {error}{more}") from error


def read_jobs(path: Path, template: Request) -> list[Job]:
    """The jobs that a file or a folder asks for, in its order; pictures are not opened.

    A file has a request as JSON on each line; its keys go before the template's, ``name`` is the picture's, and paths
    of pictures begin at the file's folder. Of a folder each picture is a job: the template's, in which the picture is
    put wherever it has ``EACH`` and into controls that have none; a text file beside it, ``NAME.txt``, is its prompt.

    Raises ``NotFound`` where there is none; ``Invalid`` for lines that are wrong, named by number, and for names that
    no file can have or that are given twice.
    """
    faults = Faults()
    if path.is_dir():
        found = _of_folder(path, template, faults)
    elif path.is_file():
        found = _of_lines(path, template, faults)
    else:
        raise NotFound(f"There are no jobs at {path}: expected a file with a request on each line, or a folder.")
    faults.settle()
    if not 0 < len(found) <= _MOST_JOBS:
        raise Invalid(f"{path} asks for {len(found):,} pictures; expected 1 to {_MOST_JOBS:,}.")
    return found


def _of_lines(path: Path, template: Request, faults: Faults) -> list[Job]:
    found, names = list[Job](), dict[str, str]()
    shared = {name: getattr(template, name) for name in Request.model_fields}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        with faults.at(where := f"{path}, line {number}"):
            if len(line) > _LONGEST_LINE:
                raise Invalid(f"it has {len(line):,} letters; expected at most {_LONGEST_LINE:,}.")
            values = parse_json(line, "the line")
            if not isinstance(values, dict):
                raise Invalid(f"the line holds a {type(values).__name__}; expected keys and values of a Request.")
            name = values.pop("name", f"{number:05}")
            if not isinstance(name, str):
                raise Invalid(f'"name" is {one_line(repr(name))}; expected a text.')
            asked = Request(**shared | values)
            own = {key: with_sources(getattr(asked, key), partial(_below, path.parent)) for key in values}
            text = _rooted(asked.model_copy(update=own)).to_json()
            _check_name(name := name.removesuffix(".png"), where, names)
            found.append(Job(name, where, text))
    return found


def _of_folder(folder: Path, template: Request, faults: Faults) -> list[Job]:
    suffixes = picture_suffixes()
    pictures = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes]
    pictures = [path for path in pictures if path.is_file() and not is_leftover(path.name)]
    if not pictures:
        raise NotFound(f"There are no pictures in {folder}: expected some ({', '.join(suffixes)}).")
    filled = [one if one.images else one.model_copy(update={"images": {"": EACH}}) for one in template.controls]
    template = template.model_copy(update={"controls": tuple(filled)})
    found, names = list[Job](), dict[str, str]()
    for path in pictures:
        with faults.at(str(path)):
            asked: Request = with_sources(template, partial(_put, path))
            if asked == template:
                raise Invalid("No control takes the pictures of the folder: give one without a picture of its own.")
            beside = path.with_suffix(".txt")
            if beside.is_file():
                prompt = " ".join(read_text(inside(folder, beside), _LONGEST_PROMPT).split())
                asked = Request(**{name: getattr(asked, name) for name in Request.model_fields} | {"prompt": prompt})
            _check_name(path.stem, str(path), names)
            found.append(Job(path.stem, str(path), _rooted(asked).to_json()))
    return found


def with_sources(value: Any, change: Callable[[Path | np.ndarray], Any]) -> Any:
    """A request, or a part of one, with each of its pictures (a path or an array) as ``change`` gives it."""
    if isinstance(value, Path | np.ndarray):
        return change(value)
    if isinstance(value, BaseModel):
        fields = {name: with_sources(getattr(value, name), change) for name in type(value).model_fields}
        return value.model_copy(update=fields)
    if isinstance(value, Mapping):
        return {key: with_sources(one, change) for key, one in value.items()}
    return tuple(with_sources(one, change) for one in value) if isinstance(value, tuple) else value


def _put(picture: Path, source: Path | np.ndarray) -> Path | np.ndarray:
    return picture if isinstance(source, Path) and source == EACH else source


def _below(folder: Path, source: Path | np.ndarray) -> Path | np.ndarray:
    return folder / source if isinstance(source, Path) else source


def _rooted(request: Request) -> Request:
    """The request with paths that hold in any folder."""
    found: Request = with_sources(request, lambda source: source.absolute() if isinstance(source, Path) else source)
    return found


def _check_name(name: str, where: str, first: dict[str, str]) -> None:
    """``Invalid`` for a name that no file can have, or that is in ``first``: names and where they were given.

    In letters of any case, as some disks take them.
    """
    short = one_line(name)
    fits = name.isprintable() and not _FORBIDDEN & {*name} and len(name.encode(errors="replace")) <= _LONGEST_NAME
    if not (fits and name and name.strip() == name and not name.startswith(".")):
        raise Invalid(f'the name "{short}" is none that every disk can have: take letters, digits, "-" and "_".')
    if (other := first.setdefault(name.casefold(), where)) != where:
        raise Invalid(f'the name "{short}" is that of {other}, too: give each its own.')


def likeness(request: Request) -> tuple[str, str, str]:
    """(the controls that it loads, what pictures made together share, what pictures that are alike share), as texts.

    Requests that are alike differ in prompts, seeds and pictures alone; see ``Prepared.is_like`` and ``goes_with``.
    """
    loaded = json.dumps([(one.name, one.annotator) for one in request.controls])
    shared = with_sources(request, lambda source: EACH).model_copy(update=_OWN).to_json()
    apart = request.tile or request.hires or request.speed != "exact"
    return loaded, shared if apart else json.dumps(request.size), shared


def groups_of(jobs: Sequence[Job], most: int = BATCH) -> list[list[Job]]:
    """Jobs that are alike, at most so many together; those with the same controls one after another, so that each is
    loaded once."""
    rows: dict[str, dict[str, list[Job]]] = {}
    for job in jobs:
        loaded, _, shared = likeness(job.request)
        rows.setdefault(loaded, {}).setdefault(shared, []).append(job)
    alike = [row for same in rows.values() for row in same.values()]
    return [row[first : first + most] for row in alike for first in range(0, len(row), most)]
