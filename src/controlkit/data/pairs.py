"""Pairs of picture, prompt and hint, and the sources they come from. A source is a sequence of ``Pair``."""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from controlkit.annotators import annotate_all, kind_of, kind_or_bare, parts_of
from controlkit.data.buckets import Size, nearest_bucket
from controlkit.data.layouts import folder_of, read_listing
from controlkit.data.layouts.rows import Row, rows_digest
from controlkit.errors import Invalid, Mismatch, Unsupported
from controlkit.images import HintSpec, decode_hint, decode_picture, fit, sides_of
from controlkit.mini import world
from controlkit.seeds import numpy_rng

if TYPE_CHECKING:
    from controlkit.mini.scenes import Scene


@dataclass(frozen=True)
class Pair:
    """A real picture, uint8 (H, W, 3), its prompt, and where its hint comes from.

    ``hint``: its own, of any size, a picture or an array (``images``). ``truth``: of a scene, from which hints are
    drawn. With neither the hint is an annotation of the picture.
    """

    picture: np.ndarray
    prompt: str
    hint: np.ndarray | None = None
    truth: "Scene | None" = None
    kind: str = ""
    """The type of its hint, where a Union learns several."""
    more: tuple[np.ndarray, ...] = ()
    """Further hints of its own, which become channels of one."""


def hint_for_pair(pair: Pair, contract: HintSpec) -> np.ndarray:
    """The pair's hint, (H, W, C) at the picture's size, as the contract says.

    Its own hint comes first, then what its scene's truth draws, then the picture's annotation. Several become channels
    of one, in the contract's order. ``Invalid`` where its own is not as the contract says, ``Unsupported`` where there
    is nothing to make a hint of.
    """
    parts = parts_of(contract)
    if pair.hint is not None:
        return _own_hint(pair, contract, parts)
    if len(parts) > 1:
        return np.concatenate([hint_for_pair(pair, part) for part in parts], 2)
    kind = kind_or_bare(contract.annotator)
    if kind.truth is not None and pair.truth is not None:
        return kind.truth(pair.truth)
    if kind.truth is not None and not kind.is_made_here:
        raise Unsupported(
            f"Hints of {contract.annotator} are drawn from a scene's truth, and these pictures have none: "
            "take data.source: scenes, or a folder with hints of its own."
        )
    return annotate_all([pair.picture], contract)[0]


def is_annotated(pair: Pair, contract: HintSpec) -> bool:
    """Whether the pair's hint is made of its picture alone."""
    kinds = [kind_or_bare(part.annotator) for part in parts_of(contract)]
    drawn = [kind.truth and pair.truth is not None for kind in kinds]
    return pair.hint is None and all(k.is_made_here and not d for k, d in zip(kinds, drawn, strict=True))


def _own_hint(pair: Pair, contract: HintSpec, parts: Sequence[HintSpec]) -> np.ndarray:
    assert pair.hint is not None
    given, size = (pair.hint, *pair.more), pair.picture.shape[:2]
    if len(given) == 1:  # channels of several, side by side in one array, are one hint
        rules = [contract]
    elif len(given) != len(parts):
        raise Mismatch(
            f"A pair has {len(given)} hints, and {len(parts)} are named: expected as many of control.annotators as "
            "hints, in their order."
        )
    else:
        rules = list(parts)
    for hint, rule in zip(given, rules, strict=True):
        if words := rule.fault(hint):
            raise Invalid(f"A hint {words}. `controlkit data doctor` says which.")
    fitted = [fit(hint, size, rule.resize) for hint, rule in zip(given, rules, strict=True)]
    if len(fitted) == 1:
        return fitted[0]
    wide = [hint.repeat(3, 2) if hint.shape[-1] == 1 else hint[..., :3] for hint in fitted]
    if len({hint.dtype for hint in wide}) > 1:  # one array has one type
        wide = [contract.values(hint) for hint in wide]
    return np.concatenate(wide, 2)


MOST_PIXELS = 64_000_000
"""Of a picture that is trained on; a larger one is taken for a mistake, or for an attack."""


def out_of_place(picture: np.ndarray, hint: np.ndarray) -> str:
    """Why a hint does not lie on its picture, or "": both are cut to the same part only if they have one shape."""
    (height, width), (high, wide) = picture.shape[:2], hint.shape[:2]
    if abs(width / height - wide / high) <= 0.02 * width / height:
        return ""
    return f"is {wide}x{high}, its picture {width}x{height}: not of one shape, so not in place"


