"""Train the paper's opponents at equal cost, each at the best of three learning rates.

    nice -n 19 python recipes/opponents.py --out runs/opponents            # all; hours, see docs/reproduction.md
    python recipes/opponents.py --out runs/opponents --only piti --only lite
    controlkit reproduce table2 --opponents runs/opponents --out runs/table2

Each opponent is tried at its three rates with a share of the operations, measured on scenes that are neither trained
nor reported on, and trained whole at the best rate. Run the same command again to go on. Leaves ``OUT/NAME``, which
``controlkit reproduce`` reads, and ``OUT/rates.json``: the fidelity of each try with its cost. One thread is used.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from controlkit.backbones import Backbone, load_base
from controlkit.baselines import (
    OPPONENTS,
    Diverged,
    Material,
    Settings,
    load_baseline,
    material_of,
    opponent,
    train_baseline,
)
from controlkit.baselines.curves import write_curve
from controlkit.data import ScenePairs
from controlkit.files import write_atomic
from controlkit.measure import EvaluationPlan, fidelity, mean_figure, metric_of
from controlkit.sample import ControlRequest

console = Console()
UNREPORTED = 2**31 + 7
"""The seed of scenes to choose rates on: no training and no report draws them."""


def tried(base: Backbone, name: str, folder: Path, num: int) -> dict[str, Any]:
    """The fidelity of a trained opponent on scenes to choose by, and its cost."""
    baseline, about = load_baseline(folder, base)
    pairs = list(ScenePairs(base.size, 2 * num, UNREPORTED, count=num))
    plan = EvaluationPlan(ControlRequest(name=name), baseline.spec, pairs, steps=10)
    made = [picture.pixels for picture in baseline.make(plan.requests("controlled"))]
    figure = mean_figure(fidelity(made, plan.hints, baseline.spec))
    return {"rate": about.settings.rate, "fidelity": figure.mean, "low": figure.low, "high": figure.high} | {
        "steps": about.step,
        "seconds": about.seconds,
        "flops": about.flops,
    }


def train(base: Backbone, name: str, settings: Settings, folder: Path, material: Material) -> None:
    """Train, or go on, and write the curve."""
    for record in train_baseline(name, base, settings, folder, material=material):
        if record.step % 100 == 0:
            console.print(f"{folder}: step {record.step}, {record.stage}, loss {record.loss:.4f}", highlight=False)
    write_curve(folder)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the opponents.")],
    only: Annotated[list[str] | None, typer.Option(help="These opponents alone; repeatable.")] = None,
    factor: Annotated[float, typer.Option(help="A factor on each opponent's own operations.")] = 1.0,
    share: Annotated[float, typer.Option(help="The share of them that each rate is tried with.")] = 0.1,
    scenes: Annotated[int, typer.Option(help="Scenes to train on.")] = 6000,
    num: Annotated[int, typer.Option(help="Scenes to choose the rate on.")] = 24,
) -> None:
    """Train the opponents."""
    torch.set_num_threads(1)
    base = load_base("mini")
    chosen = [opponent(name) for name in only or OPPONENTS]
    for row in [row for row in chosen if row.learns]:
        common = {"steps": 10**6, "batch": row.batch, "scenes": scenes}
        material = material_of(row.new(base), Settings(**common), out / "pairs" / row.hint)  # of all of that kind
        found = []
        for rate in row.rates:
            folder = out / "rates" / row.name / f"{rate:g}"
            try:
                train(base, row.name, Settings(rate=rate, pflop=share * factor * row.pflop, **common), folder, material)
            except Diverged as error:
                console.print(f"{row.name} at {rate:g}: {error}", highlight=False)
                continue
            found.append(tried(base, row.name, folder, num))
            console.print(f"{row.name} at {rate:g}: fidelity {found[-1]['fidelity']:.3f}", highlight=False)
        if not found:
            raise typer.BadParameter(f"{row.name} learns at none of its rates {row.rates}: give it lower ones.")
        higher = metric_of(row.new(base).spec).higher_is_better
        best = (max if higher else min)(found, key=lambda one: one["fidelity"])
        path = out / "rates.json"
        held = json.loads(path.read_text()) if path.exists() else {}
        write_atomic(path, (json.dumps(held | {row.name: found}, indent=2) + "\n").encode())
        train(base, row.name, Settings(rate=best["rate"], pflop=factor * row.pflop, **common), out / row.name, material)
        console.print(f"[bold green]done[/]: {out / row.name} at {best['rate']:g}")


if __name__ == "__main__":
    typer.run(main)
