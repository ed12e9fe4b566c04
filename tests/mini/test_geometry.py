"""Buckets and mirrors: a picture, its hint and what is known of it go through one geometry."""

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from controlkit.annotators import annotator, maps
from controlkit.annotators.lines import canny
from controlkit.annotators.people import limb_colour
from controlkit.backbones import TextEmbedding
from controlkit.data import (
    Cached,
    CirclePairs,
    FolderPairs,
    Pair,
    ScenePairs,
    bucket_sizes,
    build_cache,
    hint_for_pair,
    mirrored,
    turn_at,
)
from controlkit.data.buckets import nearest_bucket
from controlkit.decoding import sides_of
from controlkit.errors import UserError
from controlkit.images import HintSpec, decode_picture, write_png
from controlkit.mini.truth import MIRRORED
from controlkit.train import BatchPlan, draw_batch, resolve, train_control
from controlkit.train.recipe import parse_recipe
from controlkit.train.setup import describe_buckets, training_pairs

CANNY = annotator("canny").spec()


def recipe_of(**changes):
    plain = {"steps": 4, "batch": 2, "lr": 1e-3, "checkpoint_every": 1, "evaluation": {"every": 0}}
    return parse_recipe(plain | changes)


# --- the sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "multiple"), [(32, 8), (128, 32), (512, 64), (1024, 64), (100, 8)])
def test_buckets_have_sides_that_fit_and_no_more_pixels_than_the_square(size, multiple):
    sizes = bucket_sizes(size, multiple)
    assert len(sizes) == len(set(sizes)) > 4 and (size // multiple * multiple,) * 2 in sizes
    for height, width in sizes:
        assert height % multiple == width % multiple == 0 and height * width <= size * size
        assert min(height, width) * 2 >= size and (width, height) in sizes


def test_a_picture_goes_to_the_bucket_nearest_in_shape():
    sizes = bucket_sizes(512, 64)
    assert nearest_bucket((512, 512), sizes) == nearest_bucket((90, 91), sizes) == (512, 512)
    assert nearest_bucket((1080, 1920), sizes) == (384, 640) and nearest_bucket((1920, 1080), sizes) == (640, 384)
    assert nearest_bucket((10, 4000), sizes) == (256, 1024), "what is longer than any is cut"
    assert nearest_bucket((100, 100), [(256, 256), (512, 512)]) == (512, 512)


# --- whose turn it is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "batch"), [([7, 3, 1], 2), ([40, 1, 9, 9], 4), ([2, 3], 16), ([5], 3), ([1] * 9, 7)]
)
def test_each_bucket_s_batches_come_in_order_and_as_often_as_it_has_pictures(counts, batch):
    had = [0] * len(counts)
    steps = 3 * sum(counts)
    for step in range(steps):
        which, turn = turn_at(counts, batch, step, seed=0)
        assert turn == had[which]
        had[which] += 1
        epochs = (step + 1) * batch / sum(counts)
        assert all(
            abs(n * batch - epochs * c) < (len(counts) + 1) * (batch + c) for n, c in zip(had, counts, strict=True)
        )
    assert len(counts) == 1 or [turn_at(counts, batch, step, 0)[0] for step in range(steps)] != [
        turn_at(counts, batch, step, 1)[0] for step in range(steps)
    ]


def cached_of(count, height, width, start=0, mirrors=False):
    """Pairs that can be told apart: pair i has latents and hint start + i, its mirror image's 100 more."""
    values = torch.arange(start, start + count)
    values = torch.cat([values, values + 100]) if mirrors else values
    means = values.view(-1, 1, 1, 1).expand(-1, 4, height // 4, width // 4).float()
    moments = torch.cat([means, torch.full_like(means, -30.0)], 1).half()
    hints = values.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, height, width, 3).contiguous()
    text, zeros = TextEmbedding(torch.zeros(count + 1, 4, 32).half()), torch.zeros(count, dtype=torch.long)
    summary_of = torch.arange(count) + count if mirrors else None
    return Cached(moments, hints, zeros, text, torch.arange(1, count + 1), summary_of)


def hinted(batch):
    return (255 * batch.hints[""][:, 0, 0, 0]).round().int().tolist()


