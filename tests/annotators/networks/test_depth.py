"""Depth by transformers' networks: tiny ones of random weights, beside the library's own way from picture to depth."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from listed import noise
from PIL import Image
from torch.nn import functional
from transformers import DepthAnythingForDepthEstimation, DPTForDepthEstimation
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

from controlkit.annotators import annotator
from controlkit.annotators.maps import normals_of
from controlkit.annotators.networks import depth, pretrained
from controlkit.annotators.networks.depth import (
    ANYTHING,
    ANYTHING_V2,
    MIDAS,
    ZOE,
    DepthModel,
    MetricModel,
    normals_of_depth,
)
from controlkit.annotators.networks.weights import PublicFile
from controlkit.errors import Invalid, Unsupported


def tiny_anything():
    return depth._anything(16, 2, 4, (1, 2, 3, 4), (8, 8, 8, 8), 8)


def tiny_dpt():
    from transformers import DPTConfig

    return DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=64,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of two tiny networks, as transformers saves them."""
    root = tmp_path_factory.mktemp("hub")
    for name, kind, settings in (
        ("Tiny-Anything", DepthAnythingForDepthEstimation, tiny_anything),
        ("tiny-dpt", DPTForDepthEstimation, tiny_dpt),
    ):
        torch.manual_seed(1)
        network = kind(settings())
        for part, parameter in network.named_parameters():
            torch.nn.init.normal_(parameter, mean=float("head" in part and "bias" in part), std=0.2)
        network.save_pretrained(root / name)
    return root


