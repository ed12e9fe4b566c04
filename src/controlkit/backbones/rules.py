"""The rules of a base that are followed here: a base with any other is refused by name, and not drawn wrongly.

A diffusers folder names the classes of its parts and their settings; a single file shows some by tensors of their own.
"""

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from controlkit.backbones.noise import Diffusion
from controlkit.errors import Invalid, Mismatch, Unsupported, one_line
from controlkit.files import inside, read_json

_PIPELINES = re.compile(
    r"StableDiffusion(XL)?(ControlNet(XS|Union)?|Adapter|PAG|ControlNetPAG)?(Img2Img|Inpaint)?Pipeline"
)
"""Classes of pipelines that hold a whole base; the U-Net's channels tell an inpainting model."""
_CLASSES = {
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel(WithProjection)?",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "unet": "UNet2DConditionModel",
    # Of one noise, by betas at whole timesteps; they differ in the way back from it, which here is DDIM's.
    "scheduler": "((DDIM|DDPM)(Parallel)?|PNDM|SASolver|(UniPC|DEIS)Multistep|DPMSolver(Multistep|Singlestep|SDE)"
    "|(LMS|Heun|Euler|EulerAncestral|KDPM2|KDPM2Ancestral)Discrete)Scheduler",
}
"""By part: the classes, of diffusers and transformers, whose rules are followed."""


@dataclass(frozen=True)
class Numbers:
    """The numbers that a setting may be: from ``low`` to ``high``; ``whole`` ones, or any.

    ``most``: how many a list of them may hold; 0 where it is no list. A list of levels may hold lists.
    """

    low: float
    high: float
    whole: bool = True
    most: int = 0
    none: bool = False
    """Whether it may be left unset."""

    def holds(self, value: Any, levels: int = 2) -> bool:
        """Whether a value of a configuration is such a number, or such a list."""
        if isinstance(value, list | tuple):
            deeper = levels > (0 if self.most == LEVELS else 1)
            return deeper and 0 < len(value) <= self.most and all(self.holds(one, levels - 1) for one in value)
        if value is None:
            return self.none and levels == 2
        return type(value) in ((int,) if self.whole else (int, float)) and self.low <= value <= self.high

    def __str__(self) -> str:
        several = "a list of at most {:,} numbers" if self.most > LEVELS else "numbers" if self.most else "a number"
        words = several.format(self.most).replace("number", "whole number" if self.whole else "number")
        return f"{words} from {self.low:,} to {self.high:,}" + (", or none" if self.none else "")


LEVELS, WIDEST = 8, 2**14
"""The most levels of a network, and the most channels of a layer, that are built."""
_ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")
_TEXT_ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu")
_EITHER = (False, True)
_WIDTH, _BY_LEVEL, _SHARE = Numbers(1, WIDEST), Numbers(1, WIDEST, most=LEVELS), Numbers(0, 1, whole=False)
_FACTOR, _TOKEN = Numbers(-1e6, 1e6, whole=False), Numbers(0, 2**20, most=LEVELS, none=True)
_LATER: tuple[Any, ...] = ()  # of settings that ``latent_space`` checks
_DEPTH = Numbers(0, 16, most=LEVELS)  # of SDXL at most 10

