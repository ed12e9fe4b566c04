"""What a base is told at each step: schedules, prompts joined by AND, windows, and the halves of guidance."""

import pytest
import torch

from conftest import make
from controlkit.errors import Invalid
from controlkit.prompts import Span, Words
from controlkit.sample import Request, SamplingSettings, denoise, generate, prepare
from controlkit.sample.texts import Said, Script


def latents_of(base, **settings):
    return make(base, steps=4, **settings).latents


def test_words_change_at_their_step(toy_base):
    told = latents_of(toy_base, prompt="[red:gold:2] apple", dialect="a1111")
    x = torch.randn(1, *toy_base.latent_shape((32, 32)), generator=torch.Generator().manual_seed(0))
    settings = SamplingSettings(4)
    for prompt, span in (("red apple", range(2)), ("gold apple", range(2, 4))):
        *_, last = denoise(toy_base, x, toy_base.encode_text([None, prompt], (32, 32)), [], settings, span)
        x = last.latents
    assert torch.allclose(told, x[0], atol=1e-6)
    assert (told - latents_of(toy_base, prompt="gold apple")).abs().max() > 1e-3


def test_prompts_joined_by_and_add_up(toy_base):
    told = latents_of(toy_base, prompt="a cat :1.5 AND a red apple :-0.5", dialect="a1111", guidance=3.0)
    x = torch.randn(1, *toy_base.latent_shape((32, 32)), generator=torch.Generator().manual_seed(0))
    sampler = toy_base.noise.sampler(4)
    x, text = sampler.start(x), toy_base.encode_text([None, "a cat", "a red apple"], (32, 32))
    with torch.no_grad():
        for t in sampler.timesteps:
            plain, cat, apple = toy_base.predict(sampler.scaled(x, t).repeat(3, 1, 1, 1), t.expand(3), text).split(1)
            x = sampler.step(plain + 3.0 * (1.5 * (cat - plain) - 0.5 * (apple - plain)), t, x)
    assert torch.allclose(told, x[0], atol=1e-4)


def test_one_prompt_by_and_is_the_prompt_bit_for_bit(toy_base):
    plain = latents_of(toy_base, prompt="a cat, on teal")
    for dialect, prompt in {"a1111": "a cat, on teal", "comfy": "a (cat:1.0), on teal"}.items():
        assert torch.allclose(latents_of(toy_base, prompt=prompt, dialect=dialect), plain, atol=1e-5)
    assert torch.equal(latents_of(toy_base, prompt="a cat, on teal", dialect="a1111"), plain)


def test_a_batch_makes_what_each_makes_alone(toy_base):
    prompts = ["a [red|gold] apple", "a cat AND a dog", "apple " * 60, "a cat", "a (red:1.4) apple"]
    requests = [Request(prompt=text, dialect="a1111", steps=3, seed=i) for i, text in enumerate(prompts)]
    together = [one for one in generate(toy_base, requests) if hasattr(one, "pixels")]
    for request, picture in zip(requests, together, strict=True):
        alone = make(toy_base, **{name: getattr(request, name) for name in ("prompt", "dialect", "steps", "seed")})
        assert torch.allclose(picture.latents, alone.latents, atol=1e-5)


def test_each_text_is_encoded_once(toy_base, monkeypatch):
    calls, real = [], toy_base.encode_text
    monkeypatch.setattr(toy_base, "encode_text", lambda prompts, size: calls.append(prompts) or real(prompts, size))
    make(toy_base, prompt="[red|gold] apple", dialect="a1111", steps=6)
    assert len(calls) == 2
    make(toy_base, prompt="[red|gold] apple", steps=6)
    assert len(calls) == 3


def test_without_guidance_one_prompt_has_no_unconditional_half(toy_base):
    [one] = prepare(toy_base, [Request(guidance=1.0)])
    assert not one.settings.is_guided and len(Said(toy_base, [one.script], False, (32, 32))) == 1
    [two] = prepare(toy_base, [Request(prompt="a AND b", dialect="a1111", guidance=1.0)])
    assert two.settings.is_guided and two.settings.weights == (1.0, 1.0)


def test_a_negative_prompt_is_read_in_the_same_dialect_and_never_joined():
    script = Script.of(Request(prompt="a", negative_prompt="(b:1.2) AND c", dialect="a1111", clip_skip=2), Span(20))
    [(end, words)] = script.negative
    assert end == 20 and [piece.text for piece in words.pieces] == ["b", " AND c"] and words.clip_skip == 2
    assert Script.of(Request(), Span(20)).negative == ((20, None),)
    assert Script.of(Request(prompt="(a)"), Span(20)).parts == (((20, Words.of("(a)")),),)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dialect": "a1111", "clip_skip": 0}, "1 (the last layer)"),
        ({"clip_skip": -1}, "0 (no layer)"),
        ({"dialect": "comfy", "clip_skip": 2}, "-1 (the last layer)"),
        ({"dialect": "webui"}, "a1111"),
        ({"prompt": "x" * 30_000}, "20000"),
    ],
)
def test_settings_of_prompts_are_refused_with_what_they_may_be(settings, words):
    with pytest.raises(Invalid) as refused:
        Request(**settings)
    assert words in str(refused.value)


def test_a_lora_in_a_prompt_belongs_to_the_base(toy_base):
    with pytest.raises(Invalid, match=r"style.*load_base"):
        prepare(toy_base, [Request(prompt="a <lora:style:0.5>", dialect="a1111")])
    prepare(toy_base, [Request(prompt="a <lora:style:0.5>")])  # letters
