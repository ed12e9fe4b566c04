"""Pixels, their ranges, and the hint's contract.

Pictures on this side of a file are uint8 arrays (H, W, 3), RGB, 0-255. Tensors of pictures are float (B, 3, H, W)
in [-1, 1]; tensors of hints are in the range their ``HintSpec`` says. Conversions happen here and nowhere else.

Hints are pictures, too, or arrays (H, W, C) of any number of channels: uint8 and uint16 are shares of their type's
largest value; float32 are values in the range of the ``HintSpec`` already.
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from pydantic import TypeAdapter
from torch import Tensor

from controlkit.errors import Invalid, NotFound, one_line
from controlkit.files import parse_json, write_atomic

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000")
"""Formats of files, by Pillow's names, that are taken for pictures; of moving ones the first is read."""


def picture_suffixes() -> tuple[str, ...]:
    """The endings of files in ``FORMATS``, as far as this machine's Pillow reads them: ``.png``, ``.jpg`` and so on."""
    known = Image.registered_extensions().items()
    return tuple(sorted(suffix for suffix, format in known if format in FORMATS and format in Image.OPEN))


Resize = Literal["area", "lines", "nearest"]

MOST_SIDE = 16_384
"""The longest side, in pixels, of a picture to be made."""

Ground = str | None
"""The colour, as Pillow names it, that is laid under what is transparent; None keeps that, in a fourth channel.
``ink`` is black, but white under a drawing in black; ``white`` is the same, the other way round."""
_SECOND = {"ink": ("black", "white"), "white": ("white", "black")}

DEEPEST = {"uint8": 255.0, "uint16": 65535.0}
"""The largest value of each type of whole numbers that hints may have."""

_FILE_KEYS = {"mask_value": "mark"}
"""``HintSpec``'s fields that have another key in files: weights that are shipped have it."""


