"""ControlNet-Union: one branch that knows several types of hint, and merges any of them (xinsir, ProMax).

A type is told in two places: a token for each hint, which shifts that hint's features, and a code of all types in use
beside the time embedding. The features of several hints are added up.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from controlkit.annotators import union_types
from controlkit.backbones import Backbone
from controlkit.branch import ControlBranch, ControlNetwork, ControlSpec, Tap
from controlkit.errors import UserError, nearest


class _Types(Mapping[str, int]):
    """A view of the table of kinds of hints, so that a kind registered later is a type too."""

    def __getitem__(self, name: str) -> int:
        return union_types()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(union_types())

    def __len__(self) -> int:
        return len(union_types())


TYPES: Mapping[str, int] = _Types()
"""Names of hint types -> the released weights' numbers. The first release has 0-5, ProMax all."""


class UnionBranch(ControlBranch):
    """A ``ControlBranch`` whose hints are given by type: ``encode_hint({"canny": hint, "depth": hint})``.

    Args:
        taps, body, stride, hint_channels, spec: as a ``ControlBranch``'s.
        types: how many the weights know.  width, heads, layers: of the tokens' transformer.
        code_width: width of the sinusoid that codes each type.  embedding: width of the time embedding.
    """

    kind = "union"

    def __init__(
        self,
        taps: tuple[Tap, ...],
        body: nn.Module,
        stride: int,
        hint_channels: int = 3,
        spec: ControlSpec | None = None,
        *,
        types: int = 6,
        width: int,
        heads: int = 8,
        layers: int = 1,
        code_width: int,
        embedding: int,
    ) -> None:
        from diffusers.models.controlnets.controlnet_union import ResidualAttentionBlock
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps

        super().__init__(taps, body, stride, hint_channels, spec)
        self.heads, self.layers = heads, layers
        self.type_code = Timesteps(code_width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.task_embedding = nn.Parameter(torch.zeros(types, width))
        self.transformer_layes = nn.ModuleList(ResidualAttentionBlock(width, heads) for _ in range(layers))  # sic
        self.spatial_ch_projs = nn.Linear(width, taps[0].channels)
        self.control_add_embedding = TimestepEmbedding(code_width * types, embedding)

    def begin(self) -> "UnionBranch":
        """Weights to train from: types are told apart by their code alone, which at first changes nothing.

        The tokens' shift of the features stays zero. What tells the types apart is then a constant beside the time
        embedding, and one type can be taken out of the Union as an ordinary ControlNet, exactly.
        """
        for silent in (self.spatial_ch_projs, self.control_add_embedding.linear_2):
            nn.init.zeros_(silent.weight)
            nn.init.zeros_(silent.bias)
        for unused in (self.task_embedding, *self.transformer_layes.parameters(), *self.spatial_ch_projs.parameters()):
            unused.requires_grad_(False)
        return self

    @property
    def hint_types(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the hint types these weights know."""
        return tuple(name for name, number in TYPES.items() if number < len(self.task_embedding))

    def check_types(self, names: Collection[str]) -> None:
        """Refuse hints of types these weights do not know, or none at all."""
        if not names:
            raise UserError(f"A Union control needs at least one hint: expected one of {', '.join(self.hint_types)}.")
        if unknown := [name for name in names if name not in self.hint_types]:
            raise UserError(f'This Union control knows no type "{unknown[0]}": {nearest(unknown[0], self.hint_types)}')

    def encode_hint(self, hint: Mapping[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        """Features of all hints together, ``map`` (B, C, h, w), and their types' code, ``embedding`` (B, D).

        Neither depends on latents or timestep. The token's attention goes from a picture to itself alone, as it does
        wherever pictures are made one at a time; diffusers' module lets the pictures of a batch attend to each other,
        so that there each depends on its neighbours.
        """
        self.check_types(hint)
        return self._fused({name: self.hint_encoder(one) for name, one in hint.items()})

    def encode_rows(self, hints: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Features of rows with one hint each, as training has them: those of the first type, of the next, and so on.

        The same as ``encode_hint`` of each type by itself, but the hints are read together.
        """
        self.check_types(hints)
        maps = self.hint_encoder(torch.cat(list(hints.values()))).split([len(hint) for hint in hints.values()])
        parts = [self._fused({name: one}) for name, one in zip(hints, maps, strict=True)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _fused(self, hints: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Maps of several types of hint put together, and the code of their types."""
        numbers, maps = [TYPES[name] for name in hints], list(hints.values())
        means = [one.mean((2, 3)) + self.task_embedding[number] for one, number in zip(maps, numbers, strict=True)]
        tokens = torch.stack(means)  # (hints, B, C)
        rows = tokens.flatten(0, 1)[None]  # to the module, a sequence of one token in each of hints x B rows
        for layer in self.transformer_layes:
            rows = layer(rows)
        shifts = self.spatial_ch_projs(rows[0]).unflatten(0, tokens.shape[:2])
        features = sum(one + shift[..., None, None] for one, shift in zip(maps, shifts, strict=True))
        code = torch.zeros(len(self.task_embedding), device=tokens.device)
        for number in numbers:  # a list of them would be copied to the device, and waited for
            code[number] = 1
        embedding = self.control_add_embedding(self.type_code(code).flatten().to(tokens.dtype))
        return {"map": features, "embedding": embedding.expand(tokens.shape[1], -1)}

    def forward(self, x: Tensor, t: Tensor, text: Any, hint_features: Mapping[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        """The residual of each tap, by name; ``hint_features`` from ``encode_hint``."""
        return self.residuals(self.body(x, t, text, hint_features["map"], hint_features["embedding"]))


class OneType(ControlNetwork):
    """A Union as a control of one type: hints are plain tensors, as a ``ControlBranch`` takes them."""

    kind = "union type"

    def __init__(self, union: UnionBranch, hint_type: str) -> None:
        super().__init__()
        union.check_types([hint_type])
        self.union, self.hint_type, self.taps = union, hint_type, union.taps

    def encode_hint(self, hint: Tensor) -> dict[str, Tensor]:
        """As the Union's, of (B, C, H, W)."""
        return self.union.encode_hint({self.hint_type: hint})

    def forward(self, x: Tensor, t: Tensor, text: Any, hint_features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The residual of each tap, by name."""
        return self.union(x, t, text, hint_features)


def new_union(base: Backbone, types: int = 8, code_width: int = 32) -> UnionBranch:
    """A fresh Union for a base; released ones have codes 256 wide, which is much for a small base.

    Types are told apart by their code alone: the tokens' shift stays zero, so that each type can be taken out as an
    ordinary ControlNet. ``UserError`` where the base has no time embedding that a code could be added to.
    """
    body = base.copy_encoder()
    if not hasattr(body, "time_embedding"):
        raise UserError(f'A Union codes its types beside a time embedding; "{base.name}" has none: train one type.')
    shape = {"types": types, "width": base.branch_taps[0].channels, "code_width": code_width}
    embedding = body.time_embedding.linear_2.out_features
    union = UnionBranch(base.branch_taps, body, base.stride, **shape, embedding=embedding).begin()
    return union.to(base.device, base.dtype)
