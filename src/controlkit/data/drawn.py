"""Data sets drawn here, written in the layouts that other tools read."""

import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from controlkit.annotators import all_kinds
from controlkit.data.layouts import DRAWN, own_facts
from controlkit.data.layouts.rows import json_lines
from controlkit.data.pairs import CirclePairs
from controlkit.errors import Mismatch, NotFound, nearest, one_line
from controlkit.files import mark_output, write_atomic
from controlkit.images import write_png

if TYPE_CHECKING:
    from controlkit.mini.scenes import Scene

FILL50K_SIZE = 512
"""Side of the original tutorial set's pictures."""


def make_fill50k(folder: Path, count: int, size: int = FILL50K_SIZE, seed: int = 0) -> Iterator[int]:
    """Write the tutorial set in its own layout; yields the number of pairs written so far.

    ``prompt.json`` comes last, so that an interrupted folder is never taken for a whole one. Run again to resume;
    ``Mismatch`` if the folder was begun with another size or seed.
    """
    _begin_set(folder, {"size": size, "seed": seed})
    pairs = CirclePairs(size, count, seed)
    lines = []
    for i, truth in enumerate(pairs):
        names = {"source": f"source/{i}.png", "target": f"target/{i}.png"}
        for name, picture in zip(names.values(), (truth.hint, truth.picture), strict=True):
            if picture is not None and not (folder / name).exists():
                write_png(folder / name, picture)
        lines.append(names | {"prompt": truth.prompt})
        yield i + 1
    write_atomic(folder / "prompt.json", json_lines(lines))


def make_scenes(folder: Path, count: int, size: int = 256, seed: int = 0, hint: str = "depth") -> Iterator[int]:
    """Write scenes with everything known of them; yields the number written so far.

    ``target/N.png`` the picture; in a folder for each kind of hint that a scene's truth draws, and in ``edges``, hint
    pictures of the same name; ``truth/N.npz`` the exact values, as ``scenes.Scene`` describes them. ``prompt.json``
    pairs each picture with its ``hint`` for training; ``metadata.jsonl`` holds all wordings, as the datasets library
    reads a folder of pictures. Both come last. Run again to resume. ``NotFound`` for an unknown ``hint``, ``Mismatch``
    if the folder was begun with another size or seed.
    """
    from controlkit.mini.scenes import draw_scenes

    kinds: dict[str, Callable[[Scene], np.ndarray]] = {kind.name: kind.truth for kind in all_kinds() if kind.truth}
    kinds["edges"] = _edge_picture
    if hint not in kinds:
        raise NotFound(f'Scenes have no hints named "{hint}": {nearest(hint, kinds)}')
    _begin_set(folder, {"size": size, "seed": seed})
    missing = [i for i in range(count) if not (folder / "truth" / f"{i}.json").exists()]
    for i, scene in zip(missing, draw_scenes(size, seed, missing), strict=True):
        write_png(folder / "target" / f"{i}.png", scene.picture)
        for kind, picture_of in kinds.items():
            write_png(folder / kind / f"{i}.png", picture_of(scene))
        exact = {name: value for name, value in vars(scene).items() if isinstance(value, np.ndarray)}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **{k: value for k, value in exact.items() if k != "picture"})
        write_atomic(folder / "truth" / f"{i}.npz", buffer.getvalue())
        facts = {"captions": scene.captions, "heldout": scene.heldout}
        write_atomic(folder / "truth" / f"{i}.json", (json.dumps(facts) + "\n").encode())
        yield i + 1
    facts_of = [json.loads((folder / "truth" / f"{i}.json").read_text(encoding="utf-8")) for i in range(count)]
    pairs = [
        {"source": f"{hint}/{i}.png", "target": f"target/{i}.png", "prompt": facts["captions"][0]}
        for i, facts in enumerate(facts_of)
    ]
    rows = [{"file_name": f"target/{i}.png", "text": facts["captions"][0], **facts} for i, facts in enumerate(facts_of)]
    for name, lines in (("metadata.jsonl", rows), ("prompt.json", pairs)):
        write_atomic(folder / name, json_lines(lines))


def _edge_picture(scene: "Scene") -> np.ndarray:
    return np.repeat(scene.edges[..., None] * np.uint8(255), 3, axis=2)


def _begin_set(folder: Path, settings: Mapping[str, int]) -> None:
    """Write the file that says a folder holds a set drawn with these settings; refuse one that holds another."""
    drawn = folder / DRAWN
    begun = own_facts(drawn) if drawn.is_file() else settings
    if not drawn.is_file() and (folder / "prompt.json").is_file():
        raise Mismatch(f"{folder} holds a set that was not drawn here: give another folder.")
    if begun != settings:
        ours, theirs = (" and ".join(f"{key} {one_line(of.get(key))}" for key in settings) for of in (settings, begun))
        raise Mismatch(f"{folder} was begun with {theirs}, not {ours}: go on with those, or give another folder.")
    mark_output(folder, "data make")
    write_atomic(drawn, (json.dumps(settings) + "\n").encode())
