"""The referee of published tables, by public weights: CLIP ViT-L/14 and B/16, Inception, LAION's aesthetic heads.

Their files are looked for where annotators' are (``CONTROLKIT_ANNOTATORS``, the cache, the hub's cache); nothing is
fetched here. They know photographs: of what else they may judge, ``unjudgeable`` says.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from controlkit.annotators.networks.pretrained import Pretrained, normalised
from controlkit.annotators.networks.weights import PublicFile, file_digest, network_of
from controlkit.backbones.unet_families import clip_tokenizer
from controlkit.errors import Invalid, NotFound
from controlkit.measure.inception import Inception, as_clean_fid
from controlkit.measure.quality import QualityReferee

_COLOURS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and spread of colours that CLIP expects."""
_SIDE, _BICUBIC = 224, 3  # Pillow's number
_AT_ONCE = 32


def _settings(text_heads: int, picture_heads: int, layers: int, patch: int) -> Any:
    """Settings of a CLIP; its heads are 64 wide."""
    from transformers import CLIPConfig

    text, pixels = 64 * text_heads, 64 * picture_heads
    return CLIPConfig(
        text_config={
            "hidden_size": text, "intermediate_size": 4 * text, "num_attention_heads": text_heads,
            "projection_dim": text,
        },
        vision_config={
            "hidden_size": pixels, "intermediate_size": 4 * pixels, "num_attention_heads": picture_heads,
            "num_hidden_layers": layers, "patch_size": patch, "image_size": _SIDE, "projection_dim": text,
        },
        projection_dim=text,
    )  # fmt: skip


def _clip(repository: str, *settings: int) -> Pretrained:
    file = PublicFile("model.safetensors", repository, also=("pytorch_model.bin",))
    return Pretrained(file, "CLIPModel", partial(_settings, *settings))


L14 = _clip("openai/clip-vit-large-patch14", 12, 16, 24, 14)
B16 = _clip("openai/clip-vit-base-patch16", 8, 12, 12, 16)
INCEPTION = PublicFile("pt_inception-2015-12-05-6726825d.pth", "mseitzer/pytorch-fid")
_INCEPTION_DIGEST = "6726825d"
"""The beginning of the SHA-256 of the file, which its name has."""


def _linear() -> nn.Module:
    return nn.Linear(12 * 64, 1)


class _Layered(nn.Module):
    """LAION's second predictor; layers between are dropouts, which do nothing here."""

    def __init__(self) -> None:
        super().__init__()
        widths = {0: (12 * 64, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
        self.layers = nn.ModuleDict({str(place): nn.Linear(*sides) for place, sides in widths.items()})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


AESTHETICS: tuple[tuple[PublicFile, Callable[[], nn.Module]], ...] = (
    (PublicFile("sac+logos+ava1-l14-linearMSE.pth", "camenduru/improved-aesthetic-predictor"), _Layered),
    (PublicFile("sa_0_4_vit_l_14_linear.pth", "LAION-AI/aesthetic-predictor"), _linear),
)
"""Heads that rate pictures by L/14's vectors, the newer first."""


@dataclass(frozen=True)
class _Clip:
    """A CLIP that was loaded."""

    network: Any
    device: str

    @torch.no_grad()
    def embed(self, pictures: Sequence[np.ndarray]) -> Tensor:
        found = []
        for first in range(0, len(pictures), _AT_ONCE):
            parts = [_middle(picture) for picture in pictures[first : first + _AT_ONCE]]
            pixels = torch.cat([normalised(part, (_SIDE, _SIDE), _BICUBIC, _COLOURS) for part in parts])
            pooled = self.network.vision_model(pixel_values=pixels.to(self.device)).pooler_output
            found.append(F.normalize(self.network.visual_projection(pooled), dim=-1))
        return torch.cat(found)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        tokens = _tokenizer()(list(texts), padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        pooled = self.network.text_model(**tokens.to(self.device)).pooler_output
        return F.normalize(self.network.text_projection(pooled), dim=-1)


@cache
def _tokenizer() -> Any:
    return clip_tokenizer("<|endoftext|>")


def _middle(picture: np.ndarray) -> np.ndarray:
    """The square in the middle of a picture."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return np.ascontiguousarray(picture[top : top + side, left : left + side, :3])


class PublicReferee(QualityReferee):
    """The networks together. B/16 and a head rate where their files are; L/14 and Inception are needed.

    ``NotFound`` where one of these is not on this machine, with how to get it; ``Invalid`` for a file that is another.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._l14 = _Clip(L14.network(device), device)
        self._b16 = _Clip(B16.network(device), device) if B16.file.find() else None
        self._inception = network_of(Inception, _inception_path(), device)
        found = next(((path, make) for file, make in AESTHETICS if (path := file.find())), None)
        self._head = network_of(found[1], found[0], device) if found else None

    @property
    def rates(self) -> bool:  # type: ignore[override]  # which it knows once it is loaded
        """Whether a head that rates pictures is here."""
        return self._head is not None

    def embed(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """L/14's unit vectors (N, D) of pictures, uint8 (H, W, 3)."""
        return self._l14.embed(pictures)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """L/14's unit vectors (N, D) of texts."""
        return self._l14.embed_texts(texts)

    @torch.no_grad()
    def features(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Inception's features (N, 2048) of pictures, uint8 (H, W, 3)."""
        parts = [pictures[first : first + _AT_ONCE] for first in range(0, len(pictures), _AT_ONCE)]
        read = (torch.cat([as_clean_fid(picture) for picture in part]).to(self.device) for part in parts)
        return torch.cat([self._inception(pixels).cpu() for pixels in read])

    @torch.no_grad()
    def ratings(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """LAION's rating of each picture, about 1 to 10, (N,); ``NotFound`` without a head."""
        if self._head is None:
            return super().ratings(pictures)
        return self._head(self._l14.embed(pictures)).squeeze(-1).cpu().numpy()

    def scores(self, pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """``QualityReferee.scores``, with ``clip_score_b16`` where B/16 is here."""
        found = super().scores(pictures, prompts)
        if self._b16 is None:
            return found
        cosines = (self._b16.embed(pictures) * self._b16.embed_texts(prompts)).sum(-1)
        return found | {"clip_score_b16": cosines.cpu().numpy()}


def _inception_path() -> Path:
    path = INCEPTION.find()
    if path is None:
        raise NotFound(
            f"The weights {INCEPTION.name} are not on this machine. Fetch them from https://github.com/mseitzer/"
            f"pytorch-fid/releases/download/fid_weights/{INCEPTION.name}, and put them into {INCEPTION.own_folder}."
        )
    if not (digest := file_digest(path)).startswith(_INCEPTION_DIGEST):
        raise Invalid(f"{path} has SHA-256 {digest}; expected one that begins with {_INCEPTION_DIGEST}.")
    return path
