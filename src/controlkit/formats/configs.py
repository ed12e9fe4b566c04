"""Diffusers configurations read off the shapes of a file's tensors.

Shapes do not tell everything: heads, normalisation groups and the like come from the configuration stored with the
weights, else they are as the family has them.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from controlkit.backbones.unet_families import FAMILIES, Family, family_of_width
from controlkit.formats.names import EncoderShape, is_light_adapter
from controlkit.tensors import Shape

Shapes = Mapping[str, Shape]

_WIDEST, _MOST_LEVELS, _MOST_HINT_BLOCKS = 2**14, 8, 16
_MOST_TRANSFORMERS = 128  # SDXL has 34; each takes a while to build, even of nothing
_HINT = "controlnet_cond_embedding"


class NotOne(Exception):  # noqa: N818  # caught in this module, where it means an empty configuration
    """Shapes that no network of the kind has: a tensor or dimension is absent, or a size is beyond reason."""


def _side(shapes: Shapes, name: str, axis: int = 0) -> int:
    """A tensor's size along an axis; ``NotOne`` where there is no such tensor or axis."""
    shape = shapes.get(name, ())
    if len(shape) <= axis:
        raise NotOne(f"{name} is {shape}")
    return shape[axis]


def _require(is_so: bool, what: str) -> None:
    if not is_so:
        raise NotOne(what)


def text_width(shapes: Shapes) -> int | None:
    """The width of the prompt embeddings that cross-attentions of these names read; None without any."""
    test = re.compile(r".*attn2[._]to_k\.(weight|down|lora_A\.weight|lora_down\.weight)$")
    return next((shape[1] for name, shape in shapes.items() if test.match(name) and len(shape) >= 2), None)


def family_of_config(config: Mapping[str, Any]) -> Family | None:
    """The family with the prompts and the channels by level of a control's configuration; None if there is none."""
    family = family_of_width(config.get("cross_attention_dim", 0))
    channels = config.get("base_block_out_channels") or config.get("block_out_channels", [])
    return family if family and list(family.channels) == list(channels) else None


# --- ControlNet, ControlNet-Union and ControlNet-XS -----------------------------------------------------------------


def _transformers(shapes: Shapes, path: str) -> int:
    test = re.compile(re.escape(path) + r"transformer_blocks\.(\d{1,3})\.")
    return len({m[1] for name in shapes if (m := test.match(name))})


def _encoder_config(shapes: Shapes, stored: Mapping[str, Any], middle: str, most_layers: int) -> dict[str, Any]:
    """The settings that the three kinds share; ``middle`` is the path of the middle block's attention."""
    depth = EncoderShape.of_diffusers(shapes)
    _require(0 < depth.levels <= _MOST_LEVELS and 0 < depth.layers <= most_layers, "levels and layers")
    _require(depth.hint_blocks <= _MOST_HINT_BLOCKS, "blocks of the hint's encoder")
    levels = range(depth.levels)
    channels = [_side(shapes, f"down_blocks.{i}.resnets.0.conv1.weight") for i in levels]
    transformers = [_transformers(shapes, f"down_blocks.{i}.attentions.0.") for i in levels]
    in_middle = _transformers(shapes, middle)
    hint = [f"{_HINT}.conv_in.weight", *(f"{_HINT}.blocks.{i}.weight" for i in range(1, depth.hint_blocks, 2))]
    width = text_width(shapes)
    if width is None and "add_embedding.linear_1.weight" in shapes:  # a slim control of SDXL, without attention
        width = stored.get("cross_attention_dim")
        if type(width) is not int or not 0 < width <= _WIDEST:
            width = next(row.text_width for row in FAMILIES.values() if row.pooled_width)
    _require(width is not None, "nothing reads prompts")
    _require(max(channels) <= _WIDEST and not any(0 in shape for shape in shapes.values()), "sizes")
    _require(depth.layers * sum(transformers) + in_middle <= _MOST_TRANSFORMERS, "transformers")
    projections = [shape for name, shape in shapes.items() if name.endswith(".proj_in.weight")]
    return {
        "conditioning_channels": _side(shapes, hint[0], 1),
        "conditioning_embedding_out_channels": [_side(shapes, name) for name in hint],
        "in_channels": _side(shapes, "conv_in.weight", 1),
        "down_block_types": ["CrossAttnDownBlock2D" if n else "DownBlock2D" for n in transformers],
        "block_out_channels": channels,
        "layers_per_block": depth.layers,
        "cross_attention_dim": width,
        "transformer_layers_per_block": [*(max(n, 1) for n in transformers[:-1]), max(in_middle, transformers[-1], 1)],
        "use_linear_projection": all(len(shape) == 2 for shape in projections),
    }


