"""The ways of a CPU: the same numbers, where the rules say that they pay, and nowhere else."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from torch import nn

from conftest import relative
from controlkit.backbones import cpu, load_base, unet
from controlkit.backbones.cpu import FasterOnCPU, as_product, attention, by_rows
from controlkit.backbones.winograd import convolved
from controlkit.sample import Request, generate, pictures


def heads(*shape, dtype=torch.float64):
    """Query, key or value (B, H, N, D), lying as the layers of a U-Net leave it."""
    count, number, rows, width = shape
    return torch.randn(count, rows, number, width, dtype=dtype).transpose(1, 2)


@pytest.mark.parametrize("piece", [cpu._PIECE, 100, 7], ids=["whole", "in heads and rows", "row by row"])
@pytest.mark.parametrize(("rows", "keys"), [(9, 9), (16, 5), (1, 8)])
def test_attention_in_pieces_is_attention(rows, keys, piece, monkeypatch):
    monkeypatch.setattr(cpu, "_PIECE", piece)
    query, key, value = heads(2, 3, rows, 8), heads(2, 3, keys, 8), heads(2, 3, keys, 6)
    for scale in (None, 0.1):
        ours = attention(query, key, value, scale)
        assert torch.allclose(ours, F.scaled_dot_product_attention(query, key, value, scale=scale), atol=1e-12)
    assert ours.transpose(1, 2).is_contiguous()


def test_in_bfloat16_its_error_is_that_of_rounded_scores():
    query, key, value = (heads(1, 2, 300, 40, dtype=torch.bfloat16) for _ in range(3))
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert relative(attention(query, key, value).double(), exact) < 0.01


@pytest.mark.parametrize("width", [40, 64], ids=["sum beside the values", "sum of its own"])
def test_scores_beyond_powers_of_two_are_searched_for_the_largest(width, monkeypatch):
    """Rows of scores around +-1000, of which powers would be infinite or zero; and the rest of that head after them."""
    monkeypatch.setattr(cpu, "_PIECE", 64 * 100)
    query, key, value = (heads(2, 3, 100, width, dtype=torch.bfloat16) for _ in range(3))
    key[0, 1] = key[0, 1].abs()
    key[0, 1, 7] *= 3  # by far the largest of one row, and 0 by far that of another: no rounding changes which
    key[0, 1, 8] = 0
    query[0, 1, 70], query[0, 1, 71] = -30.0, 30.0
    soft = []
    plain = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda *args, **named: soft.append(args) or plain(*args, **named))
    ours = attention(query, key, value)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert len(soft) == 1, "one piece of one head"
    assert relative(ours.double(), exact) < 0.02
    query[0, 1, 5], query[0, 1, 70:72] = 30.0, 0.0
    attention(query, key, value)
    assert len(soft) == 3, "both pieces of that head, as those after the first are like it"


@pytest.mark.parametrize("shape", [(2, 50, 16), (1, 1, 16), (3, 7, 2, 16)])
def test_a_layer_by_rows_is_the_layer(shape, monkeypatch):
    monkeypatch.setattr(
        cpu, "_PIECE", 128 * 8
    )  # nine rows at once, three and a multiple of three, where there are over 32
    monkeypatch.setattr(cpu, "_ROWS", 3)
    layer = FeedForward(16).double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    counts = []
    layer.register_forward_pre_hook(lambda module, args: counts.append(args[0].numel() // 16))
    with torch.no_grad():
        ours = by_rows(layer, x, 128)
        assert counts == ([9] * 11 + [1] if x.numel() > 32 * 16 and len(shape) == 3 else counts)
        assert sum(counts) == x.numel() // 16 and (max(counts) <= 9 or len(counts) == 1)
        assert ours.shape == x.shape and torch.allclose(ours, layer(x), atol=1e-12)
    counts.clear()
    by_rows(layer, x, 128).sum().backward()
    assert len(counts) == 1, "all at once, where gradients are asked for"


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_as_a_product_is_the_convolution(layout, stride):
    for size in ((4, 3), (5, 8), (1, 1)):
        x, weight = torch.randn(2, 5, *size, dtype=torch.float64), torch.randn(7, 5, 3, 3, dtype=torch.float64)
        for bias in (None, torch.randn(7, dtype=torch.float64)):
            exact = F.conv2d(x, weight, bias, padding=1, stride=stride)
            laid = [value.contiguous(memory_format=layout) for value in (x, weight)]
            ours = as_product(*laid, bias, stride)
            assert ours.shape == exact.shape and torch.allclose(ours, exact, atol=1e-12)
            assert ours.is_contiguous(memory_format=torch.channels_last)


def test_in_bfloat16_few_places_and_many_channels_go_as_a_product(monkeypatch):
    seen = []
    monkeypatch.setattr(cpu, "as_product", lambda *args: seen.append(args) or as_product(*args))
    conv, down = nn.Conv2d(256, 256, 3, padding=1).bfloat16(), nn.Conv2d(256, 256, 3, 2, 1).bfloat16()
    with torch.no_grad(), FasterOnCPU():
        conv(torch.zeros(1, 256, 9, 8).bfloat16())
        nn.Conv2d(256, 16, 3, padding=1).bfloat16()(torch.zeros(1, 256, 8, 8).bfloat16())
        nn.Conv2d(256, 256, 3).bfloat16()(torch.zeros(1, 256, 8, 8).bfloat16())
        nn.Conv2d(256, 256, 3, (1, 2), 1).bfloat16()(torch.zeros(1, 256, 8, 8).bfloat16())
        conv.float()(torch.zeros(1, 256, 8, 8))
        assert not seen
        x, larger = torch.randn(1, 256, 8, 8).bfloat16(), torch.randn(1, 256, 15, 16).bfloat16()
        ours, halved = conv.bfloat16()(x), down(larger)
    assert len(seen) == 2
    with torch.no_grad():
        assert relative(ours.float(), conv(x).float()) < 0.01
        assert relative(halved.float(), down(larger).float()) < 0.01


def test_a_locked_weight_in_bfloat16_comes_to_lie_as_its_input():
    locked, learning, single = (nn.Conv2d(8, 8, 3, padding=1).bfloat16().requires_grad_(i == 1) for i in range(3))
    single.float()
    before = locked.weight.clone()
    with torch.no_grad(), FasterOnCPU():
        locked(torch.zeros(1, 8, 4, 4).bfloat16())
        assert locked.weight.is_contiguous()
        for conv in (locked, learning, single):
            conv(torch.zeros(1, 8, 4, 4).to(conv.weight.dtype).contiguous(memory_format=torch.channels_last))
    assert locked.weight.is_contiguous(memory_format=torch.channels_last) and torch.equal(locked.weight, before)
    assert learning.weight.is_contiguous(), "an optimizer may have views of it"
    assert single.weight.is_contiguous()


@pytest.fixture
def ways(monkeypatch):
    """The convolutions that went the other way."""
    seen = []
    monkeypatch.setattr(cpu, "convolved", lambda *args: seen.append(args) or convolved(*args))
    return seen


def test_only_plain_convolutions_in_float32_without_gradients_go_this_way(ways):
    x = torch.randn(1, 256, 16, 16)
    plain = nn.Conv2d(256, 256, 3, padding=1)
    others = [
        nn.Conv2d(256, 256, 1),
        nn.Conv2d(256, 256, 3),
        nn.Conv2d(256, 256, 3, padding=1, stride=2),
        nn.Conv2d(256, 256, 3, padding=2, dilation=2),
        nn.Conv2d(256, 256, 3, padding=1, groups=256),
        nn.Conv2d(256, 256, 3, padding=1, padding_mode="circular"),
    ]
    with FasterOnCPU():
        assert plain(x).requires_grad
        with torch.no_grad():
            for conv in others:
                conv(x)
            plain.to(torch.bfloat16)(x.bfloat16())
            plain.to(torch.float64)(x.double())
            with torch.autocast("cpu", torch.bfloat16):
                plain.to(torch.float32)(x)
        assert not ways
        with torch.no_grad():
            ours = plain.to(torch.float32)(x)
    assert len(ways) == 1
    with torch.no_grad():
        direct = plain(x)
    assert len(ways) == 1 and not torch.equal(ours, direct)
    assert torch.allclose(ours, direct, atol=1e-4)


@pytest.fixture
def everywhere(monkeypatch):
    """The rule for tiny networks: wherever it can be done."""
    monkeypatch.setattr(unet, "SMALL", 0)
    even = lambda x, weight: 2 if weight.shape[-2:] == (3, 3) and not (x.shape[-1] % 2 or x.shape[-2] % 2) else 0  # noqa: E731
    monkeypatch.setattr(cpu, "tile_of", even)


def test_a_large_base_on_a_cpu_makes_the_same_pictures_with_fewer_products(toy_folder, ways, everywhere, monkeypatch):
    request = Request(prompt="a red apple", steps=3)
    [ours] = pictures(generate(load_base(toy_folder), [request]))
    convolutions = len(ways)
    assert convolutions > 90
    with monkeypatch.context() as patch:
        patch.setattr(unet, "SMALL", 10**9)
        [plain] = pictures(generate(load_base(toy_folder), [request]))
    assert len(ways) == convolutions, "a small base does without"
    assert 0 < relative(ours.latents, plain.latents) < 1e-5
    assert np.abs(ours.pixels.astype(int) - plain.pixels).max() <= 1


@pytest.fixture
def pieces(monkeypatch):
    """The attentions that went in pieces."""
    seen = []
    monkeypatch.setattr(cpu, "attention", lambda *args: seen.append(args) or attention(*args))
    return seen


def test_only_plain_attention_in_bfloat16_without_gradients_goes_in_pieces(pieces):
    query, key, value = (heads(1, 2, 4, 8, dtype=torch.bfloat16) for _ in range(3))
    mask = torch.zeros(4, 4, dtype=torch.bfloat16)
    with FasterOnCPU():
        F.scaled_dot_product_attention(query.clone().requires_grad_(), key, value)
        with torch.no_grad():
            F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            F.scaled_dot_product_attention(query, key, value, is_causal=True)
            F.scaled_dot_product_attention(query, key, value, dropout_p=0.5)
            F.scaled_dot_product_attention(query[0], key[0], value[0])
            F.scaled_dot_product_attention(query.float(), key.float(), value.float())
            assert not pieces
            F.scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False)
    assert len(pieces) == 1


@torch.no_grad()
def test_functions_called_in_other_ways_are_torch_s_own(pieces):
    x, weight = torch.randn(1, 8, 8, 8), torch.randn(8, 8, 3, 3)
    query, key = heads(2, 2, 4, 8, dtype=torch.bfloat16), heads(1, 2, 4, 8, dtype=torch.bfloat16)
    calls = {
        "names": lambda: F.conv2d(input=x, weight=weight, padding=1),
        "numbers": lambda: F.conv2d(x, weight, None, 1, 1, 1, 1),
        "one picture": lambda: nn.Conv2d(8, 8, 3, padding=1)(x[0]).shape,
        "same": lambda: F.conv2d(x, weight, None, (1, 1), "same", (1, 1), 1),
        "broadcast": lambda: F.scaled_dot_product_attention(query, key, key),
        "nothing": lambda: F.scaled_dot_product_attention(query[:, :, :0], query, query),
        "rounded": lambda: torch.div(x, 1, rounding_mode="floor"),
        "other": lambda: x.div(other=1),
    }
    for name, call in calls.items():
        plain = call()
        with FasterOnCPU():
            ours = call()
        assert ours == plain if isinstance(plain, tuple) else torch.equal(ours, plain), name
    assert not pieces


def test_it_works_in_inference_mode_and_leaves_weights_alone_there():
    conv = nn.Conv2d(8, 8, 3, padding=1).bfloat16().requires_grad_(False)
    x = torch.randn(1, 8, 4, 4).bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), FasterOnCPU():
        conv(x)
    assert conv.weight.is_contiguous()


def test_a_division_by_one_makes_no_copy():
    x = torch.ones(3)
    with torch.no_grad(), FasterOnCPU():
        assert x / 1.0 is x and (x / 2.0).tolist() == [0.5] * 3
        assert (torch.ones(3, dtype=torch.long) / 1).dtype == torch.float32
    with FasterOnCPU():
        assert x / 1.0 is not x


def test_half_precision_takes_attention_and_layers_in_pieces(toy_folder, ways, pieces, everywhere, monkeypatch):
    monkeypatch.setattr(cpu, "_PIECE", 256)
    base = load_base(toy_folder, dtype=torch.bfloat16)
    [ours] = pictures(generate(base, [Request(steps=2)]))
    assert not ways and len(pieces) > 10
    count = len(pieces)
    with monkeypatch.context() as patch:
        patch.setattr(unet, "SMALL", 10**9)
        [plain] = pictures(generate(load_base(toy_folder, dtype=torch.bfloat16), [Request(steps=2)]))
    assert len(pieces) == count
    assert 0 < relative(ours.latents, plain.latents) < 0.1
