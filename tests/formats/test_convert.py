"""Every layout comes back as it was; what we write is what other programs read; and the original's two tools."""

import copy
import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, ControlNetUnionModel, T2IAdapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import draw_inputs, relative, stock_inputs
from controlkit.annotators import contract
from controlkit.backbones import UNetBase
from controlkit.backbones.unet_families import FAMILIES, unet_config
from controlkit.branch import ControlSpec
from controlkit.controls import new_control
from controlkit.errors import Mismatch, UserError
from controlkit.formats import (
    WEIGHTS,
    SavedControl,
    WriteOptions,
    attach,
    convert,
    describe,
    load_control,
    save_control,
)
from controlkit.formats.names import EncoderShape, controlnet_paths, rename
from controlkit.formats.shapes import expected_shapes
from controlkit.formats.weights import encoder_tensors, low_rank, product, read_weights
from controlkit.images import HintSpec

HINT = HintSpec("canny", {"low": 100.0, "high": 200.0}, resize="lines")
BASES = ["deep_base", "sd2_base", "xl_base"]


@pytest.fixture(params=BASES)
def base(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def saved(base, drawn_joins, tmp_path):
    """A control of the base with drawn joins and a trained body, as a diffusers folder."""
    branch = drawn_joins(new_control(base), base=base)
    torch.manual_seed(8)
    with torch.no_grad():
        for parameter in branch.body.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    save_control(tmp_path / "edges", SavedControl(branch.eval(), HINT, {"base": base.name}), base)
    return tmp_path / "edges"


def tensors_of(path):
    return load_file(path / WEIGHTS if path.is_dir() else path)


def metadata_of(path):
    with safe_open(path / WEIGHTS if path.is_dir() else path, framework="pt") as file:
        return file.metadata()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def residuals(branch, base):
    *inputs, hint = draw_inputs(base)
    with torch.no_grad():
        made = branch(*inputs, branch.encode_hint(hint))
    return [made[tap.name] for tap in base.branch_taps]


# --- the original layout ------------------------------------------------------------------------------------


def original_layout(channels, transformers, text_width, linear, pooled):
    """Names and shapes of a ControlNet as its own code lays them out (openaimodel.py and cldm.py, followed by hand)."""
    found = {}

    def put(name, *shape, bias=True):
        found[f"{name}.weight"] = shape
        if bias:
            found[f"{name}.bias"] = shape[:1]

    def resnet(at, before, after):
        put(f"{at}.in_layers.0", before)
        put(f"{at}.in_layers.2", after, before, 3, 3)
        put(f"{at}.emb_layers.1", after, time)
        put(f"{at}.out_layers.0", after)
        put(f"{at}.out_layers.3", after, after, 3, 3)
        if before != after:
            put(f"{at}.skip_connection", after, before, 1, 1)

    def transformer(at, width, depth):
        kernel = () if linear else (1, 1)
        put(f"{at}.norm", width)
        put(f"{at}.proj_in", width, width, *kernel)
        for i in range(depth):
            block = f"{at}.transformer_blocks.{i}"
            for name, read in (("attn1", width), ("attn2", text_width)):
                put(f"{block}.{name}.to_q", width, width, bias=False)
                put(f"{block}.{name}.to_k", width, read, bias=False)
                put(f"{block}.{name}.to_v", width, read, bias=False)
                put(f"{block}.{name}.to_out.0", width, width)
            put(f"{block}.ff.net.0.proj", 8 * width, width)
            put(f"{block}.ff.net.2", width, 4 * width)
            for i_norm in (1, 2, 3):
                put(f"{block}.norm{i_norm}", width)
        put(f"{at}.proj_out", width, width, *kernel)

    first, time = channels[0], 4 * channels[0]
    put("time_embed.0", time, first)
    put("time_embed.2", time, time)
    if pooled:
        put("label_emb.0.0", time, pooled)
        put("label_emb.0.2", time, time)
    put("input_blocks.0.0", first, 4, 3, 3)
    put("zero_convs.0.0", first, first, 1, 1)
    widths = [3, 16, 16, 32, 32, 96, 96, 256, first]
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        put(f"input_hint_block.{2 * i}", after, before, 3, 3)
    at, before = 1, first
    for level, (after, depth) in enumerate(zip(channels, transformers, strict=True)):
        for _ in range(2):
            resnet(f"input_blocks.{at}.0", before, after)
            if depth:
                transformer(f"input_blocks.{at}.1", after, depth)
            put(f"zero_convs.{at}.0", after, after, 1, 1)
            at, before = at + 1, after
        if level < len(channels) - 1:
            put(f"input_blocks.{at}.0.op", after, after, 3, 3)
            put(f"zero_convs.{at}.0", after, after, 1, 1)
            at += 1
    resnet("middle_block.0", before, before)
    transformer("middle_block.1", before, max(transformers[-1], 1))
    resnet("middle_block.2", before, before)
    put("middle_block_out.0", before, before, 1, 1)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_of_the_original_layout_is_there_by_name_and_shape(name):
    row = FAMILIES[name]
    added = unet_config(row).get("projection_class_embeddings_input_dim", 0)
    original = original_layout(row.channels, row.transformers, row.text_width, row.linear_projection, added)
    diffusers = expected_shapes("controlnet", controlnet_config(row))
    table = rename(diffusers, controlnet_paths(EncoderShape.of_diffusers(diffusers)))
    assert {table[key]: shape for key, shape in diffusers.items()} == original
    back = rename(original, controlnet_paths(EncoderShape.of_cldm(original)), back=True)
    assert back == {value: key for key, value in table.items()}


def controlnet_config(row):
    config = {
        key: v for key, v in unet_config(row).items() if key not in ("sample_size", "out_channels", "up_block_types")
    }
    return config | {"conditioning_embedding_out_channels": [16, 32, 96, 256], "conditioning_channels": 3}


@pytest.mark.parametrize(
    ("name", "parameters"), [("sd15", 361_279_120), ("sd21", 364_228_240), ("sdxl", 1_251_014_160)]
)
def test_a_control_has_as_many_parameters_as_the_released_ones(name, parameters):
    shapes = expected_shapes("controlnet", controlnet_config(FAMILIES[name]))
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters


# --- there and back -----------------------------------------------------------------------------------------


def test_diffusers_to_the_original_and_back_is_bit_identical(saved, tmp_path):
    convert(saved, tmp_path / "edges.safetensors", "cldm")
    convert(tmp_path / "edges.safetensors", tmp_path / "back", "diffusers")
    assert same(tensors_of(saved), tensors_of(tmp_path / "back"))
    convert(tmp_path / "back", tmp_path / "again.safetensors", "cldm")
    assert same(tensors_of(tmp_path / "edges.safetensors"), tensors_of(tmp_path / "again.safetensors"))
    theirs = ControlNetModel.load_config(saved)
    ours = ControlNetModel.load_config(tmp_path / "back")
    theirs["transformer_layers_per_block"] = ours["transformer_layers_per_block"]  # one number, or it for each level
    assert {key: ours.get(key) for key in theirs} == theirs


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_the_type_asked_for_is_the_type_written(saved, base, tmp_path, dtype):
    convert(saved, tmp_path / "a.safetensors", "cldm", options=WriteOptions(dtype))
    number = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "a.safetensors").values()} == {number}
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "cldm")
    assert same(tensors_of(tmp_path / "a.safetensors"), tensors_of(tmp_path / "b.safetensors"))


