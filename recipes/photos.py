"""A plain folder of pictures to train a control on: emoji as PNG files that are called by what they show.

    python recipes/photos.py photos
    controlkit train recipes/photos.yaml --out runs/photos

Concepts that no control may see are left out, as everywhere. Files are called ``red-apple_3d_1.png``: concept, style
and a number for each ground. The pictures are for training alone and not redistributed.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from controlkit.errors import Invalid
from controlkit.images import write_png
from controlkit.mini import world


def lay_out(folder: Path, size: int = 128, variants: int = 2, count: int | None = None) -> int:
    """Write the pictures controls may see, ``size`` pixels, each on ``variants`` grounds; returns how many there are.

    ``count``: so many pictures of all, evenly.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Invalid(f"{folder} is there and not empty: give a new folder.")
    emoji = world.load_emoji(size)
    drawn = [(row, visit) for row in world.rows(emoji, "control") for visit in range(variants)]
    step = max(len(drawn) // (count or len(drawn)), 1)
    drawn = drawn[::step][:count]
    for row, visit in track(drawn, "writing"):
        picture, _ = world.draw_emoji(emoji, row, 0, visit)
        write_png(folder / f"{emoji.concepts[row]}_{emoji.styles[row]}_{visit + 1}.png", picture)
    return len(drawn)


def main(
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    size: Annotated[int, typer.Option(help="Side in pixels.", min=32)] = 128,
    variants: Annotated[int, typer.Option(help="Grounds each emoji is seen on.", min=1)] = 2,
    count: Annotated[int | None, typer.Option(help="Pictures; all by default.", min=1)] = None,
) -> None:
    """Lay out a folder of emoji."""
    print(f"{lay_out(folder, size, variants, count)} pictures in {folder}")


if __name__ == "__main__":
    typer.run(main)
