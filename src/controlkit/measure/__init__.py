"""Measuring controls: is the hint obeyed, and at what price in picture quality."""

from controlkit.measure.captioned import caption_with, chosen_caption
from controlkit.measure.evaluate import (
    WAYS,
    EvaluationPlan,
    Maker,
    Reconstruct,
    Way,
    ceiling_of,
    evaluate,
    evaluate_base,
    judge,
    three_ways,
)
from controlkit.measure.fidelity import Finder, fidelity, unmeasurable
from controlkit.measure.metrics import METRICS, edge_f1, first_kind, metric_of, psnr
from controlkit.measure.obedience import FOUND, Figure, Obedience, mean_figure, obedience
from controlkit.measure.quality import (
    COLOURS,
    Quality,
    Referee,
    clip_score_kept,
    colours,
    fid,
    quality_kept,
    unjudgeable,
)
from controlkit.measure.verdict import Finding, Verdict, meaningless, verdict_on
from controlkit.measure.world import EMBEDDED, World, heldout_for, world_of

__all__ = [
    "COLOURS",
    "EMBEDDED",
    "FOUND",
    "METRICS",
    "WAYS",
    "EvaluationPlan",
    "Figure",
    "Finder",
    "Finding",
    "Maker",
    "Obedience",
    "Quality",
    "Reconstruct",
    "Referee",
    "Verdict",
    "Way",
    "World",
    "caption_with",
    "ceiling_of",
    "chosen_caption",
    "clip_score_kept",
    "colours",
    "edge_f1",
    "evaluate",
    "evaluate_base",
    "fid",
    "fidelity",
    "first_kind",
    "heldout_for",
    "judge",
    "mean_figure",
    "meaningless",
    "metric_of",
    "obedience",
    "psnr",
    "quality_kept",
    "three_ways",
    "unjudgeable",
    "unmeasurable",
    "verdict_on",
    "world_of",
]
