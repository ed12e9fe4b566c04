"""The one door for files of pictures and arrays from anywhere: known by content, measured before they are decoded."""

from controlkit.decoding.arrays import is_array
from controlkit.decoding.limits import MOST_BYTES, MOST_PIXELS
from controlkit.decoding.pictures import (
    Ground,
    Picture,
    TooLarge,
    open_array,
    open_picture,
    picture_suffixes,
    read_bytes,
    settings_texts,
    sides_of,
)

__all__ = [
    "MOST_BYTES",
    "MOST_PIXELS",
    "Ground",
    "Picture",
    "TooLarge",
    "is_array",
    "open_array",
    "open_picture",
    "picture_suffixes",
    "read_bytes",
    "settings_texts",
    "sides_of",
]
