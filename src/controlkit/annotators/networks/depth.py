"""Depth by networks of transformers (Depth Anything, MiDaS's DPT), and normals of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import cv2
import numpy as np
import torch
from pydantic import Field

from controlkit.annotators.maps import normal_picture
from controlkit.annotators.networks.pretrained import IMAGENET, Pretrained, best, grown, normalised
from controlkit.annotators.networks.running import grey
from controlkit.annotators.networks.weights import PublicFile

_HALVES = ((0.5,) * 3, (0.5,) * 3)
_BICUBIC = 3  # Pillow's number


@dataclass(frozen=True)
class DepthModel(Pretrained):
    """A network of depth, and how it reads pictures."""

    side: int
    """Of the pictures it reads; of the shorter side, where shapes are kept."""
    multiple: int
    keeps_shape: bool
    colours: Any

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The size (height, width) in which a picture is read.

        Where shapes are kept it is scaled by the factor, of the two that bring a side to ``side``, nearer to 1; a strip
        is made no longer than four times that.
        """
        factors = (self.side / height, self.side / width)
        if self.keeps_shape:
            nearer = min(factors, key=lambda factor: abs(1 - factor))
            factors = (min(nearer, 4 * self.side / max(height, width)),) * 2
        high, wide = (
            max(round(length * factor / self.multiple), 1) * self.multiple
            for length, factor in zip((height, width), factors, strict=True)
        )
        return high, wide


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
    file = PublicFile("model.safetensors", f"depth-anything/{repository}")
    return DepthModel(file, "DepthAnythingForDepthEstimation", settings, 518, 14, True, IMAGENET)


def _of_midas(repository: str, settings: Callable[[], Any]) -> DepthModel:
    file = PublicFile("model.safetensors", f"Intel/{repository}", also=("pytorch_model.bin",))
    return DepthModel(file, "DPTForDepthEstimation", settings, 384, 32, False, _HALVES)


_SMALL, _BASE = (384, 6, 12), (12 * 64, 12, 12)
_NECK = [48, 96, 192, 384]
ANYTHING_V2 = (  # the best first; only the small one's weights are free for any use (Apache-2.0)
    _of_anything(
        "Depth-Anything-V2-Large-hf", partial(_anything, 1024, 16, 24, (5, 12, 18, 24), (256, 512, 1024, 1024), 256)
    ),
    _of_anything("Depth-Anything-V2-Base-hf", partial(_anything, *_BASE, (3, 6, 9, 12), [2 * n for n in _NECK], 128)),
    _of_anything("Depth-Anything-V2-Small-hf", partial(_anything, *_SMALL, (3, 6, 9, 12), _NECK, 64)),
)
MIDAS = (_of_midas("dpt-large", _dpt_large), _of_midas("dpt-hybrid-midas", _dpt_hybrid))


def depth_of(pictures: Sequence[np.ndarray], device: str, model: DepthModel) -> list[np.ndarray]:
    """Inverse depth (H, W) of pictures, stretched to [0, 1]: what is near is 1."""
    network = model.network(device)
    found = []
    for picture in pictures:
        pixels = normalised(picture, model.size(*picture.shape[:2]), _BICUBIC, model.colours).to(device)
        with torch.inference_mode():
            values = network(pixel_values=pixels).predicted_depth
        depth = grown(values[:, None], picture.shape[:2])[..., 0]
        found.append((depth - depth.min()) / max(float(np.ptp(depth)), 1e-6))
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
