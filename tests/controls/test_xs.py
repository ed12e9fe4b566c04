"""ControlNet-XS walks beside the base's encoder as diffusers' fused network does, and is a control like any other."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import ControlNetXSAdapter, DDIMScheduler, StableDiffusionXLControlNetXSPipeline, UNetControlNetXSModel

from conftest import draw_inputs, make, relative, stock_inputs
from controlkit.backbones import ActiveControl, recomputed
from controlkit.branch import ControlSpec
from controlkit.controls import XSBranch, new_control
from controlkit.controls.xs import xs_network, xs_settings
from controlkit.errors import UserError
from controlkit.formats import WEIGHTS, SavedControl, WriteOptions, convert, describe, load_control, save_control
from controlkit.formats.weights import Weights, labelled
from controlkit.images import HintSpec
from controlkit.train.recipe import parse_recipe

XS = ControlSpec(body="xs")
CONTRACT = HintSpec("canny")
STOCK = ["deep_base", "sd2_base", "xl_base"]  # two layers a level and four channels of latents, all diffusers knows
BASES = ["toy_base", *STOCK]


@pytest.fixture(params=BASES)
def base(request):
    return request.getfixturevalue(request.param)


@torch.no_grad()
def drawn(branch, base, seed=0):
    """A branch whose zero convolutions are drawn: what it says has a spread of 0.2 to 0.8 of the feature it meets."""
    generator = torch.Generator().manual_seed(seed)
    *inputs, hint = draw_inputs(base)
    encoded = base.encode_noise(*inputs)
    spreads = [float(feature.std()) for feature in (*encoded.skips, encoded.middle)]
    network = branch.network
    downs = [conv for block in network.down_blocks for conv in block.ctrl_to_base]
    ups = [conv for block in network.up_connections for conv in block.ctrl_to_base]
    reads = [conv for block in network.down_blocks for conv in block.base_to_ctrl] + [network.mid_block.base_to_ctrl]
    wanted = dict(
        zip([network.control_to_base_for_conv_in, *downs, network.mid_block.ctrl_to_base], spreads, strict=True)
    )
    wanted |= dict(zip(reversed(ups), spreads[:-1], strict=True))
    wanted |= dict.fromkeys([*reads, network.controlnet_cond_embedding.conv_out], 1.0)

    def rescaled(conv, args, out):
        spread = (0.2 + 0.6 * torch.rand((), generator=generator)) * wanted[conv]
        for parameter in conv.parameters():
            parameter.mul_(spread / out.std())
        return conv._conv_forward(args[0], conv.weight, conv.bias)

    for conv in wanted:
        assert not any(parameter.any() for parameter in conv.parameters()), "born zero"
        for parameter in conv.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hooks = [conv.register_forward_hook(rescaled) for conv in wanted]
    predict(base, branch, (*inputs, hint))
    for hook in hooks:
        hook.remove()
    return branch.eval()


def predict(base, branch, inputs, strength=None):
    x, t, text, hint = inputs
    return base.predict(x, t, text, [ActiveControl(branch, branch.encode_hint(hint), strength)])


def fused(base, network):
    """diffusers' own fusion of base and adapter, with the base's normalisation: it builds the base's blocks with
    another epsilon than the base has."""
    peer = UNetControlNetXSModel.from_unet(base.unet, network).eval()
    blocks = [*(block.base_resnets for block in peer.down_blocks), peer.mid_block.base_midblock.resnets]
    for resnet in (resnet for resnets in (*blocks, *(b.resnets for b in peer.up_blocks)) for resnet in resnets):
        resnet.norm1.eps = resnet.norm2.eps = base.unet.config.norm_eps
    return peer


# --- against diffusers --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.6])
@pytest.mark.parametrize("base", STOCK, indirect=True)
def test_the_prediction_is_that_of_diffusers_fused_network(base, scale):
    branch = drawn(new_control(base, XS), base)
    inputs = draw_inputs(base, seed=2)
    ours = predict(base, branch, inputs, {tap.name: scale for tap in base.branch_taps})
    rows, more = stock_inputs(inputs)
    theirs = fused(base, branch.network)(*rows, inputs[3], scale, **more).sample
    assert relative(ours, theirs) <= 1e-5
    assert relative(ours, base.predict(*inputs[:3])) > 0.1


@torch.no_grad()
def test_a_time_embedding_of_its_own_is_mixed_in_as_diffusers_does(xl_base):
    config = xs_settings(xl_base.unet.config, xl_base.stride) | {
        "learn_time_embedding": True,
        "time_embedding_mix": 0.95,
    }
    branch = drawn(XSBranch(xs_network(config), xl_base.branch_taps), xl_base)
    inputs = draw_inputs(xl_base)
    rows, more = stock_inputs(inputs)
    theirs = fused(xl_base, branch.network)(*rows, inputs[3], 0.6, **more).sample
    scale = {tap.name: 0.6 for tap in xl_base.branch_taps}
    assert relative(predict(xl_base, branch, inputs, scale), theirs) <= 1e-5
    silent = {tap.name: torch.zeros(2, 1, 1, 1) for tap in xl_base.branch_taps}
    assert torch.equal(predict(xl_base, branch, inputs, silent), xl_base.predict(*inputs[:3]))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_a_whole_run_on_sdxl_is_the_stock_pipeline_s(xl_base):
    branch = drawn(new_control(xl_base, XS), xl_base)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    settings = {"prompt": "a red apple, 3d style", "seed": 5, "steps": 6, "guidance": 4.0, "size": (64, 64)}
    ours = make(xl_base, [SavedControl(branch, CONTRACT)], [picture], [{"scale": 0.7}], **settings)
    plain = make(xl_base, **settings)
    towers, unet = xl_base.towers, fused(xl_base, branch.network)
    pipeline = StableDiffusionXLControlNetXSPipeline(
        vae=xl_base.vae,
        text_encoder=towers[0].encoder,
        text_encoder_2=towers[1].encoder,
        tokenizer=towers[0].tokenizer,
        tokenizer_2=towers[1].tokenizer,
        unet=unet,
        controlnet=branch.network,
        scheduler=DDIMScheduler.from_config(xl_base.scheduler.config),
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        settings["prompt"],
        image=CONTRACT.tensor(picture, (64, 64)),
        height=64,
        width=64,
        num_inference_steps=6,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        controlnet_conditioning_scale=0.7,
        output_type="latent",
    ).images[0]
    assert relative(ours.latents, theirs) <= 1e-4
    assert relative(ours.latents, plain.latents) > 0.05


@pytest.mark.parametrize("base", STOCK, indirect=True)
def test_its_network_is_the_one_that_diffusers_makes_for_the_base(base):
    ours = new_control(base, XS, size_ratio=0.5).network
    hint_widths = ours.config["conditioning_embedding_out_channels"]
    stock = ControlNetXSAdapter.from_unet(base.unet, 0.5, conditioning_embedding_out_channels=hint_widths)
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in stock.state_dict().items()}
    assert plain_values(ours.config) == plain_values(stock.config)


def plain_values(config):
    """A configuration's public settings, tuples as lists."""
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in public.items()}


