"""Sketch guidance: the direction goes down the distance to the wanted edges, and its length is the step's."""

import torch

from controlkit.baselines.sketch import BETA, EdgePredictor


def test_each_place_is_read_by_itself():
    predictor = EdgePredictor(3, 4, 1000).eval()
    features = torch.randn(1, 3, 4, 4)
    other = features.clone()
    other[..., 2, 3] += 1
    t = torch.tensor([500])
    with torch.no_grad():
        changed = (predictor([features], t, (4, 4)) - predictor([other], t, (4, 4))).abs().sum((0, 1)) > 0
        assert predictor(
            [
                features,
            ],
            t,
            (8, 8),
        ).shape == (1, 4, 8, 8)
    assert changed.nonzero().tolist() == [[2, 3]]


def test_moving_against_the_direction_brings_the_edges_nearer(toy_base, fresh, material_for):
    baseline, material = fresh("sketch-guided"), material_for("canny")
    batch = material.drawn(0)
    t = torch.tensor([600, 900])
    z = toy_base.noise.add(batch.latents, batch.noise, t)
    wanted = baseline.wanted(batch.hints[""])

    def distances(z):
        with torch.no_grad():
            return (baseline.edges(z, t, batch.text) - wanted).square().mean((1, 2, 3))

    stride = 0.05 * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    direction = baseline.move(z, t, batch.text, wanted, stride)
    assert torch.allclose(direction.flatten(1).norm(dim=1), stride.flatten(1).norm(dim=1))
    assert (distances(z - direction) < distances(z)).all()
    assert (distances(z + direction) > distances(z)).all()


def test_it_leads_in_the_first_half_by_the_controls_scale(toy_base, fresh, requests_of, monkeypatch):
    baseline, seen = fresh("sketch-guided"), []
    move = baseline.move
    monkeypatch.setattr(baseline, "move", lambda read, t, *rest: seen.append(float(t[0])) or move(read, t, *rest))
    baseline.make(requests_of("canny", steps=4))
    assert len(seen) == 2 and min(seen) > toy_base.noise.count / 2
    seen.clear()
    baseline.make([one.model_copy(update={"controls": ()}) for one in requests_of("canny", steps=4)])
    assert not seen
    assert BETA == 1.6


def test_scale_two_moves_twice_as_far(fresh, requests_of):
    baseline = fresh("sketch-guided")
    still, once, twice = (
        baseline.make(requests_of("canny", steps=1, scale=scale))[0].latents for scale in (0.0, 1.0, 2.0)
    )
    assert torch.allclose(twice - still, 2 * (once - still), atol=1e-4)
    assert (once - still).norm() > 0
