"""The time and memory of controlled sampling beside diffusers', on the same random weights.

Ours and the peer's turns alternate in one process, warm; medians are compared (docs/speed.md). Both sample with one
ControlNet and guidance, from the same noise, prompts and hint.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from controlkit.annotators import contract
from controlkit.backbones import load_base
from controlkit.backbones.memory import Meter, bytes_of, high_water
from controlkit.backbones.random import draw, random_base
from controlkit.backbones.stock import stock_decode, stock_pipeline
from controlkit.controls import new_control
from controlkit.errors import OutOfRoom, one_line
from controlkit.formats import SavedControl, load_control
from controlkit.formats.networks import stock_network
from controlkit.precision import weights_type
from controlkit.sample import ControlRequest, Request, generate, prepare
from controlkit.sample.acting import Steering
from controlkit.sample.loop import Start, denoise
from controlkit.sample.pace import PACES, Pace
from controlkit.sample.texts import Said

Size = Literal["mini", "sd15", "sdxl"]
SIDES = {"mini": 128, "sd15": 512, "sdxl": 1024}
_PROMPT = "a red house beside the sea"


@dataclass(frozen=True)
class BenchPlan:
    """A benchmark to run."""

    size: Size = "mini"
    steps: int = 2
    """Sampling steps a turn."""
    turns: int = 5
    side: int | None = None
    """Of the pictures, in pixels; None is the base's own."""
    compiled: bool = False
    """Whether the peer is also measured compiled (``torch.compile``, frozen on a CPU), which takes minutes."""
    together: tuple[int, ...] = ()
    """Numbers of requests that are also made together, each with steps and guidance of its own."""
    device: str = "cpu"


