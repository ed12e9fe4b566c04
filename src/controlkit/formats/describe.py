"""The description of a file of weights: read from names and shapes, never from the file's name, and no tensor is read.

``describe`` is printed by ``controlkit inspect``. It goes from the patterns of names that only one format has to those
that several share, brings the names to diffusers' spelling, reads the network's configuration off the shapes, builds
that network without memory, and compares.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from controlkit.backbones.rules import check_folder, check_signs
from controlkit.backbones.unet_families import FAMILIES, Family, family_of_width
from controlkit.formats.configs import (
    Shapes,
    controlnet_config,
    family_of_config,
    t2i_adapter_config,
    text_width,
    xs_config,
)
from controlkit.formats.metadata import metadata_object, stored_config, weights_file
from controlkit.formats.names import PREFIX, EncoderShape, adapter_paths, controlnet_paths, rename
from controlkit.formats.shapes import expected_shapes
from controlkit.tensors import Shape, TensorFile, open_tensors

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
    "lllite-anima": "a ControlNet-LLLite of Anima",
    "flux": "a ControlNet of Flux",
    "sd3": "a ControlNet of Stable Diffusion 3",
    "qwen-image": "a ControlNet of Qwen-Image",
    "qwen-blockwise": "a blockwise ControlNet of Qwen-Image",
    "z-image": "a ControlNet of Z-Image",
    "hunyuan-dit": "a ControlNet of Hunyuan-DiT",
    "sana": "a ControlNet of Sana",
    "cosmos": "a ControlNet of Cosmos",
    "pixart": "a ControlNet of PixArt",
    "kolors": "a ControlNet of Kolors",
    "sparsectrl": "a SparseCtrl, a ControlNet of videos",
    "brushnet": "a BrushNet",
    "controlnext": "a ControlNeXt",
    "style-adapter": "a T2I-Adapter of style, which reads what CLIP sees in a picture",
    "ip-adapter": "an IP-Adapter, which reads a picture as a prompt",
    "flux-redux": "a Redux of Flux, which reads a picture as a prompt",
}
"""Controls, by format; of those that are not run, all from ``lllite`` on, nothing but the name is known."""
_NO_CONTROLS = {
    "base": "a base and no control: give it as --base",
    "other-base": "a base and no control, of no family known by its shapes",
    "unet": "a U-Net and no control: its pipeline folder is a base",
    "vae": "a VAE and no control: give it as --vae",
    "embedding": "a textual inversion and no control: give it as --embedding",
    "lora": "an ordinary LoRA and no control: give it as --lora",
    "motion": "a motion module of AnimateDiff and no control of pictures",
    "text-tower": "a text encoder and no control",
    "unknown": "not a layout of weights known here",
}

# The first row all of whose patterns match some name decides; rows go from patterns of one format to shared ones.
_PATTERNS = [
    ("control-lora", r"lora_controlnet$"),
    ("lllite-anima", r"lllite_dit"),
    ("lllite", r"lllite_"),
    ("flux", r"controlnet_mode_embedder\.|controlnet_single_blocks\."),
    ("flux", r"double_blocks\.", r"controlnet_blocks\.|input_hint_block\."),  # XLabs'
    ("flux-redux", r"redux_(up|down)\."),
    ("union", r"task_embedding$|control_add_embedding\."),
    ("controlnet-xs", r"control_to_base_for_conv_in\.|down_blocks\.\d+\.(ctrl_to_base|base_to_ctrl)\."),
    ("controlnet-xs", r"(control_model\.)?enc_zero_convs_(in|out)\."),
    ("z-image", r"control_all_x_embedder|control_layers\.|control_noise_refiner\."),
    ("hunyuan-dit", r"after_proj_list\."),
    ("qwen-blockwise", r"(controlnet_)?blocks\.\d+\.y_rms\."),
    ("pixart", r".*(copied_block|before_proj)\."),
    ("cosmos", r"control_blocks\.\d+\.", r"patch_embed(_base)?\."),
    ("sana", r"caption_norm\.", r"controlnet_blocks\.|input_block\."),
    ("sd3", r"pos_embed_input\.|control_type$", r"controlnet_blocks\.|transformer_blocks\.0\.adaLN_modulation"),
    ("qwen-image", r"controlnet_x_embedder\.|controlnet_blocks\.", r"transformer_blocks\.0\.img_mod\.|txt_norm\."),
    ("flux", r"controlnet_x_embedder\."),
    ("brushnet", r"brushnet_(down|mid|up)_block|conv_in_condition\."),
    ("controlnext", r"(controlnet\.)?mid_convs\.\d+\.", r"(controlnet\.)?down_res\.\d+\."),
    ("sparsectrl", r".*motion_modules\.", r".*(controlnet_|input_hint_block|zero_convs)"),
    ("motion", r".*motion_modules\."),
    ("ip-adapter", r"image_proj(_model)?\.|ip_adapter\."),
    ("style-adapter", r"style_embedding$"),
    ("kolors", r"encoder_hid_proj\.", r"controlnet_cond_embedding\."),
    ("diffusers", r"controlnet_cond_embedding\.conv_in\.weight$"),
    ("cldm", r"(control_model\.)?input_hint_block\.0\.weight$"),
    ("t2i-adapter", r"(adapter\.)?body\.\d+\.(resnets\.\d+\.|body\.\d+\.)?(block1|in_conv)\.weight$"),
    ("base", r"model\.diffusion_model\.(input|output)_blocks\."),
    ("unet", r"up_blocks\.\d+\.resnets\."),
    ("lora", r"lora_(unet|te)|.*\.lora_(A|down|up)\b"),
    ("vae", r"(first_stage_model\.)?encoder\.conv_in\.", r"(first_stage_model\.)?decoder\.conv_in\."),
    ("text-tower", r"(text_model\.)?encoder\.layers\.0\.self_attn\."),
    ("embedding", r"emb_params$|clip_[lg]$|<[^<>]+>$|\*$"),
]
_OF_FAMILY = ("base", "unet", "lora", "controlnet-xs")
_OF_BASE = ("conv_in.", "time_embedding.", "add_embedding.", "down_blocks.", "mid_block.")
_FLAGS = ("difference", "lora_controlnet")  # empty tensors by which a file says what it is


@dataclass(frozen=True)
class Description:
    """A file of weights, described. The first seven fields are the keys of ``inspect --json``."""

    format: str
    base: str | None = None
    """``sd15``, ``sd21``, ``sdxl``, or the base that a control of ours names as its own; None where it is unknown."""
    hint_channels: int | None = None
    parameters: int = 0
    missing: tuple[str, ...] = ()
    """Tensors its network has and the file lacks, or has in another shape; in diffusers' names."""
    unexpected: tuple[str, ...] = ()
    """Tensors the network has no place for, as the file names them."""
    runs: bool = False
    """Whether it is read as a control: it lacks nothing, and nothing is too much but what lies beside the network."""
    kind: str | None = None
    """``controlnet``, ``union``, ``xs`` or ``adapter``; None where ControlKit does not run it."""
    names: Mapping[str, str] = field(default_factory=dict)
    """The file's names -> diffusers'."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The diffusers configuration, read off the shapes and the stored configuration."""
    family: Family | None = None
    misshapen: tuple[str, ...] = ()
    """A phrase for each tensor of another shape: its shape, and the expected one."""

    def sentence(self) -> str:
        """One line: what it is, for which base, of which hints, what is missing, and whether it runs."""
        text = (_TITLES | _NO_CONTROLS)[self.format]
        if self.base:
            text += f" for {self.base}"
        if self.hint_channels:
            text += f", hints of {self.hint_channels} channel{'s' if self.hint_channels > 1 else ''}"
        text += f", {self.parameters:,} parameters"
        for verb, names in (("lacks", self.missing), ("has no place for", self.unexpected)):
            if names:
                text += f"; {verb} {len(names)} tensor{'s' if len(names) > 1 else ''}, first {names[0]}"
        if self.misshapen:
            text += f"; {self.misshapen[0]}"
        if self.kind is None and self.format in _TITLES:
            text += "; recognised, but not run yet"
        elif self.kind:
            text += "; runs" if self.runs else "; does not run"
        return text[0].upper() + text[1:] + "."

    def to_json(self) -> dict[str, Any]:
        """The seven figures, as ``inspect --json`` prints them."""
        keys = ("format", "base", "hint_channels", "parameters", "missing", "unexpected", "runs")
        return {key: list(v) if isinstance(v := getattr(self, key), tuple) else v for key in keys}