def without_prefix(tensors):
    return {name.removeprefix("control_model."): tensor for name, tensor in tensors.items()}


def whole_checkpoint(tensors):
    return tensors | {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3),
        "global_step": torch.ones(1),
    }


@pytest.mark.parametrize("change", [dict, without_prefix, whole_checkpoint], ids=["prefix", "none", "whole"])
@pytest.mark.parametrize("metadata", [True, False], ids=["ours", "foreign"])
def test_the_original_layout_runs_with_or_without_prefix_and_inside_a_checkpoint(
    saved, base, tmp_path, change, metadata
):
    convert(saved, tmp_path / "a.safetensors", "cldm")
    kept = metadata_of(tmp_path / "a.safetensors") if metadata else None
    save_file(change(tensors_of(tmp_path / "a.safetensors")), tmp_path / "b.safetensors", kept)
    before = load_control(saved, base)
    after = load_control(tmp_path / "b.safetensors", base, None if metadata else "canny")
    assert (after.hint, after.trained) == (before.hint, before.trained if metadata else {})
    assert all(map(torch.equal, residuals(after.branch, base), residuals(before.branch, base)))


def test_what_we_write_as_the_original_diffusers_reads_from_its_single_file(sd2_base, drawn_joins, tmp_path):
    branch = drawn_joins(new_control(sd2_base), base=sd2_base).eval()
    save_control(tmp_path / "edges", SavedControl(branch, HINT), sd2_base)
    convert(tmp_path / "edges", tmp_path / "edges.safetensors", "cldm")
    stock = ControlNetModel.from_single_file(tmp_path / "edges.safetensors", config=str(tmp_path / "edges"))
    assert same(dict(stock.state_dict()), tensors_of(tmp_path / "edges"))


