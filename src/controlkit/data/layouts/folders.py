"""Folders of pictures, by themselves or beside folders of hints; captions beside pictures, or in their names."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count, takewhile
from pathlib import Path

from controlkit.annotators import all_kinds
from controlkit.data.layouts.rows import HINT_SUFFIXES, SUFFIXES, Names, Problem, Row, file_at, is_there, text_of
from controlkit.data.layouts.tree import Tree
from controlkit.errors import Invalid

CAPTION_SUFFIXES = (".txt", ".caption", ".text")
OTHER_PICTURES = (".heic", ".heif", ".jxl", ".svg", ".psd", ".dng", ".cr2", ".nef", ".arw", ".exr", ".tga", ".npy")
"""Of files that are no pictures here, but may be those whose hints lie beside them."""
FOLDERS = ("condition", "conditions", "conditioning", "control", "controls", "hint", "hints", "cond")
"""The first word of a name that says a folder holds hints."""

_COMPARED = 100
"""Folders that a folder is compared with, so that many folders do not take the square of their number."""

ByName = dict[Path, Path]
"""A folder's pictures by what their names are below it, without suffix."""


def two_folders(tree: Tree, problems: list[Problem], names: Names) -> list[Row] | None:
    """A folder of pictures, with captions beside them, and one of hints, known by its name.

    The name begins with one of ``FOLDERS``; or a word in it is a word for hints (``_hint_words``), or is "source"
    beside a "target", where most of the folder's names are those of pictures beside it. The pictures may lie in the
    folder itself. Further hints lie in folders of its name with ``_2``, ``_3`` and so on. ``names`` may name both
    folders. A folder named as one of hints whose pictures are not clear is a problem: taken as pictures, hints would
    be trained on.
    """
    if names.given and "hint" not in names.given:
        return None
    groups = _groups(tree)
    held = {path: by_name(path, files, HINT_SUFFIXES) for path, files in groups.items()}
    pictures = {path: found for path, files in groups.items() if (found := by_name(path, files))}
    if names.given:
        hints = [_named(tree, names.hint[0])]
        further = (hints[0].with_name(f"{hints[0].name}_{k}") for k in count(2))
        hints += takewhile(tree.folders.__contains__, further)
        held |= {path: by_name(path, tree.under(path, HINT_SUFFIXES), HINT_SUFFIXES) for path in hints}
        if "image" in names.given:
            folder = _named(tree, names.image[0])
            pictures = {folder: by_name(folder, tree.under(folder, SUFFIXES))}
    else:
        hints = [path for path in groups if path != tree.root and _first_word(path.name) in FOLDERS]
        hints = hints or _likely(tree.root, held, pictures)
    pictures = {path: found for path, found in pictures.items() if path not in hints}
    if not hints or not (pictures or names.given):
        return None
    whose, words = _whose(hints, held, pictures)
    if words:
        problems.append(Problem("unclear folders", str(tree.root), words))
        return []
    for path in sorted(pictures.keys() - {whose}):
        words = f"has nothing to do with {hints[0].name}: not read"
        problems.append(Problem("other folder", str(path), words, fatal=False))
    return paired(
        tree, whose, [(tree, path) for path in hints], lambda path: caption_beside(path, problems, tree.root), problems
    )


def _groups(tree: Tree) -> dict[Path, list[Path]]:
    """The pictures and hints in each folder of a set, at any depth, and under the set's own those in no folder."""
    groups: dict[Path, list[Path]] = {path: [] for path in tree.folders if path.parent == tree.root}
    depth = len(tree.root.parts) + 1
    for path in tree.under(tree.root, HINT_SUFFIXES):
        groups.setdefault(tree.root if len(path.parts) == depth else Path(*path.parts[:depth]), []).append(path)
    return groups


def _named(tree: Tree, name: str) -> Path:
    """The folder that a person named; ``Invalid`` where there is none."""
    folder = tree.root / name
    if folder != tree.root and folder not in tree.folders:
        raise Invalid(f"{tree.root} has no folder {name} to read: expected the name of one in it, or . for itself.")
    return folder


def _hint_words() -> set[str]:
    """Words in folders' names that say that hints lie in them, without a plural's s."""
    return {word.removesuffix("s") for words in (FOLDERS, *(kind.folders for kind in all_kinds())) for word in words}


