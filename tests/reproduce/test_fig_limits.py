"""The figure of a misread hint: exchanged prompts, strong prompts, and which solid was drawn."""

from dataclasses import replace

import numpy as np
import pytest

from controlkit.data import Pair, ScenePairs
from controlkit.errors import Invalid
from controlkit.mini.scenes import CLASSES, SOLIDS
from controlkit.reproduce import Plan, limits, make_limits
from controlkit.reproduce.limits import Condition, Exchange
from controlkit.sample import Request


def exchange(own="a red ball and a blue box, on a green floor"):
    labels = np.full((8, 8), CLASSES.index("ball"), np.uint8)
    scene = replace(next(iter(ScenePairs(32, 10))).truth, captions=(own,), labels=labels)
    return Exchange.of(Pair(scene.picture, own, truth=scene))


def test_the_first_solid_is_exchanged_for_one_that_is_not_there():
    found = exchange()
    assert (found.shown, found.said) == ("ball", "cylinder")
    assert found.other == "a red cylinder and a blue box, on a green floor"
    assert exchange("a red ball and a blue ball, on a green floor") is None  # which of them?
    assert exchange("a person in a red shirt, on a green floor") is None
    assert exchange("a red ring, on a green floor") is None  # which cannot be seen
    assert Exchange.of(Pair(np.zeros((8, 8, 3), np.uint8), "a ball")) is None


def test_a_strong_prompt_stresses_the_word_and_denies_the_hint():
    found, request = exchange(), Request(prompt="x", seed=3, guidance=4.0)
    strong = found.asked(request, Condition("", 1.0, strong=True))
    assert "a red (cylinder:1.5) and a blue box" in strong.prompt and strong.dialect == "a1111"
    assert (strong.negative_prompt, strong.guidance, strong.seed) == ("a ball", 4.0, 3)
    assert found.asked(request, Condition("", 1.0)).prompt == found.other
    assert found.asked(request, Condition("", 1.0, exchanged=False)).prompt == found.own


def test_the_solid_that_takes_more_of_the_picture_is_drawn():
    found = exchange()
    labels = np.zeros((10, 10), np.uint8)
    assert limits._drawn(labels, found) == ""
    labels[0, :3] = CLASSES.index("ball")
    assert limits._drawn(labels, found) == "shown"
    labels[1, :4] = CLASSES.index("cylinder")
    assert limits._drawn(labels, found) == "said"


@pytest.mark.usefixtures("untrained_shipped")
def test_the_figure_has_both_ends_and_what_the_judges_know(toy_base, monkeypatch, tmp_path):
    seen = []
    figure = make_limits(toy_base, Plan(num=3, steps=1), tmp_path, seen.append)
    rows = {row.name: row for row in figure.rows}
    assert list(rows) == list(limits.ORDER) == seen
    for row in rows.values():
        assert row.shown.mean + row.said.mean + row.neither.mean == pytest.approx(1)
        assert row.chosen is None and row.words()[4] == "-"  # a toy has no referee
    assert rows["truth"].shown.mean > rows["truth"].said.mean
    assert rows["truth"].fidelity.mean > rows["strong"].fidelity.mean
    assert "cannot tell" not in figure.caption()
    assert "cannot tell" in limits.Limits._of_the_referee(limits.Figure(0.6, 0.4, 0.8))
    assert limits.Limits._of_the_referee(limits.Figure(0.8, 0.6, 0.9)) == ""
    assert "floor" in figure.caption() and (tmp_path / "fig-limits.png").is_file()
    monkeypatch.setattr(limits, "SOLIDS", ())
    with pytest.raises(Invalid, match="larger --num"):
        make_limits(toy_base, Plan(num=2, steps=1), tmp_path)
    assert SOLIDS
