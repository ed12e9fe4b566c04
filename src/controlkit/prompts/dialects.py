"""The three ways in which a prompt's text is read, as one table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from controlkit.prompts.emphasis import Piece, a1111_pieces, comfy_pieces

Dialect = Literal["plain", "a1111", "comfy"]


@dataclass(frozen=True)
class Reading:
    """One row: how a program reads the text of a prompt."""

    pieces: Callable[[str], list[Piece]]
    """The words with their weights."""
    edits: bool
    """Whether words may change between steps, and prompts be joined with ``AND``."""
    emphasis: Literal["mean", "empty"] | None
    """What weights do to the vectors z of a window's tokens: ``mean``, z w, brought to the mean that z had;
    ``empty``, e + (z - e) w with the vectors e of an empty prompt."""
    comma_within: int
    """A full window ends at its last comma, if that is among so many last tokens."""
    whole_below: int
    """Words of one weight that are fewer tokens than this are never parted by the end of a window."""
    is_cut: bool
    """Whether only one window is read, as captions are in training; else as many as the words need."""
    layers_left_out: Callable[[int, bool], int]
    """How many of a text encoder's last layers a clip skip leaves out, where it ends before its last layer by itself
    (SDXL's) or does not."""


DIALECTS: dict[Dialect, Reading] = {
    "plain": Reading(lambda text: [Piece(text)], False, None, 0, 0, True, lambda skip, early: skip + early),
    "a1111": Reading(a1111_pieces, True, "mean", 20, 0, False, lambda skip, early: max(skip - 1, int(early))),
    "comfy": Reading(comfy_pieces, False, "empty", 0, 8, False, lambda skip, early: abs(skip) - 1),
}
"""``plain``: as diffusers reads it, every letter a letter. Clip skip counts layers left out in ``plain`` (diffusers;
beyond SDXL's own), the layer read from the end in ``a1111`` (1 is the last) and in ``comfy`` (-1 is the last)."""


@dataclass(frozen=True)
class Words:
    """A prompt's words as a text encoder reads them, in as many windows as they need."""

    pieces: tuple[Piece, ...]
    dialect: Dialect = "plain"
    clip_skip: int | None = None
    """As the dialect counts it; None is as the base was trained."""

    @property
    def text(self) -> str:
        """The words without their weights."""
        return "".join(piece.text for piece in self.pieces)

    @classmethod
    def of(cls, text: str, dialect: Dialect = "plain", clip_skip: int | None = None) -> "Words":
        """The words of a text without schedules."""
        return cls(tuple(DIALECTS[dialect].pieces(text)), dialect, clip_skip)
