"""Metrics of fidelity: against numbers worked out another way."""

import numpy as np
import pytest
import torch

from controlkit.annotators import annotate, annotator, contract
from controlkit.annotators.maps import depth_picture, label_picture, normal_picture, pose_picture
from controlkit.errors import UserError
from controlkit.measure import METRICS, metric_of
from controlkit.measure.metrics import (
    depth_rmse,
    edge_f1,
    inpaint_distance,
    miou,
    ms_ssim,
    normal_angle,
    oks,
    pck,
    psnr,
    similarity,
)
from controlkit.mini.scenes import PALETTE


def column(at, side=64):
    """A line map with one vertical line."""
    lines = np.zeros((side, side), np.uint8)
    lines[:, at] = 255
    return lines


def test_equal_lines_score_one():
    assert edge_f1(column(20), column(20)) == 1.0


@pytest.mark.parametrize(("side", "reach"), [(64, 1), (256, 2), (512, 5)])
def test_the_tolerance_is_a_share_of_the_diagonal_and_at_least_a_pixel(side, reach):
    assert edge_f1(column(20, side), column(20 + reach, side)) == 1.0
    assert edge_f1(column(20, side), column(21 + reach, side)) == 0.0


def test_the_tolerance_is_a_disc_and_not_a_square():
    a, b = np.zeros((2, 64, 64), np.uint8)
    a[10, 10] = b[11, 11] = 255  # 1.4 pixels apart
    assert edge_f1(a, b) == 0.0


def test_f1_is_the_harmonic_mean_of_precision_and_recall():
    half = column(20).copy()
    half[32:] = 0
    too_much = column(20) | column(40) | column(50)
    assert edge_f1(half, column(20)) == pytest.approx(2 * 1 * (33 / 64) / (1 + 33 / 64))  # one pixel of tolerance
    assert edge_f1(too_much, column(20)) == pytest.approx(2 * (1 / 3) / (1 + 1 / 3))
    assert edge_f1(column(20), too_much) == edge_f1(too_much, column(20))


def test_emptiness_on_one_side_is_failure_and_on_both_says_nothing():
    empty = np.zeros((64, 64), np.uint8)
    assert edge_f1(empty, column(3)) == edge_f1(column(3), empty) == 0.0
    assert np.isnan(edge_f1(empty, empty))


def truths(kind, side=64):
    """Two different hints of a kind, each a picture of a ball somewhere, or of somebody."""
    y, x = np.mgrid[:side, :side] / side
    hints = []
    for cy, cx, radius in ((0.4, 0.35, 0.25), (0.65, 0.6, 0.2)):
        ball = np.hypot(y - cy, x - cx) < radius
        u, v = (x - cx) / radius, (cy - y) / radius
        up = np.sqrt((1 - u**2 - v**2).clip(0))
        if kind == "depth":
            hints.append(depth_picture(np.where(ball, 3 - radius * up, 6 - 2 * y)))
        elif kind == "normal":
            hints.append(normal_picture(np.stack([u, v, up], -1) * ball[..., None]))
        elif kind == "seg":
            hints.append(label_picture(np.where(ball, 2, np.where(y > 0.5, 1, 0)), PALETTE))
        elif kind == "pose":
            angle = np.linspace(0, 2 * np.pi, 18, endpoint=False)
            at = [side * (cx + radius * np.cos(angle)), side * (cy + radius * np.sin(angle)), np.ones(18)]
            hints.append(pose_picture(np.stack(at, -1)[None], (side, side)))
        else:
            shade = np.stack([230 - 100 * ball - 40 * y, 200 - 60 * y - 80 * ball, 90 + 60 * x * ball], -1)
            hints.append(annotate(shade.astype(np.uint8), annotator(kind).spec()))
    return hints


def best(name):
    return {"low_pass_psnr": 60.0}.get(name, 1.0 if METRICS[name].higher_is_better else 0.0)


CONDITIONS = ["canny", "scribble", "softedge", "lineart", "depth", "normal", "seg", "pose", "tile"]


@pytest.mark.parametrize("kind", CONDITIONS)
def test_what_is_wanted_scores_best_and_another_s_hint_worse(kind):
    metric = metric_of(contract(kind))
    function = metric.function
    own, other = truths(kind)
    assert function(own, own) == pytest.approx(best(metric.name), abs=1e-3)
    sign = 1 if metric.higher_is_better else -1
    assert sign * function(other, own) < sign * best(metric.name) - 0.02


@pytest.mark.parametrize("kind", [kind for kind in CONDITIONS if kind != "scribble"])
def test_a_growing_damage_never_scores_better(kind):
    metric = metric_of(contract(kind))
    function = metric.function
    own, other = truths(kind)
    scores = []
    for rows in (0, 16, 32, 48, 64):  # from the top on, another's hint
        damaged = own.copy()
        damaged[:rows] = other[:rows]
        scores.append(function(damaged, own) * (1 if metric.higher_is_better else -1))
    assert (np.diff(scores) <= 1e-6).all() and scores[0] > scores[-1]


