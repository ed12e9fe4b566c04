"""Settings of a picture in the text that A1111 and its kin write into a PNG and read: prompts, then a line of settings.

The text is for people and other tools; some of a request has no place in it (docs/generation.md).
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from controlkit import __version__
from controlkit.backbones.schedulers import has_spacing, parted_name
from controlkit.errors import Invalid, one_line
from controlkit.sample.request import MODES, RESIZES, ControlRequest, Request

LONGEST = 100_000
"""Letters of a text that is read."""
_NEGATIVE = "Negative prompt:"
_FEWEST = 3
"""Settings that a last line has at least; with fewer it is a line of the prompt."""
_TOLD = ("Model hash", "VAE hash", "Lora hashes", "TI hashes", "Hashes", "Version", "RNG")
"""Keys that are no settings of a picture, or that have a note of their own."""
_PLAIN_SPACINGS = ("", "Automatic", "Uniform", "Normal", "Simple")
"""Schedule types that are the scheduler's own steps."""
_SPLITS = re.compile("[,:\n]+")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_COUNTED_FROM = {"plain": 1, "a1111": 0, "comfy": 0}
"""By dialect: added to a clip skip to count the layers from 1, as A1111 does."""


def written(request: Request, facts: Mapping[str, Any]) -> str:
    """The text of a picture.

    Args:
        facts: what the request does not say: ``base`` and ``vae`` (names or paths), ``lora`` (FILE or FILE=WEIGHT
            each), ``sampler`` (the base's own scheduler), ``width`` and ``height`` in pixels; ``annotators``: of each
            control, by type of hint, what made it.
    """
    name, spacing = facts.get("sampler", ""), "Automatic"
    if request.scheduler:
        name, spacing = parted_name(request.scheduler)
    height, width = request.size or (facts["height"], facts["width"])
    settings: dict[str, Any] = {
        "Steps": request.steps,
        "Sampler": name,
        "Schedule type": spacing or "Uniform",
        "CFG scale": _number(request.guidance),
        "Seed": request.seed,
        "Size": f"{width}x{height}",
    } | _changes(request)
    units = [unit for i, one in enumerate(request.controls) for unit in _units(one, _annotators(facts, i))]
    settings |= {f"ControlNet {i}": unit for i, unit in enumerate(units)}
    settings["Model"] = _stem(str(facts.get("base", "")))  # after those of controls: sd-parsers takes the last
    if facts.get("vae"):
        settings["VAE"] = _stem(str(facts["vae"]))
    if request.clip_skip is not None:
        settings["Clip skip"] = abs(request.clip_skip) + _COUNTED_FROM[request.dialect]
    settings["Version"] = f"controlkit {__version__}"
    loras = "".join(f" <lora:{_stem(name)}:{weight}>" for name, weight in map(_lora, facts.get("lora") or ()))
    lines = [f"{request.prompt}{loras}"]
    if request.negative_prompt:
        lines.append(f"{_NEGATIVE} {request.negative_prompt}")
    return "\n".join([*lines, ", ".join(f"{key}: {_quoted(value)}" for key, value in settings.items())]).strip()


def _changes(request: Request) -> dict[str, Any]:
    """The settings of a picture that is changed, of a second pass and of a variation."""
    found: dict[str, Any] = {}
    if request.variation:
        found |= {"Variation seed": request.variation_seed, "Variation seed strength": _number(request.variation)}
    if (edit := request.edit) and edit.strength is not None:
        found["Denoising strength"] = _number(edit.strength)
    if request.edit and request.edit.mask is not None:
        found["Mask blur"] = request.edit.blur
    if hires := request.hires:
        found |= {"Denoising strength": _number(hires.strength), "Hires upscale": _number(hires.factor)}
        found |= {"Hires steps": hires.steps or request.steps, "Hires upscaler": "Bicubic"}
    return found


def _annotators(facts: Mapping[str, Any], place: int) -> Mapping[str, str]:
    return (list(facts.get("annotators") or ()) + [{}] * (place + 1))[place]


def _units(control: ControlRequest, annotators: Mapping[str, str]) -> Iterator[str]:
    """A control as units of A1111's ControlNet extension, one for each of its types of hint."""
    modes, resizes = (
        {ours: theirs for theirs, ours in reversed(names.items()) if isinstance(theirs, str)}
        for names in (MODES, RESIZES)
    )
    for kind in control.images or [""]:
        unit = {
            "Module": "none" if control.ready else annotators.get(kind) or control.annotator or "none",
            "Model": _stem(control.name) + (f" {kind}" if kind else ""),
            "Weight": _number(control.scales.get(kind, control.scale)),
            "Resize Mode": resizes[control.resize],
            "Guidance Start": _number(control.start),
            "Guidance End": _number(control.end),
            "Pixel Perfect": True,
            "Control Mode": modes[control.mode],
        }
        # The extension splits at commas and colons, and has no way to quote them.
        yield ", ".join(f"{key}: {_SPLITS.sub(' ', str(value))}" for key, value in unit.items())


def _stem(name: str) -> str:
    """The name of a file without its ending, of a folder, or of a hub's model."""
    last = PurePath(name).name
    return re.sub(r"\.(safetensors|ckpt|pth?|bin)$", "", last, flags=re.IGNORECASE) or name


