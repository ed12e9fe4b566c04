"""The inputs of training steps, made once of every pair: latents, text embeddings, hints."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from controlkit.backbones import Backbone, TextEmbedding
from controlkit.data.buckets import Size
from controlkit.data.hints import kept_hints
from controlkit.data.mirror import mirrored
from controlkit.data.pairs import FolderPairs, Pair, hint_for_pair, is_annotated
from controlkit.data.store import Entry, Like, Store, key_of, remembered
from controlkit.errors import Mismatch
from controlkit.files import write_atomic
from controlkit.images import HintSpec, to_tensor
from controlkit.tensors import TensorWriter, read_filled


@dataclass(frozen=True)
class Cached:
    """Inputs of training steps, of all pairs of one size, so that VAE, text tower and annotator run once.

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
    mirrors: bool = False,
    store: Store | None = None,
) -> list[Cached]:
    """The cache of ``pairs``, read from ``path`` if it is there, else built and written there whole; one for each size.

    ``contracts``: of each type of hint; of a control of one type under "". ``on_pair`` is called with the number of
    pairs done since its last call. ``mirrors``: with pairs' mirror images. ``store``: where latents, text embeddings
    and annotations are looked up and kept. The file belongs to one run: changes of the store or the data set do not
    reach it. ``Mismatch`` for hints of several shapes or types.
    """
    if path.is_file():
        return Cached.read(path)
    rows_of: dict[Size, list[int]] = {}
    for i in range(len(pairs)):
        rows_of.setdefault(pairs.size_of(i) if isinstance(pairs, FolderPairs) else (0, 0), []).append(i)

    def write(scratch: Path) -> None:
        writer = TensorWriter(scratch)
        builder = _Builder(writer, base, pairs, contracts, on_pair, mirrors, store, base.moments_key() if store else "")
        prompts_of = {}
        for size, rows in rows_of.items():
            prefix = f"{size[0]}x{size[1]}/" if len(rows_of) > 1 else ""
            prompts_of[prefix] = builder.write_pairs(prefix, rows)
        distinct = ["", *sorted({prompt for prompts in prompts_of.values() for prompt in prompts} - {""})]
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        for prefix, prompts in prompts_of.items():
            writer.add(f"{prefix}prompt_rows", torch.tensor([row_of[prompt] for prompt in prompts]))
        builder.write_prompts(distinct)
        writer.close()

    write_atomic(path, write)
    return Cached.read(path)


