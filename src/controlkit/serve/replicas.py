"""The server on Ray Serve: one deployment with the APIs and the queue, and one of workers, a replica for each device.

There is one queue, so that a job is known whichever worker makes it, and the oldest goes first. What workers write, and
what is given up while they are at it, lies in the server's folder, which all machines must share.
"""

import asyncio
import logging
import os
import queue
import shutil
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from controlkit.cluster import ray_session
from controlkit.errors import Unsupported, UserError, one_line
from controlkit.files import held
from controlkit.serve.running import address_of, bound_sockets, check_extra
from controlkit.serve.settings import Settings
from controlkit.serve.worker import Hand, Maker, Message, carried_out, opened

log = logging.getLogger(__name__)

_ONGOING = 1024
"""Requests that the server answers at the same time, as without Ray."""


def application(settings: Settings, load: Callable[[str], Any], device: str, replicas: int) -> Any:
    """The server as an application of Ray Serve, with so many workers.

    ``load``: gives the base for a device, in a worker. Workers on a GPU ask Ray for one each.
    """
    serve = _ray_serve()
    open_studio = partial(opened, load, device, settings.state / "pictures", settings.folders)
    open_studio = partial(_at, Path.cwd(), open_studio)
    needs = {"num_cpus": 1, "num_gpus": float(device.startswith("cuda"))}
    return deployed(settings, open_studio, replicas, needs, serve)


def _at(folder: Path, open_studio: Callable[[], Maker]) -> Maker:
    """A studio opened where the command was given, if there is such a folder, as relative paths begin there."""
    if folder.is_dir():
        os.chdir(folder)
    return open_studio()


def deployed(settings: Settings, open_studio: Callable[[], Maker], replicas: int, needs: Any, serve: Any) -> Any:
    """The application with these studios; ``needs``: what a worker asks Ray for."""
    workers = serve.deployment(
        Worker, name="workers", num_replicas=replicas, max_ongoing_requests=1, ray_actor_options=needs
    ).bind(open_studio, settings.state)
    return serve.deployment(
        serve.ingress()(Server),
        name="server",
        num_replicas=1,
        max_ongoing_requests=_ONGOING,
        ray_actor_options={"num_cpus": 1},
    ).bind(settings, workers, replicas)


def _ray_serve() -> Any:
    try:
        from ray import serve
    except ImportError as error:
        raise Unsupported(
            f"Ray Serve needs the extra replicas ({error}). Install it with: pip install 'controlkit[replicas]'"
        ) from error
    return serve


# --- the server -----------------------------------------------------------------------------------------------------


class Server:
    """The deployment that clients speak to: all APIs, and the one queue."""

    def __init__(self, settings: Settings, workers: Any, replicas: int) -> None:
        """``workers``: the handle of their deployment."""
        from controlkit.serve.desk import Desk

        self._until = ExitStack()
        settings.state.mkdir(parents=True, exist_ok=True)
        self._until.enter_context(held(settings.state))
        shutil.rmtree(_given_up(settings.state, ""), ignore_errors=True)
        self._desk = Desk(settings, [partial(_hire, workers, settings.state)] * replicas)
        self._desk.open()
        self._until.callback(self._desk.close)

    def __serve_build_asgi_app__(self) -> Any:  # Ray Serve's name
        """The application, for Ray Serve."""
        from controlkit.serve.app import app_of

        return app_of(self._desk)

    def __del__(self) -> None:
        """End with the replica."""
        self._until.close()


def _given_up(folder: Path, name: str) -> Path:
    """The file that says that nobody wants the rest of a job."""
    return folder / "given-up" / name


def _hire(workers: Any, folder: Path) -> Hand:
    """A worker as the server holds it: whichever replica is free."""
    line = _Line(workers, folder)
    return Hand(line, line.kill)


