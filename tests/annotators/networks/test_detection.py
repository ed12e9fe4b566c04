"""RT-DETR: a tiny network of random weights beside the library's own way from picture to boxes of people."""

from dataclasses import replace

import numpy as np
import torch
import transformers
from listed import noise

from controlkit.annotators.networks import detection
from controlkit.annotators.networks.detection import RTDETR
from controlkit.annotators.networks.weights import PublicFile


def tiny_rtdetr():
    small = {"d_model": 32, "encoder_hidden_dim": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 30}
    small |= {"encoder_in_channels": [16, 16, 32], "decoder_in_channels": [32] * 3, "decoder_layers": 1}
    settings = detection._rtdetr((1, 1, 1, 1), **small, encoder_attention_heads=4, decoder_attention_heads=4)
    settings.backbone_config.hidden_sizes, settings.backbone_config.embedding_size = [8, 16, 16, 32], 8
    settings.backbone_config.layer_type = "basic"
    return settings


TINY = replace(RTDETR[-1], file=PublicFile("model.safetensors", "x/tiny-rtdetr"), settings=tiny_rtdetr)


def test_boxes_of_people_are_the_library_s_own(weights_folder, monkeypatch):
    from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil

    torch.manual_seed(4)
    network = transformers.RTDetrForObjectDetection(tiny_rtdetr()).eval()
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif "class_embed" in name:
            torch.nn.init.constant_(parameter, -4.0)
            parameter.data[0] = -0.44  # people: about half of them above the threshold
    network.save_pretrained(weights_folder / "tiny-rtdetr")
    monkeypatch.setattr(detection, "_SIDE", 160)
    picture, processor = noise(48, 80), RTDetrImageProcessorPil(size={"height": 160, "width": 160})
    with torch.no_grad():
        outputs = network(**processor(picture, return_tensors="pt"))
    [theirs] = processor.post_process_object_detection(outputs, threshold=0.3, target_sizes=[picture.shape[:2]])
    people = theirs["boxes"][theirs["labels"] == 0].numpy()
    found = detection.find_boxes(picture, "cpu", TINY)
    assert 3 < len(people) < 30 and len(found) == len(people)
    assert np.allclose(found, people, atol=0.1)
