"""The Inception network of FID, as its public weights have it, and the way pictures are brought to it.

Szegedy et al., 2016 (Inception v3), with the poolings of the TensorFlow graph that FID was defined with (Heusel et al.,
2017): averages leave the border out, and the last block takes the maximum. Names are those of the public file
(``pt_inception-2015-12-05-6726825d.pth``). Pictures are resized as clean-fid does it (Parmar et al., 2022): bicubic,
with a filter, in floats, so that nothing is rounded or cut off.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

SIDE = 299
FEATURES = 2048
_CLASSES = 1008  # of the graph's last layer, which FID does not read


class _Conv(nn.Module):
    def __init__(self, read: int, made: int, kernel: int | tuple[int, int], stride: int = 1) -> None:
        super().__init__()
        sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = (0, 0) if stride == 2 or kernel == 1 else (sides[0] // 2, sides[1] // 2)
        self.conv = nn.Conv2d(read, made, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(made, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _mean(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class _Block(nn.Module):
    """Branches side by side; each is a chain of convolutions by name, and ``pool`` goes before the last one."""

    chains: Sequence[Sequence[str]] = ()
    reduces = False
    """Whether a maximum of half the size is one more branch."""
    takes_maximum = False

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for names in self.chains:
            y = x
            if names == ("branch_pool",):
                y = F.max_pool2d(x, 3, 1, 1) if self.takes_maximum else _mean(x)
            for name in names:
                y = self._step(name, y)
            found.append(y)
        return torch.cat([*found, F.max_pool2d(x, 3, 2)] if self.reduces else found, 1)

    def _step(self, name: str, x: Tensor) -> Tensor:
        conv: nn.Module = getattr(self, name)
        made: Tensor = conv(x)
        return made


class _A(_Block):
    chains = (
        ("branch1x1",),
        ("branch5x5_1", "branch5x5_2"),
        ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
        ("branch_pool",),
    )

    def __init__(self, read: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(read, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = _Conv(read, 48, 1), _Conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(read, 64, 1), _Conv(64, 96, 3)
        self.branch3x3dbl_3 = _Conv(96, 96, 3)
        self.branch_pool = _Conv(read, pooled, 1)


class _B(_Block):
    chains = (("branch3x3",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"))
    reduces = True

    def __init__(self, read: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(read, 384, 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(read, 64, 1), _Conv(64, 96, 3)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, 2)


class _C(_Block):
    chains = (
        ("branch1x1",),
        ("branch7x7_1", "branch7x7_2", "branch7x7_3"),
        tuple(f"branch7x7dbl_{i}" for i in range(1, 6)),
        ("branch_pool",),
    )

    def __init__(self, read: int, narrow: int) -> None:
        super().__init__()
        row, column, made = (1, 7), (7, 1), 192
        self.branch1x1 = _Conv(read, made, 1)
        self.branch7x7_1, self.branch7x7_2 = _Conv(read, narrow, 1), _Conv(narrow, narrow, row)
        self.branch7x7_3 = _Conv(narrow, made, column)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = _Conv(read, narrow, 1), _Conv(narrow, narrow, column)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = _Conv(narrow, narrow, row), _Conv(narrow, narrow, column)
        self.branch7x7dbl_5 = _Conv(narrow, made, row)
        self.branch_pool = _Conv(read, made, 1)


class _D(_Block):
    chains = (("branch3x3_1", "branch3x3_2"), tuple(f"branch7x7x3_{i}" for i in range(1, 5)))
    reduces = True

    def __init__(self, read: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = _Conv(read, 192, 1), _Conv(192, 5 * 64, 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = _Conv(read, 192, 1), _Conv(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = _Conv(192, 192, (7, 1)), _Conv(192, 192, 3, 2)


class _E(_Block):
    chains = (
        ("branch1x1",),
        ("branch3x3_1", "branch3x3_2"),
        ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
        ("branch_pool",),
    )

    def __init__(self, read: int, takes_maximum: bool) -> None:
        super().__init__()
        self.takes_maximum = takes_maximum
        self.branch1x1 = _Conv(read, 5 * 64, 1)
        self.branch3x3_1 = _Conv(read, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = _Conv(384, 384, (1, 3)), _Conv(384, 384, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(read, 448, 1), _Conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = _Conv(384, 384, (1, 3)), _Conv(384, 384, (3, 1))
        self.branch_pool = _Conv(read, 192, 1)

    def _step(self, name: str, x: Tensor) -> Tensor:
        if hasattr(self, name):
            return super()._step(name, x)
        return torch.cat([super(_E, self)._step(f"{name}{half}", x) for half in "ab"], 1)  # a row and a column


class Inception(nn.Module):
    """The network; ``forward`` gives the features that FID compares."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3, self.Conv2d_2b_3x3 = _Conv(32, 32, 3), _Conv(32, 64, 3)
        self.Conv2d_2a_3x3.conv.padding = (0, 0)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = _Conv(64, 80, 1), _Conv(80, 192, 3)
        self.Conv2d_4a_3x3.conv.padding = (0, 0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _A(192, 32), _A(256, 64), _A(288, 64)
        self.Mixed_6a = _B(288)
        wide = 4 * 192
        self.Mixed_6b, self.Mixed_6c = _C(wide, 128), _C(wide, 160)
        self.Mixed_6d, self.Mixed_6e = _C(wide, 160), _C(wide, 192)
        self.Mixed_7a = _D(wide)
        self.Mixed_7b, self.Mixed_7c = _E(wide + 512, False), _E(FEATURES, True)
        self.fc = nn.Linear(FEATURES, _CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features (B, 2048) of pictures (B, 3, 299, 299) with values in [-1, 1]."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))


def as_clean_fid(picture: np.ndarray) -> Tensor:
    """A picture, uint8 (H, W, 3), as the network reads it: (1, 3, 299, 299), resized in floats."""
    planes = [Image.fromarray(np.ascontiguousarray(picture[..., k]).astype(np.float32)) for k in range(3)]
    resized = [np.asarray(one.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for one in planes]
    return (torch.from_numpy(np.stack(resized))[None] - 128) / 128
