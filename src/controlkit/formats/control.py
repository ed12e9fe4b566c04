"""Controls with their contracts: read from any format for a base, and written as diffusers folders."""

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from controlkit.annotators import contract, contract_from_json, fits
from controlkit.backbones import Backbone
from controlkit.backbones.unet_families import family_of_width
from controlkit.branch import ControlNetwork, ControlSpec
from controlkit.controls import KINDS, TYPES, OneType, UnionBranch
from controlkit.errors import Invalid, Mismatch, NotFound, UserError, nearest
from controlkit.files import SCRATCH, home_path, scratch_folder, write_atomic
from controlkit.formats.describe import Description
from controlkit.formats.metadata import WEIGHTS, json_object, metadata_entry, weights_in
from controlkit.formats.networks import network_weights, read_network, stored_spec
from controlkit.formats.weights import Weights, as_controlnet, as_json, labelled, read_weights, types_differ_by_code
from controlkit.hub import (
    is_sealed,
    is_shipped,
    meant_path,
    names_a_repository,
    seal,
    shipped_names,
    shipped_path,
    snapshot,
)
from controlkit.images import HintSpec
from controlkit.tensors import PICKLES, open_tensors

_HUB_FILES = ["config.json", WEIGHTS, f"{WEIGHTS}.index.json", "diffusion_pytorch_model-*-of-*.safetensors"]
_SCALE_KEY = "guidance"
"""The key of ``hint_cfg_scale`` in a file's ``controlkit.use``: weights that are shipped have it."""


@dataclass(frozen=True)
class SavedControl:
    """A control with its hint's contract and the record of its training."""

    branch: ControlNetwork
    hint: HintSpec
    trained: Mapping[str, Any] = field(default_factory=dict)
    """``base``, ``base_digest``, ``step``, ``data``, ``recipe`` and other facts that its training recorded."""
    hints: Mapping[str, HintSpec] = field(default_factory=dict)
    """A Union's contracts by type, where it was trained here."""
    hint_cfg_scale: float = 1.0
    """The scale of guidance by its hint that it is meant to be used with, from 0; 1 unless its recipe says more."""
    is_own: bool = True
    """Whether the record was made here or is the package's. A stranger's says what it likes, and is not followed."""

    @property
    def trained_on(self) -> dict[str, Any]:
        """The ``data``, their ``columns`` and the pictures' ``size``, as the record of its training has them."""
        recipe = self.trained.get("recipe")
        recipe = recipe if isinstance(recipe, dict) else {}
        data = recipe.get("data")
        columns = data.get("columns") if isinstance(data, dict) else None
        return {"data": self.trained.get("data"), "columns": columns, "size": recipe.get("size")}

    def sealed(self) -> "SavedControl":
        """The same with a record that is known as one's own when it is read again."""
        return replace(self, trained={**self.trained, "seal": seal(self.trained_on)})

    def contract_of(self, kind: str) -> HintSpec:
        """The contract of its hints, ""; of a Union's hints of a type: its own, or the annotator's of that name."""
        if not kind:
            return self.hint
        return self.hints.get(kind) or self.hint.made_by(contract(kind, foreign=True))


# --- writing ------------------------------------------------------------------------------------------------------


def control_weights(control: SavedControl, base: Backbone) -> Weights:
    """A control's weights under diffusers' names, with its contract, spec and record in the metadata.

    A body trained in low ranks is written as the copy that it amounts to. Raises ``Unsupported`` where the control's
    kind has no file.
    """
    branch = control.branch
    kind, tensors, config = network_weights(branch, base, control.hint)
    facts: dict[str, Any] = {"signature": base.signature, "trained": dict(control.trained)}
    if branch.spec is not None:
        facts["spec"] = asdict(stored_spec(branch.spec))
    if control.hint_cfg_scale != 1.0:
        facts["use"] = {_SCALE_KEY: control.hint_cfg_scale}
    if control.hints:
        facts |= {"hints": {kind: hint.to_json() for kind, hint in control.hints.items()}}
    metadata = {f"controlkit.{key}": as_json(value) for key, value in facts.items()}
    return Weights(kind, tensors, config, metadata | {"controlkit.hint": control.hint.to_json()})


