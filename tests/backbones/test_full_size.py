"""The released models' full shapes, on random weights: each residual against diffusers, and conversions bit for bit.

Slow and large (up to 12 GB of memory, 6 GB of disk): ``pytest -m slow tests/test_full_size.py``.
"""

import gc
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    ControlNetUnionModel,
    DDIMScheduler,
    T2IAdapter,
    UNet2DConditionModel,
)

from conftest import relative
from controlkit.backbones import TextEmbedding, UNetBase
from controlkit.backbones.text import TextTower
from controlkit.backbones.unet_families import FAMILIES, clip_tokenizer, unet_config
from controlkit.branch import ControlSpec
from controlkit.controls import Adapter
from controlkit.formats import WEIGHTS, convert
from controlkit.formats.describe import describe
from controlkit.formats.networks import read_network
from controlkit.formats.weights import Weights, read_weights

pytestmark = pytest.mark.slow
SIDE = 16  # of the latents: enough for every level to have some pixels
WIDTHS = [16, 32, 96, 256]


@pytest.fixture(autouse=True)
def _tidy(tmp_path):
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)
    gc.collect()


def base_of(name, device="meta"):
    """A base of a family with a random U-Net; on the meta device, all a branch needs of it, and no memory."""
    row = FAMILIES[name]
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**unet_config(row))
    with torch.device("meta"):
        vae = AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, **_four_levels())
    scheduler = DDIMScheduler(prediction_type={"eps": "epsilon", "v": "v_prediction"}[row.prediction])
    return UNetBase(name, vae, [TextTower(clip_tokenizer(), torch.nn.Identity())], unet, scheduler)


def _four_levels():
    return {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}


def config_of(name, **more):
    left_out = ("sample_size", "out_channels", "up_block_types")
    config = {key: value for key, value in unet_config(FAMILIES[name]).items() if key not in left_out}
    return config | {"conditioning_embedding_out_channels": WIDTHS} | more


def draw_rows(name):
    """One row of what a branch reads: latents, timestep, prompt, and a hint."""
    row = FAMILIES[name]
    generator = torch.Generator().manual_seed(1)
    pooled = torch.randn(1, row.pooled_width, generator=generator) if row.pooled_width else None
    sizes = torch.tensor([[1024, 1024, 0, 0, 1024, 1024]]) if row.pooled_width else None
    text = TextEmbedding(torch.randn(1, 77, row.text_width, generator=generator), pooled, sizes)
    x = torch.randn(1, 4, SIDE, SIDE, generator=generator)
    return x, torch.tensor([500]), text, torch.rand(1, 3, 8 * SIDE, 8 * SIDE, generator=generator)


