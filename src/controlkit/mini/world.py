"""The pictures of ``mini``: emoji in five styles on coloured grounds, and flat shapes in the CSS colours.

Emoji come as npm packages (see ``PACKAGES`` for names, versions and licences) and are rasterised once into
the cache; they are not redistributed. Shapes are drawn here. Two lists separate training from measuring:

- ``heldout_concepts.txt``: the base has seen these concepts, no control ever has;
- ``heldout_pictures.txt``: nothing has ever seen these pictures (FID, prompt adherence, VAE error).
"""

import json
import os
import re
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal
from weakref import WeakValueDictionary

import cv2
import numpy as np
from PIL import Image, ImageColor

from controlkit.errors import NotFound
from controlkit.hub import Package, cache_dir, fetch_package
from controlkit.images import decode_picture, read_picture
from controlkit.seeds import numpy_rng

PACKAGES = {
    "noto": Package(  # Google Noto Emoji, Apache-2.0
        "@iconify-json/noto", "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw=="
    ),
    "twemoji": Package(  # Twitter Emoji, CC-BY-4.0
        "@iconify-json/twemoji", "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw=="
    ),
    "fluent": Package(  # Microsoft Fluent Emoji, colour, MIT
        "@iconify-json/fluent-emoji", "1.2.7",
        "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA=="
    ),
    "flat": Package(  # Microsoft Fluent Emoji, flat, MIT
        "@iconify-json/fluent-emoji-flat", "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw=="
    ),
    "3d": Package(  # Microsoft Fluent Emoji, 3D, MIT
        "@lobehub/fluent-emoji-3d", "1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g=="
    ),
}  # fmt: skip
STYLES = tuple(PACKAGES)

GROUNDS = {
    "white": (255, 255, 255),
    "black": (20, 20, 24),
    "grey": (136, 140, 148),
    "red": (196, 48, 52),
    "orange": (240, 140, 40),
    "yellow": (248, 216, 80),
    "green": (60, 150, 76),
    "teal": (0, 128, 128),
    "blue": (52, 96, 200),
    "purple": (120, 64, 168),
    "pink": (244, 168, 196),
    "brown": (120, 80, 52),
}
"""Background colours of emoji pictures: name -> sRGB."""

_SKIN_TONE = re.compile(r"-(light|medium-light|medium|medium-dark|dark)(-skin-tone)?$|skin-tone")
_TONE_CODES = re.compile(r"(^|-)1f3f[b-f](-|$)")
_FILL = 0.86  # share of the picture's side an emoji spans, leaving room to shift it


@dataclass(frozen=True)
class Emoji:
    """Every emoji picture at one size, in a fixed order.

    ``rgba`` is uint8 ``(N, size, size, 4)``, straight alpha; ``concepts[i]`` is a name such as ``red-apple``
    and ``styles[i]`` one of ``STYLES``.
    """

    size: int
    concepts: tuple[str, ...]
    styles: tuple[str, ...]
    rgba: np.ndarray

    def __len__(self) -> int:
        return len(self.concepts)


Split = Literal["all", "base", "control", "heldout_concepts", "heldout_pictures"]


def _lines(name: str) -> frozenset[str]:
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    return frozenset(line for line in text.splitlines() if line and not line.startswith("#"))


@cache
def heldout_concepts() -> frozenset[str]:
    """Concepts the base has seen and no control ever has."""
    return _lines("heldout_concepts.txt")


@cache
def everyday_concepts() -> frozenset[str]:
    """Concepts that people ask for first, which the base learns oftener; none is held out."""
    return _lines("everyday.txt")


@cache
def heldout_pictures() -> frozenset[str]:
    """Pictures nothing has seen, as ``style/concept``."""
    return _lines("heldout_pictures.txt")


def rows(emoji: Emoji, split: Split) -> list[int]:
    """Indices of the pictures of a split: ``base`` trains the base, ``control`` trains controls."""
    unseen = [f"{s}/{c}" in heldout_pictures() for s, c in zip(emoji.styles, emoji.concepts, strict=True)]
    held = [c in heldout_concepts() for c in emoji.concepts]
    keep = {
        "all": lambda i: True,
        "base": lambda i: not unseen[i],
        "control": lambda i: not unseen[i] and not held[i],
        "heldout_concepts": lambda i: held[i] and not unseen[i],
        "heldout_pictures": lambda i: unseen[i],
    }[split]
    return [i for i in range(len(emoji)) if keep(i)]


_HELD: WeakValueDictionary[Path, Emoji] = WeakValueDictionary()
"""Emoji in memory by their files, as long as anybody holds them."""