def save_control(folder: Path, control: SavedControl, base: Backbone, dtype: torch.dtype = torch.float32) -> None:
    """Write ``folder`` whole or not at all; one that diffusers reads, but for a ControlNet-lite's."""
    write_folder(folder, control_weights(control, base), dtype)


def write_folder(folder: Path, weights: Weights, dtype: torch.dtype | None = None) -> None:
    """Write weights as a diffusers folder, whole or not at all; in the type they have, or in ``dtype``."""
    from diffusers import __version__ as diffusers_version

    head = {"_class_name": KINDS[weights.kind].diffusers_class, "_diffusers_version": diffusers_version}
    config = head | dict(weights.config) if weights.config else {"_class_name": "ControlBranch"}
    with scratch_folder(folder.parent) as scratch:
        metadata = {"format": "pt"} | labelled(weights, "diffusers", folder.name)
        write_tensors(scratch / folder.name / WEIGHTS, weights.tensors, metadata, dtype)
        words = json.dumps(config, indent=2, default=list) + "\n"
        write_atomic(scratch / folder.name / "config.json", words.encode())
        _put_in_place(scratch / folder.name, folder)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype | None = None
) -> None:
    """Write a safetensors file of these tensors, whole or not at all; in the type they have, or in ``dtype``."""
    made = {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in tensors.items()}
    write_atomic(path, lambda scratch: save_file(made, scratch, dict(metadata)))


def _put_in_place(scratch: Path, folder: Path) -> None:
    """Rename ``scratch`` to ``folder``; a folder that it replaces goes last, and comes back if the renaming fails."""
    before = folder.with_name(f"{SCRATCH}before-{folder.name}")
    if before.exists():  # of a process that was killed here
        shutil.rmtree(before) if folder.exists() else os.replace(before, folder)
    if folder.exists():
        os.replace(folder, before)
    try:
        os.replace(scratch, folder)
    except BaseException:
        if before.exists():
            os.replace(before, folder)
        raise
    shutil.rmtree(before, ignore_errors=True)


# --- reading ------------------------------------------------------------------------------------------------------


def shipped_controls() -> dict[str, tuple[Path, str]]:
    """Shipped controls by name: the folder, and which type of it if that is a Union (else "")."""
    found: dict[str, tuple[Path, str]] = {}
    for name in shipped_names():
        if (shipped_path(name) / WEIGHTS).is_file():
            with safe_open(shipped_path(name) / WEIGHTS, framework="pt") as file:
                types = json.loads((file.metadata() or {}).get("controlkit.hints", "{}"))
            found |= {kind: (shipped_path(name), kind) for kind in types}
            found[name] = (shipped_path(name), "")
    return found


def shipped_folder(name: str) -> Path:
    """The folder that is shipped under a name; of a Union's type, the Union's. ``NotFound`` for any other name."""
    controls = shipped_controls()
    if name not in controls and name not in shipped_names():
        known = sorted({*controls, *shipped_names()})
        raise NotFound(f'Nothing is shipped under the name "{name}": {nearest(name, known)}')
    return controls[name][0] if name in controls else shipped_path(name)


def _control_folders(path: Path) -> list[Path]:
    """The folders in which a control of this path's may lie: its own, a run's."""
    return [one for one in (path, path / "control") if weights_in(one)]


def _holds_weights(path: Path) -> bool:
    """Whether a file is one of weights, or a folder or run holds a control, or several."""
    if path.is_file():
        try:
            return bool(open_tensors(path).shapes)
        except UserError:
            return False
    return bool(_control_folders(path)) or any(path.glob(f"*/{WEIGHTS}")) or any(path.glob(f"control/*/{WEIGHTS}"))


def named_path(name: str | Path) -> Path:
    """The file or folder that a name means: what is shipped under it, or a path, whether it is there or not."""
    return meant_path(name, {*shipped_names(), *shipped_controls()}, _holds_weights) or shipped_folder(str(name))


