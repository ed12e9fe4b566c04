"""The journal of a folder of pictures: jobs that are finished, those that are left, and pictures being written."""

import hashlib
import json
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from controlkit.decoding import read_bytes as read_picture_file
from controlkit.errors import Invalid
from controlkit.files import inside, mark_output, parse_json, read_bytes, sweep, write_atomic
from controlkit.formats.control import control_path, type_of
from controlkit.images import write_png
from controlkit.prompts import Span
from controlkit.sample.embedded import embedded
from controlkit.sample.jobs import BATCH, Faults, Job, groups_of, with_sources
from controlkit.sample.prepare import check_pictures
from controlkit.sample.request import Request, Step
from controlkit.sample.texts import Script

JOURNAL = "journal.jsonl"
"""The file in the folder: a line for each picture that is finished, with its ``name``, ``key`` and ``seconds``."""


@dataclass(frozen=True)
class Plan:
    """The work that is left in a folder."""

    out: Path
    groups: Sequence[Sequence[Job]]
    """The jobs to be made, those that can share a batch together."""
    keys: Mapping[str, str]
    """Of each job's name: a digest of all that its picture depends on."""
    facts: Mapping[str, Any]
    """Of all pictures: the base and so on."""
    done: int
    """How many pictures are there already."""

    @property
    def left(self) -> int:
        """How many are to be made."""
        return sum(map(len, self.groups))


@dataclass(frozen=True, eq=False)
class Made:
    """The picture of a job, not written yet."""

    name: str
    pixels: np.ndarray
    settled: Request
    """``Prepared.settled``."""
    facts: Mapping[str, Any]
    """Of the process that made it: number format and threads."""
    seconds: float
    """Its share of the batch's."""


@dataclass(frozen=True)
class Finished:
    """A picture that is written, and its line in the journal."""

    name: str
    seconds: float


def begin(out: Path, jobs: Sequence[Job], facts: Mapping[str, Any], most: int = BATCH) -> Plan:
    """Plan what is left of jobs in a folder, which no other process may write meanwhile (``files.held``).

    A picture is finished where the journal has its line, with the same request, bytes of its pictures and ``facts``,
    and its file is there. Groups of at most ``most`` are those of all jobs, finished or not: what is made together
    after a stop is what would have been without it.

    Raises what can be known without a base, with the places of the jobs: pictures and controls that are not there or
    cannot be read, prompts that are none. ``Invalid`` where a picture would be written over a file that no job made, or
    that a job reads.
    """
    faults, check = Faults(), _Check(out)
    keys = dict[str, str]()
    for job in jobs:
        with faults.at(job.where):
            keys[job.name] = check.key(job, facts)
    faults.settle()
    done = {name for name, key in keys.items() if check.is_made(name, key)}
    # Lines of other jobs stay. Those of pictures that are made anew go first, so that none can seem finished.
    kept = [line for name, line in (check.journal or {}).items() if name in done or name not in keys]
    mark_output(out, "generate")
    sweep(out)
    write_atomic(out / JOURNAL, b"".join(map(_json_line, kept)))
    groups = [[job for job in group if job.name not in done] for group in groups_of(jobs, most)]
    return Plan(out, [group for group in groups if group], keys, facts, len(done))


def written(
    plan: Plan, records: Generator[Step | Made | None, None, None]
) -> Generator[Step | Finished | None, None, None]:
    """Write pictures as they are made; each is finished when those of its batch are, and then yielded.

    So a batch that a kill interrupts is made again as a whole: in another one its pictures could be rounded otherwise.
    ``None`` among the records says that nothing is to be said, and yet a batch may be whole. Close it to stop.
    """
    batch: list[Made] = []
    with closing(records), (plan.out / JOURNAL).open("ab") as journal:
        for record in records:
            if isinstance(record, Made):
                texts = embedded(record.settled, {**plan.facts, **record.facts}, record.pixels)
                write_png(plan.out / f"{record.name}.png", record.pixels, **texts)
                batch.append(record)
                continue
            lines = [{"name": one.name, "key": plan.keys[one.name], "seconds": round(one.seconds, 3)} for one in batch]
            journal.write(b"".join(map(_json_line, lines)))
            journal.flush()
            os.fsync(journal.fileno())
            yield from (Finished(one.name, one.seconds) for one in batch)
            batch = []
            yield record


class _Check:
    """Jobs looked at beside what is in the folder; each file that they name is read once."""

    def __init__(self, out: Path) -> None:
        self.out, self.journal = out, _read_journal(out)
        self._digests: dict[Path, str] = {}
        self._checked = set[tuple[Any, ...]]()

    def key(self, job: Job, facts: Mapping[str, Any]) -> str:
        """A digest of the job's request, of the bytes of its pictures, and of the facts; raises as ``begin`` does."""
        request, read = job.request, set[Path]()

        def by_content(source: Path | np.ndarray) -> Path | np.ndarray:
            if not isinstance(source, Path):
                return source
            read.add(source)
            return Path(self._digest(source))

        plain = with_sources(request, by_content)
        held = json.dumps([plain.to_json(), dict(facts)], sort_keys=True, default=str)
        key = hashlib.sha256(held.encode()).hexdigest()[:32]
        if not self.is_made(job.name, key):
            self._check(request)
            self._check_target(self.out / f"{job.name}.png", read)
        return key

    def is_made(self, name: str, key: str) -> bool:
        """Whether the picture is finished."""
        line = (self.journal or {}).get(name, {})
        return line.get("key") == key and (self.out / f"{name}.png").is_file()

    def _digest(self, path: Path) -> str:
        if path not in self._digests:
            self._digests[path] = hashlib.sha256(read_picture_file(path, f"picture at {path}")).hexdigest()
        return self._digests[path]

    def _check(self, request: Request) -> None:
        Script.of(request, Span(request.steps))
        if request.edit:
            check_pictures(request.edit)
        for control in request.controls:
            paths = tuple(source for source in control.images.values() if isinstance(source, Path))
            facts = (control.name, control.annotator, *control.annotators.values(), control.ready, paths)
            if facts not in self._checked:
                control_path(type_of(control.name)[0])
                check_pictures(control)
                self._checked.add(facts)

    def _check_target(self, target: Path, read: set[Path]) -> None:
        if os.path.realpath(target) in {os.path.realpath(path) for path in read}:
            raise Invalid(f"the picture would be written over {target}, which it is made of: give another --out.")
        if self.journal is None and target.exists():
            raise Invalid(f"{target} is there, and no job made it: give another --out, or another name.")


def _json_line(values: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(values)}\n".encode()


def _read_journal(out: Path) -> dict[str, dict[str, Any]] | None:
    """The last line of each picture, by its name, up to a line that a kill cut short; None where there is no journal.

    ``Invalid`` for a line that is whole and that was not written here.
    """
    path = out / JOURNAL
    if not path.exists():
        return None
    *lines, _ = read_bytes(inside(out, path)).split(b"\n")  # a line without an end is torn
    found = dict[str, dict[str, Any]]()
    for number, line in enumerate(lines, 1):
        held = parse_json(line, f"{path}, line {number},")
        if not isinstance(held, dict) or not all(isinstance(held.get(key), str) for key in ("name", "key")):
            raise Invalid(f"{path}, line {number}, is none of a journal: delete the file, or give another --out.")
        found[held["name"]] = held
    return found