def load_emoji(size: int) -> Emoji:
    """All emoji at ``size`` pixels, from memory or the cache, else fetched and rasterised (a minute at 64 px)."""
    stem = "-".join(f"{s}{p.version}" for s, p in PACKAGES.items())
    path = cache_dir() / "world" / f"emoji-{size}-{stem}.npz"
    if held := _HELD.get(path):
        return held
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        emoji = _rasterise(size)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
            np.savez_compressed(file, concepts=emoji.concepts, styles=emoji.styles, rgba=emoji.rgba)
        os.replace(file.name, path)
    with np.load(path) as data:
        read = Emoji(size, tuple(map(str, data["concepts"])), tuple(map(str, data["styles"])), data["rgba"])
    _HELD[path] = read
    return read


def _rasterise(size: int) -> Emoji:
    folders = {style: fetch_package(package) for style, package in PACKAGES.items()}
    pictures: list[tuple[str, str, np.ndarray]] = []
    for style in STYLES[:4]:
        icons = json.loads((folders[style] / "icons.json").read_text(encoding="utf-8"))
        names = {n for n in icons["icons"] if not (_SKIN_TONE.search(n) and _SKIN_TONE.sub("", n) in icons["icons"])}
        for name in sorted(n for n in names if "skin-tone" not in n):
            icon = icons["icons"][name]
            box = [icon.get(k, icons.get(k, 0)) for k in ("left", "top")]
            box += [icon.get(k, icons[k]) for k in ("width", "height")]
            view = " ".join(map(str, box))
            svg = (
                f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{view}">'
            )
            pictures.append((name, style, _render_svg(f"{svg}{icon['body']}</svg>", round(size * _FILL))))
    # The 3D set is named by code point; the other sets' tables give those their names.
    names_of = {}
    for style in ("twemoji", "noto"):
        chars = json.loads((folders[style] / "chars.json").read_text(encoding="utf-8"))
        names_of.update({code.replace("-fe0f", ""): name for code, name in chars.items()})
    for file in sorted((folders["3d"] / "assets").glob("*.webp")):
        code = file.stem.replace("-fe0f", "")
        if code in names_of and not _TONE_CODES.search(code):
            side = round(size * _FILL)
            rgba = Image.fromarray(read_picture(file, None)).resize((side, side), Image.Resampling.LANCZOS)
            pictures.append((names_of[code], "3d", np.asarray(rgba)))
    margin = (size - round(size * _FILL)) // 2
    canvas = np.zeros((len(pictures), size, size, 4), np.uint8)
    for i, (_, _, drawn) in enumerate(pictures):
        canvas[i, margin : margin + drawn.shape[0], margin : margin + drawn.shape[1]] = drawn
    return Emoji(size, tuple(p[0] for p in pictures), tuple(p[1] for p in pictures), canvas)


def _render_svg(svg: str, side: int) -> np.ndarray:
    try:
        import resvg_py
    except ImportError as error:
        raise NotFound("Drawing emoji needs resvg-py. Install it with: pip install 'controlkit[world]'") from error
    drawn = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side))
    rgba = decode_picture(drawn, "the drawing", None)
    return rgba if rgba.shape[:2] == (side, side) else np.asarray(Image.fromarray(rgba).resize((side, side)))


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def caption(concept: str, style: str, ground: str) -> str:
    """``caption("red-apple", "3d", "teal")`` -> ``"a red apple, 3d style, on a teal background"``."""
    words = concept.replace("-", " ")
    return f"{_article(words)} {words}, {style} style, on {_article(ground)} {ground} background"


def caption_in(text: str, style: str) -> str:
    """A caption of ``caption`` with another style's name in it."""
    what, _, ground = text.split(", ")
    return f"{what}, {style} style, {ground}"


def draw_emoji(
    emoji: Emoji, index: int, seed: int, visit: int = 0, ground: str | None = None
) -> tuple[np.ndarray, str]:
    """Picture ``index`` on a ground, shifted a little; ``(uint8 (size, size, 3) RGB, caption)``.

    ``visit`` counts how often a training run has come back to this picture; each visit draws a new ground
    (unless one is given) and shift.
    """
    rng = numpy_rng("emoji", seed, index, visit)
    drawn = list(GROUNDS)[rng.integers(len(GROUNDS))]
    ground = ground or drawn
    reach = emoji.size // 16
    dy, dx = rng.integers(-reach, reach + 1, size=2)
    rgba = np.roll(emoji.rgba[index], (dy, dx), axis=(0, 1))
    alpha = rgba[..., 3:].astype(np.float32) / 255.0
    rgb = alpha * rgba[..., :3] + (1.0 - alpha) * np.asarray(GROUNDS[ground], np.float32)
    return rgb.round().astype(np.uint8), caption(emoji.concepts[index], emoji.styles[index], ground)


