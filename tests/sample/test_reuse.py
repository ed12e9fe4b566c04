"""Steps that reuse an earlier one's first half: which they are, what runs, and that nothing else changes."""

import numpy as np
import pytest
import torch

from conftest import draw_inputs, relative
from controlkit.backbones import ActiveControl
from controlkit.branch import ControlSpec
from controlkit.controls import new_control
from controlkit.errors import Invalid, Unsupported
from controlkit.formats import SavedControl
from controlkit.images import HintSpec
from controlkit.sample import ControlRequest, Request, generate, pictures, prepare
from controlkit.sample.pace import PACES, Pace

STEPS = 18


@pytest.fixture(scope="module")
def branch(toy_base, drawn_joins):
    return drawn_joins(new_control(toy_base), 3).eval().requires_grad_(False)


@pytest.fixture
def latents_of(toy_base, branch):
    hint = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    loaded = {"0": SavedControl(branch, HintSpec("canny"))}

    def make(count=1, use=None, **settings):
        asked = []
        for seed in range(count):
            control = ControlRequest(name="0", images=hint, ready=True, **(use or {}))
            request = Request(prompt="a red apple", seed=seed, controls=(control,), **{"steps": STEPS} | settings)
            asked += prepare(toy_base, [request], loaded)
        return [picture.latents for picture in pictures(generate(toy_base, asked))]

    return make


@pytest.fixture
def calls(toy_base, branch, monkeypatch):
    """Rows of text that each half of the base, the decoder's last level alone, and the branch, were run with."""
    seen = {"first": [], "second": [], "last": [], "branch": []}
    first, second, own = toy_base.encode_noise, toy_base.decoded, branch.forward

    def encode(x, t, text, *args):
        seen["first"].append(len(text))
        return first(x, t, text, *args)

    def decode(encoded, inject, deep=None):
        seen["second" if deep is None else "last"].append(len(encoded.text))
        return second(encoded, inject, deep)

    monkeypatch.setattr(toy_base, "encode_noise", encode)
    monkeypatch.setattr(toy_base, "decoded", decode)
    monkeypatch.setattr(branch, "forward", lambda x, t, text, f: seen["branch"].append(len(text)) or own(x, t, text, f))
    return seen


def test_which_steps_compute_all():
    assert Pace(0.2).fresh(10, range(10)) == {0, 2, 4, 6, 8}
    assert Pace(0.3, 0.3).fresh(10, range(10)) == {0, 1, 2, 5, 8}
    assert Pace(0.25, 0).fresh(12, range(5, 12)) == {5, 8, 11}
    assert Pace(0.25, 1).fresh(4, range(4)) == {0, 1, 2, 3}
    assert PACES["fast"].fresh(20, range(20)) == {0, 1, 4, 7, 10, 13, 16, 19}
    assert PACES["turbo"].fresh(20, range(20)) == {0, 1, 6, 11, 16}


def test_which_steps_run_the_whole_decoder():
    assert PACES["fast"].whole(20, range(20)) == {*range(20)}
    assert Pace(0.4, 0, deep=0.2).whole(10, range(10)) == {0, 2, 4, 6, 8}
    assert Pace(0.5, 0, deep=0.3).whole(10, range(10)) == {0, 3, 5, 8}
    assert Pace(0.25, 0, deep=1.0).whole(12, range(5, 12)) == {5, 8, 11}


@pytest.mark.parametrize("speed", PACES)
def test_runs_of_few_steps_reuse_nothing(speed):
    assert PACES[speed].fresh(7, range(7)) == {*range(7)}


@pytest.mark.parametrize(("every", "halves"), [(2, False), (3, False), (2, True), (3, True)])
def test_what_runs_at_which_step(latents_of, calls, monkeypatch, every, halves):
    monkeypatch.setitem(PACES, "fast", Pace(every / STEPS, 0, halves))
    latents_of(count=2, speed="fast")
    fresh = len(range(0, STEPS, every))
    assert calls["first"] == calls["branch"] == [4] * fresh
    reused = 2 if halves else 4
    assert calls["second"] == [4 if step % every == 0 else reused for step in range(STEPS)]


