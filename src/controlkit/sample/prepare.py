"""Requests made ready for a base: controls loaded, hints read or annotated, everything checked."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from controlkit.annotators import (
    annotate,
    contract,
    fits,
    grounds_of,
    is_empty,
    kind_or_bare,
    light_lines,
    with_maker,
)
from controlkit.backbones import Backbone
from controlkit.branch import ControlNetwork
from controlkit.errors import Invalid, Mismatch, nearest, one_line
from controlkit.formats import SavedControl, load_control
from controlkit.images import (
    MOST_SIDE,
    Ground,
    HintSpec,
    decode_picture,
    fit,
    inner_size,
    png_bytes,
    read_hint,
    read_picture,
    stretch,
    surround,
)
from controlkit.prompts import Span
from controlkit.sample.canvas import Canvas, canvas_of, check_edit, light_of
from controlkit.sample.pace import PACES, Pace
from controlkit.sample.request import ControlRequest, EditRequest, Guider, HintSource, Mode, Request
from controlkit.sample.texts import Script


@dataclass(frozen=True)
class SamplingSettings:
    """Settings that all pictures of a batch share. ``size`` is (height, width) in pixels; None is the base's own."""

    steps: int = 20
    guidance: float = 4.0
    size: tuple[int, int] | None = None
    weights: tuple[float, ...] = (1.0,)
    """Of the prompts that ``AND`` joins."""
    scheduler: str | None = None
    guidance_rescale: float = 0.0
    guider: Guider = "cfg"
    pace: Pace | None = None
    """Which steps reuse what earlier ones computed; None is that all compute."""
    skipped: int = 0
    """How many of the first steps are not made, as a picture with the noise of there is changed."""
    changes: Literal["nothing", "picture", "masked"] = "nothing"
    """Whether the start is a picture with noise, and whether a part of it is kept by a mask."""
    tile: int | None = None
    """The side of tiles in pixels; None is the picture as one."""

    @property
    def made(self) -> int:
        """How many steps are made."""
        return self.steps - self.skipped

    @property
    def is_guided(self) -> bool:
        """Whether there is an unconditional half."""
        return self.guidance != 1.0 or self.weights != (1.0,)


_AS_ASKED = ("start", "end", "guess", "by_step", "by_tap", "mode", "cond_only", "cfg_weights")


@dataclass(frozen=True)
class PreparedControl:
    """A control in use, for one picture. Two are equal if all but their hints is equal; then they can share a batch.

    Members without a word here: see ``ControlRequest``.
    """

    network: ControlNetwork
    specs: Mapping[str, HintSpec]
    """The contract of its hint, under ""; of a Union's hints, by type."""
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False
    hint_cfg_scale: float = 1.0
    by_step: tuple[float, ...] = ()
    by_tap: tuple[float, ...] = ()
    mode: Mode = "balanced"
    cond_only: bool = False
    cfg_weights: bool = False
    strengths: Mapping[str, float] = field(default_factory=dict)
    """Of a Union's types, each its own in the place of ``scale``."""
    hints: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)
    """Its hints, under the keys of ``specs``, as ``HintSpec.tensor`` reads them."""
    makers: Mapping[str, HintSpec] = field(default_factory=dict, compare=False)
    """``specs`` with what makes such hints of pictures, where that is not the contract's own annotator."""
    of_first_pass: bool = False
    """Whether its hint is to be made of what the first pass makes, and ``hints`` hold its place."""
    region: np.ndarray | None = field(default=None, compare=False, repr=False)
    """Where it acts, float32 (H, W) in [0, 1]; None is everywhere."""

    @classmethod
    def of(cls, saved: SavedControl, asked: ControlRequest, hints: Mapping[str, np.ndarray]) -> "PreparedControl":
        """A control that was loaded, used as asked for."""
        counted = saved.hint_cfg_scale if asked.hint_cfg_scale is None else asked.hint_cfg_scale
        specs = {kind: saved.contract_of(kind) for kind in hints or [""]}
        makers = {} if asked.ready else {kind: _maker(spec, asked, kind) for kind, spec in specs.items()}
        strengths = {kind: asked.scales.get(kind, asked.scale) for kind in hints if kind}
        return cls(
            network=saved.branch,
            specs=specs,
            makers=makers,
            scale=float(any(strengths.values())) if strengths else asked.scale,
            hint_cfg_scale=counted,
            strengths=strengths,
            hints=hints,
            **{name: getattr(asked, name) for name in _AS_ASKED},
        )

    def pictures(self) -> dict[str, np.ndarray]:
        """Its hints as pictures to look at, uint8 (H, W, 3 or 4)."""
        hints = {} if self.of_first_pass else self.hints
        return {kind: self.specs[kind].picture(hint) for kind, hint in hints.items()}

    def reading(self, picture: np.ndarray) -> "PreparedControl":
        """The same with the hint of what the first pass made, uint8 (H, W, 3), where it is to read that."""
        if not self.of_first_pass:
            return self
        spec = self.makers.get("", self.specs[""])
        return replace(self, hints={"": annotate(picture, spec, picture.shape[:2])}, of_first_pass=False)