def test_where_nothing_is_wanted_there_is_no_figure():
    black, facing = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), (128, 128, 255), np.uint8)
    assert np.isnan([ms_ssim(black, black), depth_rmse(black, black), pck(truths("pose")[0], black)]).all()
    assert np.isnan(oks(truths("pose")[0], black)) and oks(black, truths("pose")[0]) == 0
    assert np.isnan(normal_angle(truths("normal")[0], facing))
    assert np.isnan(inpaint_distance(facing, np.zeros((64, 64, 4), np.uint8))), "all is hole"
    assert ms_ssim(black, truths("softedge")[0]) < 0.9 and pck(black, truths("pose")[0]) == 0
    assert depth_rmse(black, truths("depth")[0]) > 0.1 and normal_angle(facing, truths("normal")[0]) > 10


def test_ms_ssim_works_on_small_maps_and_says_when_they_are_too_small():
    small = truths("softedge", 44)
    assert 0 < ms_ssim(*small) < 1
    with pytest.raises(UserError, match="at least 44 pixels"):
        ms_ssim(small[0][:40], small[1][:40])


def test_ms_ssim_is_that_of_three_scales():
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    a, b = (torch.from_numpy(hint[..., 0] / np.float32(255))[None, None] for hint in truths("softedge"))
    weights = np.array([0.0448, 0.2856, 0.3001]) / (0.0448 + 0.2856 + 0.3001)
    terms = []
    for _ in range(3):
        whole, contrast = ssim(a, b, data_range=1.0, return_contrast_sensitivity=True)
        terms.append(float(contrast))
        a, b = (torch.nn.functional.avg_pool2d(m, 2) for m in (a, b))
    terms[-1] = float(whole)
    assert ms_ssim(*truths("softedge")) == pytest.approx(np.prod(np.maximum(terms, 0) ** weights), abs=1e-4)


def test_the_errors_are_in_their_units():
    grey = np.full((64, 64, 3), 51, np.uint8)
    assert depth_rmse(grey, np.zeros_like(grey)) == pytest.approx(0.2)
    assert psnr(grey, np.zeros_like(grey)) == pytest.approx(-20 * np.log10(0.2), abs=1e-4)
    tilted = normal_picture(np.broadcast_to([np.sin(0.5), 0, np.cos(0.5)], (8, 8, 3)))
    more = normal_picture(np.broadcast_to([np.sin(0.8), 0, np.cos(0.8)], (8, 8, 3)))
    assert normal_angle(more, tilted) == pytest.approx(np.degrees(0.3), abs=0.5)


def test_normals_count_only_where_something_is_wanted():
    own = truths("normal")[0]
    elsewhere = own.copy()
    elsewhere[(own == (128, 128, 255)).all(-1)] = (255, 128, 128)
    assert normal_angle(elsewhere, own) == normal_angle(own, own)


def test_miou_is_the_mean_over_classes_in_either():
    wanted, found = np.zeros((4, 4), int), np.zeros((4, 4), int)
    wanted[:2], found[:1] = 1, 1
    found[3] = 2
    shares = [1 / 3, 1 / 2, 0]  # of class 0 one row of three, of 1 one of two, 2 is not there
    assert miou(*(label_picture(m, PALETTE) for m in (found, wanted))) == pytest.approx(np.mean(shares))


def test_labels_have_the_scenes_palette():
    labels = np.arange(len(PALETTE)).repeat(2).reshape(-1, 2)
    assert miou(*[label_picture(labels, PALETTE)] * 2) == 1
    assert miou(label_picture(0 * labels, PALETTE), label_picture(labels, PALETTE)) < 0.1


@pytest.mark.parametrize(("off", "right"), [(0, 1), (4, 1), (9, 0)])
def test_a_joint_is_right_within_a_tenth_of_the_person(off, right):
    joints = np.zeros((1, 18, 3))
    joints[0, [0, 10]] = (60, 20, 1), (60, 80, 1)  # nose and ankle, 60 apart
    moved = joints.copy()
    moved[..., 0] += off
    assert pck(*(pose_picture(j, (128, 128)) for j in (moved, joints))) == right


def test_a_joint_in_another_s_place_is_wrong():
    joints = np.zeros((1, 18, 3))
    joints[0, [4, 7]] = (30, 60, 1), (90, 60, 1)  # both wrists
    swapped = joints.copy()
    swapped[0, [4, 7]] = joints[0, [7, 4]]
    assert pck(*(pose_picture(j, (128, 128)) for j in (swapped, joints))) == 0


WANTED = [(0, 50.0, 20.0), (2, 30.0, 40.0), (10, 70.0, 100.0)]
"""A nose, a right shoulder and a right ankle, in a box of 40 by 80."""
AREA = 0.53 * 40 * 80


