"""SDXL, Union, T2I-Adapter and pooled controls: each residual, and whole sampling runs, against diffusers' own."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    DDIMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    T2IAdapter,
)

from conftest import draw_inputs, make, relative, stock_inputs
from controlkit.backbones import load_base
from controlkit.branch import ControlSpec
from controlkit.controls import TYPES, new_control
from controlkit.errors import UserError
from controlkit.formats import SavedControl, load_control, save_control
from controlkit.images import HintSpec
from controlkit.sample import PreparedControl, SamplingSettings, scale_table

CONTRACT = HintSpec("")
STEPS = 10
SIDE = 64


def draw_picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def tensor(picture):
    return CONTRACT.tensor(picture, (SIDE, SIDE))


@pytest.fixture
def peer(request):
    """``peer(kind, base, ...)`` is a stock pipeline on a base's own modules."""

    def build(kind, base, **parts):
        names = ["", *(f"_{i}" for i in range(2, len(base.towers) + 1))]
        for name, tower in zip(names, base.towers, strict=True):
            parts |= {f"text_encoder{name}": tower.encoder, f"tokenizer{name}": tower.tokenizer}
        if len(base.towers) == 1:
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        scheduler = DDIMScheduler.from_config(base.scheduler.config)
        pipeline = kind(vae=base.vae, unet=base.unet, scheduler=scheduler, **parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return build


def both_runs(base, pipeline, controls, hints, uses, images, **options):
    """(our last latents, the peer's) for one prompt; and it is checked that the controls did something."""
    texts = {"prompt": "a red apple, 3d style", "negative_prompt": options.pop("negative_prompt", None)}
    settings = {**texts, "seed": 5, "steps": STEPS, "guidance": 4.0, "size": (SIDE, SIDE)}
    ours, plain = (make(base, *under, **settings) for under in ((controls, hints, uses), ()))
    assert relative(ours.latents, plain.latents) > 0.01  # so that being equal to the peer says something
    theirs = pipeline(
        **texts,
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
        **images,
        **options,
    ).images[0]
    return ours.latents, theirs


# --- ControlNet on SDXL -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "options", "guess"),
    [(1, {}, False), (2, {}, False), (2, {"negative_prompt": ""}, False), (2, {}, True)],
    ids=["one", "two", "an empty negative prompt", "guess mode"],
)
def test_a_whole_run_on_sdxl_is_the_stock_pipelines(xl_base, drawn_joins, to_diffusers, peer, count, options, guess):
    scales = [1.0, 0.6][:count]
    branches = [drawn_joins(new_control(xl_base), seed, xl_base).eval() for seed in range(count)]
    pictures = [draw_picture(seed) for seed in range(count)]
    stock = [to_diffusers(branch, xl_base) for branch in branches]
    pipeline = peer(StableDiffusionXLControlNetPipeline, xl_base, controlnet=stock)
    controls = [SavedControl(branch, CONTRACT) for branch in branches]
    uses = [{"scale": k, "guess": guess} for k in scales]
    images = {"image": [tensor(p) for p in pictures], "controlnet_conditioning_scale": scales, "guess_mode": guess}
    ours, theirs = both_runs(xl_base, pipeline, controls, pictures, uses, images, **options)
    assert relative(ours, theirs) <= 1e-4


def test_no_prompt_and_an_empty_one_are_not_the_same_on_sdxl(xl_base):
    absent, empty = xl_base.encode_text([None, ""])[:1], xl_base.encode_text([""])
    assert not absent.tokens.any() and not absent.pooled.any()
    assert empty.tokens.any() and empty.pooled.any()


# --- pooled controls (version 1.1's shuffle) ----------------------------------------------------------------


