"""Control units: the ControlNet extension's part of A1111's requests, as controls of a ``Request``."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from controlkit.annotators import HintKind, kind_or_bare
from controlkit.errors import Invalid, one_line
from controlkit.sample.request import MODES, RESIZES, ControlRequest
from controlkit.serve import incoming
from controlkit.serve.catalogue import Catalogue, module_named
from controlkit.serve.settings import Limits

_HONOURED = (
    "enabled", "module", "model", "weight", "image", "input_image", "mask", "mask_image", "resize_mode", "threshold_a",
    "threshold_b", "guidance_start", "guidance_end", "guidance", "control_mode", "guessmode", "hr_option",
    "advanced_weighting", "effective_region_mask", "union_control_type",
)  # fmt: skip
_UNUSED = (
    "low_vram", "lowvram", "processor_res", "pixel_perfect", "save_detected_map", "ipadapter_input", "is_ui",
    "use_preview_as_input", "generated_image", "inpaint_crop_input_image", "batch_images", "output_dir", "loopback",
    "input_mode", "pulid_mode", "batch_mask_gallery", "batch_input_gallery", "multi_inputs_gallery", "mask_image_fg",
    "image_fg", "batch_modifiers", "animatediff_batch", "hint", "unit_index",
)  # fmt: skip
"""Fields that clients send and that mean nothing here: hints are made at the size of the picture to be made."""
FIELDS = (*_HONOURED, *_UNUSED)
_PASSES = {"both": "both", "low res only": "first", "high res only": "second"}


class Units:
    """The units of one request, read with its other settings."""

    def __init__(self, catalogue: Catalogue, limits: Limits, *, has_picture: bool, has_second: bool) -> None:
        self.catalogue, self.limits = catalogue, limits
        self.has_picture, self.has_second = has_picture, has_second
        """Whether the request changes a picture, which units without one read; whether there is a second pass."""
        self.notes: list[str] = []

    def controls(self, given: Sequence[Any]) -> list[ControlRequest]:
        """The controls of all units that are enabled; raises ``Invalid`` naming the unit."""
        if len(given) > 64:
            raise Invalid(f"There are {len(given)} control units; expected at most {self.limits.controls} in use.")
        found = []
        for number, unit in enumerate(given):
            if unit is None or isinstance(unit, bool):  # scripts' older form begins with such
                continue
            if not isinstance(unit, Mapping):
                raise Invalid(f"Control unit {number} is {incoming.kind_of(unit)}; expected keys and values.")
            if not incoming.truth(unit, "enabled", True):
                continue
            try:
                if (control := self._control(unit)) is not None:
                    found.append(control)
            except Invalid as error:
                raise Invalid(f"Control unit {number}: {error}") from None
        if len(found) > self.limits.controls:
            raise Invalid(f"{len(found)} controls are asked for; this server takes at most {self.limits.controls}.")
        return found

    def _control(self, unit: Mapping[str, Any]) -> ControlRequest | None:
        self._check_fields(unit)
        kind = module_named(incoming.text(unit, "module"))
        model = incoming.text(unit, "model").strip()
        if model.lower() in ("", "none"):
            if kind is not None:
                names = ", ".join(self.catalogue.titles()[:20])
                raise Invalid(f'it has the module "{kind.name}" and no model: expected one of {names}.')
            self.notes.append("a control unit has neither module nor model, and does nothing")
            return None
        control = self.catalogue.control_named(model)
        named = self.catalogue.type_for(control, incoming.text(unit, "union_control_type"), kind)
        values: dict[str, Any] = {"name": control["name"]} | self._weights(unit) | self._when(unit)
        pixels = self._pixels(unit, kind, named or control["annotator"])
        values["ready"] = kind is None and pixels is not None
        if pixels is not None or named:
            if pixels is None:
                raise Invalid("it has no image, which a Union's type needs.")
            values["images"] = {named: pixels}
        elif not self.has_picture:
            raise Invalid("it has no image: send one as base64.")
        if kind is not None:
            values |= self._maker(unit, kind, named, control)
        if region := unit.get("effective_region_mask"):
            values["region"] = incoming.picture(region, "effective_region_mask", self.limits)
        return ControlRequest(**values)

    def _check_fields(self, unit: Mapping[str, Any]) -> None:
        unknown = [str(key) for key in unit if key not in FIELDS]
        for key in unknown:
            if close := difflib.get_close_matches(key.lower(), FIELDS, n=1, cutoff=0.75):
                raise Invalid(f'it has no field "{one_line(key)}": did you mean "{close[0]}"?')
        if unknown:
            self.notes.append(f"fields of a control unit that nothing reads: {one_line(', '.join(unknown))}")
        if unit.get("ipadapter_input"):
            raise Invalid("ipadapter_input is not read here: it would have to be unpickled. Leave it out.")

    def _pixels(self, unit: Mapping[str, Any], kind: HintKind | None, reads: str) -> np.ndarray | None:
        """The unit's picture, uint8 (H, W, 3); (H, W, 4) with its mask, where its hints have masks."""
        given, mask = unit.get("image") or unit.get("input_image"), unit.get("mask_image") or unit.get("mask")
        if isinstance(given, list) and given:
            if len(given) > 1 and isinstance(given[0], Mapping):
                raise Invalid(f"it has {len(given)} images; expected one.")
            given, mask = (given[0], mask) if isinstance(given[0], Mapping) else (given[0], (*given[1:], mask)[0])
        if isinstance(given, Mapping):
            mask = given.get("mask") or mask
            given = given.get("image")
        if not given:
            return None
        is_masked = kind_or_bare(reads).mask_value is not None
        ground = None if kind is None and is_masked else "white"
        pixels = incoming.picture(given, "image", self.limits, ground)
        if not (mask and is_masked):
            if mask:
                self.notes.append("the mask of a control unit whose hints have none is left out")
            return pixels
        anew = incoming.picture(mask, "mask_image", self.limits, "black").max(-1)
        if anew.shape != pixels.shape[:2]:
            raise Invalid("its mask has another shape than its image: expected the same height and width.")
        return np.dstack([pixels[..., :3], np.where(anew > 127, 0, 255).astype(np.uint8)])

    def _maker(self, unit: Mapping[str, Any], kind: HintKind, named: str, control: Mapping[str, Any]) -> dict[str, Any]:
        """The annotator and its options, as fields of a control; thresholds out of range are the defaults, as there."""
        numbers = [incoming.number(unit, f"threshold_{one}", -1, -1e9, 1e9) for one in "ab"]
        options: dict[str, float] = {}
        if max(numbers) >= 0 and kind.thresholds:
            try:
                options = kind.of_thresholds(*numbers)
            except Invalid as error:
                self.notes.append(f"thresholds are the defaults: {error}")
        own = named or control["annotator"]
        if kind.name == own or (not own and not control["types"]):
            return {"options": options} | ({} if own else {"annotator": kind.name})
        return {"options": options} | ({"annotators": {named: kind.name}} if named else {"annotator": kind.name})

    def _weights(self, unit: Mapping[str, Any]) -> dict[str, Any]:
        weight = incoming.number(unit, "weight", 1.0, -1e9, 1e9)
        if not 0 <= weight <= 2:
            self.notes.append(
                f"weight {weight:g} of a control unit is out of 0 to 2, and taken as the nearest of these"
            )
        found: dict[str, Any] = {"scale": min(max(weight, 0.0), 2.0)}
        if taps := unit.get("advanced_weighting"):
            if not isinstance(taps, list) or not all(isinstance(one, int | float) for one in taps):
                raise Invalid("advanced_weighting is none: expected a list of numbers.")
            found["by_tap"] = tuple(taps)
        mode = unit.get("control_mode", unit.get("guessmode"))
        found["mode"] = _named(mode, MODES, "control_mode", "balanced")
        found["resize"] = _named(unit.get("resize_mode"), RESIZES, "resize_mode", "crop")
        return found

    def _when(self, unit: Mapping[str, Any]) -> dict[str, Any]:
        start = incoming.number(unit, "guidance_start", 0.0, -1e9, 1e9)
        end = incoming.number(unit, "guidance_end", incoming.number(unit, "guidance", 1.0, -1e9, 1e9), -1e9, 1e9)
        start, end = (min(max(value, 0.0), 1.0) for value in (start, end))
        if start > end:
            raise Invalid(f"guidance_start is {start:g} and guidance_end is {end:g}; expected start <= end.")
        option = incoming.text(unit, "hr_option", "Both")
        passes = _named(option, _PASSES, "hr_option", "both") if self.has_second else "both"
        return {"start": start, "end": end, "passes": passes}


def _named(value: Any, known: Mapping[Any, str], field: str, default: str) -> str:
    """A value by A1111's name or number; ``Invalid`` for one that is not known."""
    if value is None or value == "":
        return default
    names = {str(name).lower(): ours for name, ours in known.items()}
    plain = str(value).strip().lower().removeprefix("resizemode.").removeprefix("controlmode.")
    if plain not in names:
        words = ", ".join(f'"{name}"' for name in known if isinstance(name, str))
        raise Invalid(f'{field} is "{one_line(value)}"; expected one of {words}.')
    return names[plain]
