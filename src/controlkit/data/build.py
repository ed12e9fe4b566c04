"""A data set written anew in a chosen layout: pictures at one size, hints made where there were none.

The work can be interrupted and resumed; until it is whole, nothing reads the folder as a data set.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from controlkit.annotators import annotate, grounds_of, kind_or_bare, parts_of
from controlkit.data.captions import Captioning, captioned
from controlkit.data.layouts import BUILT, JOURNAL, own_facts
from controlkit.data.layouts.rows import Listing, Row, json_lines, rows_digest
from controlkit.data.opened import open_row
from controlkit.data.pairs import Pair, hint_for_pair
from controlkit.data.workers import parallel_map, ranges_of
from controlkit.errors import Mismatch, Unsupported, nearest
from controlkit.files import SCRATCH, held, is_leftover, mark_output, sweep, write_atomic
from controlkit.images import HintSpec, fit, hint_bytes, png_bytes

SHARD = 1000
"""Pairs in a tar."""
_STOP = f"{SCRATCH}stop"
"""The file in the folder at which workers stop."""


@dataclass(frozen=True)
class Target:
    """A layout to write: names of a row's files, by its number ``{}`` (a hint's without suffix), and the listing."""

    picture: str
    hint: str
    text: str = ""
    """Of the caption's file, where it has one."""
    text_end: str = ""
    listing: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Of a line of the listing: key -> ``picture``, ``hint`` or ``prompt``."""

    def files(self, place: int, picture: np.ndarray, hint: np.ndarray, prompt: str) -> dict[str, bytes]:
        """A row's files by name; the hint's is ``.npy`` where it is no picture."""
        suffix, content = hint_bytes(hint)
        text = {self.text.format(place): f"{prompt}{self.text_end}".encode()} if self.text else {}
        return {self.picture.format(place): png_bytes(picture), self.hint.format(place) + suffix: content} | text


TARGETS = {
    "prompt.json": Target(
        "target/{}.png",
        "source/{}",
        listing="prompt.json",
        keys={"source": "hint", "target": "picture", "prompt": "prompt"},
    ),
    "metadata": Target(
        "images/{}.png",
        "conditioning_images/{}",
        listing="metadata.jsonl",
        keys={"file_name": "picture", "conditioning_image_file_name": "hint", "text": "prompt"},
    ),
    "paired": Target("image_dir/{}.png", "conditioning_data_dir/{}", "image_dir/{}.txt", text_end="\n"),
    "webdataset": Target("{:08}.png", "{:08}.conditioning_image", "{:08}.txt"),
}
"""Layouts that are written; ``webdataset`` in shards, the others as single files."""


def build_set(
    listing: Listing,
    folder: Path,
    layout: str,
    contract: HintSpec,
    size: tuple[int, int] | None = None,
    captioning: Captioning | None = None,
    workers: int = 1,
) -> Iterator[int]:
    """Write a data set's pairs into ``folder``, by ``workers`` processes; yields the number written so far.

    ``contract``: of the hints; its annotator makes them where the set has none. ``size``: (height, width); None leaves
    pictures as they are. ``captioning``: captions to be made first. ``Unsupported`` for a layout that is not written,
    hints that nothing makes, or a folder that another process fills; ``Mismatch`` if the folder was begun with other
    settings or another set, or holds anything else.
    """
    if layout not in TARGETS:
        raise Unsupported(f'Nothing writes the layout "{layout}": {nearest(layout, TARGETS)}')
    made = all(kind_or_bare(part.annotator).is_made_here for part in parts_of(contract))
    if not made and not all(row.hints for row in listing.rows):
        raise Unsupported("There are rows without a hint, and no annotator to make them: name one, such as canny.")
    settings = {
        "layout": layout,
        "hint": json.loads(contract.to_json()),
        "size": size and list(size),
        "captions": {"by": captioning.captioner.name, "over": captioning.over} if captioning else None,
        "set": rows_digest(listing.rows),  # files are numbered by row: another row would be another's file
    }
    _check(folder, settings)
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        yield from _build(listing, folder, settings, contract, captioning, workers)


def _build(
    listing: Listing,
    folder: Path,
    settings: dict[str, Any],
    contract: HintSpec,
    captioning: Captioning | None,
    workers: int,
) -> Iterator[int]:
    """Write what ``build_set`` does, into a folder that no other process writes."""
    layout, size = settings["layout"], settings["size"] and tuple(settings["size"])
    _begin(folder, settings)
    if captioning:
        listing = captioned(listing, captioning, folder / JOURNAL)
    target, count = TARGETS[layout], len(listing.rows)
    writer = _Writer(listing.rows, folder, target, contract, size)
    if layout == "webdataset":
        shards = [range(first, min(first + SHARD, count)) for first in range(0, count, SHARD)]
        yield from parallel_map(writer.shard, list(enumerate(shards)), workers, folder / _STOP)
    else:
        yield from parallel_map(writer.files, ranges_of(count), workers, folder / _STOP)
        if target.listing:
            write_atomic(folder / target.listing, json_lines(map(writer.entry, range(count))))
    sweep(folder)  # a killed worker's, whose part Ray gave to another
    write_atomic(folder / BUILT, (json.dumps(settings | {"whole": True}) + "\n").encode())


def _check(folder: Path, settings: Mapping[str, Any]) -> None:
    """``Mismatch`` for a folder that was begun with other settings, or holds something that was not built here."""
    if (folder / BUILT).is_file():
        begun = {key: value for key, value in own_facts(folder / BUILT).items() if key != "whole"}
        if begun != settings:
            changed = [key for key in settings if begun.get(key) != settings[key]]
            raise Mismatch(f"{folder} was begun with another {' and '.join(changed)}: give another folder.")
    elif folder.is_dir() and not all(is_leftover(path.name) for path in folder.iterdir()):
        raise Mismatch(f"{folder} holds something that was not built here: give an empty folder, or a new one.")


def _begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the file that says a folder is being built with these settings; take out what a killed process left."""
    _check(folder, settings)
    sweep(folder)
    mark_output(folder, "data build")
    write_atomic(folder / BUILT, (json.dumps(dict(settings)) + "\n").encode())


