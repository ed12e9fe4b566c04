"""Pictures made and written: one PNG each with its request, the hints, previews, and one sheet of all."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlkit.cli.matrix import Matrix
from controlkit.cli.requests import Asked, Loads
from controlkit.cli.shared import loaded_base, progress_bars, say, split_lora, warn
from controlkit.errors import Invalid, nearest, one_line

if TYPE_CHECKING:
    import numpy as np
    from rich.progress import Progress

    from controlkit.backbones import Backbone
    from controlkit.sample import Picture, Prepared, Previewer, Step

Made = tuple["np.ndarray", dict[str, Any]]
"""A picture that was written, uint8 (H, W, 3), and its file's ``settings`` and ``infotext``."""


@dataclass(frozen=True)
class Output:
    """Where pictures go, what is written into each, and how often a preview is shown."""

    folder: Path
    loads: Loads
    facts: Mapping[str, Any]
    """What neither requests nor ``loads`` say."""
    preview: int = 0
    """Every so many steps ``preview.png`` is written; 0 is never."""
    previewer: "Previewer | None" = None
    """None is the linear map."""


def loader(loads: Loads, memory: str, merges: bool = False) -> "Callable[[str], Backbone]":
    """A function that loads the base on a device; ``Invalid`` for a number format or a memory that are none.

    ``merges``: whether LoRAs are merged into it later.
    """
    from controlkit.formats.convert import DTYPES
    from controlkit.sample import MEMORY

    for option, value, known in (("dtype", loads.dtype, ("auto", *DTYPES)), ("memory", memory, MEMORY)):
        if value not in known:
            raise Invalid(f'--{option} is "{one_line(value)}": {nearest(value, known)}')
    options: dict[str, Any] = {"dtype": DTYPES.get(loads.dtype, "auto"), "vae": loads.vae, "waits": True}
    options["compiles"] = merges  # peft is read by what a base without it leaves out
    options["embeddings"] = [Path(one) for one in loads.embedding]
    options["loras"] = [split_lora(text) for text in loads.lora]
    return partial(_loaded, loads.base, memory, options)


def _loaded(name: str, memory: Any, options: Mapping[str, Any], device: str) -> "Backbone":
    base = loaded_base(name, device, **options)
    return base if memory == "auto" else base.place(memory)


def as_loaded(loads: Loads, base: "Backbone") -> Loads:
    """The same with the number format that ``auto`` came to."""
    from controlkit.formats.convert import dtype_name

    return replace(loads, dtype=dtype_name(base.dtype))


def facts_of(base: "Backbone", asked: Asked) -> dict[str, Any]:
    """The facts that are known before pictures are made; threads are settled, to those of a repeated picture."""
    import torch

    from controlkit.backbones.schedulers import own_name
    from controlkit.precision import number_format, settle_threads

    here = number_format(base.device.type)
    if asked.format not in ("", here):
        warn(f"it was made in {one_line(asked.format)}, which here is {here}: pixels may differ")
    if 0 < asked.threads <= (os.cpu_count() or 1):
        torch.set_num_threads(asked.threads)
    else:
        settle_threads(base.networks().values())
        if asked.threads:
            warn(f"it was made on {asked.threads} threads, more than there are here: pixels may differ by a level")
    return {"format": here, "threads": torch.get_num_threads(), "sampler": own_name(base.noise)}


def write_all(base: "Backbone", prepared: "Sequence[Prepared]", matrix: Matrix, output: Output, batch: int = 0) -> int:
    """Make pictures and write them, their hints and ``grid.png``; how many.

    ``batch``: how many copies of one picture to make together, of which the first is kept; 0 is none.
    """
    from controlkit.images import thumbnail

    made, settings = [], dict[str, Any]()
    for pixels, texts in written(base, list(prepared) * max(batch, 1), matrix.names(), output):
        made.append(thumbnail(pixels))
        settings = settings or texts
    size, columns = len(matrix.columns), list(matrix.columns)
    rows = [made[i : i + size] for i in range(0, len(made), size)]
    hints = write_hints(prepared[0], output.folder)
    if len(rows) == 1:
        rows = [[*(hint for _, hint in hints), *made]]
        columns = [*(label for label, _ in hints), *columns]
    write_sheet(output.folder, rows, columns, matrix.labels, settings)
    return len(made)


