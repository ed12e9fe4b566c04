"""The figures of every shipped control, and a contact sheet of each, for the model card.

    python recipes/controls.py --out docs           # needs npm once, for the emoji
    python recipes/controls.py canny depth --out out/controls

What is known of scenes alone (depth, normals, labels, poses) is measured on held-out scenes, everything else on emoji
of held-out concepts. Each is used as it says itself; where guidance counts its hint more than once, it is measured with
the hint counted once, too, as other tools do. Writes ``OUT/controls.json``, ``OUT/controls.md`` (a table) and
``OUT/controls/NAME.png``.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.progress import Progress, TaskID

from controlkit.backbones import Backbone, load_base
from controlkit.data import TRUTHS, Pair, evaluation_pairs, hint_for_pair
from controlkit.formats import SavedControl, load_control
from controlkit.images import grid, write_atomic, write_png
from controlkit.measure import Referee, evaluate
from controlkit.sample import ControlRequest, PreparedControl, Request, SamplingSettings, maker

CONTROLS = ("canny", "softedge", "scribble", "lineart", "mlsd", "depth", "normal", "seg", "pose", "inpaint", "tile")
SHOWN = 8  # pictures on a contact sheet


@dataclass(frozen=True)
class Bench:
    """Held-out pairs, FID's reference pictures, and what the base makes of the pairs without control."""

    pairs: list[Pair]
    real: list[np.ndarray]
    without: list[np.ndarray]


def bench(base: Backbone, kind: str, num: int, progress: Progress) -> Bench:
    """Pairs and pictures to measure a kind of hint on."""
    pairs, real = evaluation_pairs("scenes" if kind in TRUTHS else "emoji", base.size, num, person=kind == "pose")
    asked = [Request(prompt=pair.prompt, seed=seed) for seed, pair in enumerate(pairs)]
    made = progress.track(maker(base)(asked), len(asked), description="without control")
    return Bench([pairs[i] for i in range(len(pairs))], real, [picture.pixels for picture in made])


def sheet(base: Backbone, saved: SavedControl, asked: ControlRequest, on: Bench) -> np.ndarray:
    """Hint, truth, controlled, without control: pairs from all over the bench with something in their hints."""
    hints = [hint_for_pair(pair, saved.hint) for pair in on.pairs]
    chosen = [i for i in np.linspace(0, len(hints) - 1, 3 * SHOWN).astype(int) if hints[i].any()][::3][:SHOWN]
    requests = [
        Request(
            prompt=on.pairs[i].prompt,
            seed=int(i),
            controls=(asked.model_copy(update={"images": {"": hints[i]}, "ready": True}),),
        )
        for i in chosen
    ]
    made = [picture.pixels for picture in maker(base, {asked.name: saved})(requests)]
    rows = [
        [hints[i][..., :3], on.pairs[i].picture, picture, on.without[i]]
        for i, picture in zip(chosen, made, strict=True)
    ]
    turned = [list(row) for row in zip(*rows, strict=True)]
    return grid(turned, cell=base.size)


def line(name: str, report: dict[str, Any]) -> str:
    """A control's row of the table."""
    low, high = (report["obedience"][end] for end in ("low", "high"))
    mean = {key: value["mean"] for key, value in report.items() if isinstance(value, dict) and "mean" in value}
    cells = [
        name,
        f"{mean['obedience']:.2f} [{low:.2f}, {high:.2f}]" + ("" if report["is_meaningful"] else " (does not count)"),
        f"{mean['obedience_counted_once']:.2f}",
        f"{report['metric']} {mean['fidelity']:.3g}",
        f"{mean['floor_no_control']:.3g}, {mean['floor_shuffled']:.3g}",
        f"{mean['ceiling']:.3g}",
        f"{mean['clip_score']:.2f} ({mean['clip_score_no_control']:.2f})",
        f"{mean['fid']:.1f} ({mean['fid_no_control']:.1f})",
        "yes" if report["quality_kept"] else "no",
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
    model, referee, settings = load_base(base), Referee(), SamplingSettings()
    benches: dict[Sequence[bool], Bench] = {}
    reports = {}
    print(HEAD)
    for name in names or CONTROLS:
        saved = load_control(f"{union}:{name}" if union else name, model)
        asked = ControlRequest(name=name, hint_cfg_scale=hint_cfg)
        control, kind = PreparedControl.of(saved, asked, {}), saved.hint.annotator
        ways = {
            once: replace(control, hint_cfg_scale=1.0 if once else control.hint_cfg_scale) for once in (False, True)
        }
        if control.hint_cfg_scale == 1.0:
            ways.pop(True)
        key = (kind in TRUTHS, kind == "pose")
        with Progress(transient=True) as progress:
            if key not in benches:
                benches[key] = bench(model, kind, num, progress)
            on = benches[key]
            task = progress.add_task(name, total=2 * num * settings.steps * len(ways))

            def advance(count: int, progress: Progress = progress, task: TaskID = task) -> None:
                progress.advance(task, count)

            measured = {
                once: evaluate(model, way, on.pairs, on.real, settings, referee, on_step=advance, without=on.without)
                for once, way in ways.items()
            }
            reports[name] = measured[False] | {"obedience_counted_once": measured[True in ways]["obedience"]}
            write_png(out / "controls" / f"{name}.png", sheet(model, saved, asked, on), colours=256)
        print(line(name, reports[name]), flush=True)
        table = "\n".join([HEAD, *(line(*one) for one in reports.items())])
        write_atomic(out / "controls.md", f"{table}\n".encode())
        write_atomic(out / "controls.json", (json.dumps(reports, indent=2) + "\n").encode())


if __name__ == "__main__":
    typer.run(main)