@dataclass(frozen=True)
class _Writer:
    """The facts that a process needs to write its part of a set."""

    rows: Sequence[Row]
    folder: Path
    target: Target
    contract: HintSpec
    size: tuple[int, int] | None

    def files(self, places: range) -> Iterator[int]:
        """Write these rows' files; yields the number of rows up to each."""
        for place in places:
            if not (self.folder / self.target.picture.format(place)).exists():  # it comes last of its row's files
                for name, content in reversed(self._files(place).items()):
                    write_atomic(self.folder / name, content)
            yield place + 1

    def entry(self, place: int) -> dict[str, str]:
        """A row's line of the listing, when its files are written."""
        hint = self.target.hint.format(place)
        suffix = next(s for s in (".png", ".npy") if (self.folder / f"{hint}{s}").exists())
        picture, prompt = self.target.picture.format(place), self.rows[place].prompt
        values = {"picture": picture, "hint": hint + suffix, "prompt": prompt}
        return {key: values[value] for key, value in self.target.keys.items()}

    def shard(self, numbered: tuple[int, range]) -> Iterator[int]:
        """Write the tar of this number, of these rows; yields the number of rows up to each."""
        number, places = numbered
        path = self.folder / f"{number:05}.tar"
        if path.exists():
            yield places.stop
            return
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for place in places:
                for name, content in self._files(place).items():
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
                if place + 1 < places.stop:
                    yield place + 1
        write_atomic(path, buffer.getvalue())
        yield places.stop

    def _files(self, place: int) -> dict[str, bytes]:
        """A row's files; picture and hint are brought to the size through the same cut."""
        row = self.rows[place]
        picture, given = open_row(row, grounds_of(self.contract)).sound()
        picture = fit(picture, self.size) if self.size else picture
        if given:
            hint = hint_for_pair(Pair(picture, row.prompt, given[0], more=tuple(given[1:])), self.contract)
        else:
            hint = annotate(picture, self.contract)
        return self.target.files(place, picture, hint, row.prompt)
