"""Figures that train in their own folder, at toy size: what they measure, going on, and what they refuse."""

import json
from dataclasses import replace

import numpy as np
import pytest

from controlkit.data import EmojiPairs
from controlkit.errors import Invalid, Mismatch
from controlkit.measure import Figure
from controlkit.reproduce import Plan, convergence, make_convergence, make_scale, scale, trained
from controlkit.reproduce.trained import Measured, read_measured

pytestmark = pytest.mark.usefixtures("untrained_shipped")


SMALL = {**trained.OUR_RECIPE, "batch": 6}
"""Two pairs a step."""


def point(step, mean, fid=1.0, kept=True):
    ends = {name: Figure(mean, mean - 0.05, mean + 0.05) for name in ("fidelity", "floor", "ceiling", "obedience")}
    fids = {"fid": Figure(fid, fid, fid), "fid_no_control": Figure(1.0, 1.0, 1.0)}
    return Measured(step, ends | fids, is_meaningful=True, quality_kept=kept)


@pytest.fixture
def short(monkeypatch):
    """One seed of each recipe, four steps long, measured at every second one."""
    paper, ours = (replace(way, steps=4, every=2) for way in convergence.WAYS.values())
    ways = {"paper": replace(paper, settings=paper.settings | {"batch": 2}), "ours": replace(ours, settings=SMALL)}
    monkeypatch.setattr(convergence, "WAYS", ways)
    monkeypatch.setattr(convergence, "SEEDS", (0,))


def figures_of(table):
    return [[one.figures for one in row.points] for row in table.rows]


def test_convergence_measures_checkpoints_and_goes_on_where_it_was_stopped(toy_base, short, tmp_path):
    whole = make_convergence(toy_base, Plan(num=2, steps=1), tmp_path / "whole")
    assert [[one.step for one in row.points] for row in whole.rows] == [[2, 4], [2, 4]]
    page = (tmp_path / "whole" / "fig-convergence.html").read_text()
    assert "<svg" in page and "our recipe, seed 0: control" in page
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {"fig-convergence-paper.png", "fig-convergence-ours.png", "fig-convergence.json"} <= names
    told = []
    stopped = Plan(num=2, steps=1, on_step=told.append, stopping=lambda: any("step 3 of 4" in one for one in told))
    with pytest.raises(KeyboardInterrupt):
        make_convergence(toy_base, stopped, tmp_path / "out")
    assert not (tmp_path / "out" / "fig-convergence.json").exists() and not any("our recipe" in one for one in told)
    resumed = make_convergence(toy_base, Plan(num=2, steps=1, on_step=told.append), tmp_path / "out")
    assert figures_of(resumed) == figures_of(whole)
    assert sum("the paper's recipe, seed 0: step 3" in one for one in told) == 1  # no step is made twice
    with pytest.raises(Mismatch, match="measured with other settings"):
        make_convergence(toy_base, Plan(num=3, steps=1), tmp_path / "out")


def test_scale_trains_on_each_number_of_pictures(toy_base, fake_packages, tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "OUR_RECIPE", SMALL)
    files = []
    load = np.load
    monkeypatch.setattr(np, "load", lambda path, *rest, **more: files.append(path) or load(path, *rest, **more))
    table = make_scale(toy_base, Plan(num=2, steps=1, share=2 / scale.FULL), tmp_path)
    assert sum("emoji" in str(path) for path in files) == 1  # for all trainings
    assert [row.count for row in table.rows] == list(scale.COUNTS) and "trial of the machinery" in table.caption()
    assert table.rows[0].words()[1] == "4% of them once"  # 2 steps of 2 pairs
    held = json.loads((tmp_path / "fig-scale.json").read_text())
    figures = held["rows"][0]["measured"]["figures"]
    assert {"fidelity", "floor", "ceiling", "obedience"} <= figures.keys() and held["settings"]["share"] == 0.0025
    assert (tmp_path / "fig-scale.png").is_file()


def test_pictures_that_no_step_sees_are_not_made(toy_base, fake_packages):
    emoji, plan = len(EmojiPairs(toy_base.size, "control")), Plan(share=10 / scale.FULL)
    few, many = (scale.recipe_of(toy_base, count, emoji, plan).data for count in (10, 100_000))
    assert (few.count, few.variants) == (10, 1)
    assert many.variants > 1 and 160 - many.variants < many.count * many.variants <= 160  # 10 steps of 16 pairs


def test_a_sudden_rise_is_found_between_its_checkpoints():
    rises = [point(10, 0.1), point(20, 0.6), point(30, 0.8)]
    row = convergence.Row("paper", "paper", 0, rises, "")
    assert row.found == 20 and row.sudden == (pytest.approx(0.5 / 0.8), 10, 20)
    flat = [point(10, 0.1, fid=3.0, kept=False), point(20, -0.1, fid=2.0)]
    slow = convergence.Row("ours", "our recipe", 0, flat, "1 s")
    assert slow.found is None and slow.words()[2:] == (
        "not found", "100%, step 0 to 10", "-0.10 [-0.15, -0.05]", "at 1 of 2", "2.0 to 3.0", "1 s",
    )  # fmt: skip
    assert convergence.Row("ours", "", 0, [point(10, 0.0)], "").sudden is None


@pytest.mark.parametrize("text", ["{", "[]", '{"settings": {}, "measured": [{"step": 1}]}'])
def test_a_damaged_file_of_measurements_is_refused(tmp_path, text):
    (tmp_path / "measured.json").write_text(text)
    with pytest.raises(Invalid):
        read_measured(tmp_path, {})