def test_of_sdxl_diffusers_reads_the_file_in_its_own_layout_and_not_the_original(xl_base, drawn_joins, tmp_path):
    """It has no row for ``label_emb`` of a ControlNet. If this fails, docs/formats.md and the note can say more."""
    branch = drawn_joins(new_control(xl_base), base=xl_base).eval()
    save_control(tmp_path / "edges", SavedControl(branch, HINT), xl_base)
    done = convert(tmp_path / "edges", tmp_path / "edges.safetensors", "cldm")
    assert "from_single_file reads no SDXL" in done.notes[0]
    with pytest.raises(NotImplementedError, match="meta tensor"):  # of add_embedding, which stays empty
        ControlNetModel.from_single_file(tmp_path / "edges.safetensors", config=str(tmp_path / "edges"))
    stock = ControlNetModel.from_single_file(tmp_path / "edges" / WEIGHTS, config=str(tmp_path / "edges"))
    assert same(dict(stock.state_dict()), tensors_of(tmp_path / "edges"))


def test_the_original_s_names_have_the_prefix_that_is_asked_for(saved, base, tmp_path):
    """kohya's generator wants one, its trainer none."""
    for prefix, start in ((None, "control_model."), ("control_model", "control_model."), ("none", "")):
        done = convert(saved, tmp_path / f"{prefix}.safetensors", "cldm", options=WriteOptions(prefix=prefix))
        names = tensors_of(done.path).keys()
        assert all(name.startswith(f"{start}") for name in names) and f"{start}input_hint_block.0.weight" in names
        assert describe(done.path).runs
    assert not any(name.startswith("control_model") for name in names)
    ours, theirs = (load_control(tmp_path / f"{one}.safetensors", base).branch for one in ("None", "none"))
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    with pytest.raises(UserError, match="--prefix is of the names in the layout cldm"):
        convert(saved, tmp_path / "folder", "diffusers", options=WriteOptions(prefix="none"))
    with pytest.raises(UserError, match='did you mean "none"'):
        WriteOptions(prefix="nome")


def test_a_difference_to_the_base_is_added_to_it(saved, base, tmp_path):
    convert(saved, tmp_path / "a.safetensors", "cldm")
    of_base = encoder_tensors(base)
    table = rename(tensors_of(saved), controlnet_paths(EncoderShape.of_diffusers(tensors_of(saved))))
    tensors = tensors_of(saved)
    stored = {f"control_model.{table[n]}": t - of_base[n] if n in of_base else t for n, t in tensors.items()}
    save_file(
        stored | {"difference": torch.zeros(1)}, tmp_path / "d.safetensors", metadata_of(tmp_path / "a.safetensors")
    )
    assert describe(tmp_path / "d.safetensors").format == "cldm-difference"
    before, after = load_control(saved, base), load_control(tmp_path / "d.safetensors", base)
    assert relative(residuals(after.branch, base), residuals(before.branch, base)) <= 1e-5
    with pytest.raises(UserError, match="--base"):
        convert(tmp_path / "d.safetensors", tmp_path / "e.safetensors", "cldm")


def test_a_file_we_write_says_what_it_is(saved, base, tmp_path):
    convert(saved, tmp_path / "a.safetensors", "cldm")
    kept = metadata_of(tmp_path / "a.safetensors")
    assert HintSpec.from_json(kept["controlkit.hint"]) == HINT
    assert json.loads(kept["controlkit.config"])["cross_attention_dim"] == base.unet.config.cross_attention_dim
    assert kept["modelspec.architecture"] == f"{base.name}/controlnet" and kept["modelspec.implementation"] == "sgm"


# --- Control-LoRA -------------------------------------------------------------------------------------------


def test_a_control_lora_gives_the_control_back_as_far_as_its_rank_goes(saved, base, tmp_path):
    before = residuals(load_control(saved, base).branch, base)
    distances = {}
    for rank in (1, 4, 64):
        done = convert(
            saved, tmp_path / f"{rank}.safetensors", "control-lora", base=base, options=WriteOptions(rank=rank)
        )
        assert f"Rank {rank};" in done.notes[0]
        back = load_control(tmp_path / f"{rank}.safetensors", base)
        assert back.hint == HINT
        distances[rank] = relative(residuals(back.branch, base), before)
    assert distances[1] > distances[4] > distances[64] and distances[64] <= 1e-5


