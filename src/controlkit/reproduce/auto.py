"""Automatic prompts (the paper's first version): a picture by the default prompt, captioned, and made again with that.

The first round has the paper's default prompt, "a high-quality, detailed, and professional image". A captioner names
what came of it, and the same hints and seeds are made again with those captions. The paper shows pictures; here both
rounds stand beside each other and between two ends: no control with the default prompt, and the true caption, which a
user would give. Quality is judged by the true captions. On the embedded world the captioner is the referee's choice
among captions, so the referee judges what it chose itself: look at obedience, FID and the concepts found, too.

    controlkit reproduce fig-auto --out runs/fig-auto

Cost: `--quick` 3 minutes of CPU time (one thread of an AMD EPYC, AVX2, beside other work).
Expected (32 pictures; floor 0.17 to 0.24, ceiling 0.96 in F1): obedience 0.87 [0.85, 0.90] by the default prompt, 0.79
[0.76, 0.82] by automatic ones, 0.85 [0.82, 0.88] by true captions; CLIP-score by the true caption 0.39, 0.42 and 0.73;
the true thing is named in 3 of 32. Unlike in the paper automatic prompts help little here: concepts are held out, and
the captioner names others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from controlkit.annotators import contract
from controlkit.backbones import Backbone
from controlkit.data import evaluation_pairs
from controlkit.measure import EMBEDDED, EvaluationPlan, caption_with
from controlkit.reproduce.conditions import HEAD, Bench, Conditions, Row, shipped
from controlkit.reproduce.entrants import Plan, Trial, write_report
from controlkit.sample import PLAIN_PROMPT, ControlRequest

KIND = "canny"
ORDER = ("default", "captions", "automatic", "true")

__all__ = ["HEAD", "ORDER", "Automatic", "make_auto"]


@dataclass(frozen=True)
class Automatic(Conditions):
    """The conditions, and each picture's captions: the true one, and the one that the captioner gave the default."""

    captioner: str = ""
    captions: Sequence[tuple[str, str]] = ()
    found: int = 0
    """In how many the captioner named the true thing."""
    found_in_truth: int = 0
    """The same of the true pictures: the captioner's ceiling."""


def make_auto(base: Backbone, plan: Plan, out: Path, on_row: Callable[[str], None] = lambda name: None) -> Automatic:
    """Make the figure and write it into a folder: ``fig-auto.json``, ``.md`` and ``.png``.

    ``on_row``: as with ``make_table2``. Raises as ``measure.caption_with`` does for a base that no captioner knows.
    """
    pairs, real = evaluation_pairs(EMBEDDED.pictures, base.size, plan.num)
    asked = EvaluationPlan(ControlRequest(name=KIND), contract(KIND), list(pairs), plan.steps, plan.guidance)
    trial = Trial(base, asked, real)
    caption, captioner = caption_with(base)
    bench, true = Bench(trial, shipped(base, KIND)), [pair.prompt for pair in asked.pairs]
    default = [PLAIN_PROMPT] * len(true)
    on_row("default")
    rows = [bench.floor_row(asked, default), bench.row("default", "default prompt", asked, default)]
    on_row("captions")
    first = bench.pictures(asked, default)
    given = [caption(picture) for picture in first]
    found, at_best = (_named(true, captions) for captions in (given, [caption(one) for one in trial.truth]))
    on_row("automatic")
    rows.append(bench.row("automatic", "automatic prompt", asked, given))
    on_row("true")
    rows.append(bench.row("true", "true caption", asked, true))
    table = Automatic(
        rows,
        trial.facts() | {"hints": KIND},
        "",
        captioner=captioner,
        captions=list(zip(true, given, strict=True)),
        found=found,
        found_in_truth=at_best,
        finding=f"Captions by {captioner}; the true thing is named in {found} of {len(true)}, of the true pictures in "
        f"{at_best}. {_finding(rows, true, given)}",
    )
    sheet: dict[str, Sequence[np.ndarray]] = {"hint": trial.shown(), "default": first}
    sheet |= {"automatic": bench.pictures(asked, given), "true caption": bench.pictures(asked, true)}
    return write_report(out, "fig-auto", table, HEAD, {"": sheet})


def _thing(caption: str) -> str:
    """A caption's part before the first comma: the thing itself, in captions of the embedded world."""
    return caption.split(",")[0].strip()


def _named(true: Sequence[str], given: Sequence[str]) -> int:
    """How many captions name the true thing."""
    return sum(_thing(a) == _thing(b) for a, b in zip(true, given, strict=True))


def _finding(rows: Sequence[Row], true: Sequence[str], given: Sequence[str]) -> str:
    own = {row.name: row for row in rows}
    moved = [
        "{:.2f} to {:.2f}".format(*(own[name].figures[figure]["mean"] for name in ("default", "automatic")))
        for figure in ("clip_score", "obedience")
        if figure in own["default"].figures
    ]
    words = " and obedience from ".join(moved) if len(moved) == 2 else ""
    scores = f"By captions for the default prompt, CLIP-score (true caption) goes from {words}. " if words else ""
    return (
        f"{scores}First captions: {'; '.join(f'{b} (truth: {a})' for a, b in list(zip(true, given, strict=True))[:3])}."
    )
