"""Pairs of picture, prompt and hint: where they come from, and their cache of latents and text embeddings.

A source is a sequence of ``Pair``.
"""

import copy
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from controlkit import maps
from controlkit.annotators import annotate
from controlkit.backbones import Text, UNetBase
from controlkit.errors import UserError, nearest
from controlkit.images import Hint, fit, read_picture, to_tensor, write_atomic, write_png
from controlkit.mini import world
from controlkit.seeds import numpy_rng

if TYPE_CHECKING:
    from controlkit.mini.observer import Truth
    from controlkit.mini.scenes import Scene

FILL50K_SIZE = 512
"""Side of the original tutorial set's pictures."""


@dataclass(frozen=True)
class Pair:
    """A picture nobody generated, uint8 (H, W, 3), and its prompt.

    And its hint, of any size, where the source has one of its own; or what is known of it (a scene's truth), from which
    its hints are drawn; else the picture's annotation is the hint.
    """

    picture: np.ndarray
    prompt: str
    hint: np.ndarray | None = None
    truth: "Scene | None" = None
    kind: str = ""
    """The type of its hint, where a Union learns several."""


TRUTHS: dict[str, Callable[["Truth"], np.ndarray]] = {
    "depth": lambda truth: maps.depth_picture(truth.depth),
    "normal": lambda truth: maps.normal_picture(truth.normals),
    "seg": lambda truth: maps.label_picture(truth.labels, _palette()),
    "pose": lambda truth: maps.pose_picture(truth.keypoints, truth.labels.shape),
}
"""Hints drawn from what is known of a picture, or was read off it by an observer, by name."""


def _palette() -> np.ndarray:
    from controlkit.mini.scenes import PALETTE  # numba's import takes a second

    return PALETTE


def hint_of(pair: Pair, contract: Hint) -> np.ndarray:
    """The pair's hint, at the picture's size, as the contract says: its own, drawn from its truth, or annotated."""
    if pair.hint is not None:
        return fit(pair.hint, pair.picture.shape[:2], contract.resize)
    if contract.annotator in TRUTHS:
        if pair.truth is None:
            raise UserError(
                f"Hints of {contract.annotator} are drawn from what is known of a picture, and of these nothing is: "
                "take data.source: scenes, or a folder with hints of its own."
            )
        return TRUTHS[contract.annotator](pair.truth)
    return annotate(pair.picture, contract)


_EVALUATION_SEED = 2**31  # far from the seeds people give


class EmojiPairs(Sequence[Pair]):
    """Emoji of one split, each on ``variants`` grounds. Hints are annotations."""

    def __init__(
        self, size: int, split: world.Split, variants: int = 1, seed: int = 0, count: int | None = None
    ) -> None:
        self._emoji = world.load_emoji(size)
        rows = world.rows(self._emoji, split)
        if count is not None:  # spread over the whole list, which is sorted by style
            rows = [rows[i] for i in np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)]
        self._rows, self._variants, self._seed = rows, variants, seed

    def __len__(self) -> int:
        return len(self._rows) * self._variants

    def __getitem__(self, index: int) -> Pair:  # type: ignore[override]  # slices are not needed
        if not 0 <= index < len(self):
            raise IndexError(index)
        row, visit = self._rows[index % len(self._rows)], index // len(self._rows)
        return Pair(*world.draw_emoji(self._emoji, row, self._seed, visit))


class ScenePairs(Sequence[Pair]):
    """Ray-cast scenes with their truth, scenes 0 to ``drawn`` of a seed.

    ``heldout``: those with something in them that no control has seen (``scenes.HELDOUT``); else those without.
    ``person``: only those with a figure. Prompts come in the scenes' several wordings.
    """

    def __init__(
        self,
        size: int,
        drawn: int,
        seed: int = 0,
        heldout: bool = False,
        count: int | None = None,
        person: bool = False,
    ) -> None:
        from controlkit.mini.scenes import load_scenes

        scenes = [s for s in load_scenes(size, seed, drawn) if s.heldout == heldout]
        self._scenes = [s for s in scenes if len(s.keypoints) or not person][:count]
        self._seed = seed

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> Pair:  # type: ignore[override]
        scene = self._scenes[index]
        wording = numpy_rng("wording", self._seed, index).integers(len(scene.captions))
        return Pair(scene.picture, scene.captions[wording], truth=scene)


