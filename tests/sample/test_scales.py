"""One table says how much of each control is added where and when."""

import numpy as np
import pytest
import torch
from diffusers import T2IAdapter

from conftest import asked, make
from controlkit.controls import Adapter, new_control
from controlkit.errors import UserError
from controlkit.formats import SavedControl
from controlkit.images import HintSpec
from controlkit.sample import ControlRequest, PreparedControl, SamplingSettings, maker, scale_table


@pytest.fixture(scope="module")
def branch(toy_base):
    return new_control(toy_base)


def test_start_and_end_keep_the_steps_that_the_stock_pipeline_keeps(branch):
    taps = branch.taps
    for steps in (1, 4, 5, 7, 10, 20):
        for start in (0, 0.1, 0.2, 0.3, 0.5):
            for end in (0.3, 0.5, 0.6, 0.7, 0.9, 1):
                control = PreparedControl(branch, {}, 2.0, start, end)
                table = scale_table([control], taps, 1, 0, SamplingSettings(steps))
                kept = [not (i / steps < start or (i + 1) / steps > end) for i in range(steps)]
                assert table[0, 0, :, :, 0, 0].tolist() == [[2.0 * keep for keep in kept]] * len(taps)


def halves(control, guidance):
    """The control's scale in guidance's unconditional and conditional half."""
    table = scale_table([control], control.network.taps, 2, 1, SamplingSettings(1, guidance))
    assert len({*table[0, 0].flatten().tolist()}) == len({*table[0, 1].flatten().tolist()}) == 1
    return table[0, :, 0, 0, 0, 0].tolist()


def test_guidance_counts_a_hint_as_often_as_it_is_told(branch):
    for guidance in (1.5, 4.0, 7.5):
        for counted in (0.0, 1.0, 1.3, guidance):
            unconditional, conditional = halves(PreparedControl(branch, {}, 0.5, hint_cfg_scale=counted), guidance)
            effect = unconditional + guidance * (conditional - unconditional)  # first order
            assert conditional == 0.5 and effect == pytest.approx(0.5 * counted, abs=1e-5)
    assert halves(PreparedControl(branch, {}), 4.0) == [1.0, 1.0]  # as released
    assert halves(PreparedControl(branch, {}, hint_cfg_scale=9.0), 4.0) == [0.0, 1.0]  # no more than the prompt
    assert halves(PreparedControl(branch, {}, hint_cfg_scale=9.0), 1.0) == [
        1.0,
        1.0,
    ]  # no guidance: nothing to count


def tap_column(control, row=1):
    """The scale of each of a control's taps, in its order, in one half of guidance."""
    taps = control.network.taps
    return scale_table([control], taps, 2, 1, SamplingSettings(1))[0, row, :, 0, 0, 0].tolist()


def test_soft_weights_are_powers_of_0825(branch):
    count = len(branch.taps)
    expected = pytest.approx([0.825 ** (count - 1 - k) for k in range(count)])
    for mode in ("prompt", "control", "My prompt is more important", 2):
        asked = ControlRequest(name="x", mode=mode)
        control = PreparedControl(branch, {}, mode=asked.mode)
        assert tap_column(control) == expected
        assert tap_column(control, row=0) == (expected if asked.mode == "prompt" else [0.0] * count)
    assert tap_column(PreparedControl(branch, {}, mode=ControlRequest(name="x", mode=0).mode)) == [1.0] * count


def test_an_adapter_s_soft_weights_are_its_own(toy_base):
    adapter = Adapter(T2IAdapter(3, [32, 64], 1, 8, "full_adapter"), toy_base.taps)
    count = len(adapter.taps)
    table = scale_table([PreparedControl(adapter, {}, mode="prompt")], adapter.taps, 2, 1, SamplingSettings(1))
    assert table[0, 1, :, 0, 0, 0].tolist() == pytest.approx([0.25, 0.62, 0.825, 1.0][-count:]) and count > 1


def test_resolution_weights_are_64_over_h_and_in_the_conditional_half_alone(branch):
    """At h = 64 for the finest tap, as 512 pixels have it on Stable Diffusion (Section 3.4)."""
    finest = min(tap.stride for tap in branch.taps)
    heights = [64 * finest / tap.stride for tap in branch.taps]
    control = PreparedControl(branch, {}, 0.5, cfg_weights=True)
    assert tap_column(control) == pytest.approx([0.5 * 64 / h for h in heights]) and len({*heights}) > 1
    assert tap_column(control, row=0) == [0.0] * len(heights)