def test_the_loss_that_a_control_lora_admits_is_the_loss_it_has(saved, base, tmp_path):
    done = convert(saved, tmp_path / "a.safetensors", "control-lora", base=base, options=WriteOptions(rank=3))
    of_base, truth = encoder_tensors(base), tensors_of(saved)
    rebuilt, _ = read_weights(tmp_path / "a.safetensors", base)
    matrices = [name for name in of_base if truth[name].dim() >= 2]
    lost = sum((rebuilt.tensors[n] - truth[n]).square().sum() for n in matrices)
    whole = sum((truth[n] - of_base[n]).square().sum() for n in matrices)
    assert f"{float((lost / whole).sqrt()):.1%}" in done.notes[0]


def test_a_rank_is_chosen_that_keeps_nearly_all_of_a_difference_of_low_rank(xl_base, tmp_path):
    branch = new_control(xl_base)
    with torch.no_grad():
        for parameter in branch.body.parameters():
            if parameter.dim() == 2:
                parameter.add_(torch.randn(len(parameter), 2) @ torch.randn(2, parameter.shape[1]) * 0.05)
    save_control(tmp_path / "edges", SavedControl(branch, HINT), xl_base)
    done = convert(tmp_path / "edges", tmp_path / "a.safetensors", "control-lora", base=xl_base)
    assert done.notes == ("Rank 16; 0.0% of the difference to the base is lost.",)


@pytest.mark.parametrize("shape", [(96, 96), (64, 300), (48, 24, 3, 3)], ids=str)
@pytest.mark.parametrize("fall", [0.0, 0.5, 1.5])
def test_a_difference_in_low_rank_is_as_near_as_the_best_there_is(shape, fall):
    """By the whole decomposition; singular values fall as n**-fall: not at all, slowly, quickly."""
    generator = torch.Generator().manual_seed(0)
    left, values, right = torch.linalg.svd(torch.randn(shape, generator=generator).flatten(1), full_matrices=False)
    if fall:
        values = torch.arange(1.0, len(values) + 1) ** -fall
    difference = (left * values @ right).reshape(shape)
    for rank in (1, 4, 16):
        up, down = low_rank(difference, rank)
        assert up.shape == (shape[0], rank, *[1] * (len(shape) - 2)) and down.shape == (rank, *shape[1:])
        lost = float((difference - product(up, down)).norm())
        assert lost <= 1.01 * float(values[rank:].square().sum().sqrt())
        assert all(map(torch.equal, (up, down), low_rank(difference, rank)))


def test_a_difference_of_zeros_takes_no_room_and_is_itself_again(base, tmp_path):
    attach(base, tmp_path / "a.safetensors", "control-lora", options=WriteOptions(rank=2))
    stored = tensors_of(tmp_path / "a.safetensors")
    pairs = {name: tensor for name, tensor in stored.items() if name.endswith((".up", ".down"))}
    assert pairs and not any(tensor.any() for tensor in pairs.values())
    assert all(tensor.shape[1 if name.endswith(".up") else 0] == 1 for name, tensor in pairs.items())
    body = load_control(tmp_path / "a.safetensors", base, "canny").branch.body.state_dict()
    assert same(body, base.encoder.state_dict())


@pytest.mark.filterwarnings("ignore:for .*no-op")  # names and shapes are asked for on the meta device
def test_a_control_lora_in_the_released_layout_is_rebuilt_on_its_base(xl_base, tmp_path):
    """Written by hand as the released ones are: no prefix, products for matrices, all else whole; and one left out."""
    torch.manual_seed(9)
    of_base, whole = encoder_tensors(xl_base), expected_tensors(xl_base)
    table = rename(whole, controlnet_paths(EncoderShape.of_diffusers(whole)))
    linear, conv = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", "down_blocks.0.resnets.0.conv1"
    stored = {}
    for name, original in table.items():
        tensor, stem = whole[name], original.removesuffix(".weight")
        if name in of_base and tensor.dim() >= 2:
            kernel = (1, 1) if tensor.dim() == 4 else ()
            stored[f"{stem}.up"] = torch.randn(len(tensor), 4, *kernel)
            stored[f"{stem}.down"] = torch.randn(4, *tensor.shape[1:])
        else:
            stored[original] = torch.randn(tensor.shape) * 0.1
    del stored["middle_block.0.in_layers.2.up"], stored["middle_block.0.in_layers.2.down"]
    up, down = (stored[f"input_blocks.4.1.transformer_blocks.0.attn2.to_k.{end}"] for end in ("up", "down"))
    up3, down3 = (stored[f"input_blocks.1.0.in_layers.2.{end}"] for end in ("up", "down"))
    save_file(stored | {"lora_controlnet": torch.zeros(0)}, tmp_path / "lora.safetensors")
    branch = load_control(tmp_path / "lora.safetensors", xl_base, "depth").branch
    body = dict(branch.body.named_parameters())
    assert relative(body[f"{linear}.weight"], of_base[f"{linear}.weight"] + up @ down) <= 1e-6
    wanted = of_base[f"{conv}.weight"] + torch.einsum("orhw,rikl->oikl", up3, down3)
    assert relative(body[f"{conv}.weight"], wanted) <= 1e-6
    assert torch.equal(body["mid_block.resnets.0.conv1.weight"], of_base["mid_block.resnets.0.conv1.weight"])


