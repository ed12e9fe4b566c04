"""The desk: takes orders in, gives them to workers in batches, and tells whoever waits how far they are."""

import asyncio
import logging
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from controlkit import errors
from controlkit.errors import NotFound, OutOfRoom
from controlkit.serve.meters import Meters
from controlkit.serve.orders import Order
from controlkit.serve.queue import Job, Queue
from controlkit.serve.settings import Settings
from controlkit.serve.worker import Hand, Hire

_PATIENCE = 60.0
"""Seconds after which a worker that does not stop is ended."""
_POLL = 0.2
_FAILURES = 3
"""Workers that may die before the first is ready."""
_LONGEST_WAIT = 30.0
"""Seconds until a worker is tried again."""

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a job is."""

    step: int = 0
    steps: int = 0
    share: float = 0.0
    preview: bytes = b""
    """A PNG; empty where there is none yet."""
    began: float = field(default_factory=time.time)
    version: int = 0
    """Counts the changes."""

    @property
    def seconds_left(self) -> float:
        """By the time that the share which is done took; 0 where nothing is."""
        return (time.time() - self.began) * (1 / self.share - 1) if self.share else 0.0


class Desk:
    """The one place that the APIs speak to; its workers each have a thread of this process."""

    def __init__(self, settings: Settings, hires: Sequence[Hire]) -> None:
        self.settings = settings
        self.limits = settings.limits
        self.meters = Meters()
        self.queue = Queue(settings.state, settings.limits)
        self.queue.recover()
        self.facts: dict[str, Any] = {}
        """As the first worker told them (``Studio.facts``)."""
        self.progress: dict[str, Progress] = {}
        """Of the jobs at work."""
        self._is_closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiters: dict[str, set[asyncio.Event]] = {}
        self._benches = [_Bench(self, hire) for hire in hires]

    def open(self) -> None:
        """Start the workers and wait until the first is ready; raises the ``UserError`` that it ended with."""
        for bench in self._benches:
            bench.start()
        first = self._benches[0]
        first.settled.wait()
        if first.broken:
            self.close()
            raise _error_of(*first.broken)

    def close(self) -> None:
        """End the workers; jobs that they are at wait for the next start."""
        if self._is_closed:
            return
        self._is_closed = True
        for bench in self._benches:
            bench.end()
        self.queue.release()
        self.queue.close()

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have news told to waiters of this event loop."""
        self._loop = loop

    @property
    def is_alive(self) -> bool:
        """Whether a worker is ready."""
        return any(bench.is_ready for bench in self._benches)

    # --- jobs -----------------------------------------------------------------------------------------------------

    def accept(self, order: Order, api: str) -> Job:
        """Accept a job; ``QueueFull`` where as many wait as may."""
        job = self.queue.add(order, api)
        self.meters.accepted.labels(api, job.kind).inc()
        return job

    async def ended(self, job: Job) -> Job:
        """Wait until a job has ended."""
        async for now in self.news(job.id):
            if now.has_ended:
                return now
        raise NotFound(f"There is no job {job.id}.")

    async def news(self, name: str) -> Any:
        """The job, each time that something of it changed, until it has ended."""
        event = asyncio.Event()
        self._waiters.setdefault(name, set()).add(event)
        try:
            while (job := await asyncio.to_thread(self.queue.get, name)) is not None:
                yield job
                if job.has_ended:
                    return
                with suppress(TimeoutError):
                    await asyncio.wait_for(event.wait(), 5.0)
                event.clear()
        finally:
            self._waiters[name].discard(event)
            if not self._waiters[name]:
                del self._waiters[name]

    def cancel(self, name: str) -> Job:
        """Cancel a job, waiting or at work; it as it is then. ``NotFound`` where there is none."""
        job = self.queue.get(name)
        if job is None:
            raise NotFound(f'There is no job "{errors.one_line(name)}".')
        if self.queue.cancel(job):
            self.meters.ended.labels(job.api, "cancelled").inc()
            self.tell(name)
            self._give_up([name])
        return self.queue.get(name) or job

    def interrupt(self, api: str) -> int:
        """Have the jobs of an API that are at work end with what they have, whatever is made beside them; how many."""
        names = [job.id for job in self.queue.running() if job.api == api]
        self._give_up(names)
        return len(names)

    def _give_up(self, names: Collection[str]) -> None:
        for bench in self._benches:
            bench.give_up(names)

    # --- called by the workers' threads -----------------------------------------------------------------------------

    def tell(self, name: str) -> None:
        """Wake whoever waits for news of a job."""
        if self._loop is not None and not self._loop.is_closed():
            with suppress(RuntimeError):  # closed meanwhile
                self._loop.call_soon_threadsafe(self._wake, name)

    def _wake(self, name: str) -> None:
        for event in self._waiters.get(name, ()):
            event.set()

    def advanced(self, jobs: Sequence[Job], news: Mapping[str, Any]) -> None:
        """Note how far jobs of a batch are."""
        for job in jobs:
            if (at := self.progress.get(job.id)) is None or job.id not in news.get("shares", ()):
                continue
            at.step, at.steps, at.share = news["step"], news["steps"], news["shares"][job.id]
            at.preview = news.get("previews", {}).get(job.id, at.preview)
            at.version += 1
            self.tell(job.id)

    def settle(self, jobs: Sequence[Job], outcomes: Mapping[str, Mapping[str, Any]]) -> None:
        """Write what came of jobs."""
        for job in jobs:
            outcome = outcomes[job.id]
            if "result" in outcome:
                self.queue.finish(job, outcome["result"])
            elif "fault" in outcome:
                self.queue.fail(job, outcome["fault"], outcome["error"])
            else:
                self.queue.cancel(job)
            self.ended_now(job)
        self.queue.forget()

    def ended_now(self, job: Job) -> None:
        """Count a job that ended, and wake whoever waits for it."""
        self.progress.pop(job.id, None)
        if now := self.queue.get(job.id):
            if now.state != "cancelled":
                self.meters.ended.labels(now.api, now.state).inc()
            self.meters.seconds.labels(now.kind).observe((now.ended or time.time()) - now.accepted)
        self.tell(job.id)


