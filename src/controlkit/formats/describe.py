"""What a file of weights is: told from names and shapes, never from the file's name, without reading a tensor.

``describe`` is what ``controlkit inspect`` prints. It goes from the marks that only one format has to those that
several share, brings the names to diffusers' spelling, reads the network's configuration off the shapes, builds that
network without memory, and compares.
"""

import inspect
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from controlkit.backbones.families import FAMILIES, Family, family_of_width
from controlkit.controls import KINDS
from controlkit.controls.xs import new_adapter
from controlkit.errors import UserError, one_line
from controlkit.formats.names import PREFIX, EncoderShape, adapter_paths, controlnet_paths, is_light_adapter, rename
from controlkit.tensors import Shape, TensorFile, open_tensors

WEIGHTS = "diffusion_pytorch_model.safetensors"
LONGEST_TEXT = 2**20
"""Letters of a metadata entry or a configuration that is read; a recipe has some 2**12."""
WEIGHTS_FILES = (WEIGHTS, "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin")

_TITLES = {
    "controlkit": "a control of ControlKit's own kind",
    "diffusers": "a ControlNet in diffusers' layout",
    "cldm": "a ControlNet in the original layout",
    "cldm-difference": "a ControlNet in the original layout, stored as its difference to the base",
    "control-lora": "a Control-LoRA",
    "union": "a ControlNet-Union",
    "t2i-adapter": "a T2I-Adapter",
    "controlnet-xs": "a ControlNet-XS",
    "lllite": "a ControlNet-LLLite",
    "flux": "a ControlNet of Flux",
    "sd3": "a ControlNet of Stable Diffusion 3",
    "qwen-image": "a ControlNet of Qwen-Image",
    "z-image": "a ControlNet of Z-Image",
    "hunyuan-dit": "a ControlNet of Hunyuan-DiT",
    "base": "a base and no control: give it as --base",
    "other-base": "a base and no control, of no family known by its shapes",
    "unet": "a U-Net and no control: its pipeline folder is a base",
    "lora": "an ordinary LoRA and no control: give it as --lora",
    "unknown": "not a layout of weights known here",
}

# The first row all of whose patterns some name matches decides; from the marks of one format alone to those of many.
_MARKS = [
    ("control-lora", r"lora_controlnet$"),
    ("lllite", r"lllite_"),
    ("flux", r"controlnet_mode_embedder\.|controlnet_single_blocks\."),
    ("flux", r"double_blocks\.", r"controlnet_blocks\.|input_hint_block\."),  # XLabs'
    ("union", r"task_embedding$|control_add_embedding\."),
    ("controlnet-xs", r"control_to_base_for_conv_in\.|down_blocks\.\d+\.(ctrl_to_base|base_to_ctrl)\."),
    ("controlnet-xs", r"(control_model\.)?enc_zero_convs_(in|out)\."),
    ("z-image", r"control_all_x_embedder|control_layers\.|control_noise_refiner\."),
    ("hunyuan-dit", r"after_proj_list\."),
    ("sd3", r"pos_embed_input\.|control_type$", r"controlnet_blocks\.|transformer_blocks\.0\.adaLN_modulation"),
    ("qwen-image", r"controlnet_x_embedder\.|controlnet_blocks\.", r"transformer_blocks\.0\.img_mod\.|txt_norm\."),
    ("flux", r"controlnet_x_embedder\."),
    ("diffusers", r"controlnet_cond_embedding\.conv_in\.weight$"),
    ("cldm", r"(control_model\.)?input_hint_block\.0\.weight$"),
    ("t2i-adapter", r"(adapter\.)?body\.\d+\.(resnets\.\d+\.|body\.\d+\.)?(block1|in_conv)\.weight$"),
    ("base", r"model\.diffusion_model\.(input|output)_blocks\."),
    ("unet", r"up_blocks\.\d+\.resnets\."),
    ("lora", r"lora_(unet|te)|.*\.lora_(A|down|up)\b"),
]
_OF_BASE = ("conv_in.", "time_embedding.", "add_embedding.", "down_blocks.", "mid_block.")


