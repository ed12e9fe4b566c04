"""Weights as people have them: in shards, wrapped, with harmless things beside them; and what is no weights, named."""

import argparse
import json
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from controlkit.errors import Invalid, UserError
from controlkit.tensors import open_tensors

STATE = {"conv_in.weight": torch.arange(8.0).reshape(2, 4), "mid_block.resnets.0.norm1.bias": torch.ones(3)}


def same(path, names=None):
    header = open_tensors(path)
    expected = {name: tensor for name, tensor in STATE.items() if names is None or name in names}
    read = header.read(names)
    return read.keys() == expected.keys() and all(torch.equal(read[name], value) for name, value in expected.items())


# --- shards -------------------------------------------------------------------------------------------------------


def write_shards(folder, ending="safetensors", prefix=""):
    """STATE in two files, and the index that lists them."""
    save = save_file if ending == "safetensors" else torch.save
    stem = "diffusion_pytorch_model" if ending == "safetensors" else "pytorch_model"
    homes = {}
    for i, (name, tensor) in enumerate(STATE.items(), 1):
        homes[prefix + name] = f"{stem}-0000{i}-of-00002.{ending}"
        save({prefix + name: tensor}, folder / homes[prefix + name])
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 44}, "weight_map": homes}))
    return index


@pytest.mark.parametrize(("ending", "prefix"), [("safetensors", ""), ("bin", ""), ("safetensors", "module.")])
def test_shards_are_read_as_the_one_file_they_are(tmp_path, ending, prefix):
    index = write_shards(tmp_path, ending, prefix)
    assert open_tensors(index).shapes == {name: tuple(tensor.shape) for name, tensor in STATE.items()}
    assert same(index) and same(index, ["conv_in.weight"])


INDICES = {
    "a shard that is not there": ({"a": "diffusion_pytorch_model-00003-of-00002.safetensors"}, "is not there: get all"),
    "a file elsewhere": ({"a": "../../etc/passwd.bin"}, "no files of weights beside it"),
    "itself": ({"a": "index.json"}, "no files of weights beside it"),
    "no names of files": ({"a": 3}, "no files of weights beside it"),
    "a tensor that its shard lacks": (
        {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"},
        "00001-of-00002.safetensors lacks a",
    ),
    "nothing": ({}, "is a text of JSON and no weights"),
    "a list": (["a"], "is a text of JSON and no weights"),
}


@pytest.mark.parametrize(("homes", "words"), INDICES.values(), ids=INDICES)
def test_an_index_that_lists_what_is_no_shard_is_refused(tmp_path, homes, words):
    write_shards(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({"weight_map": homes}))
    with pytest.raises(UserError, match=words):
        open_tensors(tmp_path / "index.json")


def test_a_shard_that_is_an_index_itself_is_refused(tmp_path):
    (tmp_path / "a.safetensors").write_text('{"weight_map": {"x": "a.safetensors"}}')
    with pytest.raises(UserError):
        open_tensors(tmp_path / "a.safetensors")


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "controlnet.", "module._orig_mod."])
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_what_all_names_begin_with_is_looked_behind(tmp_path, prefix, ending):
    save, path = (save_file if ending == "safetensors" else torch.save), tmp_path / f"control.{ending}"
    save({prefix + name: tensor for name, tensor in STATE.items()}, path)
    assert same(path) and same(path, ["conv_in.weight"])


@pytest.mark.parametrize(
    "held",
    ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod._checkpoint_wrapped_module."],
)
@pytest.mark.parametrize("also", ["", "_fsdp_wrapped_module.", "module."])
def test_blocks_that_were_held_one_by_one_have_their_plain_names(held, also, tmp_path):
    named = {also + name.replace("resnets.0.", f"resnets.0.{held}"): tensor for name, tensor in STATE.items()}
    save_file(named, tmp_path / "control.safetensors")
    assert same(tmp_path / "control.safetensors")


