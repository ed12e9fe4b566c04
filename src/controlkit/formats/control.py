"""Controls in use: read from any format for a base, and written as diffusers folders that also hold the contract."""

import inspect
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from controlkit.adapter import Adapter, Branch
from controlkit.annotators import contract
from controlkit.backbones import UNetBase, UNetEncoder, XSBranch
from controlkit.backbones.families import family_of_width
from controlkit.backbones.xs import new_adapter, shape_of
from controlkit.branch import ControlBranch, ControlSpec, HintEncoder
from controlkit.errors import UserError, nearest
from controlkit.formats.describe import KINDS, WEIGHTS, WEIGHTS_FILES, Description
from controlkit.formats.names import key_table
from controlkit.formats.weights import (
    Weights,
    as_controlnet,
    as_json,
    labelled,
    read_weights,
    said,
    tells_types_by_code,
)
from controlkit.hub import shipped_names, where
from controlkit.images import SCRATCH, Hint, write_atomic
from controlkit.union import TYPES, OneType, UnionBranch


@dataclass(frozen=True)
class SavedControl:
    """A branch with what it needs to be used rightly: its hint's contract, and what it was trained on."""

    branch: Branch | OneType
    hint: Hint
    trained: Mapping[str, Any] = field(default_factory=dict)
    """``base``, ``base_digest``, ``step``, ``data`` and what else the recipe records."""
    hints: Mapping[str, Hint] = field(default_factory=dict)
    """A Union's contracts by type, where it was trained here."""
    guidance: float = 1.0
    """How many times guidance should count the hint (``sample.Control.guidance``); 1 unless its recipe says more."""

    def contract_of(self, kind: str) -> Hint:
        """The contract of a Union's hints of a type: its own, or what that name means everywhere."""
        return self.hints.get(kind) or self.hint.made_by(contract(kind))


# --- writing ------------------------------------------------------------------------------------------------------


def _absent_joins(branch: ControlBranch) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the joins that diffusers has and this branch leaves out."""
    absent: dict[str, tuple[int, ...]] = {}
    for i, tap in enumerate(tap for tap in branch.taps if tap.site == "skip"):
        if tap.name not in branch.joins:
            absent[f"controlnet_down_blocks.{i}.weight"] = (tap.channels, tap.channels, 1, 1)
            absent[f"controlnet_down_blocks.{i}.bias"] = (tap.channels,)
    return absent


def _diffusers_config(base: UNetBase, branch: ControlBranch, hint: Hint) -> dict[str, Any]:
    """The configuration of a ``ControlNetModel`` with this branch's shapes."""
    from diffusers import ControlNetModel, ControlNetUnionModel

    unet = base.unet.config
    network = ControlNetUnionModel if isinstance(branch, UnionBranch) else ControlNetModel
    theirs = {name: unet[name] for name in inspect.signature(network.__init__).parameters if name in unet}
    convs = branch.hint_encoder.convs
    widths = [convs[0].out_channels] + [conv.out_channels for conv in convs[2:-1:2]]
    theirs |= {"conditioning_channels": convs[0].in_channels, "conditioning_embedding_out_channels": widths}
    theirs |= {"controlnet_conditioning_channel_order": hint.colour_order.lower()}
    if isinstance(branch, UnionBranch):
        types, width = branch.task_embedding.shape
        theirs |= {"num_control_type": types, "num_trans_channel": width, "num_trans_layer": branch.layers}
        theirs |= {"num_proj_channel": branch.taps[0].channels}
        theirs |= {"num_trans_head": branch.heads, "addition_time_embed_dim": branch.type_code.num_channels}
    return theirs | {"global_pool_conditions": branch.pools}