class _Line:
    """In the place of a pipe to a process: calls of the workers' deployment."""

    def __init__(self, workers: Any, folder: Path) -> None:
        self._workers, self._folder = workers, folder
        self._messages: queue.Queue[Message | None] = queue.Queue()
        """None: it is broken."""
        self._first: list[Message | None] = []
        """The message that ``poll`` saw."""
        self._replica: Any = None
        """The actor that is at work."""
        self._call(lambda: iter([workers.begun.remote().result()]))

    def send(self, message: Message) -> None:
        """Give orders to a free replica, or say what is given up."""
        kind, told = message
        if kind == "orders":
            self._call(lambda: self._workers.options(stream=True).carry_out.remote(told))
            return
        for name in told:
            path = _given_up(self._folder, name)
            path.parent.mkdir(exist_ok=True)
            path.touch()

    def _call(self, call: Callable[[], Any]) -> None:
        def take() -> None:
            try:
                for message in call():
                    self._messages.put(message)
            except Exception as error:  # Ray's own kinds, for replicas that died in all their ways
                log.warning("A worker's replica ended: %s", one_line(error))
                self._messages.put(None)

        threading.Thread(target=take, daemon=True, name="controlkit-line").start()

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Whether there is a message, or none will come any more."""
        until = None if timeout is None else time.monotonic() + timeout
        while not self._first:
            try:
                left = None if until is None else max(until - time.monotonic(), 0)
                message = self._messages.get(timeout=left) if left or left is None else self._messages.get_nowait()
            except queue.Empty:
                return False
            if message and message[0] == "replica":
                self._replica = message[1]
            else:
                self._first.append(message)
        return True

    def recv(self) -> Message:
        """The next message; ``EOFError`` where the worker died."""
        self.poll(None)
        message = self._first.pop()
        if message is None:
            self._messages.put(None)
            raise EOFError
        if message[0] == "done":
            self._replica = None
            for name in message[1]:
                _given_up(self._folder, name).unlink(missing_ok=True)
        return message

    def kill(self) -> None:
        """End the replica that is at work; Ray Serve starts another."""
        replica, self._replica = self._replica, None
        if replica is not None:
            import ray

            ray.kill(replica)
        self._messages.put(None)

    def close(self) -> None:
        """Nothing is held."""


# --- the workers ----------------------------------------------------------------------------------------------------


class Worker:
    """The deployment of workers; each replica holds a base."""

    def __init__(self, open_studio: Callable[[], Maker], folder: Path) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._studio: Maker | None = None
        try:
            self._studio = open_studio()
            self._begun: Message = ("ready", self._studio.facts())
        except (UserError, OSError) as error:
            self._begun = ("broken", (type(error).__name__, str(error)))

    def begun(self) -> Message:
        """The first message of a worker."""
        return self._begun

    async def carry_out(self, orders: dict[str, str]) -> AsyncIterator[Message]:
        """Carry out orders, JSON by the jobs' ids: where that is, news, and at last the outcomes."""
        yield "replica", _this_actor()
        messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        is_left = threading.Event()

        def tell(news: dict[str, Any]) -> Collection[str]:
            messages.put(("news", news))
            return [name for name in orders if is_left.is_set() or _given_up(self._folder, name).exists()]

        def work() -> None:
            assert self._studio is not None
            with self._lock:  # where the server went away from a batch, it ends first
                messages.put(("done", carried_out(self._studio, orders, tell)))

        threading.Thread(target=work, daemon=True, name="controlkit-work").start()
        try:
            kind = ""
            while kind != "done":
                kind, told = await asyncio.to_thread(messages.get)
                yield kind, told
        finally:
            is_left.set()


def _this_actor() -> Any:
    import ray

    return ray.get_runtime_context().current_actor


# --- from the command line ------------------------------------------------------------------------------------------


def serve_replicas(
    settings: Settings, load: Callable[[str], Any], devices: Sequence[str], ready: Callable[[str], None]
) -> None:
    """Serve on Ray until SIGINT or SIGTERM; one worker for each device. Arguments and errors as ``serve``'s.

    A Ray that runs already, or that ``$RAY_ADDRESS`` names, is used; else one is started here and ended.
    """
    check_extra()
    serve = _ray_serve()
    device = devices[0].partition(":")[0]  # which of them, Ray says
    if not os.environ.get("RAY_ADDRESS"):  # else the port is one of the cluster's first machine
        with bound_sockets(settings):
            pass
    with ray_session(len(devices) + 1):
        signals = (signal.SIGINT, signal.SIGTERM)  # a shell starts what is in the background without the first
        before = [signal.signal(one, signal.default_int_handler) for one in signals]
        try:
            serve.start(http_options={"host": settings.host, "port": settings.port}, proxy_location="HeadOnly")
            serve.run(application(settings, load, device, len(devices)), name="controlkit", route_prefix="/")
            ready(address_of(settings))
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
        except RuntimeError as error:
            raise Unsupported(f"Ray Serve cannot start the server ({one_line(error)}).") from error
        finally:
            for one, handler in zip(signals, before, strict=True):
                signal.signal(one, handler)
            serve.shutdown()
