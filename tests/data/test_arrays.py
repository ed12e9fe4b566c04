"""Hints of any number of channels, 16 bits and arrays; several hints as channels of one control."""

import io
import json
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import make
from controlkit.annotators import annotate, annotator, contract, grounds_of, joined, parts_of
from controlkit.data import (
    CirclePairs,
    FolderPairs,
    Pair,
    add_up,
    build_cache,
    build_set,
    examine,
    hint_for_pair,
    mirrored,
    read_listing,
    sheet_rows,
)
from controlkit.errors import UserError
from controlkit.formats import load_control
from controlkit.images import HintSpec, decode_hint, fit, png_bytes, read_hint, read_picture, write_png
from controlkit.measure import edge_f1, fidelity
from controlkit.train import resolve, train_control
from controlkit.train.recipe import parse_recipe
from controlkit.train.setup import training_pairs

SIDE = 32


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def drawn(dtype, channels=3, seed=0, size=(8, 12)):
    values = np.random.default_rng(seed).random((*size, channels))
    return values.astype(dtype) if dtype == np.float32 else (values * np.iinfo(dtype).max).astype(dtype)


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_an_array_s_file_is_read_as_it_was_saved(dtype, channels):
    array = drawn(dtype, channels)
    read = decode_hint(npy(array), "x.npy")
    assert read.dtype == dtype and np.array_equal(read, array)
    swapped = decode_hint(npy(array.astype(array.dtype.newbyteorder(">"))), "x.npy")
    assert swapped.dtype == dtype and np.array_equal(swapped, array)


@pytest.mark.parametrize(
    ("kind", "colour", "nothing"),
    [("canny", (255, 255, 255), 0), ("lineart", (0, 0, 0), 255), ("depth", (90, 90, 90), 0), ("tile", (9, 9, 9), 255)],
)
def test_a_fourth_channel_of_bytes_is_transparency_as_in_a_picture(kind, colour, nothing, tmp_path):
    clear = np.full((SIDE, SIDE, 4), (*colour, 0), np.uint8)
    clear[4:-4, 8:12, 3] = 255
    clear[0, 0, 3] = 128
    np.save(tmp_path / "a.npy", np.asfortranarray(clear))
    Image.fromarray(clear).save(tmp_path / "a.png")
    spec = contract(kind)
    array, picture = (read_hint(tmp_path / name, *grounds_of(spec)) for name in ("a.npy", "a.png"))
    assert np.array_equal(array, picture) and tuple(array[-1, -1]) == (nothing,) * 3
    masked, four = (grounds_of(one) for one in (contract("inpaint"), replace(spec, channels=4)))
    assert all(np.array_equal(read_hint(tmp_path / "a.npy", *ground), clear) for ground in (masked, four))
    assert torch.equal(replace(spec, channels=4).tensor(clear, (SIDE, SIDE))[0, 3] * 255, torch.tensor(clear[..., 3]))


def test_flat_arrays_truth_values_and_other_floats_are_brought_to_what_hints_are():
    flat = np.array([[True, False]])
    assert decode_hint(npy(flat), "x").tolist() == [[[255], [0]]]
    assert decode_hint(npy(np.float64([[0.25]])), "x").dtype == np.float32
    assert decode_hint(npy(np.float16([[0.25]])), "x").tolist() == [[[0.25]]]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (npy(np.zeros((4, 4), np.int64)), "an array of int64: expected uint8 or uint16"),
        (npy(np.zeros(4, np.uint8)), "has the shape 4: expected height x width"),
        (npy(np.zeros((0, 4), np.uint8)), "has the shape 0 x 4"),
        (npy(np.zeros((4, 4)))[:150], "cannot be read as an array"),
        (npy(np.array([[{}]], object)), "cannot be read as an array .*allow_pickle=False"),
    ],
    ids=["whole numbers", "one axis", "nothing", "torn", "pickle"],
)
def test_an_array_that_is_no_hint_is_refused_in_words(data, words):
    with pytest.raises(UserError, match=rf"x.npy .*{words}"):
        decode_hint(data, "x.npy")


