"""A safetensors file whose tensors are filled in place, and the reader of such files.

Not ``numpy.lib.format.open_memmap``: it makes a sparse file for each array, so a full disk would end the process
(SIGBUS) and not raise, and a folder of such files cannot be renamed over another as one file can.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from controlkit.tensors.reader import open_safetensors

_PADDING = "_filling_"
_DTYPES = {
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.float32: "F32",
}
"""Number formats that a ``TensorWriter`` writes, and their names in the file."""


class TensorWriter:
    """A safetensors file whose tensors are filled in place, on the disk: they may be larger than memory.

    The header comes first in such a file and is known last: room is left for it. Call ``close`` when all is filled.
    """

    _HEADER_BYTES = 2**20

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, dict[str, Any]] = {}
        self._end = 0

    def empty(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Place a tensor of this name, to be filled by the caller.

        Raises ``OSError`` where the disk has no room for it, before anything is written.
        """
        if used := self._end % 8:  # a tensor that begins in the middle of a number cannot be mapped
            self._place(f"{_PADDING}{self._end}", (8 - used,), torch.uint8)
        return self._place(name, tuple(shape), dtype)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor under this name; raises as ``empty`` does."""
        self.empty(name, tensor.shape, tensor.dtype).copy_(tensor)

    def _place(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        start, self._end = self._end, self._end + size
        self._entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, self._end]}
        if not size:
            return torch.empty(shape, dtype=dtype)
        first = 8 + self._HEADER_BYTES + start
        with self.path.open("r+b") as file:
            if hasattr(os, "posix_fallocate"):  # else a full disk would end the process, not raise
                os.posix_fallocate(file.fileno(), first, size)
            else:
                file.truncate(first + size)
        mapped = np.memmap(self.path, np.uint8, "r+", first, (size,))
        return torch.from_numpy(mapped).view(dtype).view(shape)

    def close(self) -> None:
        """Write the header; ``ValueError`` if it is longer than the room left for it (some 10,000 tensors)."""
        header = json.dumps(self._entries).encode()
        if len(header) > self._HEADER_BYTES:
            raise ValueError(f"{len(self._entries)} tensors are more than {type(self).__name__} has room to name.")
        with self.path.open("r+b") as file:
            file.write(self._HEADER_BYTES.to_bytes(8, "little") + header.ljust(self._HEADER_BYTES))


def read_filled(path: Path) -> dict[str, Tensor]:
    """Map the tensors that a ``TensorWriter`` wrote: only the parts that are used are read from the disk."""
    file = open_safetensors(path)
    return {name: file.get_tensor(name) for name in file.keys() if not name.startswith(_PADDING)}  # noqa: SIM118
