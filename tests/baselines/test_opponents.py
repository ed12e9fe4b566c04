"""Every opponent of the table: it learns its stages, is saved bit for bit, and makes the pictures asked for."""

import json

import numpy as np
import pytest
import torch

from controlkit.annotators import contract
from controlkit.baselines import OPPONENTS, About, load_baseline, opponent, save_baseline
from controlkit.baselines.piti import Piti
from controlkit.baselines.seam import Baseline, stage_at
from controlkit.baselines.taming import Taming
from controlkit.errors import Invalid, Mismatch, NotFound, Unsupported
from controlkit.sample import maker

LEARNING = [name for name, row in OPPONENTS.items() if row.learns]
CLASSES = {"piti": Piti, "taming": Taming}
STAGES = [(name, stage) for name in LEARNING for stage in CLASSES.get(name, Baseline).stages]
QUICK = [name for name in OPPONENTS if name != "taming"]  # whose tokens are drawn one by one


def about(base, name):
    return About(name=name, hint=OPPONENTS[name].hint, base=base.name, base_digest=base.digest)


@torch.no_grad()
def stirred(baseline):
    """The same with drawn weights wherever those of an input are all zero, so that hints matter."""
    generator = torch.Generator().manual_seed(5)
    for parameter in baseline.parameters():
        drawn = 0.1 * torch.randn(parameter.shape, generator=generator)
        silent = parameter.abs().flatten(2).sum((0, 2), keepdim=True) == 0 if parameter.ndim == 4 else ~parameter.any()
        parameter.copy_(torch.where(silent[..., None] if parameter.ndim == 4 else silent, drawn, parameter))
    return baseline


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_each_stage_learns_its_part_alone_and_its_loss_falls(fresh, material_for, name, stage):
    baseline, material = fresh(name), material_for(OPPONENTS[name].hint)
    assert abs(sum(baseline.stages.values()) - 1) < 1e-9
    for other in baseline.stages:  # what another stage has set free is held again
        baseline.begin(other)
    part = baseline.begin(stage)
    learning = {id(parameter) for parameter in part.parameters()}
    before = {key: value.clone() for key, value in baseline.named_parameters()}
    assert {id(p) for p in baseline.parameters() if p.requires_grad} == learning
    optimizer = torch.optim.AdamW(part.parameters(), lr=3e-4)
    losses = []
    for _ in range(2):
        losses.append(baseline.loss(material, 0, stage))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    if stage != "vqgan":  # a game of two has no loss that falls
        assert losses[1] < losses[0]
    moved = {key for key, value in baseline.named_parameters() if not torch.equal(value, before[key])}
    held = {key for key, value in baseline.named_parameters() if id(value) not in learning}
    assert moved and not moved & held


@pytest.mark.parametrize("name", ["ldm-scratch", "piti", "depth2img"])
def test_the_base_is_not_touched(toy_base, fresh, material_for, name):
    before = {key: value.clone() for key, value in toy_base.denoiser.state_dict().items()}
    baseline = fresh(name)
    part = baseline.begin(list(baseline.stages)[-1])
    baseline.loss(material_for(OPPONENTS[name].hint), 0, list(baseline.stages)[-1]).backward()
    torch.optim.SGD(part.parameters(), lr=1.0).step()
    after = toy_base.denoiser.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not any(parameter.requires_grad for parameter in toy_base.denoiser.parameters())


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_a_loss_depends_on_the_step_and_the_weights_alone(fresh, material_for, name, stage):
    baseline, material = fresh(name), material_for(OPPONENTS[name].hint)
    baseline.begin(stage)
    torch.manual_seed(1)
    first = baseline.loss(material, 3, stage).detach()
    torch.manual_seed(2)
    assert torch.equal(baseline.loss(material, 3, stage).detach(), first)
    assert not torch.equal(baseline.loss(material, 4, stage).detach(), first)


