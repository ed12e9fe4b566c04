"""Torch pickles from anywhere, read without running anything in them.

A pickle is walked through first, and whatever asks for more than dictionaries of tensors is refused by name; then it
goes through torch's restricted loader alone, mapped and not copied.
"""

import math
import pickletools
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlkit.errors import Invalid, UserError, one_line

PICKLES = (".pth", ".pt", ".ckpt", ".bin")
"""Endings of files that hold pickles."""

_LONGEST_PICKLE = 2**22  # bytes of one without its tensors; a training checkpoint's has some 2**20
_MOST_STEPS = 500_000  # in such a pickle; a whole checkpoint's takes some 100,000
_LONGEST_TUPLE = 10_000  # with the tuples in it written out
_CALLED = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch.Size", "torch.device")
_DICTIONARY = "collections.OrderedDict"
_SETS, _ENCODE = ("__builtin__.set", "builtins.set"), "_codecs.encode"
_TYPES = re.compile(r"torch\.((cuda\.)?[A-Z]\w*Storage|bool|b?float\d+|u?int\d+)")  # named, never called
_WRAPPERS = ("state_dict", "module", "model", "controlnet", "string_to_param", "adapter")
"""Keys of checkpoints (of torch, DeepSpeed and scripts), textual inversions and T2I-Adapters."""


class _Parameters(dict):
    """A ``ParameterDict`` in a file, as the plain dictionary that it holds."""

    def __setstate__(self, state: Any) -> None:
        held = state.get("_parameters") if type(state) is dict else None
        self.update(_items(held))


