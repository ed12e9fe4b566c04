"""Was the hint obeyed, and at what price: fidelity, floors, ceiling, obedience, CLIP-score and FID.

- **fidelity**: the output is annotated again and compared with the hint, by the metric of such hints;
- **floor**: the better of no control and hints shuffled between samples, same seeds and prompts;
- **ceiling**: the VAE reconstruction of the truth, annotated;
- **obedience** = (fidelity - floor) / (ceiling - floor): 0 is no control, 1 is all the VAE lets through. So it is for
  metrics that are errors, of which a low one is good, too.

Intervals are 95%, from a paired bootstrap over the pictures.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from controlkit.annotators import annotate, kind_or_bare, names_of, parts_of
from controlkit.annotators.maps import FACING, keypoints_of, labels_of, normals_of
from controlkit.backbones import Backbone
from controlkit.data import Pair, hint_for_pair
from controlkit.errors import UserError, nearest
from controlkit.hub import shipped_path
from controlkit.images import HintSpec, to_pictures, to_tensor
from controlkit.mini.aesthetic import AestheticHead
from controlkit.mini.observer import Observer
from controlkit.mini.tower import ImageTextTower
from controlkit.precision import autocast, number_format
from controlkit.sample import Control, Job, SamplingSettings, generate
from controlkit.seeds import numpy_rng

RESAMPLES = 1000
FOUND = 0.25
"""Control is found when the lower bound of obedience is at least this, in two evaluations running."""
KEPT = 0.95
"""Quality is kept where the CLIP-score is at least this share of that without control; FID is asked for besides."""


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


def _grey(picture: np.ndarray) -> np.ndarray:
    """Grey values (H, W), float32 in [0, 1]."""
    return cv2.cvtColor(np.ascontiguousarray(picture[..., :3]), cv2.COLOR_RGB2GRAY).astype(np.float32) / 255.0


_SCALES = (0.0448, 0.2856, 0.3001)  # the weights of the first three of Wang, Simoncelli and Bovik's five scales
_LEAST_SIDE = 44  # an 11-pixel window at the coarsest of three scales, as torchmetrics counts


def ms_ssim(found: np.ndarray, wanted: np.ndarray) -> float:
    """Multi-scale structural similarity of two maps' greys, uint8 (H, W, 3): 0 to 1, 1 for equal maps.

    Three scales instead of five, so that it can be taken of maps 64 pixels wide, and is the same at any size. NaN if
    both are black.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    if min(found.shape[:2]) < _LEAST_SIDE:
        raise UserError(f"MS-SSIM needs maps at least {_LEAST_SIDE} pixels wide and high, not {found.shape[:2]}.")
    if not found.any() and not wanted.any():
        return float("nan")
    a, b = (torch.from_numpy(_grey(m))[None, None] for m in (found, wanted))
    betas = tuple(weight / sum(_SCALES) for weight in _SCALES)
    return float(multiscale_structural_similarity_index_measure(a, b, data_range=1.0, betas=betas))


def depth_rmse(found: np.ndarray, wanted: np.ndarray) -> float:
    """Root mean square distance of two depth maps' greys, in [0, 1]; an error. NaN if both are black."""
    if not found.any() and not wanted.any():
        return float("nan")
    return float(np.sqrt(((_grey(found) - _grey(wanted)) ** 2).mean()))


def normal_angle(found: np.ndarray, wanted: np.ndarray) -> float:
    """Mean angle in degrees between two pictures of normals; an error.

    Over the pixels where something is wanted, so that nothing and what faces the camera exactly, which have the same
    colour, are left out. NaN if there are none.
    """
    there = (wanted != FACING).any(-1)
    if not there.any():
        return float("nan")
    chords = np.linalg.norm(normals_of(found[there]) - normals_of(wanted[there]), axis=-1)
    return float(np.degrees(2 * np.arcsin((chords / 2).clip(0, 1))).mean())  # exact for small angles; arccos is not


