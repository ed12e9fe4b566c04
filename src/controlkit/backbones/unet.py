"""The U-Net family (SD 1.5, SD 2.1, SDXL, ``mini``) on diffusers' own modules, unmodified, with encoder and decoder
callable apart.

Control comes in as an explicit argument, ``inject={tap name: residual}``. Leaving it out is the base as it was.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from controlkit.backbones.families import Prediction
from controlkit.backbones.xs import Layer, XSBranch, new_xs, run_layer, run_plain
from controlkit.branch import ControlBranch, ControlSpec, ConvBody, Tap, add_residuals, low_rank
from controlkit.errors import UserError
from controlkit.hub import digest
from controlkit.precision import autocast
from controlkit.union import UnionBranch

PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v"}
"""Names in diffusers' scheduler configurations -> ours."""


@dataclass(frozen=True)
class Text:
    """What the U-Net reads of B prompts. ``pooled`` and ``sizes`` are SDXL's and join the time embedding."""

    tokens: Tensor
    """(B, L, D), one vector a token: what the cross-attentions read."""
    pooled: Tensor | None = None
    """(B, P), one vector a prompt."""
    sizes: Tensor | None = None
    """(B, 6): the original height and width, the crop's top and left, the target's height and width, in pixels."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Any) -> "Text":
        return Text(**{name: value[rows] for name, value in self.tensors().items()})

    def of_size(self, size: tuple[int, int]) -> "Text":
        """The same, of pictures of (height, width) pixels, none of them cut; where sizes are not read, itself."""
        if self.sizes is None:
            return self
        height, width = size
        return replace(self, sizes=self.sizes.new_tensor([height, width, 0, 0, height, width]).repeat(len(self), 1))

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name; ``Text(**tensors)`` is the way back."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Text":
        """The same elsewhere, or in another type (sizes keep theirs: they are pixels)."""
        moved = {name: value.to(device) for name, value in self.tensors().items()}
        return Text(**{name: v if name == "sizes" else v.to(dtype or v.dtype) for name, v in moved.items()})


@dataclass(frozen=True)
class Encoded:
    """What the encoder hands to the decoder: skips (finest first), the middle feature, time embedding and text."""

    skips: list[Tensor]  # (B, C, h, w) each
    middle: Tensor
    embedding: Tensor  # (B, D)
    text: Text
    arriving: Mapping[str, Tensor] = field(default_factory=dict)
    """By skip: added to the decoder's feature where that skip arrives (ControlNet-XS)."""


@dataclass(frozen=True)
class Part:
    """One control's part in a prediction: a branch, what it read of its hints, and how loud it speaks."""

    branch: Any
    """A ``ControlBranch``, an ``Adapter``, a Union or one type of it, or an ``XSBranch``."""
    features: Any
    """What its ``encode_hint`` gave, for every row."""
    strength: Mapping[str, Tensor | float] | None = None
    """By tap, broadcastable to (rows, 1, h, w), a map of any size; None is 1 everywhere."""

    def scaled(self, residuals: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], dict[str, Tensor | float]]:
        """(residuals, the strength of each), maps brought to the residual's size: as ``add_residuals`` takes them."""
        return residuals, {name: self._at(name, residual) for name, residual in residuals.items()}

    def _at(self, tap: str, residual: Tensor) -> Tensor | float:
        value = 1.0 if self.strength is None else self.strength[tap]
        if not isinstance(value, Tensor):
            return value
        value = value.to(residual.dtype)
        return value if value.shape[-2:] == (1, 1) else F.interpolate(value, residual.shape[-2:], mode="area")

    def heard(self) -> Tensor | float:
        """1 where it speaks at all in the middle, 0 where it is silent, for each row (rows, 1)."""
        value = 1.0 if self.strength is None else self.strength["middle"]
        return value.ne(0).flatten(1).any(1, keepdim=True) if isinstance(value, Tensor) else float(value != 0)


@contextmanager
def recomputed(*modules: nn.Module, within: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Iterator[None]:
    """Within it, the blocks in ``modules`` compute their features anew in the backward pass instead of keeping them.

    ``within``: the context the forward pass runs in, entered again for the second one (autocast's is entered anyway).
    """
    blocks: list[Any] = [b for module in modules for b in module.modules() if hasattr(b, "gradient_checkpointing")]
    before = [(block, block.gradient_checkpointing) for block in blocks]
    for block in blocks:
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = partial(
            checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), within())
        )
    try:
        yield
    finally:
        for block, was in before:
            block.gradient_checkpointing = was


