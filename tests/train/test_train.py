"""Training: recipes that refuse nonsense, draws keyed by what they are for, the paper's objective, and exact resume."""

import contextlib
import copy
import dataclasses
import errno
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from pydantic import BaseModel
from safetensors.torch import load_file

from conftest import StandIn, make, randomised, stock_inputs
from controlkit import precision, train
from controlkit.backbones import TextEmbedding, UNetBase, load_base
from controlkit.branch import ControlSpec
from controlkit.controls import new_control, new_union
from controlkit.controls.union import OneType, UnionBranch
from controlkit.data import Cached, CirclePairs, build_cache, make_fill50k
from controlkit.errors import UserError
from controlkit.formats import WEIGHTS, SavedControl, load_control, save_control
from controlkit.formats.names import key_table
from controlkit.images import HintSpec, write_png
from controlkit.measure import COLOURS, Figure, obedience
from controlkit.mini import world
from controlkit.train import (
    Batch,
    EvaluationSummary,
    draw_batch,
    found_step,
    objective,
    train_control,
    training_pairs,
    verdict,
)
from controlkit.train.evaluation import HeldoutLoss
from controlkit.train.recipe import FORMATS, EvaluationRecipe, Recipe, parse_recipe, read_recipe

CONTRACT = HintSpec("canny")
CONTRACTS = {"": CONTRACT}
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
    for key, value in changes.items():
        if isinstance(value, dict):
            changes[key] = {**TINY.get(key, {}), **value}
    return parse_recipe({**TINY, **changes})