class _Bench(threading.Thread):
    """A place for a worker: keeps one there, and gives it batch after batch."""

    def __init__(self, desk: Desk, hire: Hire) -> None:
        super().__init__(daemon=True, name="controlkit-bench")
        self.desk, self._hire = desk, hire
        self.settled = threading.Event()
        """Set when the first worker is ready, or broken."""
        self.is_ready = False
        """Whether a worker is there, and its base loaded."""
        self.broken: tuple[str, str] | None = None
        """(kind of error, sentence) of a first worker that could not begin."""
        self._hand: Hand | None = None
        self._jobs: list[Job] = []
        self._given_up: set[str] = set()
        self._asked_to_stop = 0.0
        self._ends = False
        self._lock = threading.Lock()

    def end(self) -> None:
        """End the worker, and the thread."""
        self._ends = True
        with self.desk.queue.changed:
            self.desk.queue.changed.notify_all()
        if self._hand:
            self._hand.kill()
        if self.is_alive():
            self.join(15)

    def give_up(self, names: Collection[str]) -> None:
        """Have those of these jobs that are at work here end with what there is; the others of their batch go on."""
        with self._lock:
            at_work = {job.id for job in self._jobs}
            if not (ours := (at_work & set(names)) - self._given_up) or self._hand is None:
                return
            self._given_up |= ours
            if at_work <= self._given_up:
                self._asked_to_stop = self._asked_to_stop or time.monotonic()
            with suppress(OSError):  # it has died, which its thread sees
                self._hand.pipe.send(("give_up", sorted(ours)))

    def _is_cancelled(self, job: Job) -> bool:
        now = self.desk.queue.get(job.id)
        return now is None or now.has_ended

    def run(self) -> None:
        """Keep a worker at work until ``end``; one that does not come to be is tried again, ever less often."""
        failures = 0
        while not self._ends:
            hand = self._hand = self._hire()
            try:
                self._begin(*hand.pipe.recv())
                failures = 0
                while not self._ends:
                    self._one_batch(hand)
            except Exception as error:  # of a pipe that broke, and whatever else: no job may be left at work for ever
                if not (self._ends or isinstance(error, EOFError | OSError)):
                    log.exception("a worker is ended")
            self.is_ready = False
            hand.kill()
            hand.pipe.close()
            if self._ends:
                return
            failures += 1
            self._died()
            if self.settled.is_set():
                self._wait(min(0.1 * 2**failures, _LONGEST_WAIT))
            elif self.broken or failures >= _FAILURES:
                self.broken = self.broken or ("OutOfRoom", f"The worker died {failures} times before it was ready.")
                self.settled.set()
                return

    def _begin(self, kind: str, told: Any) -> None:
        """Take a worker's first message; ``EOFError`` where it could not begin."""
        if kind == "broken":
            log.error("the worker cannot begin: %s", told[1])
            self.broken = None if self.settled.is_set() else told
            raise EOFError
        self.desk.facts = self.desk.facts or told
        self.is_ready = True
        self.settled.set()

    def _wait(self, seconds: float) -> None:
        """Wait, unless the server ends."""
        until = time.monotonic() + seconds
        while not self._ends and time.monotonic() < until:
            time.sleep(0.05)

    def _one_batch(self, hand: Hand) -> None:
        queue = self.desk.queue
        jobs = queue.take(self.desk.limits.count)
        if not jobs:
            with queue.changed:
                queue.changed.wait(_POLL)
            if self._has_died(hand):
                raise EOFError
            return
        with self._lock:
            self._jobs, self._given_up, self._asked_to_stop = jobs, set(), 0.0
        orders = {job.id: text for job in jobs if (text := queue.order_text(job))}  # or it was cancelled meanwhile
        jobs = [job for job in jobs if job.id in orders]
        for job in jobs:
            self.desk.progress[job.id] = Progress()
            self.desk.tell(job.id)
        self.desk.meters.batch.observe(sum(job.count for job in jobs))
        with self._lock:
            self._jobs = jobs
            hand.pipe.send(("orders", orders))
            if self._given_up:  # before the orders it was not heard
                hand.pipe.send(("give_up", sorted(self._given_up)))
        self.give_up([job.id for job in jobs if self._is_cancelled(job)])
        self._follow(hand)

    def _follow(self, hand: Hand) -> None:
        """Take the news of a batch until all of its jobs have ended."""
        while True:
            if not hand.pipe.poll(_POLL):
                if self._asked_to_stop and time.monotonic() - self._asked_to_stop > _PATIENCE:
                    log.warning("the worker does not stop, and is ended")
                    hand.kill()
                continue
            kind, told = hand.pipe.recv()
            if kind == "news":
                self.desk.advanced(self._jobs, told)
            self._settle(told if kind == "done" else told.get("ended", {}))
            if kind == "done":
                if self._jobs:
                    raise RuntimeError(f"{len(self._jobs)} jobs have no outcome")
                return

    def _settle(self, outcomes: Mapping[str, Mapping[str, Any]]) -> None:
        """Write what came of the jobs that ended."""
        with self._lock:
            ended = [job for job in self._jobs if job.id in outcomes]
            self._jobs = [job for job in self._jobs if job.id not in outcomes]
        if ended:
            self.desk.settle(ended, outcomes)

    @staticmethod
    def _has_died(hand: Hand) -> bool:
        """Whether the pipe of a worker that has nothing to say is closed at its end."""
        return bool(hand.pipe.poll(0))

    def _died(self) -> None:
        """Have the jobs of a worker that died made by the next one, or fail."""
        with self._lock:
            jobs, self._jobs = self._jobs, []
        if not jobs and self.broken:
            return
        self.desk.meters.deaths.inc()
        log.warning("the worker died; %d jobs were at work", len(jobs))
        failed = {job.id for job in self.desk.queue.back(jobs)}
        for job in jobs:
            self.desk.progress.pop(job.id, None)
            if job.id in failed:
                self.desk.ended_now(job)
            self.desk.tell(job.id)


def _error_of(kind: str, sentence: str) -> errors.UserError:
    found = getattr(errors, kind, OutOfRoom)
    return found(sentence) if issubclass(found, errors.UserError) else OutOfRoom(sentence)
