"""Picture quality beside obedience: CLIP-score, FID, an aesthetic rating, and colours.

A referee judges pictures of the world it was trained on (see ``world``), and of these only sets whose true pictures it
tells apart by their captions: see ``unjudgeable``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from controlkit.data import Pair
from controlkit.errors import NotFound
from controlkit.hub import shipped_path
from controlkit.images import to_tensor
from controlkit.measure.obedience import Figure, mean_figure
from controlkit.mini.aesthetic import AestheticHead
from controlkit.mini.tower import ImageTextTower
from controlkit.seeds import numpy_rng

KEPT = 0.95
"""Quality is kept if the CLIP-score is at least this share of the lesser of two: that of pictures without control, and
that of the true pictures, which nobody need surpass; and if FID is at most ``FID_KEPT`` times that without control."""
FID_KEPT = 1.1
TELLS = 0.75
"""A referee may judge a set if the lower bound of ``Referee.preferences`` of its true pictures is at least this: half
way between chance, 0.5, and certainty, 1."""
NO_REFEREE = (
    "CLIP-score, FID and whether quality was kept are not measured: no referee here was trained on this base's world."
)
_REDRAWN = 50
COLOURS = ("red", "green", "blue", "contrast", "saturation")


def colours(picture: np.ndarray) -> np.ndarray:
    """A picture's ``COLOURS``, (5,), each a share of the full range: the mean of red, green and blue; the standard
    deviation of grey; and the mean over pixels of the greatest channel less the least."""
    values = picture[..., :3].astype(np.float64) / 255
    range_ = values.max(-1) - values.min(-1)
    return np.array([*values.mean((0, 1)), values.mean(-1).std(), range_.mean()])


class QualityReferee(ABC):
    """Judges pictures of a world: how near they are to words, how they are spread, perhaps how well-made."""

    rates = False
    """Whether it has ``ratings``."""

    @abstractmethod
    def embed(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Unit vectors (N, space) of pictures, uint8 (H, W, 3)."""

    @abstractmethod
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (N, space) of texts."""

    @abstractmethod
    def features(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Features (N, C) of pictures, uint8 (H, W, 3), whose spread FID compares."""

    def ratings(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """How well-made each picture is, 0 to 10, (N,); ``NotFound`` for a referee that rates nothing."""
        raise NotFound("This referee has no aesthetic head.")

    def scores(self, pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """``clip_score`` of each picture with its prompt, ``aesthetic`` where it rates, and others, (N,) each."""
        found = {"clip_score": self.clip_scores(pictures, prompts)}
        return found | ({"aesthetic": self.ratings(pictures)} if self.rates else {})

    @torch.no_grad()
    def clip_scores(self, pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        """Cosine of each picture with its prompt, (N,), -1 to 1 (Hessel et al., 2021, without their factor)."""
        return (self.embed(pictures) * self.embed_texts(prompts)).sum(-1).cpu().numpy()

    @torch.no_grad()
    def preferences(self, pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        """For each picture, the share of the other pictures' prompts that fit it less well than its own, (N,), 0 to 1.

        A prompt that fits as well counts half, so that chance is 0.5. At least two pictures.
        """
        scores = (self.embed(pictures) @ self.embed_texts(prompts).T).cpu().numpy()
        own = scores.diagonal()[:, None]
        return ((scores < own).sum(1) + ((scores == own).sum(1) - 1) / 2) / (len(own) - 1)

    @torch.no_grad()
    def choose(self, pictures: Sequence[np.ndarray], captions: Sequence[Sequence[str]]) -> np.ndarray:
        """For each picture, the index of the caption that fits best, (N,)."""
        pairs = zip(self.embed(pictures), captions, strict=True)
        return np.array([int((self.embed_texts(texts) @ image).argmax()) for image, texts in pairs])


class Referee(QualityReferee):
    """An image-text tower that the base was not trained with: prompt adherence, and the features of FID.

    Where the folder ``aesthetic`` lies beside its own, also the head that rates how well-made a picture is.
    """

    def __init__(self, folder: Path | None = None, device: str = "cpu") -> None:
        from transformers import CLIPTokenizer

        folder = folder or shipped_path("referee")
        self.tower = ImageTextTower.load(folder).to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        beside = folder.parent / "aesthetic"
        self.head = AestheticHead.load(beside).to(device) if beside.is_dir() else None
        self.device = device

    @property
    def rates(self) -> bool:  # type: ignore[override]  # which it knows once it is loaded
        """Whether it has a head that rates pictures."""
        return self.head is not None

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (N, space) of texts."""
        window = self.tower.config["text"]["max_position_embeddings"]
        rows = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=window, return_tensors="pt"
        )
        return self.tower.embed_texts(rows.input_ids.to(self.device))

    def embed(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Unit vectors (N, space) of pictures, uint8 (H, W, 3)."""
        return self._in_parts(self.tower.embed_images, pictures)

    def features(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Pooled features (N, C) of pictures, uint8 (H, W, 3)."""
        return self._in_parts(self.tower.features, pictures)

    @torch.no_grad()
    def _in_parts(self, network: Callable[[Tensor], Tensor], pictures: Sequence[np.ndarray]) -> Tensor:
        return torch.cat([network(part) for part in to_tensor(pictures).to(self.device).split(128)])

    @torch.no_grad()
    def ratings(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """How well-made each picture is, 0 to 10, (N,); ``NotFound`` without a head."""
        if self.head is None:
            raise NotFound("This referee has no aesthetic head: expected a folder `aesthetic` beside its own.")
        return self.head(self.features(pictures)).cpu().numpy()


def frechet(made: Tensor, real: Tensor) -> float:
    """The Fréchet distance of two normal distributions with the means and covariances of features, (N, C) and (M, C).

    Heusel et al., 2017, equation 6: |m - w|^2 + tr(A + B - 2 (A B)^(1/2)). With A = X'X and B = Y'Y of the centred rows
    the trace of the root is the sum of the singular values of X Y', which is exact, and quick where there are fewer
    pictures than features.
    """
    made, real = made.double(), real.double()
    shift = (made.mean(0) - real.mean(0)).square().sum()
    x, y = ((rows - rows.mean(0)) / max(len(rows) - 1, 1) ** 0.5 for rows in (made, real))
    root = torch.linalg.svdvals(_reduced(x) @ _reduced(y).T).sum()
    return float(shift + x.square().sum() + y.square().sum() - 2 * root)


def _reduced(rows: Tensor) -> Tensor:
    """Rows (N, C) with the same products of columns, at most C of them."""
    return torch.linalg.qr(rows).R if len(rows) > rows.shape[1] else rows


def fid(made: Tensor, real: Tensor) -> Figure:
    """The ``frechet`` distance of features (N, C) of made and (M, C) of real pictures; the interval redraws the made.

    FID where the features are Inception's (``public``); else the same with a referee's features in their place. With
    few pictures the distance is biased upwards: compare only figures of equal N and M.
    """
    made, real = made.cpu(), real.cpu()
    rng = numpy_rng("fid", len(made))
    draws = (torch.from_numpy(rng.integers(len(made), size=len(made))) for _ in range(_REDRAWN))
    redrawn = [frechet(made[rows], real) for rows in draws]
    whole = frechet(made, real)
    # A redrawn set repeats pictures, which alone raises the distance: the interval takes only its width from them.
    low, high = np.quantile(redrawn, [0.025, 0.975]) - np.mean(redrawn) + whole
    return Figure(whole, float(low), float(high))


@dataclass(frozen=True, eq=False)
class Quality:
    """A referee, and real pictures, uint8 (H, W, 3), that no base or control was trained on: FID's reference."""

    referee: QualityReferee
    real: Sequence[np.ndarray]

    @cached_property
    def _reference(self) -> Tensor:
        return self.referee.features(self.real)

    def figures(self, pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> dict[str, Figure]:
        """The referee's ``scores`` of pictures made of these prompts, and their ``fid``."""
        found = {name: mean_figure(values) for name, values in self.referee.scores(pictures, prompts).items()}
        return found | {"fid": fid(self.referee.features(pictures), self._reference)}


def unjudgeable(referee: QualityReferee | None, pairs: Sequence[Pair]) -> str:
    """The reason why the referee may not judge pictures like these pairs', as a sentence; "" where it may.

    It may not if it cannot tell which caption is the true picture's own: its scores of pictures that are made mean
    nothing then. None: there is no referee.
    """
    if referee is None:
        return NO_REFEREE
    told = mean_figure(referee.preferences([pair.picture for pair in pairs], [pair.prompt for pair in pairs]))
    if told.low >= TELLS:
        return ""
    return (
        "CLIP-score, FID and whether quality was kept are not measured: of the true pictures of this set the referee "
        f"prefers their own captions to each other's in {told.mean:.0%} [{told.low:.0%}, {told.high:.0%}] of all "
        f"comparisons; 50% is chance, and {TELLS:.0%} is asked. Look at the samples instead."
    )


def clip_score_kept(controlled: float, no_control: float, truth: float) -> bool:
    """Whether prompts are followed as well as could be asked, by the mean CLIP-score of the three kinds of pictures."""
    return controlled >= KEPT * min(no_control, truth)


def quality_kept(controlled: Mapping[str, Figure], no_control: Mapping[str, Figure], truth: Figure) -> bool:
    """Whether pictures under control are good enough, by ``Quality.figures`` of both, and the truth's CLIP-score."""
    adheres = clip_score_kept(controlled["clip_score"].mean, no_control["clip_score"].mean, truth.mean)
    return adheres and controlled["fid"].mean <= FID_KEPT * no_control["fid"].mean
