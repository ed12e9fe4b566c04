"""Guards around one reading: what it opens, starts, connects to, prints and takes, and how it ends."""

import faulthandler
import io
import os
import resource
import signal
import site
import sys
import sysconfig
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import controlkit
from controlkit.errors import UserError
from limits import growth_since, watch_peak

CPU_SECONDS, WAIT, GROWTH, SENTENCE = 10, 100, 2**30, 1000
"""Limits of a reading: CPU time and time on the clock, in seconds; growth in bytes; letters of a refusal."""
SPACE = 4 * 2**30
"""Bytes of addresses that a worker may take more than it has, so that no case takes the machine's memory."""

PACKAGE = str(Path(controlkit.__file__).parent)
_OWN = str(Path(__file__).parents[1])
_STARTS = {
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.forkpty",
    "os.system",
    "os.spawn",
    "pty.spawn",
}
_CONNECTS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind"}
_READS = {"os.listdir", "os.scandir", "sqlite3.connect"}
_WRITES = {
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.truncate",
    "os.utime",
}
_SYSTEM = (
    "/proc/",
    "/sys/",
    "/usr/share/zoneinfo",
    "/usr/lib",
    "/lib",
    "/etc/ld.so",
    "/etc/localtime",
    "/etc/mime.types",
)
_SYSTEM += (
    "/etc/ssl",
    "/etc/os-release",
    "/usr/share/mime",
    "/etc/apache2/mime.types",
    "/etc/httpd",
    "/dev/null",
    "/dev/urandom",
)
_SECRET = ("environ", "/fd", "/mem", "/root", "/cwd")
"""Ends of the files of /proc that tell of a process what no reader needs."""


class BlockedError(OSError):
    """Something that a guard does not let happen."""


@dataclass(frozen=True)
class Outcome:
    """How a reading ended. ``kind``: ``value``, ``refused``, or what was found; ``where``: the same for one fault."""

    kind: str
    where: str = ""
    detail: str = ""
    seconds: float = 0.0
    growth: int = 0

    @property
    def is_allowed(self) -> bool:
        """Whether a reading may end so."""
        return self.kind in ("value", "refused")


