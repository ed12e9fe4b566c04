"""Convolutions with fewer products: the same numbers, where the rule says that they pay, and nowhere else."""

import pytest
import torch
import torch.nn.functional as F

from controlkit.backbones import winograd
from controlkit.backbones.winograd import convolved, tile_of


def drawn(rows, channels, out, height, width):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=rng) for shape in ((rows, channels, height, width), (out, channels, 3, 3))]


@pytest.mark.parametrize("room", [winograd._ROOM, 2000], ids=["at once", "in strips and groups"])
@pytest.mark.parametrize("size", [(8, 8), (16, 4), (4, 24)])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("m", [2, 4])
def test_it_is_the_convolution(m, rows, size, room, monkeypatch):
    monkeypatch.setattr(winograd, "_ROOM", room)
    for out in (5, 40):  # few kernels, and so many that they come in groups
        x, weight = drawn(rows, 17, out, *size)
        exact = F.conv2d(x.double(), weight.double(), torch.arange(out).double(), padding=1)
        for rows_of_x in (x, x.contiguous(memory_format=torch.channels_last)):
            ours = convolved(rows_of_x, weight, torch.arange(out).float(), m)
            assert ours.shape == exact.shape and (ours - exact).norm() <= 3e-6 * exact.norm()
        assert torch.equal(convolved(x, weight, None, m) + torch.arange(out).view(-1, 1, 1), ours)


def test_its_error_is_that_of_the_direct_way():
    x, weight = drawn(1, 640, 640, 32, 32)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    direct = (F.conv2d(x, weight, padding=1) - exact).norm() / exact.norm()
    for m in (2, 4):
        assert (convolved(x, weight, None, m) - exact).norm() / exact.norm() <= max(3 * direct, 4e-6)


@pytest.mark.parametrize(
    ("channels", "out", "size", "m"),
    [
        (320, 320, (64, 64), 4),
        (1280, 640, (32, 32), 4),
        (1280, 1280, (16, 16), 2),
        (2560, 1280, (8, 8), 0),
        (320, 320, (66, 66), 2),
        (320, 320, (65, 64), 0),
        (1280, 1280, (4, 4), 0),
        (4, 320, (64, 64), 0),
        (128, 128, (512, 512), 0),
    ],
)
def test_the_rule_is_of_shapes(channels, out, size, m):
    assert tile_of(torch.empty(1, channels, *size, device="meta"), torch.empty(out, channels, 3, 3, device="meta")) == m
