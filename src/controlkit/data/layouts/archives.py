"""WebDataset's tar shards.

Listed here and not by the webdataset library, which reads shards from end to end: rows must be counted, sized and
read in any order, so members are read where they lie, without a dependency. Nor by ``tarfile``: a shard may come from
anybody, and its headers are taken here only as the standard has them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from controlkit.data.layouts.rows import (
    HINT_NAMES,
    HINT_SUFFIXES,
    MOST_TEXT,
    Held,
    Names,
    Problem,
    Row,
    one_of,
    open_regular,
    read_regular,
    wording,
)
from controlkit.data.layouts.tree import HIDDEN, NO_FILE, Tree
from controlkit.errors import UserError, one_line
from controlkit.files import decode_text, is_leftover, parse_json

_BLOCK = 512
"""Bytes of a header, and what members are filled up to a multiple of."""
_MOST_HEADER = 1 << 20
"""Bytes of a long name, or of a pax record."""
_FILES, _FOLDER, _WITHOUT_CONTENT = b"\x0007", b"5", b"123456"
"""Types of members: files; folders; those that nothing follows, whatever their size says (links, devices, folders)."""


def webdataset(tree: Tree, problems: list[Problem], names: Names) -> list[Row] | None:
    """Tar shards: ``KEY.jpg``, ``KEY.txt``, ``KEY.conditioning_image.png``, ``KEY.json``."""
    shards = tree.under(tree.root, [".tar"])
    if not shards:
        return None
    rows = []
    for shard in shards:
        samples: dict[str, dict[str, Held]] = {}
        try:
            with open_regular(shard) as file:
                for member in _members(file):
                    if any(map(is_leftover, PurePosixPath(member.name).parts)):
                        tree.leave_out(HIDDEN, shard / member.name)
                    elif member.kind in _FILES:
                        where, _, name = member.name.rpartition("/")
                        stem, _, part = name.partition(".")
                        read = partial(read_regular, shard, offset=member.offset, size=member.size)
                        key = f"{where}/{stem}" if where else stem
                        samples.setdefault(key, {})[part.lower()] = Held(f"{shard}:{member.name}", read)
                    elif member.kind != _FOLDER:
                        tree.leave_out(NO_FILE, shard / member.name)
        except (OSError, ValueError) as error:
            words = f"is no whole tar file, uncompressed ({one_line(error)})"
            problems.append(Problem("unreadable file", str(shard), words))
        for key, parts in samples.items():
            row = _sample(f"{shard}:{key}", parts, problems, names)
            if row:
                rows.append(row)
    return rows


def _sample(where: str, parts: Mapping[str, Held], problems: list[Problem], names: Names) -> Row | None:
    """A row of the members of one key; a member's part is what follows the first dot of its name."""
    pictures = {part: held for part, held in parts.items() if f".{part.rpartition('.')[2]}" in HINT_SUFFIXES}
    by_name = {part.split(".")[0]: held for part, held in pictures.items()}
    hints = [by_name[name] for name in names.hints(list(by_name))]
    # Of several names for a hint the likeliest counts; none of them is the picture, and no array is.
    own = [held for part, held in pictures.items() if not part.startswith(HINT_NAMES) and not part.endswith(".npy")]
    if len(own) != 1:
        problems.append(Problem("missing file", where, f"has {len(own)} pictures; expected one, such as KEY.jpg"))
        return None
    facts: Any = None
    prompt: str | None = None
    try:
        text = next((held for part, held in parts.items() if part in ("txt", "text", "caption")), None)
        prompt = decode_text(text.read(most=MOST_TEXT), text.name).strip() if text else None
        if "json" in parts:
            facts = parse_json(parts["json"].read(most=MOST_TEXT), parts["json"].name, finite=False, halves=True)
    except (UserError, OSError) as error:
        problems.append(Problem("unreadable caption", where, one_line(error)))
    if prompt is None:
        prompt = wording(one_of(facts, names.caption) if isinstance(facts, dict) else None, 0)
    return Row(own[0], prompt, tuple(hints))


@dataclass(frozen=True)
class _Member:
    """A member of a tar: its name, its type, and where its content lies in the file."""

    name: str
    kind: bytes
    offset: int
    size: int


def _members(file: BinaryIO) -> Iterator[_Member]:
    """The members of a tar (ustar, pax or GNU), up to its two empty blocks or the file's end.

    Nothing is read but headers, and every header moves on in the file. ``ValueError`` for one that is not as the
    standard has it, for content that is not all there, and for sparse members, whose content is not the file's.
    """
    total, at = file.seek(0, 2), 0
    said: dict[str, str] = {}  # what headers before a member say of it
    while at < total or not at:
        file.seek(at)
        head = file.read(_BLOCK)
        if at and not head.strip(b"\0"):
            return
        kind, offset = head[156:157], at + _BLOCK
        if len(head) < _BLOCK or _number(head[148:156]) != sum(head[:148]) + sum(head[156:]) + 8 * ord(" "):
            raise ValueError(f"there is no header at byte {at:,}")
        extends, size = kind in b"xXgLK", _number(head[124:136])
        if not extends and "size" in said:
            size = int(said["size"])
        size = 0 if kind in _WITHOUT_CONTENT else size
        if size > total - offset:
            raise ValueError(f"the member at byte {at:,} is cut off")
        at = offset + -(-size // _BLOCK) * _BLOCK
        if extends:
            said = _further(kind, size, file) | said  # the first says most
            continue
        if kind == b"S" or any(key.startswith("GNU.sparse.") for key in said):
            raise ValueError("it has a sparse member, whose content is not the file's: pack it without --sparse")
        name = said.get("path") or _name(head)
        if "\0" in name:
            raise ValueError(f"the name of the member at byte {offset - _BLOCK:,} has a zero byte")
        if kind in _FILES and name.endswith("/"):  # as tars were before 1988
            kind = _FOLDER
        yield _Member(name.rstrip("/") if kind == _FOLDER else name, kind, offset, size)
        said = {}


def _further(kind: bytes, size: int, file: BinaryIO) -> dict[str, str]:
    """The facts in a header that stands before a member's own: of a pax record, or GNU's long name."""
    if size > _MOST_HEADER:
        raise ValueError(f"a header has {size:,} bytes: more than {_MOST_HEADER:,}")
    data = file.read(size)
    if kind in b"LK":
        return {"path": _text(data)} if kind == b"L" else {}
    said, at = {}, 0
    while at < size:
        space = data.find(b" ", at, at + 10)
        length = data[at : max(space, at)]
        end = at + int(length) if length.isdigit() else 0
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not space < end <= size or not equals or data[end - 1 : end] != b"\n":
            raise ValueError("a pax header is damaged")
        said[_text(key)] = value.decode("utf-8", "surrogateescape")
        at = end
    if not said.get("size", "0").isdecimal():
        raise ValueError(f"a pax header has {said['size']!r} as a size")
    if kind == b"g" and said.keys() & {"path", "size"}:
        raise ValueError("a pax header gives all members one name or size")
    return {} if kind == b"g" else said


def _number(field: bytes) -> int:
    """A header's number: octal digits, or bits after a first one that says so; ``ValueError`` for a negative one."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        raise ValueError(f"a header has {field!r} as a number")
    return int(digits or b"0", 8)


def _name(head: bytes) -> str:
    """The name in a member's header; those of ustar may go on in a second field."""
    prefix = _text(head[345:500]) if head[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(head[:100])}" if prefix else _text(head[:100])


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")
