"""The command line: parses, calls the library, shows. Nothing is computed here.

Heavy imports stand inside the commands, so that ``controlkit --help`` answers at once.
"""

import errno
import logging
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import typer

from controlkit.cli import (
    annotating,
    baselines,
    bench,
    data,
    evaluating,
    pictures,
    reproduce,
    runs,
    serve,
    verify,
    weights,
)
from controlkit.cli.shared import complain, warn
from controlkit.errors import UserError, one_line, printable
from controlkit.files import home_path
from controlkit.hub import settle_places

app = typer.Typer(
    name="controlkit",
    help="Train, run and measure spatial control for text-to-image diffusion (ControlNet).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for commands in (pictures, annotating, runs, evaluating, weights, serve, reproduce, verify):
    app.add_typer(commands.app)
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")
app.add_typer(baselines.app, name="baseline")


_PLACES = {
    **dict.fromkeys(("ENOSPC", "EDQUOT", "EIO"), "Make room on the disk, or choose another path."),
    **dict.fromkeys(("EACCES", "EPERM", "EROFS"), "Mend the permissions, or choose another path."),
    **dict.fromkeys(("ENOTDIR", "EISDIR", "EEXIST", "ENAMETOOLONG", "ELOOP"), "Choose another path."),
}
"""Errors of a path or a disk, and what the user can do about them."""


def _sentence(error: Exception) -> str | None:
    """The sentence on what the user can do about an error; None where that is nothing."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and (advice := _PLACES.get(errno.errorcode.get(error.errno or 0, ""))):
        place = f" ({one_line(error.filename)})" if error.filename else ""
        return f"{error.strerror}{place}. {advice}"
    if isinstance(error, UnicodeEncodeError) and error.encoding == sys.getfilesystemencoding() != "utf-8":
        return (
            f"This locale ({error.encoding}) has no letters for the name {one_line(ascii(error.object))}: set "
            "LC_ALL=C.UTF-8, or PYTHONUTF8=1."
        )
    if usage := getattr(error, "format_message", None):  # of the library that reads the options
        command = getattr(getattr(error, "ctx", None), "command_path", "controlkit")
        return usage() and f"{usage().rstrip('.')}. See `{command} --help`."  # it has shown the help where that is ""
    torch = sys.modules.get("torch")  # not imported for this alone
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return (
            f"The device's memory does not hold this ({str(error).splitlines()[0]}). Take fewer or smaller pictures "
            "at once, or another device (--device cpu)."
        )
    return None


def _shown_as_notes() -> Callable[..., None]:
    """A way to show warnings: this package's as notes, each once, and others as Python does, in a line."""
    note = cache(warn)

    def show(message: Warning | str, category: type[Warning], file: str, line: int, *_: Any) -> None:
        if category is UserWarning and Path(__file__).parents[1] in Path(file).parents:
            note(str(message))
        else:
            complain(f"{file}:{line}: {category.__name__}: {message}")

    return show


def _show_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A mistake of ours, as Python shows it; the words in it may be anybody's."""
    for part in traceback.format_exception(kind, error, trace):
        for line in part.splitlines() if part.startswith("  File") else [part.strip()]:
            complain(line)


def _settle_output() -> None:
    """Have libraries' log lines printable too, and letters that a terminal does not have replaced."""
    made = logging.getLogRecordFactory()

    def record(*values: Any, **more: Any) -> logging.LogRecord:
        one = made(*values, **more)
        one.msg, one.args = printable(one.getMessage()), ()
        return one

    logging.setLogRecordFactory(record)
    sys.excepthook = _show_crash
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")


def _with_home(argument: str) -> str:
    """An argument whose path's ~ is replaced, which shells leave in ``--option=~/path`` and between quotes."""
    option, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{home_path(value)}" if value.startswith("~/") else argument


def main() -> None:
    """Run the command line; what the user can mend is one sentence and exit code 2."""
    _settle_output()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _shown_as_notes()
            settle_places()
            code = app([_with_home(argument) for argument in sys.argv[1:]], standalone_mode=False)
    except Exception as error:
        if (sentence := _sentence(error)) is None:
            raise
        if sentence:
            complain(f"controlkit: {sentence}")
        code = 2
    sys.exit(code)