def test_batches_are_of_one_bucket_and_an_epoch_of_buckets_is_every_pair_once(toy_base):
    buckets, plan = [cached_of(4, 32, 32), cached_of(6, 24, 40, start=50)], BatchPlan.of(recipe_of(), {"": CANNY})
    seen, steps = [], []
    for step in range(10):
        which, turn = turn_at([4, 6], 2, step, plan.seed)
        batch = draw_batch(toy_base, buckets[which], plan, step, turn=turn)
        assert batch.latents.shape[-2:] == ((8, 8), (6, 10))[which]
        halves = [draw_batch(toy_base, buckets[which], plan, step, k, 2, turn) for k in (0, 1)]
        assert torch.equal(torch.cat([half.noise for half in halves]), batch.noise), "parts of it are of the same"
        seen += hinted(batch)
        steps.append(batch.noise.flatten()[:8])
    assert Counter(seen[:10]) == Counter(seen[10:]) == Counter([*range(4), *range(50, 56)])
    assert len(torch.stack(steps).unique(dim=0)) == 10, "noise is keyed by the step, not by the bucket's turn"


# --- pictures in buckets ------------------------------------------------------------------------------------


@pytest.fixture
def shaped(tmp_path):
    """Ten pictures of two shapes; the hint of each is the picture itself."""
    rng = np.random.default_rng(0)
    for i in range(10):
        picture = rng.integers(0, 256, (40, 80, 3) if i % 2 else (60, 60, 3), dtype=np.uint8)
        for folder in ("images", "conditioning"):
            write_png(tmp_path / "set" / folder / f"{i}.png", picture)
        (tmp_path / "set/images" / f"{i}.txt").write_text("noise")
    return tmp_path / "set"


def test_picture_and_hint_go_through_one_crop(shaped):
    pairs = FolderPairs(shaped, 32).bucketed(bucket_sizes(32, 8))
    sizes = [pair.picture.shape[:2] for pair in pairs.part(slice(None))]
    assert sizes == [pairs.size_of(i) for i in range(10)] == [(32, 32), (24, 40)] * 5
    assert [pair.picture.shape for pair in FolderPairs(shaped, 32)] == [(32, 32, 3)] * 10
    assert pairs.part(slice(1, 2)).size_of(0) == (24, 40)
    for pair in pairs:
        assert np.array_equal(hint_for_pair(pair, HintSpec("tile")), pair.picture)
        labels = hint_for_pair(pair, HintSpec("seg", resize="nearest"))
        assert {*map(tuple, labels.reshape(-1, 3))} <= {*map(tuple, pair.hint.reshape(-1, 3))}, "no label is mixed"


def test_a_picture_on_its_side_goes_to_the_bucket_of_what_is_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 40)).save(tmp_path / "a.jpg", exif=exif)
    data = (tmp_path / "a.jpg").read_bytes()
    assert sides_of(data, "a") == decode_picture(data, "a").shape[:2] == (80, 40)
    with pytest.raises(UserError, match="b cannot be read"):
        sides_of(b"nothing", "b")


