"""Training runs: to start or go on, to watch, to measure what came of them."""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from controlkit.cli.shared import (
    DeviceOption,
    finite,
    loaded_base,
    on_cuda,
    progress_bars,
    say,
    say_beside,
    terminal,
    warn,
)
from controlkit.errors import Invalid, printable

if TYPE_CHECKING:
    from controlkit.train import Ending, Record
    from controlkit.train.recipe import Recipe

app = typer.Typer()
FromStepOption = Annotated[
    int | None,
    typer.Option(help="Resume from the checkpoint of this step; later ones, and a later `OUT/best`, are deleted."),
]


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Examples:\n\n    controlkit train recipes/smoke.yaml --out runs/smoke\n\n"
    "    controlkit train --pretrained_model_name_or_path mini --train_data_dir photos --annotator canny "
    "--resolution 128 --output_dir runs/photos\n\n"
    "    controlkit train recipes/canny.yaml --set data.source=photos --set batch=16 --out runs/photos\n\n"
    "    controlkit train recipes/canny.yaml --out runs/canny     # again, to resume after an interruption",
)
def train(
    context: typer.Context,
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe: YAML; see `recipes/`. Or, instead, train_controlnet.py's flags.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; give the same one to resume.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A value in place of the recipe's; repeatable."),
    ] = None,
    from_step: FromStepOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Train a control, and report whether control was found.

    Run the same command again to resume from the last checkpoint; rates, `steps` and `max_minutes` may be others then.
    Ctrl-C saves a checkpoint first. `OUT/log.jsonl` holds a record a line, `OUT/samples` pictures, `OUT/control` the
    result.
    """
    from controlkit.cli.stopping import Stopping
    from controlkit.train import read_ending, train_control
    from controlkit.train.checkpoints import go_back
    from controlkit.train.ranks import connect_ranks

    given = [*([str(recipe)] if recipe else []), *context.args]
    ranks = connect_ranks(cpu=not on_cuda(device))
    settings, out, notes = _asked_for(given, changes or [], out, ranks.count)
    for note in notes if ranks.first else []:
        warn(note)
    if from_step is not None and ranks.first:
        go_back(out, from_step)
    ranks.wait()
    with Stopping("", stopped := "stopped: run again to go on"):
        base = loaded_base(settings.base, device, compiles=True, vae=settings.vae)
    if settings.size == base.size:  # flags always give it
        settings = settings.model_copy(update={"size": None})
    stopping = Stopping("stopping after this step; again, to end at once", stopped)
    with stopping, progress_bars(disable=not ranks.first) as progress:
        main_task, mean = progress.add_task("training", total=settings.steps, figures=""), 0.0
        side = progress.add_task("", total=1, visible=False, figures="")

        def stage(name: str, total: int) -> None:
            if ranks.first and not total:  # no work, but a sentence; rich prints beside bars that are not shown, too
                say_beside(progress, name)
            elif ranks.first:
                progress.reset(side, total=total, description=name, visible=True)

        run = train_control(settings, out, base, stage, partial(progress.advance, side), True, stopping.is_asked)
        del base  # the run keeps what it needs of it
        for record in run:
            mean = record.loss if mean == 0.0 else 0.98 * mean + 0.02 * record.loss
            rate = settings.batch / record.seconds
            progress.update(side, visible=False)
            progress.update(main_task, completed=record.step, figures=f"loss {mean:.4f}  {rate:.0f} pictures/s")
            for line in _describe_record(record) if ranks.first else ():
                say_beside(progress, f"step {record.step}: {line}")
    if (ending := read_ending(out)) and ranks.first:
        _say_ending(ending, out, "The controls are" if settings.control.hints_as == "branches" else "The control is")
    if ending and ending.reason == "interruption":
        raise typer.Exit(stopping.code)


def _say_ending(ending: "Ending", out: Path, which: str) -> None:
    """Tell how the run in ``out`` ended, and where its control is."""
    *found, advice = ending.lines()
    place = f"{which} in {out / 'control'}; the log in {out / 'log.jsonl'}."
    for line in (*found, *([place] if ending.verdict else []), advice):
        say(line)


def _asked_for(
    given: Sequence[str], changes: Sequence[str], out: Path | None, processes: int
) -> "tuple[Recipe, Path, list[str]]":
    """The recipe, the run's folder and notes that a command line asks for: a recipe's file, or flags."""
    from controlkit.train.flags import key_of, read_flags
    from controlkit.train.recipe import parse_recipe, put, read_recipe

    if given and given[0].startswith("--"):
        asked = read_flags(given, processes)
        for change in changes:
            put(asked.recipe, change)
        return parse_recipe(asked.recipe, "The recipe of these flags"), out or asked.out, asked.notes
    if len(given) > 1:
        option, _, value = given[1].partition("=")
        meant = f"beside a recipe it is --set {key}={value or '...'}; " if (key := key_of(option)) else ""
        raise Invalid(f'"{given[1]}" is no option of train: {meant}see `controlkit train --help`.')
    if not given or not out:
        raise Invalid("Expected a recipe and --out, the run's folder; see `controlkit train --help`.")
    return _as_launched(read_recipe(Path(given[0]), changes)), out, []


def _describe_record(record: "Record") -> Iterator[str]:
    """Lines on what a step's evaluation found."""
    if record.relative:
        means = {kind: sum(quarters) / len(quarters) for kind, quarters in record.relative.items()}
        losses = ", ".join(f"{kind} {mean:.3f}".strip() for kind, mean in means.items())
        yield f"loss relative to no control {losses}"
    if record.residuals:
        low, high = min(record.residuals.values()), max(record.residuals.values())
        line = f"residuals {low:.3g} to {high:.3g} of what they are added to"
        if record.drift:
            line += "; colours " + ", ".join(f"{name} {value:+.3f}" for name, value in record.drift.items())
        if record.quality:
            line += "; CLIP-score {clip_score:.3f} ({clip_score_no_control:.3f})".format(**record.quality)
        yield line
    if seen := record.evaluation:
        range_ = f"fidelity {seen.fidelity.mean:.3f} between {seen.floor.mean:.3f} and {seen.ceiling.mean:.3f}"
        shown = f"obedience {seen.obedience}" if seen.is_meaningful else range_
        yield f"{shown} - {record.verdict or ''}"


