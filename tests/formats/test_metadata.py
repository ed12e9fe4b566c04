"""The texts that come with a control: settings and contracts within ranges, held before anything is made of them."""

import json

import pytest
from safetensors.torch import load_file, save_file

from controlkit.annotators import annotate, contract, contract_from_json
from controlkit.controls import new_control
from controlkit.errors import UserError
from controlkit.formats import WEIGHTS, SavedControl, describe, load_control, save_control
from controlkit.images import HintSpec
from limits import limited


@pytest.fixture(scope="module")
def sound(toy_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("control")
    save_control(folder / "control", SavedControl(new_control(toy_base), contract("lineart"), {}), toy_base)
    return folder / "control"


@pytest.fixture
def written(sound, tmp_path):
    """``written(config, **entries)`` is a copy of a control with settings and metadata of a stranger's."""

    def write(config=None, **entries):
        (tmp_path / "control").mkdir(exist_ok=True)
        from safetensors import safe_open

        with safe_open(sound / WEIGHTS, framework="pt") as file:
            metadata = file.metadata()
        metadata |= {f"controlkit.{key}": value for key, value in entries.items()}
        save_file(load_file(sound / WEIGHTS), tmp_path / "control" / WEIGHTS, metadata)
        text = json.dumps(json.loads((sound / "config.json").read_text()) | (config or {}))
        (tmp_path / "control" / "config.json").write_text(text)
        return tmp_path / "control"

    return write


def hint(annotator="lineart", **changes):
    return json.dumps(json.loads(HintSpec(annotator).to_json()) | changes)


HINTS = {
    "a pen wider than the picture": hint(options={"width": 1e5}),
    "a blur over the whole picture": hint(options={"width": 1.0}),
    "a soft blur over a half": hint("softedge", options={"width": 0.5}),
    "a negative pen": hint("scribble", options={"width": -1}),
    "thresholds without end": hint("canny", options={"low": 1e300}),
    "no thresholds": '{"annotator": "canny", "options": {"low": NaN}}',
    "a shrinking that leaves nothing": hint("tile", options={"shrink": 1e9}),
    "a hole larger than the picture": hint("inpaint", options={"most": 7}),
    "an option of another annotator": hint(options={"shrink": 2}),
    "a million options": hint(options={f"o{i}": 1 for i in range(10_000)}),
    "channels in great number": hint(channels=10**9),
    "no channels": hint(channels=0),
    "a range beyond numbers": hint(high=1e39),
    "a mask beyond numbers": hint(mask_value=-1e300),
    "a number of a thousand digits": '{"annotator": "", "channels": ' + "1" * 1000 + "}",
    "brackets": '{"annotator": "", "options": ' + "[" * 100_000,
    "half a letter": r'{"annotator": "\ud800"}',
    "a name of a megabyte": hint("a" * 10**6),
    "a key twice": '{"annotator": "canny", "annotator": "tile"}',
}


@pytest.mark.parametrize("text", HINTS.values(), ids=HINTS)
def test_a_contract_out_of_range_is_refused_where_it_is_accepted(written, toy_base, text):
    with limited(), pytest.raises(UserError) as refused:
        load_control(written(hint=text), toy_base)
    assert len(str(refused.value)) < 600 and str(refused.value).isprintable()
    with limited(), pytest.raises(ValueError):
        contract_from_json(text)


@pytest.mark.parametrize(
    "name", ["canny", "scribble", "softedge", "lineart", "mlsd", "tile", "inpaint", "depth", "mine"]
)
def test_a_right_contract_is_read_as_it_was_written(name):
    spec = HintSpec(name, {"strength": 0.5}) if name == "mine" else contract(name)  # of another program's annotator
    assert contract_from_json(spec.to_json()) == spec


def test_the_largest_options_that_are_read_take_no_more_than_the_picture_does():
    import numpy as np

    picture = np.random.default_rng(0).integers(0, 255, (512, 512, 3), np.uint8)
    for name, options in (
        ("lineart", {"width": 1 / 16}),
        ("softedge", {"width": 1 / 16}),
        ("tile", {"shrink": 1000.0}),
    ):
        spec = contract_from_json(hint(name, options=options))
        with limited(cpu_seconds=10, growth=2**29):
            assert annotate(picture, spec).shape == picture.shape


CONFIGS = {
    "heads without end": {"attention_head_dim": 2**40},
    "a list of heads": {"attention_head_dim": [8] * 100_000},
    "groups of none": {"norm_num_groups": 0},
    "padding": {"downsample_padding": 10**6},
    "an epsilon that is none": {"norm_eps": "many"},
    "a scale without end": {"mid_block_scale_factor": 1e300},
    "a time embedding": {"addition_time_embed_dim": 10**12},
    "a truth in words": {"flip_sin_to_cos": "yes"},
    "a number of a thousand digits": {"freq_shift": 10**1000},
    "an order of colours": {"controlnet_conditioning_channel_order": "grb"},
    "an order of colours that is none": {"conditioning_channel_order": None},
    "pooling in words": {"global_pool_conditions": "yes"},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_control_s_settings_are_held_within_ranges(written, toy_base, config):
    for read in (describe, lambda folder: load_control(folder, toy_base)):
        with limited(), pytest.raises(UserError, match="cannot be read"):
            read(written(config))


@pytest.mark.parametrize(
    "entries",
    [
        {"spec": '{"body": "lora", "rank": 1000000000}'},
        {"spec": '{"body": "lora", "rank": 1.5}'},
        {"use": '{"guidance": 1e300}'},
        {"use": '{"guidance": Infinity}'},
        {"trained": '{"a": ' * 1000},
        {"hints": json.dumps({"canny": hint("canny", options={"low": -5})})},
    ],
    ids=str,
)
def test_other_entries_are_held_too(written, toy_base, entries):
    with limited(), pytest.raises(UserError):
        load_control(written(**entries), toy_base)


def test_a_configuration_beside_that_has_no_end_is_refused_unread(written, toy_base):
    folder = written()
    (folder / "config.json").unlink()
    with (folder / "config.json").open("wb") as file:
        file.truncate(2**40)
    with limited(), pytest.raises(UserError, match="more than"):
        load_control(folder, toy_base)
    assert load_control(written(), toy_base).hint == contract("lineart")


def test_settings_beside_a_control_are_read_from_its_own_folder(written, tmp_path, toy_base):
    folder = written()
    (tmp_path / "elsewhere.json").write_bytes((folder / "config.json").read_bytes())
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UserError, match="leads out of its folder"):
        load_control(folder, toy_base)
    (folder / "config.json").unlink()
    (folder / "own.json").write_bytes((tmp_path / "elsewhere.json").read_bytes())
    (folder / "config.json").symlink_to(folder / "own.json")
    load_control(folder, toy_base)


def test_a_yaml_beside_a_control_is_read_from_its_own_folder(written, tmp_path, toy_base):
    folder = written()
    yaml = (folder / WEIGHTS).with_suffix(".yaml")
    text = "model:\n  params:\n    global_average_pooling: true\n"
    (tmp_path / "elsewhere.yaml").write_text(text)
    yaml.symlink_to(tmp_path / "elsewhere.yaml")
    assert not load_control(folder, toy_base).branch.pools
    yaml.unlink()
    yaml.write_text(text)
    assert load_control(folder, toy_base).branch.pools


def test_weights_of_a_folder_are_no_link_out_of_it(written, tmp_path, toy_base):
    folder = written()
    (tmp_path / "elsewhere.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere.safetensors")
    for read in (describe, lambda path: load_control(path, toy_base)):
        with pytest.raises(UserError, match="leads out of its folder"):
            read(folder)
    (tmp_path / "named").symlink_to(tmp_path / "elsewhere.safetensors")  # which the user names
    describe(tmp_path / "named")


def test_shards_are_no_links_out_of_their_folder(written, tmp_path):
    folder = written()
    shard, index = "model-00001-of-00001.safetensors", folder / f"{WEIGHTS}.index.json"
    (tmp_path / "elsewhere.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    index.write_text(json.dumps({"weight_map": dict.fromkeys(load_file(folder / WEIGHTS), shard)}))
    (folder / WEIGHTS).rename(folder / shard)
    describe(index)
    (folder / shard).unlink()
    (folder / shard).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UserError, match="leads out of its folder"):
        describe(index)


def test_a_shard_s_name_that_no_file_can_have_is_refused(written):
    index = written() / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a" * 300 + ".safetensors"}}))
    with pytest.raises(UserError, match="no files of weights beside it"):
        describe(index)