def _likely(root: Path, held: Mapping[Path, ByName], pictures: Mapping[Path, ByName]) -> list[Path]:
    """Folders whose names have a word for hints in them, and most of whose pictures have namesakes elsewhere."""
    words = {path: {word.removesuffix("s") for word in _words(path.name)} for path in held if path != root}
    known = _hint_words() | ({"source"} if any("target" in said for said in words.values()) else set())
    likely = [path for path, said in words.items() if said & known and held[path]][:_COMPARED]
    others = [found for path, found in pictures.items() if path not in likely]
    return [p for p in likely if any(2 * len(held[p].keys() & found.keys()) >= len(held[p]) for found in others)]


def _whose(hints: Sequence[Path], held: Mapping[Path, ByName], pictures: Mapping[Path, ByName]) -> tuple[Path, str]:
    """(The folder whose pictures these folders of hints belong to, what is unclear about them or "")."""
    called = ", ".join(path.name for path in hints[:8])
    if empty := [path for path in hints if not held[path]]:
        return hints[0], f"{empty[0].name} is named as a folder of hints and has none: fill it, or take it out"
    if [path.name for path in hints[1:]] != [f"{hints[0].name}_{k}" for k in range(2, len(hints) + 1)]:
        return hints[0], (
            f"{called} may all be hints: name them control, control_2 and so on, in the order they are meant"
        )
    whose = [path for path, found in pictures.items() if found.keys() & held[hints[0]].keys()]
    if len(whose) != 1:
        several = f"{len(whose)} folders have" if whose else "no folder has"
        return hints[0], (
            f"{several} pictures of the names in {called}: expected one, beside it or around it. Name both, as "
            f"--column image=FOLDER --column hint={hints[0].name} (in a recipe: data.columns)"
        )
    return whose[0], ""


def plain(tree: Tree, problems: list[Problem], names: Names) -> list[Row] | None:
    """Pictures, at any depth; those in the folder that ``names`` may name, "." for all."""
    top = _named(tree, names.image[0]) if "image" in names.given else tree.root
    found = tree.under(top, SUFFIXES)
    if not found:
        return None
    within = (path.relative_to(tree.root).parent for path in found if not names.given)
    if hints := next((path for path in within if any(_first_word(part) in FOLDERS for part in path.parts)), None):
        words = (
            f"{hints} is named as a folder of hints: give the folder that it and its pictures lie in, or rename it; if "
            "all are pictures, --column image=. (in a recipe: data.columns)"
        )
        problems.append(Problem("unclear folders", str(tree.root), words))
        return []
    rows = []
    for path in found:
        caption = caption_beside(path, problems, tree.root)
        rows.append(Row(file_at(path), words_of(path) if caption is None else caption, named=caption is None))
    return rows


def namesakes(pictures: Iterable[Path]) -> str:
    """Why these files may be pictures and their hints, in words; "" where their names do not say so.

    Names are compared without case, suffix, zeros before numbers and words for hints at either end. Two folders match
    where at least half of the names in one are in the other, and these are no odd ones among many pictures: three, all
    two, or a tenth of all pictures. Files of one folder match where a word for hints at an end tells two of them apart,
    or at least half of the names come twice.
    """
    known = _hint_words()
    folders: dict[str, Counter[str]] = defaultdict(Counter)
    having: dict[str, list[str]] = defaultdict(list)
    whole: dict[tuple[str, tuple[str, ...]], str] = {}
    for path in sorted(map(str, pictures)):
        folder, file = os.path.split(path)
        words = tuple(
            word.lstrip("0") or "0" for word in re.split(r"[\s_.-]+", file.rpartition(".")[0].casefold()) if word
        )
        whole[folder, words] = file
        while len(words) > 1 and words[-1].removesuffix("s") in known:
            words = words[:-1]
        while len(words) > 1 and words[0].removesuffix("s") in known:
            words = words[1:]
        name = " ".join(words) or file
        if name not in folders[folder]:
            having[name].append(folder)
        folders[folder][name] += not file.lower().endswith(OTHER_PICTURES)  # beside a picture it is that picture's own
    for (folder, words), file in whole.items():
        for word, rest in ((words[-1:], words[:-1]), (words[:1], words[1:])):
            if rest and word[0].removesuffix("s") in known and (folder, rest) in whole:
                return f"{folder} has {file} beside {whole[folder, rest]}"
    total = sum(map(len, folders.values()))
    for folder, counts in folders.items():
        twice = [name for name, count in counts.items() if count > 1]
        if 2 * len(twice) >= len(counts) and (len(twice) > 2 or 10 * len(twice) >= total):
            return f'{folder} has several pictures of {len(twice)} names, such as "{twice[0]}"'
        shared = Counter(other for name in counts for other in having[name][:_COMPARED] if other != folder)
        for other, common in shared.most_common(1):
            enough = common > 2 or common == 2 == len(folders[other]) or 10 * common >= total
            if 2 * common >= len(counts) and enough:
                return f"{folder} and {other} have {common} pictures of the same names"
    return ""


