"""Captions of pictures that were made: of an embedded world's by its referee's choice, of others by BLIP."""

from collections.abc import Callable, Sequence

import numpy as np

from controlkit.backbones import Backbone
from controlkit.data.captions import CAPTIONER, load_captioner
from controlkit.measure.quality import Referee
from controlkit.measure.world import world_of
from controlkit.mini.world import GROUNDS, STYLES, caption, everyday_concepts, heldout_concepts, heldout_pictures

Caption = Callable[[np.ndarray], str]
"""From a picture, uint8 (H, W, 3), to words."""


def caption_with(base: Backbone, captioner: str | None = None) -> tuple[Caption, str]:
    """(a captioner of pictures that ``base`` makes, its name).

    ``captioner``: a BLIP's folder or a hub's name; None: the referee of the base's world, or BLIP where it has none.
    Raises as ``load_captioner`` does.
    """
    world = world_of(base) if captioner is None else None
    if world:
        referee = world.referee(base.device.type)
        return lambda picture: chosen_caption(referee, picture), f"the referee of the world {world.name}"
    found = load_captioner(captioner or CAPTIONER, base.device.type)
    return lambda picture: found([picture])[0], found.name


def known_concepts() -> list[str]:
    """Concepts of the embedded world whose names come with the package, 664, in order."""
    seen = {one.rpartition("/")[2] for one in heldout_pictures()}
    return sorted(everyday_concepts() | heldout_concepts() | seen)


def chosen_caption(referee: Referee, picture: np.ndarray, concepts: Sequence[str] = ()) -> str:
    """The caption of the embedded world that a referee finds nearest to a picture.

    One part after another: the concept, then style and ground, then the concept among captions with these, until it
    stays. All captions together are ``len(concepts)`` x 60, of which so some 1,500 are read.
    """
    concepts = concepts or known_concepts()
    looks = [(style, ground) for style in STYLES for ground in GROUNDS]
    concept, look = "", looks[0]

    def best(captions: list[str]) -> int:
        return int(referee.choose([picture], [captions])[0])

    for _ in range(4):
        before = concept
        concept = concepts[best([caption(one, *look) for one in concepts])]
        if concept == before:
            break
        look = looks[best([caption(concept, *one) for one in looks])]
    return caption(concept, *look)
