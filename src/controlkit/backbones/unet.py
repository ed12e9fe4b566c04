"""U-Net bases (SD 1.5, SD 2.1, SDXL, ``mini``) on diffusers' own modules, with encoder and decoder callable apart.

Control is an argument, ``inject={tap name: residual}``; without it the base is as it was. Every tap is a map: residuals
have (B, C, h, w), never tokens.
"""

# ruff: noqa: D102  # members of ``Backbone`` are explained there

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from controlkit.backbones.cpu import FasterOnCPU, by_rows
from controlkit.backbones.noise import Diffusion
from controlkit.backbones.protocol import ActiveControl, Backbone, Decoded, Half, Layer, Prompt, TextEmbedding, Walker
from controlkit.backbones.text import TextTower
from controlkit.branch import Tap, add_residuals, in_rows
from controlkit.errors import Invalid, Unsupported
from controlkit.hub import digest
from controlkit.precision import SMALL, number_format
from controlkit.prompts import Words


@dataclass(frozen=True)
class Encoded:
    """The encoder's results for the decoder."""

    skips: list[Tensor]
    """(B, C, h, w) each, the finest first."""
    middle: Tensor
    """(B, C, h, w), the middle block's feature."""
    embedding: Tensor
    """(B, D), of the time."""
    text: TextEmbedding
    arriving: Mapping[str, Tensor] = field(default_factory=dict)
    """By skip: added to the decoder's feature where that skip arrives (ControlNet-XS)."""

    def of_rows(self, first: int) -> "Encoded":
        """The same without the first rows."""
        arriving = {name: one[first:] for name, one in self.arriving.items()}
        skips, middle = [one[first:] for one in self.skips], self.middle[first:]
        return Encoded(skips, middle, self.embedding[first:], self.text[first:], arriving)


@dataclass(frozen=True)
class UNetHalf:
    """A U-Net's encoder under its controls (``Half``)."""

    encoded: Encoded
    inject: Mapping[str, Tensor]
    """Residuals of the controls, by tap."""

    def of_rows(self, first: int) -> "UNetHalf":
        """The same without the first rows of the text."""
        return UNetHalf(self.encoded.of_rows(first), {name: one[first:] for name, one in self.inject.items()})


def run_layer(block: Any, i: int, h: Tensor, embedding: Tensor, text: Any) -> Tensor:
    """Run a block's resnet ``i`` and its attention, if it has one, on h (B, C, h, w), as the block itself does.

    h and the embedding may have fewer rows than the text, and the result has them where it does not depend on it.
    """
    resnet = block.resnets[i]
    h = in_rows(h, max(len(h), len(embedding)))
    embedding = in_rows(embedding, len(h))
    if torch.is_grad_enabled() and getattr(block, "gradient_checkpointing", False):
        h = block._gradient_checkpointing_func(resnet, h, embedding)
    else:
        h = resnet(h, embedding)
    if getattr(block, "attentions", None) is None:
        return h
    if torch.is_grad_enabled() and len(h) == len(text.tokens):  # the block's own way can compute features anew
        return block.attentions[i](h, encoder_hidden_states=text.tokens, return_dict=False)[0]
    return attended(block.attentions[i], h, text.tokens)


def attended(transformer: Any, h: Tensor, tokens: Tensor) -> Tensor:
    """A ``Transformer2DModel`` on h (b, C, h, w) and tokens (B, L, D), B a multiple of b: (B, C, h, w).

    The self-attention before the first cross-attention is computed once for all prompts.
    """
    blocks = transformer.transformer_blocks
    if not all(_is_plain(block) for block in blocks):
        return transformer(in_rows(h, len(tokens)), encoder_hidden_states=tokens, return_dict=False)[0]
    before, linear = h, transformer.use_linear_projection
    h = transformer.norm(h)
    h = h if linear else transformer.proj_in(h)
    places = h.permute(0, 2, 3, 1).flatten(1, 2)
    places = transformer.proj_in(places) if linear else places
    for block in blocks:
        places = in_rows(block.attn1(block.norm1(places)) + places, len(tokens))
        places = block.attn2(block.norm2(places), encoder_hidden_states=tokens) + places
        inner = 2 * block.ff.net[-1].in_features  # the values and their gates
        places = by_rows(block.ff, block.norm3(places), inner) + places
    places = transformer.proj_out(places) if linear else places
    h = places.unflatten(1, before.shape[-2:]).permute(0, 3, 1, 2)
    if not before.is_contiguous(memory_format=torch.channels_last):
        h = h.contiguous()  # as the base's own blocks leave it: norms round differently with the channels last
    return (h if linear else transformer.proj_out(h)) + in_rows(before, len(tokens))


