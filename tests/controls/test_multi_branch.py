"""Several hints as branches that are trained together (``control.hints_as: branches``)."""

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file

from conftest import draw_inputs, make
from controlkit.annotators import annotate, contract, joined
from controlkit.backbones import ActiveControl
from controlkit.controls import MultiBranch, new_control
from controlkit.data import CirclePairs
from controlkit.errors import UserError
from controlkit.formats import WEIGHTS, SavedControl, load_control
from controlkit.images import write_png
from controlkit.train import hint_specs, train_control
from controlkit.train.recipe import parse_recipe
from controlkit.train.setup import new_branch

BOTH = ["canny", "scribble"]
BRANCHES = {"annotators": BOTH, "hints_as": "branches"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A plain folder of pictures: annotators make both hints."""
    folder = tmp_path_factory.mktemp("photos")
    for i, pair in enumerate(CirclePairs(32, 24)):
        write_png(folder / f"circle {'abcdefghijklmnopqrstuvwxyz'[i]}.png", pair.picture)
    return folder


def recipe_of(photos, control=BRANCHES, **changes):
    plain = {
        "data": {"source": str(photos)},
        "steps": 4,
        "batch": 2,
        "lr": 1e-3,
        "precision": "fp32",  # a fixture of the module runs before the tests' own float32 is set
        "checkpoint_every": 2,
        "evaluation": {"every": 4, "num": 2, "steps": 1},
    }
    return parse_recipe({**plain, "control": control, **changes})


def files_of(out, folder="control"):
    return {name: load_file(out / folder / name / WEIGHTS) for name in BOTH}


@pytest.fixture
def two(toy_base, drawn_joins):
    """Two branches as one, with joins that say something."""
    return MultiBranch({name: drawn_joins(new_control(toy_base), seed) for seed, name in enumerate(BOTH)})


@torch.no_grad()
def test_as_one_they_say_what_they_say_composed(toy_base, two):
    x, t, text, hint = draw_inputs(toy_base, hint_channels=6)
    as_one = toy_base.predict(x, t, text, [ActiveControl(two, two.encode_hint(hint))])
    apart = zip(two.parts().values(), hint.split(3, 1), strict=True)
    composed = toy_base.predict(x, t, text, [ActiveControl(branch, branch.encode_hint(own)) for branch, own in apart])
    assert torch.equal(as_one, composed)
    assert not torch.equal(as_one, toy_base.predict(x, t, text)), "they say something"


@torch.no_grad()
def test_each_reads_its_own_channels_alone(toy_base, two):
    *_, hint = draw_inputs(toy_base, hint_channels=6)
    other = torch.cat([hint[:, :3], 1 - hint[:, 3:]], 1)
    before, after = two.encode_hint(hint), two.encode_hint(other)
    assert torch.equal(before["canny"], after["canny"]) and not torch.equal(before["scribble"], after["scribble"])


@pytest.fixture(scope="module")
def trained(photos, toy_base, tmp_path_factory):
    """A run on two hints, and its records."""
    out = tmp_path_factory.mktemp("two") / "run"
    return out, list(train_control(recipe_of(photos), out, toy_base))


def test_each_becomes_a_control_by_itself_that_stock_diffusers_reads(trained, photos, toy_base):
    out, records = trained
    born = new_branch(recipe_of(photos).control, hint_specs(recipe_of(photos).control), toy_base).parts()
    for name in BOTH:
        saved = load_control(out / "control" / name, toy_base)
        assert saved.hint == contract(name), "what its own hints are, not what both are"
        ControlNetModel.from_pretrained(out / "control" / name)
        for part, weights in saved.branch.named_parameters():
            assert part not in ("joins.middle.weight", "hint_encoder.convs.0.weight") or not torch.equal(
                weights, born[name].get_parameter(part)
            ), f"{name} did not learn {part}"
    assert records[-1].evaluation and records[-1].relative and records[-1].residuals
    with pytest.raises(UserError, match=r"holds several controls.*run/control/canny"):
        load_control(out, toy_base)


def test_composed_in_use_they_make_what_was_measured(trained, toy_base):
    out, _ = trained
    saved = [load_control(out / "control" / name, toy_base) for name in BOTH]
    pair = CirclePairs(toy_base.size, 1, first=30)[0]
    hints = [annotate(pair.picture, one.hint) for one in saved]
    settings = {"prompt": pair.prompt, "seed": 3, "steps": 2}
    as_one = SavedControl(MultiBranch({one.hint.annotator: one.branch for one in saved}), joined(BOTH))
    measured = make(toy_base, [as_one], [np.concatenate(hints, 2)], **settings)
    used = make(toy_base, saved, hints, **settings)
    assert torch.equal(measured.latents, used.latents)
    plain = make(toy_base, **settings)
    assert not torch.equal(measured.latents, plain.latents)


def test_a_run_stopped_and_gone_on_with_ends_as_the_whole_one(trained, photos, toy_base, tmp_path):
    out, records = trained
    run = train_control(recipe_of(photos), tmp_path / "run", toy_base)
    for _ in range(3):  # past the checkpoint of step 2
        next(run)
    run.close()
    [kept] = (tmp_path / "run" / "checkpoints").iterdir()
    assert files_of(kept).keys() == {*BOTH}
    rest = list(train_control(recipe_of(photos), tmp_path / "run", toy_base))
    assert [record.step for record in rest] == [3, 4]
    assert [record.loss for record in rest] == [record.loss for record in records[2:]]
    for name, whole in files_of(out).items():
        again = files_of(tmp_path / "run")[name]
        assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)


def test_both_can_start_from_a_folder_of_both(trained, photos, toy_base, tmp_path):
    out, _ = trained
    recipe = recipe_of(photos, BRANCHES | {"start_from": str(out / "control")})
    begun = new_branch(recipe.control, hint_specs(recipe.control), toy_base).parts()
    for name in BOTH:
        before = load_control(out / "control" / name, toy_base).branch.state_dict()
        assert all(torch.equal(before[key], value) for key, value in begun[name].state_dict().items())
    nowhere = recipe_of(photos, BRANCHES | {"start_from": str(tmp_path)})
    with pytest.raises(UserError, match=r'There is no control ".*/canny"'):
        new_branch(nowhere.control, hint_specs(nowhere.control), toy_base)


def test_bodies_of_low_rank_are_saved_as_what_they_are_and_an_unlocked_base_once(photos, toy_base, tmp_path):
    low = BRANCHES | {"body": "lora", "rank": 2}
    list(train_control(recipe_of(photos, low, unfreeze_after=1, evaluation={"every": 0}), tmp_path / "run", toy_base))
    found = {
        str(path.relative_to(tmp_path / "run" / "control")) for path in tmp_path.glob("run/control/**/*.safetensors")
    }
    each = {f"{name}/{file}" for name in BOTH for file in (WEIGHTS, "control-lora.safetensors")}
    assert found == each | {"base-difference.safetensors"}
    assert (
        load_control(tmp_path / "run/control/canny", toy_base).trained["base_difference"]
        == "../base-difference.safetensors"
    )


@pytest.mark.parametrize(
    ("control", "words"),
    [
        ({"annotators": ["canny"]}, "names two or more"),
        ({"annotators": ["canny", "canny"]}, "names two or more"),
        ({"annotator": "canny"}, "names two or more"),
        ({"annotators": ["canny", "../depth"]}, "cannot be the name of a branch's folder"),
        ({"annotators": BOTH, "body": "adapter"}, "of body copy, conv or lora, and not adapter"),
        ({"annotators": BOTH, "channels": 6}, "leave out control.channels"),
    ],
)
def test_what_cannot_be_branches_is_refused(control, words):
    with pytest.raises(UserError, match=words):
        recipe_of("photos", {"hints_as": "branches", **control})


def test_of_lite_bodies_too(photos, toy_base, tmp_path):
    list(train_control(recipe_of(photos, BRANCHES | {"body": "conv"}, steps=1), tmp_path / "run", toy_base))
    assert load_control(tmp_path / "run/control/scribble", toy_base).branch.spec.body == "conv"
