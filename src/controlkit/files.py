"""Files: texts from outside read in one way, files of ours written whole or not at all, folders of ours marked.

Every text that a person or another program wrote (captions, listings, recipes, configurations, requests) is read here,
so that encodings, byte order marks, duplicate keys and nesting are treated alike everywhere.
"""

import codecs
import errno
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from controlkit.errors import Invalid, NotFound, one_line

SCRATCH = ".writing-"
"""The beginning of the name of a file or folder until it is whole and renamed."""

OUTPUT = ".controlkit-output"
"""The file that marks a folder as written by this program; readers of data sets leave such folders out."""

LEFTOVERS = {"__macosx", "thumbs.db", "desktop.ini", "ehthumbs.db"}
"""Names, in small letters, that operating systems put beside people's files."""

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


def read_text(path: Path) -> str:
    """The text of a file, as ``decode_text`` gives it; ``NotFound`` if there is no file."""
    if not path.is_file():
        raise NotFound(f"There is no file at {path}: expected a text.")
    return decode_text(path.read_bytes(), str(path))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON text, whose keys are given once; else the last would win without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f'the key "{key}" is given twice')
    return found


def parse_json(text: str | bytes, name: str) -> Any:
    """The value of a JSON text from outside; ``name`` names it in errors. Raises ``Invalid`` for anything else."""
    try:
        plain = decode_text(text, name) if isinstance(text, bytes) else text.removeprefix("\ufeff")
        return json.loads(plain, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        if isinstance(error, Invalid):
            raise
        reason = "brackets in too many levels" if isinstance(error, RecursionError) else one_line(error)
        raise Invalid(f"{name} is no JSON ({reason}): expected one value, written whole.") from error


def parse_yaml(text: str, name: str) -> Any:
    """The value of a YAML text from outside; ``name`` names it in errors.

    Raises ``Invalid`` for what is no YAML, for a key given twice (else the last would win without a word), and for
    aliases and merges, with which a kilobyte can stand for gigabytes.
    """
    import yaml  # here, as few commands read YAML

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases (*name) are not read; write the value where it is used")
            return super().compose_node(parent, index)

        def flatten_mapping(self, node: Any) -> None:
            seen: set[Hashable] = set()
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    raise yaml.YAMLError("merges (<<) are not read; write the keys where they are used")
                if key.value.__hash__ and key.value in seen:
                    raise yaml.YAMLError(f'the key "{key.value}" is given twice (line {key.start_mark.line + 1})')
                seen |= {key.value} if key.value.__hash__ else set()

    try:
        return yaml.load(text.removeprefix("\ufeff"), Loader)  # a safe loader of plain values
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: of a date that is none
        reason = "brackets in too many levels" if isinstance(error, RecursionError) else one_line(error)
        raise Invalid(f"{name} is no YAML that is read here ({reason}).") from error


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


def write_atomic(path: Path, data: bytes | Callable[[Path], None]) -> None:
    """Write a file whole or not at all: to a neighbour first, then renamed over the target.

    ``data``: the bytes, or, where they are too many to be held twice, a function that writes them to a path. Raises
    ``OSError`` as writing does.
    """
    from safetensors import SafetensorError

    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.parent / f"{SCRATCH}{uuid.uuid4().hex}"  # not mkstemp: its files are readable by their owner alone
    try:
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
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
