"""Sampling is the stock pipeline's, faster: the same latents, whatever the batch, with nothing run in vain."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline

from conftest import asked, draw_inputs, randomised, relative
from controlkit.backbones import load_base
from controlkit.backbones.noise import Diffusion, Flow
from controlkit.branch import ControlSpec
from controlkit.controls import new_control, new_union
from controlkit.errors import Invalid, OutOfRoom
from controlkit.formats import SavedControl, save_control
from controlkit.images import HintSpec, fit
from controlkit.sample import (
    ControlRequest,
    EditRequest,
    Picture,
    PreparedControl,
    Request,
    SamplingSettings,
    Steering,
    Step,
    denoise,
    generate,
    loop,
    picture_size,
    pictures,
    prepare,
    scale_table,
)
from controlkit.sample.preview import clean_latents

CONTRACT = HintSpec("canny")
STEPS = 10


def draw_hint(seed, height=32, width=32):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def branches(toy_base, drawn_joins):
    return [drawn_joins(new_control(toy_base), seed).eval().requires_grad_(False) for seed in (11, 12)]


TEXTS = ("a red apple, 3d style", "gold circle with navy background", "")


@pytest.fixture
def prepared(toy_base, branches):
    """``prepared(uses, steps=...)``: three requests under the first branches, one for each of ``uses``, ready."""

    def build(uses=({},), texts=TEXTS, base=toy_base, **settings):
        controls = [SavedControl(branch, CONTRACT) for branch, _ in zip(branches, uses, strict=False)]
        found = []
        for seed, prompt in enumerate(texts, 7):
            hints = [draw_hint(seed + 50 * i) for i, _ in enumerate(controls)]
            request, loaded = asked(
                controls, hints, uses, prompt=prompt, seed=seed, negative_prompt="a teal circle", **settings
            )
            found += prepare(base, [request], loaded)
        return found

    return build


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


def latents_of(base, requests, batch=16, mixed=False):
    return [picture.latents for picture in pictures(generate(base, requests, batch, mixed=mixed))]


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
def test_a_whole_run_is_the_stock_pipelines(toy_base, toy_folder, prepared, to_diffusers, use, settings):
    settings = {"steps": STEPS, "guidance": 4.0} | settings
    [one] = prepared(use, TEXTS[:1], **settings)
    (ours,) = latents_of(toy_base, [one])
    (plain,) = latents_of(toy_base, prepared((), TEXTS[:1], **settings))
    controls, request = one.controls, one.request
    assert relative(ours, plain) > 0.05  # so that being equal to the peer says something

    pipeline = StableDiffusionControlNetPipeline(
        vae=toy_base.vae,
        text_encoder=toy_base.towers[0].encoder,
        tokenizer=toy_base.towers[0].tokenizer,
        unet=toy_base.unet,
        controlnet=[to_diffusers(control.network) for control in controls],
        scheduler=DDIMScheduler.from_pretrained(toy_folder, subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    height, width = picture_size(toy_base, request.size)
    theirs = pipeline(
        request.prompt,
        [CONTRACT.tensor(asked.images[""], (height, width)) for asked in request.controls],
        height,
        width,
        request.steps,
        guidance_scale=request.guidance,
        negative_prompt=request.negative_prompt,
        generator=torch.Generator().manual_seed(request.seed),
        controlnet_conditioning_scale=[control.scale for control in controls],
        control_guidance_start=[control.start for control in controls],
        control_guidance_end=[control.end for control in controls],
        guess_mode=controls[0].guess,
        output_type="latent",
    ).images[0]
    assert relative(ours, theirs) <= 1e-4


# --- what a result does not depend on -----------------------------------------------------------------------


def test_a_picture_does_not_depend_on_batch_or_order(toy_base, prepared):
    ready = prepared([{}, {}], steps=3)
    alone = latents_of(toy_base, ready, batch=1)
    assert min(relative(a, b) for i, a in enumerate(alone) for b in alone[:i]) > 0.05
    for batch in (2, 3):
        for ours, expected in zip(latents_of(toy_base, ready, batch), alone, strict=True):
            assert torch.allclose(ours, expected, atol=1e-5)
    backwards = list(pictures(generate(toy_base, ready[::-1])))
    assert [picture.request for picture in backwards] == [one.request for one in ready[::-1]]
    for picture, expected in zip(backwards, alone[::-1], strict=True):
        assert torch.allclose(picture.latents, expected, atol=1e-5)


def test_where_memory_runs_out_fewer_pictures_are_made_at_once(toy_base, prepared, monkeypatch):
    ready = prepared([{}, {}], steps=2)
    alone = latents_of(toy_base, ready, batch=1)
    real, given = loop.denoising, []

    def denoising(base, start, *more):
        given.append(len(start.latents))
        if len(start.latents) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return real(base, start, *more)

    monkeypatch.setattr(loop, "denoising", denoising)
    most = 1
    found = latents_of(toy_base, ready, batch=3)
    assert given == [3, 1, 1, 1] and len(found) == len(ready) == 3
    assert all(torch.allclose(ours, expected, atol=1e-5) for ours, expected in zip(found, alone, strict=True))
    most = 0
    with pytest.raises(OutOfRoom, match="does not hold one picture of this size"):
        latents_of(toy_base, ready)


def test_requests_and_prepared_ones_are_not_mixed_and_nothing_else_is_made(toy_base, prepared):
    ready = prepared([{}])
    for strange in ([ready[0], ready[0].request], [{"prompt": "a red apple"}]):
        with pytest.raises(Invalid, match="give one kind of them"):
            list(generate(toy_base, strange))


def test_the_global_generator_is_neither_read_nor_moved(toy_base, prepared):
    ready = prepared(steps=2)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = latents_of(toy_base, ready)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(torch.stack(first), torch.stack(latents_of(toy_base, ready)))


def test_pictures_are_the_decoded_latents(toy_base, prepared):
    seen = []
    made = list(pictures(generate(toy_base, prepared(steps=2, size=(32, 48)), batch=2), seen.append))
    assert seen == [2, 2, 1, 1] and len(made) == 3
    for picture in made:
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
def test_a_control_runs_on_the_steps_that_it_rules_and_on_no_other(toy_base, prepared, calls, options, runs):
    controlled = latents_of(toy_base, prepared([options], steps=4))
    assert (calls["branch"], calls["base"]) == (runs, 4)
    if runs == 0:
        assert torch.equal(torch.stack(controlled), torch.stack(latents_of(toy_base, prepared((), steps=4))))


def test_a_hint_is_encoded_once_for_all_steps_and_both_halves_of_guidance(toy_base, prepared, calls):
    list(generate(toy_base, prepared(steps=4)))
    assert calls == {"branch": 4, "hint": 1, "base": 4}


def test_pictures_of_one_hint_read_it_once(toy_base, branches, monkeypatch):
    read, real = [], branches[0].hint_encoder.forward
    monkeypatch.setattr(branches[0].hint_encoder, "forward", lambda hint: read.append(len(hint)) or real(hint))
    loaded = {"0": SavedControl(branches[0], CONTRACT)}

    def made(*seeds):
        hints = [ControlRequest(name="0", images=draw_hint(seed), ready=True) for seed in seeds]
        requests = [Request(seed=i, steps=2, controls=(hint,)) for i, hint in enumerate(hints)]
        return latents_of(toy_base, prepare(toy_base, requests, loaded))

    same, others = made(5, 5, 5), made(5, 6, 5)
    assert read == [1, 3]
    assert all(torch.allclose(same[i], others[i], atol=1e-5) for i in (0, 2))
    assert relative(same[1], others[1]) > 0.01


# --- scales are one table ----------------------------------------------------------------------------------


def in_use(branch, scale=1.0, **options):
    return PreparedControl(branch, {"": CONTRACT}, scale, **options)


def run_table(base, branch, scales, steps=2):
    """The last latents of two guided pictures under one control of these scales."""
    x, _, text, hint = draw_inputs(base)
    four_rows = text[[0, 1, 0, 1]]
    *_, last = denoise(base, x, four_rows, [Steering(in_use(branch), hint, scales=scales[0])], SamplingSettings(steps))
    return last.latents


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


def test_a_scale_holds_for_its_row_tap_and_step_alone(toy_base, branches, injected, calls):
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
    x, _, text, hint = draw_inputs(toy_base)
    controls = [Steering(in_use(branches[0], 0.3), hint), Steering(in_use(mid, 2.0), hint)]
    list(denoise(toy_base, x, text, controls, SamplingSettings(1, guidance=1.0)))
    t = torch.tensor([999, 999])
    both = [c.network(x, t, text, c.network.encode_hint(hint)) for c, *_ in controls]
    for name, residual in injected[0].items():
        wanted = 0.3 * both[0][name] + (2.0 * both[1][name] if name == "middle" else 0)
        assert relative(residual, wanted) < 1e-5


# --- guidance by the hint -----------------------------------------------------------------------------------


def test_guidance_by_the_hint_moves_pictures_between_both_ways_of_the_paper(toy_base, branches, prepared):
    def made(counted):
        return latents_of(toy_base, prepared([{"hint_cfg_scale": counted}], TEXTS[:1], steps=STEPS))[0]

    released, between, conditional = made(1.0), made(2.5), made(4.0)
    assert min(relative(between, released), relative(between, conditional)) > 0.01
    plain = scale_table([in_use(branches[0])], toy_base.taps, 2, 1, SamplingSettings(STEPS))
    plain[:, :1] = 0
    [request] = [one.request for one in prepared(texts=TEXTS[:1])]
    x = torch.randn((1, *conditional.shape), generator=torch.Generator().manual_seed(request.seed))
    text = toy_base.encode_text([request.negative_prompt, request.prompt], (32, 32))
    hint = CONTRACT.tensor(request.controls[0].images[""], (32, 32))
    *_, last = denoise(
        toy_base, x, text, [Steering(in_use(branches[0]), hint, scales=plain[0])], SamplingSettings(STEPS)
    )
    assert relative(conditional, last.latents[0]) < 1e-6


# --- requests of several kinds, ranges of steps, cancelling, previews ------------------------------------------


def test_requests_with_different_settings_in_one_call_are_each_as_made_alone(toy_base, prepared):
    mixed = [
        *prepared([{}], steps=3),
        *prepared([{"scale": 0.5}], TEXTS[:1], steps=3),
        *prepared((), TEXTS[:2], steps=2, guidance=1.0),
        *prepared([{}], TEXTS[:1], steps=3, size=(48, 32)),
    ]
    found = list(generate(toy_base, mixed))
    advanced = [one.count for one in found if isinstance(one, Step)]
    assert advanced == [3] * 3 + [1] * 3 + [2] * 2 + [1] * 3, "batches of what is alike, in the order given"
    made = [one for one in found if isinstance(one, Picture)]
    assert [one.request for one in made] == [one.request for one in mixed]
    alone = [*latents_of(toy_base, mixed[:3]), *latents_of(toy_base, mixed[3:4])]
    alone += [*latents_of(toy_base, mixed[4:6]), *latents_of(toy_base, mixed[6:])]
    assert all(torch.equal(picture.latents, other) for picture, other in zip(made, alone, strict=True))


OTHERS: list[dict] = [
    {"steps": 2, "scheduler": "Euler a"},
    {"steps": 5, "guidance": 7.5},
    {"steps": 3, "scheduler": "DPM++ 2M SDE", "guider": "apg"},
    {"steps": 5, "edit": EditRequest(image=draw_hint(3), strength=0.5)},
]


@pytest.mark.parametrize("use", [{}, {"guess": True}, {"end": 0.5, "scale": 0.5}, {"mode": "control"}, None])
def test_requests_of_other_steps_schedulers_and_guidance_share_passes_through_the_base(toy_base, prepared, calls, use):
    uses = () if use is None else (use,)
    some = [one for others in OTHERS for one in prepared(uses, TEXTS[:1], **others)]
    alone = [latents_of(toy_base, [one])[0] for one in some]
    assert calls["base"] == sum(one.settings.made for one in some)
    calls |= dict.fromkeys(calls, 0)
    together = latents_of(toy_base, some, mixed=True)
    assert calls["base"] == (5 if use != {"end": 0.5, "scale": 0.5} else 6), "a pass for those under control, and not"
    assert calls["hint"] == len(some) * len(uses)
    assert max(relative(one, other) for one, other in zip(together, alone, strict=True)) < 1e-4


def test_what_cannot_share_a_pass_is_made_beside_and_in_its_order(toy_base, prepared, calls):
    long = "a cup, " * 60
    some = [
        *prepared([{}], TEXTS[:1], steps=2),
        *prepared([{}], ["a AND b"], steps=2, dialect="a1111"),
        *prepared([{}], TEXTS[:1], steps=2, guidance=1.0),
        *prepared([{}], [long], steps=2, dialect="comfy"),
        *prepared([{}], TEXTS[1:2], steps=2),
    ]
    alone = [latents_of(toy_base, [one])[0] for one in some]
    calls |= dict.fromkeys(calls, 0)
    together = latents_of(toy_base, some, mixed=True)
    assert calls["base"] == 2 * 4, "the first and the last share theirs"
    assert max(relative(one, other) for one, other in zip(together, alone, strict=True)) < 1e-4


def test_plain_requests_are_prepared_and_their_notes_are_warnings(toy_base, tmp_path):
    save_control(tmp_path, SavedControl(new_control(toy_base), HintSpec("canny")), toy_base)
    empty = ControlRequest(name=str(tmp_path), images=np.zeros((32, 32, 3), np.uint8), ready=True)
    requests = [Request(controls=[empty], steps=1), Request(prompt="a red apple", seed=1, steps=1)]
    with pytest.warns(UserWarning, match="is empty"):
        records = generate(toy_base, requests)
    assert [one.request for one in pictures(records)] == requests


@pytest.mark.parametrize("first", [1, 3])
def test_steps_to_k_and_from_k_on_are_all_steps(toy_base, branches, calls, first):
    x, _, text, hint = draw_inputs(toy_base)
    rows, controls, settings = (
        text[[0, 1, 0, 1]],
        [Steering(in_use(branches[0], start=0.25), hint)],
        SamplingSettings(5),
    )
    whole = list(denoise(toy_base, x, rows, controls, settings))
    runs = calls["branch"]
    parts = list(denoise(toy_base, x, rows, controls, settings, range(first)))
    assert calls["hint"] == 1 + (first > 1), "not read where no step needs it"
    parts += denoise(toy_base, parts[-1].latents, rows, controls, settings, range(first, 5))
    assert [one.step for one in whole] == [one.step for one in parts] == list(range(5))
    assert all(torch.equal(one.latents, other.latents) for one, other in zip(whole, parts, strict=True))
    assert calls["branch"] == 2 * runs


def test_from_a_picture_with_noise_added_the_last_steps_alone_keep_the_picture(toy_base):
    """Image to image needs nothing else: latents with the noise of a late step, and the range from there on."""
    x, _, text, _ = draw_inputs(toy_base)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    times = toy_base.noise.sampler(10).timesteps

    def moved(first):
        begun = toy_base.noise.add(x, noise, times[first].expand(2))
        *_, last = denoise(toy_base, begun, text, [], SamplingSettings(10, 1.0), range(first, 10))
        return relative(last.latents, x)

    assert moved(9) < moved(5) < moved(1)


def test_a_closed_iterator_computes_nothing_more(toy_base, prepared, calls):
    records = generate(toy_base, prepared(steps=4))
    steps = [next(records), next(records)]
    assert [(one.step, one.steps, one.count) for one in steps] == [(1, 4, 3), (2, 4, 3)]
    assert calls["base"] == 2, "each step is computed when it is asked for"
    records.close()
    assert calls["base"] == 2 and not list(records)


def test_between_steps_nothing_of_the_sampling_is_left_in_the_process(toy_base, prepared, monkeypatch):
    monkeypatch.setattr(type(toy_base), "autocast", lambda self: torch.autocast("cpu", torch.bfloat16))
    for _ in generate(toy_base, prepared(texts=TEXTS[:1], steps=2)):
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_a_preview_is_rough_and_computed_only_when_asked_for(toy_base, prepared, monkeypatch):
    encoded, decoded = [], []
    encode, decode = toy_base.encode_moments, toy_base.decode_latents
    monkeypatch.setattr(toy_base, "encode_moments", lambda pixels: encoded.append(1) or encode(pixels))
    monkeypatch.setattr(toy_base, "decode_latents", lambda latents: decoded.append(1) or decode(latents))
    steps = []
    for record in generate(toy_base, prepared(steps=2, size=(32, 48))):
        if isinstance(record, Step):
            assert not encoded and not decoded
            steps.append(record)
    for step in steps:
        shown = step.preview()
        assert [(one.shape, one.dtype) for one in shown] == [((8, 12, 3), np.uint8)] * 3
    assert len(encoded) == len(decoded) == 1, "the colours of latents are fitted once; nothing is decoded for a preview"


def test_previews_show_the_picture_that_is_coming():
    *steps, picture = generate(
        load_base("mini"), [Request(prompt="a red apple, on a teal background", seed=1, steps=5)]
    )
    small = fit(picture.pixels, steps[0].preview()[0].shape[:2]).astype(float)
    likeness = [np.corrcoef(small.ravel(), one.preview()[0].ravel())[0, 1] for one in steps]
    assert likeness[1] > 0.7 and likeness[-1] > 0.95


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_what_a_prediction_stands_for_is_solved_exactly(toy_base, prediction):
    parts = {"eps": "epsilon", "v": "v_prediction"}
    noise = Flow()
    if prediction in parts:
        noise = Diffusion(DDIMScheduler.from_config(toy_base.scheduler.config, prediction_type=parts[prediction]))
    clean, drawn = torch.randn(2, 2, 4, 8, 8)
    for t in (torch.tensor(20), torch.tensor(600)):
        x, target = (made(clean, drawn, t.expand(2)) for made in (noise.add, noise.target))
        assert relative(clean_latents(noise, x, target, t), clean) < 1e-4


# --- numbers that are not finite, and strengths by type -------------------------------------------------------------


@pytest.fixture
def astray(toy_base):
    """A control whose training went astray: its joins are huge."""
    branch = new_control(toy_base)
    for name, weight in branch.named_parameters():
        if name.startswith("joins"):
            weight.data.fill_(1e37)
    return SavedControl(branch.eval().requires_grad_(False), CONTRACT)


@pytest.mark.parametrize("fault", ["a control astray", "latents", "pixels of one of two"])
def test_a_picture_whose_numbers_are_not_finite_is_an_error_that_says_why(fault, toy_base, astray, monkeypatch):
    requests, loaded = [Request(seed=seed, steps=2) for seed in (3, 4)], {}
    if fault == "a control astray":
        one, loaded = asked([astray], [draw_hint(1)], steps=2, seed=4)
        requests = [requests[0], one]
    decode = type(toy_base).decode_latents

    def broken(self, latents):
        pixels = decode(self, latents)
        pixels[-1] = float("nan" if fault == "latents" else "inf")
        return pixels

    if fault != "a control astray":
        monkeypatch.setattr(type(toy_base), "decode_latents", broken)
    with pytest.raises(Invalid, match=r"picture of seed 4 is none.*lower guidance.*fp32.*went astray"):
        list(pictures(generate(toy_base, prepare(toy_base, requests, loaded))))


@pytest.mark.parametrize(
    ("use", "strengths"),
    [
        ({"scale": 0.9}, {"canny": 0.9, "depth": 0.9}),
        ({"scales": {"depth": 0.4}}, {"canny": 1.0, "depth": 0.4}),
        ({"scale": 0.5, "scales": {"canny": -1.0, "depth": 0.0}}, {"canny": -1.0, "depth": 0.0}),
    ],
)
def test_a_union_s_types_have_a_strength_each(use, strengths, toy_base):
    """As in diffusers' ControlNetUnion, the features of several types are scaled and their residuals are not."""
    union = SavedControl(randomised(new_union(toy_base)), HintSpec(""))
    hints = {"canny": draw_hint(1), "depth": draw_hint(2)}
    [one] = prepare(toy_base, [asked([union], [hints], [use], steps=2)[0]], {"0": union})
    [control] = one.controls
    assert (control.strengths, control.scale) == (strengths, 1.0)
    assert scale_table(one.controls, toy_base.taps, 2, 1, one.settings).unique().tolist() == [0.0, 1.0], "or no tap"
    [scaled] = pictures(generate(toy_base, [one]))
    features = union.branch.encode_hint
    try:
        union.branch.encode_hint = lambda hint, given: features(hint, strengths)  # whatever the request says
        [again] = pictures(generate(toy_base, prepare(toy_base, [asked([union], [hints], steps=2)[0]], {"0": union})))
    finally:
        del union.branch.encode_hint
    assert torch.equal(scaled.latents, again.latents)


def test_types_that_are_all_of_scale_zero_are_no_control(toy_base):
    union = SavedControl(randomised(new_union(toy_base)), HintSpec(""))
    hints = {"canny": draw_hint(1), "depth": draw_hint(2)}
    [one] = prepare(toy_base, [asked([union], [hints], [{"scale": 0.0}], steps=2)[0]], {"0": union})
    [plain] = prepare(toy_base, [Request(steps=2)])
    latents = [next(pictures(generate(toy_base, [each]))).latents for each in (one, plain)]
    assert torch.equal(*latents)


# --- memory ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_memory_of_a_hundred_pictures_is_that_of_ten(toy_base, prepared):
    """Resident memory, in a process that makes one picture after the other."""
    taken, [one] = [], prepared([{}], TEXTS[:1], steps=4)
    for _ in pictures(generate(toy_base, [one] * 100, batch=1)):
        taken.append(int(Path("/proc/self/statm").read_text().split()[1]))
    assert max(taken[10:]) <= 1.02 * min(taken[10:])