def paired(
    tree: Tree,
    pictures: Path,
    hints: Sequence[tuple[Tree, Path]],
    prompt_of: Callable[[Path], str | None],
    problems: list[Problem],
) -> list[Row]:
    """Pictures and hints of the same names, whatever their suffixes, in two folders; or in more, of further hints.

    Folders of hints may lie within that of the pictures, whose other folders are left alone then.
    """
    files = tree.under(pictures, SUFFIXES)
    if any(hint.is_relative_to(pictures) for _, hint in hints):
        files = [path for path in files if path.parent == pictures]
    own = by_name(pictures, files, problems=problems)
    others = [by_name(hint, where.under(hint, HINT_SUFFIXES), HINT_SUFFIXES, problems) for where, hint in hints]
    rows = []
    for name, path in own.items():
        if lacking := [folder for (_, folder), held in zip(hints, others, strict=True) if name not in held]:
            problems.append(Problem("missing hint", str(path), f"has no hint of its name in {lacking[0]}"))
            continue
        prompt = prompt_of(path)
        if prompt is None:
            problems.append(Problem("no caption", str(path), "has no caption beside it; none is taken", fatal=False))
        rows.append(Row(file_at(path), prompt or "", tuple(file_at(held[name]) for held in others)))
    for held in others:
        for name in sorted(held.keys() - own.keys()):
            problems.append(Problem("extra hint", str(held[name]), f"has no picture of its name in {pictures}"))
    return rows


def by_name(
    folder: Path, files: Iterable[Path], suffixes: Sequence[str] = SUFFIXES, problems: list[Problem] | None = None
) -> ByName:
    """Those of a folder's files that have these suffixes; two of one name are a problem."""
    found: ByName = {}
    for path in files:
        if path.suffix.lower() in suffixes:
            name = path.relative_to(folder).with_suffix("")
            if name in found and problems is not None:
                problems.append(Problem("two of a name", str(path), f"has the name of {found[name]}: rename one"))
            found[name] = path
    return found


def _first_word(name: str) -> str:
    return re.split(r"[^a-z0-9]+", name.lower())[0]


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W_]+", name.casefold())


def caption_file(path: Path) -> Path | None:
    """The caption file of a picture's name, if there is one."""
    return next((beside for s in CAPTION_SUFFIXES if is_there(beside := path.with_suffix(s))), None)


def caption_beside(path: Path, problems: list[Problem], home: Path) -> str | None:
    """The text of the caption file of a picture's name, in the set's folder ``home``; None if there is none."""
    beside = caption_file(path)
    return None if beside is None else " ".join(text_of(beside, problems, home).split())


_MACHINES = (
    "img", "image", "photo", "picture", "pic", "dsc", "dscn", "dscf", "dji", "gopr", "mvi", "mg", "pxl", "sam", "vid",
    "frame", "scan", "screenshot", "whatsapp", "signal", "telegram", "untitled", "unnamed", "file", "copy", "of", "at",
    "am", "pm",
)  # fmt: skip
"""Words of names that cameras and programs give."""
_SERIAL = re.compile(r"[0-9a-f]{8,}|[a-z]{0,2}\d{4,}|\d+")
"""Numbers and digests: they count pictures, and do not describe them."""


def words_of(path: Path) -> str:
    """The words in a file's name: ``001_red-apple_3d (2).png`` -> ``red apple 3d``.

    Numbers at either end are counters and are dropped. A name that a machine gave (``IMG_1234``) has none: "".
    """
    words = re.findall(r"[^\W_]+(?:['’][^\W_]+)*", path.stem.lower())
    while words and words[-1].isdigit():
        words.pop()
    while words and words[0].isdigit():
        words.pop(0)
    if words:
        words[-1] = re.sub(r"(?<=[^\W\d_]{3})\d+$", "", words[-1])  # apple01, but not mp3
    meant = any(word not in _MACHINES and not _SERIAL.fullmatch(word) for word in words)
    return " ".join(words) if meant else ""
