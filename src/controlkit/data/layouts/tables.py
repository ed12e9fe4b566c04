"""Sets of the datasets library, and parquet files."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from controlkit.data.layouts.rows import Held, Names, Problem, Row, file_at, inside, is_there, wording
from controlkit.data.layouts.tree import Tree
from controlkit.errors import Invalid, Unsupported, one_line
from controlkit.hub import cache_dir


def huggingface(tree: Tree, problems: list[Problem], names: Names) -> list[Row] | None:
    """``save_to_disk``'s folder, or parquet files at any depth; pictures as the Image feature stores them."""
    folder = tree.root
    saved = (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()
    tables = _for_training(tree.under(folder, [".parquet"]), folder)
    if not saved and not tables:
        return None
    table = _table(folder, [] if saved else tables)
    columns = table.column_names
    names.check(columns, str(folder))
    picture, caption = (next((n for n in likely if n in columns), None) for likely in (names.image, names.caption))
    hints = names.hints(columns)
    if picture is None:
        raise Invalid(f"{folder} has the columns {', '.join(columns)}: none of {', '.join(names.image)}.")
    table = _as_bytes(table, (picture, *hints), folder)
    contents = {name: _contents(table, name) for name in (picture, *hints)}

    def held(place: int, column: str) -> Held | None:
        empty, linked = contents[column]
        if place in empty:
            problems.append(Problem("missing file", f"{folder}, row {place}", f"has nothing in its column {column}"))
            return None
        if table.features[column].dtype not in _PATHS:
            if link := linked.get(place):  # people's own tables may name files anywhere, a hub's may not
                fetched = folder.resolve().is_relative_to((cache_dir() / "datasets").resolve())
                if not fetched and is_there(folder / link):
                    return file_at(folder / link)
                return inside(folder, link, problems)
            return Held(f"{folder}, row {place}, {column}", lambda: table[place][column]["bytes"])
        name = table[place][column]
        beside = folder if saved or is_there(folder / name) else Path(tables[0]).parent
        return inside(beside, name, problems)

    rows = []
    for place, captions in enumerate(table[caption] if caption else [""] * len(table)):
        own, *others = (held(place, name) for name in (picture, *hints))
        if own and all(others):
            rows.append(Row(own, wording(captions, place), tuple(filter(None, others))))
    return rows


def _table(folder: Path, tables: list[str]) -> Any:
    """These parquet files as a table of the datasets library; with none the one that it saved in the folder."""
    try:
        import datasets
    except ImportError as error:
        raise Unsupported(
            f"{folder} is a data set of the datasets library. Install it with: pip install 'controlkit[datasets]'"
        ) from error
    try:
        if tables:
            table = datasets.Dataset.from_parquet(tables, cache_dir=str(cache_dir() / "datasets"))
        else:
            table = datasets.load_from_disk(str(folder))
    except Exception as error:  # what a damaged file is depends on the library's own readers
        raise Invalid(f"{folder} cannot be read as a data set ({one_line(error)}): fetch or write it anew.") from error
    if isinstance(table, datasets.DatasetDict):
        table = table["train"] if "train" in table else next(iter(table.values()))
    return table


def _as_bytes(table: Any, columns: Sequence[str], folder: Path) -> Any:
    """The table with its pictures as bytes or paths, not decoded; ``Invalid`` for a column of anything else."""
    import datasets

    for name in columns:
        feature = table.features[name]
        bare = isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()  # written by another library
        if isinstance(feature, datasets.Image) or bare or feature == datasets.Value("binary"):
            table = table.cast_column(name, datasets.Image(decode=False))
        elif getattr(feature, "dtype", "") not in _PATHS:
            raise Invalid(f"{folder} has a {one_line(feature)} in its column {name}: expected pictures, or paths.")
    return table


_PATHS = ("string", "large_string")
"""Types of columns that name files."""
_ASIDE = {"validation", "valid", "val", "dev", "test", "eval"}
"""Words that files of a split have in their names that is not for training."""


def _for_training(tables: Sequence[Path], folder: Path) -> list[str]:
    """All tables of a folder but those of other splits, where there are such."""
    split = [path for path in tables if not _ASIDE & set(re.findall("[a-z]+", str(path.relative_to(folder)).lower()))]
    return [str(path) for path in split or tables]


def _contents(table: Any, column: str) -> tuple[set[int], dict[int, str]]:
    """Of a column: the rows that have nothing in it, and the paths of pictures that have a path instead of bytes."""
    values = table.select_columns([column]).with_format("arrow")[:].column(column)
    empty = {place for place, null in enumerate(values.is_null().to_pylist()) if null} if values.null_count else set()
    if not {"bytes", "path"} <= {field.name for field in getattr(values.type, "fields", ())}:
        return empty, {}
    bare = [null for chunk in values.chunks for null in chunk.field("bytes").is_null().to_pylist()]
    paths = [path for chunk in values.chunks for path in chunk.field("path").to_pylist()]
    return empty, {place: path for place, path in enumerate(paths) if bare[place] and path is not None}
