"""The protocol between ControlKit and a base model, and between a base and a control.

``UNetBase`` is one kind of ``Backbone``. A new kind is a module beside it, and ``load.py`` learns to read its files;
nothing outside this package changes. ``tests/backbones/test_second_backbone.py`` is a small complete example.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol, Self
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from controlkit.backbones.noise import NoiseProcess
from controlkit.backbones.placement import Mode, Part, Placement
from controlkit.branch import ControlNetwork, ConvBody, Tap, in_rows
from controlkit.errors import Invalid, Unsupported
from controlkit.hub import digest
from controlkit.precision import autocast
from controlkit.prompts import Words

Prompt = str | Words | None
"""A text, of which as much is read as fits in one window; words in any number of windows; or no prompt at all."""
Layer = Callable[[Tensor, Tensor, Any], Tensor]
"""(feature, time embedding, text) -> feature."""
Stage = Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor]]
"""(own feature before a place, the base's, time embedding, text) -> (own feature there, the residual of the base's)."""
_DTYPES: WeakKeyDictionary[nn.Module, tuple[torch.dtype, torch.dtype]] = WeakKeyDictionary()
"""By denoiser: the type of its first weight, and ``Backbone.dtype``, which is found anew when that type changes. Each
step asks four times, and walking over all weights takes a millisecond at Stable Diffusion's size."""


