"""Speed beside diffusers: both compute the same, each turn is timed, ratios are of medians."""

import json
from dataclasses import replace

import pytest
import torch

from controlkit.annotators import contract
from controlkit.backbones import load_base
from controlkit.controls import new_control
from controlkit.errors import OutOfRoom
from controlkit.formats import SavedControl
from controlkit.measure import bench
from controlkit.measure.bench import Bench, BenchPlan, alternating, bench_sample, machine
from controlkit.sample.pace import PACES, Pace

PLAN = BenchPlan(steps=3, turns=3)


@pytest.fixture
def base(request, toy_base):
    """The toy, or the one that a test names."""
    return request.getfixturevalue(request.param) if hasattr(request, "param") else toy_base


@pytest.fixture
def small(base, drawn_joins, monkeypatch):
    """A toy in ``mini``'s place, and no processes of its own to measure memory in."""
    saved = SavedControl(drawn_joins(new_control(base), 2, base).eval().requires_grad_(False), contract("canny"))
    monkeypatch.setattr(bench, "load_base", lambda *args, **options: base)
    monkeypatch.setattr(bench, "load_control", lambda *args: saved)
    alone = {"exact": bench.Alone(3, 1.0), "diffusers": bench.Alone(4, 1.5)}
    monkeypatch.setattr(bench, "_alone", lambda plan, system: alone[system])
    monkeypatch.setattr(bench, "_rate", lambda dtype, device: 1e11)  # a product that takes seconds


@pytest.mark.parametrize("base", ["toy_base", "xl_base"], indirect=True)
def test_both_compute_the_same_latents(small):
    made = Bench(PLAN)
    ours, theirs = made.ours(), made.theirs()
    assert ours.shape == theirs.shape and (ours - theirs).norm() <= 1e-4 * theirs.norm()
    assert (made.ours(pace=Pace(1.0, 0)) - theirs).norm() > 1e-4 * theirs.norm()


def test_the_peer_has_the_weights_of_the_control_and_no_copies(small):
    made = Bench(PLAN)
    network, branch = made.pipeline.controlnet, made.control.branch
    own = {id(weight) for weight in branch.parameters()}
    assert {id(weight) for weight in network.parameters()} == own
    made.laid_out(torch.channels_last)
    assert {id(weight) for weight in network.parameters()} == own and made.theirs().isfinite().all()
    assert any(weight.is_contiguous(memory_format=torch.channels_last) for weight in branch.parameters())


def test_the_report(small, run, tmp_path):
    words = []
    found = bench_sample(PLAN, words.append)
    seconds = found["seconds_a_step"]
    assert found["distance"] <= 1e-4 and found["memory_ratio"] == 0.75 and found["distance_ratio"] is None
    assert found["memory"] == {"exact": 3, "diffusers": 4} and found["ratio_first_step"] == 1.5
    assert found["ratio_best"] == min(seconds["diffusers"], seconds["diffusers channels-last"]) / seconds["exact"]
    assert found["ratio_eager_bf16"] is None and found["ratio_eager_fp32"] == seconds["diffusers"] / seconds["exact"]
    assert found["share_of_limit"] == found["flops_a_step"] / found["rate_of_a_product"] / seconds["exact"]
    fresh, whole = (len(steps(20, range(20))) for steps in (PACES["turbo"].fresh, PACES["turbo"].whole))
    reused, finest = (seconds[f"all, then {rest}"] - seconds["exact"] for rest in ("reused", "the finest level"))
    paced = fresh * seconds["exact"] + (whole - fresh) * reused + (20 - whole) * finest
    assert seconds["turbo, of 20 steps"] == pytest.approx(paced / 20)
    timed = [word for word in words if word.endswith(" s")]
    assert len(timed) == PLAN.turns * (len(found["spread"]) - 2) + 2 * 2
    assert all(low <= seconds[name] <= high for name, (low, high) in found["spread"].items())
    code, out, _ = run("bench", "sample", "--steps", 2, "--turns", 1, "--json", tmp_path / "x.json")
    assert code == 0 and "ratio_best" in out
    assert json.loads((tmp_path / "x.json").read_text())["plan"]["steps"] == 2
    assert found["pictures_a_minute"] == {}
    code, out, _ = run("bench", "sample", "--steps", 1, "--turns", 1, "--together", 1, "--together", 3)
    assert code == 0 and "pictures a minute" in out
    code, _, err = run("bench", "sample", "--size", "sd14")
    assert code == 2 and "sd15" in err


