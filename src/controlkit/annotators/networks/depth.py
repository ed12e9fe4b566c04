"""Depth by networks of transformers (Depth Anything, MiDaS's DPT), and normals of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import cv2
import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from controlkit.annotators.maps import normal_picture
from controlkit.annotators.networks.pretrained import IMAGENET, Pretrained, best, grown, normalised
from controlkit.annotators.networks.running import grey
from controlkit.annotators.networks.weights import PublicFile

_HALVES = ((0.5,) * 3, (0.5,) * 3)
_BICUBIC = 3  # Pillow's number


@dataclass(frozen=True)
class DepthModel(Pretrained):
    """A network of depth, and how it reads pictures and what it answers."""

    frame: tuple[int, int]
    """Height and width of the pictures it reads; where shapes are kept, what they are brought near to."""
    multiple: int
    keeps_shape: bool
    colours: Any

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The size (height, width) in which a picture is read.

        Where shapes are kept it is scaled by the factor, of the two that bring a side to the frame's, nearer to 1; a
        strip is made no longer than four times the frame.
        """
        factors = (self.frame[0] / height, self.frame[1] / width)
        if self.keeps_shape:
            nearer = min(factors, key=lambda factor: abs(1 - factor))
            factors = (min(nearer, 4 * max(self.frame) / max(height, width)),) * 2
        high, wide = (
            max(round(length * factor / self.multiple), 1) * self.multiple
            for length, factor in zip((height, width), factors, strict=True)
        )
        return high, wide

    def read(self, picture: np.ndarray) -> Tensor:
        """A picture, uint8 (H, W, 3), as the network reads it: float32 (1, 3, h, w)."""
        return normalised(picture, self.size(*picture.shape[:2]), _BICUBIC, self.colours)

    def nearness(self, values: Tensor, size: tuple[int, int]) -> np.ndarray:
        """The network's answer (1, h, w) as nearness (H, W) in a picture of that size: near is 1, far is 0."""
        depth = grown(values[:, None], size)[..., 0]
        return np.asarray((depth - depth.min()) / max(float(np.ptp(depth)), 1e-6))


@dataclass(frozen=True)
class MetricModel(DepthModel):
    """ZoeDepth (Bhat et al., 2023): it answers in metres, and reads pictures with their borders mirrored outwards."""

    def read(self, picture: np.ndarray) -> Tensor:
        """As ``DepthModel.read``."""
        high, wide = (_border(side) for side in picture.shape[:2])
        framed = cv2.copyMakeBorder(picture, high, high, wide, wide, cv2.BORDER_REFLECT_101)
        pixels = torch.from_numpy(framed).permute(2, 0, 1)[None].float() / 255
        size = self.size(*framed.shape[:2])
        mean, spread = (torch.tensor(one).reshape(1, 3, 1, 1) for one in self.colours)
        return (functional.interpolate(pixels, size, mode="bilinear", align_corners=True) - mean) / spread

    def nearness(self, values: Tensor, size: tuple[int, int]) -> np.ndarray:
        """As ``DepthModel.nearness``; the nearest 2% are 1 and the farthest 15% are 0, as in ControlNet's annotator."""
        high, wide = (_border(side) for side in size)
        whole = grown(values[:, None], (size[0] + 2 * high, size[1] + 2 * wide))[..., 0]
        metres = whole[high : high + size[0], wide : wide + size[1]]
        near, far = np.percentile(metres, (2, 85))
        return np.asarray((1 - (metres - near) / max(far - near, 1e-6)).clip(0, 1))


def _border(side: int) -> int:
    """The pixels that are added before and after a side."""
    return int((side / 2) ** 0.5 * 3)


def _anything(width: int, heads: int, layers: int, taps: tuple[int, ...], neck: Sequence[int], fusion: int) -> Any:
    """Settings of a Depth Anything: width, heads and layers of its DINOv2, the layers that are read, its decoder."""
    from transformers import DepthAnythingConfig, Dinov2Config

    backbone = Dinov2Config(
        image_size=518, patch_size=14, hidden_size=width, num_attention_heads=heads, num_hidden_layers=layers,
        out_features=[f"stage{number}" for number in taps], reshape_hidden_states=False,
    )  # fmt: skip
    return DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=width, neck_hidden_sizes=list(neck), fusion_hidden_size=fusion
    )


def _dpt_large() -> Any:
    from transformers import DPTConfig

    return DPTConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        backbone_out_indices=[5, 11, 17, 23], neck_hidden_sizes=[256, 512, 1024, 1024],
    )  # fmt: skip


