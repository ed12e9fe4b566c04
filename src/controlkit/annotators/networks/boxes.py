"""Boxes of things that detectors find."""

import numpy as np


def overlap(low: np.ndarray, high: np.ndarray, lows: np.ndarray, highs: np.ndarray) -> np.ndarray:
    """Intersection over union (N,) of a box with boxes, of their corners (2,) and (N, 2)."""
    inner = np.clip(np.minimum(high, highs) - np.maximum(low, lows), 0, None).prod(-1)
    union = (high - low).prod() + (highs - lows).prod(-1) - inner
    return np.asarray(inner / np.maximum(union, 1e-12))
