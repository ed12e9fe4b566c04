"""The memory of requests: planned, told, and less of it where it runs out."""

import warnings

import pytest
import torch

from conftest import asked
from controlkit.backbones import load_base, memory, placement
from controlkit.controls import new_control
from controlkit.errors import OutOfRoom
from controlkit.formats import SavedControl
from controlkit.images import HintSpec
from controlkit.sample import Picture, Request, generate, loop, plan_memory, prepare
from controlkit.sample import memory as room
from controlkit.sample.memory import settle

GPU = torch.device("cpu:0")
"""In the place of a GPU: another device than ``cpu``, where networks wait."""


@pytest.fixture
def base(toy_folder):
    return load_base(toy_folder)


@pytest.fixture
def narrow(monkeypatch):
    """``narrow(free)``: a device with so many bytes; each estimate is of 8 bytes a pixel and row, and of weights."""

    def set_to(free):
        monkeypatch.setattr(memory, "free_bytes", lambda *given: free)
        pixels = lambda trial, *given: 8 * trial._work.pictures * trial._work.rows * trial._work.size[0] ** 2  # noqa: E731
        monkeypatch.setattr(memory._Trial, "_most", pixels)

    return set_to


def weights(base):
    return memory.bytes_of(base.networks().values())


def test_auto_estimates_nothing_where_there_is_room(base, monkeypatch):
    monkeypatch.setattr(room, "fastest", None)
    assert plan_memory(base.place(None, GPU), prepare(base, [Request()])) is None
    assert base.placement.mode == "fast"


def test_auto_takes_the_first_mode_that_fits_the_largest_picture(base, narrow):
    requests = prepare(base, [Request(size=size) for size in ((32, 32), (64, 64), (32, 64))])
    beside = 8 * 2 * 64 * 64
    largest = max(memory.bytes_of([one]) for one in base.networks().values())
    base.place(None, GPU)
    narrow(int(1.11 * (largest + beside)))
    plan = plan_memory(base, requests)
    assert plan.mode == base.placement.mode == "balanced" and plan.peak == largest + beside
    assert plan.pictures == settle(base, requests, 16) == 1, "one at once"
    assert settle(base, requests, 16) == 1, "from then on, too"


def test_what_is_asked_for_is_taken(base, narrow):
    narrow(10**12)
    for mode in ("balanced", "low"):
        assert plan_memory(base, prepare(base, [Request()] * 3), mode).mode == base.placement.mode == mode
    assert base.placement.at_once == 3


def test_rows_hints_and_controls_of_a_request_are_the_work(base):
    controls = [SavedControl(new_control(base, hint_channels=n).eval(), HintSpec("", channels=n)) for n in (3, 4)]
    hints = [torch.zeros(32, 32, n).numpy() for n in (3, 4)]
    request, loaded = asked(controls, hints, guidance=1.0, size=(32, 64))
    [one] = prepare(base, [request], loaded)
    work = room._work(base, one)
    assert (work.size, work.rows, work.pictures) == ((32, 64), 1, 1)
    assert [hint for _, hint in work.controls] == [{"": 3}, {"": 4}]
    two = prepare(base, [Request(prompt="a AND b", dialect="a1111")])[0]
    assert room._work(base, two).rows == 3


@pytest.fixture
def full(monkeypatch):
    """``full(modes)``: memory runs out in these modes; the modes that pictures were tried in."""
    tried = []
    real = loop.denoising

    def set_to(*modes):
        def denoising(base, *given, **more):
            tried.append(base.placement and base.placement.mode)
            if tried[-1] in modes:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            return real(base, *given, **more)

        monkeypatch.setattr(loop, "denoising", denoising)
        return tried

    return set_to


def test_where_memory_runs_out_less_is_taken_and_said(base, full):
    request = Request(steps=2, seed=3)
    [expected] = (one for one in generate(base, [request]) if isinstance(one, Picture))
    tried = full("fast", "balanced")
    base.place("fast", GPU)
    with pytest.warns(UserWarning) as said:
        [picture] = (one for one in generate(base, [request]) if isinstance(one, Picture))
    assert tried == ["fast", "balanced", "low"]
    assert [str(one.message).partition(",")[0] for one in said] == [
        "out of memory: going on with memory balanced",
        "out of memory: going on with memory low",
    ]
    assert (picture.pixels == expected.pixels).all()


def test_fewer_at_once_are_tried_first(base, full):
    tried = full("fast")
    base.place("fast", GPU)
    with pytest.warns(UserWarning, match="memory balanced"):
        list(generate(base, [Request(steps=1, seed=i) for i in range(2)]))
    assert tried[:3] == ["fast", "fast", "balanced"]


def test_a_base_that_was_never_placed_is_where_memory_runs_out(base, full, monkeypatch):
    monkeypatch.setattr(type(base), "device", GPU)
    full(None)
    with pytest.warns(UserWarning, match="going on with memory balanced"):
        list(generate(base, [Request(steps=1)]))
    assert base.placement.mode == "balanced"


def test_at_the_end_it_is_said_that_there_is_no_room(base, full):
    full("fast", "balanced", "low")
    base.place("fast", GPU)
    with warnings.catch_warnings(action="ignore"), pytest.raises(OutOfRoom, match="does not hold one picture"):
        list(generate(base, [Request(steps=1)]))


def test_networks_wait_until_it_is_known_what_is_made(base, monkeypatch):
    sent = []
    monkeypatch.setattr(placement, "send", lambda network, device: sent.append(device))
    base.place(None, GPU)
    assert not sent
    list(generate(base, [Request(steps=1)]))
    assert base.placement.mode == "fast" and set(sent) == {GPU}