@dataclass(frozen=True)
class Prepared:
    """A request that can be sampled as it is."""

    request: Request
    settings: SamplingSettings
    """With the size in pixels, also where the request leaves it to the base."""
    script: Script
    controls: tuple[PreparedControl, ...] = ()
    notes: tuple[str, ...] = ()
    """Notes to the author: the end of a prompt that is cut off, controls trained on other weights, empty hints."""
    forms: tuple[tuple[tuple[int, int], ...], ...] = ()
    """``Script.forms``."""
    canvas: Canvas | None = None
    """The picture to be changed."""
    second: "Prepared | None" = None
    """The second pass, whose canvas is to be what the first one makes."""

    @property
    def steps(self) -> int:
        """How many steps are made in all."""
        return self.settings.made + (self.second.steps if self.second else 0)

    def annotators(self) -> list[dict[str, str]]:
        """Of each control, by type of hint, what makes such hints."""
        return [{k: spec.annotator for k, spec in {**one.specs, **one.makers}.items()} for one in self.controls]

    def settled(self) -> Request:
        """The request with what it left to the base and its controls filled in: size, guidance by the hint.

        The size that a picture to be changed has by its shape is left out: it may be rounded, and is no size asked for.
        """
        used = zip(self.request.controls, self.controls, strict=True)
        controls = tuple(one.model_copy(update={"hint_cfg_scale": prepared.hint_cfg_scale}) for one, prepared in used)
        size = self.request.size if self.request.edit else self.settings.size
        return self.request.model_copy(update={"size": size, "controls": controls})

    def is_like(self, other: "Prepared") -> bool:
        """Whether both can be sampled in one batch."""
        if self.second is None or other.second is None:
            return self.second is other.second and self._key() == other._key()
        return self._key() == other._key() and self.second.is_like(other.second)

    def goes_with(self, other: "Prepared") -> bool:
        """Whether both can be sampled side by side: alike, or of one pass, one size and the same networks."""
        company = self._company()
        return self.is_like(other) or (company is not None and company == other._company())

    def _key(self) -> tuple[object, ...]:
        return self.settings, self.controls, self.forms

    def _company(self) -> tuple[object, ...] | None:
        """Equal with those that it can be predicted with; None where it is predicted by itself."""
        if self.second or self.settings.tile or self.settings.pace:
            return None
        return self.settings.size, [id(control.network) for control in self.controls]