def describe(path: Path) -> Description:
    """Describe a file or folder of weights.

    Raises ``NotFound`` if there is none, ``Invalid`` or ``Unsupported`` if it cannot be read at all, or is a base with
    rules that are not followed here.
    """
    if (path / "model_index.json").is_file():  # a pipeline's folder: its U-Net shows its family
        check_folder(path)
        return replace(describe(path / "unet"), format="base")
    header = open_tensors(weights_file(path))
    return describe_tensors(header, stored_config(header))


# --- by format ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """The contents of a file, before it is known what network they are."""

    format: str
    shapes: dict[str, Shape]
    stored: Mapping[str, Any]
    trained_base: str | None
    parameters: int


def describe_tensors(header: TensorFile, stored: Mapping[str, Any]) -> Description:
    """Describe a file by its header and the configuration that is stored with it."""
    shapes = dict(header.shapes)
    layout = _format_of(shapes)
    if layout == "cldm" and any(name.startswith(PREFIX) for name in shapes):  # the rest of a checkpoint is no control's
        shapes = {n: s for n, s in shapes.items() if n.startswith(PREFIX) or n == "difference"}
    parameters = sum(math.prod(shape) for name, shape in shapes.items() if name not in _FLAGS)
    base = metadata_object(header.metadata, "controlkit.trained").get("base")
    named = isinstance(base, str) and len(base) < 100 and base.isprintable()
    found = _Found(layout, shapes, stored, base if named else None, parameters)
    spec, config = (metadata_object(header.metadata, f"controlkit.{key}") for key in ("spec", "config"))
    if layout == "diffusers" and spec and not config:  # a body that no diffusers class has
        return _describe_own(found)
    if layout == "t2i-adapter":
        return _describe_adapter(found)
    if layout == "controlnet-xs" and "control_to_base_for_conv_in.weight" in shapes:
        return _compare(found, "xs", xs_config(shapes, stored), {name: name for name in shapes}, shapes)
    if layout in ("diffusers", "union", "cldm", "control-lora"):
        return _describe_controlnet(found)
    if layout == "base":
        family = family_of_width(text_width(shapes) or 0)
        check_signs(header.path, shapes, pooled=family is None or family.pooled_width > 0)
    return _describe_other(found)


