"""The paper: a trainable copy of a locked network's blocks, joined to it by zero convolutions.

*Adding Conditional Control to Text-to-Image Diffusion Models*, Zhang, Rao, Agrawala, ICCV 2023. Sections, equations
and figures are those of the paper. A branch is built from a backbone's description of its taps and a body that the
backbone supplies; nothing here knows a particular network.

    c   control vector: a hint after the hint encoder    F   a block of the locked network
    x   input feature map                                Θ   its weights;  Θc the trainable copy's
    y   output feature map                               Z   zero convolution;  Θz1, Θz2 its weights

Shapes: B batch, C channels, H x W the picture's size in pixels, h x w a tap's.
"""

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

Site = Literal["encoder", "skip", "middle", "block"]


@dataclass(frozen=True)
class Tap:
    """One place where a backbone accepts control: a residual of ``channels`` at 1/``stride`` of the picture's size.

    ``site`` says where it is added: inside the ``encoder``, to a ``skip`` connection, to the ``middle`` block, or to a
    ``block`` of a transformer. A residual is a map (B, C, h, w); that of a ``block`` is tokens (B, h x w, C).
    """

    name: str
    site: Site
    channels: int
    stride: int


def in_rows(value: Any, count: int) -> Any:
    """Rows (b, ...), or a mapping of such, repeated to ``count`` of them where they are fewer."""
    if isinstance(value, Mapping):
        return {name: in_rows(one, count) for name, one in value.items()}
    return value if len(value) == count else torch.cat([value] * (count // len(value)))  # which keeps the layout


@dataclass(frozen=True)
class ControlSpec:
    """The paper's ablation (Section 4.2, Figure 8) in three settings, and two more.

    - ``body``: ``copy``, the trainable copy of the encoder; ``conv``, ControlNet-lite, one convolution a block; and of
      later work ``lora``, the copy again, of which only differences of low ``rank`` are trained (a Control-LoRA), and
      ``xs``, ControlNet-XS, a thin encoder beside the base's, which has zero joins at all taps; and ``adapter``, a
      T2I-Adapter, which reads the hint alone and adds inside the base's encoder.
    - ``join``: ``zero`` convolutions; or ``gaussian``, ordinary convolutions with Gaussian weights.
    - ``taps``: ``all`` of them; or ``mid``, the middle block alone (the small-scale recipe).

    - ``pool``: ``mean`` for residuals averaged over the picture, so that a hint gives its colours and not its places
      (version 1.1's shuffle, "global pooling" in the released code); or ``none``.
    - ``rank``: of the body ``lora``, from 1; of all others 0.

    Raises ``ValueError`` for settings that do not go together.
    """

    body: Literal["copy", "conv", "lora", "xs", "adapter"] = "copy"
    join: Literal["zero", "gaussian"] = "zero"
    taps: Literal["all", "mid"] = "all"
    pool: Literal["none", "mean"] = "none"
    rank: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type is int:
                continue
            word, known = getattr(self, field.name), get_args(field.type)
            if word not in known:
                raise ValueError(f'{field.name} is "{word}", expected one of {", ".join(known)}.')
        if (self.body == "lora") != (self.rank > 0):
            raise ValueError(f"rank is {self.rank} and body is {self.body}: a lora body has a rank, no other has.")
        if self.body in ("xs", "adapter") and (self.join, self.taps, self.pool) != ("zero", "all", "none"):
            raise ValueError(f"body {self.body} has join zero, taps all and pool none, and no other.")


class ControlNetwork(nn.Module):
    """Any control, as bases, the sampler and the trainer see it: a hint is read once, residuals are added at taps.

    ``ControlBranch`` is the paper's; the other kinds are in ``controls``.

    - ``kind``: its row in ``controls.KINDS``.  ``spec``: what it was built from; None where there is nothing to choose.
    - ``taps``: where it adds residuals.
    - ``walks``: whether it runs beside the base's encoder, place by place, and cannot run apart from it
      (``backbones.Walker``).
    - ``hint_types``: the types of hint that it tells apart; empty where it reads hints of one kind.
    """

    kind: str
    taps: tuple[Tap, ...]
    spec: ControlSpec | None = None
    walks: bool = False
    hint_types: tuple[str, ...] = ()

    @property
    def pools(self) -> bool:
        """Whether residuals are averages over the picture, (B, C, 1, 1)."""
        return self.spec is not None and self.spec.pool == "mean"

    def encode_hint(self, hint: Any) -> Any:
        """Features of a hint (B, channels, H, W), for every step; of several types, of hints by type.

        Returns a tensor, or tensors by name, of B rows each.
        """
        raise NotImplementedError

    def encode_rows(self, hints: Mapping[str, Tensor]) -> Any:
        """Features of rows with one hint each, as training has them: hints (b, channels, H, W) by type, or under ""."""
        return self.encode_hint(hints[""])

    def parts(self) -> "dict[str, ControlNetwork]":
        """The controls it is made of, each complete in itself, by name; itself under "" where it is one."""
        return {"": self}

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, with their effective values."""
        return self.state_dict()

    def forward(self, x: Tensor, t: Tensor, text: Any, hint_features: Any) -> dict[str, Tensor]:
        """The residual of each tap, by name: (B, C, h, w), or tokens (B, h x w, C) at a ``block``.

        Args:
            x: noisy latents (B, C, h, w).  t: timesteps (B,).  text: B prompts as the base reads them.
            hint_features: from ``encode_hint``.

        Where the base shares rows (``Backbone.shares_rows``), all but the text may have fewer rows b, of which B is a
        multiple; residuals that do not depend on the text may then have b rows, too.
        """
        raise NotImplementedError


# --- Section 3.1: ControlNet --------------------------------------------------------------------------------


def zero_conv(channels_in: int, channels_out: int | None = None, kernel: int = 1) -> nn.Conv2d:
    """Z(.; .): a convolution whose weight and bias are zero (Section 3.1).

    Its gradient is not: with y = wx + b, dy/dw = x and dy/db = 1, so the first step makes w non-zero, and from then
    on dy/dx = w lets gradients through to what lies before it (equations 6-8 of the first preprint).
    """
    conv = nn.Conv2d(channels_in, channels_out or channels_in, kernel, padding=kernel // 2)
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


def gaussian_conv(channels_in: int, channels_out: int | None = None, kernel: int = 1) -> nn.Conv2d:
    """The ablation's join: an ordinary convolution with Gaussian weights (Figure 8b)."""
    conv = zero_conv(channels_in, channels_out, kernel)
    nn.init.normal_(conv.weight, std=1.0 / math.sqrt(conv.weight[0].numel()))
    return conv


JOINS: dict[str, Callable[..., nn.Conv2d]] = {"zero": zero_conv, "gaussian": gaussian_conv}


def token_join(conv: nn.Conv2d) -> nn.Linear:
    """A 1x1 convolution as the same map of tokens (B, L, C): the join of a transformer's block."""
    channels_out, channels_in = conv.weight.shape[:2]
    linear = nn.Linear(channels_in, channels_out)
    with torch.no_grad():
        linear.weight.copy_(conv.weight[..., 0, 0])
        linear.bias.copy_(conv.bias)  # type: ignore[arg-type]  # a join's convolution has a bias
    return linear


class ControlledBlock(nn.Module):
    """Figure 2b and equation (2), for any block that keeps the number of channels:

        y = F(x; Θ) + Z(F(x + Z(c; Θz1); Θc); Θz2)

    ``block`` is locked and stays the caller's own object; a copy of it is trained. With ``condition=None`` the
    result is the block's own.

    Shapes: x (B, C, h, w); condition (B, C_c, h, w); result as the block's.
    """

    def __init__(self, block: nn.Module, channels: int, condition_channels: int | None = None) -> None:
        super().__init__()
        self.block = [block]  # in a list: not a submodule, so neither moved, saved nor trained with this one
        self.copy = copy.deepcopy(block).requires_grad_(True)
        block.requires_grad_(False)
        self.zero_in = zero_conv(condition_channels or channels, channels)
        self.zero_out = zero_conv(channels)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """y of equation (2), (B, C, h, w), of x and condition (B, C_c, h, w); without one the block's own."""
        y = self.block[0](x)  # F(x; Θ), equation (1)
        if condition is None:
            return y
        return y + self.zero_out(self.copy(x + self.zero_in(condition)))  # equation (2)


# --- Section 3.2: ControlNet for text-to-image diffusion ----------------------------------------------------


class HintEncoder(nn.Module):
    """E(.): a hint in pixels becomes a feature map of the latents' size (equation 4: c_f = E(c_i)).

    The paper's text has four convolutions with 4x4 kernels, stride 2, ReLU and 16, 32, 64, 128 channels, which would
    give 1/16 of the size where it says 1/8. The released code, and every checkpoint, has 3x3 kernels, SiLU, and pairs
    of convolutions whose second halves the size: 16 | 16, 32 | 32, 96 | 96, 256 | zero. This is that one. It has
    log2(stride) halvings, so a stride of 8 gives exactly the released encoder.

    Shapes: (B, hint channels, H, W) in the hint's own range -> (B, channels, H/stride, W/stride).
    """

    WIDTHS = (16, 32, 96, 256)  # of the released code; a longer encoder stays at the last

    def __init__(
        self, hint_channels: int, channels: int, stride: int, join: Callable[..., nn.Conv2d] = zero_conv
    ) -> None:
        super().__init__()
        widths = self.widths(stride)
        convs = [nn.Conv2d(hint_channels, widths[0], 3, padding=1)]
        for narrow, wide in itertools.pairwise(widths):
            convs.append(nn.Conv2d(narrow, narrow, 3, padding=1))
            convs.append(nn.Conv2d(narrow, wide, 3, padding=1, stride=2))
        convs.append(join(widths[-1], channels, kernel=3))  # the zero convolution of Θz1: the hint joins once
        self.convs = nn.ModuleList(convs)

    @classmethod
    def widths(cls, stride: int) -> list[int]:
        """Its channels by size, from the picture's to the latents'; ``ValueError`` if stride is no power of two."""
        halvings = stride.bit_length() - 1
        if 2**halvings != stride:
            raise ValueError(f"A hint encoder halves the size; expected a power of two as stride, got {stride}.")
        return [cls.WIDTHS[min(i, len(cls.WIDTHS) - 1)] for i in range(halvings + 1)]

    def forward(self, hint: Tensor) -> Tensor:
        """c_f (B, channels, H/stride, W/stride) of a hint (B, hint channels, H, W)."""
        feature = hint
        for conv in self.convs[:-1]:
            feature = F.silu(conv(feature))
        return self.convs[-1](feature)


class ConvBody(nn.Module):
    """ControlNet-lite (Figure 8c): each block of the copy replaced by one convolution.

    It sees the noisy latents and the hint, as the copy does, and neither timestep nor prompt.
    """

    def __init__(self, latent_channels: int, stride: int, taps: tuple[Tap, ...]) -> None:
        super().__init__()
        convs = []
        channels, before = latent_channels, stride
        for tap in taps:
            convs.append(nn.Conv2d(channels, tap.channels, 3, padding=1, stride=tap.stride // before))
            channels, before = tap.channels, tap.stride
        self.convs = nn.ModuleList(convs)

    def forward(self, x: Tensor, t: Tensor, text: Any, hint: Tensor) -> list[Tensor]:
        """One feature (B, C, h, w) a tap, of latents x (B, C, h, w) and the hint's features, shaped as the first."""
        features = [self.convs[0](x) + hint]
        for conv in self.convs[1:]:
            features.append(conv(F.silu(features[-1])))
        return features


class LowRank(nn.Module):
    """A trained difference to a locked weight: W + up @ down, W as (out, in x k x k) (LoRA, Hu et al., 2021).

    ``up`` is zero at first, so training starts from W itself.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        inner = weight[0].numel()
        self.down = nn.Parameter(torch.randn(rank, inner, dtype=weight.dtype, device=weight.device) / math.sqrt(inner))
        self.up = nn.Parameter(weight.new_zeros(len(weight), rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight, of the shape of ``weight``: (out, in), or (out, in, k, k)."""
        return weight + (self.up @ self.down).view_as(weight)


def low_rank(module: nn.Module, rank: int) -> nn.Module:
    """Lock the matrices and convolutions of ``module`` but for differences of this rank; returns it.

    Vectors, and matrices too small to gain by it, are trained whole. So a file of the differences (Control-LoRA) holds
    exactly the trained parameters.
    """
    for part in list(module.modules()):
        weight = getattr(part, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim >= 2 and gains(weight, rank):
            weight.requires_grad_(False)
            parametrize.register_parametrization(part, "weight", LowRank(weight, rank))
    return module


def gains(weight: Tensor, rank: int) -> bool:
    """Whether two matrices of this rank have fewer numbers than a weight (out, in, ...)."""
    return rank * (len(weight) + weight[0].numel()) < weight.numel()


class ControlBranch(ControlNetwork):
    """The trainable side of Figure 3: hint encoder, body, and one join a tap.

    ``body(x, t, text, hint)`` returns one feature a tap, in the order of ``taps``, with the hint's features added
    once, after its first block (as the released code does; there is no zero convolution before each block). The
    backbone supplies it: a copy of its encoder and middle block.

    Args:
        taps: the backbone's taps that a copy of its encoder has features for, in order.
        body: as ``spec.body`` asks for; see ``ConvBody`` for the lite one.
        stride: hint pixels a latent: the VAE's; 1 where the hint comes as latents.
        hint_channels: of the hint encoder's input.
    """

    kind = "controlnet"
    spec: ControlSpec

    def __init__(
        self,
        taps: tuple[Tap, ...],
        body: nn.Module,
        stride: int,
        hint_channels: int = 3,
        spec: ControlSpec | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec or ControlSpec()
        self.taps = taps
        self.body = body
        join = JOINS[self.spec.join]
        self.hint_encoder = HintEncoder(hint_channels, taps[0].channels, stride, join)
        joined = [tap for tap in taps if self.spec.taps == "all" or tap.site == "middle"]
        self.joins = nn.ModuleDict()
        for tap in joined:
            conv = join(tap.channels)
            self.joins[tap.name] = token_join(conv) if tap.site == "block" else conv

    def encode_hint(self, hint: Tensor) -> Tensor:
        """c_f of equation (4), (B, C, h, w). It depends on the hint alone: one evaluation serves every step."""
        return self.hint_encoder(hint)

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, with differences of low rank added in."""
        state = self.state_dict()
        for path, module in self.named_modules():
            if parametrize.is_parametrized(module, "weight"):
                inside = f"{path}.parametrizations.weight."
                state = {name: value for name, value in state.items() if not name.startswith(inside)}
                state[f"{path}.weight"] = module.weight.detach()
        return state

    def forward(self, x: Tensor, t: Tensor, text: Any, hint_features: Tensor) -> dict[str, Tensor]:
        """The residual of each joined tap, by name (the second term of equation 2)."""
        return self.residuals(self.body(x, t, text, hint_features))

    def residuals(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        """The residuals by tap of the body's features, one a tap in order, through the joins."""
        pairs = zip(self.taps, features, strict=True)
        joined = {tap.name: self.joins[tap.name](f) for tap, f in pairs if tap.name in self.joins}
        return {name: f.mean((2, 3), keepdim=True) for name, f in joined.items()} if self.pools else joined


# --- Section 3.4: composing -----------------------------------------------------------------------------------


def add_residuals(parts: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor | float]]]) -> dict[str, Tensor]:
    """Several controls at once are a sum: over branches, scale x residual, tap by tap (Section 3.4).

    Each part is (residuals by tap, scale by tap); a scale broadcasts against (rows, C, h, w).
    """
    total: dict[str, Tensor] = {}
    for residuals, scale in parts:
        for name, residual in residuals.items():
            scaled = residual * scale[name]
            total[name] = total[name] + scaled if name in total else scaled
    return total
