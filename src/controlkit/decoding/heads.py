"""Heads of picture files: their sizes, read before anything decodes them, and the file without what no pixel needs.

Formats are known by their first bytes, never by a name. Decoders are given the bytes that were looked at here, without
the parts that carry no pixels: those hold most of what files can make decoders do (directories of tags, texts that
inflate, further frames).
"""

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from controlkit.decoding.boxes import avif, codestream
from controlkit.decoding.limits import MOST_PARTS, Refused, check_size, pieces

EXIF_MARK, XMP_MARK = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"


@dataclass(frozen=True)
class Head:
    """The head of a picture's file, whose size was found within the limits."""

    format: str
    """By Pillow's name."""
    data: bytes
    """The file, without what carries no pixels."""
    exif: bytes = b""
    xmp: bytes = b""
    turn: int = 0
    """The camera's rotation, EXIF's 1 to 8; 0 where ``exif``, ``xmp`` or the decoder know it."""


def head_of(data: bytes) -> Head:
    """The head of a picture's file; ``Refused`` for any other file, and for what no decoder is given."""
    known = (read for mark, read in _READERS.items() if re.match(mark, data, re.DOTALL))
    if (read := next(known, None)) is None:
        raise Refused("of no known format")
    try:
        return read(data)
    except (struct.error, IndexError, KeyError, OverflowError):  # KeyError: of a box that is not there
        raise Refused("it ends too early") from None


def orientation(exif: bytes, xmp: bytes = b"") -> int:
    """The camera's rotation, 1 to 8, as EXIF or else XMP has it; any other number where neither has."""
    while exif.startswith(EXIF_MARK):
        exif = exif[len(EXIF_MARK) :]
    if (order := {b"II": "<", b"MM": ">"}.get(exif[:2])) and len(exif) >= 8:
        (at,) = struct.unpack_from(f"{order}I", exif, 4)
        for entry in range(at + 2, min(len(exif) - 11, at + 2 + 12 * 65535), 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, entry)
            if tag == 274 and kind in (3, 4):
                return int(struct.unpack_from(f"{order}{'HI'[kind - 3]}", exif, entry + 8)[0])
    found = re.search(rb'tiff:Orientation(="|>)([0-9])', xmp)
    return int(found[2]) if found else 1


# --- PNG, JPEG, GIF, BMP, WebP ------------------------------------------------------------------------------

_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
_PNG_TEXTS = (
    b"parameters",
    b"controlkit",
    b"Raw profile type exif",
    b"XML:com.adobe.xmp",
)  # ours; rotation


def _png(data: bytes) -> Head:
    """Keep the pixels, EXIF, and the first text of each name that is read here, in front of the pixels."""
    check_size("PNG", *struct.unpack_from(">II", data, 16))
    kept: dict[bytes, memoryview] = {}
    chunks: list[bytes | memoryview] = []
    whole, at = memoryview(data), 8
    for _ in pieces():
        if at + 8 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, at)
        start, at = at, at + 12 + length
        if kind in _PNG_PIXELS and length:
            chunks.append(whole[start:at])
        elif kind == b"IEND":
            break
        elif kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            name = kind if kind == b"eXIf" else data[start + 8 : start + 88].partition(b"\0")[0]
            if name in (b"eXIf", *_PNG_TEXTS):
                kept.setdefault(name, whole[start:at])
    end = b"\0\0\0\0IEND\xaeB`\x82" if at <= len(data) else b""
    return Head("PNG", b"".join([data[:8], *chunks[:1], *kept.values(), *chunks[1:], end]))


_MARKER = re.compile(rb"\xff([\x01-\xfe])")
_MOST_SCANS = 50  # progressive files have about ten; each is a pass over the whole picture


