"""Data sets written anew: whole or not read, gone on with, and the same pairs whatever the layout."""

import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from controlkit.annotators import annotate, annotator, contract, grounds_of
from controlkit.annotators.lines import canny
from controlkit.data import CirclePairs, FolderPairs, build_set, make_fill50k, read_listing
from controlkit.data.build import TARGETS
from controlkit.data.doctor import add_up, examine
from controlkit.errors import UserError
from controlkit.files import scratch_folder
from controlkit.images import HintSpec, fit, write_png

SIDE, COUNT = 32, 4
CANNY = annotator("canny").spec()
LAYOUTS = list(TARGETS)


@pytest.fixture
def tutorial(tmp_path):
    list(make_fill50k(tmp_path / "set", COUNT, SIDE))
    return read_listing(tmp_path / "set")


@pytest.fixture
def photos(tmp_path):
    """Pictures of different shapes without hints."""
    pairs = CirclePairs(48, COUNT)
    for i, pair in enumerate(pairs):
        write_png(tmp_path / "photos" / f"a circle {'abcd'[i]}.png", pair.picture[: 48 - 4 * i])
    return read_listing(tmp_path / "photos")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_set_comes_out_as_it_went_in(layout, tutorial, tmp_path):
    assert list(build_set(tutorial, tmp_path / "out", layout, CANNY))[-1] == COUNT
    listing = read_listing(tmp_path / "out")
    assert (listing.layout, listing.problems) == (layout, [])
    for pair, drawn in zip(FolderPairs(tmp_path / "out", SIDE), CirclePairs(SIDE, COUNT), strict=True):
        assert pair.prompt == drawn.prompt
        assert np.array_equal(pair.picture, drawn.picture) and np.array_equal(pair.hint, drawn.hint)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hints_are_made_of_the_pictures_as_they_are_written(layout, photos, tmp_path):
    list(build_set(photos, tmp_path / "out", layout, CANNY, (24, 24)))
    pairs = FolderPairs(tmp_path / "out", 24)
    assert [pair.prompt for pair in pairs] == [f"a circle {letter}" for letter in "abcd"]
    for i, (pair, drawn) in enumerate(zip(pairs, CirclePairs(48, COUNT), strict=True)):
        assert np.array_equal(pair.picture, fit(drawn.picture[: 48 - 4 * i], (24, 24)))
        assert np.array_equal(pair.hint, canny(pair.picture))


@pytest.mark.parametrize(("kind", "nothing"), [("canny", 0), ("pose", 0), ("depth", 0), ("tile", 255)])
@pytest.mark.parametrize("layout", ["metadata", "webdataset"])
def test_hints_on_a_clear_ground_are_written_and_read_on_the_ground_of_their_kind(
    kind, nothing, layout, tutorial, tmp_path
):
    stroke = np.full((SIDE, SIDE, 4), (170, 170, 170, 0), np.uint8)
    stroke[4:28, 12:16, 3] = 255
    for path in (tmp_path / "set" / "source").glob("*.png"):
        Image.fromarray(stroke).save(path)
    rule = contract(kind)
    list(build_set(read_listing(tmp_path / "set"), tmp_path / "out", layout, rule))
    for folder in ("set", "out"):
        for pair in FolderPairs(tmp_path / folder, SIDE, grounds_of(rule)):
            assert np.unique(pair.hint).tolist() == sorted([170, nothing])
    report = add_up(tutorial, examine(tutorial, rule), rule)
    assert report.may_train and not [p for p in report.problems if p.kind in ("empty hint", "hints inverted")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_hints_mask_is_masked_when_they_are_read_again(layout, photos, tmp_path):
    """Hints of ``inpaint``: what training reads of the folder is what it makes of the pictures on the fly."""
    rule = annotator("inpaint").spec()
    list(build_set(photos, tmp_path / "out", layout, rule, (24, 24)))
    list(build_set(read_listing(tmp_path / "out"), tmp_path / "again", layout, rule))
    for folder in ("out", "again"):
        for pair in FolderPairs(tmp_path / folder, 24, grounds=[None]):
            read, made = (rule.tensor(hint, (24, 24)) for hint in (pair.hint, annotate(pair.picture, rule)))
            assert (read == -1).any() and torch.equal(read, made)
    assert all(pair.hint.shape[-1] == 3 for pair in FolderPairs(tmp_path / "out", 24)), "of other hints: on a ground"
    report = add_up(listing := read_listing(tmp_path / "out"), examine(listing, rule), rule)
    assert report.may_train and not any(problem.fatal for problem in report.problems)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_interrupted_set_is_not_read_and_is_gone_on_with(layout, tutorial, tmp_path, monkeypatch):
    monkeypatch.setattr("controlkit.data.build.SHARD", 2)
    list(build_set(tutorial, tmp_path / "whole", layout, CANNY))
    out = tmp_path / "out"
    list(islice(build_set(tutorial, out, layout, CANNY), 3))
    with pytest.raises(UserError, match="is not whole"):
        read_listing(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".png", ".tar")}
    list(build_set(tutorial, out, layout, CANNY))
    assert before and {path: path.stat().st_mtime_ns for path in before} == before, "what was there is kept"
    files = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    whole = tmp_path / "whole"
    assert files == {p.relative_to(whole): p.read_bytes() for p in whole.rglob("*") if p.is_file()}


def test_what_cannot_be_built_is_refused_before_anything_is_written(tutorial, photos, tmp_path):
    for listing, layout, hint, words in (
        (tutorial, "metdata", CANNY, 'did you mean "metadata"'),
        (photos, "metadata", HintSpec("depth"), "no annotator to make them"),
    ):
        with pytest.raises(UserError, match=words):
            next(build_set(listing, tmp_path / "out", layout, hint))
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="was not built here"):
        next(build_set(tutorial, tmp_path / "photos", "metadata", CANNY))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "built.json").write_bytes(b"\xff no JSON")
    with pytest.raises(UserError, match="begun with another layout and hint"):
        next(build_set(tutorial, tmp_path / "theirs", "metadata", CANNY))
    next(build_set(tutorial, tmp_path / "out", "metadata", CANNY))
    with pytest.raises(UserError, match="begun with another layout and size"):
        next(build_set(tutorial, tmp_path / "out", "paired", CANNY, (8, 8)))


def test_a_folder_that_another_process_builds_is_left_alone(tutorial, tmp_path):
    out = tmp_path / "out"
    building = build_set(tutorial, out, "metadata", CANNY)
    next(building)
    with scratch_folder(out / "images") as living:  # as the other process has while it writes
        (living / "0.png").touch()
        with pytest.raises(UserError, match="is being written by another process: wait until it ends"):
            next(build_set(tutorial, out, "metadata", CANNY))
        assert (living / "0.png").exists()
        building.close()
        assert list(build_set(tutorial, out, "metadata", CANNY))[-1] == COUNT
        assert (living / "0.png").exists(), "somebody else's scratch is left"
    assert read_listing(out).problems == []


def test_what_a_killed_build_left_is_taken_out_by_the_next(tutorial, tmp_path):
    out = tmp_path / "out"
    script = f"""
import os
from pathlib import Path
from controlkit.files import held, scratch_folder
with held(Path({str(out)!r})), scratch_folder(Path({str(out / "images")!r})) as scratch:
    (scratch / "0.png").touch()
    os._exit(9)
"""
    list(islice(build_set(tutorial, out, "metadata", CANNY), 2))
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    assert list((out / "images").glob(".writing-*"))
    assert list(build_set(tutorial, out, "metadata", CANNY))[-1] == COUNT
    assert not list(out.rglob(".writing-*")) and read_listing(out).problems == []
