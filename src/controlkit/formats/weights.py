"""Weights of any format brought to one: diffusers' names, whole tensors, a configuration and metadata.

Every reader ends here and every writer begins here, so a conversion is a reading and a writing.
"""

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from controlkit.backbones import Backbone
from controlkit.errors import Invalid, Mismatch, Unsupported, UserError
from controlkit.files import inside, parse_yaml, read_text
from controlkit.formats.configs import family_of_config
from controlkit.formats.describe import Description, describe_tensors
from controlkit.formats.metadata import json_object, stored_config, weights_file
from controlkit.seeds import torch_rng
from controlkit.tensors import TensorFile, open_tensors


@dataclass(frozen=True)
class Weights:
    """A control's weights, under diffusers' names."""

    kind: str
    """``controlnet``, ``union``, ``xs`` or ``adapter``."""
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    """Of the diffusers class of this kind."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The file's own, with ``controlkit.*`` entries where it has them, each a JSON object."""


def read_weights(path: Path, base: Backbone | None = None) -> tuple[Weights, Description]:
    """Read any control that ControlKit runs, whole.

    ``base``: the base it belongs to, for files that hold only a difference to it (Control-LoRA, ``difference``).
    Raises ``Unsupported`` for a file that is something else, ``Invalid`` for one that lacks tensors, has tensors that
    its network has no place for, or no base where it needs one; ``Mismatch`` for a difference to another base.
    """
    header = open_tensors(weights_file(path))
    stored = stored_config(header)
    described = describe_tensors(header, stored)
    if described.kind is None:
        raise Unsupported(f"{path}: {described.sentence()}")
    if not described.runs:
        of_another = described.unexpected and described.config and not described.missing
        state = "has tensors of another network" if of_another else "is damaged or cut"
        raise Invalid(f"{path} {state}: {described.sentence()}")
    if described.format == "controlkit":
        return Weights("controlnet", _float(header.read()), {}, header.metadata), described
    is_difference = described.format in ("control-lora", "cldm-difference")
    if is_difference and base is None:
        raise Invalid(f"{path} holds only the difference to its base: name the base it belongs to (--base).")
    tensors = {described.names[name]: t for name, t in header.read(described.names).items()}
    if is_difference and base is not None:
        tensors = _rebuilt(path, tensors, base, described)
    config = dict(described.config)
    if _pools(header, stored):
        config["global_pool_conditions"] = True
    return Weights(described.kind, tensors, config, header.metadata), described


def _float(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in tensors.items()}


def _pools(header: TensorFile, stored: Mapping[str, Any]) -> bool:
    """Whether residuals are averaged over the picture. Tensors do not show it; the original has a YAML beside."""
    if stored.get("global_pool_conditions"):
        return True
    beside = header.path.with_suffix(".yaml")
    if not beside.is_file() or beside.stat().st_size > 2**14:  # YAML takes its time; the original's have 2**11 letters
        return False
    try:
        content = parse_yaml(read_text(inside(beside.parent, beside)), beside.name)
    except UserError:  # another program's: it says nothing
        return False
    for key in ("model", "params", "global_average_pooling"):
        content = content.get(key) if isinstance(content, dict) else None
    return bool(content)


def encoder_tensors(base: Backbone) -> dict[str, Tensor]:
    """The base's encoder and middle block under diffusers' names, as the copy in a ControlNet has them."""
    return {name: tensor.detach().cpu().float() for name, tensor in base.encoder.state_dict().items()}


def _rebuilt(path: Path, tensors: dict[str, Tensor], base: Backbone, described: Description) -> dict[str, Tensor]:
    """The whole weights of a difference: it is added to the base's, and tensors that the file lacks are the base's."""
    of_base = encoder_tensors(base)
    whole = {}
    for name, tensor in tensors.items():
        if name.endswith(".up"):
            stem = name.removesuffix(".up")
            whole[f"{stem}.weight"] = product(tensor.float(), tensors[f"{stem}.down"].float())
        elif described.format == "cldm-difference" and name in of_base:
            whole[name] = tensor.float()
    for name, difference in whole.items():
        if name not in of_base or of_base[name].shape != difference.shape:
            came = tuple(of_base[name].shape) if name in of_base else "nothing"
            raise Mismatch(
                f'{path} is not of the base "{base.name}": {name} is {tuple(difference.shape)} in the file and {came} '
                f"in the base. {described.sentence()}"
            )
    sums = {name: of_base[name] + difference for name, difference in whole.items()}
    given = {name: t for name, t in tensors.items() if name not in sums and not name.endswith((".up", ".down"))}
    return of_base | _float(given) | sums


