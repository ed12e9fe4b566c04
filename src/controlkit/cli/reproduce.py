"""The paper's tables and figures, by one command."""

from pathlib import Path
from typing import Annotated

import typer

from controlkit.cli.shared import BaseOption, DeviceOption, check_folder, loaded_base, progress_bars, say, say_table
from controlkit.errors import NotFound, nearest

app = typer.Typer()


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="A table or figure: see the list above.")],
    out: Annotated[Path, typer.Option(help="Folder for the table, its figures as JSON, and pictures.")],
    opponents: Annotated[
        Path | None,
        typer.Option(help="Folder of trained opponents (`controlkit baseline train`), in folders of their names."),
    ] = None,
    num: Annotated[
        int | None, typer.Option(help="Held-out scenes to measure on; by default 64 for tables, 32 for figures.", min=2)
    ] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=1)] = 20,
    quick: Annotated[bool, typer.Option("--quick", help="16 scenes in 10 steps: minutes.")] = False,
    base: BaseOption = "mini",
    device: DeviceOption = "auto",
) -> None:
    """Make a table or figure of the paper again, beside its numbers.

    - **table2**: how well label maps are found again in pictures that were made of them (IoU)
    - **table3**: FID, CLIP-score and aesthetic rating of such pictures, and obedience beside them
    - **fig8**: ControlNet, without zero convolutions, and ControlNet-lite, under four prompts
    - **fig-compare**: the same hints through PITI, Taming Transformers, LDM, Sketch-Guided Diffusion and ControlNet
    - **fig-cfg**: guidance without a prompt, and its weights by resolution
    - **fig-compose**: a pose and a depth map at once
    - **fig-limits**: a hint that shows another thing than a strong prompt says
    - **table1**: the user study, as pages to rank on, and with the referees as raters
    - **fig-auto**: default pictures, captioned and made again
    - **cost**: time and memory of a training step, against fine-tuning
    - **fig-transfer**: the controls on a base that was tuned to another style

    On held-out scenes of the embedded world, judged by its referees; the paper has ADE20K and OneFormer. Opponents
    without weights are named with the command that trains them.

    Example:

        controlkit reproduce table2 --quick --opponents runs/opponents --out runs/table2
    """
    from controlkit.precision import settle_threads
    from controlkit.reproduce import QUICK, REPORTS, Plan

    if name not in REPORTS:
        raise NotFound(f'There is no table or figure "{name}": {nearest(name, REPORTS)}')
    report = REPORTS[name]
    plan = Plan(opponents=opponents, **(QUICK if quick else {"num": num or report.num, "steps": steps}))
    check_folder(out)
    loaded = loaded_base(base, device)
    settle_threads(loaded.networks().values())
    with progress_bars() as progress:
        task = progress.add_task("measuring", total=len(report.rows), figures="")
        table = report.make(loaded, plan, out, lambda row: progress.update(task, advance=1, figures=row))
    say_table(report.title, report.head, [row.words() for row in table.rows], table.caption())
    say(f"The table, its figures and pictures are in {out}.")
