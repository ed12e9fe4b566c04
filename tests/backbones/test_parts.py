"""A stranger's base folder: its texts are data within ranges; no library opens them, and nothing beyond is read."""

import inspect
import json
import shutil
import socket

import huggingface_hub
import pytest
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from controlkit.backbones import load_base, rules
from controlkit.backbones.parts import read_tokenizer
from controlkit.backbones.rules import check_folder
from controlkit.errors import UserError
from limits import limited

CONFIGS = {
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
    "tokenizer": "tokenizer/tokenizer_config.json",
    "words": "tokenizer/tokenizer.json",
}


@pytest.fixture
def changed(toy_folder, tmp_path):
    """``changed(part, **settings)`` is a copy of the toy base with other settings in a part's configuration."""

    def copy(part="unet", **settings):
        folder = tmp_path / "base"
        if not folder.is_dir():
            shutil.copytree(toy_folder, folder)
        path = folder / CONFIGS[part]
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return folder

    return copy


def refusal(folder, **options):
    with limited(), pytest.raises(UserError) as refused:
        load_base(folder, **options)
    assert len(str(refused.value)) < 600 and "\n" not in str(refused.value)
    return str(refused.value)


BEYOND = [
    ("unet", "block_out_channels", [32] * 100_000),
    ("unet", "block_out_channels", [32, 10**12]),
    ("unet", "layers_per_block", 1_000_000),
    ("unet", "layers_per_block", -1),
    ("unet", "transformer_layers_per_block", [1_000_000, 1]),
    ("unet", "transformer_layers_per_block", [[[[[1]]]]]),
    ("unet", "cross_attention_dim", 2**40),
    ("unet", "conv_in_kernel", 2**20),
    ("unet", "downsample_padding", 10**6),
    ("unet", "sample_size", 10**9),
    ("unet", "sample_size", [64, 64]),
    ("unet", "norm_num_groups", 0),
    ("unet", "norm_eps", float("nan")),
    ("vae", "layers_per_block", 10**6),
    ("vae", "latent_channels", 10**9),
    ("vae", "down_block_types", ["DownEncoderBlock2D"] * 1000),
    ("text_encoder", "num_hidden_layers", 1_000_000),
    ("text_encoder", "vocab_size", 10**9),
    ("text_encoder", "hidden_size", True),
    ("text_encoder", "intermediate_size", 10**60),
    ("text_encoder", "max_position_embeddings", 10**8),
    ("scheduler", "num_train_timesteps", 2 * 10**8),
    ("scheduler", "num_train_timesteps", 1e3),
    ("scheduler", "trained_betas", [0.1] * 50_000),
    ("scheduler", "trained_betas", [[0.1]]),
    ("scheduler", "steps_offset", -5),
]


@pytest.mark.parametrize(
    ("part", "key", "value"), BEYOND, ids=[f"{part} {key} {i}" for i, (part, key, _) in enumerate(BEYOND)]
)
def test_a_number_out_of_range_is_refused_by_its_key_before_anything_is_made(changed, part, key, value):
    assert key in refusal(changed(part, **{key: value}))
    with limited(), pytest.raises(UserError, match=key):  # so does inspect, from the texts alone
        check_folder(changed(part))


def test_ranges_that_multiply_are_refused_together(changed):
    sizes = {"block_out_channels": [32] * 8, "layers_per_block": 4, "transformer_layers_per_block": 16}
    kinds = {"down_block_types": ["CrossAttnDownBlock2D"] * 8, "up_block_types": ["CrossAttnUpBlock2D"] * 8}
    assert "transformers" in refusal(changed("unet", **sizes, **kinds))


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("unet", {"block_out_channels": [16384] * 3, "norm_num_groups": 32}),
        ("vae", {"block_out_channels": [16384, 16384, 16384]}),
        ("text_encoder", {"vocab_size": 2**20, "hidden_size": 16384, "num_hidden_layers": 64}),
    ],
)
def test_sizes_that_the_weights_have_not_take_no_memory(changed, part, settings):
    assert "its configuration means" in refusal(changed(part, **settings))


