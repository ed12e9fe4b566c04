"""A server run: its desk opened, the application served by uvicorn until it is told to stop."""

import errno
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from controlkit.errors import Invalid, Unsupported, one_line
from controlkit.files import held
from controlkit.serve.settings import Settings


def serve(
    settings: Settings,
    load: Callable[[str], Any],
    devices: Sequence[str],
    ready: Callable[[str], None],
) -> None:
    """Serve until SIGINT or SIGTERM; one worker for each device.

    ``load``: gives the base for a device, in a worker. ``ready``: called with the address when the first worker has
    loaded it. Raises what that ended with, ``Unsupported`` where another server has the folder or an extra is missing,
    and ``Invalid`` where the port cannot be had.
    """
    check_extra()
    import uvicorn

    from controlkit.serve.app import app_of
    from controlkit.serve.desk import Desk
    from controlkit.serve.worker import hire, opened

    with bound_sockets(settings) as sockets, _folder(settings):
        pictures = settings.state / "pictures"
        hires = [partial(hire, partial(opened, load, device, pictures, settings.folders)) for device in devices]
        desk = Desk(settings, hires)
        desk.open()
        try:
            ready(address_of(settings))
            config = uvicorn.Config(
                app_of(desk),
                log_level="warning",
                access_log=False,
                server_header=False,
                date_header=False,
                ws="none",
                timeout_keep_alive=30,
                timeout_graceful_shutdown=5,
                limit_concurrency=1024,
            )
            _run(uvicorn.Server(config), sockets, settings)
        finally:
            desk.close()


def address_of(settings: Settings) -> str:
    """The address of a server, for people and clients."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{settings.port}"


@contextmanager
def bound_sockets(settings: Settings) -> Iterator[list[socket.socket]]:
    """Sockets at a server's port, to which nobody can connect yet; ``Invalid`` where the port cannot be had.

    One for each address that the host's name stands for. They are taken before a base is loaded: whoever gave a port
    that is in use is told at once.
    """
    found, faults = list[socket.socket](), list[OSError]()
    with ExitStack() as until:
        try:
            places = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
            for family, address in dict.fromkeys((one[0], one[4]) for one in places):
                made = until.enter_context(socket.socket(family))
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                try:
                    made.bind(address)
                    found.append(made)
                except OSError as error:
                    if error.errno != errno.EADDRNOTAVAIL:  # such as ::1, where IPv6 is off
                        raise
                    faults.append(error)
            if not found:
                raise faults[0]
        except OSError as error:
            raise _no_port(settings, error) from error
        yield found


def _no_port(settings: Settings, error: OSError) -> Invalid:
    """The error for a port that cannot be had."""
    if error.errno == errno.EADDRINUSE:
        return Invalid(
            f"Another program listens on port {settings.port} of {settings.host}, perhaps a server that still runs: "
            "end it, or give another --port."
        )
    return Invalid(
        f"Port {settings.port} of {one_line(settings.host)} cannot be listened on ({error.strerror}): give another "
        "--port or --host."
    )


@contextmanager
def _folder(settings: Settings) -> Iterator[None]:
    """The server's folder, made and kept for this process."""
    settings.state.mkdir(parents=True, exist_ok=True)
    with held(settings.state):
        yield


def check_extra() -> None:
    """``Unsupported`` where what a server needs is not installed."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise Unsupported(
            f"A server needs the extra serve ({error}). Install it with: pip install 'controlkit[serve]'"
        ) from error


def _run(server: Any, sockets: list[socket.socket], settings: Settings) -> None:
    """Run uvicorn's server until SIGINT or SIGTERM, which it raises once more when it has ended."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.run(sockets=sockets)
    except KeyboardInterrupt:
        pass
    except OSError as error:  # since it was bound, another began to listen there
        raise _no_port(settings, error) from error
    finally:
        signal.signal(signal.SIGTERM, before)
