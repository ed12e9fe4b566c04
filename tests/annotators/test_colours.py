"""Annotators of colours and greys."""

import cv2
import numpy as np
import pytest

from controlkit.annotators.colours import blur, color, intensity, invert, luminance, shuffle, threshold
from controlkit.annotators.lines import lineart_standard, scribble, xdog
from controlkit.annotators.regions import outpaint


@pytest.fixture
def picture():
    """Soft patches of all colours, 96 x 64 pixels."""
    drawn = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
    return cv2.resize(drawn, (64, 96), interpolation=cv2.INTER_CUBIC)


def test_a_colour_grid_has_the_mean_colour_of_each_square(picture):
    grid = color(picture, cell=1 / 4)
    squares = grid.reshape(6, 16, 4, 16, 3).swapaxes(1, 2)
    assert (squares == squares[:, :, :1, :1]).all()
    means = picture.reshape(6, 16, 4, 16, 3).swapaxes(1, 2).mean((2, 3))
    assert abs(squares[:, :, 0, 0] - means).max() <= 1


def test_squares_are_no_smaller_than_a_pixel(picture):
    """Else a strip, or a tiny share, would have billions of them."""
    assert np.array_equal(color(picture[:1], cell=1 / 8), picture[:1])
    assert np.array_equal(color(picture, cell=1e-9), picture)


def test_luminance_is_the_lightness_of_cielab_and_intensity_the_largest_colour(picture):
    linear = np.where(picture / 255 <= 0.04045, picture / 255 / 12.92, ((picture / 255 + 0.055) / 1.055) ** 2.4)
    y = linear @ np.array([0.2126, 0.7152, 0.0722])
    lightness = np.where(y > (6 / 29) ** 3, 116 * np.cbrt(y) - 16, y * (29 / 3) ** 3)
    assert abs(luminance(picture).astype(int) - 2.55 * lightness[..., None]).max() < 2
    assert np.array_equal(intensity(picture)[..., 1], picture.max(-1))
    assert np.array_equal(intensity(picture, gamma=2.0)[..., 0], (255 * (picture.max(-1) / 255) ** 2).round())


def test_a_negative_twice_is_the_picture_and_a_threshold_needs_all_three_colours(picture):
    assert np.array_equal(invert(invert(picture)), picture) and not np.array_equal(invert(picture), picture)
    light = threshold(picture, level=100.0)
    assert np.array_equal(light[..., 0] == 255, (picture > 100).all(-1)) and set(np.unique(light)) == {0, 255}


def test_a_blur_has_the_width_it_is_asked_for():
    step = np.zeros((128, 128, 3), np.uint8)
    step[64:] = 255
    rise = np.diff(blur(step, width=4 / 128)[:, 5, 1].astype(float))
    assert rise.sum() == 255 and abs(np.sqrt((rise * (np.arange(127) - 63) ** 2).sum() / 255) - 4) < 0.1


def test_a_shuffled_picture_has_its_colours_and_none_of_its_places(picture):
    made = shuffle(picture)
    assert np.array_equal(shuffle(picture.copy()), made), "alike each time"
    assert not np.array_equal(shuffle(picture[:, ::-1]), made[:, ::-1]), "other pictures otherwise"
    assert made.min() >= picture.min() and made.max() <= picture.max()
    y, x = np.mgrid[:96, :64].astype(np.uint8)
    places = shuffle(np.dstack([y, x, x * 0]))  # where each pixel is from
    assert (abs(places[..., 0].astype(int) - y) > 9).mean() > 0.6 and np.ptp(places[..., 0]) > 80
    assert abs(np.diff(places[..., 0].astype(int), axis=0)).max() < 30, "neighbours stay neighbours"


def test_outpaint_shows_all_but_the_margin(picture):
    hint = outpaint(picture, margin=0.25)
    assert np.array_equal(hint[24:72, 16:48], np.dstack([picture, np.full((96, 64), 255)])[24:72, 16:48])
    assert (hint > 0).any(-1).sum() == 48 * 32
    assert np.array_equal(outpaint(hint), hint), "a picture with a mask keeps it"


@pytest.fixture
def drawing():
    """A dark ring, four pixels wide, on light paper; inside it a faint one."""
    paper = np.full((256, 256, 3), 240, np.uint8)
    cv2.circle(paper, (128, 128), 90, (30, 30, 40), 4)
    cv2.circle(paper, (128, 128), 45, (225, 225, 225), 4)
    return paper


@pytest.mark.parametrize("annotator", [xdog, lineart_standard])
def test_a_drawing_s_own_lines_are_light_and_the_paper_black(annotator, drawing):
    light = annotator(drawing)[..., 0]
    on, off = drawing.max(-1) < 60, drawing.min(-1) > 235
    assert light[on].mean() > 100 and light[off].mean() < 5
    assert light[128, 38] > 4 * light[128, 83], "the faint ring is fainter"


def test_standard_lines_of_the_middle_strength_are_half_white():
    paper = np.full((256, 256, 3), 255, np.uint8)
    paper[::32] = 255 - 100  # lines of one strength
    assert abs(int(lineart_standard(paper)[128, 128, 0]) - 127) <= 2


@pytest.mark.parametrize("side", [128, 256, 512])
def test_a_scribble_of_a_large_picture_is_that_of_a_small_one(side, drawing):
    small = scribble(cv2.resize(drawing, (128, 128), interpolation=cv2.INTER_AREA)) > 0
    large = scribble(cv2.resize(drawing, (side, side), interpolation=cv2.INTER_AREA))
    seen = cv2.resize(large, (128, 128), interpolation=cv2.INTER_AREA) > 127
    assert small.any() and (small & seen).sum() / (small | seen).sum() > 0.75
