"""The controls of a batch: what each adds at which step, with its hint read once."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from controlkit.backbones import ActiveControl, Backbone
from controlkit.branch import in_rows
from controlkit.errors import Invalid
from controlkit.sample.prepare import PreparedControl, SamplingSettings
from controlkit.sample.scales import scale_table
from controlkit.sample.tiles import Tile

HintTensors = Tensor | Mapping[str, Tensor]
"""A control's hints (B, channels, H, W) as its network reads them; a Union's by type."""


class Steering(NamedTuple):
    """One control of a batch of B pictures."""

    control: PreparedControl
    hints: HintTensors
    """In its contracts' ranges."""
    region: Tensor | None = None
    """Where it acts, (B, 1, H, W) in [0, 1], of any size; None is everywhere."""
    scales: Tensor | None = None
    """Broadcastable to (row, tap, step, h, w), taps as the base's; by default ``scale_table``'s."""

    def part(self, tile: Tile, stride: int, size: tuple[int, int]) -> "Steering":
        """The same of a tile of pictures of ``size`` (height, width in latents)."""
        region = None if self.region is None else tile.of_region(self.region, size)
        if self.scales is not None and self.scales.shape[-2:] != (1, 1):
            raise Invalid("Scales by place are of whole pictures: give them as a region, or make no tiles.")
        return self._replace(hints=tile.of_hints(self.hints, stride), region=region)


class Acting:
    """The controls of a batch over the steps of a run."""

    def __init__(
        self, base: Backbone, controls: Sequence[Steering], settings: SamplingSettings, count: int, span: range
    ) -> None:
        """Read the hints of ``count`` pictures, for the steps in ``span``."""
        self._base, self._controls = base, controls
        times = len(settings.weights) + settings.is_guided
        self._unconditional = count if settings.is_guided else 0
        table = scale_table([one.control for one in controls], base.taps, times * count, self._unconditional, settings)
        full = (times * count, len(base.taps), settings.steps)
        given = [own if one.scales is None else one.scales for one, own in zip(controls, table, strict=True)]
        scales = [one.expand(*full, *one.shape[-2:]) for one in given]
        # Asked now, on the CPU: asking a GPU at each step would wait for it.
        self._used = [_steps_of(one) for one in scales]
        self._halved = [_steps_of(one[: self._unconditional]) for one in scales]
        self.changed = {step for one in scales for step, is_new in enumerate(_changes(one), 1) if is_new}
        """The steps at which controls act otherwise than at the step before."""
        self._scales = [one.to(base.device) for one in scales]
        rows = count if base.shares_rows else times * count
        base.bring("denoiser")  # and the controls with it
        with base.inference():
            self._features = [
                in_rows(_encoded(one.control, one.hints), rows) if any(used[k] for k in span) else {}
                for one, used in zip(controls, self._used, strict=True)
            ]
        everywhere = torch.ones(1, device=base.device)
        regions = [one.region for one in controls]
        self._where = [everywhere if one is None else one.to(base.device).repeat(times, 1, 1, 1) for one in regions]

    def at(self, step: int) -> list[ActiveControl]:
        """The controls that act at a step, each with its scales there."""
        found = []
        for i, one in enumerate(self._controls):
            if self._used[i][step]:
                here = self._scales[i][:, :, step]
                taps = {tap.name: here[:, k, None] * self._where[i] for k, tap in enumerate(self._base.taps)}
                network = one.control.network
                apart = self._base.shares_rows and not network.walks and not self._halved[i][step]
                silent = self._unconditional if apart else 0
                found.append(ActiveControl(network, self._features[i], taps, silent))
        return found


def _encoded(control: PreparedControl, hints: HintTensors) -> HintTensors:
    """The features of hints, read once for all steps."""
    return control.network.encode_hint(hints, *([control.strengths] if control.strengths else []))


def _steps_of(scales: Tensor) -> list[bool]:
    """Whether scales (row, tap, step, h, w) add anything at each step."""
    return scales.ne(0).any(-1).any(-1).any(0).any(0).tolist()


def _changes(scales: Tensor) -> list[bool]:
    """Whether scales (row, tap, step, h, w) are others at each step, from the second, than at the one before."""
    return scales.diff(dim=2).ne(0).any(-1).any(-1).any(0).any(0).tolist()
