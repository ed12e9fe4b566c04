"""Faster ways of a CPU: attention and feed-forward layers in pieces, convolutions by Winograd or as a product.

Where a piece of the work fits into the processor's caches, memory need not be fetched from the system, filled and given
back for each intermediate result, which takes longer than the arithmetic. Every rule here is one of shapes, formats and
a picture's own numbers, so that it does not depend on how busy the machine is. Figures are in docs/speed.md.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from controlkit.backbones.winograd import convolved, tile_of

_PIECE = 2**21
"""Numbers of a piece's intermediate result: they stay in the caches of two cores."""
_ROWS = 256
"""Products of a multiple of so many rows are fastest."""
_LEAST = 2.0**-100
"""Sums of powers of two between this and its inverse are exact enough: what is lost below 2^-126 is nothing to them."""


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Attention of query (B, H, N, D) to key (B, H, M, D) and value (B, H, M, E), in pieces of rows: (B, H, N, E).

    Products of matrices and powers of two, divided by their sum; a softmax where those leave the number format. Torch's
    fused kernel keeps scores in float32, but runs its small products in bfloat16 at a sixth of the machine's rate.

    Args:
        query: of one number format with the others.
        key: of any strides, as the others.
        value: one for each key.
        scale: of the scores; by default 1 / sqrt(D).
    """
    count, heads, rows, width = query.shape
    keys, scale = key.shape[2], width**-0.5 if scale is None else scale
    out = query.new_empty(count, rows, heads, value.shape[-1]).transpose(1, 2)  # heads side by side, as layers want it
    some_rows = min(rows, max(_PIECE // keys, 1))
    some_heads = min(heads, max(_PIECE // (some_rows * keys), 1))
    room = query.new_empty(some_heads * some_rows * keys)
    for i in range(count):
        for head in range(0, heads, some_heads):
            of_heads = slice(head, head + some_heads)
            across, values = key[i, of_heads].transpose(1, 2).contiguous(), _with_ones(value[i, of_heads])
            in_range = True
            for row in range(0, rows, some_rows):
                queries, written = (one[i, of_heads, row : row + some_rows] for one in (query, out))
                scores = room[: written[..., 0].numel() * keys].view(*written.shape[:2], keys)
                in_range = in_range and _by_powers(queries, across, values, scale, scores, written)
                if not in_range:
                    torch.baddbmm(scores, queries, across, beta=0, alpha=scale, out=scores)
                    torch.softmax(scores, -1, out=scores)
                    written.copy_(torch.bmm(scores, values)[..., : value.shape[-1]])
    return out


def _with_ones(value: Tensor) -> Tensor:
    """Values (H, M, E) in order, up to the next multiple of 16 columns filled with ones.

    A product takes as long with them, and finds the sum of the weights on the way.
    """
    return F.pad(value, (0, -value.shape[-1] % 16), value=1.0).contiguous()


def _by_powers(queries: Tensor, across: Tensor, values: Tensor, scale: float, scores: Tensor, out: Tensor) -> bool:
    """Attention without the search for the largest score: powers of two, divided by their sum after the product.

    Twice as fast as a softmax. Written into ``out`` if the sums lie where neither they nor the products leave the range
    of the number format; returns whether they do. ``scores``: memory to work in.
    """
    torch.baddbmm(scores, queries, across, beta=0, alpha=scale / math.log(2), out=scores)
    torch.exp2(scores, out=scores)
    found, width = torch.bmm(scores, values), out.shape[-1]
    sums = found[..., width : width + 1] if found.shape[-1] > width else scores.sum(-1, keepdim=True)
    low, high = torch.aminmax(sums)
    if not _LEAST < low.item() <= high.item() < 1 / _LEAST:
        return False
    torch.div(found[..., :width], sums, out=out)
    return True


def by_rows(layer: Callable[[Tensor], Tensor], x: Tensor, inner: int) -> Tensor:
    """A layer that reads each row of x (..., D) for itself and keeps its width, on so many rows at once as are fast.

    ``inner``: the numbers of a row at the layer's widest place.
    """
    rows = x.numel() // x.shape[-1]
    if x.device.type != "cpu" or torch.is_grad_enabled() or rows * inner <= 4 * _PIECE:
        return layer(x)
    flat = x.reshape(rows, -1)
    out, step = torch.empty_like(flat), -(-_PIECE // inner // _ROWS) * _ROWS
    for first in range(0, rows, step):
        out[first : first + step] = layer(flat[first : first + step])
    return out.view(x.shape)


def as_product(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    """The convolution of x (B, C, H, W), padded by one zero on each side, with a weight (K, C, 3, 3): (B, K, h, w).

    One product of matrices. With few places the direct way takes longer to bring the weight into its own order than to
    convolve. The result's numbers lie with the channels last, and are best to lie so in both arguments.
    """
    count, channels, height, width = x.shape
    down, across = _strided(height, stride), _strided(width, stride)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    sample, row, place, _ = padded.stride()
    strides = (sample, stride * row, stride * place, row, 1)
    patches = padded.as_strided((count, down, across, 3, 3 * channels), strides)
    matrix = weight.permute(0, 2, 3, 1).reshape(len(weight), -1)
    found = F.linear(patches.reshape(-1, 9 * channels), matrix, bias)
    return found.view(count, down, across, -1).permute(0, 3, 1, 2)


def _strided(side: int, stride: int) -> int:
    """The places on a side that a convolution of three, padded by one, makes of so many."""
    return (side - 1) // stride + 1


def _pays_as_product(x: Tensor, weight: Tensor, stride: int) -> bool:
    channels, places = min(weight.shape[:2]), math.prod(_strided(side, stride) for side in x.shape[-2:])
    return weight.shape[-2:] == (3, 3) and channels >= 256 and places <= (256 if channels >= 1024 else 64)


class FasterOnCPU(TorchFunctionMode):
    """Within it a large network's functions that gain by it are computed so, on a CPU, where no gradient is asked for.

    These are convolutions, attention in bfloat16, and divisions by one, with which diffusers' blocks end.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of torch, perhaps in the way that pays."""
        way = _WAYS.get(func)
        result = None if way is None or torch.is_grad_enabled() else way(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is None else result


def _convolution(*args: Any, **named: Any) -> Tensor | None:
    """The convolution by Winograd's algorithm in float32, as a product in bfloat16, where they pay; else None."""
    if named or len(args) != 7 or args[0].dim() != 4 or not all(isinstance(one, tuple) for one in args[3:6]):
        return None  # not as layers call it
    x, weight, bias, (stride, across), padding, dilation, groups = args
    halves = _all_are(torch.bfloat16, x, weight)
    if halves:
        _lay_out(weight, x)
    if (*padding, *dilation, groups) != (1,) * 5 or stride != across:
        return None
    if halves:
        return as_product(x, weight, bias, stride) if _pays_as_product(x, weight, stride) else None
    if stride == 1 and _all_are(torch.float32, x, weight) and not torch.is_autocast_enabled("cpu"):
        return convolved(x, weight, bias, m) if (m := tile_of(x, weight)) else None
    return None


def _lay_out(weight: Tensor, x: Tensor) -> None:
    """Have a locked weight lie with the channels last, once, if its input does: torch would copy it at each call.

    Not in float32: most convolutions go another way there, so it would take memory and save no time.
    """
    free = weight.requires_grad or torch.is_inference_mode_enabled()
    if not free and x.is_contiguous(memory_format=torch.channels_last):
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, *more: Any, scale: float | None = None, **others: Any
) -> Tensor | None:
    """The attention in pieces, where it is plain and in bfloat16; else None."""
    masked = bool(more) or others.pop("attn_mask", None) is not None
    plain = not masked and not any(others.values()) and query.dim() == 4  # no dropout, not causal, no groups of heads
    alike = query.shape[:2] == key.shape[:2] == value.shape[:2] and query.numel() and key.numel()
    if not plain or not alike or not _all_are(torch.bfloat16, query, key, value):
        return None
    return attention(query, key, value, scale)


def _division(x: Tensor, by: Any = None, **named: Any) -> Tensor | None:
    """x itself where it is divided by one: a copy takes longer than a normalisation; else None."""
    return x if not named and type(by) in (int, float) and by == 1 and x.is_floating_point() else None


def _all_are(dtype: torch.dtype, *values: Tensor) -> bool:
    return all(value.dtype == dtype and value.device.type == "cpu" for value in values)


_WAYS: dict[Any, Callable[..., Tensor | None]] = {
    F.conv2d: _convolution,
    F.scaled_dot_product_attention: _attention,
    Tensor.div: _division,
}
