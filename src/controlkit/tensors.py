"""Files of named tensors from anywhere, read without trusting them.

Safetensors are read by their library, which checks sizes against the file before it takes memory. Pickles (``.pth``,
``.ckpt``, ``.bin``) go through torch's restricted loader alone, mapped and not copied; one that names code is refused.
Either way the header comes first: names, shapes and types are known before a tensor is read.
"""

import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from controlkit.errors import UserError

PICKLES = (".pth", ".pt", ".ckpt", ".bin")
"""Endings of files that hold pickles."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorFile:
    """The header of a file of tensors; ``read`` brings the tensors themselves."""

    path: Path
    shapes: Mapping[str, Shape]
    metadata: Mapping[str, str] = field(default_factory=dict)
    _held: Mapping[str, Tensor] | None = None  # a pickle's, mapped; None: a safetensors file

    def read(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Tensors by name, as stored; all by default. ``UserError`` if one holds NaN or infinity."""
        wanted = list(self.shapes if names is None else names)
        if self._held is not None:
            tensors = {name: self._held[name].contiguous() for name in wanted}
        else:
            try:
                with safe_open(self.path, framework="pt") as file:
                    tensors = {name: file.get_tensor(name) for name in wanted}
            except (SafetensorError, OSError, TypeError, KeyError, RuntimeError) as error:
                raise _unreadable(self.path, error) from error
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not _finite(tensor):
                raise UserError(f"{self.path} is damaged: {name} holds NaN or infinity. Get the file anew.")
        return tensors


def _finite(tensor: Tensor) -> bool:
    if tensor.itemsize == 1:  # float8: torch has no isfinite for it
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())


def _unreadable(path: Path, error: object) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{path} cannot be read ({reason}): expected a whole safetensors file, or a torch pickle (.pth).")


def open_tensors(path: Path) -> TensorFile:
    """The header of a file of tensors; ``UserError`` if it is damaged, no such file, or would run code."""
    if not path.is_file():
        raise UserError(f"There is no file {path}: expected a .safetensors file, or a .pth.")
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise _unreadable(path, error.strerror) from error
    if zipfile.is_zipfile(path) and start.startswith(b"PK"):
        return _open_pickle(path)
    if start.startswith(b"\x80") and path.suffix.lower() in PICKLES:
        raise UserError(
            f"{path} is a pickle of the kind torch wrote before 2020, whose sizes cannot be checked: load it where you "
            "trust it and save it as safetensors."
        )
    try:
        with safe_open(path, framework="pt") as file:
            names: list[str] = file.keys()  # this is no mapping: it cannot be iterated itself
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            return TensorFile(path, shapes, dict(file.metadata() or {}))
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise _unreadable(path, error) from error


def _open_pickle(path: Path) -> TensorFile:
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise _unreadable(path, "its parts are compressed, which torch never does")
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        if named := re.search(r"(?:GLOBAL|global:?|Class) ([\w.]+\.[\w.]+)", str(error)):
            raise UserError(
                f"{path} is refused: reading it would run {named[1]}. Ask for the file as safetensors, which cannot "
                "hold code."
            ) from None
        raise _unreadable(path, error) from None
    except Exception as error:  # whatever a damaged archive makes of torch's reader, the file is at fault
        raise _unreadable(path, error) from error
    for wrapper in ("state_dict", "string_to_param"):  # of a training checkpoint; of a textual inversion
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    tensors = {k: v for k, v in content.items() if torch.is_tensor(v)} if isinstance(content, dict) else {}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise UserError(f"{path} holds no named tensors: expected the state dict of a network.")
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.numel() > tensor.untyped_storage().nbytes() // tensor.itemsize:
            raise _unreadable(path, f"{name} claims a shape larger than its data")
    return TensorFile(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, {}, tensors)
