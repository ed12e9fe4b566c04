"""AdamW and Muon behind one step: what is moved by which, and going on from a state."""

import pytest
import torch
from torch import nn

from controlkit.optimizers import Average, Optimizer


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.ModuleDict({"conv_in": nn.Conv2d(3, 4, 3), "inner": nn.Conv2d(4, 4, 3)})


def make_step(module, optimizer, rate=1e-2):
    module["inner"](module["conv_in"](torch.ones(1, 3, 8, 8))).square().mean().backward()
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


def test_adamw_is_torch_s_own(module):
    before = weights(module)
    make_step(module, Optimizer(module, "adamw", (0.9, 0.99), 0.1))
    ours = weights(module)
    module.load_state_dict(before)
    theirs = torch.optim.AdamW(module.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    module["inner"](module["conv_in"](torch.ones(1, 3, 8, 8))).square().mean().backward()
    theirs.step()
    assert all(torch.allclose(ours[name], p, atol=1e-7) for name, p in module.named_parameters())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_going_on_from_a_state_is_going_on(module, name):
    optimizer = Optimizer(module, name)
    for _ in range(3):
        make_step(module, optimizer)
    kept, state = weights(module), {key: value.clone() for key, value in optimizer.state().items()}
    make_step(module, optimizer)
    wanted = weights(module)

    module.load_state_dict(kept)
    other = Optimizer(module, name)
    other.restore(state)
    make_step(module, other)
    assert all(torch.equal(p, wanted[key]) for key, p in module.named_parameters())

    module.load_state_dict(kept)
    make_step(module, Optimizer(module, name))
    assert not all(torch.equal(p, wanted[key]) for key, p in module.named_parameters()), "a fresh one is not"


def test_an_average_forgets_the_start_and_then_follows_slowly():
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(100.0)
    average = Average(module, 0.9)
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
