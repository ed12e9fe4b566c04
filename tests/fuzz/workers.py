"""Cases run in processes forked from one that has imported everything; what is found, and how to see it again."""

import json
import os
import selectors
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

from corpus import KINDS, Kind, place_case, rng, samples_of, write_elsewhere
from guards import Guards, Outcome
from mutate import ELSEWHERE, OUTSIDE, mutated
from readers import READERS, Setting

SHAPES = [
    *sorted(ELSEWHERE, key=lambda name: "." in name),
    "/etc/passwd",
    "/dev/zero",
    "loop",
    "folder",
    "empty",
    "gone",
]
"""What a file may be instead of a file: a link there, a link to itself, a folder, nothing in it, nothing.

Links to elsewhere are the user's own where the user named the file, and in data sets (``tree_of``) but for texts.
"""


@dataclass(frozen=True)
class Case:
    """One mutated sample of a kind, by its number; ``reader``: the only one to read it, where not all due ones do."""

    kind: str
    number: int
    reader: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.number}" + (f":{self.reader}" if self.reader else "")

    @classmethod
    def of(cls, text: str) -> "Case":
        """A case as ``str`` writes it."""
        kind, number, *reader = text.split(":")
        return cls(kind, int(number), *reader)


@dataclass
class Report:
    """What came of a campaign: outcomes by kind of input, and the findings that are alike, by what they are."""

    files: Counter = field(default_factory=Counter)
    outcomes: Counter = field(default_factory=Counter)
    seconds: defaultdict = field(default_factory=lambda: defaultdict(float))
    findings: defaultdict = field(default_factory=lambda: defaultdict(list))

    def add(self, case: Case, reader: str, outcome: Outcome) -> None:
        """Count one reading."""
        self.outcomes[case.kind, outcome.kind if outcome.is_allowed else "finding"] += 1
        self.seconds[case.kind, reader] += outcome.seconds
        if not outcome.is_allowed:
            self.findings[outcome.kind, outcome.where].append((Case(case.kind, case.number, reader), outcome))

    def words(self, seed: int) -> str:
        """The whole of it as a text: counts by kind, then the findings, with a command for each."""
        lines = [f"{sum(self.files.values()):,} files, seed {seed}; read, refused, found by kind:"]
        for kind, count in sorted(self.files.items()):
            of = [self.outcomes[kind, one] for one in ("value", "refused", "finding")]
            spent = sum(seconds for (name, _), seconds in self.seconds.items() if name == kind)
            lines.append(
                f"  {kind:16} {count:6,} files {of[0]:7,} read {of[1]:7,} refused {of[2]:5,} found  {spent:7.1f} s"
            )
        for (kind, where), cases in sorted(self.findings.items(), key=lambda one: -len(one[1])):
            case, outcome = cases[0]
            lines += [f"{len(cases)} x {kind} at {where}", f"    FUZZ_SEED={seed} FUZZ_CASE='{case}' pytest -m fuzz"]
            lines += [f"    {line}" for line in outcome.detail.strip().splitlines()[-6:]]
        return "\n".join(lines)


def make_case(kind: Kind, number: int, seed: int, samples: Sequence[Path], target: Path) -> None:
    """A right sample in ``target``, with one file of it mutated, and sometimes another one.

    Numbers below 0 are the right samples themselves, from the last one on.
    """
    draw = rng(seed, kind.name, number)
    place_case(samples[number] if number < 0 else draw.choice(samples), target)
    files = sorted({path for pattern in kind.files for path in target.glob(pattern) if path.is_file()})
    for path in [draw.choice(files) for _ in range(1 + (draw.random() < 0.15))] if number >= 0 else ():
        if draw.random() < 0.04:
            own = path.relative_to(target)
            named = own.match(kind.main) if "*" in kind.main else own == Path(kind.main)  # also one that is gone
            shapes = SHAPES[-5:] if named or kind.is_linked else SHAPES
            if "listing" in kind.readers:  # links to folders in a data set are the user's, and followed
                shapes = [shape for shape in shapes if shape not in ("base", "set")]
            _reshape(path, target, draw, shapes)
            continue
        data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        linked = path.is_symlink() or not path.is_dir()  # most are: to the right sample
        path.unlink(missing_ok=True) if linked else shutil.rmtree(path)
        path.write_bytes(mutated(path.name, data, draw))


