"""Data sets as people have them: one reader a layout, told apart by what lies in the folder.

A reader lists a set without opening its pictures: a ``Row`` for each pair, and a ``Problem`` for whatever the listing
itself has wrong. ``LAYOUTS`` is the order in which they are tried:

- ``huggingface``: what the datasets library saved, or parquet files, with columns for picture, hint and caption;
- ``simpletuner``: ``multidatabackend.json``, a backend of pictures that names a backend of hints;
- ``prompt.json``: the original repository's, JSON lines with ``source`` (hint), ``target`` (picture), ``prompt``;
- ``metadata``: the datasets library's folder of pictures, ``metadata.jsonl`` or ``.csv`` (DiffSynth's columns too);
- ``webdataset``: tar shards, whose members of one name belong together;
- ``paired``: a folder of pictures beside a folder of hints of the same names (kohya, ai-toolkit), captions beside the
  pictures;
- ``pictures``: a plain folder; captions from ``NAME.txt`` or the file's name, hints by an annotator.
"""

import csv
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from controlkit.errors import UserError, nearest, one_line
from controlkit.hub import cache_dir, names_a_repository
from controlkit.seeds import numpy_rng

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""Of files that are taken for pictures."""
HINT_SUFFIXES = (*SUFFIXES, ".npy")
"""Of files that are taken for hints."""
BUILT = "built.json"
"""What marks a folder that ``build`` writes, and says whether it is whole."""
CAPTION_SUFFIXES = (".txt", ".caption", ".text")
PICTURE_NAMES = ("image", "file_name", "image_file_name", "jpg", "picture")
HINT_NAMES = (
    "conditioning_image", "conditioning_image_file_name", "controlnet_image", "control_image", "conditioning",
    "control", "hint",
)  # fmt: skip
CAPTION_NAMES = ("text", "prompt", "caption")


@dataclass(frozen=True)
class Names:
    """What picture, hint and caption are called in columns and keys; the first found counts.

    A hint may also be called ``control_`` and something (ControlNet++), unless the name is ``given``. Further hints of
    a row have that name with ``_2``, ``_3`` after it.
    """

    image: Sequence[str] = PICTURE_NAMES
    hint: Sequence[str] = HINT_NAMES
    caption: Sequence[str] = CAPTION_NAMES
    given: frozenset[str] = frozenset()
    """Which of the three are not usual names but a set's own."""

    @classmethod
    def of(cls, columns: Mapping[str, str]) -> "Names":
        """With a set's own names for ``image``, ``hint`` or ``caption``."""
        if unknown := [kind for kind in columns if kind not in COLUMNS]:
            raise UserError(f'A row has no "{unknown[0]}" to be named: {nearest(unknown[0], COLUMNS)}')
        return cls(**{kind: (name,) for kind, name in columns.items()}, given=frozenset(columns))

    def hints(self, names: Sequence[str]) -> list[str]:
        """What of these is called a hint: the likeliest, and what has its name with ``_2`` and so on after it."""
        likely = [name for name in self.hint if name in names]
        likely += [name for name in names if name.startswith("control_") and "hint" not in self.given]
        found = likely[:1]
        while likely and (further := f"{likely[0]}_{len(found) + 1}") in names:
            found.append(further)
        return found

    def check(self, names: Sequence[str], where: str) -> None:
        """Refuse names that were given and are not there."""
        for kind in sorted(self.given):
            if getattr(self, kind)[0] not in names:
                raise UserError(f"{where} has no {kind} column {getattr(self, kind)[0]!r}: it has {', '.join(names)}.")


COLUMNS = ("image", "hint", "caption")
"""What of a row may have a name of the set's own."""
FOLDERS = ("conditioning", "control", "controls", "hint", "hints", "cond")
"""The first word of a name that says a folder holds hints."""
KINDS = (
    "canny", "depth", "edge", "edges", "hed", "lineart", "lines", "mask", "masks", "mlsd", "normal", "normals",
    "openpose", "pose", "scribble", "seg", "segmentation", "sketch", "softedge", "tile",
)  # fmt: skip
"""First words that say so too, where most of a folder's names are those of pictures beside it."""


