"""The photographs that scikit-image ships, with captions of ours: pictures that no model was tuned on here.

Only those that are free of rights (CC0, the public domain) are taken, and only from the package's own folder: nothing
is fetched, and the package is not imported. ``docs/use.md`` says how to have it: the extra ``photographs``.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from controlkit.data import Pair
from controlkit.errors import Unsupported
from controlkit.images import fit, read_picture

_PACKAGE = "skimage"


@dataclass(frozen=True)
class Photograph:
    """A photograph: its file in the package, a caption, and who gave it away."""

    file: str
    caption: str
    source: str


PHOTOGRAPHS = (
    Photograph("astronaut.png", "a portrait of an astronaut in an orange suit before a flag", "NASA, public domain"),
    Photograph("chelsea.png", "a close photograph of a tabby cat's face", "Stéfan van der Walt, CC0"),
    Photograph("coffee.png", "a cup of coffee on a saucer with a spoon, on a wooden table", "Rachel Michetti, CC0"),
    Photograph("rocket.jpg", "a rocket on its launch pad at night", "SpaceX, CC0"),
    Photograph("motorcycle_left.png", "a motorcycle in a workshop", "Middlebury stereo data, given as CC0"),
    Photograph("camera.png", "a black and white photograph of a man with a camera on a tripod", "Lav Varshney, CC0"),
    Photograph("coins.png", "a black and white photograph of ancient coins in rows", "Pompeii coins, no known rights"),
    Photograph("hubble_deep_field.jpg", "many galaxies in a black sky", "NASA, public domain"),
    Photograph("moon.png", "a black and white photograph of craters on the moon", "NASA, public domain"),
    Photograph("brick.png", "a black and white photograph of a brick wall", "CC0Textures, CC0"),
    Photograph("grass.png", "a black and white photograph of grass", "linolafett, CC0"),
    Photograph("gravel.png", "a black and white photograph of gravel", "linolafett, CC0"),
)
"""Those with most to see first."""

TO_HAVE = "The photographs come with scikit-image, which is not here: pip install 'controlkit[photographs]'."


def photographs(size: int, num: int) -> Sequence[Pair]:
    """The first ``num`` photographs, at most as many as there are, cut to squares of ``size`` pixels, with captions.

    ``Unsupported`` without scikit-image.
    """
    found = [(one, path) for one in PHOTOGRAPHS if (path := folder() / one.file).is_file()]
    if not found:
        raise Unsupported(TO_HAVE)
    return [Pair(fit(read_picture(path), (size, size)), one.caption) for one, path in found[:num]]


def folder() -> Path:
    """The folder of the package's pictures; ``Unsupported`` without scikit-image."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise Unsupported(TO_HAVE)
    return Path(spec.origin).parent / "data"
