"""What is said before a run starts: memory by part, time, and what it was begun from."""

import dataclasses
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from controlkit.backbones.memory import Meter
from controlkit.controls import new_control
from controlkit.formats import SavedControl, save_control
from controlkit.images import HintSpec
from controlkit.train import plan as plans
from controlkit.train import resolve, train_control
from controlkit.train.plan import Plan, estimate, peak_of
from controlkit.train.ranks import Ranks
from controlkit.train.recipe import parse_recipe
from controlkit.train.setup import new_branch
from controlkit.train.state import TrainState

TINY = {
    "data": {"source": "fill50k", "count": 4},
    "steps": 2,
    "batch": 8,
    "evaluation": {"every": 0},
}


def state_of(recipe, base):
    plan = resolve(recipe)
    own = base.with_own_denoiser() if recipe.unfreeze_after else base
    return TrainState.of(plan.learning, new_branch(recipe.control, plan.specs, base), own, Ranks())


@pytest.fixture
def estimated(toy_base):
    """``estimated(changes)``: the estimate of a tiny run, and its state."""

    def estimate_of(**changes):
        recipe = parse_recipe(TINY | changes)
        meter = Meter(toy_base)
        state = state_of(recipe, toy_base)
        return estimate(resolve(recipe), toy_base, state, 4, meter), state

    return estimate_of


def test_what_is_held_for_the_backward_pass_is_counted_to_the_byte():
    layers = nn.Sequential(nn.Linear(8, 256, bias=False), nn.Sigmoid(), nn.Linear(256, 1, bias=False))

    def work(rows):  # the input, two features of 256 and the result, the first feature gone; then gradients
        layers.zero_grad()
        layers(torch.zeros(rows, 8)).sum().backward()

    layers.requires_grad_(False)
    assert peak_of(lambda rows: layers(torch.zeros(rows, 8)), 1000) == 1000 * 4 * (8 + 256 + 256)
    layers.requires_grad_(True)
    assert peak_of(work, 1000) >= 1000 * 4 * (8 + 256 + 256 + 1)
    assert peak_of(work, 1000) == max(plans._held_bytes(work, 1000)), "known from two rows and four"


@pytest.mark.parametrize(
    "changes", [{}, {"gradient_checkpointing": True}, {"control": {"body": "xs"}}, {"unfreeze_after": 1}]
)
def test_the_memory_of_a_large_batch_is_known_from_small_ones(changes, toy_base):
    recipe = parse_recipe(TINY | changes)
    plan, state = resolve(recipe), state_of(recipe, toy_base)

    def work(pairs):
        plans._micro_batch(plan.batches, plan.compute.gradient_checkpointing, state, pairs)

    work(1)  # what is made once
    assert peak_of(work, 24) == pytest.approx(max(plans._held_bytes(work, 24)), rel=0.02)


def test_features_computed_anew_are_estimated_to_take_less(toy_base):
    peaks = []
    for again in (False, True):
        recipe = parse_recipe(TINY | {"gradient_checkpointing": again})
        work = partial(plans._micro_batch, resolve(recipe).batches, again, state_of(recipe, toy_base))
        peaks.append(peak_of(work, 16))
    assert peaks[1] < 0.9 * peaks[0]


def test_what_can_be_counted_is_counted(estimated, toy_base, tmp_path):
    plan, state = estimated(ema=0.9)
    branch = state.branch
    assert all(p.grad is None for p in branch.parameters())
    list(train_control(parse_recipe(TINY), tmp_path, toy_base))
    weights = sum(p.numel() * 4 for p in branch.parameters())
    saved = load_file(tmp_path / "checkpoints" / "step-0000002" / "state.safetensors")
    moments = sum(v.numel() * 4 for name, v in saved.items() if name.startswith("optimizer."))
    cached = load_file(next(tmp_path.glob("pairs*")))
    held = {name: v.numel() * v.element_size() for name, v in cached.items()}
    assert plan.parts["branch"] == plan.parts["gradients"] == plan.parts["average of the weights"] == weights
    assert plan.parts["optimizer (adamw)"] == pytest.approx(moments, rel=0.01)
    assert plan.parts["cached pairs"] == pytest.approx(sum(held.values()), rel=0.1), "no prompt twice"
    networks = (toy_base.vae, toy_base.unet, toy_base.towers[0].encoder)
    assert plan.parts["base"] == sum(v.numel() * v.element_size() for m in networks for v in m.state_dict().values())


