"""AVIF and JPEG 2000 looked through before they are decoded: files of boxes around streams with sizes of their own.

The boxes' sizes are not the streams': a box of 8x8 pixels may hold a stream of 16384x16384. Both formats' streams are
walked to every place where a size stands.
"""

import struct
from collections.abc import Iterator

from controlkit.decoding.limits import MOST_PIECES, Refused, check_size, pieces


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The boxes in a part of a file: type, and where their content begins and ends."""
    for _ in pieces():
        if start + 8 > end:
            return
        length, kind = struct.unpack_from(">I4s", data, start)
        content = start + (16 if length == 1 else 8)
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, start + 8)
        after = start + length if length else end
        if not content <= after <= end:
            raise Refused("it ends too early")
        yield kind, content, after
        start = after


# --- AVIF ---------------------------------------------------------------------------------------------------

_MOST_FRAMES = 8
"""Of one stream: a still picture has one; layers of a progressive one, up to four."""


def avif(data: bytes) -> bytes:
    """The file with its first picture alone, without EXIF; ``Refused`` where a stream in it is too large."""
    clean, (start, end) = bytearray(data), (0, 0)
    for kind, at, after in _boxes(data, 0, len(data)):
        if kind == b"ftyp":
            clean[at:after] = data[at:after].replace(b"avis", b"avif")  # else its frames are asked for
            if b"avif" not in clean[at:after]:
                raise Refused("of no known format")
        elif kind == b"meta" and not end:
            start, end = at, after
        elif kind != b"mdat":  # such as the frames of a moving one
            kept = at - (12 if data[at - 16 : at - 12] == b"\0\0\0\1" and data[at - 12 : at - 8] == kind else 4)
            clean[kept : kept + 4] = b"free"
    clean[start:end] = data[start:end].replace(b"Exif", b"skip")  # of which decoders read all tags, however many
    found: dict[bytes, tuple[int, int]] = {}
    for kind, at, after in _boxes(data, start + 4, end):
        found.setdefault(kind, (at, after))
    _check_items(data, _kinds(data, *found[b"iinf"]), _extents(data, *found[b"iloc"]), found.get(b"idat", (0, 0)))
    return bytes(clean)


def _check_items(
    data: bytes, kinds: dict[int, bytes], extents: dict[int, tuple[int, list[tuple[int, int]]]], held: tuple[int, int]
) -> None:
    """``Refused`` where a picture that the file's items hold is too large. ``held``: where the box ``idat`` lies."""
    total = 0
    for item, (method, parts) in extents.items():
        total += sum(length for _, length in parts)
        if method > 1 or total > len(data) or not all(length for _, length in parts):
            raise Refused("its items are not of the file's length")
        base, limit = held if method else (0, len(data))
        stream = b"".join(data[base + at : min(base + at + length, limit)] for at, length in parts)
        if kinds.get(item) == b"av01":
            _check_av1(stream)
        elif kinds.get(item) == b"grid":
            check_size("AVIF", *struct.unpack_from(">II" if stream[1] & 1 else ">HH", stream, 4))


def _kinds(data: bytes, start: int, end: int) -> dict[int, bytes]:
    """Items' numbers and types."""
    wide = data[start] > 0
    found: dict[int, bytes] = {}
    for _, at, _ in _boxes(data, start + (8 if wide else 6), end):
        item, _, kind = struct.unpack_from(">IH4s" if data[at] > 2 else ">HH4s", data, at + 4)
        if found.setdefault(item, kind) != kind:
            raise Refused("its items have two types")
    return found


def _extents(data: bytes, start: int, end: int) -> dict[int, tuple[int, list[tuple[int, int]]]]:
    """Items' numbers, how they lie (0: in the file, 1: in the box ``idat``), and their pieces: place and length."""
    version, sizes, at = data[start], data[start + 4 : start + 6], start + 6

    def number(size: int) -> int:
        nonlocal at
        at += size
        if at > end:
            raise Refused("it ends too early")
        return int.from_bytes(data[at - size : at], "big")

    found = {}
    of_offset, of_length, of_base = sizes[0] >> 4, sizes[0] & 15, sizes[1] >> 4
    of_index = sizes[1] & 15 if version else 0
    total = 0
    for _ in range(number(4 if version > 1 else 2)):
        item = number(4 if version > 1 else 2)
        method = number(2) & 15 if version else 0
        number(2)
        base, count = number(of_base), number(2)
        total += 1 + count
        if total > MOST_PIECES or item in found:
            raise Refused("it has too many items, or one twice")
        parts = []
        for _ in range(count):
            number(of_index)
            place = base + number(of_offset)
            parts.append((place, number(of_length)))
        found[item] = (method, parts)
    return found


def _check_av1(stream: bytes) -> None:
    """``Refused`` where a stream has too large a size or too many frames: all its units are walked."""
    at = frames = 0
    for _ in pieces():
        if at >= len(stream):
            break
        head, at = stream[at], at + 1 + (stream[at] >> 2 & 1)
        size = len(stream) - at
        if head & 2:  # its length in groups of seven bits
            size = shift = 0
            while True:
                size |= (stream[at] & 127) << shift
                shift, at = shift + 7, at + 1
                if stream[at - 1] < 128 or shift > 49:
                    break
        kind = head >> 3 & 15
        frames += kind in (3, 6)
        if kind == 1:
            check_size("AVIF", *_size_of_sequence(stream[at : at + size]))
        at += size
    if frames > _MOST_FRAMES:
        raise Refused(f"it has {frames} frames")


