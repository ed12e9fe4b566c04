"""What is shipped: stock diffusers loads and runs it, it says what it is, and nothing of it is a program."""

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)

from conftest import make
from controlkit import hub
from controlkit.backbones import load_base
from controlkit.data import Pair, hint_for_pair
from controlkit.formats import convert, load_control, shipped_controls
from controlkit.hub import shipped_path
from controlkit.mini.scenes import draw_scene
from controlkit.train import hint_specs
from controlkit.train.recipe import ControlRecipe

PROMPT = "a red apple, 3d style, on a teal background"
TYPES = ("canny", "softedge", "scribble", "lineart", "mlsd", "depth", "normal", "seg", "pose", "inpaint", "tile")


@pytest.fixture(scope="module")
def mini():
    return load_base("mini")


@pytest.fixture(scope="module")
def person(mini):
    """The first scene with a figure in it."""
    scenes = (draw_scene(mini.size, 0, index) for index in range(100))
    scene = next(scene for scene in scenes if len(scene.keypoints))
    return Pair(scene.picture, scene.captions[0], truth=scene)


def test_stock_diffusers_loads_the_base_and_makes_a_picture(mini):
    pipeline = StableDiffusionPipeline.from_pretrained(
        shipped_path("mini"), torch_dtype=torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(PROMPT, num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (mini.size, mini.size, 3) and np.isfinite(picture).all()


@pytest.mark.parametrize("name", ["canny", "depth", "pose"])
def test_the_stock_pipeline_runs_a_shipped_control_to_the_same_latents(name, mini, person, tmp_path):
    saved = load_control(name, mini)
    hint = hint_for_pair(person, saved.hint)
    settings = {"prompt": person.prompt, "seed": 3, "steps": 4}
    made = make(mini, [saved], [hint], [{"hint_cfg_scale": 1.0}], **settings)
    plain = make(mini, **settings)
    convert(name, tmp_path / name, "diffusers")
    stock = StableDiffusionControlNetPipeline.from_pretrained(
        shipped_path("mini"),
        controlnet=ControlNetModel.from_pretrained(tmp_path / name, torch_dtype=torch.float32),
        torch_dtype=torch.float32,
        local_files_only=True,
    )
    stock.set_progress_bar_config(disable=True)
    latents = stock(
        person.prompt,
        image=saved.hint.tensor(hint, (mini.size, mini.size)),
        num_inference_steps=4,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images[0]

    def difference(ours):
        return float((ours - latents).norm() / latents.norm())

    print(f"relative difference of latents: {difference(made.latents):.1e}")
    assert difference(made.latents) <= 1e-4 < 1e-2 < difference(plain.latents)


def test_stock_diffusers_loads_the_union_and_uses_all_of_its_weights():
    _, info = ControlNetUnionModel.from_pretrained(shipped_path("union"), output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


def test_every_type_is_shipped_and_says_what_it_is(mini):
    assert {name for name, (folder, kind) in shipped_controls().items() if kind} == set(TYPES)
    for name in TYPES:
        saved = load_control(name, mini)
        # The record of its training keeps the keys that recipes had then; its types mean what they mean today.
        control = saved.trained["recipe"]["control"]
        assert saved.hint == hint_specs(ControlRecipe(types=control["types"]))[name]
        assert saved.hint_cfg_scale == control["guidance"] == 2.25
        assert saved.trained["base_digest"] == mini.digest
        assert saved.trained["recipe"]["prompt_dropout"] == 0.5


def test_nothing_shipped_is_a_pickle_and_all_of_it_is_small():
    files = [path for path in hub.SHIPPED.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt"}
    for path in files:
        with path.open("rb") as file:
            assert not file.read(4).startswith((b"PK", b"\x80", b"\x1f\x8b")), path
    assert sum(path.stat().st_size for path in files) <= 36e6
