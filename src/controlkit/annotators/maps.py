"""Truth as hint pictures, and read back: depth, normals, labels and poses in the conventions released controls expect.

A hint picture is uint8 RGB (H, W, 3).
"""

import cv2
import numpy as np

from controlkit.annotators.people import POSE_COLOURS, POSE_LIMBS, Person, draw_people, limb_colour
from controlkit.errors import Invalid
from controlkit.images import DEEPEST
from controlkit.mini.truth import MIRRORED

FACING = (128, 128, 255)
"""The colour of a normal that points at the camera, and of where there is nothing."""


def depth_picture(depth: np.ndarray) -> np.ndarray:
    """Distances from the camera (H, W), in any unit, as light: near is light, as MiDaS draws it.

    Inverse depth, stretched from 0 to 255 over what is there; ``inf`` is nothing and black. What all lies at one
    distance is white.
    """
    there = np.isfinite(depth)
    if (depth[there] <= 0).any():
        raise Invalid("Some depths are not above 0: expected distances from the camera, inf where nothing is.")
    light = np.zeros(depth.shape)
    if there.any():
        inverse = 1.0 / depth[there]
        low, high = inverse.min(), inverse.max()
        light[there] = (inverse - low) / (high - low) if high > low else 1.0
    return np.repeat((255 * light).round().astype(np.uint8)[..., None], 3, axis=2)


def normal_picture(normals: np.ndarray) -> np.ndarray:
    """Unit normals (H, W, 3), x right, y up, z towards the camera, as colours (n + 1) x 127.5.

    A zero vector is nothing, and ``FACING``.
    """
    picture = ((normals + 1.0) * 127.5).round().clip(0, 255).astype(np.uint8)
    picture[~normals.any(-1)] = FACING
    return picture


def normals_of(picture: np.ndarray) -> np.ndarray:
    """Unit normals, float32 (H, W, 3), of a picture of normals; nothing reads as facing the camera."""
    normals = picture.astype(np.float32) / 127.5 - 1.0
    return normals / np.linalg.norm(normals, axis=-1, keepdims=True)  # no length is 0: 127.5 is no grey level


def turn_normals(hint: np.ndarray, total: float = 1.0) -> np.ndarray:
    """A hint of normals, (H, W, C), with x, its first channel, the other way round.

    In uint8 pictures, where there is nothing stays ``FACING``. ``total``: the sum of the two ends of floats' range.
    """
    turned = hint.copy()
    turned[..., 0] = DEEPEST.get(hint.dtype.name, total) - hint[..., 0]
    if hint.dtype == np.uint8:
        turned[(hint == FACING).all(-1)] = FACING
    return turned


def label_picture(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Labels (H, W), integers below K, in the colours of a palette, uint8 (K, 3)."""
    if labels.size and not 0 <= labels.min() <= labels.max() < len(palette):
        raise Invalid(f"Labels run from {labels.min()} to {labels.max()}: expected 0 to {len(palette) - 1}.")
    return palette[labels]


def labels_of(picture: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Labels (H, W) of a picture of labels: of each pixel, the colour of the palette (K, 3) nearest to it."""
    colours = palette.astype(np.float32)
    # The square of the pixel itself is the same for all colours. What remains is whole and below 2^24: exact.
    return ((colours**2).sum(-1) - 2 * picture.astype(np.float32) @ colours.T).argmin(-1)


def pose_picture(keypoints: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bodies as OpenPose draws them, on black (``people.draw_people``). No smoothing: colours tell the joints apart.

    Args:
        keypoints: (P, 18, 3), of each person and joint x and y in pixels, and 1 where it is visible, else 0.
        size: height and width of the picture.
    """
    return draw_people([Person(joints) for joints in keypoints], size)


def swap_sides(picture: np.ndarray) -> np.ndarray:
    """A picture of poses with the colours of left and right exchanged, for joints and limbs.

    ``Invalid`` where there are other colours than those: smoothed or blended ones do not say which limb is which.
    """
    number_of = {frozenset(limb): number for number, limb in enumerate(POSE_LIMBS)}
    pairs: list[tuple[tuple[int, ...], ...]] = [
        (POSE_COLOURS[joint], POSE_COLOURS[other]) for joint, other in enumerate(MIRRORED)
    ]
    for number, (start, end) in enumerate(POSE_LIMBS):
        other = number_of[frozenset((MIRRORED[start], MIRRORED[end]))]
        pairs.append((limb_colour(number), limb_colour(other)))
    swapped, known = np.zeros_like(picture), ~picture.any(-1)
    for colour, other_side in pairs:
        drawn = (picture == colour).all(-1)
        swapped[drawn] = other_side
        known |= drawn
    if not known.all():
        y, x = np.argwhere(~known)[0]
        raise Invalid(
            f"A picture of poses cannot be mirrored exactly: the colour {tuple(map(int, picture[y, x]))} at x {x}, "
            f"y {y} is that of no joint or limb (faces, hands and smoothed drawings have such). Set data.flip: 0, "
            "or draw the poses as `controlkit.annotators.maps.pose_picture` does."
        )
    return swapped


def keypoints_of(picture: np.ndarray) -> list[tuple[int, float, float]]:
    """(joint, x, y) of every joint in a picture of poses: centroids of connected pixels of exactly its colour."""
    found = []
    for joint, colour in enumerate(POSE_COLOURS):
        drawn = (picture == colour).all(-1).astype(np.uint8)
        _, _, _, centroids = cv2.connectedComponentsWithStats(drawn, connectivity=8)
        found += [(joint, float(x), float(y)) for x, y in centroids[1:]]  # the first is the background
    return found
