"""A run: what it writes, reports and refuses."""

import copy
import dataclasses
import itertools
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import CANNY, assert_like, ended, equal, leftovers, log_of

from conftest import TINY
from controlkit.branch import ControlSpec
from controlkit.controls import new_control
from controlkit.data import Cached, make_fill50k
from controlkit.errors import Unsupported, UserError
from controlkit.formats import WEIGHTS, SavedControl, load_control, save_control
from controlkit.images import HintSpec, write_png
from controlkit.measure import COLOURS, Figure, obedience
from controlkit.train import BatchPlan, draw_batch, objective, train_control
from controlkit.train import run as runs
from controlkit.train.recipe import EvaluationRecipe, Recipe, parse_recipe, read_recipe


def test_a_run_leaves_a_log_checkpoints_samples_and_a_control(tiny_recipe, toy_base, tmp_path):
    whole = tmp_path / "run"
    list(train_control(tiny_recipe(), whole, toy_base))
    records = log_of(whole)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records if "obedience" in record] == [3, 6]
    evaluated = records[2]
    assert set(evaluated) == {
        "step", "loss", "fidelity", "floor", "ceiling", "obedience", "obedience_interval", "is_meaningful", "verdict",
        "relative_loss", "colour_drift", "residuals",
    }  # fmt: skip
    assert not evaluated["is_meaningful"] and evaluated["verdict"].startswith(
        "it cannot be measured whether there is control"
    )
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step-0000004", "step-0000006"]
    assert sorted(path.name for path in (whole / "samples").iterdir()) == ["step-0000003.png", "step-0000006.png"]
    assert read_recipe(whole / "recipe.yaml") == tiny_recipe()
    control = load_control(whole, toy_base)
    assert control.hint == HintSpec("canny", {"low": 100.0, "high": 200.0}, resize="lines")
    assert control.trained["step"] == 6 and control.trained["base_digest"] == toy_base.digest
    assert Recipe(**control.trained["recipe"]) == tiny_recipe()
    assert not leftovers(whole)


def test_records_are_yielded_as_they_are_logged(tiny_recipe, toy_base, tmp_path):
    for record in itertools.islice(train_control(tiny_recipe(), tmp_path, toy_base), 3):
        last = (tmp_path / "log.jsonl").read_text().splitlines()[-1]
        assert last == record.to_json()
    assert record.evaluation and record.verdict and record.seconds > 0


def test_training_lowers_the_loss(tiny_recipe, toy_base, tmp_path):
    recipe = tiny_recipe(steps=40, batch=4, lr=5e-3, checkpoint_every=40, evaluation={"every": 0})
    list(train_control(recipe, tmp_path, toy_base))
    [cached] = Cached.read(next(tmp_path.glob("pairs*")))
    batch = draw_batch(toy_base, cached, BatchPlan.of(tiny_recipe(batch=16), {"": CANNY}), 1000)
    with torch.no_grad():
        before, after = (
            objective(toy_base, branch, batch)
            for branch in (new_control(toy_base), load_control(tmp_path, toy_base).branch)
        )
    assert after < 0.95 * before, (float(before), float(after))


def test_training_leaves_the_base_as_it_was(tiny_recipe, toy_base, tmp_path):
    modules = {"vae": toy_base.vae, "text": toy_base.towers[0].encoder, "unet": toy_base.unet}
    before = {f"{n}.{k}": v.clone() for n, module in modules.items() for k, v in module.state_dict().items()}
    list(train_control(tiny_recipe(steps=2), tmp_path, toy_base))
    after = {f"{n}.{k}": v for n, module in modules.items() for k, v in module.state_dict().items()}
    assert equal(before, after)
    parameters = [p for module in modules.values() for p in module.parameters()]
    assert not any(p.requires_grad or p.grad is not None for p in parameters)
    assert not any(module.training for module in modules.values())


def test_the_work_announced_is_the_work_done(tiny_recipe, toy_base, tmp_path):
    stages = []
    run = train_control(
        tiny_recipe(),
        tmp_path,
        toy_base,
        lambda name, total: stages.append([name, total, 0]),
        lambda n: stages[-1].append(n),
    )
    list(run)
    assert [name for name, total, *_ in stages[1:] if total] == ["caching", "evaluating", "evaluating"]
    assert stages[0][1:] == [0, 0], "the plan: nothing to be done, something to know"
    for name, total, *done in stages:
        assert sum(done) == total, name


@pytest.mark.parametrize(
    ("annotator", "words"),
    [
        ("", "pictures and no hints, and nobody says which hints to make: set control.annotator .--annotator, beside"),
        ("ted", 'nothing here makes hints of "ted": set control.annotator'),
        ("ip2p", 'nothing here makes hints of "ip2p"'),
    ],
)
def test_a_folder_without_hints_is_told_how_to_name_some(annotator, words, tiny_recipe, toy_base, tmp_path):
    for i in range(8):
        write_png(tmp_path / "photos" / f"{i}.png", np.full((32, 32, 3), 20 * i, np.uint8))
    recipe = tiny_recipe(data={"source": str(tmp_path / "photos"), "count": None}, control={"annotator": annotator})
    with pytest.raises(Unsupported, match=words):
        next(train_control(recipe, tmp_path / "run", toy_base))


