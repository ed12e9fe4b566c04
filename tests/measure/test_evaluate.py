"""The whole report, of makers that are models and of some that are not."""

import importlib
import json

import numpy as np
import pytest
import torch

from controlkit.annotators import contract
from controlkit.controls import new_control
from controlkit.data import CirclePairs, ScenePairs
from controlkit.errors import Invalid, Unsupported
from controlkit.formats import SavedControl, save_control
from controlkit.measure import (
    EvaluationPlan,
    Quality,
    World,
    ceiling_of,
    evaluate,
    evaluate_base,
    judge,
    obedience_tables,
    three_ways,
)
from controlkit.sample import ControlRequest, Picture, Request, maker

FIGURES = {"fidelity", "floor", "floor_no_control", "floor_shuffled", "ceiling", "obedience"}
QUALITY = {"clip_score", "clip_score_no_control", "clip_score_truth", "fid", "fid_no_control"}
CANNY = contract("canny")


def figures_in(report):
    return {name for name, value in report.items() if isinstance(value, dict)} - {"settings"}


def plan_of(num, spec=CANNY, control=None, **settings):
    control = control or ControlRequest(name="drawn", hint_cfg_scale=1.0)
    return EvaluationPlan(control, spec, list(CirclePairs(32, num)), **settings)


@pytest.fixture(scope="module")
def drawn(toy_base, drawn_joins):
    return SavedControl(drawn_joins(new_control(toy_base)).eval(), CANNY)


@pytest.fixture(scope="module")
def make(toy_base, drawn):
    return maker(toy_base, {"drawn": drawn})


# --- requests and ways --------------------------------------------------------------------------------------


def test_requests_share_seeds_and_prompts_and_differ_in_hints_alone():
    plan = plan_of(4, control=ControlRequest(name="canny", scale=0.5), steps=3, guidance=2.0)
    ways = {way: plan.requests(way) for way in ("controlled", "shuffled", "no_control")}
    for requests in ways.values():
        assert [(r.seed, r.prompt, r.steps, r.guidance) for r in requests] == [
            (i, pair.prompt, 3, 2.0) for i, pair in enumerate(plan.pairs)
        ]
    assert all(r.controls == () for r in ways["no_control"])
    for i, (own, other) in enumerate(zip(ways["controlled"], ways["shuffled"], strict=True)):
        assert own.controls == (plan.with_hint(plan.hints[i]),)
        assert other.controls == (plan.with_hint(plan.hints[(i + 2) % 4]),), "nobody keeps its own: a rotation by half"
        assert (own.controls[0].name, own.controls[0].scale, own.controls[0].ready) == ("canny", 0.5, True)
    assert plan.requests("shuffled", [3, 1]) == [ways["shuffled"][3], ways["shuffled"][1]]


def test_the_three_ways_are_made_of_them(make):
    plan = plan_of(4, steps=1)
    made = three_ways(make, plan)
    assert set(made) == {"controlled", "no_control", "shuffled"}
    plan.hints[:] = [*plan.hints[2:], *plan.hints[:2]]
    again = three_ways(make, plan, ("controlled", "shuffled"))
    assert np.array_equal(again["shuffled"], made["controlled"])
    assert not np.array_equal(made["controlled"], made["no_control"])
    assert "no_control" not in again


def test_a_maker_that_makes_too_few_is_an_error():
    with pytest.raises(Invalid, match="4 pictures were requested, and 0 were made"):
        three_ways(lambda requests: [], plan_of(4))


def test_the_ceiling_is_the_vae_s_reconstruction_whatever_the_batch(toy_base, monkeypatch):
    truths = [pair.picture for pair in CirclePairs(32, 3)]
    whole = ceiling_of(toy_base)(truths)
    monkeypatch.setattr(importlib.import_module("controlkit.measure.evaluate"), "_AT_ONCE", 2)
    halves = ceiling_of(toy_base)(truths)
    assert [picture.shape for picture in whole] == [(32, 32, 3)] * 3
    assert np.abs(np.stack(whole).astype(int) - np.stack(halves)).max() <= 1
    assert not np.array_equal(whole[0], whole[1])


# --- the report ---------------------------------------------------------------------------------------------


@pytest.fixture
def telling(referee, monkeypatch):
    """The referee with random weights, as if it told the true pictures' captions apart."""
    monkeypatch.setattr(referee, "preferences", lambda pictures, prompts: np.ones(len(pictures)))
    return referee


