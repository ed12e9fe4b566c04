"""The VQGAN and its transformer: codes, gradients past them, one token after the other."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from controlkit.baselines.taming import ADVERSARIAL, CODE, CODES, DEAD, KEPT, STRIDE, _quarter


@pytest.fixture(scope="module")
def taming(fresh):
    return fresh("taming")


def pixels_of(material):
    return material.pictures(0)


def test_a_picture_becomes_codes_and_codes_a_picture(taming, material_for, toy_base):
    pixels = pixels_of(material_for("seg"))
    tokens = taming.tokens(pixels)
    side = toy_base.size // STRIDE
    assert tokens.shape == (2, side * side) and 0 <= int(tokens.min()) <= int(tokens.max()) < CODES
    whole = taming.vq(pixels).sample.detach().clamp(-1, 1)
    assert torch.allclose(taming.picture(tokens, (toy_base.size, toy_base.size)), whole, atol=1e-4)
    # Each code lies at its own place: a change in one corner leaves the codes of the other as they were.
    with torch.no_grad():
        codes = taming.vq.quantize.get_codebook_entry(
            tokens.flatten(), (2, side, side, taming.vq.config.latent_channels)
        )
    assert torch.equal(codes[:, :, 0, 1], taming.vq.quantize.embedding(tokens[:, 1]))


def test_codes_that_nothing_is_near_are_drawn_anew(fresh):
    made, rng = fresh("taming"), torch.Generator().manual_seed(0)
    latents = torch.randn(2, CODE, 4, 4, generator=rng)
    rows = latents.movedim(1, -1).flatten(0, -2)
    made.revive(latents, rng)
    codes, used = made.vq.quantize.embedding.weight.detach(), made.vq.used
    drawn = (codes[:, None] == rows).all(-1).any(1)
    assert torch.equal(used, torch.ones(CODES)) and CODES - len(rows) <= int(drawn.sum()) < CODES
    codes.copy_(torch.randn(codes.shape, generator=rng))
    before = codes.clone()
    used[3] = DEAD
    alone = codes[7].view(1, CODE, 1, 1)
    made.revive(alone, rng)
    assert torch.equal(codes[3], before[7])
    codes[3] = before[3]
    assert torch.equal(codes, before), "those in use stay"
    assert used[3] == used[7] == 1 and torch.allclose(used[8], torch.tensor(KEPT))


def test_codes_are_drawn_anew_in_training_alone(fresh, material_for):
    made = fresh("taming")
    before = made.vq.quantize.embedding.weight.detach().clone()
    made.loss(material_for("seg"), 0, "autoencoder")
    assert torch.equal(made.vq.quantize.embedding.weight, before) and not made.vq.used.any()
    made.begin("autoencoder")
    made.loss(material_for("seg"), 0, "autoencoder")
    assert not torch.equal(made.vq.quantize.embedding.weight, before) and made.vq.used.all()


def test_gradients_pass_straight_through_the_codebook(taming):
    z = torch.randn(1, 64, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    quantised, _, _ = taming.vq.quantize(z)
    weights = torch.randn(quantised.shape, generator=torch.Generator().manual_seed(1))
    [slope] = torch.autograd.grad((weights * quantised).sum(), z)
    assert torch.allclose(slope, weights)
    assert not torch.allclose(quantised, z)


def test_a_tokens_scores_depend_on_those_before_it_and_on_the_labels_alone(taming, material_for):
    hints = material_for("seg").drawn(0).hints[""]
    tokens = taming.tokens(pixels_of(material_for("seg")))
    later = tokens.clone()
    later[:, 5] = (later[:, 5] + 1) % CODES
    with torch.no_grad():
        before, after = taming.logits(hints, tokens), taming.logits(hints, later)
        other = taming.logits(hints.flip(0), tokens)
    assert before.shape == (2, tokens.shape[1] + 1, CODES)
    assert torch.allclose(before[:, :6], after[:, :6], atol=1e-5)
    assert not torch.allclose(before[:, 6:], after[:, 6:], atol=1e-5)
    assert not torch.allclose(before[:, 0], other[:, 0], atol=1e-5)


def test_tokens_drawn_one_by_one_are_those_that_the_scores_ask_for(taming, material_for, monkeypatch):
    """With one token to choose from, writing is the argmax of the whole sequence's scores."""
    monkeypatch.setattr("controlkit.baselines.taming.TOP", 1)
    hints = material_for("seg").drawn(0).hints[""]
    tokens = taming.written(hints, [0, 1])
    with torch.no_grad():
        scores = taming.logits(hints, tokens[:, :-1])
    assert torch.equal(scores.argmax(-1), tokens)