def control_path(name: str | Path) -> Path:
    """The file or folder of a control: a shipped name, a file, a control folder, a run's folder, or a hub's name.

    Raises ``NotFound`` if there is none, ``Invalid`` if a folder holds several.
    """
    path = named_path(name)
    if path.is_file():
        return path
    if found := _control_folders(path):
        return found[0]
    for folder in (path, path / "control"):  # a run whose hints are branches
        within = sorted(file.parent for file in folder.glob(f"*/{WEIGHTS}"))
        if len(within) > 1:
            raise Invalid(f"{folder} holds several controls: name one of {', '.join(map(str, within))}.")
    if names_a_repository(str(name)) and not path.exists() and path.suffix.lower() not in (".safetensors", *PICKLES):
        return snapshot(str(name), "control", _HUB_FILES, [], lambda folder: bool(_control_folders(folder)))
    raise NotFound(
        f'There is no control "{name}": expected one of {", ".join(shipped_controls()) or "(none is shipped)"}, '
        f"a file of weights, a folder that holds {WEIGHTS}, or a hub's owner/name."
    )


def type_of(name: str | Path) -> tuple[str | Path, str]:
    """(a Union, a type) that a name means: a shipped type's own name, or ``UNION:TYPE``; else the name and ""."""
    if (shipped := shipped_controls().get(str(name))) and named_path(name) == shipped[0]:
        return name, shipped[1]
    union, colon, kind = str(name).rpartition(":")
    return (union, kind) if colon and kind in TYPES and not home_path(name).exists() else (name, "")


def load_control(name: str | Path, base: Backbone, annotator: str | None = None) -> SavedControl:
    """Read a control of any format for ``base``, frozen, on its device and in its type.

    ``annotator`` names the hints (``canny``, ``inpaint``, ...) where the file does not. A Union's type is a control by
    itself, named ``UNION:TYPE``, or by the type's name where it is shipped.

    Raises ``NotFound`` if there is none, ``Mismatch`` if it was made for a base of another shape, ``Invalid`` if the
    file is damaged or its metadata contradicts it, ``Unsupported`` if it is of a kind that is not run.
    """
    path, weights, described = read_control(name, base)
    facts = weights.metadata
    spec = metadata_entry(facts, path, "controlkit.spec", _spec, ControlSpec())
    if weights.config.get("global_pool_conditions"):
        spec = replace(spec, pool="mean")
    hint = spec_of_weights(name, weights, described, annotator)
    kind = type_of(name)[1] if weights.kind == "union" else ""
    hints = metadata_entry(facts, path, "controlkit.hints", _hints, {})
    trained = metadata_entry(facts, path, "controlkit.trained", json_object, {})
    hint_cfg_scale = metadata_entry(facts, path, "controlkit.use", _hint_cfg_scale, 1.0)
    _check_base(name, path, weights, described, base)
    if described.hint_channels not in (None, base.hint_shape(hint.channels)[0]):
        raise Invalid(
            f'The control "{name}" reads hints of {described.hint_channels} channels, and its contract says '
            f"{hint.channels}."
        )
    branch = read_network(name, weights, base, spec)
    if not hint.annotator and weights.kind != "union":
        warnings.warn(
            f'"{name}" does not say what its hints are: pictures are taken as they are, in [{hint.low:g}, '
            f"{hint.high:g}]. Name the annotator that makes them (canny, scribble, ...).",
            stacklevel=2,
        )
    ready = branch.to(base.device, base.dtype).eval().requires_grad_(False)
    saved = SavedControl(ready, hint, trained, hints, hint_cfg_scale)
    if not is_shipped(path):
        saved = replace(saved, is_own=is_sealed(trained.get("seal"), saved.trained_on))
    if kind:
        one = OneType(cast("UnionBranch", branch), kind)
        saved = replace(saved, branch=one, hint=saved.contract_of(kind), hints={})
    return saved