def test_evaluation_reports_every_figure_with_its_interval(toy_base, drawn, telling):
    advanced = []
    real = [pair.picture for pair in CirclePairs(32, 6, first=100)]
    make = maker(toy_base, {"drawn": drawn}, on_step=advanced.append)
    report = evaluate(make, plan_of(4, steps=2), ceiling_of(toy_base), Quality(telling, real))
    assert figures_in(report) == FIGURES | QUALITY
    for name in FIGURES | QUALITY:
        assert set(report[name]) == {"mean", "low", "high"}
        assert np.isfinite([*report[name].values()]).all()
    assert report["floor"]["mean"] == max(report["floor_no_control"]["mean"], report["floor_shuffled"]["mean"])
    assert (report["metric"], report["num"]) == ("edge_f1", 4)
    assert isinstance(report["quality_kept"], bool) and "notes" not in report
    assert report["settings"] == {
        "steps": 2, "guidance": 4.0, "size": None, "scale": 1.0, "hint_cfg_scale": 1.0, "seeds": "0-3",
    }  # fmt: skip
    assert report["seconds"] > 0 and json.loads(json.dumps(report)) == report
    assert sum(advanced) == 3 * 4 * 2, "three ways, four pictures, two steps"


def test_pictures_without_control_that_are_at_hand_are_not_made_again(make):
    plan, asked = plan_of(4, steps=1), []

    def counted(requests):
        asked.append(len(requests[0].controls))
        return make(requests)

    whole = evaluate(counted, plan, list)
    assert asked == [1, 1, 0]
    again = evaluate(counted, plan, list, no_control=three_ways(make, plan, ["no_control"])["no_control"])
    assert asked == [1, 1, 0, 1, 1]
    assert {name: whole[name] for name in FIGURES} == {name: again[name] for name in FIGURES}


def test_hints_that_only_scenes_have_are_refused_before_anything_is_made():
    with pytest.raises(Unsupported, match="measure on scenes"):
        evaluate(lambda requests: pytest.fail("made"), plan_of(2, contract("depth")), list)


# --- makers that are no models ------------------------------------------------------------------------------


def noise(request):
    return np.random.default_rng(request.seed).integers(0, 256, (32, 32, 3), np.uint8)


def made_by(pixels):
    return lambda requests: [Picture(request, pixels(request), torch.empty(0)) for request in requests]


def test_a_maker_that_draws_the_picture_of_each_hint_has_obedience_one():
    plan = plan_of(8)
    by_hint = {hint.tobytes(): pair.picture for hint, pair in zip(plan.hints, plan.pairs, strict=True)}

    def pixels(request: Request):
        return by_hint[request.controls[0].images[""].tobytes()] if request.controls else noise(request)

    report = evaluate(made_by(pixels), plan, list)
    assert report["fidelity"]["mean"] == report["ceiling"]["mean"] == report["obedience"]["mean"] == 1
    assert report["floor_shuffled"]["mean"] < 0.8 and report["is_meaningful"]


def test_a_maker_that_heeds_no_hint_has_obedience_zero():
    plan = plan_of(8)
    deaf = evaluate(made_by(noise), plan, list)
    assert deaf["obedience"]["mean"] == 0 and deaf["ceiling"]["mean"] == 1
    truths = evaluate(made_by(lambda request: plan.pairs[request.seed].picture), plan, list)
    assert truths["obedience"]["mean"] == 0 and not truths["is_meaningful"], "no hint was needed for them"


def test_poses_have_a_second_metric_with_a_floor_and_a_ceiling_of_its_own():
    pairs = list(ScenePairs(64, 40, 7, person=True, count=4))
    plan = EvaluationPlan(ControlRequest(name="drawn", hint_cfg_scale=1.0), contract("pose"), pairs)
    shown = [plan.spec.picture(hint) for hint in plan.hints]

    def pixels(request: Request):
        return request.controls[0].images[""] if request.controls else np.zeros_like(shown[0])

    report = evaluate(made_by(pixels), plan, lambda pictures: shown, finder=lambda picture: picture)
    second = report["beside"]["oks"]
    assert report["metric"] == "pck" and second.keys() == FIGURES | {"metric"}
    assert second["fidelity"]["mean"] == second["ceiling"]["mean"] == second["obedience"]["mean"] == 1
    assert second["floor_no_control"]["mean"] == 0 < second["floor_shuffled"]["mean"] < 0.8
    assert second["floor_shuffled"] != report["floor_shuffled"]
    assert [table.head[0] for table in obedience_tables(report)] == ["pck", "oks"]


