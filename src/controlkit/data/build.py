"""A data set written anew in a chosen layout: pictures at one size, hints made where there were none.

The work can be interrupted and resumed; until it is whole, nothing reads the folder as a data set.
"""

import io
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from controlkit.annotators import annotate, grounds_of, kind_or_bare, parts_of
from controlkit.data.captions import JOURNAL, Captioning, captioned
from controlkit.data.layouts import BUILT
from controlkit.data.layouts.rows import Listing, Row, rows_digest
from controlkit.data.pairs import Pair, hint_for_pair
from controlkit.data.workers import parallel_map, ranges_of
from controlkit.errors import Mismatch, Unsupported, nearest
from controlkit.files import SCRATCH, write_atomic
from controlkit.images import HintSpec, array_bytes, decode_hint, decode_picture, fit, png_bytes

SHARD = 1000
"""Pairs in a tar."""
_STOP = f"{SCRATCH}stop"
"""The file in the folder at which workers stop."""


@dataclass(frozen=True)
class Target:
    """A layout to write: the folders of pictures and hints, what stands beside each picture, and the listing."""

    pictures: str
    hints: str
    beside: Callable[[str], Mapping[str, bytes]] = lambda prompt: {}
    """Suffix -> content of further files of a picture's name."""
    listing: str | None = None
    entry: Callable[[str, str, str], dict[str, str]] | None = None
    """(picture, hint, prompt) -> a line of the listing."""

    def paths(self, place: int) -> tuple[str, str]:
        """Where picture and hint of a row go, in the set's folder; a hint that is no picture ends in ``.npy``."""
        return f"{self.pictures}/{place}.png", f"{self.hints}/{place}.png"


TARGETS = {
    "prompt.json": Target(
        "target",
        "source",
        listing="prompt.json",
        entry=lambda picture, hint, prompt: {"source": hint, "target": picture, "prompt": prompt},
    ),
    "metadata": Target(
        "images",
        "conditioning_images",
        listing="metadata.jsonl",
        entry=lambda picture, hint, prompt: {
            "file_name": picture,
            "conditioning_image_file_name": hint,
            "text": prompt,
        },
    ),
    "paired": Target("image_dir", "conditioning_data_dir", beside=lambda prompt: {".txt": f"{prompt}\n".encode()}),
}
"""Layouts of single files; ``webdataset`` is written in shards."""


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
    or hints that nothing makes; ``Mismatch`` if the folder was begun with other settings or another set, or holds
    anything else.
    """
    if layout not in {*TARGETS, "webdataset"}:
        raise Unsupported(f'Nothing writes the layout "{layout}": {nearest(layout, [*TARGETS, "webdataset"])}')
    made = all(kind_or_bare(part.annotator).is_made_here for part in parts_of(contract))
    if not made and any(row.hint is None for row in listing.rows):
        raise Unsupported("There are rows without a hint, and no annotator to make them: name one, such as canny.")
    settings = {
        "layout": layout,
        "hint": json.loads(contract.to_json()),
        "size": size and list(size),
        "captions": {"by": captioning.captioner.name, "over": captioning.over} if captioning else None,
        "set": rows_digest(listing.rows),  # files are numbered by row: another row would be another's file
    }
    _begin(folder, settings)
    if captioning:
        listing = captioned(listing, captioning, folder / JOURNAL)
    writer, count = _Writer(listing.rows, folder, contract, size), len(listing.rows)
    if layout == "webdataset":
        shards = [range(first, min(first + SHARD, count)) for first in range(0, count, SHARD)]
        yield from parallel_map(writer.shard, list(enumerate(shards)), workers, folder / _STOP)
    else:
        target = TARGETS[layout]
        yield from parallel_map(partial(writer.files, target), ranges_of(count), workers, folder / _STOP)
        if target.listing:
            entries = [writer.entry(target, place) for place in range(count)]
            write_atomic(folder / target.listing, "".join(f"{entry}\n" for entry in entries).encode())
    write_atomic(folder / BUILT, (json.dumps(settings | {"whole": True}) + "\n").encode())


def _begin(folder: Path, settings: Mapping[str, object]) -> None:
    """Write the file that says a folder is being built with these settings; refuse one that holds something else."""
    marker = folder / BUILT
    if marker.is_file():
        begun = json.loads(marker.read_text())
        begun.pop("whole", None)
        if begun != settings:
            changed = [key for key in settings if begun.get(key) != settings[key]]
            raise Mismatch(f"{folder} was begun with another {' and '.join(changed)}: give another folder.")
        for left in folder.rglob(f"{SCRATCH}*"):  # by a process that was killed
            left.unlink()
    elif folder.is_dir() and any(folder.iterdir()):
        raise Mismatch(f"{folder} holds something that was not built here: give an empty folder, or a new one.")
    write_atomic(marker, (json.dumps(dict(settings)) + "\n").encode())


def _hint_bytes(hint: np.ndarray) -> tuple[str, bytes]:
    """(suffix, content) of a hint's file: a PNG where it is a picture, else an array."""
    if hint.dtype == np.uint8 and hint.shape[-1] in (3, 4):
        return ".png", png_bytes(hint)
    return ".npy", array_bytes(hint)


@dataclass(frozen=True)
class _Writer:
    """The facts that a process needs to write its part of a set."""

    rows: Sequence[Row]
    folder: Path
    contract: HintSpec
    size: tuple[int, int] | None

    def files(self, target: Target, places: range) -> Iterator[int]:
        """Write these rows' files; yields the number of rows up to each."""
        for place in places:
            row = self.rows[place]
            picture, hint = (self.folder / path for path in target.paths(place))
            if not picture.exists():  # it comes last of its row's files
                pixels, hinted = self._pair(row)
                for suffix, words in target.beside(row.prompt).items():
                    write_atomic(picture.with_suffix(suffix), words)
                suffix, content = _hint_bytes(hinted)
                write_atomic(hint.with_suffix(suffix), content)
                write_atomic(picture, png_bytes(pixels))
            yield place + 1

    def entry(self, target: Target, place: int) -> str:
        """A row's line of the listing, when its files are written."""
        assert target.entry is not None
        picture, hint = target.paths(place)
        suffix = next(s for s in (".png", ".npy") if (self.folder / hint).with_suffix(s).exists())
        return json.dumps(target.entry(picture, hint.removesuffix(".png") + suffix, self.rows[place].prompt))

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
                pixels, hinted = self._pair(self.rows[place])
                suffix, hint = _hint_bytes(hinted)
                parts = {
                    "png": png_bytes(pixels),
                    f"conditioning_image{suffix}": hint,
                    "txt": self.rows[place].prompt.encode(),
                }
                for part, content in parts.items():
                    member = tarfile.TarInfo(f"{place:08}.{part}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
                if place + 1 < places.stop:
                    yield place + 1
        write_atomic(path, buffer.getvalue())
        yield places.stop

    def _pair(self, row: Row) -> tuple[np.ndarray, np.ndarray]:
        """Picture and hint of a row, brought to the size through the same cut."""
        picture = decode_picture(row.picture.read(), row.picture.name)
        picture = fit(picture, self.size) if self.size else picture
        if row.hint is None:
            return picture, annotate(picture, self.contract)
        grounds = itertools.cycle(grounds_of(self.contract))
        given = [decode_hint(held.read(), held.name, next(grounds)) for held in row.hints]
        return picture, hint_for_pair(Pair(picture, row.prompt, given[0], more=tuple(given[1:])), self.contract)
