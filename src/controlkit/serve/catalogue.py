"""The catalogue: what can be asked for by name, as the APIs show it, and the nearest name of what cannot."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from controlkit.annotators import HintKind, all_kinds, kind_or_bare, union_types, why_not
from controlkit.backbones import Backbone
from controlkit.backbones.schedulers import parted_name
from controlkit.errors import Invalid, nearest, one_line
from controlkit.images import MOST_SIDE
from controlkit.sample.canvas import shape_on
from controlkit.sample.request import Request
from controlkit.serve.settings import Limits

TYPES = {
    "Canny": "canny", "Depth": "depth", "NormalMap": "normal", "OpenPose": "pose", "MLSD": "mlsd",
    "Lineart": "lineart", "SoftEdge": "softedge", "Scribble": "scribble", "Segmentation": "seg", "Tile": "tile",
    "Inpaint": "inpaint", "InstructP2P": "ip2p", "Shuffle": "shuffle",
}  # fmt: skip
"""A1111's types of control -> kinds of hints."""
_UNION = {"hed/pidi/scribble/ted": "scribble", "canny/lineart/mlsd/etc": "canny", "normal map": "normal",
          "segment": "seg", "tile": "tile", "inpaint": "inpaint", "repaint": "repaint", "openpose": "pose"}  # fmt: skip
_HASH = re.compile(r"\s*\[[0-9a-fA-F]{6,64}\]$")


@cache
def modules() -> Mapping[str, HintKind]:
    """Annotators that can be asked for, by their own names and, in small letters, by all names of theirs."""
    made = [kind for kind in all_kinds() if kind.is_made_here]
    return {name.lower(): kind for kind in made for name in (*kind.aliases, kind.name)}


def module_names() -> list[str]:
    """Names of annotators, their own and A1111's, each once."""
    return ["none", *dict.fromkeys(n for kind in all_kinds() if kind.is_made_here for n in (kind.name, *kind.aliases))]


def module_named(name: str) -> HintKind | None:
    """The annotator of a name in letters of any case; None for A1111's ``none``. ``Invalid`` with the nearest name."""
    plain = name.strip().lower()
    if plain in ("none", ""):
        return None
    if (kind := modules().get(plain)) is None:
        unknown = f'There is no module "{one_line(name)}": {nearest(plain, module_names())}'
        raise Invalid(why_not(one_line(name)) or unknown)
    return kind


def module_sliders(kind: HintKind) -> list[dict[str, Any]]:
    """An annotator's sliders as A1111 lists them: its resolution, then the two thresholds."""
    sliders: list[dict[str, Any]] = [{"name": "Resolution", "value": 512, "min": 64, "max": 2048, "step": 8}]
    for one in kind.thresholds:
        sliders.append({"name": one.title, "value": one.value, "min": one.least, "max": one.most, "step": one.step})
    return sliders


