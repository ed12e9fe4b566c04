"""The recipe of docs/generation.md: its figures at toy size, its table of sheets, and the page that shows both."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from controlkit.annotators import contract
from controlkit.controls import new_control
from controlkit.data import Pair
from controlkit.errors import Invalid
from controlkit.formats import SavedControl
from controlkit.measure import EvaluationPlan, quality
from controlkit.mini.scenes import draw_scene
from controlkit.sample import ControlRequest, EditRequest, Request, maker

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "recipes")
    return lambda name: importlib.import_module(f"generation_{name}")


@pytest.fixture(scope="module")
def scenes():
    """Two pairs of scenes with a figure, at the toy base's size."""
    drawn = (draw_scene(32, 9, index) for index in range(100))
    people = (scene for scene in drawn if len(scene.keypoints))
    return [Pair(scene.picture, scene.captions[0], truth=scene) for scene, _ in zip(people, range(2), strict=False)]


class World:
    """A world of few pairs, with a referee of random weights."""

    def __init__(self, pairs, referee):
        self.pairs, self.referee = pairs, lambda device: referee

    def heldout(self, spec, size, num):
        return self.pairs[:num], [pair.picture for pair in self.pairs]


@pytest.fixture
def lab(recipe, scenes, toy_base, referee, drawn_joins, monkeypatch):
    """A lab at toy size, with controls of random weights in the place of those that are shipped."""
    figures = recipe("figures")
    monkeypatch.setattr(figures, "EMBEDDED", World(scenes, referee))
    controls = {
        name: SavedControl(drawn_joins(new_control(toy_base), seed), contract(name))
        for seed, name in enumerate(("canny", "scribble", "depth", "pose", "tile"))
    }
    return figures.Lab(toy_base, num=2, steps=1, counts=(1, 2), _controls=controls)


def last(parts):
    """The last part alone."""
    return dict([*parts.items()][-1:])


def test_every_figure_is_written_when_it_is_done_and_kept(recipe, lab, tmp_path, monkeypatch):
    figures, told = recipe("figures"), []
    path = tmp_path / "generation.json"
    monkeypatch.setattr(quality, "_REDRAWN", 2)
    monkeypatch.setattr(figures, "FIGURES", {name: last(parts) for name, parts in figures.FIGURES.items()})
    first = figures.measure(lab, path, list(figures.FIGURES), told.append)
    assert len(told) == len(figures.FIGURES)
    assert json.loads(path.read_text()) == json.loads(json.dumps(first))
    figures.measure(lab, path, list(figures.FIGURES), told.append)
    assert len(told) == len(figures.FIGURES)
    for line in ("| pose | both |", "| depth | cfg-weights |", "| depth | pose |", "| UniPC |", "| canny | "):
        assert line in recipe("report").tables(first)
    recipe("report").curve(first["by_steps"], tmp_path / "steps.svg")
    assert "UniPC" in (tmp_path / "steps.svg").read_text()
    lab.steps = 2
    with pytest.raises(Invalid, match="other settings"):
        figures.measure(lab, path, ["together"], told.append)


def test_a_request_is_made_once_and_has_the_controls_of_all_plans(lab, scenes):
    made = []
    lab.on_step = made.append
    pose, depth = (lab.plan(name, scenes) for name in ("pose", "depth"))
    both = lab.pictures(pose, depth)
    assert sum(made) == 2
    again, other = lab.pictures(pose, depth), lab.pictures(pose, depth, way="shuffled")
    assert sum(made) == 4 and all(a is b for a, b in zip(again, both, strict=True))
    used = (pose.with_hint(pose.hints[1]), depth.with_hint(depth.hints[1]))
    for seed, picture in ((1, both[1]), (0, other[0])):  # shuffled: each has the other's hints
        asked = Request(prompt=scenes[seed].prompt, seed=seed, steps=1, controls=used)
        [one] = maker(lab.base, lab._controls)([asked])
        assert np.abs(one.pixels.astype(int) - picture).max() <= 1  # in a batch, and by itself


def test_a_share_is_of_the_first_condition_and_a_part_is_measured_by_itself(recipe, scenes):
    plan = EvaluationPlan(ControlRequest(name="canny"), contract("canny"), scenes)
    true = [pair.picture for pair in scenes]
    grey = [np.full_like(picture, 128) for picture in true]
    left = [np.concatenate([picture[:, :16], grey[0][:, 16:]], 1) for picture in true]
    made = {"left alone": left, "true": true, "none": grey}
    conditions = recipe("figures").Conditions(plan, made, grey, {"": grey}, true)
    whole, part = conditions.measured(), conditions.measured(np.s_[:, :14])  # two pixels off what is changed
    obeyed = whole["left alone"]["obedience"]["mean"]
    assert 0 < obeyed < 1
    assert [whole[name]["share"]["mean"] for name in made] == pytest.approx([1, 1 / obeyed, 0])
    assert part["left alone"]["obedience"]["mean"] == 1
    assert part["left alone"]["fidelity"] == part["true"]["fidelity"]


def test_a_silent_half_is_black_and_the_other_as_it_was(recipe, scenes):
    hint = EvaluationPlan(ControlRequest(name="depth"), contract("depth"), scenes).hints
    for pair, was in zip(recipe("figures").emptied(scenes, hint), hint, strict=True):
        assert not pair.hint[:, :16].any() and was[:, :16].any()
        assert np.array_equal(pair.hint[:, 16:], was[:, 16:])


