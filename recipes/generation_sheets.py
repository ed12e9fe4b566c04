"""Sheets of pictures, one for each option of generation: ``SHEETS`` is the table of what they show.

A new option is a row of that table. The command is in ``generation.py``; ``docs/generation.md`` shows the sheets.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from controlkit.annotators import contract
from controlkit.backbones import Backbone
from controlkit.data import Pair, hint_for_pair
from controlkit.files import write_atomic
from controlkit.formats import SavedControl
from controlkit.images import grid
from controlkit.sample import ControlRequest, Request, maker, prepare

DRAWINGS = Path(__file__).parent / "drawings"
SIDE = 128
"""Pixels of the pictures of ``mini``."""
CELL = 112
"""Pixels of a picture on a sheet."""
SEED = 2**31 - 5  # of the scene shown: nothing was trained on it
Labelled = tuple[str, np.ndarray]


@dataclass(frozen=True)
class Cell:
    """A column of a sheet: what it is called, and what is changed for it."""

    label: str
    request: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``Request``."""
    controls: Sequence[Mapping[str, Any] | None] = ()
    """Fields of each ``ControlRequest``, in order; None leaves that control out."""

    def of(self, start: Request) -> Request:
        """The start with this cell's changes."""
        changes = [*self.controls, *[{}] * (len(start.controls) - len(self.controls))]
        used = [
            ControlRequest(**{**dict(control), **change})
            for control, change in zip(start.controls, changes, strict=True)
            if change is not None
        ]
        return Request(**{**dict(start), "controls": tuple(used), **self.request})


@dataclass(frozen=True)
class Sheet:
    """One option: pictures side by side that differ in it alone, a row for each seed."""

    name: str
    shows: str
    """The line below it: what is to be seen."""
    start: Callable[[], Request]
    cells: Sequence[Cell]
    seeds: Sequence[int] = (0, 1)
    lead: Sequence[Labelled] = ()
    """Pictures shown first, after the hints."""


