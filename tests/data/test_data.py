"""Pairs and their cache: the original's layout, splits, and what a training step reads."""

import errno
import json
import os
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from controlkit.annotators import annotate, annotator, maps
from controlkit.annotators.lines import canny
from controlkit.data import (
    CirclePairs,
    EmojiPairs,
    FolderPairs,
    Pair,
    ScenePairs,
    TypedPairs,
    build_cache,
    evaluation_pairs,
    hint_for_pair,
    make_fill50k,
    make_scenes,
    split_folder,
)
from controlkit.errors import UserError
from controlkit.files import OUTPUT
from controlkit.images import HintSpec, read_picture, to_tensor
from controlkit.measure import edge_f1
from controlkit.mini import world
from controlkit.mini.scenes import PALETTE, draw_scene, load_scenes
from controlkit.tensors import TensorWriter, read_filled

CANNY = annotator("canny").spec()


def same(a, b):
    return a.prompt == b.prompt and np.array_equal(a.picture, b.picture) and np.array_equal(a.hint, b.hint)


# --- sources ------------------------------------------------------------------------------------------------


def test_a_pair_s_own_hint_goes_before_its_picture_s_annotation():
    own = next(iter(CirclePairs(32, 1)))
    assert hint_for_pair(own, CANNY) is own.hint
    assert np.array_equal(hint_for_pair(Pair(own.picture, own.prompt), CANNY), canny(own.picture))


def test_circles_are_keyed_by_their_number():
    pairs = CirclePairs(32, 6, seed=1)
    assert len(list(pairs)) == 6
    assert all(same(a, b) for a, b in zip(CirclePairs(32, 2, seed=1, first=4), [pairs[4], pairs[5]], strict=True))
    assert not same(pairs[0], pairs[1]) and not same(pairs[0], CirclePairs(32, 1, seed=2)[0])
    assert all(" circle with " in pair.prompt for pair in pairs)


@pytest.mark.parametrize("split", ["control", "heldout_concepts"])
def test_emoji_pairs_are_the_split_s_on_each_ground(fake_packages, split):
    emoji = world.load_emoji(32)
    captions = [world.caption(emoji.concepts[row], emoji.styles[row], "red") for row in world.rows(emoji, split)]
    pairs = list(EmojiPairs(32, split, variants=3))
    assert [pair.prompt.split(", on ")[0] for pair in pairs] == [text.split(", on ")[0] for text in captions] * 3
    assert len({pair.picture.tobytes() for pair in pairs}) > 0.9 * len(pairs), "another ground or place each time"
    assert all(pair.hint is None for pair in pairs)


def test_a_count_of_emoji_is_spread_over_the_styles(fake_packages):
    few = EmojiPairs(32, "control", count=10)
    assert len(few) == len(list(few)) == 10
    assert {pair.prompt.split(", ")[1] for pair in few} == {f"{style} style" for style in world.STYLES}
    assert len(EmojiPairs(32, "control", count=10_000)) == len(EmojiPairs(32, "control"))


# --- the original's layout ----------------------------------------------------------------------------------


def test_fill50k_is_written_in_the_original_s_layout(tmp_path):
    assert list(make_fill50k(tmp_path, 2)) == [1, 2]
    lines = (tmp_path / "prompt.json").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"source": f"source/{i}.png", "target": f"target/{i}.png", "prompt": pair.prompt}
        for i, pair in enumerate(CirclePairs(512, 2))
    ]
    pictures = ("source/0.png", "source/1.png", "target/0.png", "target/1.png")
    assert {read_picture(tmp_path / name).shape for name in pictures} == {(512, 512, 3)}
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"prompt.json", "drawn.json", OUTPUT, *pictures}


def test_the_written_set_reads_back_as_it_is_drawn(tmp_path):
    list(make_fill50k(tmp_path, 3, size=32, seed=4))
    drawn = CirclePairs(32, 3, seed=4)
    assert all(same(a, b) for a, b in zip(FolderPairs(tmp_path, 32), drawn, strict=True))
    last = FolderPairs(tmp_path, 32).part(slice(2, None))
    assert len(last) == 1 and same(last[0], drawn[2])
    small = FolderPairs(tmp_path, 16)[0]
    assert small.picture.shape == hint_for_pair(small, HintSpec("canny")).shape == (16, 16, 3)


