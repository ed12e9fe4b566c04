"""A row's picture and hints opened: in one way for the doctor, for training and for a set written anew."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle

import numpy as np

from controlkit.data.layouts.rows import Held, Problem, Row
from controlkit.decoding import Ground, Picture, TooLarge, is_array, open_array, open_picture, sides_of
from controlkit.errors import Invalid, UserError


@dataclass
class Opened:
    """A row's picture, uint8 (H, W, 3), and hints; None what cannot be read, for a reason among ``problems``."""

    picture: np.ndarray | None = None
    hints: list[np.ndarray | None] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    digest: str = ""
    """Of the picture's file."""

    def sound(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Picture and hints; ``Invalid`` for the first fatal problem."""
        if fatal := next((problem for problem in self.problems if problem.fatal), None):
            raise Invalid(f"{fatal.where} {fatal.words}. `controlkit data doctor` lists all such files.")
        assert self.picture is not None
        return self.picture, [hint for hint in self.hints if hint is not None]


def open_row(row: Row, grounds: Sequence[Ground] = ("black",)) -> Opened:
    """Open a row's files and hold its hints against its picture. ``grounds``: of each hint, from the first
    on again where there are more (``annotators.grounds_of``).
    """
    opened = Opened()
    data = bytes_of(row.picture, opened.problems)
    opened.digest = hashlib.sha256(data).hexdigest() if data else ""
    opened.picture = _decoded(row.picture, data, opened.problems)
    for held, ground in zip(row.hints, cycle(grounds), strict=False):
        hint = _decoded(held, bytes_of(held, opened.problems), opened.problems, True, ground)
        opened.hints.append(hint)
        if hint is not None and opened.picture is not None:
            opened.problems += _beside(held, opened.picture, hint)
    return opened


def sides_of_row(row: Row) -> tuple[int, int]:
    """(height, width) of a row's picture, which is not decoded for it; ``Invalid`` where it cannot be read."""
    opened = Opened()
    data = bytes_of(row.picture, opened.problems)
    if not data:
        opened.sound()
    return sides_of(data, row.picture.name)


def bytes_of(held: Held, problems: list[Problem]) -> bytes:
    """A file's bytes; none, and a problem, where it has none or cannot be read."""
    try:
        data = held.read()
    except OSError as error:
        problems.append(Problem("unreadable file", held.name, f"cannot be read ({error.strerror or error})"))
        return b""
    if not data:
        problems.append(Problem("empty file", held.name, "has no bytes: write it anew, or take it out"))
    return data


def _decoded(
    held: Held, data: bytes, problems: list[Problem], is_hint: bool = False, ground: Ground = "white"
) -> np.ndarray | None:
    """The array in a file's bytes; None, with a problem, where it is none; with notes on how it is read."""
    if not data:
        return None
    kind, words = "unreadable array" if is_array(data) else "unreadable picture", ""
    try:
        if is_array(data) and is_hint:
            return open_array(data, held.name, ground)
        if is_array(data):
            words = "is an array: pictures are read from PNG, JPEG or WebP files"
        elif is_hint and held.name.lower().endswith(".npy"):
            kind, words = "unreadable array", "is no .npy file"
        else:
            return _noted(held, open_picture(data, held.name, ground, deep=is_hint), ground, problems)
    except UserError as error:
        kind = "huge picture" if isinstance(error, TooLarge) else kind
        words = str(error).removeprefix(f"{held.name} ").removesuffix(".")
    problems.append(Problem(kind, held.name, words))
    return None


def _noted(held: Held, picture: Picture, ground: Ground, problems: list[Problem]) -> np.ndarray:
    """Its pixels, with notes on what a picture's file has that is not as it is read."""
    if picture.clear:
        words = f"laid on {ground}" if ground else "masked there"
        problems.append(Problem("transparency", held.name, f"is transparent in places: {words}", fatal=False))
    read_as = {
        "P": ("palette", "has a palette: read as its colours, not as numbers of labels"),
        "CMYK": ("CMYK", "is in CMYK: read as RGB without its profile, colours may shift"),
        "I;16": ("16 bits", "has 16 bits a sample: read as 8"),
    }
    if picture.mode in read_as and picture.pixels.dtype == np.uint8:
        kind, words = read_as[picture.mode]
        problems.append(Problem(kind, held.name, words, fatal=False))
    return picture.pixels


def _beside(held: Held, picture: np.ndarray, hint: np.ndarray) -> Iterator[Problem]:
    """Problems of a hint's size compared with its picture's: both are cut alike only if they have one shape."""
    (height, width), (high, wide) = picture.shape[:2], hint.shape[:2]
    words = f"is {wide}x{high}, its picture {width}x{height}"
    if abs(width / height - wide / high) > 0.02 * width / height:
        yield Problem("sizes differ", held.name, f"{words}: not of one shape, so not in place")
    elif (height, width) != (high, wide):
        yield Problem("sizes differ", held.name, f"{words}: it will be scaled", fatal=False)
