"""A1111's txt2img and img2img, as orders of pictures: every field that is read, and the names of those that are not."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from controlkit.errors import Invalid, NotFound, nearest, one_line
from controlkit.prompts import without_loras
from controlkit.sample.request import RESIZES, EditRequest, HiresRequest, Request
from controlkit.serve import incoming
from controlkit.serve.catalogue import Catalogue, check_limits
from controlkit.serve.loras import check_loras
from controlkit.serve.orders import Pictures, drawn_seed
from controlkit.serve.settings import Limits
from controlkit.serve.units import Units

DEFAULTS: dict[str, Any] = {
    "prompt": "", "negative_prompt": "", "styles": None, "seed": -1, "subseed": -1, "subseed_strength": 0,
    "seed_resize_from_h": -1, "seed_resize_from_w": -1, "sampler_name": None, "sampler_index": None, "scheduler": None,
    "batch_size": 1, "n_iter": 1, "steps": 50, "cfg_scale": 7.0, "distilled_cfg_scale": None, "width": None,
    "height": None, "restore_faces": None, "tiling": None, "do_not_save_samples": False, "do_not_save_grid": False,
    "eta": None, "denoising_strength": None, "s_min_uncond": None, "s_churn": None, "s_tmax": None, "s_tmin": None,
    "s_noise": None, "override_settings": None, "override_settings_restore_afterwards": True,
    "refiner_checkpoint": None, "refiner_switch_at": None, "disable_extra_networks": False, "firstpass_image": None,
    "comments": None, "force_task_id": None, "infotext": None, "script_name": None, "script_args": [],
    "send_images": True, "save_images": False, "alwayson_scripts": {},
}  # fmt: skip
"""Fields of both routes, with A1111's defaults; of a missing size the base's own is taken."""
TEXT_ONLY: dict[str, Any] = {
    "enable_hr": False, "firstphase_width": 0, "firstphase_height": 0, "hr_scale": 2.0, "hr_upscaler": None,
    "hr_second_pass_steps": 0, "hr_resize_x": 0, "hr_resize_y": 0, "hr_checkpoint_name": None, "hr_sampler_name": None,
    "hr_scheduler": None, "hr_prompt": "", "hr_negative_prompt": "", "hr_cfg": None, "hr_distilled_cfg": None,
    "hr_additional_modules": None,
}  # fmt: skip
IMAGE_ONLY: dict[str, Any] = {
    "init_images": None, "resize_mode": 0, "image_cfg_scale": None, "mask": None, "mask_blur_x": 4, "mask_blur_y": 4,
    "mask_blur": None, "mask_round": True, "inpainting_fill": 0, "inpaint_full_res": True,
    "inpaint_full_res_padding": 0, "inpainting_mask_invert": 0, "initial_noise_multiplier": None, "latent_mask": None,
    "include_init_images": False,
}  # fmt: skip
_MEANINGLESS = (
    "styles", "restore_faces", "tiling", "eta", "s_min_uncond", "s_churn", "s_tmax", "s_tmin", "s_noise",
    "refiner_checkpoint", "firstpass_image", "seed_resize_from_h", "seed_resize_from_w", "distilled_cfg_scale",
    "infotext", "hr_checkpoint_name", "hr_sampler_name", "hr_scheduler", "hr_prompt", "hr_negative_prompt", "hr_cfg",
    "hr_distilled_cfg", "image_cfg_scale", "initial_noise_multiplier", "latent_mask", "include_init_images",
    "save_images", "comments",
)  # fmt: skip
"""Fields of A1111's that change nothing here; named where they are given a value of their own."""
UPSCALERS = ("None", "Bicubic")
SCRIPTS = ("controlnet", "controlnet m2m")
"""The second is listed as clients ask for it before they send units (webuiapi); it cannot be run."""
_KNOWN_SETTINGS = ("sd_model_checkpoint", "CLIP_stop_at_last_layers", "sd_vae")


@dataclass
class Asked:
    """A request as it was read."""

    order: Pictures
    ignored: list[str] = field(default_factory=list)
    """Fields that nothing reads, and notes."""
    fields: dict[str, Any] = field(default_factory=dict)
    """All of A1111's fields, with the values that were taken."""
    send: bool = True
    """Whether the pictures are to be sent back."""