def miou(found: np.ndarray, wanted: np.ndarray, palette: np.ndarray | None = None) -> float:
    """Intersection over union of two pictures of labels, the mean over the classes that are in either.

    ``palette``, uint8 (K, 3), says what colours mean; by default the embedded scenes' does.
    """
    if palette is None:
        from controlkit.mini.scenes import PALETTE

        palette = PALETTE
    a, b = (labels_of(picture, palette) for picture in (found, wanted))
    shares = [((a == k) & (b == k)).sum() / ((a == k) | (b == k)).sum() for k in np.union1d(a, b)]
    return float(np.mean(shares))


def pck(found: np.ndarray, wanted: np.ndarray) -> float:
    """Share of the wanted joints, in two pictures of poses, near which the same joint was found; NaN if none is wanted.

    Near is within a tenth of the larger side of the box about all wanted joints, and at least 2% of the short side.
    """
    joints, there = keypoints_of(wanted), keypoints_of(found)
    if not joints:
        return float("nan")
    reach = max(0.1 * np.ptp([at for _, *at in joints], axis=0).max(), 0.02 * min(wanted.shape[:2]))
    right = [any(j == k and np.hypot(x - u, y - v) <= reach for k, u, v in there) for j, x, y in joints]
    return float(np.mean(right))


def inpaint_distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """How far a picture (H, W, 3) is from the one it fills, uint8 RGBA (H, W, 4), alpha 0 in its hole; an error.

    The mean absolute distance, in [0, 1], outside the hole, plus that across the seam: between each pixel in the hole
    and its neighbour outside, as the given picture has it. So a hole filled without regard to what is about it counts
    even if that was left as it was. NaN if there is nothing outside.
    """
    given = wanted[..., :3].astype(np.float32) / 255.0
    made = found[..., :3].astype(np.float32) / 255.0
    hole = wanted[..., 3] < 128 if wanted.shape[-1] == 4 else np.zeros(wanted.shape[:2], bool)
    if hole.all():
        return float("nan")
    steps = []
    for here, beside in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        for inside, outside in ((here, beside), (beside, here)):
            border = hole[inside] & ~hole[outside]
            steps.append(abs(made[inside] - given[outside])[border])
    seam = np.concatenate(steps)
    return float(abs(made - given)[~hole].mean() + (seam.mean() if len(seam) else 0.0))