def _reshape(path: Path, target: Path, draw: Random, shapes: Sequence[str]) -> None:
    """Something else where a file was."""
    shape = draw.choice(shapes)
    path.unlink(missing_ok=True) if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)
    if shape == "folder":
        path.mkdir()
    elif shape == "empty":
        path.touch()
    elif shape == "loop":
        path.symlink_to(path.name)
    elif shape != "gone":
        path.symlink_to(os.path.relpath(target.parent / OUTSIDE / shape, path.parent) if shape in ELSEWHERE else shape)


@dataclass
class Campaign:
    """Cases to be run: right samples below ``root``, made for the base ``toy``; findings are kept in ``out``."""

    root: Path
    toy: Path
    out: Path
    seed: int
    workers: int = 2
    minutes: float = 30

    def prepare(self, kinds: Sequence[Kind]) -> None:
        """Make the right samples, once for all workers."""
        for kind in kinds:
            samples_of(kind, self.root / "corpus" / kind.name.replace(" ", "-"), self.toy)
        if not (self.root / OUTSIDE).is_dir():
            (self.root / OUTSIDE).mkdir()
            write_elsewhere(self.root / OUTSIDE, self.toy)

    def run(self, cases: Sequence[Case]) -> Report:
        """Run cases, each in one of the workers; ends before all of them where the time is over."""
        report, ends = Report(), time.monotonic() + 60 * self.minutes
        waiting, selector = list(reversed(cases)), selectors.DefaultSelector()
        for _ in range(self.workers):
            self._start(waiting, selector)
        while selector.get_map():
            for key, _ in selector.select():
                worker: _Worker = key.data
                for line in worker.lines():
                    self._take(worker, line, report)
                if worker.ended:
                    selector.unregister(worker.pipe)
                    self._bury(worker, report)
                    waiting += reversed(worker.cases[worker.done :])
                    if time.monotonic() < ends:
                        self._start(waiting, selector)
        return report

    def _start(self, waiting: list[Case], selector: selectors.BaseSelector) -> None:
        share = [waiting.pop() for _ in range(min(len(waiting), 100))]
        if share:
            worker = _Worker.fork(self, share)
            selector.register(worker.pipe, selectors.EVENT_READ, worker)

    def _take(self, worker: "_Worker", line: str, report: Report) -> None:
        what, *values = json.loads(line)
        if what == "begun":
            worker.reading = values[0]
        elif what == "read":
            worker.reading = ""
            self._note(report, worker.cases[worker.done], values[0], Outcome(**values[1]))
        else:
            report.files[worker.cases[worker.done].kind] += 1
            worker.done += 1

    def _note(self, report: Report, case: Case, reader: str, outcome: Outcome) -> None:
        report.add(case, reader, outcome)
        if not outcome.is_allowed and len(report.findings[outcome.kind, outcome.where]) <= 3:
            kept = self.out / f"{case.kind}-{case.number}".replace(" ", "-")
            kept.mkdir(parents=True, exist_ok=True)
            with (kept / "found.txt").open("a") as file:
                where = f"seed {self.seed} case {case.kind}:{case.number}:{reader}"
                file.write(f"{where}: {outcome.kind} at {outcome.where}\n{outcome.detail}\n\n")
            if not (kept / "case").exists():
                make_case(_kind(case.kind), case.number, self.seed, self.samples(case.kind), kept / "case")

    def samples(self, kind: str) -> list[Path]:
        """The right samples of a kind."""
        return samples_of(_kind(kind), self.root / "corpus" / kind.replace(" ", "-"), self.toy)

    def _bury(self, worker: "_Worker", report: Report) -> None:
        """Note how a worker ended that had not done all."""
        _, status = os.waitpid(worker.process, 0)
        if worker.reading:
            number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            kind = {signal.SIGPROF: "hang", signal.SIGALRM: "waits"}.get(
                number, f"crash ({signal.Signals(number).name if number else status})"
            )
            trace = worker.folder / "hang.txt"
            stack = trace.read_text(errors="replace") if trace.is_file() else ""
            inner = [line.strip() for line in stack.splitlines() if "controlkit/" in line]
            where = inner[0].rpartition("controlkit/")[2] if inner else stack[:100]
            self._note(report, worker.cases[worker.done], worker.reading, Outcome(kind, where, stack[:3000], 10))
            report.files[worker.cases[worker.done].kind] += 1
            worker.done += 1
        elif worker.done < len(worker.cases):
            raise RuntimeError(f"A worker ended by itself ({status}): {(worker.folder / 'error.txt').read_text()}")
        shutil.rmtree(worker.folder, ignore_errors=True)