@dataclass(frozen=True)
class _Builder:
    """The parts of a cache's file, computed and written; arguments as ``build_cache``'s."""

    writer: TensorWriter
    base: Backbone
    pairs: Sequence[Pair]
    contracts: Mapping[str, HintSpec]
    on_pair: Callable[[int], None]
    mirrors: bool
    store: Store | None
    vae: str
    """The VAE and the number format it computes in, as a part of keys in the store."""

    def write_prompts(self, prompts: Sequence[str]) -> None:
        """Write the tensors of each prompt's ``TextEmbedding``."""
        shapes = self.base.text_shapes() if self.store else {}
        like = {name: (shape, torch.long if name == "sizes" else torch.half) for name, shape in shapes.items()}
        keys = [b""] * len(prompts)
        for first in range(0, len(prompts) if self.store else 0, 16384):  # each call digests the towers' weights
            block = slice(first, first + 16384)
            keys[block] = [key_of("text", key) for key in self.base.text_keys(prompts[block])]

        def read(chunk: slice) -> list[Entry]:
            def make(absent: list[int]) -> list[Entry]:
                text = self.base.encode_text([prompts[chunk][i] for i in absent]).to(torch.device("cpu"), torch.half)
                return [{name: value[i].clone() for name, value in text.tensors().items()} for i in range(len(text))]

            return remembered(self.store, keys[chunk], [like] * len(keys[chunk]), make)

        held: dict[str, Tensor] = {}
        for first in range(0, len(prompts), 256):
            for row, entry in enumerate(read(slice(first, first + 256)), first):
                for name, value in entry.items():
                    if name not in held:
                        held[name] = self.writer.empty(f"{_TEXT}{name}", (len(prompts), *value.shape), value.dtype)
                    held[name][row] = value

    def write_pairs(self, prefix: str, rows: Sequence[int]) -> list[str]:
        """Write the tensors of a ``Cached`` of these pairs, all of one size, but for prompts; returns the prompts."""
        order = list(self.contracts)
        moments, hints = torch.empty(0), np.empty(0, np.uint8)
        kinds, prompts = [], []
        mirror_of = torch.arange(len(rows))
        for first in range(0, len(rows), AT_ONCE):
            chunk = [self.pairs[i] for i in rows[first : first + AT_ONCE]]
            shown = dict(enumerate(chunk, first))
            for place, pair in enumerate(chunk, first) if self.mirrors else ():
                if turned := mirrored(pair, self.contracts[pair.kind]):
                    mirror_of[place] = len(rows) + place
                    shown[len(rows) + place] = turned
            latents = self._moments([pair.picture for pair in shown.values()])
            drawn = self._hints(list(shown.values()))
            if not first:
                total = len(rows) * (1 + self.mirrors)
                moments = self.writer.empty(f"{prefix}moments", (total, *latents.shape[1:]), torch.half)
                hints = self._empty_hints(f"{prefix}hints", total, drawn[0])
            moments[list(shown)] = latents
            for row, hint in zip(shown, drawn, strict=True):  # beside masked ones the others are masked nowhere
                if hint.dtype != hints.dtype or (len(order) == 1 and hint.shape[-1] != hints.shape[-1]):
                    raise Mismatch(
                        f"Some hints are {hints.shape[-1]} channels of {hints.dtype}, others {hint.shape[-1]} of "
                        f"{hint.dtype}: expected all of one kind. `controlkit data doctor` counts them."
                    )
                hints[row, ..., : hint.shape[-1]] = hint
                hints[row, ..., hint.shape[-1] :] = 255
            kinds += [order.index(pair.kind) for pair in chunk]
            prompts += [pair.prompt for pair in chunk]
            self.on_pair(len(chunk))
        self.writer.add(f"{prefix}kinds", torch.tensor(kinds))
        if self.mirrors:
            self.writer.add(f"{prefix}mirrors", mirror_of)
        return prompts

    def _empty_hints(self, name: str, total: int, first: np.ndarray) -> np.ndarray:
        """Room for so many hints like the first one; of several types, with a mask where any has one."""
        masks = any(contract.mask_value is not None for contract in self.contracts.values())
        channels = 3 + masks if len(self.contracts) > 1 else first.shape[-1]
        return self.writer.empty(name, (total, *first.shape[:2], channels), getattr(torch, first.dtype.name)).numpy()

    def _moments(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Moments (B, 2C, h, w), half."""

        def make(absent: list[int]) -> list[Entry]:
            with self.base.autocast():
                pixels = to_tensor([pictures[i] for i in absent]).to(self.base.device)
                moments = self.base.encode_moments(pixels)
            return [{"moments": row} for row in moments.half().cpu()]

        keys = [key_of("moments", self.vae, picture) for picture in pictures]
        like: list[Like] = [
            {"moments": (self._moments_shape(picture), torch.half)} for picture in pictures if self.store
        ]
        entries = remembered(self.store, keys, like, make)
        return torch.stack([entry["moments"] for entry in entries])

    def _moments_shape(self, picture: np.ndarray) -> tuple[int, int, int]:
        height, width = picture.shape[:2]
        channels, high, wide = self.base.latent_shape((height, width))
        return 2 * channels, high, wide

    def _hints(self, pairs: Sequence[Pair]) -> list[np.ndarray]:
        """Each pair's hint; those made of pictures alone come from the store, or are made at once, kind by kind."""
        hints: dict[int, np.ndarray] = {}
        groups: dict[str, list[int]] = {}
        for i, pair in enumerate(pairs):
            if is_annotated(pair, self.contracts[pair.kind]):
                groups.setdefault(pair.kind, []).append(i)
            else:
                hints[i] = hint_for_pair(pair, self.contracts[pair.kind])
        for kind, places in groups.items():
            pictures, contract = [pairs[i].picture for i in places], self.contracts[kind]
            hints |= zip(places, kept_hints(pictures, contract, str(self.base.device), self.store), strict=True)
        return [hints[i] for i in range(len(pairs))]