@dataclass(frozen=True)
class Held:
    """Bytes that lie somewhere: in a file, a tar, a table."""

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Row:
    """A pair as its data set lists it, with nothing opened."""

    picture: Held
    prompt: str
    hint: Held | None = None
    more: tuple[Held, ...] = ()
    """Further hints, each of a kind of its own."""
    named: bool = False
    """The prompt is what the picture's file is called; nobody wrote a caption."""

    @property
    def hints(self) -> tuple[Held, ...]:
        """All of its hints, in order."""
        return (self.hint, *self.more) if self.hint else ()


@dataclass(frozen=True)
class Problem:
    """Something wrong with a data set: what kind, where, and what to do. Where ``fatal``, nothing trains on it."""

    kind: str
    where: str
    words: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.where}: {self.words}"


@dataclass(frozen=True)
class Listing:
    """A data set's rows, by what layout they were read, and what is wrong with the listing."""

    layout: str
    rows: list[Row]
    problems: list[Problem] = field(default_factory=list)


def rows_digest(rows: Sequence[Row]) -> str:
    """Of what rows are called and say, in their order."""
    text = json.dumps([[Path(row.picture.name).name, row.prompt] for row in rows])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def folder_of(source: str) -> Path:
    """The folder of a data set, which may also be a hub's, ``owner/name``: fetched into the cache, whole, once."""
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
        raise UserError(
            f"There is no folder {source}, and no data set of that name could be fetched from the hub "
            f"({one_line(error)})."
        ) from error
    whole.touch()
    return target


def read_listing(folder: Path, columns: Mapping[str, str] | None = None) -> Listing:
    """The rows of a data set, in the first layout that its folder shows; ``UserError`` if it shows none.

    ``columns``: what its ``image``, ``hint`` or ``caption`` is called, where that is none of the usual names.
    """
    names = Names.of(columns or {})
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: expected a data set ({', '.join(LAYOUTS)}).")
    if (folder / "drawn.json").is_file() and not (folder / "prompt.json").is_file():
        raise UserError(f"{folder} holds no prompt.json yet: its drawing was interrupted. Draw it to its end first.")
    if _half_built(folder):
        raise UserError(f"{folder} is not whole: its building was interrupted. Run `controlkit data build` again.")
    for name, reader in LAYOUTS.items():
        problems: list[Problem] = []
        rows = reader(folder, problems, names)
        if rows is not None:
            if names.given and name not in ("huggingface", "metadata"):
                raise UserError(f"{folder} is read as {name}, which has no columns: give none.")
            return Listing(name, rows, problems)
    raise UserError(
        f"{folder} shows no layout known here: expected metadata.jsonl, prompt.json, multidatabackend.json, parquet or "
        "tar files, a folder of pictures beside one of hints, or pictures."
    )


def _half_built(folder: Path) -> bool:
    """Whether ``build`` began this folder and did not end; others' files of the marker's name say nothing."""
    marker = folder / BUILT
    try:
        facts = json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else None
    except ValueError:
        return False
    return isinstance(facts, dict) and {"layout", "hint"} <= facts.keys() and not facts.get("whole")


# --- helpers of several readers -----------------------------------------------------------------------------


def _file(path: Path) -> Held:
    return Held(str(path), path.read_bytes)


def _inside(folder: Path, name: str, problems: list[Problem]) -> Held | None:
    """The file a listing names, if it is there and in the data set's own folder."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        problems.append(
            Problem("path escapes", name, f"lies outside {folder}; a listing may name what is inside alone")
        )
        return None
    if not path.is_file():
        problems.append(Problem("missing file", name, f"is named by the listing and not in {folder}"))
        return None
    return _file(path)


def _one_of(values: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((values[name] for name in names if values.get(name) not in (None, "")), None)


def _row(picture: Held, prompt: str, hints: Sequence[Held | None]) -> Row:
    first, *more = hints or [None]
    return Row(picture, prompt, first, tuple(held for held in more if held))


def _wording(captions: Any, place: int) -> str:
    """One caption of those a row has; the same one each time it is read."""
    if isinstance(captions, list):
        return str(captions[int(numpy_rng("caption", place).integers(len(captions)))]) if captions else ""
    return "" if captions is None else str(captions)


def caption_file(path: Path) -> Path | None:
    """The caption file of a picture's name, if there is one."""
    return next((beside for s in CAPTION_SUFFIXES if (beside := path.with_suffix(s)).is_file()), None)


def _caption_beside(path: Path, problems: list[Problem]) -> str | None:
    """What stands in the caption file of a picture's name; None if there is none."""
    beside = caption_file(path)
    return None if beside is None else " ".join(_text_of(beside, problems).split())


