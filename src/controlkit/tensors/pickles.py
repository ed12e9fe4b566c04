"""Torch pickles from anywhere, read without running anything in them.

The file is mapped once and its pickle copied. What a dictionary of tensors needs of a pickle is done here, step by
step, with no loader of torch's or Python's; whatever asks for more is refused by name. Tensors are views of the map.
"""

import math
import pickletools
import re
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlkit.errors import Invalid, one_line
from controlkit.tensors.archive import Archive, open_archive

PICKLES = (".pth", ".pt", ".ckpt", ".bin")
"""Endings of files that hold pickles."""

_LONGEST_PICKLE = 2**22  # bytes of one without its tensors; a training checkpoint's has some 2**20
_MOST_STEPS = 500_000  # in such a pickle; a whole checkpoint's takes some 100,000
_LARGEST = 2**48  # of the numbers that say where a tensor lies
_STORAGE = re.compile(r"torch\.(?:cuda\.)?([A-Z]\w*)Storage")
_TYPES = re.compile(rf"{_STORAGE.pattern}|torch\.(bool|b?float\d+|u?int\d+)")  # named, never called
_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
}
_WRAPPERS = ("state_dict", "module", "model", "controlnet", "string_to_param", "adapter")
"""Keys of checkpoints (of torch, DeepSpeed and scripts), textual inversions and T2I-Adapters."""


class _Named(str):
    """The dotted name of a function or type that a pickle asked for, and got no more of."""


class _Parameters(dict):
    """A ``ParameterDict`` in a file, as the plain dictionary that it holds."""


class _Other:
    """A value that is harmless and of no use, or a key that is no name: it equals nothing but itself."""


@dataclass(frozen=True)
class _Storage:
    numbers: Tensor


def unreadable(path: Path, error: object) -> Invalid:
    """The error for a file of tensors that cannot be read, with the reason."""
    return Invalid(
        f"{path} cannot be read ({one_line(error)}): expected a whole safetensors file, or a torch pickle (.pth)."
    )


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The named tensors of a torch pickle (a zip archive), mapped.

    Raises ``Invalid`` if the file is damaged, holds no named tensors, or would run code.
    """
    try:
        archive = open_archive(path)
        codes = [name for name in archive.entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if not codes:
            raise Invalid(f"{path} is an archive of other files, not weights: unpack it first.")
        if len(codes) > 1:
            raise ValueError("it holds several pickles of tensors")
        if archive.entries[codes[0]].size > _LONGEST_PICKLE:
            raise ValueError(f"its pickle has more than {_LONGEST_PICKLE:,} bytes beside the tensors")
        content = _run(path, archive.read(codes[0]), _storages(archive, codes[0].removesuffix("data.pkl")))
    except Invalid:
        raise
    except (ValueError, OSError, LookupError, TypeError, struct.error, RuntimeError) as error:
        raise unreadable(path, error if str(error) else "its pickle is damaged") from error
    for _ in _WRAPPERS:  # one in another, in any order; a dictionary may hold itself
        held = [content.get(wrapper) for wrapper in _WRAPPERS] if isinstance(content, dict) else []
        content = next((one for one in held if isinstance(one, dict)), content)
    tensors = {name: tensor for name, tensor in _items(content) if torch.is_tensor(tensor)}
    if not tensors:  # a network's parts, each a dictionary: an IP-Adapter
        parts = [(outer, name, tensor) for outer, part in _items(content) for name, tensor in _items(part)]
        tensors = {f"{outer}.{name}": tensor for outer, name, tensor in parts if torch.is_tensor(tensor)}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise Invalid(f"{path} holds no named tensors: expected the state dict of a network.")
    # Tensors may share their data, but not without end: each is read by itself.
    if sum(tensor.nbytes for tensor in tensors.values()) > 4 * len(archive.mapped):
        raise unreadable(path, "its tensors together claim many times what the file holds")
    return tensors


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    return value.items() if isinstance(value, dict) else ()


def _storages(archive: Archive, root: str) -> Callable[[Any], _Storage]:
    """A function that makes a storage of the archive of a pickle's words for it."""
    order = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in archive.entries else sys.byteorder
    if order not in ("little", "big"):
        raise ValueError("its byte order is none")
    made: dict[str, _Storage] = {}

    def storage(words: Any) -> _Storage:
        _, kind, key, _, count = words
        found = _STORAGE.fullmatch(kind) if type(kind) is _Named else None
        if not found or found[1] not in _DTYPES or type(key) is not str or type(count) is not int:
            raise ValueError("its pickle names no storage of numbers")
        dtype = _DTYPES[found[1]]
        if key not in made:
            made[key] = _Storage(archive.numbers(f"{root}data/{key}", count, dtype, order != sys.byteorder))
        if made[key].numbers.dtype != dtype or made[key].numbers.numel() != count:
            raise ValueError("its pickle names one storage in two ways")
        return made[key]

    return storage