def picture_size(base: Backbone, size: tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) of the pictures to make; ``Invalid`` where the base cannot make that size."""
    height, width = size or (base.size, base.size)
    if height % base.multiple or width % base.multiple or min(height, width) <= 0:
        good = [max(round(side / base.multiple), 1) * base.multiple for side in (height, width)]
        raise Invalid(
            f'The base "{base.name}" makes pictures with sides that {base.multiple} divides; got {width}x{height}. '
            f"The nearest is {good[1]}x{good[0]}."
        )
    return height, width


def check_pictures(asked: ControlRequest | EditRequest) -> None:
    """Raise what ``prepare`` would of a control's annotator and pictures, or of a picture to be changed.

    It needs no base.
    """
    if isinstance(asked, EditRequest):
        check_edit(asked)
        return
    control = asked
    for name in filter(None, (control.annotator, *control.annotators.values())):
        contract(name)
    for source in control.images.values():
        if isinstance(source, Path):
            _read(source, control.ready)


def hint_of(asked: ControlRequest, spec: HintSpec, size: tuple[int, int]) -> np.ndarray:
    """The hint (*size, channels) of a control that reads one kind of them, as ``prepare`` makes it.

    Raises as that does.
    """
    if "" not in asked.images:
        raise Invalid(f'"{asked.name}" needs one picture: none was given, or some by type.')
    return _hint(asked.images[""], asked, spec, _maker(spec, asked, ""), size, None)


def load(name: str, base: Backbone, annotator: str | None = None) -> tuple[SavedControl, list[str]]:
    """A control for a base, and what is to be known of it: ``load_control``'s warnings, and other weights."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        saved = load_control(name, base, annotator)
    notes = list(dict.fromkeys(str(one.message) for one in caught if one.category is UserWarning))
    trained_on = saved.trained.get("base_digest")
    # A digest takes seconds on a large base, and bfloat16's rounding gives another.
    comparable = trained_on and base.dtype != torch.bfloat16
    if difference := saved.trained.get("base_difference"):
        if comparable and trained_on == base.digest:
            notes.append(
                f'"{name}" was trained together with its base: merge what that learnt by --lora .../{difference}'
            )
    elif comparable and trained_on != base.digest:
        notes.append(
            f'"{name}" was trained on other weights ({trained_on}) than those of "{base.name}" ({base.digest})'
        )
    return saved, notes


def prepare(
    base: Backbone, requests: Sequence[Request], loaded: Mapping[str, SavedControl] | None = None
) -> list[Prepared]:
    """Make requests ready to be sampled on a base, in their order.

    Args:
        loaded: controls in memory, by the names that requests use; others are loaded, each once.

    Raises ``UserError`` of the kind that fits: ``NotFound`` (a picture, a control), ``Invalid`` (a size, a hint, a
    number of steps), ``Mismatch`` (a control of another base; types of hint for a control that has none).
    """
    preparation = _Preparation(base, loaded or {})
    return [preparation.prepared(request) for request in requests]


