"""WebDataset's tar shards.

Listed here and not by the webdataset library, which reads shards from end to end: rows must be counted, sized and
read in any order, so members are read where they lie, without a dependency.
"""

import tarfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from controlkit.data.layouts.rows import HINT_NAMES, HINT_SUFFIXES, Held, Names, Problem, Row, one_of, wording
from controlkit.data.layouts.tree import HIDDEN, NO_FILE, Tree
from controlkit.errors import UserError, one_line
from controlkit.files import decode_text, is_leftover, parse_json


def webdataset(tree: Tree, problems: list[Problem], names: Names) -> list[Row] | None:
    """Tar shards: ``KEY.jpg``, ``KEY.txt``, ``KEY.conditioning_image.png``, ``KEY.json``."""
    shards = tree.under(tree.root, [".tar"])
    if not shards:
        return None
    rows = []
    for shard in shards:
        samples: dict[str, dict[str, Held]] = {}
        try:
            with tarfile.open(shard, "r:") as archive:  # not compressed: members are read where they lie
                for member in archive:
                    if any(map(is_leftover, PurePosixPath(member.name).parts)):
                        tree.leave_out(HIDDEN, shard / member.name)
                    elif member.isfile():
                        where, _, name = member.name.rpartition("/")
                        stem, _, part = name.partition(".")
                        read = partial(_bytes_at, shard, member.offset_data, member.size)
                        key = f"{where}/{stem}" if where else stem
                        samples.setdefault(key, {})[part.lower()] = Held(f"{shard}:{member.name}", read)
                    elif not member.isdir():
                        tree.leave_out(NO_FILE, shard / member.name)
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            words = f"is no whole tar file, uncompressed ({one_line(error)})"
            problems.append(Problem("unreadable file", str(shard), words))
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
    facts: Any = None
    prompt: str | None = None
    try:
        text = next((held for part, held in parts.items() if part in ("txt", "text", "caption")), None)
        prompt = decode_text(text.read(), text.name).strip() if text else None
        if "json" in parts:
            facts = parse_json(parts["json"].read(), parts["json"].name)
    except UserError as error:
        problems.append(Problem("unreadable caption", where, str(error)))
    if prompt is None:
        prompt = wording(one_of(facts, names.caption) if isinstance(facts, dict) else None, 0)
    return Row(own[0], prompt, tuple(hints))


def _bytes_at(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
