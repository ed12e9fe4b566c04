"""Several controls at once, trained as one; each stays complete in itself."""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from controlkit.branch import ControlBranch, ControlNetwork, HintEncoder, add_residuals, in_rows


class MultiBranch(ControlNetwork):
    """Several branches that are trained as one: each reads its own channels of the hint, and residuals add up.

    The sum is that of the same branches composed in use (Section 3.4). Each stays an ordinary branch, in ``branches``.

    Args:
        branches: by name, in the order of their channels in the hint.
    """

    kind = "several"

    def __init__(self, branches: Mapping[str, ControlBranch]) -> None:
        super().__init__()
        self.names = tuple(branches)
        self.branches = nn.ModuleList(branches.values())  # a ModuleDict's names may not be any word
        self.taps = next(iter(branches.values())).taps

    def parts(self) -> dict[str, ControlNetwork]:
        """The branches by name."""
        return dict(zip(self.names, self.branches, strict=True))  # type: ignore[arg-type]

    def encode_hint(self, hint: Tensor) -> dict[str, Tensor]:
        """Features of each branch's own channels of hints (B, channels of all, H, W), by name."""
        encoders = [cast("HintEncoder", branch.hint_encoder) for branch in self.branches]
        channels = [cast("nn.Conv2d", encoder.convs[0]).in_channels for encoder in encoders]
        own = zip(self.parts().items(), hint.split(channels, 1), strict=True)
        return {name: branch.encode_hint(one) for (name, branch), one in own}

    def forward(self, x: Tensor, t: Tensor, text: Any, hint_features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sum of their residuals, by tap."""
        each = [branch(x, t, text, hint_features[name]) for name, branch in self.parts().items()]
        return add_residuals([(in_rows(residuals, len(text)), dict.fromkeys(residuals, 1.0)) for residuals in each])
