"""The recipe that makes `mini`, at toy size: every stage, what it leaves, and going on after an interruption."""

import copy
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from conftest import draw_inputs, relative
from controlkit.backbones import load_base
from controlkit.hub import digest
from controlkit.measure import Referee
from controlkit.mini import world
from recipes import mini

PROMPT = "a red apple, 3d style, on a teal background"


@pytest.fixture
def short(monkeypatch):
    """Half a second a stage."""
    for shares in mini.SHARES.values():
        for stage in shares:
            monkeypatch.setitem(shares, stage, 0.5 / 60 / 0.4)


@pytest.fixture
def counted(monkeypatch):
    """The stages that were trained and how many steps each made."""
    steps = {}
    real = mini.Run.train

    def train(run, name, module, loss_of, minutes, lr, **more):
        steps[name] = 0

        def counting(step, progress):
            steps[name] += 1
            return loss_of(step, progress)

        return real(run, name, module, counting, minutes, lr, **more)

    monkeypatch.setattr(mini.Run, "train", train)
    return steps


def test_the_toy_recipe_makes_a_base_and_its_referee_once_and_other_runs_go_on_from_it(
    short, counted, fake_packages, tmp_path, monkeypatch
):
    from diffusers import StableDiffusionPipeline

    mini.main(tmp_path, toy=True)
    assert counted.keys() == {"vae", "tower", "referee", "unet"} and all(counted.values())

    base = load_base(tmp_path / "mini")
    assert (base.size, base.stride, base.noise.prediction) == (32, 4, "v")
    assert base.encode_text([PROMPT, ""]).tokens.shape == (2, base.window, 32)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "mini")
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(PROMPT, num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (32, 32, 3) and picture.std() > 0
    drawn = world.draw_emoji(world.load_emoji(32), 0, 0)[0]
    assert Referee(tmp_path / "referee").clip_scores([drawn], [PROMPT]).shape == (1,)

    made = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = {path: data for path, data in made.items() if tmp_path / "state" not in path.parents}
    assert {path.suffix for path in result} == {".json", ".safetensors", ".txt"}
    assert not any(data.startswith((b"PK", b"\x80")) for data in result.values()), "nothing to unpickle"

    mini.main(tmp_path, toy=True)
    assert not any(counted.values()), "finished stages are not trained again"
    assert all(path.read_bytes() == data for path, data in made.items() if path.suffix in (".safetensors", ".pt"))
    assert load_base(tmp_path / "mini").vae.config.scaling_factor == base.vae.config.scaling_factor

    counted.clear()
    mini.main(tmp_path / "more", toy=True, start=tmp_path)
    assert counted.keys() == {"unet"} and all(counted.values()), "of a base of this shape only the U-Net goes on"
    more = load_base(tmp_path / "more" / "mini")
    assert more.digest != base.digest and digest(more.vae.state_dict()) == digest(base.vae.state_dict())
    weights = "referee/model.safetensors"
    assert (tmp_path / "more" / weights).read_bytes() == (tmp_path / weights).read_bytes()

    counted.clear()
    monkeypatch.setitem(mini.SIZES, "toy", replace(mini.SIZES["toy"], latent_channels=6))
    mini.main(tmp_path / "next", toy=True, start=tmp_path)
    assert counted.keys() == {"vae", "referee", "unet"} and all(counted.values()), "words are known already"
    following = load_base(tmp_path / "next" / "mini")
    assert following.latent_channels == 6
    assert following.towers[0].tokenizer(PROMPT).input_ids == base.towers[0].tokenizer(PROMPT).input_ids
    assert Referee(tmp_path / "next" / "referee").clip_scores([drawn], [PROMPT]).shape == (1,)


def test_an_interrupted_stage_goes_on_from_its_saved_step(tmp_path):
    seen = []

    def stage(stop_at=None):
        torch.manual_seed(0)
        module = nn.Linear(2, 2)

        def loss_of(step, progress):
            if step == stop_at:
                raise KeyboardInterrupt
            seen.append((step, progress))
            return module(torch.ones(2)).square().sum(), {}

        return mini.Run(tmp_path, "cpu", save_every=0.0).train("stage", module, loss_of, 0.2 / 60, lr=0.1)

    with pytest.raises(KeyboardInterrupt):
        stage(stop_at=5)
    trained = stage()
    steps, progress = zip(*seen, strict=True)
    assert steps == tuple(range(len(steps))), "no step is lost or made twice"
    assert len(steps) > 6 and sorted(progress) == list(progress), "and the time used before counts"
    assert not trained.training and not any(p.requires_grad for p in trained.parameters())
    finished = len(seen)
    again = stage()
    assert len(seen) == finished, "a finished stage is not trained again"
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))