def product(up: Tensor, down: Tensor) -> Tensor:
    """A Control-LoRA's difference: (out, r) x (r, in), or a convolution's (out, r, 1, 1) x (r, in, k, k)."""
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


_MORE, _PASSES = 16, 3
"""Of ``low_rank``: columns beyond the rank, and passes that sharpen the basis: within 1% of the best there is."""


def low_rank(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(up, down) of at most this rank whose ``product`` is nearest to a weight's difference (out, in, ...).

    By a randomised decomposition (Halko et al., 2011), five times as quick as a whole one at rank 64; of zeros, zeros
    of rank 1. The two share the scale evenly, so that both survive half precision.
    """
    matrix = difference.float().flatten(1)
    width = min(rank + _MORE, *matrix.shape)
    if not matrix.any():
        rank = width = 1
    basis = torch.randn(matrix.shape[1], width, generator=torch_rng("low rank"))
    for _ in range(_PASSES):
        basis = torch.linalg.qr(matrix.mT @ torch.linalg.qr(matrix @ basis)[0])[0]
    basis = torch.linalg.qr(matrix @ basis)[0]  # (out, width): nearly all of the matrix lies in it
    left, values, right = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    root = values[:rank].sqrt()
    up, down = basis @ left[:, :rank] * root, root[:, None] * right[:rank]
    if difference.dim() == 4:
        up, down = up[..., None, None], down.reshape(-1, *difference.shape[1:])
    return up.contiguous(), down.contiguous()


_UNION_ALONE = ("task_embedding", "transformer_layes.", "spatial_ch_projs.", "control_add_embedding.")


def types_differ_by_code(weights: Weights) -> bool:
    """Whether a Union's types differ by their code beside the time embedding alone, as in those trained here."""
    return not any(weights.tensors[f"spatial_ch_projs.{name}"].any() for name in ("weight", "bias"))


def as_controlnet(weights: Weights, number: int) -> Weights:
    """One type of a Union as an ordinary ControlNet, exactly: the type's code is a constant beside the time embedding.

    Only where ``types_differ_by_code``; a released Union also shifts its features by what a hint shows.
    """
    from diffusers import ControlNetModel
    from diffusers.models.embeddings import Timesteps

    types, width = weights.config["num_control_type"], weights.config["addition_time_embed_dim"]
    codes = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)(torch.eye(types)[number]).flatten()
    union = {name: tensor.float() for name, tensor in weights.tensors.items() if name.startswith(_UNION_ALONE)}
    first, second = (f"control_add_embedding.linear_{i}" for i in (1, 2))
    hidden = F.silu(union[f"{first}.weight"] @ codes + union[f"{first}.bias"])
    shift = union[f"{second}.weight"] @ hidden + union[f"{second}.bias"]
    tensors = {name: tensor for name, tensor in weights.tensors.items() if name not in union}
    tensors["time_embedding.linear_2.bias"] = tensors["time_embedding.linear_2.bias"].float() + shift
    settings = inspect.signature(ControlNetModel.__init__).parameters
    config = {key: value for key, value in weights.config.items() if key in settings}
    metadata = {key: value for key, value in weights.metadata.items() if key != "controlkit.hints"}
    return Weights("controlnet", tensors, config | {"addition_time_embed_dim": None}, metadata)


_ARCHITECTURES = {"sd15": "stable-diffusion-v1", "sd21": "stable-diffusion-v2", "sdxl": "stable-diffusion-xl-v1-base"}


def labelled(weights: Weights, layout: str, title: str) -> dict[str, str]:
    """The metadata to write: ours, the configuration, and the keys that other tools show (``modelspec.*``)."""
    known = {key: value for key, value in weights.metadata.items() if key.startswith(("controlkit.", "modelspec."))}
    family = family_of_config(weights.config)
    base = json_object(known.get("controlkit.trained", "{}")).get("base", "unknown")
    architecture = _ARCHITECTURES[family.name] if family else base
    kinds = {"adapter": "t2i-adapter", "xs": "controlnet-xs"}
    network = "control-lora" if layout == "control-lora" else kinds.get(weights.kind, "controlnet")
    return known | {
        "controlkit.config": as_json(dict(weights.config)),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/{network}",
        "modelspec.implementation": "diffusers" if layout in ("diffusers", "union") else "sgm",
        "modelspec.title": known.get("modelspec.title", title),
    }


def as_json(value: Any) -> str:
    """JSON for a metadata entry."""
    return json.dumps(value, default=list)
