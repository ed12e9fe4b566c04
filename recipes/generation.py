"""Figures and pictures of generation on ``mini``, for docs/generation.md.

    python recipes/generation.py figures --out docs               # needs npm once, for the emoji; 3/4 of an hour
    python recipes/generation.py pictures --out docs/generation   # from shipped weights alone; six minutes

``figures`` writes ``OUT/generation.json``, part by part: begun again, it goes on. Then it draws
``OUT/generation/steps.svg`` and prints the tables. ``pictures`` writes a sheet for each option, ``OUT/NAME.webp``.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from controlkit.backbones import load_base
from controlkit.errors import Invalid, nearest
from controlkit.formats import load_control
from controlkit.precision import settle_threads
from generation_figures import FIGURES, Lab, measure  # recipes/generation_figures.py
from generation_report import curve, tables  # recipes/generation_report.py
from generation_sheets import SHEETS, drawn, write_webp  # recipes/generation_sheets.py

app = typer.Typer(add_completion=False, help="Figures and pictures of generation on mini.")
console = Console(highlight=False)


def chosen(names: list[str] | None, known: list[str]) -> list[str]:
    """These names, or all that are known; ``Invalid`` for one that is not."""
    for name in names or []:
        if name not in known:
            raise Invalid(f'There is no "{name}": {nearest(name, known)}')
    return names or known


@app.command()
def figures(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(FIGURES)}; all by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for generation.json and generation/steps.svg.")] = Path("docs"),
    num: Annotated[int, typer.Option(help="Pictures to measure each condition on.", min=2)] = 32,
    quick: Annotated[bool, typer.Option(help="Try it out: 2 pictures, 1 step; the figures mean nothing.")] = False,
) -> None:
    """Measure what docs/generation.md states."""
    wanted = chosen(names, list(FIGURES))
    base = load_base("mini")
    settle_threads(base.networks().values())
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("steps of pictures", total=None)

        def on_step(count: int) -> None:
            progress.advance(task, count)

        lab = Lab(base, 2, 1, counts=(1, 2), on_step=on_step) if quick else Lab(base, num, on_step=on_step)
        report = measure(lab, out / "generation.json", wanted, console.print)
    if "by_steps" in report:
        curve(report["by_steps"], out / "generation" / "steps.svg")
    console.print(tables(report), soft_wrap=True)


@app.command()
def pictures(
    names: Annotated[list[str] | None, typer.Argument(help="Sheets to draw; all by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the sheets.")] = Path("docs/generation"),
) -> None:
    """Draw a sheet for each option."""
    wanted = chosen(names, [sheet.name for sheet in SHEETS])
    base = load_base("mini")
    settle_threads(base.networks().values())
    sheets = [sheet for sheet in SHEETS if sheet.name in wanted]
    used = dict.fromkeys(control.name for sheet in sheets for control in sheet.start().controls)
    loaded = {name: load_control(name, base) for name in used}
    for sheet in sheets:
        size = write_webp(out / f"{sheet.name}.webp", drawn(sheet, base, loaded))
        console.print(f"{out / sheet.name}.webp: {size / 1000:.0f} kB")


if __name__ == "__main__":
    app()
