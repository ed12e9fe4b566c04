"""The paper's tables and figures, by one command."""

from pathlib import Path
from typing import Annotated, Any

import typer

from controlkit.cli.shared import BaseOption, DeviceOption, check_folder, loaded_base, progress_bars, say, say_table
from controlkit.errors import Invalid, NotFound, nearest

app = typer.Typer()


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="A table or figure of the list below, such as `table2`.")],
    out: Annotated[Path, typer.Option(help="Folder for the table, its figures as JSON, and pictures.")],
    opponents: Annotated[
        Path | None,
        typer.Option(help="Folder of trained opponents (`controlkit baseline train`), in folders of their names."),
    ] = None,
    num: Annotated[
        int | None, typer.Option(help="Held-out pairs to measure on; by default the table's or figure's own.", min=2)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps; by default 20.", min=1)] = None,
    share: Annotated[
        float | None,
        typer.Option(
            help="Of figures that train: the share of each training's full length; by default 1.", min=0.001, max=100
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="16 pairs in 10 steps; or trainings of a few steps: minutes.")
    ] = False,
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
    - **fig-scale**: training on 100 to 100,000 pictures
    - **fig-convergence**: sudden convergence: obedience and FID at every checkpoint of six trainings
    - **fig-depth**: a small depth ControlNet beside the large depth model: can they be told apart?

    Measured on held-out pairs by the referees of the embedded world; the paper has ADE20K and OneFormer. Opponents
    without weights are named with the command that trains them; in a folder that has their rows of an earlier run with
    the same settings, these are kept. The last four train in the folder: run the same command again to go on.

    Examples:

        controlkit reproduce table2 --quick --opponents runs/opponents --out runs/table2

        controlkit reproduce fig-convergence --share 0.5 --out runs/fig-convergence
    """
    from controlkit.cli.stopping import Stopping
    from controlkit.precision import settle_threads
    from controlkit.reproduce import REPORTS, Plan

    if name not in REPORTS:
        raise NotFound(f'There is no table or figure "{name}": {nearest(name, REPORTS)}')
    report = REPORTS[name]
    if share and not report.trains:
        raise Invalid(f"{name} trains nothing: leave out --share.")
    given = {"num": num, "steps": steps, "share": share}
    if quick and (both := [f"--{key}" for key, value in given.items() if value]):
        raise Invalid(f"--quick chooses {both[0]} itself: leave out one of the two.")
    check_folder(out)
    loaded = loaded_base(base, device)
    settle_threads(loaded.networks().values())
    words = "stopping after this step; again, to end at once" if report.trains else ""
    stopping = Stopping(words, "stopped" + (": run again to go on" if report.trains else ""))
    with stopping, progress_bars() as progress:
        task = progress.add_task("measuring", total=len(report.rows), figures="")

        def show(words: str, rows: int = 0) -> None:
            progress.update(task, advance=rows, figures=words)

        asked: dict[str, Any] = {key: value for key, value in given.items() if value}
        asked = {"num": report.num} | (dict(report.quick) if quick else asked)
        plan = Plan(opponents=opponents, on_step=show, stopping=stopping.is_asked, **asked)
        table = report.make(loaded, plan, out, lambda row: show(row, 1))
    say_table(report.title, report.head, [row.words() for row in table.rows], table.caption())
    say(f"The table, its figures and pictures are in {out}.")