def test_a_stage_ends_with_the_average_of_its_weights(tmp_path):
    module = nn.Linear(1, 1, bias=False)
    weights = []

    def loss_of(step, progress):
        weights.append(module.weight.item())
        return module(torch.ones(1)).sum(), {}  # downhill all the way, however many steps the time allows

    averaged = mini.Run(tmp_path, "cpu").train("stage", module, loss_of, 0.1 / 60, lr=1e-2).weight.item()
    assert len(weights) > 2 and weights == sorted(weights, reverse=True)
    assert weights[-1] < averaged < weights[0]
    assert averaged != torch.load(tmp_path / "state" / "stage.pt", weights_only=True)["module"]["weight"].item()


def test_a_batch_is_the_same_for_its_step_whatever_came_before(fake_packages):
    pictures, later = mini.Pictures(32, "base"), mini.Pictures(32, "base")
    first = pictures.batch(6, 3)
    for step in (0, 1):
        later.batch(6, step)
        later.alike(4, step)
    again = later.batch(6, 3)
    assert torch.equal(first[0], again[0]) and first[1] == again[1]
    assert first[0].shape == (6, 3, 32, 32) and first[0].min() >= -1 and first[0].max() <= 1
    assert not torch.equal(first[0], pictures.batch(6, 4)[0])
    assert not torch.equal(first[0], mini.Pictures(32, "base", seed=1).batch(6, 3)[0])


def test_a_batch_of_one_kind_shares_style_and_ground_and_no_concept(fake_packages):
    texts = mini.Pictures(32, "base").alike(6, 0)[1]
    what, style, ground = zip(*(text.split(", ") for text in texts), strict=True)
    assert (len(set(style)), len(set(ground)), len(set(what))) == (1, 1, 6)


def test_the_base_never_sees_a_held_out_picture(fake_packages):
    pictures = mini.Pictures(32, "base")
    names = {f"{pictures.emoji.styles[row]}/{pictures.emoji.concepts[row]}" for row in pictures.rows}
    assert names and not names & world.heldout_pictures()


def test_words_are_one_of_a_picture_s_wordings_mostly_the_fullest_and_rarely_plain():
    rng = np.random.default_rng(0)
    wordings = ("a red ball, on a grey floor", "3d scene, a red ball", "a red sphere, on a grey floor")
    said = Counter(mini.words_for(wordings, rng) for _ in range(1000))
    assert said.keys() == {*wordings, mini.PLAIN}
    assert said[wordings[0]] > 400 and 10 < said[mini.PLAIN] < 80
    said = Counter(mini.words_for((PROMPT,), rng) for _ in range(1000))
    what, style, ground = PROMPT.split(", ")
    assert said.keys() == {PROMPT, f"{what}, {style}", f"{what}, {ground}", what, mini.PLAIN}
    assert said[PROMPT] > 700


def test_everyday_concepts_come_in_their_share_of_what_the_u_net_learns_and_the_rest_as_often_as_each_other():
    texts = [
        ("a 3d cube, on a red floor", "a red heart, or so"),
        (PROMPT,),
        ("a red heart, flat style, on a teal background",),
    ]
    texts += [("a red heart exclamation, flat style, on a teal background",)] * 197
    everyday = mini.everyday_rows(texts)
    assert everyday.tolist() == [1, 2], "named first, and by its whole name"
    rng = np.random.default_rng(0)
    drawn = np.concatenate([mini.choose_rows(rng, 50, len(texts), everyday) for _ in range(400)])
    assert np.isin(drawn, everyday).mean() == pytest.approx(mini.EVERYDAY_SHARE, abs=0.03)
    counts = np.bincount(drawn, minlength=len(texts))
    assert counts[1] == pytest.approx(counts[2], rel=0.1) and counts[3:].min() > 20


def test_timesteps_lie_towards_noise_unless_drawn_evenly_and_each_batch_covers_all():
    rng = np.random.default_rng(0)
    for evenly, mean in ((True, 1 / 2), (False, 2 / 3)):
        for _ in range(20):
            drawn = mini.choose_times(rng, 48, evenly)
            assert drawn.min() >= 0 and drawn.max() < 1 and drawn.mean() == pytest.approx(mean, abs=0.01)
            gaps = np.diff(drawn if evenly else drawn**2)
            assert gaps.max() < 2 / 48, "one of each share"


