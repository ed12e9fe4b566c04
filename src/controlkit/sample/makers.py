"""Makers of jobs: this process, or several through Ray (the extra ``scale``), each with a base of its own."""

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from controlkit.backbones import Backbone
from controlkit.backbones.schedulers import own_name
from controlkit.cluster import ray_session
from controlkit.errors import OutOfRoom, UserError
from controlkit.formats import SavedControl
from controlkit.formats.convert import dtype_name
from controlkit.precision import number_format, settle_threads
from controlkit.sample.jobs import BATCH, Faults, Job
from controlkit.sample.journal import Made
from controlkit.sample.loop import generate
from controlkit.sample.prepare import Prepared, load, prepare
from controlkit.sample.request import Step

Group = Sequence[Job]
Note = tuple[str, str]
"""(a note, the name of the job that it is on)."""

_TRIES = 3
"""How often a group is begun, where workers die of it, and a worker started before any is there."""


class JobMaker:
    """Jobs made in this process, on one base; controls that neighbours share are loaded once."""

    def __init__(self, base: Backbone) -> None:
        self.base = base
        threads = settle_threads(base.networks().values())
        sampler = own_name(base.noise)
        used = number_format(base.device.type)
        self._facts = {"format": used, "dtype": dtype_name(base.dtype), "threads": threads, "sampler": sampler}
        self._controls: dict[tuple[str, str | None], tuple[SavedControl, list[str]]] = {}
        self._batch = BATCH

    def check(self, groups: Sequence[Group]) -> Iterator[Note | None]:
        """The notes on all jobs, and ``None`` after each group; raises what ``prepare`` does, with the job's place."""
        faults = Faults()
        for group in groups:
            for job in group:
                with faults.at(job.where):
                    [prepared] = self._prepared([job])
                    loaded = [note for _, notes in self._controls.values() for note in notes]
                    yield from ((note, job.name) for note in dict.fromkeys([*loaded, *prepared.notes]))
            yield None
        faults.settle()

    def make(self, groups: Sequence[Group]) -> Generator[Step | Made | None, None, None]:
        """A ``Step`` for each step of a batch, then its pictures; ``None`` after each group."""
        for group in groups:
            yield from self._make(group)
            yield None

    def _make(self, group: Group) -> Iterator[Step | Made]:
        began, seconds, count, finished = time.perf_counter(), 0.0, 0, True
        prepared = self._prepared(group)
        together = len(list(takewhile(prepared[0].is_like, prepared[: self._batch])))
        left = iter(zip(group, prepared, strict=True))
        try:
            for record in generate(self.base, prepared, self._batch):
                if isinstance(record, Step):
                    count, finished = record.together, False
                    yield record
                    continue
                if not finished:
                    now = time.perf_counter()
                    began, seconds, finished = now, (now - began) / count, True
                    if count < together:  # memory ran out: the next groups need not find that out again
                        self._batch = count
                    together = 0
                job, one = next(left)
                facts = self._facts | {"annotators": one.annotators(), "batch": count}
                yield Made(job.name, record.pixels, one.settled(), facts, seconds)
        except UserError as error:
            others = " (or a picture made together with it)" if len(group) > 1 else ""
            raise type(error)(f"{group[0].where}{others}: {error}") from error

    def _prepared(self, group: Group) -> list[Prepared]:
        requests = [job.request for job in group]
        wanted = dict.fromkeys((one.name, one.annotator) for asked in requests for one in asked.controls)
        self._controls = {key: self._controls.get(key) or load(key[0], self.base, key[1]) for key in wanted}
        times = Counter(name for name, _ in wanted)
        loaded = {name: saved for (name, _), (saved, _) in self._controls.items() if times[name] == 1}
        return prepare(self.base, requests, loaded)