class _Preparation:
    """Controls and hints of several requests, each loaded, read and annotated once."""

    def __init__(self, base: Backbone, loaded: Mapping[str, SavedControl]) -> None:
        self.base, self.loaded = base, loaded
        self.controls: dict[tuple[str, str | None], tuple[SavedControl, list[str]]] = {}
        self.ready: dict[tuple[ControlRequest, tuple[int, int], int | None], PreparedControl] = {}
        self.canvases: dict[tuple[EditRequest, tuple[int, int] | None], Canvas] = {}
        self.cut: dict[str, str] = {}

    def prepared(self, request: Request) -> Prepared:
        if request.size:
            picture_size(self.base, request.size)
        canvas = self._canvas(request)
        size = picture_size(self.base, canvas.pixels.shape[:2] if canvas else request.size)
        first = self._pass(request, canvas, size, canvas)
        if not request.hires:
            if late := [one.name for one in request.controls if one.passes == "second"]:
                raise Invalid(f'"{late[0]}" acts in the second pass, and there is none: ask for one by hires.')
            return first
        if canvas and canvas.mask is not None:
            raise Invalid(
                "The picture has a mask, and hires changes the whole of it in its second pass: leave one out."
            )
        asked, multiple = request.hires, self.base.multiple
        height, width = (round(side * asked.factor / multiple) * multiple for side in size)
        later = {"steps": asked.steps or request.steps, "hires": None}
        if max(height, width) > MOST_SIDE:
            raise Invalid(f"The second pass makes {width}x{height} pixels; expected sides of at most {MOST_SIDE}.")
        enlarged = Canvas(np.zeros((height, width, 3), np.uint8), asked.strength)
        second = self._pass(request.model_copy(update=later), enlarged, (height, width), canvas, first)
        notes = tuple(dict.fromkeys([*first.notes, *second.notes]))
        return replace(first, second=second, notes=notes)

    def _canvas(self, request: Request) -> Canvas | None:
        """The picture that a request changes."""
        if request.edit is None:
            return None
        key = (request.edit, request.size)
        if key not in self.canvases:
            self.canvases[key] = canvas_of(request.edit, self.base, request.size)
        return self.canvases[key]

    def _pass(
        self,
        request: Request,
        canvas: Canvas | None,
        size: tuple[int, int],
        shown: Canvas | None,
        first: Prepared | None = None,
    ) -> Prepared:
        """One pass of a request at a size, from noise or from ``canvas``, after the ``first`` one, if this is not it.

        ``shown``: the picture that controls without one of their own read.
        """
        self._check_steps(request)
        notes = [] if request.dialect != "plain" else self._cut(request)
        controls = []
        for asked in request.controls:
            notes += self._loaded(asked)[1]
            key = (asked, size, None if shown is None else id(shown))
            if key not in self.ready:
                self.ready[key] = self._control(asked, size, shown)
            used = self.ready[key]
            is_silent = asked.passes == ("first" if first else "second")
            controls.append(replace(used, scale=0.0) if is_silent else used)
            notes += [] if used.of_first_pass else [*_empty(asked, used), *_found(asked, used)]
        settings = self._settings(request, canvas, size)
        script = Script.of(request, Span(settings.made, first.settings.made if first else 0, int(first is not None)))
        pace, reasons = self._pace(request, settings, controls)
        settings = replace(settings, weights=script.weights, pace=pace)
        notes += reasons
        kept = tuple(dict.fromkeys(notes))
        return Prepared(request, settings, script, tuple(controls), kept, script.forms(self.base), canvas)

    def _pace(
        self, request: Request, settings: SamplingSettings, controls: Sequence[PreparedControl]
    ) -> tuple[Pace | None, list[str]]:
        """The pace of a request's speed; None, with a note on why, where nothing can be reused."""
        pace = PACES.get(request.speed)
        if pace is None:
            return None, []
        if not self.base.has_halves:
            reason = f'the base "{self.base.name}" predicts in one piece'
        elif any(control.network.walks for control in controls):
            reason = "a ControlNet-XS walks beside the encoder"
        elif len(pace.fresh(settings.steps, range(settings.skipped, settings.steps))) == settings.made:
            reason = f"{settings.steps} steps are too few for it"
        else:
            return pace, []
        return None, [f"speed {request.speed} is exact here: {reason}"]

    def _check_steps(self, request: Request) -> None:
        most = self.base.noise.count
        if request.steps > most:
            raise Invalid(f'Sampling takes 1 to {most} steps on the base "{self.base.name}"; got {request.steps}.')
        for control in request.controls:
            if control.by_step and len(control.by_step) != request.steps:
                raise Invalid(
                    f'"{control.name}" has {len(control.by_step)} factors in by_step: expected one for each of the '
                    f"{request.steps} steps."
                )
        self.base.noise.sampler(request.steps, request.scheduler)  # raises where the base has no such scheduler

    def _settings(self, request: Request, canvas: Canvas | None, size: tuple[int, int]) -> SamplingSettings:
        skipped, tile = 0, request.tile
        changes: Literal["nothing", "picture", "masked"] = "nothing"
        if canvas:
            skipped = request.steps - min(int(request.steps * canvas.strength), request.steps)
            changes = "picture" if canvas.mask is None else "masked"
        if tile and tile % self.base.multiple:
            near = max(round(tile / self.base.multiple), 1) * self.base.multiple
            raise Invalid(f'Tiles on "{self.base.name}" have sides that {self.base.multiple} divides, such as {near}.')
        return SamplingSettings(
            request.steps,
            request.guidance,
            size,
            scheduler=request.scheduler,
            guidance_rescale=request.guidance_rescale,
            guider=request.guider,
            skipped=skipped,
            changes=changes,
            tile=tile if tile and tile < max(size) else None,
        )

    def _cut(self, request: Request) -> list[str]:
        """Notes on the ends of prompts that are not read."""
        found = []
        for prompt in (request.prompt, request.negative_prompt or ""):
            if prompt not in self.cut:
                self.cut[prompt] = self.base.cut_words(prompt)
            if cut := self.cut[prompt]:
                found.append(
                    f'the prompt is longer than the {self.base.window} tokens "{self.base.name}" reads at once; cut '
                    f'off: "{one_line(cut)}". The dialects a1111 and comfy read all of it'
                )
        return found

    def _loaded(self, asked: ControlRequest) -> tuple[SavedControl, list[str]]:
        if saved := self.loaded.get(asked.name):
            if asked.annotator and not fits(asked.annotator, saved.hint.annotator):
                raise Invalid(
                    f'"{asked.name}" was loaded with hints of "{saved.hint.annotator}", not {asked.annotator}.'
                )
            return saved, []
        key = (asked.name, asked.annotator)
        if key not in self.controls:
            self.controls[key] = load(asked.name, self.base, asked.annotator)
        return self.controls[key]

    def _control(self, asked: ControlRequest, size: tuple[int, int], shown: Canvas | None) -> PreparedControl:
        name, types = asked.name, [kind for kind in asked.images if kind]
        follows = not asked.images and not asked.ready and asked.passes == "second"
        if not asked.images and not follows and (not shown or asked.ready):
            raise Invalid(f'The control "{name}" needs a picture: none was given.')
        if types and asked.annotator:
            raise Invalid(f'"{name}" has hints by type: leave out annotator, and give annotators by type.')
        network = (saved := self._loaded(asked)[0]).branch
        if network.hint_types and not types:
            known = ", ".join(network.hint_types)
            raise Invalid(f'"{name}" is a Union: say of which type the hint is, as {name}:TYPE=IMAGE. Types: {known}.')
        if types and not network.hint_types:
            raise Mismatch(f'"{name}" is no Union and has no types: give it as {name}=IMAGE.')
        if unknown := [kind for kind in types if kind not in network.hint_types]:
            raise Invalid(f'"{name}" knows no type "{unknown[0]}": {nearest(unknown[0], network.hint_types)}')
        specs = {kind: saved.contract_of(kind) for kind in asked.images or [""]}
        if asked.images:
            hints = {
                kind: _hint(source, asked, specs[kind], _maker(specs[kind], asked, kind), size, shown)
                for kind, source in asked.images.items()
            }
        elif follows:
            hints = {"": np.zeros((*size, specs[""].channels), np.uint8)}
        else:
            assert shown is not None
            masks = specs[""].mask_value is not None
            hints = {"": annotate(shown.hint_picture() if masks else shown.pixels, _maker(specs[""], asked), size)}
        prepared = replace(PreparedControl.of(saved, asked, hints), of_first_pass=follows)
        taps = len(network.taps)
        if asked.by_tap and len(asked.by_tap) != taps:
            raise Invalid(f'"{name}" has {taps} taps, and by_tap {len(asked.by_tap)} factors: expected one for each.')
        if asked.region is not None and network.pools:
            raise Invalid(f'"{name}" gives colours and no places: it has no region. Leave that out.')
        return replace(prepared, region=_region(asked.region, size))