def test_a_cache_of_buckets_reads_back_and_tells_sdxl_each_picture_s_size(xl_base, shaped, tmp_path):
    pairs = FolderPairs(shaped, 64).bucketed([(64, 64), (32, 64)])
    built = build_cache(xl_base, pairs, {"": HintSpec("tile")}, tmp_path / "pairs")
    read = build_cache(xl_base, pairs, {"": HintSpec("tile")}, tmp_path / "pairs")
    assert [one.size for one in built] == [one.size for one in read] == [(32, 64), (64, 64)]
    for one, again, rows in zip(built, read, ([1, 3, 5, 7, 9], [0, 2, 4, 6, 8]), strict=True):
        assert np.array_equal(one.hints, [pairs[i].picture for i in rows])
        assert torch.equal(one.hints, again.hints) and torch.equal(one.moments, again.moments)
        assert one.moments.shape[-2:] == (one.size[0] // 8, one.size[1] // 8)
        sizes = draw_batch(xl_base, again, BatchPlan.of(recipe_of(), {"": HintSpec("tile")}), 0).text.sizes
        assert sizes.tolist() == [[*one.size, 0, 0, *one.size]] * 2


def test_a_run_in_buckets_says_so_and_goes_on_where_it_stopped(toy_base, shaped, tmp_path):
    recipe, stages = recipe_of(data={"source": str(shaped), "buckets": True, "flip": 0.5}), []
    whole = list(train_control(recipe, tmp_path / "whole", toy_base, lambda *stage: stages.append(stage)))
    list(itertools.islice(train_control(recipe, tmp_path / "stopped", toy_base), 2))
    rest = list(train_control(recipe, tmp_path / "stopped", toy_base))
    assert [record.loss for record in whole[2:]] == [record.loss for record in rest]
    assert ("pictures in 2 sizes: 48x16 4, 32x32 4", 0) in stages
    sizes = [cached_of(1, 32, 32), cached_of(2, 24, 40)]
    assert "1 of them with fewer than a batch" in describe_buckets(sizes, recipe.batch)


def test_buckets_of_what_is_square_are_refused(toy_base):
    with pytest.raises(UserError, match="those of fill50k are square"):
        training_pairs(resolve(recipe_of(data={"source": "fill50k", "buckets": True})).data, toy_base)


# --- mirrors ------------------------------------------------------------------------------------------------


@pytest.fixture
def figure(fake_packages):
    """A scene with a figure in it, as a pair whose prompt tells no sides."""
    pair = next(iter(ScenePairs(64, 24, person=True)))
    return dataclasses.replace(pair, prompt="a figure")


def flipped(picture):
    return picture[:, ::-1]


def test_the_hint_of_a_mirrored_pair_is_the_annotation_of_the_mirrored_picture():
    plain = Pair(CirclePairs(64, 1)[0].picture, "a circle")
    for name in ("canny", "inpaint", "scribble"):
        contract = annotator(name).spec()
        turned = mirrored(plain, contract)
        assert np.array_equal(turned.picture, flipped(plain.picture))
        assert np.array_equal(hint_for_pair(turned, contract), annotator(name).make([flipped(plain.picture)])[0])
    assert not np.array_equal(hint_for_pair(mirrored(plain, CANNY), CANNY), hint_for_pair(plain, CANNY))


@pytest.mark.parametrize("kind", ["depth", "seg"])
def test_a_hint_of_places_alone_is_mirrored_as_it_is(kind, figure):
    contract = HintSpec(kind, resize="nearest")
    drawn = hint_for_pair(figure, contract)
    given = Pair(figure.picture, "a figure", drawn)
    for pair in (figure, given):
        assert np.array_equal(hint_for_pair(mirrored(pair, contract), contract), flipped(drawn))


def test_in_a_mirror_normals_point_the_other_way_and_everything_else_of_them_stays(figure):
    contract = HintSpec("normal")
    drawn = hint_for_pair(figure, contract)
    before = maps.normals_of(flipped(drawn))
    for pair in (figure, Pair(figure.picture, "a figure", drawn)):
        after = maps.normals_of(hint_for_pair(mirrored(pair, contract), contract))
        assert np.abs(after - before * [-1, 1, 1]).max() < 0.02
    assert np.abs(before[..., 0]).max() > 0.5, "some point to a side"
    nothing = np.full((4, 4, 3), maps.FACING, np.uint8)
    assert np.array_equal(maps.turn_normals(nothing), nothing)


def test_in_a_mirror_the_left_wrist_s_colour_is_where_the_right_one_s_was(figure):
    assert [MIRRORED[k] for k in MIRRORED] == list(range(18))
    keypoints = np.stack([np.linspace(8, 50, 18), np.tile([10, 50, 30], 6), np.ones(18)], 1)[None]
    contract = HintSpec("pose", resize="nearest")
    drawn = maps.pose_picture(keypoints, (64, 64))
    scene = dataclasses.replace(figure.truth, keypoints=keypoints.astype(np.float32))
    at = {joint: (x, y) for joint, x, y in maps.keypoints_of(drawn)}
    for pair, off in ((Pair(figure.picture, "", drawn), 0), (dataclasses.replace(figure, truth=scene), 1)):
        picture = hint_for_pair(mirrored(pair, contract), contract)
        found = {joint: (x, y) for joint, x, y in maps.keypoints_of(picture)}
        right, left = 4, 7
        assert found[left] == pytest.approx((63 - at[right][0] + off, at[right][1]), abs=0.6)
        assert found[right] == pytest.approx((63 - at[left][0] + off, at[left][1]), abs=0.6)
        assert found[0] == pytest.approx((63 - at[0][0] + off, at[0][1]), abs=0.6), "a nose has no side"
    limbs = maps.swap_sides(maps.pose_picture(keypoints * (np.arange(18) != 4)[None, :, None], (64, 64)))
    right_forearm, left_forearm = ((limbs == limb_colour(k)).all(-1).any() for k in (3, 5))
    assert right_forearm and not left_forearm, "limbs change sides with their joints"


def test_a_pose_whose_colours_are_blended_is_refused_in_words():
    drawn = np.full((8, 8, 3), (200, 10, 10), np.uint8)
    with pytest.raises(UserError, match=r"colour \(200, 10, 10\) at x 0, y 0 .* data.flip: 0"):
        mirrored(Pair(drawn, "a figure", drawn), HintSpec("openpose", resize="nearest"))
    with pytest.raises(UserError, match="these are of no named kind"):
        mirrored(Pair(drawn, "a figure", drawn), HintSpec(""))


@pytest.mark.parametrize(
    ("prompt", "tells"),
    [("a cat to the left", True), ("Right-handed", True), ("bright light", False), ("turning clockwise", True)],
)
def test_a_pair_whose_prompt_tells_left_from_right_has_no_mirror_image(prompt, tells):
    assert (mirrored(Pair(np.zeros((8, 8, 3), np.uint8), prompt), CANNY) is None) == tells


def test_a_truth_s_lines_and_edges_are_mirrored_with_it(figure):
    before, after = figure.truth, mirrored(figure, HintSpec("depth")).truth
    assert np.array_equal(after.edges, flipped(before.edges)) and np.array_equal(after.labels, flipped(before.labels))
    assert np.allclose(after.lines[:, [0, 2]], 64 - before.lines[:, [0, 2]])
    assert np.array_equal(after.lines[:, [1, 3]], before.lines[:, [1, 3]])


def test_a_share_of_visits_sees_latents_and_hint_of_the_mirror_image(toy_base):
    cached = cached_of(10, 32, 32, mirrors=True)
    for share in (0.0, 0.4, 1.0):
        plan, turned = BatchPlan.of(recipe_of(batch=10, data={"flip": share}), {"": CANNY}), []
        for step in range(40):
            batch = draw_batch(toy_base, cached, plan, step)
            latents = (batch.latents.mean((1, 2, 3)) / toy_base.vae.config.scaling_factor).round().int().tolist()
            assert latents == hinted(batch), "both or none"
            assert sorted(value % 100 for value in latents) == list(range(10)), "every pair once, either way"
            turned += [value >= 100 for value in latents]
        assert np.mean(turned) == pytest.approx(share, abs=0.08 if 0 < share < 1 else 0)


def test_a_cache_with_mirrors_holds_both_and_what_has_none_stands_for_itself(toy_base, tmp_path, monkeypatch):
    monkeypatch.setattr("controlkit.data.cache.AT_ONCE", 2)
    pairs = [Pair(pair.picture, prompt) for pair, prompt in zip(CirclePairs(32, 3), ["a", "left", "b"], strict=True)]
    [cached] = build_cache(toy_base, pairs, {"": CANNY}, tmp_path / "pairs", mirrors=True)
    assert cached.mirrors.tolist() == [3, 1, 5] and len(cached) == 3
    for row, mirror in ((0, 3), (2, 5)):
        assert np.array_equal(cached.hints[row], canny(pairs[row].picture))
        assert np.array_equal(cached.hints[mirror], canny(np.ascontiguousarray(flipped(pairs[row].picture))))
        assert not torch.equal(cached.moments[row], cached.moments[mirror])
    [again] = Cached.read(tmp_path / "pairs")
    assert torch.equal(again.mirrors, cached.mirrors)
