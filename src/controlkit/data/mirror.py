"""Pairs seen in a mirror: what the picture shows, what its hint says, and what must not be mirrored."""

import re
from dataclasses import replace

import numpy as np

from controlkit.annotators import maps, parts_of
from controlkit.data.pairs import Pair, hint_for_pair
from controlkit.errors import UserError
from controlkit.images import DEEPEST, HintSpec

POSES = ("pose", "openpose")
"""Hints whose colours tell left from right."""
SIDES = re.compile(r"\b(left|right|clockwise|counterclockwise|anticlockwise)", re.IGNORECASE)
"""Words of prompts that would be wrong of a mirror image."""


def mirrored(pair: Pair, contract: HintSpec) -> Pair | None:
    """The pair seen in a mirror; None where its prompt tells left from right, and would be wrong of it.

    What is known of the picture is mirrored, and a hint drawn from that; an annotation is that of the mirrored picture.
    Of a hint that is only a picture the left and right limbs change colours, normals change the sign of their x, and
    everything else is mirrored as it is: labels that tell left from right would be wrong. ``UserError`` where it cannot
    be done rightly.
    """
    if SIDES.search(pair.prompt):
        return None
    picture = np.ascontiguousarray(pair.picture[:, ::-1])
    if pair.hint is not None:
        own, parts = hint_for_pair(pair, contract), parts_of(contract)
        turned = [_mirrored_hint(*one) for one in zip(np.split(own, len(parts), 2), parts, strict=True)]
        return replace(pair, picture=picture, hint=np.concatenate(turned, 2), more=(), truth=None)
    if pair.truth is not None:
        return replace(pair, picture=picture, truth=mirrored_scene(pair.truth))
    return replace(pair, picture=picture)


def _mirrored_hint(hint: np.ndarray, contract: HintSpec) -> np.ndarray:
    if not contract.annotator:
        raise UserError(
            "data.flip mirrors hints, and nobody says what these are: of normals and poses more changes than places. "
            "Set control.annotator, or data.flip: 0."
        )
    turned = np.ascontiguousarray(hint[:, ::-1])
    if contract.annotator in POSES:
        return maps.swap_sides(turned)
    if contract.annotator != "normal":
        return turned
    if turned.dtype == np.uint8:
        return maps.turn_normals(turned)
    most = DEEPEST.get(turned.dtype.name)
    turned[..., 0] = (contract.low + contract.high if most is None else most) - turned[..., 0]
    return turned


def mirrored_scene(scene):  # type: ignore[no-untyped-def]  # numba's import takes a second, so no type of it
    """A scene (``mini.scenes.Scene``) and all that is known of it, in a mirror."""
    fields = ("picture", "depth", "labels", "instances", "edges")
    turned = {name: np.ascontiguousarray(getattr(scene, name)[:, ::-1]) for name in fields}
    width = scene.picture.shape[1]
    normals = scene.normals[:, ::-1] * np.float32([-1, 1, 1])
    lines = np.float32([width, 0, width, 0]) + scene.lines * np.float32([-1, 1, -1, 1])
    keypoints = scene.keypoints[:, maps.POSE_MIRROR] * np.float32([-1, 1, 1]) + np.float32([width, 0, 0])
    return replace(scene, **turned, normals=normals, lines=lines, keypoints=keypoints)
