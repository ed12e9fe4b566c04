"""Names and shapes of the networks that configurations mean, without building them: a file is described by these alone.

As diffusers' classes have them; the tests build each and compare. Building one, of nothing, would take seconds of
imports where a file's header takes a blink.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from controlkit.tensors import Shape

Rows = Iterator[tuple[str, Shape]]


def expected_shapes(kind: str, config: Mapping[str, Any]) -> dict[str, Shape]:
    """Names and shapes of a kind's network of this configuration; empty if there is none such."""
    try:
        return dict(_NETWORKS[kind](config))
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError):  # a stranger's settings do not go together
        return {}


# --- parts ----------------------------------------------------------------------------------------------------------


def _layer(name: str, *shape: int) -> Rows:
    """A weight (out, ...) and its bias (out,); of a norm, one of one dimension."""
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _conv(name: str, channels_in: int, channels_out: int, kernel: int = 1) -> Rows:
    yield from _layer(name, channels_out, channels_in, kernel, kernel)


def _mlp(name: str, *widths: int) -> Rows:
    """A ``TimestepEmbedding``."""
    yield from _layer(f"{name}.linear_1", widths[1], widths[0])
    yield from _layer(f"{name}.linear_2", widths[1], widths[1])


def _resnet(name: str, channels_in: int, channels_out: int, time: int) -> Rows:
    yield from _layer(f"{name}.norm1", channels_in)
    yield from _conv(f"{name}.conv1", channels_in, channels_out, 3)
    yield from _layer(f"{name}.time_emb_proj", channels_out, time)
    yield from _layer(f"{name}.norm2", channels_out)
    yield from _conv(f"{name}.conv2", channels_out, channels_out, 3)
    if channels_in != channels_out:
        yield from _conv(f"{name}.conv_shortcut", channels_in, channels_out)


