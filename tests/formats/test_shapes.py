"""The shapes that a configuration means are those of the network that diffusers builds of it."""

import pytest
import torch
from diffusers import ControlNetModel, ControlNetUnionModel, T2IAdapter

from controlkit.backbones.unet_families import FAMILIES, unet_config
from controlkit.controls.xs import xs_network, xs_settings
from controlkit.formats.shapes import expected_shapes

HINT = {"conditioning_embedding_out_channels": [16, 32, 96, 256], "conditioning_channels": 3}
UNION = {"num_control_type": 8, "num_trans_channel": 320, "num_proj_channel": 320, "addition_time_embed_dim": 256}
SLIM = {
    "down_block_types": ["DownBlock2D"] * 3,
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, 1, 1],
}


def family(name, **changes):
    left_out = ("sample_size", "out_channels", "up_block_types")
    config = {key: value for key, value in unet_config(FAMILIES[name]).items() if key not in left_out}
    return config | HINT | changes


def walker(name, **changes):
    return xs_settings({"norm_num_groups": 32} | unet_config(FAMILIES[name]) | changes, 8) | {
        "learn_time_embedding": changes.get("learnt", False)
    }


def adapter(kind, channels=(320, 640, 1280, 1280), layers=2, factor=8):
    sizes = {"in_channels": 3, "channels": list(channels), "num_res_blocks": layers, "downscale_factor": factor}
    return sizes | {"adapter_type": kind}


CONFIGS = {
    **{f"ControlNet, {name}": ("controlnet", family(name)) for name in FAMILIES},
    "ControlNet, one layer": ("controlnet", family("sd15", layers_per_block=1, conditioning_channels=5)),
    "ControlNet, two blocks of a hint": (
        "controlnet",
        family("sd21", conditioning_embedding_out_channels=[16, 32], num_attention_heads=[5, 10, 20, 20]),
    ),
    "ControlNet, SDXL small": ("controlnet", family("sdxl", **SLIM)),
    **{f"Union, {name}": ("union", family(name, **UNION)) for name in FAMILIES},
    "Union of two layers": ("union", family("sd15", **UNION | {"num_trans_layer": 2, "num_control_type": 6})),
    **{f"XS, {name}": ("xs", walker(name)) for name in FAMILIES},
    "XS, one layer": ("xs", walker("sd15", layers_per_block=1, in_channels=8)),
    "XS, with a time of its own": ("xs", walker("sdxl", learnt=True)),
    "adapter, full": ("adapter", adapter("full_adapter")),
    "adapter, light": ("adapter", adapter("light_adapter", (320, 640, 1280), 4)),
    "adapter, SDXL": ("adapter", adapter("full_adapter_xl", factor=16)),
    "adapter, one layer": ("adapter", adapter("full_adapter", (8, 16), 1, 4)),
}


def built(kind, config):
    with torch.device("meta"):
        if kind == "xs":
            network = xs_network(config)
        else:
            classes = {"controlnet": ControlNetModel, "union": ControlNetUnionModel, "adapter": T2IAdapter}
            network = classes[kind](**config)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(("kind", "config"), CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_means_the_network_that_diffusers_builds_of_it(kind, config):
    assert expected_shapes(kind, config) == built(kind, config)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("controlnet", {"norm_num_groups": 7}),
        ("controlnet", {"attention_head_dim": [8, 8]}),
        ("controlnet", {"down_block_types": ["DownBlock2D"]}),
        ("union", UNION | {"num_trans_head": 7}),
        ("union", UNION | {"num_trans_channel": "many"}),
    ],
)
def test_settings_that_do_not_go_together_mean_no_network_here_and_there(kind, changes):
    config = family("sd15") | changes
    assert expected_shapes(kind, config) == {}
    with pytest.raises((ValueError, TypeError, IndexError, AssertionError, ZeroDivisionError, KeyError)):
        built(kind, config)
