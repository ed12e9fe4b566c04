"""Controls of every body are trained by one trainer: what is learnt, what is written, what goes on after a kill."""

import itertools
import json
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch
from diffusers import T2IAdapter
from safetensors.torch import load_file

from conftest import TINY, draw_inputs, relative
from controlkit import precision
from controlkit.annotators import contract
from controlkit.backbones import load_base
from controlkit.backbones.load import _add_difference
from controlkit.branch import ControlSpec, LowRank, gains
from controlkit.controls import new_control
from controlkit.errors import UserError
from controlkit.formats import WEIGHTS, SavedControl, describe, load_control, save_control
from controlkit.images import HintSpec
from controlkit.train import controlled, train_control
from controlkit.train.recipe import ControlRecipe, parse_recipe, read_recipe
from controlkit.train.run import DIFFERENCE

OWN = TINY | {"steps": 4, "lr": 1e-2, "evaluation": {"every": 0}}
RANK = 2
BODIES = {"conv": {}, "lora": {"rank": RANK}, "adapter": {}}


def recipe_of(body, **changes):
    return parse_recipe({**OWN, "control": {"body": body, **BODIES[body]}, **changes})


def trained(recipe, out, base):
    """The losses of a whole run, in single precision: module fixtures come before conftest's own patch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "bf16_pays", lambda device_type: False)
        return [record.loss for record in train_control(recipe, out, base)]


@pytest.fixture(scope="module")
def runs(toy_base, tmp_path_factory):
    """The folder of a whole tiny run, by body."""
    made = {}

    def run(body):
        if body not in made:
            made[body] = tmp_path_factory.mktemp("runs") / body
            trained(recipe_of(body), made[body], toy_base)
        return made[body]

    return run


def prediction(base, branch, inputs):
    x, t, text, hint = inputs
    return controlled(base, branch, x, t, text, branch.encode_hint(hint))


@pytest.mark.parametrize("body", BODIES)
def test_a_run_of_any_body_goes_on_as_if_it_had_never_stopped(body, runs, toy_base, tmp_path):
    out = tmp_path / "run"
    for _ in itertools.islice(train_control(recipe_of(body), out, toy_base), 3):
        pass
    list(train_control(recipe_of(body), out, toy_base))
    for name in (f"control/{WEIGHTS}", "checkpoints/step-0000004/state.safetensors"):
        ours, whole = load_file(out / name), load_file(runs(body) / name)
        assert ours.keys() == whole.keys() and all(torch.equal(ours[key], whole[key]) for key in ours)


@pytest.mark.parametrize("body", BODIES)
def test_what_any_body_learns_is_what_is_loaded_and_its_base_stays_as_it_was(body, runs, toy_base):
    before = {name: value.clone() for name, value in toy_base.unet.state_dict().items()}
    list(train_control(recipe_of(body, steps=1), runs(body).parent / f"one-{body}", toy_base))
    assert all(torch.equal(value, before[name]) for name, value in toy_base.unet.state_dict().items())
    first, last = (load_control(folder, toy_base) for folder in (runs(body).parent / f"one-{body}", runs(body)))
    inputs = draw_inputs(toy_base)
    plain = toy_base.decode_noise(toy_base.encode_noise(*inputs[:3]))
    assert relative(prediction(toy_base, first.branch, inputs), prediction(toy_base, last.branch, inputs)) > 1e-3
    assert relative(prediction(toy_base, last.branch, inputs), plain) > 1e-3
    assert last.hint == contract("canny") and last.trained["step"] == OWN["steps"]


# --- differences of low rank --------------------------------------------------------------------------------


@pytest.fixture
def lora(toy_base):
    torch.manual_seed(0)
    return new_control(toy_base, ControlSpec("lora", rank=RANK))


def test_at_birth_a_body_of_low_rank_is_the_copy(lora, toy_base):
    plain = new_control(toy_base).weights()
    assert lora.weights().keys() == plain.keys()
    assert all(torch.equal(lora.weights()[name], plain[name]) for name in plain if name.startswith("body."))


def test_what_is_locked_is_every_matrix_that_a_low_rank_makes_smaller(lora):
    locked = {name: p for name, p in lora.named_parameters() if not p.requires_grad}
    assert locked and all(name.endswith("parametrizations.weight.original") for name in locked)
    assert all(name.startswith("body.") and gains(p, RANK) for name, p in locked.items())
    free = {name: p for name, p in lora.body.named_parameters() if p.requires_grad}
    assert not any(p.ndim >= 2 and gains(p, RANK) for name, p in free.items() if "parametrizations" not in name)
    ups = [module for module in lora.modules() if isinstance(module, LowRank)]
    assert len(ups) == len(locked)


def test_a_body_of_low_rank_learns_a_difference_of_that_rank(runs, toy_base):
    state = load_file(runs("lora") / "checkpoints" / "step-0000004" / "state.safetensors")
    own = new_control(toy_base).weights()
    ends = load_file(runs("lora") / "control" / WEIGHTS)
    ranks = []
    for name, before in own.items():
        if f"learning.{name.removesuffix('weight')}parametrizations.weight.0.up" in state:
            difference = (ends[name.removeprefix("body.")] - before).reshape(len(before), -1)
            values = torch.linalg.svdvals(difference)
            ranks.append(int((values > max(1e-4 * values[0], 1e-6)).sum()))
    assert ranks and max(ranks) == RANK


def test_the_control_lora_beside_it_is_the_control(runs, toy_base):
    small, whole = runs("lora") / "control" / "control-lora.safetensors", runs("lora") / "control" / WEIGHTS
    assert describe(small).format == "control-lora"
    assert small.stat().st_size < 0.75 * whole.stat().st_size  # a toy's matrices are small themselves
    inputs = draw_inputs(toy_base)
    from_small, from_whole = (prediction(toy_base, load_control(p, toy_base).branch, inputs) for p in (small, whole))
    assert relative(from_small, from_whole) <= 1e-5


@pytest.mark.parametrize("spec", [("copy", 4), ("lora", 0)])
def test_a_rank_belongs_to_a_body_of_low_rank_and_no_other(spec):
    with pytest.raises(ValueError, match="rank"):
        ControlSpec(spec[0], rank=spec[1])


# --- T2I-Adapter --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["toy_base", "deep_base", "sd2_base", "xl_base"])
def test_an_adapter_fits_the_encoder_it_is_made_for(name, request):
    base = request.getfixturevalue(name)
    inputs = draw_inputs(base)
    adapter = new_control(base, ControlSpec(body="adapter"))
    prediction(base, adapter, inputs).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    assert all(p.grad is None for p in base.unet.parameters())
    sizes = {tap.name: (tap.channels, inputs[0].shape[-1] * base.stride // tap.stride) for tap in adapter.taps}
    assert {k: (f.shape[1], f.shape[-1]) for k, f in adapter.encode_hint(inputs[3]).items()} == sizes


def test_a_saved_adapter_is_a_diffusers_one(runs, toy_base):
    stock = T2IAdapter.from_pretrained(runs("adapter") / "control")
    ours = load_control(runs("adapter"), toy_base).branch
    hint = draw_inputs(toy_base)[3]
    assert all(torch.equal(a, b) for a, b in zip(stock(hint), ours.encode_hint(hint).values(), strict=True))
    assert json.loads((runs("adapter") / "control" / "config.json").read_text())["_class_name"] == "T2IAdapter"
    described = describe(runs("adapter") / "control")
    assert (described.format, described.base, described.runs) == ("t2i-adapter", "toy", True)


def test_a_run_starts_from_a_neighbouring_adapter(runs, toy_base, tmp_path):
    asked = {"body": "adapter", "start_from": str(runs("adapter"))}
    (record, *_) = train_control(parse_recipe({**OWN, "control": asked, "steps": 1}), tmp_path / "next", toy_base)
    (fresh, *_) = train_control(recipe_of("adapter", steps=1), tmp_path / "fresh", toy_base)
    assert record.loss != fresh.loss


@pytest.mark.parametrize("words", [{"taps": "mid"}, {"join": "gaussian"}])
def test_an_adapter_has_no_joins(words, toy_base, tmp_path):
    with pytest.raises(UserError, match=rf"control\.{next(iter(words))} is .* with body adapter"):
        recipe = parse_recipe({**OWN, "control": {"body": "adapter", **words}})
        next(train_control(recipe, tmp_path / "run", toy_base))


def test_a_control_of_the_other_kind_is_no_start(runs, toy_base, tmp_path, drawn_joins):
    save_control(tmp_path / "copy", SavedControl(drawn_joins(new_control(toy_base)), HintSpec("canny")), toy_base)
    with pytest.raises(UserError, match="is a ControlNet; this recipe starts from a T2I-Adapter"):
        asked = {"body": "adapter", "start_from": str(tmp_path / "copy")}
        next(train_control(parse_recipe({**OWN, "control": asked}), tmp_path / "run", toy_base))


# --- an unlocked base ---------------------------------------------------------------------------------------

UNLOCKED = {"control": {"body": "copy"}, "unfreeze_after": 2, "steps": 5}


@pytest.fixture(scope="module")
def unlocked(toy_base, tmp_path_factory):
    out = tmp_path_factory.mktemp("unlocked") / "run"
    return out, trained(parse_recipe({**OWN, **UNLOCKED}), out, toy_base)


def test_until_it_is_unlocked_the_base_is_locked_and_the_callers_stays_so(unlocked, toy_base, tmp_path):
    before = {name: value.clone() for name, value in toy_base.unet.state_dict().items()}
    plain = [r.loss for r in train_control(parse_recipe({**OWN, "steps": 5}), tmp_path / "plain", toy_base)]
    assert unlocked[1][:3] == plain[:3] and unlocked[1][3:] != plain[3:]  # the third step's loss is before it learns
    assert all(torch.equal(value, before[name]) for name, value in toy_base.unet.state_dict().items())
    assert not any(p.requires_grad for p in toy_base.unet.parameters())


def test_the_base_and_its_difference_are_the_base_that_learnt(unlocked, toy_base, toy_folder):
    folder = unlocked[0] / "control"
    state = load_file(unlocked[0] / "checkpoints" / "step-0000005" / "state.safetensors")
    merged = load_base(toy_folder, loras=[(folder / DIFFERENCE, 1.0)])
    moved = 0
    for name, value in merged.unet.state_dict().items():
        assert torch.allclose(value, state[f"learning.unet.{name}"], atol=1e-6)
        moved += not torch.equal(value, toy_base.unet.state_dict()[name])
    assert moved > 0.9 * len(merged.unet.state_dict())
    half = load_base(toy_folder, loras=[(folder / DIFFERENCE, 0.5)]).unet.conv_in.weight
    own = toy_base.unet.conv_in.weight
    assert torch.allclose(half - own, (merged.unet.conv_in.weight - own) / 2, atol=1e-6)
    assert load_control(folder, toy_base).trained["base_difference"] == DIFFERENCE


def test_a_run_with_an_unlocked_base_goes_on_as_if_it_had_never_stopped(unlocked, toy_base, tmp_path):
    recipe = parse_recipe({**OWN, **UNLOCKED})
    for _ in itertools.islice(train_control(recipe, tmp_path, toy_base), 5):
        pass
    shutil.rmtree(tmp_path / "checkpoints" / "step-0000005", ignore_errors=True)
    assert (tmp_path / "checkpoints" / "step-0000004").is_dir()
    list(train_control(recipe, tmp_path, toy_base))
    for name in (f"control/{WEIGHTS}", f"control/{DIFFERENCE}"):
        ours, whole = load_file(tmp_path / name), load_file(unlocked[0] / name)
        assert ours.keys() == whole.keys() and all(torch.equal(ours[key], whole[key]) for key in ours)


def test_what_an_unlocked_base_is_measured_against_is_the_base_as_it_was(toy_base, tmp_path):
    """After an interruption the pictures without control are made anew, when the base has learnt."""
    recipe = parse_recipe({**OWN, **UNLOCKED, "evaluation": {"every": 1, "num": 2, "steps": 1}})
    whole = [record.figures() for record in train_control(recipe, tmp_path / "whole", toy_base)]
    assert all(figures["colour_drift/red"] for figures in whole[3:])
    list(itertools.islice(train_control(recipe, tmp_path / "run", toy_base), 5))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-0000005", ignore_errors=True)
    assert [record.figures() for record in train_control(recipe, tmp_path / "run", toy_base)] == whole[4:]


def test_a_difference_to_another_base_is_refused(unlocked, request, tmp_path):
    deep = request.getfixturevalue("deep_base")
    with pytest.raises(UserError, match="no difference to the base"):
        _add_difference(deep, unlocked[0] / "control" / DIFFERENCE, 1.0, None)


def test_averages_and_an_unlocked_base_do_not_go_together():
    with pytest.raises(UserError, match="ema averages"):
        parse_recipe({**OWN, "unfreeze_after": 2, "ema": 0.9})


@pytest.mark.slow  # a minute or two each
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("body", get_args(ControlRecipe.model_fields["body"].annotation))
def test_each_body_learns_the_circles(body, tmp_path):
    recipe = read_recipe(Path(__file__).parents[2] / "recipes" / "bodies.yaml", [f"control.body={body}"])
    last = list(train_control(recipe, tmp_path / "run"))[-1]
    print(f"{body}: step {last.step}, obedience {last.evaluation.obedience}")
    assert last.step < recipe.steps and last.evaluation.obedience.low >= 0.5
