"""Bodies by ViTPose and ViTPose++ (Xu et al., NeurIPS 2022 and TPAMI 2023; Apache-2.0) through transformers.

Points are found in a box for each person. The boxes are RT-DETR's where its file is here, else of the people that
MediaPipe's models find, else the whole picture is one.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from controlkit.annotators.networks import detection, mediapipe
from controlkit.annotators.networks import pretrained as networks
from controlkit.annotators.networks.pretrained import IMAGENET, Pretrained, best
from controlkit.annotators.networks.running import run
from controlkit.annotators.networks.weights import PublicFile
from controlkit.annotators.people import Person, body_of_coco

_HEIGHT, _WIDTH = 256, 192
"""Of what the network reads; its heat maps are a quarter of that."""
_POINTS, _EXPERTS = 17, 6
"""COCO's points of a body, and the data sets that ViTPose++ tells apart; COCO is its first."""
_PADDING = 1.25
_SURE = 0.3
"""The least heat of a point that is taken for seen."""
_KERNEL, _SIGMA = 11, 0.8
"""Width and spread of the blur of heat maps, in places."""


@dataclass(frozen=True)
class PoseModel(Pretrained):
    """A network of bodies' points."""

    has_experts: bool
    """Whether it is to be told which data set's points it shall find."""


def _vitpose(width: int, layers: int, heads: int, part: int = 0, simple: bool = False) -> Any:
    """Settings of a ViTPose.

    Args:
        width, layers, heads: of its vision transformer.
        part: features of each expert; 0 for a network without.
        simple: whether its decoder is one convolution.
    """
    from transformers import VitPoseBackboneConfig, VitPoseConfig

    backbone = VitPoseBackboneConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_experts=_EXPERTS if part else 1, part_features=part, out_indices=[layers],
    )  # fmt: skip
    return VitPoseConfig(backbone_config=backbone, num_labels=_POINTS, use_simple_decoder=simple)


def _of_vitpose(size: str, *settings: Any) -> PoseModel:
    file = PublicFile("model.safetensors", f"usyd-community/vitpose-{size}")
    return PoseModel(file, "VitPoseForPoseEstimation", partial(_vitpose, *settings), size.startswith("plus"))


_BASE = (4 * 192, 12, 12)
VITPOSE = (  # the best first, by their papers' precision on COCO
    _of_vitpose("plus-huge", 16 * 80, 32, 16, 4 * 80),  # 80 a head
    _of_vitpose("plus-large", 1024, 24, 16, 256),
    _of_vitpose("base-coco-aic-mpii", *_BASE),
    _of_vitpose("plus-base", *_BASE, 192),
    _of_vitpose("base", *_BASE),
    _of_vitpose("plus-small", 384, 12, 12, 96),
    _of_vitpose("base-simple", *_BASE, 0, True),
)


# --- points in boxes ----------------------------------------------------------------------------------------------


