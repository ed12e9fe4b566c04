"""Figures against other libraries' and hand-worked cases: FID, F1, IoU, SSIM, RMSE, PCK.

scipy, scikit-learn and scikit-image are no dependencies: where they are there, they are compared with, too.
"""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_f1_score, multiclass_jaccard_index
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)
from torchmetrics.image.fid import FrechetInceptionDistance

from controlkit.annotators.maps import label_picture, pose_picture
from controlkit.measure import frechet
from controlkit.measure.metrics import depth_rmse, miou, palette_of, pck
from controlkit.measure.protocol import depth_distance, exact_f1, five_scales, overlaps, set_iou
from controlkit.mini.scenes import PALETTE

RNG = np.random.default_rng(0)


def features(count, width, shift=0.0):
    mix = RNG.standard_normal((width, width)) / width**0.5
    return shift + RNG.standard_normal((count, width)) @ mix


SIZES = [(300, 200, 16), (40, 60, 64), (20, 500, 32), (2, 3, 8)]


@pytest.mark.parametrize(("made", "real", "width"), SIZES)
def test_fid_is_torchmetrics(made, real, width):
    a, b = (torch.from_numpy(rows) for rows in (features(made, width), features(real, width, 0.3)))
    network = torch.nn.Identity()
    network.num_features = width
    metric = FrechetInceptionDistance(feature=network).set_dtype(torch.float64)
    metric.update(a, real=False)
    metric.update(b, real=True)
    assert frechet(a, b) == pytest.approx(float(metric.compute()), rel=1e-3)


@pytest.mark.parametrize(("made", "real", "width"), [(300, 200, 16), (60, 80, 32)])  # its root wants full ranks
def test_fid_is_scipy_s(made, real, width):
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    a, b = features(made, width), features(real, width, 0.3)
    covariances = [np.cov(rows, rowvar=False) for rows in (a, b)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    shift = ((a.mean(0) - b.mean(0)) ** 2).sum()
    theirs = shift + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet(*map(torch.from_numpy, (a, b))) == pytest.approx(theirs, rel=1e-3)


def test_fid_of_a_set_with_itself_is_nothing():
    rows = torch.from_numpy(features(50, 12))
    assert frechet(rows, rows) == pytest.approx(0, abs=1e-9)


@pytest.fixture
def lines():
    """Two stacks of four line maps, each a fifth of light pixels."""
    maps = (RNG.random((2, 4, 32, 32)) < 0.2) * 255
    return [list(np.repeat(stack[..., None], 3, -1).astype(np.uint8)) for stack in maps]


def test_the_exact_f1_is_that_of_all_pixels_of_a_prompt_s_pictures(lines):
    a, b = (torch.from_numpy(np.stack(maps)[..., 0] > 127).long() for maps in lines)
    assert exact_f1(*lines) == pytest.approx(100 * float(binary_f1_score(a.flatten(), b.flatten())), rel=1e-5)


@pytest.fixture
def labels():
    """Two stacks of label maps that agree in half of their pixels."""
    wanted = RNG.integers(0, len(PALETTE), (5, 24, 24))
    found = np.where(RNG.random(wanted.shape) < 0.5, wanted, RNG.integers(0, len(PALETTE), wanted.shape))
    return found, wanted


def test_iou_of_a_picture_and_of_a_set_are_torchmetrics(labels):
    found, wanted = labels
    pictures = [[label_picture(one, PALETTE) for one in maps] for maps in labels]
    single = multiclass_jaccard_index(torch.from_numpy(found[0]), torch.from_numpy(wanted[0]), len(PALETTE), "macro")
    assert miou(pictures[0][0], pictures[1][0]) == pytest.approx(float(single), rel=1e-5)
    whole = multiclass_jaccard_index(torch.from_numpy(found), torch.from_numpy(wanted), len(PALETTE), "macro")
    terms = [overlaps(pictures[0][i : i + 2], pictures[1][i : i + 2], np.asarray(PALETTE)) for i in (0, 2, 4)]
    assert set_iou(np.stack(terms)) == pytest.approx(100 * float(whole), rel=1e-5)


def test_ade20k_s_labels_are_read_by_their_own_colours():
    colours = palette_of("miou_ade20k")
    assert len(colours) == 150
    one, other = (np.full((4, 4), k) for k in (3, 140))
    half = np.where(np.arange(4) < 2, 3, 140) + 0 * one
    pictures = [label_picture(maps, colours) for maps in (one, other, half)]
    assert miou(pictures[0], pictures[0], of="miou_ade20k") == 1
    assert miou(pictures[0], pictures[1], of="miou_ade20k") == 0
    assert miou(pictures[2], pictures[0], of="miou_ade20k") == pytest.approx((0.5 + 0) / 2)


def test_five_scales_are_torchmetrics_defaults():
    a, b = RNG.integers(0, 256, (2, 192, 192, 1), np.uint8).repeat(3, -1)
    smooth = (0.7 * a + 0.3 * b).astype(np.uint8)
    theirs = multiscale_structural_similarity_index_measure(
        *(torch.from_numpy(one[..., 0] / np.float32(255))[None, None] for one in (smooth, a)), data_range=1.0
    )
    assert five_scales(smooth, a) == pytest.approx(float(theirs), abs=1e-4)


def test_distances_of_depth_in_hand_worked_cases():
    near, far = np.full((4, 4, 3), 200, np.uint8), np.full((4, 4, 3), 100, np.uint8)
    half = near.copy()
    half[:2] = 100
    assert depth_rmse(near, far) == pytest.approx(100 / 255)
    assert depth_rmse(half, far) == pytest.approx((0.5 * (100 / 255) ** 2) ** 0.5)
    assert depth_distance(half, half) == 0
    assert depth_distance(half, half, quirks=True) == pytest.approx((0.5 * 127.5**2) ** 0.5), "its fault: not 0"


def test_pck_of_two_joints_of_which_one_is_found():
    joints = np.zeros((1, 18, 3))
    joints[0, [0, 10]] = (60, 20, 1), (60, 80, 1)
    moved = joints.copy()
    moved[0, 10, 0] += 12  # a tenth of 60 is 6
    assert pck(*(pose_picture(one, (128, 128)) for one in (moved, joints))) == 0.5


def test_scikit_learn_and_scikit_image_agree(labels, lines):
    metrics = pytest.importorskip("sklearn.metrics")
    similarity = pytest.importorskip("skimage.metrics")
    found, wanted = labels
    pictures = [label_picture(one[0], PALETTE) for one in labels]
    shares = metrics.jaccard_score(wanted[0].ravel(), found[0].ravel(), average="macro")
    assert miou(*pictures) == pytest.approx(shares)
    a, b = (np.stack(maps)[..., 0].ravel() > 127 for maps in lines)
    assert exact_f1(*lines) == pytest.approx(100 * metrics.f1_score(b, a))
    grey = RNG.integers(0, 256, (64, 64), np.uint8)
    other = (0.8 * grey + 20).astype(np.uint8)
    deep = [one[..., None].repeat(3, -1) for one in (grey, other)]
    assert depth_rmse(*deep) ** 2 == pytest.approx(similarity.mean_squared_error(grey / 255, other / 255), rel=1e-4)
    options = {"data_range": 255, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    theirs = similarity.structural_similarity(grey.astype(float), other.astype(float), **options)
    tensors = [torch.from_numpy(one / np.float32(255))[None, None] for one in (grey, other)]
    assert float(structural_similarity_index_measure(*tensors, data_range=1.0)) == pytest.approx(theirs, abs=0.01)