def _region(source: HintSource | None, size: tuple[int, int]) -> np.ndarray | None:
    """Where a control acts, float32 (H, W) in [0, 1]: a picture's light, its transparent parts dark."""
    if source is None:
        return None
    return fit(light_of(source, "the region")[..., None], size)[..., 0].astype(np.float32) / 255


def _maker(spec: HintSpec, asked: ControlRequest, kind: str = "") -> HintSpec:
    """The contract of a control's hints (of a type), by what makes them as asked for."""
    name = asked.annotators.get(kind) if kind else asked.annotator
    return with_maker(spec, name, asked.options)


def _found(asked: ControlRequest, prepared: PreparedControl) -> list[str]:
    """Notes on hints that were made by another annotator than the contract's, which nobody named."""
    return [
        f'the hint of "{asked.name}{f":{kind}" if kind else ""}" was made by {spec.annotator}; a picture that is a '
        "hint already is given as such (--hint-ready)"
        for kind, spec in prepared.makers.items()
        if spec.annotator != prepared.specs[kind].annotator and not (asked.annotators.get(kind) or asked.annotator)
    ]


def _empty(asked: ControlRequest, prepared: PreparedControl) -> list[str]:
    """Notes on the hints of a control that say nothing."""
    return [
        f'the hint of "{asked.name}{f":{kind}" if kind else ""}" is empty, all one value, and steers nothing: look at '
        "the picture it comes from, its transparency and, of lines, their contrast"
        for kind, hint in prepared.hints.items()
        if is_empty(hint, prepared.specs[kind])
    ]


