"""The texts that a base is told at each step: prompts as their dialect reads them, with the halves of guidance."""

from collections.abc import Sequence
from dataclasses import dataclass

from controlkit.backbones import Backbone, TextEmbedding
from controlkit.errors import Invalid
from controlkit.prompts import DIALECTS, Span, Words, composed, schedule, without_loras
from controlkit.sample.request import Request

Lines = tuple[tuple[int, Words | None], ...]
"""A prompt's words, each with the step, counted from 1, up to which they hold; None is no prompt at all."""


@dataclass(frozen=True)
class Script:
    """The prompts of a picture over the steps of a run."""

    parts: tuple[Lines, ...]
    """Of each prompt that ``AND`` joins; one where it joins none."""
    weights: tuple[float, ...]
    """Of each part."""
    negative: Lines

    @classmethod
    def of(cls, request: Request, span: Span) -> "Script":
        """A request's prompts over the steps of a pass.

        ``Invalid`` where they name LoRAs, which belong to the base, or have wild weights.
        """
        edits = DIALECTS[request.dialect].edits
        if edits and (loras := without_loras(request.prompt)[1]):
            raise Invalid(f'The prompt names the LoRA "{loras[0][0]:.80}": give it to the base, load_base(loras=...).')
        parts = composed(request.prompt) if edits else [(request.prompt, 1.0)]
        lines = tuple(_lines(text, request, span) for text, _ in parts)
        negative: Lines = ((span.steps, None),)
        if request.negative_prompt is not None:
            negative = _lines(request.negative_prompt, request, span)
        return cls(lines, tuple(weight for _, weight in parts), negative)

    def forms(self, base: Backbone) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Of each prompt, the windows that its words take and the steps that they hold: alike in one batch."""
        return tuple(
            tuple((end, 1 if words is None else base.windows_of(words)) for end, words in lines)
            for lines in (self.negative, *self.parts)
        )


def _lines(text: str, request: Request, span: Span) -> Lines:
    edited = schedule(text, span) if span.steps and DIALECTS[request.dialect].edits else [(span.steps, text)]
    return tuple((end, Words.of(words, request.dialect, request.clip_skip)) for end, words in edited)


class Said:
    """The embeddings of a batch of B pictures at each step, each computed once."""

    def __init__(
        self, base: Backbone, scripts: Sequence[Script], guided: bool, size: tuple[int, int], skipped: int = 0
    ) -> None:
        self._base, self._size, self._skipped = base, size, skipped
        columns = zip(*(script.parts for script in scripts), strict=True)
        rows = [lines for column in columns for lines in column]
        self._rows: list[Lines] = [*(script.negative for script in scripts), *rows] if guided else rows
        self._known: dict[tuple[Words | None, ...], TextEmbedding] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def at(self, step: int) -> TextEmbedding:
        """The rows at a step, from 0: of the unconditional half, then of each part; B each."""
        made = step - self._skipped
        prompts = tuple(next(words for end, words in lines if made < end) for lines in self._rows)
        if prompts not in self._known:
            self._known[prompts] = self._base.encode_text(prompts, self._size)
        return self._known[prompts]
