"""What is watched besides obedience: colours and residuals."""

import numpy as np
import pytest
import torch

from controlkit.images import Hint
from controlkit.measure import COLOURS, colours
from controlkit.recipe import parse_recipe
from controlkit.train import evaluation, training_pairs
from controlkit.train.evaluation import Evaluator, Gauge

RECIPE = parse_recipe(
    {"data": {"source": "fill50k", "count": 4}, "batch": 2, "evaluation": {"every": 1, "num": 3, "steps": 1}}
)
CONTRACT = Hint("canny")


def flat(*colour):
    return np.full((8, 8, 3), colour, np.uint8)


def test_colours_are_means_contrast_and_saturation():
    assert colours(flat(255, 0, 51)).tolist() == pytest.approx([1, 0, 0.2, 0, 1])
    halves = np.concatenate([flat(0, 0, 0), flat(255, 255, 255)])
    assert colours(halves).tolist() == pytest.approx([0.5, 0.5, 0.5, 0.5, 0])


def test_drift_is_what_control_changed_of_the_base_s_colours(toy_base, tmp_path, monkeypatch):
    pairs = training_pairs(RECIPE, toy_base)[1]
    given = []

    def made(*args, wanted, rows, **more):
        given.append(wanted)
        found = {"controlled": [flat(255, 0, 51 * i) for i in rows], "shuffled": [flat(0, 0, 0)] * 3}
        return {way: (found | {"no_control": [flat(0, 0, 102)] * 3})[way] for way in wanted}

    monkeypatch.setattr(evaluation, "three_ways", made)
    monkeypatch.setattr(evaluation, "obedience", lambda *scores: None)
    evaluator = Evaluator(toy_base, pairs, CONTRACT, RECIPE, tmp_path)
    branch = toy_base.new_branch()
    for step in (1, 2):  # what is without control is made once, and remembered
        drift = evaluator.measure(branch, step, lambda count: None)[1]
        assert tuple(drift) == COLOURS
        assert list(drift.values()) == pytest.approx([1, 0, -0.2, 0, 0.6])
    assert given == [["controlled", "shuffled", "no_control"], ["controlled", "shuffled"]]


def test_residuals_are_told_relative_to_what_they_are_added_to(toy_base, tmp_path):
    pairs = training_pairs(RECIPE, toy_base)[1]
    gauge = Gauge(toy_base, pairs, {"": CONTRACT}, RECIPE, tmp_path)
    branch = toy_base.new_branch()
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
