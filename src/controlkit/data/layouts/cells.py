"""Cells of tables: parquet files, and the arrow files that the datasets library saves.

Read by pyarrow, and only after a look at what a file says of its sizes. A thousand bytes of parquet can stand for
gigabytes: pages that are next to nothing when compressed, values that are written once and counted a million times. So
pages are measured first, and cells are decoded a few at a time. Nothing is written: there is no copy in a cache.
"""

import struct
import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from controlkit.data.layouts.rows import MOST_BYTES, MOST_COLUMNS, MOST_TEXT, open_regular
from controlkit.errors import Invalid, UserError, one_line

_DESCRIPTION = 1 << 24
"""Bytes that a parquet file's description of itself may have."""
_PAGE = 1 << 26
"""Bytes that any page may stand for, and that are decoded at once where one value is not more."""
_TIMES, _LARGEST = 64, 1 << 29
"""How many times as large as it is in the file a larger page may be, and how large."""
_OVER = 1 << 27
"""Bytes that all of a file's pages together may be larger than that."""
_HELD = 1 << 28
"""Bytes of decoded cells that are kept for the next question."""
_ENCODINGS = (0, 2, 3, 8)
"""Parquet's encodings that are read: plain, by a dictionary, of truths. In others a value may be the one before."""
_BYTES = 6
"""Parquet's type of texts and bytes."""


class Table:
    """The rows of several files of one kind; files are opened when they are needed, in each process anew."""

    def __init__(self, paths: Sequence[Path], name: str) -> None:
        """``name``: of the table in errors. ``Invalid`` for files that are damaged or stand for too much."""
        kind = _Parquet if paths[0].suffix.lower() == ".parquet" else _Arrow
        self._name, self._files = name, [kind(path) for path in paths]
        try:
            self._firsts = [0, *accumulate(file.rows for file in self._files)]
            names = [file.schema.names for file in self._files]  # of each: a name may be no text
            self.names = names[0]
            if len(self.names) > MOST_COLUMNS:
                raise ValueError(f"it has {len(self.names):,} columns: more than {MOST_COLUMNS:,}")
        except Exception as error:  # what pyarrow raises for a damaged file is of many kinds
            raise self._damaged(error) from error

    def __len__(self) -> int:
        return self._firsts[-1]

    def check(self, column: str) -> str:
        """The kind of a column: ``texts``, ``pictures`` (bytes or paths) or ``paths``; else what type it is of."""
        try:
            fields = [field for file in self._files for field in file.schema if field.name == column]
            kinds = {_kind(field.type) for field in fields}
        except Exception as error:
            raise self._damaged(error) from error
        if len(fields) != len(self._files) or len(kinds) > 1:
            raise Invalid(f"{self._name} has other columns {column} in other files: expected one, of one type.")
        return kinds.pop()

    def texts(self, column: str) -> Iterator[Any]:
        """A column's values: texts, lists of them, numbers; equal texts are one object."""
        same: dict[str, str] = {}
        return self._whole(
            value for file in self._files for array in file.arrays(column) for value in _texts(array, same)
        )

    def pictures(self, column: str) -> Iterator[str | bool | None]:
        """Each row of a column of pictures: a path, True for bytes, None for nothing."""
        return self._whole(value for file in self._files for value in file.pictures(column))

    def _whole(self, values: Iterator[Any]) -> Iterator[Any]:
        """As many values as there are rows."""
        try:
            for _ in range(len(self)):
                yield next(values)
        except StopIteration:
            raise self._damaged(ValueError("it has fewer rows than it says")) from None
        except Exception as error:
            raise self._damaged(error) from error

    def read(self, place: int, column: str, columns: tuple[str, ...], most: int = MOST_BYTES) -> bytes:
        """The bytes in a cell; none of an empty one. ``columns``: all that will be asked for of a row.

        ``OSError`` where they cannot be read, or are more than ``most``.
        """
        file = bisect_right(self._firsts, place) - 1
        try:
            batch, row = self._files[file].at(place - self._firsts[file], columns)
            cell = batch.column(batch.schema.get_field_index(column))[row]
            cell = cell["bytes"] if hasattr(cell, "items") else cell
            held = cell.as_buffer() if cell.is_valid else b""
        except Exception as error:
            raise OSError(f"it is damaged: {one_line(error)}") from error
        if len(held) > most:
            raise OSError(f"it has {len(held):,} bytes: more than {most:,}")
        return bytes(held)

    def _damaged(self, error: Exception) -> Exception:
        if isinstance(error, UserError):
            return error
        return Invalid(f"{self._name} cannot be read as a data set ({one_line(error)}): fetch or write it anew.")


