"""The sheets of annotators: what stands on them, and that docs/annotators.md shows them."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from controlkit.annotators import all_kinds, kind_of

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture
def sheets(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes")
    return importlib.import_module("recipes.annotators")


def test_every_annotator_is_on_one_sheet_and_every_sheet_on_the_page(sheets):
    for kind in all_kinds():
        assert sum(which(kind) for which in sheets.SHEETS.values()) == 1, kind.name
    page = (DOCS / "annotators.md").read_text()
    written = sorted((DOCS / "annotators").iterdir())
    assert [path.name for path in written] == sorted(f"{name}.webp" for name in sheets.SHEETS)
    assert all(path.stat().st_size <= 150_000 and f"(annotators/{path.name})" in page for path in written)


def test_the_world_s_own_annotators_are_shown_on_scenes_alone(sheets):
    pictures = [np.full((64, 64, 3), grey, np.uint8) for grey in (10, 20, 30)]
    shown = sheets.row(kind_of("mini_pose"), {}, pictures, range(1, 2))
    assert (shown[0] == 255).all() and not shown[1].any() and (shown[2] == 255).all()
    inverted = sheets.row(kind_of("invert"), {}, pictures, range(1, 2))
    assert [one[0, 0, 0] for one in inverted] == [245, 235, 225]
    masked = sheets.row(kind_of("outpaint"), {}, pictures, range(1, 2))[0]
    assert masked.shape == (64, 64, 3) and (masked[32, 32] == 10).all() and masked[0, 0, 0] > 190


def test_a_sheet_is_a_small_file(sheets, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    monkeypatch.setattr(sheets, "MOST", 60_000)
    content = sheets.webp(noise)
    assert content[8:12] == b"WEBP" and len(content) <= 60_000
