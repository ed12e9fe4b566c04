"""Data sets as people have them: one reader a layout, chosen by what lies in the folder.

A reader lists a set without opening its pictures: a ``Row`` for each pair, and a ``Problem`` for whatever the listing
itself has wrong. ``LAYOUTS`` is the order in which they are tried; docs/data.md says what each looks like.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from controlkit.data.layouts.archives import webdataset
from controlkit.data.layouts.folders import plain, two_folders
from controlkit.data.layouts.listed import metadata, prompt_json, simpletuner
from controlkit.data.layouts.rows import Listing, Names, Problem, Row
from controlkit.data.layouts.tables import huggingface
from controlkit.errors import Invalid, NotFound, Unsupported, one_line
from controlkit.hub import cache_dir, names_a_repository

BUILT = "built.json"
"""The file that ``build`` writes into its folder; it says whether the set is whole."""
LAYOUTS: dict[str, Callable[[Path, list[Problem], Names], list[Row] | None]] = {
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
    ``NotFound`` for no folder, ``Unsupported`` if it shows no layout, ``Invalid`` if it is not whole or has other
    columns.
    """
    names = Names.of(columns or {})
    if not folder.is_dir():
        raise NotFound(f"There is no folder {folder}: expected a data set ({', '.join(LAYOUTS)}).")
    if (folder / "drawn.json").is_file() and not (folder / "prompt.json").is_file():
        raise Invalid(f"{folder} holds no prompt.json yet: its drawing was interrupted. Draw it to its end first.")
    if _half_built(folder):
        raise Invalid(f"{folder} is not whole: its building was interrupted. Run `controlkit data build` again.")
    for name, reader in LAYOUTS.items():
        problems: list[Problem] = []
        rows = reader(folder, problems, names)
        if rows is not None:
            if names.given and name not in ("huggingface", "metadata"):
                raise Invalid(f"{folder} is read as {name}, which has no columns: give none.")
            return Listing(name, rows, problems)
    raise Unsupported(
        f"{folder} shows no layout known here: expected metadata.jsonl, prompt.json, multidatabackend.json, parquet or "
        "tar files, a folder of pictures beside one of hints, or pictures."
    )


def sound_listing(folder: Path, columns: Mapping[str, str] | None = None) -> Listing:
    """The rows of a data set, as ``read_listing`` gives them; ``Invalid`` where the listing has a fatal problem."""
    listing = read_listing(folder, columns)
    if fatal := [problem for problem in listing.problems if problem.fatal]:
        more = f" and {len(fatal) - 1} more such things" if len(fatal) > 1 else ""
        raise Invalid(f"{fatal[0]}{more}. `controlkit data doctor {folder}` lists them all.")
    return listing


def _half_built(folder: Path) -> bool:
    """Whether ``build`` began this folder and did not end; other tools' files of the same name are ignored."""
    marker = folder / BUILT
    try:
        facts = json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else None
    except ValueError:
        return False
    return isinstance(facts, dict) and {"layout", "hint"} <= facts.keys() and not facts.get("whole")