def _jpeg(data: bytes) -> Head:
    """Keep the segments that decoding needs; EXIF and XMP apart."""
    kept, at, exif, xmp, size = [b"\xff\xd8"], 2, b"", b"", (0, 0)
    for _ in pieces():
        if not (found := _MARKER.search(data, at)):
            break
        start, marker = found.start(), found[1][0]
        if marker == 0xDA:
            check_size("JPEG", *size)
            if data.count(b"\xff\xda", start) > _MOST_SCANS:
                raise Refused(f"it has more than {_MOST_SCANS} scans")
            return Head("JPEG", b"".join([*kept, memoryview(data)[start:]]), exif, xmp)
        if marker == 0x01 or 0xD0 <= marker <= 0xD9:
            raise Refused("its data is damaged")
        (length,) = struct.unpack_from(">H", data, start + 2)
        at = start + 2 + max(length, 2)
        segment = data[start + 4 : at]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", segment, 1)
            size = (width, height)
        if marker == 0xE1 and segment.startswith(EXIF_MARK) and len(exif) < 1 << 20:
            exif += segment[len(EXIF_MARK) :] if exif else segment
        elif marker == 0xE1 and segment.startswith(XMP_MARK):
            xmp = segment
        if marker in (0xE0, 0xEE) or not (0xE0 <= marker <= 0xEF or marker == 0xFE):  # no other notes of programs
            kept.append(data[start:at])
    raise Refused("it ends too early")