def written(
    base: "Backbone",
    prepared: "Sequence[Prepared]",
    names: Sequence[str],
    output: Output,
    stem: str = "picture",
    more: Sequence[Mapping[str, Any]] = (),
) -> Iterator[Made]:
    """Make pictures and write each as ``STEM-NAME.png``, as many as there are names; ``more``: facts of each."""
    from controlkit.files import mark_output
    from controlkit.images import write_png
    from controlkit.sample import generate, pictures
    from controlkit.sample.embedded import embedded

    for note in dict.fromkeys(note for one in prepared for note in one.notes):
        warn(note)
    with progress_bars() as progress:
        following = _Following(progress, prepared, output)
        found = pictures(following.seen(generate(base, prepared, previewer=output.previewer)))
        for i, (name, picture) in enumerate(zip(names, found, strict=False)):
            own = dict(more[i]) if more else {}
            facts = {**output.facts, **output.loads.facts(), **own, "batch": following.together}
            texts = embedded(prepared[i].settled(), facts | {"annotators": prepared[i].annotators()}, picture.pixels)
            mark_output(output.folder, "generate")
            write_png(output.folder / f"{stem}-{name}.png", picture.pixels, **texts)
            yield picture.pixels, texts


class _Following:
    """A run on its way, shown: a bar with pictures a minute, and previews."""

    def __init__(self, progress: "Progress", prepared: "Sequence[Prepared]", output: Output) -> None:
        self.progress, self.output, self.count = progress, output, len(prepared)
        self.task = progress.add_task("generating", total=sum(one.steps for one in prepared), figures="")
        self.together = 1
        """How many pictures were being made at the last step."""

    def seen(self, records: "Iterable[Step | Picture]") -> "Iterator[Step | Picture]":
        """The records, after their steps are shown."""
        from controlkit.sample import Step

        for record in records:
            if isinstance(record, Step):
                self._show(record)
            yield record

    def _show(self, step: "Step") -> None:
        self.together = step.together
        self.progress.advance(self.task, step.count)
        task = self.progress.tasks[self.task]
        if task.elapsed:
            minutes, share = task.elapsed / 60, task.completed / (task.total or 1)
            self.progress.update(self.task, figures=f"{self.count * share / minutes:.1f} pictures a minute")
        if self.output.preview and step.step % self.output.preview == 0:
            self._write_preview(step)

    def _write_preview(self, step: "Step") -> None:
        from controlkit.files import mark_output
        from controlkit.images import grid, write_png

        mark_output(self.output.folder, "generate")
        write_png(self.output.folder / "preview.png", grid([step.preview()], cell=256))


def write_hints(one: "Prepared", folder: Path) -> "list[tuple[str, np.ndarray]]":
    """Write a picture's hints as ``hint-0-NAME.png`` and so on; each with its label in a sheet."""
    from controlkit.images import write_png

    shown = [
        (f"{Path(asked.name).name}{f':{kind}' if kind else ''}", hint)
        for asked, control in zip(one.request.controls, one.controls, strict=True)
        for kind, hint in control.pictures().items()
    ]
    for i, (label, hint) in enumerate(shown):
        name = re.sub(r"[^\w.-]", "-", label)[:60]
        write_png(folder / f"hint-{i}-{name}.png", hint)
    return [(f"hint: {label}", hint) for label, hint in shown]


def write_sheet(
    folder: Path,
    rows: "Sequence[Sequence[np.ndarray]]",
    columns: Sequence[str],
    labels: Sequence[str],
    texts: Mapping[str, Any],
) -> None:
    """Write pictures in rows and columns as ``grid.png``; ``texts``: ``settings`` and ``infotext`` of the first."""
    from controlkit.images import grid, write_png

    sheet = grid(rows, list(map(one_line, columns)), row_labels=list(map(one_line, labels)))
    write_png(folder / "grid.png", sheet, **texts)


def write_captioned(
    base: "Backbone", prepared: "Sequence[Prepared]", matrix: Matrix, output: Output, captioner: str | None
) -> int:
    """Make pictures, caption each, and make it again with that caption as its prompt (the paper's Fig. 6); how many.

    Of each the first is ``first-NAME.png`` and the second ``picture-NAME.png``; ``grid.png`` shows both.
    """
    from controlkit.images import thumbnail
    from controlkit.measure import caption_with
    from controlkit.sample import prepare

    caption, by = caption_with(base, captioner)
    first, captions = [], []
    for pixels, _ in written(base, prepared, matrix.names(), output, "first"):
        first.append(thumbnail(pixels))
        captions.append(caption(pixels))
    again = prepare(
        base, [one.request.model_copy(update={"prompt": text}) for one, text in zip(prepared, captions, strict=True)]
    )
    more = [
        {"auto_prompt": {"caption": text, "by": by, "first": f"first-{name}.png"}}
        for name, text in zip(matrix.names(), captions, strict=True)
    ]
    rows, texts = [], dict[str, Any]()
    hints = write_hints(prepared[0], output.folder)
    for before, (pixels, texts_of) in zip(first, written(base, again, matrix.names(), output, more=more), strict=True):
        rows.append([*(hint for _, hint in hints), before, thumbnail(pixels)])
        texts = texts or texts_of
    for name, text in zip(matrix.names(), captions, strict=True):
        say(f'picture-{name}.png: "{one_line(text)}"')
    columns = [*(label for label, _ in hints), "plain prompt", "its caption"]
    write_sheet(output.folder, rows, columns, captions, texts)
    return len(rows)