def test_tokens_are_drawn_by_each_rows_own_seed(taming, material_for):
    hints = material_for("seg").drawn(0).hints[""]
    both = taming.written(hints, [3, 4])
    assert torch.equal(taming.written(hints[1:], [4])[0], both[1])
    assert not torch.equal(taming.written(hints, [5, 6]), both)


def test_the_transformer_learns_from_every_label_map(taming, material_for):
    """Nothing guides it, so it has no half without the hint to learn."""
    losses = [
        float(taming.loss(replace(material_for("seg"), hint_dropout=share), 0, "transformer").detach())
        for share in (0.0, 1.0)
    ]
    assert losses[0] == losses[1]


def test_the_critic_learns_from_its_own_loss_alone(fresh, material_for):
    """The picture's maker gets the critic's opinion, whose gradient does not reach the critic."""
    taming = fresh("taming")
    taming.begin("vqgan")
    pixels = pixels_of(material_for("seg"))
    loss = taming.reconstruction(pixels, True, torch.Generator().manual_seed(0))
    loss.backward()
    found = {name: value.grad.clone() for name, value in taming.gan["critic"].named_parameters()}
    taming.zero_grad()
    made = taming.vq(pixels).sample.detach()
    critic = taming.gan["critic"]
    hinge = 0.5 * (torch.relu(1 - critic(pixels)).mean() + torch.relu(1 + critic(made)).mean())
    hinge.backward()
    for name, value in critic.named_parameters():
        assert torch.allclose(found[name], value.grad, atol=1e-6)


def test_the_critic_moves_the_last_layer_by_a_tenth_of_what_the_error_does(fresh, material_for):
    """More spoils the autoencoder, as there is no LPIPS in the error."""
    taming = fresh("taming")
    taming.begin("vqgan")
    pixels, last = pixels_of(material_for("seg")), taming.vq.decoder.conv_out.weight
    plain, judged = (
        torch.autograd.grad(taming.reconstruction(pixels, one, torch.Generator().manual_seed(0)), last)[0]
        for one in (False, True)
    )
    assert float((judged - plain).norm() / plain.norm()) == pytest.approx(ADVERSARIAL, rel=1e-3)
    assert ADVERSARIAL == 0.1


def test_quarters_are_parts_of_the_picture_drawn_by_step():
    pixels = torch.arange(8 * 6.0).view(1, 1, 8, 6)
    seen = [_quarter(pixels, 0, step) for step in range(40)]
    places = {divmod(int(part[0, 0, 0, 0]), 6) for part in seen}
    for part, (top, left) in zip(seen, [divmod(int(part[0, 0, 0, 0]), 6) for part in seen], strict=True):
        assert torch.equal(part, pixels[..., top : top + 4, left : left + 3])
    assert {top for top, _ in places} == set(range(5)) and {left for _, left in places} == set(range(4))
    assert torch.equal(seen[3], _quarter(pixels, 0, 3))


def test_it_makes_pictures_by_seed_and_label_map(taming, requests_of, toy_base):
    asked = requests_of("seg")
    made = taming.make(asked)
    assert [one.request for one in made] == asked and made[0].latents is None
    assert made[0].pixels.shape == (toy_base.size, toy_base.size, 3)
    again = taming.make(asked[:1])
    assert np.abs(again[0].pixels.astype(int) - made[0].pixels).max() <= 1
