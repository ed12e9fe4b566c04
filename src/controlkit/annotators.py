"""Annotators: a picture in, a hint out; both uint8 RGB arrays (H, W, 3), lines white on black.

Core annotators need OpenCV and numpy alone. An annotator is a plain function with its options as keywords; the
table ``ANNOTATORS`` says what each one's hints are and how obedience to them is measured.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import cv2
import numpy as np

from controlkit.errors import UserError, nearest
from controlkit.images import Hint, fit


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


@dataclass(frozen=True)
class Annotator:
    """An annotator's function, its default options and the metric of obedience to its hints."""

    name: str
    function: Callable[..., np.ndarray]
    options: Mapping[str, float]
    metric: str

    def hint(self, **options: float) -> Hint:
        """The contract of the hints it makes with these options."""
        for key in options:
            if key not in self.options:
                raise UserError(f'{self.name} has no option "{key}": {nearest(key, self.options)}')
        return Hint(self.name, {**self.options, **options}, resize="lines")


ANNOTATORS = {
    a.name: a
    for a in (
        Annotator("canny", canny, {"low": 100.0, "high": 200.0}, "edge_f1"),
        Annotator("scribble", scribble, {"width": 2 / 64, "detail": 0.12}, "edge_f1"),
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
    "": Hint(""),
    "inpaint": Hint("inpaint", mark=-1.0),
    **{name: Hint(name) for name in ("tile", "ip2p", "shuffle", "depth", "normal", "softedge", "hed", "pidi", "ted")},
    **{name: Hint(name, resize="lines") for name in ("lineart", "mlsd")},
    **{name: Hint(name, resize="nearest") for name in ("seg", "pose", "openpose")},
    "repaint": Hint("repaint", mark=0.0),
}
"""Contracts of hints that nothing here makes: given as they are. For inpainting the picture, masked where transparent
(a Union's repaint: with black); for tile, ip2p and shuffle the picture itself; else what some other tool drew."""


def contract(name: str) -> Hint:
    """The contract of hints of that name: an annotator's, or of hints that are given."""
    if name not in ANNOTATORS and name not in GIVEN:
        raise UserError(f'There are no hints named "{name}": {nearest(name, [*ANNOTATORS, *filter(None, GIVEN)])}')
    return ANNOTATORS[name].hint() if name in ANNOTATORS else GIVEN[name]


def annotate(picture: np.ndarray, hint: Hint, size: tuple[int, int] | None = None) -> np.ndarray:
    """Annotate a picture as a hint's contract says.

    Give the ``size`` (height, width) of the picture to be made for a picture of another size: it is brought to that
    size first, as training did. Lines found at one size and shrunk to another are not the lines found there. Hints that
    nothing makes (``GIVEN``) are the picture itself.
    """
    if hint.annotator in GIVEN:
        return fit(picture, size, hint.resize) if size else picture
    return annotator(hint.annotator).function(fit(picture, size) if size else picture, **hint.options)


def white_on_black(lines: np.ndarray) -> np.ndarray:
    """A line drawing as a hint of lines: one drawn dark on light paper is inverted."""
    return 255 - lines if lines.mean() > 127 else lines


def drawn_hint(drawing: np.ndarray, hint: Hint, size: tuple[int, int]) -> np.ndarray:
    """A drawing that is a hint already, at the ``size`` (height, width) of the picture to be made.

    Lines drawn dark on light paper are inverted, as lines in hints are light on dark.
    """
    return fit(white_on_black(drawing) if hint.resize == "lines" else drawing, size, hint.resize)
