"""Train the paper's opponents at equal cost, each at the best of three learning rates or more.

    nice -n 19 python recipes/opponents.py --out runs/opponents            # all; hours, see docs/reproduction.md
    python recipes/opponents.py --out runs/opponents --only piti --only lite
    python recipes/opponents.py --out runs/opponents --only lite --hint canny      # on other hints, in OUT/lite-canny
    controlkit reproduce table2 --opponents runs/opponents --out runs/table2

Each opponent is tried at its three rates with a share of the operations, measured on scenes that are neither trained
nor reported on, and trained whole at the best rate. Where that is the lowest or the highest, a further one beyond it is
tried, twice at most. Where guidance leads away from no hint, its strength is chosen on the same scenes. Run the same
command again to go on. Leaves ``OUT/NAME`` (``OUT/NAME-KIND`` on other hints than an opponent's own), which
``controlkit reproduce`` reads, and ``OUT/rates.json`` and ``OUT/strengths.json``: the fidelity of each try with its
cost. One thread is used.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
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
    Opponent,
    Settings,
    load_baseline,
    material_of,
    opponent,
    train_baseline,
)
from controlkit.baselines.curves import write_curve
from controlkit.baselines.saved import read_about, write_about
from controlkit.data import ScenePairs
from controlkit.files import write_atomic
from controlkit.measure import EvaluationPlan, fidelity, mean_figure, metric_of
from controlkit.sample import ControlRequest

console = Console()
UNREPORTED = 2**31 + 7
"""The seed of scenes to choose rates on: no training and no report draws them."""
FURTHER = 2
"""So many rates are tried beyond an opponent's own three."""
APART = 2.5
"""The factor from one rate to a further one."""


def tried(base: Backbone, name: str, folder: Path, num: int, strength: float = 4.0) -> dict[str, Any]:
    """The fidelity of a trained opponent on scenes to choose by, with a strength of guidance, and its cost."""
    baseline, about = load_baseline(folder, base)
    pairs = list(ScenePairs(base.size, 2 * num, UNREPORTED, count=num))
    plan = EvaluationPlan(ControlRequest(name=name), baseline.spec, pairs, steps=10, guidance=strength)
    made = [picture.pixels for picture in baseline.make(plan.requests("controlled"))]
    figure = mean_figure(fidelity(made, plan.hints, baseline.spec))
    return {
        "rate": about.settings.rate,
        "strength": strength,
        "fidelity": figure.mean,
        "low": figure.low,
        "high": figure.high,
        "steps": about.step,
        "seconds": about.seconds,
        "flops": about.flops,
    }


def train(base: Backbone, row: Opponent, settings: Settings, folder: Path, material: Material) -> None:
    """Train, or go on, and write the curve."""
    for record in train_baseline(row.name, base, settings, folder, row.hint, material=material):
        if record.step % 100 == 0:
            console.print(f"{folder}: step {record.step}, {record.stage}, loss {record.loss:.4f}", highlight=False)
    write_curve(folder)


def best_of(found: list[dict[str, Any]], row: Opponent, base: Backbone) -> dict[str, Any]:
    """The try with the best fidelity."""
    higher = metric_of(row.new(base).spec).higher_is_better
    return (max if higher else min)(found, key=lambda one: one["fidelity"])


def further_rate(rates: Sequence[float], best: float) -> float | None:
    """A rate beyond the best of those tried, where that is the lowest or the highest of them."""
    factor = {min(rates): 1 / APART, max(rates): APART}.get(best)
    return float(f"{best * factor:.2g}") if factor else None


def choose_rate(base: Backbone, row: Opponent, settings: Settings, out: Path, material: Material, num: int) -> float:
    """Try an opponent at its rates, and write down the fidelity of each; returns the best rate."""
    found: list[dict[str, Any]] = []
    rates = list(row.rates)
    for rate in rates:  # which grows
        folder = out / "rates" / row.folder / f"{rate:g}"
        try:
            train(base, row, settings.model_copy(update={"rate": rate}), folder, material)
            found.append(tried(base, row.name, folder, num))
            console.print(f"{row.folder} at {rate:g}: fidelity {found[-1]['fidelity']:.3f}", highlight=False)
        except Diverged as error:
            console.print(f"{row.folder} at {rate:g}: {error}", highlight=False)
        if rate == rates[-1] and found and len(rates) < len(row.rates) + FURTHER:
            further = further_rate(rates, best_of(found, row, base)["rate"])
            rates += [further] if further else []
    if not found:
        raise typer.BadParameter(f"{row.folder} learns at none of its rates {row.rates}: give it lower ones.")
    note(out / "rates.json", row.folder, found)
    return float(best_of(found, row, base)["rate"])


def note(path: Path, name: str, found: list[dict[str, Any]]) -> None:
    """Write the tries of an opponent into a file that holds those of others."""
    held = json.loads(path.read_text()) if path.exists() else {}
    write_atomic(path, (json.dumps(held | {name: found}, indent=2) + "\n").encode())


def choose_strength(base: Backbone, row: Opponent, out: Path, num: int) -> None:
    """Choose the strength of a trained opponent's guidance, and write it into its record."""
    folder = out / row.folder
    found = [tried(base, row.name, folder, num, strength) for strength in row.strengths]
    note(out / "strengths.json", row.folder, found)
    best = best_of(found, row, base)["strength"]
    write_about(folder, read_about(folder).model_copy(update={"strength": best}))
    console.print(f"{row.folder}: guidance {best:g} of {[round(one['fidelity'], 3) for one in found]}", highlight=False)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the opponents.")],
    only: Annotated[list[str] | None, typer.Option(help="These opponents alone; repeatable.")] = None,
    hint: Annotated[str, typer.Option(help="The kind of hints; else each opponent's own.")] = "",
    factor: Annotated[float, typer.Option(help="A factor on each opponent's own operations.")] = 1.0,
    share: Annotated[float, typer.Option(help="The share of them that each rate is tried with.")] = 0.25,
    scenes: Annotated[int, typer.Option(help="Scenes to train on.")] = 6000,
    num: Annotated[int, typer.Option(help="Scenes to choose the rate on.")] = 24,
) -> None:
    """Train the opponents."""
    torch.set_num_threads(1)
    base = load_base("mini")
    chosen = [opponent(name) for name in only or OPPONENTS]
    for row in [replace(row, hint=hint or row.hint) for row in chosen if row.learns]:
        whole = Settings(steps=10**6, pflop=factor * row.pflop, batch=row.batch, scenes=scenes)
        material = material_of(row.new(base), whole, out / "pairs" / f"{row.hint}-{scenes}")
        part = whole.model_copy(update={"pflop": share * factor * row.pflop})
        rate = choose_rate(base, row, part, out, material, num)
        train(base, row, whole.model_copy(update={"rate": rate}), out / row.folder, material)
        if row.strengths:
            choose_strength(base, row, out, num)
        console.print(f"[bold green]done[/]: {out / row.folder} at {rate:g}")


if __name__ == "__main__":
    typer.run(main)