@pytest.mark.parametrize("name", QUICK)
def test_pictures_come_in_order_with_their_requests_and_do_not_depend_on_the_batch(toy_base, fresh, requests_of, name):
    baseline = stirred(fresh(name))
    kind = OPPONENTS[name].hint
    asked = requests_of(kind)
    together = baseline.make(asked)
    assert [one.request for one in together] == asked
    assert all(one.pixels.shape == (toy_base.size, toy_base.size, 3) for one in together)
    alone = baseline.make(asked[1:])
    difference = np.abs(together[1].pixels.astype(int) - alone[0].pixels)
    assert difference.max() <= 1


@pytest.mark.parametrize("name", [name for name in QUICK if name != "no-control"])
def test_the_hint_and_guidance_change_the_picture(fresh, requests_of, name):
    baseline = stirred(fresh(name))
    kind = OPPONENTS[name].hint
    asked = requests_of(kind)[0]
    other = requests_of(kind)[1].controls
    [with_own] = baseline.make([asked])
    [with_other] = baseline.make([asked.model_copy(update={"controls": other})])
    [with_none] = baseline.make([asked.model_copy(update={"controls": ()})])
    [unguided] = baseline.make([asked.model_copy(update={"guidance": 1.0})])
    shown = [one.latents for one in (with_own, with_other, with_none, unguided)]
    assert all(not torch.allclose(shown[0], one) for one in shown[1:])


def test_no_control_is_the_base_alone(toy_base, fresh, requests_of):
    asked = requests_of("seg")
    made = fresh("no-control").make(asked)
    plain = list(maker(toy_base)([one.model_copy(update={"controls": ()}) for one in asked]))
    assert all(np.array_equal(ours.pixels, theirs.pixels) for ours, theirs in zip(made, plain, strict=True))
    assert [one.request for one in made] == asked


@pytest.mark.parametrize("name", ["depth2img", "sketch-guided"])
def test_before_training_it_makes_the_pictures_of_the_base(toy_base, fresh, requests_of, name):
    """The further channel is read by zeros; and guidance of no strength moves nothing."""
    asked = requests_of(OPPONENTS[name].hint, **({"scale": 0.0} if name == "sketch-guided" else {}))
    made = fresh(name).make(asked)
    plain = list(maker(toy_base)([one.model_copy(update={"controls": ()}) for one in asked]))
    for ours, theirs in zip(made, plain, strict=True):
        assert torch.allclose(ours.latents, theirs.latents, atol=1e-5)


@pytest.mark.parametrize("name", list(OPPONENTS))
def test_saved_and_loaded_it_is_the_same_bit_for_bit(toy_base, fresh, tmp_path, name):
    baseline = stirred(fresh(name))
    save_baseline(tmp_path, baseline, about(toy_base, name))
    loaded, read = load_baseline(tmp_path, toy_base)
    assert read == about(toy_base, name)
    theirs = loaded.state_dict()
    assert theirs.keys() == baseline.state_dict().keys()
    assert all(torch.equal(theirs[key], value) for key, value in baseline.state_dict().items())


def test_a_folder_that_is_none_or_of_another_base_is_refused(toy_base, deep_base, fresh, tmp_path):
    with pytest.raises(NotFound, match="holds no opponent"):
        load_baseline(tmp_path, toy_base)
    save_baseline(tmp_path, fresh("piti"), about(toy_base, "piti"))
    with pytest.raises(Mismatch, match="other weights"):
        load_baseline(tmp_path, deep_base)
    told = json.loads((tmp_path / "baseline.json").read_text())
    (tmp_path / "baseline.json").write_text(json.dumps(told | {"name": "lite"}))
    with pytest.raises(Mismatch, match="other weights than this opponent's"):
        load_baseline(tmp_path, toy_base)
    for wrong in ({"name": "pity"}, {"step": -1}, {"more": 1}, {"hint": "x" * 101}):
        (tmp_path / "baseline.json").write_text(json.dumps(told | wrong))
        with pytest.raises(Invalid):
            load_baseline(tmp_path, toy_base)
    (tmp_path / "baseline.json").write_text(json.dumps(told))
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(NotFound, match="no weights yet"):
        load_baseline(tmp_path, toy_base)