def _read(path: Path, ready: bool, ground: Ground = "black") -> np.ndarray:
    if path.suffix.lower() == ".npy" and not ready:
        raise Invalid(f"{path} is an array, and arrays are hints already: say so by ready (--hint-ready).")
    return (read_hint if ready else read_picture)(path, ground)


def _hint(
    source: HintSource,
    asked: ControlRequest,
    spec: HintSpec,
    maker: HintSpec,
    size: tuple[int, int],
    canvas: Canvas | None,
) -> np.ndarray:
    """A hint (*size, channels) of a source: as it is where it is ready, else annotated as ``maker`` says.

    Where only a part of ``canvas`` is worked on, the source shows the whole of it, and the hint is of that part.
    """
    ground, where = grounds_of(spec)[0], f'of "{asked.name}"'
    is_made = not asked.ready and kind_or_bare(maker.annotator).is_made_here
    if ground and is_made:
        ground = "white"  # of the photograph that hints are made of
    drawn = not isinstance(source, Path) and source.dtype == np.uint8 and source.shape[-1] in (3, 4)
    if isinstance(source, Path):
        pixels, where = _read(source, asked.ready, ground), f"in {source}"
    elif drawn and (not asked.ready or (source.shape[-1] == 4 and spec.channels in (1, 3))):
        pixels = decode_picture(png_bytes(source), "the picture", ground)  # as if it were a file
    elif asked.ready:
        pixels = source
    else:
        shape = " x ".join(map(str, source.shape))
        raise Invalid(f'"{asked.name}" got {shape} of {source.dtype}, which is no picture: if it is a hint, set ready.')
    if asked.ready:
        if words := spec.fault(pixels):
            raise Invalid(f"The hint {where} {words}.")
        pixels = light_lines(pixels, spec) if isinstance(source, Path) else pixels
    how = "area" if is_made else spec.resize
    if canvas and canvas.box:
        pixels = canvas.part_of(pixels, how, asked.resize)
    elif asked.resize == "stretch":
        pixels = stretch(pixels, size, how)
    inner = inner_size(pixels.shape, size) if asked.resize == "fill" and not (canvas and canvas.box) else size
    hint = fit(pixels, inner, spec.resize) if asked.ready else annotate(pixels, maker, inner)
    return hint if inner == size else surround(hint, size, spec.resize)
