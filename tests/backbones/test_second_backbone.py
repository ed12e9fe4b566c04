"""A second kind of base, nothing like a U-Net: a transformer that predicts a flow, controlled at tokens.

Everything else works on it unchanged: training, resuming, files, sampling, measuring.
"""

import copy
import hashlib
from contextlib import nullcontext
from functools import cached_property

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from controlkit.backbones import ActiveControl, Backbone, Flow, TextEmbedding
from controlkit.branch import Tap, add_residuals
from controlkit.controls import new_control
from controlkit.errors import Unsupported, UserError
from controlkit.formats import load_control
from controlkit.hub import digest
from controlkit.prompts import Words
from controlkit.train import train_control
from controlkit.train.recipe import parse_recipe

WIDTH, BLOCKS, COPIED = 32, 4, 2
INJECTION = {"block_0": (0, 1), "block_1": (2, 3)}
"""Which sample of a branch goes to which blocks of the base: an interval, as data."""


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x):
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norms[1](x))


class Encoder(nn.Module):
    """Latents to tokens, and the first blocks: what a branch copies."""

    def __init__(self, channels, blocks):
        super().__init__()
        self.embed = nn.Conv2d(channels, WIDTH, 1)
        self.time = nn.Linear(2, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def tokens(self, x, t, text):
        share = (t.float() / 1000)[:, None].to(x.dtype)
        condition = self.time(torch.cat([share, 1 - share], 1)) + text.tokens.mean(1)
        return self.embed(x).flatten(2).transpose(1, 2) + condition[:, None]

    def forward(self, x, t, text, hint):
        tokens, features = self.tokens(x, t, text) + hint.flatten(2).transpose(1, 2), []
        for block in self.blocks:
            tokens = block(tokens)
            features.append(tokens)
        return features


class Denoiser(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.encoder = Encoder(channels, BLOCKS)
        self.out = nn.Linear(WIDTH, channels)

    def forward(self, x, t, text, inject):
        tokens = self.encoder.tokens(x, t, text)
        for number, block in enumerate(self.encoder.blocks):
            tokens = block(tokens)
            for name, places in INJECTION.items():
                if number in places and name in inject:
                    tokens = tokens + inject[name]
        return self.out(tokens).transpose(1, 2).unflatten(2, x.shape[-2:])


class TransformerBase:
    """A ``Backbone``. Latents are pixels rearranged; a hint enters as latents."""

    name, size, stride, window = "transformer", 32, 4, 8
    device, dtype, multiple, latent_channels = torch.device("cpu"), torch.float32, 4, 48
    network_config, placement, shares_rows, has_halves = None, None, False, False

    def __init__(self):
        torch.manual_seed(0)
        self.noise = Flow()
        self.denoiser = Denoiser(self.latent_channels).eval().requires_grad_(False)
        first, own = Encoder(self.latent_channels, COPIED), self.denoiser.encoder.state_dict()
        first.load_state_dict({name: value for name, value in own.items() if name in first.state_dict()})
        self.encoder = first.requires_grad_(False)  # here, not when it is asked for: new weights draw random numbers

    taps = branch_taps = tuple(Tap(f"block_{i}", "block", WIDTH, 4) for i in range(COPIED))

    @property
    def signature(self):
        return {"taps": [[tap.name, tap.channels, tap.stride] for tap in self.taps], "latents": self.latent_channels}

    @cached_property
    def digest(self):
        return digest(self.denoiser.state_dict())

    text_digest = "words hashed"

    def cut_words(self, prompt):
        return " ".join(prompt.split()[self.window :])

    def windows_of(self, words):
        return 1

    def encode_text(self, prompts, size=None):
        rows = []
        for prompt in prompts:
            prompt = prompt.text if isinstance(prompt, Words) else prompt
            words = [hashlib.blake2b(word.encode(), digest_size=4).digest() for word in (prompt or "").split()]
            codes = [torch.Generator().manual_seed(int.from_bytes(word, "little")) for word in words[: self.window]]
            vectors = [torch.randn(WIDTH, generator=code) for code in codes]
            rows.append(torch.stack([*vectors, *[torch.zeros(WIDTH)] * (self.window - len(vectors))]))
        return TextEmbedding(torch.stack(rows))

    def text_shapes(self):
        return {"tokens": (self.window, WIDTH)}

    def text_keys(self, prompts):
        return [prompt.encode() for prompt in prompts]

    def encode_moments(self, pixels):
        latents = F.pixel_unshuffle(pixels, self.stride)
        return torch.cat([latents, torch.full_like(latents, -30.0)], 1)

    def moments_key(self):
        return "rearranged"

    def draw_latents(self, moments, noise):
        mean, log_variance = moments.chunk(2, 1)
        return mean + (0.5 * log_variance).exp() * noise

    def mean_latents(self, moments):
        return moments.chunk(2, 1)[0]

    def decode_latents(self, latents):
        return F.pixel_shuffle(latents, self.stride).clamp(-1, 1)

    def latent_shape(self, size):
        return self.latent_channels, size[0] // self.stride, size[1] // self.stride

    def predict(self, x, t, text, controls=()):
        residuals = [one.scaled(one.network(x, t, text, one.features)) for one in controls]
        return self.denoiser(x, t, text, add_residuals(residuals))

    def control_effect(self, x, t, text, control):
        residuals = control.network(x, t, text, control.features)
        return {name: (residual, torch.ones_like(residual)) for name, residual in residuals.items()}

    def hint_input(self, hint):
        return F.pixel_unshuffle(hint * 2 - 1, self.stride)

    def hint_shape(self, channels):
        return channels * self.stride**2, 1

    def copy_encoder(self):
        return copy.deepcopy(self.encoder).requires_grad_(True)

    def empty_encoder(self):
        return copy.deepcopy(self.encoder).to("meta")

    def conv_body(self):
        raise Unsupported("A body of convolutions adds to maps, and this base takes tokens.")

    def bring(self, part):
        """All of it stays where it is."""

    def networks(self):
        return {"transformer": self.denoiser}

    def with_own_denoiser(self):
        other = TransformerBase()
        other.denoiser = copy.deepcopy(self.denoiser)
        return other

    def of_size(self, size):
        other = copy.copy(self)
        other.size = size
        return other

    def autocast(self):
        return nullcontext()

    def inference(self):
        return self.autocast()

    def to(self, device):
        return self


@pytest.fixture(scope="module")
def base() -> Backbone:
    return TransformerBase()


@pytest.fixture
def inputs(base):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, *base.latent_shape((32, 32)), generator=generator)
    return x, torch.tensor([300, 700]), base.encode_text(["gold circle", ""]), torch.rand(2, 3, 32, 32)


def features_of(base, branch, hint):
    return branch.encode_hint(base.hint_input(hint))


@torch.no_grad()
def test_at_birth_the_branch_is_silent_and_its_residuals_are_tokens(base, inputs):
    x, t, text, hint = inputs
    branch = new_control(base)
    features = features_of(base, branch, hint)
    residuals = branch(x, t, text, features)
    assert {name: tuple(r.shape) for name, r in residuals.items()} == dict.fromkeys(INJECTION, (2, 64, WIDTH))
    controlled = base.predict(x, t, text, [ActiveControl(branch, features)])
    assert torch.equal(controlled, base.predict(x, t, text))


@torch.no_grad()
def test_scales_of_tokens_may_be_numbers_rows_and_maps(base, inputs):
    x, t, text, hint = inputs
    branch = new_control(base)
    for join in branch.joins.values():
        nn.init.normal_(join.weight)
    features = features_of(base, branch, hint)
    whole = base.predict(x, t, text, [ActiveControl(branch, features)])
    halves = torch.zeros(2, 1, 8, 8)
    halves[:, :, :4] = 1  # the upper half of the picture

    def under(value):
        strength = dict.fromkeys(INJECTION, value)
        return base.predict(x, t, text, [ActiveControl(branch, features, strength)])

    assert torch.equal(under(1.0), whole) and torch.equal(under(torch.ones(2, 1, 1, 1)), whole)
    assert torch.allclose(under(torch.ones(2, 1, 8, 8)), whole, atol=1e-6)
    first = under(torch.tensor([1.0, 0.0]).view(2, 1, 1, 1))
    assert torch.equal(first[0], whole[0]) and torch.equal(first[1], base.predict(x, t, text)[1])
    part = ActiveControl(branch, features, dict.fromkeys(INJECTION, halves)).scaled(
        {"block_0": torch.ones(2, 64, WIDTH)}
    )
    assert part[1]["block_0"][0, :, 0].view(8, 8).mean(1).tolist() == [1.0] * 4 + [0.0] * 4


def test_a_flow_is_noised_and_predicted_straight():
    flow = Flow()
    latents, noise = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    z = flow.add(latents, noise, torch.tensor([0, 500]))
    assert z[0].eq(0).all() and z[1].eq(0.5).all() and flow.target(latents, noise, None).eq(1).all()
    x = torch.randn(1, 3, 4, 4)
    sampler = flow.sampler(7)
    noisy = sampler.start(x)
    for t in sampler.timesteps:  # the true velocity to zero, from where we are, leads there exactly
        noisy = sampler.step(noisy / (t / 1000), t, noisy)
    assert noisy.abs().max() < 1e-5


def test_it_trains_resumes_samples_and_is_measured(base, tmp_path):
    recipe = parse_recipe(
        {
            "steps": 10,
            "batch": 4,
            "lr": 1e-2,
            "checkpoint_every": 5,
            "control": {"annotator": "canny"},
            "data": {"source": "fill50k", "count": 8},
            "evaluation": {"every": 5, "num": 4, "steps": 3},
        }
    )
    records = list(train_control(recipe, tmp_path / "run", base))
    assert len(records) == 10 and all(np.isfinite(record.loss) for record in records)
    measured = [record.evaluation for record in records if record.evaluation]
    assert len(measured) == 2 and measured[-1].metric == "edge_f1" and measured[-1].ceiling.mean > 0.99
    assert set(records[-1].residuals) == set(INJECTION) and min(records[-1].residuals.values()) > 0
    assert (tmp_path / "run" / "samples" / "step-0000010.png").is_file()

    interrupted = train_control(recipe, tmp_path / "again", base)
    for _ in range(7):
        next(interrupted)
    interrupted.close()
    rest = list(train_control(recipe, tmp_path / "again", base))
    assert [record.loss for record in rest] == [record.loss for record in records[5:]]

    saved = load_control(tmp_path / "run" / "control", base)
    other = load_control(tmp_path / "again" / "control", base)
    assert saved.hint.annotator == "canny" and saved.branch.taps == base.taps
    for name, value in saved.branch.state_dict().items():
        assert torch.equal(value, other.branch.state_dict()[name]), name


def test_a_control_of_another_kind_of_base_is_refused(base, toy_base, tmp_path):
    from controlkit.formats import SavedControl, save_control
    from controlkit.images import HintSpec

    save_control(tmp_path / "tokens", SavedControl(new_control(base), HintSpec("canny")), base)
    with pytest.raises(UserError, match="was made for the base"):
        load_control(tmp_path / "tokens", toy_base)
