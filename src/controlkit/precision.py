"""The number format that is fastest on this machine, found by a probe of a fraction of a second.

bfloat16 is 5-7 times faster than float32 on a CPU with AMX, and over two hundred times slower on one with AVX2 alone
(docs/decisions.md).
"""

import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
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


def training_attention(device_type: str) -> AbstractContextManager[object]:
    """On a CPU attention as plain products: the fused kernel's backward pass is the slower one there.

    Measured on ``mini``'s U-Net, 64 latents of 16 x 16, two Zen 5 cores, bfloat16: 551 against 619 ms a step.
    """
    return sdpa_kernel(SDPBackend.MATH) if device_type == "cpu" else nullcontext()
