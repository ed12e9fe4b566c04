"""Annotators: a picture in, a hint out; both uint8 RGB arrays (H, W, 3), lines white on black.

Core annotators need OpenCV and numpy alone. An annotator is a plain function with its options as keywords; the
table ``ANNOTATORS`` says what each one's hints are, ``GIVEN`` what hints are that nothing here makes, and
``METRIC_OF`` how obedience to either is measured.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import cv2
import numpy as np

from controlkit.errors import UserError, nearest
from controlkit.images import HintSpec, Resize, fit
from controlkit.seeds import numpy_rng


def canny(picture: np.ndarray, low: float = 100, high: float = 200) -> np.ndarray:
    """Canny edges on the colour picture; thresholds in grey levels, by default the released annotator's 100 and 200."""
    return np.repeat(cv2.Canny(np.ascontiguousarray(picture), low, high)[..., None], 3, axis=2)


def scribble(picture: np.ndarray, width: float = 2 / 64, detail: float = 0.12) -> np.ndarray:
    """A synthetic user scribble: the main outlines, straightened as a quick hand would, with a thick pen.

    The paper makes its scribbles from HED boundaries with random morphology; this needs no network: blurred Canny
    contours, short ones dropped, simplified to polygons.

    Args:
        width: of the pen, as a share of the picture's short side.
        detail: contours whose extent is less than this share of the short side are left out.
    """
    side = min(picture.shape[:2])
    soft = cv2.GaussianBlur(np.ascontiguousarray(picture), (0, 0), side / 64)
    edges = cv2.Canny(soft, 50, 120)
    contours, _ = cv2.findContours(edges, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    drawn = np.zeros(picture.shape[:2], np.uint8)
    for contour in contours:
        extent = np.ptp(contour.reshape(-1, 2), axis=0).max()
        if extent >= detail * side:
            strokes = cv2.approxPolyDP(contour, 0.02 * side, True)
            cv2.polylines(drawn, [strokes], True, 255, max(round(width * side), 1))
    return np.repeat(drawn[..., None], 3, axis=2)


def _side(picture: np.ndarray) -> int:
    return min(picture.shape[:2])


def _as_hint(light: np.ndarray) -> np.ndarray:
    """Values (H, W) in [0, 1] as a grey hint picture."""
    return np.repeat((255 * light).round().clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def softedge(picture: np.ndarray, width: float = 1 / 128, strength: float = 0.12) -> np.ndarray:
    """Soft boundaries, light on black, as HED's: the stronger and the larger an edge, the lighter and the wider.

    The released annotators (HED, PiDiNet) are networks; this needs none: the mean of the colour gradient at three
    scales, each twice the last, over that of the picture's strongest edges.

    Args:
        width: of the finest scale's blur, as a share of the short side.
        strength: what is white is at least this share of the full contrast, so that of a picture without edges the
            noise is not drawn.
    """
    colours = picture.astype(np.float32) / 255.0
    edges = np.zeros(picture.shape[:2], np.float32)
    for scale in (1, 2, 4):
        sigma = max(scale * width * _side(picture), 0.5)
        soft = cv2.GaussianBlur(colours, (0, 0), sigma)
        slopes = [cv2.Sobel(soft, cv2.CV_32F, *axis, scale=1 / 8) for axis in ((1, 0), (0, 1))]
        # A step of height 1 has the slope 1 / (sigma sqrt(2 pi)) at its middle, once blurred.
        edges += np.sqrt(slopes[0] ** 2 + slopes[1] ** 2).max(-1) * sigma * np.sqrt(2 * np.pi) / 3
    white = max(float(np.quantile(edges, 0.98)), strength)
    return _as_hint((edges / white).clip(0, 1))


def lineart(picture: np.ndarray, width: float = 1 / 200, contrast: float = 0.01) -> np.ndarray:
    """A drawing in thin soft lines, light on black: where the picture is darker than what lies about it.

    A difference of Gaussians with a soft threshold, after XDoG (Winnemöller, Kyprianidis and Olsen, 2012), in the
    colour that changes most there; the released annotator is a network.

    Args:
        width: of the finer Gaussian, as a share of the short side.
        contrast: differences below this share of the full contrast are not drawn; four times it is a full line.
    """
    colours = picture.astype(np.float32) / 255.0
    sigma = max(width * _side(picture), 0.5)
    fine, coarse = (cv2.GaussianBlur(colours, (0, 0), k * sigma) for k in (1.0, 1.6))
    darker = coarse - fine
    # One colour for both sides of an edge: where red falls and blue rises, each would draw its own line.
    span = 2 * int(np.ceil(2 * sigma)) + 1
    decides = cv2.dilate(abs(darker), np.ones((span, span), np.uint8)).argmax(-1)
    darker = np.take_along_axis(darker, decides[..., None], 2)[..., 0]
    return _as_hint(((darker - contrast) / (3 * contrast)).clip(0, 1))


def mlsd(picture: np.ndarray, length: float = 0.15, width: float = 1 / 128) -> np.ndarray:
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


def tile(picture: np.ndarray, shrink: float = 8.0) -> np.ndarray:
    """The picture itself, low-passed: ``shrink`` times smaller, and grown back; 1 leaves it as it is."""
    if shrink < 1:
        raise UserError(f"tile's shrink is {shrink:g}: expected 1 (the picture as it is) or more.")
    height, width = picture.shape[:2]
    small = (max(round(width / shrink), 1), max(round(height / shrink), 1))
    if small == (width, height):
        return picture
    shrunk = cv2.resize(picture, small, interpolation=cv2.INTER_AREA)
    return cv2.resize(shrunk, (width, height), interpolation=cv2.INTER_CUBIC)


def inpaint(picture: np.ndarray, least: float = 0.1, most: float = 0.4) -> np.ndarray:
    """The picture with a hole, uint8 RGBA (H, W, 4): alpha 0 (and black) in the hole, 255 elsewhere.

    A picture that has a mask, (H, W, 4), keeps it. Else a hole is drawn that depends on the picture alone, so that it
    is the same whenever the picture comes: a box, an ellipse or one to three strokes of a thick brush.

    Args:
        least, most: the share of the picture the hole takes.
    """
    if picture.shape[-1] == 4:
        return picture
    if not 0 < least <= most < 1:
        raise UserError(f"inpaint's hole takes {least:g} to {most:g} of the picture: expected 0 < least <= most < 1.")
    content = hashlib.blake2b(picture.tobytes(), digest_size=16).hexdigest()
    hole = _hole(picture.shape[:2], numpy_rng("inpaint", *picture.shape, content), least, most)
    alpha = np.where(hole, 0, 255).astype(np.uint8)
    return np.dstack([np.where(hole[..., None], 0, picture), alpha]).astype(np.uint8)


def _hole(size: tuple[int, int], rng: np.random.Generator, least: float, most: float) -> np.ndarray:
    """A hole (H, W), boolean, of a share between ``least`` and ``most``, as nearly as whole pixels allow."""
    height, width = size
    hole = np.zeros(size, np.uint8)
    kind = ("box", "ellipse", "strokes")[rng.integers(3)]
    if kind == "strokes":
        thick = max(round(rng.uniform(0.08, 0.16) * min(size)), 1)
        # A last dab, a disc and a half of the brush, goes beyond the share at which it was due.
        share = rng.uniform(least, max(most - 1.5 * thick**2 / (height * width), least))
        count = rng.integers(1, 4)
        for stroke in range(1, count + 1):
            at, heading = rng.uniform((0, 0), (width, height)), rng.uniform(0, 2 * np.pi)
            while hole.mean() < share * stroke / count:
                heading += rng.normal(0, 0.5)
                step = at + thick / 2 * np.array([np.cos(heading), np.sin(heading)])
                if ((step < 0) | (step >= (width, height))).any():  # turn back at the margin
                    heading += np.pi / 2
                    continue
                cv2.line(hole, (int(at[0]), int(at[1])), (int(step[0]), int(step[1])), 1, thick)
                at = step
        return hole > 0
    share, aspect = rng.uniform(least, most), 2 ** rng.uniform(-0.5, 0.5)
    part = share if kind == "box" else min(share * 4 / np.pi, 1.0)  # of the box about it
    across = np.clip(np.sqrt(part * aspect), part, 1.0)
    down = part / across
    left, top = rng.uniform(0, 1 - across) * width, rng.uniform(0, 1 - down) * height
    y, x = np.mgrid[:height, :width] + 0.5
    u, v = (x - left) / (across * width), (y - top) / (down * height)
    inside = (abs(u - 0.5) < 0.5) & (abs(v - 0.5) < 0.5)
    return inside if kind == "box" else (u - 0.5) ** 2 + (v - 0.5) ** 2 < 0.25


@dataclass(frozen=True)
class Annotator:
    """An annotator's function, its default options, and the rest of its hints' contract."""

    name: str
    function: Callable[..., np.ndarray]
    options: Mapping[str, float]
    resize: Resize = "lines"
    mask_value: float | None = None

    def hint(self, **options: float) -> HintSpec:
        """The contract of the hints it makes with these options."""
        for key in options:
            if key not in self.options:
                raise UserError(f'{self.name} has no option "{key}": {nearest(key, self.options)}')
        return HintSpec(self.name, {**self.options, **options}, mask_value=self.mask_value, resize=self.resize)


ANNOTATORS = {
    a.name: a
    for a in (
        Annotator("canny", canny, {"low": 100.0, "high": 200.0}),
        Annotator("scribble", scribble, {"width": 2 / 64, "detail": 0.12}),
        Annotator("softedge", softedge, {"width": 1 / 128, "strength": 0.12}, resize="area"),
        Annotator("lineart", lineart, {"width": 1 / 200, "contrast": 0.01}),
        Annotator("mlsd", mlsd, {"length": 0.15, "width": 1 / 128}),
        Annotator("tile", tile, {"shrink": 8.0}, resize="area"),
        Annotator("inpaint", inpaint, {"least": 0.1, "most": 0.4}, resize="area", mask_value=-1.0),
    )
}


def annotator(name: str) -> Annotator:
    """The annotator of that name; ``UserError`` for an unknown one."""
    if name not in ANNOTATORS:
        if not name:
            raise UserError(f"No annotator of these hints is named: expected one of {', '.join(ANNOTATORS)}.")
        raise UserError(f'There is no annotator "{name}": {nearest(name, ANNOTATORS)}')
    return ANNOTATORS[name]


GIVEN = {
    "": HintSpec(""),
    "tile": HintSpec("tile", {"shrink": 1.0}),
    **{name: HintSpec(name) for name in ("ip2p", "shuffle", "depth", "normal", "hed", "pidi", "ted")},
    **{name: HintSpec(name, resize="nearest") for name in ("seg", "pose", "openpose")},
    "repaint": HintSpec("repaint", mask_value=0.0),
}
"""Contracts of hints that are given as they are, as what some other tool drew. For ip2p and shuffle the picture itself,
for a Union's repaint too, masked with black where it is transparent. For tile as well: a tile control from elsewhere
reads a picture as it is, while one trained here says in its contract by how much its hints were shrunk."""

METRIC_OF = {
    **dict.fromkeys(("canny", "scribble"), "edge_f1"),
    **dict.fromkeys(("softedge", "hed", "pidi", "ted", "lineart", "mlsd"), "ms_ssim"),
    "depth": "depth_rmse",
    "normal": "normal_angle",
    "seg": "miou",
    **dict.fromkeys(("pose", "openpose"), "pck"),
    **dict.fromkeys(("inpaint", "repaint"), "inpaint_distance"),
    "tile": "low_pass_psnr",
}
"""Hints -> the metric (of ``measure.METRICS``) of obedience to them, whether or not anything here makes them."""


def contract(name: str) -> HintSpec:
    """The contract of hints of that name: of hints that are given, or of an annotator's.

    Of ``canny+depth``, that of two hints as channels of one.
    """
    if "+" in name:
        return joined(name.split("+"))
    if name not in ANNOTATORS and name not in GIVEN:
        raise UserError(f'There are no hints named "{name}": {nearest(name, {*ANNOTATORS, *filter(None, GIVEN)})}')
    return GIVEN[name] if name in GIVEN else ANNOTATORS[name].hint()


def joined(names: Sequence[str]) -> HintSpec:
    """The contract of several hints that are channels of one, three of each, in this order."""
    parts = [contract(name) for name in names]
    if masked := [part.annotator for part in parts if part.mask_value is not None]:
        raise UserError(f"Hints of {masked[0]} have masks and cannot be channels beside others.")
    return HintSpec("+".join(names), channels=3 * len(parts))


def parts_of(hint: HintSpec) -> list[HintSpec]:
    """The contracts of the hints that are this one's channels, in order; of a hint by itself, its own alone."""
    names = hint.annotator.split("+")
    return [replace(contract(name), low=hint.low, high=hint.high) for name in names] if len(names) > 1 else [hint]


@cache
def edition() -> str:
    """A digest of what makes hints here, this file and OpenCV's version: equal ones make the same of a picture."""
    return hashlib.sha256(Path(__file__).read_bytes() + cv2.__version__.encode()).hexdigest()


def annotate(picture: np.ndarray, hint: HintSpec, size: tuple[int, int] | None = None) -> np.ndarray:
    """Annotate a picture as a hint's contract says.

    Give the ``size`` (height, width) of the picture to be made for a picture of another size: it is brought to that
    size first, as training did. Lines found at one size and shrunk to another are not the lines found there. Hints that
    nothing makes are the picture itself; and so is one for inpainting that has a mask, uint8 (H, W, 4).
    """
    if len(parts := parts_of(hint)) > 1:
        if given := [part.annotator for part in parts if part.annotator not in ANNOTATORS]:
            raise UserError(
                f'Nothing here makes hints of "{given[0]}" of a picture: give those of {hint.annotator} as one '
                f".npy file, (height, width, {hint.channels})."
            )
        return np.concatenate([annotate(picture, part, size) for part in parts], 2)
    made = hint.annotator in ANNOTATORS or hint.annotator not in GIVEN
    if size:
        picture = fit(picture, size) if made else fit(picture, size, hint.resize)
    return annotator(hint.annotator).function(picture, **hint.options) if made else picture


def white_on_black(lines: np.ndarray) -> np.ndarray:
    """A line drawing as a hint of lines: one drawn dark on light paper is inverted."""
    return 255 - lines if lines.mean() > 127 else lines


def drawn_hint(drawing: np.ndarray, hint: HintSpec, size: tuple[int, int]) -> np.ndarray:
    """A drawing that is a hint already, at the ``size`` (height, width) of the picture to be made.

    Lines drawn dark on light paper are inverted, as lines in hints are light on dark. Arrays are taken as they are.
    """
    drawn = hint.resize == "lines" and drawing.dtype == np.uint8
    return fit(white_on_black(drawing) if drawn else drawing, size, hint.resize)
