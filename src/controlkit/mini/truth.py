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
    def depth(self) -> np.ndarray:
        """float32 (H, W), metres; infinite for sky."""

    @property
    def normals(self) -> np.ndarray:
        """float32 (H, W, 3), unit vectors in camera space; zero for sky."""

    @property
    def labels(self) -> np.ndarray:
        """uint8 (H, W), indices into the classes."""

    @property
    def keypoints(self) -> np.ndarray:
        """float32 (P, 18, 3), x and y in pixels, and 1 where the joint is visible."""