# --- a pickle's steps -------------------------------------------------------------------------------------------

_PLAIN = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_WRITTEN = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE"}
_WRITTEN |= {"BINBYTES", "SHORT_BINBYTES"}
_EMPTY: dict[str, type] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": list}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _steps(code: bytes) -> Iterator[tuple[str, Any]]:
    for step, (op, arg, _) in enumerate(pickletools.genops(code)):
        if step > _MOST_STEPS:
            raise ValueError(f"its pickle takes more than {_MOST_STEPS:,} steps")
        yield op.name, arg


def _run(path: Path, code: bytes, storage: Callable[[Any], _Storage]) -> Any:
    """The value of a pickle, of dictionaries, lists, tuples, plain values and tensors, and ``_Other`` for the rest.

    Nothing that it holds is hashed or compared but strings, as keys may be chosen so that this takes for ever. Raises
    ``Invalid`` with the name of what else it would call; ``ValueError``, ``LookupError`` or ``TypeError`` for anything
    that no dictionary of tensors needs.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks before each mark
    memo: dict[str, Any] = {}  # by numbers as strings, as above
    for step, arg in _steps(code):
        items: list[Any] = []
        if step in ("TUPLE", "APPENDS", "ADDITEMS", "SETITEMS"):
            items, stack = stack, below.pop()
        match step:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                break
            case "MARK":
                below.append(stack)
                stack = []
            case "POP":
                stack.pop()
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[str(arg)])
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[str(len(memo) if arg is None else arg)] = stack[-1]
            case "GLOBAL":
                stack.append(_allowed(path, arg.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                stack[-2:] = [_allowed(path, ".".join(stack[-2:]))]
            case "BINPERSID":
                stack[-1] = storage(stack[-1])
            case "TUPLE":
                stack.append(tuple(items))
            case "APPEND":
                _filled(stack[-2], list).append(stack.pop())
            case "APPENDS" | "ADDITEMS":
                _filled(stack[-1], list).extend(items)
            case "SETITEM":
                _fill(stack[-3], [stack[-2:]])
                del stack[-2:]
            case "SETITEMS":
                _fill(stack[-1], zip(items[::2], items[1::2], strict=True))
            case "REDUCE" | "NEWOBJ":
                stack[-2:] = [_called(*stack[-2:])]
            case "BUILD":
                state = stack.pop()
                _build(stack[-1], state)
            case _:
                _push(stack, step, arg)
    [value] = stack
    return value


def _push(stack: list[Any], step: str, arg: Any) -> None:
    """Put a plain value on the stack; ``ValueError`` for a step that no dictionary of tensors needs."""
    if step in _PLAIN:
        stack.append(_PLAIN[step])
    elif step in _EMPTY:
        stack.append(_EMPTY[step]())
    elif step in _TUPLES:
        count = _TUPLES[step]
        if len(stack) < count:
            raise ValueError("its pickle takes what it never put")
        stack[-count:] = [tuple(stack[-count:])]
    elif step not in _WRITTEN:
        raise ValueError(f"its pickle takes the step {step}, as no file of weights does")
    elif step == "LONG1" and abs(arg) >= 2**64:  # to write it down takes its length squared
        raise ValueError("its pickle holds a number of more than 64 bits")
    else:
        stack.append(arg)


def _filled(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"its pickle fills what is no {kind.__name__}")
    return value


def _fill(value: Any, pairs: Iterable[Iterable[Any]]) -> None:
    """Put pairs into a dictionary; a key that is no string is kept as one that is none."""
    held = _filled(value, dict)
    for key, inner in pairs:
        held[key if type(key) is str else _Other()] = inner


def _build(value: Any, state: Any) -> None:
    """Give a value its state: a ``ParameterDict``'s parameters; else nothing that is needed."""
    if type(value) is _Parameters:
        value.update(_items(state.get("_parameters") if isinstance(state, dict) else None))
    elif not isinstance(value, dict | _Other):
        raise ValueError("its pickle changes an object that is no dictionary")