def test_a_thin_outline_drawn_large_is_still_a_line_on_a_small_base(tmp_path):
    list(make_fill50k(tmp_path, 4))
    contract = annotator("canny").spec()
    for large, small in zip(FolderPairs(tmp_path, 64), CirclePairs(512, 4), strict=True):
        hint = hint_for_pair(large, contract)
        assert edge_f1(hint, annotate(large.picture, contract)) > 0.6
        assert 0.01 < (hint > 127).mean() < 0.2, "faded, or grown to a blob"
        assert small.hint.shape == (512, 512, 3)


def test_a_set_begun_with_another_seed_or_size_is_not_mixed_with_this_one(tmp_path):
    next(make_fill50k(tmp_path, 2, size=32, seed=4))
    for other in ({"size": 16, "seed": 4}, {"size": 32, "seed": 5}):
        with pytest.raises(UserError, match="was begun with size 32 and seed 4"):
            next(make_fill50k(tmp_path, 2, **other))


def test_pairs_somebody_else_made_are_not_overwritten(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "drawn.json").write_text("[theirs]")
    with pytest.raises(UserError, match="was begun with size None"):
        next(make_fill50k(tmp_path / "other", 2, size=32))
    (tmp_path / "other" / "drawn.json").write_text(json.dumps({"size": 32, "seed": "\u202eright\n" * 5000}))
    with pytest.raises(UserError, match="was begun with size 32 and seed") as refused:
        next(make_fill50k(tmp_path / "other", 2, size=32))
    assert len(str(refused.value)) < 600 and str(refused.value).isprintable()
    (tmp_path / "prompt.json").write_text("theirs")
    with pytest.raises(UserError, match="not drawn here"):
        next(make_fill50k(tmp_path, 2, size=32))
    assert (tmp_path / "prompt.json").read_text() == "theirs"


def test_an_interrupted_set_is_not_taken_for_a_whole_one_and_goes_on(tmp_path):
    assert list(islice(make_fill50k(tmp_path, 4, size=32), 2)) == [1, 2]
    with pytest.raises(UserError, match=r"holds no prompt\.json"):
        FolderPairs(tmp_path, 32)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert before
    list(make_fill50k(tmp_path, 4, size=32))
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was there was not drawn again"
    assert all(same(a, b) for a, b in zip(FolderPairs(tmp_path, 32), CirclePairs(32, 4), strict=True))


@pytest.mark.parametrize(("count", "held"), [(3, 2), (20, 2), (45, 4), (6000, 512)])
def test_a_tenth_of_a_folder_is_held_out(count, held, tmp_path):
    for name in "st":
        (tmp_path / name).touch()
    lines = [json.dumps({"source": "s", "target": "t", "prompt": str(i)}) for i in range(count)]
    (tmp_path / "prompt.json").write_text("\n".join(lines))
    trained, heldout = split_folder(tmp_path, 32)
    assert (len(trained), len(heldout)) == (count - held, held)


def test_a_folder_too_small_to_hold_any_out_is_refused(tmp_path):
    list(make_fill50k(tmp_path, 2, size=32))
    with pytest.raises(UserError, match="has 2 pairs: expected at least 3"):
        split_folder(tmp_path, 32)


@pytest.mark.parametrize("source", ["emoji", "fill50k", "folder"])
def test_evaluation_sees_no_pair_of_a_training_run(source, fake_packages, tmp_path):
    list(make_fill50k(tmp_path, 30, size=32))
    trained = {
        "emoji": EmojiPairs(32, "control", 2),
        "fill50k": CirclePairs(32, 200),
        "folder": split_folder(tmp_path, 32)[0],
    }[source]
    heldout, reference = evaluation_pairs(str(tmp_path) if source == "folder" else source, 32, 3)
    assert len(heldout) == 3
    seen = {pair.picture.tobytes() for pair in trained}
    assert not seen & {pair.picture.tobytes() for pair in heldout}
    assert reference and not seen & {picture.tobytes() for picture in reference}