def turned_over(contract: HintSpec, greys: Sequence[float]) -> str:
    """Why line hints of these mean greys (0 to 1) are inverted, in words; "" where they are not, or are no lines."""
    if not kind_or_bare(contract.annotator).lines or not greys or (mean := float(np.mean(greys))) <= 0.5:
        return ""
    return f"their mean grey is {mean:.2f}: {contract.annotator} is light lines on black"


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
    """Ray-cast scenes with their truth, of scenes 0 to ``drawn`` of a seed.

    ``heldout``: those with something in them that no control was trained on (``scenes.HELDOUT``); else those without.
    ``person``: only those with a figure. A scene's prompt is one of its wordings, drawn by seed.
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

    A source's pairs take the types in turn, those drawn from truth three times as often; types that a pair's truth
    lacks are left out. ``visits``: how often each source's pairs come, each time with another type.
    """

    def __init__(self, sources: Sequence[Sequence[Pair]], types: Sequence[str], visits: Sequence[int]) -> None:
        self._sources = sources
        self._rows: list[tuple[int, int, str]] = []
        for number, source in enumerate(sources):
            known = len(source) > 0 and source[0].truth is not None
            drawn = [t for t in types if kind_of(t).truth]
            turns = [t for t in types if t not in drawn] + drawn * (3 if known else 0)
            for row in range(len(source) * visits[number] if turns else 0):
                visit, index = divmod(row, len(source))
                kind = turns[(index + visit) % len(turns)]
                if kind_of(kind).needs_person and not len(source[index].truth.keypoints):  # type: ignore[union-attr]
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
    """A data set in a folder, in any of the layouts of ``layouts``. Hints are its own (``hinted``), else annotations.

    ``masked``: what is transparent in a hint is masked, as with hints of ``inpaint``; else it is laid on white.
    ``columns``: as with ``read_listing``. ``Invalid`` where its listing has a fatal problem.
    """

    def __init__(self, folder: Path, size: int, masked: bool = False, columns: Mapping[str, str] | None = None) -> None:
        listing = read_listing(folder, columns)
        fatal = [problem for problem in listing.problems if problem.fatal]
        if fatal:
            more = f" and {len(fatal) - 1} more such things" if len(fatal) > 1 else ""
            raise Invalid(f"{fatal[0]}{more}. `controlkit data doctor {folder}` lists them all.")
        self._rows, self._size, self._masked = listing.rows, size, masked
        self._sizes: list[Size] | None = None
        self.hinted = any(row.hint for row in listing.rows)
        self.hints = max((len(row.hints) for row in listing.rows), default=0)
        """Hints a row has."""
        if bare := sum(row.hint is None for row in listing.rows) if self.hinted else 0:
            raise Invalid(f"{bare} of {len(listing.rows)} rows in {folder} have no hint: expected all to, or none.")
        if fewer := sum(len(row.hints) < self.hints for row in listing.rows):
            raise Invalid(f"{fewer} of {len(listing.rows)} rows in {folder} have fewer than {self.hints} hints.")

    def part(self, rows: slice) -> "FolderPairs":
        """Some of the rows; pictures are still read one at a time."""
        chosen = copy.copy(self)
        chosen._rows = self._rows[rows]
        chosen._sizes = self._sizes and self._sizes[rows]
        return chosen

    def bucketed(self, sizes: Sequence[Size]) -> "FolderPairs":
        """The same, each picture at the one of these sizes that is nearest to it in shape, instead of square."""
        chosen = copy.copy(self)
        shapes = (sides_of(row.picture.read(), row.picture.name) for row in self._rows)
        chosen._sizes = [nearest_bucket(shape, sizes) for shape in shapes]
        return chosen

    def size_of(self, index: int) -> Size:
        """(height, width) of a pair's picture, which is not opened for it."""
        return self._sizes[index] if self._sizes else (self._size, self._size)

    def digest(self) -> str:
        """The digest of its pictures' names and prompts, in their order."""
        return rows_digest(self._rows)

    def lines(self) -> list[str]:
        """Each row's picture and prompt, as ``digest`` takes them, on a line."""
        return [json.dumps([Path(row.picture.name).name, row.prompt]) for row in self._rows]

    def mix(self) -> None:
        """Put the rows in an order that captions alone decide; those of one caption in the set's order."""
        self._rows = sorted(self._rows, key=lambda row: hashlib.blake2b(row.prompt.encode(), digest_size=8).digest())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Pair:  # type: ignore[override]
        row = self._rows[index]
        picture = decode_picture(row.picture.read(), row.picture.name)
        height, width = picture.shape[:2]
        if height * width > MOST_PIXELS:
            raise Invalid(f"{row.picture.name} is {width}x{height}: expected at most {MOST_PIXELS:,} pixels.")
        hints = self._hints(row)
        for held, hint in zip(row.hints, hints, strict=True):
            if words := out_of_place(picture, hint):
                raise Invalid(f"{held.name} {words}. `controlkit data doctor` lists all such pairs.")
        fitted = fit(picture, self.size_of(index))
        return Pair(fitted, row.prompt, hints[0] if hints else None, more=tuple(hints[1:]))

    def _hints(self, row: Row) -> list[np.ndarray]:
        return [decode_hint(held.read(), held.name, self._masked) for held in row.hints]

    def check_hints(self, contract: HintSpec) -> None:
        """``Invalid`` where a few hints, from all over the set, are inverted lines."""
        few = [self._rows[i] for i in np.linspace(0, len(self) - 1, min(len(self), 16)).astype(int)]
        for place, rule in enumerate(parts_of(contract)[: self.hints]):
            hints = [self._hints(row)[place] for row in few] if kind_or_bare(rule.annotator).lines else []
            greys = [rule.picture(hint).mean() / 255 for hint in hints if not rule.fault(hint)]
            if words := turned_over(rule, greys):
                raise Invalid(f"The hints are inverted: {words}. Invert them; `controlkit data doctor` shows a sheet.")


