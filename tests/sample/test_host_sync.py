"""No step waits for the device: nothing is asked of its numbers between the first step and the last.

``meta`` stands for a device: it has shapes and no numbers, so that every question about one raises.
"""

import copy

import pytest
import torch

from controlkit.backbones import load_base
from controlkit.branch import ControlSpec
from controlkit.controls import new_control
from controlkit.images import HintSpec
from controlkit.sample import Start, Steering, denoise
from controlkit.sample.pace import PACES
from controlkit.sample.prepare import PreparedControl, SamplingSettings

META = torch.device("meta")


@pytest.fixture(scope="module")
def far(toy_folder):
    """A base on the device that has no numbers, with its prompts."""
    base = load_base(toy_folder)
    text = base.encode_text(["", "a cat"]).to(META)
    return base.to(META), text


def run(far, spec=None, use=None, region=None, **settings):
    base, text = far
    text = text[1:] if settings.get("guidance") == 1 else text
    network = copy.deepcopy(new_control(base, spec)).requires_grad_(False).to(META)
    control = PreparedControl(network, {"": HintSpec("canny")}, **(use or {}))
    noise = torch.zeros(1, *base.latent_shape((32, 32)), device=META)
    hint = torch.zeros(1, 3, 32, 32, device=META)
    start = Start(noise, [torch.Generator().manual_seed(0)])
    steering = [Steering(control, hint, region)]
    return [done.latents.device for done in denoise(base, start, text, steering, SamplingSettings(6, **settings))]


@pytest.mark.parametrize("scheduler", [None, "Euler", "Euler a", "DPM++ 2M Karras", "DPM++ 2M SDE", "UniPC", "LCM"])
@pytest.mark.parametrize("speed", ["exact", "fast", "turbo"])
def test_no_scheduler_waits(far, scheduler, speed):
    assert run(far, scheduler=scheduler, pace=PACES.get(speed)) == [META] * 6


@pytest.mark.parametrize(
    ("spec", "use", "settings"),
    [
        (ControlSpec(body="xs"), {}, {}),
        (ControlSpec(body="adapter"), {}, {}),
        (None, {"end": 0.5}, {"guider": "apg"}),
        (None, {"cfg_weights": True}, {"guidance_rescale": 0.5}),
        (None, {"by_step": (1, 0, 0.5, 0.5, 1, 1)}, {"pace": PACES["turbo"]}),
        (None, {"guess": True}, {"guidance": 1.0}),
    ],
)
def test_no_control_and_no_guidance_waits(far, spec, use, settings):
    assert len(run(far, spec, use, **settings)) == 6


def test_a_region_does_not_wait(far):
    assert len(run(far, region=torch.ones(1, 1, 32, 32))) == 6


def test_a_question_would_be_seen(far, monkeypatch):
    base, _ = far
    real = type(base).predict
    monkeypatch.setattr(type(base), "predict", lambda *args: real(*args) * (args[1].sum() > 0).item())
    with pytest.raises((NotImplementedError, RuntimeError)):
        run(far)