@pytest.mark.parametrize(
    "content",
    [
        b"{not json}",
        b"[1, 2]",
        b"7",
        b'{"source": "a", "target": "b"}',
        b'{"source": "a", "target": "b", "prompt": "c"}\n{"source":',
        b"\xff\xfa",
    ],
)
def test_a_bad_prompt_json_is_named_in_one_sentence(content, tmp_path):
    for name in "ab":
        (tmp_path / name).touch()
    (tmp_path / "prompt.json").write_bytes(content)
    with pytest.raises(UserError, match=r"JSON object a line|UTF-8") as caught:
        FolderPairs(tmp_path, 32)
    assert str(tmp_path / "prompt.json") in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_picture_of_a_set_is_named(tmp_path):
    list(make_fill50k(tmp_path, 1, size=32))
    (tmp_path / "target/0.png").unlink()
    with pytest.raises(UserError, match=r"target/0\.png"):
        FolderPairs(tmp_path, 32)[0]


# --- the cache ----------------------------------------------------------------------------------------------


@pytest.fixture
def pairs():
    """Five pairs; two share a prompt, one has none."""
    drawn = list(CirclePairs(32, 5))
    drawn[3] = Pair(drawn[3].picture, drawn[0].prompt)
    drawn[4] = Pair(drawn[4].picture, "", drawn[4].hint)
    return drawn


def test_a_cache_holds_what_a_step_needs(toy_base, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr("controlkit.data.cache.AT_ONCE", 2)
    counted = []
    [cached] = build_cache(toy_base, pairs, {"": CANNY}, tmp_path / "cache.safetensors", counted.append)
    assert (len(cached), counted) == (5, [2, 2, 1])
    moments = toy_base.encode_moments(to_tensor([pair.picture for pair in pairs]))
    assert torch.allclose(cached.moments.float(), moments, atol=1e-2)
    assert np.array_equal(cached.hints, [hint_for_pair(pair, CANNY) for pair in pairs])
    assert len(cached.text) == 4, "one row a distinct prompt, the empty one among them"
    expected = toy_base.encode_text([pair.prompt for pair in pairs]).tokens
    assert torch.allclose(cached.text[cached.prompt_rows].tokens.float(), expected, atol=1e-2)
    assert torch.allclose(cached.text.tokens[0].float(), toy_base.encode_text([""]).tokens[0], atol=1e-2)


def test_row_zero_is_the_empty_prompt_though_no_pair_has_it(toy_base, pairs, tmp_path):
    [cached] = build_cache(toy_base, pairs[:2], {"": CANNY}, tmp_path / "cache.safetensors")
    assert torch.allclose(cached.text.tokens[0].float(), toy_base.encode_text([""]).tokens[0], atol=1e-2)
    assert 0 not in cached.prompt_rows


def test_a_cache_is_built_once_and_read_back_equal(toy_base, pairs, tmp_path, monkeypatch):
    path = tmp_path / "cache.safetensors"
    [built] = build_cache(toy_base, pairs, {"": CANNY}, path)

    def encode(*args):
        raise AssertionError("the cache was built again")

    monkeypatch.setattr(toy_base, "encode_moments", encode)
    monkeypatch.setattr(toy_base, "encode_text", encode)
    [read] = build_cache(toy_base, pairs, {"": CANNY}, path)
    before, after = ({**vars(c), **c.text.tensors()} for c in (built, read))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items() if torch.is_tensor(value))


