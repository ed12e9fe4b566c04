"""Where a run's figures and sheets of samples go besides its log: TensorBoard, Weights & Biases, trackio.

Each is an extra. No step is sent twice: after an interruption TensorBoard is told to forget what lies behind the
checkpoint; the others are not sent again what they had, which is the same to the bit.
"""

import importlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from controlkit.errors import UserError
from controlkit.images import read_picture, write_atomic
from controlkit.train.recipe import Recipe
from controlkit.train.records import Record


class Tracker(Protocol):
    """One of them, open for a run."""

    def send(self, step: int, figures: Mapping[str, float], sheets: Mapping[str, Path]) -> None:
        """The figures of a step by name, and sheets of samples where there are such."""

    def close(self) -> None:
        """Send what is left."""


class _TensorBoard:
    def __init__(self, recipe: Recipe, out: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def send(self, step: int, figures: Mapping[str, float], sheets: Mapping[str, Path]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        for name, sheet in sheets.items():
            self._writer.add_image(name, read_picture(sheet), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _Hosted:
    """wandb, or trackio, which is called alike."""

    def __init__(self, library: str, recipe: Recipe, sent: int, **more: str) -> None:
        self._library: Any = importlib.import_module(library)
        self._sent = sent
        settings = {"project": recipe.tracking.project, "config": recipe.model_dump(), "resume": "allow"}
        self._library.init(**settings, **more)

    def send(self, step: int, figures: Mapping[str, float], sheets: Mapping[str, Path]) -> None:
        if step > self._sent:
            shown = {name: self._library.Image(read_picture(sheet)) for name, sheet in sheets.items()}
            self._library.log({**figures, **shown}, step=step)

    def close(self) -> None:
        self._library.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Refuse those that are not installed."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f'tracking.to has "{name}", which cannot be imported ({error}): pip install "controlkit[{name}]", or '
                "leave it out. OUT/log.jsonl and `controlkit watch` are there in any case."
            ) from error


@contextmanager
def tracked(recipe: Recipe, out: Path, step: int, logged: int) -> Iterator[Callable[[Record, float], None]]:
    """Within it, a function that sends a record and its learning rate to the recipe's trackers.

    Args:
        step: of the checkpoint the run goes on from.  logged: the last step the log had before it was cut back to that.
    """
    opened: list[Tracker] = []
    name, sent = _history(out, logged) if recipe.tracking.to else ("", 0)
    for library in recipe.tracking.to:
        if library == "tensorboard":
            opened.append(_TensorBoard(recipe, out, step))
        elif library == "wandb":
            opened.append(_Hosted(library, recipe, sent, dir=str(out), name=out.resolve().name, id=name))
        else:  # it knows a run by its name
            opened.append(_Hosted(library, recipe, sent, name=f"{out.resolve().name}-{name}"))

    def track(record: Record, rate: float) -> None:
        made = {"samples": f"step-{record.step:07d}.png", "own samples": f"own-step-{record.step:07d}.png"}
        sheets = {name: path for name, file in made.items() if (path := out / "samples" / file).is_file()}
        for tracker in opened:
            tracker.send(record.step, {**record.figures(), "rate": rate}, sheets if record.drift else {})

    try:
        yield track
    finally:
        for tracker in opened:
            tracker.close()


def _history(out: Path, logged: int) -> tuple[str, int]:
    """The run's name for trackers, and the last step they were ever sent."""
    path = out / "tracking.json"
    held = json.loads(path.read_text()) if path.is_file() else {}
    name, sent = str(held.get("name") or uuid.uuid4().hex[:8]), max(int(held.get("sent", 0)), logged)
    write_atomic(path, (json.dumps({"name": name, "sent": sent}) + "\n").encode())
    return name, sent