_TEXT: dict[str, tuple[Any, ...] | Numbers] = {
    "attention_dropout": _SHARE,
    "bos_token_id": _TOKEN,
    "eos_token_id": _TOKEN,
    "hidden_act": _TEXT_ACTIVATIONS,
    "hidden_size": _WIDTH,
    "intermediate_size": Numbers(1, 4 * WIDEST),
    "layer_norm_eps": _SHARE,
    "max_position_embeddings": Numbers(1, 4096),
    "num_attention_heads": Numbers(1, 1024),
    "num_hidden_layers": Numbers(1, 64),
    "pad_token_id": _TOKEN,
    "projection_dim": replace(_WIDTH, none=True),
    "vocab_size": Numbers(1, 2**20),
}
_FOLLOWED: dict[str, dict[str, tuple[Any, ...] | Numbers]] = {
    "unet": {
        "act_fn": _ACTIVATIONS,
        "addition_embed_type": (None, "text_time"),
        "addition_embed_type_num_heads": _WIDTH,
        "addition_time_embed_dim": replace(_WIDTH, none=True),
        "attention_head_dim": _BY_LEVEL,
        "attention_type": ("default",),
        "block_out_channels": _BY_LEVEL,
        "center_input_sample": (None, False),
        "class_embed_type": (None,),
        "class_embeddings_concat": (False,),
        "conv_in_kernel": Numbers(1, 15),
        "conv_out_kernel": Numbers(1, 15),
        "cross_attention_dim": _BY_LEVEL,
        "cross_attention_norm": (None, "layer_norm", "group_norm"),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "downsample_padding": Numbers(0, 8),
        "dropout": _SHARE,
        "dual_cross_attention": (None, False),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "flip_sin_to_cos": (True, False),
        "freq_shift": Numbers(0, 8),
        "in_channels": _WIDTH,
        "layers_per_block": Numbers(1, 4, most=LEVELS),
        "mid_block_only_cross_attention": (None, *_EITHER),
        "mid_block_scale_factor": _FACTOR,
        "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
        "norm_eps": _SHARE,
        "norm_num_groups": replace(_WIDTH, none=True),
        "num_attention_heads": (None,),
        "num_class_embeds": (None,),
        "only_cross_attention": _EITHER,
        "out_channels": _WIDTH,
        "projection_class_embeddings_input_dim": replace(_WIDTH, none=True),
        "resnet_out_scale_factor": _FACTOR,
        "resnet_skip_time_act": _EITHER,
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "reverse_transformer_layers_per_block": replace(_DEPTH, none=True),
        "sample_size": Numbers(1, 2048),
        "time_cond_proj_dim": (None,),
        "time_embedding_act_fn": (None,),
        "time_embedding_dim": replace(_WIDTH, none=True),
        "time_embedding_type": ("positional",),
        "timestep_post_act": (None, *_ACTIVATIONS),
        "transformer_layers_per_block": _DEPTH,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "upcast_attention": (None, *_EITHER),
        "use_linear_projection": _EITHER,
    },
    "vae": {
        "act_fn": _ACTIVATIONS,
        "block_out_channels": _BY_LEVEL,
        "down_block_types": ("DownEncoderBlock2D",),
        "force_upcast": (True, False),
        "in_channels": (3,),
        "latent_channels": _WIDTH,
        "latents_mean": _LATER,
        "latents_std": _LATER,
        "layers_per_block": Numbers(1, 8),
        "mid_block_add_attention": (True, False),
        "norm_num_groups": _WIDTH,
        "out_channels": (3,),
        "sample_size": Numbers(1, WIDEST, most=2),
        "scaling_factor": _LATER,
        "shift_factor": _LATER,
        "up_block_types": ("UpDecoderBlock2D",),
        "use_post_quant_conv": (True, False),
        "use_quant_conv": (True, False),
    },
    "control": {  # what shapes do not show; words are checked where shapes are
        "addition_embed_type_num_heads": _WIDTH,
        "addition_time_embed_dim": replace(_WIDTH, none=True),
        "attention_head_dim": replace(_BY_LEVEL, none=True),
        "conditioning_channel_order": ("rgb", "bgr"),
        "controlnet_conditioning_channel_order": ("rgb", "bgr"),
        "downsample_padding": Numbers(0, 8),
        "downscale_factor": Numbers(1, 64, none=True),
        "flip_sin_to_cos": (True, False),
        "freq_shift": Numbers(0, 8),
        "global_pool_conditions": (None, *_EITHER),
        "max_norm_num_groups": replace(_WIDTH, none=True),
        "mid_block_scale_factor": _FACTOR,
        "norm_eps": _SHARE,
        "norm_num_groups": replace(_WIDTH, none=True),
        "num_attention_heads": replace(_BY_LEVEL, none=True),
        "num_trans_head": replace(_WIDTH, none=True),
        "time_embedding_mix": _SHARE,
        "upcast_attention": (None, *_EITHER),
    },
    "text_encoder": _TEXT,
    "text_encoder_2": _TEXT,
    "captioner's text": _TEXT
    | {
        "attention_probs_dropout_prob": _SHARE,
        "encoder_hidden_size": _WIDTH,
        "hidden_act": _TEXT_ACTIVATIONS,
        "hidden_dropout_prob": _SHARE,
        "sep_token_id": _TOKEN,
    },
    "captioner's vision": {
        "attention_dropout": _SHARE,
        "hidden_act": _TEXT_ACTIVATIONS,
        "hidden_size": _WIDTH,
        "image_size": Numbers(1, 4096),
        "intermediate_size": Numbers(1, 4 * WIDEST),
        "layer_norm_eps": _SHARE,
        "num_attention_heads": Numbers(1, 1024),
        "num_hidden_layers": Numbers(1, 64),
        "patch_size": Numbers(1, 1024),
    },
    "captioner's pictures": {
        "do_convert_rgb": (None, True, False),
        "do_normalize": (True, False),
        "do_rescale": (True, False),
        "do_resize": (True, False),
        "image_mean": replace(_FACTOR, most=3),
        "image_std": replace(_FACTOR, most=3),
        "resample": Numbers(0, 5),
        "rescale_factor": _SHARE,
        "size": Numbers(1, 4096, most=2),
    },
    "scheduler": {
        "beta_end": _SHARE,
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
        "beta_start": _SHARE,
        "clip_sample": _EITHER,
        "clip_sample_range": _FACTOR,
        "dynamic_thresholding_ratio": _SHARE,
        "num_train_timesteps": Numbers(1, 10_000),
        "prediction_type": tuple(Diffusion.PREDICTIONS),
        "rescale_betas_zero_snr": _EITHER,
        "sample_max_value": _FACTOR,
        "set_alpha_to_one": (True, False),
        "sigma_max": (None,),
        "sigma_min": (None,),
        "steps_offset": Numbers(0, 10_000),
        "thresholding": _EITHER,
        "timestep_spacing": ("leading", "trailing", "linspace"),
        "timestep_type": (None, "discrete"),
        "trained_betas": replace(_SHARE, most=10_000, none=True),
        "use_flow_sigmas": (None, False),
    },
}
"""By part: the settings that its class is given, and what of them is followed: these values, or numbers of this range.

Settings that are not here are left out. A setting's first value is the class's own, where none is given.
"""
_MOST_TRANSFORMERS = 160
"""Layers of transformers in a U-Net, of SDXL 70: building each takes a while, even of nothing."""
LONGEST_CONFIG = 2**20
"""Bytes of a configuration."""
_ENTRY = "model.diffusion_model.input_blocks.0.0.weight"
_SIGNS = {
    "edm_mean": "the noise of EDM, as Playground v2.5 has it",
    "edm_vpred.sigma_max": "the noise of EDM, as CosXL has it",
    "model.diffusion_model.time_embed.cond_proj.weight": "the scale of guidance as an input, as LCM has it",
}
"""Tensors of single files by which models with other rules are known."""


