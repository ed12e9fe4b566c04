"""A matrix of settings: what `--grid`, `--prompts` and `--num-images` ask for, as requests in rows and columns."""

import csv
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from controlkit.cli.requests import BY_TYPE, EDIT, HIRES, KEYS, changed_control, drawn_seed, edit_of, hires_of
from controlkit.cli.shared import parse_size
from controlkit.errors import Invalid, nearest, one_line
from controlkit.files import read_text

if TYPE_CHECKING:
    from controlkit.sample import ControlRequest, Request

MOST = 10_000
"""Pictures that one command makes."""
_LONGEST = 1 << 24
"""Bytes of a file of prompts."""


@dataclass(frozen=True)
class Axis:
    """A key with its values, as texts."""

    key: str
    values: tuple[str, ...]

    def labels(self) -> list[str]:
        """Each value in a few words; a prompt says by itself what it is."""
        return [one if self.key == "prompt" and one else f"{self.key} {one or 'none'}" for one in self.values]


@dataclass(frozen=True)
class Matrix:
    """Requests of pictures in rows of equal length, and the labels of rows and columns."""

    rows: list[list["Request"]]
    columns: list[str]
    labels: list[str]
    """Of the rows; none where there is one."""

    def requests(self) -> list["Request"]:
        """All, row by row."""
        return [request for row in self.rows for request in row]

    def names(self) -> list[str]:
        """Of each request, a name of its own: its seed, with a number before it where seeds repeat."""
        seeds = [request.seed for request in self.requests()]
        digits = len(str(len(seeds)))
        return [f"{seed}" if len({*seeds}) == len(seeds) else f"{i:0{digits}}-{seed}" for i, seed in enumerate(seeds)]


def axes_of(grid: Sequence[str], prompts: Path | None, num_images: int, first: "Request") -> list[Axis]:
    """The axes that options ask for, the columns' last: prompts of a file, ``--grid``'s, seeds that count on.

    Raises ``Invalid`` for a key given twice, and for more than ``MOST`` pictures.
    """
    axes = [Axis("prompt", _prompts(prompts))] if prompts else []
    axes += [_axis(text) for text in grid]
    if num_images > 1 or not axes:
        key, begun = ("variation-seed", first.variation_seed) if first.variation else ("seed", first.seed)
        if begun + num_images > 2**64:
            reach = f"{num_images} seeds from there go beyond the largest, {2**64 - 1}"
            raise Invalid(f"--{key} is {begun}, and {reach}.")
        axes.append(Axis(key, tuple(str(begun + i) for i in range(num_images))))
    keys = [axis.key for axis in axes]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise Invalid(f'"{twice}" is varied twice: give all its values once (--grid, --prompts, --num-images).')
    if (count := math.prod(len(axis.values) for axis in axes)) > MOST:
        raise Invalid(f"That makes {count:,} pictures; expected at most {MOST:,} at once.")
    return axes


def _prompts(file: Path) -> tuple[str, ...]:
    """The lines of a file that are not empty."""
    lines = tuple(line.strip() for line in read_text(file, _LONGEST).splitlines() if line.strip())
    if not lines:
        raise Invalid(f"{file} holds no prompts: expected one a line.")
    return lines


def _axis(text: str) -> Axis:
    """KEY=V1,V2: values with commas stand in double quotes, as in a table's file, or have a backslash before each."""
    key, _, values = text.partition("=")
    try:
        [found] = csv.reader([values.replace("\\,", "\0")], skipinitialspace=True, strict=True)
    except (csv.Error, ValueError):
        found = []
    if not key or not found:
        raise Invalid(f'--grid is "{text}"; expected KEY=VALUE,VALUE, such as scale=0.5,1 or \'prompt="a, b",c\'.')
    known = [drawn_seed() if key == "seed" and one.strip() == "-1" else one for one in found]
    return Axis(key.strip(), tuple(str(one).replace("\0", ",").strip() for one in known))


