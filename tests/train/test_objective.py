"""A batch's draws, keyed by what they are for; and the paper's objective."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_runs import CANNY, equal

from conftest import make, randomised, stock_inputs
from controlkit.backbones import TextEmbedding, UNetBase
from controlkit.controls import new_control, new_union
from controlkit.controls.union import OneType
from controlkit.data import Cached, CirclePairs, build_cache
from controlkit.formats import SavedControl, save_control
from controlkit.formats.names import key_table
from controlkit.images import HintSpec
from controlkit.train import Batch, BatchPlan, draw_batch, objective


@pytest.fixture(scope="module")
def cached():
    """Ten pairs that can be told apart: pair i has latents i, hint i, and row i + 1 of the text; no spread."""
    moments = torch.cat([torch.arange(10.0).view(-1, 1, 1, 1).expand(10, 4, 8, 8), torch.full((10, 4, 8, 8), -30.0)], 1)
    hints = torch.arange(10, dtype=torch.uint8).view(-1, 1, 1, 1).expand(10, 32, 32, 3)
    text = torch.arange(11.0).view(-1, 1, 1).expand(11, 4, 32)
    kinds = torch.zeros(10, dtype=torch.int64)
    return Cached(moments.half(), hints.contiguous(), kinds, TextEmbedding(text.half()), torch.arange(1, 11))


def drawn_pairs(batch, toy_base):
    """Which pairs a batch has."""
    return (batch.latents.mean((1, 2, 3)) / toy_base.vae.config.scaling_factor).round().int().tolist()


def same(a, b):
    parts = [vars(one) | one.text.tensors() | {"text": one.t, "hints": one.hints[""]} for one in (a, b)]
    assert parts[0].pop("noises_per_pair") == parts[1].pop("noises_per_pair")
    return equal(*parts)


def test_a_step_s_batch_is_the_same_whatever_came_before(tiny_recipe, toy_base, cached):
    recipe = tiny_recipe()
    first = draw_batch(toy_base, cached, BatchPlan.of(recipe, {"": CANNY}), 7)
    torch.randn(100)
    np.random.default_rng().random()
    for step in (0, 3, 8):
        assert not same(draw_batch(toy_base, cached, BatchPlan.of(recipe, {"": CANNY}), step), first)
    assert same(draw_batch(toy_base, cached, BatchPlan.of(recipe, {"": CANNY}), 7), first)


def test_a_sample_s_draws_do_not_depend_on_the_batch_s_size(tiny_recipe, toy_base, cached):
    small, large = (
        draw_batch(toy_base, cached, BatchPlan.of(tiny_recipe(batch=batch), {"": CANNY}), 0) for batch in (2, 5)
    )
    cut = {name: value[:2] for name, value in vars(large).items() if name not in ("hints", "noises_per_pair")}
    assert same(Batch(**cut, hints={"": large.hints[""][:2]}), small)
    later = [draw_batch(toy_base, cached, BatchPlan.of(tiny_recipe(batch=batch), {"": CANNY}), 3) for batch in (2, 5)]
    assert torch.equal(later[0].noise, later[1].noise[:2]) and torch.equal(later[0].t, later[1].t[:2])


def test_samples_and_steps_have_draws_of_their_own(tiny_recipe, toy_base, cached):
    batches = [
        draw_batch(toy_base, cached, BatchPlan.of(tiny_recipe(seed=seed), {"": CANNY}), step)
        for seed in (0, 1)
        for step in (0, 1)
    ]
    noise = torch.cat([batch.noise for batch in batches])
    assert len(noise.unique(dim=0)) == len(noise) == 8
    spread = dataclasses.replace(cached, moments=torch.zeros_like(cached.moments))
    batch = draw_batch(toy_base, spread, BatchPlan.of(tiny_recipe(), {"": CANNY}), 0)
    latents = batch.latents / toy_base.vae.config.scaling_factor  # of mean 0 and variance 1: the draw itself
    assert latents.std() == pytest.approx(1, abs=0.15)
    assert abs((latents * batch.noise).mean()) < 0.15, "the latents' draw is not the noise"


def test_an_epoch_shows_every_pair_once_and_each_its_own_order(tiny_recipe, toy_base, cached):
    recipe = tiny_recipe(batch=2, prompt_dropout=0.0)
    epochs = []
    for epoch in range(2):
        batches = [
            draw_batch(toy_base, cached, BatchPlan.of(recipe, {"": CANNY}), epoch * 5 + step) for step in range(5)
        ]
        epochs.append([pair for batch in batches for pair in drawn_pairs(batch, toy_base)])
        for batch in batches:
            assert (255 * batch.hints[""][:, 0, 0, 0]).round().int().tolist() == drawn_pairs(batch, toy_base)
            assert (batch.text.tokens[:, 0, 0] - 1).int().tolist() == drawn_pairs(batch, toy_base)
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1] and epochs[0] != list(range(10))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_prompts_are_dropped_at_the_share_asked_for(tiny_recipe, share, toy_base, cached):
    recipe = tiny_recipe(batch=10, prompt_dropout=share)
    rows = torch.stack(
        [
            draw_batch(toy_base, cached, BatchPlan.of(recipe, {"": CANNY}), step).text.tokens[:, 0, 0]
            for step in range(60)
        ]
    )
    assert (rows == 0).float().mean() == pytest.approx(share, abs=0.06 if 0 < share < 1 else 0)


def test_timesteps_cover_the_schedule(tiny_recipe, toy_base, cached):
    recipe = tiny_recipe(batch=10)
    t = torch.cat(
        [draw_batch(toy_base, cached, BatchPlan.of(recipe, {"": CANNY}), step).t for step in range(60)]
    ).float()
    assert t.min() < 25 and t.max() > 975
    assert t.quantile(0.5) == pytest.approx(500, abs=60)


def test_several_draws_of_a_pair_share_its_hint_and_nothing_else(tiny_recipe, toy_base, cached):
    recipe = tiny_recipe(batch=12, noises_per_pair=4)
    batches = [draw_batch(toy_base, cached, BatchPlan.of(recipe, {"": CANNY}), step) for step in range(20)]
    for batch in batches:
        pairs = drawn_pairs(batch, toy_base)
        assert [len(set(pairs[i : i + 4])) for i in (0, 4, 8)] == [1, 1, 1] and len(set(pairs)) == 3
        assert len(batch.hints[""]) == 3 and len(batch.noise.unique(dim=0)) == 12
        assert (255 * batch.hints[""][:, 0, 0, 0]).round().int().tolist() == pairs[::4]
        shares = batch.t.view(3, 4) // 250
        assert shares.tolist() == [[0, 1, 2, 3]] * 3, "each from a share of the schedule of its own"
    dropped = torch.stack([batch.text.tokens[:, 0, 0] == 0 for batch in batches]).view(-1, 4).float().mean(1)
    assert 0 < dropped.mean() < 1 and len(dropped.unique()) > 2, "prompts are dropped row by row"
    assert sorted(pair for batch in batches[:10] for pair in drawn_pairs(batch, toy_base)[::4]) == sorted(
        [*range(10)] * 3
    ), "an epoch is every pair once"


@pytest.mark.parametrize("draws", [1, 2])
def test_the_parts_of_a_batch_are_its_rows(tiny_recipe, draws, toy_base, cached):
    recipe = tiny_recipe(batch=8, noises_per_pair=draws)
    whole = draw_batch(toy_base, cached, BatchPlan.of(recipe, {"": CANNY}), 3)
    parts = [draw_batch(toy_base, cached, BatchPlan.of(recipe, {"": CANNY}), 3, part, 4) for part in range(4)]
    assert [len(part.t) for part in parts] == [2] * 4
    for name in ("latents", "noise", "t"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert torch.equal(torch.cat([part.hints[""] for part in parts]), whole.hints[""])


def test_a_batch_of_several_types_keeps_each_row_with_its_own_hint_and_picture(tiny_recipe, toy_base, cached):
    contracts = {"canny": CANNY, "depth": HintSpec("depth", low=-1.0), "pose": HintSpec("pose")}
    typed = dataclasses.replace(cached, kinds=torch.arange(10) % 3)
    plain = draw_batch(toy_base, cached, BatchPlan.of(tiny_recipe(batch=7, prompt_dropout=0.0), {"": CANNY}), 1)
    batch = draw_batch(toy_base, typed, BatchPlan.of(tiny_recipe(batch=7, prompt_dropout=0.0), contracts), 1)
    pairs = drawn_pairs(batch, toy_base)
    assert sorted(pairs) == sorted(drawn_pairs(plain, toy_base))
    assert [pair % 3 for pair in pairs] == sorted(pair % 3 for pair in pairs)
    assert (batch.text.tokens[:, 0, 0] - 1).int().tolist() == pairs
    levels = {kind: (hint[:, 0, 0, 0] - contract.low) / (contract.high - contract.low)
              for kind, contract in contracts.items() if (hint := batch.hints.get(kind)) is not None}  # fmt: skip
    assert [round(255 * float(level)) for level in torch.cat(list(levels.values()))] == pairs
    order = [drawn_pairs(plain, toy_base).index(pair) for pair in pairs]
    assert torch.equal(batch.noise, plain.noise[order]) and torch.equal(batch.t, plain.t[order])


@pytest.fixture
def base_of(toy_base, xl_base):
    """``base_of(kind)``: the toy base, predicting v, or eps on the schedule of SD 1.5; or SDXL's anatomy."""

    def base(kind):
        b = toy_base
        if kind in ("v", "sdxl"):
            return b if kind == "v" else xl_base
        settings = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
        scheduler = type(b.scheduler).from_config(b.scheduler.config, **settings)
        return UNetBase("eps", b.vae, b.towers, b.unet, scheduler)

    return base