@dataclass(frozen=True)
class HintSpec:
    """The contract of a hint: all that must be equal in training and in generation.

    It is stored with the weights, and ``tensor`` is the one place where it is applied.
    """

    annotator: str
    """Name of the annotator that made the hints, e.g. ``canny``; "" where it is unknown. At most 100 letters."""
    options: Mapping[str, float] = field(default_factory=dict)
    """The annotator's options, e.g. ``{"low": 100, "high": 200}``; finite numbers in the ranges that it names."""
    channels: int = 3
    """Channels of the hint, from 1: 3 (RGB), 1 (grey), or any other number for hints that are arrays."""
    low: float = 0.0
    """The value of black, 0; finite."""
    high: float = 1.0
    """The value of white, 255 or 65535; finite. Floats must lie in [low, high]."""
    colour_order: Literal["RGB", "BGR"] = "RGB"
    """The order in which three channels are given to the network."""
    mask_value: float | None = None
    """The value of masked pixels (transparent in the picture), finite: -1 for inpainting; None: hints have no mask."""
    resize: Resize = "area"
    """The way a hint is brought to the picture's size: ``area`` for soft maps, ``lines`` (white on black; a thin line
    must not fade when it shrinks), ``nearest`` for labels."""

    def to_json(self) -> str:
        """The contract as JSON, for a weights file's metadata."""
        return json.dumps({_FILE_KEYS.get(name, name): value for name, value in asdict(self).items()})

    @classmethod
    def from_json(cls, text: str) -> "HintSpec":
        """Read a contract that ``to_json`` wrote.

        Raises ``ValueError`` for unknown or absent keys, wrong types, numbers out of range, and a name that is too
        long or cannot be printed. The options' own ranges: ``annotators.contract_from_json``.
        """
        given = parse_json(text, "the contract")
        keys = {_FILE_KEYS.get(one.name, one.name): one.name for one in fields(cls)}
        if not isinstance(given, dict) or given.keys() - keys:
            raise ValueError(f"expected keys out of {', '.join(keys)}")
        named = {keys[key]: value for key, value in given.items()}
        TypeAdapter(cls).validate_json(json.dumps(named), strict=True)  # else 1 would do for True, and 3 for a name
        spec = cls(**named)
        numbers = (spec.low, spec.high, spec.mask_value or 0.0, *spec.options.values())
        if not all(abs(number) <= 1e6 for number in numbers) or not 0 < spec.channels <= 4096:
            raise ValueError("a number of it is beyond 1,000,000, or its channels are not 1 to 4,096")
        if len(spec.annotator) > 100 or not spec.annotator.isprintable():
            raise ValueError("its annotator's name is none")
        return spec

    def made_by(self, made: "HintSpec") -> "HintSpec":
        """This contract for hints of the annotator of ``made``; the range, channels and colour order stay."""
        return replace(
            self, annotator=made.annotator, options=made.options, mask_value=made.mask_value, resize=made.resize
        )

    def fault(self, hint: np.ndarray) -> str | None:
        """The first fault of a hint (H, W, C) under this contract, as a phrase; None if there is none."""
        if hint.ndim != 3 or not hint.size or hint.dtype.name not in {*DEEPEST, "float32"}:
            shape = " x ".join(map(str, hint.shape))
            return f"is {shape} of {hint.dtype}; expected height x width x channels of uint8, uint16 or float32"
        channels = hint.shape[-1]
        if not (channels == self.channels or (channels, self.channels) in ((1, 3), (3, 1)) or self._masks(hint)):
            return f"has {channels} channel{'s' * (channels > 1)}; expected {self.channels} (height, width, channels)"
        if hint.dtype == np.float32:
            low, high = float(hint.min()), float(hint.max())
            if not (self.low <= low and high <= self.high):  # so written, it holds for NaN as well
                return f"has values from {low:g} to {high:g}; expected floats in [{self.low:g}, {self.high:g}]"
        return None

    def _masks(self, hint: np.ndarray) -> bool:
        """Whether the fourth channel of a hint is a mask."""
        return hint.shape[-1] == 4 and hint.dtype == np.uint8 and self.channels in (1, 3)

    def tensor(self, hint: np.ndarray, size: tuple[int, int]) -> Tensor:
        """A hint as the branch reads it: (1, channels, *size), values in [low, high], masked ones ``mask_value``.

        The hint is a picture, uint8 (H, W, 3), or (H, W, 4) where hints have masks: transparent pixels are masked; or
        an array (H, W, channels) of uint8, uint16 or float32. One channel serves a contract of three, repeated, and
        three serve one of one, as their grey. Whole numbers are shares of their type's largest value and are mapped to
        [low, high]; floats are taken as they are. Raises ``Invalid`` for anything else, also for floats outside the
        range. ``size``: (height, width) in pixels.
        """
        if words := self.fault(hint):
            raise Invalid(f"The hint {words}.")
        pixels = fit(hint, size, self.resize)
        masked = torch.from_numpy(pixels[..., 3] < 128) if self._masks(pixels) else None
        pixels = np.ascontiguousarray(pixels[..., :3] if masked is not None else pixels)
        if (pixels.shape[-1], self.channels) == (3, 1):
            pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None]
        elif (pixels.shape[-1], self.channels) == (1, 3):
            pixels = pixels.repeat(3, 2)
        elif self.colour_order == "BGR" and self.channels == 3:
            pixels = pixels[..., ::-1]
        values = torch.from_numpy(self.values(pixels)).permute(2, 0, 1)[None]
        if masked is not None and self.mask_value is not None:
            values[:, :, masked] = self.mask_value
        return values

    def values(self, hint: np.ndarray) -> np.ndarray:
        """The values of a hint (H, W, C) in [low, high], a new float32 array of its shape."""
        if hint.dtype.name not in DEEPEST:
            return hint.astype(np.float32)
        return hint.astype(np.float32) / DEEPEST[hint.dtype.name] * (self.high - self.low) + self.low

    def picture(self, hint: np.ndarray) -> np.ndarray:
        """A hint (H, W, C) to look at, uint8 (H, W, 3), or (H, W, 4) with its mask: its first three channels."""
        if hint.dtype == np.uint8 and (hint.shape[-1] == 3 or self._masks(hint)):
            return hint
        light = (self.values(hint[..., :3]) - self.low) / ((self.high - self.low) or 1)
        lacking = 3 - light.shape[-1]
        light = light.repeat(3, 2) if lacking == 2 else np.pad(light, ((0, 0), (0, 0), (0, lacking)))
        return (255 * np.nan_to_num(light.clip(0, 1))).round().astype(np.uint8)


def read_picture(path: Path, ground: Ground = "white") -> np.ndarray:
    """A picture file as uint8 RGB (H, W, 3), camera rotation applied; with ``ground`` None, RGBA (H, W, 4).

    Raises ``NotFound`` if there is no file, ``Invalid`` if it is no whole picture.
    """
    if not path.is_file():
        raise NotFound(f"There is no picture at {path}: expected a PNG, JPEG or WebP file.")
    return decode_picture(path.read_bytes(), str(path), ground)


