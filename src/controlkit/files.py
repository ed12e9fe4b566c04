"""Files: texts from outside read in one way, files of ours written whole or not at all, folders of ours marked.

Every text that a person or another program wrote (captions, listings, recipes, configurations, requests) is read here,
so that encodings, byte order marks, duplicate keys and nesting are treated alike everywhere.
"""

import codecs
import errno
import json
import math
import os
import re
import shutil
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from controlkit.errors import Invalid, NotFound, Unsupported, one_line

SCRATCH = ".writing-"
"""The beginning of the name of a file or folder until it is whole and renamed."""

OUTPUT = ".controlkit-output"
"""The file that marks a folder as written by this program; readers of data sets leave such folders out."""

LEFTOVERS = {"__macosx", "thumbs.db", "desktop.ini", "ehthumbs.db"}
"""Names, in small letters, that operating systems put beside people's files."""

_HELD = re.compile(rf"{re.escape(SCRATCH)}[0-9a-f]{{32}}")  # a name of ``scratch_folder``'s

LONGEST_TEXT, LONGEST_YAML = 2**27, 2**17
"""Bytes of a file of text, and letters of one of YAML, that are read: larger ones cost more than 1 GB or seconds."""
MOST_MEMORY = 9 * 10**8
"""Bytes of memory that the values of a JSON text may take."""

_DEEPEST = 64
_YAML_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def home_path(name: str | Path) -> Path:
    """A path from outside, its ~ replaced, as a shell does it at the beginning of a word alone."""
    return Path(os.path.expanduser(name))  # noqa: PTH111  # pathlib's raises where there is no such user


def encoding_of(start: bytes) -> str:
    """The encoding of a text from outside that starts with these bytes: UTF-8, or what a byte order mark says."""
    return next((code for mark, code in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8")


def decode_text(data: bytes, name: str) -> str:
    """The text in the bytes of a file from outside, without a byte order mark.

    UTF-8; UTF-16 where a byte order mark says so. ``name`` names the file in errors. Raises ``Invalid`` for anything
    else, and for zero bytes, which no text has.
    """
    try:
        text = data.decode(encoding_of(data))
    except UnicodeDecodeError as error:
        raise Invalid(f"{name} is no text in UTF-8 (byte {error.start}): save it as UTF-8.") from error
    if "\0" in text:
        raise Invalid(f"{name} has zero bytes: expected a text in UTF-8, not a file of another kind.")
    return text


def inside(folder: Path, path: Path) -> Path:
    """The path, if what it leads to lies within ``folder``, or in the blobs that a hub's cache keeps beside it.

    Raises ``Invalid`` for a link that leads out: a stranger's folder may link to any file of this machine.
    """
    home, place = (Path(os.path.realpath(one)) for one in (folder, path))  # Path.resolve raises for links in a circle
    blobs = home.parent.parent / "blobs"
    if place.is_relative_to(home) or (home.parent.name == "snapshots" and place.is_relative_to(blobs)):
        return path
    raise Invalid(f"{path} leads out of its folder, to {one_line(place)}: expected a file within {folder}, no link.")


def read_bytes(path: Path, most: int = LONGEST_TEXT) -> bytes:
    """The bytes of a regular file; ``NotFound`` if there is none, ``Invalid`` if it has more than ``most``."""
    try:
        if not path.is_file():
            raise NotFound(f"There is no file at {path}: expected a text.")
        with path.open("rb") as file:  # its size is not asked: files of /proc have none and no end
            data = file.read(most + 1)
    except OSError as error:
        raise Invalid(f"{path} cannot be read ({error.strerror}).") from error
    if len(data) > most:
        raise Invalid(f"{path} has more than {most:,} bytes: no text of this kind has so many.")
    return data


def read_text(path: Path, most: int = LONGEST_TEXT) -> str:
    """The text of a file, as ``decode_text`` gives it; raises as ``read_bytes`` does, too."""
    return decode_text(read_bytes(path, most), str(path))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON text, whose keys are given once; else the last would win without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f'the key "{key[:80]}" is given twice')
    return found


_NUMBERS = bytes(0x31 if chr(i).isdigit() else 0x65 if chr(i) in "eE" else i for i in range(128)).ljust(256, b" ")
"""Each digit as 1, and e for E: by these long numbers are found in a text in no time."""


def _whole(digits: str) -> int:
    """A whole number that is a float, too, and can be printed: some tokenizers' longest prompt is 10^30."""
    if len(digits) > 64:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number[:40]} is no number of 64 bits")
    return value


def _check_letters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("half a letter (a lone surrogate), which UTF-8 has not") from error


