"""Files from strangers, of a few kilobytes: pictures and arrays that ask for more than they are."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def saved(picture, format, **options):
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def flat(width, height, mode="RGB"):
    return Image.new(mode, (width, height))


# --- PNG ----------------------------------------------------------------------------------------------------


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth=8, colour=2, extra=b"", late=b""):
    """A black PNG, made without holding its pixels."""
    bits = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] * depth
    row, packed = bytes(1 + (width * bits + 7) // 8), zlib.compressobj(9)
    pixels = b"".join([*(packed.compress(row) for _ in range(height)), packed.flush()])
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", pixels) + late + chunk(b"IEND", b"")


def inflating(kind, size=1 << 30):
    """A text or profile of a PNG that inflates to so many bytes."""
    packed, block = zlib.compressobj(9), bytes(1 << 20)
    text = b"".join([*(packed.compress(block) for _ in range(size >> 20)), packed.flush()])
    head = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}[kind]
    return chunk(kind, head + text)


def directory(tags, order="<"):
    """EXIF, or the beginning of a TIFF: entries of (tag, type, count, value or place)."""
    entries = b"".join(struct.pack(order + "HHII", *tag) for tag in tags)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "IH", 8, len(tags)) + entries + bytes(4)


def many_tags(count=5000, size=1_000_000):
    """EXIF whose every tag is the whole of it."""
    tags = [(40000 + k, 7, size - 100_000, 0) for k in range(count)]
    return directory(tags).ljust(size, b"\0")


# --- TIFF ---------------------------------------------------------------------------------------------------

PLAIN = {256: (4, 1, 8), 257: (4, 1, 8), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 273: (4, 1, 8), 277: (3, 1, 1),
         278: (4, 1, 8), 279: (4, 1, 64)}  # fmt: skip


def tiff(more, values=b"", drop=()):
    """A TIFF of 8x8 grey pixels whose tags are changed; ``values`` lie at 1024."""
    tags = {tag: value for tag, value in (PLAIN | more).items() if tag not in drop}
    return directory([(tag, *tags[tag]) for tag in sorted(tags)]).ljust(1024, b"\0") + values


# --- JPEG ---------------------------------------------------------------------------------------------------


def segment(marker, data):
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def many_scans(count, side=2000):
    """A progressive JPEG whose last scan comes again and again."""
    data = saved(flat(side, side), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * count + b"\xff\xd9"


def with_exif(data, exif):
    """A JPEG with EXIF of any length, in segments."""
    parts = [exif[at : at + 65000] for at in range(0, len(exif), 65000)]
    return data[:2] + b"".join(segment(0xE1, b"Exif\0\0" + part) for part in parts) + data[2:]


# --- JPEG 2000, AVIF ----------------------------------------------------------------------------------------


def jpeg2000(**changes):
    """A raw JPEG 2000 of 8x8 grey pixels with other sizes, tiles, layers, precincts or blocks in its head."""
    data = bytearray(saved(flat(64, 64, "L"), "JPEG2000", no_jp2=True, **changes.pop("options", {})))
    at = {
        "width": (8, "I"),
        "height": (12, "I"),
        "tile_width": (24, "I"),
        "tile_height": (28, "I"),
        "channels": (40, "H"),
    }
    coding = data.index(b"\xff\x52")
    at |= {"channels": (40, "H"), "layers": (coding + 6, "H"), "across": (coding + 10, "B"), "down": (coding + 11, "B")}
    for name, value in changes.items():
        place, code = at[name]
        struct.pack_into(">" + code, data, place, value)
    return bytes(data)


def avif(width, height, told=None, **options):
    """A black AVIF, whose boxes tell another size than its stream."""
    data = saved(flat(width, height), "AVIF", speed=10, **options)
    place = data.index(b"ispe") + 8
    return data[:place] + struct.pack(">II", *(told or (width, height))) + data[place + 8 :]


def moved(data, insert, at):
    return data[:at] + insert + data[at:]


# --- arrays -------------------------------------------------------------------------------------------------


def npy(head, values=b"", version=1, length=None):
    text = head.encode("latin-1") if isinstance(head, str) else head
    count = len(text) if length is None else length
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", count) + text + values


def array_head(shape="(4, 4)", kind="'|u1'", order="False"):
    return f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


def array(values):
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()
