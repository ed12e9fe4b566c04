"""Line art by networks: the public ones by their names, and hints."""

import numpy as np
import pytest
import torch
from listed import drawn, listed, noise
from torch.nn import functional

from controlkit.annotators import annotator
from controlkit.annotators.networks.drawing import AnimeLineart, Lineart


@pytest.mark.parametrize(("make", "file"), [(Lineart, "sk_model"), (AnimeLineart, "netG")])
def test_networks_have_the_public_files_names_and_shapes(make, file):
    with torch.device("meta"):
        network = make()
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == listed(file)


def lineart(x, weights):
    """The network of informative drawings, written down again."""

    def conv(x, name, pad=0, **how):
        padded = functional.pad(x, [pad] * 4, "reflect") if pad else x
        return functional.conv2d(padded, weights[f"{name}.weight"], weights[f"{name}.bias"], **how)

    def up(x, name):
        given = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return functional.instance_norm(
            functional.conv_transpose2d(x, *given, stride=2, padding=1, output_padding=1)
        ).relu()

    norm = functional.instance_norm
    x = norm(conv(x, "model0.1", 3)).relu()
    x = norm(conv(x, "model1.0", stride=2, padding=1)).relu()
    x = norm(conv(x, "model1.3", stride=2, padding=1)).relu()
    for number in range(3):
        name = f"model2.{number}.conv_block"
        x = x + norm(conv(norm(conv(x, f"{name}.1", 1)).relu(), f"{name}.5", 1))
    return conv(up(up(x, "model3.0"), "model3.3"), "model4.1", 3).sigmoid()


def test_fine_and_coarse_lines_are_their_files_light_on_black(weights_folder):
    picture = noise(32, 40)
    for seed, (name, file) in enumerate((("lineart_realistic", "sk_model.pth"), ("lineart_coarse", "sk_model2.pth"))):
        tensors = drawn("sk_model", seed)
        torch.save(tensors, weights_folder / file)
        [hint] = annotator(name).make([picture])
        light = lineart(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255.0, tensors)[0, 0].numpy()
        assert abs(hint[..., 0] - (255 - 255 * light)).max() <= 0.51 and hint.std() > 5


@pytest.mark.slow
def test_anime_lines_are_made_of_a_u_net_of_eight_levels(weights_folder):
    tensors = drawn("netG")
    torch.save({f"module.{name}": tensor for name, tensor in tensors.items()}, weights_folder / "netG.pth")
    picture = noise(200, 256)
    [hint] = annotator("lineart_anime").make([picture])
    padded = np.concatenate([picture, picture[-1:].repeat(56, 0)])
    x, skips = torch.from_numpy(padded).permute(2, 0, 1)[None] / 127.5 - 1, []
    names = ["model.model." + "1.model." * (level > 0) + "3.model." * (level - 1) for level in range(8)]
    for level, name in enumerate(names):
        conv = f"{name}{1 if level else 0}"
        x = functional.leaky_relu(x, 0.2) if level else x
        skips.append(x)  # activated: the original's leaky ReLU works in place
        x = functional.conv2d(x, tensors[f"{conv}.weight"], tensors[f"{conv}.bias"], stride=2, padding=1)
        x = functional.instance_norm(x) if 0 < level < 7 else x
    for level, name in reversed(list(enumerate(names))):
        conv = f"{name}{3 if level in (0, 7) else 5}"
        given = tensors[f"{conv}.weight"], tensors[f"{conv}.bias"]
        x = functional.conv_transpose2d(x.relu(), *given, stride=2, padding=1)
        x = torch.cat([skips[level], functional.instance_norm(x)], 1) if level else x.tanh()
    expected = 127.5 - 127.5 * x[0, 0, :200].numpy()
    assert abs(hint[..., 0] - expected).max() <= 0.51 and hint.std() > 5
