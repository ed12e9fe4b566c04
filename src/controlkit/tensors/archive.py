"""Torch's zip archives, mapped and read strictly: one directory, whose entries are stored, and fill the file in order.

Readers of zip archives differ in which directory they take, in what may lie before, between and behind the entries, and
in whether they believe an entry's own header. Here an archive has only one reading, or it is refused.
"""

import mmap
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_LONGEST_DIRECTORY = 2**23  # bytes; a training checkpoint's has some 2**20
_END, _END64, _LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_ENTRY, _LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
_ZIP64, _LATER, _UTF8 = 1, 1 << 3, 1 << 11  # an extra field's kind; flags: sizes follow the data, names in UTF-8
_WORD, _SHORT = 2**32 - 1, 2**16 - 1  # such a size is said elsewhere, in 64 bits


@dataclass(frozen=True)
class _Entry:
    start: int
    size: int
    checksum: int


@dataclass(frozen=True)
class Archive:
    """An archive, mapped: a view of this process alone, so nothing that is done to its tensors reaches the file."""

    mapped: mmap.mmap
    entries: Mapping[str, _Entry]

    def read(self, name: str) -> bytes:
        """A copy of an entry's bytes; ``ValueError`` if its checksum is another."""
        entry = self.entries[name]
        data = self.mapped[entry.start : entry.start + entry.size]
        if zlib.crc32(data) != entry.checksum:
            raise ValueError(f"{name} has another checksum than the archive says")
        return data

    def numbers(self, name: str, count: int, dtype: torch.dtype, swapped: bool) -> Tensor:
        """The first numbers (count,) of an entry, mapped; copied where they are ``swapped``: of the other byte order.

        ``ValueError`` if it does not hold as many.
        """
        entry, size = self.entries.get(name), count * dtype.itemsize
        if entry is None or not 0 <= size <= entry.size:
            raise ValueError(f"it holds no {count} numbers in {name}")
        if not size:
            return torch.empty(0, dtype=dtype)
        if not swapped and entry.start % dtype.itemsize == 0:
            return torch.frombuffer(self.mapped, dtype=dtype, count=count, offset=entry.start)
        data = torch.frombuffer(self.mapped, dtype=torch.uint8, count=size, offset=entry.start)
        return (data.view(-1, dtype.itemsize).flip(1) if swapped else data.clone()).flatten().view(dtype)


def open_archive(path: Path) -> Archive:
    """Map a zip archive.

    Raises ``ValueError`` unless each of its bytes has one meaning; ``OSError`` as reading does.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        return Archive(mapped, _entries(mapped))
    except struct.error as error:
        raise ValueError("the archive is cut") from error


def _entries(data: mmap.mmap) -> dict[str, _Entry]:
    """The entries by name: the directory from its first to its last, while the file is followed from its beginning."""
    count, at, end = _directory(data)
    found: dict[str, _Entry] = {}
    place, stop = 0, at
    for _ in range(count):
        (signature, _, _, flags, method, _, _, checksum, packed, size, *lengths, disk, _, _, start) = (
            _ENTRY.unpack_from(data, at)
        )
        at += _ENTRY.size
        name, extra, comment = (data[at + sum(lengths[:i]) : at + sum(lengths[: i + 1])] for i in range(3))
        at += sum(lengths)
        size, packed, start = _sizes64(extra, size, packed, start)
        if method or packed != size:
            raise ValueError("its parts are compressed, which torch never does")
        if (signature, disk, comment, flags & ~(_LATER | _UTF8), start) != (b"PK\1\2", 0, b"", 0, place) or at > end:
            raise ValueError("its parts do not lie side by side, as torch writes them")
        begins = _begin(data, place, name, flags, (checksum, size))
        place = begins + size + _descriptor(data, begins + size, flags, (checksum, size))
        if place > stop or (text := name.decode("utf-8" if flags & _UTF8 else "ascii")) in found:
            raise ValueError("its parts overlap, or two have one name")
        found[text] = _Entry(begins, size, checksum)
    if (at, place) != (end, stop):
        raise ValueError("it holds more than its directory names")
    return found


def _directory(data: mmap.mmap) -> tuple[int, int, int]:
    """(how many entries, where the directory begins, where it ends), by the record at the very end of the file."""
    at = len(data) - _END.size
    signature, disk, disk_too, here, count, size, start, comment = _END.unpack_from(data, max(at, 0))
    if signature != b"PK\5\6" or comment or disk != disk_too or disk not in (0, _SHORT):
        raise ValueError("no directory of an archive is at its end")
    locator = at - _LOCATOR.size
    if locator >= _END64.size and data[locator : locator + 4] == b"PK\6\7":  # torch always writes it
        short = (here, count, size, start)
        _, disk, at, disks = _LOCATOR.unpack_from(data, locator)
        if at + _END64.size != locator:
            raise ValueError("its two records of where its directory is do not lie one after the other")
        signature, length, _, _, disk_too, disk_three, here, count, size, start = _END64.unpack_from(data, at)
        agrees = short == (min(here, _SHORT), min(count, _SHORT), min(size, _WORD), min(start, _WORD))
        whole = signature == b"PK\6\6" and length == _END64.size - 12
        if not (agrees and whole) or (disk, disk_too, disk_three, disks) != (0, 0, 0, 1):
            raise ValueError("its two records of where its directory is differ")
    if here != count or size > _LONGEST_DIRECTORY or start + size != at:
        raise ValueError("its directory does not end where it is said to")
    return count, start, at


def _sizes64(extra: bytes, *sizes: int) -> list[int]:
    """The sizes of an entry's header, those beyond 32 bits from its extra field, which is the first."""
    if _WORD not in sizes:
        return list(sizes)
    kind, length = struct.unpack_from("<2H", extra)
    long = iter(struct.unpack_from(f"<{sizes.count(_WORD)}Q", extra[4 : 4 + length] if kind == _ZIP64 else b""))
    return [next(long) if size == _WORD else size for size in sizes]


def _begin(data: mmap.mmap, at: int, name: bytes, flags: int, told: tuple[int, int]) -> int:
    """Where an entry's data begin, after its own header; ``ValueError`` if that says something else."""
    signature, _, *own, _, _, checksum, packed, size, length, more = _LOCAL.unpack_from(data, at)
    at += _LOCAL.size + length
    if (signature, own, data[at - length : at]) != (b"PK\3\4", [flags, 0], name):
        raise ValueError("a part has another header than the directory says")
    later = flags & _LATER and not (checksum or packed or size)
    if not later:
        size, packed = _sizes64(data[at : at + more], size, packed)
    if not later and (checksum, size, packed) != (*told, told[1]):
        raise ValueError("a part has other sizes than the directory says")
    return at + more


def _descriptor(data: mmap.mmap, at: int, flags: int, told: tuple[int, int]) -> int:
    """The length of the record behind an entry's data, which repeats its sizes where its header came before them."""
    checksum, size = told
    if not flags & _LATER:
        return 0
    for form in ("<4s3L", "<4sL2Q"):
        if size <= _WORD or "Q" in form:
            record = struct.pack(form, b"PK\7\10", checksum, size, size)
            if data[at : at + len(record)] == record:
                return len(record)
    raise ValueError("a part has other sizes than the directory says")
