"""WebDataset's tar shards.

Listed here and not by the webdataset library, which reads shards from end to end: rows must be counted, sized and
read in any order, so members are read where they lie, without a dependency.
"""

import json
import tarfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from controlkit.data.layouts.rows import HINT_NAMES, HINT_SUFFIXES, Held, Names, Problem, Row, one_of, wording


def webdataset(folder: Path, problems: list[Problem], names: Names) -> list[Row] | None:
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
        text = next((held for part, held in parts.items() if part in ("txt", "text", "caption")), None)
        prompt = text.read().decode("utf-8").strip() if text else None
        if "json" in parts:
            held = json.loads(parts["json"].read().decode("utf-8"))
            facts = held if isinstance(held, dict) else {}
    except UnicodeDecodeError as error:
        problems.append(Problem("not UTF-8", where, f"{error.reason} at byte {error.start}: save it as UTF-8"))
    except ValueError as error:
        problems.append(Problem("unreadable line", where, f"its json cannot be read ({error})"))
    if prompt is None:
        prompt = wording(one_of(facts, names.caption), 0)
    return Row(own[0], prompt, tuple(hints))


def _bytes_at(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
