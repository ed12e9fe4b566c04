"""Bases whose denoiser reads more than latents, has new weights, or shows its features."""

import pytest
import torch

from conftest import draw_inputs
from controlkit.errors import Invalid


def test_further_inputs_change_nothing_at_first_and_the_base_never(toy_base):
    x, t, text, _ = draw_inputs(toy_base)
    wider = toy_base.reading_more(1)
    more = torch.cat([x, torch.randn(2, 1, 8, 8)], 1)
    with torch.no_grad():
        plain = toy_base.predict(x, t, text)
        assert torch.allclose(wider.predict(more, t, text), plain, atol=1e-6)
        wider.unet.conv_in.weight[:, -1] = 1.0
        assert not torch.allclose(wider.predict(more, t, text), plain, atol=1e-3)
        assert torch.equal(toy_base.predict(x, t, text), plain)
    assert not wider.inpaints and wider.latent_channels == toy_base.latent_channels
    assert wider.copy_encoder().conv_in.weight.shape == toy_base.unet.conv_in.weight.shape


def test_as_many_as_an_inpainting_base_reads_are_refused(toy_base):
    with pytest.raises(Invalid, match="inpainting"):
        toy_base.reading_more(toy_base.latent_channels + 1)


def test_new_weights_are_the_seeds_and_of_the_same_shape(toy_base):
    state = torch.random.get_rng_state()
    first, again, other = (toy_base.untrained(seed).denoiser.state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    own = toy_base.denoiser.state_dict()
    assert {key: value.shape for key, value in first.items()} == {key: value.shape for key, value in own.items()}
    assert all(torch.equal(first[key], again[key]) for key in own)
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])
    assert not torch.equal(first["conv_in.weight"], own["conv_in.weight"])
    wider = toy_base.reading_more(3).untrained(1)
    assert wider.unet.conv_in.weight[:, -3:].any()


def test_features_come_with_the_prediction_and_lead_gradients_back(toy_base):
    x, t, text, _ = draw_inputs(toy_base)
    x.requires_grad_(True)
    prediction, seen = toy_base.features(x, t, text)
    assert torch.equal(prediction, toy_base.predict(x, t, text))
    layers = sum(len(block.resnets) for block in toy_base.unet.up_blocks)
    assert len(seen) == len(toy_base.branch_taps) + layers
    for feature in seen:
        [slope] = torch.autograd.grad(feature.square().sum(), x, retain_graph=True)
        assert slope.any()
