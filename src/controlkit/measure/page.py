"""The report on a control as one HTML file: verdict, figures with their intervals between floor and ceiling, pictures.

The file holds its pictures and loads nothing else. What it shows beside them is what ``evaluate`` reports.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from controlkit.errors import Invalid
from controlkit.images import inner_size, stretch
from controlkit.measure.contests import WON, curve_points
from controlkit.measure.evaluate import WAYS, EvaluationPlan, Maker, Reconstruct, Way
from controlkit.measure.obedience import Obedience, obedience_in
from controlkit.pages import Chart, Section, Table, render
from controlkit.pages import Figure as Shown
from controlkit.sample import Picture, Request

SIDE = 256
"""The longest side of a picture on a page, in pixels."""
_MOST = 12
"""Rows of pictures on a page."""
_WAY_WORDS: dict[Way, str] = {"controlled": "controlled", "no_control": "no control", "shuffled": "another's hint"}


def shown(picture: np.ndarray, label: str) -> Shown:
    """A picture, uint8 (H, W, 3 or 4), with its label, as part of a page: a JPEG of at most ``SIDE`` pixels a side.

    What is transparent becomes grey.
    """
    height, width = picture.shape[:2]
    if max(height, width) > SIDE:
        picture = stretch(picture, inner_size(picture.shape[:2], (SIDE, SIDE)))
    if picture.shape[-1] == 4:
        seen = picture[..., 3:].astype(np.float32) / 255
        picture = (picture[..., :3] * seen + 128 * (1 - seen)).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=92, subsampling=0)
    return Shown(f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", label)


@dataclass
class Recorded:
    """A maker that keeps what it made, and gives it again where the same requests come again."""

    make: Maker
    calls: list[tuple[list[Request], list[Picture]]] = field(default_factory=list)
    """The requests and the pictures of each call, in order."""

    def __call__(self, requests: Sequence[Request]) -> list[Picture]:
        """The pictures of the requests, as ``make`` makes them."""
        asked = list(requests)
        if (made := self._made(asked)) is None:
            self.calls.append((asked, made := list(self.make(asked))))
        return made

    def _made(self, asked: list[Request]) -> list[Picture] | None:
        return next((pictures for requests, pictures in self.calls if requests == asked), None)

    def by_way(self, plan: EvaluationPlan) -> dict[Way, list[np.ndarray]]:
        """The pictures of each way of a plan; ``Invalid`` where some were not made."""
        found = {}
        for way in WAYS:
            if (made := self._made(plan.requests(way))) is None:
                raise Invalid(f"The pictures of this plan were not all made ({way}): call evaluate first.")
            found[way] = [picture.pixels for picture in made]
        return found


def obedience_rows(measured: Obedience) -> list[list[str]]:
    """The rows of a table: each figure of an obedience with its interval, and what it is."""
    words = {
        "obedience": "0 is no control, 1 is all that the VAE lets through",
        "fidelity": "of the controlled pictures to their hints",
        "floor": "the better one of the next two",
        "floor_no_control": "of pictures without control",
        "floor_shuffled": "of pictures with another pair's hint",
        "ceiling": "of the true pictures, as the VAE gives them back",
    }
    figures = {name: getattr(measured, name) for name in words}
    return [
        [name.replace("_", " "), f"{one.mean:.3f}", f"{one.low:.3f} to {one.high:.3f}", words[name]]
        for name, one in figures.items()
    ]


def obedience_tables(report: Mapping[str, Any]) -> list[Table]:
    """The table of ``obedience_rows`` of a report, and those of the metrics beside it."""
    found = [obedience_in(one) for one in (report, *report.get("beside", {}).values())]
    return [Table([one.metric, "mean", "95% interval", "what it is"], obedience_rows(one)) for one in found]


def quality_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The rows of a table: CLIP-score, FID and ratings of a report, each beside that without control."""
    named = [name for name in report if name.endswith("_no_control") and not name.startswith("floor")]
    rows = []
    for name in (one.removesuffix("_no_control") for one in named):
        columns = [report.get(f"{name}{ending}") for ending in ("", "_no_control", "_truth")]
        cells = [f"{one['mean']:.3f} [{one['low']:.3f}, {one['high']:.3f}]" if one else "" for one in columns]
        rows.append([name.replace("_", " "), *cells])
    return rows


Rows = tuple[list[str], list[list[str]], str]
"""A table: its title and the heads of its columns, its rows, and a caption."""


def _with_interval(figure: Mapping[str, float]) -> str:
    return f"{figure['mean']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def protocol_rows(report: Mapping[str, Any]) -> list[Rows]:
    """The table of a protocol's raw values in a report, between floors and ceiling; none where there are none."""
    found = report.get("protocol")
    if not found:
        return []
    words = {"controlled": "controlled", "no_control": "floor: no control", "shuffled": "floor: another's hint"}
    words |= {"ceiling": "ceiling: the truth out of the VAE"}
    rows = [[word, _with_interval(found[name])] for name, word in words.items()]
    head = [f"{found['protocol']}", "pictures", f"{found['name']} {found['unit']}".strip()]
    return [(head, rows, "With the faults of the released scorer." if found["quirks"] else "")]


