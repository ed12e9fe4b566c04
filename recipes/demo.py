"""The demo: drawings and prompts in, pictures with and without control out, both scored.

    make demo          # or: python recipes/demo.py --out out/demo

Writes ``OUT/index.html`` and ``OUT/grid.png``. Everything it needs is shipped; no network, no GPU.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import Progress

from controlkit.backbones import Backbone, load_base
from controlkit.formats import SavedControl, load_control
from controlkit.images import grid, read_picture, write_png
from controlkit.measure import Referee, fidelity
from controlkit.sample import ControlRequest, Request, generate, pictures, prepare
from page import Page  # recipes/page.py

DRAWINGS = Path(__file__).parent / "drawings"
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Scene:
    """A drawing, the control that reads it, and what to make of it.

    A line drawing is a scribble as it is; of a coloured one the Canny edges are taken.
    """

    drawing: str
    control: str
    prompt: str


SCENES = (
    Scene("cat_face", "scribble", "a cat face, 3d style, on a teal background"),
    Scene("apple", "scribble", "a red apple, fluent style, on a white background"),
    Scene("house", "scribble", "a house, noto style, on a green background"),
    Scene("fish", "scribble", "a tropical fish, 3d style, on a blue background"),
    Scene("star", "scribble", "a glowing star, fluent style, on a purple background"),
    Scene("mushroom", "scribble", "a mushroom, twemoji style, on a yellow background"),
    Scene("umbrella", "scribble", "an umbrella, 3d style, on a grey background"),
    Scene("colour_house", "canny", "a house, 3d style, on an orange background"),
    Scene("colour_fish", "canny", "a fish, flat style, on a purple background"),
    Scene("colour_mushroom", "canny", "a mushroom, 3d style, on a black background"),
)


@dataclass(frozen=True)
class Shown:
    """One scene's pictures, and its mean scores with and without control."""

    scene: Scene
    drawing: np.ndarray
    hint: np.ndarray
    controlled: list[np.ndarray]
    plain: list[np.ndarray]
    fidelity: tuple[float, float]
    clip_score: tuple[float, float]


def show(base: Backbone, controls: Mapping[str, SavedControl], scene: Scene, referee: Referee) -> Shown:
    """Make and score one scene: the same seeds with control and without."""
    path = DRAWINGS / f"{scene.drawing}.png"
    control = ControlRequest(name=scene.control, images=path, ready=scene.control == "scribble")
    plain = [Request(prompt=scene.prompt, seed=seed) for seed in SEEDS]
    under_control = [one.model_copy(update={"controls": (control,)}) for one in plain]
    prepared = prepare(base, under_control, controls)
    hint = prepared[0].controls[0].hints[""]
    controlled, free = ([made.pixels for made in pictures(generate(base, one))] for one in (prepared, plain))

    def scores(made: Sequence[np.ndarray]) -> tuple[float, float]:
        obeyed = np.nanmean(fidelity(made, [hint] * len(made), controls[scene.control].hint))
        return float(obeyed), float(referee.clip_scores(made, [scene.prompt] * len(made)).mean())

    with_, without = scores(controlled), scores(free)
    return Shown(scene, read_picture(path), hint, controlled, free, (with_[0], without[0]), (with_[1], without[1]))


def write_page(shown: Sequence[Shown], base: Backbone, out: Path, seconds: float) -> Path:
    """The demo as one HTML page with its pictures beside it."""
    page = Page(out, "ControlKit demo", "A drawing and a prompt in, a controlled picture out")
    settings = Request()
    means = np.mean([[*s.fidelity, *s.clip_score] for s in shown], axis=0)
    page.text(
        f"Base {base.name}, {base.size} pixels, {settings.steps} steps, guidance {settings.guidance:g}, {seconds:.0f} "
        "s on this machine. Same seeds with control and without."
    )
    rows = (("edges agree with the hint (F1)", *means[:2]), ("agrees with the prompt (CLIP-score)", *means[2:]))
    head = ("mean over all scenes", "with control", "without")
    page.table(head, [(name, f"{with_:.2f}", f"{without:.2f}") for name, with_, without in rows])
    for s in shown:
        drawn = [("drawing", s.drawing), (f"hint ({s.scene.control})", s.hint)]
        steered = [(f"with control, seed {k}", picture) for k, picture in zip(SEEDS, s.controlled, strict=True)]
        free = [(f"without, seed {k}", picture) for k, picture in zip(SEEDS, s.plain, strict=True)]
        page.section(
            s.scene.prompt,
            [[*drawn, None, *steered], [*free]],
            f"Edges agree with the hint: {s.fidelity[0]:.2f} with control, {s.fidelity[1]:.2f} without (F1). "
            f"Agrees with the prompt: {s.clip_score[0]:.2f} with control, {s.clip_score[1]:.2f} without (CLIP-score).",
        )
    return page.write()


def main(out: Annotated[Path, typer.Option(help="Folder for the page and its pictures.")] = Path("out/demo")) -> None:
    """Make the demo page from what is shipped."""
    started = time.perf_counter()
    base = load_base("mini")
    controls = {name: load_control(name, base) for name in {scene.control for scene in SCENES}}
    referee = Referee()
    with Progress() as progress:
        shown = [
            show(base, controls, scene, referee) for scene in progress.track(SCENES, description="drawing to picture")
        ]
    rows = [[s.drawing, s.hint, *s.controlled, *s.plain] for s in shown]
    labels = ["drawing", "hint", *["with control"] * len(SEEDS), *["without"] * len(SEEDS)]
    write_png(out / "grid.png", grid(rows, labels))
    page = write_page(shown, base, out, time.perf_counter() - started)
    print(f"The page: {page}\nAll pictures in one: {out / 'grid.png'}")


if __name__ == "__main__":
    typer.run(main)
