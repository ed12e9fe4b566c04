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
from controlkit.sample import ControlRequest, EditRequest, HiresRequest, Request, maker, prepare

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
    edit: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``EditRequest``."""

    def of(self, start: Request) -> Request:
        """The start with this cell's changes."""
        changes = [*self.controls, *[{}] * (len(start.controls) - len(self.controls))]
        used = [
            ControlRequest(**{**dict(control), **change})
            for control, change in zip(start.controls, changes, strict=True)
            if change is not None
        ]
        edit = EditRequest(**{**dict(start.edit), **self.edit}) if start.edit else None
        return Request(**{**dict(start), "controls": tuple(used), "edit": edit, **self.request})


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
    """Pictures shown first, after the hints and the picture to be changed."""
    cell: int = CELL
    """Pixels of a picture on it."""


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

    scene = draw_scene(SIDE, SEED, 15)
    pair = Pair(scene.picture, scene.captions[0], truth=scene)
    hints = {name: hint_for_pair(pair, contract(name)) for name in ("pose", "depth")}
    used = tuple(ControlRequest(name=name, images=hint, ready=True) for name, hint in hints.items())
    return Request(prompt=pair.prompt, controls=used)


@cache
def scene(index: int, side: int = SIDE) -> tuple[np.ndarray, str]:
    """A drawn scene, uint8 (side, side, 3), and its caption."""
    from controlkit.mini.scenes import draw_scene

    one = draw_scene(side, SEED, index)
    return one.picture, one.captions[0]


def drawing(name: str) -> np.ndarray:
    """A drawing, uint8 (256, 256, 3)."""
    return np.asarray(Image.open(DRAWINGS / f"{name}.png").convert("RGB"))


def box(side: int, top: int, left: int, bottom: int, right: int) -> np.ndarray:
    """A mask, uint8 (side, side, 3), white in a box."""
    mask = np.zeros((side, side, 3), np.uint8)
    mask[top:bottom, left:right] = 255
    return mask


def repainted() -> Request:
    """The painted fish, to be changed."""
    edit = EditRequest(image=DRAWINGS / "colour_fish.png")
    return Request(prompt="a tropical fish, 3d style, on a blue background", edit=edit)


def replaced() -> Request:
    """A scene with a box, which is masked; controls read the picture."""
    picture, _ = scene(7)
    edit = EditRequest(image=picture, mask=box(SIDE, 44, 40, 108, 120))
    controls = (ControlRequest(name="canny"), ControlRequest(name="inpaint"))
    return Request(prompt="a striped yellow box, on a brown floor", edit=edit, controls=controls)


def masked() -> Request:
    """The same without a control."""
    return replaced().model_copy(update={"controls": ()})


def widened() -> Request:
    """A scene with a cone, to be continued at both sides."""
    picture, prompt = scene(3)
    edit = EditRequest(image=picture, outpaint=(0, 64, 0, 64))
    return Request(prompt=prompt, edit=edit, controls=(ControlRequest(name="inpaint"),))


def part() -> Request:
    """A scene of 256 pixels, whose cylinder is masked."""
    picture, _ = scene(15, 256)
    edit = EditRequest(image=picture, mask=box(256, 88, 140, 200, 220))
    return Request(prompt="a red cone, on a green floor", edit=edit, controls=(ControlRequest(name="inpaint"),))


def wide() -> np.ndarray:
    """The painted fish, twice as wide as high."""
    return np.ascontiguousarray(drawing("colour_fish")[64:192])


def wide_control() -> Request:
    """A wide drawing as the picture of canny."""
    control = ControlRequest(name="canny", images=wide())
    return Request(prompt="a tropical fish, fluent style, on a blue background", controls=(control,))


def wide_edit() -> Request:
    """A wide drawing to be changed into a square picture."""
    edit = EditRequest(image=wide())
    return Request(prompt="a tropical fish, 3d style, on a teal background", size=(SIDE, SIDE), edit=edit)


def enlarged() -> Request:
    """The drawn cat, to be made at twice the size, where tile can hold on to what the first pass made."""
    controls = (*cat().controls, ControlRequest(name="tile", passes="second"))
    return cat().model_copy(update={"controls": controls, "hires": HiresRequest(factor=2)})


def large() -> Request:
    """A painted house of 256 pixels, by canny or tile."""
    controls = tuple(ControlRequest(name=name, images=DRAWINGS / "colour_house.png") for name in ("canny", "tile"))
    return Request(prompt="a house, fluent style, on a blue background", size=(256, 256), controls=controls)