def trained_count(pairs: int) -> int:
    """Of so many pairs in a folder, those that are trained on: a tenth, 2 to 512 pairs, is held out."""
    return max(pairs - min(max(pairs // 10, 2), 512), 0)


def split_folder(
    folder: Path, size: int, masked: bool = False, columns: Mapping[str, str] | None = None
) -> tuple[FolderPairs, FolderPairs]:
    """(pairs to train on, pairs held out): a tenth of a folder, at most 512 pairs, is never trained on.

    Both are drawn by caption. A sorted folder's end is of one kind, and pictures of one caption are often one picture
    twice: they stay on one side, but for one caption at the border. ``masked``, ``columns``: as with ``FolderPairs``.
    ``Invalid`` for fewer than 3 pairs.
    """
    pairs = FolderPairs(folder, size, masked, columns)
    trained = trained_count(len(pairs))
    if not trained:
        raise Invalid(f"{folder} has {len(pairs)} pairs: expected at least 3, of which 2 are held out.")
    pairs.mix()
    return pairs.part(slice(trained)), pairs.part(slice(trained, None))


SCENES_EVALUATED = 800
"""Scenes drawn of a seed that no recipe trains on: the held-out ones to measure on, the others for FID."""


def evaluation_pairs(
    source: str,
    size: int,
    num: int,
    person: bool = False,
    masked: bool = False,
    columns: Mapping[str, str] | None = None,
) -> tuple[Sequence[Pair], list[np.ndarray]]:
    """(``num`` held-out pairs to measure a control on, pictures that nothing was trained on as FID's reference).

    ``source`` is ``emoji`` (held-out concepts; held-out pictures), ``scenes`` (held-out pairings and poses, of a seed
    nothing is trained on; ``person``: only with a figure), ``fill50k`` (a seed no recipe uses) or a folder (its
    held-out tenth; ``masked``, ``columns``: as with ``FolderPairs``). ``Invalid`` for more scenes than there are.
    """
    if source == "emoji":
        unseen = EmojiPairs(size, "heldout_pictures")
        return EmojiPairs(size, "heldout_concepts", count=num), [pair.picture for pair in unseen]
    if source == "scenes":
        scenes = ScenePairs(size, SCENES_EVALUATED, _EVALUATION_SEED, heldout=True, count=num, person=person)
        if len(scenes) < num:
            raise Invalid(f"--num is {num}, and {len(scenes)} held-out scenes are at hand: measure on at most as many.")
        return scenes, [pair.picture for pair in ScenePairs(size, SCENES_EVALUATED, _EVALUATION_SEED)]
    if source == "fill50k":
        others = CirclePairs(size, 512, _EVALUATION_SEED + 1)
        return CirclePairs(size, num, _EVALUATION_SEED), [pair.picture for pair in others]
    _, held = split_folder(folder_of(source), size, masked, columns)
    return held.part(slice(-num, None)), [pair.picture for pair in held]
