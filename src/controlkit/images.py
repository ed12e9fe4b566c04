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
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from pydantic import TypeAdapter
from torch import Tensor

from controlkit.decoding import Ground, is_array, open_array, open_picture, read_bytes, settings_texts
from controlkit.errors import Invalid
from controlkit.files import parse_json, write_atomic

Resize = Literal["area", "lines", "nearest"]
Fitting = Literal["crop", "stretch", "fill"]
"""Ways to bring a picture to another shape: ``fit``, ``stretch``, and ``surround`` at its ``inner_size``."""

MOST_SIDE = 16_384
"""The longest side, in pixels, of a picture to be made."""

_MOST_SCALED = 1 << 25
"""Pixels that a picture is scaled to before its middle is cut out, where that has less than a quarter of them."""

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
    """Channels of the hint, 1 to 1024: 3 (RGB), 1 (grey), or any other number for hints that are arrays."""
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
        if not all(abs(number) <= 1e6 for number in numbers) or not 0 < spec.channels <= 1024:
            raise ValueError("a number of it is beyond 1,000,000, or its channels are not 1 to 1,024")
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

    Raises ``NotFound`` if there is no file, ``Invalid`` if it is no whole picture, or too large a one.
    """
    return decode_picture(read_bytes(path, f"picture at {path}: expected a PNG, JPEG or WebP file"), str(path), ground)


def decode_picture(data: bytes, name: str, ground: Ground = "white") -> np.ndarray:
    """The bytes of a picture file as ``read_picture`` gives them; ``name`` names them in errors."""
    return open_picture(data, name, ground).pixels


def read_hint(path: Path, ground: Ground = "black") -> np.ndarray:
    """A hint's file as ``decode_hint`` gives it; ``NotFound`` if there is none."""
    return decode_hint(read_bytes(path, f"hint at {path}: expected a PNG, JPEG, WebP or .npy file"), str(path), ground)


def decode_hint(data: bytes, name: str, ground: Ground = "black") -> np.ndarray:
    """The bytes of a hint's file as an array (H, W, C).

    A picture is read by ``decode_picture``, on the ``ground`` of its kind (``annotators.grounds_of``); but 16 bits a
    sample stay, as uint16 with the channels it has. A ``.npy`` file is (H, W) or (H, W, C): uint8 and uint16 as they
    are (but of uint8 a fourth channel is transparency, unless ``ground`` is None), True as 255, floats as float32.
    Raises ``Invalid`` for other whole numbers, as they have no largest value that they would be shares of, and for
    pickled objects.
    """
    return open_array(data, name, ground) if is_array(data) else open_picture(data, name, ground, deep=True).pixels


