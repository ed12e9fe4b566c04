"""Requests: what to make, checked, saved as JSON; and the results, steps and pictures.

A new option of sampling goes from ``Request`` through ``prepare`` (``SamplingSettings``) to ``loop.denoise``. It is an
option of ``cli/pictures.py`` too, which ``cli/requests.py`` reads (``FIELDS``); ``measure.EvaluationPlan`` may need it.
"""

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    model_validator,
)
from torch import Tensor

from controlkit.errors import Invalid, first_fault
from controlkit.files import home_path, parse_json
from controlkit.images import MOST_SIDE, Fitting, decode_hint, hint_bytes
from controlkit.prompts import Dialect

PLAIN_PROMPT = "a high-quality, detailed, and professional image"
"""The paper's prompt for no prompt ("insufficient prompt", Section 4.2)."""

ARRAY_TYPES = ("uint8", "uint16", "float32")
Mode = Literal["balanced", "prompt", "control"]
Guider = Literal["cfg", "apg"]
Speed = Literal["exact", "fast", "turbo"]
MODES: dict[str | int, Mode] = {
    "Balanced": "balanced",
    "My prompt is more important": "prompt",
    "ControlNet is more important": "control",
    0: "balanced",
    1: "prompt",
    2: "control",
}
"""A1111's names and numbers of modes."""
RESIZES: dict[str | int, Fitting] = {
    "Just Resize": "stretch",
    "Crop and Resize": "crop",
    "Resize and Fill": "fill",
    "Inner Fit (Scale to Fit)": "crop",
    "Scale to Fit (Inner Fit)": "crop",
    "Outer Fit (Shrink to Fit)": "fill",
    "Envelope (Outer Fit)": "fill",
    "pixel-perfect": "crop",
    0: "stretch",
    1: "crop",
    2: "fill",
}
"""A1111's names and numbers of resize modes, of all its versions. Its pixel-perfect is always so here: hints are made
at the size of the picture to be made."""
PNG, NPY = "data:image/png;base64,", "data:application/x-npy;base64,"
RGBA = b"\x06"
"""The colour type of a PNG with transparency, its 26th byte."""


def _as_utf8(text: str) -> str:
    """A text that can be written; half a character, as a shell's bytes that are no UTF-8 leave it, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{text!a:.80}; expected a text in UTF-8") from None
    return text


Text = Annotated[str, AfterValidator(_as_utf8), Field(max_length=20_000)]
Factor = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
"""Of residuals. Beyond this no picture is left; some numbers would overflow their format."""
Factors = Annotated[
    tuple[Factor, ...], BeforeValidator(lambda value: value.split("/") if isinstance(value, str) else value)
]
"""Several; as a text, with strokes between them: ``1/0.5/0``."""
Guidance = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]
Side = Annotated[int, Field(gt=0, le=MOST_SIDE)]
Pixels = Annotated[int, Field(ge=0, le=MOST_SIDE)]
Share = Annotated[float, Field(ge=0, le=1)]


def _read_source(value: Any) -> Path | np.ndarray:
    """A path, or an array (H, W, C) that cannot be written to; of a ``data:`` URI the array in it."""
    if isinstance(value, str) and value.startswith("data:"):
        value = _from_uri(value)
    if isinstance(value, str | Path) and str(value):
        if "\0" in str(value):
            raise ValueError(f"{str(value)!a:.80}; expected a path, which has no zero bytes")
        return home_path(_as_utf8(str(value)))
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{value!r:.80}; expected a path, a data: URI or an array")
    if value.ndim != 3 or not value.size or value.dtype.name not in ARRAY_TYPES:
        shape = " x ".join(map(str, value.shape))
        raise ValueError(f"{shape} of {value.dtype}; expected height x width x channels of {', '.join(ARRAY_TYPES)}")
    locked = value.astype(value.dtype.newbyteorder("="), copy=False).view()
    locked.flags.writeable = False
    return locked


def _from_uri(uri: str) -> np.ndarray:
    head, _, code = uri.partition(",")
    if not head.endswith(";base64"):
        raise ValueError(f'"{head[:40]}" is not coded in base64; expected "{PNG}..." or "{NPY}..."')
    try:
        data = base64.b64decode(code, validate=True)
    except ValueError as error:
        raise ValueError(f"a data: URI whose base64 cannot be read ({error})") from None
    pixels = decode_hint(data, "the data: URI", ground=None)
    whole = pixels.dtype == np.uint8 and pixels.shape[-1] == 4 and pixels[..., 3].min() == 255
    return pixels[..., :3] if whole and data[25:26] != RGBA and uri.startswith("data:image") else pixels


def _write_source(source: Path | np.ndarray) -> str:
    """A path as text; an array as a ``data:`` URI, a PNG where it is a picture and else a ``.npy`` file."""
    if isinstance(source, Path):
        return str(source)
    suffix, content = hint_bytes(source)
    return (PNG if suffix == ".png" else NPY) + base64.b64encode(content).decode()


def _comparable(source: Path | np.ndarray | None) -> Any:
    """A source, to compare: of an array its type, shape and bytes."""
    return (source.dtype.name, source.shape, source.tobytes()) if isinstance(source, np.ndarray) else source


def _ours(names: Mapping[str | int, str]) -> BeforeValidator:
    """A value by its name here, or by A1111's name or number; letters' case does not matter."""
    known = {str(name).lower(): value for name, value in names.items()}
    return BeforeValidator(lambda value: known.get(str(value).lower(), value))


def _by_type(value: Any) -> Any:
    """One picture as the only one, under ""."""
    return {"": value} if isinstance(value, str | Path | np.ndarray) else value


Resizing = Annotated[Fitting, _ours(RESIZES)]
Passes = Annotated[Literal["both", "first", "second"], _ours({"Low res only": "first", "High res only": "second"})]
"""With A1111's names."""
HintSource = Annotated[Path | np.ndarray, PlainValidator(_read_source), PlainSerializer(_write_source, return_type=str)]
"""A file, or pixels in memory: a picture, uint8 (H, W, 3 or 4), or a hint (H, W, C) of uint8, uint16 or float32."""


