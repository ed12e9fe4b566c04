"""Annotators of the embedded world: depth, normals, labels and poses, read off pictures by `mini`'s observer.

They know the pictures of that world alone: of photographs they give nonsense.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from controlkit.annotators import maps
from controlkit.hub import shipped_path
from controlkit.mini.truth import Truth

if TYPE_CHECKING:
    from controlkit.mini.observer import Observer

_NAME = "observer"


def labels(truth: Truth) -> np.ndarray:
    """The labels of a scene as a picture, in the scenes' own colours."""
    from controlkit.mini.scenes import PALETTE  # numba's import takes a second

    return maps.label_picture(truth.labels, PALETTE)


def pose(truth: Truth) -> np.ndarray:
    """The persons of a scene, as OpenPose draws them."""
    return maps.pose_picture(truth.keypoints, truth.labels.shape)


def depth(truth: Truth) -> np.ndarray:
    """The depth of a scene as a picture, near is light."""
    return maps.depth_picture(truth.depth)


def normal(truth: Truth) -> np.ndarray:
    """The normals of a scene as colours."""
    return maps.normal_picture(truth.normals)


def observed(draw: Callable[[Truth], np.ndarray]) -> Callable[[Sequence[np.ndarray], str], list[np.ndarray]]:
    """An annotator that draws what the observer reads off each picture."""

    def annotate(pictures: Sequence[np.ndarray], device: str) -> list[np.ndarray]:
        return [draw(seen) for seen in _observer(device).observe(pictures)]

    return annotate


@cache
def _observer(device: str) -> "Observer":
    from controlkit.mini.observer import Observer

    return Observer.load(shipped_path(_NAME)).to(device)


@cache
def weights() -> str:
    """The digest of the observer's files."""
    total = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        total.update((shipped_path(_NAME) / name).read_bytes())
    return total.hexdigest()
