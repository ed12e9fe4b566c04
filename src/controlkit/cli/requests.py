"""Requests of pictures: made of a command's options, read from a file, or an earlier picture's, with changes."""

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from controlkit.cli.shared import parse_size, warn
from controlkit.errors import Invalid, NotFound, nearest, one_line
from controlkit.files import home_path
from controlkit.hub import is_sealed, shipped_names

if TYPE_CHECKING:
    from controlkit.sample import ControlRequest, EditRequest, HiresRequest, Request

FIELDS = (
    "prompt", "negative_prompt", "dialect", "clip_skip", "scheduler", "guidance_rescale", "seed", "steps", "guidance",
    "tile", "variation", "variation_seed", "guider", "speed",
)  # fmt: skip
"""Options that are fields of a ``Request`` as they are."""
SHARED = {"scale": "scale", "guess": "guess", "hint_ready": "ready", "hint_cfg": "hint_cfg_scale"}
"""Options for all controls -> ``ControlRequest``'s fields."""
EDIT = {
    "init_image": "image", "strength": "strength", "mask": "mask", "mask_blur": "blur", "fill": "fill",
    "margin": "margin", "resize": "resize", "outpaint": "outpaint",
}  # fmt: skip
"""Options of a picture to be changed -> ``EditRequest``'s fields."""
HIRES = {"hires": "factor", "hires_strength": "strength", "hires_steps": "steps"}
"""Options of the second pass -> ``HiresRequest``'s fields."""
IN_REQUEST = (*FIELDS, "size", "control", "annotator", *SHARED, *EDIT, *HIRES)
"""Options that make a request, which a request's file says instead."""
KEYS = {"hint-cfg": "hint_cfg_scale"} | {
    key: key.replace("-", "_")
    for key in (
        "scale", "start", "end", "annotator", "guess", "ready", "mode", "by-step", "by-tap", "cond-only", "cfg-weights",
        "region", "resize", "passes",
    )
}  # fmt: skip
"""Settings of a control on the command line -> ``ControlRequest``'s."""
FLAGS = ("guess", "ready", "cond-only", "cfg-weights")
"""Those that stand without a value."""


@dataclass(frozen=True)
class Loads:
    """The base to load and what is added to it, as options name them."""

    base: str = "mini"
    lora: tuple[str, ...] = ()
    """FILE or FILE=WEIGHT each."""
    vae: str | None = None
    embedding: tuple[str, ...] = ()
    dtype: str = "auto"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Loads":
        """Those among options, or among the facts in a picture; ``Invalid`` where one of these is no text."""
        found: dict[str, Any] = {name: values[name] for name in ("base", "vae", "dtype") if values.get(name)}
        for name in ("lora", "embedding"):
            several = values.get(name) or ()
            if not isinstance(several, list | tuple) or len(several) > 100:
                raise Invalid(f"{name} is {one_line(several)}; expected at most 100 names.")
            found[name] = tuple(str(one) if isinstance(one, Path) else one for one in several)
        for name, value in found.items():
            for one in value if isinstance(value, tuple) else [value]:
                if not isinstance(one, str) or "\0" in one:
                    raise Invalid(f"{name} is {one_line(one)}; expected a name.")
        return cls(**found)

    def facts(self) -> dict[str, Any]:
        """All of it, as it stands in a picture."""
        named = {"base": self.base, "dtype": self.dtype, "vae": self.vae}
        return named | {"lora": list(self.lora), "embedding": list(self.embedding)}


@dataclass(frozen=True)
class Asked:
    """The first of the pictures that a command asks for; of one that is repeated as it is, also how it was made."""

    request: "Request"
    loads: Loads
    threads: int = 0
    """Threads it was made with; 0 leaves it open. Another number rounds otherwise."""
    batch: int = 0
    """How many pictures it was made together with, itself included; 0 leaves it open. That, too, rounds otherwise."""
    format: str = ""
    """The number format it was made in; "" leaves it open."""


def asked_for(context: typer.Context) -> Asked:
    """The first picture that the options of ``generate`` ask for; raises ``UserError`` of the kind that fits."""
    from controlkit.sample import Request

    options = context.params
    given = {name: options[name] for name in options if _is_given(context, name)}
    if options["request"]:
        if also := [name for name in IN_REQUEST if name in given]:
            raise Invalid(
                f"--request holds the whole request: leave out {', '.join(also)}, or write it into {options['request']}"
            )
        return Asked(_read_request(options["request"]), Loads.of(options))
    if options["like"]:
        return _like(options["like"], given, options["follow"], options["lora_dir"])
    options = {name: value for name, value in options.items() if not (name == "prompt" and value is None)}
    return _with_named_loras(Asked(Request(), Loads.of(options)), options, options["lora_dir"])


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _with_named_loras(first: Asked, options: Mapping[str, Any], folder: Path) -> Asked:
    """A picture to be made by options, with the LoRAs that its prompt names among those it loads."""
    from controlkit.prompts import without_loras

    request, loads = request_of(options, first.request), first.loads
    if request.dialect == "a1111":
        prompt, named = without_loras(request.prompt)
        added = tuple(f"{lora_named(name, folder)}={scale:g}" for name, scale in named)
        request, loads = request.model_copy(update={"prompt": prompt}), replace(loads, lora=(*loads.lora, *added))
    return replace(first, request=request, loads=loads)


