"""Several workers do what one process does: the same files, findings and errors, and the same going on."""

import os
import sys
from itertools import islice

import numpy as np
import pytest

from controlkit import cli
from controlkit.annotators import annotator
from controlkit.data import CirclePairs, add_up, build_set, examine, hint_files, read_listing, sheet_rows, write_hints
from controlkit.data.build import TARGETS
from controlkit.data.workers import parallel_map, ranges_of
from controlkit.errors import UserError
from controlkit.files import SCRATCH
from controlkit.images import write_png

COUNT = 10
CANNY = annotator("canny").spec()
LAYOUTS = list(TARGETS)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Pictures without hints; a part of a set is three of them."""
    monkeypatch.setattr("controlkit.data.workers._ROWS", 3)
    monkeypatch.setattr("controlkit.data.build.SHARD", 3)
    for i, pair in enumerate(CirclePairs(48, COUNT)):
        write_png(tmp_path / "photos" / f"a circle {'abcdefghij'[i]}.png", pair.picture[: 48 - i])
    return tmp_path / "photos"


@pytest.fixture(scope="module")
def workers():
    """Two workers, there for as long as work that is begun and not done with; then gone."""
    ray = pytest.importorskip("ray")
    kept = parallel_map(lambda part: [os.getpid()], range(4), 2)
    assert next(kept) != os.getpid()
    yield 2
    kept.close()
    assert not ray.is_initialized()


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def built(photos, out, layout, workers=1):
    return build_set(read_listing(photos), out, layout, CANNY, (24, 24), workers=workers)


def test_parts_are_all_the_rows_once():
    for count in (0, 1, 16, 17, 1000, 200_000):
        assert [place for part in ranges_of(count) for place in part] == list(range(count))
    assert len(ranges_of(10_000_000)) <= 4096


def test_workers_write_the_hints_that_one_process_writes(photos, workers, tmp_path):
    for name, count in (("one", 1), ("two", workers)):
        files = hint_files([photos], tmp_path / name)
        made = list(write_hints(files, CANNY, (24, 24), workers=count))
        assert [one.source for one in made] == [one.source for one in files] and len(made) == COUNT
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_workers_write_the_files_that_one_process_writes(layout, photos, workers, tmp_path):
    alone = list(built(photos, tmp_path / "alone", layout))
    assert list(built(photos, tmp_path / "together", layout, workers)) == alone
    assert files_of(tmp_path / "together") == files_of(tmp_path / "alone")


@pytest.mark.parametrize("layout", ["metadata", "webdataset"])
def test_a_row_that_cannot_be_read_is_reported_as_by_one_process_and_the_set_is_not_whole(
    layout, photos, workers, tmp_path
):
    for letter in "eg":
        (photos / f"a circle {letter}.png").write_bytes(b"rubbish")
    told = []
    for out, count in (("alone", 1), ("together", workers)):
        written = []
        with pytest.raises(UserError, match=r"a circle e\.png cannot be read") as error:
            for done in built(photos, tmp_path / out, layout, count):
                written.append(done)
        told.append((str(error.value), written))
        with pytest.raises(UserError, match="is not whole"):
            read_listing(tmp_path / out)
    assert told[0] == told[1]


def test_the_doctor_finds_the_same(photos, workers):
    (photos / "a circle e.png").write_bytes(b"")
    (photos / "a circle g.png").write_bytes((photos / "a circle f.png").read_bytes())
    listing = read_listing(photos)
    alone, together = (add_up(listing, examine(listing, CANNY, count), CANNY) for count in (1, workers))
    assert together.to_json() == alone.to_json()
    assert {problem.kind for problem in together.problems} == {"empty file", "duplicate"}
    for ours, theirs in zip(sheet_rows(together), sheet_rows(alone), strict=True):
        assert all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_without_ray_the_extra_is_named(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'controlkit\[scale\]'"):
        next(built(photos, tmp_path / "out", "metadata", 2))
    assert len(list(built(photos, tmp_path / "out", "metadata"))) == COUNT


@pytest.mark.parametrize("first", [1, 2])
def test_what_some_began_others_go_on_with(first, photos, workers, tmp_path, monkeypatch):
    out = tmp_path / "out"
    list(built(photos, tmp_path / "whole", "metadata"))
    begun = built(photos, out, "metadata", first)
    assert list(islice(begun, 4)) == [1, 2, 3, 4]
    begun.close()
    with pytest.raises(UserError, match="is not whole"):
        read_listing(out)
    before = {path: path.stat().st_mtime_ns for path in (out / "images").glob("[0-3].png")}
    command = ["controlkit", "data", "build", photos, "--annotator", "canny", "--size", "24", "--out", out]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--workers", str(3 - first)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    assert len(before) == 4 and {path: path.stat().st_mtime_ns for path in before} == before, "what was there is kept"
    assert files_of(out) == files_of(tmp_path / "whole")


def test_what_a_killed_worker_left_half_written_is_gone_when_the_set_is_whole(photos, tmp_path):
    out = tmp_path / "out"
    steps = built(photos, out, "metadata")
    next(steps)
    for place in (out, out / "images"):
        (place / f"{SCRATCH}of-a-worker").write_bytes(b"half")
    list(steps)
    assert not list(out.rglob(f"{SCRATCH}*"))
    assert len(read_listing(out).rows) == COUNT


@pytest.mark.parametrize("address", ["127.0.0.1:1", "auto", "10.0.0.1:6379"])
def test_the_ray_that_the_environment_names_is_used_or_said_not_to_answer(address, monkeypatch):
    ray, asked = pytest.importorskip("ray"), []

    def init(**options):
        asked.append(options)
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=f"No Ray answers at RAY_ADDRESS, which is {address}.*unset it"):
        list(parallel_map(lambda part: [part], range(4), 2))
    assert [options["address"] for options in asked] == [address] and "num_cpus" not in asked[0]
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(ConnectionError):
        list(parallel_map(lambda part: [part], range(4), 2))
    assert (asked[1]["address"], asked[1]["num_cpus"]) == ("local", 2)
