"""Arrays of ``.npy`` files, whose heads are read without evaluating them, and checked before anything is allocated."""

import math
import re
from typing import Literal

import numpy as np

from controlkit.decoding.limits import Refused
from controlkit.errors import Invalid

_MOST_HEAD = 10_000
"""Bytes of a file's head, as numpy has it."""

_ITEM = r"""'descr':'(?P<type>[^']{0,40})'|'fortran_order':(?P<order>True|False)|'shape':\((?P<shape>[\dL,]*)\)"""
_HEAD = re.compile(rf"\{{(?:(?:{_ITEM})(?:,|(?=\}}))){{3}}\}}")
_NUMBERS = re.compile(r"[<>|=]?(?:\?|b1|[iu][1248]|f[248]|f1[26]|c8|c16|c32)")


def is_array(data: bytes) -> bool:
    """Whether a file's bytes are those of a ``.npy`` file."""
    return data.startswith(b"\x93NUMPY")


def array_of(data: bytes, name: str) -> np.ndarray:
    """The array (H, W, C) in a ``.npy`` file's bytes: uint8 and uint16 as they are, True as 255, floats as float32.

    Its file has (H, W) or (H, W, C). ``Invalid`` for any other, and for any other kind of values.
    """
    try:
        shape, kind, order, start = _head(data)
    except Refused as error:
        raise Invalid(
            f"{name} cannot be read as an array ({error}): expected a whole .npy file of numbers, as "
            "`numpy.save` writes it."
        ) from error
    if len(shape) not in (2, 3) or 0 in shape:
        sides = " x ".join(map(str, shape))
        raise Invalid(f"{name} has the shape {sides:.100}: expected height x width, or height x width x channels.")
    if kind.kind not in "bf" and (kind.kind != "u" or kind.itemsize > 2):
        raise Invalid(
            f"{name} is an array of {kind}: expected uint8 or uint16, which are shares of their largest value, "
            "or floats, which are taken as they are. Save it as one of them."
        )
    values = np.frombuffer(data, kind, math.prod(shape), start).reshape(shape, order=order)
    if kind.kind == "b":
        array = (values.view(np.uint8) != 0) * np.uint8(255)
    else:
        with np.errstate(all="ignore"):  # larger than float32 becomes inf, and is out of every hint's range
            array = values.astype(np.float32 if kind.kind == "f" else kind.newbyteorder("="), order="C")
    return array[..., None] if array.ndim == 2 else array


def _head(data: bytes) -> tuple[tuple[int, ...], np.dtype, Literal["C", "F"], int]:
    """Shape, type, order (``C`` or ``F``), and where the values begin; they are all there."""
    wide = 4 if data[6:7] > b"\1" else 2
    start = 8 + wide + int.from_bytes(data[8 : 8 + wide], "little")
    if data[6:8] not in (b"\1\0", b"\2\0", b"\3\0") or start - 8 - wide > _MOST_HEAD:
        raise Refused("its head is of no known version, or too long")
    text = "".join(data[8 + wide : start].decode("latin-1").replace('"', "'").split())
    found = _HEAD.fullmatch(text)
    if "'descr':[" in text:
        raise Refused("its values are records, not numbers")
    if not found or None in found.groups():
        raise Refused("its head is damaged")
    kind = found["type"]
    if kind.lstrip("<>|=") == "O":
        raise Refused("its values are Python objects, which are not read: allow_pickle=False")
    if not _NUMBERS.fullmatch(kind):
        raise Refused(f"its values are of type {kind!a}, not numbers")
    sides = [side.rstrip("L") for side in found["shape"].split(",") if side]
    if len(sides) > 32 or not all(0 < len(side) < 19 for side in sides):
        raise Refused("its shape is too large")
    try:
        shape, dtype = tuple(map(int, sides)), np.dtype(kind)
    except (TypeError, ValueError):  # of a shape such as 3L4, or a type that this machine has not
        raise Refused("its head is damaged") from None
    if math.prod(shape) * dtype.itemsize > len(data) - start:
        raise Refused(f"it ends before {' x '.join(sides):.100} values of {dtype} do")
    return shape, dtype, "F" if found["order"] == "True" else "C", start
