"""Evaluation during a run: drift, quality, the held-out loss and residuals."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from controlkit.controls import new_control
from controlkit.errors import UserError
from controlkit.images import HintSpec
from controlkit.measure import COLOURS
from controlkit.train import best_of, evaluation, should_stop, summary_of, training_pairs
from controlkit.train.evaluation import Evaluator, HeldoutLoss
from controlkit.train.recipe import EvaluationRecipe, parse_recipe

RECIPE = parse_recipe(
    {"data": {"source": "fill50k", "count": 4}, "batch": 2, "evaluation": {"every": 1, "num": 3, "steps": 1}}
)
CONTRACT = HintSpec("canny")


def flat(*colour):
    return np.full((8, 8, 3), colour, np.uint8)


def test_drift_is_what_control_changed_of_the_base_s_colours(toy_base, tmp_path, monkeypatch):
    pairs = training_pairs(RECIPE, toy_base)[1]
    given = []

    def made(make, plan, wanted, rows):
        given.append(wanted)
        found = {"controlled": [flat(255, 0, 51 * i) for i in rows], "shuffled": [flat(0, 0, 0)] * 3}
        return {way: (found | {"no_control": [flat(0, 0, 102)] * 3})[way] for way in wanted}

    monkeypatch.setattr(evaluation, "three_ways", made)
    monkeypatch.setattr(evaluation, "obedience", lambda *scores: None)
    evaluator = Evaluator(toy_base, pairs, CONTRACT, RECIPE, tmp_path)
    branch = new_control(toy_base)
    for step in (1, 2):  # what is without control is made once, and remembered
        drift = evaluator.measure(branch, step, lambda count: None).drift
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
    pairs = training_pairs(RECIPE, toy_base)[1]
    assert Evaluator(toy_base, pairs, CONTRACT, RECIPE, tmp_path).measure(new_control(toy_base), 1, int).quality == {}
    monkeypatch.setattr(evaluation, "world_of", lambda base: Red())
    evaluator = Evaluator(toy_base, pairs, CONTRACT, RECIPE, tmp_path)
    for step in (1, 2):
        found = evaluator.measure(new_control(toy_base), step, int).quality
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


def test_residuals_are_told_relative_to_what_they_are_added_to(toy_base, tmp_path):
    pairs = training_pairs(RECIPE, toy_base)[1]
    gauge = HeldoutLoss(toy_base, pairs, {"": CONTRACT}, RECIPE, tmp_path)
    branch = new_control(toy_base)
    names = [tap.name for tap in toy_base.branch_taps]
    assert gauge.residuals(branch) == dict.fromkeys(names, 0.0), "exact zeros at birth"
    for number, join in enumerate(branch.joins.values(), 1):
        torch.nn.init.constant_(join.bias, number)  # residuals that are 1, 2, ... everywhere
    squares = dict.fromkeys(names, 0.0)
    with torch.no_grad():
        for batch in gauge.batches:
            z = toy_base.scheduler.add_noise(batch.latents, batch.noise, batch.t)
            encoded = toy_base.encode_noise(z, batch.t, batch.text)
            for name, feature in zip(names, [*encoded.skips, encoded.middle], strict=True):
                squares[name] += feature.square().mean().item() / len(gauge.batches)
    wanted = {name: number / squares[name] ** 0.5 for number, name in enumerate(names, 1)}
    assert gauge.residuals(branch) == pytest.approx(wanted, rel=1e-4)
    assert branch.training


@pytest.fixture
def little_memory(toy_base, monkeypatch):
    """A base that holds so many rows at once; how many it was given."""
    real, given = toy_base.predict, []

    def predict(z, *inputs):
        given.append(len(z))
        if len(z) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return real(z, *inputs)

    monkeypatch.setattr(toy_base, "predict", predict)
    return given


def test_where_memory_runs_out_the_loss_is_measured_of_fewer_pairs_at_once(toy_base, little_memory, tmp_path):
    recipe = RECIPE.model_copy(update={"evaluation": RECIPE.evaluation.model_copy(update={"num": 4})})
    pairs = training_pairs(recipe, toy_base)[1]
    branch = new_control(toy_base)
    for join in branch.joins.values():
        torch.nn.init.normal_(join.weight, std=0.2)
    gauge = HeldoutLoss(toy_base, pairs, {"": CONTRACT}, recipe, tmp_path / "little")
    few = gauge.measure(branch)
    assert little_memory == [16, 16, 8, 8, 8, 8], (
        "four pairs, four again, then two and two, without control and under it"
    )
    assert few[""] != [1.0] * 4
    little_memory.clear()
    gauge.measure(branch)
    assert little_memory == [8, 8], "and so from then on; what is without control is known"
    little = gauge.residuals(branch)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(toy_base, "predict")
        whole = HeldoutLoss(toy_base, pairs, {"": CONTRACT}, recipe, tmp_path / "much")
        assert whole.measure(branch)[""] == pytest.approx(few[""], rel=1e-5) and len(whole.batches) == 1
        assert whole.residuals(branch) == pytest.approx(little, rel=1e-5)


def test_where_memory_does_not_hold_one_pair_it_says_what_to_set(toy_base, tmp_path, monkeypatch):
    gauge = HeldoutLoss(toy_base, training_pairs(RECIPE, toy_base)[1], {"": CONTRACT}, RECIPE, tmp_path)

    def full(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(toy_base, "predict", full)
    with pytest.raises(UserError, match=r"evaluation\.every: 0"):
        gauge.measure(new_control(toy_base))
