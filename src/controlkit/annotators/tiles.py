"""Large pictures in tiles: for annotators whose every pixel depends on the pixels near it alone."""

from collections.abc import Callable

import numpy as np

SIDE = 2048
"""The side of a tile, in pixels. A picture of at most four times as many pixels is worked on whole."""


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
