"""The protocol of ControlNet++ (Li et al., ECCV 2024), whose raw values published tables have.

UniPC in 20 steps, guidance 7.5, 512 pixels, 4 pictures a prompt from seed 42, one negative prompt. Each picture is
annotated again and compared with its hint: exact pixels for Canny, MS-SSIM for soft edges and line art, the distance of
depth maps, IoU over the whole set for labels. Ours differs in this: every value comes with its floors, ceiling and
interval; each picture has a seed of its own; Canny is OpenCV's and not kornia's. The released code has two faults that
change figures (``eval_edge.py`` and ``eval.py``, read and not run): ``quirks`` repeats them, to compare
with tables made so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch

from controlkit.data import Pair
from controlkit.errors import Unsupported, nearest
from controlkit.images import HintSpec
from controlkit.measure.evaluate import EvaluationPlan
from controlkit.measure.fidelity import Finder, finder_of
from controlkit.measure.metrics import first_kind, metric_of
from controlkit.measure.obedience import Figure, resampled

NAME = "controlnet++"
SIZE, SEED, REPEATS = 512, 42, 4
STEPS, GUIDANCE, SCHEDULER, NEGATIVE = 20, 7.5, "UniPC", "worst quality, low quality"
_LEAST = 16 * 11  # pixels a side, for five scales of an 11-pixel window

Terms = np.ndarray
"""Of one prompt's pictures: what a value of the whole set is computed from, (K, ...)."""


def planned(plan: EvaluationPlan) -> EvaluationPlan:
    """A plan by the protocol: each pair ``REPEATS`` times. Of the size it says nothing: pairs have one."""
    pairs: list[Pair] = [pair for pair in plan.pairs for _ in range(REPEATS)]
    return replace(
        plan,
        pairs=pairs,
        steps=STEPS,
        guidance=GUIDANCE,
        first_seed=SEED,
        others={"scheduler": SCHEDULER, "negative_prompt": NEGATIVE},
    )


@dataclass(frozen=True)
class Raw:
    """A value of published tables: from the hints found in a prompt's pictures and those that were given."""

    name: str
    unit: str
    terms: Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], Terms]
    """Of one prompt: hints found and hints given, uint8 (H, W, 3) each."""
    value: Callable[[np.ndarray], float]
    """Of the terms of all prompts, (N, K, ...)."""

    def figure(self, found: Sequence[np.ndarray], given: Sequence[np.ndarray], repeats: int = REPEATS) -> Figure:
        """The value of a set in which each prompt has ``repeats`` pictures; the interval redraws prompts."""
        starts = range(0, len(found), repeats)
        terms = np.stack([self.terms(found[i : i + repeats], given[i : i + repeats]) for i in starts])
        redrawn = [self.value(terms[rows]) for rows in resampled(len(terms))]
        low, high = np.quantile(redrawn, [0.025, 0.975])
        return Figure(self.value(terms), float(low), float(high))


def exact_f1(found: Sequence[np.ndarray], given: Sequence[np.ndarray]) -> float:
    """F1 of the pixels of line maps, uint8 (H, W, 3), all pictures together, without tolerance, as a percentage."""
    a, b = (np.stack(maps).max(-1) > 127 for maps in (found, given))
    whole = a.sum() + b.sum()
    return 200.0 * float((a & b).sum() / whole) if whole else 0.0


