"""A control on disk comes back as it was, serves stock diffusers, fits its own base only, and is whole or absent."""

import json
import os
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import draw_inputs, make, relative, stock_inputs
from controlkit.branch import ControlSpec
from controlkit.controls import new_control
from controlkit.errors import UserError
from controlkit.formats import WEIGHTS, SavedControl, convert, load_control, save_control
from controlkit.images import HintSpec
from controlkit.sample import ControlRequest, PreparedControl

SPECS = [ControlSpec(*words) for words in product(("copy", "conv"), ("zero", "gaussian"), ("all", "mid"))]
FACTS = {"base": "toy", "step": 300, "data": "emoji", "recipe": {"lr": 1e-5, "steps": 300}}


@pytest.fixture
def control(toy_base, drawn_joins):
    return SavedControl(drawn_joins(new_control(toy_base)), HintSpec("canny", {"low": 100.0, "high": 200.0}), FACTS)


@pytest.fixture
def saved(tmp_path, control, toy_base):
    save_control(tmp_path / "edges", control, toy_base)
    return tmp_path / "edges"


def metadata_of(folder):
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return file.metadata()


def rewrite(folder, change_tensors=lambda tensors: None, **metadata):
    """The same file with some tensors or metadata changed."""
    tensors = load_file(folder / WEIGHTS)
    change_tensors(tensors)
    save_file(tensors, folder / WEIGHTS, metadata_of(folder) | metadata)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the round trip -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.body}-{spec.join}-{spec.taps}")
def test_a_control_comes_back_bit_for_bit(toy_base, drawn_joins, tmp_path, spec):
    hint = HintSpec("scribble", {"width": 0.05}, channels=1, low=-1.0, colour_order="BGR", resize="nearest")
    branch = drawn_joins(new_control(toy_base, spec, hint_channels=1))
    save_control(tmp_path / "control", SavedControl(branch, hint, FACTS), toy_base)
    back = load_control(tmp_path / "control", toy_base)
    assert (back.branch.spec, back.hint, back.trained) == (spec, hint, FACTS)
    before, after = branch.state_dict(), back.branch.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not back.branch.training and not any(p.requires_grad for p in back.branch.parameters())


def test_half_precision_is_what_the_file_holds_and_the_branch_computes_in_single(control, toy_base, tmp_path):
    save_control(tmp_path / "half", control, toy_base, torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "half" / WEIGHTS).values()} == {torch.float16}
    back = load_control(tmp_path / "half", toy_base).branch.state_dict()
    for name, value in control.branch.state_dict().items():
        assert torch.equal(back[name], value.half().float())


def test_a_runs_folder_stands_for_the_control_in_it(control, toy_base, tmp_path):
    save_control(tmp_path / "run" / "control", control, toy_base)
    assert load_control(tmp_path / "run", toy_base).trained == FACTS


# --- the hint's contract ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{}, {"low": -1.0}, {"high": 0.5}, {"channels": 1}, {"colour_order": "BGR"}, {"resize": "nearest"}],
    ids=str,
)
def test_generation_reads_hints_as_the_saved_contract_says(toy_base, tmp_path, change):
    contract = replace(HintSpec("canny"), **change)
    branch = new_control(toy_base, hint_channels=contract.channels)
    save_control(tmp_path / "control", SavedControl(branch, contract), toy_base)
    assert HintSpec.from_json(metadata_of(tmp_path / "control")["controlkit.hint"]) == contract
    back = load_control(tmp_path / "control", toy_base)
    read = []
    back.branch.hint_encoder.register_forward_hook(lambda module, args, out: read.append(args[0]))
    picture = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    make(toy_base, [back], [picture], prompt="", steps=1)
    assert torch.equal(read[0], contract.tensor(picture, (32, 32)))
    assert change == {} or not torch.equal(read[0], HintSpec("canny").tensor(picture, (32, 32)))


@pytest.mark.parametrize("counted", [1.0, 2.5])
def test_a_control_says_how_often_guidance_should_count_its_hint(toy_base, tmp_path, counted):
    saved = SavedControl(new_control(toy_base), HintSpec("canny"), hint_cfg_scale=counted)
    save_control(tmp_path / "control", saved, toy_base)
    back = load_control(tmp_path / "control", toy_base)
    used, other = (PreparedControl.of(back, ControlRequest(name="x", hint_cfg_scale=k), {}) for k in (None, 1.5))
    assert back.hint_cfg_scale == used.hint_cfg_scale == counted and other.hint_cfg_scale == 1.5
    convert(tmp_path / "control", tmp_path / "other.safetensors", "cldm")
    assert load_control(tmp_path / "other.safetensors", toy_base).hint_cfg_scale == counted


@pytest.mark.parametrize("text", ["NaN", "-1", "1e999", '"much"', "null"])
def test_a_count_that_is_none_is_refused(toy_base, tmp_path, text):
    save_control(tmp_path, SavedControl(new_control(toy_base), HintSpec("canny"), hint_cfg_scale=2.0), toy_base)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = {**file.metadata(), "controlkit.use": f'{{"guidance": {text}}}'}
    save_file(tensors, tmp_path / WEIGHTS, facts)
    with pytest.raises(UserError, match=r"controlkit\.use.*cannot be read"):
        load_control(tmp_path, toy_base)


# --- stock diffusers ----------------------------------------------------------------------------------------