def test_an_interrupted_cache_leaves_nothing(toy_base, pairs, tmp_path):
    def interrupt(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(toy_base, pairs, {"": CANNY}, tmp_path / "cache.safetensors", interrupt)
    assert not list(tmp_path.iterdir())


# --- scenes, and types of hint ------------------------------------------------------------------------------


@pytest.fixture
def scenes(fake_packages):
    """Two dozen scenes of 32 pixels, drawn once for all tests."""
    return load_scenes(32, 0, 24)


def test_scene_pairs_are_those_with_or_without_something_held_out_and_with_a_figure_if_asked(scenes):
    for heldout in (False, True):
        wanted = [scene for scene in scenes if scene.heldout == heldout]
        pairs = ScenePairs(32, 24, heldout=heldout)
        assert len(pairs) == len(wanted) > 2
        for pair, scene in zip(pairs, wanted, strict=True):
            assert np.array_equal(pair.picture, scene.picture) and pair.prompt in scene.captions
            assert np.array_equal(pair.truth.depth, scene.depth)
    people = ScenePairs(32, 24, person=True)
    assert 0 < len(people) < len(ScenePairs(32, 24)) and all(len(pair.truth.keypoints) for pair in people)
    assert len(ScenePairs(32, 24, count=2)) == 2
    firsts = [pair.prompt == pair.truth.captions[0] for pair in ScenePairs(32, 24)]
    assert any(firsts) and not all(firsts), "prompts come in several wordings"


def test_hints_of_truth_are_drawn_from_it_and_the_others_from_the_picture(scenes):
    pair = next(iter(ScenePairs(32, 24, person=True)))
    truth = pair.truth
    assert np.array_equal(hint_for_pair(pair, HintSpec("depth")), maps.depth_picture(truth.depth))
    assert np.array_equal(hint_for_pair(pair, HintSpec("normal")), maps.normal_picture(truth.normals))
    assert np.array_equal(hint_for_pair(pair, HintSpec("seg")), PALETTE[truth.labels])
    assert np.array_equal(hint_for_pair(pair, HintSpec("pose")), maps.pose_picture(truth.keypoints, (32, 32)))
    assert np.array_equal(hint_for_pair(pair, CANNY), canny(pair.picture))


@pytest.mark.parametrize("kind", ["depth", "normal", "seg", "pose"])
def test_of_a_picture_of_which_nothing_is_known_no_truth_is_drawn(kind, pairs):
    with pytest.raises(UserError, match=rf"Hints of {kind} are drawn from a scene's truth.* data.source: scenes"):
        hint_for_pair(Pair(pairs[0].picture, ""), HintSpec(kind))


def test_types_go_round_and_none_is_asked_of_a_pair_that_lacks_what_it_shows(scenes):
    circles, drawn = [Pair(p.picture, p.prompt) for p in CirclePairs(32, 10)], ScenePairs(32, 24)
    types = ["canny", "depth", "pose", "tile"]
    typed = TypedPairs([circles, drawn], types, [1, 4])
    pairs = list(islice(typed, len(typed)))
    known = [pair for pair in pairs if pair.truth is not None]
    assert {pair.kind for pair in pairs if pair.truth is None} == {"canny", "tile"}
    assert {pair.kind for pair in known} == set(types)
    assert all(len(pair.truth.keypoints) for pair in known if pair.kind == "pose")
    counts = {kind: sum(pair.kind == kind for pair in known) for kind in types}
    assert counts["depth"] > 1.5 * counts["canny"], "types of truth come twice as often"
    visits = [pair.kind for pair in known if np.array_equal(pair.picture, drawn[0].picture)]
    assert len(visits) >= 3 and len(set(visits)) == len(visits), "each visit brings another type"
    assert not len(TypedPairs([circles], ["depth"], [1]))
    often = [pair.kind for pair in islice(TypedPairs([circles], ["canny", "tile", "tile", "tile"], [4]), 40)]
    assert often.count("tile") == 30, "a type named three times comes three times as often"


def test_what_a_cache_is_filled_with_lies_in_the_file_and_is_a_safetensors_file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.uint8, torch.float16, torch.int64, torch.uint16, torch.float32]
    tensors = {f"{i}": (9 * torch.rand(3, 2 * i + 1, generator=generator)).to(k) for i, k in enumerate(kinds)}
    tensors["none"] = torch.empty(0, 3)
    path = tmp_path / "x.safetensors"
    path.touch()
    writer = TensorWriter(path)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    large = writer.empty("large", (4, 5), torch.float32)
    large[2] = 7
    writer.close()
    for read in (read_filled(path), {k: v for k, v in load_file(path).items() if not k.startswith("_")}):
        assert read.keys() == {*tensors, "large"} and float(read["large"].sum()) == 35
        assert all(read[name].dtype == tensor.dtype for name, tensor in tensors.items())
        assert all(np.array_equal(read[name].numpy(), tensor.numpy()) for name, tensor in tensors.items())


