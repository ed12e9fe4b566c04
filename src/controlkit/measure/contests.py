"""Two tests of a control beside others: a prompt that contradicts the hint, and a second control that is silent.

Against a prompt (the question of DualAlign, arXiv 2511.19268): each hint is given with another pair's prompt, at
several scales. Obedience says how far the hint wins; the referee says how far the prompt does. Beside a silent control
(the question of Minimal Impact ControlNet, arXiv 2506.01672): the same pictures are made with a second control whose
hint says nothing, and what its silence costs in obedience is measured, picture by picture.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import ImageColor

from controlkit.annotators import grounds_of
from controlkit.data import Pair
from controlkit.errors import Unsupported
from controlkit.images import HintSpec
from controlkit.measure.evaluate import EvaluationPlan, Maker, Reconstruct, three_ways
from controlkit.measure.fidelity import Finder, fidelity
from controlkit.measure.metrics import first_kind, metric_of
from controlkit.measure.obedience import mean_figure, obedience
from controlkit.measure.quality import QualityReferee
from controlkit.sample import ControlRequest

SCALES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""At which a prompt is set against the hint."""
WON = 0.5
"""The hint has won where obedience is at least this; the prompt, where the referee finds at least this share of the
pictures nearer to it than to the hint's own."""


def contradicting(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs, each with the prompt of the one half the set further."""
    own = list(pairs)  # which may know no slices
    half = max(len(own) // 2, 1)
    return [replace(pair, prompt=other.prompt) for pair, other in zip(own, [*own[half:], *own[:half]], strict=True)]


def against_prompt(
    make: Maker,
    plan: EvaluationPlan,
    reconstruct: Reconstruct,
    referee: QualityReferee | None = None,
    scales: Sequence[float] = SCALES,
    finder: Finder | None = None,
) -> dict[str, Any]:
    """Set a contradicting prompt against each hint, at several scales; in plain values that can be written as JSON.

    Floor and ceiling are those of ``evaluate``, with the contradicting prompts, and are the same for all scales.

    Returns:
        ``curve``: by scale ``obedience`` (as ``Obedience``, with floor and ceiling) and, with a referee,
        ``clip_score`` (with the prompt), ``clip_score_own`` (with the hint's own) and ``prompt_wins`` (the share of
        pictures nearer to the prompt). ``hint_wins_from``: the least scale from which obedience stays at ``WON`` or
        more; None for none. ``prompt_wins_to``: the largest scale up to which ``prompt_wins`` stays at ``WON``; None
        for none, or without a referee.
    """
    told = replace(plan, pairs=contradicting(plan.pairs))

    def scores(pictures: Sequence[np.ndarray]) -> np.ndarray:
        return fidelity(pictures, plan.hints, plan.spec, finder)

    floors = three_ways(make, told, ("no_control", "shuffled"))
    ceiling = scores(reconstruct([pair.picture for pair in plan.pairs]))
    plain, mixed = scores(floors["no_control"]), scores(floors["shuffled"])
    curve = []
    for scale in scales:
        scaled = replace(told, control=told.control.model_copy(update={"scale": scale}))
        made = three_ways(make, scaled, ("controlled",))["controlled"]
        measured = obedience(scores(made), plain, mixed, ceiling, metric_of(plan.spec).name)
        point: dict[str, Any] = {"scale": scale, "obedience": asdict(measured)}
        curve.append(point | (_words(referee, made, told.pairs, plan.pairs) if referee else {}))
    return {
        "curve": curve,
        "hint_wins_from": _from(scales, [one["obedience"]["obedience"]["mean"] >= WON for one in curve]),
        "prompt_wins_to": _to(scales, [one["prompt_wins"]["mean"] >= WON for one in curve]) if referee else None,
    }


def _words(
    referee: QualityReferee, made: Sequence[np.ndarray], told: Sequence[Pair], own: Sequence[Pair]
) -> dict[str, Any]:
    """How near pictures are to the prompts they were told, and to those of their hints."""
    near, nearer = (referee.clip_scores(made, [pair.prompt for pair in pairs]) for pairs in (told, own))
    figures = {"clip_score": near, "clip_score_own": nearer, "prompt_wins": (near > nearer).astype(float)}
    return {name: asdict(mean_figure(values)) for name, values in figures.items()}


def _from(scales: Sequence[float], won: Sequence[bool]) -> float | None:
    """The first of the last scales at all of which something was won."""
    first = len(won) - next((i for i, one in enumerate(reversed(won)) if not one), len(won))
    return scales[first] if first < len(scales) else None


def _to(scales: Sequence[float], won: Sequence[bool]) -> float | None:
    """The last of the first scales at all of which something was won."""
    count = next((i for i, one in enumerate(won) if not one), len(won))
    return scales[count - 1] if count else None


@dataclass(frozen=True)
class Companion:
    """A second control, beside the one that is measured: its request without pictures, and its hints' contract."""

    control: ControlRequest
    spec: HintSpec

    def silent(self, size: tuple[int, int]) -> ControlRequest:
        """Its request with a hint, ``size`` (height, width), that says nothing.

        ``Unsupported`` for hints of a kind that cannot say nothing, such as photographs.
        """
        return self.control.model_copy(update={"images": {"": empty_hint(self.spec, size)}, "ready": True})


def empty_hint(spec: HintSpec, size: tuple[int, int]) -> np.ndarray:
    """A hint (*size, 3) that says nothing: the ground that such hints are drawn on; of one with a mask, all masked.

    ``Unsupported`` for hints of other kinds, which are photographs.
    """
    ground = grounds_of(spec)[0]
    if spec.mask_value is not None:
        return np.zeros((*size, 4), np.uint8)
    if ground == "white" or spec.channels != 3:
        raise Unsupported(f'Hints of "{spec.annotator}" always say something: choose a control that can be silent.')
    colour = first_kind(spec).ground if ground != "ink" else "black"
    return np.full((*size, 3), ImageColor.getrgb(colour), np.uint8)


def beside_silent(
    make: Maker, plan: EvaluationPlan, reconstruct: Reconstruct, companion: Companion, finder: Finder | None = None
) -> dict[str, Any]:
    """Measure a control alone and beside a silent one, on the same pairs; in plain values.

    Returns:
        ``alone`` and ``beside``: ``Obedience`` with floor and ceiling, which are the same for both. ``cost``: by how
        much obedience is less beside it, with the interval over the pictures.
    """

    def scores(pictures: Sequence[np.ndarray]) -> np.ndarray:
        return fidelity(pictures, plan.hints, plan.spec, finder)

    made = three_ways(make, plan)
    requests = plan.requests("controlled")
    silent = companion.silent(plan.hints[0].shape[:2])
    both = make([one.model_copy(update={"controls": (*one.controls, silent)}) for one in requests])
    plain, mixed = scores(made["no_control"]), scores(made["shuffled"])
    ceiling = scores(reconstruct([pair.picture for pair in plan.pairs]))
    metric = metric_of(plan.spec).name
    alone, beside = scores(made["controlled"]), scores([picture.pixels for picture in both])
    measured = obedience(alone, plain, mixed, ceiling, metric)
    span = measured.ceiling.mean - measured.floor.mean  # with its sign: less than 0 for an error
    return {
        "alone": asdict(measured),
        "beside": asdict(obedience(beside, plain, mixed, ceiling, metric)),
        "cost": asdict(mean_figure(_whole((alone - beside) / (span or np.nan)))),
    }


def _whole(values: np.ndarray) -> np.ndarray:
    """The values that are numbers; one that is none, where there are none."""
    kept = values[~np.isnan(values)]
    return kept if len(kept) else np.array([np.nan])


def curve_points(found: dict[str, Any], name: str) -> list[tuple[float, float]]:
    """(scale, mean) of a figure along the curve of ``against_prompt``: ``obedience``, ``prompt_wins``, ..."""
    points = [(one["scale"], one[name]) for one in found["curve"] if name in one]
    return [(scale, (one["obedience"] if name == "obedience" else one)["mean"]) for scale, one in points]
