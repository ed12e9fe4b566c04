"""Put trained models into the package, half precision, within the budget of shipped weights.

    python recipes/ship.py runs/mini/mini runs/mini/referee runs/canny runs/scribble

Each folder is shipped under its own name. A base or a referee is copied as it is (``recipes/mini.py`` writes half
precision); of a control's run its result is shipped, and it must have been trained on the base that is shipped.
"""

import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer

from controlkit.backbones import load_base
from controlkit.formats import load_control, save_control
from controlkit.hub import SHIPPED

BUDGET = 36_000_000  # bytes, all shipped weights together


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(
    folders: Annotated[list[Path], typer.Argument(help="Folders of a base, a referee, or controls' runs.")],
) -> None:
    """Put trained models into the package."""
    for folder in folders:
        target = SHIPPED / folder.name
        if (folder / "recipe.yaml").is_file():
            base = load_base("mini")
            control = load_control(folder / "control", base)
            if control.trained["base_digest"] != base.digest:
                raise typer.BadParameter(f"{folder} was trained on another base than the one shipped.")
            save_control(target, control, base, torch.float16)
        else:
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(folder, target)
        print(f"{target}: {size_of(target) / 1e6:.2f} MB")
    print(f"all shipped weights: {size_of(SHIPPED) / 1e6:.2f} MB; the package's tests hold them to {BUDGET / 1e6:.0f}")


if __name__ == "__main__":
    typer.run(main)
