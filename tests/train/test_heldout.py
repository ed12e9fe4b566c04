"""The loss on held-out pairs relative to no control, and the size of residuals."""

import numpy as np
import pytest
import torch
from tiny_runs import UNION, heldout_loss, log_of

from controlkit.controls import new_control
from controlkit.errors import UserError
from controlkit.formats import load_control
from controlkit.train import resolve, train_control, training_pairs


def test_the_relative_loss_is_1_without_control_and_falls_as_a_control_learns(tiny_recipe, toy_base, tmp_path):
    recipe = tiny_recipe(steps=60, batch=8, lr=3e-3, evaluation={"every": 20, "num": 6, "steps": 1}, prompt_dropout=0.0)
    pairs = training_pairs(resolve(recipe).data, toy_base)[0]  # of what it was trained on, so that a toy can show it
    loss = heldout_loss(recipe, toy_base, [pairs[i] for i in range(6)], tmp_path)
    born = loss.measure(new_control(toy_base))
    assert born.keys() == {""} and born[""] == pytest.approx([1.0] * 4, abs=1e-6)
    records = list(train_control(recipe, tmp_path / "run", toy_base))
    assert [len(record.relative[""]) for record in records if record.relative] == [4] * 3
    trained = loss.measure(load_control(tmp_path / "run", toy_base).branch)[""]
    assert np.mean(trained) < 0.995 and loss.measure(new_control(toy_base)) == born, "the same noise each time"
    logged = [line["relative_loss"][""] for line in log_of(tmp_path / "run") if "relative_loss" in line]
    assert logged[-1] == pytest.approx(list(records[-1].relative[""]), abs=1e-4)


def test_a_union_s_relative_loss_is_given_type_by_type(tiny_recipe, toy_base, fake_packages, tmp_path):
    recipe = tiny_recipe(**UNION | {"evaluation": {"every": 2, "num": 4}}, steps=2, batch=4)
    last = list(train_control(recipe, tmp_path / "run", toy_base))[-1]
    assert last.evaluation is None and set(last.relative) <= set(UNION["control"]["types"])
    assert len(last.relative) > 1 and all(len(quarters) == 4 for quarters in last.relative.values())


def test_residuals_are_relative_to_what_they_are_added_to(tiny_recipe, toy_base, tmp_path):
    recipe = tiny_recipe(evaluation={"num": 3})
    pairs = training_pairs(resolve(recipe).data, toy_base)[1]
    loss = heldout_loss(recipe, toy_base, pairs, tmp_path)
    branch = new_control(toy_base)
    names = [tap.name for tap in toy_base.branch_taps]
    assert loss.residuals(branch) == dict.fromkeys(names, 0.0), "exact zeros at birth"
    for number, join in enumerate(branch.joins.values(), 1):
        torch.nn.init.constant_(join.bias, number)  # residuals that are 1, 2, ... everywhere
    squares = dict.fromkeys(names, 0.0)
    with torch.no_grad():
        for batch in loss.batches:
            z = toy_base.scheduler.add_noise(batch.latents, batch.noise, batch.t)
            encoded = toy_base.encode_noise(z, batch.t, batch.text)
            for name, feature in zip(names, [*encoded.skips, encoded.middle], strict=True):
                squares[name] += feature.square().mean().item() / len(loss.batches)
    wanted = {name: number / squares[name] ** 0.5 for number, name in enumerate(names, 1)}
    assert loss.residuals(branch) == pytest.approx(wanted, rel=1e-4)
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


def test_where_memory_runs_out_the_loss_is_measured_of_fewer_pairs_at_once(
    tiny_recipe, toy_base, little_memory, tmp_path
):
    recipe = tiny_recipe(evaluation={"num": 4})
    pairs = training_pairs(resolve(recipe).data, toy_base)[1]
    branch = new_control(toy_base)
    for join in branch.joins.values():
        torch.nn.init.normal_(join.weight, std=0.2)
    loss = heldout_loss(recipe, toy_base, pairs, tmp_path / "little")
    few = loss.measure(branch)
    assert little_memory == [16, 16, 8, 8, 8, 8], (
        "four pairs, four again, then two and two, without control and under it"
    )
    assert few[""] != [1.0] * 4
    little_memory.clear()
    loss.measure(branch)
    assert little_memory == [8, 8], "and so from then on; what is without control is known"
    little = loss.residuals(branch)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(toy_base, "predict")
        whole = heldout_loss(recipe, toy_base, pairs, tmp_path / "much")
        assert whole.measure(branch)[""] == pytest.approx(few[""], rel=1e-5) and len(whole.batches) == 1
        assert whole.residuals(branch) == pytest.approx(little, rel=1e-5)


def test_where_memory_does_not_hold_one_pair_it_says_what_to_set(tiny_recipe, toy_base, tmp_path, monkeypatch):
    recipe = tiny_recipe()
    loss = heldout_loss(recipe, toy_base, training_pairs(resolve(recipe).data, toy_base)[1], tmp_path)

    def full(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(toy_base, "predict", full)
    with pytest.raises(UserError, match=r"evaluation\.every: 0"):
        loss.measure(new_control(toy_base))
