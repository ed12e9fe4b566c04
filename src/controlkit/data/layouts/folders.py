"""Folders of pictures, by themselves or beside folders of hints; captions beside pictures, or in their names."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from controlkit.annotators import all_kinds
from controlkit.data.layouts.rows import HINT_SUFFIXES, SUFFIXES, Names, Problem, Row, file_at, text_of

CAPTION_SUFFIXES = (".txt", ".caption", ".text")
FOLDERS = ("conditioning", "control", "controls", "hint", "hints", "cond")
"""The first word of a name that says a folder holds hints."""


def two_folders(folder: Path, problems: list[Problem], names: Names) -> list[Row] | None:
    """A folder of pictures, with captions beside them, and one of hints, known by its name.

    The name begins with one of ``FOLDERS``; or with a word of a kind of hint (``HintKind.folders``), where most of the
    folder's names are those of pictures beside it. The pictures may lie in the folder itself. Further hints lie in
    folders of its name with ``_2``, ``_3`` and so on. A folder named as one of hints whose pictures are not clear is a
    problem: taken as pictures, hints would be trained on.
    """
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    held = {path: _names_in(path, HINT_SUFFIXES) for path in inside}
    hints = [path for path in inside if _first_word(path.name) in FOLDERS]
    pictures = {path: found for path in inside if path not in hints and (found := _names_in(path, SUFFIXES))}
    if own := {name for name in _names_in(folder, SUFFIXES) if len(name.parts) == 1}:
        pictures[folder] = own
    if not hints:
        words = {word for kind in all_kinds() for word in kind.folders}
        likely = [path for path in inside if held[path] and _first_word(path.name) in words]
        rest = [path for path in pictures if path not in likely]
        if len(rest) != 1 or not all(2 * len(held[path] & pictures[rest[0]]) >= len(held[path]) for path in likely):
            return None
        hints, pictures = likely, {rest[0]: pictures[rest[0]]}
    if not hints or not pictures:
        return None

    def unclear(words: str) -> list[Row]:
        problems.append(Problem("unclear folders", str(folder), words))
        return []

    called = ", ".join(path.name for path in hints)
    if empty := [path for path in hints if not held[path]]:
        return unclear(f"{empty[0].name} is named as a folder of hints and has none: fill it, or take it out")
    if [path.name for path in hints[1:]] != [f"{hints[0].name}_{k}" for k in range(2, len(hints) + 1)]:
        return unclear(
            f"{called} may all be hints: name them control, control_2 and so on, in the order they are meant"
        )
    whose = [path for path, found in pictures.items() if found & held[hints[0]]]
    if len(whose) != 1:
        several = f"{len(whose)} folders have" if whose else "no folder has"
        return unclear(f"{several} pictures of the names in {called}: expected one, beside it or around it")
    for path in pictures.keys() - set(whose):
        problems.append(Problem("other folder", str(path), f"has nothing to do with {called}: not read", fatal=False))
    return paired(whose[0], hints, lambda path: caption_beside(path, problems), problems)


def plain(folder: Path, problems: list[Problem], names: Names) -> list[Row] | None:
    """Pictures, at any depth."""
    found = pictures_in(folder)
    if not found:
        return None
    within = (path.relative_to(folder).parent for path in found)
    if hints := next((path for path in within if any(_first_word(part) in FOLDERS for part in path.parts)), None):
        words = f"{hints} is named as a folder of hints: give the folder that it and its pictures lie in, or rename it"
        problems.append(Problem("unclear folders", str(folder), words))
        return []
    rows = []
    for path in found:
        caption = caption_beside(path, problems)
        rows.append(Row(file_at(path), words_of(path) if caption is None else caption, named=caption is None))
    return rows


def paired(
    pictures: Path, hints: Sequence[Path], prompt_of: Callable[[Path], str | None], problems: list[Problem]
) -> list[Row]:
    """Pictures and hints of the same names, whatever their suffixes, in two folders; or in more, of further hints.

    Folders of hints may lie within that of the pictures, whose other folders are left alone then.
    """
    own = _by_name(pictures, problems, deep=not any(hint.is_relative_to(pictures) for hint in hints))
    others = [_by_name(folder, problems, HINT_SUFFIXES) for folder in hints]
    rows = []
    for name, path in own.items():
        if lacking := [folder for folder, held in zip(hints, others, strict=True) if name not in held]:
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


def _by_name(
    folder: Path, problems: list[Problem], suffixes: Sequence[str] = SUFFIXES, deep: bool = True
) -> dict[Path, Path]:
    """A folder's pictures by what their names are without suffix; those in its folders, too, where ``deep``."""
    if not folder.is_dir():
        problems.append(Problem("missing folder", str(folder), "is named by the data set and is not there"))
    found: dict[Path, Path] = {}
    for path in pictures_in(folder, suffixes):
        name = path.relative_to(folder).with_suffix("")
        if not deep and len(name.parts) > 1:
            continue
        if name in found:
            problems.append(Problem("two of a name", str(path), f"has the name of {found[name]}: rename one"))
        found[name] = path
    return found


def _first_word(name: str) -> str:
    return re.split(r"[^a-z0-9]+", name.lower())[0]


def _names_in(folder: Path, suffixes: Sequence[str]) -> set[Path]:
    """The names of a folder's pictures, without suffix."""
    return {path.relative_to(folder).with_suffix("") for path in pictures_in(folder, suffixes)}


def pictures_in(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """A folder's pictures at any depth, by name."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes and p.is_file())


def caption_file(path: Path) -> Path | None:
    """The caption file of a picture's name, if there is one."""
    return next((beside for s in CAPTION_SUFFIXES if (beside := path.with_suffix(s)).is_file()), None)


def caption_beside(path: Path, problems: list[Problem]) -> str | None:
    """The text of the caption file of a picture's name; None if there is none."""
    beside = caption_file(path)
    return None if beside is None else " ".join(text_of(beside, problems).split())


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