def _kind(kind: Any) -> str:
    """The kind of a column of this type, as ``Table.check`` says it."""
    from pyarrow import types

    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return "pictures"
    if types.is_struct(kind):
        parts = {field.name: _kind(field.type) for field in kind}
        whole = parts.get("bytes") == "pictures" and parts.get("path") in ("paths", "null")
        return "pictures" if whole else str(kind)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "paths"
    if types.is_dictionary(kind) or types.is_list(kind) or types.is_large_list(kind):
        return "texts" if _kind(kind.value_type) == "paths" else str(kind)
    return "texts" if types.is_primitive(kind) else str(kind)


def _texts(array: Any, same: dict[str, str]) -> Iterator[Any]:
    """The values of an array of texts, lists of texts, or numbers."""
    from pyarrow import compute, types

    lists, counted = types.is_list(array.type) or types.is_large_list(array.type), False
    values = array.values if lists else array
    if counted := types.is_dictionary(values.type):
        places, values = values.indices.to_pylist(), values.dictionary
    if (
        _kind(values.type) == "paths"
        and (longest := compute.max(compute.binary_length(values)).as_py() or 0) > MOST_TEXT
    ):
        raise ValueError(f"a caption has {longest:,} bytes: more than {MOST_TEXT:,}")
    known: dict[int | None, Any] = {None: None}

    def text(place: int) -> Any:
        number = places[place] if counted else place
        if number not in known:
            value = values[number].as_py()
            known[number] = same.setdefault(value, value) if isinstance(value, str) else value
        return known[number]

    if not lists:
        yield from map(text, range(len(array)))
        return
    ends = array.offsets.to_pylist()
    for first, end, null in zip(ends, ends[1:], array.is_null().to_pylist(), strict=False):
        yield None if null else [text(place) for place in range(first, end)]


def _contents(nulls: Sequence[bool], bare: Sequence[bool], paths: Sequence[str | None]) -> Iterator[str | bool | None]:
    """Cells as ``pictures`` gives them, of which these are null, these without bytes, and with these paths."""
    for null, without, path in zip(nulls, bare, paths, strict=True):
        yield None if null else path if without and path else True


