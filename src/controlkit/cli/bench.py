"""Commands that measure speed and memory."""

import json
from pathlib import Path
from typing import Annotated

import typer

from controlkit.cli.shared import DeviceOption, ready, say, say_table
from controlkit.errors import Invalid, nearest

app = typer.Typer(help="Measure speed and memory beside diffusers, on the same random weights.", no_args_is_help=True)


@app.callback()
def _commands() -> None:
    """Measure speed and memory beside diffusers, on the same random weights."""


@app.command()
def sample(
    size: Annotated[str, typer.Option(help="`mini`, `sd15` or `sdxl`.")] = "mini",
    steps: Annotated[int, typer.Option(help="Sampling steps a turn.", min=1)] = 2,
    turns: Annotated[int, typer.Option(help="Turns of each system, after one that warms it up.", min=1)] = 5,
    side: Annotated[
        int | None, typer.Option(help="Side of the pictures in pixels; by default the base's own.", min=64)
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Measure diffusers compiled, too, which takes minutes.")
    ] = False,
    together: Annotated[
        list[int] | None,
        typer.Option(help="So many requests made together, too: pictures a minute. May be given again.", min=1, max=64),
    ] = None,
    device: DeviceOption = "auto",
    report: Annotated[Path | None, typer.Option("--json", help="File for all facts.")] = None,
) -> None:
    """Time controlled sampling beside diffusers, alternately in this process.

    Examples:

        controlkit bench sample --size mini --steps 20

        controlkit bench sample --size sd15 --turns 3 --json sd15.json

        controlkit bench sample --steps 20 --together 1 --together 4 --together 16
    """
    from controlkit.files import write_atomic
    from controlkit.measure.bench import SIDES, BenchPlan, bench_sample

    if size not in SIDES:
        raise Invalid(f'--size is "{size}": {nearest(size, SIDES)}')
    plan = BenchPlan(size, steps, turns, side, compiled, tuple(together or ()), ready(device))  # type: ignore[arg-type]
    found = bench_sample(plan, say)
    seconds, spread = found["seconds_a_step"], found["spread"]
    rows = [[name, f"{taken:.3f}", " to ".join(f"{end:.3f}" for end in spread.get(name, ()))]
            for name, taken in seconds.items()]  # fmt: skip
    facts = found["machine"]
    on = f"{facts['gpu'] or facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}, {found['format']}"
    say_table(f"Controlled sampling, {size}", ["system", "seconds a step", "spread"], rows, on)
    ratios = [[name, f"{value:.3g}"] for name, value in found.items() if isinstance(value, float)]
    say_table("Ratios to the best of diffusers, above 1 where ours is faster", ["figure", "value"], ratios, on)
    if made := found["pictures_a_minute"]:
        rows = [[str(count), f"{rate:.3g}"] for count, rate in made.items()]
        say_table("Requests made together", ["requests", "pictures a minute"], rows, on)
    if report:
        write_atomic(report, (json.dumps(found, indent=1) + "\n").encode())
