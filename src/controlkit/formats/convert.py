"""Conversion from any layout to any other, and the original's two tools: attach a fresh branch, transfer a branch.

A conversion reads everything before it writes anything, and its result is whole or absent.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from controlkit.annotators import contract, contract_from_json
from controlkit.backbones import Backbone
from controlkit.branch import gains
from controlkit.controls import KINDS, new_control
from controlkit.errors import Invalid, Mismatch, Unsupported, nearest
from controlkit.formats.control import (
    SavedControl,
    control_weights,
    read_control,
    shipped_controls,
    spec_of_weights,
    write_folder,
    write_tensors,
)
from controlkit.formats.metadata import json_object, metadata_entry
from controlkit.formats.names import PREFIX, EncoderShape, controlnet_paths, rename
from controlkit.formats.shapes import expected_shapes
from controlkit.formats.weights import Weights, as_json, encoder_tensors, labelled, low_rank, product
from controlkit.hub import shipped_names

Layout = Literal["diffusers", "cldm", "control-lora", "union"]
PREFIXES = {"control_model": PREFIX, "none": ""}
"""Beginnings of names in the original layout: as in a whole checkpoint, or of the network alone."""
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def dtype_name(dtype: torch.dtype) -> str:
    """The name among ``DTYPES`` of a type of weights."""
    return next(name for name, one in DTYPES.items() if one == dtype)


RANKS = (16, 32, 64, 128, 256)
LOST_SHARE = 0.05
"""A Control-LoRA's rank is the least of ``RANKS`` that loses no more than this share of the difference to the base."""
UNION_TYPES = 8


@dataclass(frozen=True)
class Converted:
    """The result of a conversion: its path, and notes for the user."""

    path: Path
    notes: tuple[str, ...]


