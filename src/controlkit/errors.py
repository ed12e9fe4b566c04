"""The errors a user sees: a sentence that says what came, what was expected and what to do.

The library raises them; the command line prints them without a traceback and exits with code 2; a server maps their
kinds to its status codes.
"""

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what to do about it. Always one of the kinds below."""


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


def nearest(word: str, known: Iterable[str]) -> str:
    """A phrase that names the closest known words: ``did you mean "steps"? Known: ...``."""
    options = sorted(known)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    guess = f'did you mean "{close[0]}"? ' if close else ""
    return f"{guess}Known: {', '.join(options) or 'none'}."


def first_fault(error: "ValidationError", owner: str, known: Iterable[str]) -> str:
    """The first fault that pydantic found in what ``owner`` was given, as a sentence; ``known``: the owner's keys."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"] if part != "")
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


def one_line(text: object) -> str:
    """Another program's words, fit for a sentence of ours: one line, at most 200 letters, no control characters."""
    kept = " ".join(str(text).split())[:200]
    return "".join(letter if letter.isprintable() else "?" for letter in kept)
