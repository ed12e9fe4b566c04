"""Values that come in: bodies as JSON, pictures as base64, numbers that may be texts; bounded, and none a path."""

import base64
import binascii
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from starlette.requests import Request as HttpRequest

from controlkit.decoding import sides_of
from controlkit.errors import Invalid, one_line
from controlkit.files import parse_json
from controlkit.images import decode_picture
from controlkit.serve.settings import Limits

_DATA_URL = re.compile(r"data:[\w.+/-]{0,60}(;[\w=.+-]{0,60})*;base64,", re.IGNORECASE)
_URL = re.compile(r"\s*([a-z][a-z0-9+.-]{1,20}):", re.IGNORECASE)


async def json_fields(http: HttpRequest) -> dict[str, Any]:
    """The keys and values of a request's body, as ``fields_of`` gives them."""
    return fields_of(await http.body())


def fields_of(data: bytes) -> dict[str, Any]:
    """The keys and values of a body, which the guard has bounded; none in an empty one, or an empty text in JSON.

    ``Invalid`` for what is no JSON, and for other values.
    """
    found = parse_json(data, "the request's body") if data.strip() else {}
    if found in ("", None):
        return {}
    if not isinstance(found, dict):
        raise Invalid(f"The request's body holds {kind_of(found)}; expected keys and values.")
    return found


def kind_of(value: Any) -> str:
    """The kind of a value in JSON, in words for errors."""
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), "nothing")


def picture_bytes(value: Any, where: str) -> bytes:
    """The bytes of a picture's file in base64, with or without the head of a ``data:`` URL.

    ``where``: its place, for errors. ``Invalid`` for an address, which is not fetched, and for anything else.
    """
    if not isinstance(value, str):
        raise Invalid(f"{where} is {kind_of(value)}; expected a picture as base64, or a data: URL.")
    text = value.strip()
    if head := _DATA_URL.match(text):
        text = text[head.end() :]
    elif scheme := _URL.match(text[:64]):
        raise Invalid(
            f"{where} is an address ({one_line(scheme[1])}:), and none is fetched: send the picture itself as base64."
        )
    try:
        return base64.b64decode("".join(text.split()) + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise Invalid(
            f"{where} is no base64: expected the bytes of a PNG, JPEG or WebP file. Paths are never opened."
        ) from None


def picture(value: Any, where: str, limits: Limits, ground: str | None = "white") -> np.ndarray:
    """A picture in base64, uint8 (H, W, 3); with ``ground`` None (H, W, 4). Measured before it is decoded."""
    return decoded(picture_bytes(value, where), where, limits, ground)


def decoded(data: bytes, where: str, limits: Limits, ground: str | None = "white") -> np.ndarray:
    """The picture in a file's bytes, as ``picture`` gives it."""
    height, width = sides_of(data, where)
    if height * width > limits.pixels_given:
        raise Invalid(f"{where} is {width}x{height}: expected at most {limits.pixels_given:,} pixels.")
    return decode_picture(data, where, ground)


def number(values: Mapping[str, Any], key: str, default: float, least: float, most: float) -> float:
    """A number, or a text that is one; the default where it is missing or null. ``Invalid`` out of range."""
    value = values.get(key)
    if value is None or value == "":
        return default
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise Invalid(f"{key} is {one_line(value)}; expected a number.")
    try:
        found = float(value)
    except (ValueError, OverflowError):
        found = math.nan
    if not least <= found <= most:
        raise Invalid(f"{key} is {one_line(value)}; expected a number from {least:g} to {most:g}.")
    return found


def whole(values: Mapping[str, Any], key: str, default: int, least: int, most: int) -> int:
    """A whole number, as ``number``; seeds of 64 bits keep all their digits."""
    value = values.get(key)
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d{1,20}\s*", value):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if not least <= value <= most:
            raise Invalid(f"{key} is {value}; expected a whole number from {least} to {most}.")
        return value
    found = number(values, key, default, least, most)
    if found != int(found):
        raise Invalid(f"{key} is {found:g}; expected a whole number.")
    return int(found)


def truth(values: Mapping[str, Any], key: str, default: bool) -> bool:
    """A yes or no, which may be written as a number or a text."""
    value = values.get(key)
    if value is None or value == "":
        return default
    if isinstance(value, bool | int | float):
        return bool(value)
    known = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    if isinstance(value, str) and value.strip().lower() in known:
        return known[value.strip().lower()]
    raise Invalid(f"{key} is {one_line(value)}; expected true or false.")


def text(values: Mapping[str, Any], key: str, default: str = "") -> str:
    """A text; the default where it is missing or null."""
    value = values.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise Invalid(f"{key} is {kind_of(value)}; expected a text.")
    return value


def listed(values: Mapping[str, Any], key: str, most: int) -> Sequence[Any]:
    """A list of at most so many values; of none, where it is missing or null."""
    value = values.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise Invalid(f"{key} is {kind_of(value)}; expected a list.")
    if len(value) > most:
        raise Invalid(f"{key} has {len(value)} values; expected at most {most}.")
    return value
