"""What the tests share: a toy base with random weights, drawn joins, and picture packages made up on the spot."""

import colorsys
import copy
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageDraw
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from controlkit import cli, precision
from controlkit.annotators import contract
from controlkit.backbones import load_base
from controlkit.baselines import About, Material, Settings, opponent, save_baseline, train_baseline
from controlkit.controls import new_control, new_union
from controlkit.data import CirclePairs, ScenePairs, build_cache
from controlkit.formats import SavedControl, save_control
from controlkit.images import HintSpec
from controlkit.measure import Referee
from controlkit.mini.tower import WINDOW, ImageTextTower, train_tokenizer
from controlkit.mini.world import PACKAGES
from controlkit.reproduce import conditions, entrants
from controlkit.sample import ControlRequest, Request, maker
from controlkit.train.recipe import parse_recipe

sys.path.insert(0, str(Path(__file__).parents[1]))
recipe = importlib.import_module("recipes.mini")
torch.set_num_threads(1)  # bit-exactness is claimed for one thread count


def relative(ours, theirs):
    """The relative L2 distance of two tensors, or of two lists of them."""
    ours, theirs = (torch.cat([t.flatten() for t in ([v] if torch.is_tensor(v) else v)]) for v in (ours, theirs))
    assert ours.shape == theirs.shape
    return ((ours - theirs).norm() / theirs.norm()).item()


def draw_inputs(base, height=8, width=8, hint_channels=3, seed=1):
    """Two rows of what a branch reads: latents, timesteps, prompt embeddings and a hint, all at random."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, base.unet.config.in_channels, height, width, generator=generator)
    hint = torch.rand(2, hint_channels, height * base.stride, width * base.stride, generator=generator)
    return x, torch.tensor([300, 700]), base.encode_text(["a red apple", ""]), hint


def stock_inputs(inputs):
    """The first three of ``draw_inputs`` as diffusers' own modules take them, and SDXL's conditions by name."""
    x, t, text = inputs[:3]
    added = {} if text.pooled is None else {"text_embeds": text.pooled, "time_ids": text.sizes}
    return (x, t, text.tokens), {"added_cond_kwargs": added} if added else {}


@torch.no_grad()
def randomised(union, seed=0):
    """A Union whose joins, hint encoder and types' code are drawn: it has learnt something of every type."""
    generator = torch.Generator().manual_seed(seed)
    code = union.control_add_embedding
    for module in (union.hint_encoder.convs[-1], *union.joins.values(), code.linear_1, code.linear_2):
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
    for parameter in code.linear_2.parameters():
        parameter.mul_(4)
    return union.eval()


def asked(controls, hints, uses=(), **settings):
    """(a request, its controls by name): controls in memory, hints as they are; ``uses``: each control's settings."""
    names = [str(i) for i in range(len(controls))]
    parts = zip(names, hints, uses or [{}] * len(names), strict=True)
    used = [ControlRequest(name=name, images=hint, ready=True, **use) for name, hint, use in parts]
    return Request(controls=used, **settings), dict(zip(names, controls, strict=True))


def make(base, controls=(), hints=(), uses=(), **settings):
    """The picture of one request of ``asked``."""
    request, loaded = asked(controls, hints, uses, **settings)
    [picture] = maker(base, loaded)([request])
    return picture


class StandIn:
    """In place of wandb or trackio: what it was told."""

    def __init__(self):
        self.begun, self.logged, self.ended = [], [], 0

    def init(self, **settings):
        self.begun.append(settings)

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.ended += 1

    def Image(self, picture):  # noqa: N802
        return picture


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    """The same number format on every machine: no probe decides a test."""
    monkeypatch.setattr(precision, "bf16_pays", lambda device_type: False)
    monkeypatch.setattr(precision, "_settled", {})


