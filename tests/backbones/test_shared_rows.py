"""What does not depend on the prompt is computed once for all parts of guidance, and the prediction is the same."""

from dataclasses import replace

import pytest
import torch

from conftest import draw_inputs, relative
from controlkit.backbones import ActiveControl
from controlkit.branch import ControlSpec, in_rows
from controlkit.controls import MultiBranch, OneType, new_control, new_union

PARTS = 3  # an unconditional prompt and two that are joined
SHIFT = torch.Generator().manual_seed(3)


@pytest.fixture(params=["toy_base", "deep_base", "sd2_base", "xl_base"])
def base(request):
    return request.getfixturevalue(request.param)


@torch.no_grad()
def shaken(network):
    """A network whose zero weights are none."""
    for parameter in network.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=SHIFT))
    return network.eval().requires_grad_(False)


CONTROLS = {
    "none": lambda base: [],
    "copy": lambda base: [new_control(base)],
    "lite": lambda base: [new_control(base, ControlSpec(body="conv"))],
    "middle alone, pooled": lambda base: [new_control(base, ControlSpec(taps="mid", pool="mean"))],
    "xs": lambda base: [new_control(base, ControlSpec(body="xs"))],
    "adapter": lambda base: [new_control(base, ControlSpec(body="adapter"))],
    "union": lambda base: [OneType(new_union(base), "canny")],
    "several": lambda base: [MultiBranch({"a": new_control(base), "b": new_control(base, ControlSpec(body="conv"))})],
    "two": lambda base: [new_control(base), new_control(base)],
    "xs, copy and adapter": lambda base: [new_control(base, ControlSpec(body=b)) for b in ("xs", "copy", "adapter")],
}


def drawn(base, kind, rows=2):
    """(latents, timesteps, text of ``PARTS`` prompts a row, active controls) of ``rows`` pictures."""
    x = draw_inputs(base)[0]
    x = torch.cat([x, -x])[:rows]
    t = torch.tensor([500, 20])[:rows]
    prompts = base.encode_text([f"a {word}" for word in ("cat", "dog", "hat", "red", "blue", "big")[: rows * PARTS]])
    side = base.stride * x.shape[-1]
    controls = []
    for i, network in enumerate(CONTROLS[kind](base)):
        channels = 6 if kind == "several" else 3
        hint = torch.randn(rows, channels, side, side, generator=torch.Generator().manual_seed(i))
        controls.append(ActiveControl(shaken(network), network.encode_hint(hint)))
    return x, t, prompts, controls


@torch.no_grad()
@pytest.mark.parametrize("kind", CONTROLS)
def test_rows_given_once_are_rows_repeated(base, kind):
    x, t, text, controls = drawn(base, kind)
    shared = base.predict(x, t, text, controls)
    count = len(text)
    repeated = [replace(one, features=in_rows(one.features, count)) for one in controls]
    whole = base.predict(in_rows(x, count), in_rows(t, count), text, repeated)
    assert shared.shape == whole.shape and relative(shared, whole) < 2e-6
    if kind != "none":
        assert relative(shared, base.predict(x, t, text)) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("kind", ["copy", "lite", "adapter", "union", "several"])
def test_a_control_is_not_run_for_rows_that_it_is_silent_on(toy_base, kind, monkeypatch):
    x, t, text, [control] = drawn(toy_base, kind)
    seen = []
    real = control.network.forward
    monkeypatch.setattr(control.network, "forward", lambda *args: seen.append(len(args[2])) or real(*args))
    unconditional = len(x)
    on = (torch.arange(len(text)) >= unconditional).float().view(-1, 1, 1, 1)
    scale = {tap.name: on for tap in toy_base.taps}
    heard = toy_base.predict(x, t, text, [replace(control, scale=scale, silent=unconditional)])
    whole = toy_base.predict(x, t, text, [replace(control, scale=scale)])
    assert seen == [len(text) - unconditional, len(text)]
    assert relative(heard, whole) < 2e-6
    plain = toy_base.predict(x, t, text)
    assert relative(heard[:unconditional], plain[:unconditional]) < 2e-6 and relative(heard, plain) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("kind", ["none", "copy", "two"])
def test_the_first_blocks_run_once_a_picture(toy_base, deep_base, kind):
    """Counted: rows that the first convolution, resnet and self-attention read, in the base and in the branch."""
    for base in (toy_base, deep_base):
        x, t, text, controls = drawn(base, kind)
        bodies = [base.unet, *(control.network.body for control in controls)]
        rows = []
        hooks = []
        for body in bodies:
            block = body.down_blocks[0]
            parts = [body.conv_in, block.resnets[0]]
            if getattr(block, "attentions", None) is not None:
                first = block.attentions[0].transformer_blocks[0]
                parts += [first.attn1.to_q, first.attn2.to_q]
            hooks += [
                part.register_forward_hook(lambda m, args, out, rows=rows: rows.append(len(args[0]))) for part in parts
            ]
        base.predict(x, t, text, controls)
        for hook in hooks:
            hook.remove()
        once = [2, 2, 2, 6] if len(rows) == 4 * len(bodies) else [2, 2]
        assert rows == [*once] * len(bodies)


def test_repeated_rows_keep_their_layout():
    x = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    for layout in (torch.channels_last, torch.contiguous_format):
        repeated = in_rows({"": x.contiguous(memory_format=layout)}, 4)[""]
        assert repeated.is_contiguous(memory_format=layout) and torch.equal(repeated, torch.cat([x, x]))
    assert in_rows(x, 2) is x
