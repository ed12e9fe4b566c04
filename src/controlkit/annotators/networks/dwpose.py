"""Whole people by DWPose (Yang et al., ICCV workshops 2023; Apache-2.0): 133 points of bodies, hands and faces.

Two public ONNX files, run by onnxruntime (the extra ``onnx``): YOLOX finds people, an RTMPose each one's points. A file
of ONNX is a program for that library, so none but those two is opened: they are known by their digests.
"""

import hashlib
import importlib.util
from functools import cache
from typing import Any

import cv2
import numpy as np

from controlkit.annotators.networks.boxes import overlap
from controlkit.annotators.networks.weights import PublicFile
from controlkit.annotators.people import FACE, HAND, MOST_PEOPLE, Person, body_of_coco, unseen

DETECTOR = PublicFile(
    "yolox_l.onnx", "yzd-v/DWPose", sha256="7860ae79de6c89a3c1eb72ae9a2756c0ccfbe04b7791bb5880afabd97855a411"
)
POINTS = PublicFile(
    "dw-ll_ucoco_384.onnx", "yzd-v/DWPose", sha256="724f4ff2439ed61afb86fb8a1951ec39c6220682803b4a8bd4f598cd913b1843"
)
EXTRA, MODULE = "onnx", "onnxruntime"

_STRIDES = (8, 16, 32)
_SIDE = 20 * _STRIDES[-1]  # of the pictures that the detector reads
_GREY = 114  # of what it is given beyond a picture
_SURE, _OVERLAP = 0.3, 0.45
_CUT = (288, 384)
"""Width and height of what the second network reads; its answers are in half pixels of that."""
_PADDING = 1.25
_MEAN, _SPREAD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

_FACE, _LEFT, _RIGHT = slice(23, 91), slice(91, 112), slice(112, 133)


@cache
def _session(file: PublicFile) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    there = onnxruntime.get_available_providers()
    wanted = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in there]
    return onnxruntime.InferenceSession(str(file.path()), options, providers=wanted)


def _run(file: PublicFile, pixels: np.ndarray) -> list[np.ndarray]:
    """The outputs of a network for one picture, float32 (height, width, 3)."""
    session = _session(file)
    batch = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], np.float32)
    outputs: list[np.ndarray] = session.run(None, {session.get_inputs()[0].name: batch})
    return outputs


# --- where people are ---------------------------------------------------------------------------------------------


def find_boxes(picture: np.ndarray) -> np.ndarray:
    """Boxes of people, (N, 4): left, top, right, bottom in pixels, the surest first."""
    scale = _SIDE / max(picture.shape[:2])
    height, width = (max(int(side * scale), 1) for side in picture.shape[:2])
    framed = np.full((_SIDE, _SIDE, 3), _GREY, np.uint8)
    framed[:height, :width] = cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR)
    [raw] = _run(DETECTOR, framed[..., ::-1])[0]  # it was trained on BGR, without any scaling
    cells, strides = _cells()
    middles, sizes = (raw[:, :2] + cells) * strides, np.exp(raw[:, 2:4].clip(-20, 20)) * strides
    scores = raw[:, 4] * raw[:, 5]  # of a thing, and of that being a person
    boxes = np.concatenate([middles - sizes / 2, middles + sizes / 2], 1) / scale
    kept = scores > _SURE
    return _apart(boxes[kept], scores[kept])[:MOST_PEOPLE]


@cache
def _cells() -> tuple[np.ndarray, np.ndarray]:
    """The cell (N, 2) and the stride (N, 1) of each of the detector's answers."""
    cells, strides = [], []
    for stride in _STRIDES:
        x, y = np.meshgrid(*[np.arange(_SIDE // stride)] * 2)
        cells.append(np.stack([x.ravel(), y.ravel()], 1))
        strides.append(np.full((x.size, 1), stride))
    return np.concatenate(cells), np.concatenate(strides)


def _apart(boxes: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Boxes without those that overlap a surer one by more than 0.45."""
    kept, left = [], np.argsort(-scores, kind="stable")
    while left.size:
        first = boxes[left[0]]
        kept.append(first)
        left = left[overlap(first[:2], first[2:], boxes[left, :2], boxes[left, 2:]) <= _OVERLAP]
    return np.array(kept).reshape(-1, 4)


# --- their points -------------------------------------------------------------------------------------------------


def find_points(picture: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The 133 points of COCO-WholeBody, (133, 3) in pixels with confidence, of a person in a box."""
    middle, size = (box[:2] + box[2:]) / 2, np.maximum(box[2:] - box[:2], 1e-3) * _PADDING
    shape = np.array(_CUT)
    size = shape * (size / shape).max()  # the box grown to the shape of what the network reads
    step = size / shape
    matrix = np.column_stack([np.diag(step), middle - step * shape / 2])
    cut = cv2.warpAffine(picture, matrix, _CUT, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    x, y = (one[0] for one in _run(POINTS, (cut - np.array(_MEAN)) / np.array(_SPREAD))[:2])
    at = np.stack([x.argmax(-1), y.argmax(-1)], -1) / 2
    return np.column_stack([at * step + middle - size / 2, np.minimum(x.max(-1), y.max(-1))])


def find_people(picture: np.ndarray, hands: bool = True, face: bool = True) -> list[Person]:
    """The people in a picture, uint8 (H, W, 3), the surest first."""
    picture = np.ascontiguousarray(picture)
    return [_person(find_points(picture, box), hands, face) for box in find_boxes(picture)]


def _person(points: np.ndarray, hands: bool, face: bool) -> Person:
    """A person of the 133 points; seen are those of which the network is surer than 0.3."""
    points = np.where(points[:, 2:] > _SURE, points, 0).astype(np.float32)
    points[:, 2] = points[:, 2] > 0
    faced = np.concatenate([points[_FACE], unseen(FACE - 68)]) if face else unseen(FACE)  # it knows no pupils
    left, right = ((points[part] if hands else unseen(HAND)) for part in (_LEFT, _RIGHT))
    return Person(body_of_coco(points), left, right, faced)


def weights() -> str:
    """The digest of both files."""
    return hashlib.sha256(f"{DETECTOR.digest()} {POINTS.digest()}".encode()).hexdigest()


def lack() -> str:
    """A sentence on what is missing to run the networks; "" where all is here."""
    if importlib.util.find_spec(MODULE) is None:
        return f"DWPose's networks run under onnxruntime. Install it with: pip install 'controlkit[{EXTRA}]'"
    return DETECTOR.lack() or POINTS.lack()
