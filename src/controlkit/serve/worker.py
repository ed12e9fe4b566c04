"""The worker: a process of its own that holds the base, reads orders from a pipe, and says how far it is."""

import logging
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from controlkit.errors import UserError, one_line
from controlkit.serve.orders import Order, order_of
from controlkit.serve.settings import Folders

Pipe = Connection
Message = tuple[str, Any]
"""To a worker: ``orders``, those of jobs as JSON by the jobs' ids, and ``give_up``, ids of jobs of which nobody wants
the rest. From a worker: ``ready`` and its facts; ``broken`` and (kind of error, sentence); ``news``, how far it is;
``done`` and the outcomes of jobs."""
Tell = Callable[[dict[str, Any]], Collection[str]]
"""Takes how far the work is: ``step``, ``steps``, ``shares``, ``previews`` (PNGs) by the jobs' ids; or, as ``ended``,
the outcomes of jobs that end before the others. Gives the ids of jobs of which nobody wants the rest."""

log = logging.getLogger(__name__)


class Maker(Protocol):
    """The work of a worker: ``studio.Studio``, or a stand-in of tests."""

    def facts(self) -> dict[str, Any]:
        """All that requests are checked by, in plain values."""

    def carry_out(self, orders: dict[str, Order], tell: Tell) -> dict[str, Any]:
        """The outcomes of jobs, by their ids."""


@dataclass(frozen=True)
class Hand:
    """A worker as the server holds it."""

    pipe: Any
    """Where orders go in and messages come out."""
    kill: Callable[[], None]
    """End it at once."""


Hire = Callable[[], Hand]


class Line:
    """A worker's end of its pipe while it is at a batch: news out, and in what is given up."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._given_up: set[str] = set()

    def tell(self, news: dict[str, Any]) -> Collection[str]:
        """Send news (``Tell``)."""
        self._pipe.send(("news", news))
        while self._pipe.poll(0):
            _, names = self._pipe.recv()  # orders never come before the batch is done
            self._given_up.update(names)
        return self._given_up


def work(pipe: Any, open_studio: Callable[[], Maker]) -> None:
    """Carry out what comes through the pipe until it is closed; the loop of a worker."""
    try:
        try:
            studio = open_studio()
            pipe.send(("ready", studio.facts()))
        except (UserError, OSError) as error:
            pipe.send(("broken", (type(error).__name__, str(error))))
            return
        while True:
            kind, told = pipe.recv()
            if kind == "orders":  # else it gives up jobs of a batch that is done
                pipe.send(("done", carried_out(studio, told, Line(pipe).tell)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the server has gone


def carried_out(studio: Maker, orders: Mapping[str, str], tell: Tell) -> dict[str, Any]:
    """The outcomes of jobs, whose orders are JSON; a mistake of ours ends one batch and no more."""
    try:
        return studio.carry_out({name: order_of(text) for name, text in orders.items()}, tell)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        log.error("%s", traceback.format_exc())
        words = f"This is a mistake of the server ({type(error).__name__}: {one_line(error)})."
        return {name: {"fault": "Mistake", "error": words} for name in orders}


def _main(pipe: Any, open_studio: Callable[[], Maker]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal; the server ends its workers
    work(pipe, open_studio)


def hire(open_studio: Callable[[], Maker]) -> Hand:
    """Start a worker as a new process; ``open_studio`` must be found by its name from there."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_main, args=(theirs, open_studio), daemon=True, name="controlkit-worker")
    process.start()
    theirs.close()

    def kill() -> None:
        process.kill()
        process.join(10)

    return Hand(ours, kill)


def opened(load: Callable[[str], Any], device: str, folder: Path, folders: Folders) -> Maker:
    """The studio of a worker, with the base that ``load`` gives for a device; of ``cuda:1`` it sees no other."""
    from controlkit.serve.studio import Studio

    device, _, number = device.partition(":")
    if number:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[int(number)] if int(number) < len(seen) and seen[0] else number
    return Studio(load(device), folder, folders)
