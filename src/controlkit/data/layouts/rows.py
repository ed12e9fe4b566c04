"""Rows of a data set's listing, with nothing opened, problems of the listing, and how readers make them."""

import hashlib
import io
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from controlkit import files
from controlkit.decoding import picture_suffixes
from controlkit.errors import Invalid, UserError, nearest, one_line, shortened
from controlkit.files import decode_text, encoding_of
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
MOST_BYTES = 1 << 29
"""Of a file, or of a part of one, that is a picture or a hint."""
MOST_TEXT = 1 << 20
"""Bytes of a caption; letters of a line of a listing."""
MOST_COLUMNS = 1000
"""Columns of a table."""
MOST_PROBLEMS = 10_000
"""Problems of a listing that are told."""


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
        found, known = likely[:1], set(names)
        while likely and (further := f"{likely[0]}_{len(found) + 1}") in known:
            found.append(further)
        return found

    def check(self, names: Sequence[str], where: str) -> None:
        """``Invalid`` where a name was given and is not among these."""
        for kind in sorted(self.given):
            if getattr(self, kind)[0] not in names:
                held = one_line(", ".join(names))
                raise Invalid(f"{where} has no {kind} column {getattr(self, kind)[0]!r}: it has {held}.")


COLUMNS = ("image", "hint", "caption")
"""The parts of a row that may have a name of the set's own."""


@dataclass(frozen=True)
class Held:
    """Bytes that lie somewhere: in a file, a tar, a table."""

    name: str
    read: Callable[..., bytes]
    """Raises ``OSError`` where they cannot be read, or are more than its ``most``."""


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
        text = shortened(f"{self.where}: {self.words}")
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
    return Held(str(path), partial(read_regular, path))


def open_regular(path: Path) -> io.BufferedReader:
    """A regular file opened; ``OSError`` for anything else, such as a pipe or a device, which are not waited for."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = io.open(os.open(path, flags), "rb")  # noqa: UP020, SIM115  # by descriptor
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("it is no regular file")
    return file


def read_regular(path: Path, most: int = MOST_BYTES, offset: int = 0, size: int | None = None) -> bytes:
    """The bytes of a regular file, or ``size`` of them from an offset on; ``OSError`` for more than ``most``, or fewer.

    What a file has is asked before it is read, so that one that only looks short is not read without end.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size if size is None else size
        if size > most:
            raise OSError(f"it has {size:,} bytes: more than {most:,}")
        if offset:
            file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise OSError(f"it has {len(data):,} bytes where it said {size:,}")
    return data


def is_there(path: Path, folder: bool = False) -> bool:
    """Whether there is a regular file, or a folder; a name that no file can have names none."""
    try:
        return path.is_dir() if folder else path.is_file()
    except OSError:
        return False


def is_within(path: Path, folder: Path) -> bool:
    """Whether a file lies in a folder when links are followed, as ``files.inside`` sees it."""
    try:
        return bool(files.inside(folder, path))
    except Invalid:
        return False


def inside(folder: Path, name: Any, problems: list[Problem], links: bool = True) -> Held | None:
    """The file a listing names, if it is there and in the data set's own folder; ``links`` in it may lead anywhere.

    Backslashes, as listings made on Windows have, part folders where no file's name has them.
    """
    where, within = one_line(name), False
    if not isinstance(name, str):
        problems.append(Problem("missing file", where, "is a value of a listing; expected a file's name"))
        return None
    for spelling in dict.fromkeys((name, name.replace("\\", "/"))):
        path = Path(os.path.abspath(folder / spelling))  # noqa: PTH100
        bases = (at(folder) for at in (os.path.abspath, os.path.realpath))  # "..", without following links; and with
        base = next((base for base in bases if path.is_relative_to(base)), None)
        there = base is not None and is_there(path)
        within = base is not None and (not there or links or is_within(path, folder))
        if base and there and within:
            return file_at(folder / path.relative_to(base))
    if within:
        problems.append(Problem("missing file", where, f"is named by the listing and not in {folder}"))
    else:
        words = f"lies outside {folder}: files are read from inside alone. Copy it there, and name it by its path there"
        words += "" if links else " (or save pictures in their table, as `save_to_disk` of the datasets library does)"
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


def text_of(path: Path, problems: list[Problem], home: Path) -> str:
    """The text of a file in the set's folder ``home``; nothing, and a problem, if it is none that can be read."""
    try:
        _check_home(path, home)
        return decode_text(read_regular(path, MOST_TEXT), str(path))
    except (UserError, OSError) as error:
        problems.append(_unread(path, error))
    return ""


def parts_of_text(path: Path, problems: list[Problem], home: Path, ends: str | None) -> Iterator[str]:
    """A text of any length, a line at a time (``ends``: as ``open`` takes it), or with None a piece at a time.

    Where it cannot be read further, a problem says so, and it ends.
    """
    try:
        _check_home(path, home)
        with open_regular(path) as file:
            text = io.TextIOWrapper(file, encoding_of(file.peek(4)[:4]), newline=ends)
            while part := text.read(MOST_TEXT) if ends is None else text.readline(MOST_TEXT + 1):
                if "\0" in part:
                    raise Invalid(f"{path} has zero bytes: expected a text in UTF-8, not a file of another kind.")
                if len(part) > MOST_TEXT:
                    raise Invalid(f"{path} has a line of more than {MOST_TEXT:,} letters: expected a row a line.")
                yield part
    except UnicodeDecodeError:
        problems.append(_unread(path, Invalid(f"{path} is no text in UTF-8: save it as UTF-8.")))
    except (UserError, OSError) as error:
        problems.append(_unread(path, error))


def _check_home(path: Path, home: Path) -> None:
    """``Invalid`` for a text that is a link out of the set's folder: whatever lies there would be taken for a caption.

    A folder may be a link, and a text in it a link to another text in there.
    """
    if path.is_symlink() and not is_within(path, home) and not is_within(path, path.parent):
        raise Invalid(f"{path} is a link out of {home}: texts are read from inside alone. Copy what it leads to there.")


def _unread(path: Path, error: UserError | OSError) -> Problem:
    """The problem of a text that cannot be read."""
    if isinstance(error, OSError):
        return Problem("unreadable file", str(path), f"cannot be read ({error.strerror or error})")
    return Problem("not UTF-8", str(path), str(error).removeprefix(f"{path} "))


def too_many(problems: list[Problem], where: object) -> bool:
    """Whether a listing has so many problems that it is not read further, which is said then."""
    if len(problems) < MOST_PROBLEMS:
        return False
    problems.append(Problem("many problems", str(where), f"has {MOST_PROBLEMS:,} problems: it is not read further"))
    return True


def unequal(rows: Sequence[Row]) -> str:
    """Why these rows are not trained on together, in words: some have more hints than others; "" if all are alike."""
    counts = [len(row.hints) for row in rows]
    if bare := counts.count(0) if any(counts) else 0:
        return f"{bare} of {len(rows)} rows have no hint: expected all to, or none"
    if fewer := sum(count < max(counts) for count in counts):
        return f"{fewer} of {len(rows)} rows have fewer than {max(counts)} hints"
    return ""