def _format_of(shapes: Shapes) -> str:
    for name, *patterns in _PATTERNS:
        tests = [re.compile(pattern) for pattern in patterns]
        if all(any(test.match(tensor) for tensor in shapes) for test in tests):
            return name
    return "unknown"


def _compare(found: _Found, kind: str, config: dict[str, Any], names: Mapping[str, str], known: Shapes) -> Description:
    """Compare a file with the network of a configuration.

    ``names``: the file's names -> diffusers', without those that have no counterpart. ``known``: shapes by diffusers'
    names, a low-rank pair as the weight it belongs to.
    """
    expected = expected_shapes(kind, config) if config else {}
    low_rank = found.format == "control-lora"
    flags = _FLAGS if found.format in ("cldm", "control-lora") else ()
    missing = tuple(name for name, shape in expected.items() if known.get(name) != shape)
    if low_rank:  # it takes from its base whatever it lacks of the encoder
        missing = tuple(name for name in missing if name in known or not name.startswith(_OF_BASE))
    places = {name: _whole(place) if low_rank else place for name, place in names.items()}
    unexpected = tuple(n for n in found.shapes if places.get(n) not in expected and n not in flags)
    family = family_of_config(config)
    return Description(
        format=found.format,
        base=found.trained_base or (family.name if family else None),
        hint_channels=config.get("conditioning_channels"),
        parameters=found.parameters,
        missing=missing,
        unexpected=unexpected,
        runs=bool(expected) and not missing and not any(name in names for name in unexpected),
        kind=kind,
        names=names,
        config=config,
        family=family,
        misshapen=tuple(f"{n} is {known[n]} in the file, expected {expected[n]}" for n in missing if n in known),
    )