class UNetEncoder(nn.Module):
    """The encoder and middle block of a diffusers ``UNet2DConditionModel``, made of its own modules.

    Built on a base it shares the base's modules; deep-copied it is the body of a control branch. Built on a
    ``ControlNetModel`` it is that one's body, which may be slimmer than the base's encoder.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.conv_in = unet.conv_in
        self.time_proj = unet.time_proj
        self.time_embedding = unet.time_embedding
        if unet.config.addition_embed_type == "text_time":
            self.add_time_proj = unet.add_time_proj
            self.add_embedding = unet.add_embedding
        self.down_blocks = unet.down_blocks
        self.mid_block = unet.mid_block

    def embed(self, t: Tensor, text: Text, dtype: torch.dtype) -> Tensor:
        """The time embedding (B, D), and with it SDXL's pooled prompt and picture sizes."""
        embedding = self.time_embedding(self.time_proj(t).to(dtype))
        if not hasattr(self, "add_embedding"):
            return embedding
        assert text.pooled is not None and text.sizes is not None
        sizes = self.add_time_proj(text.sizes.flatten()).reshape(len(text), -1)
        return embedding + self.add_embedding(torch.cat([text.pooled, sizes.to(text.pooled.dtype)], -1).to(dtype))

    def encode(
        self,
        x: Tensor,
        t: Tensor,
        text: Text,
        hint: Tensor | None = None,
        embedding: Tensor | None = None,
        inject: Mapping[str, Tensor] | None = None,
        beside: Sequence[Part] = (),
    ) -> Encoded:
        """Encode latents x (B, C, h, w) at timesteps t (B,).

        Args:
            hint: added once, after the first block.  embedding: added to the time embedding (B, D).
            inject: residuals by name of encoder tap, added where a level's features leave for its skip.
            beside: controls that walk along, place by place (``XSBranch``).
        """
        inject = inject or {}
        whole = self.embed(t, text, x.dtype)
        if embedding is not None:
            whole = whole + embedding
        for part in beside:
            shift = part.branch.shift(self.time_proj(t).to(x.dtype), self.time_embedding)
            if shift is not None:
                whole = whole + shift * part.heard()
        h = x
        features: list[Tensor] = []
        walked: list[list[Tensor]] = [[] for _ in beside]
        stages = [part.branch.stages() for part in beside]
        for place, (layer, tap) in enumerate(self._places()):
            before, h = h, layer(h, whole, text)
            if place == 0 and hint is not None:
                h = h + hint
            if tap in inject:
                h = h + inject[tap]
            for part, own, stage in zip(beside, walked, stages, strict=True):
                feature, said = stage[place](own[-1] if own else part.features, before, whole, text)
                own.append(feature)
                name = part.branch.taps[place].name
                h = h + add_residuals([part.scaled({name: said})])[name]
            features.append(h)
        parts = zip(beside, walked, strict=True)
        arriving = add_residuals([part.scaled(part.branch.arriving(own[:-1])) for part, own in parts])
        return Encoded(features[:-1], features[-1], whole, text, arriving)

    def _places(self) -> Iterator[tuple[Layer, str]]:
        """For each feature a branch has: what makes it of the one before, and the encoder tap at its end, or ""."""
        yield partial(run_plain, self.conv_in), ""
        for level, block in enumerate(self.down_blocks):
            layers: list[Layer] = [partial(run_layer, block, i) for i in range(len(block.resnets))]
            end = len(layers) - 1
            if block.downsamplers is not None:
                layers.append(partial(run_plain, block.downsamplers[0]))
                end += not getattr(block, "has_cross_attention", False)  # a level without attention: at its very end
            yield from ((layer, f"encoder_{level}" if i == end else "") for i, layer in enumerate(layers))
        yield self._middle, ""

    def _middle(self, h: Tensor, embedding: Tensor, text: Text) -> Tensor:
        attends = getattr(self.mid_block, "has_cross_attention", False)
        return self.mid_block(h, embedding, **({"encoder_hidden_states": text.tokens} if attends else {}))

    def forward(
        self, x: Tensor, t: Tensor, text: Text, hint: Tensor | None = None, embedding: Tensor | None = None
    ) -> list[Tensor]:
        """One feature a tap of a branch: the skips, then the middle."""
        encoded = self.encode(x, t, text, hint, embedding)
        return [*encoded.skips, encoded.middle]