def test_of_an_unlocked_base_the_copy_and_its_gradients_are_counted(estimated, toy_base):
    unet = sum(v.numel() * 4 for v in toy_base.unet.state_dict().values())
    locked, unlocked = (estimated(**changes)[0].parts for changes in ({}, {"unfreeze_after": 1}))
    assert unlocked["base's copy that learns"] == unet and unlocked["base"] == locked["base"]
    assert unlocked["gradients"] == locked["gradients"] + unet
    assert unlocked["optimizer (adamw)"] == locked["optimizer (adamw)"] + 2 * unet


def test_a_part_that_would_not_fit_is_not_tried_out(estimated, monkeypatch):
    tried = []
    real = plans._micro_batch
    monkeypatch.setattr(plans, "_micro_batch", lambda *args: (tried.append(args[-1]), real(*args)))
    monkeypatch.setattr(Meter, "free", lambda meter: 10_000)
    plan = estimated()[0]
    assert tried == [2, 4] and plan.seconds is None
    assert plan.lines()[-1].startswith("That does not fit in the 0 MB left here: raise gradient_accumulation")
    monkeypatch.setattr(Meter, "free", lambda meter: 10**12)
    assert estimated()[0].seconds > 0 and tried[2:] == [2, 4, 8, 8]
    assert estimated(gradient_accumulation=2)[0].seconds > 0 and tried[6:] == [2, 4, 4, 4]


def test_a_plan_in_words():
    plan = Plan({"base": 10**9, "features": 12 * 10**9}, caching=2 * 10**9, free=10**11, seconds=0.5, steps=1200)
    lines = plan.lines()
    assert lines[0] == "estimated memory: 13.0 GB; in a step" and lines[1].split() == ["base", "1000", "MB"]
    assert lines[-1] == "estimated time: 10.0 minutes, 0.5 s a step; caching and evaluations take more"
    for minutes, time in (
        (2.0, "estimated time: 2.0 minutes (max_minutes, enough for at most 240 of 1,200 steps), 0.5 s a step"),
        (1e-6, "estimated time: 0.0 minutes (max_minutes, enough for at most 1 of 1,200 steps), 0.5 s a step"),
        (60.0, lines[-1]),
    ):
        assert dataclasses.replace(plan, minutes=minutes).lines()[-1] == time
    made = dataclasses.replace(plan, caching=2 * 10**10)
    assert made.peak == 2 * 10**10 and "while latents are made" in "\n".join(made.lines())


def test_a_run_says_what_it_will_take_and_what_it_took(toy_base, tmp_path):
    said = []
    recipe = parse_recipe(TINY)
    weights = [
        [record.loss for record in train_control(recipe, tmp_path / f"{asked}", toy_base, told, estimate_first=asked)]
        for asked, told in ((True, lambda name, total: said.append(name)), (False, lambda *stage: None))
    ]
    assert weights[0] == weights[1], "the plan changes nothing"
    assert said[1].startswith("estimated memory: ") and any(words.startswith("estimated time: ") for words in said)
    assert sum("most memory held" in words for words in said) == 1


@pytest.fixture
def begun_from(toy_base, drawn_joins, tmp_path):
    """What is noted of a run that starts from a control of these hints, trained on this base."""

    def noted(hint, digest):
        branch = drawn_joins(new_control(toy_base))
        save_control(tmp_path / "near", SavedControl(branch, hint, {"base_digest": digest}), toy_base)
        recipe = parse_recipe(TINY | {"control": {"start_from": str(tmp_path / "near")}})
        said = []
        next(train_control(recipe, tmp_path / "run", toy_base, lambda name, total: said.append(name)))
        return [words for words in said if words.startswith("note: ")]

    return noted


def test_a_neighbour_of_another_base_or_of_other_hints_is_noted(begun_from):
    notes = begun_from(HintSpec("scribble", low=-1.0), "0123456789abcdef")
    assert len(notes) == 2 and "was trained on other weights (0123456789abcdef)" in notes[0]
    assert "hints of scribble [-1, 1]; this run trains on hints of canny [0, 1]" in notes[1]


def test_a_neighbour_of_the_same_base_and_hints_is_not(begun_from, toy_base):
    assert begun_from(HintSpec("canny"), toy_base.digest) == []


def test_a_trial_that_memory_does_not_hold_ends_no_run(toy_base, monkeypatch):
    def full(*given):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(plans, "_micro_batch", full)
    recipe = parse_recipe(TINY)
    plan = estimate(resolve(recipe), toy_base, state_of(recipe, toy_base), 4, Meter(toy_base))
    assert plan.seconds is None and plan.peak > plan.free, "it says that it does not fit"
