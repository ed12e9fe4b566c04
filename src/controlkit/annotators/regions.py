"""Annotators that keep the picture: low-passed, or with a hole. Keywords are options; annotations say the ranges."""

import hashlib
from typing import Annotated

import cv2
import numpy as np
from pydantic import Field

from controlkit.annotators.options import Slider
from controlkit.errors import Invalid
from controlkit.seeds import numpy_rng

Part = Annotated[float, Field(gt=0, lt=1)]
"""A share of the picture."""

Shrink = Annotated[float, Field(ge=1, le=1000), Slider(1, 32, 0.5)]
"""How many times smaller a picture is made."""
_LONG = 4
"""How many times as long as wide a picture is at most in which a hole is drawn."""
_MOST_DRAWN = 0.6
"""The largest share of a picture that an ellipse, or a brush in a bounded time, covers; larger holes are boxes."""


def tile(picture: np.ndarray, shrink: Shrink = 8.0) -> np.ndarray:
    """The picture low-passed: made ``shrink`` (1 to 1000) times smaller and grown back; 1 leaves it as it is."""
    height, width = picture.shape[:2]
    small = (max(round(width / shrink), 1), max(round(height / shrink), 1))
    if small == (width, height):
        return picture
    shrunk = cv2.resize(picture, small, interpolation=cv2.INTER_AREA)
    return cv2.resize(shrunk, (width, height), interpolation=cv2.INTER_CUBIC)


def whole(picture: np.ndarray) -> np.ndarray:
    """The picture as it is."""
    return picture


def inpaint(picture: np.ndarray, least: Part = 0.1, most: Part = 0.4) -> np.ndarray:
    """The picture with a hole, uint8 RGBA (H, W, 4): alpha 0 (and black) in the hole, 255 elsewhere.

    A picture that has a mask, (H, W, 4), keeps it. Else a hole is drawn that depends on the picture alone, so that it
    is the same each time: a box, an ellipse or one to three strokes of a thick brush.

    Args:
        least, most: the least and largest share of the picture that the hole takes; ``Invalid`` if out of order.
    """
    if picture.shape[-1] == 4:
        return picture
    if not 0 < least <= most < 1:
        raise Invalid(f"inpaint's hole takes {least:g} to {most:g} of the picture: expected 0 < least <= most < 1.")
    content = hashlib.blake2b(picture.tobytes(), digest_size=16).hexdigest()
    hole = _hole(picture.shape[:2], numpy_rng("inpaint", *picture.shape, content), least, most)
    alpha = np.where(hole, 0, 255).astype(np.uint8)
    return np.dstack([np.where(hole[..., None], 0, picture), alpha]).astype(np.uint8)


def outpaint(picture: np.ndarray, margin: Annotated[float, Field(gt=0, lt=0.5)] = 0.2) -> np.ndarray:
    """The picture without its margin, uint8 RGBA (H, W, 4): alpha 0 (and black) there, 255 elsewhere.

    A picture that has a mask, (H, W, 4), keeps it.

    Args:
        margin: its width at each side, as a share of the picture's height and width.
    """
    if picture.shape[-1] == 4:
        return picture
    height, width = picture.shape[:2]
    above, left = max(round(margin * height), 1), max(round(margin * width), 1)
    shown = np.zeros((height, width), bool)
    shown[above : height - above, left : width - left] = True
    alpha = np.where(shown, 255, 0).astype(np.uint8)
    return np.dstack([np.where(shown[..., None], picture, 0), alpha]).astype(np.uint8)


def _hole(size: tuple[int, int], rng: np.random.Generator, least: float, most: float) -> np.ndarray:
    """A hole (H, W), boolean, of a share between ``least`` and ``most``, as nearly as whole pixels allow.

    A strip's hole is drawn in a part of it four times as long as wide, and stretched: a brush wanders, and would need
    hours to cover a share of a long strip.
    """
    height, width = size
    if max(size) > _LONG * min(size):
        most_long = _LONG * min(size)
        drawn = _hole((min(height, most_long), min(width, most_long)), rng, least, most)
        return cv2.resize(drawn.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0
    hole = np.zeros(size, np.uint8)
    kind = ("box", "ellipse", "strokes")[rng.integers(3)] if most <= _MOST_DRAWN else "box"
    if kind == "strokes":
        thick = max(round(rng.uniform(0.08, 0.16) * min(size)), 1)
        # A last dab, a disc and a half of the brush, goes beyond the share at which it was due.
        share = rng.uniform(least, max(most - 1.5 * thick**2 / (height * width), least))
        count, covered = rng.integers(1, 4), 0
        for stroke in range(1, count + 1):
            at, heading = rng.uniform((0, 0), (width, height)), rng.uniform(0, 2 * np.pi)
            while covered / hole.size < share * stroke / count:
                heading += rng.normal(0, 0.5)
                step = at + thick / 2 * np.array([np.cos(heading), np.sin(heading)])
                if ((step < 0) | (step >= (width, height))).any():  # turn back at the margin
                    heading += np.pi / 2
                    continue
                covered += _stroke(hole, at, step, thick)
                at = step
        return hole > 0
    share, aspect = rng.uniform(least, most), 2 ** rng.uniform(-0.5, 0.5)
    part = share if kind == "box" else min(share * 4 / np.pi, 1.0)  # of the box about it
    across = np.clip(np.sqrt(part * aspect), part, 1.0)
    down = part / across
    left, top = rng.uniform(0, 1 - across) * width, rng.uniform(0, 1 - down) * height
    y, x = np.mgrid[:height, :width] + 0.5
    u, v = (x - left) / (across * width), (y - top) / (down * height)
    inside = (abs(u - 0.5) < 0.5) & (abs(v - 0.5) < 0.5)
    return inside if kind == "box" else (u - 0.5) ** 2 + (v - 0.5) ** 2 < 0.25


def _stroke(hole: np.ndarray, start: np.ndarray, end: np.ndarray, thick: int) -> int:
    """Draw a line into a hole; the pixels that it has more. They are counted about the line alone, which is quick."""
    low, high = (np.minimum(start, end) - thick - 1).clip(0), np.maximum(start, end) + thick + 2
    about = hole[int(low[1]) : int(high[1]), int(low[0]) : int(high[0])]
    before = np.count_nonzero(about)
    cv2.line(hole, (int(start[0]), int(start[1])), (int(end[0]), int(end[1])), 1, thick)
    return int(np.count_nonzero(about) - before)
