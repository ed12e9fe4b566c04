"""What the tests share: a toy base with random weights, drawn joins, and picture packages made up on the spot."""

import colorsys
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

from controlkit import precision
from controlkit.backbones import load_base
from controlkit.mini.tower import WINDOW, train_tokenizer
from controlkit.mini.world import PACKAGES

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)  # bit-exactness is claimed for one thread count


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    """The same number format on every machine: no probe decides a test."""
    monkeypatch.setattr(precision, "bf16_pays", lambda device_type: False)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    """An untrained base in Stable Diffusion's anatomy, 32 pixels, stride 4, as a diffusers folder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    recipe = importlib.import_module("recipes.mini")
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
def drawn_joins(toy_base):
    """``drawn_joins(branch, seed)`` draws what is born zero, so that a residual's spread is 0.1 to 1 of its skip's.

    A fresh branch emits exact zeros, which any shortcut would match.
    """

    @torch.no_grad()
    def draw(branch, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(shape, generator=generator)

        def scale_to(conv, spread, wanted):
            for parameter in conv.parameters():
                parameter.mul_(wanted / spread)

        convs = branch.hint_encoder.convs
        for conv in (convs[-1], *branch.joins.values()):
            conv.weight.copy_(randn(*conv.weight.shape))
            conv.bias.copy_(randn(*conv.bias.shape))
        x, t, text = randn(2, 4, 8, 8), torch.tensor([300, 700]), toy_base.encode_text(["a red apple", ""])
        encoded = toy_base.encode_noise(x, t, text)
        plain = dict(zip([tap.name for tap in toy_base.taps], [*encoded.skips, encoded.middle], strict=True))
        side = 8 * toy_base.stride
        hint = torch.rand(2, convs[0].in_channels, side, side, generator=generator)
        scale_to(convs[-1], branch.encode_hint(hint).std(), plain["skip_0"].std())
        for name, residual in branch(x, t, text, branch.encode_hint(hint)).items():
            share = 0.2 + 0.6 * torch.rand((), generator=generator)
            scale_to(branch.joins[name], residual.std(), share * plain[name].std())
        return branch

    return draw


CODES = {  # concept -> code point; of these, three concepts and five pictures are held out
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
        folder = root / "packages" / package.tarball.removesuffix(".tgz")
        (folder / "assets").mkdir(parents=True)
        if style == "3d":
            for i, code in enumerate(CODES.values()):
                picture = Image.new("RGBA", (64, 64))
                ImageDraw.Draw(picture).ellipse((4, 4 + i, 60, 60 - i), _colour(i), "black", 3)
                picture.save(folder / "assets" / f"{code}.webp", lossless=True)
            continue
        icons = {
            name: {"body": f'<circle cx="16" cy="16" r="14" fill="{_colour(i)}"/><rect x="9" y="{i}" width="12" height="12"/>'}
            for i, name in enumerate(CODES)
        }
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
