"""Annotators: pictures in, hints out, as their contracts say."""

import inspect

import cv2
import numpy as np
import pytest

from controlkit.annotators import all_kinds, annotate, annotator, contract, names_of, ready_maker, white_on_black
from controlkit.annotators.lines import canny, lineart, mlsd, scribble, softedge
from controlkit.annotators.regions import inpaint, tile
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
    assert np.array_equal(annotate(disc, annotator("canny").spec()), canny(disc))


def test_lower_thresholds_find_fainter_edges(disc):
    faint = annotate(disc, annotator("canny").spec(low=10, high=20)) > 0
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


@pytest.mark.parametrize("name", names_of(lambda kind: kind.is_made_here and not kind.lack))
def test_every_annotator_keeps_to_the_common_form(name, disc):
    known = annotator(name)
    options = {
        k: p.default for k, p in inspect.signature(known.function).parameters.items() if p.default is not p.empty
    }
    assert known.spec().options == options, "the model's options are the function's"
    assert all(type(value) is float for value in options.values()), "as files hold them"
    picture, plain = disc[:48, ::-1], np.full((64, 64, 3), 200, np.uint8)  # cropped and mirrored: not contiguous
    if name == "mlsd":  # a disc has no straight lines, the speck beside it none long enough
        picture = np.kron(picture[:24, 30:62], np.ones((2, 2, 1), np.uint8))
        picture[:, 8:24] = 0
    hint = annotate(picture, known.spec())
    assert hint.shape == (48, 64, 3 if known.mask_value is None else 4) and hint.dtype == np.uint8
    assert hint.any() or name == "mini_pose", "nobody is in the picture"
    assert np.array_equal(annotate(picture.copy(), known.spec()), hint), "the same of the same picture"
    if known.lines and not known.any_lines:
        assert not annotate(plain, known.spec()).any(), "nothing is drawn of nothing"
    assert annotate(disc, known.spec(), (32, 48)).shape[:2] == (32, 48)


@pytest.mark.parametrize("name", names_of(lambda kind: kind.is_made_here and not kind.lack))
def test_every_annotator_makes_hints_of_points_strips_and_plain_pictures(name):
    kind, rng = annotator(name), np.random.default_rng(0)
    shapes = [(1, 1), (1, 300), (300, 1), (2, 2), (8, 700)]
    pictures = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    pictures += [np.full((24, 32, 3), level, np.uint8) for level in (0, 255)]
    for options in ({}, kind.foreign):
        for picture, hint in zip(pictures, kind.make(pictures, options), strict=True):
            assert hint.shape == (*picture.shape[:2], 3 if kind.mask_value is None else 4) and hint.dtype == np.uint8


def test_whatever_makes_or_is_given_as_hints_has_a_metric_or_is_known_to_have_none():
    assert {kind.metric for kind in all_kinds()} - {""} <= set(METRICS)
    assert names_of(lambda kind: not kind.metric) == ["ip2p", "shuffle", "mediapipe_face"], (
        "not prescribed, or no referee"
    )


# --- soft edges and lines -----------------------------------------------------------------------------------