def _tensor(storage: _Storage, offset: int, shape: Any, stride: Any, _grad: Any, _hooks: Any, *more: Any) -> Tensor:
    """A tensor as a view of its storage; ``ValueError`` if it does not lie in that, or has more numbers than that."""
    numbers = storage.numbers if isinstance(storage, _Storage) else torch.empty(0)
    where = (offset, *shape, *stride)
    if len(shape) != len(stride) or len(where) > 17 or any(more):  # at most 8 dimensions; negated or conjugate
        raise ValueError("one of its tensors has no shape of a weight")
    if not all(type(number) is int and 0 <= number < _LARGEST for number in where):
        raise ValueError("one of its tensors has no shape of a weight")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if math.prod(shape) > numbers.numel() or (0 not in shape and last >= numbers.numel()):
        raise ValueError("one of its tensors claims a shape larger than its data")
    return numbers.as_strided(shape, stride, offset if 0 not in shape else 0)


def _parameter(tensor: Any, *_: Any) -> Tensor:
    if not torch.is_tensor(tensor):
        raise ValueError("its pickle has a parameter that is no tensor")
    return tensor


def _set(members: Any = ()) -> _Other:
    if not isinstance(members, list | tuple) or len(members):
        raise ValueError("its pickle calls set: no function of weights")
    return _Other()


def _encode(_text: Any, codec: Any) -> _Other:
    if codec != "latin1":  # as numpy's numbers are written; other codecs compress and expand
        raise ValueError("its pickle calls _codecs.encode: no function of weights")
    return _Other()


def _beside(*_: Any) -> _Other:
    return _Other()


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": lambda sizes: _filled(sizes, tuple),
    "torch.device": _beside,
    "collections.OrderedDict": lambda: {},
    "torch.nn.modules.container.ParameterDict": lambda: _Parameters(),
    "__builtin__.set": _set,
    "builtins.set": _set,
    "_codecs.encode": _encode,
    "numpy.core.multiarray.scalar": _beside,
    "numpy._core.multiarray.scalar": _beside,
    "numpy.dtype": _beside,
    "argparse.Namespace": _beside,
}
"""Names that files of weights call, and what is done here in their place: no function of a library is ever called."""


def _allowed(path: Path, name: str) -> _Named:
    """The dotted name of a function or type, if a dictionary of tensors needs it; else ``Invalid``."""
    if name not in _CALLS and not _TYPES.fullmatch(name):
        raise Invalid(
            f"{path} is refused: reading it would run {one_line(name)}. Ask for the file as safetensors, "
            "which cannot hold code."
        )
    return _Named(name)


def _called(name: Any, given: Any) -> Any:
    """The result of a call, by ``_CALLS``."""
    if type(name) is not _Named or name not in _CALLS or type(given) is not tuple:
        said = name if type(name) is _Named else "what it made itself"
        raise ValueError(f"its pickle calls {said}: no function of weights")
    try:
        return _CALLS[name](*given)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"its pickle calls {name} as no file of weights does") from error
