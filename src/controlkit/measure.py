"""Was the hint obeyed, and at what price: fidelity, floors, ceiling, obedience, CLIP-score and FID.

- **fidelity**: the output is annotated again and compared with the hint, by the annotator's metric;
- **floor**: the better of no control and hints shuffled between samples, same seeds and prompts;
- **ceiling**: the VAE reconstruction of the truth, annotated;
- **obedience** = (fidelity - floor) / (ceiling - floor): 0 is no control, 1 is all the VAE lets through.

Intervals are 95%, from a paired bootstrap over the pictures.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from controlkit.annotators import annotate, annotator
from controlkit.backbones import UNetBase
from controlkit.data import Pair, hint_of
from controlkit.errors import UserError
from controlkit.hub import where
from controlkit.images import Hint, to_pictures, to_tensor
from controlkit.mini.tower import ImageTextTower
from controlkit.precision import autocast, number_format
from controlkit.sample import Control, Job, Settings, generate
from controlkit.seeds import numpy_rng

RESAMPLES = 1000
FOUND = 0.25
"""Control is found when the lower bound of obedience is at least this, in two evaluations running."""


@dataclass(frozen=True)
class Figure:
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


# --- fidelity -----------------------------------------------------------------------------------------------


def edge_f1(found: np.ndarray, wanted: np.ndarray) -> float:
    """F1 of two line maps, (H, W[, 3]) uint8, with a tolerance of 0.0075 of the diagonal, at least one pixel.

    Precision is the share of found pixels within the tolerance of a wanted one, recall the reverse. NaN if both are
    empty: such pairs say nothing and are left out.
    """
    a, b = (m.max(-1) > 127 if m.ndim == 3 else m > 127 for m in (found, wanted))
    if not a.any() and not b.any():
        return float("nan")
    if not a.any() or not b.any():
        return 0.0
    reach = max(0.0075 * float(np.hypot(*a.shape)), 1.0)
    span = int(np.ceil(reach))
    y, x = np.mgrid[-span : span + 1, -span : span + 1]
    disc = (np.hypot(y, x) <= reach).astype(np.uint8)
    near_a, near_b = (cv2.dilate(m.astype(np.uint8), disc) > 0 for m in (a, b))
    precision, recall = float(near_b[a].mean()), float(near_a[b].mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {"edge_f1": edge_f1}


def fidelity(pictures: Iterable[np.ndarray], hints: Iterable[np.ndarray], contract: Hint) -> np.ndarray:
    """The annotator's metric of each picture, annotated again, against its hint; NaN where it says nothing."""
    metric = METRICS[annotator(contract.annotator).metric]
    pairs = zip(pictures, hints, strict=True)
    return np.array([metric(annotate(picture, contract), hint) for picture, hint in pairs])


# --- obedience ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Obedience:
    """Fidelity between its floors and ceiling; one row a picture went in."""

    fidelity: Figure
    floor: Figure
    floor_no_control: Figure
    floor_shuffled: Figure
    ceiling: Figure
    obedience: Figure

    @property
    def counts(self) -> bool:
        """Whether floor and ceiling lie far enough apart, and the ceiling high enough, for obedience to mean much."""
        return self.ceiling.mean - self.floor.mean >= 0.2 and self.ceiling.mean >= 0.8


