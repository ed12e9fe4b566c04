"""The gallery: what control is good for, from shipped weights alone.

    make gallery          # or: python recipes/gallery.py --out out/gallery

One drawing in five styles; one scene by four conditions; a pose and a depth map together; a scribble of a cat as five
cats; and one picture by every control there is. Writes ``OUT/index.html`` and ``OUT/gallery.png``.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import Progress

from controlkit.annotators import annotate, light_lines
from controlkit.backbones import Backbone, load_base
from controlkit.data import Pair, hint_for_pair
from controlkit.formats import SavedControl, load_control
from controlkit.images import fit, grid, read_picture, write_png
from controlkit.mini import world
from controlkit.mini.scenes import Scene, draw_scene
from controlkit.sample import ControlRequest, Request, maker
from controls import CONTROLS  # recipes/controls.py
from page import Labelled, Page  # recipes/page.py

DRAWINGS = Path(__file__).parent / "drawings"
FOUR = ("depth", "normal", "seg", "canny")
CAT_GROUNDS = ("teal", "pink", "yellow", "white", "purple")
WIDEST = 13  # pictures side by side in gallery.png
SEED = 2**31 - 5  # of the scenes shown: nothing was trained on them


class Studio:
    """The base and its controls, and how pictures are made of them here: 20 steps, guidance 4, one batch a call."""

    def __init__(self, base: Backbone, tick: Progress) -> None:
        self.base, self.progress = base, tick
        self.controls: dict[str, SavedControl] = {name: load_control(name, base) for name in CONTROLS}
        self.task = tick.add_task("drawing", total=len(CONTROLS) + 5 + 5 + 3 * 3 + len(FOUR) * 2)

    def make(self, hints: Mapping[str, np.ndarray], prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        """One picture a prompt and seed, under all the hints together."""
        used = tuple(ControlRequest(name=name, images=hint, ready=True) for name, hint in hints.items())
        asked = [Request(prompt=p, seed=s, controls=used) for p, s in zip(prompts, seeds, strict=True)]
        made = [picture.pixels for picture in maker(self.base, self.controls)(asked)]
        self.progress.advance(self.task, len(made))
        return made

    def hint(self, name: str, scene: Scene) -> np.ndarray:
        """A scene's hint for a control: drawn from its truth, or annotated."""
        return hint_for_pair(Pair(scene.picture, scene.captions[0], truth=scene), self.controls[name].hint)


def scene_with(size: int, figure: bool, solids: bool) -> Scene:
    """The first scene of the gallery's seed that holds a figure or not, and solids or not."""
    index = 0
    while True:
        scene = draw_scene(size, SEED, index)
        named = len(np.unique(scene.instances)) - 1
        if (len(scene.keypoints) == 1) == figure and (named > len(scene.keypoints)) == solids:
            return scene
        index += 1


def shown(hint: np.ndarray) -> np.ndarray:
    """A hint as a picture; what is masked is grey."""
    if hint.shape[-1] == 3:
        return hint
    return np.where(hint[..., 3:] > 0, hint[..., :3], np.uint8(128))


def in_one(sheets: list[list[Labelled]], side: int) -> np.ndarray:
    """All pictures as one, ``WIDEST`` side by side."""
    blank = np.full((side, side, 3), 255, np.uint8)
    split = [row[first : first + WIDEST] for row in sheets for first in range(0, len(row), WIDEST)]
    rows = [[picture for _, picture in row] + [blank] * (WIDEST - len(row)) for row in split]
    return grid(rows, cell=96)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the page and its pictures.")] = Path("out/gallery"),
    base: Annotated[str, typer.Option(help="The base to draw with.")] = "mini",
) -> None:
    """Make the gallery from what is shipped."""
    started = time.perf_counter()
    model = load_base(base)
    sides = (model.size, model.size)
    page = Page(out, "ControlKit gallery", "What control is good for")
    sheets: list[list[Labelled]] = []

    def section(title: str, row: list[Labelled]) -> None:
        sheets.append(row)
        page.section(title, [row])

    with Progress() as progress:
        studio = Studio(model, progress)
        page.text(f"Everything here comes from {model.name} and its shipped controls, 20 steps, guidance 4.")

        drawing = read_picture(DRAWINGS / "colour_fish.png")
        edges = annotate(drawing, studio.controls["canny"].hint, sides)
        prompts = [world.caption("tropical-fish", style, "blue") for style in world.STYLES]
        made = studio.make({"canny": edges}, prompts, [0] * 5)
        section(
            "One drawing, five styles", [("drawing", drawing), ("canny", edges), *zip(world.STYLES, made, strict=True)]
        )

        spec = studio.controls["scribble"].hint
        cat = fit(light_lines(read_picture(DRAWINGS / "cat_face.png"), spec), sides, spec.resize)
        prompts = [world.caption("cat-face", s, g) for s, g in zip(world.STYLES, CAT_GROUNDS, strict=True)]
        made = studio.make({"scribble": cat}, prompts, range(5))
        section("A scribble of a cat, five cats", [("scribble", cat), *zip(world.STYLES, made, strict=True)])

        scene = scene_with(model.size, figure=False, solids=True)
        row: list[Labelled] = [("the scene", scene.picture)]
        for name in FOUR:
            hint = studio.hint(name, scene)
            first, second = studio.make({name: hint}, [scene.captions[0]] * 2, (0, 1))
            row += [(name, hint), ("seed 0", first), ("seed 1", second)]
        sheets.append(row)
        page.section(f"One scene, four conditions: {scene.captions[0]}", [row[:1], row[1:7], row[7:]])

        scene = scene_with(model.size, figure=True, solids=True)
        hints = {name: studio.hint(name, scene) for name in ("pose", "depth")}
        row = [("the scene", scene.picture), *hints.items()]
        for title, used in (("pose alone", ["pose"]), ("depth alone", ["depth"]), ("both", ["pose", "depth"])):
            made = studio.make({name: hints[name] for name in used}, [scene.captions[0]] * 3, range(3))
            row += [(title, picture) for picture in made]
        sheets.append(row)
        page.section(f"A pose and a depth map together: {scene.captions[0]}", [row[:3], row[3:]])

        row = []
        for name in CONTROLS:
            hint = studio.hint(name, scene)
            row += [(name, shown(hint)), ("", studio.make({name: hint}, [scene.captions[0]], (0,))[0])]
        sheets.append(row)
        page.section(f"Every control: {scene.captions[0]}", [row[:12], row[12:]])
    page.text(f"Made in {time.perf_counter() - started:.0f} s.")
    write_png(out / "gallery.png", in_one(sheets, model.size), colours=256)
    print(f"The page: {page.write()}\nAll pictures in one: {out / 'gallery.png'}")


if __name__ == "__main__":
    typer.run(main)