class TypedPairs(Sequence[Pair]):
    """Pairs of several sources, each with one type of hint, for a Union to learn from.

    A source's pairs take the types in turn, those drawn from truth three times as often; what is not known of a pair is
    passed over. ``visits``: how often each source's pairs come, each time with another type.
    """

    def __init__(self, sources: Sequence[Sequence[Pair]], types: Sequence[str], visits: Sequence[int]) -> None:
        self._sources = sources
        self._rows: list[tuple[int, int, str]] = []
        for number, source in enumerate(sources):
            known = len(source) > 0 and source[0].truth is not None
            turns = [t for t in types if t not in TRUTHS] + [t for t in types if t in TRUTHS and known] * 3
            for row in range(len(source) * visits[number] if turns else 0):
                visit, index = divmod(row, len(source))
                kind = turns[(index + visit) % len(turns)]
                if kind == "pose" and not len(source[index].truth.keypoints):  # type: ignore[union-attr]
                    continue
                self._rows.append((number, index, kind))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Pair:  # type: ignore[override]
        number, row, kind = self._rows[index]
        return replace(self._sources[number][row], kind=kind)


class CirclePairs(Sequence[Pair]):
    """The original tutorial set, drawn here: coloured circles on coloured grounds, the outline as hint."""

    def __init__(self, size: int, count: int, seed: int = 0, first: int = 0) -> None:
        self._size, self._count, self._seed, self._first = size, count, seed, first

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Pair:  # type: ignore[override]
        if not 0 <= index < self._count:
            raise IndexError(index)
        picture, outline, prompt = world.draw_shape(self._size, self._seed, self._first + index, ("circle",))
        return Pair(picture, prompt, outline)


class FolderPairs(Sequence[Pair]):
    """The original repository's layout: ``prompt.json``, a JSON object a line; ``source`` hint, ``target`` picture."""

    def __init__(self, folder: Path, size: int) -> None:
        listing = folder / "prompt.json"
        if not listing.is_file():
            raise UserError(
                f"{folder} holds no prompt.json: expected the tutorial layout (prompt.json, source/, target/)."
            )
        try:
            rows = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
            self._rows = [(row["source"], row["target"], row["prompt"]) for row in rows]
        except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise UserError(
                f'{listing} cannot be read ({error}): expected a JSON object a line with "source", "target", "prompt".'
            ) from error
        self._folder, self._size = folder, size

    def part(self, rows: slice) -> "FolderPairs":
        """Some of the rows; pictures are still read one at a time."""
        chosen = copy.copy(self)
        chosen._rows = self._rows[rows]
        return chosen

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Pair:  # type: ignore[override]
        source, target, prompt = self._rows[index]
        hint, picture = (read_picture(self._folder / name) for name in (source, target))
        return Pair(fit(picture, (self._size, self._size)), prompt, hint)