def _lora(text: str) -> tuple[str, str]:
    """FILE=WEIGHT as (file, weight)."""
    name, equals, weight = text.rpartition("=")
    return (name, weight) if equals and re.fullmatch(r"-?[\d.]+(e-?\d+)?", weight) else (text, "1")


def _number(value: float) -> str:
    """A number in the fewest digits that give it back."""
    return short if float(short := f"{value:g}") == value else repr(value)


def _quoted(value: Any) -> str:
    """A value as A1111 writes it: quoted as in JSON where it holds a comma, a colon or the end of a line."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if _SPLITS.search(text) or text.startswith('"') else text


# --- reading ------------------------------------------------------------------------------------------------------


def read(text: str) -> tuple[dict[str, Any], list[str]]:
    """(values for a ``Request``, notes on what cannot be taken over) of a text that A1111 or its kin wrote.

    Values are texts as they stand there; ``Request`` checks them. Raises ``Invalid`` where there is no line of
    settings, and for a text of more than ``LONGEST`` letters.
    """
    if len(text) > LONGEST:
        raise Invalid(f"The settings have {len(text):,} letters; expected at most {LONGEST:,}.")
    *lines, last = text.strip().split("\n")
    settings = dict(_settings(last))
    if len(settings) < _FEWEST:
        raise Invalid('The text has no last line of settings, such as "Steps: 20, Sampler: Euler a, CFG scale: 7".')
    prompt, found, negative = "\n".join(lines).partition(f"\n{_NEGATIVE}")
    if prompt.startswith(_NEGATIVE):
        prompt, found, negative = "", _NEGATIVE, prompt.removeprefix(_NEGATIVE)
    values: dict[str, Any] = {"prompt": prompt.strip(), "dialect": "a1111"}
    if found and negative.strip():
        values["negative_prompt"] = negative.strip()
    for key, field in {"Steps": "steps", "CFG scale": "guidance", "Seed": "seed", "Clip skip": "clip_skip"}.items():
        if key in settings:
            values[field] = settings.pop(key)
    if size := re.fullmatch(r"(\d{1,6})x(\d{1,6})", settings.get("Size", "")):
        values["size"] = (int(size[2]), int(size[1]))
        del settings["Size"]
    if "Variation seed" in settings and "Variation seed strength" in settings:
        values |= {
            "variation_seed": settings.pop("Variation seed"),
            "variation": settings.pop("Variation seed strength"),
        }
    if "Hires upscale" in settings:
        keys = {"Hires upscale": "factor", "Denoising strength": "strength", "Hires steps": "steps"}
        values["hires"] = {field: settings.pop(key) for key, field in keys.items() if key in settings}
    scheduler, notes = _scheduler(settings.pop("Sampler", ""), settings.pop("Schedule type", ""))
    return values | scheduler, [*notes, *_left(settings)]


def _settings(line: str) -> Iterator[tuple[str, str]]:
    """The keys and values of a line of settings."""
    at = 0
    while (colon := line.find(":", at)) >= 0:
        key = line[at:colon].rpartition(",")[2].strip()
        at = colon + 1 + len(line[colon + 1 : colon + 2]) - len(line[colon + 1 : colon + 2].lstrip())
        if quoted := _QUOTED.match(line, at):
            value, at = _unquoted(quoted[0]), quoted.end()
            at = len(line) if (comma := line.find(",", at)) < 0 else comma + 1
        else:
            end = len(line) if (comma := line.find(",", at)) < 0 else comma
            value, at = line[at:end].strip(), end + 1
        if re.fullmatch(r"\w[\w \-/]{0,99}", key):
            yield key, value


def _unquoted(text: str) -> str:
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if isinstance(found, str) else text


def _scheduler(sampler: str, schedule: str) -> tuple[dict[str, str], list[str]]:
    """(the field ``scheduler``, notes) of A1111's sampler and schedule type."""
    if not sampler:
        return {}, []
    try:
        kind, spacing = parted_name(sampler)
    except Invalid:
        return {}, [f'the sampler "{one_line(sampler)}" is none that is known here; the base\'s own is taken']
    if schedule in _PLAIN_SPACINGS:
        return {"scheduler": f"{kind} {spacing}".strip()}, []
    try:
        kind, spacing = parted_name(f"{kind} {schedule}")
        if has_spacing(kind, spacing):
            return {"scheduler": f"{kind} {spacing}"}, []
    except Invalid:
        pass
    return {"scheduler": kind}, [f'the schedule type "{one_line(schedule)}" is not had by {kind} here; it is left out']


def _left(settings: Mapping[str, str]) -> Iterator[str]:
    """Notes on settings that have no place in a request, or whose files are not known."""
    for key, what, option in (("Model", "base", "--base"), ("VAE", "VAE", "--vae")):
        if key in settings:
            yield f'it names the {what} "{one_line(settings[key])}", which {option} says here'
    if any(key.startswith("ControlNet") for key in settings):
        yield "the pictures of its controls are not in it: give them by --control"
    if settings.get("RNG") != "CPU":
        yield "it does not say that its noise was drawn on a CPU (RNG: CPU): the seed may give another picture here"
    left = [f"{key}: {value}" for key, value in settings.items() if key not in (*_TOLD, "Model", "VAE")]
    if left:
        yield f"not taken over: {one_line(', '.join(left))}"