def test_a_cache_that_the_disk_does_not_hold_is_refused_before_it_is_filled(toy_base, pairs, tmp_path, monkeypatch):
    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        build_cache(toy_base, pairs, {"": CANNY}, tmp_path / "cache.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_cache_says_which_type_each_hint_is_of_and_masks_nothing_of_those_without_masks(toy_base, pairs, tmp_path):
    contracts = {"canny": CANNY, "inpaint": annotator("inpaint").spec()}
    typed = [Pair(p.picture, p.prompt, kind=kind) for p, kind in zip(pairs, ["inpaint", "canny"] * 2, strict=False)]
    [cached] = build_cache(toy_base, typed, contracts, tmp_path / "cache.safetensors")
    assert cached.kinds.tolist() == [1, 0, 1, 0] and cached.hints.shape == (4, 32, 32, 4)
    assert np.array_equal(cached.hints[1, ..., :3], canny(typed[1].picture))
    assert (cached.hints[1::2, ..., 3] == 255).all() and (cached.hints[::2, ..., 3] == 0).any()


def test_evaluation_on_scenes_sees_held_out_ones_of_a_seed_nothing_is_trained_on(scenes, monkeypatch):
    monkeypatch.setattr("controlkit.data.pairs.SCENES_EVALUATED", 24)
    heldout, reference = evaluation_pairs("scenes", 32, 2)
    assert len(heldout) == 2 and all(pair.truth.heldout for pair in heldout)
    seen = {scene.picture.tobytes() for scene in scenes}
    assert not seen & {picture.tobytes() for picture in reference}
    assert not seen & {pair.picture.tobytes() for pair in heldout} and len(reference) > 2
    people, _ = evaluation_pairs("scenes", 32, 1, person=True)
    assert len(people[0].truth.keypoints)
    with pytest.raises(UserError, match="measure on at most as many"):
        evaluation_pairs("scenes", 32, 24)


def test_scenes_are_written_with_all_that_is_known_of_them(tmp_path):
    assert list(make_scenes(tmp_path, 3, size=32, seed=7, hint="normal")) == [1, 2, 3]
    kinds = ("target", "depth", "normal", "seg", "pose", "edges")
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    truths = {f"truth/{i}.{end}" for i in range(3) for end in ("npz", "json")}
    pictures = {f"{kind}/{i}.png" for kind in kinds for i in range(3)}
    assert files == {"prompt.json", "metadata.jsonl", "drawn.json", OUTPUT} | truths | pictures
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    for i, (pair, row) in enumerate(zip(FolderPairs(tmp_path, 32), rows, strict=True)):
        scene = draw_scene(32, 7, i)
        assert np.array_equal(pair.picture, scene.picture) and pair.prompt == scene.captions[0] == row["text"]
        assert np.array_equal(pair.hint, maps.normal_picture(scene.normals))
        assert row["file_name"] == f"target/{i}.png" and tuple(row["captions"]) == scene.captions
        assert row["heldout"] == scene.heldout
        with np.load(tmp_path / "truth" / f"{i}.npz", allow_pickle=False) as exact:
            assert {"depth", "normals", "labels", "instances", "edges", "lines", "keypoints"} <= set(exact.files)
            for name in exact.files:
                assert np.array_equal(exact[name], getattr(scene, name)), name


def test_interrupted_scenes_go_on_and_another_seed_or_an_unknown_hint_is_refused(tmp_path):
    next(make_scenes(tmp_path, 3, size=32))
    with pytest.raises(UserError, match=r"holds no prompt\.json"):
        FolderPairs(tmp_path, 32)
    with pytest.raises(UserError, match="was begun with size 32 and seed 0"):
        next(make_scenes(tmp_path, 3, size=32, seed=1))
    with pytest.raises(UserError, match='did you mean "depth"'):
        next(make_scenes(tmp_path / "other", 1, size=32, hint="deph"))
    assert not (tmp_path / "other").exists()
    first = tmp_path / "target" / "0.png"
    before = first.stat().st_mtime_ns
    assert list(make_scenes(tmp_path, 3, size=32)) == [2, 3]
    assert first.stat().st_mtime_ns == before and len(FolderPairs(tmp_path, 32)) == 3
