"""ControlNet-Union: one branch that knows several types of hint, and merges any of them (xinsir, ProMax).

A hint's type enters at two places: a token for each hint shifts that hint's features, and a code of all types in use
is added to the time embedding. The features of several hints are added up.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from controlkit.annotators import union_types
from controlkit.backbones import Backbone
from controlkit.branch import ControlBranch, ControlNetwork, ControlSpec, Tap, in_rows
from controlkit.errors import Invalid, NotFound, Unsupported, nearest


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


@dataclass(frozen=True)
class UnionShape:
    """The sizes of a Union's own parts."""

    width: int
    """Of a type's token."""
    code_width: int
    """Of the sinusoid that codes each type."""
    embedding: int
    """Of the base's time embedding."""
    types: int = 6
    """Types that the weights know, 1 to 64."""
    heads: int = 8
    """Attention heads of the tokens' transformer; they divide ``width``."""
    layers: int = 1
    """Layers of that transformer."""


class UnionBranch(ControlBranch):
    """A ``ControlBranch`` whose hints are given by type: ``encode_hint({"canny": hint, "depth": hint})``.

    Args:
        taps, body, stride, hint_channels, spec: as a ``ControlBranch``'s; the body also takes an embedding (B, D).
        shape: the sizes of its own parts.
    """

    kind = "union"

    def __init__(
        self,
        taps: tuple[Tap, ...],
        body: nn.Module,
        stride: int,
        shape: UnionShape,
        hint_channels: int = 3,
        spec: ControlSpec | None = None,
    ) -> None:
        from diffusers.models.controlnets.controlnet_union import ResidualAttentionBlock
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps

        super().__init__(taps, body, stride, hint_channels, spec)
        self.shape = shape
        self.type_code = Timesteps(shape.code_width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.task_embedding = nn.Parameter(torch.zeros(shape.types, shape.width))
        layers = (ResidualAttentionBlock(shape.width, shape.heads) for _ in range(shape.layers))
        self.transformer_layes = nn.ModuleList(layers)  # spelled as the released weights spell it
        self.spatial_ch_projs = nn.Linear(shape.width, taps[0].channels)
        self.control_add_embedding = TimestepEmbedding(shape.code_width * shape.types, shape.embedding)

    def begin(self) -> "UnionBranch":
        """Set the weights to train from, in which types differ by their code alone, of no effect yet; returns itself.

        The tokens' shift of the features stays zero. A type is then a constant added to the time embedding, and can be
        taken out of the Union as an ordinary ControlNet, exactly.
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
        return tuple(name for name, number in TYPES.items() if number < self.shape.types)

    def check_types(self, names: Collection[str]) -> None:
        """Raise ``Invalid`` for no hint at all, ``NotFound`` for a type that these weights do not know."""
        if not names:
            raise Invalid(f"A Union control needs at least one hint: expected one of {', '.join(self.hint_types)}.")
        if unknown := [name for name in names if name not in self.hint_types]:
            raise NotFound(f'This Union control knows no type "{unknown[0]}": {nearest(unknown[0], self.hint_types)}')

    def encode_hint(  # type: ignore[override]
        self, hint: Mapping[str, Tensor], strengths: Mapping[str, float] | None = None
    ) -> dict[str, Tensor]:
        """The sum of all hints' features, ``map`` (B, C, h, w), and their types' code, ``embedding`` (B, D).

        ``hint``: (B, channels, H, W) by type; raises as ``check_types`` does. ``strengths``: of each type, 1 by
        default. As in diffusers, those of several types scale their tokens, features and shifts, and the strength of
        a type that is alone scales the residuals: ``strength`` (B, 1, 1, 1) in the result, which ``forward`` applies.

        None depends on latents or timestep. The token's attention goes from a picture to itself alone, as it does
        wherever pictures are made one at a time; diffusers' module lets the pictures of a batch attend to each other,
        so that there each depends on its neighbours.
        """
        self.check_types(hint)
        given = [(strengths or {}).get(name, 1.0) for name in hint]
        maps = {name: self.hint_encoder(one) for name, one in hint.items()}
        if len(hint) > 1:
            return self._fused(maps, given)
        features = self._fused(maps)
        rows = features["map"][:, :1, :1, :1]
        return features | {"strength": torch.full_like(rows, given[0])}

    def encode_rows(self, hints: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Features of rows with one hint each, as training has them: rows of the first type, of the next, and so on.

        Equal to ``encode_hint`` of each type by itself, but the hint encoder runs once for all.
        """
        self.check_types(hints)
        maps = self.hint_encoder(torch.cat(list(hints.values()))).split([len(hint) for hint in hints.values()])
        parts = [self._fused({name: one}) for name, one in zip(hints, maps, strict=True)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _fused(self, hints: Mapping[str, Tensor], strengths: Sequence[float] = (1.0,)) -> dict[str, Tensor]:
        """The sum of maps (B, C, h, w) of several types, each with its token's shift; and the code of the types.

        ``strengths``: a factor for each type's map, token and shift.
        """
        numbers, maps = [TYPES[name] for name in hints], list(hints.values())
        parts = list(zip(maps, numbers, strengths, strict=True))
        means = [(one.mean((2, 3)) + self.task_embedding[number]) * strength for one, number, strength in parts]
        tokens = torch.stack(means)  # (hints, B, C)
        rows = tokens.flatten(0, 1)[None]  # to the module, a sequence of one token in each of hints x B rows
        for layer in self.transformer_layes:
            rows = layer(rows)
        shifts = self.spatial_ch_projs(rows[0]).unflatten(0, tokens.shape[:2])
        shifted = zip(maps, shifts, strengths, strict=True)
        features = sum(one * strength + shift[..., None, None] * strength for one, shift, strength in shifted)
        code = torch.zeros(self.shape.types, device=tokens.device)
        for number in numbers:  # a list of them would be copied to the device, and waited for
            code[number] = 1
        embedding = self.control_add_embedding(self.type_code(code).flatten().to(tokens.dtype))
        return {"map": features, "embedding": embedding.expand(tokens.shape[1], -1)}

    def forward(self, x: Tensor, t: Tensor, text: Any, hint_features: Mapping[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        """The residual of each tap (B, C, h, w), by name; ``hint_features`` from ``encode_hint``."""
        residuals = self.residuals(self.body(x, t, text, hint_features["map"], hint_features["embedding"]))
        if "strength" not in hint_features:
            return residuals
        strength = hint_features["strength"]
        return {name: residual * in_rows(strength, len(residual)) for name, residual in residuals.items()}


class OneType(ControlNetwork):
    """A Union as a control of one type: hints are tensors (B, C, H, W), as a ``ControlBranch`` takes them."""

    kind = "union type"

    def __init__(self, union: UnionBranch, hint_type: str) -> None:
        super().__init__()
        union.check_types([hint_type])
        self.union, self.hint_type, self.taps = union, hint_type, union.taps

    def encode_hint(self, hint: Tensor) -> dict[str, Tensor]:
        """The Union's features of hints (B, C, H, W)."""
        return self.union.encode_hint({self.hint_type: hint})

    def forward(self, x: Tensor, t: Tensor, text: Any, hint_features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The residual of each tap (B, C, h, w), by name."""
        return self.union(x, t, text, hint_features)


def time_width(body: nn.Module, name: str) -> int:
    """Width of the time embedding of a base's encoder, beside which types are coded; ``name``: the base's.

    Raises ``Unsupported`` where it has none.
    """
    if not hasattr(body, "time_embedding"):
        raise Unsupported(f'A Union codes its types beside a time embedding; "{name}" has none: train one type.')
    return body.time_embedding.linear_2.out_features  # type: ignore[union-attr, return-value]


def new_union(base: Backbone, types: int = 8) -> UnionBranch:
    """A fresh Union for a base; released ones have codes 256 wide, which is much for a small base: here 32.

    Types differ by their code alone: the tokens' shift stays zero, so that each type can be taken out as an ordinary
    ControlNet. Raises ``Unsupported`` where the base has no time embedding that a code could be added to.
    """
    body = base.copy_encoder()
    shape = UnionShape(base.branch_taps[0].channels, 32, time_width(body, base.name), types)
    channels, stride = base.hint_shape(3)
    return UnionBranch(base.branch_taps, body, stride, shape, channels).begin().to(base.device, base.dtype)
