"""Line drawings by networks: line art (Chan, Durand and Isola, CVPR 2022) and its form for anime."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from controlkit.annotators.networks.running import grey, run
from controlkit.annotators.networks.weights import PublicFile, network_of

FINE = PublicFile("sk_model.pth", "lllyasviel/Annotators")
COARSE = PublicFile("sk_model2.pth", "lllyasviel/Annotators")
ANIME = PublicFile("netG.pth", "lllyasviel/Annotators")


class Residual(nn.Module):
    """A residual block of two convolutions of three by three."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width)]
        self.conv_block = nn.Sequential(
            *half, nn.ReLU(), nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Features of the same shape."""
        return x + self.conv_block(x)


def _layer(conv: nn.Module, width: int) -> list[nn.Module]:
    return [conv, nn.InstanceNorm2d(width), nn.ReLU()]


class Lineart(nn.Module):
    """The network of ``sk_model.pth`` and ``sk_model2.pth``, whose names its parts have."""

    def __init__(self) -> None:
        super().__init__()
        down = partial(nn.Conv2d, stride=2, padding=1)
        up = partial(nn.ConvTranspose2d, stride=2, padding=1, output_padding=1)
        self.model0 = nn.Sequential(nn.ReflectionPad2d(3), *_layer(nn.Conv2d(3, 64, 7), 64))
        self.model1 = nn.Sequential(*_layer(down(64, 128, 3), 128), *_layer(down(128, 256, 3), 256))
        self.model2 = nn.Sequential(*(Residual(256) for _ in range(3)))
        self.model3 = nn.Sequential(*_layer(up(256, 128, 3), 128), *_layer(up(128, 64, 3), 64))
        self.model4 = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(64, 1, 7), nn.Sigmoid())

    def forward(self, pictures: Tensor) -> Tensor:
        """Lightness (B, 1, H, W) in [0, 1], lines dark, of RGB pictures (B, 3, H, W) in [0, 1]."""
        return self.model4(self.model3(self.model2(self.model1(self.model0(pictures)))))


class Level(nn.Module):
    """A level of a U-Net: its input, beside what the levels below make of it at half the size."""

    def __init__(self, outer: int, inner: int, below: nn.Module | None) -> None:
        super().__init__()
        down: list[nn.Module] = [nn.LeakyReLU(0.2), nn.Conv2d(outer, inner, 4, 2, 1)]
        middle = [nn.InstanceNorm2d(inner), below] if below else []
        up = nn.ConvTranspose2d(2 * inner if below else inner, outer, 4, 2, 1)
        self.model = nn.Sequential(*down, *middle, nn.ReLU(), up, nn.InstanceNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 2 C, H, W) of (B, C, H, W)."""
        return torch.cat([x, self.model(x)], 1)


class Outermost(nn.Module):
    """The outermost level: a picture in, lines out."""

    def __init__(self, below: nn.Module) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(3, 64, 4, 2, 1), below, nn.ReLU(), nn.ConvTranspose2d(128, 1, 4, 2, 1), nn.Tanh()
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, H, W) of (B, 3, H, W)."""
        return self.model(x)


class AnimeLineart(nn.Module):
    """The network of ``netG.pth``, whose names its parts have: a U-Net of eight levels."""

    def __init__(self) -> None:
        super().__init__()
        below: nn.Module | None = None
        for outer, inner in ((512, 512),) * 4 + ((256, 512), (128, 256), (64, 128)):
            below = Level(outer, inner, below)
        assert below is not None
        self.model = Outermost(below)

    def forward(self, pictures: Tensor) -> Tensor:
        """Lightness (B, 1, H, W) in [-1, 1], lines dark, of RGB pictures (B, 3, H, W) in [-1, 1]."""
        return self.model(pictures)


# --- annotators ---------------------------------------------------------------------------------------------------


def _drawn(file: PublicFile, pictures: Sequence[np.ndarray], device: str) -> list[np.ndarray]:
    network = network_of(Lineart, file.path(), device)
    return [grey(255 - 255 * one) for one in run(lambda pixels: network(pixels / 255), pictures, device, 8)]


def lineart(pictures: Sequence[np.ndarray], device: str) -> list[np.ndarray]:
    """Fine line art, light on black."""
    return _drawn(FINE, pictures, device)


def lineart_coarse(pictures: Sequence[np.ndarray], device: str) -> list[np.ndarray]:
    """Coarse line art, light on black."""
    return _drawn(COARSE, pictures, device)


def lineart_anime(pictures: Sequence[np.ndarray], device: str) -> list[np.ndarray]:
    """Line art in the manner of anime, light on black."""
    network = network_of(AnimeLineart, ANIME.path(), device)
    made = run(lambda pixels: network(pixels / 127.5 - 1), pictures, device, 256)
    return [grey(127.5 - 127.5 * one) for one in made]