def _kind(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)


@dataclass
class _Worker:
    """A process that runs some cases, and tells a line for whatever it begins and ends."""

    process: int
    pipe: int
    folder: Path
    cases: list[Case]
    done: int = 0
    reading: str = ""
    ended: bool = False
    rest: bytes = b""

    @classmethod
    def fork(cls, campaign: Campaign, cases: list[Case]) -> "_Worker":
        folder = Path(tempfile.mkdtemp(prefix="w", dir=campaign.root))
        reads, writes = os.pipe()
        process = os.fork()
        if process:
            os.close(writes)
            return cls(process, reads, folder, cases)
        os.close(reads)
        try:
            _work(campaign, cases, folder, lambda *values: os.write(writes, (json.dumps(values) + "\n").encode()))
            code = 0
        except BaseException:
            (folder / "error.txt").write_text(traceback.format_exc())
            code = 1
        os._exit(code)

    def lines(self) -> Iterator[str]:
        """What came; ``ended`` is set at the end."""
        data = os.read(self.pipe, 2**16)
        self.ended = not data
        if self.ended:
            os.close(self.pipe)
        *whole, self.rest = (self.rest + data).split(b"\n")
        yield from (line.decode() for line in whole)


def _work(campaign: Campaign, cases: list[Case], folder: Path, tell: Callable[..., object]) -> None:
    """Run cases in this process, which is forked for them alone."""
    shutil.copytree(campaign.root / OUTSIDE, folder / OUTSIDE, copy_function=shutil.copyfile)
    setting = Setting.of(folder, campaign.toy)
    guards = Guards(folder, (campaign.toy,), folder / OUTSIDE)
    guards.install()
    for case in cases:
        kind, target = _kind(case.kind), folder / "case"
        for name in kind.readers:
            due = name == case.reader if case.reader else case.number < 0 or case.number % READERS[name].every == 0
            if not due:
                continue
            make_case(kind, case.number, campaign.seed, campaign.samples(kind.name), target)  # anew: some write into it
            main = target / kind.main if "*" not in kind.main else next(target.glob(kind.main), target / "gone")
            tell("begun", name)
            os.chdir(target)
            outcome = guards.read(lambda main=main, name=name: READERS[name].read(main, setting), READERS[name].follows)
            os.chdir(folder)
            tell("read", name, asdict(outcome))
            _clear(target)
        tell("ended")


def _clear(folder: Path) -> None:
    for path in folder.rglob("*"):
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        raise RuntimeError(f"{folder} could not be deleted")


def shared(files: int, kinds: Sequence[Kind] = KINDS) -> list[Case]:
    """So many cases of all kinds, by their shares, in turn; of each at least 500 in 21,000."""
    total = sum(kind.share for kind in kinds)
    counts = {kind.name: -(-files * kind.share // total) for kind in kinds}
    most = max(counts.values())
    return [Case(name, number) for number in range(most) for name, count in counts.items() if number < count]