def test_a_pooled_control_is_the_stock_pipelines(deep_base, drawn_joins, tmp_path, peer):
    branch = drawn_joins(new_control(deep_base, ControlSpec(pool="mean")), base=deep_base).eval()
    stock = pooled_peer(branch, deep_base, tmp_path)
    picture = np.random.default_rng(3).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    pipeline = peer(StableDiffusionControlNetPipeline, deep_base, controlnet=stock)
    ours, theirs = both_runs(
        deep_base,
        pipeline,
        [SavedControl(branch, CONTRACT)],
        [picture],
        [{"scale": 0.8}],
        {"image": tensor(picture)},
        controlnet_conditioning_scale=0.8,
    )
    assert relative(ours, theirs) <= 1e-4


def pooled_peer(branch, base, folder):
    save_control(folder / "pooled", SavedControl(branch, CONTRACT), base)
    stock = ControlNetModel.from_pretrained(folder / "pooled").eval()
    assert stock.config.global_pool_conditions
    return stock


def test_beside_a_pooled_control_an_ordinary_one_still_speaks_to_both_halves(deep_base, drawn_joins):
    """The stock pipeline asks the first of several controls alone whether it pools, and treats all as that one."""
    pooled, plain = (
        drawn_joins(new_control(deep_base, ControlSpec(pool=pool)), base=deep_base) for pool in ("mean", "none")
    )
    for order in ((pooled, plain), (plain, pooled)):
        controls = [PreparedControl(branch, {"": CONTRACT}) for branch in order]
        table = scale_table(controls, deep_base.taps, 2, 1, SamplingSettings(1))
        taps = [i for i, tap in enumerate(deep_base.taps) if tap.site != "encoder"]
        halves = {branch: table[i, :, taps, 0, 0, 0] for i, branch in enumerate(order)}
        assert halves[plain].eq(1).all()
        assert halves[pooled][0].eq(0).all() and halves[pooled][1].eq(1).all()


# --- Union --------------------------------------------------------------------------------------------------


@pytest.fixture
def union(xl_base, tmp_path):
    """(ours, diffusers') of a Union with random weights, every part of it far from zero."""
    torch.manual_seed(6)
    shared = [key for key in inspect.signature(ControlNetUnionModel.__init__).parameters if key in xl_base.unet.config]
    stock = ControlNetUnionModel(
        **{key: xl_base.unet.config[key] for key in shared},
        num_control_type=8,
        num_trans_channel=8,
        num_trans_head=2,
        num_proj_channel=8,
        conditioning_embedding_out_channels=(16, 32, 96, 256),
    ).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    stock.save_pretrained(tmp_path / "union")
    return load_control(tmp_path / "union", xl_base, "").branch, stock


@pytest.mark.parametrize(
    "types", [("canny",), ("depth",), ("openpose", "canny"), ("depth", "tile", "repaint")], ids=str
)
def test_every_residual_of_a_union_is_diffusers(union, xl_base, types):
    branch, stock = union
    x, t, text, _ = draw_inputs(xl_base)
    numbers = [{"openpose": 0, "depth": 1, "canny": 3, "tile": 6, "repaint": 7}[name] for name in types]
    hints = {name: torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(types)}
    for row in range(2):  # one picture at a time: diffusers lets those of a batch look at each other
        rows, more = stock_inputs((x[[row]], t[[row]], text[[row]]))
        code = torch.zeros(1, 8)
        code[0, numbers] = 1
        with torch.no_grad():
            down, middle = stock(*rows, list(hints.values()), code, numbers, **more, return_dict=False)
            ours = branch(x[[row]], t[[row]], text[[row]], branch.encode_hint(hints))
        for tap, residual in zip(xl_base.branch_taps, [*down, middle], strict=True):
            assert relative(ours[tap.name], residual) <= 1e-5


