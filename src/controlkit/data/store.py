"""A content-addressed store: results computed on this machine, by what they were computed from.

One file of SQLite's: it takes many small entries without a file and an fsync for each, and several processes may read
and write at once. It belongs on a local disk. An entry's key is a digest of the bytes that went in, of what was done to
them and of the weights that did it, and of nothing else: the same picture in another folder, run or order is the same
entry. Every entry carries a checksum, and one that fails it is as good as absent: it is computed and written anew.
"""

import hashlib
import math
import sqlite3
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from controlkit.hub import cache_dir

Entry = Mapping[str, Tensor]
"""Tensors by name."""
Like = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""What an entry must be: shape and number format by name."""

_BROKEN = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_PATIENCE = 60.0  # seconds another process may hold the file
_HEADER = 1 << 12  # bytes of an entry's names and shapes
_AT_ONCE = 500  # keys a question may have
_TRIES = 3  # files that may be broken, one after the other
T = TypeVar("T")


def key_of(*parts: str | bytes | np.ndarray) -> bytes:
    """The key of a result computed from these: 32 bytes, other ones for any other parts."""
    total = hashlib.blake2b(digest_size=32)
    for part in parts:
        if isinstance(part, np.ndarray):
            total.update(f"{part.dtype} {part.shape} ".encode())
            content = part.tobytes()
        else:
            content = part.encode() if isinstance(part, str) else part
        total.update(f"{len(content)}:".encode())  # so that no two lists of parts run together
        total.update(content)
    return total.digest()


def _seal(key: bytes, value: bytes) -> bytes:
    return hashlib.blake2b(value, key=key, digest_size=16).digest()


def _entry(value: bytes, like: Like, most: int) -> dict[str, Tensor] | None:
    """The tensors that were kept as ``value``, if they are those of ``like``; at most so many bytes are read."""
    try:
        held = load(zlib.decompressobj().decompress(value, most))
    except (zlib.error, SafetensorError, KeyError, ValueError):
        return None
    return held if {name: (tuple(one.shape), one.dtype) for name, one in held.items()} == dict(like) else None


class Store:
    """Entries by key in ``folder``, which is made. Used as a context, it is closed at its end.

    A store that cannot be used (a full disk, a folder that may not be written) warns once and holds nothing from then
    on: what it is for is time, not results. A file that is no longer a database is left for the next number's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._connection: sqlite3.Connection | None = None
        self._number = 1
        self._usable = True

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *error: object) -> None:
        if self._connection:
            self._connection.close()
            self._connection = None

    def get(self, keys: Sequence[bytes], like: Sequence[Like]) -> list[dict[str, Tensor] | None]:
        """The entry of each key; None where there is none, or one that is damaged or is not ``like`` what was asked.

        Its size is known before it is read: whoever shares the file could write any other.
        """
        most = [_HEADER + sum(math.prod(shape) * kind.itemsize for shape, kind in one.values()) for one in like]

        def read(connection: sqlite3.Connection) -> dict[bytes, bytes]:
            found: dict[bytes, bytes] = {}
            for first in range(0, len(keys), _AT_ONCE):
                asked = keys[first : first + _AT_ONCE]
                marks = ",".join("?" * len(asked))
                limit = 2 * max(most[first : first + _AT_ONCE])  # what zlib cannot compress grows by far less
                wanted = f"key IN ({marks}) AND typeof(value) = 'blob' AND length(value) <= ?"
                rows = connection.execute(f"SELECT key, value, seal FROM entries WHERE {wanted}", [*asked, limit])
                found |= {key: value for key, value, seal in rows if seal == _seal(key, value)}
            return found

        found = self._do(read) or {}
        asked = zip(keys, like, most, strict=True)
        return [_entry(found[key], one, limit) if key in found else None for key, one, limit in asked]

    def put(self, entries: Mapping[bytes, Entry], dense: bool = True) -> None:
        """Keep entries, all of them or none; ``dense`` ones are not worth compressing."""
        level = 0 if dense else 1
        rows = []
        for key, entry in entries.items():
            value = zlib.compress(save({name: tensor.contiguous() for name, tensor in entry.items()}), level)
            rows.append((key, value, _seal(key, value)))

        def write(connection: sqlite3.Connection) -> None:
            with connection:
                connection.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", rows)

        self._do(write)

    def _open(self) -> sqlite3.Connection:
        """The newest file that is not known to be broken; older ones go, whoever still has them open."""
        self.folder.mkdir(parents=True, exist_ok=True)
        numbers = [int(path.stem) for path in self.folder.glob("*.sqlite") if path.stem.isdigit()]
        self._number = max([self._number, *numbers])
        while (self.folder / f"{self._number}.sqlite").is_symlink():  # it would be written into, wherever it leads
            self._number += 1
        connection = sqlite3.connect(self.folder / f"{self._number}.sqlite", timeout=_PATIENCE)
        connection.execute("PRAGMA journal_mode = WAL")  # readers need not wait for a writer
        connection.execute("PRAGMA synchronous = NORMAL")  # an fsync now and then; what a power cut takes is made anew
        connection.execute("CREATE TABLE IF NOT EXISTS entries (key BLOB PRIMARY KEY, value BLOB, seal BLOB)")
        for number in numbers:
            for path in self.folder.glob(f"{number}.sqlite*") if number < self._number else ():
                with suppress(OSError):
                    path.unlink()
        return connection

    def _do(self, action: Callable[[sqlite3.Connection], T]) -> T | None:
        """The result of an action; None from a store that cannot be used."""
        for _ in range(_TRIES if self._usable else 0):
            try:
                self._connection = self._connection or self._open()
                return action(self._connection)
            except (sqlite3.Error, OSError) as error:
                reason = error
                self.__exit__()
                if (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF not in _BROKEN:
                    break
                self._number += 1
        if self._usable:
            self._usable = False
            warnings.warn(f"The store in {self.folder} is not used ({reason}): all is computed anew.", stacklevel=3)
        return None


def open_store() -> Store:
    """This machine's store: the folder ``pairs`` of the cache (``hub.cache_dir``). It may be deleted at any time."""
    return Store(cache_dir() / "pairs")


def remembered(
    store: Store | None,
    keys: Sequence[bytes],
    like: Sequence[Like],
    make: Callable[[list[int]], Iterable[Entry]],
    dense: bool = True,
) -> list[Entry]:
    """The entry of each key: from the store, if it is ``like`` what it must be, else made and kept.

    ``make`` is called once, with the places to make.
    """
    held: list[Entry | None] = [*store.get(keys, like)] if store else [None] * len(keys)
    if absent := [place for place, entry in enumerate(held) if entry is None]:
        made = dict(zip(absent, make(absent), strict=True))
        if store:
            store.put({keys[place]: entry for place, entry in made.items()}, dense)
        held = [entry or made[place] for place, entry in enumerate(held)]
    return [entry for entry in held if entry is not None]