def control_weights(control: SavedControl, base: UNetBase) -> Weights:
    """A control's weights under diffusers' names, with all that is known of it in the metadata.

    Joins that ``taps: mid`` leaves out are zeros, which is what they are; a body trained in low ranks is written as
    the copy that it amounts to.
    """
    branch = control.branch
    assert isinstance(branch, Branch)
    facts: dict[str, Any] = {"signature": base.signature, "trained": dict(control.trained)}
    if isinstance(branch, Adapter):
        kind, config = "adapter", {key: value for key, value in branch.network.config.items() if key[0] != "_"}
        tensors = {key: value.detach().cpu() for key, value in branch.network.state_dict().items()}
    elif isinstance(branch, XSBranch):
        kind, config = "xs", branch.config | {"conditioning_channel_order": control.hint.colour_order.lower()}
        tensors = {key: value.detach().cpu() for key, value in branch.network.state_dict().items()}
        facts["spec"] = asdict(branch.spec)
    else:
        kind = "union" if isinstance(branch, UnionBranch) else "controlnet"
        table = key_table(branch)
        tensors = {table[key]: value.detach().cpu() for key, value in branch.weights().items()}
        spec = replace(branch.spec, body="copy", rank=0) if branch.spec.body == "lora" else branch.spec
        facts["spec"] = asdict(spec)
        config = {}
        if spec.body == "copy":
            config = _diffusers_config(base, branch, control.hint)
            tensors |= {key: torch.zeros(shape) for key, shape in _absent_joins(branch).items()}
    if control.guidance != 1.0:
        facts["use"] = {"guidance": control.guidance}
    if control.hints:
        facts |= {"hints": {kind: hint.to_json() for kind, hint in control.hints.items()}}
    metadata = {f"controlkit.{key}": as_json(value) for key, value in facts.items()}
    return Weights(kind, tensors, config, metadata | {"controlkit.hint": control.hint.to_json()})


def save_control(folder: Path, control: SavedControl, base: UNetBase, dtype: torch.dtype = torch.float32) -> None:
    """Write ``folder`` whole or not at all. Branches with body ``copy`` or ``xs`` make one of diffusers."""
    write_folder(folder, control_weights(control, base), dtype)


def write_folder(folder: Path, weights: Weights, dtype: torch.dtype | None = None) -> None:
    """Weights as a diffusers folder, whole or not at all; in the type they have, or in ``dtype``."""
    from diffusers import __version__ as diffusers_version

    head = {"_class_name": KINDS[weights.kind], "_diffusers_version": diffusers_version}
    config = head | dict(weights.config) if weights.config else {"_class_name": "ControlBranch"}
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=SCRATCH))
    try:
        metadata = {"format": "pt"} | labelled(weights, "diffusers", folder.name)
        write_tensors(scratch / WEIGHTS, weights.tensors, metadata, dtype)
        write_atomic(scratch / "config.json", (json.dumps(config, indent=2, default=list) + "\n").encode())
        scratch.chmod(0o755)
        _put_in_place(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype | None = None
) -> None:
    """A safetensors file of these tensors, whole or absent; in the type they have, or in ``dtype``."""
    made = {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in tensors.items()}
    write_atomic(path, lambda scratch: save_file(made, scratch, dict(metadata)))


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


# --- reading ------------------------------------------------------------------------------------------------------


def shipped_controls() -> dict[str, tuple[Path, str]]:
    """Shipped controls by name: the folder, and which type of it if that is a Union (else "")."""
    found: dict[str, tuple[Path, str]] = {}
    for name in shipped_names():
        if (where(name) / WEIGHTS).is_file():
            with safe_open(where(name) / WEIGHTS, framework="pt") as file:
                types = json.loads((file.metadata() or {}).get("controlkit.hints", "{}"))
            found |= {kind: (where(name), kind) for kind in types}
            found[name] = (where(name), "")
    return found


def shipped_folder(name: str) -> Path:
    """The folder of what is shipped under a name; of a Union's type, the Union's."""
    controls = shipped_controls()
    if name not in controls and name not in shipped_names():
        known = sorted({*controls, *shipped_names()})
        raise UserError(f'Nothing is shipped under the name "{name}": {nearest(name, known)}')
    return controls[name][0] if name in controls else where(name)


