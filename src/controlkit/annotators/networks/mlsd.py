"""M-LSD: straight lines by a small network (Gu et al., AAAI 2022; ``mlsd_large_512_fp32.pth``)."""

from collections.abc import Sequence
from typing import Annotated

import cv2
import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from controlkit.annotators.networks.running import run, shrunk
from controlkit.annotators.networks.weights import PublicFile, network_of

PUBLIC = PublicFile("mlsd_large_512_fp32.pth", "lllyasviel/Annotators")

_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1))
"""MobileNetV2's stages: how many times wider its blocks are inside, channels, blocks, stride of the first."""
_TAPS = (1, 3, 6, 10, 13)
"""The layers whose features the decoder takes."""
_MOST_LINES, _NEAR = 200, 3


def _conv(inner: int, outer: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution, its norm and ReLU6; with a stride it is padded at the right and below alone, as TFLite does."""
    pad = [] if stride == 1 else [0, 1, 0, 1]
    made = nn.Sequential(
        nn.Conv2d(inner, outer, size, stride, size // 2 if stride == 1 else 0, groups=groups, bias=False),
        nn.BatchNorm2d(outer),
        nn.ReLU6(),
    )
    if pad:
        made.register_forward_pre_hook(lambda _, given: (functional.pad(given[0], pad),))
    return made


class Inverted(nn.Module):
    """MobileNetV2's block: wider inside, with a shortcut where shapes allow."""

    def __init__(self, inner: int, outer: int, stride: int, times: int) -> None:
        super().__init__()
        wide = inner * times
        first = [_conv(inner, wide, 1)] if times > 1 else []
        last = [nn.Conv2d(wide, outer, 1, bias=False), nn.BatchNorm2d(outer)]
        self.conv = nn.Sequential(*first, _conv(wide, wide, 3, stride, wide), *last)
        self.adds = stride == 1 and inner == outer

    def forward(self, x: Tensor) -> Tensor:
        """Features, of half the size where the stride is 2."""
        return x + self.conv(x) if self.adds else self.conv(x)


class Backbone(nn.Module):
    """MobileNetV2 of four channels."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(4, 32, 3, 2)]
        width = 32
        for times, outer, blocks, stride in _STAGES:
            for block in range(blocks):
                layers.append(Inverted(width, outer, stride if block == 0 else 1, times))
                width = outer
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The features at the taps, the finest first."""
        found = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            found += [x] if number in _TAPS else []
        return found


def _normed(conv: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())


class Join(nn.Module):
    """Finer features beside coarser ones, 64 channels each."""

    def __init__(self, fine: int, coarse: int) -> None:
        super().__init__()
        self.conv1 = _normed(nn.Conv2d(coarse, 64, 1))
        self.conv2 = _normed(nn.Conv2d(fine, 64, 1))

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """(B, 128, H, W) of the size of the finer ones."""
        coarse, fine = self.conv1(coarse), self.conv2(fine)
        if coarse.shape != fine.shape:
            coarse = functional.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=True)
        return torch.cat([fine, coarse], 1)


class Mix(nn.Module):
    """Two convolutions of three by three, the first with a shortcut."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv1 = _normed(nn.Conv2d(inner, inner, 3, padding=1))
        self.conv2 = _normed(nn.Conv2d(inner, outer, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Features of the same size."""
        return self.conv2(x + self.conv1(x))


class Head(nn.Module):
    """The maps that the network gives."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = _normed(nn.Conv2d(64, 64, 3, padding=5, dilation=5))
        self.conv2 = _normed(nn.Conv2d(64, 64, 3, padding=1))
        self.conv3 = nn.Conv2d(64, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, 16, H, W)."""
        return self.conv3(self.conv2(self.conv1(x)))


class MLSD(nn.Module):
    """The network of ``mlsd_large_512_fp32.pth``, whose names its parts have."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        for number, (fine, coarse) in enumerate(((64, 96), (32, 64), (24, 64), (16, 64))):
            self.add_module(f"block{15 + 2 * number}", Join(fine, coarse))
            self.add_module(f"block{16 + 2 * number}", Mix(128, 64))
        self.block23 = Head()

    def forward(self, pictures: Tensor) -> Tensor:
        """Maps (B, 5, H / 2, W / 2) of pictures (B, 4, H, W) in [-1, 1], the fourth channel 1 / 127.5 - 1.

        The logit of a line's middle being there, and where from there its ends lie: x, y, x, y.
        """
        *fine, x = self.backbone(pictures)
        for number, features in enumerate(reversed(fine)):
            x = self.get_submodule(f"block{15 + 2 * number}")(features, x)
            x = self.get_submodule(f"block{16 + 2 * number}")(x)
        return self.block23(x)[:, 7:12]


# --- annotator ----------------------------------------------------------------------------------------------------


def segments(maps: np.ndarray, score: float, distance: float) -> np.ndarray:
    """Lines (N, 4), their ends x, y, x, y in pixels of the maps (5, H, W): at most 200, the surest first."""
    heat = torch.from_numpy(maps[:1]).sigmoid()
    peaks = heat * (functional.max_pool2d(heat[None], _NEAR, 1, _NEAR // 2)[0] == heat)
    scores, places = peaks.flatten().topk(min(_MOST_LINES, peaks.numel()))
    y, x = np.divmod(places[scores > score].numpy(), maps.shape[-1])
    ends = maps[1:, y, x].T
    long = np.hypot(*(ends[:, :2] - ends[:, 2:]).T) > distance
    return (ends + np.stack([x, y, x, y], 1))[long]


def mlsd_large(
    pictures: Sequence[np.ndarray],
    device: str,
    score: Annotated[float, Field(ge=0.01, le=2)] = 0.1,
    distance: Annotated[float, Field(ge=0.01, le=20)] = 0.1,
) -> list[np.ndarray]:
    """Straight lines, white on black, one pixel wide at a short side of 512.

    ``score``: the least of a line; ``distance``: the least between its ends, in half pixels.
    """
    network = network_of(MLSD, PUBLIC.path(), device)

    def forward(pixels: Tensor) -> Tensor:
        whole = torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1)
        maps = network(whole / 127.5 - 1)
        return functional.interpolate(maps, pixels.shape[-2:], mode="nearest")

    made = run(forward, [shrunk(picture) for picture in pictures], device, 16)
    return [_lines(maps, p.shape[:2], score, distance) for maps, p in zip(made, pictures, strict=True)]


def _lines(maps: np.ndarray, size: tuple[int, ...], score: float, distance: float) -> np.ndarray:
    """The picture, of a size (height, width), of the lines of maps (H, W, 5), which were made twice as large."""
    drawn = np.zeros((*size, 3), np.uint8)
    thick = max(round(min(size) / 512), 1)
    times = [2 * side / own for side, own in zip(size, maps.shape, strict=False)]
    found = segments(np.ascontiguousarray(maps[::2, ::2].transpose(2, 0, 1)), score, distance) * (times[::-1] * 2)
    limit = 4 * max(drawn.shape)
    for x0, y0, x1, y1 in found.clip(-limit, limit):
        cv2.line(drawn, (int(x0), int(y0)), (int(x1), int(y1)), (255, 255, 255), thick)
    return drawn
