"""The depth models at toy size, and the classifier that takes the users' place."""

import json

import pytest
import torch

from controlkit.reproduce import Plan, depth, make_depth
from controlkit.reproduce.depth import told_apart

pytestmark = pytest.mark.usefixtures("untrained_shipped")


def drawn(seed, count=60, width=24, shift=0.0):
    scenes = torch.randn(count, width, generator=torch.Generator().manual_seed(7))  # of a scene
    return scenes + shift + torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_equal_systems_are_not_told_apart_and_others_are():
    chance, spread = told_apart(drawn(1), drawn(2))
    assert chance.low < 0.5 < chance.high and 0.05 < spread < 0.25
    clear, spread = told_apart(drawn(1, shift=1.0), drawn(2))
    assert clear.low > 0.9 and spread < 0.1
    same, spread = told_apart(drawn(1), drawn(1))  # the same pictures twice
    assert (same.mean, same.low, same.high, spread) == (0.5, 0.5, 0.5, 0)


def test_the_scene_tells_nothing_however_much_scenes_differ():
    scene = 12 * torch.randn(16, 24, generator=torch.Generator().manual_seed(3))
    alone = told_apart(drawn(1, 16, shift=1.0), drawn(2, 16))
    assert told_apart(drawn(1, 16, shift=1.0) + scene, drawn(2, 16) + scene)[0].mean == pytest.approx(alone[0].mean)
    assert alone[0].low > 0.8


def test_no_answer_is_asked_that_was_taught(monkeypatch):
    """Every rater that has seen a scene would know it: with features of its own for each, all else is guessed."""
    own = torch.eye(20, dtype=torch.double)
    told, spread = told_apart(own, torch.zeros(20, 20))
    assert (told.mean, spread) == (0.5, 0)
    seen = []
    monkeypatch.setattr(depth, "_taught", lambda rows: seen.append(len(rows)) or rows.sum(0))
    assert told_apart(own, torch.zeros(20, 20))[0].mean == 0.5 and seen == [15] * depth.RATERS


@pytest.mark.parametrize("count", [2, 3])
def test_few_scenes_are_enough(count):
    assert told_apart(drawn(1, count), drawn(2, count))[0].mean >= 0


def test_both_models_are_trained_measured_and_kept(toy_base, tmp_path, monkeypatch):
    monkeypatch.setattr(depth, "_FEWEST", 8)
    told = []
    plan = Plan(num=3, steps=1, share=1e-9, on_step=told.append)
    figure = make_depth(toy_base, plan, tmp_path)
    assert [row.name for row in figure.rows] == list(depth.ORDER)
    rows = {row.name: row for row in figure.rows}
    assert rows["depth2img"].difference is None and rows["controlnet"].words()[4] == "0.52 ± 0.17"
    assert "steps" in rows["controlnet"].cost and rows["truth"].fidelity.mean < rows["no-control"].fidelity.mean
    assert "no referee here" in figure.caption() and "trial of the machinery" in figure.caption()  # which knows no toy
    assert json.loads((tmp_path / "fig-depth.json").read_text())["settings"]["ceiling of depth RMSE"] > 0
    count = len(told)
    make_depth(toy_base, plan, tmp_path)
    assert len(told) == count  # nothing is trained twice