@dataclass(frozen=True)
class Description:
    """What a file is. The first seven are the keys of ``inspect --json``."""

    format: str
    base: str | None
    """``sd15``, ``sd21``, ``sdxl``, the base a control of ours says it was trained on; None where it cannot be told."""
    hint_channels: int | None
    parameters: int
    missing: tuple[str, ...]
    """Tensors its network has and the file lacks, or has in another shape; in diffusers' names."""
    unexpected: tuple[str, ...]
    """Tensors the network has no place for, as the file names them."""
    runs: bool
    kind: str | None = None
    """``controlnet``, ``union``, ``xs`` or ``adapter``; None where ControlKit does not run it."""
    names: Mapping[str, str] = field(default_factory=dict)
    """The file's names -> diffusers'."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The diffusers configuration, read off the shapes and what the file says."""
    family: Family | None = None
    misshapen: tuple[str, ...] = ()
    """For each tensor of another shape, what it is and what was expected."""

    def sentence(self) -> str:
        """One line: what it is, for which base, of which hints, what is missing, and whether it runs."""
        text = _TITLES[self.format]
        if self.base:
            text += f" for {self.family.title if self.family and self.family.name == self.base else self.base}"
        if self.hint_channels:
            text += f", hints of {self.hint_channels} channel{'s' if self.hint_channels > 1 else ''}"
        text += f", {self.parameters:,} parameters"
        for what, names in (("lacks", self.missing), ("has no place for", self.unexpected)):
            if names:
                text += f"; {what} {len(names)} tensor{'s' if len(names) > 1 else ''}, first {names[0]}"
        if self.misshapen:
            text += f"; {self.misshapen[0]}"
        if self.kind is None and self.format not in ("base", "other-base", "unet", "lora", "unknown"):
            text += "; recognised, but not run yet"
        elif self.kind:
            text += "; runs" if self.runs else "; does not run"
        return text[0].upper() + text[1:] + "."

    def to_json(self) -> dict[str, Any]:
        """The seven figures, as ``inspect --json`` prints them."""
        keys = ("format", "base", "hint_channels", "parameters", "missing", "unexpected", "runs")
        return {key: list(v) if isinstance(v := getattr(self, key), tuple) else v for key in keys}


def weights_file(path: Path) -> Path:
    """The file of weights that a path means: itself, or the one in a diffusers folder or a training run."""
    if path.is_dir():
        for folder in (path, path / "control"):
            for name in WEIGHTS_FILES:
                if (folder / name).is_file():
                    return folder / name
        raise UserError(f"{path} holds no weights: expected a diffusers folder with {WEIGHTS}, or a file.")
    return path


def describe(path: Path) -> Description:
    """What a file or folder of weights is; ``UserError`` if it cannot be read at all."""
    if (path / "model_index.json").is_file():  # a pipeline's folder: told by its U-Net
        return replace(describe(path / "unet"), format="base")
    header = open_tensors(weights_file(path))
    return describe_tensors(header, stored_config(header))


def stored_config(header: TensorFile) -> dict[str, Any]:
    """The configuration kept with the weights: in their metadata, or in the ``config.json`` beside them."""
    texts = [header.metadata.get("controlkit.config", "{}")]
    beside = header.path.with_name("config.json")
    config: dict[str, Any] = {}
    try:
        if header.path.name in WEIGHTS_FILES and beside.is_file():
            texts.append(text_beside(beside))
        for text in texts:
            config |= json_object(text)
        for key in _COUNTS:
            counts = config.get(key)
            for count in counts if isinstance(counts, list) else [counts]:
                if count is not None and not (type(count) is int and 0 < count <= 2**14):
                    raise ValueError(f"{key} is {count}")
    except (ValueError, OSError) as error:
        raise UserError(f"The configuration of {header.path} cannot be read ({one_line(error)}).") from error
    return config


_COUNTS = (
    "attention_head_dim",
    "num_attention_heads",
    "norm_num_groups",
    "max_norm_num_groups",
    "num_trans_head",
    "addition_time_embed_dim",
    "downscale_factor",
)


def text_beside(path: Path, longest: int = LONGEST_TEXT) -> str:
    """The text of a small file that lies beside weights; ``ValueError`` if it is not small."""
    if path.stat().st_size > longest:
        raise ValueError(f"{path.name} has more than {longest:,} bytes")
    return path.read_text(encoding="utf-8", errors="replace")


def json_object(text: str) -> dict[str, Any]:
    """The object that a text from a stranger's file holds; ``ValueError`` if it holds none, or more than is sane."""
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"more than {LONGEST_TEXT:,} letters")
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("nested without end") from None
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__}; expected keys and values")
    if not _shallow(found):
        raise ValueError("nested without end")
    return found