class _Arrow:
    """A file of arrow's stream format, mapped into memory and never decompressed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return type(self), (self.path,)

    @cached_property
    def _batches(self) -> tuple[Any, list[Any]]:
        import pyarrow
        from pyarrow import ipc

        open_regular(self.path).close()
        source = pyarrow.memory_map(str(self.path))
        size, schema, batches = source.size(), None, []
        for message in ipc.MessageReader.open_stream(source):
            if message.type == "schema" and schema is None:
                schema = ipc.read_schema(message)
            elif message.type == "record batch" and schema is not None:
                if _is_compressed(message.metadata.to_pybytes()):
                    raise ValueError("it is compressed, as the datasets library writes none")
                batch = ipc.read_record_batch(message, schema)
                size -= 4 * batch.num_rows
                if size < 0:
                    raise ValueError("it says that it has more rows than a quarter of its bytes")
                batches.append(batch)
            else:
                raise ValueError(f"it has a {message.type} where rows were expected")
        if schema is None or "_view" in str(schema):  # in views, many values may be one piece of the file
            raise ValueError("it has no schema of values that lie one behind the other")
        return schema, batches

    @property
    def schema(self) -> Any:
        return self._batches[0]

    @property
    def rows(self) -> int:
        return sum(batch.num_rows for batch in self._batches[1])

    def arrays(self, column: str) -> Iterator[Any]:
        """A column, in parts; what it says of itself is held against what is there."""
        for batch in self._batches[1]:
            array = batch.column(self.schema.get_field_index(column))
            array.validate(full=True)
            yield array

    def pictures(self, column: str) -> Iterator[str | bool | None]:
        for array in self.arrays(column):
            if _kind(array.type) == "paths":
                yield from array.to_pylist()
            else:
                nulls = array.is_null().to_pylist()
                parts = [array.field(name) for name in ("bytes", "path")] if hasattr(array, "field") else None
                bare = parts[0].is_null().to_pylist() if parts else nulls
                yield from _contents(nulls, bare, parts[1].to_pylist() if parts else [None] * len(array))

    def at(self, row: int, columns: Sequence[str]) -> tuple[Any, int]:
        """The part of the file that a row lies in, and its place there."""
        firsts = self._firsts
        part = bisect_right(firsts, row) - 1
        return self._batches[1][part], row - firsts[part]

    @cached_property
    def _firsts(self) -> list[int]:
        return [0, *accumulate(batch.num_rows for batch in self._batches[1])]


def _is_compressed(message: bytes) -> bool:
    """Whether a batch's message says that its buffers are compressed (flatbuffers: Message.header.compression)."""

    def field(table: int, number: int) -> int:
        names = table - struct.unpack_from("<i", message, table)[0]
        [size] = struct.unpack_from("<H", message, names)
        place = struct.unpack_from("<H", message, names + 4 + 2 * number)[0] if 4 + 2 * number < size else 0
        return table + place if place else 0

    header = field(struct.unpack_from("<I", message, 0)[0], 2)
    return bool(field(header + struct.unpack_from("<I", message, header)[0], 3))


@dataclass(frozen=True)
class _Chunk:
    """The pages of a leaf of a column in a row group: where they lie, and what they say of themselves."""

    leaf: str
    kind: int
    values: int
    start: int
    length: int
    nulls: int | None