@pytest.fixture(autouse=True)
def _own_store(monkeypatch, tmp_path_factory):
    """What tests compute is not kept for anybody, nor taken from anybody."""
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def weights_folder(tmp_path, monkeypatch):
    """An empty folder of annotators' weights, an empty cache, and nothing in the hub's."""
    monkeypatch.setenv("CONTROLKIT_ANNOTATORS", str(tmp_path / "weights"))
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line as a shell would: (exit code, standard output, standard error)."""

    monkeypatch.setenv("COLUMNS", "1000")  # no sentence is broken, however long a temporary folder's name is

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["controlkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out = capsys.readouterr()
        return stopped.value.code or 0, out.out, out.err

    return call


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    """An untrained base in Stable Diffusion's anatomy, 32 pixels, stride 4, as a diffusers folder."""
    root = tmp_path_factory.mktemp("toy")
    texts = ["a red apple, 3d style, on a teal background", "gold circle with navy background", recipe.PLAIN] * 4
    tokenizer = train_tokenizer(texts, 600, root / "tokenizer")
    size = recipe.SIZES["toy"]
    width, layers = size.text
    marks = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=1,
            max_position_embeddings=WINDOW,
            **marks,
        )
    )
    vae = recipe.build_vae(size)
    vae.register_to_config(scaling_factor=0.5)
    recipe.save_base(root / "toy", vae, text_encoder, tokenizer, recipe.build_unet(size))
    return root / "toy"


@pytest.fixture(scope="session")
def toy_base(toy_folder):
    return load_base(toy_folder)


@pytest.fixture(scope="session")
def deep_base(toy_base, tmp_path_factory):
    """The toy's neighbour, another U-Net: SD 1.5's blocks, four resolutions of two layers each."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16, 24),
        cross_attention_dim=toy_base.unet.config.cross_attention_dim,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    folder = tmp_path_factory.mktemp("deep") / "deep"
    vae, text_encoder = copy.deepcopy(toy_base.vae), copy.deepcopy(toy_base.towers[0].encoder)  # saving halves them
    recipe.save_base(folder, vae, text_encoder, toy_base.towers[0].tokenizer, unet)
    return load_base(folder)


@pytest.fixture(scope="session")
def released_vae():
    """An untrained VAE of the released ones' stride, 8, and of next to no channels."""
    torch.manual_seed(2)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(**blocks, block_out_channels=(8,) * 4, latent_channels=4, norm_num_groups=4, sample_size=64)


@pytest.fixture(scope="session")
def sd2_base(toy_base, released_vae, tmp_path_factory):
    """SD 2.1 at toy size: linear projections, heads by level, attention in single precision, v-prediction."""
    torch.manual_seed(3)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 24, 24),
        cross_attention_dim=toy_base.unet.config.cross_attention_dim,
        attention_head_dim=(2, 4, 6, 6),
        use_linear_projection=True,
        upcast_attention=True,
        norm_num_groups=4,
    )
    folder = tmp_path_factory.mktemp("sd2") / "sd2"
    vae, encoder = copy.deepcopy(released_vae), copy.deepcopy(toy_base.towers[0].encoder)
    recipe.save_base(folder, vae, encoder, toy_base.towers[0].tokenizer, unet)
    return load_base(folder)


@pytest.fixture(scope="session")
def xl_folder(toy_base, released_vae, tmp_path_factory):
    """SDXL at toy size, as a diffusers folder: no attention at the finest level, deeper below, two text towers, pooled
    prompt and sizes, noise prediction."""
    torch.manual_seed(4)
    width = toy_base.unet.config.cross_attention_dim
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16, 24),
        transformer_layers_per_block=(1, 2, 3),
        cross_attention_dim=2 * width,
        attention_head_dim=(2, 4, 6),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
        norm_num_groups=4,
    )
    first = toy_base.towers[0]
    second = CLIPTextModelWithProjection(CLIPTextConfig(**first.encoder.config.to_dict() | {"projection_dim": 16}))
    vae = copy.deepcopy(released_vae)
    vae.register_to_config(scaling_factor=0.13025, force_upcast=True)
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=copy.deepcopy(first.encoder),
        text_encoder_2=second,
        tokenizer=first.tokenizer,
        tokenizer_2=first.tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
    )
    folder = tmp_path_factory.mktemp("xl") / "xl"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def xl_base(xl_folder):
    return load_base(xl_folder)


