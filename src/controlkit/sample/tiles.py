"""Overlapping tiles of large pictures: each is predicted by itself, and their predictions are blended.

As in MultiDiffusion (Bar-Tal et al., ICML 2023): at each step, the predictions of all tiles that cover a place are
averaged. A tile counts less towards its edges, so that no seam is left.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

OVERLAP = 0.25
"""The least share of a tile that its neighbour covers, too."""


@dataclass(frozen=True)
class Tile:
    """A part of a picture, in latents."""

    top: int
    left: int
    height: int
    width: int

    def of(self, x: Tensor, pixels: int = 1) -> Tensor:
        """Its part of a map (..., h, w) with ``pixels`` values a latent on a side."""
        rows, columns = ((at * pixels, (at + size) * pixels) for at, size in self._sides())
        return x[..., slice(*rows), slice(*columns)]

    def of_hints(self, hints: Tensor | Mapping[str, Tensor], pixels: int) -> Tensor | Mapping[str, Tensor]:
        """Its part of hints (B, C, H, W), or of several by type."""
        if isinstance(hints, Tensor):
            return self.of(hints, pixels)
        return {kind: self.of(hint, pixels) for kind, hint in hints.items()}

    def of_region(self, region: Tensor, whole: tuple[int, int]) -> Tensor:
        """Its part of a map (B, 1, H, W) of any size that lies over ``whole`` (height, width in latents)."""
        scaled = region if tuple(region.shape[-2:]) == whole else F.interpolate(region, whole, mode="area")
        return self.of(scaled)

    def weight(self) -> Tensor:
        """How much it counts, (height, width): more towards the middle, so that neighbours pass into each other."""
        tents = [torch.minimum(torch.arange(size) + 0.5, size - 0.5 - torch.arange(size)) for _, size in self._sides()]
        return tents[0][:, None] * tents[1]

    def _sides(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.top, self.height), (self.left, self.width)


def tiles_of(size: tuple[int, int], side: int) -> list[Tile]:
    """Tiles of at most ``side`` latents that cover a picture of ``size`` (height, width in latents), evenly spread."""
    rows, columns = (_starts(length, side) for length in size)
    return [Tile(top, left, min(side, size[0]), min(side, size[1])) for top in rows for left in columns]


def _starts(length: int, side: int) -> list[int]:
    if length <= side:
        return [0]
    count = math.ceil((length - side) / (side * (1 - OVERLAP))) + 1
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def blended(tiles: list[Tile], x: Tensor, predict: Callable[[int, Tensor], Tensor]) -> Tensor:
    """The prediction (B, C, h, w) for x (B, C', h, w), blended of ``predict(i, part)`` for each tile i, in float32."""
    total, weights = torch.zeros(0), torch.zeros(x.shape[-2:], device=x.device)
    for i, tile in enumerate(tiles):
        part = predict(i, tile.of(x)).float()
        if not i:
            total = part.new_zeros(*part.shape[:2], *x.shape[-2:])
        weight = tile.weight().to(x.device)
        tile.of(total).add_(part * weight)
        tile.of(weights).add_(weight)
    return total / weights
