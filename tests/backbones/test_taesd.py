"""TAESD beside diffusers' own class, at full size, from each of its files."""

import json

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from controlkit.backbones.taesd import load_taesd
from controlkit.errors import Invalid, Mismatch, NotFound, Unsupported
from controlkit.sample import Request, Step, generate


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(diffusers' model with drawn weights, its folder)."""
    torch.manual_seed(0)
    model = AutoencoderTiny().eval()
    model.save_pretrained(folder := tmp_path_factory.mktemp("taesd"))
    return model, folder


@pytest.fixture
def latents(sd2_base):
    return torch.randn(2, *sd2_base.latent_shape((64, 96)), generator=torch.Generator().manual_seed(1))


def test_it_decodes_as_diffusers_does_from_a_folder_a_file_and_the_original_s_names(tiny, sd2_base, latents, tmp_path):
    model, folder = tiny
    file = folder / "diffusion_pytorch_model.safetensors"
    own = {name: one for name, one in load_file(file).items() if name.startswith("decoder.layers.")}
    shifted = {}  # the original has a clamp as its first layer
    for name, one in own.items():
        _, _, number, rest = name.split(".", 3)
        shifted[f"{int(number) + 1}.{rest}"] = one
    save_file(shifted, tmp_path / "taesd_decoder.safetensors")
    torch.save(shifted, tmp_path / "taesd_decoder.pth")
    with torch.no_grad():
        expected = model.decode(latents).sample
    assert expected.shape == (2, 3, 64, 96)
    for path in (folder, file, tmp_path / "taesd_decoder.safetensors", tmp_path / "taesd_decoder.pth"):
        assert torch.equal(load_taesd(path, sd2_base)(latents), expected), path


def test_steps_are_shown_at_full_size(tiny, sd2_base):
    records = generate(
        sd2_base, [Request(prompt="x", steps=2, size=(64, 128))], previewer=load_taesd(tiny[1], sd2_base)
    )
    shown = [record.preview()[0].shape for record in records if isinstance(record, Step)]
    assert shown == [(64, 128, 3)] * 2


def test_what_is_no_taesd_for_this_base_is_refused(tiny, sd2_base, toy_base, tmp_path):
    _, folder = tiny
    with pytest.raises(Mismatch, match="4 channels, each 8 pixels wide"):
        load_taesd(folder, toy_base)
    with pytest.raises(NotFound):
        load_taesd(tmp_path / "none", sd2_base)
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    for changes in ({"act_fn": "silu"}, {"scaling_factor": 0.18}, {"_class_name": "AutoencoderKL"}):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
        with pytest.raises(Unsupported, match=next(iter(changes))):
            load_taesd(tmp_path, sd2_base)
    (tmp_path / "config.json").unlink()
    del tensors["decoder.layers.3.conv.2.weight"]
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(Invalid, match=r"lacks layers\.3\.conv\.2\.weight"):
        load_taesd(tmp_path, sd2_base)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(Mismatch):
        load_taesd(tmp_path / "x.safetensors", sd2_base)
