"""Annotators of colours and greys: a picture without its details, its places or its colours.

A picture in and a hint out, both uint8 RGB (H, W, 3). Keywords are options; their annotations say the ranges.
"""

import hashlib
from collections.abc import Callable
from typing import Annotated

import cv2
import numpy as np
from pydantic import Field

from controlkit.annotators.options import Slider
from controlkit.annotators.tiles import tiled
from controlkit.seeds import numpy_rng

Cell = Annotated[float, Field(gt=0, le=1), Slider(0.01, 0.5, 0.01)]
"""A share of the picture's short side."""
Blur = Annotated[float, Field(gt=0, le=1 / 4), Slider(0.001, 0.125, 0.001)]
"""A blur's width as a share of the short side; the work grows with it."""
Gamma = Annotated[float, Field(ge=0.01, le=100), Slider(0.1, 2, 0.01)]
"""An exponent: above 1 darker, below 1 lighter."""
Grey = Annotated[float, Field(ge=0, le=255), Slider(0, 255)]
"""A grey level."""


def color(picture: np.ndarray, cell: Cell = 1 / 8) -> np.ndarray:
    """A coarse grid of the picture's mean colours, as T2I-Adapter's colour model reads it (Mou et al., 2023).

    Args:
        cell: a square's side as a share of the short side; the released model's squares are 64 of 512 pixels.
    """
    height, width = picture.shape[:2]
    pixels = max(cell * min(height, width), 1)  # no cell is smaller: a strip would have more of them than pixels
    cells = max(round(width / pixels), 1), max(round(height / pixels), 1)
    means = cv2.resize(np.ascontiguousarray(picture), cells, interpolation=cv2.INTER_AREA)
    return cv2.resize(means, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def blur(picture: np.ndarray, width: Blur = 9 / 512) -> np.ndarray:
    """The picture under a Gaussian blur, for controls that sharpen; ``width``: its standard deviation."""
    sigma = width * min(picture.shape[:2])
    return tiled(lambda part: cv2.GaussianBlur(np.ascontiguousarray(part), (0, 0), sigma), picture, 4 * sigma + 1)


def luminance(picture: np.ndarray, gamma: Gamma = 1.0) -> np.ndarray:
    """The picture's lightness, L of CIELAB, as grey: for controls that colour it anew."""
    return _grey(picture, lambda part: cv2.cvtColor(part, cv2.COLOR_RGB2LAB)[..., 0], gamma)


def intensity(picture: np.ndarray, gamma: Gamma = 1.0) -> np.ndarray:
    """The largest of a pixel's red, green and blue, V of HSV, as grey: for controls that colour the picture anew."""
    return _grey(picture, lambda part: part.max(-1), gamma)


def _grey(picture: np.ndarray, of: Callable[[np.ndarray], np.ndarray], gamma: float) -> np.ndarray:
    levels = (255 * (np.arange(256) / 255) ** gamma).round().astype(np.uint8)
    return np.repeat(levels[of(np.ascontiguousarray(picture))][..., None], 3, axis=2)


def invert(picture: np.ndarray) -> np.ndarray:
    """The picture's negative: a drawing in dark lines on light paper as light lines on black."""
    return 255 - picture


def threshold(picture: np.ndarray, level: Grey = 127.0) -> np.ndarray:
    """White where red, green and blue are all above ``level``, black elsewhere."""
    return np.repeat(np.where(picture.min(-1) > level, 255, 0).astype(np.uint8)[..., None], 3, axis=2)


def shuffle(picture: np.ndarray, grain: Cell = 1 / 2) -> np.ndarray:
    """The picture's colours and textures, moved about, so that no form is left (ControlNet 1.1's content shuffle).

    Every pixel is taken from a place that changes smoothly across the picture and is drawn from its content: a picture
    is shuffled alike each time.

    Args:
        grain: how far apart, as a share of the short side, the places are drawn; small ones leave less of the forms.
    """
    height, width = picture.shape[:2]
    content = hashlib.blake2b(picture.tobytes(), digest_size=16).hexdigest()
    rng = numpy_rng("shuffle", *picture.shape, content)
    x, y = (_smooth(rng, (height, width), grain) * (side - 1) for side in (width, height))
    return cv2.remap(np.ascontiguousarray(picture), x, y, cv2.INTER_LINEAR)


def _smooth(rng: np.random.Generator, size: tuple[int, int], grain: float) -> np.ndarray:
    """Smooth noise, float32 (H, W), whose least value is 0 and largest 1."""
    cell = max(round(grain * min(size)), 1)
    drawn = [-(-side // cell) + 2 for side in size]
    noise = rng.uniform(size=drawn).astype(np.float32)
    grown = cv2.resize(noise, (drawn[1] * cell, drawn[0] * cell), interpolation=cv2.INTER_CUBIC)
    grown = grown[cell:, cell:][: size[0], : size[1]]  # at a margin it would not change
    low, high = float(grown.min()), float(grown.max())
    return (grown - low) / max(high - low, 1e-6)
