"""The rules of a base that are followed here: a base with any other is refused by name, and not drawn wrongly.

A diffusers folder names the classes of its parts and their settings; a single file shows some by tensors of their own.
"""

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from controlkit.backbones.noise import Diffusion
from controlkit.errors import Invalid, Mismatch, Unsupported, one_line
from controlkit.files import parse_json, read_text

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
_FOLLOWED: dict[str, dict[str, tuple[Any, ...]]] = {
    "unet": {
        "addition_embed_type": (None, "text_time"),
        "center_input_sample": (None, False),
        "class_embed_type": (None,),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "dual_cross_attention": (None, False),
        "encoder_hid_dim_type": (None,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
        "num_class_embeds": (None,),
        "time_cond_proj_dim": (None,),
        "time_embedding_act_fn": (None,),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "vae": {"in_channels": (3,), "out_channels": (3,)},
    "scheduler": {
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
        "prediction_type": tuple(Diffusion.PREDICTIONS),
        "sigma_max": (None,),
        "sigma_min": (None,),
        "timestep_type": (None, "discrete"),
        "use_flow_sigmas": (None, False),
    },
}
"""By part: settings that change what is computed, and the values of them that are followed."""
_ENTRY = "model.diffusion_model.input_blocks.0.0.weight"
_SIGNS = {
    "edm_mean": "the noise of EDM, as Playground v2.5 has it",
    "edm_vpred.sigma_max": "the noise of EDM, as CosXL has it",
    "model.diffusion_model.time_embed.cond_proj.weight": "the scale of guidance as an input, as LCM has it",
}
"""Tensors of single files by which models with other rules are known."""


def check_folder(folder: Path) -> tuple[str, dict[str, Any]]:
    """(the class of a pipeline's folder, its index), by its texts alone.

    Raises ``Invalid`` where there is none or it cannot be read, ``Unsupported`` where it has a rule that is not
    followed.
    """
    if not (folder / "model_index.json").is_file():
        raise Invalid(f"{folder} is no base: expected a diffusers pipeline folder (with a model_index.json).")
    index = read_config(folder / "model_index.json")
    kind = index.get("_class_name")
    if not (isinstance(kind, str) and _PIPELINES.fullmatch(kind)):
        raise Unsupported(
            f"{folder} holds a {one_line(kind)}; expected a StableDiffusionPipeline or a StableDiffusionXLPipeline, or "
            "one of their kinds for pictures (Img2Img, Inpaint, ControlNet)."
        )
    _check_classes(folder, index)
    configs: dict[str, dict[str, Any]] = {}
    for part in _FOLLOWED:
        path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        config = configs[part] = read_config(path) if path.is_file() else {}
        _check_classes(folder, {part: [config["_class_name"]]} if "_class_name" in config else {})
        _check_settings(folder, part, config)
    read, made = (configs["unet"].get(key, 4) for key in ("in_channels", "out_channels"))
    _check_channels(folder, read, configs["vae"].get("latent_channels", 4), made)
    return kind, index


def read_config(path: Path) -> dict[str, Any]:
    """The keys and values of a configuration in a diffusers folder; ``Invalid`` where it holds none."""
    content = parse_json(read_text(path), str(path))
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


def _check_settings(origin: object, part: str, config: Mapping[str, Any]) -> None:
    """Raise ``Unsupported`` for a part's configuration with a setting that is not followed."""
    for key, known in _FOLLOWED[part].items():
        value = config.get(key, known[0])
        for one in value if isinstance(value, list | tuple) else [value]:
            if one not in known:
                expected = " or ".join("none" if word is None else str(word) for word in known)
                _refuse(origin, f"{key} {one_line(one)} in its {part}", expected)


def check_signs(origin: object, shapes: Mapping[str, Sequence[int]], pooled: bool) -> None:
    """Raise ``Unsupported`` for a single file with tensors of another kind of model; ``pooled``: as SDXL has it."""
    _check_channels(origin, shapes[_ENTRY][1] if len(shapes.get(_ENTRY, ())) > 1 else 4, 4)
    for name, meaning in _SIGNS.items():
        if name in shapes:
            _refuse(origin, f"{meaning} (it holds {name})", "a text-to-image base of Stable Diffusion's noise")
    if not pooled and "model.diffusion_model.label_emb.0.0.weight" in shapes:
        _refuse(origin, "an embedding beside the prompt (it holds label_emb), as unCLIP has it", "none")


def _check_channels(origin: object, read: Any, latents: Any, predicted: Any = None) -> None:
    """Raise ``Unsupported`` where a U-Net does not read and predict latents of the VAE's channels."""
    if read != latents:
        raise Unsupported(
            f"{origin} reads {read} channels where its latents have {latents}: it is an inpainting or editing model. "
            "Expected a text-to-image base."
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


def ddim_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a ``DDIMScheduler`` with the noise of a scheduler's that ``check_folder`` passed.

    What it leaves out is as its own class has it, but that latents are never clipped as if they were pixels.
    """
    import diffusers

    own = inspect.signature(getattr(diffusers, config.get("_class_name", "DDIMScheduler")).__init__).parameters
    known = inspect.signature(diffusers.DDIMScheduler.__init__).parameters.keys() - {"self"}
    return {key: own[key].default for key in known if key in own} | {"clip_sample": False} | dict(config)


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
