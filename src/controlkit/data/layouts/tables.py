"""Sets of the datasets library, and parquet files."""

import re
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from controlkit.data.layouts.cells import Table
from controlkit.data.layouts.rows import (
    MOST_TEXT,
    Held,
    Names,
    Problem,
    Row,
    inside,
    is_there,
    is_within,
    read_regular,
    too_many,
    wording,
)
from controlkit.data.layouts.tree import Tree
from controlkit.errors import Invalid, Unsupported, one_line
from controlkit.files import parse_json


def huggingface(tree: Tree, problems: list[Problem], names: Names) -> list[Row] | None:
    """``save_to_disk``'s folder, or parquet files at any depth; pictures as the Image feature stores them."""
    folder = tree.root
    saved = (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()
    files = _saved(folder) if saved else _for_training(tree.under(folder, [".parquet"]), folder)
    if not files:
        return None
    if not find_spec("pyarrow"):
        raise Unsupported(
            f"{folder} is a data set of the datasets library. Install it with: pip install 'controlkit[datasets]'"
        )
    table = Table(files, str(folder))
    columns = table.names
    names.check(columns, str(folder))
    picture, caption = (next((n for n in likely if n in columns), None) for likely in (names.image, names.caption))
    if picture is None:
        raise Invalid(f"{folder} has the columns {one_line(', '.join(columns))}: none of {', '.join(names.image)}.")
    shown = (picture, *names.hints(columns))
    for name in (*shown, *filter(None, [caption])):
        if (kind := table.check(name)) not in ("paths", "pictures" if name in shown else "texts"):
            expected = "pictures, or paths" if name in shown else "texts"
            raise Invalid(f"{folder} has a {one_line(kind)} in its column {one_line(name)}: expected {expected}.")

    def held(place: int, column: str, content: str | bool | None) -> Held | None:
        if content is None:
            problems.append(Problem("missing file", f"{folder}, row {place}", f"has nothing in its column {column}"))
        elif content is True:
            return Held(f"{folder}, row {place}, {column}", partial(table.read, place, column, shown))
        else:
            beside = folder if saved or is_there(folder / str(content)) else files[0].parent
            return inside(beside, content, problems, links=False)
        return None

    rows = []
    captions = table.texts(caption) if caption else iter([""] * len(table))
    for place, (said, *contents) in enumerate(zip(captions, *map(table.pictures, shown), strict=True)):
        if too_many(problems, folder):
            break
        own, *others = (held(place, name, content) for name, content in zip(shown, contents, strict=True))
        if own and all(others):
            rows.append(Row(own, wording(said, place), tuple(filter(None, others))))
    return rows


def _saved(folder: Path) -> list[Path]:
    """The files that the datasets library saved in a folder; of a set's splits, those for training.

    Only files of the folder itself: what else it may say of them is not followed. ``Invalid`` where they are not there.
    """
    try:
        if splits := _facts(folder / "dataset_dict.json").get("splits"):
            folder = _named(folder, "train" if "train" in splits else splits[0], of_folder=True)
        files = [_named(folder, one["filename"]) for one in _facts(folder / "state.json")["_data_files"]]
    except (KeyError, TypeError, OSError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else one_line(error)
        raise Invalid(f"{folder} cannot be read as a data set ({reason}): fetch or save it anew.") from error
    if not files:
        raise Invalid(f"{folder} cannot be read as a data set (it names no files): fetch or save it anew.")
    if len({*files}) < len(files):  # which would make of a small file any number of rows
        raise Invalid(f"{folder} cannot be read as a data set (it names a file twice): fetch or save it anew.")
    return files


def _facts(path: Path) -> dict[str, Any]:
    """The values in a file that the datasets library writes beside its data; none if it is not there."""
    facts = parse_json(read_regular(path, 16 * MOST_TEXT), str(path)) if path.is_file() else {}
    if not isinstance(facts, dict):
        raise TypeError(f"{path.name} holds a {type(facts).__name__}")
    return facts


def _named(folder: Path, name: Any, of_folder: bool = False) -> Path:
    """The file or folder of this name in a folder; ``TypeError`` or ``OSError`` where it is not one, or not in it."""
    path = folder / name
    if Path(name).name != name or not is_there(path, of_folder) or not is_within(path, folder):
        raise OSError(f"it names {one_line(name)}, which is not in it")
    return path


_ASIDE = {"validation", "valid", "val", "dev", "test", "eval"}
"""Words that files of a split have in their names that is not for training."""


def _for_training(tables: Sequence[Path], folder: Path) -> list[Path]:
    """All tables of a folder but those of other splits, where there are such."""
    split = [path for path in tables if not _ASIDE & set(re.findall("[a-z]+", str(path.relative_to(folder)).lower()))]
    return split or list(tables)
