"""The U-Net family (``mini`` today) on diffusers' own modules, unmodified, with encoder and decoder callable apart.

Control comes in as an explicit argument: ``decode_noise(encoded, inject={tap name: residual})``. Leaving it out is
the base as it was.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from controlkit.branch import ControlBranch, ControlSpec, ConvBody, Tap
from controlkit.errors import UserError
from controlkit.hub import digest, shipped_names, where

Prediction = Literal["eps", "v"]
_PREDICTION: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v"}


@dataclass(frozen=True)
class Encoded:
    """What the encoder hands to the decoder: skips (finest first), the middle feature, time embedding and text."""

    skips: list[Tensor]  # (B, C, h, w) each
    middle: Tensor
    embedding: Tensor  # (B, D)
    text: Tensor  # (B, L, D)


class UNetEncoder(nn.Module):
    """The encoder and middle block of a diffusers ``UNet2DConditionModel``, made of its own modules.

    Built on a base it shares the base's modules; deep-copied it is the body of a control branch.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.conv_in = unet.conv_in
        self.time_proj = unet.time_proj
        self.time_embedding = unet.time_embedding
        self.down_blocks = unet.down_blocks
        self.mid_block = unet.mid_block

    def encode(self, x: Tensor, t: Tensor, text: Tensor, hint: Tensor | None = None) -> Encoded:
        """Encode latents x (B, C, h, w) at timesteps t (B,); ``hint`` is added once, after the first block."""
        embedding = self.time_embedding(self.time_proj(t).to(x.dtype))
        h = self.conv_in(x)
        if hint is not None:
            h = h + hint
        skips = [h]
        for block in self.down_blocks:
            extra = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
            h, outputs = block(hidden_states=h, temb=embedding, **extra)
            skips.extend(outputs)
        middle = self.mid_block(h, embedding, encoder_hidden_states=text)
        return Encoded(skips, middle, embedding, text)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, hint: Tensor | None = None) -> list[Tensor]:
        """One feature a tap: the skips, then the middle."""
        encoded = self.encode(x, t, text, hint)
        return [*encoded.skips, encoded.middle]