def test_betas_for_other_timesteps_are_refused(changed):
    assert "one for each of 1000 timesteps" in refusal(changed("scheduler", trained_betas=[0.1] * 10))


def test_a_unet_that_does_not_say_its_size_is_refused(changed):
    path = changed() / "unet/config.json"
    path.write_text(json.dumps({key: one for key, one in json.loads(path.read_text()).items() if key != "sample_size"}))
    assert "sample_size" in refusal(path.parents[1])


def test_a_text_of_brackets_or_of_great_length_is_refused(changed):
    folder = changed()
    for text in ("[" * 100_000, '{"a": ' * 100_000, '{"a": "' + "b" * 2**21 + '"}', '{"a": ' + "1" * 10**6 + "}"):
        (folder / "unet/config.json").write_text(text)
        assert "unet/config.json" in refusal(folder)


REDIRECTS = [
    ("text_encoder", {"attn_implementation": "owner/kernel", "_attn_implementation": "owner/kernel"}),
    ("text_encoder", {"auto_map": {"AutoModel": "owner/code--model.Model"}, "trust_remote_code": True}),
    ("text_encoder", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}),
    ("text_encoder", {"_name_or_path": "/etc", "num_labels": 10**9, "torch_dtype": "float64"}),
    ("unet", {"_name_or_path": "owner/other", "quantization_config": {"quant_method": "torchao"}}),
    ("vae", {"auto_map": ["owner/code--vae.Vae", None]}),
    ("tokenizer", {"auto_map": {"AutoTokenizer": ["owner/code--t.T", None]}, "tokenizer_file": "/etc/passwd"}),
    ("tokenizer", {"chat_template": "{% for i in range(10**9) %}{% endfor %}", "vocab_file": "/etc/passwd"}),
    ("words", {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": "x"}}),
    ("scheduler", {"_name_or_path": "owner/other", "trust_remote_code": True}),
]


@pytest.mark.parametrize(("part", "settings"), REDIRECTS, ids=[f"{part} {' '.join(keys)}" for part, keys in REDIRECTS])
def test_settings_that_are_not_known_here_reach_no_library(changed, toy_base, monkeypatch, part, settings):
    def connect(*arguments):
        raise AssertionError(f"asked {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    with limited():
        base = load_base(changed(part, **settings))
        assert base.digest == toy_base.digest
        assert base.encode_text(["a" * 40]).tokens.equal(toy_base.encode_text(["a" * 40]).tokens)
    assert base.towers[0].encoder.config._attn_implementation == "sdpa"


def test_an_adapter_beside_a_text_tower_redirects_it_nowhere(changed, toy_base, tmp_path):
    folder = changed()
    for part in ("text_encoder", "unet", "vae"):
        words = {"base_model_name_or_path": str(tmp_path / "elsewhere"), "peft_type": "LORA"}
        (folder / part / "adapter_config.json").write_text(json.dumps(words))
    with limited():
        assert load_base(folder).digest == toy_base.digest


# --- paths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "vae",
    ],
)
def test_a_link_out_of_the_folder_is_not_followed(changed, tmp_path, name):
    folder = changed()
    (tmp_path / "outside").mkdir()
    moved = shutil.move(folder / name, tmp_path / "outside" / "it")
    (folder / name).symlink_to(moved)
    assert "leads out of its folder" in refusal(folder)