@pytest.mark.parametrize("told", [0.5, 0.7])
def test_a_control_that_draws_the_truth_is_not_said_to_lose_quality_by_a_referee_that_cannot_tell_it(
    told, referee, monkeypatch
):
    """As it was on a person's stamps: 0.12 for the true pictures, 0.50 for those without control."""
    plan = plan_of(8)
    truths = [pair.picture for pair in plan.pairs]

    def clip_scores(pictures, prompts):
        return np.array([0.12 if any(one is true for true in truths) else 0.5 for one in pictures])

    monkeypatch.setattr(referee, "clip_scores", clip_scores)
    monkeypatch.setattr(referee, "preferences", lambda pictures, prompts: np.full(len(pictures), told))
    make = made_by(lambda request: truths[request.seed] if request.controls else noise(request))
    report = evaluate(make, plan, list, Quality(referee, truths))
    assert figures_in(report) == FIGURES and "quality_kept" not in report
    assert f"in {told:.0%} [{told:.0%}, {told:.0%}] of all comparisons" in report["notes"][0]
    monkeypatch.setattr(referee, "preferences", lambda pictures, prompts: np.ones(len(pictures)))
    report = evaluate(make, plan, list, Quality(referee, truths))
    assert report["quality_kept"] and report["clip_score_truth"]["mean"] == pytest.approx(0.12)


def test_control_is_found_by_a_second_measurement_with_the_seeds_that_follow():
    plan, seeds = plan_of(8), []
    by_hint = {hint.tobytes(): pair.picture for hint, pair in zip(plan.hints, plan.pairs, strict=True)}
    obeyed = set()

    def pixels(request):
        seeds.append(request.seed)
        own = request.controls and request.seed in obeyed
        return by_hint[request.controls[0].images[""].tobytes()] if own else noise(request)

    for more, finding, last in (((), "not found", 7), (range(8), "not found", 15), (range(16), "found", 15)):
        obeyed |= {*more}
        seeds.clear()
        report = evaluate(made_by(pixels), plan, list)
        verdict = judge(made_by(pixels), plan, report, list)
        assert (verdict.finding, max(seeds)) == (finding, last)
        assert (report["finding"], report["verdict"]) == (finding, str(verdict))
        assert ("obedience_again" in report) is (last == 15) and json.loads(json.dumps(report)) == report


# --- worlds -------------------------------------------------------------------------------------------------


def test_a_base_of_another_world_has_no_figures_of_quality_and_a_sentence_says_so(toy_base, make):
    report = evaluate_base(toy_base, make, plan_of(4, steps=1), [])
    assert figures_in(report) == FIGURES and "quality_kept" not in report
    [sentence] = report["notes"]
    assert sentence.startswith("CLIP-score, FID and whether quality was kept are not measured: no referee")
    facts = {"base": "toy", "base_digest": toy_base.digest, "format": "float32"}
    assert report["settings"] | facts == report["settings"]


def test_a_base_is_judged_by_its_own_world_s_referee(toy_base, make, telling, monkeypatch):
    monkeypatch.setattr(World, "judges", lambda self, base: base is toy_base)
    monkeypatch.setattr(World, "referee", lambda self, device: telling)
    report = evaluate_base(toy_base, make, plan_of(4, steps=1), [pair.picture for pair in CirclePairs(32, 3)])
    assert figures_in(report) == FIGURES | QUALITY and "notes" not in report


def test_the_command_shows_no_rows_of_what_is_absent(run, toy_base, toy_folder, drawn, tmp_path):
    save_control(tmp_path / "drawn", drawn, toy_base)
    out = tmp_path / "report.json"
    arguments = ("evaluate", tmp_path / "drawn", "--base", toy_folder, "--data", "fill50k", "--num", 2, "--steps", 1)
    code, shown, err = run(*arguments, "--json", out)
    assert code == 0, err
    report = json.loads(out.read_text())
    assert figures_in(report) == FIGURES and "obedience" in shown
    assert "clip_score" not in shown and "fid" not in shown.replace("fidelity", "")
    assert "not measured" in shown and "quality fell" not in shown + err
    assert shown.rstrip().splitlines()[-1] == report["verdict"] and "measuring" not in shown
    assert report["settings"]["hint_cfg_scale"] == 1.0 and report["settings"]["base"] == "toy"