@dataclass(frozen=True)
class TextTower:
    """A text encoder with its tokenizer; ``penultimate``: its last layer is not read (SDXL)."""

    tokenizer: Any
    encoder: Any
    penultimate: bool = False

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Token rows (B, window), padded, and cut where a prompt is longer than the window."""
        from diffusers.loaders import TextualInversionLoaderMixin

        learnt = TextualInversionLoaderMixin().maybe_convert_prompt(prompts, self.tokenizer)  # words of many vectors
        window = self.tokenizer.model_max_length
        rows = self.tokenizer(learnt, padding="max_length", truncation=True, max_length=window, return_tensors="pt")
        return rows.input_ids.to(self.encoder.device)

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
        """One vector a token (B, L, D), and the tower's pooled projection (B, P), if it has one."""
        out = self.encoder(self.tokenize(prompts), output_hidden_states=self.penultimate)
        tokens = out.hidden_states[-2] if self.penultimate else out.last_hidden_state
        return tokens, getattr(out, "text_embeds", None)


class UNetBase:
    """A frozen text-to-image base: VAE, text towers, U-Net and noise schedule.

    Attributes: ``name``, ``prediction`` (``eps`` or ``v``), ``size`` (the picture side it was trained at, pixels),
    ``stride`` (pixels a latent), ``window`` (tokens it reads), ``taps``.

    ``zeros_for_none``: no prompt at all is zeros, and not the encoding of an empty one (SDXL).
    """

    def __init__(
        self,
        name: str,
        vae: Any,
        towers: Sequence[TextTower],
        unet: Any,
        scheduler: Any,
        zeros_for_none: bool = False,
    ) -> None:
        self.name = name
        self.vae, self.towers, self.unet, self.scheduler = vae, tuple(towers), unet, scheduler
        self.zeros_for_none = zeros_for_none
        for module in self._modules().values():
            module.eval().requires_grad_(False)
        self.encoder = UNetEncoder(unet)
        self.prediction = PREDICTIONS[scheduler.config.prediction_type]
        self.stride = 2 ** (len(vae.config.block_out_channels) - 1)
        self.size = unet.config.sample_size * self.stride
        self.window = towers[0].tokenizer.model_max_length
        self._vae_rows: int | None = None  # as many at once as memory was seen to hold; None: any number

    def _modules(self) -> dict[str, Any]:
        """Every network, by its name in a diffusers folder."""
        names = ["text_encoder", *(f"text_encoder_{i}" for i in range(2, len(self.towers) + 1))]
        towers = dict(zip(names, (tower.encoder for tower in self.towers), strict=True))
        return {"vae": self.vae, **towers, "unet": self.unet}

    # --- description ------------------------------------------------------------------------------------

    @cached_property
    def taps(self) -> tuple[Tap, ...]:
        """Where control is accepted, in the encoder's order: inside it, at every skip, at the middle block."""
        stride = self.stride
        inside = []
        skips = [Tap("skip_0", "skip", self.unet.conv_in.out_channels, stride)]
        for level, block in enumerate(self.unet.down_blocks):
            channels = [resnet.out_channels for resnet in block.resnets]
            skips += [Tap(f"skip_{len(skips) + i}", "skip", c, stride) for i, c in enumerate(channels)]
            before = stride
            if block.downsamplers is not None:
                stride *= 2
                skips.append(Tap(f"skip_{len(skips)}", "skip", channels[-1], stride))
            attends = getattr(block, "has_cross_attention", False)
            inside.append(Tap(f"encoder_{level}", "encoder", channels[-1], before if attends else stride))
        return (*inside, *skips, Tap("middle", "middle", skips[-1].channels, stride))

    @cached_property
    def branch_taps(self) -> tuple[Tap, ...]:
        """The taps that a copy of the encoder has features for: the skips and the middle."""
        return tuple(tap for tap in self.taps if tap.site != "encoder")

    @property
    def multiple(self) -> int:
        """Picture sides must be a multiple of this many pixels."""
        return max(tap.stride for tap in self.taps)

    @cached_property
    def signature(self) -> dict[str, Any]:
        """What a control must match to run on this base; equal signatures mean equal shapes everywhere."""
        taps = [[tap.name, tap.site, tap.channels, tap.stride] for tap in self.branch_taps]
        latents, text = self.unet.config.in_channels, self.unet.config.cross_attention_dim
        return {"taps": taps, "latent_channels": latents, "text_width": text, "stride": self.stride}

    @cached_property
    def digest(self) -> str:
        """A digest of all weights: which base exactly a control was trained on and latents were cached for."""
        modules = self._modules()
        return digest({f"{part}.{k}": v for part, module in modules.items() for k, v in module.state_dict().items()})

    # --- text and pictures ------------------------------------------------------------------------------

    def cut_words(self, prompt: str) -> str:
        """The end of a prompt that does not fit the text tower's window; empty if all of it fits."""
        tokenizer = self.towers[0].tokenizer
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        return tokenizer.decode(ids[self.window - 2 :]).strip()

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str | None], size: tuple[int, int] | None = None) -> Text:
        """What the U-Net reads of prompts; None is no prompt at all, ``size`` the picture's (height, width)."""
        read = [tower.encode([prompt or "" for prompt in prompts]) for tower in self.towers]
        tokens = torch.cat([one for one, _ in read], -1)
        pooled = sizes = None
        if self.unet.config.addition_embed_type == "text_time":
            pooled = read[-1][1]
            sizes = torch.zeros(len(prompts), 6, dtype=torch.long, device=tokens.device)
        absent = [i for i, prompt in enumerate(prompts) if prompt is None]
        if absent and self.zeros_for_none:
            tokens[absent] = 0
            if pooled is not None:
                pooled[absent] = 0
        return Text(tokens, pooled, sizes).of_size(size or (self.size, self.size))

    @torch.no_grad()
    def encode_moments(self, pixels: Tensor) -> Tensor:
        """Mean and log-variance of the latents (B, 2C, h, w), unscaled, of pictures (B, 3, H, W) in [-1, 1]."""
        return self._by_vae(lambda rows: self.vae.encode(rows).latent_dist.parameters, pixels)

    def _by_vae(self, work: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """What the VAE makes of rows, of as many at once as memory holds; that is found once, by halving.

        A VAE that float16 overflows (SDXL's) computes in its weights' own format under autocast to it.
        """
        kind = self.device.type
        halves = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        upcast = halves and self.vae.config.get("force_upcast")
        while True:
            try:
                with torch.autocast(kind, enabled=False) if upcast else nullcontext():
                    parts = rows.to(self.vae.dtype).split(self._vae_rows or len(rows))
                    return torch.cat([work(part) for part in parts]) if len(parts) > 1 else work(parts[0])
            except torch.OutOfMemoryError:
                if (most := min(self._vae_rows or len(rows), len(rows))) == 1:
                    raise
                self._vae_rows = most // 2

    def draw_latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Latents (B, C, h, w) drawn from ``encode_moments``' Gaussians with standard normal ``noise``."""
        mean, log_variance = moments.chunk(2, dim=1)
        return (mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of latents (B, C, h, w)."""
        scaled = latents / self.vae.config.scaling_factor
        return self._by_vae(lambda rows: self.vae.decode(rows).sample, scaled).clamp(-1, 1)

    # --- the denoiser, in two halves --------------------------------------------------------------------

    def predict(self, x: Tensor, t: Tensor, text: Text, parts: Sequence[Part] = ()) -> Tensor:
        """The prediction (B, C, h, w) under any number of controls: here they meet the base, and each other.

        Args:
            x: noisy latents (B, C, h, w).  t: timesteps (B,).  text: of B prompts.
        """
        beside = [part for part in parts if isinstance(part.branch, XSBranch)]
        apart = [part for part in parts if not isinstance(part.branch, XSBranch)]
        inject = add_residuals([part.scaled(part.branch(x, t, text, part.features)) for part in apart])
        return self.decode_noise(self.encode_noise(x, t, text, inject, beside), inject)

    def encode_noise(
        self,
        x: Tensor,
        t: Tensor,
        text: Text,
        inject: Mapping[str, Tensor] | None = None,
        beside: Sequence[Part] = (),
    ) -> Encoded:
        """The encoder and middle block, with ``inject`` at its encoder taps, and what walks ``beside`` it.

        Where there is neither and the weights are locked, as a branch has it, no graph is built.
        """
        return self.encoder.encode(x, t, text, inject=inject, beside=beside)

    def decode_noise(self, encoded: Encoded, inject: Mapping[str, Tensor] | None = None) -> Tensor:
        """The prediction (B, C, h, w), with ``inject`` at the skips and the middle; gradients reach the residuals."""
        inject = inject or {}
        plain = [*encoded.skips, encoded.middle]
        pairs = zip(self.branch_taps, plain, strict=True)
        *skips, h = [f + inject[tap.name] if tap.name in inject else f for tap, f in pairs]
        for block in self.unet.up_blocks:
            for i in range(len(block.resnets)):
                name = self.branch_taps[len(skips) - 1].name
                if name in encoded.arriving:
                    h = h + encoded.arriving[name]
                h = run_layer(block, i, torch.cat([h, skips.pop()], 1), encoded.embedding, encoded.text)
            size = tuple(skips[-1].shape[-2:]) if skips else None  # odd sizes: as large as the skip to be met
            for upsampler in block.upsamplers or ():
                h = upsampler(h, size)
        return self.unet.conv_out(self.unet.conv_act(self.unet.conv_norm_out(h)))

    # --- control ----------------------------------------------------------------------------------------

    def copy_encoder(self) -> UNetEncoder:
        """A trainable copy of the encoder and middle block (Θc starts as Θ): the body of a branch."""
        return copy.deepcopy(self.encoder).requires_grad_(True)

    def empty_encoder(self) -> UNetEncoder:
        """The same on the ``meta`` device, without memory: for weights that are about to be loaded."""
        memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in self.encoder.parameters()}
        return copy.deepcopy(self.encoder, memo)

    def new_branch(
        self, spec: ControlSpec | None = None, hint_channels: int = 3, size_ratio: float | None = None
    ) -> ControlBranch | XSBranch:
        """A fresh branch for this base, as ``spec`` says; ``size_ratio`` is an XS's width (``xs.adapter_config``)."""
        spec = spec or ControlSpec()
        if spec.body == "xs":
            walker = new_xs(self.unet, self.branch_taps, self.stride, hint_channels, size_ratio)
            return walker.to(self.device, self.dtype)
        body: nn.Module = self.conv_body() if spec.body == "conv" else self.copy_encoder()
        if spec.body == "lora":
            body = low_rank(body, spec.rank)
        return ControlBranch(self.branch_taps, body, self.stride, hint_channels, spec).to(self.device, self.dtype)

    def new_union(self, types: int = 8, code_width: int = 32) -> UnionBranch:
        """A fresh Union for this base; released ones have codes 256 wide, which is much for a small base.

        Types are told by their code alone: the tokens' shift stays zero, so that each type can be taken out as an
        ordinary ControlNet.
        """
        first, embedding = self.branch_taps[0].channels, self.unet.time_embedding.linear_2.out_features
        shape = {"types": types, "width": first, "code_width": code_width, "embedding": embedding}
        union = UnionBranch(self.branch_taps, self.copy_encoder(), self.stride, **shape).begin()
        return union.to(self.device, self.dtype)

    def conv_body(self) -> ConvBody:
        """A fresh body of ControlNet-lite for this base's taps."""
        return ConvBody(self.latent_channels, self.stride, self.branch_taps)

    def of_size(self, size: int) -> "UNetBase":
        """The same base for pictures of another side, in pixels; ``UserError`` where its U-Net cannot halve it."""
        if size % self.multiple:
            raise UserError(f'"{self.name}" makes pictures whose sides are multiples of {self.multiple}; not {size}.')
        other = copy.copy(self)
        other.size = size
        return other

    def with_own_unet(self) -> "UNetBase":
        """The same base with a copy of its U-Net, to be trained."""
        unet = copy.deepcopy(self.unet)
        return UNetBase(self.name, self.vae, self.towers, unet, self.scheduler, self.zeros_for_none).of_size(self.size)

    # --- placement --------------------------------------------------------------------------------------

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.unet.config.in_channels

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the U-Net's weights, and of what it reads."""
        return self.unet.conv_in.weight.dtype

    def autocast(self) -> AbstractContextManager[object]:
        """The number format to compute in: the weights' own if they are in half precision, else the machine's."""
        return autocast(self.device.type) if self.dtype == torch.float32 else nullcontext()

    def to(self, device: str | torch.device) -> "UNetBase":
        """Move the weights; returns the base itself."""
        for module in self._modules().values():
            module.to(device)
        return self
