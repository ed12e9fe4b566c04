"""The rate of every step, and runs that end in time."""

import itertools

import pytest
import torch
from diffusers.optimization import get_scheduler

from controlkit.formats import load_control
from controlkit.train import learning_rate, train_control
from controlkit.train import schedule as schedules
from controlkit.train.parts import RatePlan
from controlkit.train.recipe import parse_recipe
from controlkit.train.schedule import Clock

TINY = {
    "data": {"source": "fill50k", "count": 4},
    "steps": 1000,
    "batch": 2,
    "checkpoint_every": 1000,
    "evaluation": {"every": 0},
}


def rates_of(recipe, spent=lambda step: 0.0):
    return [learning_rate(RatePlan.of(recipe), step, spent(step)) for step in range(recipe.steps)]


@pytest.mark.parametrize("warmup", [0, 7, 33])
@pytest.mark.parametrize(
    ("name", "settings", "theirs"),
    [
        ("constant_with_warmup", {}, {}),
        ("linear", {}, {}),
        ("cosine", {}, {}),
        ("cosine_with_restarts", {"cycles": 3}, {"num_cycles": 3}),
        ("polynomial", {"power": 2.5}, {"power": 2.5}),
    ],
)
def test_rates_are_those_of_diffusers_at_every_step(name, settings, theirs, warmup):
    recipe = parse_recipe({"steps": 40, "lr": 1e-3, "schedule": name, "warmup": warmup, **settings})
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=recipe.lr)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=40, **theirs)
    wanted = []
    for _ in range(40):
        wanted.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates_of(recipe) == wanted
    assert len(set(wanted)) > 3 or (name, warmup) == ("constant_with_warmup", 0)


def test_a_constant_rate_rises_stays_and_falls():
    recipe = parse_recipe({"steps": 10, "lr": 1.0, "warmup": 3, "cooldown": 3})
    assert rates_of(recipe) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert rates_of(parse_recipe({"steps": 3, "lr": 1.0})) == [1.0] * 3


def test_what_comes_down_comes_down_in_time_and_warm_up_goes_by_steps():
    recipe = parse_recipe({"steps": 1000, "lr": 1.0, "warmup": 3, "cooldown": 499})
    rates = rates_of(recipe, lambda step: step / 20)[:20]  # twenty steps fit
    assert rates[:3] == [0.25, 0.5, 0.75] and rates[3:11] == [1.0] * 8
    assert rates[15] == 0.5 and rates[19] == pytest.approx(0.1)
    assert learning_rate(RatePlan.of(recipe), 999, 0.1) == rates_of(recipe)[999], "steps are further along"
    cosine = RatePlan.of(parse_recipe({"steps": 1000, "lr": 1.0, "schedule": "cosine"}))
    assert learning_rate(cosine, 4, 0.75) == learning_rate(cosine, 750) < 0.15
    assert learning_rate(RatePlan.of(parse_recipe({"steps": 10, "lr": 1.0})), 0, 1.5) == 1.0, (
        "without a cooldown nothing falls"
    )


@pytest.fixture
def ticking(monkeypatch):
    """A clock that a step takes 6 seconds of, and nothing else any."""
    now = [1000.0]
    monkeypatch.setattr(schedules.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("controlkit.train.run.time.perf_counter", lambda: now[0])
    real = schedules.learning_rate

    def timed(plan, step, spent):
        now[0] += 6
        return real(plan, step, spent)

    monkeypatch.setattr("controlkit.train.run.learning_rate", timed)
    return now


def test_a_run_ends_with_the_last_step_that_its_budget_holds_and_has_then_ended(toy_base, tmp_path, ticking):
    recipe = parse_recipe(TINY | {"max_minutes": 0.55})  # 33 seconds: five steps of six
    assert [record.step for record in train_control(recipe, tmp_path, toy_base)] == [1, 2, 3, 4, 5]
    assert (tmp_path / "checkpoints" / "step-0000005").is_dir()
    assert load_control(tmp_path, toy_base).trained["step"] == 5
    ticking[0] += 1e6  # the time between two runs is neither's
    assert list(train_control(recipe, tmp_path, toy_base)) == []


def test_the_time_before_an_interruption_counts(toy_base, tmp_path, ticking):
    recipe = parse_recipe(TINY | {"max_minutes": 0.55, "checkpoint_every": 3})
    list(itertools.islice(train_control(recipe, tmp_path, toy_base), 4))
    ticking[0] += 1e6
    assert [record.step for record in train_control(recipe, tmp_path, toy_base)] == [4, 5]


def test_time_for_the_last_evaluation_is_kept_free_and_the_rate_is_down_before_it(monkeypatch):
    clock = Clock(1.0)
    monkeypatch.setattr(Clock, "_seconds", property(lambda clock: 45.0))
    assert clock.share == 0.75 and not clock.over
    clock.evaluation = 15.0
    clock.last_step = 1.0
    assert clock.share == 1.0 and clock.over