def _gif(data: bytes) -> Head:
    """The screen, and the first frame, for which decoders make it larger."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    check_size("GIF", width, height)
    at = 13 + (3 << (flags & 7) + 1 if flags & 128 else 0)
    note = False
    for _ in pieces():  # until the first frame
        if note:  # in blocks, of which the last has no length
            note, at = data[at] > 0, at + data[at] + 1
        elif data[at] == 0x2C:
            break
        else:
            note, at = data[at] == 0x21, at + 1 + (data[at] == 0x21)
    left, top, wide, high = struct.unpack_from("<HHHH", data, at + 1)
    check_size("GIF", max(width, left + wide), max(height, top + high))
    return Head("GIF", data)


def _bmp(data: bytes) -> Head:
    (length,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if length == 12 else "<ii", data, 18)
    check_size("BMP", width, abs(height))
    return Head("BMP", data)


def _webp(data: bytes) -> Head:
    kind = data[12:16]
    if kind == b"VP8X":
        bits = int.from_bytes(data[24:30], "little")
        width, height = (bits & 0xFFFFFF) + 1, (bits >> 24) + 1
    elif kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    check_size("WEBP", width, height)
    return Head("WEBP", data)


# --- TIFF ---------------------------------------------------------------------------------------------------

_TYPES = {1: "B", 3: "H", 4: "I", 5: "II", 7: "B", 16: "Q"}
_ONE = {256, 257, 259, 262, 266, 274, 277, 278, 284, 322, 323}
"""Tags that have one value: width, height, compression, photometric, fill order, orientation, samples, rows of a strip,
planes, sides of a tile."""
_MANY = {258, 273, 279, 324, 325, 338, 339, 256 + 64, 347, 292, 293, 317, 529, 530, 531, 532}
"""Bits, strips, tiles, extra samples, their format, palette, and what codecs and colours need."""
_MOST_OF_TILE = 1 << 22
"""Pixels of a tile, which may be larger than its picture."""

_CODECS = {1, 2, 3, 4, 5, 7, 8, 32773, 32946, 50000, 50001}
"""Raw, CCITT's, LZW, JPEG, Deflate, PackBits, Zstandard, WebP; without those that nobody writes any more, and LZMA,
which takes what memory a file asks for."""


def _entries(data: bytes, order: str, big: bool) -> Iterator[tuple[int, int, int, bytes]]:
    """The first directory's entries that pixels need: tag, type, count, and the values or where they lie."""
    (at,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
    if count > 4096:
        raise Refused(f"it has {count:,} tags")
    one = order + ("HHQ8s" if big else "HHI4s")
    for entry in range(count):
        tag, kind, values, raw = struct.unpack_from(one, data, at + (8 if big else 2) + entry * struct.calcsize(one))
        if tag in _ONE | _MANY:
            if kind not in _TYPES or not values or (tag in _ONE and values > 1) or values > MOST_PARTS:
                raise Refused(f"its tag {tag} has {values:,} values of type {kind}")
            yield tag, kind, values, raw


def _tiff(data: bytes) -> Head:
    """One directory, in order, with the tags that pixels need, each once; the decoder sees no other."""
    order = "<" if data[:2] == b"II" else ">"
    big = 43 in data[2:4]
    found: dict[int, tuple[int, int, bytes]] = {}
    tags: dict[int, tuple[int, ...]] = {}
    together = 0  # bytes of values that lie outside the directory
    for tag, kind, count, raw in _entries(data, order, big):
        if tag in found:
            continue
        found[tag] = (kind, count, raw)
        code = f"{order}{count * len(_TYPES[kind])}{_TYPES[kind][0]}"
        inline = struct.calcsize(code) <= len(raw)
        offset = 0 if inline else struct.unpack(order + ("Q" if big else "I"), raw)[0]
        tags[tag] = struct.unpack_from(code, raw if inline else data, offset)
        together += 0 if inline else struct.calcsize(code)
    if together > len(data):  # which Pillow warns of, and leaves some out
        raise Refused("its tags lie in one another")
    one = {tag: values[0] for tag, values in tags.items() if tag in _ONE}
    _check_tiff(one, tags)
    turn = one.get(274, 1)
    found.pop(274, None)  # turned here, as pictures of all formats are
    entries = [struct.pack(order + ("HHQ8s" if big else "HHI4s"), tag, *found[tag]) for tag in sorted(found)]
    place = len(data) + len(data) % 2
    directory = struct.pack(order + ("Q" if big else "H"), len(entries)) + b"".join(entries)
    start = struct.pack(order + ("Q" if big else "I"), place)
    first = data[: 8 if big else 4] + start
    parts: list[bytes | memoryview] = [first, memoryview(data)[len(first) :], bytes(len(data) % 2), directory, bytes(8)]
    return Head("TIFF", b"".join(parts), turn=turn)


def _check_tiff(one: dict[int, int], tags: dict[int, tuple[int, ...]]) -> None:
    """``Refused`` where a directory asks for more memory or work than its picture needs."""
    width, height = one.get(256, 0), one.get(257, 0)
    check_size("TIFF", width, height)
    if one.get(259, 1) not in _CODECS:
        raise Refused(f"its compression is number {one[259]}, which is not read here")
    samples, bits = one.get(277, 1), tags.get(258, (1,))
    if samples > 6 or (sum(bits) if len(bits) > 1 else bits[0] * samples) > 64:
        raise Refused(f"it has {samples} samples of {bits[0]} bits a pixel")
    tiled = 324 in tags
    if tiled == (273 in tags):
        raise Refused("it has not either strips or tiles")
    wide, high = (one.get(322, 0), one.get(323, 0)) if tiled else (width, one.get(278, height))
    if not (wide and high):
        raise Refused("its parts have no size")
    parts = -(-width // wide) * -(-height // high)
    if tiled and wide * high > max(_MOST_OF_TILE, (width + 15) * (height + 15)):
        raise Refused(f"its tiles are {wide}x{high}")
    if one.get(284, 1) == 2:
        parts *= samples
        if bits[0] > 8 and samples > 1:  # decoders read every other byte, or none
            raise Refused("its channels of 16 bits lie one after the other: write them pixel by pixel")
    if parts > MOST_PARTS or (parts > 1 and len(tags[324 if tiled else 273]) > parts):
        raise Refused(f"it has {len(tags[324 if tiled else 273]):,} parts, {parts:,} by its size")


def _jpeg2000(data: bytes) -> Head:
    codestream(data)
    return Head("JPEG2000", data)


def _avif(data: bytes) -> Head:
    return Head("AVIF", avif(data))


_READERS: dict[bytes, Callable[[bytes], Head]] = {
    rb"\x89PNG\r\n\x1a\n....IHDR": _png,
    rb"\xff\xd8\xff": _jpeg,
    rb"RIFF....WEBPVP8[ XL]": _webp,
    rb"GIF8[79]a": _gif,
    rb"II[*+]\0|MM\0[*+]": _tiff,
    rb"....ftyp(?:avi[fs]|m[is]f1)": _avif,
    rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n": _jpeg2000,
    rb"BM": _bmp,
}
"""Of each format its first bytes, as a pattern, and what reads its head."""
