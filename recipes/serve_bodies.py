"""Calls as five programs send them to a server of A1111's API, or of OpenAI's, written down from their sources."""

from typing import Any

Call = tuple[str, str, Any]
"""Method, path, body."""


def programs(picture: str, steps: int = 6) -> dict[str, list[Call]]:
    """Each program's calls, in its order; ``picture``: base64 of a PNG. Steps and sizes alone are smaller."""
    return {
        "SillyTavern": _silly_tavern(steps),
        "Open WebUI (automatic1111)": _open_webui(steps),
        "Open WebUI (openai)": [("POST", "/v1/images/generations", {
            "model": "mini", "prompt": "a lighthouse", "n": 1, "size": "128x128", "response_format": "b64_json"})],
        "Auto-Photoshop": _auto_photoshop(picture, steps),
        "LibreChat": [("POST", "/sdapi/v1/txt2img", {
            "prompt": "a lighthouse", "negative_prompt": "blurry, text", "cfg_scale": 4.5, "steps": steps,
            "width": 128, "height": 128})],
        "text-generation-webui": _text_generation_webui(steps),
    }  # fmt: skip


def _silly_tavern(steps: int) -> list[Call]:
    """Its whole request, ``url`` and ``auth`` included, goes on to the server."""
    body = {
        "url": "http://localhost:7860", "auth": "", "prompt": "best quality, a lighthouse", "negative_prompt": "lowres",
        "sampler_name": "Euler a", "scheduler": "Karras", "steps": steps, "cfg_scale": 7, "width": 128, "height": 128,
        "restore_faces": False, "enable_hr": False, "hr_upscaler": "Latent", "hr_scale": 1.0,
        "hr_additional_modules": [],
        "denoising_strength": 0.7, "hr_second_pass_steps": 0, "seed": None, "clip_skip": 1, "save_images": True,
        "send_images": True, "do_not_save_grid": False, "do_not_save_samples": False,
        "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic", "forge_additional_modules": []},
        "override_settings_restore_afterwards": True,
    }  # fmt: skip
    lists = ("options", "upscalers", "latent-upscale-modes", "sd-vae", "samplers", "schedulers", "sd-models")
    asked: list[Call] = [("GET", f"/sdapi/v1/{name}", None) for name in lists]
    chosen: Call = ("POST", "/sdapi/v1/options", {"sd_model_checkpoint": "mini"})
    seen: Call = ("GET", "/sdapi/v1/progress", None)
    return [*asked, chosen, seen, ("POST", "/sdapi/v1/txt2img", body), ("POST", "/sdapi/v1/interrupt", {})]


def _open_webui(steps: int) -> list[Call]:
    """It sends back all options that it was given, with others that it knows."""
    options = {
        "sd_model_checkpoint": "mini", "samples_save": True, "samples_format": "png", "grid_save": True,
        "jpeg_quality": 80,
        "upscaler_for_img2img": None, "face_restoration": False, "CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic",
    }  # fmt: skip
    body = {
        "prompt": "a lighthouse",
        "batch_size": 1,
        "width": 128,
        "height": 128,
        "steps": steps,
        "negative_prompt": "",
    }
    return [
        ("GET", "/sdapi/v1/options", None),
        ("POST", "/sdapi/v1/options", options),
        ("GET", "/sdapi/v1/sd-models", None),
        ("POST", "/sdapi/v1/txt2img", {**body, "cfg_scale": 7, "sampler_name": "DPM++ 2M", "scheduler": "Karras"}),
    ]


def _auto_photoshop(picture: str, steps: int) -> list[Call]:
    """All settings of the plugin at the top, units in their old and their new form, those that are off included."""
    unit = {
        "enabled": True, "input_image": picture, "mask": "", "module": "canny", "model": "canny", "weight": 1.0,
        "resize_mode": "Scale to Fit (Inner Fit)", "lowvram": True, "processor_res": 512, "threshold_a": 100,
        "threshold_b": 200, "guidance_start": 0, "guidance_end": 1, "guessmode": False, "control_mode": 0,
        "pixel_perfect": False,
    }  # fmt: skip
    off = {**unit, "enabled": False, "module": "openpose_full", "model": "none at all", "input_image": ""}
    body = {
        "prompt": "a lighthouse", "negative_prompt": "", "steps": steps, "n_iter": 1, "batch_size": 1, "cfg_scale": 7.0,
        "width": 128, "height": 128, "sampler_index": "Euler a", "seed": "-1", "denoising_strength": 0.7,
        "use_prompt_shortcut": True, "prompt_shortcut_ui_dict": {}, "selection_info": {"left": 0, "width": 512},
        "is_inpaint": False, "mode": "txt2img", "uniqueDocumentId": "x", "backend_type": "auto1111", "unit_number": 1,
        "controlnet_units": [unit, off], "restore_faces": "false", "hr_scale": "2", "enable_hr": False,
        "alwayson_scripts": {"controlnet": {"args": [unit, off]}},
    }  # fmt: skip
    lists = ("/controlnet/module_list?alias_names=true", "/controlnet/model_list", "/controlnet/settings",
             "/sdapi/v1/progress?skip_current_image=false")  # fmt: skip
    asked: list[Call] = [("GET", path, None) for path in lists]
    changed = {**body, "init_images": [picture], "mask": picture, "inpainting_fill": 1, "inpaint_full_res": False,
               "mask_expansion": 0, "mask_blur": 4, "alwayson_scripts": {"controlnet": {"args": [off]}}}  # fmt: skip
    return [*asked, ("POST", "/sdapi/v1/txt2img", body), ("POST", "/sdapi/v1/img2img", changed)]


def _text_generation_webui(steps: int) -> list[Call]:
    """Numbers as texts, an upscaler that nobody asks for, and checkpoints unloaded by an empty text."""
    body = {
        "prompt": "a lighthouse", "seed": -1, "sampler_name": "DPM++ 2M", "enable_hr": False, "hr_scale": "1.0",
        "hr_upscaler": "ESRGAN_4x", "denoising_strength": "0.55", "steps": str(steps), "cfg_scale": "7", "width": "128",
        "height": "128", "restore_faces": False, "override_settings_restore_afterwards": True, "negative_prompt": "",
    }  # fmt: skip
    return [
        ("GET", "/sdapi/v1/sd-models", None),
        ("POST", "/sdapi/v1/unload-checkpoint", ""),
        ("POST", "/sdapi/v1/reload-checkpoint", ""),
        ("POST", "/sdapi/v1/txt2img", body),
    ]
