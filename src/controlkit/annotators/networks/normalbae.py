"""Normals by a network (Bae, Budvytis and Cipolla, ICCV 2021; ``scannet.pt``): an EfficientNet-B5 with a decoder."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from controlkit.annotators.networks.pretrained import IMAGENET
from controlkit.annotators.networks.running import run
from controlkit.annotators.networks.weights import PublicFile, network_of

PUBLIC = PublicFile("scannet.pt", "lllyasviel/Annotators")

_STAGES = (
    (3, 24, 1, 3, 1), (5, 40, 6, 3, 2), (5, 64, 6, 5, 2), (7, 128, 6, 3, 2), (7, 176, 6, 5, 1), (9, 304, 6, 5, 2),
    (3, 512, 6, 3, 1),
)  # fmt: skip
"""EfficientNet-B5's stages: blocks, channels, how many times wider inside, kernel, stride of the first block."""
_STEM, _HEAD = 48, 2048
_TAPS = (0, 1, 2, 4)
"""Stages whose features the decoder takes, at 1/2, 1/4, 1/8 and 1/16 of the size."""


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow pads: to the size over the stride, one more at the right and below."""

    def forward(self, x: Tensor) -> Tensor:
        """Features, as large as the input over the stride, rounded up."""
        pads = []
        for side, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(functional.pad(x, pads))


class Squeeze(nn.Module):
    """Channels weighted by what is in the whole picture."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(width, inner, 1)
        self.conv_expand = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Features of the same shape."""
        return x * self.conv_expand(functional.silu(self.conv_reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class Separable(nn.Module):
    """The first stage's block: a convolution in each channel, then their mixture."""

    def __init__(self, inner: int, outer: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv_dw = SameConv(inner, inner, kernel, stride, groups=inner, bias=False)
        self.bn1 = _norm(inner)
        self.se = Squeeze(inner, inner // 4)
        self.conv_pw = nn.Conv2d(inner, outer, 1, bias=False)
        self.bn2 = _norm(outer)
        self.adds = stride == 1 and inner == outer

    def forward(self, x: Tensor) -> Tensor:
        """Features, smaller by the stride."""
        made = self.bn2(self.conv_pw(self.se(functional.silu(self.bn1(self.conv_dw(x))))))
        return made + x if self.adds else made


class Inverted(nn.Module):
    """The other stages' block: wider inside."""

    def __init__(self, inner: int, outer: int, times: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = inner * times
        self.conv_pw = nn.Conv2d(inner, wide, 1, bias=False)
        self.bn1 = _norm(wide)
        self.conv_dw = SameConv(wide, wide, kernel, stride, groups=wide, bias=False)
        self.bn2 = _norm(wide)
        self.se = Squeeze(wide, inner // 4)
        self.conv_pwl = nn.Conv2d(wide, outer, 1, bias=False)
        self.bn3 = _norm(outer)
        self.adds = stride == 1 and inner == outer

    def forward(self, x: Tensor) -> Tensor:
        """Features, smaller by the stride."""
        made = functional.silu(self.bn1(self.conv_pw(x)))
        made = self.bn3(self.conv_pwl(self.se(functional.silu(self.bn2(self.conv_dw(made))))))
        return made + x if self.adds else made


class EfficientNet(nn.Module):
    """EfficientNet-B5 without its classifier, under the names of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = SameConv(3, _STEM, 3, 2, bias=False)
        self.bn1 = _norm(_STEM)
        stages, width = [], _STEM
        for blocks, outer, times, kernel, stride in _STAGES:
            stage = []
            for number in range(blocks):
                step = stride if number == 0 else 1
                stage.append(
                    Inverted(width, outer, times, kernel, step) if times > 1 else Separable(width, outer, kernel, step)
                )
                width = outer
            stages.append(nn.Sequential(*stage))
        self.blocks = nn.Sequential(*stages)
        self.conv_head = nn.Conv2d(width, _HEAD, 1, bias=False)
        self.bn2 = _norm(_HEAD)  # in the file, and after all that is read

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features, the finest first; the last are the head's."""
        x, found = functional.silu(self.bn1(self.conv_stem(x))), []
        for number, stage in enumerate(self.blocks):
            x = stage(x)
            found += [x] if number in _TAPS else []
        return [*found, self.conv_head(x)]


class Encoder(nn.Module):
    """The encoder, as the file names it."""

    def __init__(self) -> None:
        super().__init__()
        self.original_model = EfficientNet()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features, the finest first."""
        found: list[Tensor] = self.original_model(x)
        return found


class Up(nn.Module):
    """Coarser features brought to the size of finer ones, and both mixed."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (inner, outer):
            layers += [nn.Conv2d(width, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.LeakyReLU()]
        self._net = nn.Sequential(*layers)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """Features of the size of the finer ones."""
        grown = functional.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=True)
        return self._net(torch.cat([grown, fine], 1))


def _points(width: int) -> nn.Sequential:
    """Layers that refine the normals of each pixel by itself, of its features and the coarser normals."""
    widths = (width + 4, 128, 128, 128)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Conv1d(a, b, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv1d(128, 4, 1))


class Decoder(nn.Module):
    """Normals at 1/8 of the size, then refined at 1/4, 1/2 and the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(_HEAD, _HEAD, 1)
        coarse = _HEAD
        for number, (fine, outer) in enumerate(((176, 1024), (64, 512), (40, 256), (24, 128)), 1):
            self.add_module(f"up{number}", Up(coarse + fine, outer))
            coarse = outer
        self.out_conv_res8 = nn.Conv2d(512, 4, 3, padding=1)
        self.out_conv_res4, self.out_conv_res2, self.out_conv_res1 = _points(512), _points(256), _points(128)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Unit normals and their certainty (B, 4, H, W)."""
        *fine, head = features
        x, levels = self.conv2(head), []
        for number, finer in enumerate(reversed(fine), 1):
            x = self.get_submodule(f"up{number}")(x, finer)
            levels.append(x)
        made = _unit(self.out_conv_res8(levels[1]))
        for level, refine in zip(levels[1:], (self.out_conv_res4, self.out_conv_res2, self.out_conv_res1), strict=True):
            both = [
                functional.interpolate(one, scale_factor=2, mode="bilinear", align_corners=True)
                for one in (level, made)
            ]
            both_in_a_row = torch.cat(both, 1).flatten(2)
            made = _unit(refine(both_in_a_row).unflatten(2, both[0].shape[-2:]))
        return made


def _unit(x: Tensor) -> Tensor:
    """Normals (B, 4, ...) brought to length 1, and the certainty made positive."""
    normals = x[:, :3] / (x[:, :3].norm(dim=1, keepdim=True) + 1e-10)
    return torch.cat([normals, functional.elu(x[:, 3:]) + 1.01], 1)


class NormalBAE(nn.Module):
    """The network of ``scannet.pt``, whose names its parts have."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Decoder()

    def forward(self, pictures: Tensor) -> Tensor:
        """Unit normals (B, 3, H, W) of RGB pictures, less ImageNet's mean and over its spread."""
        normals: Tensor = self.decoder(self.encoder(pictures))[:, :3]
        return normals


def normal_bae(pictures: Sequence[np.ndarray], device: str) -> list[np.ndarray]:
    """Normals as colours, (n + 1) x 127.5, as the network has them: by ScanNet's protocol.

    ControlNet 1.1's control of normals was trained on these. They are not brought into the convention of ``maps``.
    """
    network = network_of(NormalBAE, PUBLIC.path(), device)
    mean, spread = (torch.tensor(one, device=device).reshape(1, 3, 1, 1) for one in IMAGENET)
    made = run(lambda pixels: network((pixels / 255 - mean) / spread), pictures, device, 32)
    return [((one + 1) * 127.5).round().clip(0, 255).astype(np.uint8) for one in made]
