"""Training: recipes that refuse nonsense, draws keyed by what they are for, the paper's objective, and exact resume."""

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pydantic import BaseModel
from safetensors import safe_open
from safetensors.torch import load_file

from controlkit import precision, train
from controlkit.backbones import UNetBase, load_base
from controlkit.data import Cached, make_fill50k
from controlkit.errors import UserError
from controlkit.formats import WEIGHTS, SavedControl, key_table, load_control, save_control
from controlkit.images import Hint, write_atomic
from controlkit.measure import Figure
from controlkit.mini import world
from controlkit.train import (
    Batch,
    Recipe,
    draw_batch,
    found_step,
    objective,
    parse_recipe,
    read_recipe,
    train_control,
    training_pairs,
    verdict,
)

TINY = {
    "data": {"source": "fill50k", "count": 8},
    "steps": 6,
    "batch": 2,
    "lr": 1e-3,
    "checkpoint_every": 2,
    "evaluation": {"every": 3, "num": 2, "steps": 1},
}


def tiny(**changes):
    """The tiny recipe with some of its values changed; a section's values are merged."""
    merged = {key: {**TINY[key], **value} if isinstance(TINY.get(key), dict) else value for key, value in changes.items()}
    return parse_recipe({**TINY, **merged})


def log_of(out):
    """The log without the one thing that differs between equal runs."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def weights_of(out):
    return load_file(out / "control" / WEIGHTS)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def leftovers(out):
    """Files and folders a write left behind: hidden ones."""
    return [str(path) for path in out.rglob(".*")]


# --- recipes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"step": 5}, ['unknown key "step"', 'did you mean "steps"?']),
        ({"evaluation": {"evry": 5}}, ['unknown key "evaluation.evry"', 'did you mean "every"?']),
        ({"steps": -1}, ['"steps" is -1', "greater than 0"]),
        ({"lr": "fast"}, ["\"lr\" is 'fast'", "number"]),
        ({"prompt_dropout": 1.5}, ['"prompt_dropout" is 1.5', "less than or equal to 1"]),
        ({"control": {"body": "lora"}}, ["\"control.body\" is 'lora'", "'copy' or 'conv'"]),
        ({"control": {"options": {"low": "x"}}}, ["\"control.options.low\" is 'x'"]),
        ({"data": "emoji"}, ["\"data\" is 'emoji'"]),
    ],
)
def test_a_recipe_s_mistake_is_named_with_what_is_right(content, words, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError) as caught:
        read_recipe(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "There is no recipe"),
        (b"steps: [1", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"- steps", "holds a list; expected keys and values"),
        (b"steps", "holds a str; expected keys and values"),
    ],
)
def test_what_is_not_a_recipe_is_said_to_be_none(content, words, tmp_path):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)


def test_a_recipe_is_read_as_written_and_an_empty_one_is_the_default(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("lr: 1e-5\ncontrol: {annotator: scribble, options: {width: 0.1}}\n")
    read = read_recipe(path)
    assert (read.lr, read.control.annotator, read.control.options) == (1e-5, "scribble", {"width": 0.1})
    path.write_text("# nothing yet\n")
    assert read_recipe(path) == Recipe()


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_we_ship_is_valid(path):
    assert read_recipe(path).steps > 0


@pytest.mark.parametrize(
    ("control", "words"),
    [({"annotator": "cany"}, 'did you mean "canny"'), ({"options": {"lo": 1}}, 'did you mean "low"')],
)
def test_an_unknown_annotator_or_option_is_refused_before_anything_is_written(control, words, toy_base, tmp_path):
    with pytest.raises(UserError, match=words):
        next(train_control(tiny(control=control), tmp_path / "run", toy_base))
    assert not (tmp_path / "run").exists()


# --- every setting is obeyed --------------------------------------------------------------------------------

PROBED = {
    "data": {"source": "emoji", "count": 4},
    "steps": 3,
    "batch": 2,
    "lr": 1e-3,
    "checkpoint_every": 1,
    "evaluation": {"every": 2, "num": 2, "steps": 2},
}
SETTINGS = [  # key, another value, what it must change
    ("base", None, "base"),
    ("control.annotator", "scribble", "hints"),
    ("control.options", {"low": 10.0, "high": 30.0}, "hints"),
    ("control.body", "conv", "names"),
    ("control.join", "gaussian", "first_loss"),
    ("control.taps", "mid", "weights"),
    ("data.source", "fill50k", "hints"),
    ("data.count", 5, "pairs"),
    ("data.variants", 1, "pairs"),
    ("steps", 4, "steps"),
    ("batch", 3, "first_loss"),
    ("lr", 2e-3, "weights"),
    ("warmup", 2, "weights"),
    ("weight_decay", 1.0, "weights"),
    ("prompt_dropout", 1.0, "first_loss"),
    ("seed", 1, "first_loss"),
    ("checkpoint_every", 2, "checkpoints"),
    ("keep", 1, "checkpoints"),
    ("evaluation.every", 1, "evaluated"),
    ("evaluation.num", 3, "work"),
    ("evaluation.steps", 3, "work"),
    ("evaluation.guidance", 1.0, "samples"),
]


@pytest.fixture(scope="module")
def bases(toy_folder, toy_base, tmp_path_factory):
    """The toy base, and another: the same with a sharper output."""
    other = load_base(toy_folder)
    other.unet.conv_out.weight.data *= 2
    other.name = "other"
    return {"toy": toy_base, "other": other}


@pytest.fixture
def traced(bases, fake_packages, tmp_path, monkeypatch):
    """``traced(key, value)`` runs the probed recipe with one setting changed and says all that can be seen of the run."""
    monkeypatch.setattr(train, "load_base", bases.__getitem__)

    def run(key, value):
        section, _, name = key.rpartition(".")
        content = PROBED | {"base": "toy", key: value} if not section else PROBED | {"base": "toy"}
        if section:
            content[section] = {**content.get(section, {}), name: value}
        out, stages = tmp_path / key / str(value), []
        records = list(train_control(parse_recipe(content), out, on_stage=lambda *stage: stages.append(stage)))
        cached = load_file(out / "cache.safetensors")
        return {
            "base": load_control(out, bases["toy"]).trained["base"],
            "hints": cached["hints"].unique(dim=0).tolist(),
            "pairs": len(cached["hints"]),
            "names": sorted(weights_of(out)),
            "weights": {name: value.tolist() for name, value in weights_of(out).items()},
            "first_loss": records[0].loss,
            "steps": len(records),
            "evaluated": [record.step for record in records if record.evaluation],
            "work": {total for name, total in stages if name == "evaluating"},
            "checkpoints": sorted(path.name for path in (out / "checkpoints").iterdir()),
            "samples": {path.name: path.read_bytes() for path in (out / "samples").iterdir()},
        }

    return run


_PLAIN = {}


@pytest.mark.parametrize(("key", "value", "seen"), SETTINGS, ids=[key for key, *_ in SETTINGS])
def test_every_setting_changes_the_run(key, value, seen, traced):
    plain = _PLAIN.setdefault("run", None) or _PLAIN.update(run=traced("steps", 3)) or _PLAIN["run"]
    assert traced(key, value or "other")[seen] != plain[seen]
