"""Metrics of fidelity: a hint found in an output against the hint that was given.

Each is a function ``(found, wanted) -> float`` of two hint pictures; NaN where a pair gives no information. Of several
hints that are channels of one, the first decides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import torch

from controlkit.annotators import HintKind, kind_or_bare, names_of, parts_of
from controlkit.annotators.maps import FACING, keypoints_of, labels_of, normals_of
from controlkit.errors import Invalid, Unsupported, nearest
from controlkit.images import HintSpec


def edge_f1(found: np.ndarray, wanted: np.ndarray) -> float:
    """F1 of two line maps, uint8 (H, W[, 3]), 0 to 1, with a tolerance of 0.0075 of the diagonal, at least one pixel.

    Precision is the share of found pixels within the tolerance of a wanted one, recall the reverse; tolerance and F1 as
    in the Berkeley boundary benchmark (Martin, Fowlkes and Malik, 2004), without its one-to-one matching. NaN if both
    are empty.
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

    After Wang, Simoncelli and Bovik (2003, equation 7), with three scales instead of five: so it works on maps 64
    pixels wide, and is the same at any size. NaN if both are black; ``Invalid`` if a side is under 44 pixels.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    if min(found.shape[:2]) < _LEAST_SIDE:
        raise Invalid(f"MS-SSIM needs maps at least {_LEAST_SIDE} pixels wide and high, not {found.shape[:2]}.")
    if not found.any() and not wanted.any():
        return float("nan")
    a, b = (torch.from_numpy(_grey(m))[None, None] for m in (found, wanted))
    betas = tuple(weight / sum(_SCALES) for weight in _SCALES)
    return float(multiscale_structural_similarity_index_measure(a, b, data_range=1.0, betas=betas))


def depth_rmse(found: np.ndarray, wanted: np.ndarray) -> float:
    """Root mean square distance of two depth maps' greys, uint8 (H, W, 3), 0 to 1; an error. NaN if both are black."""
    if not found.any() and not wanted.any():
        return float("nan")
    return float(np.sqrt(((_grey(found) - _grey(wanted)) ** 2).mean()))


def normal_angle(found: np.ndarray, wanted: np.ndarray) -> float:
    """Mean angle in degrees, 0 to 180, between two pictures of normals, uint8 (H, W, 3); an error.

    Over the pixels where a normal is wanted. Background and surfaces that face the camera exactly have the same colour
    and are left out. NaN if no pixel is left.
    """
    there = (wanted != FACING).any(-1)
    if not there.any():
        return float("nan")
    chords = np.linalg.norm(normals_of(found[there]) - normals_of(wanted[there]), axis=-1)
    return float(np.degrees(2 * np.arcsin((chords / 2).clip(0, 1))).mean())  # exact for small angles; arccos is not


def palette_of(metric: str) -> np.ndarray:
    """The colours of the labels that ``miou`` or ``miou_ade20k`` compares, uint8 (classes, 3)."""
    from controlkit.annotators.networks.segmentation import ADE20K
    from controlkit.mini.scenes import PALETTE

    return {"miou": np.asarray(PALETTE), "miou_ade20k": ADE20K}[metric]


def miou(found: np.ndarray, wanted: np.ndarray, of: str = "miou") -> float:
    """Mean intersection over union of two pictures of labels, uint8 (H, W, 3), in the embedded scenes' colours.

    0 to 1, over the classes in either. As in PASCAL VOC (Everingham et al., 2015, Section 4.2), but per picture; the
    paper measures segmentation by it, too (Table 3). ``of``: ``palette_of``'s.
    """
    a, b = (labels_of(picture, palette_of(of)) for picture in (found, wanted))
    shares = [((a == k) & (b == k)).sum() / ((a == k) | (b == k)).sum() for k in np.union1d(a, b)]
    return float(np.mean(shares))


Joint = tuple[int, float, float]
"""The number of a joint, x and y in pixels."""


def correct_joints(found: Sequence[Joint], wanted: Sequence[Joint], side: int) -> list[bool]:
    """Whether each of the wanted joints, at least one, is found in a picture whose short side is ``side`` pixels.

    It is if the same joint was found within a tenth of the larger side of the box about all wanted joints (Yang and
    Ramanan, 2013, Section 6.1), or within 2% of ``side``.
    """
    reach = max(0.1 * np.ptp([at for _, *at in wanted], axis=0).max(), 0.02 * side)
    return [any(j == k and np.hypot(x - u, y - v) <= reach for k, u, v in found) for j, x, y in wanted]


def pck(found: np.ndarray, wanted: np.ndarray) -> float:
    """Percentage of correct keypoints of two pictures of poses, uint8 (H, W, 3), as a share, 0 to 1.

    By ``correct_joints``, the wanted ones of all persons together. NaN if none is wanted.
    """
    joints = keypoints_of(wanted)
    return float(np.mean(correct_joints(keypoints_of(found), joints, min(wanted.shape[:2])))) if joints else np.nan


