"""The threads that small networks are computed on, and where large tensors lie."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from controlkit import precision


@pytest.fixture
def machine(monkeypatch):
    """``machine(cores, seconds)``: a machine of so many cores; ``seconds(threads, turn)`` an operation takes on it."""
    now, set_to, turns = [0.0], [0], [0]

    def build(cores, seconds):
        def conv2d(*given, **more):
            turns[0] += 1
            now[0] += seconds(set_to[0], turns[0])

        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
        monkeypatch.setattr(torch, "get_num_threads", lambda: set_to[0])
        monkeypatch.setattr(torch, "set_num_threads", lambda count: set_to.__setitem__(0, count))
        monkeypatch.setattr(precision.time, "perf_counter", lambda: now[0])
        monkeypatch.setattr(precision.F, "conv2d", conv2d)
        set_to[0] = cores
        return lambda: set_to[0]

    return build


SMALL = [nn.Linear(10, 10)]


@pytest.mark.parametrize(
    ("cores", "seconds", "wanted"),
    [
        (2, lambda threads, turn: 3e-4 / threads**0.6, 2),  # quiet: no speed is lost
        (2, lambda threads, turn: 3e-4 * (1 if threads == 1 else 0.98), 1),  # quiet, and more threads gain nothing
        (2, lambda threads, turn: 3e-4 if threads == 1 else 0.02, 1),  # busy: the second thread waits for its turn
        (2, lambda threads, turn: 3e-4 if threads == 1 else (2e-4 if turn // 10 % 3 else 4e-3), 1),  # busy at times
        (2, lambda threads, turn: (3e-4 if turn % 50 else 3e-2) / threads**0.6, 2),  # a hiccup
        (64, lambda threads, turn: 3e-4 / min(threads, 8) + 1e-6 * threads, 8),  # more than such operations can use
    ],
)
def test_small_networks_use_the_fewest_threads_that_lose_nothing(cores, seconds, wanted, machine):
    threads = machine(cores, seconds)
    assert precision.settle_threads(SMALL) == threads() == wanted


def test_large_networks_and_counts_that_somebody_gave_are_left_alone(machine, monkeypatch):
    threads = machine(8, lambda threads, turn: 1e-3 * threads)
    monkeypatch.setattr(precision, "SMALL", 100)
    precision.settle_threads(SMALL)
    assert threads() == 8, "110 parameters"
    monkeypatch.setattr(precision, "SMALL", 110)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        with monkeypatch.context() as patched:
            patched.setenv(name, "8")
            precision.settle_threads(SMALL)
            assert threads() == 8
    precision.settle_threads(SMALL)
    assert threads() == 1


def test_a_busy_machine_is_not_probed_for_long(machine, monkeypatch):
    asked = []
    machine(2, lambda threads, turn: asked.append(threads) or 0.1)
    precision.settle_threads(SMALL)
    assert len(asked) == 4 * 2 * 5


@pytest.mark.parametrize(
    ("device", "pays", "expected"),
    [
        ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float16),
        ("cpu", True, torch.bfloat16),
        ("cpu", False, torch.float32),
    ],
)
def test_pictures_are_made_with_the_fastest_type_of_weights(device, pays, expected, monkeypatch):
    monkeypatch.setattr(precision, "bf16_pays", lambda asked: pays and asked == device)
    assert precision.weights_type(device) == expected


_FLAGS = """
import re, controlkit, torch
tensor = torch.empty(25_000_000)
for area in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read(), flags=re.M)[1:]:
    low, high = (int(end, 16) for end in area.split()[0].split("-"))
    if low <= tensor.data_ptr() < high:
        print(area.split("VmFlags:")[1])
"""


def test_large_tensors_lie_in_huge_pages():
    if not all(Path(file).exists() for file in ("/proc/self/smaps", "/sys/kernel/mm/transparent_hugepage")):
        pytest.skip("only Linux says where memory lies")
    # In a process of its own: torch decides at its first tensor, which here was made before the package was imported.
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run([sys.executable, "-c", _FLAGS], capture_output=True, text=True, check=True, env=environment)
    assert "hg" in done.stdout.split()