def _is_plain(block: Any) -> bool:
    """Whether a transformer block is self-attention, cross-attention and a feed-forward layer, with plain norms."""
    of_words = block.attn2 is not None and not block.only_cross_attention
    return block.norm_type == "layer_norm" and of_words and block.pos_embed is None


def run_plain(module: nn.Module, h: Tensor, embedding: Tensor, text: Any) -> Tensor:
    """Run a convolution or downsampler, which reads neither time nor text."""
    return module(h)


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

    def embed(self, t: Tensor, text: TextEmbedding, dtype: torch.dtype) -> Tensor:
        """The time embedding (B, D) of timesteps t (B,), with SDXL's pooled prompt and picture sizes added."""
        embedding = self.time_embedding(self.time_proj(t).to(dtype))
        if not hasattr(self, "add_embedding"):
            return embedding
        embedding = in_rows(embedding, len(text))
        assert text.pooled is not None and text.sizes is not None
        sizes = self.add_time_proj(text.sizes.flatten()).reshape(len(text), -1)
        return embedding + self.add_embedding(torch.cat([text.pooled, sizes.to(text.pooled.dtype)], -1).to(dtype))

    def encode(
        self,
        x: Tensor,
        t: Tensor,
        text: TextEmbedding,
        hint: Tensor | None = None,
        embedding: Tensor | None = None,
        inject: Mapping[str, Tensor] | None = None,
        beside: Sequence[ActiveControl] = (),
    ) -> Encoded:
        """Encode noisy latents x (B, C, h, w) at timesteps t (B,), or b rows of them (``Backbone.shares_rows``).

        Args:
            text: of B prompts.
            hint: a feature map (B, C, h, w) of the first block's channels, added once, after it.
            embedding: (B, D), added to the time embedding.
            inject: residuals (B, C, h, w) by name of encoder tap, added where a level's features leave for its skip.
            beside: controls that walk along, place by place (``Walker``).

        Returns:
            Skips (B, C, h, w), finest first, the middle feature, and all else that ``decode_noise`` needs.
        """
        inject = inject or {}
        if beside:  # their features and the base's are added to each other from the first place on
            x, t = in_rows(x, len(text)), in_rows(t, len(text))
        whole = self.embed(t, text, x.dtype)
        if embedding is not None:
            whole = whole + in_rows(embedding, len(whole))
        walkers = [cast("Walker", control.network) for control in beside]
        for control, walker in zip(beside, walkers, strict=True):
            shift = walker.shift(self.time_proj(t).to(x.dtype), self.time_embedding)
            if shift is not None:
                whole = whole + shift * control.is_heard()
        h = x
        features: list[Tensor] = []
        walked: list[list[Tensor]] = [[] for _ in beside]
        stages = [walker.stages() for walker in walkers]
        for place, (layer, tap) in enumerate(self._places()):
            before, h = h, layer(h, whole, text)
            if place == 0 and hint is not None:
                h = h + hint
            if tap in inject:
                h = in_rows(h, len(text)) + inject[tap]
            for control, walker, own, stage in zip(beside, walkers, walked, stages, strict=True):
                feature, added = stage[place](own[-1] if own else control.features, before, whole, text)
                own.append(feature)
                name = walker.taps[place].name
                h = h + add_residuals([control.scaled({name: added})])[name]
            features.append(h)
        each = zip(beside, walkers, walked, strict=True)
        arriving = add_residuals([control.scaled(walker.arriving(own[:-1])) for control, walker, own in each])
        *skips, middle = (in_rows(feature, len(text)) for feature in features)
        return Encoded(skips, middle, in_rows(whole, len(text)), text, arriving)

    def _places(self) -> Iterator[tuple[Layer, str]]:
        """For each feature of a branch: the layer that makes it, and the encoder tap at its end, or ""."""
        yield partial(run_plain, self.conv_in), ""
        for level, block in enumerate(self.down_blocks):
            layers: list[Layer] = [partial(run_layer, block, i) for i in range(len(block.resnets))]
            end = len(layers) - 1
            if block.downsamplers is not None:
                layers.append(partial(run_plain, block.downsamplers[0]))
                end += not getattr(block, "has_cross_attention", False)  # a level without attention: at its very end
            yield from ((layer, f"encoder_{level}" if i == end else "") for i, layer in enumerate(layers))
        yield self._middle, ""

    def _middle(self, h: Tensor, embedding: Tensor, text: TextEmbedding) -> Tensor:
        attends = getattr(self.mid_block, "has_cross_attention", False)
        h, embedding = in_rows(h, len(text)), in_rows(embedding, len(text))
        return self.mid_block(h, embedding, **({"encoder_hidden_states": text.tokens} if attends else {}))

    def forward(
        self, x: Tensor, t: Tensor, text: TextEmbedding, hint: Tensor | None = None, embedding: Tensor | None = None
    ) -> list[Tensor]:
        """The features (B, C, h, w) at a branch's taps: the skips, then the middle; arguments as ``encode``'s."""
        encoded = self.encode(x, t, text, hint, embedding)
        return [*encoded.skips, encoded.middle]