@pytest.mark.parametrize(("at", "sigma", "off"), [(0, 0.026, (2, 0)), (1, 0.079, (0, 9)), (2, 0.089, (6, -8))])
def test_a_joint_that_is_off_counts_by_its_distance_the_area_and_its_own_spread(at, sigma, off):
    moved = list(WANTED)
    joint, x, y = WANTED[at]
    moved[at] = joint, x + off[0], y + off[1]
    one = np.exp(-np.dot(off, off) / (2 * AREA * (2 * sigma) ** 2))
    assert similarity(WANTED, WANTED, 128) == 1
    assert similarity(moved, WANTED, 128) == pytest.approx((2 + one) / 3) and 0 < one < 1


def test_spreads_are_coco_s_in_the_order_of_18_points():
    coco = np.array([26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89]) / 1000  # pycocotools' order
    of_coco = [0, 14, 15, 16, 17, 2, 5, 3, 6, 4, 7, 8, 11, 9, 12, 10, 13]  # where each of its points is, sides apart
    for joint, spread in [*zip(of_coco, coco, strict=True), (1, 0.079)]:
        pair = [(joint, 20.0, 20.0), (0 if joint else 1, 60.0, 100.0)]
        found = [(joint, 23.0, 24.0), pair[1]]
        one = np.exp(-25 / (2 * 0.53 * 40 * 80 * (2 * spread) ** 2))
        assert similarity(found, pair, 128) == pytest.approx((1 + one) / 2), joint


def test_what_is_absent_counts_nothing_and_what_is_more_takes_nothing():
    assert similarity([], WANTED, 128) == 0
    assert similarity([WANTED[1], (7, 1.0, 1.0)], WANTED, 128) == pytest.approx(1 / 3)
    assert similarity([*WANTED, (0, 90.0, 90.0)], WANTED, 128) == 1, "the nearest of two is taken"


@pytest.mark.parametrize(("wanted", "sides"), [([(0, 60, 20), (10, 60, 80)], (15, 60)), ([(0, 60, 20)], (6.4, 6.4))])
def test_a_narrow_person_has_an_area_too(wanted, sides):
    found = [(joint, x + 1, y) for joint, x, y in wanted]
    reach = 2 * 0.53 * np.prod(sides)
    each = [np.exp(-1 / (reach * (2 * {0: 0.026, 10: 0.089}[joint]) ** 2)) for joint, *_ in wanted]
    assert similarity(found, wanted, 128) == pytest.approx(np.mean(each))


def test_each_wanted_person_counts_once_by_its_own_size():
    small, large = np.zeros((2, 1, 18, 3))
    small[0, [0, 1, 8]] = (20, 20, 1), (20, 30, 1), (30, 50, 1)
    large[0, [0, 1, 8, 10]] = (90, 10, 1), (90, 40, 1), (110, 80, 1), (70, 120, 1)
    both = pose_picture(np.concatenate([small, large]), (128, 128))
    assert oks(both, both) == 1
    assert oks(pose_picture(small, (128, 128)), both) == pytest.approx(0.5, abs=0.01)
    moved = small.copy()
    moved[0, 8, 0] += 4
    one = np.exp(-16 / (2 * 0.53 * 10 * 30 * (2 * 0.107) ** 2))
    found = oks(pose_picture(np.concatenate([moved, large]), (128, 128)), both)
    assert found == pytest.approx(((2 + one) / 3 + 1) / 2, abs=1e-6)


def test_a_picture_fills_its_hole_well_if_it_keeps_the_rest_and_goes_on_from_it(holed):
    picture, hint = holed
    assert inpaint_distance(picture, hint) < 0.01
    inside, outside, middle = picture.copy(), picture.copy(), picture.copy()
    inside[20:40, 20:40] += 51
    outside[:10] += 51
    middle[25:35, 25:35] = 0
    assert inpaint_distance(inside, hint) == pytest.approx(0.2, abs=0.01), "a step across the seam"
    share = 640 / (4096 - 400)
    assert inpaint_distance(outside, hint) == pytest.approx(0.2 * share + inpaint_distance(picture, hint))
    assert inpaint_distance(middle, hint) == inpaint_distance(picture, hint), "what fills it is free"


def test_a_picture_without_a_hole_is_measured_whole(holed):
    assert inpaint_distance(holed[0] + np.uint8(51), holed[0]) == pytest.approx(0.2)


def test_psnr_is_torchmetrics_up_to_its_rounding_and_ends_at_60():
    from torchmetrics.functional.image import peak_signal_noise_ratio

    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (32, 32, 3), np.uint8)
    b = np.clip(a + rng.normal(0, 20, a.shape), 0, 255).astype(np.uint8)
    theirs = peak_signal_noise_ratio(torch.from_numpy(a).double(), torch.from_numpy(b).double(), data_range=255.0)
    assert psnr(a, b) == pytest.approx(float(theirs), rel=1e-6)
    assert psnr(a, a) == 60.0
