"""Figures of generation: controls together, without a prompt, silent in half, in a hole; by steps and speed; seams.

Each is measured on held-out pairs by ``controlkit.measure``. ``FIGURES`` lists them; ``generation.py`` is the command.
The picture of a request is made once, whichever figures ask for it.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from controlkit.annotators import contract
from controlkit.backbones import Backbone
from controlkit.data import Pair
from controlkit.errors import Invalid
from controlkit.files import read_json, write_atomic
from controlkit.formats import SavedControl, load_control
from controlkit.measure import (
    EMBEDDED,
    EvaluationPlan,
    Quality,
    Way,
    ceiling_of,
    fidelity,
    first_kind,
    mean_figure,
    metric_of,
    obedience,
    quality_kept,
)
from controlkit.measure.fidelity import finder_of
from controlkit.precision import number_format
from controlkit.sample import ControlRequest, EditRequest, Request, maker
from controlkit.sample.tiles import tiles_of
from generation_sheets import scene  # recipes/generation_sheets.py

Pictures = list[np.ndarray]
Report = dict[str, Any]
SCHEDULERS = ("DDIM", "Euler a", "DPM++ 2M Karras", "UniPC")
STEPS = (4, 8, 12, 20, 40)
UNPROMPTED: dict[str, dict[str, Any]] = {
    "both halves": {"hint_cfg_scale": 1.0},
    "as shipped": {},
    "cond-only": {"cond_only": True},
    "guess": {"guess": True},
    "cfg-weights": {"cfg_weights": True},
}
"""Ways in which guidance may count a hint; the first is plain guidance, with which the others are compared."""
SILENCED = (("canny", "scribble", "emoji"), ("canny", "depth", "scenes"), ("depth", "canny", "scenes"),
            ("depth", "pose", "scenes"))  # fmt: skip
"""A control, another one whose hint is empty in the left half, and the pictures that both are measured on."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Held-out pairs, and the referee of such pictures."""

    pairs: list[Pair]
    quality: Quality


@dataclass
class Lab:
    """A base with its controls, and the pictures that are made with them here, each once."""

    base: Backbone
    num: int = 32
    """Pictures that each condition is measured on."""
    steps: int = 20
    guidance: float = 4.0
    counts: Sequence[int] = STEPS
    """Numbers of steps at which schedulers are compared."""
    on_step: Callable[[int], None] = lambda count: None
    _controls: dict[str, SavedControl] = field(default_factory=dict)
    _heldout: dict[str, HeldOut] = field(default_factory=dict)
    _made: dict[Request, np.ndarray] = field(default_factory=dict)

    @property
    def settings(self) -> Report:
        """All that figures depend on, to be written beside them."""
        return {
            "num": self.num,
            "steps": self.steps,
            "guidance": self.guidance,
            "counts": list(self.counts),
            "scale": 1.0,
            "hint_cfg_scale": self.control("canny").hint_cfg_scale,
            "seeds": f"0-{self.num - 1}",
            "base": self.base.name,
            "base_digest": self.base.digest,
            "format": number_format(self.base.device.type),
        }

    def control(self, name: str) -> SavedControl:
        """A control by its name."""
        if name not in self._controls:
            self._controls[name] = load_control(name, self.base)
        return self._controls[name]

    def heldout(self, name: str) -> HeldOut:
        """Held-out pairs for the control of this name: scenes with a figure for poses, emoji for edges."""
        kind = first_kind(contract(name))
        world = f"{bool(kind.truth)} {kind.needs_person}"
        if world not in self._heldout:
            pairs, real = EMBEDDED.heldout(contract(name), self.base.size, self.num)
            quality = Quality(EMBEDDED.referee(self.base.device.type), real)
            self._heldout[world] = HeldOut([pairs[i] for i in range(len(pairs))], quality)
        return self._heldout[world]

    def plan(self, name: str, pairs: Sequence[Pair], **use: Any) -> EvaluationPlan:
        """A control's plan on pairs, used with these settings."""
        control = ControlRequest(name=name, **use)
        return EvaluationPlan(control, self.control(name).hint, pairs, self.steps, self.guidance)

    def pictures(self, *plans: EvaluationPlan, way: Way = "controlled", **changes: Any) -> Pictures:
        """The pictures of plans of the same pairs, under the controls of all together; ``changes``: of ``Request``."""
        columns = zip(*(plan.requests(way) for plan in plans), strict=True)
        asked = [
            row[0].model_copy(update={"controls": tuple(used for one in row for used in one.controls), **changes})
            for row in columns
        ]
        return self.made(asked)

    def made(self, asked: Sequence[Request]) -> Pictures:
        """The pictures of requests."""
        for name in {control.name for request in asked for control in request.controls}:
            self.control(name)
        if new := [request for request in asked if request not in self._made]:
            made = maker(self.base, self._controls, on_step=self.on_step)(new)
            self._made |= {picture.request: picture.pixels for picture in made}
        return [self._made[request] for request in asked]

    def forget(self) -> None:
        """Make pictures anew that are asked for again."""
        self._made.clear()

    def reconstructed(self, on: HeldOut) -> Pictures:
        """The pairs' pictures as they come back from the base's VAE: the ceiling."""
        return ceiling_of(self.base)([pair.picture for pair in on.pairs])


