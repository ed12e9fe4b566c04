"""Networks of transformers, of settings that are written here and weights of public files.

No configuration of a stranger's is read, and the library is given no path: it gets settings and tensors.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from controlkit.annotators.networks.weights import file_state
from controlkit.errors import Invalid
from controlkit.tensors import open_tensors

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and spread of colours, as shares of 255, that most networks expect."""
_LARGER = 1.25  # files may hold a head for training, too


def pretrained(kind: str, settings: Callable[[], Any], path: Path, device: str) -> Any:
    """A network of a class of transformers, in float32 for inference on ``device``; the last two are kept.

    Raises ``Invalid`` where the file is damaged, or another network's.
    """
    return _pretrained(kind, settings, path, file_state(path), device)


@lru_cache(maxsize=2)
def _pretrained(kind: str, settings: Callable[[], Any], path: Path, state: tuple[int, int], device: str) -> Any:
    import transformers

    header = open_tensors(path)
    with torch.device("meta"):
        empty = getattr(transformers, kind)(settings())
    expected = sum(tensor.numel() for tensor in empty.state_dict().values())
    stored = sum(math.prod(shape) for shape in header.shapes.values())
    if not expected / _LARGER <= stored <= expected * _LARGER:
        raise Invalid(f"{path} holds {stored:,} numbers; a {kind} has {expected:,}. It is another network's file.")
    network, found = getattr(transformers, kind).from_pretrained(
        None, config=settings(), state_dict=header.read(), dtype=torch.float32, output_loading_info=True
    )
    if lost := [*map(str, found["missing_keys"]), *(str(one[0]) for one in found["mismatched_keys"])]:
        raise Invalid(f"{path} lacks {min(lost)} as a {kind} has it. It is another network's file, or a damaged one.")
    return network.eval().to(device)


def normalised(picture: np.ndarray, size: tuple[int, int], how: int, colours: Any = IMAGENET) -> Tensor:
    """A picture, uint8 (H, W, 3), brought to ``size`` (height, width): (1, 3, H, W), less the mean, over the spread."""
    from PIL import Image

    resized = np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling(how)))
    mean, spread = (torch.tensor(one).reshape(1, 3, 1, 1) for one in colours)
    return (torch.from_numpy(resized.copy()).permute(2, 0, 1)[None] / 255 - mean) / spread


def grown(values: Tensor, size: Sequence[int]) -> np.ndarray:
    """Values (1, C, h, w) as large as a picture of ``size`` (height, width): float32 (H, W, C)."""
    array = values[0].float().permute(1, 2, 0).cpu().numpy()
    return cv2.resize(array, (size[1], size[0]), interpolation=cv2.INTER_CUBIC).reshape(size[0], size[1], -1)
