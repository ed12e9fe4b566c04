"""The truth about a picture, as scenes know it and the observer reads it; needs neither numba nor torch."""

from typing import Protocol

import numpy as np

JOINTS = 18
"""Joints of a body, in OpenPose's COCO-18 order (``annotators.maps.POSE_LIMBS``)."""
MIRRORED = (0, 1, 5, 6, 7, 2, 3, 4, 11, 12, 13, 8, 9, 10, 15, 14, 17, 16)
"""The joint that each joint is in a mirror: left for right."""


class Truth(Protocol):
    """The fields that a ``scenes.Scene`` and an ``observer.Observation`` share; shapes and units as there."""

    @property
    def depth(self) -> np.ndarray: ...
    @property
    def normals(self) -> np.ndarray: ...
    @property
    def labels(self) -> np.ndarray: ...
    @property
    def keypoints(self) -> np.ndarray: ...
