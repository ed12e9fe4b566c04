"""Ray, connected to where it runs already, or started here and ended: processes of this machine or of a cluster."""

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from controlkit.errors import Unsupported, one_line


@contextmanager
def ray_session(workers: int, cpus: int = 1, modules: Sequence[str] = ("ray",)) -> Iterator[Any]:
    """Ray's module, for ``workers`` processes of so many ``cpus``; the other ``modules`` of Ray are imported, too.

    Where Ray runs already, or ``$RAY_ADDRESS`` names one, it is used as it is, so that its workers may be a cluster's;
    else it is started here and ended. ``Unsupported`` where Ray is not installed, or none answers at that address.
    """
    try:
        ray, *_ = [importlib.import_module(name) for name in modules]
    except ImportError as error:
        raise Unsupported(
            f"{workers} workers need Ray. Install it with: pip install 'controlkit[scale]', or leave out --workers."
        ) from error
    own = not ray.is_initialized()
    if own:
        _start_ray(workers * cpus)
    try:
        yield ray
    finally:
        if own:
            ray.shutdown()


def _start_ray(cpus: int) -> None:
    """Connect to the Ray that ``$RAY_ADDRESS`` names, as Ray itself does; else start one here."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(address=address, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise Unsupported(
                f"No Ray answers at RAY_ADDRESS, which is {address} ({one_line(error)}). Start one there, or unset it: "
                "a Ray of its own is started then."
            ) from error
    else:
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **options)