def _dpt_hybrid() -> Any:
    from transformers import DPTConfig

    width = 12 * 64  # of heads
    return DPTConfig(
        is_hybrid=True, hidden_size=width, reassemble_factors=[1, 1, 1, 0.5], neck_hidden_sizes=[256, 512, width, width]
    )


def _of_anything(repository: str, settings: Callable[[], Any]) -> DepthModel:
    file = PublicFile("model.safetensors", repository)
    return DepthModel(file, "DepthAnythingForDepthEstimation", settings, (518, 518), 14, True, IMAGENET)


def _of_midas(repository: str, settings: Callable[[], Any]) -> DepthModel:
    file = PublicFile("model.safetensors", f"Intel/{repository}", also=("pytorch_model.bin",))
    return DepthModel(file, "DPTForDepthEstimation", settings, (384, 384), 32, False, _HALVES)


_NECK = (48, 96, 192, 384)
_SIZES = (  # the best first: width, heads and layers, the layers that version 2 reads, widths of the decoder
    ("Large", (1024, 16, 24), (5, 12, 18, 24), (256, 512, 1024, 1024), 256),
    ("Base", (12 * 64, 12, 12), (3, 6, 9, 12), tuple(2 * width for width in _NECK), 128),
    ("Small", (384, 6, 12), (3, 6, 9, 12), _NECK, 64),
)
ANYTHING_V2 = tuple(  # only the small one's weights are free for any use (Apache-2.0)
    _of_anything(f"depth-anything/Depth-Anything-V2-{size}-hf", partial(_anything, *shape, taps, neck, fusion))
    for size, shape, taps, neck, fusion in _SIZES
)
ANYTHING = tuple(  # the first version reads the last four layers; all its weights are Apache-2.0
    _of_anything(
        f"LiheYoung/depth-anything-{size.lower()}-hf",
        partial(_anything, *shape, tuple(range(shape[2] - 3, shape[2] + 1)), neck, fusion),
    )
    for size, shape, _, neck, fusion in _SIZES
)
MIDAS = (_of_midas("dpt-large", _dpt_large), _of_midas("dpt-hybrid-midas", _dpt_hybrid))


def _zoe() -> Any:
    from transformers import ZoeDepthConfig

    return ZoeDepthConfig(neck_hidden_sizes=[256, 512, 1024, 1024])  # the rest are the class's: BEiT-Large, NYU's bins


ZOE = (
    MetricModel(
        PublicFile("model.safetensors", "Intel/zoedepth-nyu"),
        "ZoeDepthForDepthEstimation", _zoe, (384, 512), 32, True, _HALVES,
    ),
)  # fmt: skip


def depth_of(pictures: Sequence[np.ndarray], device: str, model: DepthModel) -> list[np.ndarray]:
    """The nearness (H, W) of pictures: 1 is the nearest, 0 the farthest; of most networks inverse depth, stretched."""
    network = model.network(device)
    found = []
    for picture in pictures:
        pixels = model.read(picture).to(device)
        with torch.inference_mode():
            values = network(pixel_values=pixels).predicted_depth
        found.append(model.nearness(values, picture.shape[:2]))
    return found


def depth(models: Sequence[DepthModel], pictures: Sequence[np.ndarray], device: str) -> list[np.ndarray]:
    """Depth as light, near is white, by the best of the models that is here."""
    return [grey(255 * one) for one in depth_of(pictures, device, best(models))]


Background = Annotated[float, Field(ge=0, le=1)]


def normal(
    models: Sequence[DepthModel], pictures: Sequence[np.ndarray], device: str, background: Background = 0.4
) -> list[np.ndarray]:
    """Normals of the depth, as colours of our convention (x right, y up, z towards the camera).

    ``background``: what is darker than this in the depth is taken for a wall that faces the camera.
    """
    return [normal_picture(normals_of_depth(one, background)) for one in depth_of(pictures, device, best(models))]


def normals_of_depth(depth: np.ndarray, background: float) -> np.ndarray:
    """Unit normals (H, W, 3) of inverse depth (H, W) in [0, 1], by its slope, as MiDaS's annotator makes them.

    The slope is of the depth in 255 steps, against a length of 2 pi: there is no scale to inverse depth, and this one
    was taken for its looks.
    """
    light = (255 * depth).astype(np.float32)
    across, down = (cv2.Sobel(light, cv2.CV_32F, *axes, ksize=3) for axes in ((1, 0), (0, 1)))
    flat = depth < background
    across[flat], down[flat] = 0, 0
    normals = np.stack([-across, down, np.full_like(light, 2 * np.pi)], -1)
    return np.asarray(normals / np.linalg.norm(normals, axis=-1, keepdims=True))
