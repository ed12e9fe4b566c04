"""Large pictures in tiles: the hints of the whole, without seams."""

import cv2
import numpy as np
import pytest

from controlkit.annotators import annotate, annotator, tiles

LOCAL = ("softedge", "lineart", "lineart_standard", "scribble_xdog", "blur_gaussian")


@pytest.fixture
def picture():
    """Shapes and noise on 250 x 190 pixels."""
    rng = np.random.default_rng(3)
    drawn = cv2.resize(rng.integers(0, 256, (25, 19, 3), np.uint8), (190, 250), interpolation=cv2.INTER_CUBIC)
    for _ in range(30):
        at, colour = rng.integers(0, 190, 2).tolist(), rng.integers(0, 256, 3).tolist()
        cv2.circle(drawn, at, int(rng.integers(3, 30)), colour, int(rng.choice([-1, 2])))
    return drawn


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("side", [40, 61])
def test_a_hint_made_in_tiles_is_that_of_the_whole(name, side, picture, monkeypatch):
    whole = annotate(picture, annotator(name).spec())
    seen = []
    monkeypatch.setattr(tiles, "SIDE", side)
    monkeypatch.setattr(tiles.np, "empty", lambda *size: seen.append(size) or np.zeros(*size))
    tiled = annotate(picture, annotator(name).spec())
    assert seen, "it was made in tiles"
    apart = abs(tiled.astype(int) - whole)
    if name == "scribble_xdog":  # a hard threshold: what lies on it may fall on either side
        assert (apart > 0).mean() < 1e-3
    else:
        assert apart.max() <= 1


def test_tiles_without_the_pixels_around_them_have_seams(picture, monkeypatch):
    blurred = cv2.GaussianBlur(picture, (0, 0), 4)
    monkeypatch.setattr(tiles, "SIDE", 40)
    made = [tiles.tiled(lambda part: cv2.GaussianBlur(part, (0, 0), 4), picture, reach) for reach in (0, 17)]
    assert abs(made[0].astype(int) - blurred).max() > 10 >= 10 * abs(made[1].astype(int) - blurred).max()


def test_strips_longer_than_opencv_moves_pixels_in_are_made_smaller_first(monkeypatch):
    monkeypatch.setattr(tiles, "LONGEST", 100)
    seen = []

    @tiles.shortened
    def annotate_some(pictures, device, gain=2.0):
        seen.extend(picture.shape for picture in pictures)
        return [picture // 2 for picture in pictures]

    pictures = [np.full((20, 400, 3), 90, np.uint8), np.full((100, 60, 3), 80, np.uint8)]
    strip, whole = annotate_some(pictures, "cpu")
    assert seen == [(5, 100, 3), (100, 60, 3)]
    assert strip.shape == (20, 400, 3) and (strip == 45).all() and (whole == 40).all()


def test_a_strip_of_forty_thousand_pixels_is_shuffled():
    picture = np.repeat(np.arange(40_000, dtype=np.uint32).astype(np.uint8)[None, :, None], 8, 0).repeat(3, 2)
    assert annotate(picture, annotator("shuffle").spec()).shape == picture.shape
