"""Names and shapes of public files of weights, as ``tests/annotators/keys`` lists them."""

import math
from pathlib import Path

import numpy as np
import torch

KEYS = Path(__file__).parents[1] / "keys"


def shape_of(words):
    """A shape as listings write it, such as ``64x3x3x3``, or ``scalar``."""
    return () if words == "scalar" else tuple(map(int, words.split("x")))


def listed(name):
    """{name: shape} of a public file."""
    lines = [line.split() for line in (KEYS / f"{name}.txt").read_text().splitlines() if not line.startswith("#")]
    return {key: shape_of(shape) for key, shape in lines}


def drawn(name, seed=0):
    """Random tensors of a public file's names and shapes, which keep the spread of what goes through them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.zeros((), dtype=torch.long)
        if key.endswith("num_batches_tracked")
        else torch.rand(shape, generator=generator) + 0.5
        if key.endswith("running_var")
        else torch.randn(shape, generator=generator) * (2 / max(math.prod(shape[1:]), 2)) ** 0.5
        if len(shape) > 1
        else torch.randn(shape, generator=generator) * 0.1 + key.endswith("running_mean")
        for key, shape in listed(name).items()
    }


def noise(height, width, seed=0):
    """A picture of random pixels."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