def test_half_precision_is_compared_with_the_peer_in_float32(small, toy_folder, monkeypatch):
    made = Bench(PLAN)
    exact = made.theirs()
    coarse = load_base(toy_folder, dtype=torch.bfloat16)
    monkeypatch.setattr(bench, "load_base", lambda *args, **options: coarse)
    made.control.branch.bfloat16()
    made = Bench(PLAN, torch.bfloat16)
    ours, theirs = made.ours().float(), made.theirs().float()
    said = []
    with monkeypatch.context() as full:
        full.setattr(bench.Meter, "free", lambda self: 0)
        assert bench._beside_float32(made, ours, theirs, 1.0, said.append) == {} and "which are not free" in said[0]
    monkeypatch.setattr(bench, "timed", lambda work, device: work() is not None and 6.0)
    ratios = bench._beside_float32(made, ours, theirs, 2.0, said.append)
    assert ratios["ratio_eager_fp32"] == 3.0 / PLAN.steps
    found = made.theirs()
    assert found.dtype == torch.float32 and (found - exact).norm() < (theirs - exact).norm() < 0.1 * exact.norm()
    ratio = ratios["distance_ratio"]
    assert ratio == pytest.approx(float((ours - found).norm() / (theirs - found).norm())) and 0.5 < ratio < 2


def test_a_process_of_its_own_is_read_by_its_last_line(monkeypatch):
    said = 'a warning\n{"memory": 5, "seconds": 0.5}\n'
    monkeypatch.setattr(bench.subprocess, "run", lambda *args, **named: bench.subprocess.CompletedProcess([], 0, said))
    assert bench._alone(PLAN, "exact") == bench.Alone(5, 0.5)


@pytest.mark.parametrize("system", ["exact", "diffusers"])
def test_a_system_alone(small, system):
    alone = bench.in_this_process(system, PLAN)
    assert alone.memory > 2**20 and 0 < alone.seconds < 60


def test_where_memory_cannot_be_measured_it_is_said_before_anything_is_timed(small, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(bench, "alternating", lambda *args: pytest.fail("timed"))
    monkeypatch.setattr(bench.sys, "executable", "false")
    with pytest.raises(OutOfRoom, match="memory of exact ended with 1"):
        bench_sample(PLAN)


def test_flops_are_those_of_the_networks(small):
    made = Bench(PLAN)
    flops = bench._flops(made)
    larger = Bench(BenchPlan(side=2 * made.side))
    assert 3.9 < bench._flops(larger) / flops < 6  # attention grows faster than pixels
    weights = sum(w.numel() for network in (made.base.unet, made.pipeline.controlnet) for w in network.parameters())
    assert flops > 2 * 2 * weights  # each weight is used once a place at least, on two rows


@pytest.mark.slow
def test_the_machine_s_limit_is_a_rate_of_products():
    assert 1e9 < bench._rate(torch.float32, "cpu") < 1e14


def test_systems_alternate_after_a_warm_up():
    calls = []
    systems = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    assert [*alternating(systems, 2)] == [("a", 3), ("b", 4), ("a", 5), ("b", 6)]
    assert calls == [*"ababab"]


def test_the_machine_is_named():
    facts = machine("cpu")
    assert facts["cpu"] and facts["threads"] == torch.get_num_threads() and facts["gpu"] is None


def test_requests_made_together_have_steps_and_guidance_of_their_own(small, monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "generate", lambda base, prepared, mixed: seen.append(prepared) or [])
    made = Bench(PLAN)
    words = []
    found = bench._throughput(replace_plan(made, (1, 4)), words.append)
    assert set(found) == {1, 4} and all(rate > 0 for rate in found.values())
    assert [len(prepared) for prepared in seen] == [1, 4] * (1 + PLAN.turns)
    assert len({(one.settings.steps, one.settings.guidance) for one in seen[1]}) == 4
    assert words[0].startswith("1 together")


def replace_plan(made, together):
    made.plan = replace(made.plan, together=together)
    return made