def _size_of_sequence(header: bytes) -> tuple[int, int]:
    """The largest (width, height) of frames under a sequence header of AV1 (5.5 of its specification)."""
    header = header[:512]  # with all that may stand before the size
    bits, left = int.from_bytes(header, "big"), 8 * len(header)

    def take(count: int) -> int:
        nonlocal left
        left -= count
        if left < 0:
            raise Refused("it ends too early")
        return bits >> left & (1 << count) - 1

    take(4)
    reduced = take(1)
    if reduced:
        take(5)
    else:
        model = delay = 0
        if take(1):  # timing
            take(64)
            if take(1):
                zeros = 0
                while not take(1):
                    zeros += 1
                take(zeros if zeros < 32 else 0)
            if model := take(1):
                delay = take(5) + 1
                take(42)
        display = take(1)
        for _ in range(take(5) + 1):
            take(12)
            if take(5) > 7:
                take(1)
            if model and take(1):
                take(2 * delay + 1)
            if display and take(1):
                take(4)
    across, down = take(4) + 1, take(4) + 1
    width, height = take(across) + 1, take(down) + 1
    # A frame may say another size, in as many bits.
    return (width, height) if reduced else (max(width, 1 << across - 1), max(height, 1 << down - 1))


# --- JPEG 2000 ----------------------------------------------------------------------------------------------

_MOST_TILES, _MOST_PRECINCTS, _MOST_PACKETS, _LEAST_BLOCK = 4096, 1 << 18, 1 << 22, 256
"""What decoders make objects of, or go through one by one, whether or not the file has data for them."""

_MARKERS = {0x50, 0x52, 0x53, 0x55, 0x57, 0x58, 0x5C, 0x5D, 0x5E, 0x60, 0x61, 0x63, 0x64}
"""The second bytes of the segments that are let through; all but changes of the order of progression."""


def codestream(data: bytes) -> None:
    """``Refused`` where a JPEG 2000 file asks for more memory or work than its pixels need."""
    start, end = 0, len(data)
    if data[4:8] == b"jP  ":
        found = ((at, last) for kind, at, last in _boxes(data, 0, len(data)) if kind == b"jp2c")
        start, end = next(found, (0, 0))
    if data[start : start + 4] != b"\xff\x4f\xff\x51":
        raise Refused("its data is damaged")
    size = struct.unpack_from(">HHIIIIIIIIH", data, start + 4)
    _, _, right, lower, left, upper, wide, high, at_x, at_y, components = size
    check_size("JPEG2000", right - left, lower - upper)
    depths = struct.unpack_from(">" + "BBB" * components, data, start + 42) if 0 < components <= 4 else (127,)
    if any((depth & 127) > 15 for depth in depths[::3]) or 0 in depths[1::3] or 0 in depths[2::3]:
        raise Refused(f"it has {components} channels that are not read")
    if not (wide and high) or at_x > left or at_y > upper:
        raise Refused("its tiles have no size")
    tiles = -(-(right - at_x) // wide) * -(-(lower - at_y) // high)
    if tiles > _MOST_TILES:
        raise Refused(f"it has {tiles:,} tiles")
    layers, precincts = 0, 0
    tile = (min(wide, right - left), min(high, lower - upper))
    for marker, at, length in _segments(data, start + 2, end):
        if marker == 0x52:
            (layers,) = struct.unpack_from(">H", data, at + 2)
            precincts = max(precincts, _precincts(data[at + 5 : at + length], data[at] & 1, tile))
        elif marker == 0x53:
            precincts = max(precincts, _precincts(data[at + 2 : at + length], data[at + 1] & 1, tile))
    precincts *= components * tiles
    if precincts > _MOST_PRECINCTS or precincts * layers > _MOST_PACKETS:
        raise Refused(f"it has {precincts:,} precincts in {layers:,} layers")


def _precincts(style: bytes, chosen: int, tile: tuple[int, int]) -> int:
    """The precincts of one component of a tile, under the parameters of a coding style."""
    levels = style[0]
    if levels > 32 or 1 << (style[1] & 15) + (style[2] & 15) + 4 < _LEAST_BLOCK:
        raise Refused("its blocks are too small")
    total = 0
    for level in range(levels + 1):
        exponents = style[5 + level] if chosen else 0xFF
        sides = [-(-side >> levels - level) for side in tile]
        across, down = exponents & 15, exponents >> 4
        total += ((sides[0] >> across) + 2) * ((sides[1] >> down) + 2)
    return total


def _segments(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The main header's segments: second byte of the marker, where the content begins, its length.

    The headers of tiles are walked, too: ``Refused`` where one changes how it is coded.
    """
    main, after = True, 0
    for _ in pieces():
        if at + 2 > end:
            return
        high, marker = data[at], data[at + 1]
        if (high, marker) == (0xFF, 0xD9):
            return
        if (high, marker) == (0xFF, 0x93) and not main:
            at = after
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        if (high, marker) == (0xFF, 0x90):
            (part,) = struct.unpack_from(">I", data, at + 6)
            if part and part < 14:
                raise Refused("its data is damaged")
            main, after = False, at + part if part else end
        elif (high, marker) == (0xFF, 0x51) and main:
            pass
        elif high != 0xFF or marker not in _MARKERS or length < 2 or (not main and marker in (0x52, 0x53)):
            raise Refused("its coding changes within the picture, or its data is damaged")
        elif main:
            yield marker, at + 4, length - 2
        at += 2 + length