class _Worker:
    """A process of Ray's; its methods give (results, the error that ended them or None)."""

    def __init__(self, load: Callable[[str], Backbone], device: str, folder: str) -> None:
        self._load = partial(load, device)
        self._folder = folder

    def start(self, group: Group) -> tuple[list[Any], Exception | None]:
        """Load the base; relative paths begin where they do in the process that asks."""
        try:
            with suppress(OSError):  # another machine may not have the folder
                os.chdir(self._folder)
            self._maker = JobMaker(self._load())
        except (UserError, OSError) as error:
            return [], error
        return [], None

    def check(self, group: Group) -> tuple[list[Any], Exception | None]:
        """The notes on a group."""
        return self._all(self._maker.check([group]))

    def make(self, group: Group) -> tuple[list[Any], Exception | None]:
        """The pictures of a group."""
        return self._all(self._maker.make([group]))

    @staticmethod
    def _all(records: Iterator[Any]) -> tuple[list[Any], Exception | None]:
        found = []
        try:
            found += [one for one in records if not isinstance(one, Step) and one is not None]
        except (UserError, OSError) as error:
            return found, error
        return found, None


class Crew:
    """Workers of Ray's that take group after group; what a dead one had is given to another."""

    def __init__(self, ray: Any, hire: Callable[[], Any], count: int) -> None:
        self._ray, self._hire = ray, hire
        self._idle = deque[Any]()
        self._busy: dict[Any, tuple[Any, str, Group]] = {}
        self._tries = Counter[int]()
        for _ in range(count):
            self._start()

    def check(self, groups: Sequence[Group]) -> Iterator[Note | None]:
        """As ``JobMaker.check``."""
        yield from self._spread("check", groups)

    def make(self, groups: Sequence[Group]) -> Generator[Made | None, None, None]:
        """As ``JobMaker.make``, without steps; ``None`` once a second, too, while all are at work."""
        yield from self._spread("make", groups)

    def dismiss(self) -> None:
        """End the workers, whatever they are at."""
        for worker in [*self._idle, *(worker for worker, _, _ in self._busy.values())]:
            self._ray.kill(worker)

    def _start(self) -> None:
        worker = self._hire()
        self._busy[worker.start.remote(())] = worker, "start", ()

    def _spread(self, task: str, groups: Sequence[Group]) -> Generator[Any, None, None]:
        waiting = deque(groups)
        while waiting or any(kind != "start" for _, kind, _ in self._busy.values()):
            while waiting and self._idle:
                worker, group = self._idle.popleft(), waiting.popleft()
                self._busy[getattr(worker, task).remote(group)] = worker, task, group
            done, _ = self._ray.wait(list(self._busy), num_returns=1, timeout=1.0)
            for reference in done:
                worker, kind, group = self._busy.pop(reference)
                if (found := self._result(reference, worker, group)) is None:
                    if kind != "start":
                        waiting.appendleft(group)
                    continue
                results, failure = found
                if failure is not None:
                    raise failure
                self._idle.append(worker)
                yield from results
            yield None

    def _result(self, reference: Any, worker: Any, group: Group) -> tuple[list[Any], Exception | None] | None:
        """The result of a worker's task; None where it died of it, and another one is started."""
        errors = self._ray.exceptions
        try:
            found: tuple[list[Any], Exception | None] = self._ray.get(reference)
            return found
        except (errors.RayActorError, errors.WorkerCrashedError, errors.ObjectLostError, errors.OutOfMemoryError):
            with suppress(Exception):  # one that is only out of reach would go on with the group
                self._ray.kill(worker)
        self._tries[id(group)] += 1
        if self._tries[id(group)] >= _TRIES:
            where = f"at {group[0].where}" if group else "while it loaded the base"
            raise OutOfRoom(
                f"{_TRIES} workers have died {where}; most often memory ran out. Take fewer workers, a smaller size, "
                "or weights of half precision."
            )
        self._start()
        return None


@contextmanager
def hired(load: Callable[[str], Backbone], device: str, workers: int) -> Iterator[Crew]:
    """Workers of Ray's, each with a base that ``load`` gives for a device, a GPU each where Ray has some.

    See ``ray_session`` for the Ray that is used. Of GPUs there are no more workers than that.
    """
    cpus = max((os.cpu_count() or 1) // workers, 1)
    with ray_session(workers, cpus) as ray:
        gpus = 0 if device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
        count = min(workers, gpus) if gpus else workers
        actor = ray.remote(num_cpus=1 if os.environ.get("RAY_ADDRESS") else cpus, num_gpus=min(gpus, 1))(_Worker)
        crew = Crew(ray, partial(actor.remote, load, "cuda" if gpus else "cpu", str(Path.cwd())), count)
        try:
            yield crew
        finally:
            crew.dismiss()
