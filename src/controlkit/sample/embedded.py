"""The settings in the file of a picture: its request, sealed, and the facts of how it was made."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from controlkit.hub import seal
from controlkit.sample.request import Request


def embedded(settled: Request, facts: Mapping[str, Any], pixels: np.ndarray) -> dict[str, Any]:
    """The settings to write into the file of a picture, ``pixels`` (H, W, 3).

    ``settled``: its request, as ``Prepared.settled`` gives it; ``facts``: the base, the number format and so on.
    """
    asked = json.loads(settled.to_json())
    height, width = pixels.shape[:2]
    return asked | {"seal": seal(asked)} | dict(facts) | {"width": width, "height": height}
