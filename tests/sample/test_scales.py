"""One table says how much of each control is added where and when."""

import pytest

from controlkit.controls import new_control
from controlkit.sample import PreparedControl, SamplingSettings, scale_table


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


def test_guess_mode_fades_towards_the_finest_resolution_and_is_silent_in_the_unconditional_half(branch):
    table = scale_table([PreparedControl(branch, {}, 2.0, guess=True)], branch.taps, 2, 1, SamplingSettings(1))
    assert not table[0, 0].any()
    fading = table[0, 1, :, 0, 0, 0].tolist()
    assert fading == sorted(fading) and fading[0] == pytest.approx(0.2) and fading[-1] == pytest.approx(2.0)
