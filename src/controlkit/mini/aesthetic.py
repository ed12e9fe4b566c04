"""A rating of how well-made a picture is, 0 to 10: a small head on the features of the referee's image tower.

Trained by ``recipes/referees.py`` on the world's pictures and the same ones damaged by a known amount. It knows the
damages of this file, not beauty.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np
from torch import Tensor, nn

from controlkit.mini.stored import Stored


class AestheticHead(Stored):
    """A rating from ``ImageTextTower.features``. ``config``: the number of ``features``, and the hidden ``width``."""

    def __init__(self, config: dict) -> None:
        super().__init__(config)
        self.layers = nn.Sequential(
            nn.LayerNorm(config["features"]),
            nn.Linear(config["features"], config["width"]),
            nn.SiLU(),
            nn.Linear(config["width"], 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Ratings (B,) from 0 (destroyed) to 10 (as drawn) of pictures with these features (B, C)."""
        return 10 * self.layers(features.float()).squeeze(-1).sigmoid()


def _blur(picture: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    return cv2.GaussianBlur(picture, (0, 0), 0.05 * amount * len(picture) + 1e-3)


def _noise(picture: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    return picture + 90 * amount * rng.normal(size=picture.shape)


def _jpeg(picture: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    options = [cv2.IMWRITE_JPEG_QUALITY, round(1 + 60 * (1 - amount) ** 2)]
    written = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), options)[1]
    return cv2.cvtColor(cv2.imdecode(written, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def _shuffle(picture: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """A share of the blocks go round in a ring."""
    side = max(len(picture) // int(rng.choice((8, 16))), 1)
    rows, columns = len(picture) // side, picture.shape[1] // side
    order = rng.permutation(rows * columns)[: round(amount * rows * columns)]
    damaged = picture.copy()
    for here, there in zip(order, np.roll(order, 1), strict=True):
        (y, x), (v, u) = ((side * k for k in divmod(int(i), columns)) for i in (here, there))
        damaged[y : y + side, x : x + side] = picture[v : v + side, u : u + side]
    return damaged


def _posterise(picture: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    step = 255 / (1 + 11 * (1 - amount) ** 2)
    return (picture / step).round() * step


def _recolour(picture: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Towards the same picture with its channels in another order and one of them inverted."""
    other = picture[..., [(1, 2, 0), (2, 0, 1)][rng.integers(2)]].astype(np.float64)
    channel = rng.integers(3)
    other[..., channel] = 255 - other[..., channel]
    return picture + amount * (other - picture)


def _smear(picture: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """As a VAE that has not learnt enough: pixels wander together, detail goes, blotches come."""
    height, width = picture.shape[:2]

    def waves(count: int) -> np.ndarray:
        return cv2.resize(rng.normal(size=(12, 12, count)), (width, height), interpolation=cv2.INTER_CUBIC)

    y, x = np.mgrid[:height, :width]
    moved = np.stack([x, y], axis=-1) + 0.06 * amount * width * waves(2)
    bent = cv2.remap(picture, moved.astype(np.float32), None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    return cv2.GaussianBlur(bent, (0, 0), 0.015 * amount * width + 1e-3) + 25 * amount * waves(3)


DAMAGES: dict[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]] = {
    "blur": _blur, "noise": _noise, "jpeg": _jpeg, "shuffle": _shuffle, "posterise": _posterise,
    "recolour": _recolour, "smear": _smear,
}  # fmt: skip
"""Kinds of damage: name -> (picture, amount, rng) -> pixels, in need of rounding."""


def damage(
    picture: np.ndarray, amount: float, rng: np.random.Generator, kinds: Sequence[str] = tuple(DAMAGES)
) -> np.ndarray:
    """A picture, uint8 (H, W, 3), damaged by an amount from 0 (not at all) to 1, by one of the kinds, or two at once.

    Drawn from ``rng`` alone: the same generator gives the same damage, more of it for a greater amount.
    """
    chosen = rng.choice(kinds, size=min(1 + int(rng.random() < 0.3), len(kinds)), replace=False)
    if amount <= 0:
        return picture
    pixels = np.ascontiguousarray(picture)
    for kind in chosen:
        # Two together should not be worse than either of them alone.
        damaged = DAMAGES[kind](pixels, amount / len(chosen) ** 0.5, rng)
        pixels = np.clip(np.round(damaged), 0, 255).astype(np.uint8)
    return pixels
