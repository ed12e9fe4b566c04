"""The command line in processes of its own, forked from one that has imported it: importing takes seconds each time."""

import itertools
import multiprocessing
import os
import pkgutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["controlkit.cli", "controlkit.train", "controlkit.formats", "accelerate"])


def die_at(place, number, when):
    """Have this process kill itself before or after (``when``) its numbered call of ``place``, a dotted name."""
    holder, name = place.rsplit(".", 1)
    holder = pkgutil.resolve_name(holder)
    real, calls = getattr(holder, name), itertools.count(1)

    def dying(*given, **more):
        own = next(calls) == number
        if own and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        found = real(*given, **more)
        if own:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(holder, name, dying)


@dataclass
class Ended:
    """How a process ended: its exit code, negative for a signal, and what it wrote."""

    code: int
    out: str
    err: str


def _command(arguments, environment, before, folder):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["controlkit", *arguments]
    exec(before, {})
    from controlkit.cli import main

    main()


def run_commands(arguments, environments, folder: Path, before="pass", timeout=200):
    """Run one command in as many processes as there are environments, all at once; ``before`` is code to run first."""
    started = []
    for index, environment in enumerate(environments):
        (own := folder / str(index)).mkdir(parents=True, exist_ok=True)
        given = ([*map(str, arguments)], dict(os.environ) | environment, before, own)  # the server's is older
        process = SERVER.Process(target=_command, args=given, daemon=True)
        process.start()
        started.append((process, own))
    for process, _ in started:
        process.join(timeout)
        assert process.exitcode is not None, "it did not end"
    return [Ended(process.exitcode, (own / "out").read_text(), (own / "err").read_text()) for process, own in started]
