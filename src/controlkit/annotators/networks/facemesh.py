"""Faces as outlines, by MediaPipe's mesh: hints as ControlNetMediaPipeFace reads them (CrucibleAI and LAION, 2023)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import cv2
import numpy as np
from pydantic import Field

from controlkit.annotators.networks.mediapipe import find_meshes
from controlkit.annotators.options import Slider
from controlkit.annotators.tiles import shortened

_RIGHT_EYE = (
    (33, 7, 163, 144, 145, 153, 154, 155, 133),
    (33, 246, 161, 160, 159, 158, 157, 173, 133),
)
_LEFT_EYE = (
    (263, 249, 390, 373, 374, 380, 381, 382, 362),
    (263, 466, 388, 387, 386, 385, 384, 398, 362),
)
_OUTLINES: tuple[tuple[tuple[int, int, int], tuple[tuple[int, ...], ...]], ...] = (
    ((10, 200, 10), (  # the face
        (10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152, 148, 176, 149,
         150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109, 10),
    )),
    ((10, 200, 180), _LEFT_EYE),
    ((10, 220, 180), ((276, 283, 282, 295, 285), (300, 293, 334, 296, 336))),
    ((180, 200, 10), _RIGHT_EYE),
    ((180, 220, 10), ((46, 53, 52, 65, 55), (70, 63, 105, 66, 107))),
    ((10, 180, 10), (  # the lips
        (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291),
        (61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291),
        (78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308),
        (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308),
    )),
)  # fmt: skip
"""Colours (RGB) of outlines, in the order in which they are drawn, and the mesh's points along them: MediaPipe's
FACEMESH_CONTOURS. Left and right are the face's own."""
_PUPILS = (((250, 200, 10), _RIGHT_EYE), ((10, 200, 250), _LEFT_EYE))
_THICK, _HALF = 2, 2
"""The width of lines and half the side of pupils, in pixels of a picture whose short side is 512."""


def draw_meshes(meshes: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Meshes of faces, (468, 2) in pixels each, as outlines on black: uint8 (H, W, 3). Points beyond are left out.

    The released annotator has the pupils of a larger network; here each is the middle of its eye.
    """
    picture, side = np.zeros((*size, 3), np.uint8), min(size) / 512
    thick, half = max(round(_THICK * side), 1), max(round(_HALF * side), 1)
    for mesh in meshes:
        at = np.floor(mesh).astype(int)
        inside = ((at >= 0) & (at < size[::-1])).all(-1)
        for colour, chains in _OUTLINES:
            for a, b in (pair for chain in chains for pair in pairwise(chain)):
                if inside[a] and inside[b]:
                    cv2.line(picture, at[a].tolist(), at[b].tolist(), colour, thick)
        for colour, eye in _PUPILS:
            x, y = mesh[sorted({point for chain in eye for point in chain})].mean(0).astype(int)
            if 0 <= x < size[1] and 0 <= y < size[0]:
                picture[max(y - half, 0) : y + half, max(x - half, 0) : x + half] = colour
    return picture


Faces = Annotated[float, Field(ge=1, le=100), Slider(1, 10)]
Least = Annotated[float, Field(gt=0, le=1)]


@shortened
def mediapipe_face(
    pictures: Sequence[np.ndarray], device: str, faces: Faces = 1.0, sure: Least = 0.5
) -> list[np.ndarray]:
    """Outlines of faces. ``faces``: how many at most, the surest first; ``sure``: the least score of one."""
    found = [find_meshes(np.ascontiguousarray(picture), round(faces), sure) for picture in pictures]
    return [draw_meshes(meshes, p.shape[:2]) for meshes, p in zip(found, pictures, strict=True)]