def _check_depth(value: Any) -> None:
    """Raise ``ValueError`` for a value of so many levels that printing or comparing it could fail."""
    level = [value]
    for _ in range(_DEEPEST + 1):
        found = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [inner for values in found for inner in values if isinstance(inner, dict | list)]
    if level:
        raise ValueError("brackets in too many levels")


def parse_json(text: str | bytes, name: str, finite: bool = True, halves: bool = False) -> Any:
    """The value of a JSON text from outside; ``name`` names it in errors.

    ``finite``: refuse NaN and infinity, which JSON has not, and numbers as large. ``halves``: let half letters (lone
    surrogates) pass. Raises ``Invalid`` for what is no JSON, for a key given twice, whole numbers of more than 64
    digits and more than 64 levels; and, before it is read, for a text whose values could take some 1 GB of memory.
    """
    plain = decode_text(text, name) if isinstance(text, bytes) else text.removeprefix("\ufeff")
    taken = 2 * sys.getsizeof(plain) + 232 * plain.count("{") + 64 * (plain.count("[") + plain.count(","))
    if taken > MOST_MEMORY:
        raise Invalid(f"{name} is too large: its values could take {taken >> 20:,} MB of memory.")
    numbers = plain.encode(errors="surrogatepass").translate(_NUMBERS, b"+")
    hooks: dict[str, Any] = {}  # which take twice the time: only where a number could be odd
    if b"1" * 64 in numbers or b"e111" in numbers or "NaN" in plain or "Infinity" in plain:
        hooks = {"parse_int": _whole} | ({"parse_float": _finite, "parse_constant": _finite} if finite else {})
    try:
        found = json.loads(plain, object_pairs_hook=_once, **hooks)
        if not halves and ("\\ud" in plain or "\\uD" in plain):  # half a pair cannot be printed or written
            _check_letters(json.dumps(found, ensure_ascii=False))
        _check_depth(found)
    except (ValueError, RecursionError) as error:
        reason = "brackets in too many levels" if isinstance(error, RecursionError) else one_line(error)
        raise Invalid(f"{name} is no JSON ({reason}): expected one value, written whole.") from error
    return found


def read_json(path: Path, most: int = LONGEST_TEXT, finite: bool = True) -> Any:
    """The value of a JSON file of at most so many bytes; raises as ``read_bytes`` and ``parse_json`` do."""
    return parse_json(read_bytes(path, most), str(path), finite)


def parse_yaml(text: str, name: str) -> Any:
    """The value of a YAML text from outside: texts, numbers, truths, dates and nothing, in lists and dictionaries.

    ``name`` names it in errors. Raises ``Invalid`` for what is no YAML, for a key given twice (else the last would win
    without a word), for aliases and merges, with which a kilobyte can stand for gigabytes, for tags, and for texts
    longer than ``LONGEST_YAML``, as reading one takes its time. Keys are texts.
    """
    return parse_yaml_as_written(text, name)[0]


def parse_yaml_as_written(text: str, name: str) -> tuple[Any, Any]:
    """(what ``parse_yaml`` gives, the same with every value as the text that was written)."""
    if len(text) > LONGEST_YAML:
        raise Invalid(f"{name} has {len(text):,} letters; expected YAML of at most {LONGEST_YAML:,}.")
    try:
        loader = _yaml_loader()(text.removeprefix("\ufeff"))
        node = loader.get_single_node()
        found = (None, None) if node is None else (loader.construct_document(node), _written(node))
        _check_depth(found[1])
        return found
    except (_yaml_error(), ValueError, RecursionError) as error:
        reason = "brackets in too many levels" if isinstance(error, RecursionError) else one_line(error)
        raise Invalid(f"{name} is no YAML that is read here ({reason}).") from error


def _written(node: Any) -> Any:
    if node.id == "mapping":
        return {key.value: _written(value) for key, value in node.value}
    return [_written(one) for one in node.value] if node.id == "sequence" else node.value


def _yaml_error() -> type[Exception]:
    import yaml  # here, as few commands read YAML

    return yaml.YAMLError


@cache
def _yaml_loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases (*name) are not read; write the value where it is used")
            if getattr(self.peek_event(), "tag", None) is not None:
                raise yaml.YAMLError("tags (!name) are not read; write plain values")
            node: Any = super().compose_node(parent, index)
            if node.id == "scalar" and len(node.value) > 64 and node.tag in _YAML_NUMBERS:
                raise yaml.YAMLError(f"a number of {len(node.value)} letters")
            if node.id == "scalar":
                _check_letters(node.value)
            return node

        def fetch_flow_collection_start(self, token: Any) -> None:
            if self.flow_level >= _DEEPEST:  # each level costs as much as all before it
                raise yaml.YAMLError("brackets in too many levels")
            super().fetch_flow_collection_start(token)

        def flatten_mapping(self, node: Any) -> None:
            seen: set[str] = set()
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    raise yaml.YAMLError("merges (<<) are not read; write the keys where they are used")
                if key.id != "scalar":
                    raise yaml.YAMLError(f"a key that is no word (line {key.start_mark.line + 1})")
                if key.value in seen:
                    raise yaml.YAMLError(f'the key "{key.value[:80]}" is given twice (line {key.start_mark.line + 1})')
                seen.add(key.value)
                key.tag = "tag:yaml.org,2002:str"

    return Loader