def expected_tensors(base):
    with torch.device("meta"):
        return ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(16, 32, 96, 256)).state_dict()


def test_a_control_lora_of_another_base_is_refused(xl_base, sd2_base, drawn_joins, tmp_path):
    save_control(tmp_path / "edges", SavedControl(drawn_joins(new_control(xl_base), base=xl_base), HINT), xl_base)
    convert(tmp_path / "edges", tmp_path / "a.safetensors", "control-lora", base=xl_base, options=WriteOptions(rank=2))
    with pytest.raises(UserError, match="is not of the base"):
        load_control(tmp_path / "a.safetensors", sd2_base)


# --- Union --------------------------------------------------------------------------------------------------


def test_a_control_as_a_union_does_for_every_type_what_it_did_and_diffusers_agrees(xl_base, drawn_joins, tmp_path):
    branch = drawn_joins(new_control(xl_base), base=xl_base).eval()
    save_control(tmp_path / "edges", SavedControl(branch, HINT), xl_base)
    convert(tmp_path / "edges", tmp_path / "union", "union")
    union = load_control(tmp_path / "union", xl_base).branch
    *inputs, hint = draw_inputs(xl_base)
    x, t, text = (one[:1] for one in inputs)
    rows, more = stock_inputs((x, t, text))
    stock = ControlNetUnionModel.from_pretrained(tmp_path / "union").eval()
    with torch.no_grad():
        plain = branch(x, t, text, branch.encode_hint(hint[:1]))
        for kind, number in (("canny", 3), ("tile", 6)):
            ours = union(x, t, text, union.encode_hint({kind: hint[:1]}))
            code = torch.eye(8)[[number]]
            down, middle = stock(*rows, [hint[:1]], code, [number], **more, return_dict=False)
            for tap, theirs in zip(xl_base.branch_taps, [*down, middle], strict=True):
                assert relative(ours[tap.name], plain[tap.name]) <= 1e-5
                assert relative(ours[tap.name], theirs) <= 1e-5


def test_a_union_is_written_back_bit_for_bit_and_as_nothing_less(xl_base, drawn_joins, tmp_path):
    save_control(tmp_path / "edges", SavedControl(drawn_joins(new_control(xl_base), base=xl_base), HINT), xl_base)
    convert(tmp_path / "edges", tmp_path / "union", "union")
    convert(tmp_path / "union", tmp_path / "again", "union")
    assert same(tensors_of(tmp_path / "union"), tensors_of(tmp_path / "again"))
    with pytest.raises(UserError, match="only --to union"):
        convert(tmp_path / "union", tmp_path / "a.safetensors", "cldm")
    assert not (tmp_path / "a.safetensors").exists()


# --- T2I-Adapter --------------------------------------------------------------------------------------------


def original_adapter(tensors, light):
    """An adapter's tensors as its own code names them: all resnets in one row; a light one's level by level."""
    renamed = {}
    for name, tensor in tensors.items():
        parts = name.removeprefix("adapter.").split(".")
        if parts[0] == "body" and light:
            parts = [p if p != "resnets" else "body" for p in parts]
        elif parts[0] == "body":
            level, *rest = parts[1:]
            inner = int(rest[1]) if rest[0] == "resnets" else 0
            parts = ["body", str(2 * int(level) + inner), *(rest[2:] if rest[0] == "resnets" else rest)]
        renamed[".".join(parts)] = tensor
    return renamed


@pytest.mark.parametrize(
    ("kind", "name", "channels"),
    [
        ("full_adapter", "sd2_base", [8, 16, 24, 24]),
        ("light_adapter", "sd2_base", [8, 16, 24]),
        ("full_adapter_xl", "xl_base", [8, 16, 24, 24]),
    ],
)
@pytest.mark.parametrize("hint_channels", [1, 3])
def test_an_adapter_in_the_original_s_names_is_read_and_written_as_diffusers(
    kind, name, channels, hint_channels, tmp_path, request
):
    torch.manual_seed(1)
    factor = 16 if kind == "full_adapter_xl" else 8
    layers = 4 if kind == "light_adapter" else 2
    stock = T2IAdapter(hint_channels, channels, layers, factor, kind)
    save_file(original_adapter(stock.state_dict(), kind == "light_adapter"), tmp_path / "a.safetensors")
    found = describe(tmp_path / "a.safetensors")
    assert (found.format, found.hint_channels, found.missing, found.unexpected) == (
        "t2i-adapter",
        hint_channels,
        (),
        (),
    )
    base = request.getfixturevalue(name)
    saved = load_control(tmp_path / "a.safetensors", base, "depth")
    assert saved.hint.channels == hint_channels
    convert(tmp_path / "a.safetensors", tmp_path / "b", "diffusers")
    assert same(dict(T2IAdapter.from_pretrained(tmp_path / "b").state_dict()), dict(stock.state_dict()))
    assert same(dict(saved.branch.network.state_dict()), dict(stock.state_dict()))