# --- as a branch --------------------------------------------------------------------------------------------


def test_a_fresh_one_is_silent(base):
    branch = new_control(base, XS)
    inputs = draw_inputs(base)
    assert isinstance(branch, XSBranch) and branch.taps == base.branch_taps
    with torch.no_grad():
        assert torch.equal(predict(base, branch, inputs), base.predict(*inputs[:3]))
        assert relative(predict(base, drawn(branch, base), inputs), base.predict(*inputs[:3])) > 0.1


@pytest.mark.parametrize("base", ["toy_base", "xl_base"], indirect=True)
def test_gradients_reach_all_of_it_and_nothing_of_the_base(base):
    branch = drawn(new_control(base, XS), base).train()
    held = {id(p) for p in base.unet.parameters()}
    assert not held & {id(p) for p in branch.parameters()}
    inputs = draw_inputs(base)
    predict(base, branch, inputs).square().mean().backward()
    for name, parameter in branch.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert all(p.grad is None for p in base.unet.parameters())
    kept = [parameter.grad.clone() for parameter in branch.parameters()]
    branch.zero_grad()
    passes = []
    counter = base.unet.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *called: passes.append(1))
    with recomputed(branch, base.unet):
        predict(base, branch, inputs).square().mean().backward()
    counter.remove()
    assert len(passes) == 2, "computed anew in the backward pass"
    assert relative([p.grad for p in branch.parameters()], kept) < 1e-5


