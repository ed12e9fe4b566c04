"""The memory that prepared requests take: planned before they are sampled, and less of it where it runs out."""

import warnings
from collections.abc import Sequence
from typing import Literal, get_args

from controlkit.backbones import Backbone
from controlkit.backbones.memory import Estimate, Work, estimate, fastest, fitting, is_roomy
from controlkit.backbones.placement import HOME, Mode
from controlkit.sample.prepare import Prepared, picture_size

Memory = Mode | Literal["auto"]
"""How a base's networks are placed (``Placement``); ``auto``: as fast as the device's memory lets them."""
MEMORY: tuple[Memory, ...] = ("auto", *get_args(Mode))
_MODES: dict[Mode, str] = {
    "fast": "everything on the device",
    "balanced": "prompts, steps and pictures by turns on the device",
    "low": "layers one by one on the device, pictures decoded in tiles",
}


def plan_memory(
    base: Backbone, prepared: Sequence[Prepared], memory: Memory = "auto", batch: int = 16
) -> Estimate | None:
    """Place a base as these requests need it, and estimate the memory they take; call it before ``generate``.

    The estimate is of the largest pictures, as many at once as fit, up to ``batch``. None: ``auto`` found so much
    memory that nothing had to be estimated, and all stays on the device.
    """
    passes = [one for first in prepared for one in (first, first.second) if one]
    work = max((_work(base, one) for one in passes), key=lambda work: work.rows * work.size[0] * work.size[1])
    if memory == "auto" and is_roomy(base, Work(work.size, work.controls, work.rows, batch)):
        base.place("fast")
        return None
    found = fastest(base, work) if memory == "auto" else estimate(base, work, memory)
    base.place(found.mode)
    found = fitting(base, work, found.mode, min(batch, len(prepared)))
    if base.placement:
        base.placement.at_once = found.pictures
    return found


def _work(base: Backbone, one: Prepared) -> Work:
    """The work of one picture of a request."""
    controls = [
        (control.network, {kind: spec.channels for kind, spec in control.specs.items()}) for control in one.controls
    ]
    rows = len(one.settings.weights) + one.settings.is_guided
    return Work(picture_size(base, one.settings.size), controls, rows)


def settle(base: Backbone, prepared: Sequence[Prepared], batch: int) -> int:
    """Have a base and the controls of these requests placed; how many pictures to make at once."""
    if base.placement is None or not prepared:
        return batch
    if base.placement.mode is None:
        plan_memory(base, prepared, "auto", batch)
    networks = {id(control.network): control.network for one in prepared for control in one.controls}
    base.placement.adopt(list(networks.values()))
    return min(batch, base.placement.at_once or batch)


def settle_lower(base: Backbone, prepared: Sequence[Prepared]) -> bool:
    """Where memory ran out: place a base so that it takes less, and warn of it; False where there is no way to."""
    if base.device == HOME:
        return False
    if base.placement is None:
        base.place("fast")
        settle(base, prepared, 1)
    mode = base.placement.take_lower() if base.placement else None
    if mode:
        warnings.warn(f"out of memory: going on with memory {mode}, {_MODES[mode]}, which is slower", stacklevel=3)
    return mode is not None
