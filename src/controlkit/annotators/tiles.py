"""Large pictures: in tiles where pixels depend on near ones alone, made smaller where OpenCV takes none so long."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import cv2
import numpy as np

SIDE = 2048
"""The side of a tile, in pixels. A picture of at most four times as many pixels is worked on whole."""
LONGEST = 2**15 - 2
"""The longest side of a picture whose pixels OpenCV moves (``warpAffine``, ``remap``)."""


def shortened(function: Callable[..., Sequence[np.ndarray]]) -> Callable[..., list[np.ndarray]]:
    """Adapt an annotator of pictures, in which OpenCV moves pixels, to strips of any length.

    Pictures with a longer side than ``LONGEST`` are made smaller first, and their hints larger again.
    """

    @wraps(function)
    def annotate(pictures: Sequence[np.ndarray], device: str, **options: Any) -> list[np.ndarray]:
        made = function([_shorter(picture) for picture in pictures], device, **options)
        return [_grown(hint, picture.shape[:2]) for hint, picture in zip(made, pictures, strict=True)]

    return annotate


def _shorter(picture: np.ndarray) -> np.ndarray:
    factor = LONGEST / max(picture.shape[:2])
    if factor >= 1:
        return picture
    width, height = (max(int(side * factor), 1) for side in picture.shape[1::-1])
    return cv2.resize(np.ascontiguousarray(picture), (width, height), interpolation=cv2.INTER_AREA)


def _grown(hint: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return hint if hint.shape[:2] == size else cv2.resize(hint, size[::-1], interpolation=cv2.INTER_NEAREST)


def tiled(local: Callable[[np.ndarray], np.ndarray], picture: np.ndarray, reach: float) -> np.ndarray:
    """The values of ``local`` on a picture (H, W, C), which is large in memory; tile by tile, where it is large itself.

    Each tile is given with the pixels around it, so that no seam is seen, and only its own part is kept. What lies
    beyond the picture is for ``local`` to say, as without tiles.

    Args:
        local: from a part of the picture (h, w, C) to values (h, w, ...) of one type.
        reach: how many pixels away a pixel may matter.
    """
    height, width = picture.shape[:2]
    if height * width <= 4 * SIDE**2:
        return local(picture)
    side, margin, values = SIDE, int(np.ceil(reach)), None
    for top in range(0, height, side):
        for left in range(0, width, side):
            above, before = max(top - margin, 0), max(left - margin, 0)
            part = local(picture[above : top + side + margin, before : left + side + margin])
            part = part[top - above :, left - before :][:side, :side]
            if values is None:
                values = np.empty((height, width, *part.shape[2:]), part.dtype)
            values[top : top + side, left : left + side] = part
    assert values is not None
    return values