def with_drawn_joins(stock, call):
    """A stock network whose joins are drawn so that each residual is half as spread as the feature it comes from."""
    joins = [*stock.controlnet_down_blocks, stock.controlnet_mid_block]
    torch.manual_seed(2)
    entry = stock.controlnet_cond_embedding.conv_out
    with torch.no_grad():
        for parameter in entry.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.05)
        for join in joins:
            for parameter in join.parameters():
                parameter.copy_(torch.randn(parameter.shape))
        spreads = {}
        hooks = [
            join.register_forward_hook(lambda m, args, out: spreads.update({m: args[0].std() / out.std()}))
            for join in joins
        ]
        call(stock)
        for hook in hooks:
            hook.remove()
        for join in joins:
            for parameter in join.parameters():
                parameter.mul_(0.5 * spreads[join])
    return stock


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_encoder_then_decoder_is_the_unet_with_residuals_everywhere(name):
    base = base_of(name, "cpu")
    x, t, text, _ = draw_rows(name)
    generator = torch.Generator().manual_seed(3)
    inject = {
        tap.name: 0.5 * torch.randn(1, tap.channels, *[8 * SIDE // tap.stride] * 2, generator=generator)
        for tap in base.taps
    }
    ours = base.decode_noise(base.encode_noise(x, t, text, inject), inject)
    theirs = base.unet(
        x,
        t,
        text.tokens,
        down_intrablock_additional_residuals=[inject[tap.name] for tap in base.taps if tap.site == "encoder"],
        down_block_additional_residuals=[inject[tap.name] for tap in base.taps if tap.site == "skip"],
        mid_block_additional_residual=inject["middle"],
        **added(text),
    ).sample
    assert relative(ours, theirs) <= 1e-5
    plain = base.decode_noise(base.encode_noise(x, t, text))
    assert relative(ours, plain) > 0.01


def added(text):
    return {} if text.pooled is None else {"added_cond_kwargs": {"text_embeds": text.pooled, "time_ids": text.sizes}}


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_every_residual_is_diffusers(name):
    x, t, text, hint = draw_rows(name)

    def call(network):
        return network(x, t, text.tokens, hint, **added(text), return_dict=False)

    torch.manual_seed(0)
    config = config_of(name)
    stock = with_drawn_joins(ControlNetModel(**config).eval(), call)
    down, middle = call(stock)
    base = base_of(name)
    branch = read_network(name, Weights("controlnet", stock.state_dict(), config), base, ControlSpec()).eval()
    ours = branch(x, t, text, branch.encode_hint(hint))
    distances = [relative(ours[tap.name], r) for tap, r in zip(base.branch_taps, [*down, middle], strict=True)]
    print(f"{name}: {sum(p.numel() for p in branch.parameters()):,} parameters, largest distance {max(distances):.1e}")
    assert max(distances) <= 1e-5


@torch.no_grad()
def test_every_residual_of_a_union_is_diffusers():
    x, t, text, hint = draw_rows("sdxl")
    code = torch.zeros(1, 8)
    code[0, [1, 3]] = 1
    hints = {"depth": hint, "canny": hint.flip(-1)}

    def call(network):
        return network(x, t, text.tokens, list(hints.values()), code, [1, 3], **added(text), return_dict=False)

    torch.manual_seed(0)
    config = config_of("sdxl", num_control_type=8, num_trans_layer=1, num_trans_head=8)
    stock = ControlNetUnionModel(**config).eval()
    for parameter in (*stock.spatial_ch_projs.parameters(),):
        torch.nn.init.normal_(parameter, std=0.05)
    stock = with_drawn_joins(stock, call)
    down, middle = call(stock)
    base = base_of("sdxl")
    branch = read_network("union", Weights("union", stock.state_dict(), config), base, ControlSpec()).eval()
    ours = branch(x, t, text, branch.encode_hint(hints))
    distances = [relative(ours[tap.name], r) for tap, r in zip(base.branch_taps, [*down, middle], strict=True)]
    print(f"union: {sum(p.numel() for p in branch.parameters()):,} parameters, largest distance {max(distances):.1e}")
    assert max(distances) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("sd15", (3, [320, 640, 1280, 1280], 2, 8, "full_adapter")),
        ("sd15", (3, [320, 640, 1280], 4, 8, "light_adapter")),
        ("sdxl", (3, [320, 640, 1280, 1280], 2, 16, "full_adapter_xl")),
    ],
    ids=["full", "light", "full_xl"],
)
def test_every_feature_of_an_adapter_is_diffusers_and_fits_its_tap(name, arguments):
    torch.manual_seed(0)
    stock = T2IAdapter(*arguments).eval()
    branch = Adapter(stock, base_of(name).taps)
    hint = torch.rand(1, 3, 256, 256)
    for tap, (ours, theirs) in zip(
        branch.taps, zip(branch.encode_hint(hint).values(), stock(hint), strict=True), strict=True
    ):
        assert relative(ours, theirs) <= 1e-5
        assert theirs.shape[1:] == (tap.channels, 256 // tap.stride, 256 // tap.stride)


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_is_bit_identical(name, tmp_path):
    torch.manual_seed(0)
    with torch.device("meta"):
        empty = ControlNetModel(**config_of(name)).half()
    stock = empty.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.uniform_(-1, 1)
    stock.save_pretrained(tmp_path / "a")
    truth = {key: tensor.clone() for key, tensor in stock.state_dict().items()} if name == "sd15" else None
    del stock, empty
    convert(tmp_path / "a", tmp_path / "b.safetensors", "cldm")
    convert(tmp_path / "b.safetensors", tmp_path / "c", "diffusers")
    before, after = (read_weights(tmp_path / folder)[0].tensors for folder in ("a", "c"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert describe(tmp_path / "b.safetensors").base == name
    if truth:  # the one family whose original layout diffusers reads, given a configuration
        read = ControlNetModel.from_single_file(tmp_path / "b.safetensors", config=str(tmp_path / "a"))
        assert all(torch.equal(tensor.half(), truth[key]) for key, tensor in read.state_dict().items())
    assert (tmp_path / "c" / WEIGHTS).stat().st_size > 2 * 360_000_000
