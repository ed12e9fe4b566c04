"""The paper's opponents: listed, and trained."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from controlkit.cli.shared import (
    BaseOption,
    DeviceOption,
    check_folder,
    loaded_base,
    progress_bars,
    say,
    say_table,
)
from controlkit.errors import Invalid

if TYPE_CHECKING:
    from controlkit.baselines import Opponent

app = typer.Typer(help="The paper's opponents, trained on the pictures that controls are.", no_args_is_help=True)
_WORDS = ("low", "middle", "high")
_ENDLESS = 10**6
_QUICK = {"steps": 40, "pflop": None, "batch": 4, "scenes": 64}


@app.command("list")
def list_opponents() -> None:
    """List the opponents: what each is here, and the publication it comes from."""
    from controlkit.baselines import OPPONENTS

    rows = [(one.name, one.title, one.hint, one.words, one.source) for one in OPPONENTS.values()]
    say_table("The paper's opponents", ("name", "in the paper", "hints", "what it is here", "source"), rows, "")


@app.command()
def train(
    name: Annotated[str, typer.Argument(help="One of `controlkit baseline list`.")],
    out: Annotated[Path, typer.Option(help="The training's folder; give the same one to resume.")],
    rate: Annotated[str, typer.Option(help="Learning rate: `low`, `middle`, `high`, or a number.")] = "middle",
    steps: Annotated[int | None, typer.Option(help="The most steps.", min=1, max=100_000_000)] = None,
    minutes: Annotated[float | None, typer.Option(help="The most minutes to train.", min=0.01, max=1e6)] = None,
    pflop: Annotated[
        float | None,
        typer.Option(
            help="The operations to spend, in 1e15; by default the opponent's own, if no steps are given.", min=1e-9
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Pairs a step.", min=1, max=4096)] = None,
    scenes: Annotated[int, typer.Option(help="Scenes to train on.", min=8, max=1_000_000)] = 6000,
    seed: Annotated[int, typer.Option(help="Seed of weights and draws.", min=0)] = 0,
    hint: Annotated[str, typer.Option(help="Kind of hints; by default the opponent's own.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="A few steps on few scenes, to see that all works.")] = False,
    base: BaseOption = "mini",
    device: DeviceOption = "auto",
) -> None:
    """Train one of the paper's opponents on rendered scenes, and print its cost.

    Run the same command again to resume. Ctrl-C saves first. `OUT/log.jsonl` holds a record a step, `OUT/curve.html`
    and `OUT/curve.json` the curve, and what is left is read by `controlkit reproduce`.

    Examples:

        controlkit baseline train piti --out runs/opponents/piti

        controlkit baseline train ldm-scratch --out runs/opponents/ldm-scratch --minutes 60 --rate high
    """
    from controlkit.baselines import Settings, opponent, train_baseline
    from controlkit.baselines.curves import write_curve
    from controlkit.cli.stopping import Stopping

    row = opponent(name)
    check_folder(out)
    budget = pflop or (None if steps else row.pflop)
    chosen = {"steps": steps or _ENDLESS, "pflop": budget, "batch": batch or row.batch, "scenes": scenes}
    settings = Settings(rate=_rate(rate, row), minutes=minutes, seed=seed, **(chosen | (_QUICK if quick else {})))
    stopping = Stopping("stopping after this step; again, to end at once", "stopped: run again to go on")
    with stopping, progress_bars() as progress:
        task, mean = progress.add_task(f"training {name}", total=100, figures=""), 0.0
        for one in train_baseline(name, loaded_base(base, device), settings, out, hint, stopping.is_asked):
            mean = one.loss if mean == 0.0 else 0.98 * mean + 0.02 * one.loss
            figures = f"{one.stage}: loss {mean:.4f}  {one.flops / 1e9:.0f} GFLOP, {one.seconds:.2f} s a step"
            progress.update(task, completed=100 * one.share, figures=f"step {one.step}, {figures}")
    if not row.learns:
        say(f"{row.title}: {row.words} There is nothing to train; {out} names it.")
        return
    curve = write_curve(out)
    say(f"{row.title}: {curve.about.cost()}; {curve.about.parameters / 1e6:.2f}M parameters, rate {settings.rate:g}.")
    say(f"The curve is in {out / 'curve.html'}.")
    if stopping.is_asked():
        raise typer.Exit(stopping.code)


def _rate(word: str, row: "Opponent") -> float:
    """A learning rate by its word, or as a number."""
    if word in _WORDS:
        return row.rates[_WORDS.index(word)]
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        rates = ", ".join(f"{name} ({rate:g})" for name, rate in zip(_WORDS, row.rates, strict=True))
        raise Invalid(f'--rate is "{word}"; expected {rates}, or a number above 0, at most 1.')
    return value
