"""The memory that making pictures takes, estimated and measured."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from conftest import draw_inputs, randomised
from controlkit.backbones import ActiveControl, load_base, memory
from controlkit.backbones.memory import (
    Estimate,
    Held,
    Meter,
    Work,
    bytes_of,
    estimate,
    fastest,
    fitting,
    is_roomy,
    narrowed,
)
from controlkit.backbones.placement import MODES
from controlkit.branch import ControlSpec
from controlkit.controls import new_control, new_union

GPU = torch.device("cpu:0")
"""In the place of a GPU: another device than ``cpu``, where networks wait."""


@pytest.fixture
def base(toy_folder):
    return load_base(toy_folder)


def test_a_meter_measures_growth_since_it_was_made_or_reset_and_the_base_s_weights(toy_base, monkeypatch):
    held, most = 1_000, 1_000
    monkeypatch.setattr(memory.psutil.Process, "memory_info", lambda process: SimpleNamespace(rss=held))
    monkeypatch.setattr(memory, "high_water", lambda: most)
    meter = Meter(toy_base)
    base = sum(v.numel() * v.element_size() for m in toy_base.networks().values() for v in m.state_dict().values())
    assert meter.peak() == base
    most = 5_000  # the process grew
    assert meter.peak() == base + 4_000
    meter.reset()
    most = 2_000  # it fell since
    assert meter.peak() == base + 1_000


@pytest.mark.skipif(sys.platform != "linux", reason="the high water mark is reset on Linux alone")
def test_the_high_water_mark_of_a_process_is_reset(toy_base):
    """Half a large block is the bound: whatever else this process takes or gives back meanwhile is far less."""
    meter = Meter(toy_base)
    before = meter.peak()
    block = np.ones(125_000_000)  # 1 GB, given back to the system at once
    assert meter.peak() - before > 5e8
    del block
    meter.reset()
    assert meter.peak() - before < 5e8


@pytest.mark.skipif(sys.platform != "linux", reason="the mark is inherited on Linux alone")
def test_the_high_water_mark_is_not_that_of_the_process_that_started_this_one():
    asked = "from controlkit.backbones.memory import high_water; print(high_water())"
    block = np.ones(250_000_000)  # 2 GB; importing takes some 500 MB
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert 5e7 < int(done.stdout) < block.nbytes


def held_by(work):
    """The most bytes of tensors that are really made and held."""
    with torch.no_grad(), Held() as held:
        work()
    return max(held.after)


@pytest.mark.parametrize("size", [(32, 32), (64, 32)])
def test_the_estimate_of_pictures_is_what_they_hold(size, base):
    """On shapes alone as with values, to the byte; but for what kernels hold and attention's scores, left out here."""
    latents = torch.zeros(3, *base.latent_shape(size))
    trial = memory._Trial(base, Work(size, pictures=3))
    with_kernels = trial._most("vae", "fast")
    really = held_by(lambda: base.decode_latents(latents * 1))
    assert really < with_kernels < 2.1 * really
    shapes, _ = memory.shapes_only(base)
    with memory._WithoutScores():
        assert held_by(lambda: memory._decode(shapes, [], Work(size, pictures=3))) == pytest.approx(really, rel=0.05)


@pytest.mark.parametrize("kind", ["copy", "conv", "lora", "xs", "adapter", "union"])
def test_the_estimate_of_a_step_is_what_it_holds(kind, base):
    control = randomised(new_union(base)) if kind == "union" else new_control(base, _spec(kind)).eval()
    hints = {"canny": 3} if control.hint_types else {"": 3}
    work = Work((32, 32), [(control, hints)])

    def step():
        x, t, text, hint = draw_inputs(base)
        features = control.encode_hint({"canny": hint[:1]} if control.hint_types else hint[:1])
        twice = tree_map(lambda one: one.repeat(2, *[1] * (one.dim() - 1)), features)
        base.predict(x, t, text, [ActiveControl(control, twice)])

    shapes, [other] = memory.shapes_only(base, [control])
    assert all(value.is_meta for value in (*shapes.unet.parameters(), *other.parameters()))
    assert not any(value.is_meta for value in (*base.unet.parameters(), *control.parameters())), "a copy"
    with memory._WithoutScores():
        really = held_by(step)
        found = held_by(lambda: memory._predict(shapes, [other], work))
    assert found == pytest.approx(really, rel=0.1)


def _spec(kind):
    return ControlSpec(kind, rank=2 if kind == "lora" else 0)


def test_attention_s_scores_are_not_held():
    query = torch.zeros(1, 2, 4096, 4)
    assert held_by(lambda: nn.functional.scaled_dot_product_attention(query, query, query)) < 2 * query.nbytes
    with memory._WithoutScores():
        meta = query.to("meta")
        assert nn.functional.scaled_dot_product_attention(meta, key=meta, value=meta).shape == query.shape


@pytest.fixture
def quick(monkeypatch):
    """Instead of a trial: 1 MB a picture for prompts, 5 in a step, 9 for the VAE, a third of it in tiles."""

    def most(trial, part, mode):
        each = {"text": 1, "denoiser": 5, "vae": 9 if mode == "fast" else 3}[part]
        return 10**6 * each * trial._work.pictures

    monkeypatch.setattr(memory._Trial, "_most", most)