def check_folder(folder: Path) -> tuple[str, dict[str, Any], dict[str, dict[str, Any]]]:
    """(the class of a pipeline's folder, its index, its parts' settings that are followed), by its texts alone.

    Raises ``Invalid`` where there is none, it cannot be read, a number is out of range or a link leads out of it,
    ``Unsupported`` where it has a rule that is not followed.
    """
    if not (folder / "model_index.json").is_file():
        raise Invalid(f"{folder} is no base: expected a diffusers pipeline folder (with a model_index.json).")
    index = read_config(folder, "model_index.json")
    kind = index.get("_class_name")
    if not (isinstance(kind, str) and _PIPELINES.fullmatch(kind)):
        raise Unsupported(
            f"{folder} holds a {one_line(kind)}; expected a StableDiffusionPipeline or a StableDiffusionXLPipeline, or "
            "one of their kinds for pictures (Img2Img, Inpaint, ControlNet)."
        )
    _check_classes(folder, index)
    configs = {
        part: read_settings(folder, part, part) if config_path(folder, part).is_file() else {} for part in _CLASSES
    }
    read, made = (configs["unet"].get(key, 4) for key in ("in_channels", "out_channels"))
    _check_channels(folder, read, configs["vae"].get("latent_channels", 4), made)
    return kind, index, configs


def config_path(folder: Path, part: str) -> Path:
    """The file with the configuration of a part."""
    return folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")