def low_pass_psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, at most 60, of two pictures that were low-passed, uint8 (H, W, 3).

    By how much the contract of a tile says, which the output is annotated by. (Nothing, for a control from elsewhere.)
    """
    error = ((found.astype(np.float32) - wanted) ** 2).mean() / 255.0**2
    return float(min(-10 * np.log10(max(error, 1e-12)), 60.0))


@dataclass(frozen=True)
class Metric:
    """A metric of hints found again: ``function(found, wanted)``, of hint pictures, and how to read it."""

    name: str
    function: Callable[[np.ndarray, np.ndarray], float]
    higher_is_better: bool = True
    least_range: float = 0.2
    """How far the ceiling must lie above the floor for obedience to mean much; errors have a rule of their own."""
    least_ceiling: float = 0.0
    """How high the ceiling must be, besides."""
    looks_again: bool = True
    """Whether outputs are annotated; if not, they are compared as they are."""

    def tells(self, floor: float, ceiling: float) -> bool:
        """Whether obedience between them means much. A ceiling's error must be at most two thirds of the floor's."""
        if not self.higher_is_better:
            return 3 * ceiling <= 2 * floor
        return ceiling - floor >= self.least_range and ceiling >= self.least_ceiling


METRICS = {
    m.name: m
    for m in (
        Metric("edge_f1", edge_f1, least_ceiling=0.8),
        Metric("ms_ssim", ms_ssim),
        Metric("depth_rmse", depth_rmse, higher_is_better=False),
        Metric("normal_angle", normal_angle, higher_is_better=False),
        Metric("miou", miou),
        Metric("pck", pck),
        Metric("inpaint_distance", inpaint_distance, higher_is_better=False, looks_again=False),
        # In dB, an error two thirds of another's lies this far from it.
        Metric("low_pass_psnr", low_pass_psnr, least_range=20 * float(np.log10(1.5))),
    )
}


def metric_of(contract: HintSpec) -> Metric:
    """The metric of obedience to hints of this contract, whether or not anything here makes them.

    Of several hints that are channels of one it is the first's, here and in ``look_of``.
    """
    name = parts_of(contract)[0].annotator
    measured = names_of(lambda kind: kind.metric)
    if not name:
        raise UserError(f"No annotator of these hints is named: expected one of {', '.join(measured)}.")
    if not (metric := kind_or_bare(name).metric):
        raise UserError(f'Obedience to hints named "{name}" is not measured: {nearest(name, measured)}')
    return METRICS[metric]


Look = Callable[[np.ndarray], np.ndarray]
"""How an output is looked at again: a picture, uint8 (H, W, 3), to the hint picture of it."""


def look_of(contract: HintSpec) -> Look:
    """How outputs are looked at again for hints of this contract: by its annotator, or as they are.

    Depth, normals, labels and poses are read by the shipped observer, which knows the embedded scenes and nothing else.
    """
    contract = parts_of(contract)[0]
    if not metric_of(contract).looks_again:
        return lambda picture: picture
    kind = kind_or_bare(contract.annotator)
    if truth := kind.truth:
        observer = shipped_observer()
        return lambda picture: truth(observer.observe([picture])[0])
    if not kind.makes:
        raise UserError(
            f'Nothing here finds "{contract.annotator}" in a picture: give a `look`, a function from a picture to it.'
        )
    return lambda picture: annotate(picture, contract)


@cache
def shipped_observer() -> Observer:
    """The network that reads truth off pictures of the embedded scenes."""
    return Observer.load(shipped_path("observer"))


def check_findable(contract: HintSpec, truths: Iterable[Pair]) -> None:
    """Refuse to look with the shipped observer at pictures of anything but the embedded scenes."""
    contract = parts_of(contract)[0]
    if kind_or_bare(contract.annotator).truth and any(truth.truth is None for truth in truths):
        raise UserError(f'"{contract.annotator}" can be found again in the embedded scenes alone: measure on scenes.')


def unmeasurable(contract: HintSpec, truths: Iterable[Pair]) -> str:
    """Why obedience to hints of this contract cannot be measured on these pairs, in words; "" where it can."""
    try:
        check_findable(contract, truths)
        look_of(contract)
    except UserError as error:
        return str(error)
    return ""


def fidelity(
    pictures: Iterable[np.ndarray], hints: Iterable[np.ndarray], contract: HintSpec, look: Look | None = None
) -> np.ndarray:
    """The metric of each picture, looked at again, against its hint; NaN where it says nothing.

    ``look`` says how, for hints that nothing here makes: a network that finds depth, say.
    """
    metric, look = metric_of(contract), look or look_of(contract)
    pairs = zip(pictures, hints, strict=True)
    return np.array([metric.function(look(picture), contract.picture(hint)) for picture, hint in pairs])


# --- obedience ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Obedience:
    """Fidelity between its floors and ceiling, by the metric of that name; one row a picture went in."""

    fidelity: Figure
    floor: Figure
    floor_no_control: Figure
    floor_shuffled: Figure
    ceiling: Figure
    obedience: Figure
    metric: str = "edge_f1"

    @property
    def is_meaningful(self) -> bool:
        """Whether floor and ceiling lie far enough apart, and the ceiling high should_stop, for obedience to mean much."""
        return METRICS[self.metric].tells(self.floor.mean, self.ceiling.mean)


def obedience(
    controlled: np.ndarray, no_control: np.ndarray, shuffled: np.ndarray, ceiling: np.ndarray, metric: str = "edge_f1"
) -> Obedience:
    """Obedience from each picture's fidelity under the four conditions, with a paired bootstrap.

    Rows in which any condition says nothing (NaN) are left out of all four. The better floor counts: the higher one, or
    the lower one where ``metric`` is an error.
    """
    table = np.stack([controlled, no_control, shuffled, ceiling])
    table = table[:, ~np.isnan(table).any(0)]
    if table.shape[1] == 0:
        raise UserError(
            f"Nothing can be measured on these {len(controlled)} pairs: in each, hint and output are both empty "
            "under some condition. Take pairs with something in their hints, or other annotator options."
        )

    sign = 1 if METRICS[metric].higher_is_better else -1

    def figures(rows: np.ndarray) -> np.ndarray:
        got, without, mixed, top = sign * rows.mean(-1)
        floor = np.maximum(without, mixed)
        scores = sign * np.stack([got, floor, without, mixed, top])
        return np.stack([*scores, (got - floor) / np.maximum(top - floor, 1e-6)])

    draws = numpy_rng("bootstrap", table.shape[1]).integers(table.shape[1], size=(RESAMPLES, table.shape[1]))
    samples = figures(table[:, draws])
    low, high = np.quantile(samples, [0.025, 0.975], axis=1)
    got, floor, without, mixed, top, share = (
        Figure(*map(float, row)) for row in zip(figures(table), low, high, strict=True)
    )
    return Obedience(got, floor, without, mixed, top, share, metric)


def ceiling_pictures(base: Backbone, truths: Sequence[np.ndarray], batch: int = 32) -> list[np.ndarray]:
    """The VAE's reconstructions (at the mean of each posterior): the best any control can do through this VAE."""
    done: list[np.ndarray] = []
    for first in range(0, len(truths), batch):
        with torch.no_grad(), autocast(base.device.type):
            moments = base.encode_moments(to_tensor(truths[first : first + batch]).to(base.device))
            done += to_pictures(base.decode_latents(base.mean_latents(moments)))
    return done