@dataclass(frozen=True, eq=False)
class Conditions:
    """The same pairs made under several conditions, and without the right hint: ``floors``."""

    plan: EvaluationPlan
    """Whose hints are looked for."""
    made: Mapping[str, Pictures]
    """Each condition's pictures. The first is what the others are compared with."""
    none: Pictures
    """Without control."""
    shuffled: Mapping[str, Pictures]
    """Each condition's pictures with the hints of other pairs; of "", those of all conditions that are not named."""
    ceiling: Pictures

    def measured(self, where: tuple[slice, ...] = ()) -> dict[str, Report]:
        """Each condition's obedience, and its ``share`` of the first's: (fidelity - floor) / (first's - floor).

        ``where``: the part of each picture to look at, after it was annotated whole.
        """
        spec = self.plan.spec
        find, hints = finder_of(spec), [hint[where] for hint in self.plan.hints]

        def scores(pictures: Pictures) -> np.ndarray:
            return fidelity(pictures, hints, spec, lambda picture: find(picture)[where])

        none, ceiling = scores(self.none), scores(self.ceiling)
        mixed = {name: scores(pictures) for name, pictures in self.shuffled.items()}
        got = {name: scores(pictures) for name, pictures in self.made.items()}
        first, metric = next(iter(got)), metric_of(spec).name
        floor = {name: mixed[name if name in mixed else ""] for name in got}
        report = {}
        for name, values in got.items():
            found = obedience(values, none, floor[name], ceiling, metric)
            share = obedience(values, none, floor[first], got[first], metric).obedience
            report[name] = asdict(found) | {"is_meaningful": found.is_meaningful, "share": asdict(share)}
        return report


def judged(on: HeldOut, made: Mapping[str, Pictures], none: Pictures) -> dict[str, Report]:
    """CLIP-score, FID and rating of each condition's pictures and of those without control, by the pairs' captions."""
    captions = [pair.prompt for pair in on.pairs]
    truth = mean_figure(on.quality.referee.clip_scores([pair.picture for pair in on.pairs], captions))
    free = on.quality.figures(none, captions)
    found = {name: on.quality.figures(pictures, captions) for name, pictures in made.items()}
    report: dict[str, Report] = {"no control": {name: asdict(figure) for name, figure in free.items()}}
    for name, figures in found.items():
        report[name] = {key: asdict(figure) for key, figure in figures.items()}
        report[name]["quality_kept"] = quality_kept(figures, free, truth)
    return report


def merged(*reports: Mapping[str, Report]) -> Report:
    """Reports on the same conditions as one."""
    names = dict.fromkeys(name for report in reports for name in report)
    return {name: {key: value for one in reports for key, value in one.get(name, {}).items()} for name in names}


def together(lab: Lab) -> Report:
    """A pose and a depth map of the same scene: each control's obedience alone, and beside the other."""
    on = lab.heldout("pose")
    plans = {name: lab.plan(name, on.pairs) for name in ("pose", "depth")}
    both, mixed = (lab.pictures(*plans.values(), way=way) for way in ("controlled", "shuffled"))
    none = lab.pictures(plans["pose"], way="no_control")
    report: Report = {}
    for name, plan in plans.items():
        made = {"alone": lab.pictures(plan), "both": both}
        shuffled = {"alone": lab.pictures(plan, way="shuffled"), "both": mixed}
        measured = Conditions(plan, made, none, shuffled, lab.reconstructed(on)).measured()
        report[name] = merged(measured, judged(on, made, none))
    return report


def unprompted(lab: Lab, name: str) -> Report:
    """One control without a prompt, under each of ``UNPROMPTED``."""
    on = lab.heldout(name)
    silent = [replace(pair, prompt="") for pair in on.pairs]
    plans = {way: lab.plan(name, silent, **use) for way, use in UNPROMPTED.items()}
    plain = next(iter(plans.values()))
    none = lab.pictures(plain, way="no_control")
    made = {way: lab.pictures(plan) for way, plan in plans.items()}
    floors = {"": plain, "cfg-weights": plans["cfg-weights"]}
    shuffled = {way: lab.pictures(plan, way="shuffled") for way, plan in floors.items()}
    measured = Conditions(plain, made, none, shuffled, lab.reconstructed(on)).measured()
    return merged(measured, judged(on, made, none))