def unlike() -> Request:
    """The painted fish, with a prompt that asks for something else."""
    return fish().model_copy(update={"prompt": "an owl, fluent style, on a blue background"})


def plainly() -> Request:
    """The drawn cat, with a prompt that leaves style and ground open."""
    return cat().model_copy(update={"prompt": "a cat face"})


def unprompted() -> Request:
    """The painted fish, without a prompt."""
    return fish().model_copy(update={"prompt": ""})


def words() -> Request:
    """A start without control; each cell has a prompt of its own."""
    return Request(dialect="a1111")


def prompts(texts: Mapping[str, str]) -> list[Cell]:
    """A cell for each prompt, by its label."""
    return [Cell(label, {"prompt": text}) for label, text in texts.items()]


def used(label: str, **settings: Any) -> Cell:
    """A cell with settings of the first control."""
    return Cell(label, controls=(settings,))


def steps_from(first: float, last: float) -> tuple[float, ...]:
    """A factor for each of 20 steps, from ``first`` to ``last`` in equal parts."""
    return tuple(float(value) for value in np.linspace(first, last, 20).round(3))


SHEETS = (
    Sheet(
        "scale",
        "At 0 the base draws a fish of its own; the outline comes with the scale, and beyond 1 the stripes as well.",
        fish,
        [used(f"scale={value:g}", scale=value) for value in (0, 0.25, 0.5, 1, 1.5, 2)],
    ),
    Sheet(
        "start-end",
        "The outline is settled in the middle of the run: its first or last fifth alone does next to nothing.",
        fish,
        [
            used(f"start={start:g}, end={end:g}", start=start, end=end)
            for start, end in ((0, 1), (0, 0.2), (0, 0.5), (0.2, 1), (0.5, 1), (0.8, 1))
        ],
    ),
    Sheet(
        "by-step",
        "Factors that fall to 0 leave eye and stripes to the base; those that rise from 0 come too late for the fins.",
        fish,
        [
            used("1 on all steps"),
            *(
                used(f"from {first} to {last}", by_step=steps_from(first, last))
                for first, last in ((1, 0), (0, 1), (2, 0), (0, 2))
            ),
        ],
    ),
    Sheet(
        "by-tap",
        "Of the seven taps of `mini` the finest three hold most of the outline, the next three some, the last none.",
        fish,
        [
            used("1 on all taps"),
            used("1/1/1/0/0/0/0", by_tap=(1, 1, 1, 0, 0, 0, 0)),
            used("0/0/0/1/1/1/0", by_tap=(0, 0, 0, 1, 1, 1, 0)),
            used("0/0/0/0/0/0/1", by_tap=(0, 0, 0, 0, 0, 0, 1)),
            used("1/1/1/1/1/1/0", by_tap=(1, 1, 1, 1, 1, 1, 0)),
        ],
    ),
    Sheet(
        "mode",
        "An owl is asked for under the outline of a fish: `balanced` fills the outline, `prompt` draws an owl.",
        unlike,
        [used(f"mode={value}", mode=value) for value in ("balanced", "prompt", "control")],
    ),
    Sheet(
        "no-prompt",
        "Counted once, the hint gives pale pictures; the others strengthen it; `guess` keeps little but the outline.",
        unprompted,
        [
            used("hint-cfg=1", hint_cfg_scale=1),
            used("2.25, as shipped"),
            used("cond-only", cond_only=True),
            used("guess", guess=True),
            used("cfg-weights", cfg_weights=True),
        ],
    ),
    Sheet(
        "hint-cfg",
        "The more often guidance counts the hint, the more exactly it is followed: eye, stripes and fins.",
        fish,
        [used(f"hint-cfg={value}", hint_cfg_scale=value) for value in range(5)],
    ),
    Sheet(
        "region",
        "Where the mask is white the outline is followed; elsewhere the base draws its own fish.",
        fish,
        [used("everywhere"), used("region=left", region=half("left")), used("region=right", region=half("right"))],
        lead=[("left.png", np.minimum(half("left"), 225))],
    ),
    Sheet(
        "together",
        "The pose places the figure alone, the depth map the cylinder, too; both together agree.",
        figure,
        [
            Cell("without", controls=(None, None)),
            Cell("pose alone", controls=({}, None)),
            Cell("depth alone", controls=(None, {})),
            Cell("both"),
        ],
    ),
    Sheet(
        "weights",
        "The more the style weighs, the smoother and redder the apple; at 2 its leaf goes and the ground breaks up.",
        words,
        prompts(
            {
                f"(3d style:{weight})": f"a red apple, (3d style:{weight}), on a teal background"
                for weight in (0, 0.5, 1, 1.5, 2)
            }
        ),
    ),
    Sheet(
        "schedule",
        "A dog at once, after a fifth, half or four fifths of the steps, or never; after half a cat has a dog's snout.",
        words,
        prompts(
            {
                f"[cat:dog:{when}]": f"a [cat face:dog face:{when}], 3d style, on a teal background"
                for when in (0.0, 0.2, 0.5, 0.8, 1.0)
            }
        ),
    ),
    Sheet(
        "joined",
        "In turns, or both at once, the two become one picture: the owl's face with the cat's ears.",
        words,
        prompts(
            {
                "cat face": "a cat face",
                "owl": "an owl",
                "[cat face|owl]": "a [cat face|owl]",
                "cat face AND owl": "a cat face AND an owl",
                "… AND owl :0.5": "a cat face AND an owl :0.5",
            }
        ),
    ),
    Sheet(
        "clip-skip",
        "The text encoder of `mini` has two layers: without the last one seed 1 has other noses, eyes and flames.",
        words,
        [
            Cell(f"{what}, clip skip {layers}", {"prompt": f"a {what}", "clip_skip": layers})
            for what in ("rocket", "cat face", "panda")
            for layers in (1, 2)
        ],
    ),
    Sheet(
        "schedulers",
        "Six steps each. Karras's spacing spends five of them where all is noise, as `mini` has zero terminal SNR.",
        cat,
        [
            Cell(name, {"scheduler": name, "steps": 6})
            for name in ("DDIM", "Euler a", "DPM++ 2M", "DPM++ 2M Karras", "UniPC", "LCM")
        ],
    ),
    Sheet(
        "guidance",
        "More guidance, more contrast: at 8 the colours begin to glare, at 16 the face falls apart.",
        cat,
        [Cell(f"guidance {value}", {"guidance": value}) for value in (1, 2, 4, 8, 16)],
    ),
    Sheet(
        "guidance-rescale",
        "Guidance 16: the glare goes as the spread of the conditional prediction comes back; what broke stays broken.",
        cat,
        [Cell(f"rescale {value}", {"guidance": 16, "guidance_rescale": value}) for value in (0, 0.35, 0.7, 1)],
    ),
    Sheet(
        "seeds",
        "The same lines under a prompt that names neither style nor ground: the seed chooses.",
        plainly,
        [Cell(f"seed {seed}", {"seed": seed}) for seed in range(6)],
        seeds=(0,),
    ),
    Sheet(
        "variation",
        "Small shares change mouth and whiskers; at 1 all noise is that of seed 5, and both rows show the same cat.",
        plainly,
        [
            Cell(f"variation {share:g}", {"variation": share, "variation_seed": 5})
            for share in (0, 0.1, 0.2, 0.4, 0.7, 1)
        ],
    ),
    Sheet(
        "guider",
        "At 16 `cfg` glares and breaks the face up; `apg` looks as `cfg` does at 8. At 4 both are nearly the same.",
        cat,
        [
            Cell(f"{guider}, guidance {value}", {"guider": guider, "guidance": value})
            for value in (4, 8, 16)
            for guider in ("cfg", "apg")
        ],
    ),
    Sheet(
        "strength",
        "0 gives the picture back, 0.4 keeps its fish; from 0.8 on nothing is left of it, and `mini` draws a poor one.",
        repainted,
        [Cell(f"strength {share:g}", edit={"strength": share}) for share in (0, 0.2, 0.4, 0.6, 0.8, 1)],
    ),
    Sheet(
        "mask",
        "A striped yellow box is asked for. Alone the base fills the mask up to its left edge; `canny` reads the "
        "picture's edges and keeps the box's shape; `inpaint` reads what is around the hole and softens the cut.",
        replaced,
        [
            Cell("no control", controls=(None, None)),
            Cell("canny", controls=({}, None)),
            Cell("inpaint", controls=(None, {})),
            Cell("both"),
        ],
    ),
    Sheet(
        "mask-blur",
        "The cut at the mask's left edge softens; the wider it is, the more changes outside, too, up to the horizon.",
        masked,
        [Cell(f"mask-blur {pixels}", edit={"blur": pixels}) for pixels in (0, 4, 8, 16, 32)],
    ),
    Sheet(
        "outpaint",
        "64 pixels more at both sides: the base alone begins more cones; `inpaint` goes on with ground and sky.",
        widened,
        [Cell("no control", controls=(None,)), Cell("inpaint")],
        cell=160,
    ),
    Sheet(
        "margin",
        "A red cone is asked for. The whole picture at 128 pixels leaves it little room. With a margin the picture "
        "keeps its 256 pixels and the part gets all 128; at 0 its ground does not fit in, at 48 it does best.",
        part,
        [Cell("no margin", {"size": (SIDE, SIDE)}), *(Cell(f"margin {n}", edit={"margin": n}) for n in (0, 16, 48))],
        cell=144,
    ),
    Sheet(
        "resize",
        "A drawing twice as wide as high: `crop` loses eye and tail, `stretch` makes a high fish, `fill` keeps it all.",
        wide_control,
        [used(f"resize={how}", resize=how) for how in ("crop", "stretch", "fill")],
        lead=[("wide.png", wide())],
    ),
    Sheet(
        "edit-resize",
        "The same drawing, changed (strength 0.4); `fill` keeps it as it is and draws what is above and below: `mini` "
        "adds a blue fin.",
        wide_edit,
        [
            Cell("resize crop", edit={"resize": "crop", "strength": 0.4}),
            Cell("resize stretch", edit={"resize": "stretch", "strength": 0.4}),
            Cell("resize fill", edit={"resize": "fill"}),
        ],
    ),
    Sheet(
        "hires",
        "`mini`, trained at 128 pixels, makes the face rough at 256, at once or in a second pass; `tile` in the second "
        "pass holds on to the face of the first.",
        enlarged,
        [
            Cell("128 pixels", {"hires": None}, ({}, None)),
            Cell("256 at once", {"hires": None, "size": (2 * SIDE, 2 * SIDE)}, ({}, None)),
            Cell("hires 2", controls=({}, None)),
            Cell("hires 2, tile,passes=second"),
        ],
        seeds=(0,),
        cell=224,
    ),
    Sheet(
        "passes",
        "The second pass, at its strength of 0.7, loses the lines where they act in the first alone.",
        enlarged,
        [Cell(f"passes={which}", controls=({"passes": which}, None)) for which in ("both", "first", "second")],
        cell=160,
    ),
    Sheet(
        "tile",
        "Without a control each tile shows a house of its own; edges alone do not stop that; `tile` gives one house.",
        large,
        [
            Cell("as one, no control", controls=(None, None)),
            Cell("tile 128, no control", {"tile": SIDE}, (None, None)),
            Cell("tile 128, canny", {"tile": SIDE}, ({}, None)),
            Cell("tile 128, tile", {"tile": SIDE}, (None, {})),
        ],
        seeds=(0,),
        cell=160,
    ),
)


