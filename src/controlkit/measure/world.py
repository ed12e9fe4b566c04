"""Worlds: held-out pictures, the truth about them, and networks that judge pictures like them.

Figures of quality are measured by the referee of a base's own world or not at all: a referee that was not trained on
such pictures gives numbers that mean nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from controlkit.annotators import grounds_of
from controlkit.backbones import Backbone, load_base
from controlkit.data import Pair, evaluation_pairs
from controlkit.errors import Invalid, one_line
from controlkit.formats import SavedControl
from controlkit.hub import shipped_path
from controlkit.images import HintSpec
from controlkit.measure.metrics import first_kind
from controlkit.measure.quality import Referee
from controlkit.mini.observer import Observer


@dataclass(frozen=True)
class World:
    """A set of pictures with a base that makes them; its networks and data by the names they are shipped under."""

    name: str
    base: str
    """The shipped base that was trained on this world."""
    referee_name: str
    observer_name: str
    pictures: str
    """The source of pictures of which nothing but the prompt is known."""
    scenes: str
    """The source of pictures whose depth, normals, labels and poses are known."""

    def heldout(self, spec: HintSpec, size: int, num: int) -> tuple[Sequence[Pair], list[np.ndarray]]:
        """(``num`` held-out pairs to measure such hints on, real pictures for FID), of ``size`` pixels.

        Of scenes where the hints are drawn from the known truth; for poses, of those with a person.
        """
        kind = first_kind(spec)
        return evaluation_pairs(self.scenes if kind.truth else self.pictures, size, num, person=kind.needs_person)

    def judges(self, base: Backbone) -> bool:
        """Whether ``base`` makes pictures of this world: it reads prompts by the text encoder of the world's own base.

        So do bases tuned from that one, whatever their number format; a base with other text weights does not.
        """
        return base.text_digest == _text_digest(self.base)

    @cache  # noqa: B019  # a world is a constant
    def referee(self, device: str) -> Referee:
        """The referee of pictures, loaded once a device."""
        return Referee(shipped_path(self.referee_name), device)

    @cache  # noqa: B019
    def observer(self) -> Observer:
        """The network that reads depth, normals, labels and poses off pictures, loaded once."""
        return Observer.load(shipped_path(self.observer_name))


@cache
def _text_digest(base: str) -> str:
    return load_base(base).text_digest


EMBEDDED = World("embedded", "mini", "referee", "observer", pictures="emoji", scenes="scenes")
"""The world of emoji and rendered scenes that ``mini`` was trained on."""
WORLDS = (EMBEDDED,)
MADE_HERE = ("emoji", "scenes", "fill50k", "world")
"""Sources of pairs that are drawn here, which any file may name."""


def heldout_for(
    saved: SavedControl, size: int, num: int, source: str | None = None, columns: Mapping[str, str] | None = None
) -> tuple[Sequence[Pair], list[np.ndarray]]:
    """(``num`` held-out pairs to measure a control on, real pictures for FID), of ``size`` pixels.

    ``source``, ``columns``: ``evaluation_pairs``'; by default what the control was trained on, and its columns.
    ``Invalid`` where that is a folder or a hub's data set that a stranger's file names.
    """
    spec, told = saved.hint, saved.trained_on
    named = "emoji" if told["data"] is None else told["data"]
    if source is None and not saved.is_own and named not in MADE_HERE:
        raise Invalid(
            f'The control\'s file says that it was trained on "{one_line(named)}". That is opened where you ask for it '
            f"alone: name the data to measure on by --data: {', '.join(MADE_HERE)}, a folder, or those."
        )
    columns = columns or ((told["columns"] or {}) if source is None and saved.is_own else {})
    source = source or str(named)
    if source == "world":
        return EMBEDDED.heldout(spec, size, num)
    return evaluation_pairs(source, size, num, first_kind(spec).needs_person, grounds_of(spec), columns)


def world_of(base: Backbone) -> World | None:
    """The world whose pictures ``base`` makes; None if no world here knows them."""
    return next((world for world in WORLDS if world.judges(base)), None)
