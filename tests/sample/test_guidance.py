"""Guidance as published: diffusers' own functions say the same."""

import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

from conftest import relative
from controlkit.sample import Request, SamplingSettings, generate, pictures
from controlkit.sample.guidance import Guide
from controlkit.sample.preview import clean_latents, prediction_of


def test_projected_guidance_is_the_published_one_on_clean_latents(toy_base, sd2_base):
    for base in (toy_base, sd2_base):  # noise and v
        guide = Guide(SamplingSettings(20, 9.0, guider="apg"), base.noise)
        buffer, generator = MomentumBuffer(-0.5), torch.Generator().manual_seed(0)
        for step in (800, 500, 200):
            read, uncond, cond = torch.randn(3, 2, 4, 8, 8, generator=generator)
            t = torch.tensor(step)
            ours = clean_latents(base.noise, read, guide(torch.cat([uncond, cond]), read, t), t)
            clean = [clean_latents(base.noise, read, one, t) for one in (cond, uncond)]
            longest = 15 / 256 * 256**0.5
            theirs = normalized_guidance(*clean, 8.0, buffer, 0.0, longest, use_original_formulation=True)
            assert relative(ours, theirs) < 1e-4


def test_predictions_of_clean_latents_are_the_way_back(toy_base, sd2_base):
    for base in (toy_base, sd2_base):
        x, prediction = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        t = torch.tensor(400)
        assert relative(prediction_of(base.noise, x, clean_latents(base.noise, x, prediction, t), t), prediction) < 1e-5


def latents_of(base, **settings):
    [picture] = pictures(generate(base, [Request(steps=2, **settings)]))
    return picture.latents


def test_guidance_of_one_is_none_with_either(toy_base):
    cfg, apg = (latents_of(toy_base, guidance=1.0, guider=guider) for guider in ("cfg", "apg"))
    assert torch.equal(cfg, apg)
    cfg, apg = (latents_of(toy_base, guidance=9.0, guider=guider) for guider in ("cfg", "apg"))
    assert relative(cfg, apg) > 0.01