def log_of(out):
    """The log without the one thing that differs between equal runs."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def weights_of(out):
    return load_file(out / "control" / WEIGHTS)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def leftovers(out):
    """Files and folders a write left behind: hidden ones, but for the lock."""
    return [str(path) for path in out.rglob(".*") if path != out / ".lock"]


# --- recipes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"step": 5}, ['unknown key "step"', 'did you mean "steps"?']),
        ({"evaluation": {"evry": 5}}, ['unknown key "evaluation.evry"', 'did you mean "every"?']),
        ({"steps": -1}, ['"steps" is -1', "greater than 0"]),
        ({"lr": "fast"}, ["\"lr\" is 'fast'", "number"]),
        ({"prompt_dropout": 1.5}, ['"prompt_dropout" is 1.5', "less than or equal to 1"]),
        ({"control": {"body": "cnn"}}, ["\"control.body\" is 'cnn'", "'copy', 'conv', 'lora', 'xs' or 'adapter'"]),
        ({"optimizer": "adafactor", "betas": [0.5, 0.9]}, ['"betas" is set', "adafactor has none"]),
        ({"schedule": "cosine", "cooldown": 5}, ['"cooldown" is set', "schedule: constant"]),
        ({"power": 2.0}, ['"power" is set', "schedule: polynomial"]),
        ({"schedule": "polynomial", "lr": 1e-8}, ["ends at a rate of 1e-07, and lr is 1e-08"]),
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


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")), ids=lambda p: p.name)
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


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"data": {"source": "emojis"}}, 'did you mean "emoji"'),
        ({"control": {"start_from": "nowhere"}}, "nowhere"),
    ],
)
def test_a_recipe_that_cannot_run_leaves_no_folder_to_be_in_the_way(section, words, toy_base, tmp_path):
    with pytest.raises(UserError, match=words):
        next(train_control(tiny(**section), tmp_path / "run", toy_base))
    assert not (tmp_path / "run").exists()


# --- every setting is obeyed --------------------------------------------------------------------------------

PROBED = {
    "base": "toy",
    "data": {"source": "emoji", "count": 4},
    "steps": 2,
    "batch": 2,
    "lr": 1e-3,
    "checkpoint_every": 1,
    "evaluation": {"every": 2, "num": 2, "steps": 1},
}
SCENES = {"data": {"source": "scenes", "scenes": 8}}
PHOTOS = {"data": {"source": "photos"}}
EVERY_STEP = {"steps": 3, "evaluation": {"every": 1}}
SETTINGS = [  # key, another value, what of the run it must change, and in what recipe, where the probed one will not do
    ("base", "other", "base"),
    ("vae", "other", "losses"),
    ("size", 64, "hints"),
    ("control.annotator", "scribble", "hints"),
    ("control.types", ["canny"], "tensors", {"evaluation": {"every": 0}}),
    ("control.options", {"low": 900.0, "high": 1000.0}, "hints"),
    ("control.annotators", ["canny", "scribble"], "weights"),
    ("control.hints_as", "branches", "controls", {"control": {"annotators": ["canny", "scribble"]}}),
    ("control.channels", 1, "weights"),
    ("control.low", -1.0, "weights"),
    ("control.high", 2.0, "weights"),
    ("control.body", "conv", "tensors"),
    ("control.rank", 2, "weights", {"control": {"body": "lora"}}),
    ("control.body", "xs", "tensors"),
    ("control.size_ratio", 0.25, "weights", {"control": {"body": "xs"}}),
    ("control.join", "gaussian", "losses"),
    ("control.taps", "mid", "weights"),
    ("control.start_from", "neighbour", "losses"),
    ("control.hint_cfg_scale", 3.0, "samples", {"lr": 0.01}),
    ("data.source", "fill50k", "hints"),
    ("data.columns", {"caption": "said"}, "losses", {"data": {"source": "named"}}),
    ("data.count", 5, "pairs"),
    ("data.variants", 1, "pairs"),
    ("data.scenes", 16, "pairs", SCENES),
    ("data.visits", 2, "pairs", SCENES),
    ("data.buckets", True, "hints", PHOTOS),
    ("data.flip", 1.0, "losses"),
    ("data.cache", False, "stored"),
    ("steps", 3, "steps"),
    ("batch", 3, "losses"),
    ("noises_per_pair", 2, "losses"),
    ("gradient_accumulation", 2, "rows"),
    ("gradient_checkpointing", True, "recomputed"),
    ("optimizer", "muon", "weights"),
    ("betas", [0.5, 0.9], "weights"),
    ("epsilon", 1.0, "weights"),
    ("max_grad_norm", 1e-9, "weights"),
    ("ema", 0.5, "weights"),
    ("precision", "bf16", "losses"),
    ("compile", True, "compiled"),
    ("lr", 2e-3, "weights"),
    ("warmup", 2, "weights"),
    ("cooldown", 1, "weights"),
    ("schedule", "cosine", "weights"),
    ("cycles", 2, "weights", {"schedule": "cosine_with_restarts"}),
    ("power", 2.0, "weights", {"schedule": "polynomial"}),
    ("max_minutes", 1e-9, "steps"),
    ("weight_decay", 1.0, "weights"),
    ("unfreeze_after", 1, "losses", {"steps": 3}),
    ("prompt_dropout", 1.0, "losses"),
    ("seed", 1, "losses"),
    ("checkpoint_every", 2, "checkpoints"),
    ("keep", 1, "checkpoints"),
    ("evaluation.every", 1, "evaluated"),
    ("evaluation.num", 3, "work"),
    ("evaluation.steps", 2, "work"),
    ("evaluation.guidance", 1.0, "samples"),
    ("evaluation.hints", ["photos/a circle a.png"], "samples"),
    ("evaluation.prompts", ["a", "b"], "samples", {"evaluation": {"hints": ["photos/a circle a.png"]}}),
    ("evaluation.target", -9.0, "steps", EVERY_STEP),
    ("evaluation.patience", 1, "steps", EVERY_STEP),
    ("tracking.to", ["tensorboard"], "tracked"),
    ("tracking.project", "mine", "tracked", {"tracking": {"to": ["trackio"]}}),
]


@pytest.fixture(scope="module")
def other_base(toy_folder):
    """The toy base with other weights."""
    other = load_base(toy_folder)
    other.unet.conv_out.weight.data *= 2
    other.name = "other"
    return other


@pytest.fixture(scope="module")
def neighbour(toy_base, drawn_joins, tmp_path_factory):
    """The folder of a trained control, beside one of pictures of several shapes."""
    folder = tmp_path_factory.mktemp("controls") / "neighbour"
    lines = []
    for i, pair in enumerate(CirclePairs(48, 8)):
        write_png(folder.parent / "named" / f"{i}.png", pair.picture)
        lines.append(json.dumps({"file_name": f"{i}.png", "text": pair.prompt, "said": f"thing {i}"}))
        write_png(folder.parent / "photos" / f"a circle {'abcdefgh'[i]}.png", pair.picture[: 48 - 8 * (i % 4)])
    (folder.parent / "named" / "metadata.jsonl").write_text("\n".join(lines))
    save_control(folder, SavedControl(drawn_joins(new_control(toy_base)), CONTRACT), toy_base)
    return folder


@pytest.fixture
def trace(toy_base, other_base, neighbour, fake_packages, tmp_path, monkeypatch):
    """``trace(key, value, within)`` runs the probed recipe, ``within`` changed, with one setting changed; all that can
    be seen of the run."""
    bases = {"toy": toy_base, "other": other_base}
    monkeypatch.setattr("controlkit.train.run.load_base", lambda name, vae=None: bases[vae or name])
    monkeypatch.chdir(neighbour.parent)

    def run(key=None, value=None, within=None):
        content, out, stages, batches = copy.deepcopy(PROBED), tmp_path / f"{key}", [], []

        def watched(base, branch, batch, predict):
            blocks = [getattr(block, "gradient_checkpointing", False) for block in base.unet.modules()]
            batches.append((len(batch.t), any(blocks), predict is not train.controlled))
            return objective(base, branch, batch, predict)

        def falling(*scores):  # a toy's figures would not count
            fell = Figure(*[1 / (1 + len(batches))] * 3)
            ends = {"floor": Figure(0.1, 0.1, 0.1), "ceiling": Figure(0.9, 0.9, 0.9)}
            return dataclasses.replace(obedience(*scores), obedience=fell, **ends)

        stored = []
        monkeypatch.setattr("controlkit.train.run.open_store", lambda: stored.append(1) or nullcontext())
        monkeypatch.setattr("controlkit.train.run.objective", watched)
        monkeypatch.setattr("controlkit.train.evaluation.obedience", falling)
        monkeypatch.setitem(sys.modules, "trackio", trackio := StandIn())
        monkeypatch.setattr(torch, "compile", lambda function: lambda *given: function(*given))
        for section, values in (within or {}).items():
            content[section] = content.get(section, {}) | values if isinstance(values, dict) else values
        if key:
            *section, name = key.split(".")
            (content.setdefault(section[0], {}) if section else content)[name] = value
        records = list(train_control(parse_recipe(content), out, on_stage=lambda *stage: stages.append(stage)))
        held = load_file(next(out.glob("pairs*")))
        first, *more = sorted(path.parent for path in (out / "control").rglob(WEIGHTS))  # a control, or several
        weights = load_file(first / WEIGHTS)
        hints = [hint for name, rows in held.items() if name.endswith("hints") for hint in rows]
        return {
            "base": load_control(first, toy_base).trained["base"],
            "controls": 1 + len(more),
            "hints": sorted(hint.numpy().tobytes() for hint in hints),
            "pairs": len(hints),
            "stored": len(stored),
            "tensors": weights.keys(),
            "weights": {name: tensor.numpy().tobytes() for name, tensor in weights.items()},
            "losses": [record.loss for record in records],
            **dict(zip(("rows", "recomputed", "compiled"), zip(*batches, strict=True), strict=True)),
            "steps": len(records),
            "evaluated": [record.step for record in records if record.evaluation],
            "work": {total for name, total in stages if name == "evaluating"},
            "checkpoints": sorted(path.name for path in (out / "checkpoints").iterdir()),
            "samples": {path.name: path.read_bytes() for path in out.glob("samples/*")},
            "tracked": [*(path.name for path in out.glob("tensorboard")), *(one["project"] for one in trackio.begun)],
        }

    return run


@pytest.fixture(scope="module")
def remembered():
    """What several tests compare with, made once."""
    return {}


@pytest.mark.parametrize("setting", SETTINGS, ids=[key for key, *_ in SETTINGS])
def test_every_setting_changes_the_run(setting, trace, remembered):
    key, value, seen, within = (*setting, None)[:4]
    if str(within) not in remembered:
        remembered[str(within)] = trace(within=within)
    assert trace(key, value, within)[seen] != remembered[str(within)][seen]


def test_no_setting_is_left_out():
    def keys(model, prefix=""):
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from keys(field.annotation, f"{name}.")
            else:
                yield prefix + name

    assert sorted(keys(Recipe)) == sorted({key for key, *_ in SETTINGS})


# --- the pairs ----------------------------------------------------------------------------------------------


def test_what_is_measured_on_was_not_trained_on(toy_base, fake_packages, tmp_path):
    list(make_fill50k(tmp_path, 7, size=32))
    for source, counts in (("fill50k", (8, 2)), (str(tmp_path), (5, 2))):
        trained, heldout = training_pairs(tiny(data={"source": source}), toy_base)
        assert (len(trained), len(heldout)) == counts
        seen = {pair.picture.tobytes() for pair in trained}
        assert not any(pair.picture.tobytes() in seen for pair in heldout)
    trained, heldout = (
        {pair.prompt.split(", ")[0].split(" ", 1)[1] for pair in pairs}
        for pairs in training_pairs(tiny(data={"source": "emoji", "count": None}), toy_base)
    )
    concepts = {concept.replace("-", " ") for concept in world.heldout_concepts()}
    assert heldout <= concepts and not trained & concepts


def test_an_xs_is_trained_measured_and_goes_on_to_the_bit(toy_base, tmp_path):
    recipe = tiny(control={"body": "xs"}, steps=4, ema=0.5)
    list(train_control(recipe, tmp_path / "whole", toy_base))
    list(itertools.islice(train_control(recipe, tmp_path / "stopped", toy_base), 3))
    list(train_control(recipe, tmp_path / "stopped", toy_base))
    assert_like(tmp_path / "whole", tmp_path / "stopped")
    trained = load_control(tmp_path / "whole", toy_base).branch
    assert trained.spec == ControlSpec(body="xs") and trained.network.mid_block.ctrl_to_base.weight.any()
    wider = {"body": "xs", "size_ratio": 0.75, "start_from": str(tmp_path / "whole")}
    with pytest.raises(UserError, match=r"another width: set control\.size_ratio"):
        next(train_control(tiny(control=wider), tmp_path / "wider", toy_base))


def test_a_neighbour_of_another_shape_is_refused(neighbour, toy_base, tmp_path):
    recipe = tiny(control={"start_from": str(neighbour), "taps": "mid"})
    with pytest.raises(UserError, match=r"neighbour.*taps='all'.*taps='mid'"):
        next(train_control(recipe, tmp_path / "run", toy_base))


def test_a_control_of_the_middle_alone_is_reconnected_to_all_taps(toy_base, drawn_joins, tmp_path):
    middle = drawn_joins(new_control(toy_base, ControlSpec(taps="mid")))
    save_control(tmp_path / "mid", SavedControl(middle, CONTRACT), toy_base)
    recipe = tiny(control={"start_from": str(tmp_path / "mid")}, steps=1, lr=1e-12, evaluation={"every": 0})
    begun = ended(recipe, tmp_path / "run", toy_base)[0]
    before = load_file(tmp_path / "mid" / WEIGHTS)
    outside = {name for name in begun if name.startswith("controlnet_down_blocks")}
    assert outside and all(begun[name].abs().max() < 1e-9 for name in outside), "silent where nothing was learnt"
    assert all(torch.allclose(begun[name], before[name], atol=1e-6) for name in before if name not in outside)


# --- draws --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cached():
    """Ten pairs that can be told apart: pair i has latents i, hint i, and row i + 1 of the text; no spread."""
    moments = torch.cat([torch.arange(10.0).view(-1, 1, 1, 1).expand(10, 4, 8, 8), torch.full((10, 4, 8, 8), -30.0)], 1)
    hints = torch.arange(10, dtype=torch.uint8).view(-1, 1, 1, 1).expand(10, 32, 32, 3)
    text = torch.arange(11.0).view(-1, 1, 1).expand(11, 4, 32)
    kinds = torch.zeros(10, dtype=torch.int64)
    return Cached(moments.half(), hints.contiguous(), kinds, TextEmbedding(text.half()), torch.arange(1, 11))


def drawn_pairs(batch, toy_base):
    """Which pairs a batch has."""
    return (batch.latents.mean((1, 2, 3)) / toy_base.vae.config.scaling_factor).round().int().tolist()


def same(a, b):
    parts = [vars(one) | one.text.tensors() | {"text": one.t, "hints": one.hints[""]} for one in (a, b)]
    assert parts[0].pop("draws") == parts[1].pop("draws")
    return equal(*parts)


def test_a_step_s_batch_is_the_same_whatever_came_before(toy_base, cached):
    recipe = tiny()
    first = draw_batch(toy_base, cached, CONTRACTS, recipe, 7)
    torch.randn(100)
    np.random.default_rng().random()
    for step in (0, 3, 8):
        assert not same(draw_batch(toy_base, cached, CONTRACTS, recipe, step), first)
    assert same(draw_batch(toy_base, cached, CONTRACTS, recipe, 7), first)


def test_a_sample_s_draws_do_not_depend_on_the_batch_s_size(toy_base, cached):
    small, large = (draw_batch(toy_base, cached, CONTRACTS, tiny(batch=batch), 0) for batch in (2, 5))
    cut = {name: value[:2] for name, value in vars(large).items() if name not in ("hints", "draws")}
    assert same(Batch(**cut, hints={"": large.hints[""][:2]}), small)
    later = [draw_batch(toy_base, cached, CONTRACTS, tiny(batch=batch), 3) for batch in (2, 5)]
    assert torch.equal(later[0].noise, later[1].noise[:2]) and torch.equal(later[0].t, later[1].t[:2])


def test_samples_and_steps_have_draws_of_their_own(toy_base, cached):
    batches = [draw_batch(toy_base, cached, CONTRACTS, tiny(seed=seed), step) for seed in (0, 1) for step in (0, 1)]
    noise = torch.cat([batch.noise for batch in batches])
    assert len(noise.unique(dim=0)) == len(noise) == 8
    spread = dataclasses.replace(cached, moments=torch.zeros_like(cached.moments))
    batch = draw_batch(toy_base, spread, CONTRACTS, tiny(), 0)
    latents = batch.latents / toy_base.vae.config.scaling_factor  # of mean 0 and variance 1: the draw itself
    assert latents.std() == pytest.approx(1, abs=0.15)
    assert abs((latents * batch.noise).mean()) < 0.15, "the latents' draw is not the noise"


def test_an_epoch_shows_every_pair_once_and_each_its_own_order(toy_base, cached):
    recipe = tiny(batch=2, prompt_dropout=0.0)
    epochs = []
    for epoch in range(2):
        batches = [draw_batch(toy_base, cached, CONTRACTS, recipe, epoch * 5 + step) for step in range(5)]
        epochs.append([pair for batch in batches for pair in drawn_pairs(batch, toy_base)])
        for batch in batches:
            assert (255 * batch.hints[""][:, 0, 0, 0]).round().int().tolist() == drawn_pairs(batch, toy_base)
            assert (batch.text.tokens[:, 0, 0] - 1).int().tolist() == drawn_pairs(batch, toy_base)
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1] and epochs[0] != list(range(10))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_prompts_are_dropped_at_the_share_asked_for(share, toy_base, cached):
    recipe = tiny(batch=10, prompt_dropout=share)
    rows = torch.stack(
        [draw_batch(toy_base, cached, CONTRACTS, recipe, step).text.tokens[:, 0, 0] for step in range(60)]
    )
    assert (rows == 0).float().mean() == pytest.approx(share, abs=0.06 if 0 < share < 1 else 0)


def test_timesteps_cover_the_schedule(toy_base, cached):
    recipe = tiny(batch=10)
    t = torch.cat([draw_batch(toy_base, cached, CONTRACTS, recipe, step).t for step in range(60)]).float()
    assert t.min() < 25 and t.max() > 975
    assert t.quantile(0.5) == pytest.approx(500, abs=60)


def test_several_draws_of_a_pair_share_its_hint_and_nothing_else(toy_base, cached):
    recipe = tiny(batch=12, noises_per_pair=4)
    batches = [draw_batch(toy_base, cached, CONTRACTS, recipe, step) for step in range(20)]
    for batch in batches:
        pairs = drawn_pairs(batch, toy_base)
        assert [len(set(pairs[i : i + 4])) for i in (0, 4, 8)] == [1, 1, 1] and len(set(pairs)) == 3
        assert len(batch.hints[""]) == 3 and len(batch.noise.unique(dim=0)) == 12
        assert (255 * batch.hints[""][:, 0, 0, 0]).round().int().tolist() == pairs[::4]
        shares = batch.t.view(3, 4) // 250
        assert shares.tolist() == [[0, 1, 2, 3]] * 3, "each from a share of the schedule of its own"
    dropped = torch.stack([batch.text.tokens[:, 0, 0] == 0 for batch in batches]).view(-1, 4).float().mean(1)
    assert 0 < dropped.mean() < 1 and len(dropped.unique()) > 2, "prompts are dropped row by row"
    assert sorted(pair for batch in batches[:10] for pair in drawn_pairs(batch, toy_base)[::4]) == sorted(
        [*range(10)] * 3
    ), "an epoch is every pair once"


@pytest.mark.parametrize("draws", [1, 2])
def test_the_parts_of_a_batch_are_its_rows(draws, toy_base, cached):
    recipe = tiny(batch=8, noises_per_pair=draws)
    whole = draw_batch(toy_base, cached, CONTRACTS, recipe, 3)
    parts = [draw_batch(toy_base, cached, CONTRACTS, recipe, 3, part, 4) for part in range(4)]
    assert [len(part.t) for part in parts] == [2] * 4
    for name in ("latents", "noise", "t"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert torch.equal(torch.cat([part.hints[""] for part in parts]), whole.hints[""])


def test_a_batch_is_whole_pairs_and_equal_parts():
    for changes in (
        {"noises_per_pair": 4},
        {"gradient_accumulation": 4},
        {"noises_per_pair": 2, "gradient_accumulation": 2},
    ):
        with pytest.raises(UserError, match="a batch of 6 rows cannot be shared out"):
            parse_recipe({"batch": 6} | changes)


# --- the objective ------------------------------------------------------------------------------------------


@pytest.fixture
def base_of(toy_base, xl_base):
    """``base_of(kind)``: the toy base, predicting v, or eps on the schedule of SD 1.5; or SDXL's anatomy."""

    def base(kind):
        b = toy_base
        if kind in ("v", "sdxl"):
            return b if kind == "v" else xl_base
        settings = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
        scheduler = type(b.scheduler).from_config(b.scheduler.config, **settings)
        return UNetBase("eps", b.vae, b.towers, b.unet, scheduler)

    return base