def _transformer(name: str, channels: int, depth: int, heads: int, config: Mapping[str, Any]) -> Rows:
    inner, text = heads * (channels // heads), config["cross_attention_dim"]
    kernel = () if config["use_linear_projection"] else (1, 1)
    if not inner:
        raise ValueError("heads of no channel")
    yield from _layer(f"{name}.norm", channels)
    yield from _layer(f"{name}.proj_in", inner, channels, *kernel)
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        for k, width in ((1, inner), (2, text)):
            yield f"{block}.attn{k}.to_q.weight", (inner, inner)
            yield f"{block}.attn{k}.to_k.weight", (inner, width)
            yield f"{block}.attn{k}.to_v.weight", (inner, width)
            yield from _layer(f"{block}.attn{k}.to_out.0", inner, inner)
        for k in (1, 2, 3):
            yield from _layer(f"{block}.norm{k}", inner)
        yield from _layer(f"{block}.ff.net.0.proj", 8 * inner, inner)
        yield from _layer(f"{block}.ff.net.2", inner, 4 * inner)
    yield from _layer(f"{name}.proj_out", channels, inner, *kernel)


def _hint_encoder(widths: Sequence[int], config: Mapping[str, Any]) -> Rows:
    name, convs = "controlnet_cond_embedding", config["conditioning_embedding_out_channels"]
    yield from _conv(f"{name}.conv_in", config["conditioning_channels"], convs[0], 3)
    for i in range(len(convs) - 1):
        yield from _conv(f"{name}.blocks.{2 * i}", convs[i], convs[i], 3)
        yield from _conv(f"{name}.blocks.{2 * i + 1}", convs[i], convs[i + 1], 3)
    yield from _conv(f"{name}.conv_out", convs[-1], widths[0], 3)


def _by_level(value: Any, levels: int) -> list[Any]:
    values = list(value) if isinstance(value, list | tuple) else [value] * levels
    if len(values) != levels:
        raise ValueError("a setting for other levels")
    return values


def _levels(config: Mapping[str, Any]) -> tuple[list[int], list[int], list[int], list[bool]]:
    """(channels, transformers, heads, whether there is attention) by level."""
    channels = list(config["block_out_channels"])
    heads = config.get("num_attention_heads") or config["attention_head_dim"]
    attends = [kind == "CrossAttnDownBlock2D" for kind in _by_level(config["down_block_types"], len(channels))]
    depths = _by_level(config.get("transformer_layers_per_block", 1), len(channels))
    return channels, depths, _by_level(heads, len(channels)), attends


# --- networks -------------------------------------------------------------------------------------------------------


_FOLLOWED = {"act_fn": ("silu", "swish"), "only_cross_attention": (False,), "resnet_time_scale_shift": ("default",)}


def _controlnet(config: Mapping[str, Any]) -> Rows:
    channels, depths, heads, attends = _levels(config)
    time, layers, last = 4 * channels[0], config.get("layers_per_block", 2), len(channels) - 1
    if any(width % (config.get("norm_num_groups") or 32) for width in channels):
        raise ValueError("groups that do not divide the channels")
    if any(config.get(key) not in (None, *known) for key, known in _FOLLOWED.items()):
        raise ValueError("a rule that no base here has")
    yield from _conv("conv_in", config.get("in_channels", 4), channels[0], 3)
    yield from _mlp("time_embedding", channels[0], time)
    if config.get("addition_embed_type") == "text_time":
        yield from _mlp("add_embedding", config["projection_class_embeddings_input_dim"], time)
    yield from _hint_encoder(channels, config)
    before, joins = channels[0], [channels[0]]
    for level, width in enumerate(channels):
        for i in range(layers):
            yield from _resnet(f"down_blocks.{level}.resnets.{i}", before, width, time)
            if attends[level]:
                path = f"down_blocks.{level}.attentions.{i}"
                yield from _transformer(path, width, depths[level], heads[level], config)
            before = width
        if level < last:
            yield from _conv(f"down_blocks.{level}.downsamplers.0.conv", width, width, 3)
        joins += [width] * (layers + (level < last))
    yield from _resnet("mid_block.resnets.0", before, before, time)
    if config.get("mid_block_type", "UNetMidBlock2DCrossAttn") == "UNetMidBlock2DCrossAttn":
        yield from _transformer("mid_block.attentions.0", before, depths[-1], heads[-1], config)
        yield from _resnet("mid_block.resnets.1", before, before, time)
    for i, joined in enumerate(joins):
        yield from _conv(f"controlnet_down_blocks.{i}", joined, joined)
    yield from _conv("controlnet_mid_block", before, before)


def _union(config: Mapping[str, Any]) -> Rows:
    yield from _controlnet({key: value for key, value in config.items() if key != "mid_block_type"})
    width, types = config["num_trans_channel"], config["num_control_type"]
    if width % config.get("num_trans_head", 8):
        raise ValueError("heads that do not divide the tokens' width")
    yield "task_embedding", (types, width)
    for i in range(config.get("num_trans_layer", 1)):
        layer = f"transformer_layes.{i}"  # spelled as the released weights spell it
        yield f"{layer}.attn.in_proj_weight", (3 * width, width)
        yield f"{layer}.attn.in_proj_bias", (3 * width,)
        yield from _layer(f"{layer}.attn.out_proj", width, width)
        yield from _layer(f"{layer}.ln_1", width)
        yield from _layer(f"{layer}.ln_2", width)
        yield from _layer(f"{layer}.mlp.c_fc", 4 * width, width)
        yield from _layer(f"{layer}.mlp.c_proj", width, 4 * width)
    yield from _layer("spatial_ch_projs", config["num_proj_channel"], width)
    code = config["addition_time_embed_dim"] * types
    yield from _mlp("control_add_embedding", code, 4 * config["block_out_channels"][0])


def _xs(config: Mapping[str, Any]) -> Rows:
    channels, depths, heads, attends = _levels(config)
    base, layers = list(config["base_block_out_channels"]), config.get("layers_per_block", 2)
    time, last = 4 * base[0], len(channels) - 1
    yield from _hint_encoder(channels, config)
    if config.get("learn_time_embedding"):
        yield from _mlp("time_embedding", base[0], time)
    yield from _conv("conv_in", config.get("in_channels", 4), channels[0], 3)
    yield from _conv("control_to_base_for_conv_in", channels[0], base[0])
    own, theirs, skips = channels[0], base[0], [channels[0]]
    for level, (width, wide) in enumerate(zip(channels, base, strict=True)):
        block = f"down_blocks.{level}"
        for i in range(layers):
            yield from _conv(f"{block}.base_to_ctrl.{i}", theirs, theirs)
            yield from _resnet(f"{block}.resnets.{i}", own + theirs, width, time)
            if attends[level]:
                yield from _transformer(f"{block}.attentions.{i}", width, depths[level], heads[level], config)
            yield from _conv(f"{block}.ctrl_to_base.{i}", width, wide)
            own, theirs = width, wide
        if level < last:
            yield from _conv(f"{block}.base_to_ctrl.{layers}", wide, wide)
            yield from _conv(f"{block}.downsamplers.conv", width + wide, width, 3)
            yield from _conv(f"{block}.ctrl_to_base.{layers}", width, wide)
        skips += [width] * (layers + (level < last))
    yield from _conv("mid_block.base_to_ctrl", theirs, theirs)
    yield from _resnet("mid_block.midblock.resnets.0", own + theirs, own, time)
    yield from _transformer("mid_block.midblock.attentions.0", own, depths[-1], heads[-1], config)
    yield from _resnet("mid_block.midblock.resnets.1", own, own, time)
    yield from _conv("mid_block.ctrl_to_base", own, theirs)
    for up, level in enumerate(reversed(range(len(channels)))):
        arriving = [base[min(level + 1, last)]] + [base[level]] * layers  # channels of the decoder where skips arrive
        for i, wide in enumerate(arriving):
            yield from _conv(f"up_connections.{up}.ctrl_to_base.{i}", skips.pop(), wide)


def _adapter(config: Mapping[str, Any]) -> Rows:
    channels, layers = list(config["channels"]), config["num_res_blocks"]
    entry = config["in_channels"] * config["downscale_factor"] ** 2
    if light := config["adapter_type"] == "light_adapter":
        pairs = list(zip([entry, *channels], [*channels, channels[-1]], strict=True))
    else:
        yield from _conv("adapter.conv_in", entry, channels[0], 3)
        pairs = list(zip([channels[0], *channels], channels, strict=False))
    for i, (before, width) in enumerate(pairs):
        inner = width // 4 if light else width
        if light or before != width:
            yield from _conv(f"adapter.body.{i}.in_conv", before, inner)
        for k in range(layers):
            path = f"adapter.body.{i}.resnets.{k}"
            yield from _conv(f"{path}.block1", inner, inner, 3)
            yield from _conv(f"{path}.block2", inner, inner, 3 if light else 1)
        if light:
            yield from _conv(f"adapter.body.{i}.out_conv", inner, width)


_NETWORKS = {"controlnet": _controlnet, "union": _union, "xs": _xs, "adapter": _adapter}
