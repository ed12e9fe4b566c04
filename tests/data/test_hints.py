"""Hints of many pictures, kept in the store or written as files."""

import numpy as np
import pytest

from controlkit.annotators import annotate, annotator, kinds
from controlkit.data import CirclePairs, hint_files, kept_hints, write_hints
from controlkit.data import hints as module
from controlkit.data.store import Store
from controlkit.errors import Invalid, Mismatch, NotFound
from controlkit.images import read_picture, write_png

CANNY = annotator("canny").spec()


@pytest.fixture
def counts(monkeypatch):
    """How many pictures were annotated at once, each time."""
    found = []
    function = module.annotate_all

    def counting(pictures, *args, **kwargs):
        found.append(len(pictures))
        return function(pictures, *args, **kwargs)

    monkeypatch.setattr(module, "annotate_all", counting)
    return found


@pytest.fixture
def pictures():
    return [pair.picture for pair in CirclePairs(32, 5)]


@pytest.fixture
def photos(tmp_path, pictures):
    """Three pictures in a folder, two of them below it, beside files that are none."""
    for name, picture in zip(("b.png", "deep/a.png", "deep/er/b.png"), pictures, strict=False):
        write_png(tmp_path / "photos" / name, picture)
    (tmp_path / "photos/notes.txt").write_text("no picture")
    write_png(tmp_path / "photos/.hidden.png", pictures[0])
    return tmp_path / "photos"


def written(photos, out, spec=CANNY, size=None):
    return list(write_hints(hint_files([photos], out), spec, size))


def test_hints_are_kept_by_their_pictures_options_and_maker(counts, pictures, tmp_path, monkeypatch):
    with Store(tmp_path / "store") as store:
        made = kept_hints(pictures[:3], CANNY, store=store)
        assert all(
            np.array_equal(hint, annotate(picture, CANNY)) for hint, picture in zip(made, pictures, strict=False)
        )
        again = kept_hints(pictures[::-1], CANNY, store=store)
        assert counts == [3, 2] and all(map(np.array_equal, again[::-1], made)), "those that are new"
        kept_hints(pictures, annotator("canny").spec(low=50), store=store)
        kept_hints(pictures, annotator("lineart").spec(), store=store)
        assert counts == [3, 2, 5, 5]
        monkeypatch.setitem(kinds._KINDS, "canny", kinds.replace(kinds._KINDS["canny"], version=2))
        kept_hints(pictures, CANNY, store=store)
        assert counts[4:] == [5], "another version's are made anew"
    assert len(kept_hints(pictures, CANNY)) == 5, "without a store all are made"


def test_hints_have_their_pictures_names_below_the_folders_they_lie_in(photos, tmp_path):
    out = tmp_path / "hints"
    made = written(photos, out)
    assert [one.target for one in made] == [out / "b.png", out / "deep/a.png", out / "deep/er/b.png"]
    for one in made:
        assert np.array_equal(read_picture(one.target), annotate(read_picture(one.source), CANNY))
    single = hint_files([photos / "deep/a.png"], out)
    assert single[0].target == out / "a.png"


def test_what_was_made_is_left_and_what_changed_is_made_anew(counts, photos, pictures, tmp_path):
    out = tmp_path / "hints"
    written(photos, out)
    (out / "deep/a.png").unlink()
    counts.clear()
    again = written(photos, out)
    assert sorted(one.was_there for one in again) == [False, True, True] and sum(counts) == 1
    write_png(photos / "b.png", pictures[4])
    assert sum(not one.was_there for one in written(photos, out)) == 1, "another picture of that name"
    assert np.array_equal(read_picture(out / "b.png"), annotate(pictures[4], CANNY))
    for change in ({"spec": annotator("canny").spec(low=20)}, {"size": (16, 16)}):
        assert not any(one.was_there for one in written(photos, out, **change))
        assert all(one.was_there for one in written(photos, out, **change))


def test_a_file_that_no_annotator_wrote_is_not_overwritten(photos, pictures, tmp_path):
    out = tmp_path / "hints"
    write_png(out / "b.png", pictures[4])
    write_png(out / "deep/a.png", pictures[4], {"prompt": "another program's"})
    kept = [(out / name).read_bytes() for name in ("b.png", "deep/a.png")]
    first, second, third = sorted(written(photos, out), key=lambda one: one.source)
    assert all(isinstance(one.fault, Mismatch) and "no annotator wrote it" in str(one.fault) for one in (first, second))
    assert third.fault is None and kept == [(out / name).read_bytes() for name in ("b.png", "deep/a.png")]


def test_a_picture_that_cannot_be_read_does_not_stop_the_others(photos, tmp_path):
    (photos / "torn.png").write_bytes(b"no picture")
    faults = {one.source.name: one.fault for one in written(photos, tmp_path / "hints")}
    assert isinstance(faults.pop("torn.png"), Invalid) and not any(faults.values()) and faults


def test_hints_that_would_overwrite_something_are_refused(photos, tmp_path):
    with pytest.raises(Invalid, match="would overwrite the picture"):
        hint_files([photos], photos)
    with pytest.raises(Invalid, match="Two of the pictures have the same name"):
        hint_files([photos / "b.png", photos / "deep/er/b.png"], tmp_path)
    with pytest.raises(NotFound, match="no picture at"):
        hint_files([photos / "nowhere.png"], tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(Invalid, match="has no pictures"):
        hint_files([tmp_path / "empty"], tmp_path / "hints")


def test_the_folder_that_is_written_is_no_part_of_the_pictures(photos):
    written(photos, photos / "hints")
    assert len(hint_files([photos], photos / "hints")) == 3
    (photos / "deep/round").symlink_to(photos, target_is_directory=True)
    assert len(hint_files([photos], photos / "hints")) == 3, "links to folders are not followed in circles"


def test_many_pictures_are_annotated_at_once_and_large_ones_alone(counts, photos, pictures, tmp_path, monkeypatch):
    for i in range(20):
        write_png(tmp_path / f"many/{i:02}.png", pictures[0])
    assert len(written(tmp_path / "many", tmp_path / "out")) == 20
    assert max(counts) == module.MOST
    counts.clear()
    monkeypatch.setattr(module, "PIXELS", 2 * 32 * 32)
    assert len(written(tmp_path / "many", tmp_path / "fewer")) == 20 and max(counts) == 2