@dataclass(frozen=True)
class TextEmbedding:
    """B prompts as a base reads them. ``pooled`` and ``sizes`` are SDXL's and join the time embedding."""

    tokens: Tensor
    """(B, L, D), one vector a token, for the cross-attentions."""
    pooled: Tensor | None = None
    """(B, P), one vector a prompt."""
    sizes: Tensor | None = None
    """(B, 6): the original height and width, the crop's top and left, the target's height and width, in pixels."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Any) -> "TextEmbedding":
        return TextEmbedding(**{name: value[rows] for name, value in self.tensors().items()})

    def at(self, step: int) -> "TextEmbedding":
        """Itself: the same at every step."""
        return self

    def of_size(self, size: tuple[int, int]) -> "TextEmbedding":
        """The same, of pictures of (height, width) pixels, none of them cut; where sizes are not read, itself."""
        if self.sizes is None:
            return self
        height, width = size
        return replace(self, sizes=self.sizes.new_tensor([height, width, 0, 0, height, width]).repeat(len(self), 1))

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name; ``TextEmbedding(**tensors)`` is the way back."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "TextEmbedding":
        """The same elsewhere, or in another type (sizes keep theirs: they are pixels)."""
        moved = {name: value.to(device) for name, value in self.tensors().items()}
        return TextEmbedding(**{name: v if name == "sizes" else v.to(dtype or v.dtype) for name, v in moved.items()})


@dataclass(frozen=True)
class ActiveControl:
    """One control in a prediction: its network, the features of its hints, and its scale."""

    network: ControlNetwork
    features: Any
    """The result of the network's ``encode_hint``, for every row."""
    scale: Mapping[str, Tensor | float] | None = None
    """By tap, broadcastable to (rows, 1, h, w), a map of any size; None is 1 everywhere."""
    silent: int = 0
    """How many of the first rows it adds nothing to: it need not be run for them."""

    def scaled(self, residuals: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], dict[str, Tensor | float]]:
        """(residuals, the scale of each), maps brought to the residual's size: as ``add_residuals`` takes them."""
        return residuals, {name: self._scale_at(name, residual) for name, residual in residuals.items()}

    def residuals(
        self, x: Tensor, t: Tensor, text: TextEmbedding
    ) -> tuple[Mapping[str, Tensor], dict[str, Tensor | float]]:
        """The residuals of its network for B prompts, B rows each, with their scales; arguments as of ``forward``."""
        found = self.network(x, t, text[self.silent :], self.features)
        rows = len(text)
        heard = in_rows(found, rows - self.silent)
        if self.silent:
            heard = {name: F.pad(one, (0, 0) * (one.dim() - 1) + (self.silent, 0)) for name, one in heard.items()}
        return self.scaled(heard)

    def _scale_at(self, tap: str, residual: Tensor) -> Tensor | float:
        value = 1.0 if self.scale is None else self.scale[tap]
        if not isinstance(value, Tensor):
            return value
        value = value.to(residual.dtype)
        if residual.dim() == 3:  # tokens (B, h x w, C)
            return self._of_tokens(value, residual.shape[1])
        return value if value.shape[-2:] == (1, 1) else F.interpolate(value, residual.shape[-2:], mode="area")

    @staticmethod
    def _of_tokens(value: Tensor, count: int) -> Tensor:
        """A scale map (rows, 1, h, w) for ``count`` tokens of a grid of its shape, (rows, tokens, 1)."""
        if value.shape[-2:] == (1, 1):
            return value[..., 0]
        height = max(round((count * value.shape[-2] / value.shape[-1]) ** 0.5), 1)
        return F.interpolate(value, (height, count // height), mode="area").flatten(2).transpose(1, 2)

    def is_heard(self) -> Tensor | float:
        """1 where it is added at all in the middle, else 0, for each row (rows, 1)."""
        value = 1.0 if self.scale is None else self.scale["middle"]
        return value.ne(0).flatten(1).any(1, keepdim=True) if isinstance(value, Tensor) else float(value != 0)


class Walker(Protocol):
    """A control that runs beside the base's encoder (``ControlNetwork.walks``), place by place, both ways."""

    taps: tuple[Tap, ...]

    def shift(self, time: Tensor, embedding: nn.Module) -> Tensor | None:
        """A term (B, D) of the base's time embedding, given the timesteps' sinusoids; None where there is none."""

    def stages(self) -> Sequence[Stage]:
        """One for each place of the encoder, in order."""

    def arriving(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        """Residuals (B, C, h, w) where skips arrive in the decoder, by skip, given its own features at the skips."""


class Half(Protocol):
    """The result of a denoiser's first half, of noisy latents under controls, for its second half."""

    def of_rows(self, first: int) -> "Half":
        """The same without the first rows of the text."""


class Decoded(NamedTuple):
    """The result of a denoiser's second half."""

    prediction: Tensor
    """(B, C, h, w)."""
    deep: Tensor
    """The feature (B, channels, h, w) that arrived at its last level, which is the finest and the dearest one."""


class Backbone(Protocol):
    """A frozen text-to-image base. It is never modified: control is an argument of ``predict``.

    Sizes are in pixels, (height, width); pictures are tensors (B, 3, H, W) in [-1, 1]; latents (B, C, h, w) with
    h = H / ``stride``. Members with a body serve any base that derives from this class; the rest it must have itself.
    """

    name: str
    size: int
    """The side of the pictures it was trained on."""
    stride: int
    """Pixels a latent."""
    window: int
    """Tokens of a prompt that it reads, start and end marks included."""
    noise: NoiseProcess
    """The process that adds noise in training and takes it away in sampling."""
    encoder: nn.Module
    """The part that ``copy_encoder`` copies."""
    shares_rows: bool = False
    """Whether ``predict`` takes fewer rows b of latents, timesteps and features of hints than prompts B, a multiple of
    b: row i is that of the prompts i, i + b, ... What does not depend on the prompt is then computed once."""
    has_halves: bool = False
    """Whether it has ``first_half`` and ``second_half``."""
    placement: Placement | None = None
    """Where its networks are, if they may be moved; None where they stay on the device."""

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Where control is accepted, in the order of the forward pass."""

    @cached_property
    def branch_taps(self) -> tuple[Tap, ...]:
        """The taps that a copy of its encoder has features for."""
        return tuple(tap for tap in self.taps if tap.site != "encoder")

    @property
    def multiple(self) -> int:
        """Picture sides must be a multiple of this many pixels."""
        return max(tap.stride for tap in self.taps)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""

    @property
    def inpaints(self) -> bool:
        """Whether ``predict`` reads (B, 2 C + 1, h, w): noisy latents, the mask, and latents of the masked picture.

        The mask is 1 where the picture is to be made anew; there the masked picture is grey. Given (B, C, h, w), it
        takes the whole picture as masked.
        """
        return False

    @property
    def signature(self) -> dict[str, Any]:
        """The facts that a control must match to run on this base; equal signatures mean equal shapes everywhere."""

    @cached_property
    def digest(self) -> str:
        """A digest of all weights: which base exactly a control was trained on and latents were cached for."""
        modules = self.networks()
        return digest({f"{part}.{k}": v for part, module in modules.items() for k, v in module.state_dict().items()})

    @property
    def text_digest(self) -> str:
        """A digest of the weights that encode prompts; equal for equal weights in any number format."""

    @property
    def network_config(self) -> Mapping[str, Any] | None:
        """The denoiser's diffusers configuration, for controls that are diffusers' classes; None where it has none."""

    # --- text and pictures

    def cut_words(self, prompt: str) -> str:
        """The end of a prompt that does not fit the window; empty if all of it fits."""

    def windows_of(self, words: Words) -> int:
        """How many windows words take."""

    def encode_text(self, prompts: Sequence[Prompt], size: tuple[int, int] | None = None) -> TextEmbedding:
        """B prompts as the denoiser reads them. ``size``: (height, width) of the picture.

        Prompts of fewer windows than others are repeated, which changes nothing in attention to them.
        """

    def text_keys(self, prompts: Sequence[str]) -> list[bytes]:
        """Of each prompt, all that its embedding is computed from: equal ones have equal embeddings."""

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one prompt's tensors in ``TextEmbedding``, by name; another base may know them without it."""
        return {name: tuple(value.shape[1:]) for name, value in self.encode_text([""]).tensors().items()}

    def encode_moments(self, pixels: Tensor) -> Tensor:
        """Mean and log-variance (B, 2C, h, w) of the latents of pictures (B, 3, H, W)."""

    def moments_key(self) -> str:
        """A text of all that ``encode_moments`` depends on beside the picture."""

    def draw_latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Latents (B, C, h, w) drawn from ``encode_moments``' Gaussians with standard normal ``noise`` (B, C, h, w)."""

    def mean_latents(self, moments: Tensor) -> Tensor:
        """The means of ``encode_moments``' Gaussians, as latents (B, C, h, w)."""
        return self.draw_latents(moments, torch.zeros_like(moments.chunk(2, dim=1)[0]))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of latents (B, C, h, w)."""

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of a picture's latents, and of the noise that sampling starts from."""
        return self.latent_channels, size[0] // self.stride, size[1] // self.stride

    # --- the denoiser, and control of it

    def predict(self, x: Tensor, t: Tensor, text: TextEmbedding, controls: Sequence[ActiveControl] = ()) -> Tensor:
        """The prediction (B, C, h, w) for noisy latents x at timesteps t (B,), under any number of controls."""

    def first_half(self, x: Tensor, t: Tensor, text: TextEmbedding, controls: Sequence[ActiveControl] = ()) -> Half:
        """The first half of ``predict``, where the latents are read and controls act; a U-Net's encoder."""
        raise Unsupported(f'The base "{self.name}" predicts in one piece.')

    def second_half(self, half: Half, t: Tensor, text: TextEmbedding, deep: Tensor | None = None) -> Decoded:
        """The prediction of a first half, perhaps an earlier step's, for timesteps t and prompts.

        ``deep``: an earlier step's ``Decoded.deep``, on which the last level alone is run.
        """
        raise Unsupported(f'The base "{self.name}" predicts in one piece.')

    def features(self, x: Tensor, t: Tensor, text: TextEmbedding) -> tuple[Tensor, list[Tensor]]:
        """The prediction, and the features (B, C, h, w) that it was made of, in the order of the forward pass.

        Gradients go back to x.
        """
        raise Unsupported(f'The base "{self.name}" does not show its features.')

    def control_effect(
        self, x: Tensor, t: Tensor, text: TextEmbedding, control: ActiveControl
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """By tap, (the control's effect on its feature, added there or before; the feature without control)."""

    def hint_input(self, hint: Tensor) -> Tensor:
        """The input of a branch's hint encoder for hints (B, channels, H, W): themselves, or their latents."""
        return hint

    def hint_shape(self, channels: int) -> tuple[int, int]:
        """(channels, pixels a place) of the result of ``hint_input`` for hints with so many channels."""
        return channels, self.stride

    def copy_encoder(self) -> nn.Module:
        """A trainable copy of its encoder (the paper's trainable copy, Section 3.1): the body of a branch."""
        return copy.deepcopy(self.encoder).requires_grad_(True)

    def empty_encoder(self) -> nn.Module:
        """The same on the ``meta`` device, without memory: for weights that are about to be loaded."""
        memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in self.encoder.parameters()}
        return copy.deepcopy(self.encoder, memo)

    def conv_body(self) -> ConvBody:
        """A fresh body of ControlNet-lite for this base's taps; ``Unsupported`` where its taps are no maps."""
        return ConvBody(self.latent_channels, self.stride, self.branch_taps)

    # --- its weights

    @property
    def denoiser(self) -> nn.Module:
        """The network that predicts."""

    def networks(self) -> dict[str, nn.Module]:
        """Every network, by its name in a diffusers folder."""

    def with_own_denoiser(self) -> Self:
        """The same base with a copy of its denoiser, to be trained."""

    def reading_more(self, channels: int) -> Self:
        """The same with a copy of its denoiser that reads ``channels`` more after the latents, by weights of zero.

        ``predict`` then takes (B, C + channels, h, w). ``Invalid`` for the number that an inpainting base reads.
        """
        raise Unsupported(f'The denoiser of "{self.name}" cannot be given further inputs.')

    def untrained(self, seed: int) -> Self:
        """The same with a denoiser of the same shape whose weights are drawn anew, by ``seed``."""
        raise Unsupported(f'The denoiser of "{self.name}" cannot be made anew.')

    def of_size(self, size: int) -> Self:
        """The same base for pictures of another side, in pixels; ``Invalid`` where it cannot make them."""
        if size % self.multiple:
            raise Invalid(f'"{self.name}" makes pictures whose sides are multiples of {self.multiple}; not {size}.')
        other = copy.copy(self)
        other.size = size
        return other

    @property
    def device(self) -> torch.device:
        """Where it computes, and where the weights are while they are used."""
        return self.placement.device if self.placement else next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the denoiser's weights and inputs; float32 where any weights are (``memory.narrowed``)."""
        first = next(self.denoiser.parameters()).dtype
        known = _DTYPES.get(self.denoiser)
        if known is None or known[0] != first:
            whole = any(value.dtype == torch.float32 for value in self.denoiser.parameters())
            known = _DTYPES[self.denoiser] = (first, torch.float32 if whole else first)
        return known[1]

    def autocast(self) -> AbstractContextManager[object]:
        """The number format to compute in: the weights' own if they are in half precision, else the machine's."""
        return autocast(self.device.type) if self.dtype == torch.float32 else nullcontext()

    def inference(self) -> AbstractContextManager[object]:
        """The context that pictures are made in: ``autocast``, and what is faster where no gradient is asked for."""
        return self.autocast()

    def to(self, device: str | torch.device) -> Self:
        """Move the weights; returns the base itself."""
        for module in self.networks().values():
            module.to(device)
        return self

    def place(self, mode: Mode | None, device: str | torch.device | None = None) -> Self:
        """Place its networks as a mode says (``Placement``); returns the base itself.

        ``mode``: None lets them wait in the machine's memory until ``sample.generate`` knows what is to be made.
        ``device``: where it will compute; by default where it does now. So a base that is larger than a GPU's memory
        is loaded on the CPU and placed: ``load_base("sdxl", dtype=torch.bfloat16).place("low", "cuda")``.
        """
        if self.placement is None:
            self.placement = Placement(self.networks(), torch.device(device) if device else self.device)
        if mode:
            self.placement.take(mode)
        return self

    def bring(self, part: Part) -> None:
        """Have a part's weights on the device; whoever uses a network or a control directly calls it before."""
        if self.placement:
            self.placement.bring(part)
