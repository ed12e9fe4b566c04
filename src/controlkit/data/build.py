"""A data set written anew in the layout of choice: pictures at one size, hints made where there were none.

The work can be interrupted and gone on with; until it is whole, nothing reads the folder as a data set.
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from controlkit.annotators import ANNOTATORS, annotate, parts_of
from controlkit.data.layouts import BUILT, Listing, Row
from controlkit.data.pairs import Pair, hint_of
from controlkit.errors import UserError, nearest
from controlkit.images import Hint, decode_hint, decode_picture, fit, png_bytes, write_atomic

SHARD = 1000
"""Pairs in a tar."""


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
    listing: Listing, folder: Path, layout: str, contract: Hint, size: tuple[int, int] | None = None
) -> Iterator[int]:
    """Write a data set's pairs into ``folder``; yields the number written so far.

    ``contract`` says what the hints are; its annotator makes them where the set has none. ``size`` is (height, width);
    None leaves pictures as they are. ``UserError`` if the folder was begun with other settings, or holds anything else.
    """
    if layout not in {*TARGETS, "webdataset"}:
        raise UserError(f'Nothing writes the layout "{layout}": {nearest(layout, [*TARGETS, "webdataset"])}')
    made = all(part.annotator in ANNOTATORS for part in parts_of(contract))
    if not made and any(row.hint is None for row in listing.rows):
        raise UserError("There are rows without a hint, and no annotator to make them: name one, such as canny.")
    settings = {"layout": layout, "hint": json.loads(contract.to_json()), "size": size and list(size)}
    _begin(folder, settings)
    if layout == "webdataset":
        yield from _shards(listing, folder, contract, size)
    else:
        yield from _files(listing, folder, TARGETS[layout], contract, size)
    write_atomic(folder / BUILT, (json.dumps(settings | {"whole": True}) + "\n").encode())


def _begin(folder: Path, settings: Mapping[str, object]) -> None:
    """Mark a folder as being built with these settings, or refuse one that holds something else."""
    marker = folder / BUILT
    if marker.is_file():
        begun = json.loads(marker.read_text())
        begun.pop("whole", None)
        if begun != settings:
            changed = [key for key in settings if begun.get(key) != settings[key]]
            raise UserError(f"{folder} was begun with another {' and '.join(changed)}: give another folder.")
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} holds something that was not built here: give an empty folder, or a new one.")
    write_atomic(marker, (json.dumps(dict(settings)) + "\n").encode())


def _pair(row: Row, contract: Hint, size: tuple[int, int] | None) -> tuple[np.ndarray, np.ndarray]:
    """Picture and hint of a row, brought to the size through the same cut."""
    picture = decode_picture(row.picture.read(), row.picture.name)
    picture = fit(picture, size) if size else picture
    if row.hint is None:
        return picture, annotate(picture, contract)
    given = [decode_hint(held.read(), held.name) for held in row.hints]
    return picture, hint_of(Pair(picture, row.prompt, given[0], more=tuple(given[1:])), contract)


def _hint_bytes(hint: np.ndarray) -> tuple[str, bytes]:
    """(suffix, content) of a hint's file: a PNG where it is a picture, else an array."""
    if hint.dtype == np.uint8 and hint.shape[-1] in (3, 4):
        return ".png", png_bytes(hint)
    buffer = io.BytesIO()
    np.save(buffer, hint)
    return ".npy", buffer.getvalue()


def _files(
    listing: Listing, folder: Path, target: Target, contract: Hint, size: tuple[int, int] | None
) -> Iterator[int]:
    entries = []
    for place, row in enumerate(listing.rows):
        picture, hint = f"{target.pictures}/{place}.png", f"{target.hints}/{place}"
        if not (folder / picture).exists():  # it comes last of its row's files
            pixels, hinted = _pair(row, contract, size)
            for suffix, words in target.beside(row.prompt).items():
                write_atomic((folder / picture).with_suffix(suffix), words)
            suffix, content = _hint_bytes(hinted)
            write_atomic(folder / f"{hint}{suffix}", content)
            write_atomic(folder / picture, png_bytes(pixels))
        if target.entry:
            suffix = next(suffix for suffix in (".png", ".npy") if (folder / f"{hint}{suffix}").exists())
            entries.append(json.dumps(target.entry(picture, f"{hint}{suffix}", row.prompt)))
        yield place + 1
    if target.listing:
        write_atomic(folder / target.listing, "".join(f"{entry}\n" for entry in entries).encode())


def _shards(listing: Listing, folder: Path, contract: Hint, size: tuple[int, int] | None) -> Iterator[int]:
    for first in range(0, len(listing.rows), SHARD):
        rows = listing.rows[first : first + SHARD]
        path = folder / f"{first // SHARD:05}.tar"
        if not path.exists():
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as archive:
                for place, row in enumerate(rows, first):
                    pixels, hinted = _pair(row, contract, size)
                    suffix, content = _hint_bytes(hinted)
                    parts = {
                        "png": png_bytes(pixels),
                        f"conditioning_image{suffix}": content,
                        "txt": row.prompt.encode(),
                    }
                    for part, content in parts.items():
                        member = tarfile.TarInfo(f"{place:08}.{part}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
                    yield place + 1
            write_atomic(path, buffer.getvalue())
        yield first + len(rows)