def test_links_within_the_folder_and_those_of_a_hub_s_cache_are_followed(changed, toy_base, tmp_path):
    folder = changed()
    (folder / "unet/config.json").rename(folder / "shared.json")
    (folder / "unet/config.json").symlink_to("../shared.json")
    assert load_base(folder).digest == toy_base.digest
    (folder / "unet/config.json").unlink()
    (folder / "shared.json").rename(folder / "unet/config.json")
    snapshot = tmp_path / "models--owner--model/snapshots/0123456789"
    (tmp_path / "models--owner--model/blobs").mkdir(parents=True)
    for i, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        place = snapshot / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(tmp_path / f"models--owner--model/blobs/{i:040x}")
        up = "../" * (len(place.relative_to(snapshot).parts) + 1)
        place.symlink_to(f"{up}blobs/{i:040x}")
    assert load_base(snapshot).digest == toy_base.digest


@pytest.mark.parametrize("place", ["../../outside.safetensors", "/etc/passwd", "a\0b", "shard.safetensors"])
def test_an_index_of_shards_names_files_within_the_folder_alone(changed, tmp_path, place):
    folder = changed()
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    names = list(load_file(weights))
    shutil.move(weights, tmp_path / "outside.safetensors")
    (folder / "unet/shard.safetensors").symlink_to(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, place)}
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    refusal(folder)