def test_an_adapter_whose_features_have_other_sizes_than_the_base_takes_is_refused(sd2_base, tmp_path):
    """As many channels are not enough: SDXL's halve their size once, Stable Diffusion's at each level."""
    T2IAdapter(3, [8, 16, 24, 24], 2, 8, "full_adapter_xl").save_pretrained(tmp_path / "a")
    with pytest.raises(Mismatch, match=r"at 1/\[8, 8, 16, 16\] of the picture; .* at 1/\[8, 16, 32, 64\]"):
        load_control(tmp_path / "a", sd2_base, "depth")


# --- the original's two tools -------------------------------------------------------------------------------


def test_an_attached_branch_is_silent_and_stock_diffusers_loads_it(base, tmp_path):
    attach(base, tmp_path / "fresh", "diffusers", annotator="canny")
    stock, report = ControlNetModel.from_pretrained(tmp_path / "fresh", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    fresh = load_control(tmp_path / "fresh", base)
    assert fresh.hint.annotator == "canny" and fresh.trained["base_digest"] == base.digest
    assert not any(residual.any() for residual in residuals(fresh.branch, base))
    for name, tensor in encoder_tensors(base).items():
        assert torch.equal(stock.state_dict()[name], tensor)


def tuned(base, seed=12):
    """A fine-tuned neighbour: the same base with other weights."""
    unet = copy.deepcopy(base.unet)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    return UNetBase("tuned", base.vae, base.towers, unet, base.scheduler, base.zeros_for_none)


def test_a_transfer_adds_what_tuning_changed_in_the_base_and_nothing_else(saved, base, tmp_path):
    other = tuned(base)
    convert(saved, tmp_path / "moved", "diffusers", base=base, transfer_to=other)
    before, after = tensors_of(saved), tensors_of(tmp_path / "moved")
    old, new = encoder_tensors(base), encoder_tensors(other)
    for name, tensor in before.items():
        wanted = tensor + new[name] - old[name] if name in old else tensor
        assert torch.allclose(after[name], wanted, atol=1e-6)
    moved = load_control(tmp_path / "moved", other)
    assert (moved.trained["base_digest"], moved.trained["transferred_from"]) == (other.digest, base.name)
    convert(saved, tmp_path / "stayed", "diffusers", base=base, transfer_to=base)
    assert relative(list(tensors_of(tmp_path / "stayed").values()), list(before.values())) <= 1e-7


def test_a_fresh_branch_transferred_is_a_fresh_branch_of_the_other_base(base, tmp_path):
    other = tuned(base)
    attach(base, tmp_path / "fresh", "diffusers")
    convert(tmp_path / "fresh", tmp_path / "moved", "diffusers", base=base, transfer_to=other)
    attach(other, tmp_path / "wanted", "diffusers")
    moved, wanted = tensors_of(tmp_path / "moved"), tensors_of(tmp_path / "wanted")
    hints = {name for name in moved if "controlnet_cond_embedding" in name}  # drawn anew for each
    names = sorted(moved.keys() - hints)
    assert relative([moved[n] for n in names], [wanted[n] for n in names]) <= 1e-6


def test_a_transfer_needs_both_bases_and_both_of_its_shape(saved, base, toy_base, tmp_path):
    with pytest.raises(UserError, match="needs both bases"):
        convert(saved, tmp_path / "a", "diffusers", transfer_to=base)
    with pytest.raises(UserError, match="is not of the base"):
        convert(saved, tmp_path / "a", "diffusers", base=base, transfer_to=toy_base)
    assert not (tmp_path / "a").exists()


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "name", "message"),
    [
        ("ckpt", "a", "no layout .ckpt. to convert to: .*Known: cldm, control-lora"),
        ("cldm", "a", "one file: expected a name that ends in .safetensors"),
        ("diffusers", "a.safetensors", "a folder: expected a folder's name"),
        ("diffusers", "full", "is there already"),
        ("diffusers", "run", "is there already"),
        ("diffusers", "edges", "is there already"),
        ("cldm", "there.safetensors", "is there already"),
        ("diffusers", ".", "is there already"),
        ("control-lora", "a.safetensors", "name the base"),
    ],
)
def test_a_conversion_that_cannot_be_is_refused_and_writes_nothing(deep_base, tmp_path, to, name, message):
    save_control(tmp_path / "edges", SavedControl(new_control(deep_base), HINT), deep_base)
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    shutil.copytree(tmp_path / "edges", tmp_path / "run" / "control")  # a training run, with all its checkpoints
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "edges", tmp_path / name, to)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_number_too_large_for_half_precision_is_not_made_infinite(deep_base, tmp_path):
    branch = new_control(deep_base)
    with torch.no_grad():
        branch.joins["middle"].weight[0, 0] = 1e5
    save_control(tmp_path / "edges", SavedControl(branch, HINT), deep_base)
    with pytest.raises(UserError, match=r"controlnet_mid_block.weight reaches 1e\+05, too much for fp16"):
        convert(tmp_path / "edges", tmp_path / "a.safetensors", "cldm", options=WriteOptions("fp16"))


