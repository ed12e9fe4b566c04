"""Pictures decoded: Pillow is asked for one format by name, and given what ``heads`` let through, never a path."""

import ctypes
import io
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from controlkit.decoding.arrays import array_of
from controlkit.decoding.heads import head_of, orientation
from controlkit.decoding.limits import MOST_BYTES, Large, Refused, check_size
from controlkit.errors import Invalid, NotFound, OutOfRoom, UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000")
"""Formats of files, by Pillow's names, that are taken for pictures; of moving ones the first is read."""

Ground = str | None
"""The colour, as Pillow names it, that is laid under what is transparent; None keeps that, in a fourth channel.
``ink`` is black, but white under a drawing in black; ``white`` is the same, the other way round."""
_SECOND = {"ink": ("black", "white"), "white": ("white", "black")}

_BAND = 1 << 22
"""Pixels that are brought to another mode at once, so that a large picture is not held several times."""

_TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270"}
_TURNS |= {7: "TRANSVERSE", 8: "ROTATE_90"}
"""What brings a picture upright, by the camera's rotation."""

_OTHER_BYTE = {"RGB;16B": "RGB;16L", "RGB;16L": "RGB;16B"}
_OTHER_BYTE["RGB;16N"] = f"RGB;16{'B' if struct.pack('=H', 1) == struct.pack('<H', 1) else 'L'}"
"""Pillow reads the higher byte of 16-bit colours; under the other order of bytes, that is the lower one."""


class TooLarge(Invalid):
    """A picture's file with more pixels, or a file with more bytes, than are read."""


@dataclass(frozen=True)
class Picture:
    """A picture, decoded and upright."""

    pixels: np.ndarray
    """uint8 (H, W, 3), or (H, W, 4) without a ground; or uint16 (H, W, 1) or (H, W, 3)."""
    mode: str
    """Pillow's mode of the file: ``P``, ``CMYK``, ``I;16`` and so on."""
    clear: bool = False
    """Whether it is transparent anywhere."""


def picture_suffixes() -> tuple[str, ...]:
    """The endings of files in ``FORMATS``, as far as this machine's Pillow reads them: ``.png``, ``.jpg`` and so on."""
    known = Image.registered_extensions().items()
    return tuple(sorted(suffix for suffix, format in known if format in FORMATS and format in Image.OPEN))


def read_bytes(path: Path, expected: str) -> bytes:
    """The bytes of a picture's or an array's file; ``NotFound`` for what is no regular file, ``TooLarge``."""
    if not path.is_file():
        raise NotFound(f"There is no {expected}.")
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise TooLarge(f"{path} has {size:,} bytes: expected at most {MOST_BYTES:,}.")
    with path.open("rb") as file:
        return file.read(size + 1)


def open_picture(data: bytes, name: str, ground: Ground = "white", deep: bool = False) -> Picture:
    """Decode the bytes of a picture's file; ``name`` names them in errors.

    ``deep``: 16 bits a sample stay, where the file is a PNG or TIFF of grey or of colours without transparency.
    Raises ``TooLarge`` and ``Invalid``, before anything is decoded wherever the file's head says so.
    """
    with _opened(data, name) as (opened, turn):
        mode = "I;16" if opened.mode.startswith("I;16") else opened.mode
        if deep and opened.format in ("PNG", "TIFF") and (pixels := _sixteen_bits(opened, turn)) is not None:
            return Picture(pixels, mode)
        image = _upright(opened, turn)
        if mode != "I;16" and (mode in ("RGBA", "LA", "P", "PA") or "transparency" in image.info):
            return _transparent(image, mode, ground)
        return Picture(_array(image, "RGB" if ground else "RGBA"), mode)


def open_array(data: bytes, name: str, ground: Ground = None) -> np.ndarray:
    """The array (H, W, C) in a ``.npy`` file's bytes, as ``arrays.array_of`` gives it; with a ``ground``, of uint8 a
    fourth channel is transparency, as a picture's is.
    """
    if len(data) > MOST_BYTES:
        raise TooLarge(f"{name} has {len(data):,} bytes: expected at most {MOST_BYTES:,}.")
    array = array_of(data, name)
    if ground and array.dtype == np.uint8 and array.shape[2] == 4:
        return _transparent(Image.fromarray(array), "RGBA", ground).pixels
    return array


def sides_of(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) of the picture that ``open_picture`` gives, read from the file's head; raises as it does."""
    with _opened(data, name) as (opened, turn):
        width, height = opened.size
    return (width, height) if turn in (5, 6, 7, 8) else (height, width)


def settings_texts(data: bytes, name: str) -> dict[str, str]:
    """Those of the text fields ``controlkit`` and ``parameters`` that a PNG has."""
    with _opened(data, name) as (opened, _):
        return {key: str(opened.info[key]) for key in ("controlkit", "parameters") if opened.info.get(key)}


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[tuple[ImageFile.ImageFile, int]]:
    """A picture whose pixels are not decoded yet, and the camera's rotation; whatever is wrong with it in words."""
    try:
        if not data:
            raise Refused("the file is empty")
        if len(data) > MOST_BYTES:
            raise Large(f"has {len(data):,} bytes: expected at most {MOST_BYTES:,}")
        head = head_of(data)
        with Image.open(io.BytesIO(head.data), formats=[head.format]) as opened:
            check_size(head.format, *opened.size)
            if head.format == "TIFF":
                _silence_libtiff()
            if opened.mode in ("I", "F"):  # such as depth in millimetres; clipping would ruin it
                raise Refused(f"its samples are of mode {opened.mode}, 32 bits, without a range")
            yield opened, head.turn or _turn(opened, head.exif, head.xmp)
    except UserError:
        raise
    except Large as error:
        raise TooLarge(f"{name} {error}; make it smaller, or take it out.") from error
    except MemoryError as error:
        raise OutOfRoom(f"{name} does not fit into memory: make the picture smaller.") from error
    except Exception as error:  # whatever a decoder makes of damaged data
        early = "truncated" in str(error) or isinstance(error, EOFError)
        reason = error if isinstance(error, Refused) else "it ends too early" if early else "its data is damaged"
        raise Invalid(
            f"{name} cannot be read as a picture ({reason}): expected a whole PNG, JPEG or WebP file, 8 or 16 bits."
        ) from error