def test_sixteen_bits_are_kept_grey_and_in_colour(tmp_path):
    import cv2

    grey, colour = drawn(np.uint16, 1), drawn(np.uint16)
    Image.fromarray(grey[..., 0]).save(tmp_path / "grey.png")
    cv2.imwrite(str(tmp_path / "colour.png"), colour[..., ::-1])
    assert np.array_equal(read_hint(tmp_path / "grey.png"), grey)
    assert np.array_equal(read_hint(tmp_path / "colour.png"), colour)
    eight = drawn(np.uint8)
    assert np.array_equal(decode_hint(png_bytes(eight), "x"), eight)
    with pytest.raises(UserError, match="cannot be read as a picture"):
        decode_hint((tmp_path / "colour.png").read_bytes()[:300], "x")


# --- the contract -------------------------------------------------------------------------------------------


def test_whole_numbers_are_shares_of_their_type_and_floats_are_taken_as_they_are():
    size = (8, 12)
    for dtype, most in ((np.uint8, 255), (np.uint16, 65535)):
        hint = drawn(dtype, 5)
        got = HintSpec("x", channels=5, low=-1.0, high=3.0).tensor(hint, size)
        assert torch.allclose(got, torch.tensor(hint / most * 4 - 1).permute(2, 0, 1)[None].float(), atol=1e-6)
    floats = drawn(np.float32, 5) * 4 - 1
    got = HintSpec("x", channels=5, low=-1.0, high=3.0).tensor(floats, size)
    assert torch.equal(got, torch.tensor(floats).permute(2, 0, 1)[None])


def test_one_channel_serves_three_and_three_serve_one_and_nothing_else_does():
    grey, colour = drawn(np.uint16, 1), drawn(np.uint16)
    three = HintSpec("x").tensor(grey, (8, 12))
    assert three.shape == (1, 3, 8, 12) and torch.equal(three[:, 0], three[:, 2])
    one = HintSpec("x", channels=1).tensor(colour, (8, 12))
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    assert torch.allclose(one, (HintSpec("x").tensor(colour, (8, 12)) * weights).sum(1, keepdim=True), atol=1e-4)
    for hint, channels in ((drawn(np.uint8, 2), 3), (drawn(np.uint16, 4), 3), (drawn(np.uint8, 3), 5)):
        with pytest.raises(UserError, match=rf"has {hint.shape[-1]} channels; expected {channels}"):
            HintSpec("x", channels=channels).tensor(hint, (8, 12))


@pytest.mark.parametrize("bad", [1.5, -0.1, np.nan, np.inf])
def test_floats_outside_the_range_are_refused(bad):
    hint = drawn(np.float32, 3)
    hint[0, 0, 0] = bad
    with pytest.raises(UserError, match=r"has values from .* expected floats in \[0, 1\]"):
        HintSpec("x").tensor(hint, (8, 12))


