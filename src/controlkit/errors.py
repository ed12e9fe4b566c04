"""The one error a user sees: a sentence that says what was expected, what came and what to do.

The command line prints it without a traceback and exits with code 2; the library raises it.
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what to do about it."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A phrase that names the closest known words: ``did you mean "steps"? Known: ...``."""
    options = sorted(known)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    guess = f'did you mean "{close[0]}"? ' if close else ""
    return f"{guess}Known: {', '.join(options)}."


def one_line(text: object) -> str:
    """What may stand in a sentence of ours of another's words: one line, not long, nothing a terminal obeys."""
    kept = " ".join(str(text).split())[:200]
    return "".join(letter if letter.isprintable() else "?" for letter in kept)
