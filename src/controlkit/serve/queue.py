"""The queue: accepted jobs in SQLite, so that they outlive the process, and the files that they leave."""

import json
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from controlkit.errors import OutOfRoom
from controlkit.serve.orders import Order
from controlkit.serve.settings import Limits

State = Literal["waiting", "running", "done", "failed", "cancelled"]
ENDED = ("done", "failed", "cancelled")
TRIES = 2
"""How often a job is begun, where the worker dies of it."""

_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, api TEXT NOT NULL, kind TEXT NOT NULL,
    state TEXT NOT NULL, tries INTEGER NOT NULL DEFAULT 0, alike TEXT NOT NULL, count INTEGER NOT NULL,
    asked TEXT NOT NULL, result TEXT, fault TEXT, error TEXT,
    accepted REAL NOT NULL, begun REAL, ended REAL
);
CREATE INDEX IF NOT EXISTS jobs_state ON jobs (state, number);
"""
_COLUMNS = "number, id, api, kind, state, tries, alike, count, result, fault, error, accepted, begun, ended"


class QueueFull(OutOfRoom):
    """As many jobs wait as may."""


@dataclass(frozen=True)
class Job:
    """A job as it stands in the queue; times are seconds since 1970."""

    number: int
    id: str
    api: str
    """``a1111``, ``openai`` or ``v1``."""
    kind: str
    state: State
    tries: int
    """How often it was begun."""
    alike: str
    count: int
    result: Mapping[str, Any] = field(default_factory=dict)
    """Names of files, texts, figures, as the worker found them."""
    fault: str = ""
    """The kind of error, such as ``Invalid``; "" where there is none."""
    error: str = ""
    """Its sentence."""
    accepted: float = 0.0
    begun: float | None = None
    ended: float | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in ENDED


class Queue:
    """Jobs of one server, whose folder no other process writes; safe to use from several threads."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.folder, self.limits = folder, limits
        self.changed = threading.Condition()
        """Notified when a job is added."""
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._base = sqlite3.connect(folder / "jobs.sqlite", check_same_thread=False, isolation_level=None)
        self._base.execute("PRAGMA journal_mode = WAL")
        self._base.execute("PRAGMA synchronous = NORMAL")
        self._base.executescript(_TABLE)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._base.close()

    # --- accepted -------------------------------------------------------------------------------------------------

    def add(self, order: Order, api: str) -> Job:
        """Accept a job; from then on it is on the disk. ``QueueFull`` where as many wait as may."""
        text, name = order.to_json(), uuid.uuid4().hex
        with self._writing():
            (waiting, size) = self._base.execute(
                "SELECT count(*), coalesce(sum(length(asked)), 0) FROM jobs WHERE state = 'waiting'"
            ).fetchone()
            if waiting >= self.limits.waiting or size + len(text) > self.limits.bytes_waiting:
                raise QueueFull(f"The queue is full: {waiting} jobs wait. Ask again when some of them are done.")
            self._base.execute(
                "INSERT INTO jobs (id, api, kind, state, alike, count, asked, accepted) "
                "VALUES (?, ?, ?, 'waiting', ?, ?, ?, ?)",
                (name, api, order.kind, order.alike, order.count, text, time.time()),
            )
        with self.changed:
            self.changed.notify_all()
        accepted = self.get(name)
        assert accepted is not None
        return accepted

    def get(self, name: str) -> Job | None:
        """The job of that id; None where there is none, or it is forgotten."""
        found = self._select("WHERE id = ?", name)
        return found[0] if found else None

    def order_text(self, job: Job) -> str:
        """The order of a job as JSON; "" where it has ended."""
        with self._lock:
            found = self._base.execute("SELECT asked FROM jobs WHERE id = ?", (job.id,)).fetchone()
        return found[0] if found else ""

    def newest(self, most: int = 100) -> list[Job]:
        """The jobs accepted last, the newest first."""
        return self._select("ORDER BY number DESC LIMIT ?", most)

    def running(self) -> list[Job]:
        """The jobs that a worker is at."""
        return self._select("WHERE state = 'running' ORDER BY number")

    def counts(self) -> dict[str, int]:
        """How many jobs there are in each state."""
        with self._lock:
            return dict(self._base.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())

    def waiting_before(self, job: Job) -> int:
        """How many jobs wait that were accepted before this one."""
        with self._lock:
            found = self._base.execute(
                "SELECT count(*) FROM jobs WHERE state = 'waiting' AND number < ?", (job.number,)
            ).fetchone()
        return int(found[0])

    # --- at work --------------------------------------------------------------------------------------------------

    def take(self, most: int) -> list[Job]:
        """The oldest job that waits, now running; with it others that can be made in one batch of ``most`` pictures.

        A job that a worker died of is taken alone, so that no other suffers from it twice.
        """
        with self._writing():
            waiting = self._select("WHERE state = 'waiting' ORDER BY number LIMIT 256")
            if not waiting:
                return []
            taken = [waiting[0]]
            for job in waiting[1:] if taken[0].alike and not taken[0].tries else ():
                if (
                    job.alike == taken[0].alike
                    and not job.tries
                    and sum(one.count for one in taken) + job.count <= most
                ):
                    taken.append(job)
            for job in taken:
                self._set(job, "running", "tries = tries + 1, begun = ?", time.time())
        return [now for one in taken if (now := self.get(one.id))]

    def finish(self, job: Job, result: Mapping[str, Any]) -> None:
        """Say that a job is done, with what came of it."""
        self._end(job, "done", "result = ?", json.dumps(result))

    def fail(self, job: Job, fault: str, error: str) -> None:
        """Say that a job failed: the kind of error, and its sentence."""
        self._end(job, "failed", "fault = ?, error = ?", fault, error)

    def cancel(self, job: Job) -> bool:
        """Cancel a job that has not ended; whether it had not."""
        with self._writing():
            now = self.get(job.id)
            if now is None or now.has_ended:
                return False
            self._set(job, "cancelled", "asked = '', ended = ?", time.time())
        return True

    def back(self, jobs: Sequence[Job]) -> list[Job]:
        """Have jobs wait again whose worker died, or fail where that was so before; those that failed."""
        failed = []
        for job in jobs:
            now = self.get(job.id)
            if now is None or now.state != "running":
                continue
            if now.tries >= TRIES:
                self.fail(now, "OutOfRoom", _DIED)
                failed.append(now)
            else:
                with self._writing():
                    self._set(now, "waiting", "begun = NULL")
        with self.changed:
            self.changed.notify_all()
        return failed

    def release(self) -> None:
        """Have the jobs at work wait again, as if they had not been begun: the server ends, and not by their fault."""
        with self._writing():
            for job in self.running():
                self._set(job, "waiting", "begun = NULL, tries = tries - 1")

    def recover(self) -> None:
        """Take up what a server that was killed left: what was running waits again."""
        self.back(self.running())
        known = {job.id for job in self._select("")}
        for left in (self.folder / "pictures").glob("*"):
            if left.name not in known:
                shutil.rmtree(left, ignore_errors=True)

    def forget(self) -> None:
        """Delete the jobs that ended first, with their files, beyond those that are kept."""
        old = self._select(
            "WHERE state IN ('done', 'failed', 'cancelled') ORDER BY ended DESC LIMIT -1 OFFSET ?", self.limits.kept
        )
        for job in old:
            shutil.rmtree(self.files_of(job.id), ignore_errors=True)
            with self._writing():
                self._base.execute("DELETE FROM jobs WHERE id = ?", (job.id,))

    def files_of(self, name: str) -> Path:
        """The folder of what a job leaves."""
        return self.folder / "pictures" / name

    # --- SQL ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A change that is made as a whole, or not at all."""
        with self._lock:
            if self._base.in_transaction:
                yield
                return
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._base.execute("ROLLBACK")
                raise
            self._base.execute("COMMIT")

    def _select(self, where: str, *values: Any) -> list[Job]:
        with self._lock:
            rows = self._base.execute(f"SELECT {_COLUMNS} FROM jobs {where}", values).fetchall()
        return [_job(row) for row in rows]

    def _set(self, job: Job, state: State, more: str, *values: Any) -> None:
        self._base.execute(f"UPDATE jobs SET state = ?, {more} WHERE id = ?", (state, *values, job.id))

    def _end(self, job: Job, state: State, more: str, *values: Any) -> None:
        """End a job, unless it was cancelled; what it was asked for is not needed any more."""
        with self._writing():
            now = self.get(job.id)
            if now is not None and now.state == "running":
                self._set(job, state, f"asked = '', ended = ?, {more}", time.time(), *values)


def _job(row: Sequence[Any]) -> Job:
    """The job of a row of ``_COLUMNS``."""
    held = dict(zip(_COLUMNS.split(", "), row, strict=True))
    held |= {"result": json.loads(held["result"] or "{}"), "fault": held["fault"] or "", "error": held["error"] or ""}
    return Job(**held)


_DIED = (
    f"The worker died {TRIES} times while it made this job; most often memory ran out. Ask for fewer or smaller "
    "pictures."
)
