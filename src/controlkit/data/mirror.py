"""Pairs seen in a mirror: picture, hint and scene; pairs whose prompts name a side are not mirrored."""

import re
from dataclasses import replace

import numpy as np

from controlkit.annotators import kind_or_bare, parts_of
from controlkit.data.pairs import Pair, hint_for_pair
from controlkit.errors import Invalid
from controlkit.images import HintSpec
from controlkit.mini.truth import MIRRORED

SIDES = re.compile(r"\b(left|right|clockwise|counterclockwise|anticlockwise)", re.IGNORECASE)
"""Words of prompts that would be wrong of a mirror image."""


def mirrored(pair: Pair, contract: HintSpec) -> Pair | None:
    """The pair seen in a mirror; None where its prompt names left or right, and would be wrong of it.

    A scene's truth is mirrored, and its hint drawn from that; an annotation is that of the mirrored picture. A hint of
    the pair's own is mirrored by its kind's rule (``HintKind.mirror``): limbs exchange their colours, normals the sign
    of their x, others only change places, so that labels that name a side would be wrong. ``Invalid`` where the kind is
    not known, or a hint cannot be mirrored exactly.
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
        raise Invalid(
            "data.flip mirrors hints, and these are of no named kind: of normals and poses more changes than places. "
            "Set control.annotator, or data.flip: 0."
        )
    return kind_or_bare(contract.annotator).mirror(np.ascontiguousarray(hint[:, ::-1]), contract)


def mirrored_scene(scene):  # type: ignore[no-untyped-def]  # numba's import takes a second, so no type of it
    """A scene (``mini.scenes.Scene``) and all that is known of it, in a mirror."""
    fields = ("picture", "depth", "labels", "instances", "edges")
    turned = {name: np.ascontiguousarray(getattr(scene, name)[:, ::-1]) for name in fields}
    width = scene.picture.shape[1]
    normals = scene.normals[:, ::-1] * np.float32([-1, 1, 1])
    lines = np.float32([width, 0, width, 0]) + scene.lines * np.float32([-1, 1, -1, 1])
    keypoints = scene.keypoints[:, MIRRORED] * np.float32([-1, 1, 1]) + np.float32([width, 0, 0])
    return replace(scene, **turned, normals=normals, lines=lines, keypoints=keypoints)
