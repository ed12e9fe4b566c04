"""Whole people by MediaPipe's models (Google, Apache-2.0): bodies, hands and faces as OpenPose's points.

The models come inside npm's ``@mediapipe/holistic``, fetched by name and digest, and run under LiteRT (the extra
``mediapipe``). What lies between them is done here, with the constants of MediaPipe's graphs: anchors of detectors,
regions turned upright, points. A person is found first, then the hands and the face where the body says they are.
"""

import hashlib
import importlib.util
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby
from typing import Any

import cv2
import numpy as np

from controlkit.annotators.networks.boxes import overlap
from controlkit.annotators.networks.weights import lack_of
from controlkit.annotators.people import FACE, HAND, Person, unseen
from controlkit.hub import Package, fetch_package
from controlkit.mini.truth import JOINTS

PACKAGE = Package(
    "@mediapipe/holistic",
    "0.5.1675471629",
    "qY+cxtDeSOvVtevrLgnodiwXYaAtPi7dHZtNv/bUCGEjFicAOYtMmrZSqMmbPkTB2+4jLnPF1vgshkAqQRSYAw==",
)
EXTRA, MODULE = "mediapipe", "ai_edge_litert"
_ASSETS = "holistic_solution_packed_assets.data"
_PLACES = {  # within the assets, in bytes, as the package's loader says
    "face_detection": (0, 229_032),
    "face": (248_408, 1_490_304),
    "hand": (3_986_256, 9_464_944),
    "palm_detection": (9_588_747, 11_930_027),
    "pose_detection": (13_915_467, 16_877_755),
}
_FILES = {"pose": "pose_landmark_heavy.tflite"}


_SURE = 0.5
"""The least score of what is taken for found, as in MediaPipe's graphs."""


# --- running ------------------------------------------------------------------------------------------------------

_LOCK = threading.Lock()


@cache
def _interpreter(model: str) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    folder = fetch_package(PACKAGE)
    if model in _FILES:
        content = (folder / _FILES[model]).read_bytes()
    else:
        start, end = _PLACES[model]
        content = (folder / _ASSETS).read_bytes()[start:end]
    made = Interpreter(model_content=content)
    made.allocate_tensors()
    return made


def _run(model: str, pixels: np.ndarray) -> list[np.ndarray]:
    """The outputs of a model for one picture, float32 (side, side, 3), in the model's order."""
    with _LOCK:
        made = _interpreter(model)
        made.set_tensor(made.get_input_details()[0]["index"], pixels[None].astype(np.float32))
        made.invoke()
        return [made.get_tensor(one["index"])[0] for one in made.get_output_details()]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x.astype(np.float64), -100, 100)))


