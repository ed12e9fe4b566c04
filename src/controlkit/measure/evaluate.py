"""The whole report on a control: fidelity, floors, ceiling, obedience, and the quality of the pictures.

Measures anything that makes pictures: a ``Maker`` turns requests into pictures, and may be a model or not. A pair's
hint is in ``request.controls[0].images``; without control there is none.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch

from controlkit.backbones import Backbone
from controlkit.data import Pair, hint_for_pair
from controlkit.errors import Invalid
from controlkit.images import HintSpec, to_pictures, to_tensor
from controlkit.measure.fidelity import Finder, check_findable, fidelities
from controlkit.measure.metrics import first_kind, metric_of
from controlkit.measure.obedience import Obedience, mean_figure, obedience, obedience_in
from controlkit.measure.quality import Quality, QualityReferee, quality_kept, unjudgeable
from controlkit.measure.verdict import Verdict, verdict_on
from controlkit.measure.world import EMBEDDED, world_of
from controlkit.precision import autocast, number_format
from controlkit.sample import ControlRequest, Maker, Request

Reconstruct = Callable[[Sequence[np.ndarray]], list[np.ndarray]]
"""Pictures, uint8 (H, W, 3), as they come back from a maker's VAE: the most that any control can reach."""
Way = Literal["controlled", "shuffled", "no_control"]
WAYS: tuple[Way, ...] = get_args(Way)
"""The ways in which pictures are made for obedience."""
_AT_ONCE = 32
"""Pictures in a batch of the VAE."""


