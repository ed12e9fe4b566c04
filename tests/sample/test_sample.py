"""Sampling is the stock pipeline's, faster: the same latents, whatever the batch, with nothing run in vain."""

import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline

from conftest import draw_inputs, relative
from controlkit import sample
from controlkit.branch import ControlSpec
from controlkit.controls import new_control
from controlkit.errors import UserError
from controlkit.images import HintSpec
from controlkit.sample import Control, Job, SamplingSettings, denoise, generate, picture_size, strength_table

CONTRACT = HintSpec("canny")
STEPS = 10


def draw_hint(seed, height=32, width=32):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def branches(toy_base, drawn_joins):
    return [drawn_joins(new_control(toy_base), seed).eval().requires_grad_(False) for seed in (11, 12)]


@pytest.fixture(scope="module")
def jobs():
    prompts = ("a red apple, 3d style", "gold circle with navy background", "")
    return [
        Job(prompt, seed, (draw_hint(seed), draw_hint(seed + 50)), negative="a teal circle")
        for seed, prompt in enumerate(prompts, 7)
    ]


@pytest.fixture
def calls(toy_base, branches, monkeypatch):
    """Counts of what runs: ``branch`` and ``hint`` for the first branch, ``base``."""
    count = {"branch": 0, "hint": 0, "base": 0}

    def counted(name, function):
        def run(*args):
            count[name] += 1
            return function(*args)

        return run

    monkeypatch.setattr(branches[0], "forward", counted("branch", branches[0].forward))
    monkeypatch.setattr(branches[0].hint_encoder, "forward", counted("hint", branches[0].hint_encoder.forward))
    monkeypatch.setattr(toy_base, "encode_noise", counted("base", toy_base.encode_noise))
    return count


@pytest.fixture
def injected(toy_base, monkeypatch):
    """What each step hands to the decoder."""
    caught = []
    decode = toy_base.decode_noise
    monkeypatch.setattr(
        toy_base, "decode_noise", lambda encoded, inject: caught.append(inject) or decode(encoded, inject)
    )
    return caught


def latents_of(base, jobs, controls, settings, batch=16):
    return [picture.latents for picture in generate(base, jobs, controls, settings, batch)]