def read(
    body: Mapping[str, Any], is_edit: bool, catalogue: Catalogue, limits: Limits, options: Mapping[str, Any]
) -> Asked:
    """The order of a body; ``options``: the server's settings that such a request may override.

    Raises ``Invalid`` for what is out of range and for unknown scripts, modules, models and samplers; ``NotFound``
    where there is no picture to be changed.
    """
    known = DEFAULTS | (IMAGE_ONLY if is_edit else TEXT_ONLY)
    ignored = [str(key) for key in body if key not in known]
    taken = {key: value if (value := body.get(key)) is not None else default for key, default in known.items()}
    ignored += [
        key for key in _MEANINGLESS if key in known and body.get(key) not in (None, known[key], "", [], {}, 0, False)
    ]
    settings = _settings(body, catalogue, ignored)
    scripts = _scripts(body)
    edit = _edit(body, limits) if is_edit else None
    hires = None if is_edit else _hires(body, catalogue, limits, ignored)
    units = Units(catalogue, limits, has_picture=edit is not None, has_second=hires is not None)
    controls = units.controls(scripts)
    sampler = incoming.text(body, "sampler_name") or incoming.text(body, "sampler_index")
    scheduler, note = catalogue.steps_by(sampler, incoming.text(body, "scheduler"))
    ignored += [note] if note else []
    size = _size(body, edit, catalogue)
    steps = incoming.whole(body, "steps", DEFAULTS["steps"], 1, limits.steps)
    count = incoming.whole(body, "batch_size", 1, 1, limits.count) * incoming.whole(body, "n_iter", 1, 1, limits.count)
    factor = hires.factor if hires else 1
    prompt, negative = _prompts(body, catalogue, limits, ignored)
    width, height = (round(side * factor) for side in size or (1, 1))
    check_limits(limits, width, height, max(steps, (hires and hires.steps) or 1), count)
    request = Request(
        prompt=prompt,
        negative_prompt=negative,
        dialect="a1111",
        clip_skip=settings.get("clip_skip") or options.get("clip_skip"),
        size=(size[1], size[0]) if size else None,
        steps=steps,
        guidance=incoming.number(body, "cfg_scale", DEFAULTS["cfg_scale"], 0, 1000),
        scheduler=scheduler,
        controls=tuple(controls),
        edit=edit,
        hires=hires,
        variation=incoming.number(body, "subseed_strength", 0, 0, 1),
    )
    order = Pictures(request=request, seeds=_seeds(body, count, request.variation), shows_hints=True, takes_parts=True)
    return Asked(order, [*ignored, *units.notes], taken, incoming.truth(body, "send_images", True))


def _prompts(body: Mapping[str, Any], catalogue: Catalogue, limits: Limits, ignored: list[str]) -> tuple[str, str]:
    """The prompt, with the names of LoRAs unless they are switched off, and the negative prompt, where none counts."""
    words, negative = incoming.text(body, "prompt"), incoming.text(body, "negative_prompt")
    if incoming.truth(body, "disable_extra_networks", False):
        words = without_loras(words)[0]
    check_loras(without_loras(words)[1], catalogue.loras, limits.loras)
    plain, loras = without_loras(negative)
    ignored += [f"negative_prompt: the LoRA {one_line(name)}, which counts in the prompt alone" for name, _ in loras]
    return words, plain


def _seeds(body: Mapping[str, Any], count: int, variation: float) -> tuple[tuple[int, int], ...]:
    """Of each picture its seed and that of its variation, counted on as A1111 does."""
    seed, other = (incoming.whole(body, key, -1, -1, 2**64 - 1) for key in ("seed", "subseed"))
    seed, other = (drawn_seed() if one == -1 else one for one in (seed, other))
    return tuple(((seed + (0 if variation else i)) % 2**64, (other + i) % 2**64) for i in range(count))


def _settings(body: Mapping[str, Any], catalogue: Catalogue, ignored: list[str]) -> dict[str, Any]:
    """Settings of the server that a request overrides for itself."""
    given = body.get("override_settings") or {}
    if not isinstance(given, Mapping):
        raise Invalid(f"override_settings is {incoming.kind_of(given)}; expected keys and values.")
    ignored += [f"override_settings.{key}" for key in given if key not in _KNOWN_SETTINGS]
    catalogue.check_base(incoming.text(given, "sd_model_checkpoint"))
    return {"clip_skip": clip_skip(given)}


def clip_skip(settings: Mapping[str, Any]) -> int | None:
    """A1111's setting of the text encoder's last layer; None where it is not given. 1, the last, is the base's own."""
    layers = incoming.whole(settings, "CLIP_stop_at_last_layers", 0, 0, 12)
    return layers if layers > 1 else None


