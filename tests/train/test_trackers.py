"""What a run sends to trackers: every step once, whatever interrupted it."""

import itertools
import json
import sys

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import TINY, StandIn
from controlkit.errors import UserError
from controlkit.images import write_png
from controlkit.train import learning_rate, resolve, train_control
from controlkit.train.recipe import parse_recipe

RECIPE = TINY | {"warmup": 3}


def sent_to(*names, **changes):
    return parse_recipe(RECIPE | {"tracking": {"to": names}} | changes)


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_tensorboard_has_every_figure_of_every_step_once(toy_base, tmp_path):
    write_png(tmp_path / "own.png", np.zeros((32, 32, 3), np.uint8))
    own = {"hints": [str(tmp_path / "own.png")], "prompts": ["a circle"]}
    recipe = sent_to("tensorboard", evaluation=RECIPE["evaluation"] | own)
    for steps in (5, 3, 9):  # twice interrupted: behind a checkpoint, and before it has come as far again
        list(itertools.islice(train_control(recipe, tmp_path, toy_base), steps))
    read = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    read.Reload()
    log = log_of(tmp_path)
    assert [(one.step, one.value) for one in read.Scalars("loss")] == [
        (line["step"], pytest.approx(line["loss"])) for line in log
    ]
    rates = [learning_rate(resolve(recipe).rates, step) for step in range(6)]
    assert [one.value for one in read.Scalars("rate")] == pytest.approx(rates) and rates[0] < rates[3]
    measured = [line for line in log if "residuals" in line]
    several = ("colour_drift", "residuals")
    flat = [line | {f"{key}/{k}": v for key in several for k, v in line[key].items()} for line in measured]
    for name in ("obedience", "colour_drift/red", "residuals/middle"):
        assert [one.step for one in read.Scalars(name)] == [3, 6]
        told, wanted = [one.value for one in read.Scalars(name)], [line[name] for line in flat]
        assert told == pytest.approx(wanted, abs=1e-4, rel=1e-4)
    assert [one.step for one in read.Images("samples")] == [3, 6]
    shown = read.Images("samples")[0]
    assert (shown.height, shown.width) == (2 * 132 + 24, 4 * 132 + 4)
    assert [one.step for one in read.Images("own samples")] == [3, 6]


def test_samples_are_sent_where_obedience_is_not_measured_too(toy_base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", library := StandIn())
    list(train_control(sent_to("trackio", control={"annotator": "openpose"}), tmp_path / "run", toy_base))
    assert [step for step, values in library.logged if "samples" in values] == [3, 6]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_hosted_trackers_are_sent_no_step_twice_and_go_on_in_the_same_run(name, toy_base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, library := StandIn())
    recipe = sent_to(name, checkpoint_every=6)
    for steps in (5, 2, 9):  # each begins anew: there is no checkpoint before the end
        list(itertools.islice(train_control(recipe, tmp_path / "run", toy_base), steps))
    assert [step for step, _ in library.logged] == [1, 2, 3, 4, 5, 6]
    assert [step for step, values in library.logged if "samples" in values] == [3, 6]
    assert [values["loss"] for _, values in library.logged] == [line["loss"] for line in log_of(tmp_path / "run")]
    assert len(library.begun) == library.ended == 3
    runs = {(one["project"], one.get("id", one["name"]), one["resume"]) for one in library.begun}
    assert len(runs) == 1 and library.begun[0]["config"]["steps"] == 6
    list(train_control(sent_to(name), tmp_path / "other", toy_base))
    assert library.begun[-1].get("id", library.begun[-1]["name"]) not in {run[1] for run in runs}


def test_a_tracker_that_is_not_there_is_named_before_anything_is_written(toy_base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r'"wandb", which cannot be imported.*pip install "controlkit\[wandb\]"'):
        next(train_control(sent_to("wandb"), tmp_path / "run", toy_base))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"tracking\.to"):
        sent_to("tensorbord")
