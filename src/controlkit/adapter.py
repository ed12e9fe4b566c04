"""T2I-Adapter: control from the hint alone, added inside the base's encoder (Mou et al., 2023).

On diffusers' own module. Its features depend on neither timestep nor prompt: once a picture is enough.
"""

from typing import Any

from torch import Tensor, nn

from controlkit.branch import Tap
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

    def encode_hint(self, hint: Tensor) -> dict[str, Tensor]:
        """Features (B, C, h, w) by tap, of hints (B, channels, H, W)."""
        multiple = self.network.downscale_factor
        if hint.shape[-1] % multiple or hint.shape[-2] % multiple:
            raise UserError(f"This T2I-Adapter reads sides that {multiple} divides; got {tuple(hint.shape[-2:])}.")
        return {tap.name: feature for tap, feature in zip(self.taps, self.network(hint), strict=True)}

    def forward(self, x: Tensor, t: Tensor, text: Any, hint_features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The features as they are."""
        return hint_features
