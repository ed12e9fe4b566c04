"""The worker: a process of its own that holds the base, reads orders from a pipe, and says how far it is."""

import logging
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from controlkit.errors import UserError, one_line
from controlkit.serve.orders import Order, order_of

Pipe = Connection
Message = tuple[str, Any]
"""From a worker: ``ready`` and its facts; ``broken`` and (kind of error, sentence); ``news``, how far it is; ``done``
and the outcomes of jobs."""

log = logging.getLogger(__name__)


class Maker(Protocol):
    """The work of a worker: ``studio.Studio``, or a stand-in of tests."""

    def facts(self) -> dict[str, Any]:
        """All that requests are checked by, in plain values."""

    def carry_out(self, orders: dict[str, Order], tell: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The outcomes of jobs, by their ids; ``tell`` takes news, and says whether to stop."""


@dataclass(frozen=True)
class Hand:
    """A worker as the server holds it."""

    pipe: Any
    """Where orders go in and messages come out."""
    stop: Any
    """An event: the batch at work is to end after its next step."""
    kill: Callable[[], None]
    """End it at once."""


Hire = Callable[[], Hand]


def work(pipe: Any, stop: Any, open_studio: Callable[[], Maker]) -> None:
    """Carry out what comes through the pipe until it is closed; the loop of a worker.

    A message in is a dictionary of orders as JSON, by the jobs' ids.
    """
    try:
        try:
            studio = open_studio()
            pipe.send(("ready", studio.facts()))
        except (UserError, OSError) as error:
            pipe.send(("broken", (type(error).__name__, str(error))))
            return
        while True:
            orders = {name: order_of(text) for name, text in pipe.recv().items()}
            pipe.send(("done", _carried_out(studio, orders, partial(_tell, pipe, stop))))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the server has gone


def _tell(pipe: Any, stop: Any, news: dict[str, Any]) -> bool:
    pipe.send(("news", news))
    return bool(stop.is_set())


def _carried_out(studio: Maker, orders: dict[str, Order], tell: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The outcomes of jobs; a mistake of ours ends one batch and no more."""
    try:
        return studio.carry_out(orders, tell)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        log.error("%s", traceback.format_exc())
        words = f"This is a mistake of the server ({type(error).__name__}: {one_line(error)})."
        return {name: {"fault": "Mistake", "error": words} for name in orders}


def _main(pipe: Any, stop: Any, open_studio: Callable[[], Maker]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal; the server ends its workers
    work(pipe, stop, open_studio)


def hire(open_studio: Callable[[], Maker]) -> Hand:
    """Start a worker as a new process; ``open_studio`` must be found by its name from there."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    stop = context.Event()
    process = context.Process(target=_main, args=(theirs, stop, open_studio), daemon=True, name="controlkit-worker")
    process.start()
    theirs.close()

    def kill() -> None:
        process.kill()
        process.join(10)

    return Hand(ours, stop, kill)


def opened(load: Callable[[str], Any], device: str, folder: Path, controls: Path | None) -> Maker:
    """The studio of a worker, with the base that ``load`` gives for a device; of ``cuda:1`` it sees no other."""
    from controlkit.serve.studio import Studio

    device, _, number = device.partition(":")
    if number:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[int(number)] if int(number) < len(seen) and seen[0] else number
    return Studio(load(device), folder, controls)
