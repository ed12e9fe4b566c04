"""Files of named tensors from anywhere, read without trusting them.

Safetensors are read by their library, which checks sizes against the file before it takes memory. Pickles (``.pth``,
``.ckpt``, ``.bin``) are walked through first, and what asks for more than dictionaries of tensors is refused by name;
then they go through torch's restricted loader alone, mapped and not copied.
Either way the header comes first: names, shapes and types are known before a tensor is read.
"""

import json
import math
import os
import pickletools
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from controlkit.errors import UserError, one_line

PICKLES = (".pth", ".pt", ".ckpt", ".bin")
"""Endings of files that hold pickles."""
LONGEST_HEADER = 2**23
"""Bytes of a header; those of whole checkpoints have 2**19. Reading one takes a hundred times its size."""

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
            if tensor.is_complex():
                raise UserError(f"{self.path} cannot be weights: {name} holds complex numbers.")
            if tensor.is_floating_point() and not _finite(tensor):
                raise UserError(f"{self.path} is damaged: {name} holds NaN or infinity. Get the file anew.")
        return tensors


class TensorWriter:
    """A safetensors file whose tensors are filled in place, on the disk: larger ones than memory holds.

    The header comes first in such a file and is known last: room is left for it. ``OSError`` where the disk has none
    for a tensor, before anything is put there.
    """

    _ROOM = 2**20

    def __init__(self, path: Path) -> None:
        self.path = path
        self._facts: dict[str, dict[str, Any]] = {}
        self._end = 0

    def empty(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of this name, to be filled."""
        if skipped := -self._end % 8:  # where one begins in the middle of a number it cannot be mapped
            self._place(f"{_FILLING}{self._end}", (skipped,), torch.uint8)
        return self._place(name, tuple(shape), dtype)

    def add(self, name: str, tensor: Tensor) -> None:
        """A tensor of this name, as it is."""
        self.empty(name, tensor.shape, tensor.dtype).copy_(tensor)

    def _place(self, name: str, shape: Shape, dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        start, self._end = self._end, self._end + size
        offsets = [start, self._end]
        self._facts[name] = {"dtype": _WRITTEN[dtype], "shape": list(shape), "data_offsets": offsets}
        if not size:
            return torch.empty(shape, dtype=dtype)
        first = 8 + self._ROOM + start
        with self.path.open("r+b") as file:
            if hasattr(os, "posix_fallocate"):  # or a disk without room would end the process, not raise
                os.posix_fallocate(file.fileno(), first, size)
            else:
                file.truncate(first + size)
        held = np.memmap(self.path, np.uint8, "r+", first, (size,))
        return torch.from_numpy(held).view(dtype).view(shape)

    def close(self) -> None:
        """Write the header."""
        header = json.dumps(self._facts).encode()
        if len(header) > self._ROOM:
            raise ValueError(f"{len(self._facts)} tensors are more than {type(self).__name__} has room to name.")
        with self.path.open("r+b") as file:
            file.write(self._ROOM.to_bytes(8, "little") + header.ljust(self._ROOM))


_FILLING = "_filling_"
_WRITTEN = {
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.float32: "F32",
}
"""What the numbers that a ``TensorWriter`` writes are called in the file."""


def read_filled(path: Path) -> dict[str, Tensor]:
    """The tensors that a ``TensorWriter`` wrote, mapped: what is not looked at is not read."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if not name.startswith(_FILLING)}  # noqa: SIM118


def _finite(tensor: Tensor) -> bool:
    if tensor.itemsize == 1:  # float8: torch has no isfinite for it
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())


def _unreadable(path: Path, error: object) -> UserError:
    return UserError(
        f"{path} cannot be read ({one_line(error)}): expected a whole safetensors file, or a torch pickle (.pth)."
    )


def open_tensors(path: Path) -> TensorFile:
    """The header of a file of tensors; ``UserError`` if it is damaged, no such file, or would run code."""
    try:
        if not path.is_file():
            raise UserError(f"There is no file {path}: expected a .safetensors file, or a .pth.")
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise _unreadable(path, error.strerror) from error
    if start.startswith(b"PK\3\4"):
        return _checked(_open_pickle(path))
    if start.startswith(b"\x80") and path.suffix.lower() in PICKLES:
        raise UserError(
            f"{path} is a pickle of the kind torch wrote before 2020, whose sizes cannot be checked: load it where you "
            "trust it and save it as safetensors."
        )
    if int.from_bytes(start, "little") > LONGEST_HEADER:
        raise _unreadable(path, f"its header is said to have more than {LONGEST_HEADER:,} bytes")
    try:
        with safe_open(path, framework="pt") as file:
            names: list[str] = file.keys()  # this is no mapping: it cannot be iterated itself
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise _unreadable(path, error) from error
    return _checked(TensorFile(path, shapes, metadata))


def _checked(header: TensorFile) -> TensorFile:
    """The header, if its names are names and its shapes shapes: sentences quote them, and tables are built of them."""
    for name, shape in header.shapes.items():
        if not (len(name) <= 250 and name.isprintable() and len(shape) <= 8):
            raise _unreadable(header.path, f"{name[:100]!a} is no name of a weight, or its shape is none")
    return header


# --- pickles ------------------------------------------------------------------------------------------------------

_LONGEST_PICKLE = 2**22  # of one without its tensors; a training checkpoint's has some 2**20 bytes
_MOST_STEPS = 500_000  # in such a pickle; a whole checkpoint's takes some 100,000
_CALLED = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch.Size", "torch.device")
_DICTIONARY = "collections.OrderedDict"
_TYPES = re.compile(r"torch\.((cuda\.)?[A-Z]\w*Storage|bool|b?float\d+|u?int\d+)")  # named, never called