def control_path(name: str | Path) -> Path:
    """The file or folder of a control: a shipped name, a file, a control folder, or a training run's folder."""
    if str(name) in shipped_names():
        return where(str(name))
    path = Path(name)
    if path.is_file():
        return path
    for folder in (path, path / "control"):
        if any((folder / file).is_file() for file in WEIGHTS_FILES):
            return folder
    if str(name) in shipped_controls():
        return shipped_folder(str(name))
    for folder in (path, path / "control"):  # a run whose hints are branches
        within = sorted(file.parent for file in folder.glob(f"*/{WEIGHTS}"))
        if len(within) > 1:
            raise UserError(f"{folder} holds several controls: name one of {', '.join(map(str, within))}.")
    raise UserError(
        f'There is no control "{name}": expected one of {", ".join(shipped_controls()) or "(none is shipped)"}, '
        f"a file of weights, or a folder that holds {WEIGHTS}."
    )


def type_of(name: str | Path) -> tuple[str | Path, str]:
    """(a Union, a type) that a name means: a shipped type's own name, or ``UNION:TYPE``; else the name and ""."""
    if str(name) in shipped_names() or Path(name).exists():
        return name, ""
    union, colon, kind = str(name).rpartition(":")
    if colon and kind in TYPES:
        return union, kind
    return name, shipped_controls().get(str(name), (None, ""))[1]


def load_control(name: str | Path, base: UNetBase, annotator: str | None = None) -> SavedControl:
    """Read a control of any format for ``base``; ``UserError`` if it was made for a base of another shape.

    ``annotator`` names what the hints of a file are that does not say it itself (``canny``, ``inpaint``, ...). A
    Union's type is a control by itself, named ``UNION:TYPE``, or by the type's name where it is shipped.
    """
    path, weights, described = read_control(name, base)
    spec = said(weights, path, "controlkit.spec", lambda text: ControlSpec(**json.loads(text)), ControlSpec())
    if weights.config.get("global_pool_conditions"):
        spec = replace(spec, pool="mean")
    hint = hint_of(name, weights, described, annotator)
    kind = type_of(name)[1] if weights.kind == "union" else ""
    hints = said(weights, path, "controlkit.hints", lambda text: _hints(json.loads(text)), {})
    trained = said(weights, path, "controlkit.trained", json.loads, {})
    guidance = said(weights, path, "controlkit.use", _guidance, 1.0)
    signature = said(weights, path, "controlkit.signature", json.loads, None)
    if signature is not None and signature != json.loads(json.dumps(base.signature)):
        differing = [key for key in base.signature if signature.get(key) != json.loads(json.dumps(base.signature[key]))]
        raise UserError(
            f'The control "{name}" was made for the base "{described.base or "unknown"}" and not for "{base.name}": '
            f"they differ in {', '.join(differing)}. Use the control with its own base, or train one for this base."
        )
    _check_family(name, described, base)
    if described.hint_channels not in (None, hint.channels):
        raise UserError(
            f'The control "{name}" reads hints of {described.hint_channels} channels, and its contract says '
            f"{hint.channels}."
        )
    branch: Branch
    if weights.kind == "adapter":
        branch = _adapter(name, weights, base)
    else:
        branch = _walker(name, weights, base) if weights.kind == "xs" else _branch(name, weights, base, spec)
    if not hint.annotator and weights.kind != "union":
        warnings.warn(
            f'"{name}" does not say what its hints are: pictures are taken as they are, in [{hint.low:g}, '
            f"{hint.high:g}]. Name the annotator that makes them (canny, scribble, ...).",
            stacklevel=2,
        )
    ready = branch.to(base.device, base.dtype).eval().requires_grad_(False)
    saved = SavedControl(ready, hint, trained, hints, guidance)
    if kind and isinstance(branch, UnionBranch):
        saved = replace(saved, branch=OneType(branch, kind), hint=saved.contract_of(kind), hints={})
    return saved


