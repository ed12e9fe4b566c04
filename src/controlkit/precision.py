"""The number format and the threads that are fastest on this machine, found by probes of a fraction of a second.

bfloat16 is 5-7 times faster than float32 on a CPU with AMX, and over two hundred times slower on one with AVX2 alone
(docs/decisions.md).
"""

import os
import statistics
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_SIDE = 192  # 14 MFLOP a product: long enough to time, short even where bfloat16 is emulated
_TURNS = 12


@cache
def bf16_pays(device_type: str) -> bool:
    """Whether bfloat16 products are faster than float32 ones on ``cpu`` (probed) or ``cuda`` (asked)."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False

    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    products = {dtype: torch.ones(_SIDE, _SIDE, dtype=dtype) for dtype in best}
    for turn in range(_TURNS):  # in turn, so that a busy machine disturbs both alike
        for dtype, a in products.items():
            start = time.perf_counter()
            a @ a
            best[dtype] = min(best[dtype], time.perf_counter() - start)
        if turn and best[torch.bfloat16] > 8 * best[torch.float32]:
            break  # emulated: each further product costs tens of milliseconds
    return best[torch.bfloat16] < best[torch.float32]


HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""The formats of half precision. float16 is used only on request: it loses small numbers, so losses are scaled."""

_settled: dict[str, str] = {}


def weights_type(device_type: str) -> torch.dtype:
    """The type of weights that pictures are made with on this device: half precision where that is no slower.

    On a GPU bfloat16, or float16 on one without; on a CPU bfloat16 where it pays, else float32.
    """
    if bf16_pays(device_type):
        return torch.bfloat16
    return torch.float16 if device_type == "cuda" else torch.float32


def faster_format(device_type: str) -> str:
    """``bfloat16`` where it pays, else ``float32``."""
    return "bfloat16" if bf16_pays(device_type) else "float32"


def number_format(device_type: str) -> str:
    """The format that ``settle_format`` fixed for this process; else the faster one."""
    return _settled.get(device_type) or faster_format(device_type)


def settle_format(device_type: str, name: str) -> None:
    """Fix one format (``bfloat16``, ``float16``, ``float32``) for the rest of the process: a resumed run needs it."""
    _settled[device_type] = name


def autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast to the ``number_format`` where that is a half, else nothing."""
    half = HALVES.get(number_format(device_type))
    return torch.autocast(device_type, dtype=half) if half else nullcontext()


SMALL = 50_000_000
"""Parameters of a network whose single operations are too short to be shared by many threads."""
_GAIN = 1.05
"""How many times faster more threads must be to be worth it."""


def settle_threads(networks: Iterable[nn.Module]) -> int:
    """Use the fewest threads that these networks lose nothing by, as this machine is now, if they are small; how many.

    After each operation the threads wait for the last of them. Beside busy neighbours that one is often not running,
    and a picture of ``mini`` takes ten to a hundred times as long as on one thread. Networks of over ``SMALL``
    parameters, or on a GPU, keep all threads, and so does everyone who sets OMP_NUM_THREADS or MKL_NUM_THREADS. Another
    count rounds differently: pictures differ by a level here and there.
    """
    weights = [parameter for network in networks for parameter in network.parameters()]
    small = sum(weight.numel() for weight in weights) <= SMALL and not any(weight.is_cuda for weight in weights)
    given = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & {*os.environ}
    if small and not given and (most := torch.get_num_threads()) > 1:
        torch.set_num_threads(_fitting_threads(most))
    return torch.get_num_threads()


def _fitting_threads(most: int) -> int:
    """The fewest of ``most`` threads that are as fast as any, by the upper quartile of turns: there neighbours show."""
    counts = [*(count for count in (1, 2, 4, 8) if count < most), most]
    times: dict[int, list[float]] = {count: [] for count in counts}
    pixels, weight = torch.ones(2, 64, 16, 16), torch.ones(64, 64, 3, 3)  # a convolution of mini's, with guidance
    began = time.perf_counter()
    for turn in range(_TURNS):
        for count in counts:
            torch.set_num_threads(count)
            F.conv2d(pixels, weight, padding=1)  # threads are made at the first operation
            start = time.perf_counter()
            for _ in range(4):
                F.conv2d(pixels, weight, padding=1)
            times[count].append(time.perf_counter() - start)
        if turn >= 3 and time.perf_counter() - began > 0.3:
            break  # busy: each turn takes a while
    late = {count: statistics.quantiles(taken)[2] for count, taken in times.items()}
    return min(count for count in counts if late[count] <= _GAIN * min(late.values()))


def training_attention(device_type: str) -> AbstractContextManager[object]:
    """On a CPU attention as plain products: the fused kernel's backward pass is the slower one there.

    Measured on ``mini``'s U-Net, 64 latents of 16 x 16, two Zen 5 cores, bfloat16: 551 against 619 ms a step.
    """
    return sdpa_kernel(SDPBackend.MATH) if device_type == "cpu" else nullcontext()
