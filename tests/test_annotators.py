"""Annotators: pictures in, hints out, as their contracts say."""

import inspect

import cv2
import numpy as np
import pytest

from controlkit.annotators import ANNOTATORS, annotate, annotator, canny, scribble, white_on_black
from controlkit.errors import UserError
from controlkit.measure import METRICS


@pytest.fixture
def disc():
    """A dark disc on a light ground, a faint ring round it and a speck beside it."""
    picture = np.full((64, 64, 3), 230, np.uint8)
    cv2.circle(picture, (36, 36), 25, (215, 215, 215), -1)
    cv2.circle(picture, (36, 36), 18, (60, 20, 20), -1)
    picture[4:9, 4:9] = 0
    return picture


def test_canny_is_opencv_s_at_100_and_200(disc):
    assert np.array_equal(canny(disc), np.repeat(cv2.Canny(disc, 100, 200)[..., None], 3, axis=2))
    assert np.array_equal(annotate(disc, annotator("canny").hint()), canny(disc))


def test_lower_thresholds_find_fainter_edges(disc):
    faint = annotate(disc, annotator("canny").hint(low=10, high=20)) > 0
    strong = canny(disc) > 0
    assert faint[strong].all()
    assert faint.sum() > 1.5 * strong.sum()


def test_a_scribble_follows_the_outline_with_a_thick_pen(disc):
    drawn = scribble(disc)[..., 0]
    y, x = np.nonzero(drawn)
    radii = np.hypot(y - 36, x - 36)
    assert set(np.unique(drawn)) == {0, 255}
    assert (abs(radii - 18) < 5).all(), "only the disc's outline: neither the faint ring nor the speck"
    assert np.diff(np.sort(np.arctan2(y - 36, x - 36))).max() < 0.1, "all the way round"
    assert len(y) > 2 * (2 * np.pi * 18), "thicker than two pixels"


def test_a_scribble_is_drawn_alike_every_time(disc):
    assert np.array_equal(scribble(disc), scribble(disc))


def test_the_pen_s_width_and_the_detail_are_options(disc):
    plain, wide, detailed = (scribble(disc, **o) > 0 for o in ({}, {"width": 6 / 64}, {"detail": 0.05}))
    assert wide[plain].all() and wide.sum() > 1.3 * plain.sum()
    assert detailed[plain].all() and detailed[:14, :14].any() and not plain[:14, :14].any(), "the speck"


@pytest.mark.parametrize("name", ANNOTATORS)
def test_every_annotator_keeps_to_the_common_form(name, disc):
    known = ANNOTATORS[name]
    options = {k: p.default for k, p in inspect.signature(known.function).parameters.items() if k != "picture"}
    assert known.options == options, "the table's options are the function's"
    assert known.metric in METRICS
    hint = annotate(disc[:48, ::-1], known.hint())  # cropped and mirrored: not contiguous
    assert hint.shape == (48, 64, 3) and hint.dtype == np.uint8 and hint.any()
    assert not annotate(np.full((64, 64, 3), 200, np.uint8), known.hint()).any(), "nothing is drawn of nothing"


def test_a_contract_holds_the_options_it_was_made_with():
    contract = annotator("canny").hint(low=50)
    assert (contract.annotator, contract.options) == ("canny", {"low": 50, "high": 200.0})


def test_an_unknown_annotator_or_option_names_the_nearest():
    with pytest.raises(UserError, match='no annotator "cany": did you mean "canny"'):
        annotator("cany")
    with pytest.raises(UserError, match='canny has no option "hihg": did you mean "high"'):
        annotator("canny").hint(hihg=3)


def test_lines_become_white_on_black_whichever_way_they_were_drawn(disc):
    lines = canny(disc)
    assert np.array_equal(white_on_black(lines), lines)
    assert np.array_equal(white_on_black(255 - lines), lines)
