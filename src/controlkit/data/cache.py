"""All that a training step needs of every pair, made once: latents, text embeddings, hints."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from controlkit.annotators import ANNOTATORS, edition, parts_of
from controlkit.backbones import Backbone, TextEmbedding
from controlkit.data.buckets import Size
from controlkit.data.mirror import mirrored
from controlkit.data.pairs import FolderPairs, Pair, hint_for_pair
from controlkit.data.store import Entry, Store, key_of, remembered
from controlkit.errors import UserError
from controlkit.images import HintSpec, to_tensor, write_atomic
from controlkit.tensors import TensorWriter, read_filled


@dataclass(frozen=True)
class Cached:
    """All a training step needs of every pair of one size, so that VAE, text tower and annotator run once.

    ``moments`` (R, 2C, h, w) half; ``hints`` uint8 (R, H, W, 3, or 4 where some are masked), or arrays of uint8, uint16
    or float32 (R, H, W, channels): rows of N pairs, and after them of their mirror images, where those are seen too;
    ``kinds`` (N,), the place of each hint's type in the contracts' order; ``text`` half, one row a distinct prompt, row
    0 the empty prompt; ``prompt_rows`` (N,) says which row is whose; ``mirrors`` (N,), the row of each pair's mirror
    image, its own where it has none.
    """

    moments: Tensor
    hints: Tensor
    kinds: Tensor
    text: TextEmbedding
    prompt_rows: Tensor
    mirrors: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt_rows)

    @property
    def size(self) -> Size:
        """Height and width of its pictures."""
        height, width = self.hints.shape[1:3]
        return height, width

    @classmethod
    def read(cls, path: Path) -> "list[Cached]":
        """The cache that ``build_cache`` wrote: one for each size of picture."""
        held = read_filled(path)
        text = TextEmbedding(
            **{name.removeprefix(_TEXT): held.pop(name) for name in list(held) if name.startswith(_TEXT)}
        )
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in held.items():
            size, _, part = name.rpartition("/")
            parts.setdefault(size, {})[part] = value
        of_sizes = [cls(text=text.of_size(tuple(one["hints"].shape[1:3])), **one) for one in parts.values()]  # type: ignore[arg-type]
        return sorted(of_sizes, key=lambda cached: cached.size)


AT_ONCE = 32
"""Pictures encoded together."""

_TEXT = "text."  # what the names of the prompts' tensors begin with in a cache's file


def build_cache(
    base: Backbone,
    pairs: Sequence[Pair],
    contracts: Mapping[str, HintSpec],
    path: Path,
    on_pair: Callable[[int], None] = lambda done: None,
    batch: int = AT_ONCE,
    mirrors: bool = False,
    store: Store | None = None,
) -> list[Cached]:
    """The cache of ``pairs``, read from ``path`` if it is there, else built and written there whole; one for each size.

    ``contracts``: of each type of hint; of a control of one type under "". ``mirrors``: with pairs' mirror images.
    ``store``: where latents, text embeddings and annotations may lie already, and go. The file is this run's own:
    what it began with it keeps, whatever becomes of the store or of the data set.
    """
    if path.is_file():
        return Cached.read(path)
    rows_of: dict[Size, list[int]] = {}
    for i in range(len(pairs)):
        rows_of.setdefault(pairs.size_of(i) if isinstance(pairs, FolderPairs) else (0, 0), []).append(i)
    made_by = base.moments_key() if store else ""
    encode = partial(_read_moments, base, made_by, store)

    def write(scratch: Path) -> None:
        writer = TensorWriter(scratch)
        prompts_of = {}
        for size, rows in rows_of.items():
            prefix = f"{size[0]}x{size[1]}/" if len(rows_of) > 1 else ""
            prompts_of[prefix] = _read_pairs(
                writer, prefix, encode, pairs, rows, contracts, on_pair, batch, mirrors, store
            )
        distinct = ["", *sorted({prompt for prompts in prompts_of.values() for prompt in prompts} - {""})]
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        for prefix, prompts in prompts_of.items():
            writer.add(f"{prefix}prompt_rows", torch.tensor([row_of[prompt] for prompt in prompts]))
        _read_prompts(writer, base, distinct, store)
        writer.close()

    write_atomic(path, write)
    return Cached.read(path)


def _read_prompts(writer: TensorWriter, base: Backbone, prompts: Sequence[str], store: Store | None) -> None:
    """Write the tensors of each prompt's ``TextEmbedding``."""

    def read(chunk: Sequence[str]) -> list[Entry]:
        def make(absent: list[int]) -> list[Entry]:
            text = base.encode_text([chunk[i] for i in absent]).to(torch.device("cpu"), torch.half)
            return [{name: value[i].clone() for name, value in text.tensors().items()} for i in range(len(text))]

        keys = [key_of("text", key) for key in base.text_keys(chunk)] if store else [b""] * len(chunk)
        return remembered(store, keys, make)

    held: dict[str, Tensor] = {}
    for first in range(0, len(prompts), 256):
        for row, entry in enumerate(read(prompts[first : first + 256]), first):
            for name, value in entry.items():
                if name not in held:
                    held[name] = writer.empty(f"{_TEXT}{name}", (len(prompts), *value.shape), value.dtype)
                held[name][row] = value