_MACHINES = (
    "img", "image", "photo", "picture", "pic", "dsc", "dscn", "dscf", "dji", "gopr", "mvi", "mg", "pxl", "sam", "vid",
    "frame", "scan", "screenshot", "whatsapp", "signal", "telegram", "untitled", "unnamed", "file", "copy", "of", "at",
    "am", "pm",
)  # fmt: skip
"""Words of names that cameras and programs give."""
_SERIAL = re.compile(r"[0-9a-f]{8,}|[a-z]{0,2}\d{4,}|\d+")
"""Numbers and digests: they count pictures, and say nothing of them."""


def _words_of(path: Path) -> str:
    """What a file's name calls its picture: ``001_red-apple_3d (2).png`` -> ``red apple 3d``.

    Numbers at either end are counters and are dropped. A name that a machine gave (``IMG_1234``) says nothing: "".
    """
    words = re.findall(r"[^\W_]+(?:['’][^\W_]+)*", path.stem.lower())
    while words and words[-1].isdigit():
        words.pop()
    while words and words[0].isdigit():
        words.pop(0)
    if words:
        words[-1] = re.sub(r"(?<=[^\W\d_]{3})\d+$", "", words[-1])  # apple01, but not mp3
    said = [word for word in words if word not in _MACHINES and not _SERIAL.fullmatch(word)]
    return " ".join(words) if said else ""


def _said(prompt: str, path: Path) -> str:
    return prompt


def _pictures_in(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes and p.is_file())


def _paired(
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
        first, *more = (_file(held[name]) for held in others)
        rows.append(Row(_file(path), prompt or "", first, tuple(more)))
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
    for path in _pictures_in(folder, suffixes):
        name = path.relative_to(folder).with_suffix("")
        if not deep and len(name.parts) > 1:
            continue
        if name in found:
            problems.append(Problem("two of a name", str(path), f"has the name of {found[name]}: rename one"))
        found[name] = path
    return found


def _text_of(path: Path, problems: list[Problem]) -> str:
    """A file's text; nothing, and a problem, if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        problems.append(Problem("not UTF-8", str(path), f"{error.reason} at byte {error.start}: save it as UTF-8"))
        return ""


def _json_lines(path: Path, problems: list[Problem]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON lines, and where each stands."""
    for number, line in enumerate(_text_of(path, problems).split("\n"), 1):  # captions may hold other ends of lines
        if line.strip():
            where = f"{path}, line {number}"
            try:
                values = json.loads(line)
                reason = f"holds a {type(values).__name__}"
            except ValueError as error:
                values, reason = None, f"is no JSON ({error})"
            if isinstance(values, dict):
                yield where, values
            else:
                problems.append(Problem("unreadable line", where, f"{reason}; expected a JSON object a line"))


# --- the layouts --------------------------------------------------------------------------------------------


_ASIDE = {"validation", "valid", "val", "dev", "test", "eval"}
"""Words that files of a split have in their names that is not for training."""


def _for_training(tables: Sequence[Path], folder: Path) -> list[str]:
    """All tables of a folder but those of other splits, where there are such."""
    split = [path for path in tables if not _ASIDE & set(re.findall("[a-z]+", str(path.relative_to(folder)).lower()))]
    return [str(path) for path in split or tables]


def _nulls(table: Any, column: str) -> set[int]:
    """The rows of a table of the datasets library that have nothing in a column."""
    values = table.select_columns([column]).with_format("arrow")[:].column(column)
    return {place for place, null in enumerate(values.is_null().to_pylist()) if null} if values.null_count else set()


def _linked(table: Any, column: str) -> dict[int, str]:
    """The rows whose picture is a path instead of bytes, and that path; the bytes are not read for it."""
    values = table.select_columns([column]).with_format("arrow")[:].column(column)
    if not {"bytes", "path"} <= {field.name for field in getattr(values.type, "fields", ())}:
        return {}
    bare = [null for chunk in values.chunks for null in chunk.field("bytes").is_null().to_pylist()]
    paths = [path for chunk in values.chunks for path in chunk.field("path").to_pylist()]
    return {place: path for place, path in enumerate(paths) if bare[place] and path is not None}


def _huggingface(folder: Path, problems: list[Problem], names: Names) -> list[Row] | None:
    """``save_to_disk``'s folder, or parquet files at any depth; pictures as the Image feature stores them."""
    saved = (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()
    tables = _for_training(sorted(folder.rglob("*.parquet")), folder)
    if not saved and not tables:
        return None
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{folder} is a data set of the datasets library. Install it with: pip install 'controlkit[datasets]'"
        ) from error
    if saved:
        table = datasets.load_from_disk(str(folder))
    else:
        table = datasets.Dataset.from_parquet(tables, cache_dir=str(cache_dir() / "datasets"))
    if isinstance(table, datasets.DatasetDict):
        table = table["train"] if "train" in table else next(iter(table.values()))
    columns = table.column_names
    names.check(columns, str(folder))
    picture, caption = (next((n for n in likely if n in columns), None) for likely in (names.image, names.caption))
    hints = names.hints(columns)
    if picture is None:
        raise UserError(f"{folder} has the columns {', '.join(columns)}: none of {', '.join(names.image)}.")
    for name in (picture, *hints):
        if isinstance(table.features[name], datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))

    empty = {name: _nulls(table, name) for name in (picture, *hints)}
    linked = {name: _linked(table, name) for name in (picture, *hints)}

    def held(place: int, column: str) -> Held | None:
        if place in empty[column]:
            problems.append(Problem("missing file", f"{folder}, row {place}", f"has nothing in its column {column}"))
            return None

        if isinstance(table.features[column], datasets.Image):
            if link := linked[column].get(place):  # people's own tables may name files anywhere, a hub's may not
                fetched = folder.resolve().is_relative_to((cache_dir() / "datasets").resolve())
                return _inside(folder, link, problems) if fetched else _file(folder / link)
            return Held(f"{folder}, row {place}, {column}", lambda: table[place][column]["bytes"])
        name = str(table[place][column])
        beside = folder if saved or (folder / name).is_file() else Path(tables[0]).parent
        return _inside(beside, name, problems)

    rows = []
    for place, said in enumerate(table[caption] if caption else [""] * len(table)):
        own, others = held(place, picture), [held(place, name) for name in hints]
        if own and all(others):
            rows.append(_row(own, _wording(said, place), others))
    return rows


