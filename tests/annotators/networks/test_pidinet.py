"""PiDiNet: the public network by its names, its convolutions of differences, and hints."""

import numpy as np
import pytest
import torch
from listed import drawn, listed, noise
from torch.nn import functional

from controlkit.annotators import annotator
from controlkit.annotators.networks import pidinet, weights
from controlkit.annotators.networks.pidinet import PiDiNet, plain_kernel
from controlkit.errors import Unsupported


def test_the_network_has_the_public_file_s_names_and_shapes():
    with torch.device("meta"):
        network = PiDiNet()
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == listed("table5_pidinet")


def neighbours(x):
    """The 25 pixels about each, (H, W, 25), of (H, W), zero beyond."""
    return functional.unfold(x[None, None], 5, padding=2)[0].T.view(*x.shape, 25)


def test_kernels_do_to_pixels_what_their_kind_does_to_differences():
    x, kernel = torch.randn(6, 7), torch.randn(1, 1, 3, 3)
    about, flat = neighbours(x), kernel.flatten()
    near = about[..., [6, 7, 8, 11, 12, 13, 16, 17, 18]]
    ring, middle = [0, 1, 2, 5, 8, 7, 6, 3], 12  # clockwise from the upper left, among the nine
    after = dict(zip(ring, ring[1:] + ring[:1], strict=True))
    expected = {
        "plain": (near * flat).sum(-1),
        "central": ((near - about[..., middle : middle + 1]) * flat).sum(-1),
        # Each weight by its pixel and the next one, clockwise.
        "angular": sum(flat[k] * (near[..., k] - near[..., after[k]]) for k in ring),
    }
    far = about[..., [0, 2, 4, 10, 14, 20, 22, 24]]
    expected["radial"] = ((far - near[..., [0, 1, 2, 3, 5, 6, 7, 8]]) * flat[1:]).sum(-1)
    for kind, wanted in expected.items():
        weight = plain_kernel(kernel, kind)
        made = functional.conv2d(x[None, None], weight, padding=weight.shape[-1] // 2)[0, 0]
        assert torch.allclose(made, wanted, atol=1e-5), kind


def test_the_public_file_is_read_and_makes_hints_of_bgr(weights_folder, monkeypatch):
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in drawn("table5_pidinet").items()}},
        weights_folder / pidinet.PUBLIC.name,
        weights_folder / pidinet.PUBLIC.name,
    )
    picture = noise(40, 48)
    [hint] = annotator("softedge_pidinet").make([picture])
    network = weights.network_of(PiDiNet, pidinet.PUBLIC.path())
    pixels = torch.from_numpy(picture[..., ::-1].copy()).permute(2, 0, 1)[None] / 255.0
    with torch.no_grad():
        expected = 255 * network(pixels).sigmoid()[0, 0].numpy()
    assert abs(hint[..., 1] - expected).max() <= 0.51 and hint.std() > 5
    [scribble] = annotator("scribble_pidinet").make([picture])
    assert set(np.unique(scribble)) <= {0, 255}
    assert set(np.unique(annotator("pidi_safe").make([picture])[0])) <= {0, 128, 255}


def test_without_the_file_the_row_says_how_to_get_it(weights_folder):
    assert "hf download lllyasviel/Annotators table5_pidinet.pth" in annotator("pidi").lacks()
    with pytest.raises(Unsupported, match="hf download"):
        annotator("pidi").make([noise(16, 16)])