def emptied(pairs: Sequence[Pair], hints: Sequence[np.ndarray]) -> list[Pair]:
    """Pairs with these hints, black in their left half: of lines, poses and depth, nothing."""
    right = np.arange(hints[0].shape[1]) >= hints[0].shape[1] // 2
    return [replace(pair, hint=hint * right[:, None]) for pair, hint in zip(pairs, hints, strict=True)]


def half_silent(lab: Lab, name: str, other: str, world: str) -> Report:
    """A control's obedience in the left half, alone and beside another one whose hint is empty there."""
    on = lab.heldout({"emoji": "canny", "scenes": "pose"}[world])
    plan, whole = (lab.plan(one, on.pairs) for one in (name, other))
    silent = emptied(on.pairs, whole.hints)
    right = np.zeros((lab.base.size, lab.base.size, 3), np.uint8)
    right[:, lab.base.size // 2 :] = 255
    beside = {
        "alone": (),
        "silent": (lab.plan(other, silent),),
        "silent, with a region": (lab.plan(other, silent, region=right),),
        "whole": (whole,),
    }
    made = {condition: lab.pictures(plan, *more) for condition, more in beside.items()}
    none, mixed = (lab.pictures(plan, way=way) for way in ("no_control", "shuffled"))
    left = np.s_[:, : lab.base.size // 2]
    return Conditions(plan, made, none, {"": mixed}, lab.reconstructed(on)).measured(left)


def in_a_hole(lab: Lab, name: str) -> Report:
    """A control's obedience in the middle square of half the side, made anew in the true picture or with all of it."""
    on = lab.heldout(name)
    plan, quarter = lab.plan(name, on.pairs), lab.base.size // 4
    inside = np.s_[quarter:-quarter, quarter:-quarter]
    mask = np.zeros((lab.base.size, lab.base.size, 3), np.uint8)
    mask[inside] = 255

    def filled(way: Way) -> Pictures:
        edits = [EditRequest(image=pair.picture, mask=mask) for pair in on.pairs]
        asked = zip(plan.requests(way), edits, strict=True)
        return lab.made([request.model_copy(update={"edit": edit}) for request, edit in asked])

    none, mixed = (lab.pictures(plan, way=way) for way in ("no_control", "shuffled"))
    made, ceiling = {"with all of it": lab.pictures(plan)}, lab.reconstructed(on)
    whole = Conditions(plan, made, none, {"": mixed}, ceiling).measured(inside)
    made = {"in a hole": filled("controlled")}
    hole = Conditions(plan, made, filled("no_control"), {"": filled("shuffled")}, ceiling).measured(inside)
    kept = [picture[mask == 0] for picture in made["in a hole"]]
    true = [pair.picture[mask == 0] for pair in on.pairs]
    changed = float(np.mean([(a != b).mean() for a, b in zip(kept, true, strict=True)]))
    return {**whole, **hole, "outside": {"share_of_values_changed": changed}}


def by_steps(lab: Lab, scheduler: str) -> Report:
    """Canny's obedience and the pictures' quality at each number of steps; floors as with the base's own one."""
    on = lab.heldout("canny")
    plan = lab.plan("canny", on.pairs)
    none, mixed = (lab.pictures(plan, way=way) for way in ("no_control", "shuffled"))
    made = {str(steps): lab.pictures(plan, scheduler=scheduler, steps=steps) for steps in lab.counts}
    measured = Conditions(plan, made, none, {"": mixed}, lab.reconstructed(on)).measured()
    return merged(measured, judged(on, made, none))


SPEEDS = (("exact", 1.0), ("fast", 1.0), ("turbo", 1.0), ("exact", 0.4), ("fast", 0.4), ("turbo", 0.4), ("exact", 0.25))
"""Speeds, and the share of the lab's steps that each is measured at."""


def by_speed(lab: Lab, name: str) -> Report:
    """A control's obedience and the pictures' quality at each speed, with seconds of one picture, made as a batch."""
    on = lab.heldout(name)
    plan = lab.plan(name, on.pairs)
    none, mixed = (lab.pictures(plan, way=way) for way in ("no_control", "shuffled"))
    made, seconds = dict[str, Pictures](), dict[str, float]()
    for speed, share in SPEEDS:
        steps = max(round(share * lab.steps), 1)
        condition = f"{speed}, {steps} steps"
        lab.forget()  # what is to be timed is made
        began = time.perf_counter()
        made[condition] = lab.pictures(plan, speed=speed, steps=steps)
        seconds[condition] = (time.perf_counter() - began) / len(on.pairs)
    measured = Conditions(plan, made, none, {"": mixed}, lab.reconstructed(on)).measured()
    taken = {condition: {"seconds": value} for condition, value in seconds.items()}
    return merged(measured, judged(on, made, none), taken)


SEAM_PICTURES = 8
"""Of ``seams``, as each of them takes as long as seventeen others."""


def edges_of(side: int, tile: int, stride: int) -> list[int]:
    """The columns, in pixels, at which tiles begin or end inside of a square picture that is made in tiles."""
    tiles = tiles_of((side // stride, side // stride), tile // stride)
    ends = {at for one in tiles for at in (one.left, one.left + one.width)}
    return sorted(at * stride for at in ends - {0, side // stride})


def jump(picture: np.ndarray, edges: Sequence[int]) -> float:
    """The mean difference of neighbours across edges, in a picture (H, H, 3), over that of all other neighbours.

    ``edges``: columns, and rows likewise, whose first pixels lie beyond an edge. 1 where no edge can be seen.
    """
    values = picture.astype(np.float64)
    steps = np.concatenate([np.abs(np.diff(values, axis=axis)).mean((1 - axis, 2)) for axis in (0, 1)])
    across = np.isin(np.arange(1, len(picture)), edges)
    across = np.concatenate([across, across])
    return float(steps[across].mean() / steps[~across].mean())


def seams(lab: Lab, name: str) -> Report:
    """Jumps at the edges of tiles of the base's size, blended and cut hard, in scenes of twice that size.

    They are divided by those at the same places of the same picture made as one: there may be a horizon.
    """
    tile = lab.base.size
    side, count = 2 * tile, min(lab.num, SEAM_PICTURES)
    scenes = [scene(index, side) for index in range(count)]

    def asked(seed: int, top: int = 0, left: int = 0, size: int = side, **settings: Any) -> Request:
        picture, prompt = scenes[seed]
        control = ControlRequest(name=name, images=picture[top : top + size, left : left + size])
        common = {"seed": seed, "steps": lab.steps, "guidance": lab.guidance, "size": (size, size)}
        return Request(prompt=prompt, controls=(control,), **common, **settings)

    parts = [lab.made([asked(i, top, left, tile) for i in range(count)]) for top in (0, tile) for left in (0, tile)]
    cut = [np.vstack([np.hstack(four[:2]), np.hstack(four[2:])]) for four in zip(*parts, strict=True)]
    blended = lab.made([asked(i, tile=tile) for i in range(count)])
    as_one = lab.made([asked(i) for i in range(count)])
    conditions = {"tiles": (blended, edges_of(side, tile, lab.base.stride)), "tiles cut hard": (cut, [tile])}
    report: Report = {"num": count, "side": side, "tile": tile}
    for condition, (pictures, edges) in conditions.items():
        values = [jump(one, edges) / jump(whole, edges) for one, whole in zip(pictures, as_one, strict=True)]
        report[condition] = asdict(mean_figure(np.array(values)))
    return report


FIGURES: dict[str, dict[str, Callable[[Lab], Report]]] = {
    "together": {"pose, depth": together},
    "unprompted": {name: partial(unprompted, name=name) for name in ("canny", "depth")},
    "half_silent": {
        f"{name}, {other}": partial(half_silent, name=name, other=other, world=world) for name, other, world in SILENCED
    },
    "in_a_hole": {name: partial(in_a_hole, name=name) for name in ("canny", "depth", "pose")},
    "by_steps": {name: partial(by_steps, scheduler=name) for name in SCHEDULERS},
    "by_speed": {name: partial(by_speed, name=name) for name in ("canny", "depth")},
    "seams": {name: partial(seams, name=name) for name in ("tile", "canny")},
}
"""Each figure with its parts, which are measured and written one after the other."""


def measure(lab: Lab, path: Path, figures: Sequence[str], told: Callable[[str], None]) -> Report:
    """Measure figures, each part of which is written to a JSON file when it is done; what the file has is kept.

    ``Invalid`` where the file has figures of other settings.
    """
    report: Report = {"settings": lab.settings}
    if path.exists():
        report = read_json(path)
        if report["settings"] != lab.settings:
            raise Invalid(f"{path} has figures of other settings: expected {lab.settings}. Name another --out.")
    for figure in figures:
        done = report.setdefault(figure, {})
        for part, function in FIGURES[figure].items():
            if part not in done:
                told(f"{figure}: {part}")
                done[part] = function(lab)
                write_atomic(path, (json.dumps(report, indent=1) + "\n").encode())
    return report