@pytest.mark.parametrize(
    "strengths",
    [
        {"canny": 0.9, "depth": 0.9},
        {"canny": 0.3, "depth": 1.4},
        {"depth": 0.5, "tile": 0.0, "repaint": 2.0},
        {"openpose": 0.6},
    ],
    ids=str,
)
def test_a_union_s_types_have_a_strength_each_as_in_diffusers(union, xl_base, strengths):
    """There several types' features are scaled and not the residuals; a type that is alone has its residuals scaled."""
    branch, stock = union
    (x, t, text, _), numbers = draw_inputs(xl_base), [TYPES[name] for name in strengths]
    hints = {name: torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(TYPES[name])) for name in strengths}
    rows, more = stock_inputs((x[:1], t[:1], text[:1]))
    code = torch.zeros(1, 8)
    code[0, numbers] = 1
    scales = list(strengths.values())
    with torch.no_grad():
        down, middle = stock(*rows, list(hints.values()), code, numbers, scales, **more, return_dict=False)
        ours = branch(x[:1], t[:1], text[:1], branch.encode_hint(hints, strengths))
        plain = branch(x[:1], t[:1], text[:1], branch.encode_hint(hints))
    theirs = dict(zip([tap.name for tap in xl_base.branch_taps], [*down, middle], strict=True))
    assert all(relative(ours[name], theirs[name]) <= 1e-5 for name in theirs)
    assert relative(plain["middle"], theirs["middle"]) > 1e-3


def test_a_union_merges_all_of_its_hints_and_not_the_first_alone(union, xl_base):
    branch, _ = union
    hints = {name: torch.rand(1, 3, 64, 64) for name in ("canny", "depth", "normal")}
    with torch.no_grad():
        whole = branch.encode_hint(hints)
        for left_out in hints:
            fewer = branch.encode_hint({name: hint for name, hint in hints.items() if name != left_out})
            assert relative(fewer["map"], whole["map"]) > 0.01
            assert relative(fewer["embedding"], whole["embedding"]) > 0.01


def test_a_picture_of_a_batch_does_not_change_with_its_neighbours(union):
    branch, _ = union
    hint = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        together, alone = branch.encode_hint({"canny": hint}), branch.encode_hint({"canny": hint[:1]})
    assert relative(together["map"][:1], alone["map"]) <= 1e-5


def test_a_whole_run_of_a_union_is_the_stock_pipelines(union, xl_base, peer):
    branch, stock = union
    pictures = {"canny": draw_picture(0), "depth": draw_picture(1)}
    pipeline = peer(StableDiffusionXLControlNetUnionPipeline, xl_base, controlnet=stock)
    images = {"control_image": [tensor(p) for p in pictures.values()], "control_mode": [3, 1]}
    ours, theirs = both_runs(xl_base, pipeline, [SavedControl(branch, CONTRACT)], [pictures], (), images)
    assert relative(ours, theirs) <= 1e-4


def test_a_type_that_a_union_does_not_know_is_refused_with_those_it_knows(union):
    branch, _ = union
    with pytest.raises(UserError, match='knows no type "cany": did you mean "canny"'):
        branch.encode_hint({"cany": torch.rand(1, 3, 64, 64)})
    with pytest.raises(UserError, match="at least one hint"):
        branch.encode_hint({})


# --- T2I-Adapter --------------------------------------------------------------------------------------------

ADAPTERS = {
    "full": ("sd2_base", {"channels": [8, 16, 24, 24], "adapter_type": "full_adapter"}),
    "light": ("sd2_base", {"channels": [8, 16, 24], "adapter_type": "light_adapter"}),
    "full_xl": ("xl_base", {"channels": [8, 16, 24, 24], "adapter_type": "full_adapter_xl", "downscale_factor": 16}),
}


def draw_adapter(folder, config):
    torch.manual_seed(7)
    stock = T2IAdapter(in_channels=3, num_res_blocks=2, **config).eval()
    stock.save_pretrained(folder)
    return stock