def request_of(options: Mapping[str, Any], first: "Request") -> "Request":
    """A request by the options of ``generate`` that are there; what none says is as in ``first``."""
    from controlkit.sample import Request

    changes = {name: options[name] for name in FIELDS if name in options}
    if changes.get("seed") == -1:
        changes["seed"] = drawn_seed()
    if "size" in options:
        changes["size"] = parse_size(options["size"])
    changes |= {"edit": edit_of(options, first.edit), "hires": hires_of(options, first.hires)}
    shared = {field: options[name] for name, field in SHARED.items() if name in options}
    annotator = options.get("annotator")
    if options.get("control") or not first.controls:
        changes["controls"] = control_requests(options.get("control") or [], shared, annotator)
    else:
        shared |= {"annotator": annotator} if annotator else {}
        changes["controls"] = tuple(changed_control(one, shared) for one in first.controls)
    return Request(**{name: getattr(first, name) for name in Request.model_fields} | changes)


def edit_of(options: Mapping[str, Any], first: "EditRequest | None") -> "EditRequest | None":
    """The picture to be changed by the options that are there; what none says is as in ``first``."""
    from controlkit.sample import EditRequest

    given = {name: value for name, value in options.items() if name != "fill" or value}  # a flag, which is not asked
    if given.get("outpaint") is not None:
        given["outpaint"] = parse_sides(given["outpaint"])
    return _part_of(EditRequest, EDIT, given, first, "is for a picture that is changed: give it by --init-image")


def hires_of(options: Mapping[str, Any], first: "HiresRequest | None") -> "HiresRequest | None":
    """The second pass by the options that are there; what none says is as in ``first``."""
    from controlkit.sample import HiresRequest

    return _part_of(HiresRequest, HIRES, options, first, "is of a second pass: give its factor by --hires, such as 2")


def _part_of(model: Any, fields: Mapping[str, str], options: Mapping[str, Any], first: Any, lack: str) -> Any:
    """A part of a request by the options that are there, of which the first in ``fields`` makes it; else ``first``.

    ``Invalid`` for options without it, with the sentence ``lack``.
    """
    changes = {fields[name]: options[name] for name in fields if options.get(name) is not None}
    if first is None and changes and next(iter(fields.values())) not in changes:
        named = next(name for name, field in fields.items() if field in changes)
        raise Invalid(f"--{named.replace('_', '-')} {lack}.")
    if first is None and not changes:
        return None
    held = {name: getattr(first, name) for name in model.model_fields} if first else {}
    return model(**held | changes)


def parse_sides(text: str) -> tuple[int, int, int, int]:
    """Pixels to be added above, right, below and left: four numbers, or one for each side."""
    numbers = text.split(",")
    if len(numbers) not in (1, 4) or not all(one.strip().isdecimal() and len(one) < 10 for one in numbers):
        raise Invalid(
            f'--outpaint is "{text}"; expected pixels above,right,below,left, such as 0,64,0,64, or one number.'
        )
    above, right, below, left = (int(one) for one in (numbers if len(numbers) == 4 else numbers * 4))
    return above, right, below, left


def drawn_seed() -> int:
    """A seed that nobody chose, of 32 bits."""
    return secrets.randbelow(2**32)


def changed_control(control: "ControlRequest", changes: Mapping[str, Any]) -> "ControlRequest":
    """A control with other settings. A ``scale`` is that of all its types, too."""
    from controlkit.sample import ControlRequest

    fields = {name: getattr(control, name) for name in ControlRequest.model_fields}
    return ControlRequest(**fields | ({"scales": {}} if "scale" in changes else {}) | dict(changes))


def lora_named(name: str, folder: Path) -> Path:
    """The file of a LoRA that a prompt names: a path, or a file in the folder, with or without its ending."""
    from controlkit.tensors import PICKLES

    there = sorted(path for path in home_path(folder).glob("*") if path.suffix.lower() in (".safetensors", *PICKLES))
    near = [path for path in there if name in (path.name, path.stem)]
    if not near and not home_path(name).is_file():
        words = nearest(name, [path.stem for path in there]) if there else "there is none in it"
        raise NotFound(f'The prompt names the LoRA "{name:.80}", which is not in {folder} (--lora-dir): {words}')
    return near[0] if near else home_path(name)