class _Checked(BaseModel):
    """Frozen values; ``Invalid`` names the first key that is not as it must be."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise Invalid(first_fault(error, type(self).__name__, type(self).model_fields)) from None

    def to_json(self) -> str:
        """All of it as JSON; arrays as ``data:`` URIs."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The value that ``to_json`` wrote; ``Invalid`` where the text is none."""
        values = parse_json(text, f"The {cls.__name__}")
        if not isinstance(values, dict):
            raise Invalid(f"The JSON holds a {type(values).__name__}; expected keys and values of a {cls.__name__}.")
        return cls(**values)


class ControlRequest(_Checked):
    """One control of a picture, with its own settings."""

    name: Annotated[Text, Field(min_length=1)]
    """A shipped control's name, a file, a folder; of a Union one of its types may be named, ``UNION:TYPE``."""
    images: Annotated[Mapping[str, HintSource], BeforeValidator(_by_type)] = {}
    """Its pictures: under "" where it reads one kind of hint; of a Union, by type of hint. One picture alone is taken
    as that under "". Without any it reads the picture that is changed: if it acts in the second pass alone, what the
    first one made; else that of ``Request.edit``, with its mask where its hints have one. Where there is none, it is a
    template, for ``model_copy``, and ``prepare`` refuses it."""
    ready: bool = False
    """Whether these are hints already. If not, the control's annotator makes hints of them. A file in which lines are
    drawn dark on light is inverted; arrays are taken as they are."""
    annotator: str | None = None
    """Name of the annotator: for a control that does not say it itself, or another maker of the same hints, as the
    contract's family has them. None: what the contract says or, where that cannot be made here, the first maker of the
    family that has all it needs."""
    annotators: Mapping[str, Text] = {}
    """Of a Union: the same of each type, by its name."""
    options: Mapping[str, Annotated[float, Field(allow_inf_nan=False)]] = {}
    """Options of the annotator, in its own ranges; of a Union, where it reads one type alone. Those left out have the
    contract's values, or the defaults."""
    scale: Factor = 1.0
    """A factor on its residuals, -100 to 100; 0 is no control. Of several types of a Union, on their features."""
    scales: Mapping[str, Factor] = {}
    """Of a Union: the scale of each type, by its name, where that is not ``scale``."""
    start: Share = 0.0
    end: Share = 1.0
    """It acts on the steps between these shares of the steps that are made."""
    by_step: Factors = ()
    """A factor for each step, as many as ``Request.steps``; none is 1 everywhere. Where a picture is changed, those of
    the first steps, which are not made, count for nothing."""
    by_tap: Factors = ()
    """A factor for each tap, in the control's order: the finest skip first, the middle block last (A1111's
    ``advanced_weighting``: 13 for SD 1.5, 10 for SDXL); none is 1 everywhere."""
    resize: Resizing = "crop"
    """How its pictures come to the size of the picture to be made: ``crop`` (scaled to cover it, the middle cut out),
    ``stretch``, or ``fill`` (scaled to fit in; the rest says nothing, or what its border says most). A1111's names and
    numbers are understood."""
    passes: Passes = "both"
    """Where there is a second pass (``Request.hires``): in which it acts, ``both``, ``first`` or ``second``."""
    mode: Annotated[Mode, _ours(MODES)] = "balanced"
    """Which counts more: ``balanced``; ``prompt``, softer at finer taps, 0.825^k for the k-th tap before the last;
    ``control``, the same, on the conditional half of guidance alone. A1111's names and numbers are understood."""
    cond_only: bool = False
    """Whether it acts on the conditional half of guidance alone."""
    cfg_weights: bool = False
    """The paper's CFG resolution weighting (Section 3.4): on the conditional half alone, each tap times the ratio of
    the finest resolution to its own: 64 / h for pictures of 512 pixels on Stable Diffusion."""
    region: HintSource | None = None
    """A picture (any size, scaled to fit; light is 1, dark or transparent 0) of where it acts; None is everywhere."""
    guess: bool = False
    """Guess mode (Section 4.2 of the paper's first version), for use without a prompt: the control acts on the
    conditional half of guidance alone, and is weaker at finer resolutions (0.1 at the finest, 1 at the middle)."""
    hint_cfg_scale: Guidance | None = None
    """How many times guidance counts the hint, 0 to ``Request.guidance``; see ``scales.unconditional_share``. None: as
    the control's file says, or 1."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.start > self.end:
            raise ValueError(f"start is {self.start:g} and end is {self.end:g}; expected start <= end")
        for key in ("scales", "annotators"):
            if self.images and (strange := getattr(self, key).keys() - (self.images.keys() - {""})):
                raise ValueError(f'{key} names the type "{min(strange)}", of which there is no picture')
        if self.options and len(self.images) > 1:
            raise ValueError("options are of one annotator, and there are several types of hint; expected one")
        if (self.mode != "balanced") + self.guess + self.cfg_weights > 1:
            raise ValueError("it has two of mode, guess and cfg_weights; expected one, as each weighs the taps")
        return self

    def _key(self) -> tuple[Any, ...]:
        """All of it, to compare: of arrays their type, shape and bytes."""
        images = {kind: _comparable(source) for kind, source in self.images.items()}
        tables = ("scales", "annotators", "options")
        others = (getattr(self, name) for name in type(self).model_fields if name not in {"images", "region", *tables})
        held = (frozenset(getattr(self, name).items()) for name in tables)
        return frozenset(images.items()), *held, _comparable(self.region), *others

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, ControlRequest) and self._key() == other._key())

    def __hash__(self) -> int:
        return hash(self._key())


class EditRequest(_Checked):
    """A picture to be changed: the whole of it, or what a mask shows."""

    image: HintSource
    """The picture. Where it is transparent and no mask is given, it is masked."""
    strength: Share | None = None
    """The share of the steps that are made, on the picture with the noise of there; 0 gives the picture back. None: 1
    with a mask, else 0.75."""
    mask: HintSource | None = None
    """A picture of the same shape: where it is light, the picture is made anew; all else stays as it is, to the
    pixel."""
    blur: Annotated[int, Field(ge=0, le=256)] = 0
    """The width in pixels over which the mask's edge passes outside it from new to old; 0 is a sharp edge."""
    outpaint: tuple[Pixels, Pixels, Pixels, Pixels] = (0, 0, 0, 0)
    """Pixels that are added above, right, below and left, and made anew."""
    fill: bool = False
    """Whether what is masked is first filled with the colours around it; matters where ``strength`` is less than 1."""
    margin: Pixels | None = None
    """Only what is masked and so many pixels around it are worked on, at the request's size, and pasted back into the
    picture ("only masked" elsewhere); None is the whole picture."""
    resize: Resizing = "crop"
    """How it comes to the request's size, as ``ControlRequest.resize``; with ``fill`` the rest is made anew."""

    def _key(self) -> tuple[Any, ...]:
        others = (getattr(self, name) for name in type(self).model_fields if name not in ("image", "mask"))
        return _comparable(self.image), _comparable(self.mask), *others

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, EditRequest) and self._key() == other._key())

    def __hash__(self) -> int:
        return hash(self._key())