def _unseen(read: Mapping[str, Any], channels: list[int]) -> tuple[list[int], bool]:
    """(attention heads by level, whether attention is computed in float32), as the families have them."""
    family = family_of_width(read["cross_attention_dim"])
    # Eight heads with SD 1, heads 64 wide since SD 2.
    heads = [max(c // 64, 1) for c in channels] if read["use_linear_projection"] else [8] * len(channels)
    return heads, bool(family and family.upcast_attention)


_STORED = (
    "act_fn",
    "addition_embed_type_num_heads",
    "addition_time_embed_dim",
    "attention_head_dim",
    "controlnet_conditioning_channel_order",
    "downsample_padding",
    "flip_sin_to_cos",
    "freq_shift",
    "global_pool_conditions",
    "mid_block_scale_factor",
    "norm_eps",
    "norm_num_groups",
    "num_attention_heads",
    "num_trans_head",
    "only_cross_attention",
    "resnet_time_scale_shift",
    "upcast_attention",
)
"""Settings of a ControlNet that its shapes do not show."""


def controlnet_config(shapes: Shapes, stored: Mapping[str, Any], union: bool) -> dict[str, Any]:
    """The ``ControlNetModel`` or ``ControlNetUnionModel`` with these shapes; empty if they are not one's."""
    try:
        read = _encoder_config(shapes, stored, "mid_block.attentions.0.", most_layers=8)
        union_settings = _union_config(shapes) if union else {}
        pooled = _side(shapes, "add_embedding.linear_1.weight", 1) if "add_embedding.linear_1.weight" in shapes else 0
    except NotOne:
        return {}
    channels = read["block_out_channels"]
    heads, upcast = _unseen(read, channels)
    config = {"attention_head_dim": heads, "norm_num_groups": math.gcd(32, *channels), "upcast_attention": upcast}
    config |= {key: value for key, value in stored.items() if key in _STORED} | read
    if pooled:
        config.setdefault("addition_time_embed_dim", 256)
        config |= {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": pooled}
    if union:
        config.setdefault("num_trans_head", 8)
        return config | union_settings
    attends = _transformers(shapes, "mid_block.attentions.0.") > 0
    return config | {"mid_block_type": "UNetMidBlock2DCrossAttn" if attends else "UNetMidBlock2D"}


def _union_config(shapes: Shapes) -> dict[str, Any]:
    types, width = _side(shapes, "task_embedding"), _side(shapes, "task_embedding", 1)
    layers = len({name.split(".")[1] for name in shapes if name.startswith("transformer_layes.")})
    _require(types <= 64 and layers <= 8, "types and layers of a Union")
    return {
        "num_control_type": types,
        "num_trans_channel": width,
        "num_trans_layer": layers,
        "num_proj_channel": _side(shapes, "spatial_ch_projs.weight"),
        "addition_time_embed_dim": _side(shapes, "control_add_embedding.linear_1.weight", 1) // types,
    }


_XS_STORED = (
    "num_attention_heads",
    "max_norm_num_groups",
    "upcast_attention",
    "time_embedding_mix",
    "conditioning_channel_order",
)
"""Settings of a ControlNet-XS that its shapes do not show."""


def xs_config(shapes: Shapes, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The ``ControlNetXSAdapter`` with these shapes, as ``xs_network`` takes it; empty if they are not one's."""
    middle = "mid_block.midblock.attentions.0."
    try:
        read = _encoder_config(shapes, stored, middle, most_layers=2)
        base = [_side(shapes, f"down_blocks.{i}.ctrl_to_base.0.weight") for i in range(len(read["block_out_channels"]))]
        _require(f"{middle}proj_in.weight" in shapes and max(base) <= _WIDEST, "its middle block, and its base")
        mix = stored.get("time_embedding_mix", 1.0)
        _require(isinstance(mix, int | float) and 0 <= mix <= 1, "a share of the time embedding")
    except NotOne:
        return {}
    heads, upcast = _unseen(read, base)  # diffusers gives the thin encoder as many heads as the base has
    config = {"num_attention_heads": heads, "upcast_attention": upcast}
    config |= {key: stored[key] for key in _XS_STORED if key in stored} | read
    learnt = "time_embedding.linear_1.weight" in shapes
    return config | {"learn_time_embedding": learnt, "base_block_out_channels": base}


# --- T2I-Adapter ----------------------------------------------------------------------------------------------------


def t2i_adapter_config(shapes: Shapes, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The ``T2IAdapter`` with these shapes, under diffusers' names or the original's; empty if they are not one's."""
    original = not any(name.startswith("adapter.") for name in shapes)
    plain = {name.removeprefix("adapter."): shape for name, shape in shapes.items()}
    rows = sorted({int(m[1]) for name in plain if (m := re.match(r"body\.(\d{1,2})\.", name))})
    light = is_light_adapter(shapes)
    inner = r"body\.0\.body" if light and original else r"body\.0\.resnets"
    layers = len({m[1] for name in plain if (m := re.match(rf"{inner}\.(\d{{1,2}})\.", name))})
    if original and not light:  # one row, in which a level begins where its first resnet's input is projected
        layers = 2 if len(rows) % 2 == 0 else 1
    try:
        _require(0 < len(rows) <= 32 and layers <= 8, "rows and layers")
        entry = _side(plain, "body.0.in_conv.weight" if light else "conv_in.weight", 1)
        if light:
            channels = [_side(plain, f"body.{i}.out_conv.weight") for i in range(max(rows))]  # the last level repeats
        elif original:
            channels = [_side(plain, f"body.{i}.block1.weight") for i in rows if i % layers == 0]
        else:
            channels = [_side(plain, f"body.{i}.resnets.0.block1.weight") for i in rows]
        _require(bool(channels) and max(channels) <= _WIDEST, "channels")
    except NotOne:
        return {}
    # Pixels are unshuffled 8x8 for SD, 16x16 for SDXL; hints have 1 or 3 channels.
    wide = not light and entry in (256, 3 * 256)
    kind = "light_adapter" if light else "full_adapter_xl" if wide else "full_adapter"
    factor = 16 if wide else 8
    if isinstance(stored.get("downscale_factor"), int) and stored.get("adapter_type") in (kind, "full_adapter_xl"):
        kind, factor = stored["adapter_type"], stored["downscale_factor"]
    config = {"in_channels": entry // factor**2, "channels": channels, "num_res_blocks": layers}
    return config | {"downscale_factor": factor, "adapter_type": kind}
