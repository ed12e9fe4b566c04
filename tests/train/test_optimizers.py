"""Five optimizers behind one step: what is moved by which, and going on from a state."""

import copy
import sys
from typing import get_args

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from controlkit.errors import UserError
from controlkit.train.optimizers import EMA, Optimizer, OptimizerName, state_bytes


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.ModuleDict({"conv_in": nn.Conv2d(3, 32, 3), "inner": nn.Conv2d(32, 32, 3), "more": nn.Conv2d(32, 32, 3)})


def make_step(module, optimizer, rate=1e-2):
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(2, 3, 8, 8, generator=generator)
    module["more"](module["inner"](module["conv_in"](picture))).square().mean().backward()
    optimizer.step(rate)


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_muon_moves_inner_matrices_by_an_equal_amount_in_every_direction_and_adamw_the_rest(module):
    before = weights(module)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape)
    Optimizer(module, "muon", weight_decay=0.0).step(1e-2)
    after = weights(module)
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert all(p.grad is None for p in module.parameters())
    moved = torch.linalg.svdvals((after["inner.weight"] - before["inner.weight"]).flatten(1))
    assert moved.max() < 2 * moved.min(), "orthogonal, nearly: Newton and Schulz stop early"
    for name in ("conv_in.weight", "inner.bias"):  # AdamW's first step is the rate in every coordinate
        assert (after[name] - before[name]).abs().median().item() == pytest.approx(1e-2, rel=0.01)


def test_weights_with_channels_last_are_moved_all_the_same(module):
    module.requires_grad_(True)
    other = nn.ModuleDict({name: copy.deepcopy(layer) for name, layer in module.items()})
    make_step(module, Optimizer(module, "muon"))
    other.to(memory_format=torch.channels_last)
    make_step(other, Optimizer(other, "muon"))
    pairs = zip(module.parameters(), other.parameters(), strict=True)  # Muon computes in bfloat16
    assert all(torch.allclose(p, q, atol=1e-3) for p, q in pairs)


def test_adamw_is_torch_s_own(module):
    before = weights(module)
    make_step(module, Optimizer(module, "adamw", (0.9, 0.99), 0.1))
    ours = weights(module)
    module.load_state_dict(before)
    theirs = torch.optim.AdamW(module.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    make_step(module, Stepped(theirs))
    assert all(torch.allclose(ours[name], p, atol=1e-7) for name, p in module.named_parameters())


class Stepped:
    """A library's own optimizer, stepped as ours are."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, rate):
        self.optimizer.step()
        self.optimizer.zero_grad()


def library_s_own(name, module):
    import bitsandbytes
    import prodigyopt

    given = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.1}
    if name == "adamw8bit":
        return bitsandbytes.optim.AdamW8bit(module.parameters(), **given)
    return prodigyopt.Prodigy(module.parameters(), **given, safeguard_warmup=True, use_bias_correction=True)


@pytest.mark.parametrize("name", ["adamw8bit", "prodigy"])
def test_a_library_s_optimizer_is_the_library_s_own(module, name):
    before = weights(module)
    ours = Optimizer(module, name, (0.8, 0.9), 0.1, 1e-4)
    for _ in range(3):
        make_step(module, ours)
    moved = weights(module)
    module.load_state_dict(before)
    theirs = Stepped(library_s_own(name, module))
    for _ in range(3):
        make_step(module, theirs)
    assert all(torch.equal(moved[key], p) and not torch.equal(before[key], p) for key, p in module.named_parameters())


def test_adafactor_keeps_a_row_and_a_column_of_a_convolution_s_matrix(module):
    optimizer = Optimizer(module, "adafactor")
    make_step(module, optimizer)
    sizes = {tuple(value.shape) for value in optimizer.state().values() if value.ndim > 1}
    assert sizes == {(32, 1), (1, 27), (1, 288)}


def test_prodigy_finds_its_rate(module):
    optimizer = Optimizer(module, "prodigy", weight_decay=0.0)
    found = []
    for _ in range(30):
        make_step(module, optimizer, 1.0)
        found.append(optimizer.state()["0.all.d"].item())
    assert found[0] < 1e-5 and found[-1] > 3 * found[0]


@pytest.mark.parametrize(("name", "library"), [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")])
def test_an_optimizer_whose_library_is_missing_says_what_to_install(name, library, module, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"{library}'s. Install it with: pip install 'controlkit\[optimizers\]'"):
        Optimizer(module, name)


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_the_memory_of_a_state_is_foreseen(module, name):
    optimizer = Optimizer(module, name)
    make_step(module, optimizer)
    held = sum(value.numel() * value.element_size() for value in optimizer.state().values())
    levels = 2 * 2 * 256 * 4 if name == "adamw8bit" else 0  # shared while it runs, written with each weight
    assert state_bytes(module, name) == pytest.approx(held - levels, rel=0.02)


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_going_on_from_a_state_is_going_on(module, name):
    optimizer = Optimizer(module, name)
    for _ in range(3):
        make_step(module, optimizer)
    kept, state = weights(module), load(save({key: value.contiguous() for key, value in optimizer.state().items()}))
    make_step(module, optimizer)
    wanted = weights(module)

    module.load_state_dict(kept)
    other = Optimizer(module, name)
    other.restore(state)
    again = other.state()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], kept) and again[key].dtype == kept.dtype for key, kept in state.items())
    make_step(module, other)
    assert all(torch.equal(p, wanted[key]) for key, p in module.named_parameters())

    module.load_state_dict(kept)
    make_step(module, Optimizer(module, name))
    assert not all(torch.equal(p, wanted[key]) for key, p in module.named_parameters()), "a fresh one is not"


def test_an_average_forgets_the_start_and_then_follows_slowly():
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(100.0)
    average = EMA(module, 0.9)
    for step in range(1, 41):
        module.weight.data.fill_(float(step))
        average.update(module, step)
    wanted = 100.0
    for step in range(1, 41):
        keep = min(0.9, (1 + step) / (10 + step))
        wanted = keep * wanted + (1 - keep) * step
    assert average.module.weight.item() == pytest.approx(wanted, rel=1e-5)
    assert 28 < wanted < 36 and not average.module.weight.requires_grad
    assert module.weight.item() == 40, "the module itself is not touched"
