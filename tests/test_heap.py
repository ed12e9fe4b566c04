"""Memory that is freed stays with the process while pictures are made, and is given back after."""

import ctypes
import resource
import sys
import threading
from pathlib import Path

import pytest
import torch

from controlkit import heap
from controlkit.heap import kept_heap

SIZE = 25_000_000
PAGES = 4 * SIZE // resource.getpagesize()
GLIBC = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
pytestmark = pytest.mark.skipif(not GLIBC, reason="only glibc's heap is kept")


def faults() -> int:
    """Pages that came anew while a block was filled and freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(SIZE).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


def test_a_freed_block_is_used_again_without_new_pages():
    assert faults() > 0.9 * PAGES
    with kept_heap("cpu"):
        faults()
        assert faults() < 0.01 * PAGES


def test_at_the_end_it_is_given_back_and_blocks_are_fresh_again():
    before = resident()
    with kept_heap("cpu"):
        faults()
        assert resident() - before > 0.9 * PAGES
    assert resident() - before < 0.1 * PAGES
    assert faults() > 0.9 * PAGES


def test_it_is_kept_until_the_last_holder_ends():
    first, second = kept_heap("cpu"), kept_heap("cpu")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    faults()
    assert faults() < 0.01 * PAGES
    second.__exit__(None, None, None)
    assert faults() > 0.9 * PAGES


def test_a_block_that_one_thread_freed_serves_another_pass_of_it():
    found = []
    with kept_heap("cpu"):
        thread = threading.Thread(target=lambda: found.extend(faults() for _ in range(2)))
        thread.start()
        thread.join()
    assert len(found) == 2  # a thread's own arena holds blocks of at most 64 MB: larger ones come from the common one


@pytest.mark.parametrize("library, device", [(None, "cpu"), (heap._glibc(), "cuda")])
def test_nothing_is_done_elsewhere(library, device, monkeypatch):
    monkeypatch.setattr(heap, "_glibc", lambda: library)
    with kept_heap(device):
        assert faults() > 0.9 * PAGES
