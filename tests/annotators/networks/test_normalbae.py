"""Normals by Bae's network: the public one by its names, and hints."""

import numpy as np
import torch
from listed import listed, noise
from torch.nn import functional

from controlkit.annotators import annotator
from controlkit.annotators.networks import normalbae


def test_the_network_has_the_public_file_s_names_and_shapes():
    with torch.device("meta"):
        network = normalbae.NormalBAE()
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == listed("scannet")


def test_convolutions_are_padded_as_tensorflow_pads():
    for side, kernel, stride in ((8, 3, 2), (9, 3, 2), (8, 5, 2), (7, 5, 1)):
        conv = normalbae.SameConv(1, 1, kernel, stride, bias=False)
        x = torch.randn(1, 1, side, side + 4)
        made = conv(x)
        assert made.shape[2:] == (-(-side // stride), -(-(side + 4) // stride))
        # TensorFlow's: the first window begins half of what is lacking, rounded down, before the picture.
        lack = max((made.shape[2] - 1) * stride + kernel - side, 0)
        first = functional.pad(x, [kernel] * 4)[0, 0, kernel - lack // 2 :, kernel:][:kernel]
        across = max((made.shape[3] - 1) * stride + kernel - side - 4, 0)
        first = functional.pad(x, [kernel] * 4)[0, 0, kernel - lack // 2 :, kernel - across // 2 :][:kernel, :kernel]
        assert torch.allclose(made[0, 0, 0, 0], (first * conv.weight[0, 0]).sum(), atol=1e-6)


def test_normals_have_length_one_and_their_certainty_is_positive():
    x = torch.randn(2, 4, 5)
    made = normalbae._unit(x)
    assert torch.allclose(made[:, :3].norm(dim=1), torch.ones(2, 5)) and (made[:, 3] > 0).all()
    assert torch.allclose(made[:, :3] * x[:, :3].norm(dim=1, keepdim=True), x[:, :3], atol=1e-6)


def test_hints_are_the_normals_as_colours(weights_folder, monkeypatch):
    class Small(torch.nn.Module):
        """In the network's place: normals that are the picture's own values."""

        def forward(self, pictures):
            return torch.stack([pictures[:, 0] * 0 - 1, pictures[:, 0] * 0, pictures[:, 0] * 0 + 1], 1)

    (weights_folder / "scannet.pt").touch()
    monkeypatch.setattr(normalbae, "network_of", lambda make, path, device: Small())
    [hint] = annotator("normal_bae").make([noise(40, 50)])
    assert hint.shape == (40, 50, 3) and set(map(tuple, np.unique(hint.reshape(-1, 3), axis=0))) == {(0, 128, 255)}