class UNetBase(Backbone):
    """A frozen text-to-image base: VAE, text towers, U-Net and noise schedule.

    Members without a word here are explained in ``Backbone``.

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
        self.name, self.shares_rows, self.has_halves = name, True, True
        self.vae, self.towers, self.unet, self.scheduler = vae, tuple(towers), unet, scheduler
        self.zeros_for_none = zeros_for_none
        for module in self.networks().values():
            module.eval().requires_grad_(False)
        self.encoder = UNetEncoder(unet)
        self.noise = Diffusion(scheduler)
        self.stride = 2 ** (len(vae.config.block_out_channels) - 1)
        self.size = unet.config.sample_size * self.stride
        self.window = towers[0].tokenizer.model_max_length
        self._grey: dict[tuple[int, int], Tensor] = {}  # latents of a grey picture, by their height and width
        self._vae_rows: int | None = None  # the most rows that fitted into memory at once; None: any number

    def networks(self) -> dict[str, nn.Module]:
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
    def signature(self) -> dict[str, Any]:
        """Taps, latent channels, text width and stride: a control must match them to run on this base."""
        taps = [[tap.name, tap.site, tap.channels, tap.stride] for tap in self.branch_taps]
        text = self.unet.config.cross_attention_dim
        return {"taps": taps, "latent_channels": self.latent_channels, "text_width": text, "stride": self.stride}

    @cached_property
    def text_digest(self) -> str:
        # Rounded to bfloat16; of their order and not their names, which differ between versions of transformers.
        values = [value for tower in self.towers for value in tower.encoder.parameters()]
        return digest({str(i): value.bfloat16() for i, value in enumerate(values)})

    # --- text and pictures ------------------------------------------------------------------------------

    def cut_words(self, prompt: str) -> str:
        tokenizer = self.towers[0].tokenizer
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        return tokenizer.decode(ids[self.window - 2 :]).strip()

    def windows_of(self, words: Words) -> int:
        return len(self.towers[0].windows(words))

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[Prompt], size: tuple[int, int] | None = None) -> TextEmbedding:
        self.bring("text")
        read = [tower.encode([prompt or "" for prompt in prompts]) for tower in self.towers]
        rows = [torch.cat([one for one, _ in towers], -1) for towers in zip(*read, strict=True)]
        longest = math.lcm(*(len(row) for row in rows))
        tokens = torch.stack([row.repeat(longest // len(row), 1) for row in rows])  # attention is the same for it
        pooled = sizes = None
        if self.unet.config.addition_embed_type == "text_time":
            pooled = torch.stack([cast("Tensor", one) for _, one in read[-1]])
            sizes = torch.zeros(len(prompts), 6, dtype=torch.long, device=tokens.device)
        absent = [i for i, prompt in enumerate(prompts) if prompt is None]
        if absent and self.zeros_for_none:
            tokens[absent] = 0
            if pooled is not None:
                pooled[absent] = 0
        return TextEmbedding(tokens, pooled, sizes).of_size(size or (self.size, self.size))

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        configs = [tower.encoder.config for tower in self.towers]
        shapes: dict[str, tuple[int, ...]] = {"tokens": (self.window, sum(config.hidden_size for config in configs))}
        if self.unet.config.addition_embed_type == "text_time":
            shapes |= {"pooled": (configs[-1].projection_dim,), "sizes": (6,)}
        return shapes

    def text_keys(self, prompts: Sequence[str]) -> list[bytes]:
        rows = [tower.tokenize(list(prompts)).cpu().numpy() for tower in self.towers]
        return [b" ".join([self._text_key, *(tokens[i].tobytes() for tokens in rows)]) for i in range(len(prompts))]

    @property
    def _text_key(self) -> bytes:
        weights = {f"{i}.{k}": v for i, tower in enumerate(self.towers) for k, v in tower.encoder.state_dict().items()}
        return f"{digest(weights)} {[tower.penultimate for tower in self.towers]} {self.dtype}".encode()

    def moments_key(self) -> str:
        return f"{digest(self.vae.state_dict())} {self.vae.dtype} {number_format(self.device.type)}"

    @torch.no_grad()
    def encode_moments(self, pixels: Tensor) -> Tensor:
        return self._by_vae(lambda rows: self.vae.encode(rows).latent_dist.parameters, pixels)

    def _latent_range(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Middle and spread (1, C or 1, 1, 1), which a VAE's configuration may have beside the scaling factor."""
        config = self.vae.config
        middle, spread = config.get("latents_mean") or config.get("shift_factor"), config.get("latents_std")
        if not middle and spread is None:
            return None
        return like.new_tensor(middle or 0.0).view(1, -1, 1, 1), like.new_tensor(spread or 1.0).view(1, -1, 1, 1)

    def _by_vae(self, work: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """Apply ``work``, a pass through the VAE, to rows (B, ...), as many at once as fit: found once, by halving.

        A VAE that float16 overflows (SDXL's) computes in its weights' own format under autocast to it.
        """
        self.bring("vae")
        kind = self.device.type
        halves = kind != "meta" and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        upcast = halves and self.vae.config.get("force_upcast")
        while True:
            try:
                with torch.autocast(kind, enabled=False) if upcast else nullcontext():
                    parts = self._laid_out(rows.to(self.vae.dtype)).split(self._vae_rows or len(rows))
                    return torch.cat([work(part) for part in parts]) if len(parts) > 1 else work(parts[0])
            except torch.OutOfMemoryError:
                if (most := min(self._vae_rows or len(rows), len(rows))) == 1:
                    raise
                self._vae_rows = most // 2

    def draw_latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        mean, log_variance = moments.chunk(2, dim=1)
        drawn = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise
        if at := self._latent_range(mean):
            drawn = (drawn - at[0]) / at[1]
        return drawn * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        scaled = latents / self.vae.config.scaling_factor
        if at := self._latent_range(latents):
            scaled = scaled * at[1] + at[0]
        return self._by_vae(lambda rows: self.vae.decode(rows).sample, scaled).clamp(-1, 1)

    # --- the denoiser, in two halves --------------------------------------------------------------------

    def predict(self, x: Tensor, t: Tensor, text: TextEmbedding, controls: Sequence[ActiveControl] = ()) -> Tensor:
        half = self.first_half(x, t, text, controls)
        return self.decode_noise(half.encoded, half.inject)

    def first_half(self, x: Tensor, t: Tensor, text: TextEmbedding, controls: Sequence[ActiveControl] = ()) -> UNetHalf:
        x = self._with_mask(x)  # which may need the VAE
        self.bring("denoiser")
        x = self._laid_out(x)
        inject, beside = self._split(x, t, text, controls)
        return UNetHalf(self.encode_noise(x, t, text, inject, beside), inject)

    def second_half(self, half: Half, t: Tensor, text: TextEmbedding, deep: Tensor | None = None) -> Decoded:
        assert isinstance(half, UNetHalf)
        encoded = half.encoded
        if encoded.arriving:
            raise Unsupported("A ControlNet-XS walks beside the encoder at every step: nothing of it can be reused.")
        embedding = in_rows(self.encoder.embed(t, text, encoded.middle.dtype), len(text))
        return self.decoded(replace(encoded, embedding=embedding, text=text), half.inject, deep)

    def _split(
        self, x: Tensor, t: Tensor, text: TextEmbedding, controls: Sequence[ActiveControl]
    ) -> tuple[dict[str, Tensor], list[ActiveControl]]:
        """(the residuals by tap of controls that run apart from the encoder; the controls that walk beside it).

        Controls read the latents alone, never the mask and the picture that an inpainting base reads beside them.
        """
        beside = [control for control in controls if control.network.walks]
        apart = [control for control in controls if not control.network.walks]
        if beside and self.inpaints:
            raise Unsupported(
                f'A ControlNet-XS walks beside an encoder that reads latents alone; the inpainting base "{self.name}" '
                "reads more. Take its text-to-image base, or another control."
            )
        x = x[:, : self.latent_channels]
        beside = [replace(one, features=in_rows(one.features, len(text))) for one in beside]
        return add_residuals([one.residuals(x, t, text) for one in apart]), beside

    @torch.no_grad()
    def control_effect(
        self, x: Tensor, t: Tensor, text: TextEmbedding, control: ActiveControl
    ) -> dict[str, tuple[Tensor, Tensor]]:
        x = self._with_mask(x)  # which may need the VAE
        self.bring("denoiser")
        inject, beside = self._split(x, t, text, [control])
        plain = self.encode_noise(x, t, text)
        walked = self.encode_noise(x, t, text, inject, beside)
        features = zip([*walked.skips, walked.middle], [*plain.skips, plain.middle], strict=True)
        return {
            tap.name: (under - without + inject.get(tap.name, 0), without)
            for tap, (under, without) in zip(self.branch_taps, features, strict=True)
        }

    def encode_noise(
        self,
        x: Tensor,
        t: Tensor,
        text: TextEmbedding,
        inject: Mapping[str, Tensor] | None = None,
        beside: Sequence[ActiveControl] = (),
    ) -> Encoded:
        """Run the encoder and middle block, with ``inject`` at its encoder taps, and controls that walk ``beside`` it.

        Shapes and arguments are ``UNetEncoder.encode``'s. Without either, and with locked weights, no graph is built.
        """
        return self.encoder.encode(x, t, text, inject=inject, beside=beside)

    def _with_mask(self, x: Tensor) -> Tensor:
        """All that the U-Net reads: where it inpaints and only latents (B, C, h, w) came, all of it masked."""
        if not self.inpaints or x.shape[1] > self.latent_channels:
            return x
        sides = x.shape[-2], x.shape[-1]
        if sides not in self._grey:
            grey = torch.zeros(1, 3, sides[0] * self.stride, sides[1] * self.stride, device=x.device)
            self._grey = {sides: self.mean_latents(self.encode_moments(grey))}  # of one size, the last one asked for
        rest = torch.cat([torch.ones_like(self._grey[sides][:, :1]), self._grey[sides]], 1).to(x)
        return torch.cat([x, rest.expand(len(x), -1, -1, -1)], 1)

    def features(self, x: Tensor, t: Tensor, text: TextEmbedding) -> tuple[Tensor, list[Tensor]]:
        x = self._with_mask(x)
        self.bring("denoiser")
        encoded = self.encode_noise(x, t, text)
        seen = [*encoded.skips, encoded.middle]
        return self.decoded(encoded, seen=seen).prediction, seen

    def decode_noise(self, encoded: Encoded, inject: Mapping[str, Tensor] | None = None) -> Tensor:
        """The prediction (B, C, h, w), with residuals ``inject`` (B, C, h, w) at the skips and the middle."""
        return self.decoded(encoded, inject).prediction

    def decoded(
        self,
        encoded: Encoded,
        inject: Mapping[str, Tensor] | None = None,
        deep: Tensor | None = None,
        seen: list[Tensor] | None = None,
    ) -> Decoded:
        """The same as ``decode_noise``, with what the decoder leaves for later steps.

        Args:
            deep: the feature (B, C, h, w) that arrives at the last block, if no other is to be run.
            seen: gets the feature (B, C, h, w) of each layer.
        """
        inject = inject or {}
        skips, blocks, h = list(encoded.skips), list(self.unet.up_blocks), encoded.middle
        if deep is not None:
            blocks, h = blocks[-1:], deep
            skips = skips[: len(blocks[0].resnets)]
        elif "middle" in inject:
            h = h + inject["middle"]
        for block in blocks:
            arrived = h
            for i in range(len(block.resnets)):
                skip, name = skips.pop(), self.branch_taps[len(skips)].name
                skip = skip + inject[name] if name in inject else skip  # now, as all sums at once take memory
                if name in encoded.arriving:
                    h = h + encoded.arriving[name]
                h = run_layer(block, i, torch.cat([h, skip], 1), encoded.embedding, encoded.text)
                if seen is not None:
                    seen.append(h)
            size = tuple(skips[-1].shape[-2:]) if skips else None  # odd sizes: as large as the skip to be met
            for upsampler in block.upsamplers or ():
                h = upsampler(h, size)
        return Decoded(self.unet.conv_out(self.unet.conv_act(self.unet.conv_norm_out(h))), arrived)

    @contextmanager
    def inference(self) -> Iterator[None]:
        with self.autocast(), FasterOnCPU() if self._is_large_on_cpu else nullcontext():
            yield

    def _laid_out(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) as it is, but for a large base on a CPU: there convolutions are faster with channels last."""
        return x.contiguous(memory_format=torch.channels_last) if self._is_large_on_cpu else x

    @property
    def _is_large_on_cpu(self) -> bool:
        return self.device.type == "cpu" and not self._is_small

    @cached_property
    def _is_small(self) -> bool:
        return sum(weight.numel() for weight in self.unet.parameters()) <= SMALL

    def with_own_denoiser(self) -> "UNetBase":
        unet = copy.deepcopy(self.unet)
        return UNetBase(self.name, self.vae, self.towers, unet, self.scheduler, self.zeros_for_none).of_size(self.size)

    def reading_more(self, channels: int) -> "UNetBase":
        if channels == self.latent_channels + 1 or self.inpaints:
            raise Invalid(
                f'An inpainting base reads {self.latent_channels + 1} channels beside the latents, and "{self.name}" '
                "would be taken for one, or is one: give it another number of further channels."
            )
        other = self.with_own_denoiser()
        before = other.unet.conv_in
        wider = type(before)(
            before.in_channels + channels, before.out_channels, before.kernel_size, padding=before.padding
        ).to(before.weight)
        with torch.no_grad():
            wider.weight.zero_()
            wider.weight[:, : before.in_channels] = before.weight
            wider.bias.copy_(before.bias)
        other.unet.conv_in = wider.requires_grad_(False)
        other.unet.register_to_config(in_channels=wider.in_channels)
        return UNetBase(self.name, self.vae, self.towers, other.unet, self.scheduler, self.zeros_for_none).of_size(
            self.size
        )

    def untrained(self, seed: int) -> "UNetBase":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet = type(self.unet).from_config(self.unet.config).to(self.device, self.dtype)
        return UNetBase(self.name, self.vae, self.towers, unet, self.scheduler, self.zeros_for_none).of_size(self.size)

    @property
    def denoiser(self) -> nn.Module:
        return self.unet

    @property
    def network_config(self) -> Mapping[str, Any]:
        return {**self.unet.config, "in_channels": self.latent_channels}

    @property
    def latent_channels(self) -> int:
        return self.unet.config.out_channels

    @property
    def inpaints(self) -> bool:
        return self.unet.config.in_channels == 2 * self.latent_channels + 1

    def copy_encoder(self) -> nn.Module:
        return self._reading_latents(super().copy_encoder())

    def empty_encoder(self) -> nn.Module:
        return self._reading_latents(super().empty_encoder())

    def _reading_latents(self, encoder: nn.Module) -> nn.Module:
        """An encoder whose first convolution reads the latents alone, also where the base's own reads more."""
        if self.unet.config.in_channels > self.latent_channels:
            own = cast("nn.Conv2d", encoder.conv_in)
            own.weight = nn.Parameter(own.weight[:, : self.latent_channels].clone(), own.weight.requires_grad)
            own.in_channels = self.latent_channels
        return encoder