def _open_pickle(path: Path) -> TensorFile:
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise _unreadable(path, "its parts are compressed, which torch never does")
            codes = [entry for entry in archive.infolist() if entry.filename.lower().endswith(".pkl")]
            if sum(entry.file_size for entry in codes) > _LONGEST_PICKLE:
                raise _unreadable(path, f"its pickle has more than {_LONGEST_PICKLE:,} bytes beside the tensors")
            for entry in codes:
                _refuse_code(path, archive.read(entry))
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged archive makes of torch's reader, the file is at fault
        raise _unreadable(path, error) from error
    for wrapper in ("state_dict", "string_to_param", "adapter"):  # of checkpoints, textual inversions, T2I-Adapters
        # dict's own methods: a pickle may put what it likes in the place of an OrderedDict's
        if isinstance(content, dict) and isinstance(dict.get(content, wrapper), dict):
            content = dict.get(content, wrapper)
    found = dict.items(content) if isinstance(content, dict) else ()
    tensors = {name: tensor.detach() for name, tensor in found if torch.is_tensor(tensor)}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise UserError(f"{path} holds no named tensors: expected the state dict of a network.")
    claimed = 0
    for name, tensor in tensors.items():
        bytes_ = math.prod(tensor.shape) * tensor.itemsize
        claimed += bytes_
        plain = tensor.layout is torch.strided and not tensor.is_neg() and not tensor.is_conj()
        if not plain or bytes_ > tensor.untyped_storage().nbytes():
            raise _unreadable(path, f"{name} claims a shape larger than its data")
    if claimed > 4 * path.stat().st_size:  # tensors may share their data, but not without end: each is read by itself
        raise _unreadable(path, "its tensors together claim many times what the file holds")
    return TensorFile(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, {}, tensors)


class _Value(NamedTuple):
    """What is known of an object while walking through a pickle."""

    what: str = ""  # a function's or a type's dotted name; a string after a quote; "tuple"; what was called and "()"
    size: int = 1  # of a tuple, with the tuples in it written out


def _refuse_code(path: Path, code: bytes) -> None:
    """Walk through a pickle, doing nothing it says; ``UserError`` at what no dictionary of tensors needs.

    torch's loader runs no stranger's code, but would take any memory (``bytearray(10**12)``) and any time (a key that
    is a tuple of tuples of tuples: hashing one visits each as often as it is named).
    """
    stack: list[_Value] = []
    marks: list[int] = []
    memo: dict[Any, _Value] = {}
    steps: Iterable[tuple[pickletools.OpcodeInfo, Any, int | None]] = pickletools.genops(code)
    for step, (op, arg, _) in enumerate(steps):
        if step > _MOST_STEPS:
            raise ValueError(f"its pickle takes more than {_MOST_STEPS:,} steps")
        if op.name == "MARK":
            marks.append(len(stack))
            continue
        items: list[_Value] = []
        before = op.stack_before
        if pickletools.markobject in before:
            before = before[: before.index(pickletools.markobject)]
            items = stack[marks[-1] :]
            del stack[marks.pop() :]
        floor = len(stack) - len(before)
        if floor < (marks[-1] if marks else 0):
            raise ValueError("its pickle takes what it never put")
        taken = stack[floor:]
        del stack[floor:]
        given = [_Value() for _ in op.stack_after]
        if "UNICODE" in op.name:
            given = [_Value(f"'{arg}")]
        elif op.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            named = ".".join(value.what[1:] for value in taken) if op.name == "STACK_GLOBAL" else arg.replace(" ", ".")
            if named not in (*_CALLED, _DICTIONARY) and not _TYPES.fullmatch(named):
                raise UserError(
                    f"{path} is refused: reading it would run {one_line(named)}. Ask for the file as safetensors, "
                    "which cannot hold code."
                )
            given = [_Value(named)]
        elif "TUPLE" in op.name:
            given = [_Value("tuple", 1 + sum(value.size for value in (*taken, *items)))]
        elif op.name in ("REDUCE", "NEWOBJ"):
            function, arguments = taken
            empty = function.what == _DICTIONARY and arguments == _Value("tuple")
            if function.what not in _CALLED and not empty:
                raise ValueError("its pickle calls what is no function of weights")
            given = [_Value(f"{function.what}()")]
        elif op.name in ("SETITEM", "SETITEMS"):
            if any(key.what in ("tuple", "torch.Size()") for key in (*taken[1:], *items)[::2]):
                raise ValueError("its pickle has keys that are no names")
            given = taken[:1]
        elif op.name in ("APPEND", "APPENDS", "BUILD"):
            if op.name == "BUILD" and taken[0].what != f"{_DICTIONARY}()":
                raise ValueError("its pickle changes an object that is no dictionary")
            given = taken[:1]
        elif op.name in ("BINGET", "LONG_BINGET", "GET"):
            given = [memo[arg]]
        elif op.name == "MEMOIZE":
            given, memo[len(memo)] = taken, taken[0]
        elif op.name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[arg] = stack[-1]
        elif op.name == "LONG1" and abs(arg) >= 2**64:  # keys chosen to collide take for ever, too
            raise ValueError("its pickle holds a number of more than 64 bits")
        if any(value.size > 10_000 for value in given):
            raise ValueError("its pickle holds a tuple without end")
        stack += given