@pytest.mark.parametrize("how", ["area", "lines", "nearest"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_any_number_of_channels_goes_through_the_geometry_of_pictures(dtype, how):
    hint = drawn(dtype, 6, size=(9, 20))
    for size in ((6, 6), (30, 20)):
        got = fit(hint, size, how)
        assert got.shape == (*size, 6) and got.dtype == dtype
        inside = dtype != np.float32 or (hint.min() <= got.min() and got.max() <= hint.max())
        assert inside, "no value goes beyond those that were there"
        for k in (0, 3, 5):
            alone = fit(hint[..., k : k + 1], size, how)[..., 0]  # rounding may differ in the last place
            assert np.allclose(got[..., k].astype(float), alone, rtol=0, atol=1e-5 if dtype == np.float32 else 1)


def test_a_hint_to_be_looked_at_is_a_picture():
    rule = HintSpec("x", channels=5, low=-1.0, high=1.0)
    hint = np.zeros((2, 2, 5), np.float32)
    hint[0, 0] = [-1, 0, 1, 1, 1]
    assert rule.picture(hint)[0, 0].tolist() == [0, 128, 255]
    assert HintSpec("x", channels=1).picture(np.full((2, 2, 1), 65535, np.uint16)).tolist() == [[[255] * 3] * 2] * 2
    assert HintSpec("x", channels=2).picture(np.full((1, 1, 2), 255, np.uint8)).tolist() == [[[255, 255, 0]]]
    picture = drawn(np.uint8)
    assert HintSpec("canny").picture(picture) is picture


# --- data sets ----------------------------------------------------------------------------------------------


def kohya(folder, hints, suffix=".npy", count=6):
    """A set in two folders whose hints are what ``hints(i)`` gives."""
    for i in range(count):
        write_png(folder / "images" / f"{i}.png", CirclePairs(SIDE, count)[i].picture)
        (folder / "images" / f"{i}.txt").write_text(f"circle {'abcdef'[i]}")
        (folder / "conditioning").mkdir(exist_ok=True)
        (folder / "conditioning" / f"{i}{suffix}").write_bytes(hints(i))
    return folder


def five(i):
    return drawn(np.float32, 5, i, (SIDE, SIDE)) * 2 - 1


@pytest.fixture
def arrays(tmp_path):
    """A set whose hints are arrays of five channels in [-1, 1]."""
    return kohya(tmp_path / "set", lambda i: npy(five(i)))


FIVE = {"annotator": "depth", "channels": 5, "low": -1.0}


def recipe_of(source, control, **changes):
    plain = {"steps": 2, "batch": 2, "checkpoint_every": 2, "evaluation": {"every": 2, "num": 2, "steps": 1}}
    return parse_recipe({**plain, "data": {"source": str(source)}, "control": control, **changes})


def test_a_control_of_five_channels_is_trained_saved_and_used(arrays, toy_base, tmp_path):
    recipe = recipe_of(arrays, FIVE, evaluation={"every": 0})
    list(train_control(recipe, tmp_path / "run", toy_base))
    saved = load_control(tmp_path / "run", toy_base)
    assert (saved.hint.channels, saved.hint.low, saved.hint.high) == (5, -1.0, 1.0)
    assert saved.branch.hint_encoder.convs[0].in_channels == 5
    read = []
    saved.branch.hint_encoder.register_forward_hook(lambda module, args, out: read.append(args[0]))
    make(toy_base, [saved], [five(3)], prompt="", steps=1)
    assert torch.equal(read[0], torch.tensor(five(3)).permute(2, 0, 1)[None]), "the very values, no rounding"


def test_the_command_line_takes_an_array_for_a_hint_and_shows_it(arrays, toy_base, toy_folder, tmp_path, run):
    list(train_control(recipe_of(arrays, FIVE, evaluation={"every": 0}), tmp_path / "run", toy_base))
    shown = f"{tmp_path / 'run'}={arrays / 'conditioning/2.npy'}"
    words = ["generate", "x", "--base", toy_folder, "--steps", 1, "--out", tmp_path / "out", "--control", shown]
    assert run(*words, "--hint-ready")[0] == 0
    assert read_picture(tmp_path / "out" / "hint-0-run.png").shape == (SIDE, SIDE, 3)
    code, _, said = run(*words)
    assert code == 2 and "arrays are hints already: say so by ready (--hint-ready)" in said
    doctor = ["data", "doctor", arrays, "--annotator", "depth", "--out", tmp_path / "told"]
    assert run(*doctor, "--channels", 5, "--low", -1)[0] == 0
    assert run(*doctor)[0] == 1 and run(*doctor[:3], "--channels", 5)[0] == 2


def test_arrays_are_cached_in_their_own_type_and_kinds_are_not_mixed(toy_base, tmp_path):
    pairs = [
        Pair(pair.picture, "", drawn(np.uint16, 1, i, (SIDE, SIDE))) for i, pair in enumerate(CirclePairs(SIDE, 3))
    ]
    for _ in range(2):
        [cached] = build_cache(toy_base, pairs, {"": HintSpec("depth")}, tmp_path / "pairs")
        assert cached.hints.dtype == torch.uint16 and np.array_equal(cached.hints, [pair.hint for pair in pairs])
    mixed = [*pairs, Pair(pairs[0].picture, "", drawn(np.uint8, 3, 0, (SIDE, SIDE)))]
    with pytest.raises(UserError, match="1 channels of uint16, others 3 of uint8: expected all of one kind"):
        build_cache(toy_base, mixed, {"": HintSpec("depth")}, tmp_path / "mixed")


def test_every_layout_takes_arrays_for_hints(arrays, tmp_path):
    expected = [five(i) for i in range(6)]
    listed = tmp_path / "listed"
    shutil.copytree(arrays, listed)
    (listed / "metadata.jsonl").write_text("".join(
        json.dumps({"file_name": f"images/{i}.png", "conditioning_image": f"conditioning/{i}.npy", "text": "x"}) + "\n"
        for i in range(6)
    ))  # fmt: skip
    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "0.tar", "w") as archive:
        for i in range(6):
            for name, place in (("png", f"images/{i}.png"), ("conditioning_image.npy", f"conditioning/{i}.npy")):
                archive.add(arrays / place, f"{i}.{name}")
            archive.add(arrays / "conditioning/0.npy", f"{i}.latents.npy")
    for folder, layout in ((arrays, "paired"), (listed, "metadata"), (shards, "webdataset")):
        assert read_listing(folder).layout == layout and not read_listing(folder).problems
        assert all(
            np.array_equal(pair.hint, hint) for pair, hint in zip(FolderPairs(folder, SIDE), expected, strict=True)
        )


@pytest.mark.parametrize("layout", ["metadata", "webdataset"])
def test_arrays_are_written_anew_as_arrays(layout, arrays, tmp_path):
    list(build_set(read_listing(arrays), tmp_path / "out", layout, HintSpec("depth", channels=5, low=-1.0)))
    pairs = FolderPairs(tmp_path / "out", SIDE)
    assert all(np.array_equal(pair.hint, five(i)) for i, pair in enumerate(pairs))


# --- the doctor ---------------------------------------------------------------------------------------------


def report_of(folder, contract):
    listing = read_listing(folder)
    return add_up(listing, examine(listing, contract), contract)


def test_the_doctor_holds_arrays_against_the_contract(arrays):
    rule = HintSpec("depth", channels=5, low=-1.0)
    sound = report_of(arrays, rule)
    assert sound.problems == [] and sound.hints == 6 and 0.4 < sound.to_json()["hint_mean_grey"] < 0.6
    assert {picture.shape for row in sheet_rows(sound) for picture in row} == {(128, 128, 3)}
    for wrong, words in (
        (HintSpec("depth", channels=5), "expected floats in [0, 1]"),
        (HintSpec("depth"), "has 5 channels"),
    ):
        report = report_of(arrays, wrong)
        assert {p.kind for p in report.problems} == {"not as agreed"} and words in report.problems[0].words
        assert not report.may_train


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (npy(np.array([[{}]], object)), "unreadable array", "cannot be read as an array"),
        (b"hello", "unreadable array", "is no .npy file"),
        (npy(np.zeros((SIDE, SIDE, 2))), "kinds differ", "5 have 5 channels of float32, 1 have 2 channels of float32"),
        (npy(np.zeros((SIDE, 2 * SIDE, 5))), "sizes differ", "not of one shape"),
    ],
)
def test_an_array_that_is_wrong_is_named(data, kind, words, arrays):
    (arrays / "conditioning/1.npy").write_bytes(data)
    report = report_of(arrays, None)
    assert [(p.kind, p.fatal) for p in report.problems] == [(kind, True)] and words in report.problems[0].words