class Bench:
    """A base and a control of one size, as ours and as the peer's, of the same weights."""

    def __init__(self, plan: BenchPlan, dtype: torch.dtype | None = None) -> None:
        self.plan = plan
        self.dtype = dtype or weights_type(plan.device)
        if plan.size == "mini":
            self.base = load_base("mini", plan.device, dtype=self.dtype)
            saved = load_control("canny", self.base)
        else:
            self.base = random_base(plan.size, self.dtype).to(plan.device)
            saved = SavedControl(new_control(self.base).eval().requires_grad_(False), contract("canny"))
            draw(saved.branch)
        self.side = plan.side or (self.base.size if plan.size == "mini" else SIDES[plan.size])
        hint = np.zeros((self.side, self.side, 3), np.uint8)
        hint[self.side // 4 : self.side // 2] = 255
        self.control = saved
        control = ControlRequest(name="canny", images=hint, ready=True, hint_cfg_scale=1.0)
        self.request = Request(prompt=_PROMPT, size=(self.side, self.side), steps=plan.steps, controls=(control,))
        self.noise = torch.randn(1, *self.base.latent_shape((self.side, self.side)), generator=_seeded())
        self.hint = saved.hint.tensor(hint, (self.side, self.side))

    # --- ours

    def ours(self, steps: int | None = None, pace: Pace | None = None) -> Tensor:
        """Final latents of a run of ours, exact or with a pace."""
        request = self.request.model_copy(update={"steps": steps or self.plan.steps})
        [one] = prepare(self.base, [request], {"canny": self.control})
        size = (self.side, self.side)
        text = Said(self.base, [one.script], True, size)
        hints = self.base.hint_input(self.hint.to(self.base.device, self.base.dtype))
        start, settings = Start(self.noise.to(self.base.device)), replace(one.settings, pace=pace)
        for done in denoise(self.base, start, text, [Steering(one.controls[0], hints)], settings):
            latents = done.latents
        return latents

    def made(self, count: int) -> None:
        """Make so many requests, each with a prompt, a seed, steps and guidance of its own, decoded."""
        changes = [
            {"prompt": f"{_PROMPT}, {i}", "seed": i, "steps": self.plan.steps + i % 2, "guidance": 4 + i / 4}
            for i in range(count)
        ]
        requests = [self.request.model_copy(update=own) for own in changes]
        prepared = prepare(self.base, requests, {"canny": self.control})
        deque(generate(self.base, prepared, mixed=True), 0)

    # --- the peer

    @cached_property
    def pipeline(self) -> Any:
        """diffusers' pipeline on the base's own networks, with the control as a ``ControlNetModel``.

        On a CPU its weights are the control's own, not copies: in float32 SDXL has no room for both in 24 GB.
        """
        network = stock_network(self.control.branch, self.base, self.control.hint)
        _hold_the_same(network, self.control.branch)
        return stock_pipeline(self.base, network.to(self.base.device, self.dtype))

    def theirs(self) -> Tensor:
        """Final latents of a run of the peer's."""
        return self.pipeline(
            prompt=_PROMPT,
            image=self.hint.to(self.base.device, self.dtype),
            height=self.side,
            width=self.side,
            num_inference_steps=self.plan.steps,
            guidance_scale=self.request.guidance,
            latents=self.noise.to(self.base.device, self.dtype),
            output_type="latent",
        ).images

    def theirs_in_float32(self) -> Tensor:
        """The same in float32, to which the networks of both are brought for good."""
        for network in self.pipeline.components.values():
            if isinstance(network, nn.Module):
                network.float()
        self.dtype = torch.float32
        return self.theirs()

    def laid_out(self, layout: torch.memory_format) -> None:
        """Bring the networks of both to a layout, as its documentation has it."""
        networks: list[Any] = [self.base.denoiser, self.pipeline.controlnet, self.base.networks()["vae"]]
        for network in networks:
            network.to(memory_format=layout)

    def decode(self) -> None:
        """Decode the noise."""
        with torch.no_grad(), self.base.inference():
            self.base.decode_latents(self.noise.to(self.base.device, self.dtype))

    def decode_theirs(self) -> None:
        """Decode the noise as the peer does."""
        stock_decode(self.pipeline, self.noise.to(self.base.device, self.dtype))


def _hold_the_same(network: nn.Module, other: nn.Module) -> None:
    """Have a network hold the very parameters of another one whose memory it shares.

    Or else a change of the layout of one would copy them.
    """
    held = {(one.data_ptr(), one.shape): one for one in other.parameters()}
    for module in network.modules():
        for name, own in module.named_parameters(recurse=False):
            if (one := held.get((own.data_ptr(), own.shape))) is not None:
                module.register_parameter(name, one)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def timed(work: Callable[[], object], device: str) -> float:
    """The seconds that some work takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def alternating(systems: dict[str, Callable[[], float]], turns: int) -> Iterator[tuple[str, float]]:
    """(system, its seconds), turn by turn; the first turn of each is its warm-up, and left out."""
    for turn in range(turns + 1):
        for name, run in systems.items():
            seconds = run()
            if turn:
                yield name, seconds


def bench_sample(plan: BenchPlan, told: Callable[[str], None] = lambda words: None) -> dict[str, Any]:
    """The facts of a benchmark, ready for JSON: medians, spreads and ratios of seconds a step, memory, the machine."""
    told("the memory and the first step of each, in a process of its own")  # as the networks here leave too little
    alone = {system: _alone(plan, system) for system in ("exact", "diffusers")}
    bench = Bench(plan)
    told(f"{plan.size}, {bench.side} pixels, {_name(bench.dtype)}, {plan.steps} steps a turn, {plan.turns} turns")
    latents = bench.ours().float(), bench.theirs().float()
    told("one turn to warm up, which is not counted")
    layouts = {"diffusers": torch.contiguous_format, "diffusers channels-last": torch.channels_last}
    plain = {name: getattr(bench.pipeline, name) for name in ("unet", "controlnet")}

    def peer(layout: torch.memory_format, networks: dict[str, Any]) -> float:
        bench.laid_out(layout)
        for name, network in networks.items():
            setattr(bench.pipeline, name, network)
        try:
            return timed(bench.theirs, plan.device) / plan.steps
        finally:
            for name, network in plain.items():
                setattr(bench.pipeline, name, network)

    def ours(steps: int = plan.steps, pace: Pace | None = None) -> float:
        bench.laid_out(torch.channels_last)  # as locked weights come to lie on a CPU at the first step
        return timed(partial(bench.ours, steps, pace), plan.device)

    systems: dict[str, Callable[[], float]] = {name: partial(peer, layout, plain) for name, layout in layouts.items()}
    if plan.compiled:
        compiled = {name: torch.compile(one, options=_COMPILED[plan.device]) for name, one in plain.items()}
        systems["diffusers compiled"] = partial(peer, torch.channels_last, compiled)
    systems["exact"] = lambda: ours() / plan.steps
    systems["all, then reused"] = partial(ours, 2, Pace(1.0, 0))
    systems["all, then the finest level"] = partial(ours, 2, Pace(1.0, 0, deep=1.0))
    decoders: dict[str, Callable[[], float]] = {
        "decode": partial(timed, bench.decode, plan.device),
        "decode, diffusers": partial(timed, bench.decode_theirs, plan.device),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*systems, *decoders)}
    for name, taken in chain(alternating(systems, plan.turns), alternating(decoders, min(plan.turns, 2))):
        seconds[name].append(taken)
        told(f"{name}: {taken:.3f} s")
    bench.laid_out(torch.contiguous_format)
    report, throughput = _report(plan, bench, seconds), _throughput(bench, told)
    if bench.dtype != torch.float32:  # last, as the weights stay in float32
        report |= _beside_float32(bench, *latents, report["seconds_a_step"]["exact"], told)
    return report | {
        "distance": _distance(*latents),
        "pictures_a_minute": throughput,
        "memory": {system: one.memory for system, one in alone.items()},
        "memory_ratio": alone["exact"].memory / alone["diffusers"].memory,
        "seconds_of_first_step": {system: one.seconds for system, one in alone.items()},
        "ratio_first_step": alone["diffusers"].seconds / alone["exact"].seconds,
    }


def _throughput(bench: Bench, told: Callable[[str], None]) -> dict[int, float]:
    """Pictures a minute, by how many requests are made together: the median of the turns."""
    counts, device = bench.plan.together, bench.plan.device
    works: dict[str, Callable[[], float]] = {str(n): partial(timed, partial(bench.made, n), device) for n in counts}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for name, taken in alternating(works, bench.plan.turns):
        seconds[name].append(taken)
        told(f"{name} together: {taken:.3f} s")
    return {int(name): 60 * int(name) / statistics.median(taken) for name, taken in seconds.items()}


_COMPILED: dict[str, dict[str, Any]] = {"cpu": {"freezing": True}, "cuda": {"triton.cudagraphs": True}}


def _distance(latents: Tensor, exact: Tensor) -> float:
    """The relative L2 distance of latents from others."""
    return float((latents - exact).norm() / exact.norm())


def _beside_float32(
    bench: Bench, ours: Tensor, theirs: Tensor, seconds: float, told: Callable[[str], None]
) -> dict[str, float]:
    """The peer in float32: how far we are from its latents, over its own distance in half precision; and its time over
    our seconds a step. Nothing where there is no memory for it."""
    networks = [one for one in bench.pipeline.components.values() if isinstance(one, nn.Module)]
    grows = sum(weight.numel() * 4 for network in networks for weight in network.parameters()) - bytes_of(networks)
    if grows > 0.9 * Meter(bench.base).free():
        told(f"not beside float32: the peer takes {grows / 1e9:.1f} GB more there, which are not free")
        return {}
    told("the peer in float32, to compare with")
    exact = bench.theirs_in_float32().float()
    taken = timed(bench.theirs, bench.plan.device) / bench.plan.steps
    distance = _distance(ours, exact) / _distance(theirs, exact)
    return {"distance_ratio": distance, "ratio_eager_fp32": taken / seconds}


def _report(plan: BenchPlan, bench: Bench, seconds: dict[str, list[float]]) -> dict[str, Any]:
    middle = {name: statistics.median(taken) for name, taken in seconds.items()}
    spread = {name: [min(taken), max(taken)] for name, taken in seconds.items()}
    peers = [name for name in seconds if name.startswith("diffusers")]
    best = min(peers, key=lambda name: middle[name])
    exact = middle["exact"]
    reused, finest = (middle[f"all, then {rest}"] - exact for rest in ("reused", "the finest level"))
    paced = {name: _paced(pace, exact, reused, finest) for name, pace in PACES.items()}
    rate = _rate(bench.dtype, plan.device)
    flops = _flops(bench)
    half = bench.dtype != torch.float32
    return {
        "size": plan.size,
        "side": bench.side,
        "format": _name(bench.dtype),
        "seconds_a_step": middle | {f"{name}, of 20 steps": taken for name, taken in paced.items()},
        "spread": spread,
        "best_peer": best,
        "ratio_best": middle[best] / exact,
        "ratio_eager_bf16": middle["diffusers"] / exact if half else None,
        "ratio_eager_fp32": None if half else middle["diffusers"] / exact,
        "distance_ratio": None,
        "ratio_fast": middle[best] / paced["fast"],
        "ratio_turbo": middle[best] / paced["turbo"],
        "ratio_decode": middle["decode, diffusers"] / middle["decode"],
        "share_of_limit": flops / rate / exact,
        "flops_a_step": flops,
        "rate_of_a_product": rate,
        "machine": machine(plan.device),
        "plan": asdict(plan),
    }


def _paced(pace: Pace, all_: float, reused: float, finest: float) -> float:
    """Seconds a step in a run of 20 steps, of those of a step that computes all, and of the two kinds that reuse."""
    fresh, whole = len(pace.fresh(20, range(20))), len(pace.whole(20, range(20)))
    return (fresh * all_ + (whole - fresh) * reused + (20 - whole) * finest) / 20


def _rate(dtype: torch.dtype, device: str) -> float:
    """FLOP a second in a product of two 4096 x 4096 matrices: the machine's limit."""
    a = torch.rand(4096, 4096).to(device, dtype)
    return 2 * 4096**3 / min(timed(lambda: a @ a, device) for _ in range(4))


def _flops(bench: Bench) -> float:
    """The nominal FLOPs of one step of the peer: its U-Net and ControlNet on both halves of guidance."""
    from torch.utils.flop_counter import FlopCounterMode

    shape = (2, *bench.noise.shape[1:])
    text = bench.base.encode_text([_PROMPT, ""], (bench.side, bench.side)).to(torch.device("meta"))
    extra: dict[str, Any] = {}
    if text.pooled is not None:
        extra["added_cond_kwargs"] = {"text_embeds": text.pooled, "time_ids": text.sizes}
    networks: list[Any] = [bench.base.denoiser, bench.pipeline.controlnet]
    with torch.device("meta"):
        unet, control = (type(network)(**network.config) for network in networks)
    x, t = torch.empty(shape, device="meta"), torch.zeros(2, device="meta")
    hint = torch.empty(2, *bench.hint.shape[1:], device="meta")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
        control(x, t, text.tokens.float(), hint, return_dict=False, **extra)
        unet(x, t, text.tokens.float(), return_dict=False, **extra)
    return float(counter.get_total_flops())


@dataclass(frozen=True)
class Alone:
    """A system in a fresh process: one step and a picture's decoding."""

    memory: int
    """Peak bytes."""
    seconds: float
    """Of the step, the first of that process."""


def _alone(plan: BenchPlan, system: str) -> Alone:
    """Measure a system in a process of its own."""
    words = [sys.executable, "-m", "controlkit.measure.bench", system, plan.size, plan.device, str(plan.side or 0)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        last = one_line(done.stderr.strip().rpartition("\n")[2])
        raise OutOfRoom(f"The process that measures the memory of {system} ended with {done.returncode} ({last}).")
    return Alone(**json.loads(done.stdout.splitlines()[-1]))


def in_this_process(system: str, plan: BenchPlan) -> Alone:
    """Measure a system in this process, which has made no step before."""
    bench = Bench(replace(plan, steps=1))
    if system == "exact":
        seconds = timed(bench.ours, plan.device)
        bench.decode()
    else:
        bench.pipeline  # noqa: B018  # made while the control is there
        bench.control = replace(bench.control, branch=nn.Identity())  # type: ignore[arg-type]  # the peer has its own
        seconds = timed(bench.theirs, plan.device)
        bench.decode_theirs()
    return Alone(torch.cuda.max_memory_allocated() if plan.device == "cuda" else high_water(), seconds)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def machine(device: str) -> dict[str, Any]:
    """The facts of this machine that figures depend on."""
    facts = dict[str, str]()
    if (cpus := Path("/proc/cpuinfo")).exists():
        lines = (line.split(":", 1) for line in cpus.read_text(encoding="utf-8").splitlines() if ":" in line)
        facts = {key.strip(): value.strip() for key, value in lines}
    name, flags = facts.get("model name", platform.processor()), facts.get("flags", "").split()
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "cpu": name,
        "instructions": known,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    words = sys.argv[1:]
    side = int(words[3]) or None
    plan = BenchPlan(size=words[1], device=words[2], side=side)  # type: ignore[arg-type]
    print(json.dumps(asdict(in_this_process(words[0], plan))))
