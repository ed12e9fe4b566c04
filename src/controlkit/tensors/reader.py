"""Files of named tensors from anywhere, read without trusting them.

Safetensors are read by their library, which checks sizes against the file before it takes memory; torch pickles by
``pickles``. Either way the header comes first: names, shapes and types are known before a tensor is read.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from controlkit.errors import Invalid, NotFound, Unsupported
from controlkit.tensors.pickles import PICKLES, read_pickle, unreadable

LONGEST_HEADER = 2**23
"""Bytes of a header; those of whole checkpoints have 2**19. Reading one takes a hundred times its size."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorFile:
    """The header of a file of tensors; ``read`` brings the tensors themselves."""

    path: Path
    shapes: Mapping[str, Shape]
    metadata: Mapping[str, str] = field(default_factory=dict)
    _mapped: Mapping[str, Tensor] | None = None  # a pickle's tensors; None: a safetensors file

    def read(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Tensors by name, as stored; all by default.

        Raises ``Invalid`` if the file is damaged, or a tensor holds NaN, infinity or complex numbers.
        """
        wanted = list(self.shapes if names is None else names)
        if self._mapped is not None:
            tensors = {name: self._mapped[name].contiguous() for name in wanted}
        else:
            try:
                with safe_open(self.path, framework="pt") as file:
                    tensors = {name: file.get_tensor(name) for name in wanted}
            except (SafetensorError, OSError, TypeError, KeyError, RuntimeError) as error:
                raise unreadable(self.path, error) from error
        for name, tensor in tensors.items():
            if tensor.is_complex():
                raise Invalid(f"{self.path} cannot be weights: {name} holds complex numbers.")
            if tensor.is_floating_point() and not _finite(tensor):
                raise Invalid(f"{self.path} is damaged: {name} holds NaN or infinity. Get the file anew.")
        return tensors


def _finite(tensor: Tensor) -> bool:
    if tensor.itemsize == 1:  # float8: torch has no isfinite for it
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())


def open_tensors(path: Path) -> TensorFile:
    """Read the header of a file of tensors.

    Raises ``NotFound`` if there is no such file, ``Unsupported`` for torch's old kind of pickle, and ``Invalid`` if the
    file is damaged or would run code.
    """
    try:
        if not path.is_file():
            raise NotFound(f"There is no file {path}: expected a .safetensors file, or a .pth.")
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise unreadable(path, error.strerror) from error
    if start.startswith(b"PK\3\4"):
        tensors = read_pickle(path)
        return _checked(TensorFile(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, {}, tensors))
    if start.startswith(b"\x80") and path.suffix.lower() in PICKLES:
        raise Unsupported(
            f"{path} is a pickle of the kind torch wrote before 2020, whose sizes cannot be checked: load it where you "
            "trust it and save it as safetensors."
        )
    if int.from_bytes(start, "little") > LONGEST_HEADER:
        raise unreadable(path, f"its header claims more than {LONGEST_HEADER:,} bytes")
    try:
        with safe_open(path, framework="pt") as file:
            names: list[str] = file.keys()  # this is no mapping: it cannot be iterated itself
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise unreadable(path, error) from error
    return _checked(TensorFile(path, shapes, metadata))


def _checked(header: TensorFile) -> TensorFile:
    """The header, if its names can stand in a sentence and its shapes have at most 8 dimensions."""
    for name, shape in header.shapes.items():
        if not (len(name) <= 250 and name.isprintable() and len(shape) <= 8):
            raise unreadable(header.path, f"{name[:100]!a} is no name of a weight, or its shape is none")
    return header