@pytest.fixture(scope="session")
def drawn_joins(toy_base):
    """``drawn_joins(branch, seed)`` draws what is born zero, so that a residual's spread is 0.1 to 1 of its skip's.

    A fresh branch emits exact zeros, which any shortcut would match.
    """

    @torch.no_grad()
    def draw(branch, seed=0, base=toy_base):
        generator = torch.Generator().manual_seed(seed)
        x, t, text, hint = draw_inputs(base, hint_channels=branch.hint_encoder.convs[0].in_channels)
        encoded = base.encode_noise(x, t, text)
        plain = dict(zip([tap.name for tap in base.branch_taps], [*encoded.skips, encoded.middle], strict=True))

        def randomise(conv):
            for parameter in conv.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

        def rescale(conv, output, spread):
            for parameter in conv.parameters():
                parameter.mul_(spread / output.std())

        entry = branch.hint_encoder.convs[-1]
        for conv in (entry, *branch.joins.values()):
            randomise(conv)
        rescale(entry, branch.encode_hint(hint), plain["skip_0"].std())
        for name, residual in branch(x, t, text, branch.encode_hint(hint)).items():
            share = 0.2 + 0.6 * torch.rand((), generator=generator)
            rescale(branch.joins[name], residual, share * plain[name].std())
        return branch

    return draw


@pytest.fixture(scope="session")
def union_folder(toy_base, tmp_path_factory):
    """A Union of the toy base, with something learnt of each of five types; alone in its folder, as if shipped."""
    hints = {kind: contract(kind) for kind in ("canny", "scribble", "depth", "pose", "inpaint")}
    trained = {"base": toy_base.name, "base_digest": toy_base.digest, "data": "world"}
    saved = SavedControl(randomised(new_union(toy_base)), HintSpec(""), trained, hints)
    folder = tmp_path_factory.mktemp("shipped") / "union"
    save_control(folder, saved, toy_base)
    return folder


@pytest.fixture
def holed():
    """(a smooth picture, the same with a hole)."""
    y, x = np.mgrid[:64, :64]
    picture = np.stack([60 + x, 60 + y, 120 + 0 * x], -1).astype(np.uint8)
    hint = np.dstack([picture, np.full((64, 64), 255, np.uint8)])
    hint[20:40, 20:40] = 0
    return picture, hint


