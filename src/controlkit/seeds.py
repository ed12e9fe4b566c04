"""Random draws keyed by their purpose, never by the time they are made.

A draw for (seed, step, sample) is the same whatever the batch size, the order of the work, the number
of workers or the point at which a run was resumed. (One exception: the noise a generated picture starts
from is what ``torch.Generator().manual_seed(seed)`` gives, because that is what a seed means to everyone else.)
"""

import hashlib

import numpy as np
import torch

Key = int | str


def _words(key: tuple[Key, ...]) -> list[int]:
    plain = tuple(part if isinstance(part, str) else int(part) for part in key)  # numpy's 3 is 3
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=16).digest()
    return [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)]


def numpy_rng(*key: Key) -> np.random.Generator:
    """A numpy generator that depends on the key alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(_words(key))))


def torch_rng(*key: Key) -> torch.Generator:
    """A CPU torch generator that depends on the key alone."""
    low, high, *_ = _words(key)
    return torch.Generator().manual_seed((high << 31) ^ low)
