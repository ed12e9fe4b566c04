"""Pixels, their ranges, and the hint's contract.

Pictures on this side of a file are uint8 arrays (H, W, 3), RGB, 0-255. Tensors of pictures are float (B, 3, H, W)
in [-1, 1]; tensors of hints are in the range their ``HintSpec`` says. Conversions happen here and nowhere else.

Hints are pictures, too, or arrays (H, W, C) of any number of channels: uint8 and uint16 are shares of their type's
largest value; float32 are values in the range of the ``HintSpec`` already.
"""

import errno
import io
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from safetensors import SafetensorError
from torch import Tensor

from controlkit.errors import UserError, one_line

Resize = Literal["area", "lines", "nearest"]

DEEPEST = {"uint8": 255.0, "uint16": 65535.0}
"""The largest value of each type of whole numbers that hints may have."""

SCRATCH = ".writing-"
"""What the name of a file or folder begins with until it is whole and renamed."""


@dataclass(frozen=True)
class HintSpec:
    """The contract of a hint: everything that must be equal in training and in generation.

    It is stored with the weights, and ``tensor`` is the one place where it is applied.
    """

    annotator: str
    """Name of the annotator that made the hints, e.g. ``canny``."""
    options: Mapping[str, float] = field(default_factory=dict)
    """The annotator's options, e.g. ``{"low": 100, "high": 200}``."""
    channels: int = 3
    """Channels of the hint: 3 (RGB), 1 (grey), or any other number, of hints that are arrays."""
    low: float = 0.0
    high: float = 1.0
    """The range that 0-255, or 0-65535, is mapped to, and in which floats must lie."""
    colour_order: Literal["RGB", "BGR"] = "RGB"
    mask_value: float | None = None
    """The value of what is masked (transparent in its picture), where hints have masks: -1 for inpainting."""
    resize: Resize = "area"
    """How a hint is brought to the picture's size: ``area`` for soft maps, ``lines`` (white on black; a thin one must
    not fade when it shrinks), ``nearest`` for labels."""

    def to_json(self) -> str:
        """The contract as JSON, for a weights file's metadata."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "HintSpec":
        """The contract ``to_json`` wrote."""
        return cls(**json.loads(text))

    def made_by(self, made: "HintSpec") -> "HintSpec":
        """This contract, of hints made as ``made`` says; what weights learnt stays: range, channels, colour order."""
        return replace(
            self, annotator=made.annotator, options=made.options, mask_value=made.mask_value, resize=made.resize
        )

    def fault(self, hint: np.ndarray) -> str | None:
        """What of a hint is not as this contract says, in words; None if nothing is."""
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
        """Whether its fourth channel is a mask."""
        return hint.shape[-1] == 4 and hint.dtype == np.uint8 and self.channels in (1, 3)

    def tensor(self, hint: np.ndarray, size: tuple[int, int]) -> Tensor:
        """A hint as the branch reads it: (1, channels, *size), values in [low, high], masked ones ``mask_value``.

        The hint is a picture, uint8 (H, W, 3), or (H, W, 4) where hints have masks: what is transparent is masked; or
        an array (H, W, channels) of uint8, uint16 or float32. One channel serves a contract of three, repeated, and
        three serve one of one, as their grey. Whole numbers are shares of their type's largest value and are mapped to
        [low, high]; floats are taken as they are. ``UserError`` for anything else, floats outside the range among them.
        """
        if words := self.fault(hint):
            raise UserError(f"The hint {words}.")
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
        """A hint's values in [low, high], float32, a new array of its shape."""
        if hint.dtype.name not in DEEPEST:
            return hint.astype(np.float32)
        return hint.astype(np.float32) / DEEPEST[hint.dtype.name] * (self.high - self.low) + self.low

    def picture(self, hint: np.ndarray) -> np.ndarray:
        """A hint to be looked at, uint8 (H, W, 3), or (H, W, 4) with its mask: its first three channels, low black."""
        if hint.dtype == np.uint8 and (hint.shape[-1] == 3 or self._masks(hint)):
            return hint
        light = (self.values(hint[..., :3]) - self.low) / ((self.high - self.low) or 1)
        lacking = 3 - light.shape[-1]
        light = light.repeat(3, 2) if lacking == 2 else np.pad(light, ((0, 0), (0, 0), (0, lacking)))
        return (255 * np.nan_to_num(light.clip(0, 1))).round().astype(np.uint8)


def read_picture(path: Path, masked: bool = False) -> np.ndarray:
    """A picture file as uint8 RGB (H, W, 3); transparency is laid on white, camera rotation applied.

    ``masked``: keep transparency, as a mask, in a fourth channel (H, W, 4).
    """
    if not path.is_file():
        raise UserError(f"There is no picture at {path}: expected a PNG, JPEG or WebP file.")
    return decode_picture(path.read_bytes(), str(path), masked)


def decode_picture(data: bytes, name: str, masked: bool = False) -> np.ndarray:
    """The bytes of a picture file as ``read_picture`` gives them; ``name`` says in errors where they come from."""
    try:
        with Image.open(io.BytesIO(data)) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I;16"):  # PIL's own conversion clips instead of scaling
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            if picture.mode in ("I", "F"):  # such as depth in millimetres; clipping would ruin it
                raise ValueError(f"its samples are of mode {picture.mode}, 32 bits, without a range")
            if picture.mode in ("RGBA", "LA", "P", "PA") or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                picture = picture if masked else Image.alpha_composite(white, picture)
            if masked:
                return np.asarray(picture.convert("RGBA"))
            return np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "the file is empty" if not data else picture_error(error)
        raise UserError(
            f"{name} cannot be read as a picture ({reason}): expected a whole PNG, JPEG or WebP file, 8 or 16 bits."
        ) from error


