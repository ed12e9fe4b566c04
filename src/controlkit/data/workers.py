"""Work on many parts, here or in several processes by Ray Data (the extra ``scale``)."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from controlkit.cluster import ray_session
from controlkit.errors import UserError

if TYPE_CHECKING:
    import numpy as np

Part = TypeVar("Part")
Result = TypeVar("Result")

_ROWS = 16
_PARTS = 4096


def ranges_of(count: int) -> list[range]:
    """The places of ``count`` rows in parts worth sending: 16 rows, more where there would be too many parts."""
    step = max(_ROWS, -(-count // _PARTS))
    return [range(first, min(first + step, count)) for first in range(0, count, step)]


def parallel_map(
    work: Callable[[Part], Iterable[Result]], parts: Sequence[Part], workers: int = 1, stop_file: Path | None = None
) -> Iterator[Result]:
    """The results of ``work`` on each part, in the parts' order; by ``workers`` processes, or here where that is one.

    A ``UserError`` or ``OSError`` of the work is raised here at the place where it would have come without workers;
    these may have begun later parts meanwhile. ``stop_file``: a path that all workers see; they stop once a file lies
    there; by default one on this machine. See ``ray_session`` for the Ray that is used, and what it raises.
    """
    if workers < 2 or len(parts) < 2:
        for part in parts:
            yield from work(part)
        return
    with ray_session(workers, modules=("ray", "ray.data", "ray.cloudpickle")) as ray, TemporaryDirectory() as scratch:
        stop_file = stop_file or Path(scratch) / "stop"
        context = ray.data.DataContext.get_current().copy()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        with ray.data.DataContext.current(context):
            places = ray.data.from_items([{"part": i} for i in range(len(parts))], override_num_blocks=len(parts))
            done = places.map_batches(
                _results_of,
                batch_size=1,
                compute=ray.data.TaskPoolStrategy(size=workers),
                fn_kwargs={"held": ray.put((work, list(parts))), "stop_file": stop_file},
            )
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        rows = iter(done.iter_rows())
        try:
            for row in rows:
                results, failure = ray.cloudpickle.loads(row["done"])
                yield from results
                if failure is not None:
                    raise failure
        finally:
            # To the end, whatever happens: Ray, shut down while Ray Data still reads, takes this process with it.
            stop_file.touch()
            for _ in rows:
                pass
            stop_file.unlink(missing_ok=True)


def _results_of(batch: Mapping[str, "np.ndarray"], held: Any, stop_file: Path) -> dict[str, list[bytes]]:
    """In a worker: the results of the parts whose numbers it is sent, until it is to stop."""
    from ray import cloudpickle

    work, parts = _unpacked(held)
    done = []
    for place in batch["part"].tolist():
        results: list[Any] = []
        failure: Exception | None = None
        try:
            for result in () if stop_file.exists() else work(parts[place]):
                results.append(result)  # results before an error are kept
                if stop_file.exists():
                    break
        except (UserError, OSError) as error:
            failure = error
        done.append(cloudpickle.dumps((results, failure)))
    return {"done": done}


@lru_cache(maxsize=1)
def _unpacked(held: Any) -> Any:
    """The work and its parts, unpacked once a worker: a listing may be long."""
    import ray

    return ray.get(held)
