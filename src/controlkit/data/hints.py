"""Hints of many pictures: kept in the store, or written as files under their pictures' names."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from controlkit.annotators import annotate_all, is_empty, kind_of, parts_of
from controlkit.data.layouts.rows import SUFFIXES
from controlkit.data.store import Entry, Like, Store, key_of, remembered
from controlkit.data.workers import parallel_map, ranges_of
from controlkit.decoding import read_bytes
from controlkit.errors import Invalid, Mismatch, NotFound, UserError
from controlkit.files import is_leftover
from controlkit.images import HintSpec, decode_picture, read_settings, write_png

MOST, PIXELS = 16, 1 << 22
"""Pictures, and pixels of them, that are annotated at once; a picture of more pixels by itself."""


def kept_hints(
    pictures: Sequence[np.ndarray], contract: HintSpec, device: str = "cpu", store: Store | None = None
) -> list[np.ndarray]:
    """``annotate_all`` of pictures at their own sizes, with what was made before taken from the store.

    The key of a hint is its picture's pixels, what makes it (``HintKind.digest``) and its options.
    """

    def make(absent: list[int]) -> list[Entry]:
        made = annotate_all([pictures[i] for i in absent], contract, device=device)
        return [{"hint": torch.from_numpy(hint)} for hint in made]

    parts = parts_of(contract)
    made_by = [kind_of(part.annotator).digest() for part in parts]
    channels = 3 * len(parts) + (contract.mask_value is not None)
    like: list[Like] = [{"hint": ((*picture.shape[:2], channels), torch.uint8)} for picture in pictures]
    options = json.dumps([contract.annotator, *made_by, *sorted(contract.options.items())])
    keys = [key_of("hint", options, picture) for picture in pictures]
    return [entry["hint"].numpy() for entry in remembered(store, keys, like, make, dense=False)]


@dataclass(frozen=True)
class HintFile:
    """A picture's file, the hint's, and what became of it."""

    source: Path
    target: Path
    was_there: bool = False
    """Whether the same hint had been written before."""
    is_empty: bool = False
    """Whether nothing was found in the picture."""
    fault: UserError | None = None
    """Why nothing was written; the others go on."""


def hint_files(paths: Sequence[Path], out: Path) -> list[HintFile]:
    """The hint's file of each picture: ``OUT/NAME.png``, of a folder's pictures below the folders that they lie in.

    ``NotFound`` for a path that is not there; ``Invalid`` where a folder has no pictures, two hints would have one
    name, or a hint would overwrite a picture.
    """
    found: list[HintFile] = []
    for path in paths:
        if path.is_dir():
            inside = list(_pictures_in(path, out))
            if not inside:
                raise Invalid(f"{path} has no pictures: expected files that end in {', '.join(SUFFIXES)}.")
            found += [HintFile(one, out / one.relative_to(path).with_suffix(".png")) for one in inside]
        elif path.exists():
            found.append(HintFile(path, out / f"{path.stem}.png"))
        else:
            raise NotFound(f"There is no picture at {path}.")
    if len({one.target for one in found}) < len(found):
        targets = [one.target for one in found]
        twice = next(one for one in targets if targets.count(one) > 1)
        raise Invalid(
            f"Two of the pictures have the same name, and one hint would overwrite the other ({twice}): rename one."
        )
    read = {os.path.realpath(one.source) for one in found}  # Path.resolve raises for links in a circle
    if clash := next((one.target for one in found if os.path.realpath(one.target) in read), None):
        raise Invalid(f"A hint would overwrite the picture {clash}: give another --out.")
    return found


def _pictures_in(folder: Path, out: Path) -> Iterator[Path]:
    """A folder's pictures, in order; those that are hidden, or lie in the folder that is written, are none."""
    written = os.path.realpath(out)
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_leftover(name))
        if place != str(folder) and os.path.realpath(place) == written:
            folders.clear()
            continue
        for name in sorted(names):
            if Path(name).suffix.lower() in SUFFIXES and not is_leftover(name):
                yield Path(place) / name


def write_hints(
    files: Sequence[HintFile],
    contract: HintSpec,
    size: tuple[int, int] | None = None,
    device: str = "cpu",
    workers: int = 1,
) -> Iterator[HintFile]:
    """Annotate the pictures of files, by ``workers`` processes, and write each hint; yields them as they are there.

    A hint that was made before of the same picture, by the same annotator with the same options, is left as it is:
    begun again, the work goes on. A file of anything else is not overwritten. ``size``: (height, width) of the hints.
    """
    writer = _Writer(files, contract, size, device)
    yield from parallel_map(writer.part, ranges_of(len(files)), workers)


@dataclass(frozen=True)
class _Writer:
    """The facts that a process needs to write its part of the hints."""

    files: Sequence[HintFile]
    contract: HintSpec
    size: tuple[int, int] | None
    device: str

    def part(self, places: range) -> Iterator[HintFile]:
        """Write the hints of these files, and yield each, in batches whose pictures fit in memory."""
        batch: list[tuple[HintFile, np.ndarray, dict[str, Any]]] = []
        for place in places:
            one = self.files[place]
            try:
                data = read_bytes(one.source, f"picture at {one.source}")
                settings = self._settings(data)
                if _is_made(one.target, settings):
                    yield replace(one, was_there=True)
                    continue
                picture = decode_picture(data, str(one.source))
            except UserError as error:
                yield replace(one, fault=error)
                continue
            if batch and (len(batch) == MOST or sum(p.size for _, p, _ in batch) + picture.size > 3 * PIXELS):
                yield from self._written(batch)
                batch = []
            batch.append((one, picture, settings))
        yield from self._written(batch)

    def _settings(self, data: bytes) -> dict[str, Any]:
        """The facts in a hint's file: which annotator made it, of which picture."""
        made_by = [kind_of(part.annotator).digest()[:16] for part in parts_of(self.contract)]
        options = {name: float(value) for name, value in self.contract.options.items()}
        return {
            "annotator": self.contract.annotator,
            "options": options,
            "size": list(self.size) if self.size else None,
            "made_by": made_by,
            "picture": hashlib.sha256(data).hexdigest()[:16],
        }

    def _written(self, batch: list[tuple[HintFile, np.ndarray, dict[str, Any]]]) -> Iterator[HintFile]:
        hints = annotate_all([picture for _, picture, _ in batch], self.contract, self.size, self.device)
        for (one, _, settings), hint in zip(batch, hints, strict=True):
            write_png(one.target, hint, settings)
            yield replace(one, is_empty=is_empty(hint, self.contract))


def _is_made(target: Path, settings: dict[str, Any]) -> bool:
    """Whether this very hint is there; ``Mismatch`` where something else is that no annotator wrote."""
    if not target.exists():
        return False
    try:
        found = read_settings(target)
    except UserError:
        found = {}
    if "annotator" not in found:
        raise Mismatch(f"{target} is there, and no annotator wrote it: give another --out.")
    return found == settings
