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
    at = torch.arange(steps) / steps
    for i, control in enumerate(controls):
        active = (at >= control.start) & (at + 1 / steps <= control.end + 1e-6)
        own = [tap.name for tap in control.network.taps]
        # A pooled control gives colours, not places: the same at every resolution, as released (version 1.1, shuffle).
        fading = control.guess and not control.network.pools
        weights = torch.logspace(-1, 0, len(own)) if fading else torch.ones(len(own))
        for name, weight in zip(own, weights.tolist(), strict=True):
            table[i, :, index[name]] = weight * control.scale * active.float().view(-1, 1, 1)
        table[i, :unconditional] *= unconditional_share(control, settings.guidance)
    return table


def unconditional_share(control: PreparedControl, guidance: float) -> float:
    """The share, 0 to 1, of a control's scale that acts on guidance's unconditional half.

    A residual's first-order effect r on the prediction is, with share u:

        u r + guidance (r - u r) = r (guidance - u (guidance - 1)) = r x hint_cfg_scale

    ``hint_cfg_scale`` 1 is u = 1, as in other tools: both halves get the control. ``guidance`` is u = 0, the paper's
    other way (Section 3.4): the conditional half alone gets it.
    """
    if control.guess or control.network.pools:
        return 0.0
    return max(guidance - control.hint_cfg_scale, 0.0) / (guidance - 1) if guidance > 1 else 1.0
