"""Hints as their contracts say: contracts by name, and pictures or drawings turned into hints."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from controlkit.annotators.kinds import annotator, fits, kind_of, kind_or_bare, makers_of, ready_maker
from controlkit.errors import Mismatch, Unsupported
from controlkit.images import Ground, HintSpec, fit


def contract(name: str, foreign: bool = False) -> HintSpec:
    """The contract of hints of a kind, made with its default options; of ``canny+depth``, of two as channels of one.

    ``foreign``: as controls from elsewhere read them, whose files do not say. ``NotFound`` for an unknown name.
    """
    if "+" in name and not kind_or_bare(name).is_made_here:
        return joined(name.split("+"))
    kind = kind_of(name)
    return kind.spec(**kind.foreign) if foreign else kind.spec()


def contract_from_json(text: str) -> HintSpec:
    """The contract that a file gives for its hints, its options in the ranges that the annotator names.

    Raises ``ValueError`` as ``HintSpec.from_json`` does, and for an option that the annotator has not, or out of range.
    """
    hint = HintSpec.from_json(text)
    if (kind := kind_or_bare(hint.annotator)).is_made_here:  # nothing else reads options
        kind.checked(hint.options)
    return hint


def joined(names: Sequence[str]) -> HintSpec:
    """The contract of several hints that are channels of one, three of each, in this order.

    ``Unsupported`` where one of them has a mask.
    """
    parts = [contract(name) for name in names]
    if masked := [part.annotator for part in parts if part.mask_value is not None]:
        raise Unsupported(f"Hints of {masked[0]} have masks and cannot be channels beside others.")
    return HintSpec("+".join(part.annotator for part in parts), channels=3 * len(parts))


def parts_of(hint: HintSpec) -> list[HintSpec]:
    """The contracts of the hints that are this one's channels, in order; of a hint by itself, its own alone."""
    names = hint.annotator.split("+")
    return [replace(contract(name), low=hint.low, high=hint.high) for name in names] if len(names) > 1 else [hint]


def grounds_of(hint: HintSpec | None) -> list[Ground]:
    """The ground (``images.decode_hint``) of each hint that is channels of this one; of a hint by itself, one."""
    if hint is None:
        return ["black"]
    kinds = [kind_or_bare(part.annotator) for part in parts_of(hint)]
    masked = hint.mask_value is not None or hint.channels == 4  # or the fourth is a channel like the others
    return [None if masked else "ink" if kind.lines else kind.ground for kind in kinds]


def with_maker(hint: HintSpec, name: str | None = None, options: Mapping[str, float] | None = None) -> HintSpec:
    """The contract of a control's hints, made by another maker of its family; without a name, as the contract says.

    Where nothing makes the contract's own kind, it is the first maker of the family that has all it needs here, if
    there is one. ``options``: of the maker, instead of its defaults or the contract's own. Range, channels and order of
    colours stay the contract's. ``NotFound`` for an unknown name, ``Mismatch`` for one of another family.
    """
    own = kind_or_bare(hint.annotator)
    kind = kind_of(name) if name else own
    if not fits(kind.name, own.name):
        makers = ", ".join(one.name for one in makers_of(own.name)) or "none"
        raise Mismatch(
            f'The hints are to be of "{hint.annotator}", and {kind.name} makes those of "{kind.contract_name}": '
            f"expected one of {makers}."
        )
    if kind.name == own.name and not own.is_made_here:
        kind = ready_maker(own.name) or own
    if kind.name == own.name:
        return replace(hint, options=kind.checked({**hint.options, **options})) if options else hint
    return hint.made_by(annotator(kind.name).spec(**(options or {})))


def is_empty(hint: np.ndarray, kind: HintSpec) -> bool:
    """Whether a hint (H, W, C) says nothing: all one value, where its kind draws on a ground and is no photograph."""
    return grounds_of(kind)[0] not in ("white", None) and bool((hint == hint[:1, :1]).all())


def annotate(picture: np.ndarray, hint: HintSpec, size: tuple[int, int] | None = None) -> np.ndarray:
    """Annotate a picture, uint8 (H, W, 3), as a hint's contract says: uint8 (H, W, 3 for each part).

    Give the ``size`` (height, width) of the picture to be made for a picture of another size: it is brought to that
    size first, as training did. Lines found at one size and shrunk to another are not the lines found there. Hints that
    nothing makes are the picture itself; and so is one for inpainting that has a mask, uint8 (H, W, 4).
    """
    return annotate_all([picture], hint, size)[0]


def annotate_all(
    pictures: Sequence[np.ndarray], hint: HintSpec, size: tuple[int, int] | None = None, device: str = "cpu"
) -> list[np.ndarray]:
    """Annotate pictures as ``annotate`` does each; an annotator that is a network reads them at once, on ``device``.

    ``NotFound`` for hints of an unknown kind, ``Invalid`` for wrong options, ``Unsupported`` where an extra is missing.
    """
    if len(parts := parts_of(hint)) > 1:
        if given := [part.annotator for part in parts if not kind_of(part.annotator).is_made_here]:
            raise Unsupported(
                f'Nothing here makes hints of "{given[0]}" of a picture: give those of {hint.annotator} as one '
                f".npy file, (height, width, {hint.channels})."
            )
        made = [annotate_all(pictures, part, size, device) for part in parts]
        return [np.concatenate(one, 2) for one in zip(*made, strict=True)]
    kind = kind_of(hint.annotator)
    if size:
        pictures = [fit(picture, size, "area" if kind.is_made_here else hint.resize) for picture in pictures]
    return kind.make(pictures, hint.options, device) if kind.is_made_here else list(pictures)


def white_on_black(lines: np.ndarray) -> np.ndarray:
    """A line drawing as a hint of lines: one drawn dark on light paper is inverted."""
    return 255 - lines if lines.mean() > 127 else lines


def light_lines(drawing: np.ndarray, hint: HintSpec) -> np.ndarray:
    """A drawing that is a hint already; where it is of lines, dark ones on light paper are inverted.

    Arrays of other types than uint8 are taken as they are.
    """
    return white_on_black(drawing) if hint.resize == "lines" and drawing.dtype == np.uint8 else drawing
