"""Sheets of every annotator that runs here, for docs/annotators.md.

    pip install scikit-image          # its photographs, which are in the public domain
    python recipes/annotators.py      # docs/annotators/{lines,pictures,scenes}.webp, half a minute

A row for each annotator, and another with the options that controls from elsewhere are used to. Annotators of the
embedded world are shown on its scenes alone.
"""

import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from rich.console import Console

from controlkit.annotators import HintKind, all_kinds, kind_of
from controlkit.errors import NotFound
from controlkit.files import write_atomic
from controlkit.images import fit, grid, read_picture
from generation_sheets import drawing, scene  # recipes/generation_sheets.py

SIDE, CELL, MOST = 512, 112, 150_000
PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "camera.png")
SCENES = (0, 15)
SHEETS: Mapping[str, Callable[[HintKind], bool]] = {
    "lines": lambda kind: kind.lines,
    "scenes": lambda kind: kind_of(kind.contract_name).truth is not None,
    "pictures": lambda kind: not kind.lines and kind_of(kind.contract_name).truth is None,
}
"""Which annotators are on a sheet."""

app = typer.Typer(add_completion=False)
console = Console(highlight=False)


def photographs() -> Path:
    """The folder of scikit-image's photographs, found without importing it; ``NotFound`` where it is not installed."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise NotFound("The photographs are scikit-image's: install it with pip install scikit-image.")
    return Path(spec.submodule_search_locations[0]) / "data"


def shown(hint: np.ndarray) -> np.ndarray:
    """A hint to look at; where it is masked, a chequered ground."""
    if hint.shape[-1] == 3:
        return hint
    y, x = np.mgrid[: hint.shape[0], : hint.shape[1]] // (hint.shape[0] // 16)
    ground = np.where((y + x) % 2, 200, 240).astype(np.uint8)[..., None].repeat(3, 2)
    return np.where(hint[..., 3:] < 128, ground, hint[..., :3])


def row(
    kind: HintKind, options: Mapping[str, float], pictures: Sequence[np.ndarray], scenes: range
) -> list[np.ndarray]:
    """A kind's hints of all pictures; white where it does not know such pictures."""
    known = [place for place in range(len(pictures)) if not kind.own_world or place in scenes]
    made = dict(zip(known, kind.make([pictures[place] for place in known], options), strict=True))
    return [shown(made[p]) if p in made else np.full_like(picture, 255) for p, picture in enumerate(pictures)]


def webp(picture: np.ndarray) -> bytes:
    """A picture as a WebP file of at most MOST bytes, of the best quality that this allows."""
    for quality in range(80, 0, -10):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "WEBP", quality=quality, method=6)
        if buffer.tell() <= MOST:
            break
    return buffer.getvalue()


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for the sheets.")] = Path("docs/annotators"),
    photos: Annotated[Path | None, typer.Option(help="Folder of the photographs; scikit-image's by default.")] = None,
) -> None:
    """Write the sheets."""
    folder = photos or photographs()
    pictures = [fit(read_picture(folder / name), (SIDE, SIDE)) for name in PHOTOGRAPHS]
    scenes = range(len(pictures), len(pictures) + len(SCENES))
    pictures += [*(scene(index)[0] for index in SCENES), drawing("fish")]
    labels = [*(Path(name).stem for name in PHOTOGRAPHS), *("a scene" for _ in SCENES), "a drawing"]
    ready = [kind for kind in all_kinds() if not kind.lacks()]
    for name, which in SHEETS.items():
        rows = [("the picture", pictures)]
        for kind in sorted(filter(which, ready), key=place_of):
            rows.append((kind.name, row(kind, {}, pictures, scenes)))
            if kind.foreign:
                words = ", ".join(f"{option} {value:g}" for option, value in kind.foreign.items())
                rows.append((f"{kind.name}, {words}", row(kind, kind.foreign, pictures, scenes)))
        content = webp(grid([one for _, one in rows], labels, CELL, [label for label, _ in rows]))
        write_atomic(out / f"{name}.webp", content)
        console.print(f"{out / name}.webp: {len(rows) - 1} rows, {len(content) / 1000:.0f} kB")


def place_of(kind: HintKind) -> int:
    """The place of a kind's family in the table."""
    return [one.name for one in all_kinds()].index(kind.contract_name)


if __name__ == "__main__":
    app()