class Catalogue:
    """The base and the controls, as a worker told of them (``Studio.facts``), and the LoRAs of a folder, by name."""

    def __init__(self, facts: Mapping[str, Any], loras: Path | None = None) -> None:
        self.facts, self.loras = facts, loras
        self.controls: dict[str, Mapping[str, Any]] = {one["name"]: one for one in facts["controls"]}
        self.samplers: Mapping[str, Sequence[str]] = facts["samplers"]

    # --- the base ---------------------------------------------------------------------------------------------------

    @property
    def base(self) -> str:
        """The base's name."""
        return re.split(r"[/\\]", str(self.facts["base"]))[-1]

    @property
    def base_hash(self) -> str:
        """The first ten digits of its digest."""
        return str(self.facts["digest"])[:10]

    @property
    def base_title(self) -> str:
        """Name and hash, as A1111 writes them."""
        return f"{self.base} [{self.base_hash}]"

    def check_base(self, name: str) -> None:
        """``Invalid`` where a base is asked for that this server does not have; "" is the one it has."""
        if _HASH.sub("", name).strip().lower() not in ("", self.base.lower(), self.base_hash):
            raise Invalid(f'This server has no model "{one_line(name)}": {nearest(name, [self.base_title])}')

    def floored(self, side: int) -> int:
        """A side in pixels as the base can make it: rounded down, at least to one step."""
        step = int(self.facts["multiple"])
        return max(side // step, 1) * step

    def size_of(self, request: Request) -> tuple[int, int]:
        """(height, width) of a request's pictures before a second pass, where a part alone is worked on the most."""
        own, edit = int(self.facts["size"]), request.edit
        if request.size or edit is None:
            return request.size or (own, own)
        assert isinstance(edit.image, np.ndarray)
        (height, width), (above, right, below, left) = edit.image.shape[:2], edit.outpaint
        base = SimpleNamespace(size=own, multiple=int(self.facts["multiple"]))
        return shape_on(cast(Backbone, base), (height + above + below, width + left + right))

    def check_made(self, request: Request) -> None:
        """``Invalid`` for a size, a number of steps or a scheduler that the base does not have."""
        step, most = int(self.facts["multiple"]), int(self.facts["most_steps"])
        if request.size and any(side % step for side in request.size):
            height, width = (max(round(side / step), 1) * step for side in request.size)
            raise Invalid(
                f"size is {list(request.size)}; expected height and width that {step} divides, such as "
                f"{[height, width]}."
            )
        if request.steps > most:
            raise Invalid(f"steps is {request.steps}; expected at most {most}.")
        if request.scheduler is not None:
            kind, spacing = parted_name(request.scheduler)
            if spacing and spacing not in self.samplers.get(kind, ()):
                raise Invalid(f"{kind} has no {spacing} here: {nearest(spacing, self.samplers.get(kind, ()))}")

    # --- controls ---------------------------------------------------------------------------------------------------

    def titles(self, kind: str = "") -> list[str]:
        """Controls as A1111 lists them, ``NAME [HASH]``; of a kind of hints, those that read such."""
        return [f"{one['name']} [{one['hash']}]" for one in self.controls.values() if not kind or _reads(one, kind)]

    def control_named(self, name: str) -> Mapping[str, Any]:
        """The control of a name, with or without its hash or its file's ending; ``Invalid`` with the nearest name."""
        plain = re.sub(r"\.(safetensors|pth|ckpt|pt|bin)$", "", _HASH.sub("", name).strip(), flags=re.IGNORECASE)
        for known, one in self.controls.items():
            if plain.lower() == known.lower():
                return one
        raise Invalid(f'There is no control "{one_line(name)}": {nearest(plain, self.controls)}')

    def type_for(self, control: Mapping[str, Any], named: str, kind: HintKind | None) -> str:
        """The type of hint that a Union is to read: as named, else that of the annotator; "" where it is no Union."""
        types = list(control["types"])
        if not types:
            return ""
        wanted = named.strip().lower()
        if wanted and wanted != "unknown":
            wanted = _UNION.get(wanted, wanted)
            wanted = kind_or_bare(wanted).contract_name
        elif kind is not None:
            wanted = kind.contract_name
        if wanted in types:
            return wanted
        number = union_types().get(wanted)
        if same := [one for one in types if number is not None and union_types().get(one) == number]:
            return same[0]  # another name for the same type
        raise Invalid(
            f'"{control["name"]}" is a Union: say which type of hint it is to read by union_control_type: '
            f"{nearest(named or wanted, types)}"
        )

    # --- samplers ---------------------------------------------------------------------------------------------------

    def steps_by(self, sampler: str, spacing: str) -> tuple[str | None, str]:
        """(a scheduler's name, "" or a note) of A1111's sampler and schedule type; None is the base's own.

        A type that this sampler does not have is left out, with a note. ``Invalid`` for names that are not known.
        """
        spacings = sorted({one for found in self.samplers.values() for one in found})
        kind, own = self._parted(sampler, spacings)
        wanted = spacing.strip().lower().replace("_", " ")
        if wanted in ("", "automatic", "normal", "uniform", "simple", "none"):
            chosen = own
        else:
            known = {one.lower(): one for one in spacings}
            if wanted not in known:
                raise Invalid(
                    f'There is no scheduler "{one_line(spacing)}": {nearest(spacing, ["Automatic", *spacings])}'
                )
            chosen = known[wanted]
        kind = kind or (next(iter(self.samplers)) if chosen else "")
        if not kind:
            return None, ""
        if chosen and chosen not in self.samplers[kind]:
            return kind, f"scheduler: {kind} has no {chosen} here"
        return f"{kind} {chosen}".strip(), ""

    def _parted(self, sampler: str, spacings: Sequence[str]) -> tuple[str, str]:
        plain = sampler.strip().lower().replace("_", " ")
        if plain in ("", "automatic", "none"):
            return "", ""
        names = {f"{kind} {one}".strip().lower(): (kind, one) for kind in self.samplers for one in ("", *spacings)}
        names |= {f"k {key}": pair for key, pair in list(names.items())}
        if plain not in names:
            raise Invalid(f'There is no sampler "{one_line(sampler)}": {nearest(sampler, self.samplers)}')
        return names[plain]


def _reads(control: Mapping[str, Any], kind: str) -> bool:
    own = kind_or_bare(control["annotator"]).contract_name if control["annotator"] else ""
    return own == kind or kind in control["types"] or not (own or control["types"])


def check_limits(limits: Limits, width: int, height: int, steps: int, count: int) -> None:
    """``Invalid`` for more than a server takes on."""
    if max(width, height) > limits.side:
        raise Invalid(f"{width}x{height} pixels are asked for; this server makes sides of at most {limits.side}.")
    if steps > limits.steps:
        raise Invalid(f"{steps} steps are asked for; this server makes at most {limits.steps}.")
    if not 1 <= count <= limits.count:
        raise Invalid(f"{count} pictures are asked for; this server makes 1 to {limits.count} at once.")


def most_side(limits: Limits, shape: Sequence[int]) -> int:
    """The longest shorter side of a hint of a picture of ``shape`` (H, W, ...): of a strip it is less than of a square.

    Larger hints than the pictures that may be given, or with a longer side than a picture may be made with, are none.
    """
    short, long = sorted(shape[:2])
    most = min(MOST_SIDE * short / long, (limits.pixels_given * short / long) ** 0.5)
    return min(max(int(most), short), limits.side)