def test_weights_in_shards_are_read(changed, toy_base):
    folder = changed()
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    homes = {name: f"diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for home in set(homes.values()):
        save_file({name: tensors[name] for name in tensors if homes[name] == home}, weights.with_name(home))
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    assert load_base(folder).digest == toy_base.digest


def test_names_of_other_versions_are_read(changed, toy_base):
    """Attention in VAEs had other names before 2023, and text towers of some versions have a prefix."""
    folder = changed()
    vae, text = folder / "vae/diffusion_pytorch_model.safetensors", folder / "text_encoder/model.safetensors"
    tensors, old = load_file(vae), {}
    for name, tensor in tensors.items():
        for ours, before in (
            (".to_q.", ".query."),
            (".to_k.", ".key."),
            (".to_v.", ".value."),
            (".to_out.0.", ".proj_attn."),
        ):
            name = name.replace(ours, before)
        old[name] = tensor
    save_file(old, vae)
    save_file({f"text_model.{name.removeprefix('text_model.')}": t for name, t in load_file(text).items()}, text)
    assert load_base(folder).digest == toy_base.digest


# --- tokenizers ---------------------------------------------------------------------------------------------------


def written(folder, kind):
    """The toy's tokenizer in the files of one of transformers' versions."""
    whole = json.loads((folder / "tokenizer.json").read_text())
    config = {"model_max_length": json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"]}
    count, flags = (
        len(whole["model"]["vocab"]),
        {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False},
    )
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    if kind != "new":
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
        lines = ["#version: 0.2", *(" ".join(pair) for pair in whole["model"]["merges"]), ""]
        (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    if kind == "old":
        config |= {key: {"__type": "AddedToken", "content": word, **flags} for key, word in marks.items()}
        special = {key: {"content": word, **flags} for key, word in marks.items()} | {"pad_token": "!"}
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
        (folder / "added_tokens.json").write_text(json.dumps({"<new>": count, "Apple": count + 1}))
    elif kind == "middle":
        words = {
            str(whole["model"]["vocab"][word]): {"content": word, "special": True, **flags} for word in marks.values()
        }
        config |= marks | {"added_tokens_decoder": words | {str(count): {"content": "<new>", **flags, "lstrip": True}}}
    else:
        whole["added_tokens"].append({"id": count, "content": "<new>", "special": False, **flags, "normalized": False})
        whole["model"]["merges"] = [" ".join(pair) for pair in whole["model"]["merges"]]
        (folder / "tokenizer.json").write_text(json.dumps(whole))
        config |= marks | {"pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["old", "middle", "new"])
def test_a_tokenizer_of_any_version_is_the_one_that_transformers_reads(toy_folder, tmp_path, kind):
    shutil.copytree(toy_folder / "tokenizer", tmp_path / "tokenizer")
    written(tmp_path / "tokenizer", kind)
    ours, theirs = read_tokenizer(tmp_path, "tokenizer"), CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    prompts = ["a Red <new> apple, naïve 東京", "", "<|startoftext|>gold<|endoftext|>", "Apple <new><new>!", "x" * 99]
    for way in ({"padding": "max_length", "truncation": True, "max_length": 16}, {"add_special_tokens": False}):
        assert ours(prompts, **way).input_ids == theirs(prompts, **way).input_ids
    assert ours.get_vocab() == theirs.get_vocab() and len(ours) == len(theirs)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "model_max_length"):
        assert getattr(ours, key) == getattr(theirs, key)


def words_of(model, **settings):
    return {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []} | model} | settings


LISTS = {
    "too many words": words_of({"vocab": {f"w{i}": i for i in range(300_000)}}),
    "a word of a million letters": words_of({"vocab": {"a" * 10**6: 0}}),
    "a word without a number": words_of({"vocab": {"a": "0"}}),
    "a number beyond all": words_of({"vocab": {"a": 10**18}}),
    "merges of three": words_of({"merges": [["a", "b", "c"]]}),
    "merges of no words": words_of({"merges": [["a", "b"]]}),
    "merges of numbers": words_of({"merges": [1, 2]}),
    "no vocabulary": words_of({"vocab": ["a"]}),
    "no model": {"model": 7},
    "added beyond all": words_of({}, added_tokens=[{"id": 10**9, "content": "x"}]),
    "added without a word": words_of({}, added_tokens=[{"id": 3}]),
    "added of a million letters": words_of({}, added_tokens=[{"id": 3, "content": "x" * 10**6}]),
}


@pytest.mark.parametrize("words", LISTS.values(), ids=LISTS)
def test_words_that_are_none_are_refused(changed, words):
    refusal(changed("words", **words))


@pytest.mark.parametrize(
    "settings",
    [
        {"model_max_length": 10**30},
        {"model_max_length": -1},
        {"pad_token": "x" * 10**6},
        {"pad_token": {"content": ["a"]}},
        {"pad_token": 5},
        {"pad_token": "<a word the text tower has no vector for>"},
        {"added_tokens_decoder": {"many": {"content": "a"}}},
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {str(i): {"content": f"w{i}"} for i in range(20_000)}},
    ],
    ids=lambda settings: str(settings)[:40],
)
def test_settings_of_words_that_are_none_are_refused(changed, settings):
    refusal(changed("tokenizer", **settings))


# --- the table ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "kind"), [("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("scheduler", DDIMScheduler)]
)
def test_the_table_says_of_every_setting_of_a_class_what_is_followed(part, kind):
    """A setting that a new version adds is left out, and its pictures would be wrong: it belongs into the table."""
    own = inspect.signature(kind.__init__).parameters
    assert own.keys() - {"self"} <= rules._FOLLOWED[part].keys()
    for key, known in rules._FOLLOWED[part].items():  # and what a class has by itself is followed
        if key in own and known:
            default = own[key].default
            several = default if isinstance(default, tuple) else (default,)
            usual = key in ("clip_sample", "sample_size")  # of a base they must be given, or are known
            assert usual or (
                known.holds(default) if isinstance(known, rules.Numbers) else all(one in known for one in several)
            ), key


def test_another_vae_of_a_hub_is_read_like_a_folder(toy_folder, toy_base, monkeypatch):
    asked = []

    def snapshot_download(repository, local_files_only=False, **options):
        asked.append((repository, local_files_only))
        return str(toy_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load_base(toy_folder, vae="owner/vae").digest == toy_base.digest and asked == [("owner/vae", True)]


def test_another_vae_is_held_within_ranges_too(changed, toy_folder):
    assert "latent_channels" in refusal(toy_folder, vae=changed("vae", latent_channels=10**9) / "vae")
    assert "layers_per_block" in refusal(toy_folder, vae=changed("vae", latent_channels=4, layers_per_block=10**6))
