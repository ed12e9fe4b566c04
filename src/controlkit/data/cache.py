"""All that a training step needs of every pair, made once: latents, text embeddings, hints."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from controlkit.backbones import Text, UNetBase
from controlkit.data.pairs import Pair, hint_of
from controlkit.images import Hint, to_tensor, write_atomic


@dataclass(frozen=True)
class Cached:
    """All a training step needs of every pair, so that VAE, text tower and annotator run once and not every step.

    ``moments`` (N, 2C, h, w) half; ``hints`` uint8 (N, H, W, 3, or 4 where some are masked); ``kinds`` (N,), the place
    of each hint's type in the contracts' order; ``text`` half, one row a distinct prompt, row 0 the empty prompt;
    ``prompt_rows`` (N,) says which row is whose.
    """

    moments: Tensor
    hints: Tensor
    kinds: Tensor
    text: Text
    prompt_rows: Tensor

    def __len__(self) -> int:
        return len(self.moments)

    @classmethod
    def read(cls, path: Path) -> "Cached":
        """The cache that ``build_cache`` wrote."""
        held = load_file(path)
        text = Text(**{name.removeprefix(_TEXT): held.pop(name) for name in list(held) if name.startswith(_TEXT)})
        return cls(text=text, **held)


AT_ONCE = 32
"""Pictures encoded together."""

_TEXT = "text."  # what the names of the prompts' tensors begin with in a cache's file


def build_cache(
    base: UNetBase,
    pairs: Sequence[Pair],
    contracts: Mapping[str, Hint],
    path: Path,
    on_pair: Callable[[int], None] = lambda done: None,
    batch: int = AT_ONCE,
) -> Cached:
    """The cache of ``pairs``, read from ``path`` if it is there, else built and written there whole.

    ``contracts``: of each type of hint; of a control of one type under "".
    """
    if path.is_file():
        return Cached.read(path)
    order = list(contracts)
    # Many pairs are many gigabytes: held once, and written without a copy.
    moments = torch.empty(0)
    hints = torch.empty(0, dtype=torch.uint8)
    kinds, prompts = [], []
    for first in range(0, len(pairs), batch):
        chunk = [pairs[i] for i in range(first, min(first + batch, len(pairs)))]
        with base.autocast():
            latents = base.encode_moments(to_tensor([t.picture for t in chunk]).to(base.device))
        drawn = [hint_of(t, contracts[t.kind]) for t in chunk]
        if not first:
            moments = torch.empty((len(pairs), *latents.shape[1:]), dtype=torch.half)
            channels = 3 + any(contract.mark is not None for contract in contracts.values())
            hints = torch.full((len(pairs), *drawn[0].shape[:2], channels), 255, dtype=torch.uint8)
        moments[first : first + len(chunk)] = latents.half().cpu()
        for row, hint in zip(hints[first:], drawn, strict=False):  # beside masked ones the others are masked nowhere
            row[..., : hint.shape[-1]] = torch.from_numpy(np.ascontiguousarray(hint))
        kinds += [order.index(t.kind) for t in chunk]
        prompts += [t.prompt for t in chunk]
        on_pair(len(chunk))
    distinct = ["", *sorted(set(prompts) - {""})]
    row_of = {prompt: row for row, prompt in enumerate(distinct)}
    read = [
        base.encode_text(distinct[i : i + 256]).to(torch.device("cpu"), torch.half).tensors()
        for i in range(0, len(distinct), 256)
    ]
    text = {name: torch.cat([part[name] for part in read]).contiguous() for name in read[0]}
    rows = torch.tensor([row_of[prompt] for prompt in prompts])
    parts = {"moments": moments, "hints": hints, "kinds": torch.tensor(kinds), "prompt_rows": rows}
    named = parts | {f"{_TEXT}{name}": value for name, value in text.items()}
    write_atomic(path, lambda scratch: save_file(named, scratch))
    return Cached(text=Text(**text), **parts)
