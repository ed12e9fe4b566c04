"""A stranger's captioner is data: its settings within ranges, its words, its weights; nothing else of it is read."""

import json
import shutil
import socket

import numpy as np
import pytest
from test_captions import blip_folder  # noqa: F401  # the fixture

from controlkit.data import load_captioner
from controlkit.errors import UserError
from limits import limited

PICTURES = [np.full((20, 20, 3), 40 * i, np.uint8) for i in range(3)]


@pytest.fixture
def changed(blip_folder, tmp_path):  # noqa: F811
    """``changed(file, **settings)`` is a copy of a BLIP with other settings; those of its parts are merged."""

    def copy(file="config.json", **settings):
        if not (tmp_path / "blip").is_dir():
            shutil.copytree(blip_folder, tmp_path / "blip")
        path = tmp_path / "blip" / file
        held = json.loads(path.read_text()) if path.is_file() else {}
        for key, value in settings.items():
            held[key] = held.get(key, {}) | value if isinstance(value, dict) else value
        path.write_text(json.dumps(held))
        return str(tmp_path / "blip")

    return copy


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("config.json", {"text_config": {"num_hidden_layers": 10**6}}),
        ("config.json", {"text_config": {"vocab_size": 10**10}}),
        ("config.json", {"vision_config": {"image_size": 10**6}}),
        ("config.json", {"vision_config": {"hidden_size": 16384, "num_hidden_layers": 64}}),
        ("config.json", {"vision_config": {"patch_size": 0}}),
        ("config.json", {"text_config": {"hidden_act": "owner/kernel"}}),
        ("config.json", {"text_config": {"layer_norm_eps": "many"}}),
        ("processor_config.json", {"image_processor": {"size": {"height": 10**6, "width": 10**6}}}),
        ("processor_config.json", {"image_processor": {"image_mean": [0.5] * 10_000}}),
        ("processor_config.json", {"image_processor": 7}),
        ("tokenizer.json", {"model": {"vocab": {"a": 10**9}}}),
        ("tokenizer.json", {"model": {"vocab": ["a"]}}),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_before_anything_is_made(changed, file, settings):
    with limited(), pytest.raises(UserError) as refused:
        load_captioner(changed(file, **settings))
    assert len(str(refused.value)) < 700 and "\n" not in str(refused.value)


def test_what_is_not_known_reaches_no_library(changed, blip_folder, monkeypatch, tmp_path):  # noqa: F811
    def connect(*arguments):
        raise AssertionError(f"asked {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    said = load_captioner(str(blip_folder))(PICTURES)
    code = {
        "AutoModel": "owner/code--m.M",
        "AutoProcessor": "owner/code--m.P",
        "AutoTokenizer": ["owner/code--m.T", None],
    }
    kernel = {"attn_implementation": "owner/kernel", "_attn_implementation": "owner/kernel"}
    folder = changed("config.json", quantization_config={"quant_method": "gptq"}, text_config=kernel, **kernel)
    changed("processor_config.json", auto_map=code, processor_class="Other")
    changed("tokenizer_config.json", auto_map=code, tokenizer_class="LlamaTokenizer", chat_template="{{ 1 / 0 }}")
    changed("adapter_config.json", base_model_name_or_path=str(tmp_path / "elsewhere"), peft_type="LORA")
    with limited():
        assert load_captioner(folder)(PICTURES) == said


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_link_out_of_the_folder_is_not_followed(changed, tmp_path, name):
    folder = changed()
    shutil.move(f"{folder}/{name}", tmp_path / "outside")
    (tmp_path / "blip" / name).symlink_to(tmp_path / "outside")
    with limited(), pytest.raises(UserError, match="leads out of its folder"):
        load_captioner(folder)