MODELS = {
    "Tiny-Anything": DepthModel(
        PublicFile("model.safetensors", "x/Tiny-Anything"), "DepthAnythingForDepthEstimation", tiny_anything,
        (56, 56), 14, True, depth.IMAGENET,
    ),
    "tiny-dpt": DepthModel(
        PublicFile("model.safetensors", "x/tiny-dpt"), "DPTForDepthEstimation", tiny_dpt,
        (64, 64), 32, False, depth._HALVES,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_depth_is_the_library_s_own(name, saved, monkeypatch):
    monkeypatch.setenv("CONTROLKIT_ANNOTATORS", str(saved))
    model, picture = MODELS[name], noise(50, 90)
    mean, spread = model.colours
    processor = DPTImageProcessorPil(
        size={"height": model.frame[0], "width": model.frame[1]}, keep_aspect_ratio=model.keeps_shape,
        ensure_multiple_of=model.multiple, image_mean=mean, image_std=spread,
    )  # fmt: skip
    kind = DepthAnythingForDepthEstimation if "Anything" in name else DPTForDepthEstimation
    network = kind.from_pretrained(saved / name).eval()
    with torch.no_grad():
        outputs = network(**processor(Image.fromarray(picture), return_tensors="pt"))
    [theirs] = processor.post_process_depth_estimation(outputs, [picture.shape[:2]])
    expected = theirs["predicted_depth"].numpy()
    expected = (expected - expected.min()) / np.ptp(expected)
    [ours] = depth.depth_of([picture], "cpu", model)
    assert np.std(expected) > 0.05 and abs(ours - expected).mean() < 0.01, "they differ in the curve of one resize"
    [hint] = depth.depth([model], [picture], "cpu")
    assert hint.shape == (50, 90, 3) and (hint.min(), hint.max()) == (0, 255)


@pytest.mark.parametrize("shape", [(1, 1), (1, 600), (600, 1), (16, 500)])
@pytest.mark.parametrize("name", MODELS)
def test_points_and_strips_have_hints_of_their_size(name, shape, saved, monkeypatch):
    monkeypatch.setenv("CONTROLKIT_ANNOTATORS", str(saved))
    for make in (depth.depth, depth.normal):
        [hint] = make([MODELS[name]], [noise(*shape)], "cpu")
        assert hint.shape == (*shape, 3) and hint.dtype == np.uint8


def test_pictures_are_read_in_the_sizes_that_the_library_reads_them_in():
    for model in (ANYTHING_V2[0], ANYTHING[0], MIDAS[0]):
        processor = DPTImageProcessorPil(
            size={"height": model.frame[0], "width": model.frame[1]}, keep_aspect_ratio=model.keeps_shape,
            ensure_multiple_of=model.multiple,
        )  # fmt: skip
        for height, width in ((512, 768), (300, 200), (518, 518), (1080, 720)):
            read = processor(Image.new("RGB", (width, height)), return_tensors="np")["pixel_values"].shape[2:]
            assert model.size(height, width) == read
    assert max(ANYTHING_V2[0].size(16_384, 100)) <= 4 * 518 + 14, "a strip"


def test_another_network_s_file_is_refused(saved, monkeypatch):
    monkeypatch.setenv("CONTROLKIT_ANNOTATORS", str(saved))
    tiny, anything = MODELS["tiny-dpt"], MODELS["Tiny-Anything"]
    for wrong in (replace(tiny, file=anything.file), replace(ANYTHING_V2[2], file=tiny.file)):
        with pytest.raises(Invalid, match="another network's file"):
            depth.depth_of([noise(32, 32)], "cpu", wrong)


def test_the_best_model_that_is_here_is_taken(weights_folder):
    assert pretrained.best(ANYTHING_V2) is ANYTHING_V2[-1]
    assert "depth-anything/Depth-Anything-V2-Small-hf model.safetensors" in annotator("depth_anything_v2").lacks()
    with pytest.raises(Unsupported, match="hf download"):
        annotator("depth_anything_v2").make([noise(8, 8)])
    (weights_folder / "Depth-Anything-V2-Base-hf").mkdir()
    (weights_folder / "Depth-Anything-V2-Base-hf" / "model.safetensors").touch()
    assert pretrained.best(ANYTHING_V2) is ANYTHING_V2[1] and not annotator("depth_anything_v2").lacks()
    (weights_folder / "model.safetensors").touch()
    assert pretrained.best(MIDAS) is MIDAS[-1], "a file of that name alone is anybody's"


def test_normals_of_the_depth_of_a_ball_point_away_from_its_middle():
    y, x = np.mgrid[-1:1:128j, -1:1:128j]
    inside = x**2 + y**2 < 0.8**2
    ball = np.where(inside, 0.5 + 0.5 * np.sqrt(np.clip(0.8**2 - x**2 - y**2, 0, None)), 0.0)
    normals = normals_of_depth(ball, 0.4)
    core = x**2 + y**2 < 0.6**2
    assert np.corrcoef(normals[core][:, 0], x[core])[0, 1] > 0.9, "right where the ball is right of its middle"
    assert np.corrcoef(normals[core][:, 1], -y[core])[0, 1] > 0.9, "up is up"
    assert np.allclose(normals[~inside], (0, 0, 1)) and np.allclose(np.linalg.norm(normals, axis=-1), 1)


def test_a_hint_of_normals_is_in_our_colours(saved, monkeypatch):
    monkeypatch.setenv("CONTROLKIT_ANNOTATORS", str(saved))
    model = MODELS["tiny-dpt"]
    [hint] = partial(depth.normal, [model])([noise(48, 64)], "cpu", background=0.0)
    [light] = depth.depth_of([noise(48, 64)], "cpu", model)
    assert abs(normals_of(hint) - normals_of_depth(light, 0.0)).max() < 0.02


def tiny_zoe():
    from transformers import BeitConfig

    settings, stages = depth._zoe(), [f"stage{number}" for number in (1, 2, 3, 4)]
    settings.backbone_config = BeitConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=64,
        use_relative_position_bias=True, reshape_hidden_states=False, out_features=stages,
    )  # fmt: skip
    settings.neck_hidden_sizes, settings.fusion_hidden_size, settings.bottleneck_features = [8] * 4, 8, 8
    return settings


def test_metres_are_the_library_s_own_and_near_is_light(weights_folder):
    from transformers import ZoeDepthForDepthEstimation
    from transformers.models.zoedepth.image_processing_pil_zoedepth import ZoeDepthImageProcessorPil

    torch.manual_seed(1)
    network, picture = ZoeDepthForDepthEstimation(tiny_zoe()).eval(), noise(50, 90)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter[0].numel() ** -0.5)
    network.save_pretrained(weights_folder / "zoedepth-tiny")
    model = MetricModel(
        PublicFile("model.safetensors", "x/zoedepth-tiny"), ZOE[0].kind, tiny_zoe, (64, 96), 32, True, depth._HALVES
    )
    processor = ZoeDepthImageProcessorPil(size={"height": 64, "width": 96}, ensure_multiple_of=32)
    inputs = processor(Image.fromarray(picture), return_tensors="pt")
    assert np.allclose(model.read(picture), inputs["pixel_values"], atol=1e-4)
    with torch.no_grad():
        outputs = network(**inputs)
    high, wide = (int((side / 2) ** 0.5 * 3) for side in (50, 90))  # the library's own step back lacks an import
    framed = functional.interpolate(outputs.predicted_depth[None], (50 + 2 * high, 90 + 2 * wide), mode="bicubic")
    metres = framed[0, 0, high:-high, wide:-wide].numpy()
    near, far = np.percentile(metres, (2, 85))
    expected = (1 - (metres - near) / (far - near)).clip(0, 1)
    [ours] = depth.depth_of([picture], "cpu", model)
    assert np.std(expected) > 0.05 and abs(ours - expected).mean() < 0.02
    for shape in ((1, 1), (1, 600), (600, 1)):
        [hint] = depth.depth([model], [noise(*shape)], "cpu")
        assert hint.shape == (*shape, 3)