@pytest.fixture(scope="session")
def referee(toy_base, tmp_path_factory):
    """A referee with random weights, in the form the recipe saves."""
    folder = tmp_path_factory.mktemp("referee")
    tokens = toy_base.towers[0].tokenizer
    text = {name: getattr(tokens, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text |= {"vocab_size": len(tokens), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 1, "max_position_embeddings": toy_base.window}
    image = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    torch.manual_seed(0)
    ImageTextTower({"pixels": 32, "space": 8, "text": text, "image": image}).save(folder)
    tokens.save_pretrained(folder)
    return Referee(folder)


@pytest.fixture
def to_diffusers(toy_base, tmp_path):
    """``to_diffusers(branch)`` is the stock ``ControlNetModel`` read from the folder that we write."""

    def convert(branch, base=toy_base):
        save_control(tmp_path / "peer", SavedControl(branch, HintSpec("canny")), base)
        return ControlNetModel.from_pretrained(tmp_path / "peer").eval()

    return convert


CODES = {  # concept -> code point; of these, three concepts and seven pictures are held out
    "red-apple": "1f34e",
    "banana": "1f34c",
    "cat-face": "1f431",
    "mushroom": "1f344",
    "pizza": "1f355",
    "red-heart": "2764-fe0f",
    "star": "2b50",
    "horizontal-traffic-light": "1f6a5",  # not a skin tone, though it ends like one
    "waving-hand": "1f44b",
    "waving-hand-light-skin-tone": "1f44b-1f3fb",
    "automobile": "1f697",
    "carrot": "1f955",
    "cherries": "1f352",
}


@pytest.fixture(scope="session")
def _packages_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    for style, package in PACKAGES.items():
        folder = root / "packages" / package.file.removesuffix(".tgz")
        (folder / "assets").mkdir(parents=True)
        if style == "3d":
            for i, code in enumerate(CODES.values()):
                picture = Image.new("RGBA", (64, 64))
                ImageDraw.Draw(picture).ellipse((4, 4 + i, 60, 60 - i), _colour(i), "black", 3)
                picture.save(folder / "assets" / f"{code}.webp", lossless=True)
            continue
        disc, bar = '<circle cx="16" cy="16" r="14" fill="{}"/>', '<rect x="9" y="{}" width="12" height="12"/>'
        icons = {name: {"body": disc.format(_colour(i)) + bar.format(i)} for i, name in enumerate(CODES)}
        (folder / "icons.json").write_text(json.dumps({"icons": icons, "width": 32, "height": 32}))
        (folder / "chars.json").write_text(json.dumps({code: name for name, code in CODES.items()}))
    return root


def _colour(i):
    rgb = colorsys.hsv_to_rgb(i / len(CODES), 0.9, 0.9)
    return "#" + "".join(f"{round(255 * value):02x}" for value in rgb)


@pytest.fixture
def fake_packages(_packages_folder, monkeypatch):
    """A cache in which the five picture packages lie unpacked, a dozen tiny pictures each; the cache's folder."""
    monkeypatch.setenv("CONTROLKIT_CACHE", str(_packages_folder))
    return _packages_folder


TINY = {
    "data": {"source": "fill50k", "count": 8},
    "steps": 6,
    "batch": 2,
    "lr": 1e-3,
    "checkpoint_every": 2,
    "evaluation": {"every": 3, "num": 2, "steps": 1},
}


@pytest.fixture(scope="session")
def tiny_recipe():
    """``tiny_recipe(**changes)``: a run of six steps; a section's changes are merged into its values."""

    def make(**changes):
        merged = {key: TINY.get(key, {}) | new if isinstance(new, dict) else new for key, new in changes.items()}
        return parse_recipe(TINY | merged)

    return make


# --- the paper's opponents and its tables --------------------------------------------------------------------------


@pytest.fixture(scope="session")
def material_for(toy_base, tmp_path_factory):
    """``material_for(kind)``: eight circles, their outlines as hints of a kind, for steps of two."""
    made = {}

    def make(kind):
        if kind not in made:
            pairs, spec = CirclePairs(toy_base.size, 8), contract(kind)
            [cached] = build_cache(toy_base, pairs, {"": spec}, tmp_path_factory.mktemp("pairs") / "pairs.safetensors")
            made[kind] = Material(toy_base, spec, pairs, cached, 2)
        return made[kind]

    return make


@pytest.fixture(scope="session")
def fresh(toy_base):
    """``fresh(name)``: an untrained opponent on the toy base, made anew each time."""
    return lambda name: opponent(name).new(toy_base)


@pytest.fixture(scope="session")
def requests_of(material_for):
    """``requests_of(kind, steps)``: two requests, each with a circle's hint; settings of the control by name."""

    def make(kind, steps=2, guidance=4.0, **control):
        material = material_for(kind)
        hints = [material.cached.hints[i].numpy() for i in range(2)]
        return [
            Request(
                prompt=material.pairs[i].prompt,
                seed=i,
                steps=steps,
                guidance=guidance,
                controls=(ControlRequest(name=kind, images=hint, ready=True, **control),),
            )
            for i, hint in enumerate(hints)
        ]

    return make


@pytest.fixture
def untrained_shipped(toy_base, monkeypatch):
    """Tables of the paper with few scenes, and a fresh control in place of the shipped one, which is another base's."""

    def few(source, size, num, person=False):
        return ScenePairs(size, 60, 7, heldout=True, count=num, person=person), [
            p.picture for p in ScenePairs(size, 60, 7, count=8)
        ]

    monkeypatch.setattr(entrants, "evaluation_pairs", few)
    branch = new_control(toy_base).eval()
    for module in (entrants, conditions):
        monkeypatch.setattr(module, "load", lambda name, base: (SavedControl(branch, contract(name)), []))


@pytest.fixture
def sketchy(toy_base, tmp_path):
    """A folder with an untrained edge predictor alone."""
    about = About(name="sketch-guided", hint="canny", base=toy_base.name, base_digest=toy_base.digest)
    save_baseline(tmp_path / "opponents" / "sketch-guided", opponent("sketch-guided").new(toy_base), about)
    return tmp_path / "opponents"


@pytest.fixture
def opponents(toy_base, material_for, tmp_path):
    """A folder with one opponent, trained for a step."""
    folder = tmp_path / "opponents"
    list(train_baseline("lite", toy_base, Settings(steps=1), folder / "lite", material=material_for("seg")))
    return folder