class HiresRequest(_Checked):
    """A second pass: the picture scaled up, and changed at that size ("hires fix" elsewhere).

    It begins with the noise of the same seed, at the larger size.
    """

    factor: Annotated[float, Field(gt=1, le=8)] = 2.0
    """How many times as high and wide."""
    strength: Share = 0.7
    """As ``EditRequest.strength``."""
    steps: int | None = Field(None, ge=1)
    """As ``Request.steps``; None is as many."""


_SKIPS: dict[Dialect, tuple[int, int, str]] = {
    "plain": (0, 11, "0 (no layer) to 11"),
    "a1111": (1, 12, "1 (the last layer) to 12"),
    "comfy": (-12, -1, "-1 (the last layer) to -12"),
}


class Request(_Checked):
    """One picture to make.

    The same request on the same base gives the same picture, whatever is made beside it.
    """

    prompt: Text = PLAIN_PROMPT
    """Words for the picture; "" is no prompt."""
    negative_prompt: Text | None = None
    """Words for what the picture must not show; None is no prompt at all (for SDXL not the same as an empty one)."""
    dialect: Dialect = "plain"
    """How both are read: ``plain``, every letter as it is; ``a1111``, with its weights, schedules, ``AND`` and
    ``BREAK``; ``comfy``, with its weights. Prompts longer than a window of the text encoder are cut in ``plain``, as
    captions are in training, and take several windows in the others."""
    clip_skip: int | None = Field(None, ge=-12, le=12)
    """Layers of the text encoder that are left out, as the dialect counts them: ``plain`` from 0 (diffusers), ``a1111``
    from 1, ``comfy`` from -1. None is as the base was trained."""
    seed: int = Field(0, ge=0, lt=2**64)
    """The starting noise depends on it alone, as ``torch.Generator().manual_seed(seed)`` gives it."""
    size: tuple[Side, Side] | None = None
    """(height, width) in pixels; None is the base's own. Of a picture to be changed its shape, with the base's own size
    as the shorter side."""
    steps: int = Field(20, ge=1)
    guidance: Guidance = 4.0
    """Of classifier-free guidance, 0 to 1000; 1 is none."""
    guidance_rescale: Share = 0.0
    """How far the guided prediction is brought back to the spread of the conditional one, 0 to 1 (Lin et al., 2023,
    Section 3.4): against glaring pictures of bases with zero terminal SNR."""
    guider: Guider = "cfg"
    """``cfg``, classifier-free guidance; ``apg``, adaptive projected guidance (Sadat et al., ICLR 2025), which keeps
    colours from glaring at high guidance."""
    speed: Speed = "exact"
    """``exact``; ``fast`` and ``turbo``, in which some steps read what an earlier one left of the U-Net's encoder and
    the controls: pictures differ, and are as good and as obedient on average (docs/speed.md)."""
    scheduler: Text | None = None
    """Its usual name, such as ``Euler a`` or ``DPM++ 2M Karras``; None is the base's own."""
    controls: tuple[ControlRequest, ...] = ()
    edit: EditRequest | None = None
    """A picture to be changed; None makes one from noise."""
    hires: HiresRequest | None = None
    """A second pass at a larger size; None is none."""
    tile: Side | None = None
    """The side in pixels of the overlapping tiles in which large pictures are made, so that the base sees sizes it was
    trained on; None is the picture as one."""
    variation: Share = 0.0
    """How far its noise is turned towards that of ``variation_seed``, 0 to 1 (A1111's subseed strength)."""
    variation_seed: int = Field(0, ge=0, lt=2**64)

    @model_validator(mode="after")
    def _counted(self) -> Self:
        least, most, words = _SKIPS[self.dialect]
        if self.clip_skip is not None and not least <= self.clip_skip <= most:
            raise ValueError(f'clip_skip is {self.clip_skip}; in the dialect "{self.dialect}" it is {words}')
        return self


@dataclass(frozen=True)
class Step:
    """One step made of a batch of ``count`` pictures: number ``step`` of ``steps``, from 1."""

    step: int
    steps: int
    count: int
    draw: Callable[[], list[np.ndarray]]

    def preview(self) -> list[np.ndarray]:
        """A rough picture of each, uint8 (h, w, 3), at the latents' size; nothing is computed before this call."""
        return self.draw()


@dataclass(frozen=True, eq=False)
class Picture:
    """A finished picture, uint8 (H, W, 3), with its request; and final latents (C, h, w), where its maker has such."""

    request: Request
    pixels: np.ndarray
    latents: Tensor | None = None
