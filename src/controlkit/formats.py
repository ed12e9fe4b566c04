"""Controls on disk: a valid diffusers ControlNet folder whose metadata also holds the hint's contract.

One table of names, ``key_table``, is read both ways. Weights are safetensors; nothing is unpickled.
"""

import inspect
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from controlkit.backbones import UNetBase
from controlkit.branch import ControlBranch, ControlSpec
from controlkit.errors import UserError
from controlkit.hub import shipped_names, where
from controlkit.images import SCRATCH, Hint, write_atomic

WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class SavedControl:
    """A branch with what it needs to be used rightly: its hint's contract, and what it was trained on."""

    branch: ControlBranch
    hint: Hint
    trained: Mapping[str, Any] = field(default_factory=dict)
    """``base``, ``base_digest``, ``step``, ``data`` and what else the recipe records."""


def key_table(branch: ControlBranch) -> dict[str, str]:
    """Our parameter names -> diffusers' ``ControlNetModel`` names, for this branch's shape."""
    last = len(branch.hint_encoder.convs) - 1
    hint = {0: "conv_in", last: "conv_out"} | {i: f"blocks.{i - 1}" for i in range(1, last)}
    prefixes = {f"hint_encoder.convs.{i}.": f"controlnet_cond_embedding.{name}." for i, name in hint.items()}
    skips = [tap.name for tap in branch.taps if tap.site == "skip"]
    prefixes |= {f"joins.{name}.": f"controlnet_down_blocks.{i}." for i, name in enumerate(skips)}
    prefixes |= {"joins.middle.": "controlnet_mid_block.", "body.": ""}
    table = {}
    for key in branch.state_dict():
        ours = next(prefix for prefix in prefixes if key.startswith(prefix))
        table[key] = prefixes[ours] + key.removeprefix(ours)
    return table


def _absent_joins(branch: ControlBranch) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the joins that diffusers has and this branch leaves out."""
    absent: dict[str, tuple[int, ...]] = {}
    for i, tap in enumerate(tap for tap in branch.taps if tap.site == "skip"):
        if tap.name not in branch.joins:
            absent[f"controlnet_down_blocks.{i}.weight"] = (tap.channels, tap.channels, 1, 1)
            absent[f"controlnet_down_blocks.{i}.bias"] = (tap.channels,)
    return absent


def _is_diffusers_shaped(spec: ControlSpec) -> bool:
    return spec.body == "copy"


def _diffusers_config(base: UNetBase, branch: ControlBranch, hint: Hint) -> dict[str, Any]:
    """The ``config.json`` of a ControlNetModel with this branch's shapes."""
    from diffusers import ControlNetModel
    from diffusers import __version__ as diffusers_version

    unet, theirs = base.unet.config, {}
    for name in inspect.signature(ControlNetModel.__init__).parameters:
        if name in unet:
            theirs[name] = unet[name]
    convs = branch.hint_encoder.convs
    widths = [convs[0].out_channels] + [conv.out_channels for conv in convs[2:-1:2]]
    theirs |= {"conditioning_channels": convs[0].in_channels, "conditioning_embedding_out_channels": widths}
    theirs["controlnet_conditioning_channel_order"] = hint.colour_order.lower()
    return {"_class_name": "ControlNetModel", "_diffusers_version": diffusers_version, **theirs}


