"""TAESD: a tiny decoder of a base's latents, for previews of full size (Bohan, github.com/madebyollin/taesd)."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlkit.backbones.parts import make_network, open_part
from controlkit.backbones.protocol import Backbone
from controlkit.backbones.rules import read_config
from controlkit.errors import Invalid, Mismatch, Unsupported, UserError, one_line
from controlkit.tensors import TensorFile, open_tensors

_STRIDE = 8
_TAESD: dict[str, Any] = {
    "block_out_channels": (64, 64, 64, 64),
    "num_blocks": (3, 3, 3, 1),
    "upsampling_scaling_factor": 2,
    "act_fn": "relu",
    "upsample_fn": "nearest",
}
"""Settings of its decoder, of all its kinds (TAESD, TAESDXL, TAESD3, TAEF1)."""
_CONFIG = {"block_out_channels": "decoder_block_out_channels", "num_blocks": "num_decoder_blocks"}
"""Of these, the keys that have another name in a folder's configuration."""
_SPACE = {"scaling_factor": 1.0, "shift_factor": 0.0}
"""Settings of all its kinds: it reads latents as the base does."""


def load_taesd(path: Path, base: Backbone) -> Callable[[Tensor], Tensor]:
    """The decoder of a TAESD, from a base's latents (B, C, h, w) to pictures (B, 3, 8 h, 8 w) in about [-1, 1].

    ``path``: a folder of diffusers' ``AutoencoderTiny``, its file of weights, or the original's file of a decoder.
    Raises ``NotFound``, ``Invalid`` or ``Unsupported`` where there is none, ``Mismatch`` for another base's latents.
    """
    from diffusers.models.autoencoders.vae import DecoderTiny

    header = _decoder_in(open_part(path, "") if path.is_dir() else open_tensors(path))
    if (path / "config.json").is_file():
        _check_config(path)
    read = (header.shapes.get("layers.0.weight", ()) + (0, 0))[1]
    if (read, _STRIDE) != (base.latent_channels, base.stride):
        raise Mismatch(
            f"{path} reads latents of {read} channels, each {_STRIDE} pixels wide; those of "
            f'"{base.name}" have {base.latent_channels} and are {base.stride} wide.'
        )
    try:
        settings = {"in_channels": read, "out_channels": 3, **_TAESD}
        decoder = make_network(DecoderTiny, settings, header, torch.float32).to(base.device)
    except UserError:
        raise
    except ValueError as error:
        raise Invalid(f"{path} is no whole TAESD ({one_line(error)}).") from error

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        return decoder(latents.detach().float())

    return decode


def _decoder_in(header: TensorFile) -> TensorFile:
    """The decoder's tensors by diffusers' names; the original counts the clamp before its first layer, too."""
    names = {name.removeprefix("decoder."): name for name in header.shapes if name.startswith("decoder.layers.")}
    if not names:
        numbered = [(found, name) for name in header.shapes if (found := re.fullmatch(r"(\d{1,3})\.(.+)", name))]
        names = {f"layers.{int(found[1]) - 1}.{found[2]}": name for found, name in numbered}

    def bring(wanted: list[str]) -> dict[str, Tensor]:
        tensors = header.read([names[name] for name in wanted])
        return {name: tensors[names[name]] for name in wanted}

    return TensorFile(header.path, {new: header.shapes[old] for new, old in names.items()}, {}, bring)


def _check_config(folder: Path) -> None:
    """``Unsupported`` for a configuration that says something else of the decoder than ``_TAESD``."""
    config: Mapping[str, Any] = read_config(folder, "config.json")
    expected = {_CONFIG.get(key, key): value for key, value in (_TAESD | _SPACE).items()}
    for key, value in ({"_class_name": "AutoencoderTiny"} | expected).items():
        held = config.get(key, value)
        if (tuple(held) if isinstance(held, list) else held) != value:
            raise Unsupported(f"{folder} has {key} {one_line(held)}; expected a TAESD, with {value}.")