def test_a_run_whose_rate_nobody_gave_says_whose_it_is(toy_base, tmp_path):
    recipe = parse_recipe({key: value for key, value in TINY.items() if key != "lr"})
    said = []
    next(train_control(recipe, tmp_path, toy_base, on_stage=lambda name, total: said.append(name)))
    assert "rate 0.0002 (the default for mini; `lr` sets it)" in said[0]


def test_a_run_says_beforehand_what_it_will_do(tiny_recipe, toy_base, tmp_path):
    said = []
    recipe = tiny_recipe(batch=4, noises_per_pair=2, prompt_dropout=0.5)
    next(train_control(recipe, tmp_path, toy_base, on_stage=lambda name, total: said.append((name, total))))
    plan, total = said[0]
    learning = sum(p.numel() for p in new_control(toy_base).parameters()) / 1e6
    assert total == 0 and plan.startswith(
        f"{learning:.2f}M parameters learn hints of canny [0, 1] for {toy_base.name}: "
    )
    assert "8 pairs, 1.5 times each, in 6 steps of 4 rows; 50% of prompts dropped" in plan
    assert plan.endswith("adamw, rate 0.001; 1 process")
    recipe = recipe.model_copy(update={"max_minutes": 0.8})
    next(train_control(recipe, tmp_path / "short", toy_base, on_stage=lambda name, total: said.append((name, total))))
    assert any("in 6 steps (or 0.8 minutes) of 4 rows" in name for name, _ in said)


@pytest.mark.parametrize("changes", [{"evaluation": {"steps": 1000}}, {"noises_per_pair": 1000, "batch": 1000}])
def test_more_steps_or_noises_than_timesteps_are_refused_before_the_run(tiny_recipe, changes, toy_base, tmp_path):
    base = copy.copy(toy_base)
    base.noise = SimpleNamespace(count=999)
    with pytest.raises(UserError, match=r"is 1000, and .* has 999 timesteps: use fewer"):
        next(train_control(tiny_recipe(**changes), tmp_path / "run", base))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_a_number_ends_the_run_and_names_the_learning_rate(
    tiny_recipe, toy_base, tmp_path, monkeypatch
):
    run = train_control(tiny_recipe(), tmp_path, toy_base)
    list(itertools.islice(run, 2))
    monkeypatch.setattr("controlkit.train.gradients.objective", lambda *args: objective(*args) * float("nan"))
    with pytest.raises(UserError, match=r"Diverged at step 3: the loss is nan.*learning rate.*0\.001"):
        next(run)
    assert len(log_of(tmp_path)) == 2


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tiny_recipe, toy_base, tmp_path, monkeypatch):
    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, slope):
            return slope * float("inf")

    run = train_control(tiny_recipe(), tmp_path, toy_base)
    list(itertools.islice(run, 3))
    monkeypatch.setattr("controlkit.train.gradients.objective", lambda *args: Overflow.apply(objective(*args)))
    with pytest.raises(UserError, match=r"at step 4: the loss is [\d.]+ and its gradient's norm (nan|inf)"):
        next(run)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000002"], "step 4 was kept"
    assert len(log_of(tmp_path)) == 3


def test_the_best_is_kept_and_a_run_that_ended_early_has_ended(tiny_recipe, toy_base, tmp_path, monkeypatch):
    means = iter([0.2, 0.5, 0.3, 0.4, 0.1])
    figures = {"floor": Figure(0.1, 0.1, 0.1), "ceiling": Figure(0.9, 0.9, 0.9)}

    def told(*scores):
        mean = next(means)
        return dataclasses.replace(obedience(*scores), obedience=Figure(mean, mean - 0.1, mean + 0.1), **figures)

    monkeypatch.setattr("controlkit.train.evaluation.obedience", told)
    recipe = tiny_recipe(steps=9, evaluation={"every": 1, "num": 2, "steps": 1, "patience": 2})
    records = list(train_control(recipe, tmp_path, toy_base))
    assert [record.step for record in records] == [1, 2, 3, 4]
    assert load_control(tmp_path / "best", toy_base).trained["step"] == 2
    assert load_control(tmp_path / "control", toy_base).trained["step"] == 4
    assert (tmp_path / "checkpoints" / "step-0000004").is_dir()
    assert list(train_control(recipe, tmp_path, toy_base)) == []