def half(side: str) -> np.ndarray:
    """A mask, white in the ``left`` or ``right`` half."""
    mask = np.zeros((SIDE, SIDE, 3), np.uint8)
    mask[:, : SIDE // 2] = 255
    return mask if side == "left" else 255 - mask


@cache
def cat() -> Request:
    """A drawn cat, for scribble."""
    drawing = ControlRequest(name="scribble", images=DRAWINGS / "cat_face.png", ready=True)
    return Request(prompt="a cat face, 3d style, on a teal background", controls=(drawing,))


@cache
def fish() -> Request:
    """A painted fish, for canny."""
    drawing = ControlRequest(name="canny", images=DRAWINGS / "colour_fish.png")
    return Request(prompt="a tropical fish, fluent style, on a blue background", controls=(drawing,))


@cache
def figure() -> Request:
    """A scene with a figure, for pose and depth together."""
    from controlkit.mini.scenes import draw_scene  # numba's import takes a second

    scene = draw_scene(SIDE, SEED, 7)
    pair = Pair(scene.picture, scene.captions[0], truth=scene)
    hints = {name: hint_for_pair(pair, contract(name)) for name in ("pose", "depth")}
    used = tuple(ControlRequest(name=name, images=hint, ready=True) for name, hint in hints.items())
    return Request(prompt=pair.prompt, controls=used)


def words(prompt: str = "", dialect: str = "a1111", **changes: Any) -> Callable[[], Request]:
    """A start without control."""
    return lambda: Request(prompt=prompt, dialect=dialect, **changes)


def over(name: str, values: Sequence[Any], label: str = "{}") -> list[Cell]:
    """A cell for each value of a field of ``Request``."""
    return [Cell(label.format(value), {name: value}) for value in values]


def used(**settings: Any) -> Cell:
    """A cell with settings of the first control."""
    label = ", ".join(f"{name} {value}" for name, value in settings.items())
    return Cell(label, controls=(settings,))


TAPS = 7  # of the controls of mini: six skips, the middle block


def steps_of(count: int, first: float, last: float) -> tuple[float, ...]:
    """Factors for each of ``count`` steps, from ``first`` to ``last`` in equal parts."""
    return tuple(float(value) for value in np.linspace(first, last, count).round(3))


SHEETS = (
    Sheet("scale", "", fish, [used(scale=value) for value in (0, 0.25, 0.5, 1, 1.5, 2)]),
    Sheet(
        "start-end",
        "",
        fish,
        [
            Cell(f"{start:g} to {end:g}", controls=({"start": start, "end": end},))
            for start, end in ((0, 1), (0, 0.2), (0, 0.5), (0.2, 1), (0.5, 1), (0.8, 1))
        ],
    ),
    Sheet(
        "by-step",
        "",
        fish,
        [
            Cell(label, controls=({"by_step": factors},))
            for label, factors in (
                ("1 on all", ()),
                ("1 to 0", steps_of(20, 1, 0)),
                ("0 to 1", steps_of(20, 0, 1)),
                ("2 to 0", steps_of(20, 2, 0)),
                ("0 to 2", steps_of(20, 0, 2)),
            )
        ],
    ),
    Sheet(
        "by-tap",
        "",
        fish,
        [
            Cell(label, controls=({"by_tap": factors},))
            for label, factors in (
                ("1 on all", ()),
                ("finest three", (1, 1, 1, 0, 0, 0, 0)),
                ("next three", (0, 0, 0, 1, 1, 1, 0)),
                ("middle", (0, 0, 0, 0, 0, 0, 1)),
                ("without middle", (1, 1, 1, 1, 1, 1, 0)),
            )
        ],
    ),
    Sheet("mode", "", cat, [used(mode=value) for value in ("balanced", "prompt", "control")]),
    Sheet(
        "no-prompt",
        "",
        lambda: fish().model_copy(update={"prompt": ""}),
        [
            Cell("hint-cfg 1", controls=({"hint_cfg_scale": 1},)),
            Cell("as shipped: 2.25", {}),
            Cell("cond-only", controls=({"cond_only": True},)),
            Cell("guess", controls=({"guess": True},)),
            Cell("cfg-weights", controls=({"cfg_weights": True},)),
        ],
    ),
    Sheet("hint-cfg", "", fish, [Cell(f"hint-cfg {v:g}", controls=({"hint_cfg_scale": v},)) for v in (0, 1, 2, 3, 4)]),
    Sheet(
        "region",
        "",
        fish,
        [
            Cell("everywhere", {}),
            Cell("left", controls=({"region": half("left")},)),
            Cell("right", controls=({"region": half("right")},)),
        ],
        lead=[("region left", half("left"))],
    ),
    Sheet(
        "together",
        "",
        figure,
        [
            Cell("without", controls=(None, None)),
            Cell("pose alone", controls=({}, None)),
            Cell("depth alone", controls=(None, {})),
            Cell("both", {}),
        ],
    ),
    Sheet(
        "weights",
        "",
        words(),
        over("prompt", [f"a red apple, (3d style:{w}), on a teal background" for w in (0, 0.5, 1, 1.5)], "{}"),
    ),
    Sheet(
        "schedule",
        "",
        words(),
        over(
            "prompt",
            [f"a [cat face:dog face:{w}], 3d style, on a teal background" for w in (0, 0.2, 0.5, 0.8, 1)],
            "{}",
        ),
    ),
    Sheet(
        "joined",
        "",
        words(),
        over(
            "prompt",
            ["a cat face", "an owl", "a [cat face|owl]", "a cat face AND an owl", "a cat face AND an owl :0.5"],
        ),
    ),
    Sheet("clip-skip", "", cat, [Cell(f"clip-skip {n}", {"dialect": "a1111", "clip_skip": n}) for n in (1, 2, 3, 4)]),
    Sheet(
        "schedulers",
        "",
        cat,
        [Cell(n, {"scheduler": n, "steps": 8}) for n in ("DDIM", "Euler a", "DPM++ 2M Karras", "UniPC", "LCM")],
    ),
    Sheet("guidance", "", cat, over("guidance", (1, 2, 4, 8, 16), "guidance {}")),
    Sheet(
        "guidance-rescale",
        "",
        cat,
        [Cell(f"rescale {v}", {"guidance": 16, "guidance_rescale": v}) for v in (0, 0.35, 0.7, 1)],
    ),
    Sheet("seeds", "", cat, over("seed", range(6), "seed {}"), seeds=(0,)),
)


def hints(base: Backbone, start: Request, loaded: Mapping[str, SavedControl]) -> list[Labelled]:
    """The hints of a start's controls, as they are given to the controls."""
    [prepared] = prepare(base, [start], loaded)
    named = zip(start.controls, prepared.controls, strict=True)
    return [(asked.name, picture[..., :3]) for asked, control in named for picture in control.pictures().values()]


def drawn(sheet: Sheet, base: Backbone, loaded: Mapping[str, SavedControl]) -> np.ndarray:
    """A sheet's picture, uint8 (H, W, 3)."""
    start = sheet.start()
    starts = [start.model_copy(update={"seed": seed}) for seed in sheet.seeds]
    columns = [maker(base, loaded)([cell.of(start) for start in starts]) for cell in sheet.cells]
    lead = [*hints(base, start, loaded), *sheet.lead]
    made = [[picture.pixels for picture in column] for column in columns]
    blank = np.full((SIDE, SIDE, 3), 255, np.uint8)
    rows = [
        [blank if place else picture for _, picture in lead] + [column[place] for column in made]
        for place in range(len(sheet.seeds))
    ]
    return grid(rows, [*(label for label, _ in lead), *(cell.label for cell in sheet.cells)], CELL)


def write_webp(path: Path, picture: np.ndarray) -> int:
    """Write a picture, uint8 (H, W, 3), as a WebP file; its bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", quality=80, method=6)
    write_atomic(path, buffer.getvalue())
    return buffer.tell()
