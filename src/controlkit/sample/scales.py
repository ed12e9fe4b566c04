"""How much of a control is added where and when: one table, which every kind of weighting fills."""

from collections.abc import Sequence

import torch
from torch import Tensor

from controlkit.branch import Tap
from controlkit.sample.prepare import PreparedControl, SamplingSettings


def scale_table(
    controls: Sequence[PreparedControl], taps: Sequence[Tap], rows: int, unconditional: int, settings: SamplingSettings
) -> Tensor:
    """The scale of every control on every row, tap and step: (control, row, tap, step, 1, 1).

    One formula serves all: guess mode, guidance by the hint, weights by resolution, start and end, region masks are
    ways to fill it. The first ``unconditional`` rows are guidance's unconditional half.
    """
    steps = settings.steps
    table = torch.zeros(len(controls), rows, len(taps), steps, 1, 1)
    index = {tap.name: k for k, tap in enumerate(taps)}
    made = max(settings.made, 1)
    at = (torch.arange(steps) - settings.skipped) / made  # start and end are shares of the steps that are made
    for i, control in enumerate(controls):
        active = ((at >= control.start) & (at + 1 / made <= control.end + 1e-6)).float()
        if control.by_step:
            active = active * torch.tensor(control.by_step)
        for tap, weight in zip(control.network.taps, tap_weights(control), strict=True):
            table[i, :, index[tap.name]] = weight * control.scale * active.view(-1, 1, 1)
        table[i, :unconditional] *= unconditional_share(control, settings.guidance)
    return table


SOFT = 0.825
"""How much weaker each finer tap is under soft weights (the original's guess mode, A1111's modes)."""


SOFT_ADAPTER = (0.25, 0.62, 0.825, 1.0)
"""The same for a T2I-Adapter's four taps (A1111)."""


def tap_weights(control: PreparedControl) -> list[float]:
    """The weight of each of a control's taps, in its order: the finest skip first, the middle last.

    A pooled control gives colours, not places: the same at every resolution, as released (version 1.1, shuffle), unless
    its weights are given one by one.
    """
    taps, weights = control.network.taps, [1.0] * len(control.network.taps)
    if control.guess and not control.network.pools:
        weights = torch.logspace(-1, 0, len(taps)).tolist()
    elif control.mode != "balanced" and not control.network.pools:
        softer = [SOFT**k for k in reversed(range(len(taps)))]
        adapts = control.network.spec is not None and control.network.spec.body == "adapter"
        weights = [*SOFT_ADAPTER[-len(taps) :]] if adapts else softer
    elif control.cfg_weights and not control.network.pools:
        weights = [tap.stride / min(tap.stride for tap in taps) for tap in taps]
    return [weight * own for weight, own in zip(weights, control.by_tap or [1.0] * len(taps), strict=True)]


def unconditional_share(control: PreparedControl, guidance: float) -> float:
    """The share, 0 to 1, of a control's scale that acts on guidance's unconditional half.

    A residual's first-order effect r on the prediction is, with share u:

        u r + guidance (r - u r) = r (guidance - u (guidance - 1)) = r x hint_cfg_scale

    ``hint_cfg_scale`` 1 is u = 1, as in other tools: both halves get the control. ``guidance`` is u = 0, the paper's
    other way (Section 3.4): the conditional half alone gets it.
    """
    if control.guess or control.cond_only or control.cfg_weights or control.mode == "control" or control.network.pools:
        return 0.0
    return max(guidance - control.hint_cfg_scale, 0.0) / (guidance - 1) if guidance > 1 else 1.0