def decode_picture(data: bytes, name: str, ground: Ground = "white") -> np.ndarray:
    """The bytes of a picture file as ``read_picture`` gives them; ``name`` names them in errors."""
    try:
        with Image.open(io.BytesIO(data)) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I;16"):  # PIL's own conversion clips instead of scaling
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            if picture.mode in ("I", "F"):  # such as depth in millimetres; clipping would ruin it
                raise ValueError(f"its samples are of mode {picture.mode}, 32 bits, without a range")
            if picture.mode in ("RGBA", "LA", "P", "PA") or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                picture = _laid_on(picture, ground) if ground else picture
            return np.asarray(picture.convert("RGB" if ground else "RGBA"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "the file is empty" if not data else picture_error(error)
        raise Invalid(
            f"{name} cannot be read as a picture ({reason}): expected a whole PNG, JPEG or WebP file, 8 or 16 bits."
        ) from error


def _laid_on(picture: Image.Image, ground: str) -> Image.Image:
    """A picture (RGBA) on a ground; on the ground's second colour where the first would swallow all that is drawn."""
    grounds = [Image.new("RGBA", picture.size, colour) for colour in _SECOND.get(ground, (ground,))]
    laid = [Image.alpha_composite(one, picture) for one in grounds]
    return next((one for one in laid if np.ptp(np.asarray(one), (0, 1)).any()), laid[0])


def read_hint(path: Path, ground: Ground = "black") -> np.ndarray:
    """A hint's file as ``decode_hint`` gives it; ``NotFound`` if there is none."""
    if not path.is_file():
        raise NotFound(f"There is no hint at {path}: expected a PNG, JPEG, WebP or .npy file.")
    return decode_hint(path.read_bytes(), str(path), ground)


def decode_hint(data: bytes, name: str, ground: Ground = "black") -> np.ndarray:
    """The bytes of a hint's file as an array (H, W, C).

    A picture is read by ``decode_picture``, on the ``ground`` of its kind (``annotators.grounds_of``); but 16 bits a
    sample stay, as uint16 with the channels it has. A ``.npy``
    file is (H, W) or (H, W, C): uint8 and uint16 as they are, True as 255, floats as float32. Raises ``Invalid`` for
    other whole numbers, as they have no largest value that they would be shares of, and for pickled objects.
    """
    if data.startswith(b"\x93NUMPY"):
        return _decode_array(data, name)
    picture = decode_picture(data, name, ground)  # raises if the file is damaged
    if not (data.startswith((b"II*\0", b"MM\0*")) or (data.startswith(b"\x89PNG") and data[24] == 16)):
        return picture
    deep = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)  # Pillow reads colours as 8 bits alone
    if deep is None or deep.dtype != np.uint16 or deep.shape[:2] != picture.shape[:2] or deep.shape[2:] == (4,):
        return picture  # with a mask, or on its side: as other pictures are
    return deep[..., None] if deep.ndim == 2 else np.ascontiguousarray(deep[..., ::-1])


def _decode_array(data: bytes, name: str) -> np.ndarray:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError, MemoryError) as error:
        raise Invalid(
            f"{name} cannot be read as an array ({one_line(error)}): expected a whole .npy file of numbers, as "
            "`numpy.save` writes it."
        ) from error
    if array.ndim not in (2, 3) or not array.size:
        shape = " x ".join(map(str, array.shape))
        raise Invalid(f"{name} has the shape {shape}: expected height x width, or height x width x channels.")
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype.kind == "f":
        array = array.astype(np.float32)
    elif array.dtype.kind != "u" or array.dtype.itemsize > 2:
        raise Invalid(
            f"{name} is an array of {array.dtype}: expected uint8 or uint16, which are shares of their largest value, "
            "or floats, which are taken as they are. Save it as one of them."
        )
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return array[..., None] if array.ndim == 2 else array


def sides_of(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) of the picture that ``decode_picture`` gives, read from the file's head; raises as it does."""
    try:
        with Image.open(io.BytesIO(data)) as opened:
            width, height = opened.size
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        height, width = decode_picture(data, name).shape[:2]  # raises, with the reason
        return height, width
    return (width, height) if turned else (height, width)


def picture_error(error: Exception) -> str:
    """PIL's reason why a file cannot be read, without the name of an object in memory."""
    return "of no known format" if isinstance(error, UnidentifiedImageError) else str(error)


def fit(picture: np.ndarray, size: tuple[int, int], how: Resize = "area") -> np.ndarray:
    """Scale to cover ``size`` (height, width) and crop the middle ("Crop and Resize" elsewhere).

    ``picture``: (H, W, 3), or a hint (H, W, C) of any number of channels and number format; the result has its format.
    Floats stay in the range of their channel.
    """
    height, width = size
    if picture.shape[:2] == (height, width):
        return picture
    if picture.shape[-1] > 4 and picture.ndim == 3:  # more than OpenCV takes at once
        return np.concatenate([fit(picture[..., k : k + 4], size, how) for k in range(0, picture.shape[-1], 4)], 2)
    given = picture
    scale = max(height / picture.shape[0], width / picture.shape[1])
    scaled = (max(round(picture.shape[1] * scale), width), max(round(picture.shape[0] * scale), height))
    if how == "lines" and scale < 1:  # the lightest value of each cell: the mean would turn a thin line grey
        span = math.ceil(1 / scale)
        picture = cv2.dilate(picture, np.ones((span, span), np.uint8))
    shrink, grow = (cv2.INTER_AREA, cv2.INTER_CUBIC) if how == "area" else (cv2.INTER_NEAREST,) * 2
    resized = cv2.resize(picture, scaled, interpolation=shrink if scale < 1 else grow)
    resized = resized.reshape(*resized.shape[:2], *given.shape[2:])  # OpenCV drops a single channel
    if given.dtype.kind == "f":  # as whole numbers cannot go beyond their type's
        resized = resized.clip(given.min((0, 1)), given.max((0, 1)))
    top, left = (scaled[1] - height) // 2, (scaled[0] - width) // 2
    return resized[top : top + height, left : left + width]


