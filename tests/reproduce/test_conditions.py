"""Conditions: makers that remember and are told other prompts, several controls at once; Figures 5 and 6, captions."""

import json
from dataclasses import replace

import numpy as np
import pytest

from controlkit.annotators import contract
from controlkit.controls import new_control
from controlkit.data import ScenePairs
from controlkit.formats import SavedControl
from controlkit.measure import EvaluationPlan
from controlkit.reproduce import Plan, auto, cfg, compose, conditions, make_auto, make_cfg, make_compose
from controlkit.reproduce.conditions import Remembered, Under, told
from controlkit.sample import ControlRequest, Picture, Request

pytestmark = pytest.mark.usefixtures("untrained_shipped")
PLAN = Plan(num=3, steps=1)


@pytest.fixture
def acting(toy_base, drawn_joins, monkeypatch):
    """The shipped controls are one that acts; returns the requests that it is given."""
    branch = drawn_joins(new_control(toy_base).eval())
    monkeypatch.setattr(conditions, "load", lambda name, base: (SavedControl(branch, contract(name)), []))
    asked = []
    make = conditions.maker

    def spying(base, loaded):
        def call(requests):
            asked.extend(requests)
            return make(base, loaded)(requests)

        return call

    monkeypatch.setattr(conditions, "maker", spying)
    return asked


def grey(requests):
    return [Picture(one, np.full((2, 2, 3), one.seed, np.uint8)) for one in requests]


def test_a_request_is_made_once_and_comes_back_in_its_place():
    asked = []
    make = Remembered(lambda requests: asked.append(len(requests)) or grey(requests))
    a, b = Request(seed=1), Request(seed=2)
    assert [one.pixels[0, 0, 0] for one in make([a, b, a])] == [1, 2, 1]
    assert [one.pixels[0, 0, 0] for one in make([b, Request(seed=3)])] == [2, 3] and asked == [2, 1]


def test_prompts_are_told_by_seed():
    make = told(grey, ["x", "y"], first_seed=5)
    assert [one.request.prompt for one in make([Request(seed=6, prompt="a"), Request(seed=5, prompt="b")])] == [
        "y",
        "x",
    ]


def test_under_several_controls_each_pair_has_the_hints_of_one_pair(toy_base):
    pairs = list(ScenePairs(toy_base.size, 10, count=4))
    plans = [EvaluationPlan(ControlRequest(name=kind), contract(kind), pairs) for kind in ("seg", "depth")]
    both = Under(**{name: getattr(plans[0], name) for name in ("control", "spec", "pairs")}, controls=plans)
    for way, of in (("controlled", 1), ("shuffled", 3)):
        names, hints = zip(*((one.name, one.images[""]) for one in both.requests(way)[1].controls), strict=True)
        assert names == ("seg", "depth")
        assert all(np.array_equal(hint, plan.hints[of]) for hint, plan in zip(hints, plans, strict=True))
    assert not both.requests("no_control")[0].controls
    assert [one.name for one in replace(both, controls=plans[1:]).requests("controlled")[0].controls] == ["depth"]


def test_figure_5_weighs_the_taps_without_any_prompt(toy_base, acting, tmp_path):
    seen = []
    table = make_cfg(toy_base, PLAN, tmp_path, seen.append)
    assert seen == list(cfg.ORDER)
    assert [(row.name, row.kind) for row in table.rows] == [
        (name, kind) for kind in cfg.KINDS for name in (conditions.NO_CONTROL, *cfg.WAYS)
    ]
    assert {one.prompt for one in acting} == {""}
    used = [control for one in acting for control in one.controls]
    assert {(one.cond_only, one.cfg_weights, one.guess, one.hint_cfg_scale) for one in used} == {
        (False, False, False, 1.0),
        (True, False, False, None),
        (False, True, False, None),
        (False, False, True, None),
        (False, False, False, None),
    }
    fidelity = {row.figures["fidelity"]["mean"] for row in table.rows if row.kind == "canny"}
    assert len(fidelity) > 3  # the ways make other pictures
    told = json.loads((tmp_path / "fig-cfg.json").read_text())
    assert all({"fidelity", "ceiling"} <= row["figures"].keys() for row in told["rows"])
    assert all("floor" in row["figures"] for row in told["rows"] if row["name"] != conditions.NO_CONTROL)
    assert told["settings"]["prompt"] == "none" and "weighted" in table.caption()
    assert {path.name for path in tmp_path.glob("*.png")} == {"fig-cfg-canny.png"}


def test_figure_6_measures_each_hint_under_its_control_the_other_and_both(toy_base, acting, tmp_path):
    table = make_compose(toy_base, PLAN, tmp_path)
    rows = {(row.name, row.kind): row for row in table.rows}
    conditions_of = (conditions.NO_CONTROL, "pose", "depth", compose.BOTH)
    assert list(rows) == [(name, kind) for kind in compose.KINDS for name in conditions_of]
    assert {tuple(control.name for control in one.controls) for one in acting} == {
        (), ("pose",), ("depth",), ("pose", "depth")
    }  # fmt: skip
    depth = [rows[name, "depth"].figures["fidelity"]["mean"] for name in ("pose", "depth", compose.BOTH)]
    assert len(set(depth)) == 3
    assert "OKS of pose: " in table.caption() and "OKS of depth" not in table.caption()
    assert rows[compose.BOTH, "pose"].beside["oks"].keys() >= {"fidelity", "floor", "ceiling", "obedience"}
    assert "as a share of that alone: pose" in table.caption() and (tmp_path / "fig-compose.png").is_file()


def test_captions_of_the_default_pictures_are_the_prompts_of_the_second_round(toy_base, acting, monkeypatch, tmp_path):
    pairs = list(ScenePairs(toy_base.size, 10, count=3))
    monkeypatch.setattr(auto, "evaluation_pairs", lambda *_: (pairs, [pair.picture for pair in pairs]))
    given = iter(["a ball, x", "a box, y", f"{pairs[2].prompt.split(',')[0]}, z", *(pair.prompt for pair in pairs)])
    monkeypatch.setattr(auto, "caption_with", lambda base: (lambda picture: next(given), "a test"))
    table = make_auto(toy_base, PLAN, tmp_path)
    assert [row.name for row in table.rows] == [conditions.NO_CONTROL, "default", "automatic", "true"]
    assert [one for _, one in table.captions][:2] == ["a ball, x", "a box, y"] and (
        table.found,
        table.found_in_truth,
    ) == (1, 3)
    assert [one.prompt for one in acting if one.controls][6:9] == [one for _, one in table.captions]
    assert "by a test" in table.caption() and "1 of 3" in table.caption()
