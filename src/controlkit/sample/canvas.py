"""Pictures that are changed: brought to the base's size with their masks, and pasted back where they were."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from controlkit.backbones import Backbone
from controlkit.errors import Invalid
from controlkit.images import (
    Fitting,
    Resize,
    decode_picture,
    fit,
    inner_size,
    png_bytes,
    read_picture,
    stretch,
    surround,
)
from controlkit.sample.request import EditRequest, HintSource

_MOST_PIXELS = 1 << 26
"""Of a picture with what is outpainted."""
Box = tuple[int, int, int, int]
"""Top, left, bottom and right of a part of a picture, in pixels; the last two are beyond it."""


@dataclass(frozen=True, eq=False)
class Canvas:
    """A picture to be changed, as the base sees it, and what it becomes a part of."""

    pixels: np.ndarray
    """uint8 (H, W, 3), at the size of the picture to be made."""
    strength: float
    """The share of the steps that are made, 0 to 1."""
    mask: np.ndarray | None = None
    """bool (H, W): what is made anew; None is all, softly, by ``strength``."""
    whole: np.ndarray | None = None
    """uint8 (H', W', 3): the picture that the result is pasted into; None where the result is all of it."""
    cover: np.ndarray | None = None
    """float32 (H', W', 1) in [0, 1]: how far the result covers ``whole``."""
    box: Box | None = None
    """The part of ``whole`` that ``pixels`` shows; None is all of it."""

    def finished(self, made: np.ndarray) -> np.ndarray:
        """The whole picture with what was made, uint8 (H, W, 3), pasted in; where ``cover`` is 0 it is as it was."""
        if self.whole is None or self.cover is None:
            return made
        top, left, bottom, right = self.box or (0, 0, *self.whole.shape[:2])
        laid = self.whole.copy()
        old, share = laid[top:bottom, left:right], self.cover[top:bottom, left:right]
        new = stretch(made, old.shape[:2])
        laid[top:bottom, left:right] = np.rint(old + share * (new.astype(np.float32) - old)).astype(np.uint8)
        return laid

    def hint_picture(self) -> np.ndarray:
        """It as the picture of a hint with a mask, uint8 (H, W, 4): transparent where it is made anew."""
        seen = np.ones(self.pixels.shape[:2], bool) if self.mask is None else ~self.mask
        return np.dstack([self.pixels, np.uint8(255) * seen])

    def part_of(self, picture: np.ndarray, how: Resize, fitting: Fitting) -> np.ndarray:
        """The part of another picture (H, W, C) of the same scene that lies where ``pixels`` lies in the whole one."""
        if self.whole is None or self.box is None:
            return picture
        top, left, bottom, right = self.box
        return fitted(picture, self.whole.shape[:2], how, fitting)[top:bottom, left:right]


def fitted(picture: np.ndarray, size: tuple[int, int], how: Resize, fitting: Fitting) -> np.ndarray:
    """A picture (H, W, C) brought to ``size`` (height, width)."""
    if fitting == "fill":
        return surround(stretch(picture, inner_size(picture.shape, size), how), size, how)
    return (stretch if fitting == "stretch" else fit)(picture, size, how)


def read_source(source: HintSource, ground: str | None, name: str = "the picture") -> np.ndarray:
    """A picture of a request, uint8 (H, W, 3), or (H, W, 4) where ``ground``, what lies under it, is None."""
    if isinstance(source, Path):
        return read_picture(source, ground)
    if source.dtype != np.uint8 or source.shape[-1] not in (3, 4):
        shape = " x ".join(map(str, source.shape))
        raise Invalid(f"Got {shape} of {source.dtype} for {name}; expected a file, or uint8 (height, width, 3 or 4).")
    return decode_picture(png_bytes(np.ascontiguousarray(source)), name, ground)


def light_of(source: HintSource, name: str) -> np.ndarray:
    """A picture's light, uint8 (H, W): 255 where it is white; 0 where it is black or transparent."""
    return read_source(source, "black", name).max(-1)


def canvas_of(edit: EditRequest, base: Backbone, size: tuple[int, int] | None) -> Canvas:
    """The picture of a request, to be changed at a size (height, width); None is its shape at the base's own size.

    Raises ``NotFound`` and ``Invalid`` for its files, for a mask of another shape, and for one that masks nothing.
    """
    pixels, mask = _with_mask(edit)
    pixels, mask = _outpainted(pixels, mask, edit.outpaint)
    if edit.resize == "fill" and size:
        inner = inner_size(pixels.shape, size)
        above, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
        pixels, mask = stretch(pixels, inner), None if mask is None else stretch(mask[..., None], inner)[..., 0]
        sides = above, size[1] - inner[1] - left, size[0] - inner[0] - above, left
        pixels, mask = _outpainted(pixels, mask, sides)
    if edit.margin is not None:
        if mask is None:
            raise Invalid("A margin is around what is masked: give a mask, too.")
        return _part(pixels, mask, edit, base, size)
    size = size or shape_on(base, pixels.shape)
    bring = stretch if edit.resize == "stretch" else fit
    if mask is None:
        return Canvas(bring(pixels, size), 0.75 if edit.strength is None else edit.strength)
    return _masked(bring(pixels, size), bring(mask[..., None], size)[..., 0], edit)


def check_edit(edit: EditRequest) -> None:
    """Raise what ``canvas_of`` would of the files; needs no base."""
    _with_mask(edit)


