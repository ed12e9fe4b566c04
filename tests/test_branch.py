"""The paper's statements about its own construction, equation by equation."""

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import draw_inputs, relative
from controlkit.branch import ControlledBlock, ControlSpec, HintEncoder, add_residuals, zero_conv
from controlkit.controls import new_control

SPECS = [ControlSpec(*words) for words in product(("copy", "conv"), ("zero", "gaussian"), ("all", "mid"))]
SILENT = [spec for spec in SPECS if spec.join == "zero"]
LOUD = [spec for spec in SPECS if spec.join == "gaussian"]


def words(spec):
    return f"{spec.body}-{spec.join}-{spec.taps}"


def residuals_of(branch, inputs):
    x, t, text, hint = inputs
    return branch(x, t, text, branch.encode_hint(hint))


def predictions(base, branch, inputs):
    """The base's prediction with the branch and without."""
    encoded = base.encode_noise(*inputs[:3])
    return base.decode_noise(encoded, residuals_of(branch, inputs)), base.decode_noise(encoded)


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(module, before):
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


# --- Section 3.1 --------------------------------------------------------------------------------------------


class PerPixel(nn.Module):
    """A linear layer on the channels of a feature map."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x.movedim(1, -1)).movedim(-1, 1)


class Resnet(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + self.conv(F.silu(self.norm(x)))


BLOCKS = {"conv": lambda: nn.Conv2d(4, 4, 3, padding=1), "linear": PerPixel, "resnet": Resnet}


@pytest.fixture(params=BLOCKS)
def block(request):
    torch.manual_seed(0)
    return BLOCKS[request.param]()


@pytest.fixture
def x():
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def c():
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(2))


def test_a_zero_convolution_has_the_gradients_of_equation_6(x):
    conv = zero_conv(4, 5)
    x.requires_grad_(True)
    y = conv(x)
    assert y.count_nonzero() == 0
    y.sum().backward()
    assert torch.allclose(conv.weight.grad, x.detach().sum((0, 2, 3)).view(1, 4, 1, 1).expand(5, 4, 1, 1))  # dy/dw = x
    assert torch.equal(conv.bias.grad, torch.full((5,), 2.0 * 6 * 6))  # dy/db = 1
    assert x.grad.count_nonzero() == 0  # dy/dx = w = 0


def test_after_one_step_a_zero_convolution_lets_gradients_through(x):
    conv = zero_conv(4)
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    conv(x).sum().backward()
    optimizer.step()
    assert conv.weight.count_nonzero() == conv.weight.numel()
    x.requires_grad_(True)
    conv(x).sum().backward()
    assert x.grad.count_nonzero() == x.numel()


def test_a_controlled_block_is_equation_2(block, x, c):
    controlled = ControlledBlock(block, 4, condition_channels=3)
    trained = copy.deepcopy(block)  # Θc, apart from Θ
    with torch.no_grad():
        for parameter in [*trained.parameters(), *controlled.zero_in.parameters(), *controlled.zero_out.parameters()]:
            parameter.copy_(torch.randn(parameter.shape))
    controlled.copy.load_state_dict(trained.state_dict())
    z1, z2 = ((conv.weight, conv.bias) for conv in (controlled.zero_in, controlled.zero_out))
    y = block(x) + F.conv2d(trained(x + F.conv2d(c, *z1)), *z2)
    assert relative(controlled(x, c), y) <= 1e-6
    assert relative(block(x), y) > 0.1


def test_a_controlled_block_is_silent_at_birth_and_without_condition(block, x, c):
    controlled = ControlledBlock(block, 4, condition_channels=3)
    assert torch.equal(controlled(x, c), block(x))  # equation (3)
    nn.init.ones_(controlled.zero_out.weight)
    assert not torch.equal(controlled(x, c), block(x))
    assert torch.equal(controlled(x), block(x))  # equation (1)


def test_the_copy_starts_as_the_block_and_is_its_own(block):
    controlled = ControlledBlock(block, 4)
    assert not moved(controlled.copy, block.state_dict())
    locked = {id(p) for p in block.parameters()}
    assert not locked & {id(p) for p in controlled.parameters()}
    assert all(p.requires_grad for p in controlled.parameters())


def test_training_a_controlled_block_leaves_the_locked_one_as_it_was(block, x, c):
    before = snapshot(block)
    controlled = ControlledBlock(block, 4, condition_channels=3)
    born = snapshot(controlled)
    optimizer = torch.optim.AdamW(controlled.parameters(), lr=1e-2, weight_decay=0)
    order = []
    for _ in range(3):
        optimizer.zero_grad()
        controlled(x, c).square().mean().backward()
        optimizer.step()
        order.append({name.split(".")[0] for name in moved(controlled, born)})
    assert order == [{"zero_out"}, {"zero_out", "copy", "zero_in"}, {"zero_out", "copy", "zero_in"}]
    assert not moved(block, before)
    assert all(p.grad is None for p in block.parameters())


# --- Section 3.2 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SILENT, ids=words)
def test_a_branch_with_zero_joins_is_silent_at_birth(toy_base, spec):
    inputs = draw_inputs(toy_base)
    branch = new_control(toy_base, spec)
    for residual in residuals_of(branch, inputs).values():
        assert residual.count_nonzero() == 0
    assert torch.equal(*predictions(toy_base, branch, inputs))


@pytest.mark.parametrize("spec", LOUD, ids=words)
def test_a_branch_with_gaussian_joins_speaks_at_birth(toy_base, spec):
    torch.manual_seed(0)
    inputs = draw_inputs(toy_base)
    branch = new_control(toy_base, spec)
    assert all(residual.all() for residual in residuals_of(branch, inputs).values())
    assert not torch.equal(*predictions(toy_base, branch, inputs))


@pytest.mark.parametrize(("optimizer", "lr"), [(torch.optim.SGD, 10.0), (torch.optim.AdamW, 1e-2)])
def test_equations_6_to_8_the_joins_move_first_then_the_copy_then_the_hint_encoder(toy_base, optimizer, lr):
    inputs = draw_inputs(toy_base)
    branch = new_control(toy_base)
    before = snapshot(branch)
    steps = optimizer(branch.parameters(), lr=lr, weight_decay=0)
    seen = []
    for _ in range(3):
        steps.zero_grad()
        predictions(toy_base, branch, inputs)[0].square().mean().backward()
        steps.step()
        seen.append(moved(branch, before))
    last = f"hint_encoder.convs.{len(branch.hint_encoder.convs) - 1}."
    joins = {name for name in before if name.startswith("joins.")}
    copied = {name for name in before if name.startswith("body.")}
    zero = {name for name in before if name.startswith(last)}
    assert seen[0] == joins
    assert joins | zero < seen[1] <= joins | zero | copied
    assert {"body.conv_in.weight", "body.mid_block.resnets.1.conv2.weight"} <= seen[1]
    assert {name for name in before if name.startswith("hint_encoder.")} <= seen[2]


def test_training_a_branch_leaves_no_trace_in_the_base(toy_base):
    parts = {"vae": toy_base.vae, "text": toy_base.towers[0].encoder, "unet": toy_base.unet}
    before = {name: snapshot(module) for name, module in parts.items()}
    inputs = draw_inputs(toy_base)
    branch = new_control(toy_base).train()
    own = {p.data_ptr() for p in branch.parameters()}
    optimizer = torch.optim.AdamW(branch.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = predictions(toy_base, branch, inputs)[0].square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    for name, module in parts.items():
        assert not moved(module, before[name])
        assert all(p.grad is None and not p.requires_grad and p.data_ptr() not in own for p in module.parameters())
        assert not any(child.training for child in module.modules())


def test_the_body_is_a_copy_that_knows_time_and_prompt_or_convolutions_that_know_neither(toy_base, drawn_joins):
    x, t, text, hint = draw_inputs(toy_base)
    for body, knows in (("copy", True), ("conv", False)):
        branch = drawn_joins(new_control(toy_base, ControlSpec(body=body)))
        features = branch.encode_hint(hint)
        plain = branch(x, t, text, features)["middle"]
        for changed in ((x, t - 100, text, features), (x, t, text[[1, 0]], features)):
            assert torch.equal(branch(*changed)["middle"], plain) != knows
        for changed in ((x.flip(0), t, text, features), (x, t, text, features.flip(0))):
            assert not torch.equal(branch(*changed)["middle"], plain)


def test_the_taps_are_all_of_them_or_the_middle_alone(toy_base):
    inputs = draw_inputs(toy_base)
    everywhere = {tap.name: (2, tap.channels, 32 // tap.stride, 32 // tap.stride) for tap in toy_base.branch_taps}
    for body in ("copy", "conv"):
        for taps, expected in (("all", everywhere), ("mid", {"middle": everywhere["middle"]})):
            residuals = residuals_of(new_control(toy_base, ControlSpec(body=body, taps=taps)), inputs)
            assert {name: tuple(residual.shape) for name, residual in residuals.items()} == expected


def test_with_stride_8_the_hint_encoder_is_the_released_one():
    encoder = HintEncoder(3, 320, stride=8)
    layout = [(c.in_channels, c.out_channels, c.kernel_size, c.padding, c.stride[0]) for c in encoder.convs]
    path = [3, 16, 16, 32, 32, 96, 96, 256, 320]
    strides = [1, 1, 2, 1, 2, 1, 2, 1]
    assert layout == [(a, b, (3, 3), (1, 1), s) for a, b, s in zip(path, path[1:], strides, strict=False)]
    assert sum(p.numel() for p in encoder.parameters()) == 1_086_480
    zero = [not conv.weight.any() and not conv.bias.any() for conv in encoder.convs]
    assert zero == [False] * 7 + [True]


@pytest.mark.parametrize("stride", [1, 2, 4, 8, 16, 32])
def test_the_hint_encoder_halves_as_often_as_the_vae(stride):
    encoder = HintEncoder(1, 5, stride)
    assert encoder(torch.rand(1, 1, 64, 32)).shape == (1, 5, 64 // stride, 32 // stride)
    assert sum(conv.stride == (2, 2) for conv in encoder.convs) == stride.bit_length() - 1


@pytest.mark.parametrize("stride", [6, 0, 12])
def test_a_stride_that_is_no_power_of_two_is_refused(stride):
    with pytest.raises(ValueError, match=f"power of two as stride, got {stride}"):
        HintEncoder(3, 8, stride)


# --- Section 3.4 --------------------------------------------------------------------------------------------


def test_several_controls_are_the_sum_of_strength_times_residual():
    a, b, m = torch.randn(3, 2, 4, 6, 6).unbind()
    mask = torch.rand(2, 1, 6, 6)
    total = add_residuals([({"one": a}, {"one": 0.7, "two": 5.0}), ({"one": b, "two": m}, {"one": mask, "two": -1.0})])
    assert total.keys() == {"one", "two"}
    assert torch.equal(total["one"], 0.7 * a + mask * b)
    assert torch.equal(total["two"], -m)
    assert add_residuals([]) == {}
