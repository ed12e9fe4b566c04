"""The public referee on random weights of the right names and shapes."""

from functools import partial

import numpy as np
import pytest
import torch

from controlkit.annotators.networks.weights import PublicFile
from controlkit.errors import Invalid, NotFound
from controlkit.measure import Quality, public
from controlkit.measure.inception import Inception, as_clean_fid

PICTURES = [np.random.default_rng(i).integers(0, 256, (40, 56, 3), np.uint8) for i in range(3)]
SHAPES = {  # of a few of the public file's tensors
    "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
    "Conv2d_4a_3x3.bn.running_var": (192,),
    "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
    "Mixed_5d.branch_pool.conv.weight": (64, 288, 1, 1),
    "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
    "Mixed_6c.branch7x7dbl_2.conv.weight": (160, 160, 7, 1),
    "Mixed_6e.branch7x7_3.conv.weight": (192, 192, 7, 1),
    "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
    "Mixed_7b.branch3x3dbl_1.conv.weight": (448, 1280, 1, 1),
    "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
    "fc.weight": (1008, 2048),
}


@pytest.fixture(scope="module")
def inception():
    torch.manual_seed(0)
    return Inception().eval()


def test_inception_has_the_public_file_s_tensors(inception):
    state = {name: tuple(value.shape) for name, value in inception.state_dict().items()}
    counted = [name for name in state if not name.endswith("num_batches_tracked")]
    assert len(counted) == 94 * 5 + 2
    assert SHAPES.items() <= state.items()
    assert sum(np.prod(state[name]) for name in counted if "running" not in name) == 23_850_960


def test_inception_s_features_are_wide_and_tell_pictures_apart(inception):
    with torch.no_grad():
        found = inception(torch.cat([as_clean_fid(picture) for picture in PICTURES[:2]]))
    assert found.shape == (2, 2048) and (found[0] - found[1]).norm() > 0


def test_pictures_are_resized_in_floats_and_not_cut_off():
    step = np.zeros((64, 64, 3), np.uint8)
    step[:, 32:] = 255
    read = as_clean_fid(step)
    assert read.shape == (1, 3, 299, 299)
    assert read.max() > 127 / 128 and read.min() < -1, "bicubic goes beyond the ends at a step"
    assert torch.allclose(as_clean_fid(np.full((9, 9, 3), 128, np.uint8)), torch.zeros(1), atol=1e-5)


@pytest.fixture
def public_referee(weights_folder, monkeypatch, inception):
    """All its networks, the CLIPs narrow, on random weights; files as people have them."""
    import transformers

    for name in ("L14", "B16"):
        own = getattr(public, name)
        narrow = partial(public._settings, 12, 1, 1, 56)  # the head reads vectors of the released width
        monkeypatch.setattr(public, name, type(own)(own.file, own.kind, narrow))
        folder = weights_folder / own.file.repository.rpartition("/")[2]
        folder.mkdir()
        settings = narrow()
        settings.text_config.num_hidden_layers = 1
        monkeypatch.setattr(public, name, type(own)(own.file, own.kind, lambda settings=settings: settings))
        torch.manual_seed(len(name))
        network = transformers.CLIPModel(settings)
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, folder / "model.safetensors")
    torch.save(inception.state_dict(), weights_folder / public.INCEPTION.name)
    monkeypatch.setattr(public, "_INCEPTION_DIGEST", "")
    torch.save(public._Layered().state_dict(), weights_folder / public.AESTHETICS[0][0].name)
    return public.PublicReferee()


def test_the_referee_gives_every_figure_of_published_tables(public_referee):
    prompts = ["a cat", "a red house", "coffee"]
    figures = Quality(public_referee, PICTURES).figures(PICTURES, prompts)
    assert set(figures) == {"clip_score", "clip_score_b16", "aesthetic", "fid"}
    assert figures["fid"].mean == pytest.approx(0, abs=1e-6)
    assert (
        public_referee.embed(PICTURES).norm(dim=-1).allclose(torch.ones(3))
        and public_referee.embed_texts(prompts).shape[0] == 3
    )
    assert (
        abs(public_referee.clip_scores(PICTURES, prompts) - public_referee.clip_scores(PICTURES, prompts[::-1])).max()
        > 1e-4
    )


def test_without_files_the_referee_says_how_to_get_them(weights_folder):
    with pytest.raises(NotFound, match="hf download openai/clip-vit-large-patch14"):
        public.PublicReferee()
    with pytest.raises(NotFound, match="releases/download/fid_weights"):
        public._inception_path()


def test_another_inception_is_refused(weights_folder):
    (weights_folder / public.INCEPTION.name).write_bytes(b"another")
    with pytest.raises(Invalid, match="begins with 6726825d"):
        public._inception_path()


@pytest.mark.parametrize("clip", [public.L14, public.B16], ids=["L/14", "B/16"])
def test_the_clips_have_the_released_shapes(clip):
    import transformers

    with torch.device("meta"):
        network = transformers.CLIPModel(clip.settings())
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == {public.L14: 427_616_513, public.B16: 149_620_737}[clip]


def test_the_heads_are_found_by_the_names_they_were_published_under():
    assert all(isinstance(file, PublicFile) and file.name.endswith(".pth") for file, _ in public.AESTHETICS)
    assert public._linear().weight.shape == (1, 768)
    assert [tuple(value.shape) for value in public._Layered().state_dict().values()][::2] == [
        (1024, 768), (128, 1024), (64, 128), (16, 64), (1, 16),
    ]  # fmt: skip
