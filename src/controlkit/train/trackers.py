"""Where a run's figures and sheets of samples go besides its log: TensorBoard, Weights & Biases, trackio.

Each is an extra. No step is sent twice: after an interruption TensorBoard deletes the steps after the checkpoint; the
others are not sent them again, as they are the same to the bit.
"""

import importlib
import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from controlkit.errors import NotFound, UserError
from controlkit.files import read_json, write_atomic
from controlkit.images import read_picture
from controlkit.train.recipe import TrackingRecipe
from controlkit.train.records import Record


class _TensorBoard:
    """``send`` sends the figures of a step by name, and its sample sheets, if any; ``close`` the rest."""

    def __init__(self, out: Path, step: int) -> None:
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
    """As ``_TensorBoard``; wandb, or trackio, which has the same functions."""

    def __init__(self, library: str, sent: int, **settings: Any) -> None:
        self._library: Any = importlib.import_module(library)
        self._sent = sent
        self._library.init(**settings, resume="allow")

    def send(self, step: int, figures: Mapping[str, float], sheets: Mapping[str, Path]) -> None:
        if step > self._sent:
            shown = {name: self._library.Image(read_picture(sheet)) for name, sheet in sheets.items()}
            self._library.log({**figures, **shown}, step=step)

    def close(self) -> None:
        self._library.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Raise ``NotFound`` for a tracker that is not installed."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise NotFound(
                f'tracking.to has "{name}", which cannot be imported ({error}): pip install "controlkit[{name}]", or '
                "leave it out. OUT/log.jsonl and `controlkit watch` are there in any case."
            ) from error


@contextmanager
def tracked(
    plan: TrackingRecipe, config: Mapping[str, Any], out: Path, step: int, logged: int
) -> Iterator[Callable[[Record, float], None]]:
    """Open a run's trackers, and give a function that sends them a record and its learning rate.

    ``config``: the recipe's values, to be shown. ``step``: the step of the checkpoint to resume from. ``logged``: the
    last step in the log before it was cut back to that.
    """
    opened: list[_TensorBoard | _Hosted] = []
    name, sent = _history(out, logged) if plan.to else ("", 0)
    settings = {"project": plan.project, "config": config}
    for library in plan.to:
        if library == "tensorboard":
            opened.append(_TensorBoard(out, step))
        elif library == "wandb":
            opened.append(_Hosted(library, sent, **settings, dir=str(out), name=out.resolve().name, id=name))
        else:  # trackio identifies a run by its name
            opened.append(_Hosted(library, sent, **settings, name=f"{out.resolve().name}-{name}"))

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
    """The run's name for trackers, and the last step that was ever sent to them."""
    path = out / "tracking.json"
    try:
        held = read_json(path)
        if not re.fullmatch(r"[0-9a-f]{8}", held["name"]):
            raise ValueError("it is no name that was given here")
        name, sent = held["name"], max(int(held["sent"]), logged)
    except (UserError, ValueError, KeyError, TypeError):  # none yet, or a damaged one
        name, sent = uuid.uuid4().hex[:8], logged
    write_atomic(path, (json.dumps({"name": name, "sent": sent}) + "\n").encode())
    return name, sent