_SPREADS = np.array([0.026, 0.079, *(0.079, 0.072, 0.062) * 2, *(0.107, 0.087, 0.089) * 2, 0.025, 0.025, 0.035, 0.035])
"""COCO's standard deviation of where annotators see each joint, as a share of a person's size, in OpenPose's order.
Of the neck, which COCO lacks, it is CrowdPose's (Li et al., 2019): that of a shoulder."""
_COVERED = 0.53
"""The area of a person as a share of that of the box, where there is no mask, as in CrowdPose's evaluation."""
_NECK = 1


def similarity(found: Sequence[Joint], wanted: Sequence[Joint], side: int) -> float:
    """Object keypoint similarity (COCO's) of one person's wanted joints, at least one, 0 to 1.

    The mean over these of exp(-d^2 / (2 s^2 k^2)): d is the distance of the nearest joint of the same kind that was
    found, s^2 the person's area, k twice the joint's spread. A joint that was not found counts 0. The area is
    ``_COVERED`` of the box about the wanted joints, whose sides are taken as at least a quarter of each other, and 5%
    of ``side``, the short side of the picture.
    """
    box = np.ptp([at for _, *at in wanted], axis=0)
    width, height = box.clip(min=max(box.max() / 4, 0.05 * side))
    scale = 2 * _COVERED * width * height
    away = [min((np.hypot(x - u, y - v) for k, u, v in found if k == j), default=np.inf) for j, x, y in wanted]
    reach = 2 * _SPREADS[[joint for joint, *_ in wanted]]
    return float(np.exp(-np.square(away) / (scale * reach**2)).mean())


def _persons(joints: Sequence[Joint]) -> list[list[Joint]]:
    """Joints by person: each joins the nearest neck; where there is no more than one neck, all are one person's."""
    necks = np.array([at for joint, *at in joints if joint == _NECK])
    if len(necks) < 2:
        return [list(joints)]
    owners = [int(np.hypot(*(necks - at).T).argmin()) for _, *at in joints]
    return [[one for one, owner in zip(joints, owners, strict=True) if owner == i] for i in range(len(necks))]


def oks(found: np.ndarray, wanted: np.ndarray) -> float:
    """Object keypoint similarity of two pictures of poses, uint8 (H, W, 3), 0 to 1; the mean over wanted persons.

    By ``similarity``; a person is a neck with the joints next to it. NaN if no joint is wanted.
    """
    joints, seen, side = keypoints_of(wanted), keypoints_of(found), min(wanted.shape[:2])
    return float(np.mean([similarity(seen, own, side) for own in _persons(joints)])) if joints else np.nan


def inpaint_distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Distance of a picture, uint8 (H, W, 3), from the one it fills, RGBA (H, W, 4) with alpha 0 in the hole; an error.

    The mean absolute distance, in [0, 1], outside the hole, plus that across its border: between each pixel in the hole
    and its neighbour outside, as the given picture has it. So a filling that does not fit its surroundings is an error
    even if these were left unchanged. NaN if there is nothing outside.
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


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two pictures, uint8 (H, W, 3), in dB, at most 60.

    Ours, because torchmetrics' differs in the sixth digit, and published figures of tiles were made with this one.
    """
    error = ((found.astype(np.float32) - wanted) ** 2).mean() / 255.0**2
    return float(min(-10 * np.log10(max(error, 1e-12)), 60.0))


@dataclass(frozen=True)
class Metric:
    """A metric of fidelity, and how to read it."""

    name: str
    function: Callable[[np.ndarray, np.ndarray], float]
    """``function(found, wanted)`` of two hint pictures; NaN where they give no information."""
    higher_is_better: bool = True
    least_range: float = 0.2
    """How far the ceiling must lie above the floor for obedience to be meaningful; not used for errors."""
    least_ceiling: float = 0.0
    """How high the ceiling must be, too."""
    annotates: bool = True
    """Whether outputs are annotated; if not, they are compared as they are."""
    beside: str = ""
    """The name of another metric of such hints, which ``evaluate`` reports beside it."""

    def is_meaningful(self, floor: float, ceiling: float) -> bool:
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
        Metric("miou_ade20k", partial(miou, of="miou_ade20k")),  # of OneFormer's and UperNet's 150 classes
        Metric("pck", pck, beside="oks"),
        Metric("oks", oks),
        Metric("inpaint_distance", inpaint_distance, higher_is_better=False, annotates=False),
        # Of pictures low-passed as the tile's options say. In dB, an error two thirds of another's lies this far off.
        Metric("low_pass_psnr", psnr, least_range=20 * float(np.log10(1.5))),
    )
}


def first_kind(spec: HintSpec) -> HintKind:
    """The kind of these hints, or of the first of several."""
    return kind_or_bare(parts_of(spec)[0].annotator)


def metric_of(spec: HintSpec) -> Metric:
    """The metric of fidelity to such hints, whether or not anything here makes them; ``Unsupported`` if none."""
    kind = first_kind(spec)
    measured = names_of(lambda kind: kind.metric)
    if not kind.name:
        raise Unsupported(f"No annotator of these hints is named: expected one of {', '.join(measured)}.")
    if not kind.metric:
        raise Unsupported(f'Obedience to hints named "{kind.name}" is not measured: {nearest(kind.name, measured)}')
    return METRICS[kind.metric]
