"""Evaluation during a run: drift, quality, the held-out loss and residuals."""

from dataclasses import replace

import numpy as np
import pytest

from controlkit.controls import new_control
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


def test_the_best_of_the_shipped_world_kept_its_quality(toy_base, tmp_path, monkeypatch):
    class Red:
        def referee(self, device):
            return self

        def clip_scores(self, pictures, prompts):
            assert len(pictures) == len(prompts)
            return np.array([picture[..., 0].mean() / 255 for picture in pictures])

    def made(make, plan, wanted, rows):
        red = {"controlled": 153, "shuffled": 0, "no_control": 255}
        return {way: [flat(red[way], 0, 0) for _ in rows] for way in wanted}

    monkeypatch.setattr(evaluation, "three_ways", made)
    monkeypatch.setattr(evaluation, "obedience", lambda *scores: None)
    pairs = training_pairs(resolve(RECIPE).data, toy_base)[1]
    evaluator = Evaluator(toy_base, toy_base, plan_of(pairs), [], tmp_path, Ranks())
    assert evaluator.measure(new_control(toy_base), Record(1, 0.0, 0.0), int).quality == {}
    monkeypatch.setattr(evaluation, "world_of", lambda base: Red())
    evaluator = Evaluator(toy_base, toy_base, plan_of(pairs), [], tmp_path, Ranks())
    for step in (1, 2):
        found = evaluator.measure(new_control(toy_base), Record(step, 0.0, 0.0), int).quality
        assert found == {"clip_score": pytest.approx(0.6), "clip_score_no_control": pytest.approx(1.0)}
    line = {"step": 2, "obedience": 0.9, "obedience_interval": [0.8, 1.0], "is_meaningful": True, "quality": found}
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
