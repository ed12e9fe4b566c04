"""The recipe that makes `mini`, at toy size: every stage, what it leaves, and going on after an interruption."""

import pytest
import torch
from recipes import mini
from torch import nn

from controlkit.backbones import load_base
from controlkit.measure import Referee
from controlkit.mini import world

PROMPT = "a red apple, 3d style, on a teal background"


@pytest.fixture
def short(monkeypatch):
    """Half a second a stage."""
    monkeypatch.setattr(mini, "SHARES", dict.fromkeys(mini.SHARES, 0.5 / 60 / 0.4))


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


def test_the_toy_recipe_makes_a_base_and_its_referee_once(short, counted, fake_packages, tmp_path):
    from diffusers import StableDiffusionPipeline

    mini.main(tmp_path, toy=True)
    assert counted.keys() == {"vae", "tower", "referee", "unet"} and all(counted.values())

    base = load_base(tmp_path / "mini")
    assert (base.size, base.stride, base.prediction) == (32, 4, "v")
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
        return module(torch.ones(1)).square().sum(), {}

    averaged = mini.Run(tmp_path, "cpu").train("stage", module, loss_of, 0.1 / 60, lr=1e-2).weight.item()
    assert min(map(abs, weights)) < abs(averaged) < max(map(abs, weights))
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


def test_muon_moves_the_module_s_own_matrices_and_is_used_for_the_inner_ones_alone():
    torch.manual_seed(0)
    module = nn.ModuleDict({"conv_in": nn.Conv2d(3, 4, 3), "inner": nn.Conv2d(4, 4, 3)})
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = mini.Optimizer(module, 1e-2, muon=True)
    assert [parameter is module["inner"].weight for parameter, _ in optimizer.views] == [True]
    module["inner"](module["conv_in"](torch.ones(1, 3, 8, 8))).square().mean().backward()
    optimizer.step(1e-2)
    assert all(not torch.equal(p, before[name]) and p.grad is None for name, p in module.named_parameters())
