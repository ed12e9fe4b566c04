"""A control on drawings of an origin that nothing here was trained on.

    apt-get download openclipart-png && dpkg-deb -x openclipart-png_*.deb clipart      # Debian; public domain
    python recipes/clipart.py clipart --out out/clipart

Draws at random among the folder's pictures with a transparent background, lays each on one of the emoji's grounds,
calls it by its file's name, and measures as `controlkit evaluate` does. The drawings are not redistributed. Writes
``OUT/clipart.json`` and ``OUT/clipart.png`` (drawings, hints, pictures under control).
"""

import json
import re
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from rich.progress import Progress

from controlkit.backbones import load_base
from controlkit.data import Pair, evaluation_pairs
from controlkit.errors import NotFound
from controlkit.files import write_atomic
from controlkit.formats import load_control
from controlkit.images import grid, read_picture, write_png
from controlkit.measure import EvaluationPlan, evaluate_base
from controlkit.mini import world
from controlkit.sample import ControlRequest, maker
from controlkit.seeds import numpy_rng

COVER = (0.15, 0.9)  # share of its box a drawing must fill: neither thin strokes nor mere rectangles
FILL = 0.86  # of the side, as emoji span it


def words_of(path: Path) -> str:
    """The words in a file's name: ``cat_jeff_01.png`` -> ``cat jeff``."""
    return " ".join(re.findall(r"[a-z]{2,}", path.stem.lower())) or "thing"


def drawings(folder: Path, count: int, size: int) -> list[Pair]:
    """``count`` drawings drawn at random, on grounds; the same ones for the same folder."""
    paths = sorted(folder.rglob("*.png"))
    rng = numpy_rng("clipart", len(paths))
    pairs: list[Pair] = []
    for i in rng.permutation(len(paths)):
        picture = Image.fromarray(read_picture(paths[i], None))
        box = picture.getchannel("A").getbbox()
        if box is None or min(box[2] - box[0], box[3] - box[1]) < size // 3:
            continue
        picture = picture.crop(box)
        if not COVER[0] <= np.mean(np.asarray(picture)[..., 3] > 127) <= COVER[1]:
            continue
        picture.thumbnail((round(FILL * size),) * 2, Image.Resampling.LANCZOS)
        ground = list(world.GROUNDS)[rng.integers(len(world.GROUNDS))]
        sheet = Image.new("RGBA", (size, size), world.GROUNDS[ground])
        sheet.alpha_composite(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
        prompt = f"a {words_of(paths[i])}, on a {ground} background"
        pairs.append(Pair(np.asarray(sheet.convert("RGB")), prompt))
        if len(pairs) == count:
            return pairs
    raise NotFound(f"{folder} holds {len(pairs)} drawings with a transparent background: expected {count}.")


def main(
    folder: Annotated[Path, typer.Argument(help="A folder of PNG drawings, at any depth.")],
    out: Annotated[Path, typer.Option(help="Folder for clipart.json and clipart.png.")] = Path("out/clipart"),
    name: Annotated[str, typer.Option("--control", help="The control to measure.")] = "canny",
    base: Annotated[str, typer.Option(help="The base it is used on.")] = "mini",
    num: Annotated[int, typer.Option(help="Drawings to measure on.", min=2)] = 64,
) -> None:
    """Measure a control on drawings from elsewhere."""
    model = load_base(base)
    saved = load_control(name, model)
    control = ControlRequest(name=name, hint_cfg_scale=saved.hint_cfg_scale)
    plan = EvaluationPlan(control, saved.hint, drawings(folder, num, model.size))
    _, real = evaluation_pairs("emoji", model.size, 2)
    with Progress() as progress:
        task = progress.add_task("measuring", total=3 * num * plan.steps)
        make = maker(model, {name: saved}, on_step=lambda n: progress.advance(task, n))
        report = evaluate_base(model, make, plan, real)
    shown = range(min(10, num))
    made = [picture.pixels for picture in maker(model, {name: saved})(plan.requests("controlled", shown))]
    rows = [[plan.pairs[i].picture for i in shown], plan.hints[: len(shown)], made]
    write_png(out / "clipart.png", grid(rows, cell=model.size))
    write_atomic(out / "clipart.json", (json.dumps(report, indent=2) + "\n").encode())
    figure = report["obedience"]
    print(f"{name} on {num} drawings: obedience {figure['mean']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]")


if __name__ == "__main__":
    typer.run(main)
