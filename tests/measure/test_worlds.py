"""Worlds: whose pictures a referee may judge."""

import copy

import pytest
import torch

from controlkit.annotators import contract, grounds_of
from controlkit.backbones import load_base
from controlkit.errors import Invalid
from controlkit.formats import SavedControl
from controlkit.measure import EMBEDDED, heldout_for, world, world_of


@pytest.fixture(scope="module")
def mini():
    return load_base("mini")


def in_format(base, dtype):
    """A copy of a base whose text encoder is kept in another number format, read anew."""
    other = copy.deepcopy(base)
    other.__dict__.pop("text_digest", None)
    other.towers[0].encoder.to(dtype)
    return other


def test_the_shipped_base_and_what_is_tuned_from_it_are_of_the_embedded_world(mini):
    assert world_of(mini) is EMBEDDED
    tuned = mini.with_own_denoiser()
    tuned.name = "tuned"
    torch.nn.init.normal_(tuned.denoiser.conv_in.weight)
    assert tuned.digest != mini.digest and world_of(tuned) is EMBEDDED
    assert world_of(mini.of_size(64)) is EMBEDDED


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_number_format_does_not_change_a_base_s_world(mini, dtype):
    assert world_of(in_format(mini, dtype)) is EMBEDDED


def test_a_base_that_reads_prompts_by_other_weights_is_of_no_world(mini, toy_base, xl_base, monkeypatch):
    assert world_of(toy_base) is None and world_of(xl_base) is None
    monkeypatch.setattr(toy_base, "name", "mini")
    assert world_of(toy_base) is None, "the name decides nothing"
    taught = in_format(mini, torch.float32)
    next(taught.towers[0].encoder.parameters()).data[5] += 0.1
    assert world_of(taught) is None


def test_the_referee_is_loaded_once_a_device():
    assert EMBEDDED.referee("cpu") is EMBEDDED.referee("cpu") and EMBEDDED.observer() is EMBEDDED.observer()


@pytest.mark.parametrize(
    ("kind", "given", "wanted"),
    [
        ("canny", None, ("emoji", 32, 3, False)),
        ("depth", None, ("scenes", 32, 3, False)),
        ("pose", None, ("scenes", 32, 3, True)),
        ("depth", "photos", ("photos", 32, 3, False, ["black"], {})),
        ("inpaint", "photos", ("photos", 32, 3, False, [None], {})),
    ],
)
def test_a_control_of_the_world_is_measured_where_its_hints_are_known(monkeypatch, kind, given, wanted):
    monkeypatch.setattr(world, "evaluation_pairs", lambda *args, **more: (*args, *more.values()))
    trained = {"data": "world", "recipe": {"data": {"columns": {"image": "file"}}}}
    saved = SavedControl(None, contract(kind), trained)
    assert heldout_for(saved, 32, 3, given) == wanted


def test_a_control_of_a_folder_is_measured_on_its_columns(monkeypatch):
    monkeypatch.setattr(world, "evaluation_pairs", lambda *args: args)
    trained = {"data": "photos", "recipe": {"data": {"columns": {"image": "file"}}}}
    saved = SavedControl(None, contract("canny"), trained)
    assert heldout_for(saved, 32, 3) == ("photos", 32, 3, False, grounds_of(contract("canny")), {"image": "file"})
    assert heldout_for(saved, 32, 3, "others")[-1] == {}
    assert heldout_for(saved, 32, 3, "others", {"image": "a"})[-1] == {"image": "a"}
    assert heldout_for(SavedControl(None, contract("canny")), 32, 3)[0] == "emoji"


def test_a_stranger_s_control_is_measured_on_what_is_drawn_here_or_asked_for(monkeypatch):
    monkeypatch.setattr(world, "evaluation_pairs", lambda *args: args)
    columns = {"data": {"columns": {"image": "../x"}}}

    def of(data):
        return SavedControl(None, contract("canny"), {"data": data, "recipe": columns}, is_own=False)

    for data in ("photos", "owner/dataset", "/etc", ["emoji"], 5, {}):
        with pytest.raises(Invalid, match="--data"):
            heldout_for(of(data), 32, 3)
        assert heldout_for(of(data), 32, 3, "mine")[::5] == ("mine", {})
    assert heldout_for(of("fill50k"), 32, 3)[::5] == ("fill50k", {})
    assert heldout_for(SavedControl(None, contract("canny"), is_own=False), 32, 3)[0] == "emoji"