@dataclass(frozen=True, eq=False)
class EvaluationPlan:
    """One control on held-out pairs: the pairs' prompts and hints, N seeds from ``first_seed`` on."""

    control: ControlRequest
    """The control with its settings, and no pictures: in each request it gets a pair's hint."""
    spec: HintSpec
    pairs: Sequence[Pair]
    steps: int = 20
    guidance: float = 4.0
    first_seed: int = 0
    others: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of each ``Request``, such as its negative prompt."""

    @cached_property
    def hints(self) -> list[np.ndarray]:
        """Each pair's hint, (H, W, C)."""
        return [hint_for_pair(pair, self.spec) for pair in self.pairs]

    def with_hint(self, hint: np.ndarray) -> ControlRequest:
        """The control's request for a picture with this hint, (H, W, C)."""
        return self.control.model_copy(update={"images": {"": hint}, "ready": True})

    def requests(self, way: Way, rows: Sequence[int] | None = None) -> list[Request]:
        """The requests of one way, of pairs ``rows`` alone if given.

        The same seeds and prompts in each; shuffled: with the hints rotated by half, so that no pair has its own.
        """
        half = max(len(self.hints) // 2, 1)
        hints = self.hints if way == "controlled" else [*self.hints[half:], *self.hints[:half]]
        return [
            Request(
                prompt=self.pairs[i].prompt,
                seed=self.first_seed + i,
                steps=self.steps,
                guidance=self.guidance,
                controls=() if way == "no_control" else (self.with_hint(hints[i]),),
                **self.others,
            )
            for i in (range(len(self.pairs)) if rows is None else rows)
        ]


def three_ways(
    make: Maker, plan: EvaluationPlan, ways: Sequence[Way] = WAYS, rows: Sequence[int] | None = None
) -> dict[Way, list[np.ndarray]]:
    """The pictures of each way, one call of ``make`` a way; ``Invalid`` if it makes more or fewer than requested."""
    made = {}
    for way in ways:
        requests = plan.requests(way, rows)
        made[way] = [picture.pixels for picture in make(requests)]
        if len(made[way]) != len(requests):
            raise Invalid(f"{len(requests)} pictures were requested, and {len(made[way])} were made: expected as many.")
    return made


def ceiling_of(base: Backbone) -> Reconstruct:
    """Reconstruction by the VAE of ``base``, from the mean of each posterior."""

    def reconstruct(pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        done: list[np.ndarray] = []
        for first in range(0, len(pictures), _AT_ONCE):
            with torch.no_grad(), autocast(base.device.type):
                moments = base.encode_moments(to_tensor(pictures[first : first + _AT_ONCE]).to(base.device))
                done += to_pictures(base.decode_latents(base.mean_latents(moments)))
        return done

    return reconstruct


def evaluate(
    make: Maker,
    plan: EvaluationPlan,
    reconstruct: Reconstruct,
    quality: Quality | None = None,
    finder: Finder | None = None,
    no_control: Sequence[np.ndarray] | None = None,
) -> dict[str, Any]:
    """Measure a control, in plain values that can be written as JSON.

    Args:
        make: called once for each way of ``WAYS``.
        reconstruct: gives the ceiling; ``ceiling_of(base)``, or ``list`` for a maker that has no VAE.
        quality: the referee of the maker's world; it is not asked where it is ``unjudgeable``. None: there is none.
        finder: ``fidelity``'s, for hints that nothing here finds.
        no_control: the pictures without control, where they were made before, of the same pairs and settings.

    Returns:
        ``fidelity``, ``floor``, ``floor_no_control``, ``floor_shuffled``, ``ceiling``, ``obedience``, and where quality
        is judged also ``clip_score``, ``fid`` and ``aesthetic``, each also with ``_no_control``, and
        ``clip_score_truth``: ``mean``, ``low`` and ``high``. ``beside``, where such hints have a second metric: by its
        name the figures from ``fidelity`` to ``obedience``. ``metric``, ``is_meaningful``, ``quality_kept`` (where it
        is judged), ``notes`` (where it is not), ``observer`` (its accuracy, where it read the outputs), ``num``,
        ``settings``, ``seconds``.

    Raises ``Unsupported`` for hints that cannot be measured, ``Invalid`` where no pair gives information.
    """
    started = time.perf_counter()
    if finder is None:
        check_findable(plan.spec, plan.pairs)
    made = three_ways(make, plan, [way for way in WAYS if way != "no_control" or no_control is None])
    if no_control is not None:
        made["no_control"] = list(no_control)
    truth = [pair.picture for pair in plan.pairs]
    report = _obeyed(made | {"ceiling": reconstruct(truth)}, plan, finder)
    reason = unjudgeable(quality.referee if quality else None, plan.pairs)
    if quality and not reason:
        report |= _judged(quality, made, truth, [pair.prompt for pair in plan.pairs])
    else:
        report["notes"] = [reason]
    if finder is None and first_kind(plan.spec).truth:
        report["observer"] = EMBEDDED.observer().config.get("accuracy")
    report["num"] = len(plan.pairs)
    report["settings"] = {
        "steps": plan.steps,
        "guidance": plan.guidance,
        "size": None,
        "scale": plan.control.scale,
        "hint_cfg_scale": plan.control.hint_cfg_scale,
        "seeds": f"{plan.first_seed}-{plan.first_seed + len(plan.pairs) - 1}",
        **plan.others,
    }
    report["seconds"] = round(time.perf_counter() - started, 2)
    return report


def _obeyed(shown: Mapping[str, list[np.ndarray]], plan: EvaluationPlan, finder: Finder | None) -> dict[str, Any]:
    """``evaluate``'s figures of obedience, of the pictures made each way and of the ``ceiling``."""
    scores = {name: fidelities(pictures, plan.hints, plan.spec, finder) for name, pictures in shown.items()}
    by_metric = {
        metric: obedience(**{name: one[metric] for name, one in scores.items()}, metric=metric)
        for metric in scores["ceiling"]
    }
    measured = by_metric.pop(metric_of(plan.spec).name)
    beside = {name: asdict(one) for name, one in by_metric.items()}
    facts = asdict(measured) | {"is_meaningful": measured.is_meaningful}
    return facts | ({"beside": beside} if beside else {})


def _judged(
    quality: Quality, made: Mapping[Way, list[np.ndarray]], truth: Sequence[np.ndarray], prompts: Sequence[str]
) -> dict[str, Any]:
    """``evaluate``'s figures of quality, and ``quality_kept``."""
    controlled, plain = (quality.figures(made[way], prompts) for way in ("controlled", "no_control"))
    true = mean_figure(quality.referee.clip_scores(truth, prompts))
    found = {name: asdict(figure) for name, figure in controlled.items()}
    found |= {f"{name}_no_control": asdict(figure) for name, figure in plain.items()}
    return found | {"clip_score_truth": asdict(true), "quality_kept": quality_kept(controlled, plain, true)}


def judge(make: Maker, plan: EvaluationPlan, report: dict[str, Any], reconstruct: Reconstruct) -> Verdict:
    """The verdict on a control that ``evaluate`` reported on by this plan; written into the report, too.

    Where that finds control, the control is measured once more, with the N seeds that follow: ``obedience_again``.
    """

    def again() -> Obedience:
        second = evaluate(make, replace(plan, first_seed=plan.first_seed + len(plan.pairs)), reconstruct)
        report["obedience_again"] = second["obedience"]
        return obedience_in(second)

    verdict = verdict_on(obedience_in(report), report.get("quality_kept"), again)
    report |= {"finding": verdict.finding, "verdict": str(verdict)}
    return verdict


def evaluate_base(
    base: Backbone,
    make: Maker,
    plan: EvaluationPlan,
    real: Sequence[np.ndarray],
    no_control: Sequence[np.ndarray] | None = None,
    referee: QualityReferee | None = None,
) -> dict[str, Any]:
    """``evaluate`` a maker that samples with ``base``: its VAE's ceiling, its world's referee, its facts.

    ``real``: pictures that nothing was trained on, for FID; not used where quality is not judged. ``referee``: in the
    place of the world's, such as ``public.PublicReferee`` for photographs.
    """
    world = world_of(base)
    referee = referee or (world.referee(base.device.type) if world else None)
    quality = Quality(referee, real) if referee else None
    report = evaluate(make, plan, ceiling_of(base), quality, no_control=no_control)
    report["settings"] |= {"base": base.name, "base_digest": base.digest, "format": number_format(base.device.type)}
    return report