def _with_mask(edit: EditRequest) -> tuple[np.ndarray, np.ndarray | None]:
    """The picture, uint8 (H, W, 3), and its mask, uint8 (H, W), light where it is made anew; None where it has none."""
    # What lies under transparent places is nobody's picture: controls would read it, and strength 0 show it.
    pixels = read_source(edit.image, "white", "the picture to be changed")
    if edit.mask is None:
        seen = read_source(edit.image, None, "the picture to be changed")[..., 3]
        return pixels, 255 - seen if seen.min() < 128 else None
    mask = light_of(edit.mask, "the mask")
    (height, width), (tall, wide) = pixels.shape[:2], mask.shape
    if abs(height * wide - width * tall) > 0.02 * height * wide:
        raise Invalid(f"The mask is {wide}x{tall} and the picture {width}x{height}: expected one shape.")
    return pixels, stretch(mask[..., None], (height, width))[..., 0]


def _outpainted(
    pixels: np.ndarray, mask: np.ndarray | None, sides: tuple[int, int, int, int]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Both with so many pixels added above, right, below and left, masked."""
    if not any(sides):
        return pixels, mask
    top, right, bottom, left = sides
    height, width = pixels.shape[0] + top + bottom, pixels.shape[1] + left + right
    if height * width > _MOST_PIXELS:
        raise Invalid(f"Outpainted, the picture has {width}x{height} pixels: expected at most {_MOST_PIXELS:,}.")
    around = ((top, bottom), (left, right))
    mask = np.zeros(pixels.shape[:2], np.uint8) if mask is None else mask
    return np.pad(pixels, (*around, (0, 0)), "edge"), np.pad(mask, around, constant_values=255)


def shape_on(base: Backbone, shape: tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of a picture of this shape on a base: the shorter side its own, the longer at most twice that."""
    short = min(shape[:2])
    sides = [min(base.size * side / short, 2 * base.size) for side in shape[:2]]
    height, width = (max(round(side / base.multiple), 1) * base.multiple for side in sides)
    return height, width


def _masked(pixels: np.ndarray, mask: np.ndarray, edit: EditRequest) -> Canvas:
    """A canvas of a picture with its mask, uint8 (H, W), at one size."""
    anew = mask > 127
    if not anew.any():
        raise Invalid("The mask shows nothing that is to be made anew: expected light pixels where it is.")
    cover = _softened(anew, edit.blur)
    anew = cover[..., 0] > 0
    strength = 1.0 if edit.strength is None else edit.strength
    worked_on = _filled(pixels, anew) if edit.fill else pixels
    return Canvas(worked_on, strength, anew, pixels, cover)


def _part(
    pixels: np.ndarray, mask: np.ndarray, edit: EditRequest, base: Backbone, size: tuple[int, int] | None
) -> Canvas:
    """A canvas of what is masked and the margin around it, at the request's size; or its own shape on the base."""
    if not (mask > 127).any():
        raise Invalid("The mask shows nothing that is to be made anew: expected light pixels where it is.")
    top, left, bottom, right = _box_around(mask > 127, edit.margin or 0)
    size = size or shape_on(base, (bottom - top, right - left))
    top, left, bottom, right = box = _grown((top, left, bottom, right), size, mask.shape)
    whole = _masked(pixels, mask, edit)
    assert whole.mask is not None
    shown = stretch(whole.pixels[top:bottom, left:right], size)
    anew = stretch(np.uint8(255) * whole.mask[top:bottom, left:right, None], size)[..., 0] > 0
    return Canvas(shown, whole.strength, anew, pixels, whole.cover, box)


def _box_around(anew: np.ndarray, margin: int) -> Box:
    """The box of what is masked, bool (H, W), with a margin, as far as the picture goes."""
    rows, columns = (np.flatnonzero(anew.any(1 - axis)) for axis in (0, 1))
    bottom, right = (min(int(at[-1]) + 1 + margin, most) for at, most in zip((rows, columns), anew.shape, strict=True))
    return max(int(rows[0]) - margin, 0), max(int(columns[0]) - margin, 0), bottom, right


def _grown(box: Box, size: tuple[int, int], shape: tuple[int, ...]) -> Box:
    """A box grown to the shape of ``size``, as far as a picture of ``shape`` goes."""
    lows, highs = list(box[:2]), list(box[2:])
    unit = max((high - low) / side for low, high, side in zip(lows, highs, size, strict=True))
    for axis, most in enumerate(shape):
        wanted = max(min(round(unit * size[axis]), most), highs[axis] - lows[axis])
        lows[axis] = min(max(lows[axis] - (wanted - highs[axis] + lows[axis]) // 2, 0), most - wanted)
        highs[axis] = lows[axis] + wanted
    return lows[0], lows[1], highs[0], highs[1]


def _softened(anew: np.ndarray, blur: int) -> np.ndarray:
    """How far the result covers the picture, float32 (H, W, 1): 1 where it is anew, 0 from ``blur`` pixels on."""
    if not blur:
        return anew[..., None].astype(np.float32)
    away = cv2.distanceTransform(np.uint8(~anew), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.clip(1 - away / (blur + 1), 0, 1)[..., None].astype(np.float32)


_FILLED_AT = 256
"""The longest side, in pixels, at which masked places are filled: only soft colours are wanted."""


def _filled(pixels: np.ndarray, anew: np.ndarray) -> np.ndarray:
    """The picture with what is masked in the colours around it."""
    share = min(1.0, _FILLED_AT / max(anew.shape))
    small = (max(round(anew.shape[0] * share), 1), max(round(anew.shape[1] * share), 1))
    hole = np.uint8(stretch(np.uint8(255) * anew[..., None], small)[..., 0] > 0)
    if hole.all():
        return pixels
    filled = cv2.inpaint(np.ascontiguousarray(stretch(pixels, small)), hole, 3, cv2.INPAINT_TELEA)
    return np.where(anew[..., None], stretch(filled, anew.shape[:2]), pixels)