def matrix(first: "Request", axes: Sequence[Axis]) -> Matrix:
    """The requests of all combinations: the last axis makes the columns, the product of the others the rows.

    Raises ``Invalid`` for a key that is none, and for values that do not fit.
    """
    *others, last = axes
    below = list(itertools.product(*(zip(axis.values, axis.labels(), strict=True) for axis in others)))
    rows, labels = [], []
    for values in below:
        begun = first
        for axis, (value, _) in zip(others, values, strict=True):
            begun = changed(begun, axis.key, value)
        rows.append([changed(begun, last.key, value) for value in last.values])
        labels.append(", ".join(label for _, label in values))
    return Matrix(rows, last.labels(), labels if others else [])


def changed(request: "Request", key: str, text: str) -> "Request":
    """A request with another value of a key: a field of its own, a control's setting, or ``NAME.SETTING`` of one."""
    name, _, setting = key.rpartition(".")
    field = key.replace("-", "_")
    from controlkit.sample import EditRequest, Request

    if field in (plain := _plain_fields(Request)):
        value: Any = parse_size(text) if field == "size" else text
        return _with(request, {field: None if text == "" and plain[field] else value})
    if request.edit and EDIT.get(field) in _plain_fields(EditRequest):
        return _with(request, {"edit": edit_of({field: text}, request.edit)})
    if request.hires and field in HIRES:
        return _with(request, {"hires": hires_of({field: text}, request.hires)})
    if setting not in KEYS:
        raise Invalid(f'--grid has no key "{one_line(key)}": {nearest(setting, [*_keys(plain), *KEYS])}')
    if not request.controls:
        raise Invalid(f'--grid varies "{one_line(key)}" of the controls, and there is none: give one by --control.')
    if name and not any(_is_meant(name, control) for control in request.controls):
        raise Invalid(f'--grid names the control "{one_line(name)}": {nearest(name, map(_name, request.controls))}')
    controls = [
        _changed_control(control, name, setting, text) if not name or _is_meant(name, control) else control
        for control in request.controls
    ]
    return _with(request, {"controls": controls})


def _with(request: "Request", changes: Mapping[str, Any]) -> "Request":
    from controlkit.sample import Request

    return Request(**{name: getattr(request, name) for name in Request.model_fields} | dict(changes))


def _plain_fields(model: Any) -> dict[str, bool]:
    """The fields of a request whose value is a text, a number or a size -> whether it may be none."""
    found = {}
    for name, field in model.model_fields.items():
        parts = [*_parts(field.annotation)]
        if all(part in (str, int, float, bool, type(None)) or isinstance(part, str) for part in parts):
            found[name] = type(None) in parts
    return found


def _parts(annotation: Any) -> Iterator[Any]:
    """The plain types, and the words, that a type is made of."""
    if hasattr(annotation, "__metadata__"):  # Annotated: its ranges are checked by the request
        annotation = annotation.__origin__
    inner = get_args(annotation)
    yield from (part for one in inner for part in _parts(one)) if inner else [annotation]


def _keys(fields: Mapping[str, bool]) -> Iterator[str]:
    return (name.replace("_", "-") for name in fields)


def _name(control: "ControlRequest") -> str:
    return control.name


def _is_meant(name: str, control: "ControlRequest") -> bool:
    """Whether a control is called so, by its whole name or its file's, or one of its types is."""
    return name in (control.name, Path(control.name).stem) or _type_in(name, control) != ""


def _type_in(name: str, control: "ControlRequest") -> str:
    """The type of a Union that NAME:TYPE means; "" where it means none."""
    own, _, kind = name.rpartition(":")
    return kind if kind in control.images and own in (control.name, Path(control.name).stem) else ""


def _changed_control(control: "ControlRequest", name: str, setting: str, text: str) -> "ControlRequest":
    if kind := _type_in(name, control):
        if setting not in BY_TYPE:
            known = " and ".join(BY_TYPE)
            raise Invalid(f'--grid varies "{one_line(name)}.{setting}": a Union\'s types have {known} each.')
        table = BY_TYPE[setting]
        return changed_control(control, {table: {**getattr(control, table), kind: text}})
    return changed_control(control, {KEYS[setting]: text if text != "" else None})