def read_hint(path: Path, masked: bool = False) -> np.ndarray:
    """A hint's file as ``decode_hint`` gives it."""
    if not path.is_file():
        raise UserError(f"There is no hint at {path}: expected a PNG, JPEG, WebP or .npy file.")
    return decode_hint(path.read_bytes(), str(path), masked)


def decode_hint(data: bytes, name: str, masked: bool = False) -> np.ndarray:
    """The bytes of a hint's file as an array (H, W, C).

    Of a picture, what ``decode_picture`` gives; but 16 bits a sample are kept, as uint16 with the channels it has. Of a
    ``.npy`` file (H, W) or (H, W, C): uint8 and uint16 as they are, True as 255, floats as float32. Other whole numbers
    are refused, as they have no largest value that they would be shares of; so is anything that would be unpickled.
    """
    if data.startswith(b"\x93NUMPY"):
        return _decode_array(data, name)
    picture = decode_picture(data, name, masked)  # it says what is wrong with a file
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
        raise UserError(
            f"{name} cannot be read as an array ({one_line(error)}): expected a whole .npy file of numbers, as "
            "`numpy.save` writes it."
        ) from error
    if array.ndim not in (2, 3) or not array.size:
        shape = " x ".join(map(str, array.shape))
        raise UserError(f"{name} has the shape {shape}: expected height x width, or height x width x channels.")
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype.kind == "f":
        array = array.astype(np.float32)
    elif array.dtype.kind != "u" or array.dtype.itemsize > 2:
        raise UserError(
            f"{name} is an array of {array.dtype}: expected uint8 or uint16, which are shares of their largest value, "
            "or floats, which are taken as they are. Save it as one of them."
        )
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return array[..., None] if array.ndim == 2 else array


def sides_of(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) of the picture that ``decode_picture`` would give, told from the file's head."""
    try:
        with Image.open(io.BytesIO(data)) as opened:
            width, height = opened.size
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        height, width = decode_picture(data, name).shape[:2]  # says what is wrong with it
        return height, width
    return (width, height) if turned else (height, width)


def picture_error(error: Exception) -> str:
    """What PIL says is wrong with a file, without the name of an object in memory."""
    return "of no format that is known" if isinstance(error, UnidentifiedImageError) else str(error)


def fit(picture: np.ndarray, size: tuple[int, int], how: Resize = "area") -> np.ndarray:
    """Scale to cover ``size`` (height, width) and crop the middle ("Crop and Resize" elsewhere).

    Of a picture, or of a hint (H, W, C) of any number of channels. No float goes beyond those of its channel.
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
    """uint8 pictures (H, W, 3) as one tensor (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_pictures(tensor: Tensor) -> list[np.ndarray]:
    """A tensor (B, 3, H, W) in [-1, 1] as uint8 pictures (H, W, 3)."""
    pixels = ((tensor.float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)
    return list(pixels.permute(0, 2, 3, 1).cpu().numpy())


def write_atomic(path: Path, data: bytes | Callable[[Path], None]) -> None:
    """Write a file whole or not at all: to a neighbour first, then renamed over the target.

    ``data`` is what to write, or, for what is too large to be held twice, a function that writes it to a path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.parent / f"{SCRATCH}{uuid.uuid4().hex}"  # not mkstemp: its files are readable by their owner alone
    try:
        if callable(data):
            scratch.touch(exist_ok=False)
            mode = scratch.stat().st_mode  # the writer may make the file anew, for its owner alone
            try:
                data(scratch)
            except SafetensorError as error:  # which is what its writer makes of a full disk, too
                full = shutil.disk_usage(path.parent).free < 1 << 20
                raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from error
            scratch.chmod(mode)
        with scratch.open("ab") as file:
            if isinstance(data, bytes):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_png(
    path: Path, picture: np.ndarray, settings: Mapping[str, Any] | None = None, colours: int | None = None
) -> None:
    """Write a PNG, with its settings as JSON in the text field ``parameters`` (where other tools look for them).

    ``colours``: with a palette of so many (2 to 256), a third of the size: for contact sheets that documents keep.
    """
    info = PngImagePlugin.PngInfo()
    if settings:
        info.add_text("parameters", json.dumps(settings))
    write_atomic(path, png_bytes(picture, info, colours))


def png_bytes(picture: np.ndarray, info: PngImagePlugin.PngInfo | None = None, colours: int | None = None) -> bytes:
    """A picture, uint8 (H, W, 3) or (H, W, 4), as a PNG file's bytes."""
    buffer = io.BytesIO()
    image = Image.fromarray(picture)
    (image.quantize(colours) if colours else image).save(buffer, "PNG", pnginfo=info, optimize=colours is not None)
    return buffer.getvalue()


def grid(rows: Sequence[Sequence[np.ndarray]], labels: Sequence[str] = (), cell: int = 128) -> np.ndarray:
    """Pictures side by side, each scaled to fit a square of ``cell`` pixels, with a label above each column."""
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