def _as_launched(recipe: "Recipe") -> "Recipe":
    """The recipe with the number format of `accelerate launch --mixed_precision`, where it has none of its own."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION")
    taken = recipe.precision == "auto" and asked in ("bf16", "fp16")
    return recipe.model_copy(update={"precision": asked}) if taken else recipe


@app.command(
    epilog="Examples:\n\n    controlkit watch runs/canny\n\n    controlkit watch runs/canny --html run.html --once"
)
def watch(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    html: Annotated[Path | None, typer.Option(help="Write it as one HTML file, too.")] = None,
    every: Annotated[
        float, typer.Option(help="Seconds between two looks.", min=0.2, max=86_400, callback=finite)
    ] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and do not wait for the run's end.")] = False,
    pictures: Annotated[bool, typer.Option(help="Show the newest samples, in a terminal.")] = True,
) -> None:
    """Look at a run while it goes on: its loss, the loss relative to no control, obedience, quality and verdict.

    Reads the run's folder alone, so it does not matter where the run goes on. Ends when the run has ended, or no
    process trains in it any more. Without a terminal, each line that changes is printed.
    """
    import time
    from contextlib import nullcontext

    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from controlkit.files import write_atomic
    from controlkit.images import read_picture
    from controlkit.train.watch import blocks, lines, page, read_run

    seen, told, console = read_run(run), list[str](), terminal()
    with Live(console=console, refresh_per_second=4) if console.is_terminal else nullcontext() as live:
        while True:
            shown = [printable(line) for line in lines(seen)]
            if live:
                parts = [Text("\n".join(shown))]
                room = max(console.height - len(shown) - 1, 1)
                if pictures and seen.sheets:
                    parts.append(blocks(read_picture(seen.sheets[0]), console.width, room))
                live.update(Group(*parts))
            else:
                for line in shown:
                    if line not in told:
                        say(line)
                told = shown
            if html:
                write_atomic(html, page(seen, every).encode())
            if once or seen.ended or seen.stopped:
                break
            time.sleep(every)
            seen = read_run(run)
    if html:
        say(str(html))