def _simpletuner(folder: Path, problems: list[Problem], names: Names) -> list[Row] | None:
    """``multidatabackend.json``: backends of pictures with ``conditioning_data``, the id of a backend of hints."""
    path = folder / "multidatabackend.json"
    if not path.is_file():
        return None
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        backends = {one["id"]: one for one in listed if not one.get("disabled")}
        local = [one for one in backends.values() if "instance_data_dir" in one]
        for one in backends.values():
            problems += _left_out(str(path), one)
        pictures = [one for one in local if one.get("dataset_type", "image") == "image"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}): expected a list of backends, each with an id.") from error

    def place(backend: Mapping[str, Any]) -> Path:
        return folder / str(backend["instance_data_dir"])

    rows: list[Row] = []
    for backend in pictures:
        strategy = backend.get("caption_strategy", "filename")
        prompts: dict[str, Callable[[Path], str | None]] = {
            "filename": _words_of,
            "textfile": lambda picture: _caption_beside(picture, problems),
            "instanceprompt": partial(_said, str(backend.get("instance_prompt", ""))),
        }
        if strategy not in prompts:
            raise UserError(f'{path}: caption_strategy is "{strategy}": {nearest(strategy, prompts)}')
        said = backend.get("conditioning_data")
        others = said if isinstance(said, list) else [said]
        if said is None:
            named = strategy == "filename"
            rows += [Row(_file(p), prompts[strategy](p) or "", named=named) for p in _pictures_in(place(backend))]
        elif unknown := [other for other in others if other not in backends]:
            raise UserError(f'{path}: conditioning_data is "{unknown[0]}": {nearest(str(unknown[0]), backends)}')
        else:
            hints = [place(backends[other]) for other in others]
            rows += _paired(place(backend), hints, prompts[strategy], problems)
    return rows


def _left_out(where: str, backend: Mapping[str, Any]) -> Iterator[Problem]:
    """What of a backend's settings is not read, where it would change what is trained on."""
    name = f"{where}, {backend['id']}"
    if backend.get("dataset_type", "image") not in ("image", "conditioning"):
        return  # caches of text and latents
    if "instance_data_dir" not in backend:
        said = f"is of type {backend.get('type', 'unknown')} without instance_data_dir: its pictures are left out"
        yield Problem("other backend", name, said, fatal=False)
    instead = {
        "repeats": "its pictures come as often as others",
        "conditioning": "name a backend of hints by conditioning_data, or an annotator",
    }
    for key, words in instead.items():
        if backend.get(key):
            yield Problem("setting not read", name, f"{key} is not read: {words}", fatal=False)