def read_control(name: str | Path, base: UNetBase | None) -> tuple[Path, Weights, Description]:
    """Where a control lies and what is there; a Union's type as an ordinary ControlNet, where it can be one."""
    union, kind = type_of(name)
    path = control_path(union)
    weights, described = read_weights(path, base)
    if not kind:
        return path, weights, described
    if weights.kind != "union":
        raise UserError(f'"{union}" is no Union and has no types: name it without ":{kind}".')
    if not TYPES[kind] < weights.config["num_control_type"]:
        raise UserError(
            f'The Union "{union}" knows {weights.config["num_control_type"]} types; {kind} is none of them.'
        )
    if tells_types_by_code(weights):
        hints = said(weights, path, "controlkit.hints", lambda text: _hints(json.loads(text)), {})
        weights = as_controlnet(weights, TYPES[kind])
        own = {"controlkit.hint": (hints.get(kind) or contract(kind)).to_json()}
        weights = replace(weights, metadata={**weights.metadata, **own})
        described = replace(described, kind="controlnet")
    return path, weights, described


def _hints(texts: Mapping[str, str]) -> dict[str, Hint]:
    """A Union's contracts by type; ``ValueError`` for what is none of its types."""
    if strange := texts.keys() - TYPES.keys():
        raise ValueError(f"there is no type {sorted(strange)[0]}")
    return {kind: _hint(text) for kind, text in texts.items()}


def _hint(text: str) -> Hint:
    """The contract in a file's metadata; ``ValueError`` if it is of the wrong types, which Python itself would take."""
    hint = Hint.from_json(text)
    TypeAdapter(Hint).validate_json(text, strict=True)
    numbers = (hint.low, hint.high, hint.mark or 0.0, *hint.options.values())
    if not all(map(math.isfinite, numbers)) or len(hint.annotator) > 100 or not hint.annotator.isprintable():
        raise ValueError("its numbers are not finite, or its annotator's name is none")
    return hint


def _guidance(text: str) -> float:
    """How often guidance should count the hint; ``ValueError`` if that is no number from 0 on."""
    value = float(json.loads(text)["guidance"])
    if not 0 <= value < math.inf:
        raise ValueError(f"guidance by the hint is {value}")
    return value


def hint_of(name: str | Path, weights: Weights, described: Description, annotator: str | None) -> Hint:
    """The contract of a file's hints, with ``annotator`` named where the file does not say it itself.

    A file of someone else's has its family's: ControlNets and T2I-Adapters alike read hints in [0, 1].
    """
    said_order = (f"{prefix}conditioning_channel_order" for prefix in ("controlnet_", ""))
    order = next((str(weights.config[key]).upper() for key in said_order if key in weights.config), "RGB")
    foreign = Hint("", channels=described.hint_channels or 3, colour_order="BGR" if order == "BGR" else "RGB")
    hint = said(weights, Path(name), "controlkit.hint", _hint, foreign)
    if not annotator or annotator == hint.annotator:
        return hint
    if hint.annotator:
        raise UserError(f'The hints of "{name}" are made by {hint.annotator}, not by {annotator}.')
    return hint.made_by(contract(annotator))


def _check_family(name: str | Path, described: Description, base: UNetBase) -> None:
    width = described.config.get("cross_attention_dim")
    own = base.unet.config.cross_attention_dim
    if width is not None and width != own:
        families = [f"{row.title} " if (row := family_of_width(w)) else "" for w in (width, own)]
        raise UserError(
            f'The control "{name}" is for {families[0]}bases that read prompts {width} wide; "{base.name}" reads '
            f"{families[1]}prompts {own} wide. Use a control made for this base, or its own base."
        )


