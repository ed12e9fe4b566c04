"""People's boxes by RT-DETR (Zhao et al., CVPR 2024; Apache-2.0), for networks that find points in boxes."""

from functools import partial
from typing import Any

import numpy as np
import torch

from controlkit.annotators.networks.pretrained import Pretrained, best, normalised
from controlkit.annotators.networks.weights import PublicFile
from controlkit.annotators.people import MOST_PEOPLE

_SIDE = 20 * 32  # of the pictures it reads, in its coarsest cells
_BILINEAR = 2  # Pillow's number
_PLAIN = ((0.0,) * 3, (1.0,) * 3)  # colours are read as shares of 255
_PERSON, _CLASSES = 0, 80
"""The class of people among COCO's."""
_SURE = 0.3
"""The least score of a person, as ViTPose's model card takes it."""


def _rtdetr(depths: tuple[int, ...], **settings: Any) -> Any:
    """Settings of an RT-DETR: the depths of its ResNet, and what differs from the network of 50 layers."""
    from transformers import RTDetrConfig, RTDetrResNetConfig

    stages = [f"stage{level}" for level in (2, 3, 4)]
    basic = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]} if sum(depths) == 8 else {}
    backbone = RTDetrResNetConfig(depths=list(depths), out_features=stages, **basic)
    return RTDetrConfig(backbone_config=backbone, num_labels=_CLASSES, **settings)


def _of_rtdetr(size: int, depths: tuple[int, ...], **settings: Any) -> Pretrained:
    file = PublicFile("model.safetensors", f"PekingU/rtdetr_r{size}vd_coco_o365")
    return Pretrained(file, "RTDetrForObjectDetection", partial(_rtdetr, depths, **settings))


RTDETR = (  # the best first
    _of_rtdetr(101, (3, 4, 23, 3), encoder_ffn_dim=2048, encoder_hidden_dim=384, decoder_in_channels=[384] * 3),
    _of_rtdetr(50, (3, 4, 6, 3)),
    _of_rtdetr(18, (2, 2, 2, 2), encoder_in_channels=[128, 256, 512], hidden_expansion=0.5, decoder_layers=3),
)


def find_boxes(picture: np.ndarray, device: str, model: Pretrained | None = None) -> np.ndarray:
    """Boxes of people, (N, 4): left, top, right, bottom in pixels, the surest first, by the best model that is here."""
    network = (model or best(RTDETR)).network(device)
    pixels = normalised(picture, (_SIDE, _SIDE), _BILINEAR, _PLAIN).to(device)
    with torch.inference_mode():
        found = network(pixel_values=pixels)
    scores = found.logits[0, :, _PERSON].float().sigmoid().cpu().numpy()
    boxes = found.pred_boxes[0].float().cpu().numpy()  # middle and size, as shares of the sides
    corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
    order = np.argsort(-scores, kind="stable")
    kept = order[scores[order] > _SURE][:MOST_PEOPLE]
    return np.asarray(corners[kept] * np.array(picture.shape[1::-1] * 2))
