"""Annotators of lines: light on a black ground. A picture in and a hint out, both uint8 RGB (H, W, 3).

They need OpenCV and numpy alone. Keywords are options; their annotations say the ranges.
"""

from typing import Annotated

import cv2
import numpy as np
from pydantic import Field

from controlkit.annotators.options import Slider
from controlkit.annotators.tiles import tiled

Level = Annotated[float, Field(ge=0, le=10_000), Slider(0, 255)]
"""A threshold in grey levels."""
Pen = Annotated[float, Field(gt=0, le=1), Slider(0.001, 0.1, 0.001)]
"""A line's width as a share of the short side."""
Share = Annotated[float, Field(gt=0, le=1)]
"""A share of the full contrast."""
Width = Annotated[float, Field(gt=0, le=1 / 16)]
"""A blur's width as a share of the short side; the work grows with it."""
Least = Annotated[float, Field(ge=0, le=1)]
"""A least share of the short side."""


def canny(picture: np.ndarray, low: Level = 100.0, high: Level = 200.0) -> np.ndarray:
    """Canny edges on the colour picture; thresholds in grey levels, by default the released annotator's 100 and 200."""
    return np.repeat(cv2.Canny(np.ascontiguousarray(picture), low, high)[..., None], 3, axis=2)


def scribble(picture: np.ndarray, width: Pen = 2 / 64, detail: Least = 0.12) -> np.ndarray:
    """A synthetic user scribble: the main outlines, straightened as a quick hand would, with a thick pen.

    The paper makes its scribbles from HED boundaries with random morphology; this needs no network: blurred Canny
    contours, short ones dropped, simplified to polygons. They are found in a picture of at most 128 pixels across: a
    gradient is the weaker the larger the picture, and a hand sees no more.

    Args:
        width: of the pen, as a share of the picture's short side.
        detail: contours whose extent is less than this share of the short side are left out.
    """
    side = min(_side(picture), 128)
    times = _side(picture) / side
    small = tuple(max(round(length / times), 1) for length in picture.shape[1::-1])
    seen = np.ascontiguousarray(picture) if times == 1 else cv2.resize(picture, small, interpolation=cv2.INTER_AREA)
    edges = cv2.Canny(cv2.GaussianBlur(seen, (0, 0), side / 64), 50, 120)
    contours, _ = cv2.findContours(edges, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    drawn = np.zeros(picture.shape[:2], np.uint8)
    for contour in contours:
        extent = np.ptp(contour.reshape(-1, 2), axis=0).max()
        if extent >= detail * side:
            strokes = (cv2.approxPolyDP(contour, 0.02 * side, True) + 0.5) * times - 0.5
            cv2.polylines(drawn, [strokes.round().astype(np.int32)], True, 255, max(round(width * _side(picture)), 1))
    return np.repeat(drawn[..., None], 3, axis=2)


def _side(picture: np.ndarray) -> int:
    return min(picture.shape[:2])


def _as_hint(light: np.ndarray) -> np.ndarray:
    """Values (H, W) in [0, 1] as a grey hint picture."""
    return np.repeat((255 * light).round().clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def softedge(picture: np.ndarray, width: Width = 1 / 128, strength: Share = 0.12) -> np.ndarray:
    """Soft boundaries, light on black, as HED's: the stronger and the larger an edge, the lighter and the wider.

    The released annotators (HED, PiDiNet) are networks; this needs none: the mean of the colour gradient at three
    scales, each twice the last, over that of the picture's strongest edges.

    Args:
        width: of the finest scale's blur, as a share of the short side.
        strength: edges weaker than this share of the full contrast never become white, so that noise is not drawn.
    """
    sigmas = [max(scale * width * _side(picture), 0.5) for scale in (1, 2, 4)]
    edges = tiled(lambda part: _slopes(part, sigmas), picture, 4 * sigmas[-1] + 2)
    white = max(float(np.quantile(edges, 0.98)), strength)
    return _as_hint((edges / white).clip(0, 1))


def _slopes(picture: np.ndarray, sigmas: list[float]) -> np.ndarray:
    """The colour gradient, float32 (H, W), averaged over blurs of these widths in pixels; about 1 at a full step."""
    colours = picture.astype(np.float32) / 255.0
    edges = np.zeros(picture.shape[:2], np.float32)
    for sigma in sigmas:
        soft = cv2.GaussianBlur(colours, (0, 0), sigma)
        slopes = [cv2.Sobel(soft, cv2.CV_32F, *axis, scale=1 / 8) for axis in ((1, 0), (0, 1))]
        # A step of height 1 has the slope 1 / (sigma sqrt(2 pi)) at its middle, once blurred.
        edges += np.sqrt(slopes[0] ** 2 + slopes[1] ** 2).max(-1) * sigma * np.sqrt(2 * np.pi) / len(sigmas)
    return edges


def lineart(picture: np.ndarray, width: Width = 1 / 200, contrast: Share = 0.01) -> np.ndarray:
    """A drawing in thin soft lines, light on black: where the picture is darker than what lies about it.

    A difference of Gaussians with a soft threshold, after XDoG (Winnemöller, Kyprianidis and Olsen, 2012), in the
    colour that changes most there; the released annotator is a network.

    Args:
        width: of the finer Gaussian, as a share of the short side.
        contrast: differences below this share of the full contrast are not drawn; four times it is a full line.
    """
    sigma = max(width * _side(picture), 0.5)
    span = 2 * int(np.ceil(2 * sigma)) + 1

    def drawn(part: np.ndarray) -> np.ndarray:
        colours = part.astype(np.float32) / 255.0
        fine, coarse = (cv2.GaussianBlur(colours, (0, 0), k * sigma) for k in (1.0, 1.6))
        darker = coarse - fine
        # One colour for both sides of an edge: where red falls and blue rises, each would draw its own line.
        decides = cv2.dilate(abs(darker), np.ones((span, span), np.uint8)).argmax(-1)
        darker = np.take_along_axis(darker, decides[..., None], 2)[..., 0]
        return _as_hint(((darker - contrast) / (3 * contrast)).clip(0, 1))

    return tiled(drawn, picture, 4 * 1.6 * sigma + span)


def lineart_standard(picture: np.ndarray, width: Width = 6 / 512, least: Share = 16 / 255) -> np.ndarray:
    """A drawing's own lines, soft and light on black: how much darker all its colours are than what lies about them.

    Half white is the middle strength of the lines that there are, as in the released programs' "standard" lines; for
    drawings in dark lines on a light ground.

    Args:
        width: of the blur that says what lies about, as a share of the short side.
        least: where lines are weaker than this share of the full contrast, this is half white.
    """
    sigma = max(width * _side(picture), 0.5)
    darker = tiled(lambda part: _darker(part, 0, sigma), picture, 4 * sigma + 1)
    lines = darker[darker > 8 / 255]
    middle = max(float(np.median(lines)), least) if lines.size else least
    return _as_hint((darker / middle / 2).clip(0, 1))


def xdog(picture: np.ndarray, width: Width = 5 / 512, contrast: Share = 16 / 255) -> np.ndarray:
    """A scribble, white on black: where all colours are darker than what lies about them.

    A difference of two Gaussians, the finer one a tenth as wide, and a hard threshold: XDoG's simplest form
    (Winnemöller, Kyprianidis and Olsen, 2012), as the scribble programs have it.

    Args:
        width: of the wider Gaussian, as a share of the short side.
        contrast: differences below this share of the full contrast are not drawn.
    """
    sigma = max(width * _side(picture), 0.5)
    darker = tiled(lambda part: _darker(part, sigma / 10, sigma), picture, 4 * sigma + 1)
    return _as_hint(darker > contrast)


def _darker(picture: np.ndarray, fine: float, coarse: float) -> np.ndarray:
    """How much darker, in the least of the colours, a pixel is than about it, float32 (H, W) in [0, 1].

    Both are seen through blurs of these widths in pixels; 0 is none.
    """
    colours = picture.astype(np.float32) / 255.0
    near = cv2.GaussianBlur(colours, (0, 0), fine) if fine else colours
    return (cv2.GaussianBlur(colours, (0, 0), coarse) - near).min(-1).clip(0, 1)


def mlsd(picture: np.ndarray, length: Least = 0.15, width: Pen = 1 / 128) -> np.ndarray:
    """Straight segments only, white on black, found by OpenCV's LSD; the released annotator, M-LSD, is a network.

    Args:
        length: segments shorter than this share of the short side are left out.
        width: of the drawn lines, as a share of the short side; at least one pixel.
    """
    drawn = np.zeros(picture.shape[:2], np.uint8)
    grey = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY)
    # A narrow tolerance of direction: the usual 22.5 degrees let the arcs of a circle pass as straight.
    found = cv2.createLineSegmentDetector(cv2.LSD_REFINE_STD, scale=1.0, ang_th=10.0).detect(grey)[0]
    for x0, y0, x1, y1 in () if found is None else found.reshape(-1, 4):
        if np.hypot(x1 - x0, y1 - y0) >= length * _side(picture):
            start, end = (round(float(x0)), round(float(y0))), (round(float(x1)), round(float(y1)))
            cv2.line(drawn, start, end, 255, max(round(width * _side(picture)), 1))
    return np.repeat(drawn[..., None], 3, axis=2)