# --- requests in files --------------------------------------------------------------------------------------------


def _read_request(file: Path) -> "Request":
    """The request in a JSON file. Who names it asks for what it says."""
    from controlkit.sample import Request

    if not file.is_file():
        raise NotFound(f"There is no request at {file}: expected a JSON file.")
    if file.suffix.lower() == ".png":
        raise Invalid(f"{file} is a picture: --like repeats it. --request reads a JSON file.")
    try:
        return Request.from_json(file.read_bytes())
    except Invalid as error:
        raise Invalid(f"{file}: {error}") from None


def _like(file: Path, given: Mapping[str, Any], follow: bool, lora_dir: Path) -> Asked:
    """A picture's request, changed by the options given. A PNG's settings nobody sees: a stranger's are asked for."""
    from controlkit.images import read_texts, settings_in
    from controlkit.sample import Request, infotext

    if not file.is_file():
        raise NotFound(f"There is no picture at {file}: expected a PNG that generate, or A1111, wrote.")
    texts = read_texts(file)
    words = texts.get("parameters", "").strip()
    foreign = "controlkit" not in texts and not (words.startswith("{") and words.endswith("}"))
    try:
        held, notes = infotext.read(words) if foreign else (settings_in(texts, file), [])
        written = {key: value for key, value in held.items() if key in Request.model_fields}
        found = Asked(Request(**written), Loads() if foreign else Loads.of(held))
    except Invalid as error:
        raise Invalid(f"{file}: {error}") from None
    for note in notes:
        warn(f"{file}: {note}")
    own = is_sealed(held.get("seal"), written, found.loads.facts())
    wanted = [] if own else [*_beyond_loads(found.loads, given)]
    if not own and not is_sealed(held.get("seal"), written):  # as older pictures have it, without what was loaded
        wanted = [*_beyond(found.request, given), *wanted]
    if wanted and not follow:
        raise Invalid(f"{file} was not made here, and asks for {', '.join(wanted)}. If you want that, add --follow.")
    own_loads = {name: getattr(Loads.of(given), name) for name in found.loads.facts() if name in given}
    asked = _with_named_loras(replace(found, loads=replace(found.loads, **own_loads)), given, lora_dir)
    if (asked.request, asked.loads) != (found.request, found.loads):
        return asked
    return replace(
        asked,
        threads=_count(held.get("threads"), 1024),
        batch=_count(held.get("batch"), 16) if own else 0,  # it costs as many pictures
        format=str(held.get("format") or ""),
    )


def _count(value: Any, most: int) -> int:
    """A number that a file may give, 1 to ``most``; else 0."""
    return value if type(value) is int and 0 < value <= most else 0


_USUAL = {"side": 1024, "steps": 100}
"""Sizes and steps that a stranger's request may ask for."""


def _beyond(request: "Request", given: Mapping[str, Any]) -> Iterator[str]:
    """In words, all that a request has the program open, fetch or spend, unless the options given say it instead."""
    from controlkit.formats import shipped_controls
    from controlkit.prompts import without_loras

    for control in () if "control" in given else request.controls:
        if control.name.partition(":")[0] not in shipped_controls():
            yield f'the control "{one_line(control.name)}"'
        sources = (*control.images.values(), control.region)
        yield from (f'the picture "{one_line(one)}"' for one in sources if isinstance(one, Path))
    if request.edit:
        both = (("init_image", request.edit.image), ("mask", request.edit.mask))
        edited = (one for option, one in both if option not in given)
        yield from (f'the picture "{one_line(one)}"' for one in edited if isinstance(one, Path))
    if "prompt" not in given and "a1111" in (request.dialect, given.get("dialect")):
        yield from (f'the LoRA "{one_line(name)}"' for name, _ in without_loras(request.prompt)[1])
    factor = request.hires.factor if request.hires else 1
    if "size" not in given and max(request.size or (0,)) * factor > _USUAL["side"]:
        yield "{1:g} x {0:g} pixels".format(*(factor * side for side in request.size or ()))
    steps = max(request.steps, (request.hires.steps or 0) if request.hires else 0)
    if "steps" not in given and steps > _USUAL["steps"]:
        yield f"{steps} steps"