def test_a_beginning_that_some_names_lack_is_a_part_of_them(tmp_path):
    save_file({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "a.safetensors")
    assert set(open_tensors(tmp_path / "a.safetensors").shapes) == {"module.a", "b"}


WRAPS = {
    "model": lambda state: {"model": state, "step": 3},
    "module, as DeepSpeed": lambda state: {"module": state, "dp_world_size": 2, "ema": {"x": torch.ones(1)}},
    "state_dict": lambda state: {"state_dict": state, "optimizer": {"exp_avg": torch.ones(1)}},
    "controlnet": lambda state: {"controlnet": OrderedDict(state), "unet_lora": {"up": torch.ones(1)}},
    "one in another": lambda state: {"model": {"module": {"state_dict": state}}},
    "names and a wrapper": lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_pickle_s_wrappers_are_looked_behind(tmp_path, wrap):
    torch.save(wrap(STATE), tmp_path / "control.pth")
    assert same(tmp_path / "control.pth")


def test_a_pickle_of_parts_names_their_tensors_by_the_part(tmp_path):
    parts = {"image_proj": {"proj.weight": torch.ones(2)}, "ip_adapter": {"1.to_k_ip.weight": torch.ones(3)}}
    torch.save(parts, tmp_path / "adapter.bin")
    assert open_tensors(tmp_path / "adapter.bin").shapes == {
        "image_proj.proj.weight": (2,),
        "ip_adapter.1.to_k_ip.weight": (3,),
    }


def test_a_pickle_that_holds_itself_is_refused_and_not_followed_for_ever(tmp_path):
    content = {"a": 1}
    content["model"] = content
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(Invalid, match="no named tensors"):
        open_tensors(tmp_path / "a.pth")


# --- beside the weights -------------------------------------------------------------------------------------------

BESIDE = {
    "a float of numpy": np.float64(1.5),
    "numbers of numpy": {"loss": np.float32(0.5), "step": np.int64(7), "best": np.bool_(True)},
    "the settings of a script": argparse.Namespace(lr=1e-5, betas=(0.9, 0.99), name="run"),
    "a ParameterDict": nn.ParameterDict({"x": nn.Parameter(torch.ones(2))}),
    "a set of nothing": set(),
}


@pytest.mark.parametrize("thing", BESIDE.values(), ids=BESIDE)
def test_harmless_things_beside_the_weights_are_left_out(tmp_path, thing):
    torch.save({"state_dict": STATE, "beside": thing}, tmp_path / "control.ckpt")
    assert same(tmp_path / "control.ckpt")


def test_a_dictionary_of_parameters_is_read_as_its_tensors(tmp_path):
    """A textual inversion of old is one."""
    held = nn.ParameterDict({"word": nn.Parameter(torch.arange(4.0))})
    torch.save({"string_to_token": {"word": 265}, "string_to_param": held}, tmp_path / "word.pt")
    read = open_tensors(tmp_path / "word.pt").read()
    assert read.keys() == {"word"} and torch.equal(read["word"], torch.arange(4.0))


class Encoded:
    def __init__(self, *given):
        self.given = given

    def __reduce__(self):
        import _codecs

        return _codecs.encode, self.given


class Filled:
    """A set of a list that is filled after the call of it was written down."""

    def __reduce__(self):
        return set, ([(1, 2)],)


@pytest.mark.parametrize(
    "thing", [Encoded("x" * 100, "punycode"), Encoded("x", "hex"), Filled()], ids=["punycode", "hex", "a filled set"]
)
def test_calls_that_may_take_time_or_memory_stay_refused(tmp_path, thing):
    torch.save({"state_dict": STATE, "beside": thing}, tmp_path / "control.pth")
    with pytest.raises(Invalid, match="calls"):
        open_tensors(tmp_path / "control.pth")


def test_a_list_filled_behind_the_reader_s_back_is_no_empty_set(tmp_path):
    """The list is put into memory while it is empty, filled, and taken from memory for the call."""
    code = b"\x80\x02cbuiltins\nset\n]q\x00h\x00(K\x01K\x02e00h\x00\x85R."
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as file:
        file.writestr("archive/data.pkl", code)
        file.writestr("archive/version", b"3\n")
    with pytest.raises(Invalid, match="calls"):
        open_tensors(tmp_path / "a.pth")


# --- no weights ---------------------------------------------------------------------------------------------------

OTHERS = {
    "a pointer of git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n", "git-lfs"),
    "a web page": (b"\n <!DOCTYPE html>\n<html lang=en>", "a web page in the place of the file"),
    "a web page after a byte order mark": (b"\xef\xbb\xbf<html><body>401</body></html>", "a web page"),
    "an error of a store": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page"),
    "a GGUF": (b"GGUF\x03\0\0\0" + bytes(100), "a GGUF file"),
    "a configuration": (b'{\n "_class_name": "ControlNetModel"\n}', "a text of JSON and no weights"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(50), "a picture"),
    "a file of Keras": (b"\x89HDF\r\n\x1a\n" + bytes(50), "Keras"),
    "an archive": (b"\x1f\x8b\x08" + bytes(50), "an archive"),
    "a store's answer": (b"404: Not Found\n", 'a text lies in its place, "404: Not Found"'),
    "a hub's answer": (b"Access to model x/y is restricted and you are not in the list. Please log in.", "a text lies"),
    "somebody's notes": (b"weights are on the\tother disk\r\n" * 9, "a text lies"),
    "nothing": (b"", "it is empty"),
}


@pytest.mark.parametrize("name", ["control.safetensors", "control.pth"])
@pytest.mark.parametrize(("data", "words"), OTHERS.values(), ids=OTHERS)
def test_what_is_no_weights_is_named(tmp_path, data, words, name):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(Invalid, match=words) as refused:
        open_tensors(tmp_path / name)
    assert "\n" not in str(refused.value)


def test_an_archive_of_other_files_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "control.pth", "w") as file:
        file.writestr("model/control.safetensors", b"x")
    with pytest.raises(Invalid, match="an archive of other files"):
        open_tensors(tmp_path / "control.pth")


def test_a_pickle_of_old_is_told_to_be_one(tmp_path):
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"x": 1}, protocol=2))
    with pytest.raises(UserError, match="before 2020"):
        open_tensors(tmp_path / "a.pth")
