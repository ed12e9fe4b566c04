"""Networks run over pictures of any number and size: in batches of bounded memory, large pictures in tiles."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

MOST_PIXELS = 2**20
"""Pixels that a network reads at once: a network of 64 channels at full size then takes 256 MiB a layer."""


def run(
    forward: Callable[[Tensor], Tensor],
    pictures: Sequence[np.ndarray],
    device: str,
    multiple: int = 1,
    margin: int | None = None,
) -> list[np.ndarray]:
    """Run a network over pictures, uint8 (H, W, 3): float32 (H, W, C) for each.

    Args:
        forward: of float32 (B, 3, H, W) in [0, 255], RGB, gives (B, C, H, W).
        multiple: both sides are brought to multiples of this by repeating the border, which is cut off again.
        margin: how far a pixel of the result sees in the picture, a multiple of ``multiple``: larger pictures than
            ``MOST_PIXELS`` are then cut into overlapping tiles, and the result is the same as of the whole.
            None: the network sees all of it, and larger ones are made smaller first, and the result larger again.
    """
    results: dict[int, np.ndarray] = {}
    by_size = defaultdict(list)
    for number, picture in enumerate(pictures):
        by_size[picture.shape[:2]].append(number)
    with torch.inference_mode():
        for (height, width), numbers in by_size.items():
            many = max(MOST_PIXELS // (height * width), 1)
            for start in range(0, len(numbers), many):
                some = numbers[start : start + many]
                batch = [pictures[number] for number in some]
                if height * width <= MOST_PIXELS or margin is None:
                    made = _whole(forward, batch, device, multiple)
                else:
                    made = [_tiled(forward, batch[0], device, multiple, margin)]
                results |= zip(some, made, strict=True)
    return [results[number] for number in range(len(pictures))]


def shrunk(picture: np.ndarray) -> np.ndarray:
    """A picture as a network that sees all of it reads it: smaller, where it has more than ``MOST_PIXELS``."""
    height, width = picture.shape[:2]
    scale = (MOST_PIXELS / (height * width)) ** 0.5
    if scale >= 1:
        return picture
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def _whole(
    forward: Callable[[Tensor], Tensor], batch: list[np.ndarray], device: str, multiple: int
) -> list[np.ndarray]:
    height, width = batch[0].shape[:2]
    batch = [shrunk(one) for one in batch]
    size = batch[0].shape[:2]
    bottom, right = (-side % multiple for side in size)
    padded = [cv2.copyMakeBorder(one, 0, bottom, 0, right, cv2.BORDER_REPLICATE) for one in batch]
    pixels = torch.from_numpy(np.stack(padded)).to(device).permute(0, 3, 1, 2).float()
    made = forward(pixels).float().permute(0, 2, 3, 1).cpu().numpy()[:, : size[0], : size[1]]
    if size != (height, width):
        return [
            cv2.resize(one, (width, height), interpolation=cv2.INTER_LINEAR).reshape(height, width, -1) for one in made
        ]
    return list(made)


def _tiled(
    forward: Callable[[Tensor], Tensor], picture: np.ndarray, device: str, multiple: int, margin: int
) -> np.ndarray:
    height, width = picture.shape[:2]
    side, rows = _tile_side(margin, multiple), []
    for top in range(0, height, side):
        row = []
        for left in range(0, width, side):
            (y0, y1), (x0, x1) = _around(top, side, margin, height), _around(left, side, margin, width)
            made = _whole(forward, [picture[y0:y1, x0:x1]], device, multiple)[0]
            row.append(made[top - y0 : top - y0 + side, left - x0 : left - x0 + side])
        rows.append(np.concatenate(row, 1))
    return np.concatenate(rows, 0)


def _tile_side(margin: int, multiple: int) -> int:
    """The side of a tile without its margins."""
    side = int(MOST_PIXELS**0.5) - 2 * margin
    return side - side % multiple


def _around(start: int, side: int, margin: int, whole: int) -> tuple[int, int]:
    """The first and last pixel of a tile with its margins, within the picture."""
    return max(start - margin, 0), min(start + side + margin, whole)


def grey(light: np.ndarray) -> np.ndarray:
    """Values (H, W) or (H, W, 1) from 0 to 255 as a grey hint picture, uint8 (H, W, 3)."""
    return np.repeat(light.reshape(*light.shape[:2], 1).round().clip(0, 255).astype(np.uint8), 3, axis=2)