# --- several hints as channels of one -----------------------------------------------------------------------

BOTH = ["canny", "scribble"]


def test_several_annotators_are_channels_of_one_hint():
    both, picture = joined(BOTH), CirclePairs(SIDE, 1)[0].picture
    assert (both.annotator, both.channels) == ("canny+scribble", 6) and contract("canny+scribble") == both
    assert [part.annotator for part in parts_of(both)] == BOTH and parts_of(HintSpec("canny")) == [HintSpec("canny")]
    apart = [annotator(name).make([picture])[0] for name in BOTH]
    assert np.array_equal(annotate(picture, both), np.concatenate(apart, 2))
    assert np.array_equal(hint_for_pair(Pair(picture, ""), both), np.concatenate(apart, 2))
    with pytest.raises(
        UserError, match=r'makes hints of "depth" of a picture: give those of canny.depth as one .npy file'
    ):
        annotate(picture, joined(["canny", "depth"]))
    with pytest.raises(UserError, match="Hints of inpaint have masks"):
        joined(["inpaint", "canny"])


def two_hints(folder, layout):
    """A set of two hints a row: grey of 16 bits, and a picture."""
    second = "conditioning_2" if layout == "paired" else "second"
    kohya(folder, lambda i: npy(drawn(np.uint16, 1, i, (SIDE, SIDE))))
    for i in range(6):
        write_png(folder / second / f"{i}.png", drawn(np.uint8, 3, 10 + i, (SIDE, SIDE)))
    if layout == "metadata":
        (folder / "metadata.jsonl").write_text("".join(
            json.dumps({"file_name": f"images/{i}.png", "conditioning_image": f"conditioning/{i}.npy",
                        "conditioning_image_2": f"second/{i}.png", "text": "x"}) + "\n" for i in range(6)
        ))  # fmt: skip
    return folder


