"""The paper's tables and figures, one command each."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from controlkit.cli.shared import BaseOption, DeviceOption, check_folder, loaded_base, progress_bars, say, say_table

if TYPE_CHECKING:
    from controlkit.backbones import Backbone
    from controlkit.reproduce import Comparison, Figure8, Plan, Table2, Table3

app = typer.Typer(help="Make the paper's tables and figures again, beside its numbers.", no_args_is_help=True)
ReportOption = Annotated[Path, typer.Option("--out", help="Folder for the table, its figures as JSON, and pictures.")]
OpponentsOption = Annotated[
    Path | None,
    typer.Option(help="Folder of trained opponents (`controlkit baseline train`), in folders of their names."),
]
NumOption = Annotated[int, typer.Option(help="Held-out scenes to measure on.", min=2)]
SamplingOption = Annotated[int, typer.Option("--steps", help="Sampling steps.", min=1)]
QuickOption = Annotated[bool, typer.Option("--quick", help="16 scenes in 10 steps: minutes.")]


@app.callback()
def _commands() -> None:
    """Make the paper's tables and figures again, beside its numbers."""


@app.command()
def table2(
    out: ReportOption,
    opponents: OpponentsOption = None,
    num: NumOption = 64,
    steps: SamplingOption = 20,
    quick: QuickOption = False,
    base: BaseOption = "mini",
    device: DeviceOption = "auto",
) -> None:
    """Table 2: how well label maps are found again in pictures that were made of them (IoU).

    The label maps are of held-out rendered scenes, and the observer of their world segments; the paper has ADE20K and
    OneFormer. Opponents without weights are named with the command that trains them.

    Example:

        controlkit reproduce table2 --quick --opponents runs/opponents --out runs/table2
    """
    from controlkit.reproduce import make_table2
    from controlkit.reproduce.table2 import HEAD, ORDER

    plan = _plan(num, steps, quick, opponents)
    _make(make_table2, loaded_base(base, device), plan, out, [*ORDER, "floor"], HEAD)


@app.command()
def table3(
    out: ReportOption,
    opponents: OpponentsOption = None,
    num: NumOption = 64,
    steps: SamplingOption = 20,
    quick: QuickOption = False,
    base: BaseOption = "mini",
    device: DeviceOption = "auto",
) -> None:
    """Table 3: FID, CLIP-score and aesthetic rating of pictures made of label maps, and obedience beside them.

    By the referee of the embedded world, on held-out rendered scenes; the paper has ADE20K. Opponents without weights
    are named with the command that trains them.

    Example:

        controlkit reproduce table3 --quick --opponents runs/opponents --out runs/table3
    """
    from controlkit.reproduce import make_table3
    from controlkit.reproduce.table3 import HEAD, ORDER

    _make(make_table3, loaded_base(base, device), _plan(num, steps, quick, opponents), out, ORDER, HEAD)


@app.command()
def fig8(
    out: ReportOption,
    opponents: OpponentsOption = None,
    num: NumOption = 32,
    steps: SamplingOption = 20,
    quick: QuickOption = False,
    base: BaseOption = "mini",
    device: DeviceOption = "auto",
) -> None:
    """Figure 8: ControlNet, without zero convolutions, and ControlNet-lite, under four prompts.

    None, an insufficient, a conflicting and a perfect prompt; fidelity to the label map, and a picture of each.

    Example:

        controlkit reproduce fig8 --quick --opponents runs/opponents --out runs/fig8
    """
    from controlkit.reproduce import make_fig8
    from controlkit.reproduce.fig8 import HEAD, ORDER

    _make(make_fig8, loaded_base(base, device), _plan(num, steps, quick, opponents), out, ORDER, HEAD)


@app.command("fig-compare")
def fig_compare(
    out: ReportOption,
    opponents: OpponentsOption = None,
    num: NumOption = 32,
    steps: SamplingOption = 20,
    quick: QuickOption = False,
    base: BaseOption = "mini",
    device: DeviceOption = "auto",
) -> None:
    """The comparison with earlier methods: the same hints through each, side by side, with the fidelity of each.

    PITI, Taming Transformers, LDM and ControlNet on label maps; Sketch-Guided Diffusion at two strengths and
    ControlNet on edges.

    Example:

        controlkit reproduce fig-compare --quick --opponents runs/opponents --out runs/compare
    """
    from controlkit.reproduce import make_comparison
    from controlkit.reproduce.compare import HEAD, ORDER

    _make(make_comparison, loaded_base(base, device), _plan(num, steps, quick, opponents), out, ORDER, HEAD)


def _plan(num: int, steps: int, quick: bool, opponents: Path | None) -> "Plan":
    from controlkit.reproduce import QUICK, Plan

    return Plan(opponents=opponents, **(QUICK if quick else {"num": num, "steps": steps}))


def _make(
    make: "Callable[..., Comparison | Figure8 | Table2 | Table3]",
    base: "Backbone",
    plan: "Plan",
    out: Path,
    order: Sequence[str],
    head: Sequence[str],
) -> None:
    """Make a table, with a bar of its rows, and show it."""
    from controlkit.precision import settle_threads

    check_folder(out)
    settle_threads(base.networks().values())
    with progress_bars() as progress:
        task = progress.add_task("measuring", total=len(order), figures="")
        table = make(base, plan, out, lambda name: progress.update(task, advance=1, figures=name))
    say_table(
        make.__name__.removeprefix("make_").capitalize(), head, [row.words() for row in table.rows], table.caption()
    )
    say(f"The table, its figures and pictures are in {out}.")
