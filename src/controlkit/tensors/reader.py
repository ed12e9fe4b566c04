"""Files of named tensors from anywhere, read without trusting them.

Safetensors are read by their library, which checks sizes against the file before it takes memory; torch pickles by
``pickles``. Either way the file is opened once, and the header comes first: names, shapes and types are known before a
tensor is read. No library that makes networks is given a file from outside: it gets the tensors that came through here.
"""

import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from controlkit.errors import Invalid, NotFound, Unsupported, one_line
from controlkit.files import inside, parse_json
from controlkit.tensors.pickles import PICKLES, read_pickle, unreadable

LONGEST_HEADER = 2**23
"""Bytes of a header; those of whole checkpoints have 2**19. Reading one takes a hundred times its size."""

Shape = tuple[int, ...]


_OTHERS = {
    b"version https://git-lfs": "a pointer of git-lfs in its place: run `git lfs pull`, or download the file itself",
    b"GGUF": "a GGUF file, whose packed numbers are not read here: get the weights as safetensors",
    b"\x89HDF": "a file of Keras (HDF5): get the weights as safetensors",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"\x1f\x8b": "an archive: unpack it first",
    b"7z\xbc\xaf": "an archive: unpack it first",
    b"Rar!": "an archive: unpack it first",
}
"""Beginnings of files that people have in the place of weights, and what these are."""
_WEB_PAGES = ("<!doctype", "<html", "<head", "<?xml", "<!--")
_WRAPPED = ("module.", "controlnet.")
"""Beginnings of all names of a file, by what held the network when it was saved: DistributedDataParallel, a script."""
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts of names wherever they stand: of what was compiled, sharded, or computed anew in the backward pass."""
_MOST_SHARDS = 100
_SHARD_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}\.(safetensors|bin|pth|pt)")


@dataclass(frozen=True)
class TensorFile:
    """The header of a file of tensors, or of one in shards; ``read`` brings the tensors themselves."""

    path: Path
    shapes: Mapping[str, Shape]
    metadata: Mapping[str, str]
    _bring: Callable[[list[str]], dict[str, Tensor]]

    def read(self, names: Iterable[str] | None = None, finite: bool = True) -> dict[str, Tensor]:
        """Tensors by name, as stored; all by default.

        Raises ``Invalid`` if the file is damaged, or a tensor holds complex numbers; with ``finite``, NaN or infinity.
        """
        try:
            tensors = self._bring(list(self.shapes if names is None else names))
        except (SafetensorError, OSError, TypeError, KeyError, RuntimeError) as error:
            raise unreadable(self.path, error) from error
        for name, tensor in tensors.items():
            if tensor.is_complex():
                raise Invalid(f"{self.path} cannot be weights: {name} holds complex numbers.")
            if finite and tensor.is_floating_point() and not _finite(tensor):
                raise Invalid(f"{self.path} is damaged: {name} holds NaN or infinity. Get the file anew.")
        return tensors


def _finite(tensor: Tensor) -> bool:
    if tensor.itemsize == 1:  # float8: torch has no isfinite for it
        tensor = tensor.float()
    return not tensor.numel() or all(map(torch.isfinite, torch.aminmax(tensor)))  # 15 times as quick as isfinite of all


def open_tensors(path: Path) -> TensorFile:
    """Read the header of a file of tensors, or of the file that lists the shards of one (``*.index.json``).

    Names are given without what all of them begin with, if it is of no network (``module.``). Raises ``NotFound`` if
    there is no such file, ``Unsupported`` for torch's old kind of pickle, and ``Invalid`` if the file is damaged, is
    something else, or would run code.
    """
    return _unwrapped(_open(path))


def _open(path: Path, is_shard: bool = False) -> TensorFile:
    try:
        if not path.is_file():
            raise NotFound(f"There is no file {path}: expected a .safetensors file, or a .pth.")
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise unreadable(path, error.strerror) from error
    if start.startswith(b"PK\3\4"):
        return _checked(of_tensors(path, read_pickle(path)))
    if start.startswith(b"\x80") and _claimed(start) > LONGEST_HEADER and path.suffix.lower() in PICKLES:
        raise Unsupported(
            f"{path} is a pickle of the kind torch wrote before 2020, whose sizes cannot be checked: load it where you "
            "trust it and save it as safetensors."
        )
    text = start.removeprefix(BOM_UTF8).decode("latin1").lstrip().lower()
    words = next((words for magic, words in _OTHERS.items() if start.startswith(magic)), None)
    if text.startswith(_WEB_PAGES):
        words = "a web page in the place of the file: download the file itself (on a hub, /resolve/ and not /blob/)"
    if not start:
        raise unreadable(path, "it is empty")
    if words:
        raise Invalid(f"{path} is {words}. Expected weights, as safetensors or a torch pickle (.pth).")
    if text.startswith("{") and not is_shard:
        return _open_shards(path)
    if (
        _claimed(start) > LONGEST_HEADER
        and start.isascii()
        and (said := " ".join(start.decode("ascii").split())).isprintable()
    ):
        raise unreadable(path, f'a text lies in its place, "{said}"')
    return _checked(_of_safetensors(path))


def _claimed(start: bytes) -> int:
    """Bytes of a safetensors header, by what the file begins with."""
    return int.from_bytes(start[:8], "little")


def open_safetensors(path: Path) -> Any:
    """The library's handle of a safetensors file, which is not opened again: for what needs its words and not ours.

    Raises ``NotFound`` where there is no such file, ``Invalid`` where it cannot be read, or has a header that takes too
    much memory.
    """
    if not path.is_file():  # a pipe would be waited for
        raise NotFound(f"There is no file {path}: expected a .safetensors file.")
    try:
        with path.open("rb") as file:
            claimed = _claimed(file.read(8))
        if claimed > LONGEST_HEADER:
            raise unreadable(path, f"its header claims more than {LONGEST_HEADER:,} bytes")
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error


def _of_safetensors(path: Path) -> TensorFile:
    file = open_safetensors(path)
    try:
        names: list[str] = file.keys()  # this is no mapping: it cannot be iterated itself
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise unreadable(path, error) from error
    return TensorFile(path, shapes, metadata, lambda wanted: {name: file.get_tensor(name) for name in wanted})


def of_tensors(path: Path, tensors: Mapping[str, Tensor]) -> TensorFile:
    """The header of tensors that were read already; ``path`` names in errors where they came from."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return TensorFile(path, shapes, {}, lambda wanted: {name: tensors[name].contiguous() for name in wanted})


