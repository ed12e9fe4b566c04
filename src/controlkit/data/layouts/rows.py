"""Rows of a data set's listing, with nothing opened, problems of the listing, and how readers make them."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from controlkit.decoding import picture_suffixes
from controlkit.errors import Invalid, UserError, nearest, one_line
from controlkit.files import read_text
from controlkit.seeds import numpy_rng

SUFFIXES = picture_suffixes()
"""Of files that are taken for pictures."""
HINT_SUFFIXES = (*SUFFIXES, ".npy")
"""Of files that are taken for hints."""
PICTURE_NAMES = ("image", "file_name", "image_file_name", "jpg", "picture")
HINT_NAMES = (
    "conditioning_image", "conditioning_image_file_name", "controlnet_image", "control_image", "conditioning",
    "control", "hint",
)  # fmt: skip
CAPTION_NAMES = ("text", "prompt", "caption")


@dataclass(frozen=True)
class Names:
    """The names of picture, hint and caption in columns and keys; the first that is found is used.

    A hint may also be called ``control_`` and something (ControlNet++), unless the name is ``given``. Further hints of
    a row have that name with ``_2``, ``_3`` after it.
    """

    image: Sequence[str] = PICTURE_NAMES
    hint: Sequence[str] = HINT_NAMES
    caption: Sequence[str] = CAPTION_NAMES
    given: frozenset[str] = frozenset()
    """Which of the three are not usual names but a set's own."""

    @classmethod
    def of(cls, columns: Mapping[str, str]) -> "Names":
        """With a set's own names for ``image``, ``hint`` or ``caption``; ``Invalid`` for another part."""
        if unknown := [kind for kind in columns if kind not in COLUMNS]:
            raise Invalid(f'A row has no "{unknown[0]}" to be named: {nearest(unknown[0], COLUMNS)}')
        return cls(**{kind: (name,) for kind, name in columns.items()}, given=frozenset(columns))

    def hints(self, names: Sequence[str]) -> list[str]:
        """Those of these names that mean hints: the likeliest, and its name with ``_2`` and so on after it."""
        likely = [name for name in self.hint if name in names]
        likely += [name for name in names if name.startswith("control_") and "hint" not in self.given]
        found = likely[:1]
        while likely and (further := f"{likely[0]}_{len(found) + 1}") in names:
            found.append(further)
        return found

    def check(self, names: Sequence[str], where: str) -> None:
        """``Invalid`` where a name was given and is not among these."""
        for kind in sorted(self.given):
            if getattr(self, kind)[0] not in names:
                raise Invalid(f"{where} has no {kind} column {getattr(self, kind)[0]!r}: it has {', '.join(names)}.")


COLUMNS = ("image", "hint", "caption")
"""The parts of a row that may have a name of the set's own."""


@dataclass(frozen=True)
class Held:
    """Bytes that lie somewhere: in a file, a tar, a table."""

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Row:
    """A pair as its data set lists it, with nothing opened."""

    picture: Held
    prompt: str
    hints: tuple[Held, ...] = ()
    """Each of a kind of its own, in order."""
    named: bool = False
    """The prompt is what the picture's file is called; nobody wrote a caption."""


@dataclass(frozen=True)
class Problem:
    """Something wrong with a data set: its kind, where, and what to do. With a ``fatal`` one, nothing trains on it."""

    kind: str
    where: str
    words: str
    fatal: bool = True

    def __str__(self) -> str:
        text = f"{self.where}: {self.words}"
        return text.encode("utf-8", "replace").decode()  # names of files may be bytes that are no text


@dataclass(frozen=True)
class Listing:
    """A data set's rows, by what layout they were read, and what is wrong with the listing."""

    layout: str
    rows: list[Row]
    problems: list[Problem] = field(default_factory=list)


def rows_digest(rows: Sequence[Row]) -> str:
    """The digest of rows' names and prompts, in their order."""
    text = json.dumps([[Path(row.picture.name).name, row.prompt] for row in rows])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def json_lines(entries: Iterable[Mapping[str, Any]]) -> bytes:
    """A file of JSON lines."""
    return "".join(f"{json.dumps(entry)}\n" for entry in entries).encode()


def file_at(path: Path) -> Held:
    """A file's bytes, when they are asked for."""
    return Held(str(path), path.read_bytes)


def is_there(path: Path, folder: bool = False) -> bool:
    """Whether there is a regular file, or a folder; a name that no file can have names none."""
    try:
        return path.is_dir() if folder else path.is_file()
    except OSError:
        return False


def inside(folder: Path, name: Any, problems: list[Problem]) -> Held | None:
    """The file a listing names, if it is there and in the data set's own folder; a link in it may lead anywhere.

    Backslashes, as listings made on Windows have, part folders where no file's name has them.
    """
    where = one_line(name)
    if not isinstance(name, str):
        problems.append(Problem("missing file", where, "is a value of a listing; expected a file's name"))
        return None
    bases = [Path(os.path.abspath(folder)), folder.resolve()]  # noqa: PTH100  # "..", without following links
    for spelling in dict.fromkeys((name, name.replace("\\", "/"))):
        path = Path(os.path.abspath(folder / spelling))  # noqa: PTH100
        base = next((base for base in bases if path.is_relative_to(base)), None)
        if base and is_there(path):
            return file_at(folder / path.relative_to(base))
    if base:
        problems.append(Problem("missing file", where, f"is named by the listing and not in {folder}"))
    else:
        words = f"lies outside {folder}; a listing may name what is inside alone"
        problems.append(Problem("path escapes", where, words))
    return None


def one_of(values: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The value of the first of these names that has one."""
    return next((values[name] for name in names if values.get(name) not in (None, "")), None)


def wording(captions: Any, place: int) -> str:
    """One caption of those a row has; the same one each time it is read. What is no text or number is none."""
    if isinstance(captions, list):
        captions = captions[int(numpy_rng("caption", place).integers(len(captions)))] if captions else ""
    return str(captions) if isinstance(captions, str | int | float) and captions == captions else ""  # nan is none


def text_of(path: Path, problems: list[Problem]) -> str:
    """A file's text; nothing, and a problem, if it is none that can be read."""
    try:
        return read_text(path)
    except UserError as error:
        problems.append(Problem("not UTF-8", str(path), str(error).removeprefix(f"{path} ")))
    except OSError as error:
        problems.append(Problem("unreadable file", str(path), f"cannot be read ({error.strerror or error})"))
    return ""


def unequal(rows: Sequence[Row]) -> str:
    """Why these rows are not trained on together, in words: some have more hints than others; "" if all are alike."""
    counts = [len(row.hints) for row in rows]
    if bare := counts.count(0) if any(counts) else 0:
        return f"{bare} of {len(rows)} rows have no hint: expected all to, or none"
    if fewer := sum(count < max(counts) for count in counts):
        return f"{fewer} of {len(rows)} rows have fewer than {max(counts)} hints"
    return ""
