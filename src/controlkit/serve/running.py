"""A server run: its desk opened, the application served by uvicorn until it is told to stop."""

import signal
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from controlkit.errors import Unsupported
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
    loaded it. Raises what that ended with, and ``Unsupported`` where another server has the folder or an extra is
    missing.
    """
    check_extra()
    import uvicorn

    from controlkit.serve.app import app_of
    from controlkit.serve.desk import Desk
    from controlkit.serve.worker import hire, opened

    settings.state.mkdir(parents=True, exist_ok=True)
    with held(settings.state):
        pictures = settings.state / "pictures"
        hires = [partial(hire, partial(opened, load, device, pictures, settings.folders)) for device in devices]
        desk = Desk(settings, hires)
        desk.open()
        try:
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            ready(f"http://{host}:{settings.port}")
            config = uvicorn.Config(
                app_of(desk),
                host=settings.host,
                port=settings.port,
                log_level="warning",
                access_log=False,
                server_header=False,
                date_header=False,
                ws="none",
                timeout_keep_alive=30,
                timeout_graceful_shutdown=5,
                limit_concurrency=1024,
            )
            _run(uvicorn.Server(config))
        finally:
            desk.close()


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


def _run(server: Any) -> None:
    """Run uvicorn's server until SIGINT or SIGTERM, which it raises once more when it has ended."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.run()
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
