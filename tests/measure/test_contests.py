"""The contests: a prompt against the hint, and a control beside a silent one; of makers that obey as told."""

import numpy as np
import pytest

from controlkit.annotators import contract
from controlkit.data import CirclePairs
from controlkit.errors import Unsupported
from controlkit.measure import EvaluationPlan, QualityReferee
from controlkit.measure.contests import (
    Companion,
    against_prompt,
    beside_silent,
    contradicting,
    curve_points,
    empty_hint,
)
from controlkit.measure.page import contest_rows
from controlkit.sample import ControlRequest, Picture

PAIRS = CirclePairs(48, 4)
SCALES = (0.25, 0.5, 1.0, 2.0)


@pytest.fixture
def plan():
    return EvaluationPlan(ControlRequest(name="drawn", hint_cfg_scale=1.0), contract("canny"), PAIRS, steps=1)


@pytest.fixture
def through(plan):
    """In place of a VAE: one that lets through all that the hints show."""
    return lambda pictures: [plan.spec.picture(hint) for hint in plan.hints]


def outline(request, scale_needed=1.0):
    """The hint as the picture where the first control's scale is large enough; else a black picture."""
    heard = request.controls and request.controls[0].scale >= scale_needed
    pixels = request.controls[0].images[""] if heard else np.zeros((48, 48, 3), np.uint8)
    return Picture(request, pixels.copy())


class Words(QualityReferee):
    """Finds every black picture near to the prompt it was told, and others to their own."""

    def __init__(self, told, own):
        self.told, self.own = told, own

    def embed(self, pictures):
        raise NotImplementedError

    embed_texts = features = embed

    def clip_scores(self, pictures, prompts):
        is_black = np.array([not picture.any() for picture in pictures])
        return np.where(is_black, 0.9, 0.1) if list(prompts) == self.told else np.where(is_black, 0.2, 0.8)


def test_no_pair_keeps_its_prompt_and_all_keep_their_pictures():
    told = contradicting(PAIRS)
    assert [one.prompt for one in told] == [PAIRS[i].prompt for i in (2, 3, 0, 1)]
    assert all(np.array_equal(a.picture, b.picture) and a.prompt != b.prompt for a, b in zip(told, PAIRS, strict=True))


def test_the_scale_at_which_the_hint_wins_is_found_and_up_to_which_the_prompt_does(plan, through):
    words = Words([one.prompt for one in contradicting(PAIRS)], [one.prompt for one in PAIRS])
    found = against_prompt(
        lambda requests: [outline(one) for one in requests],
        plan,
        through,
        words,
        SCALES,
        finder=lambda picture: picture,
    )
    assert (found["hint_wins_from"], found["prompt_wins_to"]) == (1.0, 0.5)
    assert [round(mean, 3) for _, mean in curve_points(found, "prompt_wins")] == [1, 1, 0, 0]
    low, *_, high = (mean for _, mean in curve_points(found, "obedience"))
    assert low <= 0 and high > 0.9
    floors = {one["obedience"]["floor"]["mean"] for one in found["curve"]}
    assert len(floors) == 1, "floor and ceiling stand at every point"
    [(head, rows, caption)] = contest_rows({"against_prompt": found})
    assert len(rows) == 4 and len(rows[0]) == len(head) - 1 and "from scale 1 on" in caption


def test_without_a_referee_obedience_alone_is_told(plan, through):
    found = against_prompt(
        lambda requests: [outline(one, 9) for one in requests],
        plan,
        through,
        None,
        SCALES,
        finder=lambda picture: picture,
    )
    assert found["hint_wins_from"] is None and found["prompt_wins_to"] is None
    assert "prompt_wins" not in found["curve"][0]
    [(head, rows, caption)] = contest_rows({"against_prompt": found})
    assert len(rows[0]) == len(head) - 1 == 2 and "at no scale" in caption


@pytest.mark.parametrize(("harm", "cost"), [(0, 0.0), (48, 1.15)], ids=["harmless", "fatal"])
def test_the_cost_of_silence_is_what_is_lost_beside_it(plan, through, harm, cost):
    def make(requests):
        for one in requests:
            picture = outline(one)
            if len(one.controls) > 1:
                assert not one.controls[1].images[""].any(), "the second control says nothing"
                picture.pixels[:harm] = 0
            yield picture

    companion = Companion(ControlRequest(name="other", hint_cfg_scale=1.0), contract("depth"))
    found = beside_silent(make, plan, through, companion, finder=lambda picture: picture)
    assert found["cost"]["mean"] == pytest.approx(cost, abs=0.25)
    assert found["alone"]["floor"] == found["beside"]["floor"] and found["alone"]["ceiling"]["mean"] > 0.5
    [(_, rows, caption)] = contest_rows({"beside_silent": found | {"silent": "depth"}})
    assert rows[1][0] == "beside a silent depth" and "costs" in caption


@pytest.mark.parametrize(
    ("kind", "colour"), [("canny", (0, 0, 0)), ("depth", (0, 0, 0)), ("normal", (128, 128, 255)), ("pose", (0, 0, 0))]
)
def test_a_silent_hint_is_the_ground_of_its_kind(kind, colour):
    assert np.array_equal(np.unique(empty_hint(contract(kind), (8, 6)).reshape(-1, 3), axis=0), [colour])
    assert empty_hint(contract(kind), (8, 6)).shape == (8, 6, 3)


def test_a_silent_hint_with_a_mask_is_all_masked():
    assert not empty_hint(contract("inpaint"), (8, 8))[..., 3].any()


def test_photographs_cannot_be_silent():
    with pytest.raises(Unsupported, match="always say something"):
        empty_hint(contract("tile"), (8, 8))