def _read_moments(base: Backbone, made_by: str, store: Store | None, pictures: Sequence[np.ndarray]) -> Tensor:
    """Moments (B, 2C, h, w), half; ``made_by`` names the VAE and the format it computes in."""

    def make(absent: list[int]) -> list[Entry]:
        with base.autocast():
            moments = base.encode_moments(to_tensor([pictures[i] for i in absent]).to(base.device))
        return [{"moments": row} for row in moments.half().cpu()]

    entries = remembered(store, [key_of("moments", made_by, picture) for picture in pictures], make)
    return torch.stack([entry["moments"] for entry in entries])


def _read_hints(pairs: Sequence[Pair], contracts: Mapping[str, HintSpec], store: Store | None) -> list[np.ndarray]:
    """Each pair's hint; of those that an annotator makes of the picture alone, the store's."""
    hints: dict[int, np.ndarray] = {}
    keys: dict[int, bytes] = {}
    for i, pair in enumerate(pairs):
        contract = contracts[pair.kind]
        if store and pair.hint is None and all(part.annotator in ANNOTATORS for part in parts_of(contract)):
            options = json.dumps([contract.annotator, *sorted(contract.options.items())])
            keys[i] = key_of("hint", edition(), options, pair.picture)
        else:
            hints[i] = hint_for_pair(pair, contract)

    def make(absent: list[int]) -> list[Entry]:
        made = [pairs[list(keys)[k]] for k in absent]
        return [{"hint": torch.from_numpy(hint_for_pair(pair, contracts[pair.kind]))} for pair in made]

    entries = remembered(store, list(keys.values()), make, dense=False) if keys else []
    hints |= {i: entry["hint"].numpy() for i, entry in zip(keys, entries, strict=True)}
    return [hints[i] for i in range(len(pairs))]


def _read_pairs(
    writer: TensorWriter,
    prefix: str,
    encode: Callable[[Sequence[np.ndarray]], Tensor],
    pairs: Sequence[Pair],
    rows: Sequence[int],
    contracts: Mapping[str, HintSpec],
    on_pair: Callable[[int], None],
    batch: int,
    mirrors: bool,
    store: Store | None,
) -> list[str]:
    """Write what a ``Cached`` holds of some pairs, all of one size, but for their prompts; which are returned."""
    order = list(contracts)
    total = len(rows) * (1 + mirrors)
    moments, hints = torch.empty(0), np.empty(0, np.uint8)
    kinds, prompts = [], []
    summary_of = torch.arange(len(rows))
    for first in range(0, len(rows), batch):
        chunk = [pairs[i] for i in rows[first : first + batch]]
        shown = dict(enumerate(chunk, first))
        for place, pair in enumerate(chunk, first) if mirrors else ():
            if turned := mirrored(pair, contracts[pair.kind]):
                summary_of[place] = len(rows) + place
                shown[len(rows) + place] = turned
        latents = encode([t.picture for t in shown.values()])
        drawn = _read_hints(list(shown.values()), contracts, store)
        if not first:
            moments = writer.empty(f"{prefix}moments", (total, *latents.shape[1:]), torch.half)
            masks = any(contract.mask_value is not None for contract in contracts.values())
            channels = 3 + masks if len(contracts) > 1 else drawn[0].shape[-1]
            kind = torch.from_numpy(drawn[0]).dtype
            hints = writer.empty(f"{prefix}hints", (total, *drawn[0].shape[:2], channels), kind).numpy()
        moments[list(shown)] = latents
        for row, hint in zip(shown, drawn, strict=True):  # beside masked ones the others are masked nowhere
            if hint.dtype != hints.dtype or (len(contracts) == 1 and hint.shape[-1] != hints.shape[-1]):
                raise UserError(
                    f"Some hints are {hints.shape[-1]} channels of {hints.dtype}, others {hint.shape[-1]} of "
                    f"{hint.dtype}: expected all of one kind. `controlkit data doctor` counts them."
                )
            hints[row, ..., : hint.shape[-1]] = hint
            hints[row, ..., hint.shape[-1] :] = 255
        kinds += [order.index(t.kind) for t in chunk]
        prompts += [t.prompt for t in chunk]
        on_pair(len(chunk))
    writer.add(f"{prefix}kinds", torch.tensor(kinds))
    if mirrors:
        writer.add(f"{prefix}mirrors", summary_of)
    return prompts
