"""One type of a Union is a control by itself, the same as the Union given that type alone."""

from dataclasses import replace

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file

from conftest import draw_inputs, randomised, relative, stock_inputs
from controlkit.annotators import contract
from controlkit.branch import ControlBranch
from controlkit.controls import new_control, new_union
from controlkit.controls.union import OneType, UnionBranch, time_width
from controlkit.errors import Unsupported, UserError
from controlkit.formats import WEIGHTS, SavedControl, convert, load_control, save_control
from controlkit.images import HintSpec


@pytest.fixture(scope="module")
def inputs(toy_base):
    return draw_inputs(toy_base)


@torch.no_grad()
def residuals(branch, inputs, kind=None):
    x, t, text, hint = inputs
    return list(branch(x, t, text, branch.encode_hint({kind: hint} if kind else hint)).values())


def test_a_fresh_union_changes_nothing_and_learns_all_but_the_tokens(toy_base, inputs):
    union = new_union(toy_base)
    assert not any(residual.any() for residual in residuals(union, inputs, "canny"))
    still = {name.split(".")[0] for name, parameter in union.named_parameters() if not parameter.requires_grad}
    assert still == {"task_embedding", "transformer_layes", "spatial_ch_projs"}


def test_a_type_taken_out_of_a_union_is_an_ordinary_control_that_does_the_same(union_folder, toy_base, inputs):
    union = load_control(union_folder, toy_base).branch
    for kind in ("canny", "depth"):
        saved = load_control(f"{union_folder}:{kind}", toy_base)
        assert type(saved.branch) is ControlBranch and type(union) is UnionBranch
        assert saved.hint == contract(kind) and saved.trained["data"] == "world" and not saved.hints
        assert relative(residuals(saved.branch, inputs), residuals(union, inputs, kind)) <= 1e-5
    assert relative(residuals(saved.branch, inputs), residuals(union, inputs, "canny")) > 1e-2


def test_stock_diffusers_runs_a_type_converted_out_of_a_union(union_folder, toy_base, inputs, tmp_path):
    convert(f"{union_folder}:depth", tmp_path / "depth", "diffusers")
    stock, info = ControlNetModel.from_pretrained(tmp_path / "depth", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    rows, more = stock_inputs(inputs)
    with torch.no_grad():
        down, middle = stock.eval()(*rows, controlnet_cond=inputs[3], **more, return_dict=False)
    ours = residuals(load_control(union_folder, toy_base).branch, inputs, "depth")
    assert relative(ours, [*down, middle]) <= 1e-5
    with pytest.raises(UserError, match="one type of it, as NAME:TYPE"):
        convert(union_folder, tmp_path / "edges.safetensors", "cldm")


def test_a_union_that_also_shifts_its_features_gives_its_types_as_they_are(toy_base, inputs, tmp_path):
    union = randomised(new_union(toy_base))
    with torch.no_grad():
        union.spatial_ch_projs.weight.normal_(generator=torch.Generator().manual_seed(1))
    save_control(tmp_path / "foreign", SavedControl(union, HintSpec("")), toy_base)
    saved = load_control(f"{tmp_path / 'foreign'}:pose", toy_base)
    assert type(saved.branch) is OneType and saved.hint == HintSpec("").made_by(contract("pose"))
    assert relative(residuals(saved.branch, inputs), residuals(union, inputs, "pose")) <= 1e-5
    assert relative(residuals(saved.branch, inputs), residuals(union, inputs, "depth")) > 1e-3


def test_what_is_no_union_or_knows_fewer_types_has_no_such_type(toy_base, tmp_path):
    save_control(tmp_path / "edges", SavedControl(new_control(toy_base), HintSpec("canny")), toy_base)
    with pytest.raises(UserError, match='is no Union and has no types: name it without ":canny"'):
        load_control(f"{tmp_path / 'edges'}:canny", toy_base)
    save_control(tmp_path / "few", SavedControl(new_union(toy_base, types=6), HintSpec("")), toy_base)
    with pytest.raises(UserError, match="knows 6 types; tile is none of them"):
        load_control(f"{tmp_path / 'few'}:tile", toy_base)
    with pytest.raises(UserError, match="There is no control"):
        load_control(f"{tmp_path / 'few'}:tyle", toy_base)


def test_a_union_s_own_contracts_go_before_what_a_name_means_everywhere(toy_base, tmp_path):
    own = replace(contract("canny"), options={"low": 50.0, "high": 60.0})
    saved = SavedControl(new_union(toy_base), HintSpec(""), hints={"canny": own})
    save_control(tmp_path / "union", saved, toy_base)
    assert load_control(f"{tmp_path / 'union'}:canny", toy_base).hint == own
    read = load_control(tmp_path / "union", toy_base)
    assert read.hints == {"canny": own} and read.contract_of("canny") == own
    assert read.contract_of("depth") == contract("depth")


def test_contracts_of_types_that_there_are_not_are_refused(union_folder, toy_base, tmp_path):
    (tmp_path / "union").mkdir()
    (tmp_path / "union" / "config.json").write_bytes((union_folder / "config.json").read_bytes())
    metadata = {"controlkit.hints": '{"cany": "{}"}'}
    save_file(load_file(union_folder / WEIGHTS), tmp_path / "union" / WEIGHTS, metadata)
    with pytest.raises(UserError, match="cany"):
        load_control(tmp_path / "union", toy_base)


def test_a_base_without_a_time_embedding_has_no_union():
    with pytest.raises(Unsupported, match='beside a time embedding; "tokens" has none'):
        time_width(torch.nn.Linear(2, 2), "tokens")
