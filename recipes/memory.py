"""The memory that pictures take on full-size bases of random weights: estimated before, measured after.

    python recipes/memory.py sd15 --size 512
    python recipes/memory.py sdxl --size 1024 --memory low --products skip

One base a process, so that nothing else counts. Weights are drawn in place, in bfloat16; a ControlNet of the base's
size steers one picture with guidance. Where a CPU has no instructions for bfloat16, its products are emulated, some
hundred times slower than float32's, with buffers that no other machine needs. There convolutions, products and
attention are computed in float32, a strip of a few megabytes at a time, and give bfloat16 back (``--products strips``).
What is held between the operations is the same; convolutions copy their input, weights and output into a layout of
their own, as oneDNN does. ``--products skip`` does all of that but the arithmetic, and gives zeros: a picture of SDXL
at 1024 pixels then takes a minute instead of an hour.
"""

import time
from contextlib import nullcontext
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.overrides import TorchFunctionMode

from controlkit.annotators import contract
from controlkit.backbones.memory import Meter, bytes_of
from controlkit.backbones.random import random_base
from controlkit.controls import new_control
from controlkit.formats import SavedControl
from controlkit.precision import bf16_pays
from controlkit.sample import ControlRequest, Memory, Request, generate, plan_memory, prepare

GIB = 2**30
STRIP = 2 * 2**20
"""Numbers of a strip's input, in float32."""


class Strips(TorchFunctionMode):
    """Products of bfloat16 in float32, a strip at a time, and bfloat16 again; or zeros in their place (``skip``)."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.skip = skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        strips = {F.conv2d: conv2d, F.linear: linear, F.scaled_dot_product_attention: attention}.get(func)
        if strips is None or args[0].is_meta or args[0].dtype != torch.bfloat16:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return strips(*args, **kwargs, skip=self.skip)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, *grouping: Any, skip: bool
) -> Tensor:
    """A convolution, some rows of the output at a time, and some channels of it."""
    (down, _), (above, beside), kernel = stride, padding, weight.shape[2]
    height = (x.shape[2] + 2 * above - kernel) // down + 1
    width = (x.shape[3] + 2 * beside - weight.shape[3]) // stride[1] + 1
    x, weight = (one.contiguous(memory_format=torch.channels_last) for one in (x, weight))
    out = torch.zeros(len(x), len(weight), height, width, dtype=x.dtype).contiguous(memory_format=torch.channels_last)
    rows = max(STRIP // (x[:, :, 0].numel() * down), 1)
    channels = max(STRIP // weight[0].numel(), 1)
    for first in range(0, 0 if skip else len(weight), channels):
        some = slice(first, first + channels)
        kernels, shift = weight[some].float(), None if bias is None else bias[some].float()
        for top in range(0, height, rows):
            last = min(top + rows, height)
            begin, end = top * down - above, (last - 1) * down + kernel - above
            strip = x[:, :, max(begin, 0) : end].float()
            strip = F.pad(strip, (beside, beside, max(-begin, 0), max(end - x.shape[2], 0)))
            out[:, some, top:last] = F.conv2d(strip, kernels, shift, stride, 0, *grouping)
    return out.contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, skip: bool) -> Tensor:
    """A matrix's product, some rows of both at a time."""
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_zeros(len(rows), len(weight))
    few, some = (max(STRIP // x.shape[-1], 1) for _ in range(2))
    for left in range(0, 0 if skip else len(weight), some):
        part = slice(left, left + some)
        kernel, shift = weight[part].float(), None if bias is None else bias[part].float()
        for top in range(0, len(rows), few):
            out[top : top + few, part] = F.linear(rows[top : top + few].float(), kernel, shift)
    return out.view(*x.shape[:-1], -1)


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *, skip: bool, **options: Any
) -> Tensor:
    """Attention, one head of one row at a time."""
    options.pop("dropout_p", None)
    out = torch.zeros_like(query)
    for row, head in () if skip else np.ndindex(*query.shape[:2]):
        one = (part[row : row + 1, head : head + 1].float() for part in (query, key, value))
        mask = None if attn_mask is None else attn_mask[row : row + 1].float()
        out[row : row + 1, head : head + 1] = F.scaled_dot_product_attention(*one, mask, **options)
    return out


def main(
    base: Annotated[str, typer.Argument(help="`sd15`, `sd21` or `sdxl`.")],
    size: Annotated[int, typer.Option(help="Side of the picture in pixels.")] = 512,
    memory: Annotated[str, typer.Option(help="`fast`, `balanced`, `low` or `auto`.")] = "fast",
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 1,
    control: Annotated[bool, typer.Option(help="Steer by a ControlNet of random weights.")] = True,
    products: Annotated[
        str | None, typer.Option(help="`own`, `strips` or `skip`; by default `strips` where bfloat16 is emulated.")
    ] = None,
    device: Annotated[str, typer.Option(help="`cpu` or `cuda`.")] = "cpu",
) -> None:
    """Print the estimate, make a picture, print what was held and by how much it differs."""
    model = random_base(base, torch.bfloat16)
    model.place(None, device)
    loaded, controls = {}, ()
    if control:
        hint = np.zeros((size, size, 3), np.uint8)
        hint[size // 4 : size // 2] = 255
        loaded = {"random": SavedControl(new_control(model).eval().requires_grad_(False), contract("canny"))}
        controls = (ControlRequest(name="random", images=hint, ready=True),)
    request = Request(prompt="a house", size=(size, size), steps=steps, guidance=4.0, controls=controls)
    prepared = prepare(model, [request], loaded)
    mode: Memory = memory  # type: ignore[assignment]  # plan_memory refuses others
    plan = plan_memory(model, prepared, mode)
    assert plan is not None, "full-size bases are always estimated"
    for line in plan.lines():
        print(line, flush=True)
    meter, started = Meter(model), time.perf_counter()
    products = products or ("own" if bf16_pays(device) else "strips")
    with nullcontext() if products == "own" else Strips(products == "skip"):
        for _ in generate(model, prepared):
            pass
    beside = bytes_of(one.branch for one in loaded.values()) if device == "cpu" else 0
    found = meter.peak() + beside
    print(
        f"measured: at most {found / GIB:.2f} GiB, the estimate is {plan.peak / found - 1:+.1%} from it; "
        f"{time.perf_counter() - started:.0f} s, products: {products}"
    )


if __name__ == "__main__":
    typer.run(main)