@torch.no_grad()
def test_strength_holds_for_its_row_and_place_and_a_map_of_one_number_is_that_number(toy_base):
    branch, inputs = drawn(new_control(toy_base, XS), toy_base), draw_inputs(toy_base)
    plain, full = toy_base.predict(*inputs[:3]), predict(toy_base, branch, inputs)
    taps = [tap.name for tap in toy_base.branch_taps]
    rows = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    one = predict(toy_base, branch, inputs, dict.fromkeys(taps, rows))
    assert torch.equal(one[0], plain[0]) and relative(one[1], full[1]) < 1e-6
    everywhere = predict(toy_base, branch, inputs, dict.fromkeys(taps, torch.full((2, 1, 32, 32), 0.7)))
    assert relative(everywhere, predict(toy_base, branch, inputs, dict.fromkeys(taps, 0.7))) < 1e-6
    alone = [predict(toy_base, branch, inputs, dict.fromkeys(taps, 0.0) | {tap: 1.0}) for tap in taps]
    assert min(relative(a, b) for i, a in enumerate([plain, *alone]) for b in [plain, *alone][:i]) > 1e-4


@torch.no_grad()
def test_it_adds_up_with_a_controlnet_in_any_order(toy_base, drawn_joins):
    walker, copied = drawn(new_control(toy_base, XS), toy_base), drawn_joins(new_control(toy_base))
    x, t, text, hint = draw_inputs(toy_base)
    parts = [ActiveControl(branch, branch.encode_hint(hint)) for branch in (walker, copied)]
    both = toy_base.predict(x, t, text, parts)
    assert torch.equal(toy_base.predict(x, t, text, parts[::-1]), both)
    for part in parts:
        assert relative(both, toy_base.predict(x, t, text, [part])) > 0.05
    fresh = new_control(toy_base, XS)
    silent = [ActiveControl(fresh, fresh.encode_hint(hint)), parts[1]]
    assert torch.equal(toy_base.predict(x, t, text, silent), toy_base.predict(x, t, text, [parts[1]]))


def test_it_is_as_wide_as_asked_for_and_unless_asked_32_channels_or_half_of_a_small_base_s(toy_base):
    def widths(**asked):
        return new_control(toy_base, XS, **asked).config["block_out_channels"]

    assert widths() == [8, 16, 16] and widths(size_ratio=0.25) == [4, 8, 8]
    config = dict(toy_base.unet.config) | {"block_out_channels": (320, 640, 1280), "attention_head_dim": 8}
    assert xs_settings(config, 8)["block_out_channels"] == [32, 64, 128]
    with pytest.raises(UserError, match=re.escape("[0, 1, 1] channels for attention of [1, 1, 1] heads")):
        widths(size_ratio=0.05)


# --- on disk ------------------------------------------------------------------------------------------------


def saved(base, folder, branch=None):
    branch = branch or drawn(new_control(base, XS), base)
    save_control(folder, SavedControl(branch, CONTRACT, {"base": base.name, "step": 3}), base)
    return branch


def test_it_comes_back_bit_for_bit_and_says_what_it_is(base, tmp_path):
    branch = saved(base, tmp_path / "walker")
    back = load_control(tmp_path / "walker", base)
    assert (back.branch.spec, back.hint, back.trained["step"]) == (XS, CONTRACT, 3)
    before, after = branch.state_dict(), back.branch.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    inputs = draw_inputs(base)
    with torch.no_grad():
        assert relative(predict(base, back.branch, inputs), predict(base, branch, inputs)) <= 1e-6
    assert json.loads((tmp_path / "walker" / "config.json").read_text())["_class_name"] == "ControlNetXSAdapter"
    found = describe(tmp_path / "walker")
    assert (found.format, found.base, found.hint_channels, found.runs) == ("controlnet-xs", base.name, 3, True)
    assert found.sentence().startswith("A ControlNet-XS for ") and found.sentence().endswith("; runs.")