@pytest.mark.parametrize("name", ["baseline.json", "diffusion_pytorch_model.safetensors"])
def test_a_file_that_leads_out_of_the_folder_is_refused(toy_base, fresh, tmp_path, name):
    folder = tmp_path / "piti"
    save_baseline(folder, fresh("piti"), about(toy_base, "piti"))
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(Invalid, match="leads out of its folder"):
        load_baseline(folder, toy_base)


def test_what_opponents_do_not_do_is_refused(fresh, requests_of):
    [asked, _] = requests_of("seg")
    with pytest.raises(Unsupported, match="leave out tile"):
        fresh("piti").make([asked.model_copy(update={"tile": 16})])


def test_stages_follow_their_shares():
    stages = {"a": 0.25, "b": 0.25, "c": 0.5}
    assert [stage_at(stages, at) for at in (0.0, 0.24, 0.25, 0.5, 0.99, 1.0)] == ["a", "a", "b", "c", "c", "c"]


def test_hints_are_left_out_at_the_rate_asked_for(material_for):
    material = material_for("seg")
    hints = torch.ones(1000, 3, 2, 2)
    kept = material.some_absent(hints, 0)[:, 0, 0, 0]
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert 0.85 < kept.mean() < 0.95
    assert not torch.equal(kept, material.some_absent(hints, 1)[:, 0, 0, 0])


@pytest.mark.parametrize(("name", "dropped"), [("controlnet", 0.5), ("lite", 0.5), ("t2i-adapter", 0.0)])
def test_controls_learn_as_published(toy_base, fresh, material_for, name, dropped):
    """Half of the prompts are left out for the paper's; noisy timesteps come more often for T2I-Adapter's."""
    baseline, material = fresh(name), material_for("seg")
    batches = [baseline.drawn(material, step) for step in range(150)]
    empty = material.cached.text[[0]].to(torch.device("cpu"), torch.float32).tokens[0]
    share = np.mean([torch.equal(row, empty) for one in batches for row in one.text.tokens])
    assert share == pytest.approx(dropped, abs=0.1)
    t = torch.cat([one.t for one in batches]).double() / toy_base.noise.count
    assert t.mean() == pytest.approx(0.75 if name == "t2i-adapter" else 0.5, abs=0.07) and 0 <= t.min() <= t.max() < 1


def test_every_row_says_where_it_comes_from_and_has_rates_in_order():
    for row in OPPONENTS.values():
        assert row.words.endswith(".") and row.source and row.title
        assert list(row.rates) == sorted(set(row.rates)) and contract(row.hint)
    with pytest.raises(Invalid, match="did you mean"):
        opponent("ldm_scratch")


@pytest.mark.parametrize("name", ["ldm-scratch", "piti"])
def test_the_half_that_guidance_leads_away_from_knows_no_hint(fresh, requests_of, name):
    baseline = stirred(fresh(name))
    [asked, other] = requests_of("seg", guidance=0.0)
    [made] = baseline.make([asked])
    [with_other] = baseline.make([asked.model_copy(update={"controls": other.controls})])
    [with_none] = baseline.make([asked.model_copy(update={"controls": (), "guidance": 1.0})])
    assert torch.allclose(made.latents, with_other.latents, atol=1e-5)
    assert torch.allclose(made.latents, with_none.latents, atol=1e-5)


@pytest.mark.parametrize(("name", "reads"), [("ldm-scratch", False), ("piti", False), ("depth2img", True)])
def test_prompts_are_read_where_the_paper_reads_them(fresh, requests_of, name, reads):
    baseline = stirred(fresh(name))
    [asked, _] = requests_of(OPPONENTS[name].hint)
    [made] = baseline.make([asked])
    [told] = baseline.make([asked.model_copy(update={"prompt": "a red apple"})])
    assert torch.equal(made.latents, told.latents) != reads
