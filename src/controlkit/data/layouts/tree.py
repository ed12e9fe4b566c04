"""The files of a data set's folder, without those that are no data: one walk, which every layout reads."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from controlkit.data.layouts.rows import Problem, is_there
from controlkit.files import OUTPUT, is_leftover, is_output

HIDDEN = "hidden, or left by an operating system"
WRITTEN = "a folder that controlkit wrote its results into"
CIRCLE = "a link to a folder that is read already"
NO_FILE = "no file that can be read: a link that leads nowhere, or a device"
NO_PICTURE = "neither a picture nor the caption of one"


@dataclass
class Tree:
    """Regular files and folders below a folder, sorted; links are followed to them."""

    root: Path
    files: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    left_out: dict[str, list[Path]] = field(default_factory=dict)
    """What is not read, by the reason."""

    def leave_out(self, reason: str, path: Path) -> None:
        """Note that something is not read."""
        self.left_out.setdefault(reason, []).append(path)

    def under(self, folder: Path, suffixes: Sequence[str]) -> list[Path]:
        """The files with these suffixes below a folder, at any depth."""
        below = self.files if folder == self.root else (path for path in self.files if folder in path.parents)
        return [path for path in below if path.suffix.lower() in suffixes]

    def notes(self) -> Iterator[Problem]:
        """Notes on what is left out: of each reason how many, the first, and of files which endings."""
        for reason, paths in self.left_out.items():
            more = f"; and {len(paths) - 1} more like it" if len(paths) > 1 else ""
            if reason == NO_PICTURE:
                endings = Counter(path.suffix.lower() or "no ending" for path in paths)
                counts = [f"{count} of {ending}" for ending, count in endings.most_common(8)]
                more = f" ({', '.join(counts)}{', ...' if len(endings) > 8 else ''})"
            yield Problem("left out", str(min(paths)), f"is {reason}{more}: not read", fatal=False)


def tree_of(root: Path) -> Tree:
    """Walk a folder. Left out, with a note: hidden files and leftovers, folders marked as results, devices.

    Links are followed to files and to folders, wherever they lead, but a folder is read through links once, and a link
    to a folder around it is not followed, so that a circle of links ends.
    """
    tree, linked = Tree(root), set()
    waiting: list[tuple[Path, tuple[tuple[int, int], ...], bool]] = [(root, (_identity(root),), False)]
    while waiting:
        folder, around, by_link = waiting.pop()
        for entry in _entries(folder, tree):
            path = folder / entry.name
            if is_leftover(entry.name):
                if entry.name != OUTPUT:
                    tree.leave_out(HIDDEN, path)
            elif is_there(path):
                tree.files.append(path)
            elif not is_there(path, folder=True):
                tree.leave_out(NO_FILE, path)
            elif is_output(path):
                tree.leave_out(WRITTEN, path)
            else:
                identity, link = _identity(path), by_link or entry.is_symlink()
                if identity in around or (link and identity in linked):
                    tree.leave_out(CIRCLE, path)
                    continue
                if link:
                    linked.add(identity)
                tree.folders.append(path)
                waiting.append((path, (*around, identity), link))
    tree.files.sort()
    tree.folders.sort()
    return tree


def _entries(folder: Path, tree: Tree) -> Iterable[os.DirEntry[str]]:
    try:
        return list(os.scandir(folder))
    except OSError:
        tree.leave_out(NO_FILE, folder)
        return []


def _identity(folder: Path) -> tuple[int, int]:
    facts = folder.stat()
    return facts.st_dev, facts.st_ino