def test_a_jump_is_seen_at_the_edges_alone_and_nowhere_in_what_is_even(recipe):
    figures = recipe("figures")
    ramp = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)[..., None].repeat(3, -1)
    assert figures.jump(ramp, [16, 32, 48]) == 1
    raised = ramp.copy()
    raised[:, 32:] += 10  # a step of 11 in the place of 1, at one of the two edges
    assert figures.jump(raised, [32]) == 6
    assert figures.jump(raised, [31]) < 1


def test_edges_are_where_tiles_begin_and_end_inside(recipe):
    assert recipe("figures").edges_of(256, 128, 8) == [64, 128, 192]
    assert recipe("figures").edges_of(128, 128, 8) == []


def test_seams_cut_hard_are_the_tiles_beside_each_other(recipe, lab, monkeypatch):
    figures, asked = recipe("figures"), []

    def made(requests):
        asked.extend(requests)
        return [np.full((*request.size, 3), 10 * len(asked), np.uint8) + np.indices(request.size)[0][..., None] % 2
                for request in requests]  # fmt: skip

    monkeypatch.setattr(lab, "made", made)
    found = figures.seams(lab, "tile")
    assert [request.size for request in asked[:8]] == [(32, 32)] * 8
    assert [request.tile for request in asked[8:]] == [32, 32, None, None]
    top_left, top_right = (asked[at].controls[0].images[""] for at in (0, 2))
    whole = asked[8].controls[0].images[""]
    assert np.array_equal(np.hstack([top_left, top_right]), whole[:32])
    assert found["tiles cut hard"]["mean"] == pytest.approx(59)  # (20 + 39) / 2 at the edges, 1 / 2 elsewhere
    assert found["tiles"]["mean"] == pytest.approx(1)


def test_a_cell_changes_what_it_names_alone(recipe):
    sheets = recipe("sheets")
    start = Request(prompt="a cat", controls=[ControlRequest(name="pose", scale=2), ControlRequest(name="depth")])
    changed = sheets.Cell("", {"steps": 3}, [None, {"end": 0.5}]).of(start)
    assert changed == Request(prompt="a cat", steps=3, controls=[ControlRequest(name="depth", end=0.5)])
    assert sheets.Cell("").of(start) == start
    picture = np.zeros((8, 8, 3), np.uint8)
    edited = Request(prompt="a cat", edit=EditRequest(image=picture, strength=0.5))
    changed = sheets.Cell("", edit={"blur": 3}).of(edited)
    assert changed == Request(prompt="a cat", edit=EditRequest(image=picture, strength=0.5, blur=3))


def test_the_picture_to_be_changed_is_shown_red_where_it_is_masked(recipe):
    sheets = recipe("sheets")
    picture = np.full((8, 8, 3), 100, np.uint8)
    mask = sheets.box(8, 2, 0, 4, 8)
    [(_, shown)] = sheets.given(Request(edit=EditRequest(image=picture, mask=mask)))
    assert (shown[2:4, :, 0] > 150).all() and (shown[2:4, :, 1] < 100).all()
    assert (np.delete(shown, [2, 3], 0) == 100).all()
    assert sheets.given(Request()) == []


def test_no_two_cells_of_a_sheet_ask_for_the_same(recipe):
    for sheet in recipe("sheets").SHEETS:
        start = sheet.start()
        assert len({cell.of(start) for cell in sheet.cells}) == len(sheet.cells), sheet.name


def test_a_sheet_has_a_row_for_each_seed_and_columns_for_hints_and_cells(recipe, lab, scenes):
    sheets = recipe("sheets")
    start = Request(prompt="", steps=1, controls=[ControlRequest(name="canny", images=scenes[0].picture)])
    sheet = sheets.Sheet("", "", lambda: start, [sheets.used("without", scale=0), sheets.used("with")], seeds=(3, 4, 5))
    picture = sheets.drawn(sheet, lab.base, lab._controls)
    assert picture.shape == (20 + 3 * (sheets.CELL + 4) + 4, 3 * (sheets.CELL + 4) + 4, 3)
    cells = [[picture[24 + y * 116 :, 4 + x * 116 :][:112, :112] for x in range(3)] for y in range(3)]
    assert (cells[1][0] == 255).all()  # the hint is shown once
    assert not np.array_equal(cells[0][1], cells[0][2]) and not np.array_equal(cells[0][1], cells[1][1])


def test_the_page_shows_every_sheet_with_its_line_and_none_is_large(recipe):
    page = (DOCS / "generation.md").read_text()
    names = [sheet.name for sheet in recipe("sheets").SHEETS]
    assert len(set(names)) == len(names)
    for sheet in recipe("sheets").SHEETS:
        assert sheet.shows and f"![{sheet.name}](generation/{sheet.name}.webp)\n\n{sheet.shows}\n" in page
    sizes = {path.stem: path.stat().st_size for path in (DOCS / "generation").glob("*.webp")}
    assert sorted(sizes) == sorted(names)
    assert max(sizes.values()) <= 40_000 and sum(sizes.values()) <= 500_000


def test_the_page_states_the_figures_that_were_measured(recipe):
    page, report = (DOCS / "generation.md").read_text(), json.loads((DOCS / "generation.json").read_text())
    figures = recipe("figures").FIGURES
    assert all(report[name].keys() == parts.keys() for name, parts in figures.items())
    for table in recipe("report").tables(report).split("\n\n"):
        assert table in page
    assert "](generation/steps.svg)" in page and (DOCS / "generation" / "steps.svg").stat().st_size < 60_000