def _beyond_loads(loads: Loads, given: Mapping[str, Any]) -> Iterator[str]:
    """In words, the files and bases that a picture names, unless the options given say them instead."""
    if "base" not in given and loads.base not in shipped_names():
        yield f'the base "{one_line(loads.base)}"'
    if "vae" not in given and loads.vae:
        yield f'the VAE "{one_line(loads.vae)}"'
    for name, what in (("lora", "LoRA"), ("embedding", "embedding")):
        if name not in given:
            yield from (f'the {what} "{one_line(one)}"' for one in getattr(loads, name))


# --- controls -----------------------------------------------------------------------------------------------------


BY_TYPE = {"scale": "scales", "annotator": "annotators"}
"""Settings that each type of a Union has by itself, and their names in a ``ControlRequest``."""


def control_requests(
    given: Sequence[str], shared: Mapping[str, Any], annotator: str | None = None
) -> tuple["ControlRequest", ...]:
    """The controls that ``--control`` options ask for; a Union's types under one, in the order they came.

    ``shared``: settings of those that have none of their own; ``annotator``: of those whose hints have no type.
    """
    from controlkit.sample import ControlRequest

    found: list[tuple[str, dict[str, Path], dict[str, Any]]] = []
    for text in given:
        name, kind, path, own = split_control(text)
        if path is None:
            found.append((name, {}, own))
            continue
        for key in [key for key in BY_TYPE if kind and key in own]:
            own[BY_TYPE[key]] = {kind: own.pop(key)}
        same = next((one for one in found if kind and "" not in one[1] and one[0] == name), None)
        if same is None:
            found.append((name, {kind: path}, own))
            continue
        _, images, settings = same
        if kind in images:
            raise Invalid(f"--control {name}:{kind} was given twice; expected one picture for a type.")
        for key in BY_TYPE.values():
            own[key] = settings.get(key, {}) | own.get(key, {})
        if twice := [key for key in own.keys() - {*BY_TYPE.values()} if settings.get(key, own[key]) != own[key]]:
            raise Invalid(f'--control {name} has two values of "{twice[0]}": a Union\'s types share one.')
        images[kind] = path
        settings |= own
    if annotator and all(images and "" not in images for _, images, _ in found):
        raise Invalid("--annotator says what makes a control's hints; none was given, or a Union's types say it.")
    return tuple(
        ControlRequest(name=name, images=images, **{**shared, "annotator": None if any(images) else annotator, **own})
        for name, images, own in found
    )


def split_control(text: str) -> tuple[str, str, Path | None, dict[str, Any]]:
    """NAME[:TYPE]=IMAGE[,KEY=VALUE...] as (name, type, path, settings).

    NAME[,KEY=VALUE...] without a picture has no path: it reads the picture that is changed.
    Settings are taken off the end as long as their keys are known, so that a path may hold commas and equals signs. The
    name ends at the first equals sign before which there is a control's name or a path that exists; else at the first.
    """
    from controlkit.controls import TYPES
    from controlkit.formats import shipped_controls

    known = shipped_controls()

    def is_there(name: str) -> bool:
        return name in known or home_path(name).exists()

    def parted(name: str) -> tuple[str, str]:
        """A name as (name, type)."""
        file, colon, kind = name.rpartition(":")
        return (file, kind) if colon and (kind in TYPES or not is_there(name)) else (name, "")

    bare, settings = _without_settings(text, is_there)
    if is_there(bare) and "" not in (bare, text):
        return bare, "", None, settings
    ends = [place for place, letter in enumerate(text) if letter == "="]
    end = next((one for one in ends if is_there(text[:one]) or is_there(parted(text[:one])[0])), ends[0] if ends else 0)
    name = text[:end]
    path, settings = _without_settings(text[end + 1 :], lambda one: home_path(one).exists())
    if not (name and path):
        raise Invalid(
            f'--control is "{text}"; expected NAME=IMAGE, such as canny=photo.png or canny=photo.png,scale=0.8.'
        )
    last = path.rpartition(",")[2]
    key = last.partition("=")[0]
    if "," in path and key.replace("-", "_").isidentifier() and not home_path(path).exists():
        raise Invalid(f'--control {name} has no setting "{last}": {nearest(key, KEYS)}')
    return *parted(name), home_path(path), settings


def _without_settings(text: str, is_there: Callable[[str], bool]) -> tuple[str, dict[str, Any]]:
    """(what stands before the settings at a text's end, these), up to what ``is_there`` knows as a name or a path."""
    settings: dict[str, Any] = {}
    while text and not is_there(text):
        head, _, last = text.rpartition(",")
        key, equals, value = last.partition("=")
        if not head or key not in KEYS or bool(equals) == (key in FLAGS):
            break
        if KEYS[key] in settings:
            raise Invalid(f'--control {text} has "{key}" twice.')
        settings[KEYS[key]] = value if equals else True
        text = head
    return text, settings