@pytest.mark.parametrize("kind", ["eps", "v", "sdxl"])
def test_the_objective_and_its_gradient_are_those_of_the_field_s_reference(kind, base_of, drawn_joins, tmp_path):
    from diffusers import ControlNetModel

    base = base_of(kind)
    assert base.noise.prediction == {"sdxl": "eps"}.get(kind, kind)
    branch = drawn_joins(new_control(base), base=base)
    save_control(tmp_path / "control", SavedControl(branch, CONTRACT), base)
    reference = ControlNetModel.from_pretrained(tmp_path / "control")
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    hints, t = torch.rand(3, 3, *[8 * base.stride] * 2, generator=generator), torch.tensor([0, 500, 999])
    batch = Batch(latents, noise, t, base.encode_text(["a red apple", "", "gold circle"]), {"": hints})

    alpha = base.scheduler.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    z = alpha * latents + sigma * noise
    rows, more = stock_inputs((z, t, batch.text))
    down, middle = reference(*rows, controlnet_cond=hints, **more, return_dict=False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    predicted = base.unet(*rows, **residuals, **more).sample
    expected = (
        (predicted - (noise if base.noise.prediction == "eps" else alpha * noise - sigma * latents)) ** 2
    ).mean()
    expected.backward()

    loss = objective(base, branch, batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs, names = dict(reference.named_parameters()), key_table(branch)
    for name, parameter in branch.named_parameters():
        wanted = theirs[names[name]].grad
        assert (parameter.grad - wanted).norm() <= 1e-4 * wanted.norm() + 1e-8, name
        assert wanted.norm() > 0, name


@pytest.mark.parametrize("body", ["copy", "xs"])
def test_a_control_of_sdxl_s_anatomy_is_trained_and_goes_on_where_it_stopped(body, xl_base, tmp_path):
    recipe = tiny(steps=4, evaluation={"every": 0}, control={"body": body})
    whole = list(train_control(recipe, tmp_path / "whole", xl_base))
    begun = train_control(recipe, tmp_path / "stopped", xl_base)
    for _ in range(2):
        next(begun)
    begun.close()
    rest = list(train_control(recipe, tmp_path / "stopped", xl_base))
    assert [record.loss for record in whole[2:]] == [record.loss for record in rest]
    assert load_control(tmp_path / "whole", xl_base).trained["step"] == 4


@pytest.mark.parametrize(
    "contract",
    [
        CONTRACT,
        HintSpec("x", low=-1.0),
        HintSpec("x", channels=1),
        HintSpec("x", colour_order="BGR"),
        HintSpec("x", resize="lines"),
    ],
    ids=["released", "from -1", "grey", "BGR", "lines"],
)
@pytest.mark.parametrize("name", ["toy_base", "xl_base"])
def test_the_hint_a_step_trains_on_is_the_hint_a_run_reads(name, contract, tmp_path, request, monkeypatch):
    """Elsewhere the two differ: in [-1, 1] in training and [0, 1] in use, or the other way round."""
    base = request.getfixturevalue(name)
    pair = CirclePairs(base.size, 1)[0]
    monkeypatch.setattr("controlkit.data.cache.hint_for_pair", lambda pair, contract: pair.hint)
    [cached] = build_cache(base, [pair], {"": contract}, tmp_path / "x")
    trained_on = draw_batch(base, cached, {"": contract}, tiny(batch=1), 0).hints[""]
    branch = new_control(base, hint_channels=contract.channels)
    read = []
    branch.hint_encoder.register_forward_hook(lambda module, args, out: read.append(args[0]))
    make(base, [SavedControl(branch, contract)], [pair.hint], prompt="", steps=1)
    assert torch.equal(read[0], trained_on)


def test_training_leaves_the_base_as_it_was(toy_base, tmp_path):
    modules = {"vae": toy_base.vae, "text": toy_base.towers[0].encoder, "unet": toy_base.unet}
    before = {f"{n}.{k}": v.clone() for n, module in modules.items() for k, v in module.state_dict().items()}
    list(train_control(tiny(steps=2), tmp_path, toy_base))
    after = {f"{n}.{k}": v for n, module in modules.items() for k, v in module.state_dict().items()}
    assert equal(before, after)
    parameters = [p for module in modules.values() for p in module.parameters()]
    assert not any(p.requires_grad or p.grad is not None for p in parameters)
    assert not any(module.training for module in modules.values())


# --- the run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(toy_base, tmp_path_factory):
    """The tiny recipe's run, uninterrupted: its folder."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:  # module fixtures come before conftest's own patch
        patch.setattr(precision, "bf16_pays", lambda device_type: False)
        list(train_control(tiny(), out, toy_base))
    return out


def assert_like(whole, out):
    """A run's outcome is the uninterrupted run's, to the bit."""
    assert log_of(out) == log_of(whole)
    assert equal(weights_of(out), weights_of(whole))
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == names
    for name in names:
        states = (load_file(run / "checkpoints" / name / "state.safetensors") for run in (whole, out))
        assert equal(*states)
    assert not leftovers(out)


def test_a_run_leaves_a_log_checkpoints_samples_and_a_control(whole, toy_base):
    records = log_of(whole)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records if "obedience" in record] == [3, 6]
    evaluated = records[2]
    assert set(evaluated) == {
        "step", "loss", "fidelity", "floor", "ceiling", "obedience", "obedience_interval", "is_meaningful", "verdict",
        "relative_loss", "colour_drift", "residuals",
    }  # fmt: skip
    assert not evaluated["is_meaningful"] and evaluated["verdict"].startswith("control cannot be told here")
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step-0000004", "step-0000006"]
    assert sorted(path.name for path in (whole / "samples").iterdir()) == ["step-0000003.png", "step-0000006.png"]
    assert read_recipe(whole / "recipe.yaml") == tiny()
    control = load_control(whole, toy_base)
    assert control.hint == HintSpec("canny", {"low": 100.0, "high": 200.0}, resize="lines")
    assert control.trained["step"] == 6 and control.trained["base_digest"] == toy_base.digest
    assert Recipe(**control.trained["recipe"]) == tiny()
    assert not leftovers(whole)


def test_records_are_yielded_as_they_are_logged(toy_base, tmp_path):
    for record in itertools.islice(train_control(tiny(), tmp_path, toy_base), 3):
        last = (tmp_path / "log.jsonl").read_text().splitlines()[-1]
        assert last == record.to_json()
    assert record.evaluation and record.verdict and record.seconds > 0


def test_training_lowers_the_loss(toy_base, tmp_path):
    recipe = tiny(steps=40, batch=4, lr=5e-3, checkpoint_every=40, evaluation={"every": 0})
    list(train_control(recipe, tmp_path, toy_base))
    [cached] = Cached.read(next(tmp_path.glob("pairs*")))
    batch = draw_batch(toy_base, cached, CONTRACTS, tiny(batch=16), 1000)
    with torch.no_grad():
        before, after = (
            objective(toy_base, branch, batch)
            for branch in (new_control(toy_base), load_control(tmp_path, toy_base).branch)
        )
    assert after < 0.95 * before, (float(before), float(after))


def test_the_work_announced_is_the_work_done(toy_base, tmp_path):
    stages = []
    run = train_control(
        tiny(), tmp_path, toy_base, lambda name, total: stages.append([name, total, 0]), lambda n: stages[-1].append(n)
    )
    list(run)
    assert [name for name, *_ in stages[1:]] == ["caching", "evaluating", "evaluating"]
    assert stages[0][1:] == [0, 0], "the plan: nothing to be done, something to know"
    for name, total, *done in stages:
        assert sum(done) == total, name


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_run_stopped_and_run_again_ends_as_if_never_stopped(steps, whole, toy_base, tmp_path):
    list(itertools.islice(train_control(tiny(), tmp_path, toy_base), steps))
    again = [record.step for record in train_control(tiny(), tmp_path, toy_base)]
    assert again == list(range(2 * (steps // 2) + 1, 7)), "it goes on from the last checkpoint"
    assert_like(whole, tmp_path)


def test_a_finished_run_has_nothing_left_to_do(whole, toy_base, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    assert not list(train_control(tiny(), tmp_path / "run", toy_base))
    assert_like(whole, tmp_path / "run")


@pytest.fixture
def stopped(whole, tmp_path):
    """The run as it was after step 5, its last checkpoint that of step 4."""
    out = tmp_path / "stopped"
    shutil.copytree(whole, out)
    for gone in ("control", "checkpoints/step-0000006", "samples/step-0000006.png"):
        shutil.rmtree(out / gone) if (out / gone).is_dir() else (out / gone).unlink()
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(lines[:5]))
    return out


@pytest.mark.parametrize("garbage", ['{"step": 5, "lo', "\0\0\0"])
def test_a_line_cut_short_is_dropped(garbage, whole, stopped, toy_base):
    log = stopped / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]) + garbage)
    list(train_control(tiny(), stopped, toy_base))
    assert_like(whole, stopped)


@pytest.mark.parametrize("number", [1, 3, 6, 8, 11])
def test_what_a_kill_leaves_half_written_is_removed(number, whole, stopped, toy_base, monkeypatch):
    """Each file and folder is renamed into its place; here the power goes just before the numbered one is."""
    rename, renames = os.replace, itertools.count(1)

    def last_rename(*names):
        if next(renames) == number:
            raise KeyboardInterrupt
        rename(*names)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", last_rename)
        for tidying in ("pathlib.Path.unlink", "shutil.rmtree"):
            patch.setattr(tidying, lambda *args, **kwargs: None)
        with pytest.raises(KeyboardInterrupt):
            list(train_control(tiny(), stopped, toy_base))
    assert leftovers(stopped)
    list(train_control(tiny(), stopped, toy_base))
    assert_like(whole, stopped)


def test_resuming_goes_back_to_the_run_s_thread_count(stopped, toy_base, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    next(train_control(tiny(), stopped, toy_base))
    assert asked == [1]


@pytest.mark.parametrize("gone", [None, "checkpoints"])
def test_resuming_goes_on_in_the_run_s_number_format(gone, whole, stopped, toy_base, monkeypatch):
    if gone:
        shutil.rmtree(stopped / gone)
    monkeypatch.setattr(precision, "_settled", {})
    monkeypatch.setattr(precision, "bf16_pays", lambda device_type: True)  # the probe changed its mind
    list(train_control(tiny(), stopped, toy_base))
    assert_like(whole, stopped)


def test_a_run_that_another_process_holds_is_left_alone(stopped, toy_base):
    before = (stopped / "log.jsonl").read_bytes()
    with FileLock(stopped / ".lock"), pytest.raises(UserError, match="Another process is training"):
        next(train_control(tiny(), stopped, toy_base))
    assert (stopped / "log.jsonl").read_bytes() == before


def test_an_unreadable_checkpoint_is_named(stopped, toy_base):
    (state := stopped / "checkpoints" / "step-0000004" / "state.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"Delete .*step-0000004 and run again"):
        next(train_control(tiny(), stopped, toy_base))
    assert state.read_bytes() == b"torn"


def test_the_neighbour_is_needed_at_the_start_only(toy_base, neighbour, tmp_path, monkeypatch):
    shutil.copytree(neighbour, tmp_path / "near")
    recipe = tiny(control={"start_from": str(tmp_path / "near")})
    list(itertools.islice(train_control(recipe, tmp_path / "run", toy_base), 3))
    shutil.rmtree(tmp_path / "near")
    assert len(list(train_control(recipe, tmp_path / "run", toy_base))) == 4


def test_resuming_on_other_weights_of_the_base_is_refused(stopped, toy_base, other_base):
    with pytest.raises(UserError, match=rf"{toy_base.digest}, now {other_base.digest}"):
        next(train_control(tiny(), stopped, other_base))


LONG = {"steps": 60, "checkpoint_every": 3, "evaluation": {"every": 4, "num": 2, "steps": 1}}


def _train_to_the_end(base_folder, out, says):
    """The long run in a process of its own, which says what it is about to do."""
    precision.bf16_pays = lambda device_type: False
    torch.set_num_threads(1)
    save = train.run.save_checkpoint
    train.run.save_checkpoint = lambda *args: [says.send("saving"), save(*args)]
    for _ in train_control(tiny(**LONG), out, load_base(base_folder), lambda name, total: says.send(name)):
        says.send("stepping")


def test_a_run_killed_twenty_times_at_any_moment_loses_nothing(toy_folder, toy_base, tmp_path):
    list(train_control(tiny(**LONG), tmp_path / "whole", toy_base))
    wanted = log_of(tmp_path / "whole")
    context = multiprocessing.get_context("forkserver")  # one process imports all that takes long, and forks
    slow = ("controlkit", "diffusers", "transformers")
    context.set_forkserver_preload([name for name in sys.modules if name.startswith(slow)])
    chance, out, killed = random.Random(0), tmp_path / "run", []
    later = ["evaluating", "saving", "stepping"] * 5 + ["stepping"]
    chance.shuffle(later)
    for place in ["caching"] * 4 + later:
        hears, says = context.Pipe(duplex=False)
        process = context.Process(target=_train_to_the_end, args=(toy_folder, out, says))
        process.start()
        says.close()
        doing = ""
        while doing != place:
            doing = hears.recv()
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it ended before it was killed"
        with contextlib.suppress(EOFError):
            while True:
                doing = hears.recv()
        killed.append(doing)
        if place == "caching":
            killed[-1] += " whole" if list(out.glob("pairs-*")) else ""
        log = (out / "log.jsonl").read_text().splitlines(keepends=True) if (out / "log.jsonl").is_file() else []
        whole_lines = [json.loads(line) for line in log if line.endswith("\n")]
        assert [{k: v for k, v in line.items() if k != "seconds"} for line in whole_lines] == wanted[: len(whole_lines)]
    assert len(killed) == 20 and {"caching", "evaluating", "saving", "stepping"} <= set(killed), killed
    rest = list(train_control(tiny(**LONG), out, toy_base))
    assert rest, "it was not done"
    assert_like(tmp_path / "whole", out)


def _full_disk(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["save_control", "write_tensors", "os.replace"])
def test_a_full_disk_costs_no_checkpoint_and_the_run_goes_on_later(call, whole, toy_base, tmp_path, monkeypatch):
    run = train_control(tiny(), tmp_path, toy_base)
    list(itertools.islice(run, 3))
    with monkeypatch.context() as patch:
        patch.setattr(f"controlkit.train.checkpoints.{call}", _full_disk)
        with pytest.raises(UserError, match=r"step 4 .*No space left on device.*Kept: step-0000002.*go on"):
            list(run)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000002"]
    assert not leftovers(tmp_path)
    list(train_control(tiny(), tmp_path, toy_base))
    assert_like(whole, tmp_path)


@pytest.mark.parametrize(
    ("change", "key"), [({"lr": 0.1}, "lr"), ({"seed": 3}, "seed"), ({"control": {"join": "gaussian"}}, "control")]
)
def test_another_recipe_in_the_same_folder_is_refused_and_the_difference_named(change, key, whole, toy_base):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=rf"another recipe \(it differs in {key}\b"):
        next(train_control(tiny(**change), whole, toy_base))
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_a_recipe_laid_out_otherwise_is_the_same_recipe(whole, toy_base, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "recipe.yaml"
    path.write_text(f"# my run\n{path.read_text()}")
    assert not list(train_control(tiny(), tmp_path / "run", toy_base))


def test_a_file_where_the_folder_should_be_is_refused(toy_base, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="is a file; expected a folder"):
        next(train_control(tiny(), tmp_path / "run", toy_base))
    assert (tmp_path / "run").read_text() == "mine"


def test_a_loss_that_is_not_a_number_ends_the_run_and_names_the_learning_rate(toy_base, tmp_path, monkeypatch):
    run = train_control(tiny(), tmp_path, toy_base)
    list(itertools.islice(run, 2))
    monkeypatch.setattr("controlkit.train.run.objective", lambda *args: objective(*args) * float("nan"))
    with pytest.raises(UserError, match=r"step 3 the loss is nan.*learning rate.*0\.001"):
        next(run)
    assert len(log_of(tmp_path)) == 2


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(toy_base, tmp_path, monkeypatch):
    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, slope):
            return slope * float("inf")

    run = train_control(tiny(), tmp_path, toy_base)
    list(itertools.islice(run, 3))
    monkeypatch.setattr("controlkit.train.run.objective", lambda *args: Overflow.apply(objective(*args)))
    with pytest.raises(UserError, match=r"step 4 the loss is [\d.]+ and its gradient's norm (nan|inf)"):
        next(run)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000002"], "step 4 was kept"
    assert len(log_of(tmp_path)) == 3


# --- found? -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lows", "found", "words"),
    [
        ([], None, "no control yet"),
        ([0.1, 0.2], None, "no control yet"),
        ([0.1, 0.3], None, "control perhaps found at step 200: the next evaluation will confirm"),
        ([0.3, 0.2], None, "no control yet"),
        ([0.3, 0.2, 0.3], None, "control perhaps found at step 300: the next evaluation will confirm"),
        ([0.1, 0.25, 0.25], 200, "control found at step 200"),
        ([0.3, 0.4, 0.1], 100, "control found at step 100"),
        ([0.3, 0.1, 0.3, 0.3, 0.3], 300, "control found at step 300"),
    ],
)
def test_control_is_found_at_the_first_of_two_successive_evaluations(lows, found, words):
    evaluations = [EvaluationSummary(100 * (i + 1), low, counts=True) for i, low in enumerate(lows)]
    assert found_step(evaluations) == found
    assert verdict(evaluations) == words


def test_obedience_that_does_not_count_finds_no_control():
    evaluations = [EvaluationSummary(100, 0.9, counts=False), EvaluationSummary(200, 0.9, counts=False)]
    assert found_step(evaluations) is None
    assert verdict(evaluations).startswith("control cannot be told here")


def test_evaluations_before_an_interruption_still_count(toy_base, tmp_path, monkeypatch):
    figure = Figure(0.5, 0.4, 0.6)
    changed = {"obedience": figure, "floor": Figure(0.1, 0.1, 0.1), "ceiling": Figure(0.9, 0.9, 0.9)}
    monkeypatch.setattr(
        "controlkit.train.evaluation.obedience", lambda *scores: dataclasses.replace(obedience(*scores), **changed)
    )
    list(itertools.islice(train_control(tiny(), tmp_path, toy_base), 4))
    last = list(train_control(tiny(), tmp_path, toy_base))[-1]
    assert last.verdict == "control found at step 3"


UNION = {
    "control": {"types": ["canny", "depth", "pose", "inpaint"]},
    "data": {"source": "scenes", "scenes": 8, "count": 6, "visits": 4},
    "evaluation": {"every": 0},
}


def test_the_relative_loss_is_1_without_control_and_falls_as_a_control_learns(toy_base, tmp_path):
    recipe = tiny(steps=60, batch=8, lr=3e-3, evaluation={"every": 20, "num": 6, "steps": 1}, prompt_dropout=0.0)
    pairs = training_pairs(recipe, toy_base)[0]  # of what it was trained on, so that a toy can show it
    gauge = HeldoutLoss(toy_base, [pairs[i] for i in range(6)], CONTRACTS, recipe, tmp_path)
    born = gauge.measure(new_control(toy_base))
    assert born.keys() == {""} and born[""] == pytest.approx([1.0] * 4, abs=1e-6)
    records = list(train_control(recipe, tmp_path / "run", toy_base))
    assert [len(record.relative[""]) for record in records if record.relative] == [4] * 3
    trained = gauge.measure(load_control(tmp_path / "run", toy_base).branch)[""]
    assert np.mean(trained) < 0.995 and gauge.measure(new_control(toy_base)) == born, "the same noise each time"
    logged = [line["relative_loss"][""] for line in log_of(tmp_path / "run") if "relative_loss" in line]
    assert logged[-1] == pytest.approx(list(records[-1].relative[""]), abs=1e-4)


def test_a_union_s_relative_loss_is_told_type_by_type(toy_base, fake_packages, tmp_path):
    recipe = tiny(**UNION | {"evaluation": {"every": 2, "num": 4}}, steps=2, batch=4)
    last = list(train_control(recipe, tmp_path / "run", toy_base))[-1]
    assert last.evaluation is None and set(last.relative) <= set(UNION["control"]["types"])
    assert len(last.relative) > 1 and all(len(quarters) == 4 for quarters in last.relative.values())


def test_a_run_ends_where_it_got_where_it_should_or_no_longer_gets_better():
    seen = [EvaluationSummary(100 * i, mean - 0.1, counts, mean) for i, (mean, counts) in enumerate(
        [(0.9, False), (0.1, True), (0.4, True), (0.3, True), (0.4, True)], 1)]  # fmt: skip
    assert train.best_of(seen).step == 300 and train.best_of(seen[:1]) is None
    for patience, length in ((1, 4), (2, 5), (3, None)):
        recipe = EvaluationRecipe(patience=patience)
        assert next((n for n in range(6) if train.should_stop(recipe, seen[:n])), None) == length
    for target, length in ((0.0, 2), (0.29, 3), (0.35, None)):
        recipe = EvaluationRecipe(target=target)
        assert next((n for n in range(6) if train.should_stop(recipe, seen[:n])), None) == length
    assert not train.should_stop(EvaluationRecipe(), seen)


def test_the_best_is_kept_and_a_run_that_ended_early_has_ended(toy_base, tmp_path, monkeypatch):
    means = iter([0.2, 0.5, 0.3, 0.4, 0.1])
    figures = {"floor": Figure(0.1, 0.1, 0.1), "ceiling": Figure(0.9, 0.9, 0.9)}

    def told(*scores):
        mean = next(means)
        return dataclasses.replace(obedience(*scores), obedience=Figure(mean, mean - 0.1, mean + 0.1), **figures)

    monkeypatch.setattr("controlkit.train.evaluation.obedience", told)
    recipe = tiny(steps=9, evaluation={"every": 1, "num": 2, "steps": 1, "patience": 2})
    records = list(train_control(recipe, tmp_path, toy_base))
    assert [record.step for record in records] == [1, 2, 3, 4]
    assert load_control(tmp_path / "best", toy_base).trained["step"] == 2
    assert load_control(tmp_path / "control", toy_base).trained["step"] == 4
    assert (tmp_path / "checkpoints" / "step-0000004").is_dir()
    assert list(train_control(recipe, tmp_path, toy_base)) == []


def test_a_run_says_beforehand_what_it_will_do(toy_base, tmp_path):
    said = []
    recipe = tiny(batch=4, noises_per_pair=2, prompt_dropout=0.5)
    next(train_control(recipe, tmp_path, toy_base, on_stage=lambda name, total: said.append((name, total))))
    plan, total = said[0]
    learning = sum(p.numel() for p in new_control(toy_base).parameters()) / 1e6
    assert total == 0 and plan.startswith(
        f"{learning:.2f}M parameters learn hints of canny [0, 1] for {toy_base.name}: "
    )
    assert (
        "8 pairs, 1.5 times each, in 6 steps of 4 rows; 50% of prompts dropped" in plan and "adamw, rate 0.001" in plan
    )


# --- settings of the run ------------------------------------------------------------------------------------


def ended(recipe, out, base):
    """The weights a run ends with, and what its log says."""
    list(train_control(recipe, out, base))
    return weights_of(out), log_of(out)


def far(a, b):
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


PLAIN = {"steps": 3, "batch": 4, "lr": 1e-3, "evaluation": {"every": 0}}


def test_gradients_of_parts_add_up_to_those_of_the_whole(toy_base, tmp_path):
    whole, log = ended(tiny(**PLAIN), tmp_path / "whole", toy_base)
    parts, log_of_parts = ended(tiny(**PLAIN, gradient_accumulation=2), tmp_path / "parts", toy_base)
    assert [one["loss"] for one in log] == pytest.approx([one["loss"] for one in log_of_parts], rel=1e-4)
    moved = far(whole, ended(tiny(**PLAIN, seed=1), tmp_path / "other", toy_base)[0])
    assert far(whole, parts) < 0.1 * moved


def test_a_batch_that_does_not_fit_in_memory_is_computed_in_more_parts_and_said_so(toy_base, tmp_path, monkeypatch):
    log = ended(tiny(**PLAIN), tmp_path / "whole", toy_base)[1]
    room, real, said = 2, train.objective, []

    def crowded(base, branch, batch, predict):
        if len(batch.t) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(base, branch, batch, predict)

    monkeypatch.setattr("controlkit.train.run.objective", crowded)
    list(train_control(tiny(**PLAIN), tmp_path / "parts", toy_base, on_stage=lambda name, total: said.append(name)))
    assert [one["loss"] for one in log_of(tmp_path / "parts")] == pytest.approx([one["loss"] for one in log], rel=1e-4)
    assert [words for words in said if "memory" in words] == [
        "out of memory: step 1 and the rest in 2 parts, the batch is still 4"
    ]
    room = 0
    with pytest.raises(UserError, match="does not hold even 1 pair"):
        list(train_control(tiny(**PLAIN), tmp_path / "none", toy_base))


def test_features_computed_anew_give_the_same_weights_and_leave_the_base_as_it_was(toy_base, tmp_path, monkeypatch):
    kept = ended(tiny(**PLAIN), tmp_path / "kept", toy_base)[0]
    calls = []
    real = torch.utils.checkpoint.checkpoint

    def counted(*args, **more):
        calls.append(args)
        return real(*args, **more)

    monkeypatch.setattr("controlkit.backbones.unet.checkpoint", counted)
    anew = ended(tiny(**PLAIN, gradient_checkpointing=True), tmp_path / "anew", toy_base)[0]
    assert calls and far(kept, anew) < 1e-5
    assert not any(getattr(block, "gradient_checkpointing", False) for block in toy_base.unet.modules())


def test_an_average_is_what_is_saved_and_goes_on_exactly(toy_base, tmp_path):
    recipe = tiny(**PLAIN | {"steps": 6}, ema=0.9, checkpoint_every=2)
    whole, _ = ended(recipe, tmp_path / "whole", toy_base)
    assert far(whole, ended(tiny(**PLAIN | {"steps": 6}), tmp_path / "plain", toy_base)[0]) > 1e-5
    list(itertools.islice(train_control(recipe, tmp_path / "stopped", toy_base), 5))
    assert far(whole, ended(recipe, tmp_path / "stopped", toy_base)[0]) == 0


@pytest.mark.parametrize("name", ["muon", "adamw8bit", "adafactor", "prodigy"])
def test_other_optimizers_train_another_control_and_go_on_exactly(name, toy_base, tmp_path):
    recipe = tiny(**PLAIN | {"steps": 4, "lr": 1.0 if name == "prodigy" else 1e-2}, optimizer=name, checkpoint_every=2)
    whole, _ = ended(recipe, tmp_path / "whole", toy_base)
    assert far(whole, ended(tiny(**PLAIN | {"steps": 4}), tmp_path / "plain", toy_base)[0]) > 1e-4
    list(itertools.islice(train_control(recipe, tmp_path / "stopped", toy_base), 3))
    assert far(whole, ended(recipe, tmp_path / "stopped", toy_base)[0]) == 0


def test_values_of_a_recipe_can_be_put_in_place(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("steps: 5\ndata: {source: fill50k}\n")
    recipe = read_recipe(path, ["steps=7", "data.count=9", "evaluation.guidance=2.5", "control.taps=mid"])
    assert (recipe.steps, recipe.data.source, recipe.data.count) == (7, "fill50k", 9)
    assert (recipe.evaluation.guidance, recipe.control.taps) == (2.5, "mid")
    for change, words in (
        ("steps", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("steps=[", "is not YAML"),
        ("steps.more=3", "steps is 5 and has no more"),
        ("data.sorce=x", 'did you mean "source"'),
    ):
        with pytest.raises(UserError, match=words):
            read_recipe(path, [change])


# --- a Union ------------------------------------------------------------------------------------------------


def test_a_batch_of_several_types_keeps_each_row_with_its_own_hint_and_picture(toy_base, cached):
    contracts = {"canny": CONTRACT, "depth": HintSpec("depth", low=-1.0), "pose": HintSpec("pose")}
    typed = dataclasses.replace(cached, kinds=torch.arange(10) % 3)
    plain = draw_batch(toy_base, cached, CONTRACTS, tiny(batch=7, prompt_dropout=0.0), 1)
    batch = draw_batch(toy_base, typed, contracts, tiny(batch=7, prompt_dropout=0.0), 1)
    pairs = drawn_pairs(batch, toy_base)
    assert sorted(pairs) == sorted(drawn_pairs(plain, toy_base))
    assert [pair % 3 for pair in pairs] == sorted(pair % 3 for pair in pairs)
    assert (batch.text.tokens[:, 0, 0] - 1).int().tolist() == pairs
    levels = {kind: (hint[:, 0, 0, 0] - contract.low) / (contract.high - contract.low)
              for kind, contract in contracts.items() if (hint := batch.hints.get(kind)) is not None}  # fmt: skip
    assert [round(255 * float(level)) for level in torch.cat(list(levels.values()))] == pairs
    order = [drawn_pairs(plain, toy_base).index(pair) for pair in pairs]
    assert torch.equal(batch.noise, plain.noise[order]) and torch.equal(batch.t, plain.t[order])


def test_the_objective_of_a_batch_of_types_is_the_mean_of_its_types_own(toy_base, cached):
    union = randomised(new_union(toy_base))
    typed = dataclasses.replace(cached, kinds=torch.arange(10) % 2)
    batch = draw_batch(toy_base, typed, {"canny": CONTRACT, "depth": CONTRACT}, tiny(batch=6), 0)
    counts = [len(hint) for hint in batch.hints.values()]
    assert len(counts) == 2
    total, first = 0.0, 0
    for kind, hint in batch.hints.items():
        rows = slice(first, first + len(hint))
        own = {name: value[rows] for name, value in vars(batch).items() if name not in ("hints", "draws")}
        total += len(hint) / 6 * objective(toy_base, OneType(union, kind), Batch(**own, hints={"": hint})).item()
        first += len(hint)
    assert objective(toy_base, union, batch).item() == pytest.approx(total, rel=1e-5)


def test_the_objective_of_several_draws_is_that_of_rows_with_the_same_hint(toy_base, cached, drawn_joins):
    for branch, kinds in (
        (drawn_joins(new_control(toy_base)), [""]),
        (randomised(new_union(toy_base)), ["canny", "depth"]),
    ):
        contracts = dict.fromkeys(kinds, CONTRACT)
        typed = dataclasses.replace(cached, kinds=torch.arange(10) % len(kinds))
        batch = draw_batch(toy_base, typed, contracts, tiny(batch=12, noises_per_pair=2), 0)
        repeated = {name: hint.repeat_interleave(2, 0) for name, hint in batch.hints.items()}
        plain = dataclasses.replace(batch, hints=repeated, draws=1)
        got, wanted = (objective(toy_base, branch, one).item() for one in (batch, plain))
        assert got == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("source", ["scenes", "world"])
def test_a_union_is_trained_and_ends_the_same_whether_stopped_or_not(source, toy_base, fake_packages, tmp_path):
    recipe = tiny(**UNION, steps=4, batch=4)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": source})})
    list(train_control(recipe, tmp_path / "whole", toy_base))
    list(itertools.islice(train_control(recipe, tmp_path / "stopped", toy_base), 3))
    list(train_control(recipe, tmp_path / "stopped", toy_base))
    assert_like(tmp_path / "whole", tmp_path / "stopped")
    saved = load_control(tmp_path / "whole", toy_base)
    assert type(saved.branch) is UnionBranch and saved.trained["data"] == source
    assert saved.hints == train.hints_of(recipe) and list(saved.hints) == UNION["control"]["types"]
    assert saved.hints["inpaint"].mask_value == -1 and saved.hints["canny"].options == {"low": 100.0, "high": 200.0}
    fresh = new_union(toy_base).state_dict()
    changed = {key for key, value in saved.branch.state_dict().items() if not torch.equal(value, fresh[key])}
    assert "control_add_embedding.linear_2.weight" in changed and "joins.middle.weight" in changed
    assert not any(key.startswith("spatial_ch_projs") for key in changed), "types are told by their code alone"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"control": {"types": ["cany"]}}, 'did you mean "canny"'),
        ({"control": {"types": ["canny"], "body": "conv"}}, r"no control\.body"),
        ({"control": {"types": ["canny"], "options": {"low": 1.0}}}, r"no control\.options"),
        ({"data": {"source": "fill50k"}}, '"fill50k" has hints of one type'),
    ],
)
def test_a_union_s_recipe_that_cannot_be_meant_is_refused(changes, words, toy_base, fake_packages, tmp_path):
    with pytest.raises(UserError, match=words):
        next(train_control(tiny(**(UNION | changes)), tmp_path / "run", toy_base))
    assert not (tmp_path / "run").exists()


def test_a_run_can_be_made_longer_and_otherwise_kept_where_its_rate_knows_of_no_end(toy_base, tmp_path):
    whole, _ = ended(tiny(steps=4), tmp_path / "whole", toy_base)
    ended(tiny(steps=2), tmp_path / "run", toy_base)
    longer = tiny(steps=4, keep=None, checkpoint_every=1, evaluation={"patience": 3})
    went_on, log = ended(longer, tmp_path / "run", toy_base)
    assert equal(went_on, whole) and [line["step"] for line in log] == [1, 2, 3, 4]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) >= 3, "null keeps all"
    assert read_recipe(tmp_path / "run" / "recipe.yaml") == longer
    with pytest.raises(UserError, match=r"differs in lr\): give another --out, or run with the recipe as it was to go"):
        next(train_control(tiny(steps=4, lr=5e-4), tmp_path / "run", toy_base))
    for bent in ({"cooldown": 1}, {"schedule": "cosine"}):  # what was made knew of no end, what is asked for does
        with pytest.raises(UserError, match=f"differs in .*{next(iter(bent))}"):
            next(train_control(tiny(steps=6, **bent), tmp_path / "run", toy_base))
    ended(tiny(steps=2, cooldown=1), tmp_path / "falling", toy_base)
    with pytest.raises(UserError, match=r"differs in steps\).*longer where its rate does not come down"):
        next(train_control(tiny(steps=4, cooldown=1), tmp_path / "falling", toy_base))


def test_a_run_does_not_go_on_with_a_folder_that_has_changed(toy_base, tmp_path):
    """What is held out would be drawn anew, and be measured on after it was trained on."""
    list(make_fill50k(tmp_path / "set", 12, toy_base.size))
    recipe = tiny(data={"source": str(tmp_path / "set"), "count": None}, steps=3, checkpoint_every=1)
    next(run := train_control(recipe, tmp_path / "run", toy_base))
    run.close()
    listing = tmp_path / "set" / "prompt.json"
    lines = listing.read_text().splitlines()
    listing.write_text("\n".join(lines[1:]))
    with pytest.raises(UserError, match="has other names or captions than when the run in"):
        next(train_control(recipe, tmp_path / "run", toy_base))
    listing.write_text("\n".join(lines))
    assert [record.step for record in train_control(recipe, tmp_path / "run", toy_base)] == [2, 3]


def test_what_compiling_gets_wrong_is_not_gone_on_with(toy_base, tmp_path, monkeypatch):
    """The loss is right, and some joins' gradients are zero: as with torch 2.13 on some CPUs."""

    def cut(place):
        def compiling(function):
            def wrong(base, branch, *rest):
                place(branch).requires_grad_(False)
                try:
                    return function(base, branch, *rest)
                finally:
                    place(branch).requires_grad_(True)

            return wrong

        return compiling

    kept = lambda function: lambda *given: function(*given)  # noqa: E731
    cases = {"join": cut(lambda branch: branch.joins["middle"]), "body": cut(lambda branch: branch.body), "right": kept}
    recipe = tiny(steps=2, compile=True, evaluation={"every": 0})
    plain, log = ended(recipe.model_copy(update={"compile": False}), tmp_path / "plain", toy_base)
    for name, compiling in cases.items():  # a body's gradient is there from the second step on
        monkeypatch.setattr(torch, "compile", compiling)
        said = []
        list(train_control(recipe, tmp_path / name, toy_base, lambda stage, total, said=said: said.append(stage)))
        assert any(line.startswith("not compiled: compiled, ") for line in said) == (name != "right")
        if name == "body":  # whose first step was without weight decay
            assert [line["loss"] for line in log_of(tmp_path / name)] == pytest.approx([line["loss"] for line in log])
        else:
            assert log_of(tmp_path / name) == log
            assert equal(weights_of(tmp_path / name), plain)


def test_pictures_of_another_size_than_the_base_s_are_trained_on_and_said(toy_base, tmp_path):
    said = []
    list(train_control(tiny(size=64, steps=1), tmp_path / "run", toy_base, lambda name, total: said.append(name)))
    assert any("pictures of 64 pixels" in line and "was trained on 32" in line for line in said)
    [cached] = Cached.read(next((tmp_path / "run").glob("pairs*")))
    assert cached.size == (64, 64) and toy_base.size == 32, "the caller's base is as it was"
    with pytest.raises(UserError, match="sides are multiples of"):
        toy_base.of_size(33)


@pytest.mark.parametrize(
    "content",
    [
        {"control": {"rank": 4}},
        {"control": {"annotator": "scribble", "annotators": ["canny", "scribble"]}},
        {"data": {"source": "fill50k", "variants": 3}},
        {"data": {"scenes": 3}},
        {"data": {"visits": 3}},
        {"evaluation": {"every": 0, "patience": 2}},
        {"evaluation": {"every": 0, "target": 0.5}},
        {"evaluation": {"every": 0, "hints": ["a.png"]}},
        {"evaluation": {"hints": ["a.png"]}, "control": {"types": ["canny"]}},
    ],
)
def test_a_setting_that_nothing_would_read_is_refused(content):
    with pytest.raises(UserError, match="is set, and nothing reads it"):
        parse_recipe(content)


def test_hints_that_nothing_here_makes_take_no_options():
    with pytest.raises(UserError, match="Nothing here makes hints of depth"):
        train.hints_of(parse_recipe({"control": {"annotator": "depth", "options": {"low": 1.0}}}))


@pytest.mark.parametrize(
    ("annotator", "words"),
    [
        ("depth", '"depth" can be found again in the embedded scenes alone'),
        ("openpose", 'Nothing here finds "openpose" in a picture'),
        ("shuffle", 'Obedience to hints named "shuffle" is not measured'),
        ("", "No annotator of these hints is named"),
    ],
)
def test_hints_that_cannot_be_found_again_are_trained_on_and_judged_by_their_loss(annotator, words, toy_base, tmp_path):
    list(make_fill50k(tmp_path / "set", 24, toy_base.size))
    recipe = tiny(
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
    best = load_control(tmp_path / "run" / "best", toy_base)
    assert best.trained["step"] == seen[int(np.argmin(losses))].step
    ends = [i for i in range(1, len(losses)) if losses[i] > min(losses[:i])]
    assert len(seen) == (ends[0] + 1 if ends else 3), "patience has the loss to go by"
    with pytest.raises(UserError, match=r"evaluation\.target is an obedience, and none is measured"):
        next(train_control(recipe.model_copy(update={"evaluation": EvaluationRecipe(target=0.5)}),
                           tmp_path / "other", toy_base))  # fmt: skip
    assert not (tmp_path / "other").exists()


# --- number formats -------------------------------------------------------------------------------------------


def test_half_precision_learns_what_single_precision_does_and_goes_on_exactly(toy_base, tmp_path):
    single = ended(tiny(**PLAIN, precision="fp32"), tmp_path / "fp32", toy_base)
    for name in ("fp16", "bf16"):
        recipe = tiny(**PLAIN, precision=name)
        whole, log = ended(recipe, tmp_path / name, toy_base)
        assert [one["loss"] for one in log] == pytest.approx([one["loss"] for one in single[1]], rel=0.02)
        assert [one["loss"] for one in log] != [one["loss"] for one in single[1]]
        list(itertools.islice(train_control(recipe, tmp_path / "stopped" / name, toy_base), 2))
        assert equal(ended(recipe, tmp_path / "stopped" / name, toy_base)[0], whole)
        assert json.loads((tmp_path / name / "machine.json").read_text())["format"] == FORMATS[name]


def test_a_step_whose_gradients_overflow_is_left_out_and_the_loss_scaled_less(toy_base, tmp_path, monkeypatch):
    real = torch.amp.GradScaler.get_scale(torch.amp.GradScaler("cpu"))
    recipe, seen = tiny(**PLAIN, precision="fp16"), []

    def spiked(*args):
        loss = objective(*args)
        seen.append(loss)
        return loss * (1e38 if len(seen) == 2 else 1.0)  # finite, and its gradient, scaled, is not

    monkeypatch.setattr("controlkit.train.run.objective", spiked)
    (tmp_path / "run").mkdir()
    list(train_control(recipe, tmp_path / "run", toy_base))
    state = load_file(tmp_path / "run" / "checkpoints" / "step-0000003" / "state.safetensors")
    assert state["scaler.scale"].item() == real / 2
    assert all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point())
    counts = {value.item() for name, value in state.items() if name.startswith("optimizer") and name.endswith(".step")}
    assert counts == {2.0}
