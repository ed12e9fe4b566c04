"""People as points: bodies, hands and faces, drawn as OpenPose draws them, and read and written as OpenPose's JSON."""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import cv2
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from controlkit.errors import Invalid, first_fault
from controlkit.files import parse_json
from controlkit.mini.truth import JOINTS

POSE_LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10),
    (1, 11), (11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
"""Pairs of joints that OpenPose joins, in the order it draws them. Joints are in its COCO-18 order: nose, neck,
right shoulder, elbow, wrist, the left ones, right hip, knee, ankle, the left ones, eyes and ears, right before left."""

POSE_COLOURS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0),
    (0, 255, 0), (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255),
    (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85),
)  # fmt: skip
"""OpenPose's colour (RGB) of each joint; a limb has the colour of its own number, darkened to 60%."""

HAND, FACE = 21, 70
"""Points of a hand (the wrist, then thumb to little finger from the palm to the tip) and of a face (68 of iBUG's
300-W, then the pupils, right before left)."""
_FINGERS = tuple((4 * finger + part if part else 0, 4 * finger + part + 1) for finger in range(5) for part in range(4))
_HAND_COLOURS = tuple(tuple(round(255 * c) for c in colorsys.hsv_to_rgb(i / 20, 1, 1)) for i in range(20))
_SEEN = 0.05
"""The least confidence of a point that is drawn, as OpenPose draws by default."""
_BODY_25 = (*range(8), *range(9, 19))
"""Where the joints of COCO-18 are in OpenPose's later body of 25 points, whose ninth is the middle of the hips."""
_COCO = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
"""The point of COCO's 17 that each joint is; the neck is none of them."""
_COCO_SHOULDERS = (5, 6)
MOST_PEOPLE = 100
LONGEST_SIDE = 2**14


def unseen(count: int) -> np.ndarray:
    """Points of which none is seen, float32 (count, 3)."""
    return np.zeros((count, 3), np.float32)


@dataclass(frozen=True)
class Person:
    """The points of a person: x and y in pixels, and the confidence from 0 (not seen) to 1. float32 (points, 3) each.

    Left and right are the person's own.
    """

    body: np.ndarray = field(default_factory=lambda: unseen(JOINTS))
    left_hand: np.ndarray = field(default_factory=lambda: unseen(HAND))
    right_hand: np.ndarray = field(default_factory=lambda: unseen(HAND))
    face: np.ndarray = field(default_factory=lambda: unseen(FACE))


def body_of_coco(points: np.ndarray) -> np.ndarray:
    """OpenPose's joints (18, 3) of COCO's points (17 or more, 3), whose third column is 0 where nothing is seen.

    The neck is the middle of the shoulders, seen where both are.
    """
    body = unseen(JOINTS)
    for joint, source in enumerate(_COCO):
        pair = points[list(_COCO_SHOULDERS) if source is None else [source]]
        body[joint] = pair.mean(0) if (pair[:, 2] > 0).all() else 0
    return body


# --- drawing ------------------------------------------------------------------------------------------------------


def draw_people(
    people: Sequence[Person], size: tuple[int, int], body: bool = True, hands: bool = True, face: bool = True
) -> np.ndarray:
    """People as OpenPose draws them for ControlNets, on black: uint8 (H, W, 3). Nothing is smoothed.

    Widths are shares of the short side; at 512 pixels those of the released annotator. Limbs are ellipses at most 8
    thick, over them lies each joint, a disc of radius 4 in its own full colour; fingers are lines 2 thick with discs of
    radius 4, points of faces discs of radius 3. Smaller pictures than of 256 pixels have plain lines as limbs.

    Args:
        size: height and width of the picture.
        body, hands, face: which of the points are drawn.
    """
    picture = np.zeros((*size, 3), np.uint8)
    for person in people:
        if body:
            _draw_body(picture, person.body)
        for hand in (person.left_hand, person.right_hand) if hands else ():
            _draw_hand(picture, hand)
        for at in filter(None, _places(person.face)) if face else ():
            cv2.circle(picture, at, _share(picture, 3), (255, 255, 255), -1)
    return picture


def _places(points: np.ndarray) -> list[tuple[int, int] | None]:
    """The pixel of each point; None where it is not seen, or far outside of every picture."""
    seen = (points[:, 2] > _SEEN) & (abs(points[:, :2]) < 2 * LONGEST_SIDE).all(-1)
    return [(round(float(x)), round(float(y))) if s else None for (x, y, _), s in zip(points, seen, strict=True)]


def _share(picture: np.ndarray, width: int) -> int:
    """A width in pixels of a picture whose short side is 512, in pixels of this one."""
    return max(round(width * min(picture.shape[:2]) / 512), 1)


def limb_colour(number: int) -> tuple[int, ...]:
    """The colour (RGB) of a limb of ``POSE_LIMBS``."""
    return tuple(round(0.6 * value) for value in POSE_COLOURS[number])


