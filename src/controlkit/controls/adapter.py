"""T2I-Adapter: control from the hint alone, added inside the base's encoder (Mou et al., 2023).

On diffusers' own module. Its features depend on neither timestep nor prompt: they are computed once a picture.
"""

from typing import Any

from torch import Tensor

from controlkit.backbones import Backbone
from controlkit.branch import ControlNetwork, ControlSpec, Tap
from controlkit.errors import Invalid, Unsupported


class Adapter(ControlNetwork):
    """A diffusers ``T2IAdapter`` as a control.

    Its features go to the base's encoder taps in order; an SDXL one's last goes to the middle.
    """

    kind = "adapter"

    def __init__(self, network: Any, taps: tuple[Tap, ...]) -> None:
        super().__init__()
        self.spec = ControlSpec(body="adapter")
        self.network = network
        places = [tap for tap in taps if tap.site == "encoder"] + [tap for tap in taps if tap.site == "middle"]
        self.taps = tuple(places[: len(network.adapter.body)])

    def encode_hint(self, hint: Tensor) -> dict[str, Tensor]:
        """Features (B, C, h, w) by tap, of hints (B, channels, H, W); ``Invalid`` where the sides do not divide."""
        multiple = self.network.downscale_factor
        if hint.shape[-1] % multiple or hint.shape[-2] % multiple:
            raise Invalid(f"This T2I-Adapter reads sides that {multiple} divides; got {tuple(hint.shape[-2:])}.")
        return {tap.name: feature for tap, feature in zip(self.taps, self.network(hint), strict=True)}

    def forward(self, x: Tensor, t: Tensor, text: Any, hint_features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The features (B, C, h, w) by tap, as ``encode_hint`` gave them."""
        return hint_features


def feature_strides(kind: str, finest: int, levels: int) -> list[int]:
    """Pixels a place of each feature of diffusers' ``T2IAdapter`` of a kind, given the finest one's."""
    return [finest * (2 ** (level > 1) if kind == "full_adapter_xl" else 2**level) for level in range(levels)]


def new_adapter(base: Backbone, spec: ControlSpec, hint_channels: int = 3, size_ratio: float | None = None) -> Adapter:
    """A fresh T2I-Adapter, of the released shape whose features have the sizes of this base's encoder.

    ``spec`` and ``size_ratio`` leave nothing to choose here. Raises ``Unsupported`` where no released shape has them.
    """
    from diffusers import T2IAdapter

    inside = [tap for tap in base.taps if tap.site == "encoder"]
    first = inside[0].stride if inside else base.stride
    channels, steps = [tap.channels for tap in inside], [tap.stride // first for tap in inside]
    if inside and steps == [2**level for level in range(len(inside))]:
        kind = "full_adapter"
    elif steps == [1, 1, 2]:  # as SDXL's, whose fourth feature goes to the middle
        kind, channels = "full_adapter_xl", [*channels, channels[-1]]
    else:
        raise Unsupported(
            f'No released shape of a T2I-Adapter has features of the sizes of "{base.name}": its encoder takes '
            f"control at strides {[tap.stride for tap in inside]}. Train another body."
        )
    network = T2IAdapter(in_channels=hint_channels, channels=channels, downscale_factor=first, adapter_type=kind)
    return Adapter(network, base.taps)