# --- what a foreign file's hints are ------------------------------------------------------------------------


def test_a_foreign_file_gets_the_contract_of_its_family_and_the_annotator_that_is_named(deep_base, tmp_path):
    stock = ControlNetModel.from_unet(deep_base.unet, conditioning_embedding_out_channels=(16, 32, 96))
    stock.register_to_config(controlnet_conditioning_channel_order="bgr")
    stock.save_pretrained(tmp_path / "theirs")
    named = load_control(tmp_path / "theirs", deep_base, "canny").hint
    assert named == replace(HINT, colour_order="BGR")
    with pytest.warns(UserWarning, match="does not say what its hints are"):
        assert load_control(tmp_path / "theirs", deep_base).hint == HintSpec("", colour_order="BGR")
    with pytest.raises(UserError, match='no hints named "cany": did you mean "canny"'):
        load_control(tmp_path / "theirs", deep_base, "cany")


def test_an_inpainting_hint_is_minus_one_where_its_picture_is_transparent():
    picture = np.full((8, 8, 4), 128, np.uint8)
    picture[..., 3] = 255
    picture[:, :3, 3] = 0
    hint = contract("inpaint").tensor(picture, (8, 8))
    assert (hint[..., :3] == -1).all() and torch.allclose(hint[..., 3:], torch.tensor(128 / 255))
    assert contract("tile").tensor(picture, (8, 8)).min() > 0, "only hints that have masks are marked"


def test_a_pooled_control_says_so_in_its_configuration_or_in_the_yaml_beside_it(deep_base, tmp_path):
    save_control(tmp_path / "edges", SavedControl(new_control(deep_base), HINT), deep_base)
    convert(tmp_path / "edges", tmp_path / "shuffle.safetensors", "cldm")
    save_file(
        tensors_of(tmp_path / "shuffle.safetensors"), tmp_path / "shuffle.safetensors"
    )  # a foreign one: no metadata
    assert not load_control(tmp_path / "shuffle.safetensors", deep_base, "shuffle").branch.pools
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        text = "model:\n  params:\n    global_average_pooling: True\n"
        (tmp_path / "shuffle.yaml").write_text(text, encoding=encoding)
        assert load_control(tmp_path / "shuffle.safetensors", deep_base, "shuffle").branch.pools
    convert(tmp_path / "shuffle.safetensors", tmp_path / "pooled", "diffusers", annotator="shuffle")
    assert load_control(tmp_path / "pooled", deep_base).branch.pools


def test_a_contract_of_other_channels_than_the_network_s_is_refused(deep_base, tmp_path):
    save_control(tmp_path / "edges", SavedControl(new_control(deep_base), HINT), deep_base)
    wrong = metadata_of(tmp_path / "edges") | {"controlkit.hint": replace(HINT, channels=1).to_json()}
    save_file(tensors_of(tmp_path / "edges"), tmp_path / "edges" / WEIGHTS, wrong)
    with pytest.raises(UserError, match="reads hints of 3 channels, and its contract says 1"):
        load_control(tmp_path / "edges", deep_base)


def test_eight_bit_numbers_can_be_written_as_half_precision(deep_base, tmp_path):
    save_control(tmp_path / "edges", SavedControl(new_control(deep_base), HINT), deep_base)
    small = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors_of(tmp_path / "edges").items()}
    save_file(small, tmp_path / "edges" / WEIGHTS, metadata_of(tmp_path / "edges"))
    convert(tmp_path / "edges", tmp_path / "a.safetensors", "cldm", options=WriteOptions("fp16"))
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "a.safetensors").values()} == {torch.float16}


