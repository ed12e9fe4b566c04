"""Fidelity: outputs annotated again, as the contract of their hints says."""

import numpy as np
import pytest

from controlkit.annotators import all_kinds, annotate, annotator, contract
from controlkit.annotators.lines import canny
from controlkit.data import CirclePairs
from controlkit.errors import Unsupported, UserError
from controlkit.measure import METRICS, fidelity, metric_of, unmeasurable
from controlkit.measure.fidelity import check_findable
from controlkit.measure.metrics import depth_rmse, inpaint_distance, psnr


def test_fidelity_annotates_the_picture_as_the_contract_says():
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, 32:] = 40  # fainter than 100/200 sees
    faint = annotator("canny").spec(low=10, high=20)
    hint = canny(picture, 10, 20)
    assert fidelity([picture, picture], [hint, np.zeros_like(hint)], faint).tolist() == [1.0, 0.0]
    assert fidelity([picture], [hint], annotator("canny").spec()).tolist() == [0.0]


def test_an_output_for_inpainting_is_compared_as_it_is_and_a_tile_s_low_passed(holed):
    picture, hint = holed
    rough = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    rule = annotator("inpaint").spec()
    assert fidelity([picture, rough], [hint, hint], rule).tolist() == [
        inpaint_distance(picture, hint),
        inpaint_distance(rough, hint),
    ]
    finer = annotator("tile").spec(shrink=4)
    noisy = picture + np.random.default_rng(0).integers(0, 20, picture.shape, np.uint8)
    small = annotate(picture, finer)
    assert fidelity([picture, noisy], [small, small], finer).tolist() == [
        60.0,
        psnr(annotate(noisy, finer), small),
    ]


def test_what_nothing_here_finds_needs_a_finder():
    own, other = np.full((2, 64, 64, 3), 51, np.uint8) * np.array([1, 3], np.uint8)[:, None, None, None]
    seen = {0: own, 1: other}
    pictures = [np.full((64, 64, 3), i, np.uint8) for i in seen]
    with pytest.raises(UserError, match='Nothing here finds "ted" in a picture: give a `finder`'):
        fidelity(pictures, [own, own], contract("ted"))
    scores = fidelity(pictures, [own, own], contract("depth"), finder=lambda picture: seen[int(picture[0, 0, 0])])
    assert scores.tolist() == [0.0, depth_rmse(other, own)] == pytest.approx([0.0, 0.4])


def test_hints_that_prescribe_nothing_have_no_metric():
    assert metric_of(contract("hed")) is METRICS["ms_ssim"]
    reported = {kind.metric for kind in all_kinds()} - {""}
    assert reported | {METRICS[name].beside for name in reported} - {""} == set(METRICS)
    with pytest.raises(UserError, match='hints named "shuffle" is not measured'):
        metric_of(contract("shuffle"))


def test_what_is_known_of_scenes_alone_is_not_measured_elsewhere():
    pairs = list(CirclePairs(32, 2))
    reason = unmeasurable(contract("depth"), pairs)
    assert reason == '"depth" can be found again in the embedded scenes alone: measure on scenes.'
    with pytest.raises(Unsupported, match="measure on scenes"):
        check_findable(contract("depth"), pairs)
    assert unmeasurable(contract("canny"), pairs) == ""
    assert "give a `finder`" in unmeasurable(contract("ted"), pairs)
    assert "table5_pidinet.pth" in unmeasurable(contract("pidi"), pairs), "its weights are not here"
