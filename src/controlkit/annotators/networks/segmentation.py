"""Maps of what is where, in ADE20K's 150 classes, by networks of transformers: OneFormer and UperNet."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from controlkit.annotators.maps import label_picture
from controlkit.annotators.networks.pretrained import Pretrained, best, normalised
from controlkit.annotators.networks.weights import PublicFile

_PALETTE = (
    "787878b4787806e6e650323204c8037878508c8c8ccc05ffe6e6e604fa07e005ffebff0796053d78784608ff33ff0652"
    "8fff8cccff04ff3307cc46030066c83de6faff06330b66ffff0747ff09e00907e6dcdcdcff095c7009ff08ffd607ffe0"
    "ffb8060aff47ff290a07ffffe0ff086608ffff3d06ffc207ff7a0800ff14ff0829ff05990633ffeb0cffa0961400a3ff"
    "8c8c8cfa0a0f14ff001fff00ff1f00ffe00099ff000000ffff470000ebff00adff1f00ff0bc8c8ff520000fff5003dff"
    "00ff7000ff85ff0000ffa300ff6600c2ff00008fff33ff000052ff00ff2900ffad0a00ffadff0000ff99ff5c00ff00ff"
    "ff00f5ff0066ffad00ff0014ffb8b8001fff00ff3d0047ffff00cc00ffc200ff52000aff0070ff3300ff00c2ff007aff"
    "00ffa3ff990000ff0aff70008fff005200ffa3ff00ffeb0008b8aa8500ff00ff5cb800ffff001f00b8ff00d6ffff0070"
    "5cff0000e0ff70e0ff46b8a0a300ff9900ff47ff00ff00a3ffcc00ff008f00ffeb85ff00ff00ebf500ffff007afff500"
    "0abed4d6ff0000ccff1400ffffff000099ff0029ff00ffcc2900ff29ff00ad00ff00f5ff4700ff7a00ff00ffb8005cff"
    "b8ff000085ffffd60019c2c266ff005c00ff"
)
ADE20K = np.frombuffer(bytes.fromhex(_PALETTE), np.uint8).reshape(150, 3)
"""The colours of ADE20K's classes that ControlNets of segmentation were trained on, from "wall" to "flag"."""

EXTRA, MODULE = "segmentation", "scipy"
"""Of OneFormer alone: transformers' class imports it for a loss."""

_BILINEAR = 2  # Pillow's number
_CELL = 32
"""The side in pixels of the coarsest cell of the networks' features."""
_TASK = (49406, 518, 10549, 533, 29119, 1550, 49407)
"""CLIP's tokens of "the task is semantic", which OneFormer reads; the rest of its 77 are 0."""


@dataclass(frozen=True)
class SegmentationModel(Pretrained):
    """A network of segmentation, and how it reads pictures."""

    shorter: int
    """The side that a picture's shorter one is brought to, as long as the longer one stays below ``longer``."""
    longer: int
    scores: Callable[[Any, Tensor], Tensor]
    """Of the network and pixels (1, 3, H, W): scores of each class, (1, 150, h, w)."""

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The size (height, width) in which a picture is read; of a strip no side is below the coarsest cell's."""
        factor = min(self.shorter / min(height, width), self.longer / max(height, width))
        return max(round(height * factor), _CELL), max(round(width * factor), _CELL)


def _oneformer_scores(network: Any, pixels: Tensor) -> Tensor:
    """OneFormer's queries, each with its class and its mask, as scores of classes."""
    tokens = torch.zeros(1, network.config.task_seq_len, dtype=torch.long, device=pixels.device)
    tokens[0, : len(_TASK)] = torch.tensor(_TASK)
    found = network(pixel_values=pixels, task_inputs=tokens)
    classes = found.class_queries_logits.softmax(-1)[..., :-1]  # the last is nothing
    return torch.einsum("bqc,bqhw->bchw", classes, found.masks_queries_logits.sigmoid())


def _logits(network: Any, pixels: Tensor) -> Tensor:
    scores: Tensor = network(pixel_values=pixels).logits
    return scores


def _oneformer(width: int, depths: tuple[int, ...], window: int, queries: int) -> Any:
    """Settings of a OneFormer: width, depths and window of its Swin, and the number of its queries."""
    from transformers import OneFormerConfig, SwinConfig

    backbone = SwinConfig(
        embed_dim=width, depths=list(depths), num_heads=[width // 32 * 2**level for level in range(4)],
        window_size=window, out_features=[f"stage{level}" for level in range(1, 5)],
    )  # fmt: skip
    return OneFormerConfig(backbone_config=backbone, num_queries=queries, num_labels=len(ADE20K))


def _upernet(width: int, depths: tuple[int, ...]) -> Any:
    """Settings of an UperNet: width and depths of its ConvNeXt."""
    from transformers import ConvNextConfig, UperNetConfig

    widths = [width * 2**level for level in range(4)]
    backbone = ConvNextConfig(
        hidden_sizes=widths, depths=list(depths), out_features=[f"stage{level}" for level in range(1, 5)]
    )
    return UperNetConfig(backbone_config=backbone, auxiliary_in_channels=widths[2], num_labels=len(ADE20K))


def _of_oneformer(size: str, shorter: int, *settings: Any) -> SegmentationModel:
    file = PublicFile("model.safetensors", f"shi-labs/oneformer_ade20k_swin_{size}", also=("pytorch_model.bin",))
    made = partial(_oneformer, *settings)
    kind = "OneFormerForUniversalSegmentation"
    return SegmentationModel(file, kind, made, shorter, 4 * shorter, _oneformer_scores)


def _of_upernet(size: str, *settings: Any) -> SegmentationModel:
    file = PublicFile("model.safetensors", f"openmmlab/upernet-convnext-{size}", also=("pytorch_model.bin",))
    made = partial(_upernet, *settings)
    return SegmentationModel(file, "UperNetForSemanticSegmentation", made, 512, 2048, _logits)


ONEFORMER = (  # the best first
    _of_oneformer("large", 20 * 32, 192, (2, 2, 18, 2), 12, 250),
    _of_oneformer("tiny", 512, 96, (2, 2, 6, 2), 7, 150),
)
UPERNET = (_of_upernet("small", 96, (3, 3, 27, 3)), _of_upernet("tiny", 96, (3, 3, 9, 3)))


def labels_of(picture: np.ndarray, device: str, model: SegmentationModel) -> np.ndarray:
    """The class (H, W) of each pixel of a picture."""
    network = model.network(device)
    pixels = normalised(picture, model.size(*picture.shape[:2]), _BILINEAR).to(device)
    with torch.inference_mode():
        scores = model.scores(network, pixels)
    return largest(scores[0].float().cpu().numpy(), picture.shape[:2])


def largest(scores: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """The class (H, W) with the largest score, of scores (K, h, w) brought to ``size`` one class after the other.

    All at once would take 600 MB for a million pixels.
    """
    labels, most = np.zeros(size, np.uint8), np.full(size, -np.inf, np.float32)
    for number, plane in enumerate(scores):
        grown = cv2.resize(plane, size[::-1], interpolation=cv2.INTER_LINEAR)
        labels[grown > most] = number
        np.maximum(most, grown, out=most)
    return labels


def segmentation(models: Sequence[SegmentationModel], pictures: Sequence[np.ndarray], device: str) -> list[np.ndarray]:
    """Maps of what is where, in ADE20K's colours, by the best of the models that is here."""
    return [label_picture(labels_of(picture, device, best(models)), ADE20K) for picture in pictures]
