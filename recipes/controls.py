"""The figures of every shipped control, and a contact sheet of each, for the model card.

    python recipes/controls.py --out docs           # needs npm once, for the emoji
    python recipes/controls.py canny depth --out out/controls

What is known of scenes alone (depth, normals, labels, poses) is measured on held-out scenes, everything else on emoji
of held-out concepts. Each is used as it says itself; where guidance counts its hint more than once, it is measured with
the hint counted once, too, as other tools do. Writes ``OUT/controls.json``, ``OUT/controls.md`` (a table) and
``OUT/controls/NAME.png``.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.progress import Progress, TaskID

from controlkit.backbones import load_base
from controlkit.data import Pair
from controlkit.files import write_atomic
from controlkit.formats import load_control
from controlkit.images import HintSpec, grid, write_png
from controlkit.measure import EMBEDDED, EvaluationPlan, Maker, evaluate_base, first_kind
from controlkit.sample import ControlRequest, Request, maker

CONTROLS = ("canny", "softedge", "scribble", "lineart", "mlsd", "depth", "normal", "seg", "pose", "inpaint", "tile")
SHOWN = 8  # pictures on a contact sheet


@dataclass(frozen=True)
class Bench:
    """Held-out pairs, FID's reference pictures, and the base's pictures of the pairs without control."""

    pairs: list[Pair]
    real: list[np.ndarray]
    without: list[np.ndarray]


def bench(make: Maker, spec: HintSpec, size: int, num: int, progress: Progress) -> Bench:
    """The bench for one kind of hint."""
    pairs, real = EMBEDDED.heldout(spec, size, num)
    requests = [Request(prompt=pair.prompt, seed=seed) for seed, pair in enumerate(pairs)]
    made = progress.track(make(requests), len(requests), description="without control")
    return Bench([pairs[i] for i in range(len(pairs))], real, [picture.pixels for picture in made])


def sheet(make: Maker, plan: EvaluationPlan, without: list[np.ndarray], cell: int) -> np.ndarray:
    """Hint, truth, controlled, without control: pairs from all over the plan with something in their hints."""
    hints = plan.hints
    chosen = [int(i) for i in np.linspace(0, len(hints) - 1, 3 * SHOWN).astype(int) if hints[i].any()][::3][:SHOWN]
    made = make(plan.requests("controlled", chosen))
    rows = [
        [hints[i][..., :3], plan.pairs[i].picture, picture.pixels, without[i]]
        for i, picture in zip(chosen, made, strict=True)
    ]
    turned = [list(row) for row in zip(*rows, strict=True)]
    return grid(turned, cell=cell)


def line(name: str, report: dict[str, Any]) -> str:
    """A control's row of the table."""
    low, high = (report["obedience"][end] for end in ("low", "high"))
    mean = {key: value["mean"] for key, value in report.items() if isinstance(value, dict) and "mean" in value}
    quality = ["not measured"] * 3  # of a base whose world has no referee here
    if "quality_kept" in report:
        quality = [
            f"{mean['clip_score']:.2f} ({mean['clip_score_no_control']:.2f})",
            f"{mean['fid']:.1f} ({mean['fid_no_control']:.1f})",
            "yes" if report["quality_kept"] else "no",
        ]
    cells = [
        name,
        f"{mean['obedience']:.2f} [{low:.2f}, {high:.2f}]" + ("" if report["is_meaningful"] else " (does not count)"),
        f"{mean['obedience_counted_once']:.2f}",
        f"{report['metric']} {mean['fidelity']:.3g}",
        f"{mean['floor_no_control']:.3g}, {mean['floor_shuffled']:.3g}",
        f"{mean['ceiling']:.3g}",
        *quality,
    ]
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| control | obedience | hint counted once | fidelity | floor: none, shuffled | ceiling | CLIP-score (without) "
    "| FID (without) | quality kept |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Controls to measure; all by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for controls.json, controls.md and controls/.")] = Path("docs"),
    base: Annotated[str, typer.Option(help="The base they are used on.")] = "mini",
    union: Annotated[str, typer.Option(help="Take them from this Union instead of the shipped one.")] = "",
    num: Annotated[int, typer.Option(help="Pictures to measure each on.", min=2)] = 64,
    hint_cfg: Annotated[
        float | None, typer.Option(help="How many times guidance counts the hint; by default what the control says.")
    ] = None,
) -> None:
    """Measure controls, and draw what they do."""
    model = load_base(base)
    benches: dict[tuple[bool, bool], Bench] = {}
    reports = {}
    print(HEAD)
    for name in names or CONTROLS:
        saved = load_control(f"{union}:{name}" if union else name, model)
        counted = saved.hint_cfg_scale if hint_cfg is None else hint_cfg
        scales = dict.fromkeys((counted, 1.0))  # once where it is counted once anyway
        kind = first_kind(saved.hint)
        key = (kind.truth is not None, kind.needs_person)
        with Progress(transient=True) as progress:
            if key not in benches:
                benches[key] = bench(maker(model), saved.hint, model.size, num, progress)
            on = benches[key]
            task = progress.add_task(name, total=2 * num * Request().steps * len(scales))

            def advance(count: int, progress: Progress = progress, task: TaskID = task) -> None:
                progress.advance(task, count)

            make = maker(model, {name: saved}, on_step=advance)
            plans = {
                scale: EvaluationPlan(ControlRequest(name=name, hint_cfg_scale=scale), saved.hint, on.pairs)
                for scale in scales
            }
            measured = {scale: evaluate_base(model, make, plan, on.real, on.without) for scale, plan in plans.items()}
            reports[name] = measured[counted] | {"obedience_counted_once": measured[1.0]["obedience"]}
            shown = sheet(maker(model, {name: saved}), plans[counted], on.without, model.size)
            write_png(out / "controls" / f"{name}.png", shown, colours=256)
        print(line(name, reports[name]), flush=True)
        table = "\n".join([HEAD, *(line(*one) for one in reports.items())])
        write_atomic(out / "controls.md", f"{table}\n".encode())
        write_atomic(out / "controls.json", (json.dumps(reports, indent=2) + "\n").encode())


if __name__ == "__main__":
    typer.run(main)