@pytest.mark.parametrize("layout", ["paired", "metadata"])
def test_two_hints_of_a_row_become_channels_in_their_order(layout, tmp_path):
    pairs = FolderPairs(two_hints(tmp_path / "set", layout), SIDE)
    assert pairs.hints == 2 and read_listing(tmp_path / "set").layout == layout
    hint = hint_for_pair(pairs[4], joined(["depth", "seg"]))
    values = HintSpec("", channels=6).tensor(hint, (SIDE, SIDE))[0].permute(1, 2, 0).numpy()
    assert np.allclose(values[..., :3], drawn(np.uint16, 1, 4, (SIDE, SIDE)) / 65535, atol=1e-6)
    assert np.allclose(values[..., 3:], drawn(np.uint8, 3, 14, (SIDE, SIDE)) / 255, atol=1e-6)
    turned = mirrored(pairs[4], joined(["depth", "seg"]))
    assert np.array_equal(hint_for_pair(turned, joined(["depth", "seg"])), hint[:, ::-1])


def test_of_two_hints_both_are_named_or_the_set_is_refused(toy_base, tmp_path):
    folder = two_hints(tmp_path / "set", "paired")
    with pytest.raises(UserError, match="has 2 hints a row, and the recipe names depth: list as many"):
        training_pairs(resolve(recipe_of(folder, {"annotator": "depth"})).data, toy_base)
    assert training_pairs(resolve(recipe_of(folder, {"annotators": ["depth", "seg"]})).data, toy_base)[0].hints == 2
    assert report_of(folder, contract("depth+seg")).problems == []
    assert {p.kind for p in report_of(folder, HintSpec("depth")).problems} == {"other hints"}
    (folder / "conditioning_2/3.png").unlink()
    assert [p.kind for p in read_listing(folder).problems] == ["missing hint"]


def test_obedience_to_two_hints_is_that_to_the_first(toy_base, tmp_path):
    both, picture = joined(BOTH), CirclePairs(64, 2)[0].picture
    hint, other = annotate(picture, both), CirclePairs(64, 2)[1].picture
    (found,), (wanted,) = (annotator("canny").make([one]) for one in (other, picture))
    assert fidelity([other], [hint], both)[0] == edge_f1(found, wanted)


def test_a_run_on_two_hints_measures_shows_and_saves_what_it_learnt(toy_base, fake_packages, tmp_path):
    recipe = recipe_of("emoji", {"annotators": BOTH})
    *_, last = train_control(recipe, tmp_path / "run", toy_base)
    assert last.evaluation and next((tmp_path / "run").glob("samples/*.png"))
    saved = load_control(tmp_path / "run", toy_base)
    assert saved.hint == joined(BOTH) and saved.branch.hint_encoder.convs[0].in_channels == 6
    with pytest.raises(UserError, match=r"with options: leave out control\.options"):
        next(train_control(recipe_of("emoji", {"annotators": BOTH, "options": {"low": 1}}), tmp_path / "x", toy_base))