def is_leftover(name: str) -> bool:
    """Whether a file's or folder's name is hidden, of an operating system, or of a file being written: no data."""
    return name.startswith(".") or name.lower() in LEFTOVERS


def mark_output(folder: Path, command: str) -> None:
    """Make a folder for what ``command`` writes and mark it, unless it holds files of somebody else's.

    A marked folder inside a data set is not taken for a part of it: run folders, pictures made, reports.
    """
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / OUTPUT
    if marker.exists() or any(not is_leftover(path.name) for path in folder.iterdir()):
        return
    words = f"Written by ControlKit ({command}). Data sets leave this folder out; delete this file to use it as data.\n"
    write_atomic(marker, words.encode())


def is_output(folder: Path) -> bool:
    """Whether ``mark_output`` marked this folder."""
    return (folder / OUTPUT).exists()


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder in ``parent``, to be filled with what is renamed when it is whole; deleted with all that is left.

    The process holds a lock on it, which the system frees if it is killed. Such folders of others that were killed are
    deleted first. Raises ``OSError`` as writing does.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _tidy(parent.absolute())
    lock = None
    while lock is None:  # one that is not locked yet may be taken for a killed process's
        scratch = parent / f"{SCRATCH}{uuid.uuid4().hex}"
        scratch.mkdir()
        lock = _lock(scratch)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        _unlock(lock)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a folder for this process while it fills it; ``Unsupported`` where another one does.

    What a killed process kept is free.
    """
    lock = _lock(folder)
    if lock is None:
        raise Unsupported(f"{folder} is being written by another process: wait until it ends, or give another folder.")
    try:
        yield
    finally:
        _unlock(lock)


def sweep(folder: Path) -> None:
    """Delete what killed processes left half written in a folder and those below; what is being written now stays."""
    for left in sorted(folder.rglob(f"{SCRATCH}*")):
        _delete_abandoned(left)


@cache
def _tidy(folder: Path) -> None:
    """``sweep`` for this folder alone, once: there may be many files in it, and each is written by itself."""
    for left in folder.iterdir():
        if _HELD.fullmatch(left.name):
            _delete_abandoned(left)


def _delete_abandoned(left: Path) -> None:
    lock = None if left.is_symlink() else _lock(left)
    with suppress(OSError):  # gone meanwhile, or somebody else's
        if left.is_symlink() or lock not in (None, _NO_LOCK):
            left.unlink() if left.is_symlink() or not left.is_dir() else shutil.rmtree(left)
    _unlock(lock)


_NO_LOCK = -1
"""In the place of a lock, where the system has none for folders: then nothing is taken for abandoned."""


def _lock(path: Path) -> int | None:
    """The lock on a scratch folder or file; None where another process holds it, or it is gone."""
    if sys.platform == "win32":
        return _NO_LOCK
    import fcntl

    try:
        lock = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # of a pipe the opening itself would wait
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists():
            return lock
    except OSError as error:
        if not isinstance(error, BlockingIOError):  # a network's disk
            os.close(lock)
            return _NO_LOCK
    os.close(lock)
    return None


def _unlock(lock: int | None) -> None:
    if lock not in (None, _NO_LOCK):
        os.close(lock)


def write_atomic(path: Path, data: bytes | Callable[[Path], None]) -> None:
    """Write a file whole or not at all: to a neighbour first, then renamed over the target.

    ``data``: the bytes, or, where they are too many to be held twice, a function that writes them to a path. Raises
    ``Invalid`` where a folder is in its place, ``OSError`` as writing does.
    """
    from safetensors import SafetensorError

    if path.is_dir() and not path.is_symlink():
        raise Invalid(f"{path} is a folder, where a file is to be written: move it away, or choose another place.")
    with scratch_folder(path.parent) as folder:
        scratch = folder / path.name
        if callable(data):
            scratch.touch(exist_ok=False)
            mode = scratch.stat().st_mode  # the writer may make the file anew, for its owner alone
            try:
                data(scratch)
            except SafetensorError as error:  # which is what its writer makes of a full disk, too
                full = shutil.disk_usage(path.parent).free < 1 << 20
                raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from error
            scratch.chmod(mode)
        with scratch.open("ab") as file:
            if isinstance(data, bytes):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