COLOURS = ("red", "green", "blue", "contrast", "saturation")


def colours(picture: np.ndarray) -> np.ndarray:
    """A picture's ``COLOURS``, (5,), each a share of the full range: the mean of red, green and blue; the standard
    deviation of grey; and the mean over pixels of the greatest channel less the least."""
    values = picture[..., :3].astype(np.float64) / 255
    spread = values.max(-1) - values.min(-1)
    return np.array([*values.mean((0, 1)), values.mean(-1).std(), spread.mean()])


# --- quality ------------------------------------------------------------------------------------------------


class Referee:
    """The image-text tower that never met the base: prompt adherence, and the features of FID.

    And, where there is one in the folder ``aesthetic`` beside it, the head that rates how well-made a picture is.
    """

    def __init__(self, folder: Path | None = None, device: str = "cpu") -> None:
        from transformers import CLIPTokenizer

        folder = folder or shipped_path("referee")
        self.tower = ImageTextTower.load(folder).to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        beside = folder.parent / "aesthetic"
        self.head = AestheticHead.load(beside).to(device) if beside.is_dir() else None
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
    def ratings(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """How well-made each picture is, 0 to 10, (N,); ``UserError`` without a head."""
        if self.head is None:
            raise UserError("This referee has no aesthetic head: expected a folder `aesthetic` beside its own.")
        return self.head(self.features(pictures)).cpu().numpy()

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
    base: Backbone,
    control: Control,
    truths: Sequence[Pair],
    real: Sequence[np.ndarray],
    settings: SamplingSettings | None = None,
    referee: Referee | None = None,
    batch: int = 16,
    on_step: Callable[[int], None] = lambda pictures: None,
    look: Look | None = None,
    without: Sequence[np.ndarray] | None = None,
) -> dict[str, Any]:
    """Everything `controlkit evaluate` prints, as plain values.

    Seeds are 0..N-1. ``real`` are pictures nothing was trained on, for FID; ``look`` is ``fidelity``'s. Three passes of
    sampling are made: controlled, without control, and with hints shuffled (a rotation by half: nobody keeps his own).
    ``without``: the pictures of the second, where another control was measured on the same pairs and settings.
    """
    started = time.perf_counter()
    settings = settings or SamplingSettings()
    if look is None:
        check_findable(control.hint, truths)
    hints = [hint_for_pair(truth, control.hint) for truth in truths]
    wanted = [way for way in WAYS if way != "no_control" or without is None]
    made = three_ways(base, control, truths, hints, settings, batch, on_step, wanted)
    if without is not None:
        made["no_control"] = list(without)
    shown = made | {"ceiling": ceiling_pictures(base, [truth.picture for truth in truths])}
    scores = {name: fidelity(pictures, hints, control.hint, look) for name, pictures in shown.items()}
    measured = obedience(**scores, metric=metric_of(control.hint).name)
    referee = referee or Referee(device=base.device.type)
    prompts = [truth.prompt for truth in truths]
    reference = referee.features(real)
    report: dict[str, Any] = asdict(measured)
    for suffix, pictures in (("", made["controlled"]), ("_no_control", made["no_control"])):
        report[f"clip_score{suffix}"] = asdict(mean_figure(referee.clip_scores(pictures, prompts)))
        report[f"fid{suffix}"] = asdict(fid(referee.features(pictures), reference))
        if referee.head is not None:
            report[f"aesthetic{suffix}"] = asdict(mean_figure(referee.ratings(pictures)))
    report["is_meaningful"] = measured.is_meaningful
    means = {name: figure["mean"] for name, figure in report.items() if isinstance(figure, dict)}
    adheres = means["clip_score"] >= KEPT * means["clip_score_no_control"]
    report["quality_kept"] = adheres and means["fid"] <= 1.1 * means["fid_no_control"]
    if look is None and kind_or_bare(control.hint.annotator).truth:
        report["observer"] = shipped_observer().config.get("accuracy")
    report["num"] = len(truths)
    report["settings"] = asdict(settings) | {
        "scale": control.scale,
        "hint_cfg_scale": control.hint_cfg_scale,
        "seeds": f"0-{len(truths) - 1}",
        "base": base.name,
        "base_digest": base.digest,
        "format": number_format(base.device.type),
    }
    report["seconds"] = round(time.perf_counter() - started, 2)
    return report