# --- against the stock pipeline -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "settings"),
    [
        ([{}], {}),
        ([{"scale": 0.7}], {}),
        ([{}], {"guidance": 1.0}),
        ([{"start": 0.2, "end": 0.6}], {}),
        ([{}, {"scale": 0.5, "start": 0.4}], {}),
        ([{"guess": True}, {"guess": True, "scale": 0.6}], {}),
        ([{}], {"size": (48, 16)}),
    ],
    ids=["scale 1", "scale 0.7", "guidance 1", "start and end", "two controls", "guess mode", "another size"],
)
def test_a_whole_run_is_the_stock_pipelines(toy_base, toy_folder, branches, jobs, to_diffusers, use, settings):
    settings = SamplingSettings(**{"steps": STEPS, "guidance": 4.0} | settings)
    controls = [Control(branch, CONTRACT, **options) for branch, options in zip(branches, use, strict=False)]
    job = jobs[0]
    (ours,) = latents_of(toy_base, [job], controls, settings)
    (plain,) = latents_of(toy_base, [job], [], settings)
    assert relative(ours, plain) > 0.05  # so that being equal to the peer says something

    pipeline = StableDiffusionControlNetPipeline(
        vae=toy_base.vae,
        text_encoder=toy_base.towers[0].encoder,
        tokenizer=toy_base.towers[0].tokenizer,
        unet=toy_base.unet,
        controlnet=[to_diffusers(control.branch) for control in controls],
        scheduler=DDIMScheduler.from_pretrained(toy_folder, subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    height, width = picture_size(toy_base, settings)
    theirs = pipeline(
        job.prompt,
        [CONTRACT.tensor(hint, (height, width)) for hint, _ in zip(job.hints, controls, strict=False)],
        height,
        width,
        settings.steps,
        guidance_scale=settings.guidance,
        negative_prompt=job.negative,
        generator=torch.Generator().manual_seed(job.seed),
        controlnet_conditioning_scale=[control.scale for control in controls],
        control_guidance_start=[control.start for control in controls],
        control_guidance_end=[control.end for control in controls],
        guess_mode=controls[0].guess,
        output_type="latent",
    ).images[0]
    assert relative(ours, theirs) <= 1e-4


def test_start_and_end_keep_the_steps_that_the_stock_pipeline_keeps(branches):
    taps = branches[0].taps
    for steps in (1, 4, 5, 7, 10, 20):
        for start in (0, 0.1, 0.2, 0.3, 0.5):
            for end in (0.3, 0.5, 0.6, 0.7, 0.9, 1):
                table = strength_table(
                    [Control(branches[0], CONTRACT, 2.0, start, end)], taps, 1, 0, SamplingSettings(steps)
                )
                kept = [not (i / steps < start or (i + 1) / steps > end) for i in range(steps)]
                assert table[0, 0, :, :, 0, 0].tolist() == [[2.0 * keep for keep in kept]] * len(taps)


# --- what a result does not depend on -----------------------------------------------------------------------


def test_a_picture_does_not_depend_on_batch_or_order(toy_base, branches, jobs):
    controls = [Control(branch, CONTRACT) for branch in branches]
    settings = SamplingSettings(3)
    alone = latents_of(toy_base, jobs, controls, settings, batch=1)
    assert min(relative(a, b) for i, a in enumerate(alone) for b in alone[:i]) > 0.05
    for batch in (2, 3):
        for ours, expected in zip(latents_of(toy_base, jobs, controls, settings, batch), alone, strict=True):
            assert torch.allclose(ours, expected, atol=1e-5)
    backwards = list(generate(toy_base, jobs[::-1], controls, settings))
    assert [picture.job for picture in backwards] == jobs[::-1]
    for picture, expected in zip(backwards, alone[::-1], strict=True):
        assert torch.allclose(picture.latents, expected, atol=1e-5)


def test_where_memory_runs_out_fewer_pictures_are_made_at_once(toy_base, branches, jobs, monkeypatch):
    controls = [Control(branch, CONTRACT) for branch in branches]
    alone = latents_of(toy_base, jobs, controls, SamplingSettings(2), batch=1)
    real, given = sample.denoise, []

    def denoise(base, noise, *more):
        given.append(len(noise))
        if len(noise) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return real(base, noise, *more)

    monkeypatch.setattr(sample, "denoise", denoise)
    most = 1
    found = latents_of(toy_base, jobs, controls, SamplingSettings(2), batch=3)
    assert given == [3, 1, 1, 1] and len(found) == len(jobs) == 3
    assert all(torch.allclose(ours, expected, atol=1e-5) for ours, expected in zip(found, alone, strict=True))
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        latents_of(toy_base, jobs, controls, SamplingSettings(2))


def test_the_global_generator_is_neither_read_nor_moved(toy_base, branches, jobs):
    controls, settings = [Control(branches[0], CONTRACT)], SamplingSettings(2)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = latents_of(toy_base, jobs, controls, settings)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(torch.stack(first), torch.stack(latents_of(toy_base, jobs, controls, settings)))


def test_pictures_are_the_decoded_latents(toy_base, branches, jobs):
    seen = []
    settings = SamplingSettings(2, size=(32, 48))
    pictures = list(generate(toy_base, jobs, [Control(branches[0], CONTRACT)], settings, batch=2, on_step=seen.append))
    assert seen == [2, 2, 1, 1]
    for picture in pictures:
        decoded = toy_base.decode_latents(picture.latents[None])[0]
        assert picture.pixels.dtype == np.uint8 and picture.pixels.shape == (32, 48, 3)
        wanted = (decoded.permute(1, 2, 0).numpy() + 1) * 127.5
        assert np.abs(picture.pixels - wanted).max() <= 0.51


# --- what is not run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "runs"),
    [({}, 4), ({"scale": 0.0}, 0), ({"start": 0.5}, 2), ({"end": 0.25}, 1), ({"start": 0.25, "end": 0.75}, 2)],
    ids=str,
)
def test_a_control_runs_on_the_steps_that_it_rules_and_on_no_other(toy_base, branches, jobs, calls, options, runs):
    control = Control(branches[0], CONTRACT, **options)
    controlled = latents_of(toy_base, jobs, [control], SamplingSettings(4))
    assert (calls["branch"], calls["base"]) == (runs, 4)
    if runs == 0:
        assert torch.equal(torch.stack(controlled), torch.stack(latents_of(toy_base, jobs, [], SamplingSettings(4))))


def test_a_hint_is_encoded_once_for_all_steps_and_both_halves_of_guidance(toy_base, branches, jobs, calls):
    list(generate(toy_base, jobs, [Control(branches[0], CONTRACT)], SamplingSettings(4)))
    assert calls == {"branch": 4, "hint": 1, "base": 4}


# --- strength is one table ----------------------------------------------------------------------------------


def run_table(base, branch, strength, steps=2):
    """The last latents of two guided pictures under one control of this strength."""
    x, _, text, hint = draw_inputs(base)
    four_rows = text[[0, 1, 0, 1]]
    *_, last = denoise(base, x, four_rows, [hint], [Control(branch, CONTRACT)], SamplingSettings(steps), strength)
    return last


def test_a_masked_half_gets_no_residual(toy_base, branches, injected):
    mask = torch.ones(1, 1, 1, 1, 32, 32)
    mask[..., :16] = 0
    run_table(toy_base, branches[0], mask)
    assert len(injected) == 2
    for residuals in injected:
        assert residuals.keys() == {tap.name for tap in toy_base.branch_taps}
        for residual in residuals.values():
            half = residual.shape[-1] // 2
            assert not residual[..., :half].any()
            assert residual[..., half:].all()


def test_a_map_of_one_number_is_that_number(toy_base, branches):
    number, ones = torch.full((1, 1, 1, 1, 1, 1), 0.7), torch.full((1, 1, 1, 1, 32, 32), 0.7)
    assert relative(run_table(toy_base, branches[0], ones), run_table(toy_base, branches[0], number)) < 1e-6


def test_strength_holds_for_its_row_tap_and_step_alone(toy_base, branches, injected, calls):
    table = torch.zeros(1, 4, len(toy_base.taps), 3, 1, 1)
    tap = toy_base.branch_taps[2]
    table[0, 1, toy_base.taps.index(tap), 1] = 1.0
    run_table(toy_base, branches[0], table, steps=3)
    assert calls["branch"] == 1
    assert [bool(residuals) for residuals in injected] == [False, True, False]
    speaking = {name: [bool(row.any()) for row in residual] for name, residual in injected[1].items()}
    assert speaking == {t.name: [False, t == tap, False, False] for t in toy_base.branch_taps}


def test_the_default_table_is_each_controls_scale(toy_base, branches, injected):
    torch.manual_seed(0)
    mid = new_control(toy_base, ControlSpec(join="gaussian", taps="mid"))
    controls = [Control(branches[0], CONTRACT, 0.3), Control(mid, CONTRACT, 2.0)]
    x, _, text, hint = draw_inputs(toy_base)
    list(denoise(toy_base, x, text, [hint, hint], controls, SamplingSettings(1)))
    t = torch.tensor([999, 999])
    both = [c.branch(x, t, text, c.branch.encode_hint(hint)) for c in controls]
    for name, residual in injected[0].items():
        wanted = 0.3 * both[0][name] + (2.0 * both[1][name] if name == "middle" else 0)
        assert relative(residual, wanted) < 1e-5


# --- guidance by the hint -----------------------------------------------------------------------------------


def halves(control, guidance):
    """The control's strength in guidance's unconditional and conditional half."""
    table = strength_table([control], control.branch.taps, 2, 1, SamplingSettings(1, guidance))
    assert len({*table[0, 0].flatten().tolist()}) == len({*table[0, 1].flatten().tolist()}) == 1
    return table[0, :, 0, 0, 0, 0].tolist()


def test_guidance_counts_a_hint_as_often_as_it_is_told(branches):
    for guidance in (1.5, 4.0, 7.5):
        for counted in (0.0, 1.0, 1.3, guidance):
            unconditional, conditional = halves(Control(branches[0], CONTRACT, 0.5, hint_cfg_scale=counted), guidance)
            effect = unconditional + guidance * (conditional - unconditional)  # first order: as strength
            assert conditional == 0.5 and effect == pytest.approx(0.5 * counted, abs=1e-5)
    assert halves(Control(branches[0], CONTRACT), 4.0) == [1.0, 1.0]  # as released
    assert halves(Control(branches[0], CONTRACT, hint_cfg_scale=9.0), 4.0) == [0.0, 1.0]  # no more than the prompt
    assert halves(Control(branches[0], CONTRACT, hint_cfg_scale=9.0), 1.0) == [
        1.0,
        1.0,
    ]  # no guidance: nothing to count


def test_guidance_by_the_hint_moves_pictures_between_both_ways_of_the_paper(toy_base, branches, jobs):
    def made(counted):
        return latents_of(
            toy_base, jobs[:1], [Control(branches[0], CONTRACT, hint_cfg_scale=counted)], SamplingSettings(STEPS)
        )[0]

    released, between, conditional = made(1.0), made(2.5), made(4.0)
    assert min(relative(between, released), relative(between, conditional)) > 0.01
    plain = strength_table([Control(branches[0], CONTRACT)], toy_base.taps, 2, 1, SamplingSettings(STEPS))
    plain[:, :1] = 0
    x = torch.randn((1, *conditional.shape), generator=torch.Generator().manual_seed(jobs[0].seed))
    text = toy_base.encode_text([jobs[0].negative, jobs[0].prompt], (32, 32))
    hint = [CONTRACT.tensor(jobs[0].hints[0], (32, 32))]
    *_, last = denoise(toy_base, x, text, hint, [Control(branches[0], CONTRACT)], SamplingSettings(STEPS), plain)
    assert relative(conditional, last[0]) < 1e-6


# --- sizes --------------------------------------------------------------------------------------------------


def test_the_size_is_the_bases_own_unless_one_is_given(toy_base):
    assert picture_size(toy_base, SamplingSettings()) == (32, 32)
    assert picture_size(toy_base, SamplingSettings(size=(16, 64))) == (16, 64)


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ((60, 33), "got 33x60. The nearest is 32x64."),
        ((32, 8), "got 8x32. The nearest is 16x32."),
        ((0, 32), "got 32x0. The nearest is 32x16."),
        ((-16, 32), "got 32x-16. The nearest is 32x16."),
    ],
)
def test_a_size_that_the_base_cannot_make_is_refused_with_the_nearest(toy_base, size, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        picture_size(toy_base, SamplingSettings(size=size))