def _scripts(body: Mapping[str, Any]) -> list[Any]:
    """The control units; ``Invalid`` for scripts that are not known."""
    if name := incoming.text(body, "script_name").strip():
        raise Invalid(f'Script "{one_line(name)}" not found: none can be run by itself here; leave script_name out.')
    given = body.get("alwayson_scripts") or {}
    if not isinstance(given, Mapping):
        raise Invalid(f"alwayson_scripts is {incoming.kind_of(given)}; expected keys and values.")
    found: list[Any] = []
    for name, script in given.items():
        if str(name).strip().lower() != "controlnet":
            raise Invalid(f'Script "{one_line(name)}" not found: {nearest(str(name).lower(), SCRIPTS[:1])}')
        args = script.get("args", []) if isinstance(script, Mapping) else script
        if not isinstance(args, list):
            raise Invalid(f"The args of {one_line(name)} are {incoming.kind_of(args)}; expected a list of units.")
        found += args
    return found


def _size(body: Mapping[str, Any], edit: EditRequest | None, catalogue: Catalogue) -> tuple[int, int] | None:
    """(width, height) that the base can make, rounded down as A1111 does; None where it is left to the picture."""
    own = int(catalogue.facts["size"])
    given = [incoming.whole(body, key, 0, 0, 1 << 16) for key in ("width", "height")]
    if edit is not None and not any(given):
        return None
    width, height = (catalogue.floored(side or own) for side in given)
    return width, height


def _edit(body: Mapping[str, Any], limits: Limits) -> EditRequest:
    given = incoming.listed(body, "init_images", limits.pictures_given)
    if not given or not given[0]:
        raise NotFound("Init image not found: send one in init_images, as base64.")
    pixels = incoming.picture(given[0], "init_images[0]", limits)
    mode = incoming.whole(body, "resize_mode", 0, 0, 3)
    values: dict[str, Any] = {"image": pixels, "resize": RESIZES[mode] if mode < 3 else "stretch"}
    values["strength"] = incoming.number(body, "denoising_strength", 0.75, 0, 1)
    if mask := body.get("mask"):
        anew = incoming.picture(mask, "mask", limits, "black")
        anew = 255 - anew if incoming.truth(body, "inpainting_mask_invert", False) else anew
        values["mask"] = np.ascontiguousarray(anew)
        blur = incoming.whole(body, "mask_blur", incoming.whole(body, "mask_blur_x", 4, 0, 256), 0, 256)
        values["blur"], values["fill"] = blur, incoming.whole(body, "inpainting_fill", 0, 0, 3) == 0
        if incoming.truth(body, "inpaint_full_res", True):
            values["margin"] = incoming.whole(body, "inpaint_full_res_padding", 0, 0, 4096)
    return EditRequest(**values)


def _hires(body: Mapping[str, Any], catalogue: Catalogue, limits: Limits, ignored: list[str]) -> HiresRequest | None:
    """The second pass, where ``enable_hr`` asks for one; nothing of it is read otherwise."""
    if not incoming.truth(body, "enable_hr", False):
        return None
    upscaler = incoming.text(body, "hr_upscaler") or "Latent"
    if re.match(r"latent\b", upscaler, re.IGNORECASE):
        ignored.append(f"hr_upscaler: {one_line(upscaler)} is made as Bicubic")
    elif upscaler.lower() not in [name.lower() for name in UPSCALERS]:
        raise Invalid(f'There is no upscaler "{one_line(upscaler)}": {nearest(upscaler, UPSCALERS)}')
    factor = incoming.number(body, "hr_scale", 2.0, 1, 8)
    wanted = [incoming.whole(body, key, 0, 0, 1 << 16) for key in ("hr_resize_x", "hr_resize_y")]
    if any(wanted):
        sides = [
            incoming.whole(body, key, 0, 0, 1 << 16) or int(catalogue.facts["size"]) for key in ("width", "height")
        ]
        factor = max(side / own for side, own in zip(wanted, sides, strict=True))
    if not 1 < factor <= 8:
        if factor == 1:
            return None
        raise Invalid(f"The second pass is {factor:g} times as large; expected over 1 to 8.")
    steps = incoming.whole(body, "hr_second_pass_steps", 0, 0, limits.steps)
    strength = incoming.number(body, "denoising_strength", 0.7, 0, 1)
    return HiresRequest(factor=factor, strength=strength, steps=steps or None)