def _open_shards(path: Path) -> TensorFile:
    """The header of all shards that an index lists; it may name no file but those beside it."""
    if path.stat().st_size > LONGEST_HEADER:
        raise unreadable(path, f"a text of more than {LONGEST_HEADER:,} bytes")
    index = parse_json(path.read_bytes(), str(path))
    homes = index.get("weight_map") if isinstance(index, dict) else None
    if not (homes and isinstance(homes, dict)):
        raise Invalid(f"{path} is a text of JSON and no weights: name the folder or the file of weights beside it.")
    places = sorted({str(home) for home in homes.values()})
    if len(places) > _MOST_SHARDS or any(not _SHARD_NAME.fullmatch(one) for one in places):
        raise unreadable(path, "it lists what are no files of weights beside it")
    if absent := [place for place in places if not path.with_name(place).is_file()]:
        raise NotFound(f"{path} lists {len(places)} files of weights, and {absent[0]} is not there: get all of them.")
    shards = {place: _open(inside(path.parent, path.with_name(place)), is_shard=True) for place in places}
    if lost := [name for name, place in homes.items() if name not in shards[place].shapes]:
        raise unreadable(path, f"{one_line(homes[lost[0]])} lacks {one_line(lost[0])}")

    def bring(wanted: list[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for place, shard in shards.items():
            found |= shard.read([name for name in wanted if homes[name] == place])
        return found

    shapes = {name: shards[place].shapes[name] for name, place in homes.items()}
    return _checked(TensorFile(path, shapes, shards[places[0]].metadata, bring))


def _checked(header: TensorFile) -> TensorFile:
    """The header, if its names can stand in a sentence and its shapes have at most 8 dimensions."""
    for name, shape in header.shapes.items():
        if not (len(name) <= 250 and name.isprintable() and len(shape) <= 8):
            raise unreadable(header.path, f"{name[:100]!a} is no name of a weight, or its shape is none")
    return header


def _unwrapped(header: TensorFile) -> TensorFile:
    """The header, names without what all of them begin with by what held the network."""
    names = [_WRAPPERS.sub("", name) for name in header.shapes]
    while prefix := next((one for one in _WRAPPED if names and all(n.startswith(one) for n in names)), None):
        names = [name.removeprefix(prefix) for name in names]
    stored = dict(zip(names, header.shapes, strict=True))
    if list(stored) == list(header.shapes) or len(stored) < len(names):
        return header

    def bring(wanted: list[str]) -> dict[str, Tensor]:
        tensors = header._bring([stored[name] for name in wanted])
        return {name: tensors[stored[name]] for name in wanted}

    return replace(header, shapes={name: header.shapes[own] for name, own in stored.items()}, _bring=bring)
