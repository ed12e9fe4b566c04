"""T2I-Adapter: control from the hint alone, added inside the base's encoder (Mou et al., 2023).

On diffusers' own module. Its features depend on neither timestep nor prompt: once a picture is enough.
"""

from typing import Any

from torch import Tensor, nn

from controlkit.backbones import UNetBase, XSBranch
from controlkit.branch import ControlBranch, MultiBranch, Tap
from controlkit.errors import UserError


class Adapter(nn.Module):
    """A diffusers ``T2IAdapter`` behind a branch's two calls.

    Its features go to the base's encoder taps in order; an SDXL one's last goes to the middle.
    """

    pools = False

    def __init__(self, network: Any, taps: tuple[Tap, ...]) -> None:
        super().__init__()
        self.network = network
        places = [tap for tap in taps if tap.site == "encoder"] + [tap for tap in taps if tap.site == "middle"]
        self.taps = tuple(places[: len(network.adapter.body)])

    @classmethod
    def fresh(cls, base: UNetBase, hint_channels: int = 3) -> "Adapter":
        """One to train, of the released shape whose features have the sizes of this base's encoder."""
        from diffusers import T2IAdapter

        inside = [tap for tap in base.taps if tap.site == "encoder"]
        first = inside[0].stride
        channels, steps = [tap.channels for tap in inside], [tap.stride // first for tap in inside]
        if steps == [2**level for level in range(len(inside))]:
            kind = "full_adapter"
        elif steps == [1, 1, 2]:  # as SDXL's, whose fourth feature goes to the middle
            kind, channels = "full_adapter_xl", [*channels, channels[-1]]
        else:
            raise UserError(
                f'No released shape of a T2I-Adapter has features of the sizes of "{base.name}": its encoder takes '
                f"control at strides {[tap.stride for tap in inside]}. Train another body."
            )
        network = T2IAdapter(in_channels=hint_channels, channels=channels, downscale_factor=first, adapter_type=kind)
        return cls(network, base.taps).to(base.device, base.dtype)

    def encode_hint(self, hint: Tensor) -> dict[str, Tensor]:
        """Features (B, C, h, w) by tap, of hints (B, channels, H, W)."""
        multiple = self.network.downscale_factor
        if hint.shape[-1] % multiple or hint.shape[-2] % multiple:
            raise UserError(f"This T2I-Adapter reads sides that {multiple} divides; got {tuple(hint.shape[-2:])}.")
        return {tap.name: feature for tap, feature in zip(self.taps, self.network(hint), strict=True)}

    def forward(self, x: Tensor, t: Tensor, text: Any, hint_features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The features as they are."""
        return hint_features


Branch = ControlBranch | XSBranch | Adapter
"""A control's network."""
Trained = Branch | MultiBranch
"""What a run trains: a control's network, or several as one."""