def test_a_run_that_goes_on_from_other_weights_draws_anew_and_one_from_the_same_alike(toy_base, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(mini, "torch_rng", lambda *key: drawn.append(key) or torch.Generator().manual_seed(0))
    monkeypatch.setattr(mini.Run, "train", lambda run, name, model, loss_of, *more, **options: loss_of(0, 0.0))
    size, tower = mini.SIZES["toy"], toy_base.towers[0]
    latents = np.zeros((2, size.latent_channels, 8, 8), np.float16)
    for scale in (1, 1, 2):

        def begin(unet, scale=scale):
            torch.nn.init.constant_(unet.conv_in.weight, 0.01 * scale)

        run = mini.Run(tmp_path, "cpu")
        mini.train_unet(run, size, latents, [(PROMPT,)] * 2, copy.deepcopy(tower.encoder), tower.tokenizer, 1.0, begin)
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.fixture
def pictures(fake_packages):
    """A world with a dozen scenes in it."""
    return mini.Pictures(32, "base", scenes=12)


def as_drawn(pixels):
    return [picture.tobytes() for picture in ((pixels.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()]


def test_a_batch_of_one_kind_is_of_scenes_alone_or_has_none(pictures):
    scenes = {scene.picture.tobytes(): scene.captions for scene in pictures.scenes}
    kinds = []
    for step in range(12):
        pixels, texts = pictures.alike(6, step)
        drawn = as_drawn(pixels)
        kinds.append({picture in scenes for picture in drawn})
        assert len(set(drawn)) == 6 and len(kinds[-1]) == 1
        if kinds[-1] == {True}:
            assert all(text in (*scenes[one], mini.PLAIN) for one, text in zip(drawn, texts, strict=True))
    assert {True} in kinds and {False} in kinds


def test_a_batch_has_scenes_in_their_share(pictures):
    scenes = {scene.picture.tobytes() for scene in pictures.scenes}
    share = np.mean([one in scenes for step in range(8) for one in as_drawn(pictures.batch(25, step)[0])])
    assert share == pytest.approx(mini.SCENE_SHARE, abs=0.12)


def test_two_visits_show_every_scene_and_the_next_two_their_mirror_images(pictures):
    shown = [[picture for picture, words in pictures.views(visit) if len(words) > 1] for visit in range(4)]
    assert [len(visit) for visit in shown] == [6, 6, 6, 6]
    drawn = {scene.picture.tobytes() for scene in pictures.scenes}
    assert {picture.tobytes() for visit in shown[:2] for picture in visit} == drawn
    assert {picture[:, ::-1].tobytes() for visit in shown[2:] for picture in visit} == drawn


def test_a_vae_begins_with_another_s_layers_nearest_the_pixels():
    torch.manual_seed(0)
    size = mini.SIZES["toy"]
    old, new = mini.build_vae(size), mini.build_vae(replace(size, vae_channels=(8, 16, 16, 16), latent_channels=8))
    mini.carry_vae(old, new)
    before, after = old.state_dict(), new.state_dict()
    for theirs, ours in (
        ("encoder.conv_in", "encoder.conv_in"),
        ("encoder.down_blocks.0.resnets.0.conv1", "encoder.down_blocks.0.resnets.0.conv1"),
        ("decoder.up_blocks.2.resnets.0.conv1", "decoder.up_blocks.3.resnets.0.conv1"),
        ("decoder.up_blocks.1.upsamplers.0.conv", "decoder.up_blocks.2.upsamplers.0.conv"),
        ("decoder.conv_out", "decoder.conv_out"),
    ):
        assert torch.equal(before[f"{theirs}.weight"], after[f"{ours}.weight"]), ours
    middle = "decoder.mid_block.resnets.0.conv1.weight"
    assert not torch.equal(before[middle], after[middle])


def test_a_u_net_is_carried_over_as_it_is_where_the_latents_are_the_same_and_turned_with_them(toy_base):
    generator = torch.Generator().manual_seed(0)
    drawn = SimpleNamespace(batch=lambda count, step: (2 * torch.rand(count, 3, 32, 32, generator=generator) - 1, []))
    unet = mini.build_unet(mini.SIZES["toy"])
    mini.carry_unet(toy_base, toy_base.vae, unet, drawn)
    x, t, text, _ = draw_inputs(toy_base)
    with torch.no_grad():
        wanted = toy_base.unet(x, t, text.tokens).sample
        assert relative(unet(x, t, text.tokens).sample, wanted) < 1e-3
        turned = copy.deepcopy(toy_base.vae)
        for parameter in turned.quant_conv.parameters():
            parameter[:4] = -2 * parameter[[1, 0, 3, 2]]
        mini.carry_unet(toy_base, turned, unet, drawn)
        assert relative(unet(-2 * x[:, [1, 0, 3, 2]], t, text.tokens).sample, -2 * wanted[:, [1, 0, 3, 2]]) < 1e-3