def fit(picture: np.ndarray, size: tuple[int, int], how: Resize = "area") -> np.ndarray:
    """Scale to cover ``size`` (height, width) and crop the middle ("Crop and Resize" elsewhere).

    ``picture``: (H, W, 3), or a hint (H, W, C) of any number of channels and number format; the result has its format.
    Floats stay in the range of their channel.
    """
    height, width = size
    if picture.shape[:2] == (height, width):
        return picture
    scale = max(height / picture.shape[0], width / picture.shape[1])
    if picture.shape[0] * scale * picture.shape[1] * scale > max(_MOST_SCALED, 4 * height * width):
        # Of a strip, nearly all would be made large only to be cut off: cut it first.
        keep = [math.ceil(side / scale) + 2 for side in size]
        top, left = (max((side - kept) // 2, 0) for side, kept in zip(picture.shape[:2], keep, strict=True))
        picture = picture[top : top + keep[0], left : left + keep[1]]
    covering = (max(round(picture.shape[0] * scale), height), max(round(picture.shape[1] * scale), width))
    resized = _scaled(picture, covering, how, (scale, scale))
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return resized[top : top + height, left : left + width]


def stretch(picture: np.ndarray, size: tuple[int, int], how: Resize = "area") -> np.ndarray:
    """Scale to ``size`` (height, width), whatever its shape ("Just Resize" elsewhere); pictures as for ``fit``."""
    if picture.shape[:2] == size:
        return picture
    return _scaled(picture, size, how, (size[0] / picture.shape[0], size[1] / picture.shape[1]))


def _scaled(picture: np.ndarray, size: tuple[int, int], how: Resize, scales: tuple[float, float]) -> np.ndarray:
    """A picture scaled to ``size`` (height, width) by nearly these factors."""
    if picture.ndim == 3 and picture.shape[-1] > 4:  # more than OpenCV takes at once
        parts = [picture[..., k : k + 4] for k in range(0, picture.shape[-1], 4)]
        return np.concatenate([_scaled(part, size, how, scales) for part in parts], 2)
    given = picture
    if how == "lines" and min(scales) < 1:  # the lightest value of each cell: the mean would turn a thin line grey
        picture = cv2.dilate(picture, np.ones([math.ceil(max(1 / scale, 1)) for scale in scales], np.uint8))
    shrink, grow = (cv2.INTER_AREA, cv2.INTER_CUBIC) if how == "area" else (cv2.INTER_NEAREST,) * 2
    resized = cv2.resize(picture, size[::-1], interpolation=shrink if scales[0] * scales[1] < 1 else grow)
    resized = resized.reshape(*resized.shape[:2], *given.shape[2:])  # OpenCV drops a single channel
    if given.dtype.kind == "f":  # as whole numbers cannot go beyond their type's
        resized = resized.clip(given.min((0, 1)), given.max((0, 1)))
    return resized


def inner_size(shape: Sequence[int], size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a picture of ``shape`` (H, W, ...) scaled to fit into ``size``, at least 1 pixel each."""
    scale = min(size[0] / shape[0], size[1] / shape[1])
    return max(round(shape[0] * scale), 1), max(round(shape[1] * scale), 1)


def surround(picture: np.ndarray, size: tuple[int, int], how: Resize = "area") -> np.ndarray:
    """A picture (H, W, C) in the middle of ``size`` (height, width), which it fits in ("Resize and Fill" elsewhere).

    The rest is what its border is mostly: the median of each channel, or the commonest value where values must not be
    mixed (``how`` is not ``area``); around a picture with a mask, uint8 (H, W, 4), it is masked.
    """
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    if picture.dtype == np.uint8 and picture.shape[-1] == 4:
        value = np.zeros(4, np.uint8)
    elif how == "area":
        value = np.median(border, 0)
    else:
        values, counts = np.unique(border, axis=0, return_counts=True)
        value = values[counts.argmax()]
    whole = np.empty((*size, picture.shape[-1]), picture.dtype)
    whole[:] = value.astype(picture.dtype)
    top, left = ((outer - inner) // 2 for outer, inner in zip(size, picture.shape[:2], strict=True))
    whole[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return whole


def to_tensor(pictures: Sequence[np.ndarray]) -> Tensor:
    """B pictures of one size, uint8 (H, W, 3), as one tensor (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_pictures(tensor: Tensor) -> list[np.ndarray]:
    """A tensor (B, 3, H, W) in [-1, 1] as uint8 pictures (H, W, 3)."""
    pixels = ((tensor.float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)
    return list(pixels.permute(0, 2, 3, 1).cpu().numpy())


def write_png(
    path: Path,
    picture: np.ndarray,
    settings: Mapping[str, Any] | None = None,
    colours: int | None = None,
    infotext: str = "",
) -> None:
    """Write a picture, uint8 (H, W, 3) or (H, W, 4), as a PNG file, whole or not at all.

    ``settings``: written as JSON to the text field ``controlkit``; ``infotext``: the same for people and other tools,
    which look for it in ``parameters``. ``colours``: the size of a palette (2 to 256), which makes a third of the
    bytes: for contact sheets in documents.
    """
    info = PngImagePlugin.PngInfo()
    if infotext:
        info.add_text("parameters", infotext)
    if settings:
        info.add_text("controlkit", json.dumps(settings))
    write_atomic(path, png_bytes(picture, info, colours))


def read_texts(path: Path) -> dict[str, str]:
    """The texts of settings in a PNG, by field: ``controlkit``, ``parameters``; ``Invalid`` where it has neither."""
    texts = settings_texts(read_bytes(path, f"picture at {path}: expected a PNG"), str(path))
    if not texts:
        raise Invalid(f"{path} holds no settings: expected a PNG as `generate` writes it.")
    return texts


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a PNG that ``write_png`` wrote; ``Invalid`` where it has none."""
    return settings_in(read_texts(path), path)


def settings_in(texts: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The settings in the ``read_texts`` of a PNG; older ones of ours are in ``parameters``. Raises ``Invalid``."""
    settings = parse_json(texts.get("controlkit") or texts["parameters"], f"the text in {path}")
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


def grid(
    rows: Sequence[Sequence[np.ndarray]],
    labels: Sequence[str] = (),
    cell: int = 128,
    row_labels: Sequence[str] = (),
) -> np.ndarray:
    """Lay out pictures in rows and columns, each scaled to fit a square of ``cell`` pixels, on white.

    Args:
        rows: uint8 pictures (H, W, 3) of any sizes; rows may have different lengths.
        labels: one above each column, cut where it is wider than the column; none by default.
        row_labels: one left of each row, in as many lines as there is room for, then cut; none by default.

    Returns:
        uint8 (R (cell + 4) + 4, C (cell + 4) + 4, 3) for R rows of at most C pictures; 20 pixels higher with labels,
        ``cell`` + 4 wider with those of rows.
    """
    columns = max(len(row) for row in rows)
    gap, head, left = 4, 20 if labels else 0, cell + 4 if row_labels else 0
    sheet = Image.new("RGB", (columns * (cell + gap) + gap + left, len(rows) * (cell + gap) + gap + head), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for column, label in enumerate(labels):
        draw.text((left + gap + column * (cell + gap), 4), _cut(label, cell, draw, font), "black", font)
    for y, label in enumerate(row_labels):
        lines = _broken(label, cell, cell // 16, draw, font)
        draw.multiline_text((gap, head + gap + y * (cell + gap)), "\n".join(lines), "black", font, spacing=2)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            how = Image.Resampling.NEAREST if max(picture.shape[:2]) < cell else Image.Resampling.LANCZOS
            scaled = ImageOps.pad(Image.fromarray(picture), (cell, cell), how, color="white")
            sheet.paste(scaled, (left + gap + x * (cell + gap), head + gap + y * (cell + gap)))
    return np.asarray(sheet)


def thumbnail(picture: np.ndarray, cell: int = 128) -> np.ndarray:
    """A picture, uint8 (H, W, 3), no larger than ``grid`` shows it: to be kept in the place of a large one."""
    if max(picture.shape[:2]) <= cell:
        return picture
    return np.asarray(ImageOps.contain(Image.fromarray(picture), (cell, cell), Image.Resampling.LANCZOS))


_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _cut(label: str, width: int, draw: ImageDraw.ImageDraw, font: _Font) -> str:
    """A label of one line, cut to so many pixels."""
    while label and draw.textlength(label, font) > width:
        label = label[:-2] + "…" if not label.endswith("…") else label[:-2].rstrip() + "…"
    return label


def _broken(label: str, width: int, most: int, draw: ImageDraw.ImageDraw, font: _Font) -> list[str]:
    """A label broken between words into at most ``most`` lines of so many pixels; what is left is cut."""
    lines: list[str] = []
    words = label.split()
    while words and len(lines) < most:
        count = 1
        while count < len(words) and draw.textlength(" ".join(words[: count + 1]), font) <= width:
            count += 1
        count = len(words) if len(lines) == most - 1 else count
        lines.append(_cut(" ".join(words[:count]), width, draw, font))
        words = words[count:]
    return lines
