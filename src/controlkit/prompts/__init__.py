"""Prompts as people write them: weights of words, words that change between steps, LoRAs named in the text."""

from controlkit.prompts.dialects import DIALECTS, Dialect, Words
from controlkit.prompts.emphasis import Piece, a1111_pieces, comfy_pieces, without_loras
from controlkit.prompts.schedules import Span, composed, schedule

__all__ = [
    "DIALECTS",
    "Dialect",
    "Piece",
    "Span",
    "Words",
    "a1111_pieces",
    "comfy_pieces",
    "composed",
    "schedule",
    "without_loras",
]