def test_the_folder_is_a_diffusers_controlnet(saved, control):
    stock, report = ControlNetModel.from_pretrained(saved, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    count = sum(p.numel() for p in control.branch.parameters())
    assert sum(p.numel() for p in stock.parameters()) == count


def test_joins_that_the_branch_lacks_are_zeros_for_diffusers(toy_base, drawn_joins, to_diffusers):
    branch = drawn_joins(new_control(toy_base, ControlSpec(taps="mid")))
    stock = to_diffusers(branch)
    assert len(stock.controlnet_down_blocks) == len(toy_base.branch_taps) - 1
    assert not any(p.any() for p in stock.controlnet_down_blocks.parameters())
    assert torch.equal(stock.controlnet_mid_block.weight, branch.joins["middle"].weight)


def test_diffusers_swaps_the_colours_where_the_contract_does(toy_base, tmp_path):
    for order in ("RGB", "BGR"):
        save_control(tmp_path / order, SavedControl(new_control(toy_base), HintSpec("x", colour_order=order)), toy_base)
        stock = ControlNetModel.from_pretrained(tmp_path / order)
        assert stock.config.controlnet_conditioning_channel_order.upper() == order


def test_a_controlnet_that_diffusers_wrote_loads_here(toy_base, tmp_path):
    torch.manual_seed(0)
    stock = ControlNetModel.from_unet(toy_base.unet, conditioning_embedding_out_channels=(16, 32, 96)).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    stock.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="does not say what its hints are"):
        back = load_control(tmp_path / "theirs", toy_base)
    assert (back.branch.spec, back.hint, back.trained) == (ControlSpec(), HintSpec(""), {})
    *inputs, hint = draw_inputs(toy_base)
    ours = back.branch(*inputs, back.branch.encode_hint(hint))
    with torch.no_grad():
        down, middle = stock(*stock_inputs(inputs)[0], hint, return_dict=False)
    for tap, residual in zip(toy_base.branch_taps, [*down, middle], strict=True):
        assert relative(ours[tap.name], residual) <= 1e-5


# --- what does not fit --------------------------------------------------------------------------------------


def test_a_control_of_another_base_is_refused_naming_both(saved, deep_base):
    with pytest.raises(UserError, match=r'".*edges" was made for the base "toy" .* "deep": they differ in taps'):
        load_control(saved, deep_base)


@pytest.mark.parametrize(("maker", "user"), [("toy_base", "deep_base"), ("deep_base", "toy_base")])
def test_a_stock_controlnet_of_another_base_is_refused(maker, user, tmp_path, request):
    unet = request.getfixturevalue(maker).unet
    ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 96)).save_pretrained(tmp_path / "x")
    with pytest.raises(UserError, match="does not fit the base"):
        load_control(tmp_path / "x", request.getfixturevalue(user))


def drop_join(tensors):
    del tensors["controlnet_mid_block.weight"]


def widen_join(tensors):
    tensors["controlnet_mid_block.weight"] = torch.zeros(40, 40, 1, 1)


def add_join(tensors):
    tensors["controlnet_down_blocks.6.weight"] = torch.zeros(32, 32, 1, 1)


def cut(share):
    def damage(folder):
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[: int(len(data) * share)])

    return damage


DAMAGES = {
    "cut in half": (cut(0.5), "cannot be read .*: expected a whole safetensors file"),
    "cut in its header": (cut(0.001), "cannot be read .*: expected a whole safetensors file"),
    "empty": (cut(0), "cannot be read .*: expected a whole safetensors file"),
    "without a tensor": (
        lambda f: rewrite(f, drop_join),
        "damaged or cut.* lacks 1 tensor, first controlnet_mid_block",
    ),
    "with a wide tensor": (lambda f: rewrite(f, widen_join), r"controlnet_mid_block.weight is \(40, 40, 1, 1\)"),
    "with a tensor too many": (lambda f: rewrite(f, add_join), "controlnet_down_blocks.6.weight"),
    "with a torn contract": (lambda f: rewrite(f, **{"controlkit.hint": '{"annotator": '}), "controlkit.hint"),
    "with a strange contract": (lambda f: rewrite(f, **{"controlkit.hint": '{"tone": 1}'}), "controlkit.hint"),
    "with a strange body": (lambda f: rewrite(f, **{"controlkit.spec": '{"body": "lora"}'}), "lora"),
}


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_control_is_refused_with_a_reason(saved, toy_base, damage, sentence):
    damage(saved)
    with pytest.raises(UserError, match=sentence) as refused:
        load_control(saved, toy_base)
    assert str(saved) in str(refused.value)


def test_a_name_that_is_nowhere_is_refused_with_what_was_expected(toy_base, tmp_path):
    with pytest.raises(UserError, match=f'There is no control "{tmp_path}": expected .* a folder that holds {WEIGHTS}'):
        load_control(tmp_path, toy_base)


# --- whole or absent ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("was_there", [True, False])
def test_a_write_that_fails_at_any_point_leaves_what_was_there(
    control, toy_base, tmp_path, monkeypatch, call, was_there
):
    folder = tmp_path / "edges"
    if was_there:
        save_control(folder, replace(control, trained={"step": 1}), toy_base)
    before = contents(tmp_path)
    works, failed = getattr(os, call), 0
    while True:
        count = 0

        def fails_once(*args, at=failed):
            nonlocal count
            count += 1
            if count == at + 1:
                raise OSError(28, "No space left on device")
            return works(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fails_once)
            try:
                save_control(folder, control, toy_base)
                break
            except OSError:
                failed += 1
        assert contents(tmp_path) == before
        assert [path.name for path in tmp_path.iterdir()] == ["edges"] * was_there
    assert failed >= 2
    assert json.loads(metadata_of(folder)["controlkit.trained"]) == FACTS
    assert [path.name for path in tmp_path.iterdir()] == ["edges"]
