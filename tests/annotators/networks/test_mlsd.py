"""M-LSD: the public network by its names, and lines read off its maps."""

import numpy as np
import torch
from listed import drawn, listed, noise

from controlkit.annotators import annotator
from controlkit.annotators.networks import mlsd, running


def logit(share):
    return np.log(share / (1 - share))


def maps(*lines, size=(40, 60)):
    """Maps of lines (score, x, y, then ends relative to that)."""
    made = np.zeros((5, *size), np.float32)
    made[0] = -20
    for score, x, y, *ends in lines:
        made[0, y, x], made[1:, y, x] = logit(score), ends
    return made


def test_the_network_has_the_public_file_s_names_and_shapes():
    with torch.device("meta"):
        network = mlsd.MLSD()
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == listed("mlsd_large_512_fp32")


def test_the_maps_of_lines_are_the_eighth_to_the_twelfth():
    network, whole = mlsd.MLSD().eval(), []
    network.block23.register_forward_hook(lambda module, given, made: whole.append(made))
    with torch.no_grad():
        made = network(torch.randn(1, 4, 32, 32))
    assert made.shape == (1, 5, 16, 16) and torch.equal(made, whole[0][:, 7:12])


def test_lines_are_peaks_of_the_first_map_with_ends_about_them():
    made = maps(
        (0.9, 30, 20, -10, -5, 10, 5), (0.8, 31, 20, 1, 1, 2, 2), (0.5, 5, 5, 0, 0, 0.05, 0), (0.05, 50, 30, 0, 0, 9, 9)
    )
    assert np.allclose(mlsd.segments(made, 0.1, 0.1), [(20, 15, 40, 25)]), "not beside a surer one, short, or unsure"
    assert len(mlsd.segments(made, 0.01, 0.01)) == 3
    assert len(mlsd.segments(maps(size=(4, 4)), 0.1, 0.1)) == 0


def test_lines_are_drawn_at_the_picture_s_size(weights_folder, monkeypatch):
    torch.save(drawn("mlsd_large_512_fp32"), weights_folder / mlsd.PUBLIC.name)
    seen = []

    def forward(self, pixels):
        seen.append(pixels)
        return torch.from_numpy(maps((0.9, 20, 10, -15, 0, 15, 0), size=(24, 48)))[None]

    monkeypatch.setattr(mlsd.MLSD, "forward", forward)
    [hint] = annotator("mlsd_large").make([noise(46, 90)])
    y, x = np.nonzero(hint[..., 0])
    assert hint.shape == (46, 90, 3) and set(y) == {20} and (x.min(), x.max()) == (10, 70)
    assert seen[0].shape == (1, 4, 48, 96) and torch.allclose(seen[0][:, 3], torch.tensor(1 / 127.5 - 1))


def test_lines_of_a_picture_that_is_read_smaller_are_as_long_as_there(weights_folder, monkeypatch):
    """Their ends are told in pixels of what was read."""
    torch.save(drawn("mlsd_large_512_fp32"), weights_folder / mlsd.PUBLIC.name)
    monkeypatch.setattr(running, "MOST_PIXELS", 48 * 96)
    made = torch.from_numpy(maps((0.9, 20, 10, -15, 0, 15, 0), size=(24, 48)))[None]
    monkeypatch.setattr(mlsd.MLSD, "forward", lambda self, pixels: made)
    [hint] = annotator("mlsd_large").make([noise(144, 288)])
    y, x = np.nonzero(hint[..., 0])
    assert hint.shape == (144, 288, 3) and set(y) == {60} and (x.min(), x.max()) == (30, 210)


def test_a_public_file_makes_hints_and_counters_of_norms_may_be_absent(weights_folder):
    tensors = {k: v for k, v in drawn("mlsd_large_512_fp32").items() if not k.endswith("num_batches_tracked")}
    torch.save(tensors, weights_folder / mlsd.PUBLIC.name)
    [hint] = annotator("mlsd_large").make([noise(64, 64)], {"score": 0.01})
    assert hint.shape == (64, 64, 3) and set(np.unique(hint)) <= {0, 255}


def test_the_two_thresholds_of_a1111_are_its_score_and_distance():
    assert annotator("mlsd_large").of_thresholds(0.3, -1) == {"score": 0.3, "distance": 0.1}