@pytest.mark.parametrize("halves", [False, True])
def test_the_last_level_alone_runs_where_the_deeper_ones_serve(latents_of, calls, monkeypatch, halves):
    monkeypatch.setitem(PACES, "turbo", Pace(6 / STEPS, 0, halves, deep=3 / STEPS))
    latents_of(count=2, speed="turbo")
    reused = 2 if halves else 4
    assert calls["second"] == [4, reused] * (STEPS // 6) and calls["first"] == [4] * (STEPS // 6)
    assert calls["last"] == [reused] * 4 * (STEPS // 6)


def test_the_last_level_on_the_same_steps_features_is_the_whole_decoder(toy_base, branch):
    x, t, text, hint = draw_inputs(toy_base)
    with torch.no_grad():
        half = toy_base.first_half(x, t, text, [ActiveControl(branch, branch.encode_hint(hint))])
        whole = toy_base.second_half(half, t, text)
        again = toy_base.second_half(half, t, text, whole.deep)
        other = toy_base.second_half(half, t, text, whole.deep + 1)
    assert torch.equal(whole.prediction, again.prediction) and torch.equal(whole.deep, again.deep)
    assert relative(other.prediction, whole.prediction) > 1e-3


def test_a_pace_that_computes_all_is_exact_bit_for_bit(latents_of, monkeypatch):
    monkeypatch.setitem(PACES, "fast", Pace(0.0))
    for settings in ({}, {"guidance": 1.0}, {"tile": 16, "size": (32, 32)}):
        [exact], [fast] = latents_of(**settings), latents_of(speed="fast", **settings)
        assert torch.equal(exact, fast)


def test_reused_steps_differ_a_little(latents_of):
    [exact], [fast], [turbo] = (latents_of(speed=speed) for speed in ("exact", "fast", "turbo"))
    [other] = latents_of(use={"scale": 0.0})
    assert 0 < relative(fast, exact) < 0.5 * relative(other, exact)
    assert 0 < relative(turbo, exact) < relative(other, exact) and not torch.equal(fast, turbo)


@pytest.mark.parametrize("settings", [{}, {"guidance": 1.0}])
def test_a_batch_reuses_as_each_picture_alone(latents_of, settings):
    for speed in ("fast", "turbo"):
        together, alone = latents_of(count=3, speed=speed, **settings), latents_of(count=1, speed=speed, **settings)
        assert relative(together[0], alone[0]) < 1e-5


def test_joined_prompts_are_predicted_at_every_step_and_the_unconditional_half_is_not(toy_base, calls, monkeypatch):
    monkeypatch.setitem(PACES, "turbo", Pace(0.5, 0))
    request = Request(prompt="a cat AND a dog", dialect="a1111", steps=4, speed="turbo")
    list(generate(toy_base, [request]))
    assert calls["second"] == [3, 2, 3, 2] and calls["first"] == [3, 3]


def test_where_a_control_or_the_words_change_all_is_computed(latents_of, calls, monkeypatch):
    monkeypatch.setitem(PACES, "fast", Pace(1.0, 0, False))
    latents_of(speed="fast")
    assert len(calls["first"]) == 1
    halved = (1,) * 9 + (0.5,) * 9
    for use, fresh in (({"end": 0.5}, 2), ({"start": 0.3, "end": 0.7}, 3), ({"by_step": halved}, 2)):
        calls["first"].clear()
        latents_of(speed="fast", use=use)
        assert len(calls["first"]) == fresh, use


def test_words_that_change_are_read(toy_base, calls, monkeypatch):
    monkeypatch.setitem(PACES, "fast", Pace(1.0, 0, False))
    request = Request(prompt="a [cat:dog:0.5]", dialect="a1111", steps=8, speed="fast")
    list(generate(toy_base, [request]))
    assert len(calls["first"]) == 2


def test_a_speed_that_is_none_is_refused():
    with pytest.raises(Invalid, match="speed"):
        Request(speed="ludicrous")


@pytest.mark.parametrize(("steps", "body", "reason"), [(6, "copy", "too few"), (20, "xs", "walks beside")])
def test_where_nothing_can_be_reused_a_note_says_so_and_pictures_are_exact(toy_base, steps, body, reason):
    loaded = {"0": SavedControl(new_control(toy_base, ControlSpec(body=body)), HintSpec("canny"))}
    hint = np.zeros((32, 32, 3), np.uint8)
    hint[8:16] = 255
    made = {}
    for speed in ("exact", "fast"):
        control = ControlRequest(name="0", images=hint, ready=True)
        [one] = prepare(toy_base, [Request(steps=steps, speed=speed, controls=(control,))], loaded)
        assert any(reason in note for note in one.notes) == (speed == "fast")
        [made[speed]] = [picture.latents for picture in pictures(generate(toy_base, [one]))]
    assert torch.equal(made["exact"], made["fast"])


def test_the_second_half_refuses_what_walked_beside_the_first(toy_base):
    x, t, text, hint = draw_inputs(toy_base)
    branch = new_control(toy_base, ControlSpec(body="xs"))
    with torch.no_grad():
        half = toy_base.first_half(x, t, text, [ActiveControl(branch, branch.encode_hint(hint))])
        with pytest.raises(Unsupported, match="every step"):
            toy_base.second_half(half, t, text)
