"""The table of kinds of control, and a fresh control of each body for any base."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from controlkit.backbones import Backbone
from controlkit.branch import ControlBranch, ControlNetwork, ControlSpec, low_rank
from controlkit.controls.adapter import new_adapter
from controlkit.controls.xs import new_xs
from controlkit.errors import Mismatch, Unsupported


@dataclass(frozen=True)
class ControlKind:
    """One kind of network (``ControlNetwork.kind``)."""

    name: str
    title: str
    """Its name in messages."""
    diffusers_class: str | None
    """The diffusers class of the same network; None where there is none, and no file of it."""

    def network_class(self) -> Any:
        """The diffusers class itself; ``Unsupported`` where there is none."""
        if self.diffusers_class is None:
            raise Unsupported(f"A {self.title} is not a network of diffusers.")
        import diffusers

        return getattr(diffusers, self.diffusers_class)


KINDS = {
    kind.name: kind
    for kind in (
        ControlKind("controlnet", "ControlNet", "ControlNetModel"),
        ControlKind("union", "ControlNet-Union", "ControlNetUnionModel"),
        ControlKind("union type", "type of a ControlNet-Union", None),
        ControlKind("xs", "ControlNet-XS", "ControlNetXSAdapter"),
        ControlKind("adapter", "T2I-Adapter", "T2IAdapter"),
        ControlKind("several", "set of ControlNets", None),
    )
}


def _new_copy(base: Backbone, spec: ControlSpec, hint_channels: int, size_ratio: float | None) -> ControlBranch:
    if spec.body == "lora" and base.network_config is None:
        raise Unsupported(f'A Control-LoRA is written in a U-Net\'s layout; "{base.name}" is none: train body copy.')
    body = base.conv_body() if spec.body == "conv" else base.copy_encoder()
    if spec.body == "lora":
        body = low_rank(body, spec.rank)
    channels, stride = base.hint_shape(hint_channels)
    return ControlBranch(base.branch_taps, body, stride, channels, spec)


BODIES: dict[str, Callable[[Backbone, ControlSpec, int, float | None], ControlNetwork]] = {
    "copy": _new_copy,
    "conv": _new_copy,
    "lora": _new_copy,
    "xs": new_xs,
    "adapter": new_adapter,
}
"""``ControlSpec.body`` -> a function that makes a fresh control: (base, spec, channels of the hint, an XS's width)."""


def new_control(
    base: Backbone, spec: ControlSpec | None = None, hint_channels: int = 3, size_ratio: float | None = None
) -> ControlNetwork:
    """A fresh control for this base, as ``spec`` says; silent where its joins are zero.

    ``hint_channels``: of the hint's tensor, from 1. ``size_ratio``: an XS's channels as a share of the base's, above 0
    and at most 1 (``xs.xs_settings``). Raises ``Unsupported`` where this base cannot have such a control.
    """
    spec = spec or ControlSpec()
    return BODIES[spec.body](base, spec, hint_channels, size_ratio).to(base.device, base.dtype)


def start_from(network: ControlNetwork, neighbour: ControlNetwork, name: str) -> None:
    """Put the weights of a control of the same kind, called ``name`` in messages, into ``network``.

    A control of the middle alone is reconnected (the paper's small-scale recipe, Section 4.2): joins that it lacks stay
    zero. Raises ``Mismatch`` where the two are not alike.
    """
    if neighbour.kind != network.kind:
        raise Mismatch(
            f'The control "{name}" is a {KINDS[neighbour.kind].title}; this recipe starts from a '
            f"{KINDS[network.kind].title}."
        )
    ours, theirs = network.spec, neighbour.spec
    if ours is None or theirs is None:
        raise Unsupported(f"A {KINDS[network.kind].title} has no weights of its own to start from: name its parts.")
    reconnected = replace(theirs, taps="all") if ours.join == "zero" else theirs
    if ours not in (theirs, reconnected):
        raise Mismatch(
            f'The control "{name}" is {theirs}; the recipe asks for {ours}: they must be equal, but that zero joins of '
            "the middle alone may become joins of all taps."
        )
    given, own = neighbour.state_dict(), network.state_dict()
    if any(key not in own or own[key].shape != tensor.shape for key, tensor in given.items()):
        raise Mismatch(f'The control "{name}" has another width: set control.size_ratio to what it was trained with.')
    network.load_state_dict(own | given)
