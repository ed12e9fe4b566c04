"""Data sets as people have them: one reader a layout, chosen by what lies in the folder.

A reader lists a set without opening its pictures: a ``Row`` for each pair, and a ``Problem`` for whatever the listing
itself has wrong. ``LAYOUTS`` is the order in which they are tried; docs/data.md says what each looks like.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from controlkit.data.layouts.archives import webdataset
from controlkit.data.layouts.folders import CAPTION_SUFFIXES, OTHER_PICTURES, namesakes, plain, two_folders
from controlkit.data.layouts.listed import metadata, prompt_json, simpletuner
from controlkit.data.layouts.rows import (
    HINT_SUFFIXES,
    MOST_TEXT,
    SUFFIXES,
    Listing,
    Names,
    Problem,
    Row,
    read_regular,
)
from controlkit.data.layouts.tables import huggingface
from controlkit.data.layouts.tree import NO_PICTURE, Tree, tree_of
from controlkit.errors import Invalid, NotFound, Unsupported, one_line
from controlkit.files import inside, parse_json
from controlkit.hub import cache_dir, names_a_repository

BUILT = "built.json"
"""The file that ``build`` writes into its folder; it says whether the set is whole."""
DRAWN = "drawn.json"
"""The file that ``make_fill50k`` and ``make_scenes`` write into theirs."""
JOURNAL = "captions.jsonl"
"""In a folder that ``build`` writes: the captions that the captioner gave, by row."""
_OURS = {BUILT, DRAWN, JOURNAL}
_FOLDERS = ("paired", "pictures")
"""Layouts without a listing."""
LAYOUTS: dict[str, Callable[[Tree, list[Problem], Names], list[Row] | None]] = {
    "huggingface": huggingface,
    "simpletuner": simpletuner,
    "prompt.json": prompt_json,
    "metadata": metadata,
    "webdataset": webdataset,
    "paired": two_folders,
    "pictures": plain,
}


def folder_of(source: str) -> Path:
    """The folder of a data set; one of the hub, ``owner/name``, is fetched into the cache, whole, once.

    ``NotFound`` where it cannot be fetched.
    """
    path = Path(source)
    if path.exists() or not names_a_repository(source):
        return path
    target = cache_dir() / "datasets" / source.replace("/", "--")
    if (whole := target.with_name(f"{target.name}.whole")).is_file():
        return target
    from huggingface_hub import file_exists, snapshot_download

    try:
        # A program that makes the set is not run. The hub has made one of parquet files of it, on a branch of its own.
        program = file_exists(source, f"{source.partition('/')[2]}.py", repo_type="dataset")
        branch = "refs/convert/parquet" if program else None
        snapshot_download(source, repo_type="dataset", revision=branch, local_dir=target)
    except Exception as error:  # what a lost connection surfaces as depends on the client's HTTP library
        raise NotFound(
            f"There is no folder {source}, and no data set of that name could be fetched from the hub "
            f"({one_line(error)})."
        ) from error
    whole.touch()
    return target


def read_listing(folder: Path, columns: Mapping[str, str] | None = None) -> Listing:
    """The rows of a data set, in the first layout that its folder shows.

    ``columns``: the names of its ``image``, ``hint`` or ``caption``, where they are none of the usual ones.
    Of folders of pictures and hints, the names of these folders; ``image: .`` says that all that lies there are
    pictures. ``NotFound`` for no folder, ``Unsupported`` if it shows no layout, ``Invalid`` if it is not whole or has
    other columns.
    """
    names = Names.of(columns or {})
    if not folder.is_dir():
        raise NotFound(f"There is no folder {folder}: expected a data set ({', '.join(LAYOUTS)}).")
    if {"size", "seed"} <= own_facts(folder / DRAWN).keys() and not (folder / "prompt.json").is_file():
        raise Invalid(f"{folder} holds no prompt.json yet: its drawing was interrupted. Draw it to its end first.")
    built = own_facts(folder / BUILT)
    if {"layout", "hint"} <= built.keys() and not built.get("whole"):
        raise Invalid(f"{folder} is not whole: its building was interrupted. Run `controlkit data build` again.")
    tree = tree_of(folder)
    for name, reader in LAYOUTS.items():
        problems: list[Problem] = []
        rows = reader(tree, problems, names)
        if rows is None:
            continue
        _check_names(tree, name, names)
        if "image" not in names.given:
            problems += _taken_for_pictures(tree, name, rows)
        if name in _FOLDERS:
            _leave_others_out(tree, SUFFIXES if name == "pictures" else HINT_SUFFIXES)
        rows = _without_half_letters(rows, problems)
        return Listing(name, rows, [*problems, *tree.notes()])
    left_out = "".join(f" {note}." for note in tree.notes())
    raise Unsupported(
        f"{folder} shows no layout known here: expected metadata.jsonl, prompt.json, multidatabackend.json, parquet or "
        f"tar files, a folder of pictures beside one of hints, or pictures.{left_out}"
    )


def _check_names(tree: Tree, layout: str, names: Names) -> None:
    """``Invalid`` for names of parts that a layout has not; folders have no captions apart from their pictures."""
    if layout in _FOLDERS and "caption" in names.given:
        raise Invalid(f"{tree.root} is read as {layout}: captions lie beside its pictures, in NAME.txt.")
    if layout not in ("huggingface", "metadata", *_FOLDERS) and names.given and names.image != (".",):
        raise Invalid(f"{tree.root} is read as {layout}, which has no columns: give none.")


def _taken_for_pictures(tree: Tree, layout: str, rows: Sequence[Row]) -> Iterator[Problem]:
    """The question whether pictures without hints are pictures and their hints."""
    if any(row.hints for row in rows):
        return
    names = {Path(os.path.normpath(row.picture.name.replace(".tar:", ".tar/"))) for row in rows}
    if words := namesakes(names.union(tree.under(tree.root, OTHER_PICTURES) if layout != "metadata" else ())):
        answer = "name both folders, as --column image=A --column hint=B; if all are pictures, --column image=."
        if layout == "metadata":
            answer = "name the column of the hints (--column hint=NAME); if all are pictures, that of the pictures"
        words = f"{words}: are these pictures and their hints? If so, {answer} (in a recipe: data.columns)"
        yield Problem("unclear folders", str(tree.root), words)


def _without_half_letters(rows: Sequence[Row], problems: list[Problem]) -> list[Row]:
    """The rows, without surrogates that stand alone in captions: no text tower reads them, and no file holds them."""
    whole = []
    for row in rows:
        prompt = row.prompt.encode("utf-8", "ignore").decode()
        if prompt != row.prompt:
            words = "has half a letter in its caption (a surrogate): left out of it"
            problems.append(Problem("half a letter", row.picture.name, words, fatal=False))
            row = replace(row, prompt=prompt)
        whole.append(row)
    return whole


def _leave_others_out(tree: Tree, suffixes: Sequence[str]) -> None:
    """Note the files of a folder that are neither pictures nor captions of one."""
    pictures = {path.with_suffix("") for path in tree.under(tree.root, suffixes)}
    for path in tree.files:
        ending = path.suffix.lower()
        caption = ending in CAPTION_SUFFIXES and path.with_suffix("") in pictures
        if not caption and ending not in suffixes and path.name not in _OURS:
            tree.leave_out(NO_PICTURE, path)


def sound_listing(folder: Path, columns: Mapping[str, str] | None = None) -> Listing:
    """The rows of a data set, as ``read_listing`` gives them; ``Invalid`` where the listing has a fatal problem."""
    listing = read_listing(folder, columns)
    if fatal := [problem for problem in listing.problems if problem.fatal]:
        more = f" and {len(fatal) - 1} more such things" if len(fatal) > 1 else ""
        raise Invalid(f"{fatal[0]}{more}. `controlkit data doctor {folder}` lists them all.")
    return listing


def own_facts(path: Path) -> dict[str, Any]:
    """The values in a JSON file of ours; none in other tools' files of that name, and in links out of the folder."""
    try:
        facts = parse_json(read_regular(inside(path.parent, path), MOST_TEXT), path.name) if path.is_file() else None
    except (Invalid, OSError):
        return {}
    return facts if isinstance(facts, dict) else {}
