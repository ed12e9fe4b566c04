"""The table of kinds of hints: one row says all there is to know of a kind, and everything else reads it.

A new kind is a function (in ``lines``, ``regions`` or a module of its own) and a row; or, outside this package, a call
of ``register``. Another way to make hints of a kind that is there is a row of its family (``maker``): controls of that
kind read its hints too. No other module lists kinds by name.
"""

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial, wraps
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pydantic import ValidationError

from controlkit.annotators import colours, lines, maps, regions, world
from controlkit.annotators.elsewhere import why_not
from controlkit.annotators.options import Options, Threshold, options_of, slider_of
from controlkit.annotators.tiles import shortened
from controlkit.errors import Invalid, NotFound, Unsupported, UserError, first_fault, nearest
from controlkit.images import HintSpec, Resize
from controlkit.mini.truth import Truth

Annotate = Callable[..., Sequence[np.ndarray]]
"""``function(pictures, device, **options)``: the hint of each picture, uint8 (H, W, 3), at its size. Each option is a
keyword with a default; its annotation may give its range, as ``Annotated[float, Field(ge=0)]``."""


def each(function: Callable[..., np.ndarray]) -> Annotate:
    """Adapt a function of one picture, ``function(picture, **options)``, to a batch."""

    @wraps(function)
    def annotate(pictures: Sequence[np.ndarray], device: str, **options: Any) -> list[np.ndarray]:
        return [function(picture, **options) for picture in pictures]

    return annotate


@dataclass(frozen=True)
class HintKind:
    """A kind of hint. Only ``name`` must be given; a kind without a function is given as a file, never made here."""

    name: str
    function: Annotate | None = None
    """Makes hints of pictures; ``each`` adapts a function of one picture."""
    family: str = ""
    """The kind whose hints these are, made in another way; "" where they are a kind by themselves. See ``maker``."""
    aliases: tuple[str, ...] = ()
    """Other names, such as A1111's names of modules; one with a plus stands for no channels of two hints."""
    thresholds: tuple[Threshold, ...] = ()
    """A1111's ``threshold_a`` and ``threshold_b``, in this order."""
    foreign: Mapping[str, float] = field(default_factory=dict)
    """Options of the hints that controls from elsewhere read, where they are not the defaults."""
    resize: Resize = "area"
    ground: str = "black"
    """The colour, as Pillow names it, laid under what is transparent in a hint: of nothing; of photographs white."""
    mask_value: float | None = None
    """The value of masked pixels, where hints have masks."""
    lines: bool = False
    """Whether hints are grey lines, light on a black ground: inverted or coloured ones are a mistake."""
    any_lines: bool = False
    """Whether what it makes, of drawings, serves the controls of every kind of lines."""
    metric: str = ""
    """Name of the metric of obedience (``measure``); "" where none is known."""
    truth: Callable[[Truth], np.ndarray] | None = None
    """Draws the hint, uint8 (H, W, 3), from what is known of a scene, or was read off a picture by an observer."""
    needs_person: bool = False
    """Whether only scenes with a figure have something to draw."""
    union_type: int | None = None
    """Its number in ControlNet-Union's released weights."""
    mirror: Callable[[np.ndarray, HintSpec], np.ndarray] = lambda flipped, spec: flipped
    """Corrects a hint whose left and right were exchanged, where more than places changes."""
    folders: tuple[str, ...] = ()
    """First words of folders' names that say that these hints lie in them."""
    version: int = 1
    """Add 1 if its hints change, but neither the file of its function nor its weights do."""
    weights: Callable[[], str] | None = None
    """The digest of its network's weights, where it is one."""
    extra: str = ""
    """The optional dependencies (of ``pip install 'controlkit[...]'``) that its function imports."""
    modules: tuple[str, ...] = ()
    """The modules of that extra that it imports."""
    lack: Callable[[], str] | None = None
    """Says which of its weights are not on this machine, in a sentence that says how to get them; "" where all are. It
    asks no network."""
    own_world: bool = False
    """Whether it knows the pictures of the embedded world alone; then it makes hints where it is named, and never by
    itself."""

    @property
    def is_made_here(self) -> bool:
        """Whether hints can be made of pictures."""
        return self.function is not None

    @property
    def contract_name(self) -> str:
        """The kind whose contract its hints keep: its family, or itself."""
        return self.family or self.name

    def lacks(self) -> str:
        """A sentence on what is missing here to make such hints, and how to get it; "" where nothing is."""
        if self.function is None:
            return f'Nothing here makes hints of "{self.name}" of a picture: give them as files.'
        if absent := [name for name in self.modules if importlib.util.find_spec(name) is None]:
            return self._without(f"no module named {absent[0]}")
        return self.lack() if self.lack else ""

    def _without(self, reason: object) -> str:
        return (
            f"Making hints of {self.name} needs the extra {self.extra} ({reason}). "
            f"Install it with: pip install 'controlkit[{self.extra}]'"
        )

    @cached_property
    def options(self) -> type[Options]:
        """The model of its options, read off its function's keywords."""
        return options_of(self.name, self.function)

    def checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """These options and the defaults of the others; ``Invalid`` for an unknown one or a value out of range."""
        try:
            return self.options.model_validate(dict(options)).model_dump()
        except ValidationError as error:
            raise Invalid(first_fault(error, self.name, self.options.model_fields)) from None

    @cached_property
    def sliders(self) -> list[dict[str, Any]]:
        """Its options as sliders, ``{name, value, min, max, step}``, in their order (``options.slider_of``)."""
        return [slider_of(name, info) for name, info in self.options.model_fields.items()]

    def of_thresholds(self, *numbers: float | None) -> dict[str, float]:
        """Options of A1111's ``threshold_a`` and ``threshold_b``; below 0 or None, a number is its default there.

        ``Invalid`` where one is out of the option's range.
        """
        given = dict(zip(self.thresholds, numbers, strict=False))
        read = {
            one.option: (one.value if number is None or number < 0 else number) * one.per
            for one, number in given.items()
            if one.option
        }
        return self.checked(read)

    def spec(self, **options: Any) -> HintSpec:
        """The contract of its hints: made with these options, and the defaults of the others."""
        return HintSpec(self.name, self.checked(options), mask_value=self.mask_value, resize=self.resize)

    def make(
        self, pictures: Sequence[np.ndarray], options: Mapping[str, Any] | None = None, device: str = "cpu"
    ) -> list[np.ndarray]:
        """The hint of each picture, uint8 (H, W, 3).

        ``Invalid`` for wrong options; ``Unsupported`` where nothing makes such hints, or an extra is missing.
        """
        if self.function is None or (self.lack and self.lack()):
            raise Unsupported(self.lacks())
        checked = self.checked(options or {})
        try:
            return list(self.function(pictures, device, **checked))
        except ModuleNotFoundError as error:
            if not self.extra:
                raise
            raise Unsupported(self._without(error)) from error

    def digest(self) -> str:
        """A digest of what makes its hints: equal ones make the same of a picture, so that a cache may keep it.

        Of the file its function is written in, OpenCV's version, its own version and its network's weights.
        """
        weights = self.weights() if self.weights else ""
        parts = [self.name, _code(self.function), cv2.__version__, self.version, weights]
        return hashlib.sha256(repr(parts).encode()).hexdigest()


