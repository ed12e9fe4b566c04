"""Evaluation during a run: drift, quality, the held-out loss and residuals."""

from dataclasses import replace

import numpy as np
import pytest

from controlkit.controls import new_control
from controlkit.data import Pair
from controlkit.images import HintSpec
from controlkit.measure import COLOURS, EvaluationPlan
from controlkit.sample import ControlRequest
from controlkit.train import Record, best_of, evaluation, resolve, should_stop, summary_of, training_pairs
from controlkit.train.evaluation import Evaluator
from controlkit.train.ranks import Ranks
from controlkit.train.recipe import EvaluationRecipe, parse_recipe

RECIPE = parse_recipe(
    {"data": {"source": "fill50k", "count": 4}, "batch": 2, "evaluation": {"every": 1, "num": 3, "steps": 1}}
)


def plan_of(pairs):
    return EvaluationPlan(ControlRequest(name=evaluation.CONTROL), HintSpec("canny"), list(pairs), steps=1)


def flat(*colour):
    return np.full((8, 8, 3), colour, np.uint8)


def test_drift_is_what_control_changed_of_the_base_s_colours(toy_base, tmp_path, monkeypatch):
    pairs = training_pairs(resolve(RECIPE).data, toy_base)[1]
    given = []

    def made(make, plan, wanted, rows):
        given.append(wanted)
        found = {"controlled": [flat(255, 0, 51 * i) for i in rows], "shuffled": [flat(0, 0, 0)] * 3}
        return {way: (found | {"no_control": [flat(0, 0, 102)] * 3})[way] for way in wanted}

    monkeypatch.setattr(evaluation, "three_ways", made)
    monkeypatch.setattr(evaluation, "obedience", lambda *scores: None)
    evaluator = Evaluator(toy_base, toy_base, plan_of(pairs), [], tmp_path, Ranks())
    branch = new_control(toy_base)
    for step in (1, 2):  # what is without control is made once, and remembered
        drift = evaluator.measure(branch, Record(step, 0.0, 0.0), lambda count: None).drift
        assert tuple(drift) == COLOURS
        assert list(drift.values()) == pytest.approx([1, 0, -0.2, 0, 0.6])
    assert given == [["controlled", "shuffled", "no_control"], ["controlled", "shuffled"]]


class Red:
    """A world whose referee scores a picture by its red, and tells captions apart so well."""

    def __init__(self, told):
        self.told = told

    def referee(self, device):
        return self

    def clip_scores(self, pictures, prompts):
        assert len(pictures) == len(prompts)
        return np.array([picture[..., 0].mean() / 255 for picture in pictures])

    def preferences(self, pictures, prompts):
        return np.full(len(pictures), self.told)


@pytest.fixture
def judged_by(toy_base, tmp_path, monkeypatch):
    """``judged_by(world, truth)``: an evaluator whose held-out pictures have that much red, 0 to 255."""

    def made(make, plan, wanted, rows):
        red = {"controlled": 153, "shuffled": 0, "no_control": 255}
        return {way: [flat(red[way], 0, 0) for _ in rows] for way in wanted}

    monkeypatch.setattr(evaluation, "three_ways", made)
    monkeypatch.setattr(evaluation, "obedience", lambda *scores: None)

    def evaluator(world, truth=255):
        pairs = [Pair(np.full((32, 32, 3), (truth, 0, 0), np.uint8), "a") for _ in range(3)]
        monkeypatch.setattr(evaluation, "world_of", lambda base: world)
        return Evaluator(toy_base, toy_base, plan_of(pairs), [], tmp_path, Ranks())

    return evaluator


LINE = {"step": 2, "obedience": 0.9, "obedience_interval": [0.8, 1.0], "is_meaningful": True}


@pytest.mark.parametrize(("truth", "kept"), [(255, False), (170, False), (160, True), (30, True)])
def test_quality_is_measured_against_the_lesser_of_truth_and_no_control(truth, kept, toy_base, judged_by):
    evaluator = judged_by(Red(1.0), truth)
    assert evaluator.unjudged == ""
    found = evaluator.measure(new_control(toy_base), Record(1, 0.0, 0.0), int).quality
    assert found == {
        "clip_score": pytest.approx(0.6),
        "clip_score_no_control": pytest.approx(1.0),
        "clip_score_truth": pytest.approx(truth / 255),
    }
    assert summary_of(LINE | {"quality": found}).quality_kept is kept


@pytest.mark.parametrize("world", [Red(0.6), Red(0.5), None])
def test_a_referee_that_cannot_tell_the_truth_ends_no_run_and_prefers_nothing(world, toy_base, judged_by):
    evaluator = judged_by(world, truth=30)
    assert evaluator.unjudged.startswith("CLIP-score, FID and whether quality was kept are not measured")
    found = evaluator.measure(new_control(toy_base), Record(1, 0.0, 0.0), int).quality
    line = LINE | {"quality": found} if found else LINE
    reached, poorer = summary_of(line), summary_of(line | {"step": 3, "obedience": 0.5})
    assert found == {} and best_of([poorer, reached]) is reached
    assert should_stop(EvaluationRecipe(target=0.7), [reached])


def test_a_log_of_before_the_truth_was_measured_is_read_as_it_was():
    quality = {"clip_score": 0.9, "clip_score_no_control": 1.0}
    assert not summary_of(LINE | {"quality": quality}).quality_kept


def test_the_best_of_the_shipped_world_kept_its_quality(toy_base, judged_by):
    evaluator = judged_by(Red(1.0))
    found = evaluator.measure(new_control(toy_base), Record(1, 0.0, 0.0), int).quality
    assert evaluator.measure(new_control(toy_base), Record(2, 0.0, 0.0), int).quality == found
    line = LINE | {"quality": found}
    fell = summary_of(line)
    poorer = summary_of(line | {"step": 3, "obedience": 0.5, "quality": found | {"clip_score": 0.96}})
    assert (fell.quality_kept, poorer.quality_kept) == (False, True)
    none = summary_of(line | {"step": 1, "obedience": 0.0, "obedience_interval": [-0.1, 0.1], "quality": {}})
    assert best_of([none, fell, poorer]) is poorer and best_of([none, fell]) is fell, "no control keeps any quality"
    assert not should_stop(EvaluationRecipe(patience=1), [none, fell])
    reached = replace(fell, quality_kept=True)
    assert should_stop(EvaluationRecipe(target=0.7), [reached]) and not should_stop(
        EvaluationRecipe(target=0.7), [fell]
    )