class UNetBase:
    """A frozen text-to-image base: VAE, text tower, U-Net and noise schedule, from a diffusers folder.

    Attributes: ``name``, ``prediction`` (``eps`` or ``v``), ``size`` (the picture side it was trained at, pixels),
    ``stride`` (pixels a latent), ``taps``.
    """

    def __init__(self, name: str, vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, scheduler: Any) -> None:
        self.name = name
        self.vae, self.text_encoder, self.tokenizer, self.unet = vae, text_encoder, tokenizer, unet
        self.scheduler = scheduler
        for module in (vae, text_encoder, unet):
            module.eval().requires_grad_(False)
        self.encoder = UNetEncoder(unet)
        self.prediction = _PREDICTION[scheduler.config.prediction_type]
        self.stride = 2 ** (len(vae.config.block_out_channels) - 1)
        self.size = unet.config.sample_size * self.stride
        self.window = tokenizer.model_max_length

    # --- description ------------------------------------------------------------------------------------

    @cached_property
    def taps(self) -> tuple[Tap, ...]:
        """Every skip connection and the middle block, in the encoder's order."""
        stride = self.stride
        found = [Tap("skip_0", "skip", self.unet.conv_in.out_channels, stride)]
        for block in self.unet.down_blocks:
            channels = [resnet.out_channels for resnet in block.resnets]
            found += [Tap(f"skip_{len(found) + i}", "skip", c, stride) for i, c in enumerate(channels)]
            if block.downsamplers is not None:
                stride *= 2
                found.append(Tap(f"skip_{len(found)}", "skip", channels[-1], stride))
        return (*found, Tap("middle", "middle", found[-1].channels, stride))

    @property
    def multiple(self) -> int:
        """Picture sides must be a multiple of this many pixels."""
        return max(tap.stride for tap in self.taps)

    @cached_property
    def signature(self) -> dict[str, Any]:
        """What a control must match to run on this base; equal signatures mean equal shapes everywhere."""
        taps = [[tap.name, tap.site, tap.channels, tap.stride] for tap in self.taps]
        latents, text = self.unet.config.in_channels, self.unet.config.cross_attention_dim
        return {"taps": taps, "latent_channels": latents, "text_width": text, "stride": self.stride}

    @cached_property
    def digest(self) -> str:
        """A digest of all weights: which base exactly a control was trained on and latents were cached for."""
        parts = {"vae": self.vae, "text_encoder": self.text_encoder, "unet": self.unet}
        return digest({f"{part}.{k}": v for part, module in parts.items() for k, v in module.state_dict().items()})

    # --- text and pictures ------------------------------------------------------------------------------

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Token rows (B, window), padded, and cut where a prompt is longer than the window."""
        rows = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.window, return_tensors="pt"
        )
        return rows.input_ids.to(self.device)

    def cut_words(self, prompt: str) -> str:
        """The end of a prompt that does not fit the text tower's window; empty if all of it fits."""
        ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
        return self.tokenizer.decode(ids[self.window - 2 :]).strip()

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Tensor:
        """Prompt embeddings (B, L, D)."""
        return self.text_encoder(self.tokenize(prompts)).last_hidden_state

    @torch.no_grad()
    def encode_moments(self, pixels: Tensor) -> Tensor:
        """Mean and log-variance of the latents (B, 2C, h, w), unscaled, of pictures (B, 3, H, W) in [-1, 1]."""
        return self.vae.encode(pixels).latent_dist.parameters

    def draw_latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Latents (B, C, h, w) drawn from ``encode_moments``' Gaussians with standard normal ``noise``."""
        mean, log_variance = moments.chunk(2, dim=1)
        return (mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of latents (B, C, h, w)."""
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample.clamp(-1, 1)

    # --- the denoiser, in two halves --------------------------------------------------------------------

    @torch.no_grad()
    def encode_noise(self, x: Tensor, t: Tensor, text: Tensor) -> Encoded:
        """The locked encoder and middle block. No graph is built: nothing before it is trained."""
        return self.encoder.encode(x, t, text)

    def decode_noise(self, encoded: Encoded, inject: Mapping[str, Tensor] | None = None) -> Tensor:
        """The prediction (B, C, h, w), with each residual of ``inject`` added at its tap; gradients reach them."""
        inject = inject or {}
        plain = [*encoded.skips, encoded.middle]
        pairs = zip(self.taps, plain, strict=True)
        *skips, h = [f + inject[tap.name] if tap.name in inject else f for tap, f in pairs]
        for block in self.unet.up_blocks:
            count = len(block.resnets)
            skips, own = skips[:-count], tuple(skips[-count:])
            extra = {"encoder_hidden_states": encoded.text} if getattr(block, "has_cross_attention", False) else {}
            size = tuple(skips[-1].shape[-2:]) if skips else None  # odd sizes: as large as the skip to be met
            h = block(hidden_states=h, temb=encoded.embedding, res_hidden_states_tuple=own, upsample_size=size, **extra)
        return self.unet.conv_out(self.unet.conv_act(self.unet.conv_norm_out(h)))

    # --- control ----------------------------------------------------------------------------------------

    def copy_encoder(self) -> UNetEncoder:
        """A trainable copy of the encoder and middle block (Θc starts as Θ): the body of a branch."""
        return copy.deepcopy(self.encoder).requires_grad_(True)

    def new_branch(self, spec: ControlSpec | None = None, hint_channels: int = 3) -> ControlBranch:
        """A fresh branch for this base, as ``spec`` says."""
        spec = spec or ControlSpec()
        latents = self.unet.config.in_channels
        body = self.copy_encoder() if spec.body == "copy" else ConvBody(latents, self.stride, self.taps)
        return ControlBranch(self.taps, body, self.stride, hint_channels, spec).to(self.device)

    # --- placement --------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.unet.device

    def to(self, device: str | torch.device) -> "UNetBase":
        """Move the weights; returns the base itself."""
        for module in (self.vae, self.text_encoder, self.unet):
            module.to(device)
        return self


def load_base(name: str | Path, device: str = "cpu") -> UNetBase:
    """Load a base: ``mini``, or a diffusers ``StableDiffusionPipeline`` folder. Weights are float32 and frozen."""
    folder = where(str(name)) if str(name) in shipped_names() else Path(name)
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(
            f'There is no base "{name}": expected "mini" or a diffusers pipeline folder (with a model_index.json).'
        )
    try:
        kind = json.loads(index.read_text())["_class_name"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{index} cannot be read ({error!r}): expected a diffusers pipeline folder.") from error
    if kind != "StableDiffusionPipeline":
        raise UserError(f"{folder} holds a {kind}; expected a StableDiffusionPipeline.")
    for part in ("vae", "text_encoder", "tokenizer", "unet", "scheduler"):
        if not (folder / part).is_dir():
            raise UserError(f"{folder} lacks the folder {part}: expected a whole StableDiffusionPipeline folder.")
    # Here and not above: these imports take seconds, and --help must not.
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    only = {"local_files_only": True}
    try:
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32, **only)
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32, **only)
        text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32, **only)
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", **only)
        scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", **only)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not a whole StableDiffusionPipeline folder ({error}).") from error
    if scheduler.config.prediction_type not in _PREDICTION:
        raise UserError(
            f'{folder} predicts "{scheduler.config.prediction_type}"; expected one of {", ".join(_PREDICTION)}.'
        )
    name = str(name) if str(name) in shipped_names() else folder.name
    return UNetBase(name, vae, text_encoder, tokenizer, unet, scheduler).to(device)
