"""The pictures that a verification shows and measures on, with the hints of the control's kind made of them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from controlkit.annotators import all_kinds, ready_maker, with_maker
from controlkit.backbones import Backbone
from controlkit.data import CirclePairs, Pair, ScenePairs, evaluation_pairs
from controlkit.errors import Unsupported
from controlkit.images import HintSpec
from controlkit.measure import first_kind, unmeasurable, world_of
from controlkit.verify.album import photographs

_ENDING = re.compile(r"\.(safetensors|pth|pt|ckpt|bin)$")
_SEED = 2**31 + 1  # of no training
PHOTOGRAPHS = "photographs"
"""The source of pictures that scikit-image ships; others are those of ``evaluate --data``."""


@dataclass(frozen=True)
class Subject:
    """Pairs of picture and prompt, and how hints are made of them."""

    pairs: Sequence[Pair]
    source: str
    spec: HintSpec | None
    """The control's contract with the maker that is used here; None without a control."""
    note: str = ""
    """Says why the pictures are others than the photographs."""

    @property
    def unmeasurable(self) -> str:
        """The reason why obedience cannot be measured on these, as a sentence; "" where it can."""
        return unmeasurable(self.spec, self.pairs) if self.spec else "There is no control to measure."


def subject_of(base: Backbone, hint: HintSpec | None, source: str | None, num: int) -> Subject:
    """The pictures for a base and a control's hints.

    ``source``: ``evaluate --data``'s, or ``photographs``; by default the scenes of the base's own world where it has
    one, photographs where hints can be made of them, scenes where their truth draws the hints, else drawn circles.
    Raises as ``evaluation_pairs`` and ``photographs`` do where a source is named.
    """
    spec = _makeable(hint) if hint else None
    if source == PHOTOGRAPHS:
        return Subject(photographs(base.size, num), source, spec)
    if source:
        return Subject(_pairs(source, base, hint, num), source, spec)
    if world := world_of(base):
        note = f"The pictures are {world.scenes} of the world that this base was trained on."
        return Subject(_pairs(world.scenes, base, hint, num), world.scenes, hint, note)
    kind = first_kind(spec) if spec else None
    if kind and not kind.is_made_here and kind.truth:
        note = f"Nothing here makes hints of {kind.name} of a photograph: those of rendered scenes were taken."
        return Subject(_pairs("scenes", base, hint, num), "scenes", hint, note)
    try:
        return Subject(photographs(base.size, num), PHOTOGRAPHS, spec)
    except Unsupported as error:
        return Subject(_pairs("fill50k", base, hint, num), "fill50k", spec, f"{error} Drawn circles were taken.")


def _pairs(source: str, base: Backbone, hint: HintSpec | None, num: int) -> Sequence[Pair]:
    person = hint is not None and first_kind(hint).needs_person
    if source == "fill50k":
        return list(CirclePairs(base.size, num, _SEED))
    if source == "scenes":  # without the pictures that evaluation_pairs draws for FID
        return list(ScenePairs(base.size, 8 * num, _SEED, heldout=True, count=num, person=person))
    return list(evaluation_pairs(source, base.size, num, person)[0])


def _makeable(hint: HintSpec) -> HintSpec:
    """The contract with a maker that has all it needs here, where there is one."""
    spec = with_maker(hint)
    kind = first_kind(spec)
    ready = ready_maker(kind.name) if kind.name and kind.lacks() else None
    return with_maker(hint, ready.name) if ready else spec


def kind_in_name(name: str) -> str:
    """The kind of hints that a file's name ends with: ``canny`` of ``control_v11p_sd15_canny.pth``; "" for none.

    Of several words that are kinds, the longest, then the last.
    """
    stem = _ENDING.sub("", name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower())
    words = [word for word in re.split(r"[^a-z0-9+]+", stem) if word]
    known = {one: kind.name for kind in all_kinds() for one in (kind.name, *kind.aliases)}
    for length in range(len(words), 0, -1):
        for last in range(len(words), length - 1, -1):
            if found := known.get("_".join(words[last - length : last])):
                return found
    return ""
