"""The one table of names: ours, diffusers' and the original's (cldm), read both ways.

A name is a module's path and a parameter; only paths differ. ``controlnet_paths`` pairs diffusers' paths with the
original's for an encoder of any depth, and ``rename`` applies a table forwards or backwards.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from controlkit.branch import ControlBranch

PREFIX = "control_model."
"""The beginning of the original's names inside a whole ControlLDM checkpoint, and in most files cut from one."""

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


@dataclass(frozen=True)
class EncoderShape:
    """How many modules an encoder has of each kind: levels, resnets a level, stride-2 convolutions of the hint.

    Numbers of two digits count, which are more than any has: a longer one in a stranger's file is no module's.
    """

    levels: int
    layers: int
    hint_blocks: int

    @classmethod
    def of_diffusers(cls, names: Iterable[str]) -> "EncoderShape":
        """Read from diffusers' names."""
        names = list(names)
        found = [re.match(r"down_blocks\.(\d{1,2})\.resnets\.(\d{1,2})\.", name) for name in names]
        places = [(int(m[1]), int(m[2])) for m in found if m]
        blocks = [re.match(r"controlnet_cond_embedding\.blocks\.(\d{1,2})\.", name) for name in names]
        if not places:
            return cls(0, 0, 0)
        return cls(1 + max(i for i, _ in places), 1 + max(j for _, j in places), len({m[1] for m in blocks if m}))

    @classmethod
    def of_cldm(cls, names: Iterable[str]) -> "EncoderShape":
        """Read from the original's names, prefix removed."""
        names = list(names)
        inputs = {int(m[1]) for name in names if (m := re.match(r"input_blocks\.(\d{1,2})\.", name))}
        downs = sorted({int(m[1]) for name in names if (m := re.match(r"input_blocks\.(\d{1,2})\.0\.op\.", name))})
        hints = {int(m[1]) for name in names if (m := re.match(r"input_hint_block\.(\d{1,2})\.", name))}
        if not inputs:
            return cls(0, 0, 0)
        last = max(inputs)
        step = downs[0] if downs else last + 1  # resnets a level, and the downsampler after them
        return cls(len(downs) + 1, step - 1, max(len(hints) - 2, 0))


def controlnet_paths(depth: EncoderShape) -> dict[str, str]:
    """diffusers' module path -> the original's, for a ControlNet of this depth."""
    table = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    table |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    table["conv_in"] = "input_blocks.0.0"
    hints = ["conv_in", *(f"blocks.{i}" for i in range(depth.hint_blocks)), "conv_out"]
    table |= {f"controlnet_cond_embedding.{name}": f"input_hint_block.{2 * i}" for i, name in enumerate(hints)}
    step = depth.layers + 1
    for level in range(depth.levels):
        for layer in range(depth.layers):
            at = f"input_blocks.{step * level + layer + 1}"
            table |= _resnet(f"down_blocks.{level}.resnets.{layer}", f"{at}.0")
            table[f"down_blocks.{level}.attentions.{layer}"] = f"{at}.1"
        table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{step * (level + 1)}.0.op"
    for i in range(2):
        table |= _resnet(f"mid_block.resnets.{i}", f"middle_block.{2 * i}")
    table["mid_block.attentions.0"] = "middle_block.1"
    table |= {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(step * depth.levels)}
    table["controlnet_mid_block"] = "middle_block_out.0"
    return table


def _resnet(theirs: str, original: str) -> dict[str, str]:
    return {f"{theirs}.{name}": f"{original}.{other}" for name, other in _RESNET.items()}


def adapter_paths(names: Iterable[str], layers: int) -> dict[str, str]:
    """diffusers' module path -> the original's, for a T2I-Adapter of ``layers`` resnets a level; ``names`` of either.

    A light adapter keeps its levels apart in the original too; a full one has its resnets in one row.
    """
    names = list(names)
    rows = {int(m[1]) for name in names if (m := re.match(r"(?:adapter\.)?body\.(\d{1,2})\.", name))}
    if not rows:
        return {}
    light = is_light_adapter(names)
    diffusers = any(name.startswith("adapter.") for name in names)
    levels = max(rows) + 1 if light or diffusers else (max(rows) + 1) // layers
    table = {"adapter.conv_in": "conv_in"}
    for level in range(levels):
        first = level if light else level * layers
        table |= {f"adapter.body.{level}.{end}": f"body.{first}.{end}" for end in ("in_conv", "out_conv")}
        for i in range(layers):
            path = f"body.{level}.body.{i}" if light else f"body.{first + i}"
            table |= {f"adapter.body.{level}.resnets.{i}.{b}": f"{path}.{b}" for b in ("block1", "block2")}
    return table


def is_light_adapter(names: Iterable[str]) -> bool:
    """Whether an adapter's names, of either kind, are a light one's."""
    return any(".out_conv." in name for name in names)


def rename(names: Iterable[str], paths: Mapping[str, str], back: bool = False) -> dict[str, str]:
    """Each name in the other spelling; names whose module the table lacks are left out.

    The longest path that a name begins with decides, so that a whole transformer moves under one entry.
    """
    table = {value: key for key, value in paths.items()} if back else paths
    renamed = {}
    deepest = max((path.count(".") + 1 for path in table), default=0)
    for name in names:
        parts = name.split(".")
        for cut in range(min(len(parts) - 1, deepest), 0, -1):
            path = ".".join(parts[:cut])
            if path in table:
                renamed[name] = ".".join([table[path], *parts[cut:]])
                break
    return renamed


def key_table(branch: ControlBranch) -> dict[str, str]:
    """Our parameter names -> diffusers' ``ControlNetModel`` names, for this branch's shape."""
    last = len(branch.hint_encoder.convs) - 1
    hint = {0: "conv_in", last: "conv_out"} | {i: f"blocks.{i - 1}" for i in range(1, last)}
    prefixes = {f"hint_encoder.convs.{i}.": f"controlnet_cond_embedding.{name}." for i, name in hint.items()}
    skips = [tap.name for tap in branch.taps if tap.site == "skip"]
    prefixes |= {f"joins.{name}.": f"controlnet_down_blocks.{i}." for i, name in enumerate(skips)}
    prefixes |= {"joins.middle.": "controlnet_mid_block.", "body.": ""}
    table = {}
    for key in branch.weights():
        ours = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        table[key] = key if ours is None else prefixes[ours] + key.removeprefix(ours)  # a Union's own parts: the same
    return table
