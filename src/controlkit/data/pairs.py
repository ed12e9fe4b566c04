"""Pairs of picture, prompt and hint, and the sources they come from. A source is a sequence of ``Pair``."""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from controlkit.annotators import annotate_all, grounds_of, kind_of, kind_or_bare, parts_of
from controlkit.data.buckets import Size, nearest_bucket
from controlkit.data.layouts import folder_of, sound_listing
from controlkit.data.layouts.rows import Row, rows_digest, unequal
from controlkit.data.opened import open_row, sides_of_row
from controlkit.errors import Invalid, Mismatch, Unsupported
from controlkit.images import Ground, HintSpec, fit
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
    if pair.hint is not None:
        return _own_hint(pair, contract)
    if len(parts := parts_of(contract)) > 1:
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


def rules_of(contract: HintSpec, hints: int) -> list[HintSpec]:
    """The contract of each of a row's hints; ``Mismatch`` where it has others than are named.

    Of one hint it is the contract itself: channels of several, side by side in one array, are one hint.
    """
    parts = parts_of(contract)
    if hints > 1 and hints != len(parts):
        raise Mismatch(
            f"has {hints} hints, and {contract.annotator or 'no kind'} is named: name as many kinds as hints, in their "
            "order (--annotator canny+depth; in a recipe, control.annotators)."
        )
    return parts if hints > 1 else [contract] * hints


def _own_hint(pair: Pair, contract: HintSpec) -> np.ndarray:
    assert pair.hint is not None
    given, size = (pair.hint, *pair.more), pair.picture.shape[:2]
    try:
        rules = rules_of(contract, len(given))
    except Mismatch as error:
        raise Mismatch(f"A pair {error}") from None
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


def inverted(rows: Sequence[Row], contract: HintSpec) -> str:
    """Why the hints of these rows are inverted lines, in words, by the mean grey of a few; "" where they are not."""
    few = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), 16)).astype(int)) if rows else np.empty(0, int)
    hints = [open_row(rows[place], grounds_of(contract)).sound()[1] for place in few if rows[place].hints]
    for place, rule in enumerate(rules_of(contract, len(hints[0])) if hints else []):
        greys = [rule.picture(row[place]).mean() / 255 for row in hints if not rule.fault(row[place])]
        if kind_or_bare(rule.annotator).lines and greys and (mean := float(np.mean(greys))) > 0.5:
            return f"their mean grey is {mean:.2f}: {rule.annotator} is light lines on black"
    return ""


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
    """A data set in a folder, in any of the layouts of ``layouts``. Hints are its own, else annotations.

    ``grounds``: the colour laid under what is transparent in each of a row's hints (``annotators.grounds_of``).
    ``columns``: as with ``read_listing``. ``Invalid`` where its listing has a fatal problem.
    """

    def __init__(
        self,
        folder: Path,
        size: int,
        grounds: Sequence[Ground] = ("black",),
        columns: Mapping[str, str] | None = None,
    ) -> None:
        listing = sound_listing(folder, columns)
        self._rows = self._listed = listing.rows
        self._size, self._grounds = size, grounds
        self._sizes: list[Size] | None = None
        self.hints = max((len(row.hints) for row in listing.rows), default=0)
        """Hints a row has; with none they are annotations."""
        if words := unequal(listing.rows):
            raise Invalid(f"{folder}: {words}.")

    def part(self, rows: slice) -> "FolderPairs":
        """Some of the rows; pictures are still read one at a time."""
        chosen = copy.copy(self)
        chosen._rows = self._rows[rows]
        chosen._sizes = self._sizes and self._sizes[rows]
        return chosen

    def bucketed(self, sizes: Sequence[Size]) -> "FolderPairs":
        """The same, each picture at the one of these sizes that is nearest to it in shape, instead of square."""
        chosen = copy.copy(self)
        chosen._sizes = [nearest_bucket(sides_of_row(row), sizes) for row in self._rows]
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
        picture, hints = open_row(row, self._grounds).sound()
        fitted = fit(picture, self.size_of(index))
        return Pair(fitted, row.prompt, hints[0] if hints else None, more=tuple(hints[1:]))

    def check_hints(self, contract: HintSpec) -> None:
        """``Invalid`` where a few hints, from all over the listed set, are inverted lines."""
        if words := inverted(self._listed, contract):
            raise Invalid(f"The hints are inverted: {words}. Invert them; `controlkit data doctor` shows a sheet.")


def trained_count(pairs: int) -> int:
    """Of so many pairs in a folder, those that are trained on: a tenth, 2 to 512 pairs, is held out."""
    return max(pairs - min(max(pairs // 10, 2), 512), 0)


def too_few(pairs: int) -> str:
    """Why so many pairs cannot be trained on, in words; "" where they can."""
    return "" if trained_count(pairs) else f"has {pairs} pairs: expected at least 3, of which 2 are held out"


def split_folder(
    folder: Path, size: int, grounds: Sequence[Ground] = ("black",), columns: Mapping[str, str] | None = None
) -> tuple[FolderPairs, FolderPairs]:
    """(pairs to train on, pairs held out): a tenth of a folder, at most 512 pairs, is never trained on.

    Both are drawn by caption. A sorted folder's end is of one kind, and pictures of one caption are often one picture
    twice: they stay on one side, but for one caption at the border. ``grounds``, ``columns``: as with ``FolderPairs``.
    ``Invalid`` for fewer than 3 pairs.
    """
    pairs = FolderPairs(folder, size, grounds, columns)
    if words := too_few(len(pairs)):
        raise Invalid(f"{folder} {words}.")
    trained = trained_count(len(pairs))
    pairs.mix()
    return pairs.part(slice(trained)), pairs.part(slice(trained, None))


SCENES_EVALUATED = 800
"""Scenes drawn of a seed that no recipe trains on: the held-out ones to measure on, the others for FID."""


def evaluation_pairs(
    source: str,
    size: int,
    num: int,
    person: bool = False,
    grounds: Sequence[Ground] = ("black",),
    columns: Mapping[str, str] | None = None,
) -> tuple[Sequence[Pair], list[np.ndarray]]:
    """(``num`` held-out pairs to measure a control on, pictures that nothing was trained on as FID's reference).

    ``source`` is ``emoji`` (held-out concepts; held-out pictures), ``scenes`` (held-out pairings and poses, of a seed
    nothing is trained on; ``person``: only with a figure), ``fill50k`` (a seed no recipe uses) or a folder (its
    held-out tenth; ``grounds``, ``columns``: as with ``FolderPairs``). ``Invalid`` for more scenes than there are.
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
    _, held = split_folder(folder_of(source), size, grounds, columns)
    return held.part(slice(-num, None)), [pair.picture for pair in held]
