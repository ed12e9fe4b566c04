"""A1111's prompt editing: words that change between steps, ``[a:b:0.5]`` and ``[a|b]``, and ``AND``.

Written from its documentation ("Features", sections Prompt editing, Alternating Words, Composable Diffusion) and its
published examples.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_DEEPEST = 16
"""Brackets in brackets that are read; deeper ones stay as they are written."""
_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*")
_WORDS = re.compile(r"(?:\\.|[^\\\[\]():|])+|\\", re.DOTALL)


@dataclass(frozen=True)
class _Change:
    """``[before:after:when]``: the first up to the step ``when``, then the second."""

    before: "_Text"
    after: "_Text"
    when: str


@dataclass(frozen=True)
class _Turns:
    """``[a|b|c]``: another one at each step."""

    choices: "tuple[_Text, ...]"


_Text = tuple["str | _Change | _Turns", ...]


class _Reader:
    """A text read from left to right; what is no whole bracket is given back as it is written."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._read: dict[tuple[int, bool, int], tuple[_Text, int]] = {}  # else brackets never closed cost 2^depth

    def whole(self) -> _Text:
        """All of the text."""
        parts: list[str | _Change | _Turns] = []
        at = 0
        while at < len(self.text):
            read, at = self.words(at, True, 0)
            parts += read
            if at < len(self.text):  # a bracket or colon without its partner
                parts.append(self.text[at])
                at += 1
        return tuple(parts)

    def words(self, at: int, bars: bool, depth: int) -> tuple[_Text, int]:
        """The words from ``at`` to the first sign that belongs to a bracket around it, and where that is.

        ``bars``: whether ``|`` is a letter as any other.
        """
        key = (at, bars, depth)
        if key not in self._read:
            self._read[key] = self._words(at, bars, depth)
        return self._read[key]

    def _words(self, at: int, bars: bool, depth: int) -> tuple[_Text, int]:
        parts: list[str | _Change | _Turns] = []
        while at < len(self.text):
            if found := _WORDS.match(self.text, at):
                parts.append(found.group())
                at = found.end()
            elif self.text[at] == "|" and bars:
                parts.append("|")
                at += 1
            elif self.text[at] in "([" and depth < _DEEPEST and (bracket := self._bracket(at, depth + 1)):
                parts += bracket[0]
                at = bracket[1]
            else:
                break
        return tuple(parts), at

    def _bracket(self, at: int, depth: int) -> tuple[_Text, int] | None:
        """The bracket that begins at ``at``, and where it ends; None if it is none."""
        if self.text[at] == "(":
            parts, end = self._parts(at, ":", True, depth)
            return (("(", *_joined(parts, ":"), ")"), end + 1) if len(parts) < 3 and self._is(end, ")") else None
        choices, end = self._parts(at, "|", False, depth)
        if len(choices) > 1 and self._is(end, "]"):
            return (_Turns(tuple(choices)),), end + 1
        parts, end = self._parts(at, ":", True, depth)
        if not self._is(end, "]"):
            return None
        if len(parts) == 1:
            return ("[", *parts[0], "]"), end + 1
        *texts, when = parts
        if len(texts) > 2 or len(when) > 1 or not (number := _NUMBER.fullmatch("".join(map(str, when)))):
            return None
        return (_Change(texts[0] if len(texts) == 2 else (), texts[-1], number[1]),), end + 1

    def _parts(self, at: int, sign: str, bars: bool, depth: int) -> tuple[list[_Text], int]:
        """The texts after the bracket at ``at`` that ``sign`` parts, and where the last ends."""
        parts = []
        while True:
            part, at = self.words(at + 1, bars, depth)
            parts.append(part)
            if not self._is(at, sign):
                return parts, at

    def _is(self, at: int, sign: str) -> bool:
        return self.text[at : at + 1] == sign


def _joined(parts: Sequence[_Text], sign: str) -> Iterator["str | _Change | _Turns"]:
    for place, part in enumerate(parts):
        yield from (*((sign,) if place else ()), *part)


@dataclass(frozen=True)
class Span:
    """The steps that a pass makes, and how its numbers count: the second pass of two goes on where the first ended."""

    steps: int
    before: int = 0
    """Steps of the passes before it."""
    passes: int = 0
    """How many passes there were before it."""

    def step(self, when: str) -> int:
        """The last step, counted from 1, before the change; 0 is before the first. A number with a point is a share
        of the steps (of the second pass from 1 on), a whole one a step."""
        at = (float(when) - self.passes) * self.steps if "." in when else int(when) - self.before
        return min(int(at), self.steps)


def _ends(text: _Text, span: Span) -> set[int]:
    """The steps after which a text may change."""
    ends: set[int] = set()
    for part in text:
        if isinstance(part, _Change):
            ends |= {span.step(part.when)} | _ends(part.before, span) | _ends(part.after, span)
        elif isinstance(part, _Turns):
            ends |= {*range(1, span.steps)}.union(*(_ends(choice, span) for choice in part.choices))
    return {end for end in ends if 1 <= end < span.steps}


def _at(text: _Text, step: int, span: Span) -> str:
    words = []
    for part in text:
        if isinstance(part, _Change):
            words.append(_at(part.before if step <= span.step(part.when) else part.after, step, span))
        elif isinstance(part, _Turns):
            words.append(_at(part.choices[(step - 1) % len(part.choices)], step, span))
        else:
            words.append(part)
    return "".join(words)


def schedule(text: str, span: Span) -> list[tuple[int, str]]:
    """The words of a prompt by step: (last step, words), steps counted from 1, in order; equal neighbours are one.

    ``[a:b:0.5]`` is a, and b after half of the steps; ``[b:5]`` adds b after step 5; ``[a::5]`` takes a away;
    ``[a|b]`` is a and b in turns. Brackets without a partner, and those of anything else, stay as they are written.
    """
    tree = _Reader(text).whole()
    found: list[tuple[int, str]] = []
    for end in (*sorted(_ends(tree, span)), span.steps):
        words = _at(tree, end, span)
        if found and found[-1][1] == words:
            found.pop()
        found.append((end, words))
    return found


_AND = re.compile(r"\bAND\b")
_WEIGHT = re.compile(r"(.*?)\s*:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*", re.DOTALL)


def composed(text: str) -> list[tuple[str, float]]:
    """The prompts that ``AND`` parts, each with its weight (``a cat :1.2 AND a dog``), 1 by default.

    Their predictions are added: unconditional + guidance x sum of weight x (conditional - unconditional).
    """
    found = []
    for part in _AND.split(text):
        weighted = _WEIGHT.fullmatch(part)
        found.append((weighted[1].strip(), float(weighted[2])) if weighted else (part.strip(), 1.0))
    return found
