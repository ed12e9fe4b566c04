"""Weights of words: ``(word:1.2)`` as A1111 and as ComfyUI read it, and ``<lora:name:0.8>``.

Written from their documentation and published examples.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby

from controlkit.errors import Invalid

MOST_WEIGHT = 1000.0


@dataclass(frozen=True)
class Piece:
    """Words of one weight."""

    text: str
    weight: float = 1.0
    breaks: bool = False
    """No words, but the end of a window of the text encoder (A1111's ``BREAK``)."""


_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_A1111 = re.compile(rf"\\[()\[\]\\]|\\|\(|\[|:\s*(?P<weight>{_NUMBER})\s*\)|\)|\]|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


def a1111_pieces(text: str) -> list[Piece]:
    r"""The words of a prompt with their weights, as A1111 reads them.

    ``(word)`` is 1.1 times, ``[word]`` a 1.1th, ``(word:1.2)`` 1.2 times; brackets in brackets multiply. ``\(`` is a
    bracket as a letter. A bracket that is never closed holds to the end; one that was never opened is a letter. Raises
    ``Invalid`` for weights beyond ``MOST_WEIGHT``.
    """
    pieces: list[Piece] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        pieces[start:] = [one if one.breaks else replace(one, weight=one.weight * factor) for one in pieces[start:]]

    for found in _A1111.finditer(text):
        sign = found.group()
        if sign in opened:
            opened[sign].append(len(pieces))
        elif found["weight"] and opened["("]:
            weigh("(", float(found["weight"]))
        elif sign == ")" and opened["("]:
            weigh("(", 1.1)
        elif sign == "]" and opened["["]:
            weigh("[", 1 / 1.1)
        else:
            parts = [sign[1:]] if sign.startswith("\\") else _BREAK.split(sign)
            for i, part in enumerate(parts):
                pieces += [Piece("", breaks=True)] * (i > 0) + [Piece(part)]
    while opened["("]:
        weigh("(", 1.1)
    while opened["["]:
        weigh("[", 1 / 1.1)
    return _joined(pieces)


def comfy_pieces(text: str) -> list[Piece]:
    r"""The words of a prompt with their weights, as ComfyUI reads them.

    ``(word)`` is 1.1 times the weight around it; ``(word:1.2)`` is 1.2, whatever is around it. ``\(`` is a bracket as a
    letter. A bracket without its partner is a letter. Raises ``Invalid`` for weights beyond ``MOST_WEIGHT``.
    """
    found = re.findall(r"\\[()]|[()]|[^\\()]+|\\", text)
    partner, opened = {}, []
    for place, sign in enumerate(found):
        if sign == "(":
            opened.append(place)
        elif sign == ")" and opened:
            partner[opened.pop()] = place
    closed = set(partner.values())
    given: dict[int, float | None] = {}  # by the place of a bracket, the weight that is written at its end
    for start, end in partner.items():
        words, _, number = found[end - 1].rpartition(":")
        written = end - 1 > start and (words or end - 2 > start) and re.fullmatch(rf"\s*{_NUMBER}\s*", number)
        given[start] = float(number) if written else None
        if written:
            found[end - 1] = words
    pieces, around = [], [1.0]
    for place, sign in enumerate(found):
        if place in partner:
            around.append(around[-1] * 1.1 if given[place] is None else given[place] or 0.0)
        elif place in closed:
            around.pop()
        else:
            pieces.append(Piece(sign[1:] if sign in ("\\(", "\\)") else sign, around[-1]))
    return _joined(pieces)


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Neighbours of one weight as one piece."""
    joined = []
    for (weight, breaks), group in groupby(pieces, lambda piece: (piece.weight, piece.breaks)):
        alike = list(group)
        if not abs(weight) <= MOST_WEIGHT:  # so written, it holds for infinity times zero as well
            raise Invalid(f"A word of the prompt has the weight {weight:g}; expected at most {MOST_WEIGHT:g}.")
        joined += alike if breaks else [Piece("".join(one.text for one in alike), weight)]
    return [piece for piece in joined if piece.text or piece.breaks] or [Piece("")]


_EXTRA = re.compile(r"<(\w+):([^<>:]+)((?::[^<>:]*)*)>")


def without_loras(text: str) -> tuple[str, list[tuple[str, float]]]:
    """A prompt without its ``<lora:name:0.8>``, and these: (name, scale), 1 where none is written.

    Raises ``Invalid`` for a scale that is no number, and for other kinds of networks in angle brackets.
    """
    loras = []

    def take(found: re.Match[str]) -> str:
        kind, name, given = found[1].lower(), found[2].strip(), found[3].strip(":")
        if kind not in ("lora", "lyco"):
            return found.group()
        scale = re.sub(r"^(unet|te)=", "", given.split(":")[0]) or "1"
        if not re.fullmatch(_NUMBER, scale.strip()):
            raise Invalid(f"The prompt has {found.group()[:80]!a}: expected a number after the name, <lora:name:0.8>.")
        loras.append((name, float(scale)))
        return ""

    return _EXTRA.sub(take, text), loras
