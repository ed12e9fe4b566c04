"""Full-size bases of random weights: for measuring time and memory where there are no real ones."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from controlkit.backbones.text import TextTower
from controlkit.backbones.unet import UNetBase
from controlkit.backbones.unet_families import FAMILIES, clip_tokenizer, part_configs, scheduler_config


def random_base(name: str, dtype: torch.dtype, device: str = "cpu") -> UNetBase:
    """A base of a family with small random weights, which are never held in another type.

    ``device``: on ``meta`` it has shapes alone, and no weights.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    family = FAMILIES[name]
    configs = part_configs(family)
    wide = len(family.towers) > 1
    vae = drawn(lambda: AutoencoderKL(**configs["vae"]), dtype, device)
    unet = drawn(lambda: UNet2DConditionModel(**configs["unet"]), dtype, device)
    towers = []
    for part, row in zip(("text_encoder", "text_encoder_2"), family.towers, strict=False):
        kind = CLIPTextModelWithProjection if row[-1] else CLIPTextModel
        config = CLIPTextConfig(**configs[part])
        encoder = drawn(partial(kind, config), dtype, device)
        towers.append(TextTower(clip_tokenizer("!" if wide else "<|endoftext|>"), encoder, wide))
    return UNetBase(name, vae, towers, unet, DDIMScheduler(**scheduler_config(family.prediction)), wide)


@torch.no_grad()
def drawn(make: Callable[[], nn.Module], dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """A network made without memory, then drawn layer by layer in its type; but on ``meta``, where nothing is drawn."""
    with torch.device("meta"):
        network = make()
    nn.Module.to(network, dtype)
    if device == "meta":
        return network.eval()
    network.to_empty(device=device)
    draw(network)
    modules: list[Any] = [*network.modules()]
    for module in modules:  # positions, which no file has either
        if isinstance(getattr(module, "position_ids", None), Tensor):
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
    return network.eval()


@torch.no_grad()
def draw(network: nn.Module) -> None:
    """Draw a network's weights anew, so that each layer's output is about as spread as its input."""
    for name, value in network.named_parameters():
        if value.ndim > 1:
            value.uniform_(-1 / value[0].numel() ** 0.5, 1 / value[0].numel() ** 0.5)
        else:
            value.fill_(float("norm" in name and name.endswith("weight")))