def read_settings(folder: Path, part: str, place: str) -> dict[str, Any]:
    """A part's settings that are followed, of its configuration in ``place`` within a folder; of a scheduler its class.

    Raises as ``known_settings`` and ``read_config`` do, and ``Unsupported`` for a class that is not followed.
    """
    config = read_config(folder, str(config_path(folder, place).relative_to(folder)))
    if config.get("model_type") == "clip" and isinstance(config.get("text_config"), dict):
        config = config["text_config"]  # of a whole CLIP, as transformers reads it
    _check_classes(folder, {part: [config["_class_name"]]} if "_class_name" in config else {})
    kept = {"_class_name": config["_class_name"]} if part == "scheduler" and "_class_name" in config else {}
    return kept | known_settings(folder, part, config)


def read_config(folder: Path, name: str, most: int = LONGEST_CONFIG) -> dict[str, Any]:
    """The keys and values of a configuration in a base's folder.

    Raises ``Invalid`` where it holds none, has more than ``most`` bytes or is a link out of the folder.
    """
    path = inside(folder, folder / name)
    content = read_json(path, most, finite=False)  # a number that is none is named by its key
    if not isinstance(content, dict):
        raise Invalid(f"{path} holds a {type(content).__name__}; expected keys and values, as diffusers writes them.")
    return content


def _check_classes(origin: object, index: Mapping[str, Any]) -> None:
    """Raise ``Unsupported`` for a pipeline's index that names a part whose class has other rules."""
    for part, known in _CLASSES.items():
        entry = index.get(part)
        name = str(entry[-1]) if isinstance(entry, list) and entry else None
        if name is not None and not re.fullmatch(known, name):
            expected = "one of Stable Diffusion's noise, as DDIM's" if part == "scheduler" else known.partition("(")[0]
            _refuse(origin, f"a {one_line(name)} as its {part}", expected)