def to_tensor(pictures: Sequence[np.ndarray]) -> Tensor:
    """B pictures of one size, uint8 (H, W, 3), as one tensor (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_pictures(tensor: Tensor) -> list[np.ndarray]:
    """A tensor (B, 3, H, W) in [-1, 1] as uint8 pictures (H, W, 3)."""
    pixels = ((tensor.float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)
    return list(pixels.permute(0, 2, 3, 1).cpu().numpy())


def write_png(
    path: Path, picture: np.ndarray, settings: Mapping[str, Any] | None = None, colours: int | None = None
) -> None:
    """Write a picture, uint8 (H, W, 3) or (H, W, 4), as a PNG file, whole or not at all.

    ``settings``: written as JSON to the text field ``parameters``, where other tools look for them. ``colours``: the
    size of a palette (2 to 256), which makes a third of the bytes: for contact sheets in documents.
    """
    info = PngImagePlugin.PngInfo()
    if settings:
        info.add_text("parameters", json.dumps(settings))
    write_atomic(path, png_bytes(picture, info, colours))


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a PNG that ``write_png`` wrote; ``Invalid`` where it has none."""
    try:
        with Image.open(path, formats=["PNG"]) as opened:
            text = opened.text["parameters"]  # type: ignore[attr-defined]  # of PNG files alone
        settings = parse_json(text, "its text")
    except (UnidentifiedImageError, OSError, SyntaxError, KeyError, ValueError) as error:
        raise Invalid(
            f"{path} holds no settings ({one_line(error)}): expected a PNG as `generate` writes it."
        ) from error
    if not isinstance(settings, dict):
        raise Invalid(f"{path} holds a {type(settings).__name__} as settings: expected keys and values.")
    return settings


def png_bytes(picture: np.ndarray, info: PngImagePlugin.PngInfo | None = None, colours: int | None = None) -> bytes:
    """A picture, uint8 (H, W, 3) or (H, W, 4), as a PNG file's bytes; ``colours`` as in ``write_png``."""
    buffer = io.BytesIO()
    image = Image.fromarray(picture)
    (image.quantize(colours) if colours else image).save(buffer, "PNG", pnginfo=info, optimize=colours is not None)
    return buffer.getvalue()


def hint_bytes(hint: np.ndarray) -> tuple[str, bytes]:
    """(suffix, content) of a hint's file: ``.png`` where it is a picture, uint8 (H, W, 3 or 4), else ``.npy``."""
    if hint.dtype == np.uint8 and hint.shape[-1] in (3, 4):
        return ".png", png_bytes(hint)
    buffer = io.BytesIO()
    np.save(buffer, hint, allow_pickle=False)
    return ".npy", buffer.getvalue()


def grid(rows: Sequence[Sequence[np.ndarray]], labels: Sequence[str] = (), cell: int = 128) -> np.ndarray:
    """Lay out pictures in rows and columns, each scaled to fit a square of ``cell`` pixels, on white.

    Args:
        rows: uint8 pictures (H, W, 3) of any sizes; rows may have different lengths.
        labels: one above each column, cut where it is wider than the column; none by default.

    Returns:
        uint8 (R (cell + 4) + 4, C (cell + 4) + 4, 3) for R rows of at most C pictures; 20 pixels higher with labels.
    """
    columns = max(len(row) for row in rows)
    gap, head = 4, 20 if labels else 0
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, len(rows) * (cell + gap) + gap + head), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for column, label in enumerate(labels):
        while label and draw.textlength(label, font) > cell:
            label = label[:-2] + "…" if not label.endswith("…") else label[:-2].rstrip() + "…"
        draw.text((gap + column * (cell + gap), 4), label, "black", font)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            how = Image.Resampling.NEAREST if max(picture.shape[:2]) < cell else Image.Resampling.LANCZOS
            scaled = ImageOps.pad(Image.fromarray(picture), (cell, cell), how, color="white")
            sheet.paste(scaled, (gap + x * (cell + gap), head + gap + y * (cell + gap)))
    return np.asarray(sheet)