def read_control(name: str | Path, base: Backbone | None) -> tuple[Path, Weights, Description]:
    """(path, weights, description) of a control; a Union's type as an ordinary ControlNet, where it can be one.

    Raises as ``load_control`` does.
    """
    union, kind = type_of(name)
    path = control_path(union)
    weights, described = read_weights(path, base)
    if not kind:
        return path, weights, described
    if weights.kind != "union":
        raise Invalid(f'"{union}" is no Union and has no types: name it without ":{kind}".')
    if not TYPES[kind] < weights.config["num_control_type"]:
        raise NotFound(f'The Union "{union}" knows {weights.config["num_control_type"]} types; {kind} is none of them.')
    if types_differ_by_code(weights):
        hints = metadata_entry(weights.metadata, path, "controlkit.hints", _hints, {})
        weights = as_controlnet(weights, TYPES[kind])
        own = {"controlkit.hint": (hints.get(kind) or contract(kind, foreign=True)).to_json()}
        weights = replace(weights, metadata={**weights.metadata, **own})
        described = replace(described, kind="controlnet")
    return path, weights, described


def _spec(text: str) -> ControlSpec:
    """The spec in a file's metadata; ``ValueError`` for keys or values that no spec has."""
    try:
        spec = ControlSpec(**json_object(text))
        if type(spec.rank) is not int or spec.rank > 4096:
            raise ValueError(f"rank is {spec.rank}")
        return spec
    except TypeError as error:
        raise ValueError(str(error)) from error


def _hints(text: str) -> dict[str, HintSpec]:
    """A Union's contracts by type; ``ValueError`` for a type that no Union has, or a contract that is none."""
    texts = json_object(text)
    if strange := texts.keys() - TYPES.keys():
        raise ValueError(f"there is no type {sorted(strange)[0]}")
    if not all(isinstance(one, str) for one in texts.values()):
        raise ValueError("a contract is no text")
    return {kind: contract_from_json(one) for kind, one in texts.items()}


def _hint_cfg_scale(text: str) -> float:
    """The scale of guidance by the hint in a file's metadata; ``ValueError`` if it is no number from 0 to 100."""
    value = json_object(text).get(_SCALE_KEY)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise ValueError(f"guidance by the hint is {value}")
    return float(value)


def spec_of_weights(name: str | Path, weights: Weights, described: Description, annotator: str | None) -> HintSpec:
    """The contract of a file's hints, made by ``annotator`` where the file names none.

    A file without a contract has its family's: ControlNets and T2I-Adapters alike read hints in [0, 1]. Raises
    ``Invalid`` for a contract that is none, ``Mismatch`` if the file names an annotator of another family.
    """
    keys = ("controlnet_conditioning_channel_order", "conditioning_channel_order")
    order = next((str(weights.config[key]).upper() for key in keys if key in weights.config), "RGB")
    foreign = HintSpec("", channels=described.hint_channels or 3, colour_order="BGR" if order == "BGR" else "RGB")
    hint = metadata_entry(weights.metadata, name, "controlkit.hint", contract_from_json, foreign)
    if not annotator or (hint.annotator and fits(annotator, hint.annotator)):
        return hint
    if hint.annotator:
        raise Mismatch(f'The hints of "{name}" are made by {hint.annotator}, not by {annotator}.')
    return hint.made_by(contract(annotator, foreign=True))


def _check_base(name: str | Path, path: Path, weights: Weights, described: Description, base: Backbone) -> None:
    """Raise ``Mismatch`` where a control was made for a base of another shape, or of another family."""
    signature = metadata_entry(weights.metadata, path, "controlkit.signature", json_object, None)
    own = json.loads(json.dumps(base.signature))
    if signature is not None and signature != own:
        differing = [key for key in own if signature.get(key) != own[key]]
        raise Mismatch(
            f'The control "{name}" was made for the base "{described.base or "unknown"}" and not for "{base.name}": '
            f"they differ in {', '.join(differing)}. Use the control with its own base, or train one for this base."
        )
    width = described.config.get("cross_attention_dim")
    if width is not None and width != own.get("text_width"):
        reads = own.get("text_width")
        families = [f"{row.name} " if (row := family_of_width(w or 0)) else "" for w in (width, reads)]
        raise Mismatch(
            f'The control "{name}" is for {families[0]}bases that read prompts {width} wide; "{base.name}" reads '
            f"{families[1]}prompts {reads} wide. Use a control made for this base, or its own base."
        )