def five_scales(found: np.ndarray, given: np.ndarray) -> float:
    """MS-SSIM of the greys of two maps, uint8 (H, W, 3), in five scales, 0 to 1 (Wang et al., 2003).

    ``Unsupported`` for maps under 176 pixels a side, which five scales need.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    if min(found.shape[:2]) < _LEAST:
        raise Unsupported(f"The protocol's MS-SSIM needs pictures of {_LEAST} pixels a side: give --size {SIZE}.")
    a, b = (torch.from_numpy(_grey(one) / 255)[None, None] for one in (found, given))
    return float(multiscale_structural_similarity_index_measure(a, b, data_range=1.0))


def _grey(picture: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(np.ascontiguousarray(picture[..., :3]), cv2.COLOR_RGB2GRAY).astype(np.float32)


def wrapped(found: np.ndarray) -> np.ndarray:
    """Line art, light on dark, as the released scorer inverts it: 1 - x in whole numbers of 8 bits, which wrap."""
    return (1 - (255 - found.astype(np.int32))).astype(np.uint8)


def depth_distance(found: np.ndarray, given: np.ndarray, quirks: bool = False) -> float:
    """Root mean square distance of two depth maps' greys, each stretched to 0 to 255.

    ``quirks``: the found one is divided by its largest value and keeps its least one, so that equal maps may differ.
    """
    a, b = (_grey(one) for one in (found, given))
    low = 0.0 if quirks else float(a.min())
    a = 255 * (a - low) / max(float(a.max()) - low, 1e-6)
    b = 255 * (b - b.min()) / max(float(b.max() - b.min()), 1e-6)
    return float(np.sqrt(((a - b) ** 2).mean()))


def set_iou(terms: np.ndarray) -> float:
    """Mean IoU as a percentage, over the classes in either, of intersections and unions (N, 2, classes) summed up."""
    both, either = terms.sum(0)
    there = either > 0
    return 100.0 * float((both[there] / either[there]).mean())


def overlaps(found: Sequence[np.ndarray], given: Sequence[np.ndarray], palette: np.ndarray) -> Terms:
    """Intersections and unions (2, classes), in pixels, of pictures of labels in the colours of ``palette``."""
    from controlkit.annotators.maps import labels_of

    a, b = (np.stack([labels_of(one, palette) for one in maps]) for maps in (found, given))
    classes = np.arange(len(palette))[:, None]
    each = [(a.reshape(1, -1) == k) & (b.reshape(1, -1) == k) for k in classes]
    unions = [(a.reshape(1, -1) == k) | (b.reshape(1, -1) == k) for k in classes]
    return np.array([[one.sum() for one in each], [one.sum() for one in unions]])


def _mean(function: Callable[[np.ndarray, np.ndarray], float]) -> Callable[..., Terms]:
    return lambda found, given: np.array([np.mean([function(*pair) for pair in zip(found, given, strict=True)])])


def _plain(terms: np.ndarray) -> float:
    return float(terms.mean())


def raw_of(spec: HintSpec, quirks: bool = False) -> Raw:
    """The protocol's value for such hints; ``Unsupported`` for kinds that it does not measure."""
    kind = first_kind(spec)
    by_family = {
        "canny": lambda: Raw("F1", "%", lambda *maps: np.array([exact_f1(*maps)]), _plain),
        "softedge": lambda: Raw("MS-SSIM", "", _mean(five_scales), _plain),
        "lineart": lambda: Raw("MS-SSIM", "", _mean(_wrapping if quirks else five_scales), _plain),
        "depth": lambda: Raw("RMSE", "", _mean(lambda found, given: depth_distance(found, given, quirks)), _plain),
        "seg": lambda: Raw("mIoU", "%", lambda found, given: overlaps(found, given, _palette(spec)), set_iou),
    }
    name = "softedge" if kind.contract_name in ("hed", "pidi", "ted") else kind.contract_name
    if name not in by_family:
        raise Unsupported(f'ControlNet++ does not measure "{kind.name}": {nearest(kind.name, by_family)}')
    return by_family[name]()


def _wrapping(found: np.ndarray, given: np.ndarray) -> float:
    return five_scales(wrapped(found), given)


def _palette(spec: HintSpec) -> np.ndarray:
    """The colours of labels of such hints."""
    from controlkit.measure.metrics import palette_of

    return palette_of(metric_of(spec).name)


def raw_figures(
    plan: EvaluationPlan,
    made: Mapping[str, Sequence[np.ndarray]],
    quirks: bool = False,
    finder: Finder | None = None,
) -> dict[str, Any]:
    """The protocol's value of each kind of pictures, in plain values: of those made each way and of the ceiling.

    ``made``: pictures of ``planned`` pairs by name, as ``controlled``, ``no_control``, ``shuffled`` and ``ceiling``.
    """
    raw, find = raw_of(plan.spec, quirks), finder or finder_of(plan.spec)
    given = [plan.spec.picture(hint) for hint in plan.hints]
    figures = {name: raw.figure([find(one) for one in pictures], given) for name, pictures in made.items()}
    found: dict[str, Any] = {"protocol": NAME, "name": raw.name, "unit": raw.unit, "quirks": quirks}
    return found | {name: asdict(figure) for name, figure in figures.items()}