@cache
def _code(function: Annotate | None) -> str:
    """The digest of the file a function, or a callable object's class, is written in."""
    while function is not None and (inner := getattr(function, "func", getattr(function, "__wrapped__", None))):
        function = inner  # of a partial, or of what ``each`` wraps
    module = sys.modules.get(getattr(function, "__module__", "")) if function else None
    file = getattr(module, "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


# --- the registry -------------------------------------------------------------------------------------------------

_KINDS: dict[str, HintKind] = {}
_NAMELESS = HintKind("")  # hints of which nobody says what they are


def register(kind: HintKind) -> HintKind:
    """Add a kind to the table; ``Invalid`` where one of its names is taken, or cannot be a name."""
    for name in (kind.name, *kind.aliases):
        if not name or "+" in kind.name or _found(name):
            raise Invalid(f'A kind of hint cannot be called "{name}": expected a name of its own, without +.')
    return _KINDS.setdefault(kind.name, kind)


def maker(name: str, function: Annotate, *, of: str, **facts: Any) -> HintKind:
    """Another way to make hints of a kind: a row of the family ``of``, for ``register``.

    It has what the family's row says of hints: how they are scaled, their ground and mask value, whether they are
    lines, how they are measured and mirrored. Its own are the function and ``facts``, the fields in ``_OWN``. It is no
    type of a ControlNet-Union: its hints are of the family's. ``NotFound`` for an unknown family.
    """
    row = kind_of(of)
    return replace(row, **_OWN | {"name": name, "function": function, "family": row.contract_name} | facts)


_OWN: dict[str, Any] = {
    "aliases": (), "foreign": {}, "thresholds": (), "truth": None, "needs_person": False, "union_type": None,
    "folders": (), "version": 1, "weights": None, "extra": "", "modules": (), "lack": None, "own_world": False,
}  # fmt: skip
"""Fields that a maker does not have from its family."""


def makers_of(name: str) -> list[HintKind]:
    """All rows that make hints of the kind of that name, or of its family; the kind's own row and the family's first.

    None for an unknown name.
    """
    own = kind_or_bare(name)
    made = [kind for kind in all_kinds() if kind.is_made_here and fits(kind.name, name)]
    return sorted(made, key=lambda kind: (kind.name != own.name, kind.name != own.family, kind.any_lines))


def all_kinds() -> list[HintKind]:
    """All kinds, in the order in which they were registered."""
    return list(_KINDS.values())


def names_of(which: Callable[[HintKind], object] = lambda kind: True) -> list[str]:
    """The names of all kinds, or of those that pass the test ``which``."""
    return [kind.name for kind in all_kinds() if which(kind)]


def _found(name: str) -> HintKind | None:
    return _KINDS.get(name) or next((kind for kind in all_kinds() if name in kind.aliases), None)


def _unknown(words: str, name: str, known: list[str]) -> UserError:
    """The error for a name that no row has: why not, where it is one of A1111's, else the nearest names."""
    if reason := why_not(name):
        return Unsupported(reason)
    return NotFound(f'{words} "{name}": {nearest(name, known)}')


def kind_of(name: str) -> HintKind:
    """The kind of that name or alias; of "", a kind of which nothing is known.

    ``NotFound`` for an unknown name; ``Unsupported`` for a module of A1111's that nothing here stands for.
    """
    if not name:
        return _NAMELESS
    if (kind := _found(name)) is None:
        raise _unknown("There are no hints named", name, names_of())
    return kind


def kind_or_bare(name: str) -> HintKind:
    """The kind of that name or alias; of an unknown name (a file may hold any), a kind of which nothing is known."""
    return _found(name) or HintKind(name)


def fits(made: str, hints: str) -> bool:
    """Whether what the annotator of one name makes are hints of the other name, known or not: of one family."""
    one, other = kind_or_bare(made), kind_or_bare(hints)
    return one.contract_name == other.contract_name or (one.any_lines and other.lines)


def ready_maker(name: str) -> HintKind | None:
    """The first maker of hints of a name, or of its family, that has all it needs and knows pictures of any kind."""
    return next((one for one in makers_of(name) if not (one.own_world or one.lacks())), None)


def annotator(name: str) -> HintKind:
    """The row of that name or alias that makes hints; of a kind that has no function, the first of its ready makers.

    ``NotFound`` for a name that is unknown, or of which no maker is ready here.
    """
    made = names_of(lambda kind: kind.is_made_here)
    if not name:
        raise NotFound(f"No annotator of these hints is named: expected one of {', '.join(made)}.")
    kind = _found(name)
    if kind is None or not makers_of(name):
        raise _unknown("There is no annotator", name, made)
    if found := kind if kind.is_made_here else ready_maker(name):
        return found
    reasons = [one.lacks() or f"{one.name} knows pictures of the embedded world alone." for one in makers_of(name)]
    raise NotFound(f'There is no annotator "{name}" that can be used here without being named: {" ".join(reasons)}')


def union_types() -> dict[str, int]:
    """Names and aliases of the kinds that a ControlNet-Union knows -> their numbers in the released weights."""
    known = [(kind.union_type, name) for kind in all_kinds() for name in (*kind.aliases, kind.name)]
    return {name: number for number, name in sorted(known, key=lambda one: one[0] or 0) if number is not None}


# --- the table ----------------------------------------------------------------------------------------------------


_GAMMA = Threshold("gamma", "Gamma Correction", 1, 0.1, 2, 0.001)
_TABLE = (
    HintKind("pose", aliases=("openpose",), resize="nearest", metric="pck", union_type=0, needs_person=True,
             truth=world.pose,
             mirror=lambda flipped, spec: maps.swap_sides(flipped), folders=("pose", "openpose")),
    HintKind("depth", metric="depth_rmse", union_type=1, folders=("depth",), truth=world.depth),
    HintKind("canny", each(lines.canny), resize="lines", lines=True, metric="edge_f1", union_type=3,
             thresholds=(Threshold("low", "Canny Low Threshold", 100, 1, 255),
                         Threshold("high", "Canny High Threshold", 200, 1, 255)),
             folders=("canny", "edge", "edges")),
    HintKind("scribble", each(lines.scribble), resize="lines", lines=True, metric="edge_f1", union_type=2,
             folders=("scribble", "sketch")),
    HintKind("softedge", each(lines.softedge), lines=True, metric="ms_ssim", union_type=2, folders=("softedge",)),
    HintKind("lineart", each(lines.lineart), resize="lines", lines=True, metric="ms_ssim", union_type=3,
             folders=("lineart", "lines")),
    HintKind("mlsd", each(lines.mlsd), foreign={"length": 0.05}, resize="lines", lines=True, metric="ms_ssim",
             union_type=3, folders=("mlsd",),
             thresholds=(Threshold("", "MLSD Value Threshold", 0.1, 0.01, 2, 0.01),
                         Threshold("", "MLSD Distance Threshold", 0.1, 0.01, 20, 0.01))),
    HintKind("normal", ground="#8080ff", metric="normal_angle", union_type=4, folders=("normal", "normals"),
             truth=world.normal,
             mirror=lambda flipped, spec: maps.turn_normals(flipped, spec.low + spec.high)),
    HintKind("seg", resize="nearest", metric="miou", truth=world.labels, union_type=5, folders=("seg", "segmentation")),
    # Released tile controls read the picture as it is; one trained here stores by how much its hints were shrunk.
    HintKind("tile", each(regions.tile), ground="white", foreign={"shrink": 1.0}, metric="low_pass_psnr",
             union_type=6, folders=("tile",)),
    HintKind("inpaint", each(regions.inpaint), aliases=("inpaint_only", "inpaint_global_harmonious"), mask_value=-1.0,
             metric="inpaint_distance", union_type=7, folders=("mask", "masks")),
    HintKind("repaint", mask_value=0.0, metric="inpaint_distance", union_type=7),  # a Union's, black where masked
    HintKind("ip2p", ground="white"),  # the picture to be edited
    HintKind("shuffle", shortened(each(colours.shuffle)), ground="white"),
    HintKind("color", each(colours.color), aliases=("t2ia_color_grid",), resize="nearest", ground="white",
             metric="low_pass_psnr"),
    HintKind("recolor", each(colours.luminance), aliases=("recolor_luminance",), ground="white",
             metric="low_pass_psnr", thresholds=(_GAMMA,)),
    # Of drawings; they serve the controls of all lines.
    HintKind("invert", each(colours.invert), aliases=("invert (from white bg & black line)",), ground="white",
             lines=True, any_lines=True, metric="ms_ssim"),
    HintKind("threshold", each(colours.threshold), ground="white", lines=True, any_lines=True, metric="ms_ssim",
             thresholds=(Threshold("level", "Binarization Threshold", 127, 0, 255),)),
)  # fmt: skip
for _kind in _TABLE:
    register(_kind)

_MAKERS = (
    maker("scribble_xdog", each(lines.xdog), of="scribble",
          thresholds=(Threshold("contrast", "XDoG Threshold", 32, 1, 64, per=1 / 510),)),
    maker("lineart_standard", each(lines.lineart_standard), of="lineart",
          aliases=("lineart_standard (from white bg & black line)",)),
    maker("tile_resample", each(partial(regions.tile, shrink=1.0)), of="tile",
          thresholds=(Threshold("shrink", "Down Sampling Rate", 1, 1, 8, 0.01),)),
    # What its name promises happens there after sampling, to the colours of what was made; as a hint it is the picture.
    maker("tile_colorfix", each(regions.whole), of="tile",
          thresholds=(Threshold("", "Variation", 8, 3, 32), Threshold("", "Sharpness", 1, 0, 2, 0.01)),
          aliases=("tile_colorfix+sharp",)),
    maker("blur_gaussian", each(colours.blur), of="tile",
          thresholds=(Threshold("width", "Sigma", 9, 0.01, 64, 0.01, per=1 / 512),)),
    maker("recolor_intensity", each(colours.intensity), of="recolor", thresholds=(_GAMMA,)),
    maker("outpaint", each(regions.outpaint), of="inpaint"),
    *(maker(f"mini_{kind.name}", world.observed(kind.truth), of=kind.name, weights=world.weights, own_world=True)
      for kind in _TABLE if kind.truth),
)  # fmt: skip
for _kind in _MAKERS:
    register(_kind)