def _branch(name: str | Path, weights: Weights, base: UNetBase, spec: ControlSpec) -> ControlBranch:
    """A branch of this base's shape, on copies of the file's tensors.

    Copies, because a mapped file's tensors lie at odd places in memory, and sums then depend on the place.
    """
    tensors = {key: tensor.to(torch.float32, copy=True) for key, tensor in weights.tensors.items()}
    channels = tensors["controlnet_cond_embedding.conv_in.weight"].shape[1]
    taps, stride = base.branch_taps, base.stride
    with torch.device("meta"):
        if weights.kind == "union":
            types, width = tensors["task_embedding"].shape
            branch: ControlBranch = UnionBranch(
                taps,
                _body(weights, base),
                stride,
                channels,
                ControlSpec(pool=spec.pool),
                types=types,
                width=width,
                heads=weights.config["num_trans_head"],
                layers=weights.config["num_trans_layer"],
                code_width=weights.config["addition_time_embed_dim"],
                embedding=base.unet.time_embedding.linear_2.out_features,
            )
        elif spec.body == "copy":
            branch = ControlBranch(taps, _body(weights, base), stride, channels, spec)
        else:
            branch = ControlBranch(taps, base.conv_body(), stride, channels, spec)
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
    branch.load_state_dict(state, assign=True)
    return branch


def _body(weights: Weights, base: UNetBase) -> nn.Module:
    """The body of the file's network, on the meta device: the base's encoder, or a slimmer one with the same taps."""
    copied = base.empty_encoder()
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    if all(shapes.get(name) == tensor.shape for name, tensor in copied.state_dict().items()):
        return copied
    import diffusers

    network = getattr(diffusers, KINDS[weights.kind])(**weights.config)
    features = [network.conv_in.out_channels]
    for block in network.down_blocks:
        features += [resnet.out_channels for resnet in block.resnets]
        features += [features[-1]] if block.downsamplers is not None else []
    if [*features, features[-1]] != [tap.channels for tap in base.branch_taps]:
        return copied  # of another base altogether: what does not fit is told tensor by tensor
    return UNetEncoder(network)


def _walker(name: str | Path, weights: Weights, base: UNetBase) -> XSBranch:
    """A ControlNet-XS on copies of the file's tensors, if it can walk beside this base's encoder."""
    wanted = {"base_block_out_channels": list(base.unet.config.block_out_channels), **shape_of(base.unet)}
    wanted["conditioning_embedding_out_channels"] = HintEncoder.widths(base.stride)
    for key, value in wanted.items():
        if weights.config[key] != value:
            raise UserError(
                f'The ControlNet-XS "{name}" does not fit the base "{base.name}": its {key} is {weights.config[key]}, '
                f"expected {value}."
            )
    with torch.device("meta"):
        network = new_adapter(weights.config)
    tensors = {key: tensor.to(torch.float32, copy=True) for key, tensor in weights.tensors.items()}
    network.load_state_dict(tensors, assign=True)
    return XSBranch(network, base.branch_taps)


def _adapter(name: str | Path, weights: Weights, base: UNetBase) -> Adapter:
    """A T2I-Adapter on the file's tensors, if its features fit this base's encoder."""
    from diffusers import T2IAdapter

    with torch.device("meta"):
        network: nn.Module = T2IAdapter(**weights.config)
    network.load_state_dict({key: tensor.float() for key, tensor in weights.tensors.items()}, assign=True)
    adapter = Adapter(network, base.taps)
    kind = weights.config["adapter_type"]
    channels = list(weights.config["channels"])
    channels = channels + channels[-1:] if kind == "light_adapter" else channels
    wanted = [tap.channels for tap in adapter.taps]
    finest = weights.config["downscale_factor"]
    if channels != wanted or finest != adapter.taps[0].stride:
        raise UserError(
            f'The T2I-Adapter "{name}" does not fit the base "{base.name}": its features have {channels} channels, '
            f"the finest at 1/{finest} of the picture; the base takes {wanted} from 1/{adapter.taps[0].stride} on."
        )
    return adapter
