import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline

from controlkit.annotators import annotate
from controlkit.backbones import load_base
from controlkit.formats import load_control
from controlkit.hub import where
from controlkit.mini import world
from controlkit.sample import Control, Job, Settings, generate

PROMPT = "a red apple, 3d style, on a teal background"


@pytest.fixture(scope="module")
def mini():
    return load_base("mini")


def test_stock_diffusers_loads_the_base_and_makes_a_picture():
    pipeline = StableDiffusionPipeline.from_pretrained(where("mini"), torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(PROMPT, num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (64, 64, 3) and np.isfinite(picture).all()


@pytest.mark.parametrize("name", ["canny", "scribble"])
def test_the_stock_pipeline_runs_the_shipped_control_to_the_same_latents(name, mini):
    saved = load_control(name, mini)
    hint = annotate(world.draw_shape(64, 0, 0)[0], saved.hint)
    made = next(generate(mini, [Job(PROMPT, 3, (hint,))], [Control(saved.branch, saved.hint)], Settings(steps=20)))
    stock = StableDiffusionControlNetPipeline.from_pretrained(
        where("mini"),
        controlnet=ControlNetModel.from_pretrained(where(name), torch_dtype=torch.float32),
        torch_dtype=torch.float32,
        local_files_only=True,
    )
    stock.set_progress_bar_config(disable=True)
    latents = stock(
        PROMPT,
        image=saved.hint.tensor(hint, (64, 64)),
        num_inference_steps=20,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images[0]
    difference = float((made.latents - latents).norm() / latents.norm())
    print(f"relative difference of latents: {difference:.1e}")
    assert difference <= 1e-4


@pytest.mark.parametrize("name", ["canny", "scribble"])
def test_the_shipped_control_says_what_it_is(name, mini):
    saved = load_control(name, mini)
    assert saved.hint.annotator == name
    assert saved.trained["base_digest"] == mini.digest
    assert saved.trained["recipe"]["prompt_dropout"] == 0.5