def test_other_tools_are_told_that_it_is_one_and_of_which_base():
    config = {"cross_attention_dim": 2048, "base_block_out_channels": [320, 640, 1280], "block_out_channels": [32] * 3}
    told = labelled(Weights("xs", {}, config), "diffusers", "edges")
    assert told["modelspec.architecture"] == "stable-diffusion-xl-v1-base/controlnet-xs"


@pytest.mark.parametrize("base", STOCK, indirect=True)
def test_stock_diffusers_loads_the_folder(base, tmp_path):
    branch = saved(base, tmp_path / "walker")
    stock, report = ControlNetXSAdapter.from_pretrained(tmp_path / "walker", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(t, branch.network.state_dict()[name]) for name, t in stock.state_dict().items())
    inputs = draw_inputs(base)
    rows, more = stock_inputs(inputs)
    with torch.no_grad():
        theirs = fused(base, stock.eval())(*rows, inputs[3], **more).sample
        assert relative(predict(base, branch, inputs), theirs) <= 1e-5


@pytest.mark.filterwarnings("ignore:.*does not say what its hints are")
def test_a_folder_that_diffusers_wrote_and_a_file_by_itself_load_here(xl_base, tmp_path):
    stock = ControlNetXSAdapter.from_unet(xl_base.unet, size_ratio=0.25, learn_time_embedding=True).eval()
    stock.save_pretrained(tmp_path / "theirs")
    back = load_control(tmp_path / "theirs", xl_base).branch
    said = plain_values(stock.config)
    assert all(said[key] == value for key, value in back.config.items() if key != "sample_size")
    assert all(torch.equal(t, back.network.state_dict()[name]) for name, t in stock.state_dict().items())
    branch = saved(xl_base, tmp_path / "walker")
    shutil.copy(tmp_path / "walker" / WEIGHTS, tmp_path / "alone.safetensors")
    alone = load_control(tmp_path / "alone.safetensors", xl_base).branch
    assert all(torch.equal(t, branch.state_dict()[name]) for name, t in alone.state_dict().items())


def test_what_it_cannot_be_is_refused(toy_base, deep_base, xl_base, tmp_path):
    saved(toy_base, tmp_path / "walker")
    with pytest.raises(UserError, match="A ControlNet-XS is another network and cannot be cldm"):
        convert(tmp_path / "walker", tmp_path / "x.safetensors", "cldm")
    with pytest.raises(UserError, match="holds no copy of its base"):
        convert(tmp_path / "walker", tmp_path / "x", "diffusers", base=toy_base, transfer_to=toy_base)
    with pytest.raises(UserError, match=r'was made for the base "toy" and not for "deep"'):
        load_control(tmp_path / "walker", deep_base)
    ControlNetXSAdapter.from_unet(deep_base.unet, size_ratio=0.5).save_pretrained(tmp_path / "theirs")
    with pytest.raises(
        UserError, match=r"does not fit the base \"toy\": its base_block_out_channels is \[8, 16, 16, 24\]"
    ):
        load_control(tmp_path / "theirs", toy_base)
    convert(tmp_path / "walker", tmp_path / "half", "diffusers", options=WriteOptions("fp16"))
    assert load_control(tmp_path / "half", toy_base).branch.spec == XS


@pytest.mark.parametrize(
    ("control", "words"),
    [
        ({"body": "xs", "taps": "mid"}, "control.taps is mid; with body xs, which joins every layer, only all"),
        ({"body": "xs", "join": "gaussian"}, "control.join is gaussian; with body xs"),
        ({"body": "copy", "size_ratio": 0.5}, "control.size_ratio is the width of body xs"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(control, words):
    with pytest.raises(UserError, match=words):
        parse_recipe({"control": control})


def test_a_base_of_three_layers_a_level_is_refused(toy_base):
    with pytest.raises(UserError, match="one or two layers a level; this one has 3"):
        xs_network(xs_settings(toy_base.unet.config, 4) | {"layers_per_block": 3})
