"""A row's picture and hints opened: in one way for the doctor, for training and for a set written anew."""

import hashlib
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle

import numpy as np
from PIL import Image, UnidentifiedImageError

from controlkit.data.layouts.rows import Held, Problem, Row
from controlkit.errors import Invalid, UserError
from controlkit.images import Ground, decode_hint, decode_picture, picture_error, sides_of

MOST_PIXELS = 64_000_000
"""Of a picture that is trained on; a larger one is taken for a mistake, or for an attack."""


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
    array = data.startswith(b"\x93NUMPY")
    kind, words = "unreadable array" if array else "unreadable picture", ""
    try:
        if array and not is_hint:
            words = "is an array: pictures are read from PNG, JPEG or WebP files"
        elif not array and is_hint and held.name.lower().endswith(".npy"):
            kind, words = "unreadable array", "is no .npy file"
        elif not array and (many := _too_many_pixels(data)):
            kind, words = "huge picture", many
        else:
            decode = decode_hint if is_hint else decode_picture
            return _noted(held, data, decode(data, held.name, ground), ground, problems)
    except UserError as error:
        words = str(error).removeprefix(f"{held.name} ").removesuffix(".")
    problems.append(Problem(kind, held.name, words))
    return None


def _too_many_pixels(data: bytes) -> str:
    """Why a picture's file is not decoded, read from its head; "" where it may be."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as opened:
            width, height = opened.size
    except Image.DecompressionBombError as error:
        return f"{picture_error(error)}: write it anew, or take it out"
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return ""  # decoding says what it is
    return f"is {width}x{height}: more than {MOST_PIXELS:,} pixels" if width * height > MOST_PIXELS else ""


def _noted(held: Held, data: bytes, picture: np.ndarray, ground: Ground, problems: list[Problem]) -> np.ndarray:
    """The same, with notes on what a picture's file has that is not as it is read."""
    if data.startswith(b"\x93NUMPY"):
        return picture
    with Image.open(io.BytesIO(data)) as opened:  # the header alone
        mode = "I;16" if opened.mode.startswith("I;16") else opened.mode
        clear = opened.has_transparency_data and mode != "I;16"  # of which no transparency is read
        if clear and opened.convert("RGBA").getchannel("A").getextrema() != (255, 255):
            words = f"laid on {ground}" if ground else "masked there"
            problems.append(Problem("transparency", held.name, f"is transparent in places: {words}", fatal=False))
    read_as = {
        "P": ("palette", "has a palette: read as its colours, not as numbers of labels"),
        "CMYK": ("CMYK", "is in CMYK: read as RGB without its profile, colours may shift"),
        "I;16": ("16 bits", "has 16 bits a sample: read as 8"),
    }
    if mode in read_as and picture.dtype == np.uint8:
        kind, words = read_as[mode]
        problems.append(Problem(kind, held.name, words, fatal=False))
    return picture


def _beside(held: Held, picture: np.ndarray, hint: np.ndarray) -> Iterator[Problem]:
    """Problems of a hint's size compared with its picture's: both are cut alike only if they have one shape."""
    (height, width), (high, wide) = picture.shape[:2], hint.shape[:2]
    words = f"is {wide}x{high}, its picture {width}x{height}"
    if abs(width / height - wide / high) > 0.02 * width / height:
        yield Problem("sizes differ", held.name, f"{words}: not of one shape, so not in place")
    elif (height, width) != (high, wide):
        yield Problem("sizes differ", held.name, f"{words}: it will be scaled", fatal=False)