# The CSS colour names as words; joined, each is a key of PIL's table (checked by a test).
CSS_COLOURS = tuple(
    """alice blue, antique white, aqua, aquamarine, azure, beige, bisque, black, blanched almond, blue, blue violet,
brown, burly wood, cadet blue, chartreuse, chocolate, coral, cornflower blue, cornsilk, crimson, dark blue, dark cyan,
dark golden rod, dark gray, dark green, dark khaki, dark magenta, dark olive green, dark orange, dark orchid, dark red,
dark salmon, dark sea green, dark slate blue, dark slate gray, dark turquoise, dark violet, deep pink, deep sky blue,
dim gray, dodger blue, fire brick, floral white, forest green, fuchsia, gainsboro, ghost white, gold, golden rod, gray,
green, green yellow, honeydew, hot pink, indian red, indigo, ivory, khaki, lavender, lavender blush, lawn green,
lemon chiffon, light blue, light coral, light cyan, light golden rod yellow, light green, light gray, light pink,
light salmon, light sea green, light sky blue, light slate gray, light steel blue, light yellow, lime, lime green,
linen, maroon, medium aquamarine, medium blue, medium orchid, medium purple, medium sea green, medium slate blue,
medium spring green, medium turquoise, medium violet red, midnight blue, mint cream, misty rose, moccasin,
navajo white, navy, old lace, olive, olive drab, orange, orange red, orchid, pale golden rod, pale green,
pale turquoise, pale violet red, papaya whip, peach puff, peru, pink, plum, powder blue, purple, red, rosy brown,
royal blue, saddle brown, salmon, sandy brown, sea green, sea shell, sienna, silver, sky blue, slate blue, slate gray,
snow, spring green, steel blue, tan, teal, thistle, tomato, turquoise, violet, wheat, white, white smoke, yellow,
yellow green""".replace("\n", " ").split(", ")
)
SHAPES = ("circle", "square", "star")
_MIN_CONTRAST = 60.0  # grey levels: below this canny at 100/200 cannot see the outline


def css_rgb(words: str) -> tuple[int, int, int]:
    """sRGB of a colour in ``CSS_COLOURS``."""
    return ImageColor.getrgb(words.replace(" ", ""))[:3]


def draw_shape(
    size: int, seed: int, index: int, shapes: tuple[str, ...] = SHAPES
) -> tuple[np.ndarray, np.ndarray, str]:
    """One flat shape: ``(picture, outline, prompt)``.

    ``picture`` is uint8 RGB ``(size, size, 3)``; ``outline`` is the shape's edge, one pixel wide, white on black,
    ``(size, size, 3)``; the prompt has the original tutorial set's wording, ``"<colour> circle with <colour>
    background"``. Colours are drawn until their grey levels differ enough for the outline to be an edge at all.
    """
    rng = numpy_rng("shape", seed, index)
    shape = shapes[rng.integers(len(shapes))]
    while True:
        front, back = (CSS_COLOURS[i] for i in rng.integers(len(CSS_COLOURS), size=2))
        levels = [np.dot(css_rgb(c), (0.299, 0.587, 0.114)) for c in (front, back)]
        if abs(levels[0] - levels[1]) >= _MIN_CONTRAST:
            break
    radius = rng.uniform(0.08, 0.3) * size
    centre = rng.uniform(radius + 2, size - radius - 2, size=2)
    picture = np.full((size, size, 3), css_rgb(back), np.uint8)
    inside = np.zeros((size, size), np.uint8)
    if shape == "circle":
        middle = (round(centre[0]), round(centre[1]))
        for canvas, colour in ((picture, css_rgb(front)), (inside, 255)):
            cv2.circle(canvas, middle, round(radius), colour, -1, cv2.LINE_AA)
    else:
        corners, inner = (4, 1.0) if shape == "square" else (10, 0.45)
        turn = np.pi / 4 if shape == "square" else -np.pi / 2
        angles = turn + 2 * np.pi * np.arange(corners) / corners
        reach = radius * np.where(np.arange(corners) % 2 == 0, 1.0, inner)
        points = np.round(centre + reach[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)).astype(np.int32)
        for canvas, colour in ((picture, css_rgb(front)), (inside, 255)):
            cv2.fillPoly(canvas, [points], colour, cv2.LINE_AA)
    # The rim of what is drawn, not a circle of the same radius: antialiasing makes the disc up to a pixel larger.
    solid = np.where(inside >= 128, 255, 0).astype(np.uint8)
    rim = solid - cv2.erode(solid, cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3)))
    outline = np.repeat(rim[..., None], 3, axis=2)
    return picture, outline, f"{front} {shape} with {back} background"