class _Beside(dict):
    """An object beside the weights that is harmless and of no use: a number of numpy's, the settings of a script."""

    def __init__(self, *given: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Keep nothing."""


_STAND_INS: dict[str, type] = {
    "torch.nn.modules.container.ParameterDict": _Parameters,
    "numpy.core.multiarray.scalar": _Beside,
    "numpy._core.multiarray.scalar": _Beside,
    "numpy.dtype": _Beside,
    "argparse.Namespace": _Beside,
}
"""Names that files have beside tensors, and the classes of ours that are made in their place."""


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
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise unreadable(path, "its parts are compressed, which torch never does")
            codes = [entry for entry in archive.infolist() if entry.filename.lower().endswith(".pkl")]
            if not codes:
                raise Invalid(f"{path} is an archive of other files, not weights: unpack it first.")
            if sum(entry.file_size for entry in codes) > _LONGEST_PICKLE:
                raise unreadable(path, f"its pickle has more than {_LONGEST_PICKLE:,} bytes beside the tensors")
            for entry in codes:
                _check_code(path, archive.read(entry))
        with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in _STAND_INS.items()]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except Exception as error:  # a damaged archive makes torch's reader raise anything: the file is at fault
        raise unreadable(path, error) from error
    for _ in _WRAPPERS:  # one in another, in any order; a dictionary may hold itself
        held = [dict.get(content, wrapper) for wrapper in _WRAPPERS] if isinstance(content, dict) else []
        content = next((one for one in held if isinstance(one, dict)), content)
    tensors = {name: tensor.detach() for name, tensor in _items(content) if torch.is_tensor(tensor)}
    if not tensors:  # a network's parts, each a dictionary: an IP-Adapter
        parts = [(outer, name, tensor) for outer, part in _items(content) for name, tensor in _items(part)]
        tensors = {f"{outer}.{name}": tensor.detach() for outer, name, tensor in parts if torch.is_tensor(tensor)}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise Invalid(f"{path} holds no named tensors: expected the state dict of a network.")
    _check_sizes(path, tensors)
    return tensors


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    """Keys and values, by dict's own method: a pickle may put what it likes in the place of an OrderedDict's."""
    return dict.items(value) if isinstance(value, dict) else ()


def _check_sizes(path: Path, tensors: dict[str, Tensor]) -> None:
    """Refuse tensors that claim more than the file holds."""
    claimed = 0
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * tensor.itemsize
        claimed += size
        plain = tensor.layout is torch.strided and not tensor.is_neg() and not tensor.is_conj()
        if not plain or size > tensor.untyped_storage().nbytes():
            raise unreadable(path, f"{name} claims a shape larger than its data")
    if claimed > 4 * path.stat().st_size:  # tensors may share their data, but not without end: each is read by itself
        raise unreadable(path, "its tensors together claim many times what the file holds")


# --- the walk through a pickle ----------------------------------------------------------------------------------


@dataclass
class _Value:
    """An object on the stack of a pickle, as far as it is known without making it."""

    name: str = ""  # a function's or type's dotted name; a string after a quote; "tuple"; what was called, and "()"
    size: int = 1  # of a tuple, with the tuples in it written out
    held: "list[_Value]" = field(default_factory=list)  # of a tuple; of a list that is filled, anything


def _steps(code: bytes) -> Iterator[tuple[pickletools.OpcodeInfo, Any]]:
    for step, (op, arg, _) in enumerate(pickletools.genops(code)):
        if step > _MOST_STEPS:
            raise ValueError(f"its pickle takes more than {_MOST_STEPS:,} steps")
        yield op, arg


def _check_code(path: Path, code: bytes) -> None:
    """Walk through a pickle without doing anything it asks for.

    torch's loader runs no stranger's code, but would take any memory (``bytearray(10**12)``) and any time (a key that
    is a tuple of tuples of tuples: hashing one visits each as often as it is named). ``Invalid`` names a function that
    it would call; ``ValueError`` for anything else that no dictionary of tensors needs.
    """
    stack: list[_Value] = []
    marks: list[int] = []
    memo: dict[Any, _Value] = {}
    for op, arg in _steps(code):
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
        if op.name in ("BINGET", "LONG_BINGET", "GET"):
            put = [memo[arg]]
        elif op.name == "MEMOIZE":
            put, memo[len(memo)] = taken, taken[0]
        elif op.name in ("BINPUT", "LONG_BINPUT", "PUT"):
            put, memo[arg] = [], stack[-1]
        elif op.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            parts = [value.name[1:] for value in taken] if op.name == "STACK_GLOBAL" else arg.split(" ")
            put = [_Value(_allowed(path, ".".join(parts)))]
        else:
            put = _result(op, arg, taken, items)
        if any(value.size > _LONGEST_TUPLE for value in put):
            raise ValueError("its pickle holds a tuple without end")
        stack += put


def _allowed(path: Path, name: str) -> str:
    """The dotted name of a function or type, if a dictionary of tensors needs it; else ``Invalid``."""
    if name not in (*_CALLED, _DICTIONARY, *_SETS, _ENCODE, *_STAND_INS) and not _TYPES.fullmatch(name):
        raise Invalid(
            f"{path} is refused: reading it would run {one_line(name)}. Ask for the file as safetensors, "
            "which cannot hold code."
        )
    return name


def _result(op: pickletools.OpcodeInfo, arg: Any, taken: Sequence[_Value], items: Sequence[_Value]) -> list[_Value]:
    """The values that a step leaves on the stack, given what it took: ``taken``, and ``items`` after a mark."""
    if "UNICODE" in op.name:
        return [_Value(f"'{arg}")]
    if "TUPLE" in op.name:
        parts = [*taken, *items]
        return [_Value("tuple", 1 + sum(value.size for value in parts), parts)]
    if op.name == "EMPTY_LIST":
        return [_Value("list")]
    if op.name in ("REDUCE", "NEWOBJ"):
        function, arguments = taken
        if arguments.name != "tuple" or not _may_call(function.name, arguments.held):
            raise ValueError(f"its pickle calls {function.name or 'what it made itself'}: no function of weights")
        return [_Value(f"{function.name}()")]
    if op.name in ("SETITEM", "SETITEMS"):
        if any(key.name in ("tuple", "torch.Size()") for key in (*taken[1:], *items)[::2]):
            raise ValueError("its pickle has keys that are no names")
        return list(taken[:1])
    if op.name in ("APPEND", "APPENDS", "BUILD"):
        if op.name == "BUILD" and taken[0].name.removesuffix("()") not in (_DICTIONARY, *_STAND_INS):
            raise ValueError("its pickle changes an object that is no dictionary")
        taken[0].held = [_Value()]  # the object, so in the memo too: it is empty no more
        return list(taken[:1])
    if op.name == "LONG1" and abs(arg) >= 2**64:  # keys chosen to collide take for ever, too
        raise ValueError("its pickle holds a number of more than 64 bits")
    return [_Value() for _ in op.stack_after]


def _may_call(name: str, given: Sequence[_Value]) -> bool:
    """Whether a call can neither run a stranger's code nor take more than the file's own size of memory and time."""
    if name == _DICTIONARY:
        return not given
    if name in _SETS:  # a filled one's members are hashed
        return [(value.name, value.held) for value in given] == [("list", [])]
    if name == _ENCODE:  # of the bytes of a number; other codecs compress and expand
        return len(given) == 2 and given[1].name == "'latin1"
    return name in _CALLED or name in _STAND_INS