def obedience(controlled: np.ndarray, no_control: np.ndarray, shuffled: np.ndarray, ceiling: np.ndarray) -> Obedience:
    """Obedience from each picture's fidelity under the four conditions, with a paired bootstrap.

    Rows in which any condition says nothing (NaN) are left out of all four.
    """
    table = np.stack([controlled, no_control, shuffled, ceiling])
    table = table[:, ~np.isnan(table).any(0)]
    if table.shape[1] == 0:
        raise UserError(
            f"Nothing can be measured on these {len(controlled)} pairs: in each, hint and output are both empty "
            "under some condition. Take pairs with something in their hints, or other annotator options."
        )

    def figures(rows: np.ndarray) -> np.ndarray:
        got, without, mixed, top = rows.mean(-1)
        floor = np.maximum(without, mixed)
        return np.stack([got, floor, without, mixed, top, (got - floor) / np.maximum(top - floor, 1e-6)])

    draws = numpy_rng("bootstrap", table.shape[1]).integers(table.shape[1], size=(RESAMPLES, table.shape[1]))
    spread = figures(table[:, draws])
    low, high = np.quantile(spread, [0.025, 0.975], axis=1)
    return Obedience(*(Figure(*map(float, row)) for row in zip(figures(table), low, high, strict=True)))


def ceiling_pictures(base: UNetBase, truths: Sequence[np.ndarray], batch: int = 32) -> list[np.ndarray]:
    """The VAE's reconstructions (at the mean of each posterior): the best any control can do through this VAE."""
    done: list[np.ndarray] = []
    for first in range(0, len(truths), batch):
        with torch.no_grad(), autocast(base.device.type):
            moments = base.encode_moments(to_tensor(truths[first : first + batch]).to(base.device))
            done += to_pictures(base.decode_latents(moments.chunk(2, 1)[0] * base.vae.config.scaling_factor))
    return done


# --- quality ------------------------------------------------------------------------------------------------