def hints(base: Backbone, start: Request, loaded: Mapping[str, SavedControl]) -> list[Labelled]:
    """The hints of a start's controls, as they are given to the controls."""
    [prepared] = prepare(base, [start], loaded)
    named = zip(start.controls, prepared.controls, strict=True)
    return [(asked.name, picture[..., :3]) for asked, control in named for picture in control.pictures().values()]


def given(start: Request) -> list[Labelled]:
    """The picture to be changed, reddened where it is masked."""
    if start.edit is None:
        return []
    image, mask = start.edit.image, start.edit.mask
    pixels = np.asarray(Image.open(image).convert("RGB")) if isinstance(image, Path) else image
    if not isinstance(mask, np.ndarray):
        return [("picture", pixels)]
    red = np.uint8([255, 60, 60])
    return [("picture, masked", np.where(mask > 127, pixels // 2 + red // 2, pixels))]


def drawn(sheet: Sheet, base: Backbone, loaded: Mapping[str, SavedControl]) -> np.ndarray:
    """A sheet's picture, uint8 (H, W, 3)."""
    start = sheet.start()
    starts = [start.model_copy(update={"seed": seed}) for seed in sheet.seeds]
    columns = [maker(base, loaded)([cell.of(start) for start in starts]) for cell in sheet.cells]
    lead = [*hints(base, start, loaded), *given(start), *sheet.lead]
    made = [[picture.pixels for picture in column] for column in columns]
    blank = np.full((SIDE, SIDE, 3), 255, np.uint8)
    rows = [
        [blank if place else picture for _, picture in lead] + [column[place] for column in made]
        for place in range(len(sheet.seeds))
    ]
    return grid(rows, [*(label for label, _ in lead), *(cell.label for cell in sheet.cells)], sheet.cell)


def write_webp(path: Path, picture: np.ndarray) -> int:
    """Write a picture, uint8 (H, W, 3), as a WebP file; its bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", quality=80, method=6)
    write_atomic(path, buffer.getvalue())
    return buffer.tell()