def _describe_controlnet(found: _Found) -> Description:
    """A ControlNet or a Union, in any of their layouts."""
    names = _diffusers_names(found.shapes, found.format)
    known = {names[name]: shape for name, shape in found.shapes.items() if name in names}
    if found.format == "control-lora":
        known = _whole_shapes(known)
    union = found.format == "union"
    config = controlnet_config(known, found.stored, union)
    described = _compare(found, "union" if union else "controlnet", config, names, known)
    if found.format == "cldm" and "difference" in found.shapes:
        return replace(described, format="cldm-difference")
    return described


def _describe_own(found: _Found) -> Description:
    """A branch whose body no diffusers class has, under our own names: whether it fits shows on its base."""
    entry = found.shapes["controlnet_cond_embedding.conv_in.weight"]
    channels = entry[1] if len(entry) == 4 else None
    return Description(
        format="controlkit",
        base=found.trained_base,
        hint_channels=channels,
        parameters=found.parameters,
        runs=channels is not None,
        kind="controlnet",
        names={name: name for name in found.shapes},
    )


def _describe_adapter(found: _Found) -> Description:
    """A T2I-Adapter, under diffusers' names or the original's."""
    shapes = found.shapes
    config = t2i_adapter_config(shapes, found.stored)
    names = {name: name for name in shapes}
    if not any(name.startswith("adapter.") for name in shapes):
        names = rename(shapes, adapter_paths(shapes, config.get("num_res_blocks", 1)), back=True)
    known = {names[name]: shape for name, shape in shapes.items() if name in names}
    described = _compare(found, "adapter", config, names, known)
    made_for = "sdxl" if config.get("adapter_type") == "full_adapter_xl" else "sd15"
    readable = described.runs or described.missing  # so there is a network to compare with
    base = found.trained_base or (made_for if readable else None)
    return replace(described, base=base, hint_channels=config.get("in_channels"))


def _describe_other(found: _Found) -> Description:
    """A base, a LoRA, or a control that is recognised and not run."""
    layout, names = found.format, list(found.shapes)
    family = family_of_width(text_width(found.shapes) or 0) if layout in _OF_FAMILY else None
    base = family.name if family else "sdxl" if any(name.startswith("lllite_unet") for name in names) else None
    if layout == "unknown" and len(names) <= 2 and all(0 < len(shape) <= 2 for shape in found.shapes.values()):
        layout = "embedding"  # of diffusers: the word as the only name
    if layout == "embedding":
        widths = [shape[-1] for shape in found.shapes.values() if shape]
        towers = {name: [tower[0] for tower in row.towers] for name, row in FAMILIES.items()}
        base = next((name for name, known in towers.items() if sorted(widths) == sorted(known)), None)
        layout = layout if base or found.format == "embedding" else "unknown"
    if layout in ("base", "unet") and family is None:
        layout = "other-base"
    return Description(layout, base, parameters=found.parameters, family=family)


# --- names ----------------------------------------------------------------------------------------------------------


def _diffusers_names(shapes: Mapping[str, Shape], layout: str) -> dict[str, str]:
    """The file's names -> diffusers'; those that have no counterpart are left out."""
    if layout in ("diffusers", "union"):
        return {name: name.replace(".attn.in_proj.", ".attn.in_proj_") for name in shapes}  # as some write Unions
    bare = {name: name.removeprefix(PREFIX) for name in shapes}
    renamed = rename(bare.values(), controlnet_paths(EncoderShape.of_cldm(bare.values())), back=True)
    return {name: renamed[short] for name, short in bare.items() if short in renamed}


def _whole(name: str) -> str:
    """The weight that a Control-LoRA's ``up`` or ``down`` belongs to; other names as they are."""
    path, _, last = name.rpartition(".")
    return f"{path}.weight" if last in ("up", "down") else name


def _whole_shapes(known: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes with each pair (up, down) taken as the weight that their product is added to."""
    whole = {name: shape for name, shape in known.items() if not name.endswith((".up", ".down"))}
    for name, up in known.items():
        down = known.get(f"{name.removesuffix('.up')}.down")
        if name.endswith(".up") and down and len(up) >= 2 and len(down) >= 2 and math.prod(up[1:]) == down[0]:
            whole[_whole(name)] = (up[0], *down[1:])
        elif name.endswith((".up", ".down")):
            whole.setdefault(_whole(name), ())  # half a pair, or a pair that has no product: no weight has this shape
    return whole