def save_control(folder: Path, control: SavedControl, base: UNetBase, dtype: torch.dtype = torch.float32) -> None:
    """Write ``folder`` whole or not at all. A copy-bodied branch makes a folder that stock diffusers loads.

    Joins that ``taps: mid`` leaves out are written as zeros, which is what they are.
    """
    branch = control.branch
    table = key_table(branch)
    tensors = {table[key]: value.detach().to("cpu", dtype) for key, value in branch.state_dict().items()}
    config: dict[str, Any] = {"_class_name": "ControlBranch", "spec": asdict(branch.spec)}
    if _is_diffusers_shaped(branch.spec):
        config = _diffusers_config(base, branch, control.hint)
        tensors |= {key: torch.zeros(shape, dtype=dtype) for key, shape in _absent_joins(branch).items()}
    metadata = {
        "format": "pt",
        "controlkit.hint": control.hint.to_json(),
        "controlkit.spec": json.dumps(asdict(branch.spec)),
        "controlkit.signature": json.dumps(base.signature),
        "controlkit.trained": json.dumps(dict(control.trained)),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=SCRATCH))
    try:
        write_atomic(scratch / WEIGHTS, save({k: v.contiguous() for k, v in tensors.items()}, metadata))
        write_atomic(scratch / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        scratch.chmod(0o755)
        _put_in_place(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _put_in_place(scratch: Path, folder: Path) -> None:
    """Rename ``scratch`` to ``folder``; what was there goes last, and comes back if the renaming fails."""
    before = scratch.with_name(f"{scratch.name}.before")
    if folder.exists():
        os.replace(folder, before)
    try:
        os.replace(scratch, folder)
    except BaseException:
        if before.exists():
            os.replace(before, folder)
        raise
    shutil.rmtree(before, ignore_errors=True)


def control_folder(name: str | Path) -> Path:
    """The folder of a control: a shipped name, a control folder, or a training run's folder."""
    if str(name) in shipped_names():
        return where(str(name))
    folder = Path(name)
    for candidate in (folder, folder / "control"):
        if (candidate / WEIGHTS).is_file():
            return candidate
    names = [n for n in shipped_names() if (where(n) / WEIGHTS).is_file()]
    raise UserError(
        f'There is no control "{name}": expected one of {", ".join(names) or "(none is shipped)"}, '
        f"or a folder that holds {WEIGHTS}."
    )


def _parsed(folder: Path, metadata: Mapping[str, str], key: str, parse: Callable[[str], Any], default: Any) -> Any:
    """A metadata entry's value, ``default`` if it is not there."""
    try:
        return parse(metadata[key]) if key in metadata else default
    except (TypeError, ValueError) as error:
        raise UserError(f'{folder / WEIGHTS} has a "{key}" that cannot be read ({error}).') from error


def load_control(name: str | Path, base: UNetBase) -> SavedControl:
    """Read a control for ``base``; ``UserError`` if it was made for a base of another shape."""
    folder = control_folder(name)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            keys: list[str] = file.keys()  # this is no mapping: it cannot be iterated itself
            tensors: dict[str, Tensor] = {key: file.get_tensor(key).float() for key in keys}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read ({error}): expected a whole safetensors file.") from error
    spec = _parsed(folder, metadata, "controlkit.spec", lambda text: ControlSpec(**json.loads(text)), ControlSpec())
    hint = _parsed(folder, metadata, "controlkit.hint", Hint.from_json, Hint("canny"))
    trained = _parsed(folder, metadata, "controlkit.trained", json.loads, {})
    signature = _parsed(folder, metadata, "controlkit.signature", json.loads, None)
    if signature is not None and signature != json.loads(json.dumps(base.signature)):
        differing = [key for key in base.signature if signature.get(key) != json.loads(json.dumps(base.signature[key]))]
        raise UserError(
            f'The control "{name}" was made for the base "{trained.get("base", "unknown")}" and not for "{base.name}": '
            f"they differ in {', '.join(differing)}. Use the control with its own base, or train one for this base."
        )
    channels = tensors.get("controlnet_cond_embedding.conv_in.weight", torch.empty(0, 3)).shape[1]
    branch = base.new_branch(spec, hint_channels=channels)
    table = key_table(branch)
    missing = [theirs for theirs in table.values() if theirs not in tensors]
    if missing:
        raise UserError(
            f'The control "{name}" does not fit the base "{base.name}": it lacks {len(missing)} of the {len(table)} '
            f"tensors this base's branch has, first {missing[0]}."
        )
    strange = sorted(tensors.keys() - set(table.values()) - _absent_joins(branch).keys())
    if strange:
        raise UserError(
            f'The control "{name}" does not fit the base "{base.name}": its branch has no '
            f"place for {len(strange)} of the file's tensors, first {strange[0]}."
        )
    state = {ours: tensors[theirs] for ours, theirs in table.items()}
    for key, value in branch.state_dict().items():
        if value.shape != state[key].shape:
            raise UserError(
                f'The control "{name}" does not fit the base "{base.name}": {table[key]} is {tuple(state[key].shape)} '
                f"in the file, expected {tuple(value.shape)}."
            )
    branch.load_state_dict(state)
    if "controlkit.hint" not in metadata:
        warnings.warn(f'"{name}" does not say what its hints are; taken for canny edges in [0, 1].', stacklevel=2)
    return SavedControl(branch.eval().requires_grad_(False), hint, trained)
