"""The most that is read of a picture: chosen so that no file makes a decoder hold more than a gigabyte."""

from collections.abc import Iterator

MOST_PIXELS = 64_000_000
"""Of a picture's file. Cameras of full frame have 61 million; decoding takes up to 14 bytes a pixel."""

_FEWER_PIXELS = {"WEBP": 40_000_000, "AVIF": 40_000_000, "JPEG2000": 25_000_000}
"""Of formats, by Pillow's names, whose decoders hold more at once: 20 bytes a pixel, JPEG 2000's 30 and more."""

MOST_SIDE = 65_535
"""Of a picture's file, in pixels: as much as JPEG and GIF can have."""

MOST_BYTES = 1 << 28
"""Of a file of a picture or an array; as much as 64 million pixels of four bytes."""

MOST_PARTS = 65_536
"""Strips or tiles of a TIFF, values of one of its tags."""


MOST_PIECES = 1 << 17
"""Chunks, segments, blocks or boxes that are gone through: twice as many as the rows of the tallest picture."""


class Refused(ValueError):  # noqa: N818  # a reason, made into an error with the file's name by whoever has it
    """Why a file is not decoded, as a phrase."""


class Large(Refused):
    """The file's picture has too many pixels; the phrase begins with "is"."""


def check_size(format: str, width: int, height: int) -> None:
    """``Refused`` for a picture without pixels, ``Large`` for one with too many; ``format``: by Pillow's name."""
    most = _FEWER_PIXELS.get(format, MOST_PIXELS)
    if width <= 0 or height <= 0:
        raise Refused("it has no pixels")
    if width * height > most or max(width, height) > MOST_SIDE:
        raise Large(f"is {width}x{height}: expected at most {most:,} pixels, {MOST_SIDE:,} on a side")


def pieces() -> Iterator[int]:
    """Numbers for a loop over a file's pieces; ``Refused`` at the end of them."""
    yield from range(MOST_PIECES)
    raise Refused(f"it has more than {MOST_PIECES:,} pieces")