def split_folder(folder: Path, size: int) -> tuple[FolderPairs, FolderPairs]:
    """(pairs to train on, pairs held out): the last tenth of a folder, at most 512 pairs, is never trained on."""
    pairs = FolderPairs(folder, size)
    held = min(max(len(pairs) // 10, 2), 512)
    if len(pairs) <= held:
        raise UserError(f"{folder} has {len(pairs)} pairs: expected at least 3, of which 2 are held out.")
    return pairs.part(slice(None, -held)), pairs.part(slice(-held, None))


SCENES_EVALUATED = 800
"""Scenes drawn of a seed that trains nothing: those with something held out to measure on, the others for FID."""


def evaluation_pairs(source: str, size: int, num: int, person: bool = False) -> tuple[Sequence[Pair], list[np.ndarray]]:
    """(``num`` held-out pairs to measure a control on, pictures nothing has seen as FID's reference).

    ``source`` is ``emoji`` (held-out concepts; held-out pictures), ``scenes`` (held-out pairings and poses, of a seed
    nothing is trained on; ``person``: only with a figure), ``fill50k`` (a seed no recipe uses) or a folder (its
    held-out tenth).
    """
    if source == "emoji":
        unseen = EmojiPairs(size, "heldout_pictures")
        return EmojiPairs(size, "heldout_concepts", count=num), [pair.picture for pair in unseen]
    if source == "scenes":
        scenes = ScenePairs(size, SCENES_EVALUATED, _EVALUATION_SEED, heldout=True, count=num, person=person)
        if len(scenes) < num:
            raise UserError(f"{len(scenes)} held-out scenes are at hand: measure on at most as many.")
        return scenes, [pair.picture for pair in ScenePairs(size, SCENES_EVALUATED, _EVALUATION_SEED)]
    if source == "fill50k":
        others = CirclePairs(size, 512, _EVALUATION_SEED + 1)
        return CirclePairs(size, num, _EVALUATION_SEED), [pair.picture for pair in others]
    _, held = split_folder(Path(source), size)
    return held.part(slice(num)), [pair.picture for pair in held]


def make_fill50k(folder: Path, count: int, size: int = FILL50K_SIZE, seed: int = 0) -> Iterator[int]:
    """Write the tutorial set in its own layout; yields the number of pairs written so far.

    ``prompt.json`` comes last, so that an interrupted folder is never taken for a whole one. Run again to go on;
    ``UserError`` if the folder was begun with another size or seed.
    """
    _begin_set(folder, {"size": size, "seed": seed})
    pairs = CirclePairs(size, count, seed)
    lines = []
    for i, truth in enumerate(pairs):
        names = {"source": f"source/{i}.png", "target": f"target/{i}.png"}
        for name, picture in zip(names.values(), (truth.hint, truth.picture), strict=True):
            if picture is not None and not (folder / name).exists():
                write_png(folder / name, picture)
        lines.append(json.dumps(names | {"prompt": truth.prompt}))
        yield i + 1
    write_atomic(folder / "prompt.json", ("\n".join(lines) + "\n").encode())


def make_scenes(folder: Path, count: int, size: int = 256, seed: int = 0, hint: str = "depth") -> Iterator[int]:
    """Write scenes with everything known of them; yields the number written so far.

    ``target/N.png`` the picture; ``depth``, ``normal``, ``seg``, ``pose`` and ``edges`` hint pictures of the same name;
    ``truth/N.npz`` the exact values, as ``scenes.Scene`` describes them. ``prompt.json`` pairs each picture with its
    ``hint`` for training; ``metadata.jsonl`` holds all wordings, as the datasets library reads a folder of pictures.
    Both come last. Run again to go on.
    """
    from controlkit.mini.scenes import draw_scenes

    kinds: dict[str, Callable[[Scene], np.ndarray]] = {**TRUTHS, "edges": _edge_picture}
    if hint not in kinds:
        raise UserError(f'Scenes have no hints named "{hint}": {nearest(hint, kinds)}')
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
    facts_of = [json.loads((folder / "truth" / f"{i}.json").read_text()) for i in range(count)]
    pairs = [
        {"source": f"{hint}/{i}.png", "target": f"target/{i}.png", "prompt": facts["captions"][0]}
        for i, facts in enumerate(facts_of)
    ]
    rows = [{"file_name": f"target/{i}.png", "text": facts["captions"][0], **facts} for i, facts in enumerate(facts_of)]
    for name, lines in (("metadata.jsonl", rows), ("prompt.json", pairs)):
        write_atomic(folder / name, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _edge_picture(scene: "Scene") -> np.ndarray:
    return np.repeat(scene.edges[..., None] * np.uint8(255), 3, axis=2)


def _begin_set(folder: Path, settings: Mapping[str, int]) -> None:
    """Mark a folder as holding a set drawn with these settings, or refuse one that holds another."""
    drawn = folder / "drawn.json"
    begun = json.loads(drawn.read_text()) if drawn.is_file() else settings
    if not drawn.is_file() and (folder / "prompt.json").is_file():
        raise UserError(f"{folder} holds a set that was not drawn here: give another folder.")
    if begun != settings:
        ours, theirs = (" and ".join(f"{key} {value}" for key, value in of.items()) for of in (settings, begun))
        raise UserError(f"{folder} was begun with {theirs}, not {ours}: go on with those, or give another folder.")
    write_atomic(drawn, (json.dumps(settings) + "\n").encode())


# --- the cache ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cached:
    """All a training step needs of every pair, so that VAE, text tower and annotator run once and not every step.

    ``moments`` (N, 2C, h, w) half; ``hints`` uint8 (N, H, W, 3, or 4 where some are masked); ``kinds`` (N,), the place
    of each hint's type in the contracts' order; ``text`` half, one row a distinct prompt, row 0 the empty prompt;
    ``prompt_rows`` (N,) says which row is whose.
    """

    moments: Tensor
    hints: Tensor
    kinds: Tensor
    text: Text
    prompt_rows: Tensor

    def __len__(self) -> int:
        return len(self.moments)

    @classmethod
    def read(cls, path: Path) -> "Cached":
        """The cache that ``build_cache`` wrote."""
        held = load_file(path)
        text = Text(**{name.removeprefix(_TEXT): held.pop(name) for name in list(held) if name.startswith(_TEXT)})
        return cls(text=text, **held)


_TEXT = "text."  # what the names of the prompts' tensors begin with in a cache's file


def _stacked(hints: Sequence[np.ndarray]) -> np.ndarray:
    """Hints as one array; beside masked ones the others are masked nowhere."""
    channels = max(hint.shape[-1] for hint in hints)
    stacked = np.full((len(hints), *hints[0].shape[:2], channels), 255, np.uint8)
    for row, hint in zip(stacked, hints, strict=True):
        row[..., : hint.shape[-1]] = hint
    return stacked


def build_cache(
    base: UNetBase,
    pairs: Sequence[Pair],
    contracts: Mapping[str, Hint],
    path: Path,
    on_pair: Callable[[int], None] = lambda done: None,
    batch: int = 32,
) -> Cached:
    """The cache of ``pairs``, read from ``path`` if it is there, else built and written there whole.

    ``contracts``: of each type of hint; of a control of one type under "".
    """
    if path.is_file():
        return Cached.read(path)
    moments, hints, kinds, prompts = [], [], [], []
    order = list(contracts)
    for first in range(0, len(pairs), batch):
        chunk = [pairs[i] for i in range(first, min(first + batch, len(pairs)))]
        with base.autocast():
            latents = base.encode_moments(to_tensor([t.picture for t in chunk]).to(base.device))
        moments.append(latents.half().cpu())
        hints += [hint_of(t, contracts[t.kind]) for t in chunk]
        kinds += [order.index(t.kind) for t in chunk]
        prompts += [t.prompt for t in chunk]
        on_pair(len(chunk))
    distinct = ["", *sorted(set(prompts) - {""})]
    row_of = {prompt: row for row, prompt in enumerate(distinct)}
    read = [
        base.encode_text(distinct[i : i + 256]).to(torch.device("cpu"), torch.half).tensors()
        for i in range(0, len(distinct), 256)
    ]
    text = {name: torch.cat([part[name] for part in read]).contiguous() for name in read[0]}
    rows = torch.tensor([row_of[prompt] for prompt in prompts])
    parts = {
        "moments": torch.cat(moments).contiguous(),
        "hints": torch.from_numpy(_stacked(hints)),
        "kinds": torch.tensor(kinds),
        "prompt_rows": rows,
    }
    write_atomic(path, save(parts | {f"{_TEXT}{name}": value for name, value in text.items()}))
    return Cached(text=Text(**text), **parts)
