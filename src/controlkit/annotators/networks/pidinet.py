"""PiDiNet: soft edges by a small network of pixel differences (Su et al., ICCV 2021; ``table5_pidinet.pth``)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from controlkit.annotators.networks.hed import in_steps, thick_ridges
from controlkit.annotators.networks.running import grey, run
from controlkit.annotators.networks.weights import PublicFile, network_of
from controlkit.annotators.options import Switch

PUBLIC = PublicFile("table5_pidinet.pth", "lllyasviel/Annotators")

_WIDTH, _INNER = 60, 24
_DIFFERENCES = ("central", "angular", "radial", "plain")
"""The kinds of convolution, in turn, from the first layer on."""
_STRIDE, _MARGIN = 8, 192
"""Of the coarsest features, and how far they see: 4 blocks and dilations of up to 11 at each scale."""
_ROUND = (3, 0, 1, 6, 4, 2, 7, 8, 5)
"""The neighbour that lies before each place of a kernel of nine, clockwise about its middle."""
_INSIDE, _OUTSIDE = (6, 7, 8, 11, 13, 16, 17, 18), (0, 2, 4, 10, 14, 20, 22, 24)
"""Of 25 places, those about the middle and those of the ring around them that lie in the same directions."""


def plain_kernel(kernel: Tensor, kind: str) -> Tensor:
    """The plain kernel that does to pixels what a kernel of nine does to their differences.

    ``central``: of each pixel and the middle; ``angular``: of each and the one before it, clockwise; ``radial``: of
    pixels two away and those one away in the same direction, which makes a kernel of five by five.
    """
    if kind == "plain":
        return kernel
    flat = kernel.flatten(2)
    if kind == "angular":
        return (flat - flat[..., _ROUND]).view_as(kernel)
    if kind == "central":
        middle = torch.zeros_like(flat)
        middle[..., 4] = flat.sum(-1)
        return (flat - middle).view_as(kernel)
    wide = flat.new_zeros(*flat.shape[:2], 25)
    wide[..., _OUTSIDE], wide[..., _INSIDE] = flat[..., 1:], -flat[..., 1:]
    return wide.view(*flat.shape[:2], 5, 5)


class DifferenceConv(nn.Module):
    """A convolution of three by three over differences of pixels."""

    def __init__(self, kind: str, inner: int, outer: int, groups: int = 1) -> None:
        super().__init__()
        self.kind, self.groups = kind, groups
        self.weight = nn.Parameter(torch.empty(outer, inner // groups, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Features of the same size."""
        kernel = plain_kernel(self.weight, self.kind)
        return functional.conv2d(x, kernel, padding=kernel.shape[-1] // 2, groups=self.groups)


class Block(nn.Module):
    """A residual block: differences in each channel, and their mixture; the first of a scale halves the size."""

    def __init__(self, kind: str, inner: int, outer: int, halves: bool) -> None:
        super().__init__()
        self.halves = halves
        if halves:
            self.shortcut = nn.Conv2d(inner, outer, 1)
        self.conv1 = DifferenceConv(kind, inner, inner, inner)
        self.conv2 = nn.Conv2d(inner, outer, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features of the same size, or half of it."""
        x = functional.max_pool2d(x, 2) if self.halves else x
        changed = self.conv2(self.conv1(x).relu())
        return changed + (self.shortcut(x) if self.halves else x)


class Dilations(nn.Module):
    """Features that see far: the sum of four dilated convolutions."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, _INNER, 1)
        for number, far in enumerate((5, 7, 9, 11), 1):
            self.add_module(f"conv2_{number}", nn.Conv2d(_INNER, _INNER, 3, padding=far, dilation=far, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, 24, H, W)."""
        x = self.conv1(x.relu())
        return torch.stack([self.get_submodule(f"conv2_{number}")(x) for number in range(1, 5)]).sum(0)


class Attention(nn.Module):
    """Features weighted by place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(_INNER, 4, 1)
        self.conv2 = nn.Conv2d(4, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features of the same shape."""
        return x * self.conv2(self.conv1(x.relu())).sigmoid()


class Reduce(nn.Module):
    """The logits of edges at one scale."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(_INNER, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 1, H, W)."""
        return self.conv(x)


class PiDiNet(nn.Module):
    """The network of ``table5_pidinet.pth``, whose names its parts have."""

    def __init__(self) -> None:
        super().__init__()
        kinds = [_DIFFERENCES[number % 4] for number in range(16)]
        self.init_block = DifferenceConv(kinds[0], 3, _WIDTH)
        widths, number = (_WIDTH, 2 * _WIDTH, 4 * _WIDTH, 4 * _WIDTH), 1
        for scale, width in enumerate(widths, 1):
            for place in range(1 if scale > 1 else 2, 5):
                first = scale > 1 and place == 1
                block = Block(kinds[number], widths[scale - 2] if first else width, width, first)
                self.add_module(f"block{scale}_{place if scale > 1 else place - 1}", block)
                number += 1
        self.dilations = nn.ModuleList(Dilations(width) for width in widths)
        self.attentions = nn.ModuleList(Attention() for _ in widths)
        self.conv_reduces = nn.ModuleList(Reduce() for _ in widths)
        self.classifier = nn.Conv2d(4, 1, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits of edges (B, 1, H, W), of BGR pictures (B, 3, H, W) in [0, 1]."""
        x, sides = self.init_block(pictures), []
        parts = zip(self.dilations, self.attentions, self.conv_reduces, strict=True)
        for scale, (far, attend, reduce) in enumerate(parts, 1):
            for place in range(1, 5 if scale > 1 else 4):
                x = self.get_submodule(f"block{scale}_{place}")(x)
            sides.append(functional.interpolate(reduce(attend(far(x))), pictures.shape[-2:], mode="bilinear"))
        return self.classifier(torch.cat(sides, 1))


# --- annotators ---------------------------------------------------------------------------------------------------


def _edges(pictures: Sequence[np.ndarray], device: str) -> list[np.ndarray]:
    """Edges (H, W) in [0, 1] of pictures."""
    network = network_of(PiDiNet, PUBLIC.path(), device)
    made = run(lambda pixels: network(pixels.flip(1) / 255).sigmoid(), pictures, device, _STRIDE, _MARGIN)
    return [one[..., 0] for one in made]


def pidi(pictures: Sequence[np.ndarray], device: str, safe: Switch = 0.0) -> list[np.ndarray]:
    """Soft edges, light on black. ``safe``: whether they are in steps of grey, as ``hed.in_steps`` makes them."""
    return [grey(255 * in_steps(edges, safe >= 0.5)) for edges in _edges(pictures, device)]


def scribble_pidi(pictures: Sequence[np.ndarray], device: str) -> list[np.ndarray]:
    """Scribbles made of soft edges, as ``hed.scribble_hed``."""
    return [thick_ridges(edges) for edges in _edges(pictures, device)]


def sketch_pidi(pictures: Sequence[np.ndarray], device: str) -> list[np.ndarray]:
    """Edges above one half, white on black: as T2I-Adapters of sketches read them."""
    return [grey(255.0 * (edges > 0.5)) for edges in _edges(pictures, device)]
