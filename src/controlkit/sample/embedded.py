"""The texts in the file of a picture: its request, sealed, with the facts of how it was made; and A1111's line."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from controlkit.hub import seal
from controlkit.sample import infotext
from controlkit.sample.request import Request

LOADS = ("base", "dtype", "vae", "lora", "embedding")
"""Facts that name what was loaded, which the seal covers, too."""


def embedded(settled: Request, facts: Mapping[str, Any], pixels: np.ndarray) -> dict[str, Any]:
    """``settings`` and ``infotext`` of a picture, ``pixels`` (H, W, 3), as ``images.write_png`` takes them.

    ``settled``: its request, as ``Prepared.settled`` gives it. ``facts``: ``LOADS``, and what ``infotext.written`` asks
    for; the number format and so on.
    """
    asked = json.loads(settled.to_json())
    height, width = pixels.shape[:2]
    whole = {**facts, "width": width, "height": height}
    settings = asked | whole | {"seal": seal(asked, {name: facts[name] for name in LOADS if name in facts})}
    return {"settings": settings, "infotext": infotext.written(settled, whole)}
