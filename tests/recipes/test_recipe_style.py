"""The recipe that tunes a base to one style, at toy size."""

import importlib
from pathlib import Path

import pytest
import torch

from controlkit.backbones import load_base
from controlkit.controls import new_control
from controlkit.errors import UserError
from controlkit.formats import SavedControl, save_control
from controlkit.images import HintSpec, read_picture
from controlkit.mini import world


@pytest.fixture
def style(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "recipes")
    return importlib.import_module("style")


def test_it_tunes_the_unet_alone_and_shows_the_control_before_and_after(
    style, fake_packages, toy_folder, toy_base, tmp_path
):
    save_control(tmp_path / "edges", SavedControl(new_control(toy_base), HintSpec("canny")), toy_base)
    style.main(tmp_path / "tuned", "3d", steps=2, batch=2, base=str(toy_folder), control=str(tmp_path / "edges"))
    tuned = load_base(tmp_path / "tuned")
    for part in ("vae", "text_encoder"):
        before, after = (base.networks()[part].state_dict() for base in (toy_base, tuned))
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    before, after = toy_base.unet.state_dict(), tuned.unet.state_dict()
    assert not all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert read_picture(tmp_path / "tuned.png").shape[1] > 3 * 128  # drawing, before, after


def test_a_caption_says_another_style_and_nothing_else_changes():
    assert (
        world.caption_in(world.caption("red-apple", "3d", "teal"), "flat")
        == "a red apple, flat style, on a teal background"
    )


def test_an_unknown_style_is_refused(style, tmp_path):
    with pytest.raises(UserError, match="3d"):
        style.main(tmp_path / "tuned", "4d")