def known_settings(origin: object, part: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A part's settings that are followed, and no others, of its configuration: what its class may be given.

    Raises ``Unsupported`` for a setting that changes what is computed and is not followed, ``Invalid`` for a number out
    of its range.
    """
    whole = part.partition("'")[0] if part.startswith(("captioner", "control")) else "base"
    for key, known in _FOLLOWED[part].items():
        if isinstance(known, Numbers):
            if key in config and not known.holds(config[key]):
                raise Invalid(
                    f"{origin} is not a whole {whole}: {key} of its {part} is {one_line(str(config[key])[:60])}; "
                    f"expected {known}."
                )
            continue
        value = config.get(key, known[0]) if known else ()
        several = isinstance(value, list | tuple)
        if several and len(value) > LEVELS:
            raise Invalid(f"{origin} is not a whole {whole}: its {part} has {key} of {len(value)} levels.")
        for one in value if several else [value]:
            if one not in known:
                expected = " or ".join("none" if word is None else str(word) for word in known)
                _refuse(origin, f"{key} {one_line(one)} in its {part}", expected)
    if part == "unet" and (total := _transformers(config)) > _MOST_TRANSFORMERS:
        raise Invalid(f"{origin} is not a whole base: its unet has some {total} transformers; SDXL's has 70.")
    return {key: config[key] for key in _FOLLOWED[part] if key in config}


def _transformers(config: Mapping[str, Any]) -> int:
    """How many layers of transformers a U-Net of these settings has, or a few more."""
    levels, layers = len(config.get("block_out_channels", "four")), config.get("layers_per_block", 2)
    total = 0
    for key in ("transformer_layers_per_block", "reverse_transformer_layers_per_block"):
        depths = config.get(key, int(key.startswith("transformer"))) or 0
        for i in range(levels):
            many, deep = ((value[i % len(value)] if isinstance(value, list) else value) for value in (layers, depths))
            total += (2 * many + 1) * (max(deep) if isinstance(deep, list) else deep)
    return total


def channels_read(shapes: Mapping[str, Sequence[int]]) -> int:
    """The channels that the U-Net of a single file reads: 4, those of latents, where it does not say."""
    return shapes[_ENTRY][1] if len(shapes.get(_ENTRY, ())) > 1 else 4


def check_signs(origin: object, shapes: Mapping[str, Sequence[int]], pooled: bool) -> None:
    """Raise ``Unsupported`` for a single file with tensors of another kind of model; ``pooled``: as SDXL has it."""
    _check_channels(origin, channels_read(shapes), 4)
    for name, meaning in _SIGNS.items():
        if name in shapes:
            _refuse(origin, f"{meaning} (it holds {name})", "a text-to-image base of Stable Diffusion's noise")
    if not pooled and "model.diffusion_model.label_emb.0.0.weight" in shapes:
        _refuse(origin, "an embedding beside the prompt (it holds label_emb), as unCLIP has it", "none")


def _check_channels(origin: object, read: Any, latents: Any, predicted: Any = None) -> None:
    """Raise ``Unsupported`` where a U-Net does not read and predict latents of the VAE's channels.

    It may read a mask and a masked picture's latents after them, as inpainting bases do.
    """
    if read not in (latents, 2 * latents + 1):
        raise Unsupported(
            f"{origin} reads {read} channels where its latents have {latents}: it is an editing model. Expected a "
            f"text-to-image base, or one for inpainting, which reads {2 * latents + 1}."
        )
    if predicted not in (None, latents):
        _refuse(origin, f"a prediction of {predicted} channels, with a variance", f"{latents}")


def check_text(origin: object, towers: list[Any], unet: Mapping[str, Any]) -> None:
    """Raise ``Mismatch`` where a U-Net reads other vectors than the text towers (transformers' modules) give."""
    width = sum(tower.config.hidden_size for tower in towers)
    if unet["cross_attention_dim"] != width:
        raise Mismatch(
            f"{origin} has text towers of {width} numbers a token, and its U-Net reads {unet['cross_attention_dim']}: "
            "its parts are of different bases."
        )
    if unet["addition_embed_type"] == "text_time":
        pooled = towers[-1].config.projection_dim + 6 * unet["addition_time_embed_dim"]
        if unet["projection_class_embeddings_input_dim"] != pooled:
            _refuse(
                origin,
                f"{unet['projection_class_embeddings_input_dim']} numbers beside the time, as a refiner may have",
                f"{pooled}: the pooled prompt and six sizes",
            )


def check_words(origin: object, tokenizer: Any, encoder: Any) -> None:
    """Raise ``Mismatch`` where a tokenizer has words, or prompts a length, that a text tower has no vectors for."""
    words, rows = max(tokenizer.get_vocab().values()) + 1, encoder.config.vocab_size
    window, places = tokenizer.model_max_length, encoder.config.max_position_embeddings
    if words > rows or window > places:
        raise Mismatch(
            f"{origin} has a tokenizer of {words} words and prompts of {window}, and a text tower that knows {rows} "
            f"words and {places} places: its parts are of different bases."
        )


def ddim_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a ``DDIMScheduler`` with the noise of a scheduler's that ``check_folder`` passed.

    What it leaves out is as its own class has it, but that latents are never clipped as if they were pixels.
    """
    import diffusers

    own = inspect.signature(getattr(diffusers, config.get("_class_name", "DDIMScheduler")).__init__).parameters
    known = inspect.signature(diffusers.DDIMScheduler.__init__).parameters.keys() - {"self"}
    usual = {key: own[key].default for key in known if key in own} | {"clip_sample": False}
    return usual | {key: value for key, value in config.items() if key in known}


def latent_space(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a VAE by which its latents become a U-Net's; ``Invalid`` where they are no such numbers."""
    found = {key: config.get(key) for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")}
    for key, value in found.items():
        many, divides = key.startswith("latents"), key in ("scaling_factor", "latents_std")
        numbers: list[Any] = list(value) if many and isinstance(value, list | tuple) else [value]
        finite = all(type(one) in (int, float) and math.isfinite(one) and (one or not divides) for one in numbers)
        if value is None and key != "scaling_factor":
            continue
        if not finite or len(numbers) != (config["latent_channels"] if many else 1):
            raise Invalid(
                f"The VAE's {key} is {value!r:.80}; expected {'numbers, one a channel' if many else 'a number'}."
            )
    return found


def _refuse(origin: object, what: str, expected: str) -> None:
    raise Unsupported(
        f"{origin} has {what}: a rule that is not followed here, and its pictures would be wrong. Expected {expected}."
    )