Way = Literal["controlled", "shuffled", "no_control"]
WAYS: tuple[Way, ...] = get_args(Way)
"""How pictures are made that obedience is computed of."""


def three_ways(
    base: Backbone,
    control: Control,
    truths: Sequence[Pair],
    hints: Sequence[np.ndarray],
    settings: SamplingSettings,
    batch: int = 16,
    on_step: Callable[[int], None] = lambda pictures: None,
    wanted: Sequence[Way] = WAYS,
    plain: Backbone | None = None,
    rows: Sequence[int] | None = None,
) -> dict[Way, list[np.ndarray]]:
    """The same seeds and prompts, controlled, with another sample's hint, and without control; of ``rows`` alone.

    ``plain``: the base that is to make those without control, where training has changed ``base``.
    """
    half = max(len(hints) // 2, 1)
    mixed = [*hints[half:], *hints[:half]]
    ways: dict[Way, tuple[Sequence[np.ndarray] | None, Sequence[Control]]] = {
        "controlled": (hints, [control]),
        "shuffled": (mixed, [control]),
        "no_control": (None, []),
    }
    made = {}
    for name in wanted:
        given, controls = ways[name]
        chosen = range(len(truths)) if rows is None else rows
        jobs = [Job(truths[i].prompt, i, (given[i],) if given else ()) for i in chosen]
        by = base if controls else plain or base
        made[name] = [p.pixels for p in generate(by, jobs, controls, settings, batch, on_step)]
    return made