def _draw_body(picture: np.ndarray, joints: np.ndarray) -> None:
    at, thick, side = _places(joints), _share(picture, 8), min(picture.shape[:2])
    for number, (start, end) in enumerate(POSE_LIMBS):
        a, b = at[start], at[end]
        if a is None or b is None:
            continue
        if thick < 4:
            cv2.line(picture, a, b, limb_colour(number), thick)
            continue
        middle, axes = ((a[0] + b[0]) // 2, (a[1] + b[1]) // 2), (int(math.dist(a, b) / 2), thick // 2)
        angle = int(math.degrees(math.atan2(a[1] - b[1], a[0] - b[0])))  # cut off as there: the same to the pixel
        cv2.fillConvexPoly(picture, cv2.ellipse2Poly(middle, axes, angle, 0, 360, 1), limb_colour(number))
    radius = max(_share(picture, 4), min(round(side / 80), 2))  # in small ones larger: a joint must be found again
    for joint, colour in zip(at, POSE_COLOURS, strict=True):
        if joint:
            cv2.circle(picture, joint, radius, colour, -1)


def _draw_hand(picture: np.ndarray, points: np.ndarray) -> None:
    at = _places(points)
    for (start, end), colour in zip(_FINGERS, _HAND_COLOURS, strict=True):
        if (a := at[start]) and (b := at[end]):
            cv2.line(picture, a, b, colour, _share(picture, 2))
    for point in filter(None, at):
        cv2.circle(picture, point, _share(picture, 4), (0, 0, 255), -1)


# --- OpenPose's JSON ----------------------------------------------------------------------------------------------

_Number = Annotated[float, Field(ge=-1e6, le=1e6)]
_Points = Annotated[list[_Number], Field(max_length=3 * FACE)]


class _PersonEntry(BaseModel):
    """A person in OpenPose's JSON: x, y and confidence of each point in a row; other keys are of no use here."""

    model_config = ConfigDict(extra="ignore", strict=False, allow_inf_nan=False)

    pose_keypoints_2d: _Points | None = None
    hand_left_keypoints_2d: _Points | None = None
    hand_right_keypoints_2d: _Points | None = None
    face_keypoints_2d: _Points | None = None


class _Canvas(BaseModel):
    """OpenPose's JSON of one picture."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    people: Annotated[list[_PersonEntry], Field(max_length=MOST_PEOPLE)] = []
    canvas_width: Annotated[int, Field(ge=1, le=LONGEST_SIDE)]
    canvas_height: Annotated[int, Field(ge=1, le=LONGEST_SIDE)]


def people_to_json(people: Sequence[Person], size: tuple[int, int]) -> dict[str, Any]:
    """People as OpenPose's JSON, as A1111's controlnet extension and pose editors write it; ``size``: (height, width).

    Coordinates are pixels, and the confidence of what is seen 1; of hands and faces of which nothing is seen, None.
    """
    parts = {"pose": "body", "hand_left": "left_hand", "hand_right": "right_hand", "face": "face"}
    entries = [
        {f"{key}_keypoints_2d": _row(getattr(person, name), name == "body") for key, name in parts.items()}
        for person in people
    ]
    return {"people": entries, "canvas_width": size[1], "canvas_height": size[0]}


def _row(points: np.ndarray, always: bool) -> list[float] | None:
    seen = points[:, 2] > _SEEN
    if not (always or seen.any()):
        return None
    whole = np.where(seen[:, None], np.column_stack([points[:, :2], np.ones(len(points))]), 0.0)
    return [round(float(value), 2) for value in whole.ravel()]


def people_from_json(given: str | dict[str, Any]) -> tuple[list[Person], tuple[int, int]]:
    """(people, (height, width) of their picture) of OpenPose's JSON: a text, or what was parsed of one already.

    Bodies may have 18 points or 25. Coordinates are pixels, or, where all of a person's are at most 1, shares of the
    sides. Raises ``Invalid`` for anything else.
    """
    value = parse_json(given, "OpenPose's JSON") if isinstance(given, str) else given
    try:
        canvas = _Canvas.model_validate(value)
    except ValidationError as error:
        raise Invalid(first_fault(error, "OpenPose's JSON", _Canvas.model_fields)) from None
    size = (canvas.canvas_height, canvas.canvas_width)
    return [_person(entry, size) for entry in canvas.people], size


def _person(entry: _PersonEntry, size: tuple[int, int]) -> Person:
    body = _points(entry.pose_keypoints_2d, "pose", (JOINTS, 25))
    parts = [
        body[list(_BODY_25)] if len(body) == 25 else body,
        _points(entry.hand_left_keypoints_2d, "hand_left", (HAND,)),
        _points(entry.hand_right_keypoints_2d, "hand_right", (HAND,)),
        _points(entry.face_keypoints_2d, "face", (FACE, FACE - 2)),
    ]
    if all((abs(part[:, :2]) <= 1).all() for part in parts):
        parts = [part * np.array((size[1], size[0], 1), np.float32) for part in parts]
    parts[3] = np.concatenate([parts[3], unseen(FACE - len(parts[3]))])  # a face without pupils
    return Person(*parts)


def _points(row: list[float] | None, name: str, counts: tuple[int, ...]) -> np.ndarray:
    if not row:
        return unseen(counts[0])
    if len(row) not in [3 * count for count in counts]:
        raise Invalid(
            f"OpenPose's JSON has {len(row)} numbers as {name}_keypoints_2d: expected {3 * counts[0]}, x, y and "
            f"confidence of {counts[0]} points."
        )
    return np.array(row, np.float32).reshape(-1, 3)