def _prompt_json(folder: Path, problems: list[Problem], names: Names) -> list[Row] | None:
    """The original repository's ``prompt.json``."""
    listing = folder / "prompt.json"
    if not listing.is_file():
        return None
    rows = []
    for where, values in _json_lines(listing, problems):
        if absent := [key for key in ("source", "target", "prompt") if not isinstance(values.get(key), str)]:
            words = f'lacks "{absent[0]}"; expected "source", "target" and "prompt" in a JSON object a line'
            problems.append(Problem("unreadable line", where, words))
            continue
        hint, picture = (_inside(folder, values[key], problems) for key in ("source", "target"))
        if hint and picture:
            rows.append(Row(picture, values["prompt"], hint))
    return rows


def _metadata(folder: Path, problems: list[Problem], names: Names) -> list[Row] | None:
    """``metadata.jsonl``, ``.csv`` or ``.json`` (a list), in the folder itself or in ``train/``; paths from where it
    lies."""
    suffixes = (".jsonl", ".csv", ".json")
    places = [base / f"metadata{suffix}" for base in (folder, folder / "train") for suffix in suffixes]
    listing = next((path for path in places if path.is_file()), None)
    if listing is None or (listing.suffix == ".json" and not listing.read_bytes().lstrip().startswith(b"[")):
        return None  # a JSON object of that name is about something else
    rows = []
    for number, (where, values) in enumerate(_entries(listing, problems)):
        if not number:
            names.check(list(values), where)
        named = _one_of(values, names.image)
        hinted = [str(values[name]) for name in names.hints([key for key in values if values[key] not in (None, "")])]
        if not isinstance(named, str):
            words = f"names no picture; expected one of {', '.join(names.image)}"
            problems.append(Problem("unreadable line", where, words))
            continue
        picture = _inside(listing.parent, named, problems)
        others = [_inside(listing.parent, name, problems) for name in hinted]
        if picture and all(others):
            rows.append(_row(picture, _wording(_one_of(values, names.caption), number), others))
    if hints := sum(row.hint is not None for row in rows):
        for row in rows:
            if row.hint is None:
                problems.append(Problem("missing hint", row.picture.name, f"has no hint, and {hints} others have"))
        rows = [row for row in rows if row.hint is not None]
    return rows


