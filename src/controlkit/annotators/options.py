"""Options of annotators: a model of each one's, read off its function's keywords, and their sliders.

A keyword's annotation says its range, and may say how a slider shows it: ``Annotated[float, Field(ge=0, le=1e4),
Slider(0, 255)]``.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Slider:
    """The part of an option's range that a slider shows, where the whole of it is of little use."""

    least: float
    most: float
    step: float = 1.0


Switch = Annotated[float, Field(ge=0, le=1), Slider(0, 1)]
"""An option that is 0 for no, or 1 for yes: contracts of hints hold numbers alone."""


@dataclass(frozen=True)
class Threshold:
    """One of the two numbers that A1111's ControlNet extension gives its modules, as an option of ours."""

    option: str
    """The option's name here; "" where ours has none that means the same, and the number is not read."""
    title: str
    """The slider's name there."""
    value: float
    """Its default there, which stands for a number below 0 too."""
    least: float
    most: float
    step: float = 1.0
    per: float = 1.0
    """The option's value is theirs times this."""


class Options(BaseModel):
    """The options of a kind: one field for each keyword of its function."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def options_of(name: str, function: Callable[..., Any] | None) -> type[Options]:
    """The model of a function's options: of each keyword that has a default, but for ``device``."""
    found = inspect.signature(function, eval_str=True).parameters.values() if function else ()
    fields: dict[str, Any] = {
        one.name: (float if one.annotation is one.empty else one.annotation, one.default)
        for one in found
        if one.default is not one.empty and one.name != "device"
    }
    return create_model(f"{name.title()}Options", __base__=Options, **fields)


def slider_of(name: str, info: FieldInfo) -> dict[str, Any]:
    """An option as a slider, ``{name, value, min, max, step}``.

    Its range is its annotation's ``Slider``; else the option's own, in steps of a hundredth, rounded down to 1, 2 or 5
    times a power of ten and no larger than its default. An end that is not in the range itself is one step inside.
    """
    for one in info.metadata:
        if isinstance(one, Slider):
            return {"name": name, "value": info.default, "min": one.least, "max": one.most, "step": one.step}
    bounds = {key: getattr(one, key) for one in info.metadata for key in ("ge", "gt", "le", "lt") if hasattr(one, key)}
    low, high = (float(bounds.get(a, bounds.get(b, end))) for a, b, end in (("ge", "gt", 0), ("le", "lt", 1)))
    rough = min((high - low) / 100, abs(info.default) or math.inf) * 1.0001
    power = 10.0 ** math.floor(math.log10(rough))
    step = float(f"{max(times for times in (1, 2, 5) if times * power <= rough) * power:.6g}")
    low, high = low + step * ("gt" in bounds), high - step * ("lt" in bounds)
    return {"name": name, "value": info.default, "min": low, "max": high, "step": step}
