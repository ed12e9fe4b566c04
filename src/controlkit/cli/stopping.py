"""Ctrl-C and SIGTERM: the first asks long work to stop where it can go on from another time, the second ends it."""

import os
import signal
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

import typer

from controlkit.cli.shared import warn

_ECHO = 1.0
"""Seconds in which a launcher may pass on a signal that the terminal has sent already."""


class Stopping:
    """Within it signals are answered so, that of a closed terminal too; ``asked``: the first that came, or None.

    ``words`` are said at the first; without any it ends the work at once, too, for work that keeps nothing. Work that
    is ended by a ``KeyboardInterrupt`` says ``ended``, and the command ends.
    """

    def __init__(self, words: str, ended: str) -> None:
        self.asked: int | None = None
        self._words, self._ended, self._at = words, ended, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup sets
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._answer) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if kind is KeyboardInterrupt:
            warn(self._ended)
            raise typer.Exit(self.code) from None

    def is_asked(self) -> bool:
        """Whether a signal has come."""
        return self.asked is not None

    @property
    def code(self) -> int:
        """The exit code of a process that was stopped."""
        return 128 + (self.asked or signal.SIGINT)

    def _answer(self, number: int, frame: FrameType | None) -> None:
        first, self.asked = self.asked is None, self.asked or number
        if first and self._words:
            self._at = time.monotonic()
            with suppress(OSError):  # of a terminal that is closed
                os.write(2, f"\n{self._words}\n".encode())  # print may be busy in the line that was interrupted
        elif time.monotonic() - self._at > _ECHO:
            signal.signal(number, signal.SIG_DFL)  # the third ends even what does not listen
            raise KeyboardInterrupt
