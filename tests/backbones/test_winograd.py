"""Convolutions with fewer products: the same numbers, where the rule says that they pay, and nowhere else."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import relative
from controlkit.backbones import load_base, unet, winograd
from controlkit.backbones.winograd import FewerProducts, convolved, tile_of
from controlkit.sample import Request, generate, pictures


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


@pytest.fixture
def ways(monkeypatch):
    """The convolutions that went the other way."""
    seen = []
    monkeypatch.setattr(winograd, "convolved", lambda *args: seen.append(args) or convolved(*args))
    return seen


def test_only_plain_convolutions_in_float32_without_gradients_go_this_way(ways):
    x = torch.randn(1, 256, 16, 16)
    plain = nn.Conv2d(256, 256, 3, padding=1)
    others = [
        nn.Conv2d(256, 256, 1),
        nn.Conv2d(256, 256, 3),
        nn.Conv2d(256, 256, 3, padding=1, stride=2),
        nn.Conv2d(256, 256, 3, padding=2, dilation=2),
        nn.Conv2d(256, 256, 3, padding=1, groups=256),
        nn.Conv2d(256, 256, 3, padding=1, padding_mode="circular"),
    ]
    with FewerProducts():
        assert plain(x).requires_grad
        with torch.no_grad():
            for conv in others:
                conv(x)
            plain.to(torch.bfloat16)(x.bfloat16())
            plain.to(torch.float64)(x.double())
        assert not ways
        with torch.no_grad():
            ours = plain.to(torch.float32)(x)
    assert len(ways) == 1
    with torch.no_grad():
        direct = plain(x)
    assert len(ways) == 1 and not torch.equal(ours, direct)
    assert torch.allclose(ours, direct, atol=1e-4)


@pytest.fixture
def everywhere(monkeypatch):
    """The rule for tiny networks: wherever it can be done."""
    monkeypatch.setattr(unet, "SMALL", 0)
    even = lambda x, weight: 2 if weight.shape[-2:] == (3, 3) and not (x.shape[-1] % 2 or x.shape[-2] % 2) else 0  # noqa: E731
    monkeypatch.setattr(winograd, "tile_of", even)


def test_a_large_base_on_a_cpu_makes_the_same_pictures_with_fewer_products(toy_folder, ways, everywhere, monkeypatch):
    request = Request(prompt="a red apple", steps=3)
    [ours] = pictures(generate(load_base(toy_folder), [request]))
    convolutions = len(ways)
    assert convolutions > 90
    with monkeypatch.context() as patch:
        patch.setattr(unet, "SMALL", 10**9)
        [plain] = pictures(generate(load_base(toy_folder), [request]))
    assert len(ways) == convolutions, "a small base does without"
    assert 0 < relative(ours.latents, plain.latents) < 1e-5
    assert np.abs(ours.pixels.astype(int) - plain.pixels).max() <= 1


def test_half_precision_does_without(toy_folder, ways, everywhere):
    base = load_base(toy_folder, dtype=torch.bfloat16)
    list(generate(base, [Request(steps=1)]))
    assert not ways