def _shallow(value: Any, levels: int = 32) -> bool:
    """Whether a value is nested no deeper than that: what is deeper cannot be counted on to be written again."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_shallow(part, levels - 1) for part in inner)


def describe_tensors(header: TensorFile, stored: Mapping[str, Any]) -> Description:
    """What a header is, given the configuration that is stored with it."""
    shapes = dict(header.shapes)
    mark = _mark(shapes)
    if mark == "cldm" and any(name.startswith(PREFIX) for name in shapes):  # the rest of a whole checkpoint is not ours
        shapes = {n: s for n, s in shapes.items() if n.startswith(PREFIX) or n == "difference"}
    parameters = sum(math.prod(s) for n, s in shapes.items() if n not in ("difference", "lora_controlnet"))
    own = _metadata_object(header, "controlkit.spec") and not _metadata_object(header, "controlkit.config")
    if mark == "diffusers" and own:  # a body that no diffusers class has
        first = shapes["controlnet_cond_embedding.conv_in.weight"]
        names = {name: name for name in shapes}
        channels = first[1] if len(first) == 4 else None
        return Description(
            "controlkit", _trained_base(header), channels, parameters, (), (), channels is not None, "controlnet", names
        )
    if mark == "t2i-adapter":
        return _describe_adapter(shapes, parameters, stored, _trained_base(header))
    if mark == "controlnet-xs" and "control_to_base_for_conv_in.weight" in shapes:
        return _describe_xs(shapes, parameters, stored, _trained_base(header))
    if mark not in ("diffusers", "union", "cldm", "control-lora"):
        family = (
            family_of_width(_text_width(shapes) or 0) if mark in ("base", "unet", "lora", "controlnet-xs") else None
        )
        base = family.name if family else "sdxl" if mark == "lllite" else None
        mark = mark if family or mark not in ("base", "unet") else "other-base"
        return Description(mark, base, None, parameters, (), (), False, family=family)
    names = _diffusers_names(shapes, mark)
    known = {names[name]: shape for name, shape in shapes.items() if name in names}
    if mark == "control-lora":
        known = _rebuilt_shapes(known)
    config = _config_of(known, stored, mark == "union")
    expected = expected_shapes("union" if mark == "union" else "controlnet", config) if config else {}
    missing = [name for name, shape in expected.items() if known.get(name) != shape]
    if mark == "control-lora":  # what it lacks of the encoder is the base's
        missing = [n for n in missing if n in known or not n.startswith(_OF_BASE)]
    left = [n for n in shapes if (_whole(names[n]) not in expected if n in names else n not in _MARKERS)]
    family = family_of_width(config.get("cross_attention_dim", 0))
    if family and list(family.channels) != list(config.get("block_out_channels", [])):
        family = None
    base = _trained_base(header) or (family.name if family else None)
    channels = config.get("conditioning_channels")
    if mark == "cldm" and "difference" in shapes:
        mark = "cldm-difference"
    kind = "union" if mark == "union" else "controlnet"
    runs = bool(expected) and not missing
    shaped = [f"{n} is {known[n]} in the file, expected {expected[n]}" for n in missing if n in known]
    return Description(
        mark, base, channels, parameters, tuple(missing), tuple(left), runs, kind, names, config, family, tuple(shaped)
    )


_MARKERS = ("difference", "lora_controlnet")


def _mark(shapes: Mapping[str, Shape]) -> str:
    for mark, *patterns in _MARKS:
        tests = [re.compile(pattern) for pattern in patterns]
        if all(any(test.match(name) for name in shapes) for test in tests):
            return mark
    return "unknown"


def _metadata_object(header: TensorFile, key: str) -> dict[str, Any]:
    """An entry of the metadata that should hold an object; empty if it does not."""
    try:
        return json_object(header.metadata.get(key, "{}"))
    except ValueError:
        return {}


def _trained_base(header: TensorFile) -> str | None:
    base = _metadata_object(header, "controlkit.trained").get("base")
    return base if isinstance(base, str) and len(base) < 100 and base.isprintable() else None


def _text_width(shapes: Mapping[str, Shape]) -> int | None:
    test = re.compile(r".*attn2[._]to_k\.(weight|down|lora_A\.weight|lora_down\.weight)$")
    return next((shape[1] for name, shape in shapes.items() if test.match(name) and len(shape) >= 2), None)


def _diffusers_names(shapes: Mapping[str, Shape], mark: str) -> dict[str, str]:
    """The file's names -> diffusers'; those that have no counterpart are left out."""
    if mark in ("diffusers", "union"):
        return {name: name.replace(".attn.in_proj.", ".attn.in_proj_") for name in shapes}  # as some write Unions
    bare = {name: name.removeprefix(PREFIX) for name in shapes}
    renamed = rename(bare.values(), controlnet_paths(EncoderShape.of_cldm(bare.values())), back=True)
    return {name: renamed[short] for name, short in bare.items() if short in renamed}


def _whole(name: str) -> str:
    """The weight that a Control-LoRA's ``up`` or ``down`` belongs to; other names as they are."""
    path, _, last = name.rpartition(".")
    return f"{path}.weight" if last in ("up", "down") else name


