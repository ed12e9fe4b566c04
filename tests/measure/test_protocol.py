"""The protocol of ControlNet++: its settings, its values, and the faults that it can repeat."""

import numpy as np
import pytest

from controlkit.annotators import contract
from controlkit.data import CirclePairs
from controlkit.errors import Unsupported
from controlkit.measure import EvaluationPlan, protocol_rows, three_ways
from controlkit.measure.protocol import REPEATS, five_scales, planned, raw_figures, raw_of, wrapped
from controlkit.sample import ControlRequest, Picture


@pytest.fixture
def plan():
    asked = ControlRequest(name="drawn", hint_cfg_scale=1.0)
    return planned(EvaluationPlan(asked, contract("canny"), list(CirclePairs(48, 3))))


def make(requests):
    for one in requests:
        hint = one.controls[0].images[""] if one.controls else np.zeros((48, 48, 3), np.uint8)
        yield Picture(one, np.ascontiguousarray(hint))


def test_each_prompt_has_four_pictures_in_the_published_settings(plan):
    requests = plan.requests("controlled")
    assert len(requests) == 12 and [one.seed for one in requests] == [*range(42, 54)]
    assert [one.prompt for one in requests[:5]] == [*[plan.pairs[0].prompt] * 4, plan.pairs[4].prompt]
    one = requests[0]
    assert (one.steps, one.guidance, one.scheduler) == (20, 7.5, "UniPC")
    assert one.negative_prompt == "worst quality, low quality"
    assert plan.requests("no_control")[0].scheduler == "UniPC"


def test_raw_values_stand_between_their_floors_and_ceiling(plan):
    made = three_ways(make, plan) | {"ceiling": [plan.spec.picture(hint) for hint in plan.hints]}
    found = raw_figures(plan, made, finder=lambda picture: picture)
    assert found["controlled"]["mean"] == found["ceiling"]["mean"] == 100
    assert found["no_control"]["mean"] == 0 and 0 <= found["shuffled"]["mean"] < 50
    [(head, rows, _)] = protocol_rows({"protocol": found})
    assert head[2] == "F1 %" and [row[0].split(":")[0] for row in rows] == ["controlled", "floor", "floor", "ceiling"]


def test_the_interval_redraws_prompts_and_not_pictures():
    raw = raw_of(contract("canny"))
    light, dark = np.full((4, 4, 3), 255, np.uint8), np.zeros((4, 4, 3), np.uint8)
    same = raw.figure([light, dark, dark, dark] * 3, [light, light, dark, dark] * 3)
    assert same.low == same.mean == same.high == pytest.approx(200 / 3)
    mixed = raw.figure([light] * 4 + [dark] * 4, [light] * 8)
    assert (mixed.mean, mixed.low, mixed.high) == (50, 0, 100) and REPEATS == 4


def test_the_released_scorer_wraps_line_art_around():
    picture = np.array([255, 254, 0, 1], np.uint8)  # light on dark: 0, 1, 255, 254 dark on light
    assert wrapped(picture).tolist() == [1, 0, 2, 3]
    lines = np.zeros((192, 192, 3), np.uint8)
    lines[::16] = 255
    assert five_scales(lines, lines) == pytest.approx(1, abs=1e-4)
    raw = raw_of(contract("lineart"), quirks=True)
    assert raw.terms([lines], [lines])[0] < 0.9 and raw_of(contract("lineart")).terms([lines], [lines])[0] > 0.99


def test_what_the_protocol_does_not_measure_is_refused():
    with pytest.raises(Unsupported, match='does not measure "mlsd"'):
        raw_of(contract("mlsd"))
    with pytest.raises(Unsupported, match="--size 512"):
        five_scales(*np.zeros((2, 64, 64, 3), np.uint8))
