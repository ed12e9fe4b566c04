"""Hints from pictures."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from controlkit.cli.shared import (
    DeviceOption,
    KindsCommand,
    OutOption,
    SizeOption,
    check_folder,
    key_values,
    on_cuda,
    parse_size,
    progress_bars,
    say,
    say_beside,
    warn,
)
from controlkit.cli.stopping import Stopping
from controlkit.errors import Invalid, Unsupported
from controlkit.files import home_path

if TYPE_CHECKING:
    from controlkit.data import HintFile

app = typer.Typer()


@app.command(
    cls=KindsCommand,
    epilog="Examples:\n\n    controlkit annotate canny photo.png drawing.jpg --out hints\n\n"
    "    controlkit annotate canny photos --set low=50 --set high=100 --size 512x512 --out hints\n\n"
    "    controlkit annotate lineart photos --workers 8 --out hints",
)
def annotate(
    annotator: Annotated[str, typer.Argument(metavar="ANNOTATOR", help="What makes the hints: {annotators}.")],
    images: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Pictures, or folders of them.")],
    out: OutOption = Path("out"),
    size: SizeOption = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "--option", metavar="KEY=VALUE", help="An option of the annotator: {options}. Repeatable."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes; several need Ray (the extra `scale`).", min=1)] = 1,
    device: DeviceOption = "auto",
) -> None:
    """Turn pictures into hints: `OUT/NAME.png` for each, in the folders that they lie in; lines are white on black.

    Run again to go on after an interruption: a hint of the same picture, annotator and options is left as it is.
    """
    from controlkit.annotators import annotator as find
    from controlkit.data import hint_files, write_hints

    kind = find(annotator)
    contract = kind.spec(**key_values(option, "--set", "KEY=VALUE, such as low=50"))
    sides = parse_size(size)
    check_folder(out)
    if lack := kind.lacks():
        raise Unsupported(lack)
    files = hint_files([home_path(path) for path in images], out)
    on = "cuda" if kind.weights and on_cuda(device) else "cpu"
    with Stopping("", "stopped: run again to go on"):
        _show(write_hints(files, contract, sides, on, workers), len(files), out)


def _show(files: Iterable["HintFile"], count: int, out: Path) -> None:
    """A line for each hint as it is written, a bar with pictures a second, and what could not be read at the end."""
    began, made, rate, faults = time.perf_counter(), 0, 0.0, []
    with progress_bars(disable=count == 1) as progress:
        task = progress.add_task("annotating", total=count, figures="")
        for one in files:
            made += not one.was_there and one.fault is None
            rate = made / (time.perf_counter() - began)
            progress.update(task, advance=1, figures=f"{rate:.1f} pictures a second")
            if one.fault:
                faults.append(one.fault)
            else:
                say_beside(progress, str(one.target))
            if one.is_empty:
                warn(f"{one.target} is empty: nothing was found in that picture")
    if faults and count > 1:
        raise Invalid(f"{len(faults)} of {count} pictures could not be annotated; the first: {faults[0]}")
    if faults:
        raise faults[0]
    if count > 1:
        there = f", {count - made} were there" if made < count else ""
        say(f"{made} hint{'s' if made != 1 else ''} made{there}, in {out}: {rate:.1f} pictures a second")