@dataclass
class Guards:
    """The guards of one worker, installed for good: its own folder may be written, and ``given`` ones be read."""

    own: Path
    given: tuple[Path, ...]
    outside: Path
    watching: bool = False
    follows: bool = False
    seen: list[tuple[str, str]] = field(default_factory=list)

    def install(self) -> None:
        """Hook into the interpreter, limit memory, and have the system end this process by SIGPROF at a hang."""
        prefixes = {
            sys.prefix,
            sys.base_prefix,
            *site.getsitepackages(),
            sysconfig.get_paths()["stdlib"],
            PACKAGE,
            _OWN,
        }
        self._readable = tuple(os.path.realpath(path) + "/" for path in (*prefixes, *self.given, self.own))
        self._writable = (os.path.realpath(self.own) + "/",)
        self._forbidden = os.path.realpath(self.outside)
        self._traces = (self.own / "hang.txt").open("w+")
        self._words = (self.own / "words.txt").open("w+")
        for number in (1, 2):
            os.dup2(self._words.fileno(), number)
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
            faulthandler.register(number, file=self._traces, all_threads=False, chain=True)
        space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + SPACE
        resource.setrlimit(resource.RLIMIT_AS, (space, resource.getrlimit(resource.RLIMIT_AS)[1]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.dont_write_bytecode = True
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or bool(set(mode or "") & set("wax+"))
            self._check(path, writes)
        elif event in _READS:
            self._check(arguments[0], False)
        elif event in _WRITES:
            self._check(arguments[0], True, is_entry=event == "os.remove")
        elif event in _STARTS or event in _CONNECTS:
            self._block("process" if event in _STARTS else "network", f"{event} {str(arguments)[:200]}")
        elif event == "ctypes.dlopen" and "/" in str(arguments[0]):
            self._check(arguments[0], False)
        elif event == "pickle.find_class" and not str(arguments[0]).startswith(("torch", "collections", "numpy")):
            self._block("pickle", f"{event} {arguments}")

    def _check(self, path: Any, writes: bool, is_entry: bool = False) -> None:
        """``is_entry``: of a link it is itself that is meant, not where it leads: what is deleted."""
        if not isinstance(path, str | bytes | os.PathLike) or path in ("", ":memory:"):
            return  # the number of an open file
        try:
            named = os.fsdecode(path)
            home, name = os.path.split(named)
            real = f"{os.path.realpath(home)}/{name}" if is_entry else os.path.realpath(named)
        except ValueError:  # a zero byte: the system opens none such
            return
        if path in sys.path or real == f"/proc/{os.getpid()}/clear_refs":
            return  # folders that the interpreter looks for modules in; a measurement's own
        if writes and not (real + "/").startswith((*self._writable, "/dev/null")):
            self._block("foreign write", real)
        inside = (real + "/").startswith(self._readable) and (self.follows or not real.startswith(self._forbidden))
        system = real.startswith(_SYSTEM) and not real.endswith(_SECRET) and "/fd/" not in real
        if not (inside or system):
            self._block("foreign file", real)

    def _block(self, kind: str, what: str) -> None:
        self.watching = False  # the stack is read from source files
        frames = "".join(traceback.format_list(traceback.extract_stack()[:-3][-12:]))
        self.seen.append((kind, f"{what}\n{frames}"))
        self.watching = True
        raise BlockedError(13, f"{kind}: {what}"[:300])

    @contextmanager
    def _watched(self) -> Iterator[None]:
        self.seen.clear()
        self._words.truncate(0)
        self._words.seek(0)
        self._traces.truncate(0)
        self._traces.seek(0)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WAIT)
        self.watching = True
        try:
            yield
        finally:
            self.watching = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)

    def read(self, reader: Callable[[], object], follows: bool = False) -> Outcome:
        """Run a reader; never raises. ``follows``: whether it may read the files outside, which its input names."""
        self.follows = follows
        self._forget_reads()
        before, memory, kind, where, detail = time.process_time(), watch_peak(), "value", "", ""
        said = io.StringIO()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with self._watched(), redirect_stdout(said), redirect_stderr(said):
                    reader()
            except UserError as error:
                kind, detail = "refused", str(error)
                if len(detail) > SENTENCE or not detail.isprintable():
                    kind, where = "long or strange sentence", _place(error)
            except UncouthError as error:
                kind, where, detail = "terminal", error.command, str(error)
            except BaseException as error:
                kind, where = type(error).__name__, _place(error)
                detail = "".join(traceback.format_exception(error)[-8:])
        growth, seconds = growth_since(memory), time.process_time() - before
        if growth > GROWTH:
            kind, where, detail = "growth", detail[:80], f"{growth / 2**20:,.0f} MiB; {detail}"
        if strange := [one for one in caught if not _is_ours(one)]:
            one = strange[0]
            kind, where = "warning", f"{one.category.__name__} {Path(one.filename).name}:{one.lineno}"
            detail = str(one.message)
        words = Path(self._words.name).read_text(errors="replace")
        if (
            not words.replace("\n", "").isprintable() or len(words) > 4 * SENTENCE
        ):  # plain words of C code are let through
            kind, where, detail = "printed", words.strip()[:60], words
        if (opened := self._opened()) and not follows:
            kind, where, detail = "foreign file (native)", opened.name, f"{opened}; {detail}"
        if self.seen:
            kind, detail = self.seen[0]
            where = _frame_in(detail)
        return Outcome(kind, where, detail[-3000:], seconds, growth)

    def _forget_reads(self) -> None:
        """Set the times of the last reading back, which the file system sets anew at the next (``relatime``)."""
        self._watched_files = (
            [self.outside, *self.outside.rglob("*")] if not hasattr(self, "_watched_files") else self._watched_files
        )
        for path in self._watched_files:
            if path.stat().st_atime_ns:
                os.utime(path, ns=(0, path.stat().st_mtime_ns))

    def _opened(self) -> Path | None:
        """A file outside that C code read, which tells no hook."""
        return next((path for path in self._watched_files if path.is_file() and path.stat().st_atime_ns), None)

    def trace(self) -> str:
        """Where a worker was when the system ended it."""
        return Path(self._traces.name).read_text(errors="replace")


class UncouthError(Exception):
    """What a command wrote to the terminal that it may not."""

    def __init__(self, command: str, words: str) -> None:
        """``command``: its name; ``words``: what it wrote."""
        super().__init__(words)
        self.command = command


def _is_ours(warning: warnings.WarningMessage) -> bool:
    """Whether a warning is one of this package's notes, and can be shown as it is."""
    ours = warning.category is UserWarning and warning.filename.startswith((PACKAGE, _OWN))
    return ours and len(text := str(warning.message)) <= SENTENCE and text.isprintable()


def _place(error: BaseException) -> str:
    """The innermost line of the package's that an error passed, and the function that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    inner = [f"{frame.filename.removeprefix(PACKAGE)}:{frame.lineno}" for frame in frames if PACKAGE in frame.filename]
    last = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else ""
    return f"{inner[-1] if inner else ''} {last}"


def _frame_in(stack: str) -> str:
    lines = [line.strip() for line in stack.splitlines() if PACKAGE in line]
    return lines[-1].replace(PACKAGE, "") if lines else stack[:80]