@cache
def _silence_libtiff() -> None:
    """Keep libtiff's own words, of which Pillow makes an error, too, off the terminal."""
    with suppress(AttributeError, OSError):  # where it is no library of its own
        ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


def _turn(opened: Image.Image, exif: bytes, xmp: bytes) -> int:
    """The camera's rotation, in EXIF or XMP wherever formats have them."""
    info = opened.info
    if not (exif := exif or info.get("exif", b"")) and "Raw profile type exif" in info:
        exif = bytes.fromhex("".join(info["Raw profile type exif"].split("\n")[3:]))
    text = xmp or info.get("XML:com.adobe.xmp") or info.get("xmp") or b""
    return orientation(exif, text.encode() if isinstance(text, str) else text)


def _upright(opened: Image.Image, turn: int) -> Image.Image:
    opened.load()
    return opened.transpose(Image.Transpose[_TURNS[turn]]) if turn in _TURNS else opened


def _filled(image: Image.Image, change: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    """A picture's array, made of some rows at a time."""
    rows = max(_BAND // image.width, 1)
    if rows >= image.height:
        return change(image)
    pieces = (image.crop((0, top, image.width, min(top + rows, image.height))) for top in range(0, image.height, rows))
    first = change(next(pieces))
    pixels = np.empty((image.height, *first.shape[1:]), first.dtype)
    pixels[:rows] = first
    for number, piece in enumerate(pieces, 1):
        pixels[number * rows : (number + 1) * rows] = change(piece)
    return pixels


def _array(image: Image.Image, mode: str) -> np.ndarray:
    """A picture as uint8 in a mode of three or four channels."""

    def change(piece: Image.Image) -> np.ndarray:
        if piece.mode.startswith("I;16"):  # PIL's own conversion clips instead of scaling
            piece = Image.fromarray((np.asarray(piece) >> 8).astype(np.uint8))
        return np.asarray(piece if piece.mode == mode else piece.convert(mode))

    return _filled(image, change)


def _transparent(image: Image.Image, mode: str, ground: Ground) -> Picture:
    """On a ground; on its second colour where the first would swallow all that is drawn."""
    alphas: list[tuple] = []
    shades: list[tuple] = []  # of each piece and channel, the least and the greatest value

    def lay(piece: Image.Image, colour: str) -> np.ndarray:
        piece = piece if piece.mode == "RGBA" else piece.convert("RGBA")
        alphas.append(piece.getchannel("A").getextrema())
        if ground:
            piece = Image.alpha_composite(Image.new("RGBA", piece.size, colour), piece).convert("RGB")
            shades.append(piece.getextrema())
        return np.asarray(piece)

    def swallowed() -> bool:
        lows, highs = (np.array(shades)[..., k] for k in (0, 1))
        return bool((lows.min(0) == highs.max(0)).all())

    grounds = _SECOND.get(ground, (ground,)) if ground else ("",)
    laid = _filled(image, partial(lay, colour=grounds[0]))
    clear = min(least for least, _ in alphas) < 255
    if len(grounds) > 1 and clear and max(most for _, most in alphas) > 0 and swallowed():
        shades.clear()
        other = _filled(image, partial(lay, colour=grounds[1]))
        laid = laid if swallowed() else other
    return Picture(laid, mode, clear)


def _sixteen_bits(opened: ImageFile.ImageFile, turn: int) -> np.ndarray | None:
    """Pixels of 16 bits a sample, uint16 (H, W, 1) or (H, W, 3), upright; None where they are no such."""
    raw = {_raw_mode(tile) for tile in opened.tile}
    if opened.mode.startswith("I;16") and "I;12" not in raw:
        return np.asarray(_upright(opened, turn)).astype(np.uint16)[..., None]
    if not raw or raw - _OTHER_BYTE.keys() or "transparency" in opened.info or not isinstance(opened.fp, io.BytesIO):
        return None
    source = opened.fp.getvalue()
    pixels = _filled(_upright(opened, turn), lambda piece: np.asarray(piece).astype(np.uint16) << 8)
    opened.close()  # one of the two is held at a time
    with Image.open(io.BytesIO(source), formats=[str(opened.format)]) as again:
        for number, tile in enumerate(again.tile):
            other = _OTHER_BYTE[_raw_mode(tile)]
            again.tile[number] = tile._replace(args=(other, *tile.args[1:]) if isinstance(tile.args, tuple) else other)
        pixels |= _array(_upright(again, turn), "RGB")
    return pixels


def _raw_mode(tile: ImageFile._Tile) -> str:
    """The order of bytes in which a part of a picture lies, by Pillow's name."""
    return str(tile.args[0] if isinstance(tile.args, tuple) else tile.args)