class _Parquet:
    """A parquet file: row groups, and in each a chunk of pages for every leaf of a column.

    Its description is read here, as pyarrow ends the process at some that are damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._over = _OVER
        self._measures: dict[tuple[int, str], tuple[int, int]] = {}
        self._at_once: dict[tuple[int, Sequence[str]], int] = {}
        self._kept: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._size = 0
        self._reading: tuple[int, int, Iterator[Any]] = (-1, 0, iter(()))

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return type(self), (self.path,)

    @cached_property
    def _file(self) -> BinaryIO:
        file = open_regular(self.path)
        weakref.finalize(self, file.close)
        return file

    @cached_property
    def _groups(self) -> list[tuple[int, dict[str, _Chunk]]]:
        """Of each row group, how many rows it has, and its chunks by the names of their leaves."""
        size = self._file.seek(0, 2)
        self._file.seek(max(size - 8, 0))
        end = self._file.read(8)
        length = int.from_bytes(end[:4], "little")
        if end[4:] != b"PAR1" or length > min(size - 8, _DESCRIPTION):
            raise ValueError(f"it does not end as a parquet file whose description has at most {_DESCRIPTION:,} bytes")
        self._file.seek(size - 8 - length)
        facts, _ = _thrift(self._file.read(length) + b"\0")
        groups = [(group[3], [_chunk(column[3]) for column in group[1]]) for group in facts[4]]
        counts = [rows for rows, _ in groups]
        if sum(counts) != facts[3] or 4 * facts[3] > size or min(counts, default=0) < 0:
            raise ValueError(f"it says that it has {facts[3]:,} rows, in {size:,} bytes")
        if sum(chunk.length for _, chunks in groups for chunk in chunks) > size:
            raise ValueError("its columns are larger than the file")
        if len(facts[2]) > 10 * MOST_COLUMNS:
            raise ValueError(f"it has {len(facts[2]):,} columns, and parts of some: more than {10 * MOST_COLUMNS:,}")
        return [(rows, {chunk.leaf: chunk for chunk in chunks}) for rows, chunks in groups]

    def _opened(self, **how: Any) -> Any:
        from pyarrow import parquet

        limits = {"thrift_string_size_limit": _DESCRIPTION, "thrift_container_size_limit": 1 << 20}
        return parquet.ParquetFile(self._file, buffer_size=1 << 20, pre_buffer=False, **limits, **how)

    @cached_property
    def _reader(self) -> Any:
        return self._opened() if self._groups is not None else None

    @cached_property
    def _counting(self) -> Any:
        """A reader that gives texts and bytes by their places in a dictionary: nothing is written out many times."""
        texts = {chunk.leaf for _, chunks in self._groups for chunk in chunks.values() if chunk.kind == _BYTES}
        return self._opened(read_dictionary=sorted(texts))

    @property
    def schema(self) -> Any:
        return self._reader.schema_arrow

    @cached_property
    def rows(self) -> int:
        return sum(rows for rows, _ in self._groups)

    def arrays(self, column: str) -> Iterator[Any]:
        """A column, in parts."""
        for group in range(len(self._groups)):
            yield from self._group(group, column)

    def _group(self, group: int, column: str) -> Iterator[Any]:
        """A column of a row group, in parts of about ``_PAGE`` bytes."""
        total = sum(size for size, _ in self._pages(group, [column]))
        rows, _ = self._groups[group]
        at_once = min(max(rows * _PAGE // max(total, _PAGE), 1), 1 << 16)
        for batch in self._counting.iter_batches(at_once, [group], [column], use_threads=False):
            yield batch.column(0)

    def pictures(self, column: str) -> Iterator[str | bool | None]:
        kind = self.schema.field(column).type
        if _kind(kind) == "paths":
            for array in self.arrays(column):
                yield from _texts(array, {})
            return
        leaf = f"{column}.bytes" if kind.num_fields else column
        for group, (rows, chunks) in enumerate(self._groups):
            nulls: list[bool] = []
            paths: list[str | None] = []
            if kind.num_fields:
                for array in self._group(group, f"{column}.path"):
                    nulls += array.is_null().to_pylist()
                    paths += _texts(array.field(0), {})
            said = chunks[leaf].nulls
            if said == sum(nulls):  # of what has a cell at all, all have bytes
                bare = nulls or [False] * rows
            elif said == rows:
                bare = [True] * rows
            else:
                bare = []
                for array in self._group(group, leaf):
                    bare += (array.field(0) if kind.num_fields else array).is_null().to_pylist()
            yield from _contents(nulls or bare, bare, paths or [None] * rows)

    def at(self, row: int, columns: tuple[str, ...]) -> tuple[Any, int]:
        """Some rows of these columns with this one among them, and its place there."""
        group = bisect_right(self._firsts, row) - 1
        row -= self._firsts[group]
        if (group, columns) not in self._at_once:
            largest = max(largest for _, largest in self._pages(group, columns))
            self._at_once[group, columns] = min(max(_PAGE // largest, 1), 64)
        at_once = self._at_once[group, columns]
        first = row // at_once * at_once
        if (group, first) not in self._kept:
            reading, next_row, batches = self._reading
            if reading != group or next_row > first:
                next_row, batches = 0, self._reader.iter_batches(at_once, [group], list(columns), use_threads=False)
            for batch in batches:
                self._keep(group, next_row, batch)
                next_row += at_once
                if next_row > first:
                    break
            self._reading = group, next_row, batches
        self._kept.move_to_end((group, first))
        return self._kept[group, first], row - first

    def _keep(self, group: int, first: int, batch: Any) -> None:
        """Keep a part, and let go of those that were not asked for since long."""
        if (group, first) in self._kept:
            self._size -= self._kept.pop((group, first)).nbytes
        self._kept[group, first] = batch
        self._size += batch.nbytes
        while self._size > _HELD and len(self._kept) > 1:
            self._size -= self._kept.popitem(last=False)[1].nbytes

    @cached_property
    def _firsts(self) -> list[int]:
        return [0, *accumulate(rows for rows, _ in self._groups)]

    def _pages(self, group: int, columns: Sequence[str]) -> list[tuple[int, int]]:
        """(bytes that all pages stand for, bytes of the largest) of each chunk of these columns, or leaves of columns.

        ``ValueError`` for pages that stand for too much, or are written in a way in which values can.
        """
        within = tuple(f"{column}." for column in columns)
        chunks = [chunk for leaf, chunk in self._groups[group][1].items() if f"{leaf}.".startswith(within)]
        for chunk in chunks:
            if (group, chunk.leaf) not in self._measures:
                self._measures[group, chunk.leaf] = self._measured(chunk)
        return [self._measures[group, chunk.leaf] for chunk in chunks]

    def _measured(self, chunk: _Chunk) -> tuple[int, int]:
        at, end, total, largest, values = chunk.start, chunk.start + chunk.length, 0, 1, 0
        while at < end and values < chunk.values:
            page, length = self._page_at(at)
            size, stored = page.get(2, -1), page.get(3, -1)
            if page.get(1) in (0, 3):  # pages of data, of the first and the second version
                head = page[5 if page[1] == 0 else 8]
                values += head[1]
                if head[2 if page[1] == 0 else 4] not in _ENCODINGS:
                    raise ValueError("its pages are encoded in a way that is not read: write plain or dictionary pages")
            at += length + stored
            if size < 0 or stored < 0 or at > end:
                raise ValueError("a page is cut off")
            self._over -= max(size - _TIMES * stored, 0)
            if size > min(max(_PAGE, _TIMES * stored), _LARGEST) or self._over < 0:
                raise ValueError(f"a page of {stored:,} bytes stands for {size:,}")
            total, largest = total + size, max(largest, size)
        return total, largest

    def _page_at(self, at: int) -> tuple[dict[int, Any], int]:
        """The header of a page, by the numbers of its fields, and how long it is."""
        for room in (1 << 10, 1 << 20):
            self._file.seek(at)
            try:
                return _thrift(self._file.read(room))
            except IndexError:
                continue
        raise ValueError("a page has no header")


def _chunk(facts: dict[int, Any]) -> _Chunk:
    """A chunk as a file's description has it (parquet's ColumnMetaData)."""
    start = min(facts[9], facts.get(11) or facts[9])
    if min(start, facts[5], facts[7]) < 0:
        raise ValueError("a column lies nowhere")
    leaf = ".".join(part.decode() for part in facts[3])
    return _Chunk(leaf, facts[1], facts[5], start, facts[7], facts.get(12, {}).get(3))


def _thrift(data: bytes, at: int = 0, depth: int = 8) -> tuple[dict[int, Any], int]:
    """A struct of Thrift's compact protocol, by the numbers of its fields, and where it ends.

    ``IndexError`` where the data end before it, ``ValueError`` for what parquet has not.
    """

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            value |= (data[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 128:
                return value
            if shift > 63:
                raise ValueError("a number has no end")

    def value_of(kind: int) -> Any:
        nonlocal at
        if kind in (4, 5, 6):
            value = number()
            return value >> 1 ^ -(value & 1)
        if kind == 8:
            length = number()
            at += length
            return data[at - length : at]
        if kind == 9:
            head = data[at]
            at += 1
            count = head >> 4 if head >> 4 < 15 else number()
            if count > len(data) - at:
                raise IndexError("a list has no end")
            return [value_of(head & 15) for _ in range(count)]
        if kind == 12 and depth:
            found, at = _thrift(data, at, depth - 1)
            return found
        if kind not in (1, 2, 3, 7):
            raise ValueError("its description is damaged")
        at += {3: 1, 7: 8}.get(kind, 0)
        return None

    fields: dict[int, Any] = {}
    name = 0
    while kind := data[at]:
        at += 1
        name = name + (kind >> 4) if kind >> 4 else number() >> 1
        fields[name] = value_of(kind & 15)
    return fields, at + 1