@pytest.mark.parametrize("kind", ["eps", "v", "sdxl"])
def test_the_objective_and_its_gradient_are_those_of_the_field_s_reference(kind, base_of, drawn_joins, tmp_path):
    from diffusers import ControlNetModel

    base = base_of(kind)
    assert base.noise.prediction == {"sdxl": "eps"}.get(kind, kind)
    branch = drawn_joins(new_control(base), base=base)
    save_control(tmp_path / "control", SavedControl(branch, CANNY), base)
    reference = ControlNetModel.from_pretrained(tmp_path / "control")
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    hints, t = torch.rand(3, 3, *[8 * base.stride] * 2, generator=generator), torch.tensor([0, 500, 999])
    batch = Batch(latents, noise, t, base.encode_text(["a red apple", "", "gold circle"]), {"": hints})

    alpha = base.scheduler.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    z = alpha * latents + sigma * noise
    rows, more = stock_inputs((z, t, batch.text))
    down, middle = reference(*rows, controlnet_cond=hints, **more, return_dict=False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    predicted = base.unet(*rows, **residuals, **more).sample
    expected = (
        (predicted - (noise if base.noise.prediction == "eps" else alpha * noise - sigma * latents)) ** 2
    ).mean()
    expected.backward()

    loss = objective(base, branch, batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs, names = dict(reference.named_parameters()), key_table(branch)
    for name, parameter in branch.named_parameters():
        wanted = theirs[names[name]].grad
        assert (parameter.grad - wanted).norm() <= 1e-4 * wanted.norm() + 1e-8, name
        assert wanted.norm() > 0, name


@pytest.mark.parametrize(
    "contract",
    [
        CANNY,
        HintSpec("x", low=-1.0),
        HintSpec("x", channels=1),
        HintSpec("x", colour_order="BGR"),
        HintSpec("x", resize="lines"),
    ],
    ids=["released", "from -1", "grey", "BGR", "lines"],
)
@pytest.mark.parametrize("name", ["toy_base", "xl_base"])
def test_the_hint_a_step_trains_on_is_the_hint_a_run_reads(tiny_recipe, name, contract, tmp_path, request, monkeypatch):
    """Elsewhere the two differ: in [-1, 1] in training and [0, 1] in use, or the other way round."""
    base = request.getfixturevalue(name)
    pair = CirclePairs(base.size, 1)[0]
    monkeypatch.setattr("controlkit.data.cache.hint_for_pair", lambda pair, contract: pair.hint)
    [cached] = build_cache(base, [pair], {"": contract}, tmp_path / "x")
    trained_on = draw_batch(base, cached, BatchPlan.of(tiny_recipe(batch=1), {"": contract}), 0).hints[""]
    branch = new_control(base, hint_channels=contract.channels)
    read = []
    branch.hint_encoder.register_forward_hook(lambda module, args, out: read.append(args[0]))
    make(base, [SavedControl(branch, contract)], [pair.hint], prompt="", steps=1)
    assert torch.equal(read[0], trained_on)


def test_the_objective_of_a_batch_of_types_is_the_mean_of_its_types_own(tiny_recipe, toy_base, cached):
    union = randomised(new_union(toy_base))
    typed = dataclasses.replace(cached, kinds=torch.arange(10) % 2)
    batch = draw_batch(toy_base, typed, BatchPlan.of(tiny_recipe(batch=6), {"canny": CANNY, "depth": CANNY}), 0)
    counts = [len(hint) for hint in batch.hints.values()]
    assert len(counts) == 2
    total, first = 0.0, 0
    for kind, hint in batch.hints.items():
        rows = slice(first, first + len(hint))
        own = {name: value[rows] for name, value in vars(batch).items() if name not in ("hints", "noises_per_pair")}
        total += len(hint) / 6 * objective(toy_base, OneType(union, kind), Batch(**own, hints={"": hint})).item()
        first += len(hint)
    assert objective(toy_base, union, batch).item() == pytest.approx(total, rel=1e-5)


def test_the_objective_of_several_draws_is_that_of_rows_with_the_same_hint(tiny_recipe, toy_base, cached, drawn_joins):
    for branch, kinds in (
        (drawn_joins(new_control(toy_base)), [""]),
        (randomised(new_union(toy_base)), ["canny", "depth"]),
    ):
        contracts = dict.fromkeys(kinds, CANNY)
        typed = dataclasses.replace(cached, kinds=torch.arange(10) % len(kinds))
        batch = draw_batch(toy_base, typed, BatchPlan.of(tiny_recipe(batch=12, noises_per_pair=2), contracts), 0)
        repeated = {name: hint.repeat_interleave(2, 0) for name, hint in batch.hints.items()}
        plain = dataclasses.replace(batch, hints=repeated, noises_per_pair=1)
        got, wanted = (objective(toy_base, branch, one).item() for one in (batch, plain))
        assert got == pytest.approx(wanted, rel=1e-6)
