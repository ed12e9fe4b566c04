"""Networks of transformers, of settings that are written here and weights of public files.

No configuration of a stranger's is read, and the library is given no path: it gets settings and tensors.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor

from controlkit.annotators.networks.weights import PublicFile, file_state
from controlkit.errors import Invalid
from controlkit.tensors import open_tensors

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and spread of colours, as shares of 255, that most networks expect."""
_LARGER = 1.25  # files may hold a head for training, too


@dataclass(frozen=True)
class Pretrained:
    """A network of transformers: its public file, its class there, and its settings."""

    file: PublicFile
    kind: str
    settings: Callable[[], Any]

    def network(self, device: str) -> Any:
        """The network, in float32 for inference on ``device``; the last two are kept.

        Raises ``NotFound`` where its file is not here, ``Invalid`` where it is damaged, or another network's.
        """
        path = self.file.path()
        return _pretrained(self.kind, self.settings, path, file_state(path), device)


P = TypeVar("P", bound=Pretrained)


def best(models: Sequence[P]) -> P:
    """The first of the models whose file is on this machine; the last where none is."""
    return next((model for model in models if model.file.find()), models[-1])


def lack(models: Sequence[Pretrained]) -> str:
    """A sentence on how to get the last of the models; "" where one is here."""
    return best(models).file.lack()


def weights(models: Sequence[Pretrained]) -> str:
    """The digest of the weights of the best model that is here."""
    return best(models).file.digest()


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
    with _silent():
        network, found = getattr(transformers, kind).from_pretrained(
            None, config=settings(), state_dict=header.read(), dtype=torch.float32, output_loading_info=True
        )
    unread = [p for module in network.modules() for p in getattr(module, "_keys_to_ignore_on_load_missing", None) or ()]
    missing = [key for key in map(str, found["missing_keys"]) if not any(re.search(p, key) for p in unread)]
    if lost := [*missing, *(str(one[0]) for one in found["mismatched_keys"])]:
        raise Invalid(f"{path} lacks {min(lost)} as a {kind} has it. It is another network's file, or a damaged one.")
    return network.eval().to(device)


@contextmanager
def _silent() -> Iterator[None]:
    """The library without its progress bars, and without its list of what a file lacks, which is ours to tell."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


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