@pytest.mark.parametrize(
    ("annotator", "words"),
    [
        ("depth", '"depth" can be found again in the embedded scenes alone'),
        ("openpose", '"pose" can be found again in the embedded scenes alone'),
        ("ted", 'Nothing here finds "ted" in a picture'),
        ("shuffle", 'Obedience to hints named "shuffle" is not measured'),
        ("", "No annotator of these hints is named"),
    ],
)
def test_hints_that_cannot_be_found_again_are_trained_on_and_judged_by_their_loss(
    tiny_recipe, annotator, words, toy_base, tmp_path
):
    list(make_fill50k(tmp_path / "set", 24, toy_base.size))
    recipe = tiny_recipe(
        control={"annotator": annotator}, data={"source": str(tmp_path / "set")}, steps=6, lr=1e-3,
        evaluation={"every": 2, "num": 2, "steps": 1, "patience": 1},
    )  # fmt: skip
    said = []
    records = list(train_control(recipe, tmp_path / "run", toy_base, lambda name, total: said.append(name)))
    assert any(words in line and line.startswith("note: obedience is not measured") for line in said)
    seen = [record for record in records if record.relative]
    assert seen[0].evaluation is None and seen[0].verdict is None and set(seen[0].drift) == set(COLOURS)
    assert len(list((tmp_path / "run" / "samples").iterdir())) == len(seen)
    losses = [sum(round(loss, 4) for loss in record.relative[""]) for record in seen]  # as the log has them
    nameless = pytest.warns(UserWarning, match="does not say what its hints are")
    with nullcontext() if annotator else nameless:
        best = load_control(tmp_path / "run" / "best", toy_base)
    assert best.trained["step"] == seen[int(np.argmin(losses))].step
    ends = [i for i in range(1, len(losses)) if losses[i] > min(losses[:i])]
    assert len(seen) == (ends[0] + 1 if ends else 3), "patience has the loss to go by"
    with pytest.raises(UserError, match=r"evaluation\.target is an obedience, and none is measured"):
        next(train_control(recipe.model_copy(update={"evaluation": EvaluationRecipe(target=0.5)}),
                           tmp_path / "other", toy_base))  # fmt: skip
    assert not (tmp_path / "other").exists()


def test_a_file_where_the_folder_should_be_is_refused(tiny_recipe, toy_base, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="is a file; expected a folder"):
        next(train_control(tiny_recipe(), tmp_path / "run", toy_base))
    assert (tmp_path / "run").read_text() == "mine"


def test_a_neighbour_of_another_shape_is_refused(tiny_recipe, toy_base, tmp_path):
    neighbour = tmp_path / "neighbour"
    save_control(neighbour, SavedControl(new_control(toy_base), CANNY), toy_base)
    recipe = tiny_recipe(control={"start_from": str(neighbour), "taps": "mid"})
    with pytest.raises(UserError, match=r"neighbour.*taps='all'.*taps='mid'"):
        next(train_control(recipe, tmp_path / "run", toy_base))


def test_a_control_of_the_middle_alone_is_reconnected_to_all_taps(tiny_recipe, toy_base, drawn_joins, tmp_path):
    middle = drawn_joins(new_control(toy_base, ControlSpec(taps="mid")))
    save_control(tmp_path / "mid", SavedControl(middle, CANNY), toy_base)
    recipe = tiny_recipe(control={"start_from": str(tmp_path / "mid")}, steps=1, lr=1e-12, evaluation={"every": 0})
    begun = ended(recipe, tmp_path / "run", toy_base)[0]
    before = load_file(tmp_path / "mid" / WEIGHTS)
    outside = {name for name in begun if name.startswith("controlnet_down_blocks")}
    assert outside and all(begun[name].abs().max() < 1e-9 for name in outside), "silent where nothing was learnt"
    assert all(torch.allclose(begun[name], before[name], atol=1e-6) for name in before if name not in outside)


NARROW = {"precision": "bf16", "steps": 2, "checkpoint_every": 1, "evaluation": {"every": 2, "num": 2, "steps": 1}}


def test_a_locked_base_is_kept_in_the_run_s_half_precision_and_nothing_differs(
    tiny_recipe, toy_base, tmp_path, monkeypatch
):
    held, real = [], runs.narrowed
    for name, narrow in (("whole", lambda base, dtype: base), ("narrow", real)):

        def noted(base, dtype, narrow=narrow):
            held.append(narrow(base, dtype))
            return held[-1]

        monkeypatch.setattr(runs, "narrowed", noted)
        list(train_control(tiny_recipe(**NARROW), tmp_path / name, toy_base))
    assert [base.unet.conv_in.weight.dtype for base in held] == [torch.float32, torch.bfloat16]
    assert_like(tmp_path / "whole", tmp_path / "narrow")
    shutil.copytree(tmp_path / "narrow", tmp_path / "again", ignore=lambda *_: ["step-0000002", "control", "best"])
    list(train_control(tiny_recipe(**NARROW), tmp_path / "again", toy_base))  # from the first step on
    assert_like(tmp_path / "whole", tmp_path / "again")


@pytest.mark.parametrize(
    "changes", [{"unfreeze_after": 1}, {"control": {"body": "lora", "rank": 2}}, {"precision": "fp32"}]
)
def test_weights_that_differences_are_written_to_stay_whole(changes, tiny_recipe, toy_base, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "narrowed", None)
    next(train_control(tiny_recipe(**(NARROW | {"evaluation": {"every": 0}} | changes)), tmp_path / "run", toy_base))
