"""The kinds of control there are, as rows of one table; and a fresh one of each for any base."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from controlkit.backbones import Backbone
from controlkit.branch import ControlBranch, ControlNetwork, ControlSpec, low_rank
from controlkit.controls.adapter import new_adapter
from controlkit.controls.xs import new_xs
from controlkit.errors import UserError


@dataclass(frozen=True)
class ControlKind:
    """One kind of network (``ControlNetwork.kind``)."""

    name: str
    title: str
    """What messages call it."""
    diffusers_class: str | None
    """The diffusers class of the same network; None where there is none, and no file of it."""


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
"""``ControlSpec.body`` -> what makes a fresh control of it: (base, spec, channels of the hint, an XS's width)."""


def new_control(
    base: Backbone, spec: ControlSpec | None = None, hint_channels: int = 3, size_ratio: float | None = None
) -> ControlNetwork:
    """A fresh control for this base, as ``spec`` says; silent where its joins are zero.

    ``size_ratio`` is an XS's width (``xs.adapter_config``). ``UserError`` where this base cannot have such a control.
    """
    spec = spec or ControlSpec()
    return BODIES[spec.body](base, spec, hint_channels, size_ratio).to(base.device, base.dtype)


def start_from(network: ControlNetwork, neighbour: ControlNetwork, name: str) -> None:
    """Put the weights of a control of the same kind, called ``name`` in messages, into ``network``.

    One of the middle alone is reconnected (the paper's small-scale recipe): the joins it lacks stay zero.
    ``UserError`` where the two are not alike.
    """
    if neighbour.kind != network.kind:
        raise UserError(
            f'The control "{name}" is a {KINDS[neighbour.kind].title}; this recipe starts from a '
            f"{KINDS[network.kind].title}."
        )
    ours, theirs = network.spec, neighbour.spec
    assert ours is not None and theirs is not None
    reconnected = replace(theirs, taps="all") if ours.join == "zero" else theirs
    if ours not in (theirs, reconnected):
        raise UserError(
            f'The control "{name}" is {theirs}; the recipe asks for {ours}: they must be equal, but that zero joins of '
            "the middle alone may become joins of all taps."
        )
    given, own = neighbour.state_dict(), network.state_dict()
    if any(key not in own or own[key].shape != tensor.shape for key, tensor in given.items()):
        raise UserError(f'The control "{name}" has another width: set control.size_ratio to what it was trained with.')
    network.load_state_dict(own | given)
