"""diffusers' own pipelines on a base's networks: the peer that ours is measured beside."""

from typing import Any

import torch
from torch import Tensor

from controlkit.backbones.unet import UNetBase

_PIPELINES = {  # how many text towers; the class of what controls -> the pipeline's class, and its name for that part
    (1, ""): ("StableDiffusionPipeline", ""),
    (2, ""): ("StableDiffusionXLPipeline", ""),
    (1, "ControlNetModel"): ("StableDiffusionControlNetPipeline", "controlnet"),
    (2, "ControlNetModel"): ("StableDiffusionXLControlNetPipeline", "controlnet"),
    (2, "ControlNetUnionModel"): ("StableDiffusionXLControlNetUnionPipeline", "controlnet"),
    (1, "T2IAdapter"): ("StableDiffusionAdapterPipeline", "adapter"),
    (2, "T2IAdapter"): ("StableDiffusionXLAdapterPipeline", "adapter"),
}


def stock_pipeline(base: UNetBase, control: Any = None) -> Any:
    """diffusers' pipeline for a base and a network of diffusers that controls it, without copies of the weights.

    ``control``: a ``ControlNetModel``, a ``ControlNetUnionModel``, a ``T2IAdapter``, or None. ``KeyError`` where
    diffusers has no pipeline of the two.
    """
    import diffusers

    first, *more = base.towers
    kind = "" if control is None else type(control).__name__
    pipeline_name, part = _PIPELINES[len(base.towers), kind]
    parts: dict[str, Any] = {"vae": base.vae, "unet": base.unet, "scheduler": base.scheduler}
    parts |= {"text_encoder": first.encoder, "tokenizer": first.tokenizer}
    if part:
        parts[part] = control
    if more:
        parts |= {"text_encoder_2": more[0].encoder, "tokenizer_2": more[0].tokenizer}
        if "Adapter" not in pipeline_name:
            parts["add_watermarker"] = False
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = getattr(diffusers, pipeline_name)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def stock_decode(pipeline: Any, latents: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] of latents (B, C, h, w), as a pipeline decodes them."""
    return pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