# --- regions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Region:
    """A square of a picture: its middle and its side in pixels, turned clockwise by ``angle`` (radians)."""

    x: float
    y: float
    side: float
    angle: float = 0.0

    @property
    def axes(self) -> np.ndarray:
        """(2, 2): the directions of the region's x and y, as columns."""
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        return np.array([[cos, -sin], [sin, cos]])

    def cut(self, picture: np.ndarray, size: int) -> np.ndarray:
        """The region, uint8 (size, size, 3), upright; black beyond the picture."""
        finer = size * int(np.clip(self.side / size, 1, 8))  # cut finely, then the mean of what becomes one pixel
        step = self.side / finer
        matrix = np.column_stack([self.axes * step, (self.x, self.y) - self.axes @ np.full(2, (finer - 1) / 2 * step)])
        cut = cv2.warpAffine(picture, matrix, (finer, finer), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
        return cut if finer == size else cv2.resize(cut, (size, size), interpolation=cv2.INTER_AREA)

    def back(self, points: np.ndarray) -> np.ndarray:
        """Points (N, 2), shares of the region from its upper left, as pixels of the picture."""
        return (points - 0.5) * self.side @ self.axes.T + (self.x, self.y)

    def moved(self, down: float = 0.0, grown: float = 1.0) -> "Region":
        """The region moved along its own y by a share of its side, then with a side so many times as long."""
        x, y = self.axes @ (0.0, down * self.side) + (self.x, self.y)
        return Region(float(x), float(y), self.side * grown, self.angle)


def _whole(picture: np.ndarray) -> Region:
    height, width = picture.shape[:2]
    return Region((width - 1) / 2, (height - 1) / 2, max(height, width))


def _direction(start: np.ndarray, end: np.ndarray) -> float:
    """The angle by which a region must be turned so that ``end`` is right above ``start`` in it."""
    return float(np.pi / 2 - np.arctan2(start[1] - end[1], end[0] - start[0]))


# --- detectors ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Detector:
    """A detector with anchors: where things are in a region, with a few points of each."""

    model: str
    side: int
    strides: tuple[int, ...]
    signed: bool
    """Whether it reads [-1, 1], not [0, 1]."""

    @property
    def anchors(self) -> np.ndarray:
        """(N, 2): the middle of each anchor, as shares of the side; two for each cell and layer."""
        return _anchors(self.side, self.strides)

    def find(self, picture: np.ndarray, region: Region, least: float = _SURE) -> list[tuple[float, np.ndarray]]:
        """(score, points (2 + K, 2)) of all that is found in a region, the surest first.

        The points are the upper left and the lower right of the box, in the region's directions, and its K points, all
        in the region's shares.
        """
        pixels = region.cut(picture, self.side) / (127.5 if self.signed else 255.0) - self.signed
        boxes, logits = _run(self.model, pixels)
        scores = _sigmoid(logits[:, 0])
        kept = scores >= least
        at = boxes[kept].reshape(-1, boxes.shape[1] // 2, 2) / self.side
        middles, sizes = at[:, 0] + self.anchors[kept], at[:, 1]
        points = at[:, 2:] + self.anchors[kept][:, None]
        corners = np.stack([middles - sizes / 2, middles + sizes / 2], 1)
        return _merged(scores[kept], np.concatenate([corners, points], 1))


@lru_cache
def _anchors(side: int, strides: tuple[int, ...]) -> np.ndarray:
    found = []
    for stride, layers in groupby(strides):
        cells = (np.arange(side // stride) + 0.5) * stride / side
        x, y = np.meshgrid(cells, cells)
        found.append(np.stack([x.ravel(), y.ravel()], 1).repeat(2 * len(list(layers)), 0))
    return np.concatenate(found)


def _merged(scores: np.ndarray, points: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """Detections that overlap by more than 0.3 as one, at the mean weighted with their scores."""
    found, left = [], np.argsort(-scores, kind="stable")
    while left.size:
        over = overlap(points[left[0], 0], points[left[0], 1], points[left, 0], points[left, 1]) > 0.3
        over[0] = True
        group = left[over]
        mean = np.average(points[group], axis=0, weights=scores[group])
        found.append((float(scores[left[0]]), mean))
        left = left[~over]
    return found


POSES = Detector("pose_detection", 224, (8, 16, 32, 32, 32), signed=True)
PALMS = Detector("palm_detection", 192, (8, 16, 16, 16), signed=False)
FACES = Detector("face_detection", 128, (8, 16, 16, 16), signed=True)


# --- bodies -------------------------------------------------------------------------------------------------------

_BODY = (0, None, 12, 14, 16, 11, 13, 15, 24, 26, 28, 23, 25, 27, 5, 2, 8, 7)
"""MediaPipe's point of each of OpenPose's joints; the neck is between the shoulders."""
_SHOULDERS, _HIPS = (11, 12), (23, 24)
_WRIST, _PINKY, _INDEX = (15, 16), (17, 18), (19, 20)
_HEAD = slice(0, 11)
_WINDOW = 3
_MOST_PEOPLE = 20


def _body(picture: np.ndarray, region: Region) -> tuple[np.ndarray, float]:
    """(points (33, 3) in pixels with visibility, how sure a person is there) of a region turned upright."""
    raw, sure, _, heat, _ = _run("pose", region.cut(picture, 256) / 255.0)
    points = raw.reshape(39, 5)[:33]
    at = _refined(points[:, :2] / 256, _sigmoid(heat[..., :33]))
    return np.column_stack([region.back(at), _sigmoid(points[:, 3])]), float(sure[0])


def _refined(at: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Points (N, 2), in shares, moved to the weighted middle of the heat (S, S, N) about them, where that is sure."""
    size, moved = heat.shape[0], at.copy()
    for number, (x, y) in enumerate(at * size):
        column, row = int(x), int(y)
        if not (0 <= column < size and 0 <= row < size):
            continue
        left, top = max(column - _WINDOW, 0), max(row - _WINDOW, 0)
        near = heat[top : row + _WINDOW + 1, left : column + _WINDOW + 1, number]
        if near.max() >= _SURE:
            rows, columns = np.mgrid[: near.shape[0], : near.shape[1]]
            moved[number] = np.array([(near * (columns + left)).sum(), (near * (rows + top)).sum()]) / near.sum() / size
    return moved


def _joints(points: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """OpenPose's joints (18, 3) of MediaPipe's points (33, 3): seen are those that are sure and in the picture."""
    joints = unseen(JOINTS)
    for joint, source in enumerate(_BODY):
        pair = list(_SHOULDERS) if source is None else [source]
        joints[joint] = [*points[pair, :2].mean(0), points[pair, 2].min()]
    inside = ((joints[:, :2] >= 0) & (joints[:, :2] < (size[1], size[0]))).all(-1)
    joints[(joints[:, 2] < _SURE) | ~inside] = 0
    return joints


# --- hands and faces ----------------------------------------------------------------------------------------------


def _hand(picture: np.ndarray, points: np.ndarray, right: int) -> np.ndarray:
    """The points (21, 3) of a hand of a body's points; none is seen where no hand is found.

    The body tells about where it is; there the palm is looked for, and without one the body's word is taken.
    """
    wrist, pinky, index = (points[pair[right], :2] for pair in (_WRIST, _PINKY, _INDEX))
    if points[_WRIST[right], 2] < _SURE:
        return unseen(HAND)
    middle = (2 * index + pinky) / 3
    side = 2 * float(np.hypot(*(middle - wrist)))
    if side < 2:
        return unseen(HAND)
    near = Region(float(middle[0]), float(middle[1]), side, _direction(wrist, middle)).moved(-0.1, 2.7)
    around = Region(near.x, near.y, near.side)
    regions = [_palm_region(around, palm) for _, palm in PALMS.find(picture, around)[:1]]
    for region in (*regions, near):
        raw, sure, *_ = _run("hand", region.cut(picture, 224) / 255.0)
        if sure[0] >= _SURE:
            at = region.back(raw.reshape(HAND, 3)[:, :2] / 224)
            return np.column_stack([at, np.ones(HAND)]).astype(np.float32)
    return unseen(HAND)


def _palm_region(around: Region, palm: np.ndarray) -> Region:
    """The region of a whole hand, of a palm's box and points: its wrist and middle finger say where up is."""
    low, high, wrist, _, middle = around.back(palm[:5])
    x, y = (low + high) / 2
    return Region(float(x), float(y), float((high - low).max()), _direction(wrist, middle)).moved(-0.5, 2.6)


_MESH_68 = (
    *(162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389),
    *(71, 63, 105, 66, 107, 336, 296, 334, 293, 301, 168, 197, 5, 4, 75, 97, 2, 326, 305),
    *(33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380),
    *(61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181, 78, 82, 13, 312, 308, 317, 14, 87),
)
"""Points of MediaPipe's mesh of faces that lie where the 68 of 300-W do."""


def face_meshes(picture: np.ndarray, around: Region, least: float = _SURE) -> Iterator[np.ndarray]:
    """The mesh (468, 2), in pixels, of each face in a region, the surest first. ``least``: the least score of one."""
    for _, found in FACES.find(picture, around, least):
        low, high, right, left = around.back(found[:4])
        x, y = (low + high) / 2
        angle = float(np.arctan2(left[1] - right[1], left[0] - right[0]))
        region = Region(float(x), float(y), 1.5 * float((high - low).max()), angle)
        raw, logit = _run("face", region.cut(picture, 192) / 255.0)
        if _sigmoid(logit.ravel())[0] >= _SURE:
            yield region.back(raw.reshape(468, 3)[:, :2] / 192)


def find_meshes(picture: np.ndarray, most: int, least: float = _SURE) -> list[np.ndarray]:
    """The meshes (468, 2), in pixels, of at most so many faces: found in the whole picture, then in windows of it.

    ``least``: the least score of a face.
    """
    whole, found = _whole(picture), list[np.ndarray]()
    for window in (whole, *_windows(picture.shape[:2], whole.side / 2)):
        for mesh in face_meshes(picture, window, least):
            if len(found) == most:
                return found
            if not any(np.hypot(*(mesh - one).mean(0)) < np.ptp(one, 0).max() / 2 for one in found):
                found.append(mesh)
    return found


def _face(picture: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The points (70, 3) of the face of a body's points; none is seen where no face is found."""
    head = points[_HEAD, :2]
    low, high = head.min(0), head.max(0)
    side = 3 * float((high - low).max())
    if side < 8:
        return unseen(FACE)
    x, y = (low + high) / 2
    mesh = next(face_meshes(picture, Region(float(x), float(y), side)), None)
    if mesh is None:
        return unseen(FACE)
    at = mesh[list(_MESH_68)]
    pupils = [at[36:42].mean(0), at[42:48].mean(0)]  # the mesh without irises: the middle of each eye
    return np.column_stack([np.concatenate([at, pupils]), np.ones(FACE)]).astype(np.float32)


# --- people -------------------------------------------------------------------------------------------------------


def find_people(picture: np.ndarray, hands: bool = True, face: bool = True) -> list[Person]:
    """The people in a picture, uint8 (H, W, 3): at most 20, those first that are found in the whole picture."""
    picture = np.ascontiguousarray(picture)
    return [_person(picture, points, hands, face) for points in _bodies(picture)]


def _bodies(picture: np.ndarray) -> list[np.ndarray]:
    """The points (33, 3) of each body."""
    found: list[np.ndarray] = []
    for region in _standing(picture):
        points, sure = _body(picture, region)
        if sure >= _SURE and not any(_same(points, other) for other in found):
            found.append(points)
        if len(found) == _MOST_PEOPLE:
            break
    return found


def find_boxes(picture: np.ndarray, device: str) -> np.ndarray:
    """Boxes of people, (N, 4): left, top, right, bottom in pixels, in the picture.

    Each is that of the body's points and a tenth more on each side, since none of the points is the crown of a head.
    """
    boxes = np.array([(*one[:, :2].min(0), *one[:, :2].max(0)) for one in _bodies(picture)]).reshape(-1, 4)
    more = 0.1 * (boxes[:, 2:] - boxes[:, :2])
    grown = boxes + np.concatenate([-more, more], 1)
    return np.asarray(grown.clip(0, (*picture.shape[1::-1], *picture.shape[1::-1])))


def _person(picture: np.ndarray, points: np.ndarray, hands: bool, face: bool) -> Person:
    left, right = ((_hand(picture, points, k) if hands else unseen(HAND)) for k in (0, 1))
    return Person(_joints(points, picture.shape), left, right, _face(picture, points) if face else unseen(FACE))


def _standing(picture: np.ndarray) -> Iterator[Region]:
    """Regions of people, upright: found in the whole picture, then in windows of half its longer side.

    The detector sees 224 pixels, and often no more than the foremost person. In windows it must be surer: in the
    photographs it was tried on, folds, tools and spoons reached 0.6 there, and people 0.73.
    """
    whole = _whole(picture)
    windows = [(window, 0.7) for window in _windows(picture.shape[:2], whole.side / 2)]
    for window, least in ((whole, _SURE), *windows):
        for _, found in POSES.find(picture, window, least):
            hips, top = window.back(found[2:4])
            side = 2 * float(np.hypot(*(top - hips)))
            yield Region(float(hips[0]), float(hips[1]), side, _direction(hips, top)).moved(grown=1.25)


def _windows(size: tuple[int, ...], side: float) -> list[Region]:
    """Windows of this side that cover a picture, each overlapping its neighbours by half."""
    along = [
        np.linspace(min(side, one) / 2, one - min(side, one) / 2, max(round(2 * one / side) - 1, 1)) for one in size
    ]
    return [Region(float(x), float(y), side) for y in along[0] for x in along[1]]


def _same(points: np.ndarray, other: np.ndarray) -> bool:
    """Whether two bodies, (33, 3), are one found twice: their noses are nearer than a quarter of the trunk."""
    trunk = np.hypot(*(other[list(_SHOULDERS), :2].mean(0) - other[list(_HIPS), :2].mean(0)))
    return bool(np.hypot(*(points - other)[0, :2]) < trunk / 4)


def weights() -> str:
    """The digest of the package of models."""
    return hashlib.sha256(PACKAGE.sha512.encode()).hexdigest()


def lack() -> str:
    """A sentence on what is missing to run the models; "" where all is here or can be fetched."""
    if importlib.util.find_spec(MODULE) is None:
        return f"MediaPipe's models run under LiteRT. Install it with: pip install 'controlkit[{EXTRA}]'"
    return lack_of(PACKAGE)