@dataclass(frozen=True)
class WriteOptions:
    """How weights are written. Raises ``Invalid`` for an unknown ``dtype`` or a rank below 1."""

    dtype: str | None = None
    """``fp16``, ``bf16`` or ``fp32``; None: as stored."""
    rank: int | None = None
    """Of a Control-LoRA, from 1; None: the least that keeps 95% of the difference to the base."""
    on_tensor: Callable[[int, int], None] = lambda count, total: None
    """Called with the tensors decomposed so far at the rank that is tried, and all of them (Control-LoRA only)."""
    prefix: str | None = None
    """Of the original's names: ``control_model`` (None: the same), or ``none``, as kohya's trainer wants them."""

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise Invalid(f'There is no type "{self.dtype}" to convert to: {nearest(self.dtype, DTYPES)}')
        if self.rank is not None and self.rank < 1:
            raise Invalid(f"--rank is {self.rank}; expected at least 1.")
        if self.prefix not in (None, *PREFIXES):
            raise Invalid(f'--prefix is "{self.prefix}": {nearest(self.prefix or "", PREFIXES)}')

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The type to write in; None: as stored."""
        return DTYPES[self.dtype] if self.dtype else None


def convert(
    source: str | Path,
    target: Path,
    to: str,
    base: Backbone | None = None,
    transfer_to: Backbone | None = None,
    annotator: str | None = None,
    options: WriteOptions = WriteOptions(),  # frozen
) -> Converted:
    """Write a control in another layout; ``target`` is a folder for ``diffusers`` and ``union``, else a file.

    Args:
        to: a ``Layout``.
        base: the base the control belongs to, where one is needed: to rebuild a difference, or to make one.
        transfer_to: another base, to whose weights the control is moved: control + (new base - old base), the
            original's offset method.
        annotator: the annotator of its hints, where the source names none.

    Raises ``Invalid`` for a target or layout that cannot be, a target that exists, a missing base or numbers too large
    for ``fp16``; ``Unsupported`` where the layout has no place for such a control; ``Mismatch`` where it is not of its
    base; and all that ``read_control`` raises. ``OSError`` where the disk refuses.
    """
    _check(target, to)
    _, weights, described = read_control(source, base)
    hint = spec_of_weights(source, weights, described, annotator)
    weights = replace(weights, metadata={**weights.metadata, "controlkit.hint": hint.to_json()})
    if transfer_to is not None:
        weights = transferred(weights, base, transfer_to)
    return write(weights, target, to, transfer_to or base, options)


def attach(
    base: Backbone,
    target: Path,
    to: str,
    hint_channels: int = 3,
    annotator: str = "",
    options: WriteOptions = WriteOptions(),  # frozen
) -> Converted:
    """Write a fresh branch for a base, silent until it is trained: the original's ``tool_add_control``.

    ``hint_channels``: from 1. Raises as ``convert`` does.
    """
    _check(target, to)
    hint = replace(contract(annotator, foreign=True), channels=hint_channels)
    facts = {"base": base.name, "base_digest": base.digest, "step": 0}
    weights = control_weights(SavedControl(new_control(base, hint_channels=hint_channels), hint, facts), base)
    return write(weights, target, to, base, options)


def _check(target: Path, to: str) -> None:
    """Raise ``Invalid`` for what cannot be written, before anything is read."""
    if to not in get_args(Layout):
        raise Invalid(f'There is no layout "{to}" to convert to: {nearest(to, get_args(Layout))}')
    if to in ("cldm", "control-lora"):
        if target.suffix != ".safetensors" or target.is_dir():
            raise Invalid(f"{to} is one file: expected a name that ends in .safetensors, got {target}.")
    elif target.suffix == ".safetensors" or target.is_file():
        raise Invalid(f"{to} is a folder: expected a folder's name, got {target}.")
    if target.is_file() or (target.is_dir() and (any(target.iterdir()) or target.samefile("."))):
        raise Invalid(f"{target} is there already and is not overwritten: give another name, or delete it first.")
    if str(target) in {*shipped_names(), *shipped_controls()}:
        raise Invalid(f'"{target}" is the name of a shipped model, which would be found instead: give another name.')


def write(weights: Weights, target: Path, to: str, base: Backbone | None, options: WriteOptions) -> Converted:
    """Write weights in a layout; the second half of every conversion. Raises as ``convert`` does."""
    _check_fits(weights, to)
    if options.prefix and to != "cldm":
        raise Invalid(f"--prefix is of the names in the layout cldm; {to} has names of its own.")
    notes: list[str] = []
    if to == "union" and weights.kind == "controlnet":
        weights = as_union(weights)
        notes.append("It does with every type of hint what the control did: the types are not trained apart.")
    if to == "cldm" and weights.config.get("addition_embed_type"):
        notes.append(
            "diffusers' from_single_file reads no SDXL in this layout: give it the file that --to diffusers writes."
        )
    if to in ("cldm", "control-lora"):
        weights = as_rgb(weights)
        if weights.config.get("global_pool_conditions"):
            notes.append('It is pooled, which other programs tell by "shuffle" in a file\'s name or a YAML beside it.')
    tensors = weights.tensors
    if to == "control-lora":
        if base is None:
            raise Invalid("A Control-LoRA is a difference to a base: name the base it belongs to (--base).")
        tensors, note = control_lora(weights, base, options)
        notes.append(note)
    if options.torch_dtype == torch.float16:
        _check_reach(tensors)
    if to in ("diffusers", "union"):
        write_folder(target, replace(weights, tensors=tensors), options.torch_dtype)
        return Converted(target, tuple(notes))
    names = rename(tensors, controlnet_paths(EncoderShape.of_diffusers(weights.tensors)))
    prefix = PREFIXES[options.prefix or "control_model"] if to == "cldm" else ""
    named = {prefix + names[name]: tensor for name, tensor in tensors.items()}
    if to == "control-lora":
        named["lora_controlnet"] = torch.zeros(1)
    write_tensors(target, named, labelled(weights, to, target.stem), options.torch_dtype)
    return Converted(target, tuple(notes))


def _check_fits(weights: Weights, to: str) -> None:
    """Raise ``Unsupported`` where a layout has no place for a control of this kind."""
    if not weights.config:
        raise Unsupported(
            "No class of diffusers has this branch's body (ControlNet-lite, or of a base that is no U-Net): it has no "
            "other layout than its own."
        )
    if weights.kind in ("adapter", "xs") and to != "diffusers":
        raise Unsupported(f"A {KINDS[weights.kind].title} is another network and cannot be {to}: only --to diffusers.")
    if weights.kind == "union" and to not in ("union", "diffusers"):
        raise Unsupported(
            f"{to} cannot hold a Union's several types: only --to union, or one type of it, as NAME:TYPE."
        )


def _check_reach(tensors: Mapping[str, Tensor]) -> None:
    """Raise ``Invalid`` for numbers beyond half precision."""
    for name, tensor in tensors.items():
        reach = float(tensor.float().abs().max()) if tensor.numel() else 0.0
        if reach > torch.finfo(torch.float16).max:
            raise Invalid(f"{name} reaches {reach:.3g}, too much for fp16: use --dtype bf16.")


def save_control_lora(path: Path, control: SavedControl, base: Backbone, rank: int) -> None:
    """Write a control whose body was trained in differences of this rank as the Control-LoRA that it is."""
    write(control_weights(control, base), path, "control-lora", base, WriteOptions(rank=rank))


# --- Control-LoRA, Union, transfer --------------------------------------------------------------------------------


def control_lora(weights: Weights, base: Backbone, options: WriteOptions) -> tuple[dict[str, Tensor], str]:
    """(tensors under diffusers' names with ``up`` and ``down``, a note on what is lost).

    Matrices and convolutions of the copied encoder become low-rank differences to the base; all others stay whole.
    Raises ``Mismatch`` where the control is not of this base.
    """
    of_base = encoder_tensors(base)
    _check_shapes(weights, of_base, base)
    for rank in [options.rank] if options.rank else RANKS:
        made, lost = _in_low_rank(weights.tensors, of_base, rank, options.on_tensor)
        if lost <= LOST_SHARE:
            break
    return made, f"Rank {rank}; {lost:.1%} of the difference to the base is lost."


def _in_low_rank(
    tensors: Mapping[str, Tensor], of_base: Mapping[str, Tensor], rank: int, on_tensor: Callable[[int, int], None]
) -> tuple[dict[str, Tensor], float]:
    """(the tensors, those of the base's encoder as differences of a rank; the share of these that is lost)."""
    made: dict[str, Tensor] = {}
    energy = lost = 0.0
    for i, (name, tensor) in enumerate(tensors.items()):
        made[name] = tensor
        if name in of_base and tensor.dim() >= 2:
            difference = tensor.float() - of_base[name]
            energy += float(difference.square().sum())
            if gains(tensor, rank):
                del made[name]
                up, down = (part.to(tensor.dtype) for part in low_rank(difference, rank))
                stem = name.removesuffix(".weight")
                made[f"{stem}.up"], made[f"{stem}.down"] = up, down
                lost += float((difference - product(up.float(), down.float())).square().sum())
        on_tensor(i + 1, len(tensors))
    return made, math.sqrt(lost / energy) if energy else 0.0


def as_rgb(weights: Weights) -> Weights:
    """A ControlNet that reads its hints in BGR, made to read RGB: the original layout knows no other order."""
    if weights.config.get("controlnet_conditioning_channel_order") != "bgr":
        return weights
    first = "controlnet_cond_embedding.conv_in.weight"
    metadata = dict(weights.metadata)
    if "controlkit.hint" in metadata:
        hint = contract_from_json(metadata["controlkit.hint"])
        metadata["controlkit.hint"] = replace(hint, colour_order="RGB").to_json()
    return replace(
        weights,
        tensors={**weights.tensors, first: weights.tensors[first].flip(1)},
        config={**weights.config, "controlnet_conditioning_channel_order": "rgb"},
        metadata=metadata,
    )


def as_union(weights: Weights) -> Weights:
    """A ControlNet as a Union that does the same for every type: the weights by which types differ are zero.

    Raises ``Unsupported`` where a Union's eight heads do not divide the channels of the first level.
    """
    config = dict(weights.config)
    first = config["block_out_channels"][0]
    config["addition_time_embed_dim"] = config.get("addition_time_embed_dim") or 256
    config |= {"num_control_type": UNION_TYPES, "num_trans_channel": first, "num_trans_head": 8, "num_trans_layer": 1}
    config["num_proj_channel"] = first
    config = {key: value for key, value in config.items() if key != "mid_block_type"}
    tensors = dict(weights.tensors)
    expected = expected_shapes("union", config)
    if not expected:
        raise Unsupported(
            f"A Union's tokens have 8 heads: expected a first level of a multiple of 8 channels, got {first}."
        )
    for name, shape in expected.items():
        if name not in tensors:
            tensors[name] = torch.ones(shape) if ".ln_" in name and name.endswith("weight") else torch.zeros(shape)
    return Weights("union", tensors, config, weights.metadata)


def transferred(weights: Weights, old: Backbone | None, new: Backbone) -> Weights:
    """The control moved from its base to another: each copied weight + (new base - old base).

    The original's ``tool_transfer_control``: the branch keeps the difference that training made to its first base.
    Raises ``Invalid`` without the old base, ``Unsupported`` for a control that copies no base, ``Mismatch`` where
    shapes differ.
    """
    if old is None:
        raise Invalid("Transferring needs both bases: name the one the control belongs to (--base).")
    if weights.kind in ("adapter", "xs"):
        raise Unsupported(
            f"A {KINDS[weights.kind].title} holds no copy of its base: it runs on a fine-tuned base as it is."
        )
    before, after = encoder_tensors(old), encoder_tensors(new)
    _check_shapes(weights, before, old)
    _check_shapes(weights, after, new)
    tensors = {
        name: (tensor.float() + after[name] - before[name]).to(tensor.dtype) if name in before else tensor
        for name, tensor in weights.tensors.items()
    }
    metadata = dict(weights.metadata)
    trained = metadata_entry(metadata, "the control", "controlkit.trained", json_object, {})
    facts = {"base": new.name, "base_digest": new.digest, "transferred_from": old.name}
    metadata["controlkit.trained"] = as_json(trained | facts)
    return replace(weights, tensors=tensors, metadata=metadata)


def _check_shapes(weights: Weights, of_base: Mapping[str, Tensor], base: Backbone) -> None:
    """Raise ``Mismatch`` where a control's copy has other shapes than the base's encoder."""
    for name, tensor in of_base.items():
        came = weights.tensors.get(name)
        if came is None or came.shape != tensor.shape:
            got = "nothing" if came is None else str(tuple(came.shape))
            raise Mismatch(
                f'The control is not of the base "{base.name}": {name} is {tuple(tensor.shape)} in the base and {got} '
                "in the control."
            )
