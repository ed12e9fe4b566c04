"""Convolutions of three by three with half to a quarter of the products, for float32 on a CPU.

Winograd's algorithm (Lavin and Gray, *Fast Algorithms for Convolutional Neural Networks*, 2016): a tile of (m + 2)^2
inputs and a kernel of 3 x 3 are brought into a space where their convolution is a product number by number, and back to
m x m outputs. Summed over channels these are (m + 2)^2 products of matrices. In float32 the result is as near to the
exact one as the direct convolution's (relative L2 of either 1e-6 to 4e-6).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_ROOM = 4 * 2**20
"""Numbers of inputs or kernels that are there at once, where there are more: as many as a CPU's caches hold."""
_KERNEL = {
    2: torch.tensor([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], dtype=torch.float64) / 2,
    4: torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64)
    / 24,
}
"""By m: the matrix that brings a kernel's rows, or columns, there."""


def _there_2(d: Sequence[Tensor], out: Tensor) -> None:
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _back_2(m: Tensor, out: Tensor) -> None:
    both = m[1] + m[2]
    torch.add(m[0], both, out=out[0])
    torch.sub(m[1], m[2], out=both)
    torch.sub(both, m[3], out=out[1])


def _there_4(d: Sequence[Tensor], out: Tensor) -> None:
    even, odd = torch.add(d[4], d[2], alpha=-4), torch.add(d[3], d[1], alpha=-4)
    torch.add(even, odd, out=out[1])
    torch.sub(even, odd, out=out[2])
    torch.sub(d[4], d[2], out=even)
    torch.sub(d[3], d[1], out=odd)
    torch.add(even, odd, alpha=2, out=out[3])
    torch.add(even, odd, alpha=-2, out=out[4])
    torch.sub(d[0], d[2], out=out[0])
    out[0].mul_(4).add_(even)
    torch.sub(d[5], d[3], out=out[5])
    out[5].add_(odd, alpha=-4)


def _back_4(m: Tensor, out: Tensor) -> None:
    near, near_apart, far, far_apart = m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4]
    torch.add(m[0], near, out=out[0])
    out[0].add_(far)
    torch.add(near_apart, far_apart, alpha=2, out=out[1])
    torch.add(near, far, alpha=4, out=out[2])
    torch.add(near_apart, far_apart, alpha=8, out=out[3])
    out[3].add_(m[5])


_THERE: dict[int, Callable[[Sequence[Tensor], Tensor], None]] = {2: _there_2, 4: _there_4}
_BACK: dict[int, Callable[[Tensor, Tensor], None]] = {2: _back_2, 4: _back_4}


def _kernels(weight: Tensor, m: int) -> Tensor:
    """A weight (K, C, 3, 3) there: ((m + 2)^2, K, C)."""
    rows = _KERNEL[m]
    both = torch.kron(rows, rows).to(weight).expand(len(weight), -1, -1)
    # By output channel: one product with a weight as a matrix of nine rows is twice as slow.
    return torch.bmm(both, weight.flatten(2).transpose(1, 2)).transpose(0, 1)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, m: int) -> Tensor:
    """The convolution of x (B, C, h, w), padded by one zero on each side, with a weight (K, C, 3, 3): (B, K, h, w).

    ``m``: 2 or 4, which h and w must be multiples of. The result's numbers lie with the channels last.
    """
    count, channels, height, width = x.shape
    down, across, side = height // m, width // m, m + 2
    last = x.permute(0, 2, 3, 1)
    result = x.new_empty(count, height, width, len(weight))
    tiles = result.view(count, down, m, across, m, len(weight)).permute(4, 2, 0, 1, 3, 5)
    # Either all kernels are there at once, for strips of tiles; or all tiles are, for groups of kernels.
    few = weight.numel() * side**2 <= 9 * 2 * _ROOM
    group = len(weight) if few else max(_ROOM // (side**2 * channels), 1)
    strip = down if not few else max(_ROOM // (side**2 * across * count * max(channels, len(weight))), 1)
    kernels = _kernels(weight, m) if few else None
    for top in range(0, down, strip):
        rows = min(strip, down - top)
        first, end = top * m - 1, (top + rows) * m + 1
        inner = last[:, max(first, 0) : min(end, height)]  # a strip is padded alone: all of it would be a second x
        there = _tiles_there(F.pad(inner, (0, 0, 1, 1, max(-first, 0), max(end - height, 0))), m, across)
        for start in range(0, len(weight), group):
            some = slice(start, start + group)
            kernel = _kernels(weight[some], m) if kernels is None else kernels
            found = torch.bmm(there.view(side**2, -1, channels), kernel.transpose(1, 2))
            found = found.view(side, side, count, rows, across, -1)
            half = x.new_empty(m, *found.shape[1:])
            _BACK[m](found, half)
            _BACK[m](half.transpose(0, 1), tiles[:, :, :, top : top + rows, :, some])
    if bias is not None:
        result += bias
    return result.permute(0, 3, 1, 2)


def _tiles_there(padded: Tensor, m: int, across: int) -> Tensor:
    """Rows of tiles of inputs (B, m r + 2, w + 2, C) there: (m + 2, m + 2, B, r, w / m, C)."""
    count, height, width, channels = padded.shape
    side, rows = m + 2, (height - 2) // m
    half = padded.new_empty(side, count, rows, width, channels)
    there = padded.new_empty(side, side, count, rows, across, channels)
    _THERE[m]([padded[:, i : i + m * rows - m + 1 : m] for i in range(side)], half)
    _THERE[m]([half[:, :, :, i : i + m * across - m + 1 : m] for i in range(side)], there.transpose(0, 1))
    return there


def tile_of(x: Tensor, weight: Tensor) -> int:
    """The m that pays for a convolution of x (B, C, h, w), padded by one, with a weight; 0 where none does.

    A rule of the shapes alone, so that a picture does not depend on how busy the machine is. With fewer places the
    kernels, which are brought there anew each time, cost more than the products saved.
    """
    height, width = x.shape[-2:]
    if weight.shape[-2:] != (3, 3) or min(weight.shape[:2]) < 256 or height * width < 256:
        return 0
    if height % 4 == width % 4 == 0 and height * width >= 1024:
        return 4
    return 2 if height % 2 == width % 2 == 0 else 0
