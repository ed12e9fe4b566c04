"""Every scheduler goes the way that the stock pipeline goes with diffusers' class of it."""

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from conftest import make, relative
from controlkit.backbones import load_base
from controlkit.backbones.noise import Diffusion, Flow
from controlkit.backbones.schedulers import SCHEDULERS, scheduler_named
from controlkit.errors import Invalid, UserError
from controlkit.sample import Request, generate, pictures

PEERS = {  # name -> diffusers' class and settings, as its documentation gives them for A1111's names
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler Karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "Euler SGM Uniform": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "Euler Exponential": ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ 2M SDE Karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "DPM++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "UniPC Karras": ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
}


def stock(base, folder, class_name="DDIMScheduler", settings=None, **call):
    """The stock pipeline's latents (C, h, w) of the same request, in ten steps."""
    plain = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline = StableDiffusionPipeline(
        vae=base.vae,
        text_encoder=base.towers[0].encoder,
        tokenizer=base.towers[0].tokenizer,
        unet=base.unet,
        scheduler=getattr(diffusers, class_name).from_config(plain.config, **settings or {}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    given = {"num_inference_steps": 10, "guidance_scale": 4.0, "output_type": "latent", "generator": generator}
    return pipeline("a red apple", **given | call).images[0]


def ours(base, **settings):
    return make(base, prompt="a red apple", negative_prompt="", seed=5, steps=10, **settings).latents


@pytest.mark.parametrize("name", PEERS)
def test_a_scheduler_s_run_is_the_stock_pipeline_s(toy_base, toy_folder, name):
    made = ours(toy_base, scheduler=name)
    eta = 0.3 if name == "TCD" else 0.0  # the class's own, which the pipeline sets to 0
    assert relative(made, stock(toy_base, toy_folder, *PEERS[name], eta=eta)) < 1e-4
    if name != "DDIM":
        assert relative(made, ours(toy_base)) > 1e-3


def test_no_scheduler_is_left_without_a_peer():
    assert {name for name in PEERS if name in SCHEDULERS} == {*SCHEDULERS}


@pytest.mark.parametrize("name", ["Euler", "DPM++ 2M Karras", "UniPC", "LCM"])
def test_bases_with_v_prediction_and_zero_terminal_snr_keep_both(toy_folder, name):
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    plain = DDIMScheduler.from_pretrained(toy_folder, subfolder="scheduler")
    base = load_base(toy_folder)
    base.scheduler = DDIMScheduler.from_config(plain.config, **settings)
    base.noise = Diffusion(base.scheduler)
    class_name, own = PEERS[name]
    assert relative(ours(base, scheduler=name), stock(base, toy_folder, class_name, settings | own)) < 1e-4


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_guidance_is_rescaled_as_in_the_stock_pipeline(toy_base, toy_folder, share):
    made = ours(toy_base, guidance_rescale=share)
    assert relative(made, stock(toy_base, toy_folder, guidance_rescale=share)) < 1e-4
    assert relative(made, ours(toy_base)) > 1e-3


def test_noise_on_the_way_is_the_seed_s_own_whatever_is_made_beside_it(toy_base):
    requests = [Request(prompt="a red apple", seed=seed, steps=4, scheduler="Euler a") for seed in (5, 6, 7)]
    together = [one for one in generate(toy_base, requests) if hasattr(one, "pixels")]
    for request, picture in zip(requests, together, strict=True):
        alone = make(toy_base, prompt="a red apple", seed=request.seed, steps=4, scheduler="Euler a")
        assert relative(picture.latents, alone.latents) < 1e-4


def test_names_are_found_whatever_their_case(toy_base):
    found = scheduler_named("dpm++ 2m sde karras", toy_base.scheduler)
    assert found.config.use_karras_sigmas and found.config.algorithm_type == "sde-dpmsolver++"
    assert scheduler_named("euler sgm_uniform", toy_base.scheduler).config.timestep_spacing == "trailing"


@pytest.mark.parametrize(
    ("name", "words"),
    [("Euller", 'did you mean "Euler"'), ("DDIM Karras", "these have it: .*Euler"), ("Euler Beta Karras", "scheduler")],
)
def test_names_that_are_not_known_are_refused_before_anything_is_made(toy_base, name, words):
    with pytest.raises(Invalid, match=words):
        make(toy_base, scheduler=name)


def test_a_flow_has_no_scheduler_of_diffusion():
    with pytest.raises(UserError, match="is a flow"):
        Flow().sampler(4, "Euler a")


@pytest.mark.parametrize("name", ["DPM++ 2M Karras", "DPM++ 2M SDE Karras", "UniPC Karras"])
def test_steps_whose_timesteps_are_the_same_are_made_all_the_same(toy_base, name):
    """With zero terminal SNR and many steps the first timesteps of these spacings round to one number."""
    times = toy_base.noise.sampler(40, name).timesteps
    assert len(times) > len(set(times.tolist()))
    [picture] = pictures(generate(toy_base, [Request(steps=40, scheduler=name)]))
    assert picture.latents.isfinite().all()