def steps(heights, side=96):
    """A picture that steps up by each height, from left to right."""
    row = np.repeat(np.cumsum([40, *heights]), side // (len(heights) + 1)).astype(np.uint8)
    return np.repeat(np.repeat(row[None, :, None], side, 0), 3, 2)


def test_a_soft_edge_is_lightest_at_the_edge_and_lighter_the_stronger_it_is():
    light = softedge(steps([60, 20]))[48, :, 0].astype(int)
    assert abs(light[:48].argmax() - 31.5) < 1 and abs(48 + light[48:].argmax() - 63.5) < 1
    assert light[31] > 2 * light[63] > 0
    assert (np.diff(light[24:32]) >= 0).all() and 0 < light[28] < light[31], "it rises softly"
    assert not light[:16].any() and light.max() == 255


def test_soft_edges_of_a_faint_picture_are_faint():
    assert 0 < softedge(steps([8])).max() < 128 < softedge(steps([80])).max()


def test_an_edge_between_colours_of_one_lightness_is_soft_edge_and_line():
    picture = np.full((64, 64, 3), (200, 60, 60), np.uint8)
    picture[:, 32:] = (60, 132, 60)  # the same grey
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    assert np.ptp(grey.astype(int)) <= 1
    assert softedge(picture)[32, 28:36].max() > 200 and lineart(picture)[32, 28:36].max() > 200


def test_a_line_is_thin_and_drawn_once_on_the_darker_side():
    light = lineart(steps([120]))[48, :, 0]
    assert np.flatnonzero(light).tolist() == [46, 47] and light[47] == 255
    assert len(np.flatnonzero(lineart(steps([120], 384))[48, :, 0])) < 8


def test_a_fainter_line_is_greyer_and_contrast_leaves_it_out():
    strong, faint = (lineart(steps([height]))[48].max() for height in (100, 20))
    assert 0 < faint < strong
    assert not lineart(steps([20]), contrast=0.1).any()


# --- straight segments --------------------------------------------------------------------------------------


@pytest.fixture
def house():
    """A square of 60 pixels, its corners at 30 and 90, on a light ground of 128."""
    picture = np.full((128, 128, 3), 230, np.uint8)
    picture[30:90, 30:90] = 60
    return picture


def test_straight_segments_are_drawn_where_they_lie(house):
    y, x = np.nonzero(mlsd(house)[..., 0])
    off = np.maximum(abs(x - 59.5), abs(y - 59.5)) - 30  # from the square's outline
    assert (abs(off) <= 2).all() and len(y) > 0.8 * 4 * 60
    assert set(np.unique(mlsd(house))) == {0, 255}


@pytest.mark.parametrize("radius", [8, 16, 24, 40])
def test_circles_are_not_straight(radius):
    large = np.full((512, 512, 3), 230, np.uint8)
    cv2.circle(large, (256, 256), 4 * radius, (60, 60, 60), -1)
    assert not mlsd(cv2.resize(large, (128, 128), interpolation=cv2.INTER_AREA)).any()


def test_short_segments_are_left_out_and_the_pen_has_a_width(house):
    assert not mlsd(house, length=0.5).any()
    assert (mlsd(house, width=4 / 128) > 0).sum() > 2 * (mlsd(house) > 0).sum()


# --- tile and inpaint ---------------------------------------------------------------------------------------


def test_a_tile_keeps_what_is_large_and_loses_what_is_small():
    y, x = np.mgrid[:64, :64]
    checks = np.repeat((255 * ((y + x) % 2)).astype(np.uint8)[..., None], 3, 2)
    assert (abs(tile(checks).astype(int) - 127.5) < 2).all(), "a pattern finer than the shrinking is its mean"
    halves = np.repeat(np.where(x < 32, 20, 220).astype(np.uint8)[..., None], 3, 2)
    assert (abs(tile(halves).astype(int) - halves)[:, [0, 16, 20, 43, 47, 63]] < 5).all()
    assert tile(checks[:60, :52]).shape == (60, 52, 3)


def test_a_tile_control_from_elsewhere_reads_the_picture_as_it_is(disc):
    assert contract("tile", foreign=True).options == {"shrink": 1.0}
    assert np.array_equal(annotate(disc, contract("tile", foreign=True)), disc)
    assert np.array_equal(annotate(disc, annotator("tile").spec()), tile(disc))
    assert np.array_equal(annotate(disc, contract("tile")), tile(disc)), "as training, doctor and build make them"
    with pytest.raises(UserError, match=r'tile: "shrink" is 0\.5; expected greater than or equal to 1'):
        annotate(disc, annotator("tile").spec(shrink=0.5))


def noise(count, shape=(48, 64, 3)):
    """Pictures of noise, no two alike."""
    return np.random.default_rng(0).integers(1, 255, (count, *shape), np.uint8)


def test_a_picture_has_one_hole_and_other_pictures_others():
    pictures = noise(20)
    masks = [inpaint(picture)[..., 3] for picture in pictures]
    assert np.array_equal(inpaint(pictures[0].copy()), inpaint(pictures[0]))
    assert np.array_equal(inpaint(np.asfortranarray(pictures[0])), inpaint(pictures[0])), "however it is stored"
    assert len({mask.tobytes() for mask in masks}) == 20


def test_a_hole_takes_10_to_40_percent_and_shows_nothing_of_what_it_hides():
    shares = []
    for picture in noise(60):
        hint = inpaint(picture)
        hole = hint[..., 3] == 0
        assert set(np.unique(hint[..., 3])) == {0, 255}
        assert not hint[hole].any() and np.array_equal(hint[~hole][:, :3], picture[~hole])
        shares.append(hole.mean())
    assert 0.09 < min(shares) < 0.15 and 0.35 < max(shares) < 0.42  # edges fall between pixels
    small = [(inpaint(picture, least=0.05, most=0.1)[..., 3] == 0).mean() for picture in noise(20)]
    assert max(small) < 0.12
    with pytest.raises(UserError, match=r"takes 0\.5 to 0\.2 of the picture"):
        inpaint(noise(1)[0], least=0.5, most=0.2)


def test_a_hole_of_nearly_all_is_a_box():
    """A brush would wander for hours, and an ellipse covers no more than four fifths."""
    for picture in noise(12):
        hole = inpaint(picture, least=0.95, most=0.97)[..., 3] == 0
        rows, columns = hole.any(1), hole.any(0)
        assert np.array_equal(hole, rows[:, None] & columns) and 0.9 < hole.mean() <= 1


def test_the_hole_of_a_strip_is_stretched():
    """A brush would wander in it for minutes, or hours."""
    for picture in noise(12, (16, 1600, 3)):
        mask = inpaint(picture)[..., 3]
        assert (mask.reshape(16, 64, 25) == mask[:, ::25, None]).all() and 0.08 < (mask == 0).mean() < 0.45
        tall = inpaint(np.ascontiguousarray(picture.transpose(1, 0, 2)))[..., 3]
        assert tall.shape == (1600, 16) and 0.08 < (tall == 0).mean() < 0.45


def test_a_picture_with_a_mask_is_its_own_hint_for_inpainting(disc):
    masked = np.dstack([disc, np.full((64, 64), 255, np.uint8)])
    masked[:20, :, 3] = 0
    assert np.array_equal(annotate(masked, contract("inpaint")), masked)
    values = contract("inpaint").tensor(annotate(disc, contract("inpaint")), (64, 64))
    hole = inpaint(disc)[..., 3] == 0
    assert (values[0, :, hole] == -1).all() and (values[0, :, ~hole] >= 0).all()


def test_what_nothing_makes_is_given_as_it_is(disc):
    for name in ("depth", "normal", "seg", "pose"):
        assert not contract(name).options and np.array_equal(annotate(disc, contract(name)), disc)
        if ready_maker(name) is None:  # without the extra of MediaPipe, and other networks' weights
            with pytest.raises(
                UserError, match=f'no annotator "{name}" that can be used .* mini_{name} knows pictures'
            ):
                annotator(name)
    assert contract("softedge") == annotator("softedge").spec(), "what is made here is not given"


# --- contracts ----------------------------------------------------------------------------------------------


def test_a_contract_holds_the_options_it_was_made_with():
    contract = annotator("canny").spec(low=50)
    assert (contract.annotator, contract.options) == ("canny", {"low": 50, "high": 200.0})


def test_an_unknown_annotator_or_option_names_the_nearest():
    with pytest.raises(UserError, match='no annotator "cany": did you mean "canny"'):
        annotator("cany")
    with pytest.raises(UserError, match='canny has no "hihg": did you mean "high"'):
        annotator("canny").spec(hihg=3)


def test_lines_become_white_on_black_whichever_way_they_were_drawn(disc):
    lines = canny(disc)
    assert np.array_equal(white_on_black(lines), lines)
    assert np.array_equal(white_on_black(255 - lines), lines)
