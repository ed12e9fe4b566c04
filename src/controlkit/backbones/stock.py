"""diffusers' own pipelines on a base's networks: the peer that ours is measured beside."""

from typing import Any

import torch
from torch import Tensor

from controlkit.backbones.unet import UNetBase


def stock_pipeline(base: UNetBase, controlnet: Any) -> Any:
    """diffusers' ControlNet pipeline for a base and a ``ControlNetModel``, without copies of the weights."""
    import diffusers

    first, *more = base.towers
    parts: dict[str, Any] = {"vae": base.vae, "unet": base.unet, "scheduler": base.scheduler, "controlnet": controlnet}
    parts |= {"text_encoder": first.encoder, "tokenizer": first.tokenizer}
    if more:
        parts |= {"text_encoder_2": more[0].encoder, "tokenizer_2": more[0].tokenizer}
        pipeline = diffusers.StableDiffusionXLControlNetPipeline(**parts, add_watermarker=False)
    else:
        nothing: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
        pipeline = diffusers.StableDiffusionControlNetPipeline(**parts, **nothing, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def stock_decode(pipeline: Any, latents: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] of latents (B, C, h, w), as a pipeline decodes them."""
    return pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