def contest_rows(report: Mapping[str, Any]) -> list[Rows]:
    """The tables of the contests in a report, each with its sentence."""
    tables: list[Rows] = []
    if found := report.get("against_prompt"):
        names = [name for name in ("clip_score", "clip_score_own", "prompt_wins") if name in found["curve"][0]]
        rows = [
            [
                f"{one['scale']:g}",
                _with_interval(one["obedience"]["obedience"]),
                *(_with_interval(one[n]) for n in names),
            ]
            for one in found["curve"]
        ]
        head = ["A contradicting prompt", "scale", "obedience", *(name.replace("_", " ") for name in names)]
        hint, prompt = found["hint_wins_from"], found["prompt_wins_to"]
        words = f"The hint wins from scale {hint:g} on." if hint is not None else "The hint wins at no scale."
        if names:
            words += f" The prompt wins up to scale {prompt:g}." if prompt is not None else " The prompt wins at none."
        ends = {name: found["curve"][0]["obedience"][name]["mean"] for name in ("floor", "ceiling")}
        tables.append((head, rows, f"{words} Floor {ends['floor']:.3f}, ceiling {ends['ceiling']:.3f}."))
    if found := report.get("beside_silent"):
        rows = [
            [words, _with_interval(found[name]["obedience"]), _with_interval(found[name]["fidelity"])]
            for name, words in (("alone", "alone"), ("beside", f"beside a silent {found['silent']}"))
        ]
        cost = f"Its silence costs {_with_interval(found['cost'])} of obedience. "
        floor = f"Floor {found['alone']['floor']['mean']:.3f}, ceiling {found['alone']['ceiling']['mean']:.3f}."
        tables.append((["A silent second control", "control", "obedience", "fidelity"], rows, cost + floor))
    return tables


def picture_rows(plan: EvaluationPlan, made: Mapping[Way, Sequence[np.ndarray]], reconstruct: Reconstruct) -> Section:
    """Rows of pictures: a pair's hint, the truth, the truth out of the VAE, and what was made each way."""
    rows = []
    pairs = list(plan.pairs)[:_MOST]
    for i, (pair, back) in enumerate(zip(pairs, reconstruct([pair.picture for pair in pairs]), strict=True)):
        row = [shown(plan.spec.picture(plan.hints[i]), pair.prompt or "the hint"), shown(pair.picture, "truth")]
        row += [shown(back, "truth, out of the VAE")]
        rows.append([*row, *(shown(made[way][i], _WAY_WORDS[way]) for way in WAYS)])
    return Section("The hint, the truth, and pictures made with the hint, without it, and with another's", rows)


def _curves(report: Mapping[str, Any]) -> list[Chart]:
    """Obedience, and the share of pictures nearer to a contradicting prompt, over the scales of the control."""
    found, marks = report["against_prompt"], [(WON, "won")]
    titles = {"obedience": "the hint: obedience", "prompt_wins": "the prompt: nearer to it"}
    curves = {title: curve_points(found, name) for name, title in titles.items()}
    return [Chart(title, points, scale=(0, 1), marks=marks, unit="scale") for title, points in curves.items() if points]


def evaluation_page(
    report: Mapping[str, Any],
    plan: EvaluationPlan,
    made: Mapping[Way, Sequence[np.ndarray]],
    reconstruct: Reconstruct,
    title: str,
) -> str:
    """One HTML page on a report of ``evaluate``, with the pictures of each way (``Recorded.by_way``).

    ``Invalid`` for a report without floor and ceiling: no figure is shown without them.
    """
    try:
        tables = obedience_tables(report)
    except (KeyError, TypeError) as error:
        raise Invalid(f"The report has no {error} with its interval: expected one of evaluate.") from error
    body: list[str | Table | Section] = [str(report.get("verdict", ""))] if report.get("verdict") else []
    if not report.get("is_meaningful", True):
        body.append("Floor and ceiling are too close together for obedience to mean much.")
    body += tables
    if rows := quality_rows(report):
        body.append(Table(["quality", "controlled", "no control", "truth"], rows))
    body += [str(note) for note in report.get("notes", [])]
    for head, rows, caption in (*protocol_rows(report), *contest_rows(report)):
        charts = _curves(report) if head[0] == "A contradicting prompt" else []
        body += [Section(head[0], charts=charts, text=caption), Table(head[1:], rows)]
    body.append(picture_rows(plan, made, reconstruct))
    settings = {"pictures": report["num"], **report["settings"], "seconds": report["seconds"]}
    used = [[name.replace("_", " "), str(value)] for name, value in settings.items() if value is not None]
    return render(title, title, [*body, Table(["setting", "value"], used)])
