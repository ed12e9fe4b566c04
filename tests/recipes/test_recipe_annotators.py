"""The sheets of annotators: what stands on them, and that docs/annotators.md shows them."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from controlkit.annotators import all_kinds, kind_of
from controlkit.errors import NotFound
from controlkit.images import write_png

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture
def sheets(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes")
    return importlib.import_module("recipes.annotators")


def test_every_annotator_is_on_one_sheet_and_every_sheet_on_the_page(sheets):
    for kind in all_kinds():
        if kind.is_made_here:
            assert sum(sheet.shows(kind) for sheet in sheets.SHEETS.values()) == 1, kind.name
    page = (DOCS / "annotators.md").read_text()
    written = sorted((DOCS / "annotators").iterdir())
    assert [path.name for path in written] == sorted(f"{name}.webp" for name in sheets.SHEETS)
    assert all(path.stat().st_size <= 150_000 and f"(annotators/{path.name})" in page for path in written)


def test_the_world_s_own_annotators_are_shown_on_scenes_alone(sheets):
    sheet = sheets.SHEETS["scenes"]
    assert sheet.shows(kind_of("mini_pose")) and not (sheet.photographs or sheet.has_drawing)
    assert sheet.scenes and not sheets.SHEETS["people"].shows(kind_of("mini_pose"))


def test_a_sheet_has_a_row_for_each_ready_annotator_and_for_the_options_of_others_controls(sheets):
    pictures = [np.full((64, 64, 3), grey, np.uint8) for grey in (10, 20)]
    kinds = ("tile", "invert", "outpaint", "vitpose")
    rows = sheets.rows_of(sheets.Sheet(lambda kind: kind.name in kinds), pictures)
    ready = [] if kind_of("vitpose").lacks() else ["vitpose"]
    assert list(rows) == ["the picture", *ready, "tile", "tile, shrink 1", "outpaint", "invert"]
    assert [one[0, 0, 0] for one in rows["invert"]] == [245, 235]
    masked = rows["outpaint"][0]
    assert masked.shape == (64, 64, 3) and (masked[32, 32] == 10).all() and masked[0, 0, 0] > 190


def test_photographs_are_found_in_a_folder_or_in_the_packages_that_ship_them(sheets, tmp_path, monkeypatch):
    for name in sheets.PHOTOGRAPHS:
        write_png((tmp_path / name).with_suffix(".png"), np.full((64, 64, 3), 90, np.uint8))
    (tmp_path / "rocket.png").rename(tmp_path / "rocket.jpg")  # known by its content
    pictures = sheets.Sheet(lambda kind: True, scenes=(), has_drawing=False).pictures(tmp_path)
    assert list(pictures) == ["astronaut", "coffee", "chelsea", "rocket", "camera"]
    assert pictures["coffee"].shape == (512, 512, 3)
    with pytest.raises(NotFound, match="pip install scikit-image matplotlib"):
        sheets.photograph("nobody.png", None)


def test_a_sheet_is_a_small_file(sheets, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    monkeypatch.setattr(sheets, "MOST", 60_000)
    content = sheets.webp(noise)
    assert content[8:12] == b"WEBP" and len(content) <= 60_000
