"""The C library's heap, kept while pictures are made or a control is trained on a CPU.

glibc gives a large block back to the system as soon as it is freed, and the next step faults it in anew, 4 KB at a
time. In a virtual machine that costs more than the arithmetic on it. What is kept here is what the work holds at its
peak anyway; it is given back at the end.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock

_TRIM, _MAPPED, _MOST_MAPPED = -1, -3, -4  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX of <malloc.h>
_LARGEST = 32 * 2**20  # glibc raises its threshold of mapped blocks up to this by itself
_lock = Lock()
_holders = 0


@cache
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None  # musl has no mallopt


@contextmanager
def kept_heap(device_type: str) -> Iterator[None]:
    """Within it freed memory stays with the process and is used again, where work is done on a CPU and libc is glibc.

    For the whole process; where several hold it, until the last ends.
    """
    global _holders
    if device_type != "cpu" or (library := _glibc()) is None:
        yield
        return
    with _lock:
        _holders += 1
        library.mallopt(_MOST_MAPPED, 0)
        library.mallopt(_TRIM, -1)
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if not _holders:
                for name, value in ((_MOST_MAPPED, 65_536), (_MAPPED, _LARGEST), (_TRIM, 2 * _LARGEST)):
                    library.mallopt(name, value)
                library.malloc_trim(0)
