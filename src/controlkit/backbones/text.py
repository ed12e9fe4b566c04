"""Text towers: prompts in windows of tokens, their vectors, and the weights of their words."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from controlkit.errors import Invalid
from controlkit.prompts import DIALECTS, Words

Weighted = tuple[int, float]
"""A token's number and its weight."""


@dataclass(frozen=True)
class _Rows:
    """A prompt's windows for a text encoder."""

    ids: Tensor
    """(windows, window), int64."""
    weights: Tensor | None = None
    """(windows, window, 1); None is 1 everywhere."""
    left_out: int | None = None
    """Last layers of the encoder that are left out; None is as its base was trained."""
    emphasis: str | None = None


@dataclass(frozen=True)
class TextTower:
    """A text encoder with its tokenizer; ``penultimate``: tokens are read before its last layer (SDXL)."""

    tokenizer: Any
    encoder: Any
    penultimate: bool = False

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token rows (B, window), int64, padded, and cut where a prompt is longer than the window."""
        learnt, window = self._learnt(list(prompts)), self.tokenizer.model_max_length
        rows = self.tokenizer(learnt, padding="max_length", truncation=True, max_length=window, return_tensors="pt")
        return rows.input_ids.to(self.encoder.device)

    def encode(self, prompts: Sequence[str | Words]) -> list[tuple[Tensor, Tensor | None]]:
        """Of each prompt one vector a token (L, D), and the tower's pooled projection (P,), if it has one.

        A text is cut where its window ends, so that L is the window; of ``Words`` L is a multiple of it, and the
        projection is of the first window.
        """
        rows = [self._rows(prompt) for prompt in prompts]
        found: dict[int, tuple[Tensor, Tensor | None]] = {}
        for left_out in dict.fromkeys(row.left_out for row in rows):
            places = [i for i, row in enumerate(rows) if row.left_out == left_out]
            tokens, pooled = self._run(torch.cat([rows[i].ids for i in places]), left_out)
            start = 0
            for i in places:
                end = start + len(rows[i].ids)
                weighted = self._emphasised(tokens[start:end], rows[i]).flatten(0, 1)
                found[i] = weighted, None if pooled is None else pooled[start]
                start = end
        return [found[i] for i in range(len(prompts))]

    def _learnt(self, prompts: list[str]) -> list[str]:
        """The prompts with learnt words of many vectors (textual inversions) written out."""
        from diffusers.loaders import TextualInversionLoaderMixin

        return TextualInversionLoaderMixin().maybe_convert_prompt(prompts, self.tokenizer)

    def _rows(self, prompt: str | Words) -> _Rows:
        if isinstance(prompt, str):
            return _Rows(self.tokenize([prompt]))
        dialect, device = DIALECTS[prompt.dialect], self.encoder.device
        left_out, windows = self._left_out(prompt), self.windows(prompt)
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        length, pad = self.tokenizer.model_max_length, self.tokenizer.pad_token_id
        ids = torch.full((len(windows), length), pad, device=device)
        weights = torch.ones(len(windows), length, 1, device=device)
        for i, window in enumerate(windows):
            ids[i, : len(window) + 2] = torch.tensor([begin, *(token for token, _ in window), end])
            weights[i, 1 : len(window) + 1, 0] = torch.tensor([weight for _, weight in window])
        plain = dialect.emphasis is None or bool((weights == 1).all())
        return _Rows(ids, None if plain else weights, left_out, dialect.emphasis)

    def _left_out(self, words: Words) -> int | None:
        """How many last layers a prompt's clip skip leaves out; ``Invalid`` where that is all there are."""
        if words.clip_skip is None:
            return None
        left_out = DIALECTS[words.dialect].layers_left_out(words.clip_skip, self.penultimate)
        if left_out >= (layers := self.encoder.config.num_hidden_layers):
            raise Invalid(
                f"clip_skip is {words.clip_skip}, which leaves out {left_out} layers of a text encoder that has "
                f"{layers}: expected fewer."
            )
        return left_out

    def _run(self, ids: Tensor, left_out: int | None) -> tuple[Tensor, Tensor | None]:
        """The vectors (rows, window, D) of token rows, and their projections (rows, P), if the tower has one.

        The last norm is applied where the base reads tokens that passed it (SD 1.5, 2.1), also to an earlier layer's.
        """
        early = self.penultimate
        out = self.encoder(ids, output_hidden_states=early or left_out is not None)
        if left_out is None and not early:
            tokens = out.last_hidden_state
        else:
            tokens = out.hidden_states[-1 - (early if left_out is None else left_out)]
            if not early:
                tokens = getattr(self.encoder, "text_model", self.encoder).final_layer_norm(tokens)
        return tokens, getattr(out, "text_embeds", None)

    def _emphasised(self, tokens: Tensor, row: _Rows) -> Tensor:
        """The vectors (windows, window, D) of a prompt's tokens under the weights of its words."""
        if row.weights is None:
            return tokens
        if row.emphasis == "empty":
            empty, _ = self._run(self.tokenize([""]), row.left_out)
            return empty + (tokens - empty) * row.weights
        weighted = tokens * row.weights
        had, has = (z.float().mean((1, 2), keepdim=True) for z in (tokens, weighted))
        # Where a mean is rounding alone (a last norm without a shift), there is none to bring back.
        noise = 1e-3 * tokens.float().abs().mean((1, 2), keepdim=True)
        ratio = torch.where((had.abs() > noise) & (has.abs() > noise), had / has, 1.0)
        return weighted * ratio.to(weighted.dtype)

    # --- windows ------------------------------------------------------------------------------------------------

    def windows(self, words: Words) -> list[list[Weighted]]:
        """A prompt's tokens with their weights, in as many windows as they need; at least one, which may be empty.

        ``Invalid`` for a clip skip that leaves no layer.
        """
        self._left_out(words)
        dialect, room = DIALECTS[words.dialect], self.tokenizer.model_max_length - 2
        comma = self.tokenizer.convert_tokens_to_ids(",</w>")
        windows: list[list[Weighted]] = [[]]
        last_comma = -1  # its place in the last window
        for part in self._parts(words, room):
            window = windows[-1]
            if not part or len(window) + len(part) > room:
                near = last_comma >= 0 and len(window) - last_comma <= dialect.comma_within
                kept = last_comma + 1 if near and len(part) == 1 and part[0][0] != comma else len(window)
                windows[-1:] = [window[:kept], window[kept:]]
                last_comma = -1
            if [token for token, _ in part] == [comma]:
                last_comma = len(windows[-1])
            windows[-1] += part
        if dialect.is_cut:
            return windows[:1]
        return windows[:-1] if len(windows) > 1 and not windows[-1] else windows

    def _parts(self, words: Words, room: int) -> Iterator[list[Weighted]]:
        """Tokens that stay in one window, with their weights; none where a window ends (``BREAK``)."""
        whole_below = DIALECTS[words.dialect].whole_below
        names = {token: name for name, token in self.tokenizer.get_added_vocab().items()}
        for piece in words.pieces:
            if piece.breaks:
                yield []
                continue
            tokens = self.tokenizer(self._learnt([piece.text])[0], add_special_tokens=False, verbose=False).input_ids
            if len(tokens) < whole_below:
                yield from ([[(token, piece.weight) for token in tokens]] if tokens else [])
                continue
            part: list[Weighted] = []
            for token in tokens:  # a learnt word's vectors are named sparkle, sparkle_1, sparkle_2
                if part and not (re.search(r"_\d+$", names.get(token, "")) and len(part) < room):
                    yield part
                    part = []
                part.append((token, piece.weight))
            yield from [part] if part else []
