"""``controlkit annotate``: pictures and folders in, hints out."""

import numpy as np
import pytest

from controlkit.annotators import annotate, annotator
from controlkit.data import CirclePairs, hints
from controlkit.images import read_picture, write_png


@pytest.fixture
def photos(tmp_path):
    for i, pair in enumerate(CirclePairs(32, 4)):
        write_png(tmp_path / f"photos/{'deep/' * (i % 2)}{i}.png", pair.picture)
    return tmp_path / "photos"


def test_a_folder_is_annotated_with_options_and_at_a_size_and_gone_on_with(run, photos, tmp_path):
    command = ["annotate", "canny", photos, "--set", "low=20", "--size", "24x24", "--out", tmp_path / "out"]
    code, out, err = run(*command)
    assert code == 0, err
    hint = annotate(read_picture(photos / "deep/1.png"), annotator("canny").spec(low=20), (24, 24))
    assert np.array_equal(read_picture(tmp_path / "out/deep/1.png"), hint)
    assert "4 hints made, in" in out and "pictures a second" in out and "annotating" in err
    (tmp_path / "out/0.png").unlink()
    code, out, _ = run(*command)
    assert code == 0 and "1 hint made, 3 were there" in out
    code, out, _ = run("annotate", "canny", photos / "0.png", photos / "deep", "--out", tmp_path / "more")
    assert code == 0 and sorted(path.name for path in (tmp_path / "more").iterdir()) == ["0.png", "1.png", "3.png"]


def test_pictures_that_cannot_be_read_are_named_and_the_others_made(run, photos, tmp_path):
    (photos / "torn.png").write_bytes(b"\x89PNG")
    code, _, err = run("annotate", "canny", photos, "--out", tmp_path / "out")
    assert code == 2 and "1 of 5 pictures could not be annotated; the first:" in err and "torn.png" in err
    assert len(list((tmp_path / "out").rglob("*.png"))) == 4


def test_an_annotator_that_is_not_ready_is_refused_with_the_way_to_it(run, photos, tmp_path):
    code, _, err = run("annotate", "depth", photos, "--out", tmp_path / "out")
    assert code == 2 and "mini_depth" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "count"), [((), 1), (("--workers", 3), 3)])
def test_workers_are_as_many_as_are_asked_for(option, count, run, photos, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(hints, "parallel_map", lambda work, parts, workers: asked.append(workers) or [])
    run("annotate", "canny", photos, *option, "--out", tmp_path / "out")
    assert asked == [count]