def _frame(box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(upper left corner, size) in pixels of a box (left, top, right, bottom) grown to the network's shape."""
    middle, (wide, high) = (box[:2] + box[2:]) / 2, np.maximum(box[2:] - box[:2], 1e-3)
    shape = np.array((_WIDTH, _HEIGHT))
    size = shape * max(wide / _WIDTH, high / _HEIGHT) * _PADDING
    return middle - size / 2, size


def _cut(picture: np.ndarray, box: np.ndarray) -> np.ndarray:
    """A box of a picture as the network reads it, uint8 (256, 192, 3); black beyond the picture.

    The first and the last pixel's middles are the box's ends, as in the training ("unbiased data processing").
    """
    corner, size = _frame(box)
    scale = (np.array((_WIDTH, _HEIGHT)) - 1) / size
    return cv2.warpAffine(picture, np.column_stack([np.diag(scale), -scale * corner]), (_WIDTH, _HEIGHT))


def points_of(heat: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The points (K, 3), in pixels of the picture with their heat, of the heat maps (h, w, K) of a box.

    A point is where its map is largest, moved to the top of the parabola that fits the logarithm of the blurred map
    there ("DARK", Zhang et al., CVPR 2020). Maps without any heat have points of 0.
    """
    high, wide, count = heat.shape
    row, column = np.divmod(heat.reshape(-1, count).argmax(0), wide)
    most, each = heat[row, column, np.arange(count)], np.arange(count)
    soft = cv2.GaussianBlur(heat, (_KERNEL, _KERNEL), _SIGMA, borderType=cv2.BORDER_REFLECT).reshape(heat.shape)
    log = np.pad(np.log(soft.clip(0.001, 50)), ((1, 1), (1, 1), (0, 0)), mode="edge").astype(np.float64)

    def near(down: int, right: int) -> np.ndarray:
        return np.asarray(log[row + 1 + down, column + 1 + right, each])

    slope = np.stack([near(0, 1) - near(0, -1), near(1, 0) - near(-1, 0)], -1) / 2
    here = near(0, 0)
    xx, yy = near(0, 1) - 2 * here + near(0, -1), near(1, 0) - 2 * here + near(-1, 0)
    xy = (near(1, 1) - near(0, 1) - near(1, 0) + 2 * here - near(0, -1) - near(-1, 0) + near(-1, -1)) / 2
    curve = np.stack([xx, xy, xy, yy], -1).reshape(count, 2, 2) + np.finfo(np.float32).eps * np.eye(2)
    moved = -np.linalg.solve(curve, slope[..., None])[..., 0]
    moved[(abs(moved) > 1).any(-1)] = 0  # no top is near: the map is flat there
    corner, size = _frame(box)
    at = corner + (np.stack([column, row], -1) + moved) * size / (wide - 1, high - 1)
    return np.where(most[:, None] > 0, np.column_stack([at, most]), 0).astype(np.float32)


def _heat(cuts: Sequence[np.ndarray], device: str, model: PoseModel) -> list[np.ndarray]:
    """The heat maps (64, 48, 17) of each cut."""
    network = model.network(device)
    mean, spread = (torch.tensor(one, device=device).reshape(1, 3, 1, 1) for one in IMAGENET)

    def forward(pixels: Tensor) -> Tensor:
        which = {"dataset_index": torch.zeros(len(pixels), dtype=torch.long, device=device)}
        heat: Tensor = network((pixels / 255 - mean) / spread, **(which if model.has_experts else {})).heatmaps
        return heat

    return run(forward, cuts, device)


def find_people(pictures: Sequence[np.ndarray], device: str, model: PoseModel | None = None) -> list[list[Person]]:
    """The people in each picture, uint8 (H, W, 3): bodies alone. Boxes of all pictures are read in batches."""
    boxes = [find_boxes(picture, device) for picture in pictures]
    cuts = [_cut(picture, box) for picture, some in zip(pictures, boxes, strict=True) for box in some]
    heat = iter(_heat(cuts, device, model or best(VITPOSE)) if cuts else ())
    return [list(_people(picture, some, heat)) for picture, some in zip(pictures, boxes, strict=True)]


def _people(picture: np.ndarray, boxes: np.ndarray, heat: Iterator[np.ndarray]) -> Iterator[Person]:
    """A person of each box, of the next heat maps; none of a box in which no point is sure."""
    for box in boxes:
        points = points_of(next(heat), box)
        inside = ((points[:, :2] >= 0) & (points[:, :2] < picture.shape[1::-1])).all(-1)
        points[(points[:, 2] <= _SURE) | ~inside] = 0
        points[:, 2] = points[:, 2] > 0
        if points.any():
            yield Person(body_of_coco(points))


# --- where people are ---------------------------------------------------------------------------------------------


def _finder() -> Any:
    """The module that finds boxes: RT-DETR's where its file is here, else MediaPipe's where it can run, else None."""
    if not networks.lack(detection.RTDETR):
        return detection
    return None if mediapipe.lack() else mediapipe


def find_boxes(picture: np.ndarray, device: str) -> np.ndarray:
    """Boxes of people, (N, 4): left, top, right, bottom in pixels; without any finder, the whole picture's."""
    if (finder := _finder()) is None:
        return np.array([(0, 0, picture.shape[1], picture.shape[0])], np.float64)
    boxes: np.ndarray = finder.find_boxes(np.ascontiguousarray(picture), device)
    return boxes


def weights() -> str:
    """The digest of the best network that is here, and of what finds the boxes."""
    finder = _finder()
    boxes = "" if finder is None else mediapipe.weights() if finder is mediapipe else networks.weights(detection.RTDETR)
    return hashlib.sha256(f"{networks.weights(VITPOSE)} {boxes}".encode()).hexdigest()


def lack() -> str:
    """A sentence on how to get the smallest network; "" where one is here."""
    return networks.lack(VITPOSE)
