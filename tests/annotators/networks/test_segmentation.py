"""Segmentation by transformers' networks: tiny ones of random weights, beside the library's own way to labels."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from listed import noise
from safetensors.torch import load_file, save_file
from torch.nn import functional

from controlkit.annotators import annotator, maps
from controlkit.annotators.networks import segmentation
from controlkit.annotators.networks.segmentation import ADE20K, ONEFORMER, UPERNET
from controlkit.annotators.networks.weights import PublicFile
from controlkit.backbones.unet_families import clip_tokenizer
from controlkit.errors import Invalid


def tiny_oneformer():
    settings = segmentation._oneformer(32, (1, 1, 1, 1), 4, 6)
    small = {"hidden_dim": 32, "mask_dim": 32, "conv_dim": 32, "encoder_layers": 1, "decoder_layers": 2}
    small |= {"text_encoder_width": 32, "text_encoder_num_layers": 1, "dim_feedforward": 32, "num_attention_heads": 4}
    for name, value in (small | {"encoder_feedforward_dim": 32, "text_encoder_vocab_size": 64}).items():
        setattr(settings, name, value)
    return settings


def tiny_upernet():
    settings = segmentation._upernet(8, (1, 1, 1, 1))
    settings.hidden_size = 16
    return settings


TINY = {
    "tiny-oneformer": replace(ONEFORMER[-1], settings=tiny_oneformer, shorter=64, longer=256),
    "tiny-upernet": replace(UPERNET[-1], settings=tiny_upernet, shorter=64, longer=256),
}
TINY = {name: replace(model, file=PublicFile("model.safetensors", f"x/{name}")) for name, model in TINY.items()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """``hub(name)``: a tiny network of random weights, saved where it is looked for."""
    monkeypatch.setenv("CONTROLKIT_ANNOTATORS", str(tmp_path))

    def put(name):
        if "oneformer" in name:
            pytest.importorskip("scipy")
        torch.manual_seed(3)
        model = TINY[name]
        network = getattr(transformers, model.kind)(model.settings()).eval()
        for parameter in network.parameters():  # large enough that what is seen decides, not the biases
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=3 * parameter[0].numel() ** -0.5)
        network.save_pretrained(tmp_path / name)
        return network

    return put


@pytest.mark.parametrize("name", TINY)
def test_labels_are_the_library_s_own(name, hub):
    network, picture = hub(name), noise(64, 96)
    mean, spread = (torch.tensor(one).reshape(1, 3, 1, 1) for one in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (torch.from_numpy(picture).permute(2, 0, 1)[None] / 255 - mean) / spread
    with torch.no_grad():
        if "oneformer" in name:
            from transformers.models.oneformer.image_processing_pil_oneformer import OneFormerImageProcessorPil

            tokens = clip_tokenizer()("the task is semantic")["input_ids"]
            tasks = functional.pad(torch.tensor([tokens]), (0, 77 - len(tokens)))
            outputs = network(pixel_values=pixels, task_inputs=tasks)
            own = OneFormerImageProcessorPil.post_process_semantic_segmentation
            [expected] = own(None, outputs, [(64, 96)])
        else:
            logits = functional.interpolate(network(pixel_values=pixels).logits, (64, 96), mode="bilinear")
            expected = logits.argmax(1)[0]
    ours = segmentation.labels_of(picture, "cpu", TINY[name])
    assert (ours == expected.numpy()).mean() > 0.99 and len(np.unique(ours)) > 2
    [hint] = segmentation.segmentation([TINY[name]], [picture], "cpu")
    assert np.array_equal(hint, ADE20K[ours])


@pytest.mark.parametrize("shape", [(1, 1), (1, 600), (600, 1), (16, 500)])
@pytest.mark.parametrize("name", TINY)
def test_points_and_strips_have_hints_of_their_size(name, shape, hub):
    hub(name)
    [hint] = segmentation.segmentation([TINY[name]], [noise(*shape)], "cpu")
    assert hint.shape == (*shape, 3) and hint.dtype == np.uint8


def test_a_file_without_the_norm_that_nothing_reads_is_whole(hub, tmp_path):
    """As the public ones of OneFormer are; without any other tensor it is not."""
    hub("tiny-oneformer")
    path, model = tmp_path / "tiny-oneformer" / "model.safetensors", TINY["tiny-oneformer"]
    tensors = load_file(path)
    expected = segmentation.labels_of(noise(64, 64), "cpu", model)
    unread = [name for name in tensors if ".swin.layernorm." in name]
    assert len(unread) == 2
    save_file({name: tensor for name, tensor in tensors.items() if name not in unread}, path)
    assert np.array_equal(segmentation.labels_of(noise(64, 64), "cpu", model), expected)
    lost = next(name for name in tensors if "hidden_states_norms" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name not in (*unread, lost)}, path)
    with pytest.raises(Invalid, match=f"lacks {re.escape(lost)}"):
        segmentation.labels_of(noise(64, 64), "cpu", model)


def test_the_task_s_tokens_are_clip_s():
    assert tuple(clip_tokenizer()("the task is semantic")["input_ids"]) == segmentation._TASK


def test_pictures_are_read_at_the_shorter_side_unless_the_longer_one_is_too_long():
    assert ONEFORMER[-1].size(480, 640) == (512, 683) and ONEFORMER[-1].size(100, 1000) == (205, 2048)
    assert ONEFORMER[0].size(1080, 1920) == (640, 1138)


def test_the_largest_score_is_found_as_of_all_at_once():
    scores = torch.randn(7, 5, 6)
    expected = functional.interpolate(scores[None], (40, 55), mode="bilinear").argmax(1)[0].numpy()
    assert (segmentation.largest(scores.numpy(), (40, 55)) == expected).mean() > 0.999


def test_the_palette_is_ade20k_s():
    assert [tuple(map(int, ADE20K[k])) for k in (0, 2, 4, 12, 149)] == [
        (120, 120, 120),  # wall
        (6, 230, 230),  # sky
        (4, 200, 3),  # tree
        (150, 5, 61),  # person
        (92, 0, 255),  # flag
    ]
    assert len(np.unique(ADE20K, axis=0)) == 149, "two classes share a grey"
    labels = np.arange(48)[None]
    assert np.array_equal(maps.labels_of(maps.label_picture(labels, ADE20K), ADE20K), labels)


def test_without_files_rows_say_how_to_get_them(weights_folder):
    assert "hf download shi-labs/oneformer_ade20k_swin_tiny model.safetensors" in annotator("seg_ofade20k").lack()
    (weights_folder / "upernet-convnext-tiny").mkdir()
    (weights_folder / "upernet-convnext-tiny" / "pytorch_model.bin").touch()
    assert not annotator("upernet_ade20k").lacks(), "by its other name"