@pytest.mark.filterwarnings("ignore:.*does not say what its hints are")
@pytest.mark.parametrize("kind", ["full", "full_xl"])
def test_a_whole_run_of_an_adapter_is_the_stock_pipelines(kind, tmp_path, peer, request):
    name, config = ADAPTERS[kind]
    base = request.getfixturevalue(name)
    stock = draw_adapter(tmp_path / "adapter", config)
    saved = load_control(tmp_path / "adapter", base, "")
    picture = draw_picture(4)
    wide = len(base.towers) > 1
    pipeline = peer(StableDiffusionXLAdapterPipeline if wide else StableDiffusionAdapterPipeline, base, adapter=stock)
    ours, theirs = both_runs(
        base,
        pipeline,
        [saved],
        [picture],
        [{"scale": 0.9}],
        {"image": tensor(picture)},
        adapter_conditioning_scale=0.9,
    )
    assert relative(ours, theirs) <= 1e-4


@pytest.mark.filterwarnings("ignore:.*does not say what its hints are")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_s_features_are_diffusers_and_are_made_once_a_picture(kind, tmp_path, request):
    name, config = ADAPTERS[kind]
    base = request.getfixturevalue(name)
    stock = draw_adapter(tmp_path / "adapter", config)
    saved = load_control(tmp_path / "adapter", base, "")
    hint = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(saved.branch.encode_hint(hint).values(), stock(hint), strict=True):
            assert relative(ours, theirs) <= 1e-5
    made = []
    saved.branch.network.register_forward_hook(lambda *args: made.append(1))
    make(base, [saved], [draw_picture(0)], prompt="", steps=3, size=(64, 64))
    assert len(made) == 1


def test_an_adapter_of_another_base_is_refused(xl_base, tmp_path):
    draw_adapter(tmp_path / "adapter", ADAPTERS["full"][1])
    with pytest.raises(UserError, match="does not fit the base"):
        load_control(tmp_path / "adapter", xl_base, "")


# --- half precision -----------------------------------------------------------------------------------------


def test_in_bfloat16_we_are_no_further_from_single_precision_than_the_peer(deep_base, drawn_joins, to_diffusers):
    branch = drawn_joins(new_control(deep_base), base=deep_base).eval()
    *inputs, hint = draw_inputs(deep_base)
    exact = branch(*inputs, branch.encode_hint(hint))
    stock = to_diffusers(branch, deep_base).bfloat16()
    half = branch.bfloat16()
    x, t, text = inputs
    text = text.to(x.device, torch.bfloat16)
    rows, _ = stock_inputs((x.bfloat16(), t, text))
    with torch.no_grad():
        ours = half(x.bfloat16(), t, text, half.encode_hint(hint.bfloat16()))
        down, middle = stock(*rows, hint.bfloat16(), return_dict=False)
    names = [tap.name for tap in deep_base.branch_taps]
    distance = relative([ours[n].float() for n in names], [exact[n] for n in names])
    peers = relative([r.float() for r in (*down, middle)], [exact[n] for n in names])
    assert 0 < distance <= 1.1 * peers


@pytest.mark.filterwarnings("ignore:.*does not say what its hints are")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_base_and_a_control_in_half_precision_make_the_same_picture_nearly(
    xl_folder, xl_base, drawn_joins, tmp_path, dtype
):
    branch = drawn_joins(new_control(xl_base), base=xl_base).eval()
    save_control(tmp_path / "edges", SavedControl(branch, CONTRACT), xl_base)
    half = load_base(xl_folder, dtype=dtype)
    saved = load_control(tmp_path / "edges", half, "")
    assert {p.dtype for p in saved.branch.parameters()} == {dtype}
    assert half.vae.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    exact, made = (
        make(on, [SavedControl(network, CONTRACT)], [draw_picture(2)], prompt="a red apple", steps=3, size=(SIDE, SIDE))
        for on, network in ((xl_base, branch), (half, saved.branch))
    )
    assert 0 < relative(made.latents, exact.latents) < 0.05
    assert np.abs(made.pixels.astype(int) - exact.pixels.astype(int)).mean() < 8