class Referee:
    """The image-text tower that never met the base: prompt adherence, and the features of FID."""

    def __init__(self, folder: Path | None = None, device: str = "cpu") -> None:
        from transformers import CLIPTokenizer

        folder = folder or where("referee")
        self.tower = ImageTextTower.load(folder).to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self.device = device

    def _tokens(self, texts: Sequence[str]) -> Tensor:
        window = self.tower.config["text"]["max_position_embeddings"]
        rows = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=window, return_tensors="pt"
        )
        return rows.input_ids.to(self.device)

    @torch.no_grad()
    def embed(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Unit vectors (N, space)."""
        return torch.cat([self.tower.embed_images(b) for b in to_tensor(pictures).to(self.device).split(128)])

    @torch.no_grad()
    def features(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Pooled features (N, C)."""
        return torch.cat([self.tower.features(b) for b in to_tensor(pictures).to(self.device).split(128)])

    @torch.no_grad()
    def clip_scores(self, pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        """Cosine of each picture with its prompt, (N,)."""
        return (self.embed(pictures) * self.tower.embed_texts(self._tokens(prompts))).sum(-1).cpu().numpy()

    @torch.no_grad()
    def choose(self, pictures: Sequence[np.ndarray], captions: Sequence[Sequence[str]]) -> np.ndarray:
        """For each picture, which of its captions fits best: indices (N,)."""
        images = self.embed(pictures)
        chosen = [
            int((self.tower.embed_texts(self._tokens(texts)) @ image).argmax())
            for image, texts in zip(images, captions, strict=True)
        ]
        return np.array(chosen)


def mean_figure(values: np.ndarray) -> Figure:
    """The mean of values (N,) with its bootstrap interval."""
    draws = numpy_rng("bootstrap", len(values)).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return Figure(float(values.mean()), float(low), float(high))


def fid(made: Tensor, real: Tensor, resamples: int = 50) -> Figure:
    """Fréchet distance between features (N, C) of made and (M, C) of real pictures; the interval redraws the made.

    With few pictures the distance is biased upwards: compare only figures of equal N and M.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    features = nn.Identity()
    features.num_features = made.shape[1]  # type: ignore[assignment]  # torchmetrics asks the module for it
    metric = FrechetInceptionDistance(feature=features, reset_real_features=False).set_dtype(torch.float64)
    made, real = made.cpu(), real.cpu()
    metric.update(real.double(), real=True)

    def distance(rows: Tensor) -> float:
        metric.reset()
        metric.update(rows.double(), real=False)
        return float(metric.compute())

    rng = numpy_rng("fid", len(made))
    spread = [distance(made[torch.from_numpy(rng.integers(len(made), size=len(made)))]) for _ in range(resamples)]
    whole = distance(made)
    # A redrawn set repeats pictures, which alone raises the distance: only its spread is the figure's.
    low, high = np.quantile(spread, [0.025, 0.975]) - np.mean(spread) + whole
    return Figure(whole, float(low), float(high))


# --- the whole report ---------------------------------------------------------------------------------------


def evaluate(
    base: UNetBase,
    control: Control,
    truths: Sequence[Pair],
    real: Sequence[np.ndarray],
    settings: Settings | None = None,
    referee: Referee | None = None,
    batch: int = 16,
    on_step: Callable[[int], None] = lambda pictures: None,
) -> dict[str, Any]:
    """Everything `controlkit evaluate` prints, as plain values.

    Seeds are 0..N-1. ``real`` are pictures nothing was trained on, for FID. Three passes of sampling are made:
    controlled, without control, and with hints shuffled (a rotation by half: nobody keeps his own).
    """
    started = time.perf_counter()
    settings = settings or Settings()
    hints = [hint_of(truth, control.hint) for truth in truths]
    made = three_ways(base, control, truths, hints, settings, batch, on_step)
    scores = {name: fidelity(pictures, hints, control.hint) for name, pictures in made.items()}
    scores["ceiling"] = fidelity(ceiling_pictures(base, [t.picture for t in truths]), hints, control.hint)
    measured = obedience(scores["controlled"], scores["no_control"], scores["shuffled"], scores["ceiling"])
    referee = referee or Referee(device=base.device.type)
    prompts = [truth.prompt for truth in truths]
    reference = referee.features(real)
    report: dict[str, Any] = {name: asdict(figure) for name, figure in vars(measured).items()}
    for suffix, pictures in (("", made["controlled"]), ("_no_control", made["no_control"])):
        report[f"clip_score{suffix}"] = asdict(mean_figure(referee.clip_scores(pictures, prompts)))
        report[f"fid{suffix}"] = asdict(fid(referee.features(pictures), reference))
    report["counts"] = measured.counts
    means = {name: figure["mean"] for name, figure in report.items() if isinstance(figure, dict)}
    adheres = means["clip_score"] >= 0.95 * means["clip_score_no_control"]
    report["quality_kept"] = adheres and means["fid"] <= 1.1 * means["fid_no_control"]
    report["metric"] = annotator(control.hint.annotator).metric
    report["num"] = len(truths)
    report["settings"] = asdict(settings) | {
        "scale": control.scale,
        "seeds": f"0-{len(truths) - 1}",
        "base": base.name,
        "base_digest": base.digest,
        "format": number_format(base.device.type),
    }
    report["seconds"] = round(time.perf_counter() - started, 2)
    return report


def three_ways(
    base: UNetBase,
    control: Control,
    truths: Sequence[Pair],
    hints: Sequence[np.ndarray],
    settings: Settings,
    batch: int = 16,
    on_step: Callable[[int], None] = lambda pictures: None,
    skip_no_control: bool = False,
) -> dict[str, list[np.ndarray]]:
    """The same seeds and prompts, controlled, without control, and with another sample's hint."""
    half = max(len(hints) // 2, 1)
    mixed = [*hints[half:], *hints[:half]]
    ways: dict[str, tuple[Sequence[np.ndarray] | None, Sequence[Control]]] = {
        "controlled": (hints, [control]),
        "shuffled": (mixed, [control]),
    }
    if not skip_no_control:
        ways["no_control"] = (None, [])
    made = {}
    for name, (given, controls) in ways.items():
        jobs = [Job(t.prompt, i, (given[i],) if given else ()) for i, t in enumerate(truths)]
        made[name] = [p.pixels for p in generate(base, jobs, controls, settings, batch, on_step)]
    return made