def _entries(listing: Path, problems: list[Problem]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a listing of pictures says of each, and where it says so."""
    if listing.suffix == ".jsonl":
        yield from _json_lines(listing, problems)
    elif listing.suffix == ".csv":
        lines = csv.DictReader(io.StringIO(_text_of(listing, problems), newline=""))
        for values in lines:
            where = f"{listing}, line {lines.line_num}"
            if None in values:  # where the rest of a line goes
                words = "has more fields than the first line: a caption with commas stands in quotes"
                problems.append(Problem("unreadable line", where, words))
            else:
                yield where, values
    else:
        try:
            listed = json.loads(_text_of(listing, problems) or "[]")
        except ValueError as error:
            problems.append(Problem("unreadable file", str(listing), f"is no JSON ({error})"))
            return
        for place, values in enumerate(listed):
            if isinstance(values, dict):
                yield f"{listing}, entry {place}", values
            else:
                words = f"holds a {type(values).__name__}; expected a list of JSON objects"
                problems.append(Problem("unreadable line", f"{listing}, entry {place}", words))


def _webdataset(folder: Path, problems: list[Problem], names: Names) -> list[Row] | None:
    """Tar shards: ``KEY.jpg``, ``KEY.txt``, ``KEY.conditioning_image.png``, ``KEY.json``."""
    shards = sorted(folder.rglob("*.tar"))
    if not shards:
        return None
    rows = []
    for shard in shards:
        samples: dict[str, dict[str, Held]] = {}
        try:
            with tarfile.open(shard, "r:") as archive:  # not compressed: members are read where they lie
                for member in archive:
                    if member.isfile():
                        where, _, name = member.name.rpartition("/")
                        stem, _, part = name.partition(".")
                        read = partial(_bytes_at, shard, member.offset_data, member.size)
                        key = f"{where}/{stem}" if where else stem
                        samples.setdefault(key, {})[part.lower()] = Held(f"{shard}:{member.name}", read)
        except tarfile.TarError as error:
            problems.append(Problem("unreadable file", str(shard), f"is no whole tar file, uncompressed ({error})"))
        for key, parts in samples.items():
            row = _sample(f"{shard}:{key}", parts, problems, names)
            if row:
                rows.append(row)
    return rows


def _sample(where: str, parts: Mapping[str, Held], problems: list[Problem], names: Names) -> Row | None:
    """A row of the members of one key; a member's part is what follows the first dot of its name."""
    pictures = {part: held for part, held in parts.items() if f".{part.rpartition('.')[2]}" in HINT_SUFFIXES}
    by_name = {part.split(".")[0]: held for part, held in pictures.items()}
    hints = [by_name[name] for name in names.hints(list(by_name))]
    # Of several names for a hint the likeliest counts; none of them is the picture, and no array is.
    own = [held for part, held in pictures.items() if not part.startswith(HINT_NAMES) and not part.endswith(".npy")]
    if len(own) != 1:
        problems.append(Problem("missing file", where, f"has {len(own)} pictures; expected one, such as KEY.jpg"))
        return None
    facts: dict[str, Any] = {}
    prompt: str | None = None
    try:
        said = next((held for part, held in parts.items() if part in ("txt", "text", "caption")), None)
        prompt = said.read().decode("utf-8").strip() if said else None
        if "json" in parts:
            held = json.loads(parts["json"].read().decode("utf-8"))
            facts = held if isinstance(held, dict) else {}
    except UnicodeDecodeError as error:
        problems.append(Problem("not UTF-8", where, f"{error.reason} at byte {error.start}: save it as UTF-8"))
    except ValueError as error:
        problems.append(Problem("unreadable line", where, f"its json cannot be read ({error})"))
    if prompt is None:
        prompt = _wording(_one_of(facts, names.caption), 0)
    return _row(own[0], prompt, hints)


def _bytes_at(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _two_folders(folder: Path, problems: list[Problem], names: Names) -> list[Row] | None:
    """A folder of pictures, with captions beside them, and one of hints, told by its name (``FOLDERS``, ``KINDS``).

    The pictures may lie in the folder itself. Further hints lie in folders of its name with ``_2``, ``_3`` and so on.
    Where a folder is named as one of hints and it cannot be told whose, that is a problem: taken as pictures, hints
    would be trained on.
    """
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    held = {path: _names_in(path, HINT_SUFFIXES) for path in inside}
    first = {path: re.split(r"[^a-z0-9]+", path.name.lower())[0] for path in inside}
    hints = [path for path in inside if first[path] in FOLDERS]
    pictures = {path: found for path in inside if path not in hints and (found := _names_in(path, SUFFIXES))}
    if own := {name for name in _names_in(folder, SUFFIXES) if len(name.parts) == 1}:
        pictures[folder] = own
    if not hints:
        likely = [path for path in pictures if path != folder and first[path] in KINDS]
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
    paired = [path for path, found in pictures.items() if found & held[hints[0]]]
    if len(paired) != 1:
        said = f"{len(paired)} folders have" if paired else "no folder has"
        return unclear(f"{said} pictures of the names in {called}: expected one, beside it or around it")
    for path in pictures.keys() - set(paired):
        problems.append(Problem("other folder", str(path), f"has nothing to do with {called}: not read", fatal=False))
    return _paired(paired[0], hints, lambda path: _caption_beside(path, problems), problems)


def _names_in(folder: Path, suffixes: Sequence[str]) -> set[Path]:
    """What a folder's pictures are called, without suffix."""
    return {path.relative_to(folder).with_suffix("") for path in _pictures_in(folder, suffixes)}


def _plain(folder: Path, problems: list[Problem], names: Names) -> list[Row] | None:
    """Pictures, at any depth."""
    found = _pictures_in(folder)
    if not found:
        return None
    rows = []
    for path in found:
        said = _caption_beside(path, problems)
        rows.append(Row(_file(path), _words_of(path) if said is None else said, named=said is None))
    return rows


LAYOUTS: dict[str, Callable[[Path, list[Problem], Names], list[Row] | None]] = {
    "huggingface": _huggingface,
    "simpletuner": _simpletuner,
    "prompt.json": _prompt_json,
    "metadata": _metadata,
    "webdataset": _webdataset,
    "paired": _two_folders,
    "pictures": _plain,
}