def test_factors_are_given_by_step_and_by_tap(branch):
    count = len(branch.taps)
    by_tap = tuple(k / 10 for k in range(count))
    control = PreparedControl(branch, {}, 2.0, start=0.25, by_step=(1.0, 0.5, 0.0, -1.0), by_tap=by_tap)
    table = scale_table([control], branch.taps, 1, 0, SamplingSettings(4))[0, 0, :, :, 0, 0]
    assert torch.allclose(table, 2 * torch.tensor(by_tap)[:, None] * torch.tensor([0.0, 0.5, 0.0, -1.0]))


def test_the_conditional_half_alone_is_as_asked(branch):
    assert halves(PreparedControl(branch, {}, 0.5, cond_only=True), 4.0) == [0.0, 0.5]


@pytest.mark.parametrize(
    "neutral",
    [
        {"mode": "balanced"},
        {"by_step": (1.0,) * 3},
        {"by_tap": "ones"},
        {"region": np.full((8, 8, 3), 255, np.uint8)},
        {"cond_only": False},
        {"scale": 1.0},
        {"start": 0.0, "end": 1.0},
    ],
    ids=lambda neutral: next(iter(neutral)),
)
def test_a_neutral_setting_changes_nothing_bit_for_bit(toy_base, drawn_joins, neutral):
    control = SavedControl(drawn_joins(new_control(toy_base)), HintSpec("canny"))
    hint = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    if neutral.get("by_tap"):
        neutral = {"by_tap": (1.0,) * len(control.branch.taps)}
    plain, same = (make(toy_base, [control], [hint], [use], steps=3) for use in ({}, neutral))
    assert np.array_equal(plain.pixels, same.pixels) and torch.equal(plain.latents, same.latents)
    without = make(toy_base, steps=3)
    assert not torch.equal(plain.latents, without.latents)


def test_a_region_keeps_residuals_inside_it(toy_base, drawn_joins, monkeypatch):
    control = SavedControl(drawn_joins(new_control(toy_base)), HintSpec("canny"))
    hint = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    region = np.zeros((32, 32, 3), np.uint8)
    region[:, 16:] = 255
    seen, real = [], toy_base.decode_noise
    monkeypatch.setattr(
        toy_base, "decode_noise", lambda encoded, inject=None: seen.append(inject) or real(encoded, inject)
    )
    make(toy_base, [control], [hint], [{"region": region}], steps=1)
    make(toy_base, [control], [hint], steps=1)
    inside, everywhere = seen
    for name, residual in inside.items():
        half = residual.shape[-1] // 2
        assert not residual[..., :half].any() and residual[..., half:].any()
        assert torch.allclose(residual[..., half:], everywhere[name][..., half:])


def test_pictures_of_one_batch_have_regions_of_their_own(toy_base, drawn_joins):
    control = SavedControl(drawn_joins(new_control(toy_base)), HintSpec("canny"))
    hint = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    regions = [None, np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)]
    uses = [{} if region is None else {"region": region} for region in regions]
    pairs = [asked([control], [hint], [use], steps=2) for use in uses]
    whole, none, all_of_it = maker(toy_base, pairs[0][1])([request for request, _ in pairs])
    assert torch.allclose(whole.latents, all_of_it.latents, atol=1e-5)
    assert torch.allclose(none.latents, make(toy_base, steps=2).latents, atol=1e-5)
    assert (whole.latents - none.latents).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ({"mode": "both"}, "mode"),
        ({"mode": "prompt", "guess": True}, "one"),
        ({"cfg_weights": True, "mode": 2}, "one"),
        ({"by_step": (1.0, 2.0)}, "3 steps"),
        ({"by_tap": (1.0, 2.0)}, "taps"),
        ({"by_tap": "1/x"}, "by_tap"),
        ({"region": "absent.png"}, "absent.png"),
    ],
)
def test_settings_of_a_control_that_do_not_fit_are_refused(toy_base, use, words):
    control = SavedControl(new_control(toy_base), HintSpec("canny"))
    with pytest.raises(UserError, match=words):
        make(toy_base, [control], [np.zeros((32, 32, 3), np.uint8)], [use], steps=3)


def test_factors_are_read_from_a_text():
    assert ControlRequest(name="x", by_tap="1/0.5/0").by_tap == (1.0, 0.5, 0.0)


def test_guess_mode_fades_towards_the_finest_resolution_and_is_silent_in_the_unconditional_half(branch):
    table = scale_table([PreparedControl(branch, {}, 2.0, guess=True)], branch.taps, 2, 1, SamplingSettings(1))
    assert not table[0, 0].any()
    fading = table[0, 1, :, 0, 0, 0].tolist()
    assert fading == sorted(fading) and fading[0] == pytest.approx(0.2) and fading[-1] == pytest.approx(2.0)
