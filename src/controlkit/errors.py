"""The errors a user sees: a sentence that says what came, what was expected and what to do.

The library raises them; the command line prints them without a traceback and exits with code 2; a server maps their
kinds to its status codes.
"""

import difflib
import re
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what to do about it. Always one of the kinds below.

    The message is one printable line, and words longer than any name of ours are cut: it may quote any file.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(shortened(message)))


class NotFound(UserError):  # noqa: N818  # read as kinds of UserError
    """A file, folder, name or package that is not there."""


class Invalid(UserError):  # noqa: N818
    """A value, file or setting that is not as it must be."""


class Mismatch(UserError):  # noqa: N818
    """Two things that do not belong together, such as a control and a base of another shape."""


class Unsupported(UserError):  # noqa: N818
    """Something recognised, or asked for, that cannot be done here."""


class OutOfRoom(UserError):  # noqa: N818
    """Memory, of the machine or its GPU, or disk that does not hold what was asked for."""


def shortened(text: str) -> str:
    """A sentence whose words of over 300 letters are cut in the middle: a file may hold names of any length."""
    return re.sub(r"\S{301,}", lambda word: f"{word[0][:200]}...{word[0][-60:]}", text)


def nearest(word: str, known: Iterable[str]) -> str:
    """A phrase that names the closest known words: ``did you mean "steps"? Known: ...``."""
    options = sorted(known)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    guess = f'did you mean "{close[0]}"? ' if close else ""
    return f"{guess}Known: {', '.join(options) or 'none'}."


def first_fault(error: "ValidationError", owner: str, known: Iterable[str]) -> str:
    """The first fault that pydantic found in what ``owner`` was given, as a sentence; ``known``: the owner's keys."""
    first = error.errors()[0]
    name = one_line(".".join(str(part) for part in first["loc"] if part != ""))
    inner = first.get("ctx", {}).get("error")
    if first["type"] == "extra_forbidden":
        return f'{owner} has no "{name}": {nearest(name, known)}'
    if isinstance(inner, UserError):  # a whole sentence, of a value within this one
        return f"{name}: {inner}"
    if isinstance(inner, Exception):
        quoted = f'"{name}" is ' if name else ""
        return f"{owner}: {quoted}{str(inner).rstrip('.')}."
    found = "missing" if first["type"] == "missing" else repr(first["input"])[:80]
    return f'{owner}: "{name}" is {found}; expected {first["msg"].removeprefix("Input should be ")}.'


LINE = 4000
"""The most letters of a line that is printed: more than any sentence of ours, and less than a flood."""
_MARKS = 4
"""Marks that one letter may carry: no script stacks more, and towers of them cover the lines above."""
_BLANK = "\u115f\u1160\u3164\uffa0\u2800"
"""Letters that show nothing."""


def printable(text: object, most: int | None = LINE) -> str:
    """Words from anywhere, fit for a terminal or a page: one line of at most ``most`` letters (None: of any length).

    Spaces and ends of lines of all kinds become spaces. What controls a terminal, turns the direction of writing, is
    invisible or no letter becomes a question mark; marks beyond the fourth of a letter are left out. Markup is left as
    it is: whoever prints shows it as letters.
    """
    found = str(text)
    if most is not None and len(found) > most:
        found = f"{found[:most]}..."
    if found.isascii() and found.isprintable():
        return found
    kept, marks = list[str](), 0
    for letter in found:
        marks = marks + 1 if unicodedata.category(letter) in ("Mn", "Me") else 0
        if marks <= _MARKS:
            shown = letter.isprintable() and letter not in _BLANK
            kept.append(" " if letter.isspace() else letter if shown else "?")
    return "".join(kept)


def one_line(text: object) -> str:
    """Another program's words, quoted in a sentence of ours: ``printable``, and at most 200 letters."""
    return printable(" ".join(str(text)[:2000].split()), 200)