def _rebuilt_shapes(known: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes with each pair (up, down) taken as the weight that their product is added to."""
    whole = {name: shape for name, shape in known.items() if not name.endswith((".up", ".down"))}
    for name, up in known.items():
        down = known.get(f"{name.removesuffix('.up')}.down")
        if name.endswith(".up") and down and len(up) >= 2 and len(down) >= 2 and math.prod(up[1:]) == down[0]:
            whole[_whole(name)] = (up[0], *down[1:])
        elif name.endswith((".up", ".down")):
            whole.setdefault(_whole(name), ())  # half a pair, or a pair that has no product: no weight has this shape
    return whole


# --- configurations off shapes ------------------------------------------------------------------------------------


def _config_of(shapes: Mapping[str, Shape], stored: Mapping[str, Any], union: bool) -> dict[str, Any]:
    """The diffusers configuration of a ControlNet with these shapes; empty if they are not one's.

    What shapes cannot tell (heads, normalisation groups) comes from ``stored``, else from the family.
    """
    depth = EncoderShape.of_diffusers(shapes)
    try:
        if not (0 < depth.levels <= 8 and 0 < depth.layers <= 8 and depth.hint_blocks <= 16):
            return {}
        channels = [shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(depth.levels)]
        transformers = [_transformers(shapes, f"down_blocks.{i}.attentions.0.") for i in range(depth.levels)]
        middle = _transformers(shapes, "mid_block.attentions.0.")
        hint = [shapes["controlnet_cond_embedding.conv_in.weight"]]
        hint += [shapes[f"controlnet_cond_embedding.blocks.{i}.weight"] for i in range(1, depth.hint_blocks, 2)]
        width = _text_width(shapes)
        if width is None and "add_embedding.linear_1.weight" in shapes:  # a slim control of SDXL, without attention
            width = stored.get("cross_attention_dim")
            if type(width) is not int or not 0 < width <= 2**14:
                width = next(row.text_width for row in FAMILIES.values() if row.pooled_width)
        projections = [shape for name, shape in shapes.items() if name.endswith(".proj_in.weight")]
        linear = all(len(shape) == 2 for shape in projections)
        if width is None or max(channels) > 2**14 or any(0 in shape for shape in shapes.values()):
            return {}
        if depth.layers * sum(transformers) + middle > 128:  # SDXL has 34; each takes a while to build, even of nothing
            return {}
        family = family_of_width(width)
        # What shapes do not show, as the families have it: eight heads with SD 1, heads 64 wide since SD 2.
        heads = [max(c // 64, 1) for c in channels] if linear else [8] * len(channels)
        config: dict[str, Any] = {"attention_head_dim": heads, "norm_num_groups": math.gcd(32, *channels)}
        config["upcast_attention"] = bool(family and family.upcast_attention)
        config |= {key: value for key, value in stored.items() if key in _settings("union" if union else "controlnet")}
        config |= {
            "conditioning_channels": hint[0][1],
            "in_channels": shapes["conv_in.weight"][1],
            "down_block_types": ["CrossAttnDownBlock2D" if n else "DownBlock2D" for n in transformers],
            "block_out_channels": channels,
            "layers_per_block": depth.layers,
            "cross_attention_dim": width,
            "transformer_layers_per_block": [*(max(n, 1) for n in transformers[:-1]), max(middle, transformers[-1], 1)],
            "use_linear_projection": linear,
            "conditioning_embedding_out_channels": [shape[0] for shape in hint],
        }
        if "add_embedding.linear_1.weight" in shapes:
            config["addition_embed_type"] = "text_time"
            config.setdefault("addition_time_embed_dim", 256)
            config["projection_class_embeddings_input_dim"] = shapes["add_embedding.linear_1.weight"][1]
        if not union:
            config["mid_block_type"] = "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D"
        else:
            types, tokens = shapes["task_embedding"]
            config |= {"num_control_type": types, "num_trans_channel": tokens}
            config.setdefault("num_trans_head", 8)
            config["num_trans_layer"] = len({n.split(".")[1] for n in shapes if n.startswith("transformer_layes.")})
            config["num_proj_channel"] = shapes["spatial_ch_projs.weight"][0]
            config["addition_time_embed_dim"] = shapes["control_add_embedding.linear_1.weight"][1] // max(types, 1)
            if types > 64 or config["num_trans_layer"] > 8:
                return {}
        return config
    except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError):
        return {}


@lru_cache(maxsize=8)
def _settings(kind: str) -> frozenset[str]:
    """What the diffusers class of a kind can be configured with."""
    import diffusers

    return frozenset(inspect.signature(getattr(diffusers, KINDS[kind].diffusers_class or "").__init__).parameters) - {
        "self"
    }


def _transformers(shapes: Mapping[str, Shape], path: str) -> int:
    test = re.compile(re.escape(path) + r"transformer_blocks\.(\d{1,3})\.")
    return len({m[1] for name in shapes if (m := test.match(name))})


def expected_shapes(kind: str, config: Mapping[str, Any]) -> dict[str, Shape]:
    """Names and shapes of the network that a configuration means, built without memory; empty if there is none such."""
    return dict(_expected(kind, json.dumps(dict(config), sort_keys=True, default=list)))


@lru_cache(maxsize=32)
def _expected(kind: str, config: str) -> Mapping[str, Shape]:
    import diffusers
    import torch

    try:
        build = (
            new_adapter
            if kind == "xs"
            else lambda asked: getattr(diffusers, KINDS[kind].diffusers_class or "")(**asked)
        )
        with torch.device("meta"):
            network = build(json.loads(config))
    except Exception:  # no such network: what it stumbles over first says nothing of the file
        return {}
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


# --- ControlNet-XS ------------------------------------------------------------------------------------------------


def _describe_xs(
    shapes: Mapping[str, Shape], parameters: int, stored: Mapping[str, Any], trained: str | None
) -> Description:
    config = _xs_config(shapes, stored)
    expected = expected_shapes("xs", config) if config else {}
    missing = tuple(name for name, shape in expected.items() if shapes.get(name) != shape)
    left = tuple(name for name in shapes if name not in expected)
    family = family_of_width(config.get("cross_attention_dim", 0))
    if family and list(family.channels) != config["base_block_out_channels"]:
        family = None
    base = trained or (family.name if family else None)
    runs = bool(expected) and not missing
    shaped = tuple(f"{n} is {shapes[n]} in the file, expected {expected[n]}" for n in missing if n in shapes)
    channels, names = config.get("conditioning_channels"), {name: name for name in shapes}
    found = Description("controlnet-xs", base, channels, parameters, missing, left, runs, "xs", names, config, family)
    return replace(found, misshapen=shaped)


_XS_TOLD = (
    "num_attention_heads",
    "max_norm_num_groups",
    "upcast_attention",
    "time_embedding_mix",
    "conditioning_channel_order",
)
"""What the shapes of a ControlNet-XS do not show."""


def _xs_config(shapes: Mapping[str, Shape], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The ``ControlNetXSAdapter`` with these shapes, as ``xs.new_adapter`` takes it; empty if they are not one's."""
    depth = EncoderShape.of_diffusers(shapes)
    try:
        if not (0 < depth.levels <= 8 and 0 < depth.layers <= 2 and depth.hint_blocks <= 16):
            return {}
        levels = range(depth.levels)
        own = [shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in levels]
        base = [shapes[f"down_blocks.{i}.ctrl_to_base.0.weight"][0] for i in levels]
        transformers = [_transformers(shapes, f"down_blocks.{i}.attentions.0.") for i in levels]
        middle = _transformers(shapes, "mid_block.midblock.attentions.0.")
        hint = [shapes["controlnet_cond_embedding.conv_in.weight"]]
        hint += [shapes[f"controlnet_cond_embedding.blocks.{i}.weight"] for i in range(1, depth.hint_blocks, 2)]
        width = _text_width(shapes)
        linear = len(shapes["mid_block.midblock.attentions.0.proj_in.weight"]) == 2
        if width is None or max(own + base) > 2**14 or any(0 in shape for shape in shapes.values()):
            return {}
        if depth.layers * sum(transformers) + middle > 128:
            return {}
        family = family_of_width(width)
        # What shapes do not show, as the families have it: diffusers gives the thin encoder as many heads as the base.
        config: dict[str, Any] = {"num_attention_heads": [max(c // 64, 1) for c in base] if linear else [8] * len(base)}
        config["upcast_attention"] = bool(family and family.upcast_attention)
        config |= {key: stored[key] for key in _XS_TOLD if key in stored}
        if not 0 <= config.get("time_embedding_mix", 1.0) <= 1:
            return {}
        return config | {
            "conditioning_channels": hint[0][1],
            "conditioning_embedding_out_channels": [shape[0] for shape in hint],
            "learn_time_embedding": "time_embedding.linear_1.weight" in shapes,
            "block_out_channels": own,
            "base_block_out_channels": base,
            "cross_attention_dim": width,
            "down_block_types": ["CrossAttnDownBlock2D" if n else "DownBlock2D" for n in transformers],
            "transformer_layers_per_block": [*(max(n, 1) for n in transformers[:-1]), max(middle, transformers[-1], 1)],
            "use_linear_projection": linear,
            "in_channels": shapes["conv_in.weight"][1],
            "layers_per_block": depth.layers,
        }
    except (KeyError, IndexError, ValueError, TypeError):
        return {}


# --- T2I-Adapter --------------------------------------------------------------------------------------------------


def _describe_adapter(
    shapes: Mapping[str, Shape], parameters: int, stored: Mapping[str, Any], trained_on: str | None
) -> Description:
    config = _adapter_config(shapes, stored)
    layers = config.get("num_res_blocks", 1)
    table = adapter_paths(shapes, layers)
    original = not any(name.startswith("adapter.") for name in shapes)
    names = rename(shapes, table, back=True) if original else {name: name for name in shapes}
    expected = expected_shapes("adapter", config) if config else {}
    known = {names[name]: shape for name, shape in shapes.items() if name in names}
    missing = tuple(name for name, shape in expected.items() if known.get(name) != shape)
    left = tuple(name for name in shapes if names.get(name) not in expected)
    wide = config.get("adapter_type") == "full_adapter_xl"
    base = trained_on or ({True: "sdxl", False: "sd15"}[wide] if expected else None)
    runs = bool(expected) and not missing
    channels = config.get("in_channels")
    return Description("t2i-adapter", base, channels, parameters, missing, left, runs, "adapter", names, config)


def _adapter_config(shapes: Mapping[str, Shape], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The ``T2IAdapter`` with these shapes; empty if they are not one's."""
    try:
        original = not any(name.startswith("adapter.") for name in shapes)
        plain = {name.removeprefix("adapter."): shape for name, shape in shapes.items()}
        rows = {int(m[1]) for name in plain if (m := re.match(r"body\.(\d{1,2})\.", name))}
        if not rows or len(rows) > 32:
            return {}
        if is_light_adapter(shapes):
            first = plain["body.0.in_conv.weight"]
            channels = [plain[f"body.{i}.out_conv.weight"][0] for i in range(max(rows))]  # the last level repeats
            inner = "body" if original else "resnets"
            layers = len({m[1] for n in plain if (m := re.match(rf"body\.0\.{inner}\.(\d{{1,2}})\.", n))})
            kind, downscale = "light_adapter", 8
        else:
            first = plain["conv_in.weight"]
            # In the original's one row, a level begins where its first resnet's input is projected.
            if original:
                layers = 2 if len(rows) % 2 == 0 else 1
                channels = [plain[f"body.{i}.block1.weight"][0] for i in sorted(rows) if i % layers == 0]
            else:
                layers = len({m[1] for n in plain if (m := re.match(r"body\.0\.resnets\.(\d{1,2})\.", n))})
                channels = [plain[f"body.{i}.resnets.0.block1.weight"][0] for i in sorted(rows)]
            # Pixels are unshuffled 8x8 for SD, 16x16 for SDXL; hints have 1 or 3 channels.
            wide = first[1] in (256, 3 * 256)
            kind, downscale = ("full_adapter_xl", 16) if wide else ("full_adapter", 8)
        config = {"in_channels": first[1] // downscale**2, "channels": channels, "num_res_blocks": layers}
        config |= {"downscale_factor": downscale, "adapter_type": kind}
        if isinstance(stored.get("downscale_factor"), int) and stored.get("adapter_type") in (kind, "full_adapter_xl"):
            factor = max(stored["downscale_factor"], 1)
            config |= {"downscale_factor": factor, "in_channels": first[1] // factor**2}
            config["adapter_type"] = stored["adapter_type"]
        return config if layers <= 8 and max(channels) <= 2**14 else {}
    except (KeyError, IndexError, ValueError, TypeError):
        return {}
