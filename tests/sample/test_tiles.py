"""Large pictures in overlapping tiles: everywhere covered, blended smoothly, each under its part of the hints."""

import itertools

import numpy as np
import pytest
import torch

from conftest import asked, relative
from controlkit.controls import new_control
from controlkit.errors import Invalid
from controlkit.formats import SavedControl
from controlkit.images import HintSpec
from controlkit.sample import Request, generate, pictures, prepare
from controlkit.sample.tiles import OVERLAP, Tile, blended, tiles_of

CONTRACT = HintSpec("canny")


@pytest.fixture(scope="module")
def branch(toy_base, drawn_joins):
    return drawn_joins(new_control(toy_base), 11).eval().requires_grad_(False)


def made(base, request, loaded=None):
    [picture] = pictures(generate(base, prepare(base, [request], loaded)))
    return picture


@pytest.mark.parametrize(("size", "side"), [((8, 8), 8), ((9, 30), 8), ((100, 7), 16), ((64, 64), 24)])
def test_tiles_cover_everything_and_overlap(size, side):
    tiles = tiles_of(size, side)
    covered = torch.zeros(size)
    for tile in tiles:
        tile.of(covered).add_(1)
        assert tile.of(covered).shape == (min(side, size[0]), min(side, size[1]))
    assert covered.min() >= 1
    for axis in ("top", "left"):
        starts = sorted({getattr(tile, axis) for tile in tiles})
        assert all(b - a <= side * (1 - OVERLAP) for a, b in itertools.pairwise(starts))


def test_equal_predictions_are_blended_to_themselves_and_others_pass_smoothly():
    tiles = tiles_of((16, 40), 16)
    x = torch.randn(2, 4, 16, 40)
    assert torch.allclose(blended(tiles, x, lambda i, part: part), x, atol=1e-6)
    steps = blended(tiles, x, lambda i, part: torch.full_like(part, float(i)))[0, 0, 8]
    assert steps[0] == 0 and steps[-1] == len(tiles) - 1
    assert (steps.diff() >= -1e-6).all() and steps.diff().max() < 0.3  # and no jump from 0 to 1


def test_a_tile_as_large_as_the_picture_is_the_picture_as_one(toy_base, branch):
    request, loaded = asked([SavedControl(branch, CONTRACT)], [np.zeros((32, 32, 3), np.uint8)], steps=3)
    plain = made(toy_base, request, loaded)
    for side in (32, 64):
        assert torch.equal(made(toy_base, request.model_copy(update={"tile": side}), loaded).latents, plain.latents)
    smaller = made(toy_base, request.model_copy(update={"tile": 16}), loaded)
    assert relative(smaller.latents, plain.latents) > 0.01


def test_each_tile_reads_its_part_of_the_hint_and_of_the_region(toy_base, branch, monkeypatch):
    hint = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    region = np.zeros((32, 64, 3), np.uint8)
    region[:, :24] = 255
    request, loaded = asked(
        [SavedControl(branch, CONTRACT)], [hint], [{"region": region}], steps=1, size=(32, 64), tile=32
    )
    read, real = [], branch.encode_hint
    monkeypatch.setattr(branch, "encode_hint", lambda hints, *more: read.append(hints) or real(hints, *more))
    scales, predict = [], toy_base.predict

    def watched(x, t, text, controls):
        scales.append(controls[0].scale["middle"][0, 0].mean(0).tolist() if controls else [])
        return predict(x, t, text, controls)

    monkeypatch.setattr(toy_base, "predict", watched)
    made(toy_base, request, loaded)
    whole = CONTRACT.tensor(hint, (32, 64))
    starts = [4 * tile.left for tile in tiles_of((8, 16), 8)]
    assert starts == [0, 16, 32]
    assert [torch.equal(part, whole[..., at : at + 32]) for part, at in zip(read, starts, strict=True)] == [True] * 3
    assert scales == [[1.0] * 6 + [0.0] * 2, [1.0] * 2 + [0.0] * 6, [0.0] * 8]


def test_a_walk_in_tiles_has_no_seams(toy_base):
    """The prediction of a base that reads only near places is the same in tiles as in one, but for their edges."""
    torch.manual_seed(0)
    kernel = torch.randn(4, 4, 3, 3) / 6
    x = torch.randn(1, 4, 24, 48)

    def predict(part):
        return torch.nn.functional.conv2d(part, kernel, padding=1)

    whole, tiled = predict(x), blended(tiles_of((24, 48), 16), x, lambda i, part: predict(part))
    assert relative(tiled[..., 1:-1, 1:-1], whole[..., 1:-1, 1:-1]) < 0.05  # an edge's wrong value counts little


def test_sides_that_the_base_cannot_make_are_refused(toy_base):
    with pytest.raises(Invalid, match="sides that 16 divides, such as 16"):
        prepare(toy_base, [Request(tile=20, size=(64, 64))])


def test_a_region_of_another_size_is_scaled_before_it_is_cut():
    region = torch.arange(4.0).view(1, 1, 1, 4)
    assert Tile(0, 4, 2, 4).of_region(region, (2, 8))[0, 0, 0].tolist() == [2.0, 2.0, 3.0, 3.0]


def test_the_second_pass_may_be_made_in_tiles(toy_base, monkeypatch):
    sizes, real = [], toy_base.predict
    monkeypatch.setattr(toy_base, "predict", lambda x, *more: sizes.append(x.shape[-1]) or real(x, *more))
    request = Request(steps=2, tile=32, hires={"factor": 2, "strength": 0.5})
    assert made(toy_base, request).pixels.shape == (64, 64, 3) and sizes == [8, 8] + [8] * 9
