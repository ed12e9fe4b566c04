"""Limits of CPU time, memory and waiting for what tests do in their own process with files from strangers."""

import resource
import signal
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

WAIT = 60  # seconds on the clock: nothing is waited for longer, such as a pipe that nobody writes into


class OverLimit(BaseException):
    """A limit was passed. No Exception, so that no reader takes it for a damaged file."""


@contextmanager
def limited(cpu_seconds=10, growth=2**30):
    """Let the block use at most ``cpu_seconds`` of CPU time, and ``growth`` bytes more than the process holds now.

    The CPU time is that of all threads and of children that ended; a timer interrupts the block when it is used up, or
    after ``WAIT`` seconds on the clock. C code is interrupted when it comes back to Python. Growth is that of the
    largest resident size, of this process or of the children that ended. Only for a main thread; not to be nested.

    Raises:
        OverLimit: with the limit that was passed, and by how much.
    """

    def over(signum=None, frame=None):
        late.append(f"{_cpu() - cpu:.1f} s of CPU time of {cpu_seconds} s, {time.monotonic() - clock:.1f} s in all")
        raise OverLimit(late[0])

    late, cpu, clock, memory = [], _cpu(), time.monotonic(), watch_peak()
    before = signal.signal(signal.SIGPROF, over)
    main = threading.main_thread().ident
    waiting = threading.Timer(WAIT, lambda: signal.pthread_kill(main, signal.SIGPROF))
    waiting.daemon = True
    waiting.start()
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds, 1)  # again each second, for blocks that catch everything
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        waiting.cancel()
        waiting.join()
        signal.signal(signal.SIGPROF, before)
    if late or _cpu() - cpu > cpu_seconds:
        over()
    grown = growth_since(memory)
    if grown > growth:
        raise OverLimit(f"grew by {grown / 2**20:,.0f} MiB of {growth / 2**20:,.0f} MiB")


def _cpu():
    """Seconds of CPU time of this process, all its threads, and its children that ended."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in spent)


def watch_peak():
    """Set this process's largest resident size back to the present one, where the system can; for ``growth_since``."""
    with suppress(OSError):  # not Linux, or not allowed: then a peak of before hides smaller ones
        Path("/proc/self/clear_refs").write_text("5")
    return _peaks()


def growth_since(before):
    """Bytes by which this process grew since ``watch_peak``, or a child that ended is larger than it was then.

    A child is seen where it is larger than all that ended before.
    """
    (own, children), (own_before, children_before) = _peaks(), before
    return max(own, children if children > children_before else 0) - own_before


def _peaks():
    """The largest resident sizes in bytes: of this process, and of the children that ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        [own] = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    except (OSError, ValueError):
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return own, children