# --- what a first reading got wrong -----------------------------------------------------------------------------


def test_a_pooled_control_stays_pooled_in_every_layout(deep_base, tmp_path):
    branch = new_control(deep_base, ControlSpec(pool="mean"))
    save_control(tmp_path / "pooled", SavedControl(branch, HINT), deep_base)
    for to, name in (("cldm", "a.safetensors"), ("control-lora", "b.safetensors"), ("union", "c"), ("diffusers", "d")):
        done = convert(tmp_path / "pooled", tmp_path / name, to, base=deep_base)
        assert load_control(tmp_path / name, deep_base).branch.pools
        assert any("shuffle" in note for note in done.notes) == (to in ("cldm", "control-lora"))


def test_a_control_that_reads_bgr_reads_rgb_in_the_original_layout(deep_base, drawn_joins, tmp_path):
    branch = drawn_joins(new_control(deep_base), base=deep_base).eval()
    save_control(tmp_path / "bgr", SavedControl(branch, replace(HINT, colour_order="BGR")), deep_base)
    convert(tmp_path / "bgr", tmp_path / "rgb.safetensors", "cldm")
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    before, after = (load_control(tmp_path / name, deep_base) for name in ("bgr", "rgb.safetensors"))
    assert (before.hint.colour_order, after.hint.colour_order) == ("BGR", "RGB")
    read = [c.branch.encode_hint(c.hint.tensor(picture, (32, 32))) for c in (before, after)]
    assert relative(*read) <= 1e-6


def test_an_annotator_named_in_a_conversion_is_the_one_named_in_a_load(deep_base, tmp_path):
    stock = ControlNetModel.from_unet(deep_base.unet, conditioning_embedding_out_channels=(16, 32, 96))
    stock.register_to_config(controlnet_conditioning_channel_order="bgr")
    stock.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "named", "diffusers", annotator="canny")
    assert (
        load_control(tmp_path / "named", deep_base).hint == load_control(tmp_path / "theirs", deep_base, "canny").hint
    )
    with pytest.raises(UserError, match="made by canny, not by scribble"):
        convert(tmp_path / "named", tmp_path / "other", "diffusers", annotator="scribble")


def test_others_may_read_what_is_written(deep_base, tmp_path):
    (tmp_path / "ordinary").write_text("")
    save_control(tmp_path / "edges", SavedControl(new_control(deep_base), HINT), deep_base)
    convert(tmp_path / "edges", tmp_path / "a.safetensors", "cldm")
    wanted = (tmp_path / "ordinary").stat().st_mode
    assert {p.stat().st_mode for p in (tmp_path / "a.safetensors", *(tmp_path / "edges").iterdir())} == {wanted}


@pytest.mark.parametrize("kept", [0, 1], ids=["no attention", "one transformer"])
def test_a_slimmer_network_than_the_base_s_encoder_runs_as_diffusers_runs_it(xl_base, tmp_path, kept):
    """As diffusers' small and mid controls of SDXL: the same taps, fewer transformers, or none."""
    config = dict(ControlNetModel.from_unet(xl_base.unet, conditioning_embedding_out_channels=(16, 32, 96, 256)).config)
    config |= {"transformer_layers_per_block": [1, kept or 1, kept or 1]}
    if not kept:
        config |= {"down_block_types": ["DownBlock2D"] * 3, "mid_block_type": "UNetMidBlock2D"}
    torch.manual_seed(0)
    stock = ControlNetModel.from_config(config).eval()
    with torch.no_grad():
        for join in (*stock.controlnet_down_blocks, stock.controlnet_mid_block):
            join.weight.normal_(std=0.2)
    stock.save_pretrained(tmp_path / "slim")
    assert describe(tmp_path / "slim").runs
    branch = load_control(tmp_path / "slim", xl_base, "canny").branch
    *inputs, hint = draw_inputs(xl_base)
    rows, more = stock_inputs(inputs)
    with torch.no_grad():
        ours = branch(*inputs, branch.encode_hint(hint))
        down, middle = stock(*rows, hint, **more, return_dict=False)
    for tap, theirs in zip(xl_base.branch_taps, [*down, middle], strict=True):
        assert relative(ours[tap.name], theirs) <= 1e-5
    convert(tmp_path / "slim", tmp_path / "slim.safetensors", "cldm")
    convert(tmp_path / "slim.safetensors", tmp_path / "back", "diffusers")
    assert same(tensors_of(tmp_path / "slim"), tensors_of(tmp_path / "back"))