def test_weights_are_summed_and_only_those_that_are_there_count(quick, base):
    control = new_control(base)
    work = Work((32, 32), [(control, {"": 3})])
    sizes = {name: bytes_of([network]) for name, network in base.networks().items()} | {"control": bytes_of([control])}
    assert sizes["unet"] == sum(value.numel() * 4 for value in base.unet.state_dict().values())
    fast = estimate(base, work, "fast")
    assert fast.weights == sizes and set(fast.resident.values()) == {sum(sizes.values())}
    on_cpu = estimate(base, work, "balanced")
    assert on_cpu.resident == fast.resident, "nothing is moved there"
    base.place(None, GPU)
    there = {"text": sizes["text_encoder"], "denoiser": sizes["unet"] + sizes["control"], "vae": sizes["vae"]}
    assert estimate(base, work, "balanced").resident == there
    low = estimate(base, work, "low")
    layers = [one for network in (base.unet, control) for one in network.modules() if isinstance(one, nn.Conv2d)]
    largest = max(layer.weight.nbytes + layer.bias.nbytes for layer in layers)
    assert low.resident == there | {"denoiser": largest}
    assert fast.peak == max(fast.held.values()) + sum(sizes.values())


def test_tiles_of_large_pictures_take_less_as_estimated(base):
    base.vae.tile_sample_min_size, base.vae.tile_latent_min_size = 32, 8
    work = Work((96, 96), pictures=2)
    whole, tiled = (estimate(base, work, mode).held["vae"] for mode in ("fast", "balanced"))
    latents = torch.zeros(2, *base.latent_shape(work.size))
    base.place("balanced")
    really = held_by(lambda: base.decode_latents(latents * 1))
    assert really < tiled < 2.2 * really and tiled < 0.5 * whole


def test_the_first_mode_that_fits_is_chosen(quick, base, monkeypatch):
    base.place(None, GPU)
    work = Work((32, 32))
    peaks = [estimate(base, work, mode).peak for mode in MODES]
    assert peaks[0] > peaks[1] > peaks[2]
    for free, mode in ((1.2 * peaks[0], "fast"), (1.2 * peaks[1], "balanced"), (1.2 * peaks[2], "low"), (1, "low")):
        monkeypatch.setattr(memory, "free_bytes", lambda *given, free=free: int(free))
        found = fastest(base, work)
        assert found.mode == mode and found.fits == (free > 1)


def test_as_many_pictures_at_once_as_fit(quick, base, monkeypatch):
    work = Work((32, 32))
    three = estimate(base, Work((32, 32), pictures=3), "fast")
    monkeypatch.setattr(memory, "free_bytes", lambda *given: int(1.1 * three.peak * 1.01))
    found = fitting(base, work, "fast", 8)
    assert found.pictures == 3 and found.peak == pytest.approx(three.peak, rel=0.01)
    assert fitting(base, work, "fast", 2).pictures == 2
    monkeypatch.setattr(memory, "free_bytes", lambda *given: 0)
    assert fitting(base, work, "fast", 8).pictures == 1


def test_where_memory_is_ample_nothing_is_estimated(base, monkeypatch):
    work = Work((32, 32))
    rough = bytes_of(base.networks().values()) + 8192 * 32 * 32 * 2
    for free, roomy in ((4 * rough + 4, True), (4 * rough, False)):
        monkeypatch.setattr(memory, "free_bytes", lambda *given, free=free: free)
        assert is_roomy(base, work) == roomy
    assert estimate(base, work, "fast").peak < rough


def test_a_plan_in_words():
    gib = 2**30
    weights = {"vae": gib, "unet": 4 * gib}
    held = {"text": 0, "denoiser": gib, "vae": 2 * gib}
    fast = Estimate("fast", weights, held, dict.fromkeys(held, 5 * gib), 12 * gib)
    assert fast.lines() == [
        "memory fast: at most 7.00 GiB of 12.00 GiB.",
        "  vae                                    1.00 GiB",
        "  unet                                   4.00 GiB",
        "  beside weights, pictures are decoded   2.00 GiB",
    ]
    moved = Estimate("balanced", weights, held, {"text": 0, "denoiser": 4 * gib, "vae": gib}, 5 * gib, 2)
    assert moved.peak == 5 * gib and not moved.fits
    assert moved.lines()[0] == (
        "memory balanced: 2 pictures at once, at most 5.00 GiB of 5.00 GiB; of the weights 4.00 GiB at a time. "
        "That may not fit."
    )
    assert moved.lines()[-1] == "  beside weights, in a step   1.00 GiB"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["toy", "xl"])
def test_a_narrow_base_computes_the_same_under_autocast_and_holds_half(kind, toy_folder, xl_folder):
    base = load_base(toy_folder if kind == "toy" else xl_folder)
    torch.manual_seed(5)
    for value in base.unet.parameters():  # no number of a half format
        value.mul_(1 + 0.01 * torch.rand(value.shape))
    held, digest = bytes_of([base.unet]), base.digest
    narrow = narrowed(base, torch.bfloat16)
    inputs = draw_inputs(base)[:3]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert narrow.predict(*inputs).equal(base.predict(*inputs))
    assert bytes_of([narrow.unet]) < 0.52 * held and bytes_of([base.unet]) == held, "a copy"
    assert narrow.digest == digest and narrow.dtype == torch.float32
    assert narrow.vae.encoder.conv_in.weight.data_ptr() == base.vae.encoder.conv_in.weight.data_ptr(), "shared"
    assert narrow.encoder.conv_in is narrow.unet.conv_in
