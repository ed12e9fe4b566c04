"""The limits that other tests rely on really fail when they are passed."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import limits
from limits import OverLimit, limited


def test_what_stays_within_the_limits_passes_and_leaves_no_timer_behind():
    before = signal.getsignal(signal.SIGPROF)
    with limited():
        sum(range(1000))
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0) and signal.getsignal(signal.SIGPROF) is before
    assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())


def test_an_endless_loop_is_ended():
    with pytest.raises(OverLimit, match=r"of CPU time of 0\.1 s"), limited(cpu_seconds=0.1):
        while True:
            pass


def test_time_spent_in_one_call_of_c_is_counted_when_it_returns():
    with pytest.raises(OverLimit, match="of CPU time"), limited(cpu_seconds=0.05):
        sum(range(10_000_000))


def test_a_reader_that_catches_every_error_does_not_hide_that_it_was_too_slow():
    with pytest.raises(OverLimit, match="of CPU time"), limited(cpu_seconds=0.1):
        try:
            while True:
                pass
        except BaseException:
            pass


def test_growth_is_seen_though_a_larger_child_ended_before():
    subprocess.run([sys.executable, "-c", "bytearray(2**31)"], check=True)
    with pytest.raises(OverLimit, match=r"grew by .* of 50 MiB"), limited(growth=50 * 2**20):
        bytearray(100 * 2**20)


def test_growth_is_seen_though_the_memory_was_given_back():
    with pytest.raises(OverLimit, match=r"grew by .* of 50 MiB"), limited(growth=50 * 2**20):
        bytearray(100 * 2**20)
    with limited(growth=50 * 2**20):  # an earlier peak is not this block's
        bytearray(2**20)


def test_what_a_child_process_spends_counts():
    with pytest.raises(OverLimit, match="of CPU time"), limited(cpu_seconds=0.1):
        subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"], check=True)


def test_a_pipe_that_nobody_writes_into_is_waited_for_no_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "WAIT", 0.2)
    os.mkfifo(tmp_path / "pipe")
    begun = time.monotonic()
    with pytest.raises(OverLimit, match="in all"), limited():
        (tmp_path / "pipe").read_bytes()
    assert time.monotonic() - begun < 5


def test_the_blocks_own_error_comes_out_as_it_is():
    with pytest.raises(KeyError), limited():
        raise KeyError("mine")
