"""LoRAs and textual inversions that prompts name: files of two folders, known by their names and never by a path."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from controlkit.backbones import Backbone
from controlkit.backbones.load import Before, add_words, merge_loras, restore
from controlkit.errors import Invalid, NotFound, UserError, nearest, one_line
from controlkit.tensors import PICKLES, open_tensors

_MOST_FILES = 10_000
"""Files of a folder that are looked at."""
_LONGEST = 500
"""Letters of a text in a LoRA's file that is told; longer ones, such as the words of all its captions, are not."""
_STRONGEST = 100.0
"""The largest weight of a LoRA, as on the command line."""

Loras = Sequence[tuple[str, float]]
"""Names with their weights."""

log = logging.getLogger(__name__)


def weights_in(folder: Path | None) -> dict[str, Path]:
    """Files of weights in a folder and those below it, by their names without the ending; of two the first is taken."""
    found = dict[str, Path]()
    for path in sorted(folder.rglob("*"))[:_MOST_FILES] if folder else ():
        if path.suffix.lower() in (".safetensors", *PICKLES) and not path.name.startswith(".") and path.is_file():
            found.setdefault(path.stem, path)
    return found


def check_loras(wanted: Loras, folder: Path | None, most: int) -> None:
    """``Invalid`` for LoRAs that are not in the folder, with the nearest name; for more of them, and wild weights."""
    if len(wanted) > most:
        raise Invalid(f"The prompt names {len(wanted)} LoRAs; this server takes at most {most}.")
    there = weights_in(folder) if wanted else {}
    for name, weight in wanted:
        if name not in there:
            words = nearest(name, there) if there else "this server has none: leave it out."
            raise Invalid(f'The prompt names the LoRA "{one_line(name)}": {words}')
        if not abs(weight) <= _STRONGEST:
            raise Invalid(f'The LoRA "{one_line(name)}" has the weight {weight:g}; expected -100 to 100.')


def told_loras(folder: Path | None) -> list[dict[str, Any]]:
    """The LoRAs of a folder as A1111 lists them; of a path the last part alone."""
    return [
        {"name": name, "alias": name, "path": path.name, "metadata": _texts_in(path)}
        for name, path in weights_in(folder).items()
    ]


def _texts_in(path: Path) -> dict[str, str]:
    """The texts in a file's head that are not long."""
    try:
        texts = open_tensors(path).metadata
    except (UserError, OSError):
        return {}
    return {key: value for key, value in texts.items() if len(key) + len(value) <= _LONGEST}


class Merged:
    """A base with the LoRAs that are asked for at a time, and no others."""

    def __init__(self, base: Backbone, folder: Path | None) -> None:
        self.base, self.folder = base, folder
        self._held: tuple[tuple[str, float], ...] = ()
        self._before: Before = {}

    def take(self, wanted: Loras) -> None:
        """Have the base hold these LoRAs; without any it is what it was, to the bit.

        Raises ``NotFound`` for a name that is not in the folder, ``Mismatch`` for a file that does not fit the base.
        """
        if (wanted := tuple(wanted)) == self._held:
            return
        restore(self._before)
        self._held = ()
        if not wanted:
            return
        there = weights_in(self.folder)
        if missing := [name for name, _ in wanted if name not in there]:
            raise NotFound(f'There is no LoRA "{one_line(missing[0])}": {nearest(missing[0], there)}')
        try:
            merge_loras(self.base, [(there[name], weight) for name, weight in wanted], self._before)
        except UserError as error:
            raise type(error)(_without_places(str(error), there)) from error
        self._held = wanted


def add_embeddings(base: Backbone, folder: Path | None) -> dict[str, dict[str, Any]]:
    """Add the textual inversions of a folder to a base; what A1111 tells of those ``loaded`` and those ``skipped``."""
    found: dict[str, dict[str, Any]] = {"loaded": {}, "skipped": {}}
    for name, path in weights_in(folder).items():
        told: dict[str, Any] = {
            "step": None,
            "sd_checkpoint": None,
            "sd_checkpoint_name": None,
            "shape": 0,
            "vectors": 0,
        }
        try:
            told["vectors"], told["shape"] = add_words(base, path)
            found["loaded"][name] = told
        except UserError as error:
            log.warning("%s is left out: %s", path, error)
            found["skipped"][name] = told
    return found


def _without_places(sentence: str, there: Mapping[str, Path]) -> str:
    """A sentence in which files stand by their names, as clients know them."""
    for name, path in there.items():
        sentence = sentence.replace(str(path), name)
    return sentence
