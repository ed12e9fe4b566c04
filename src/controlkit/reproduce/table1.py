"""Table 1: the user study, in which persons rank five systems' pictures of the same sketches by quality and fidelity.

The paper has 20 sketches drawn by hand, 12 users, and the average user rank, 1 worst to 5 best. Here the sketches are
edges of held-out scenes. The command writes the study as a folder of pages, one a rater, in random order and without
names: whoever ranks saves a file `answers-NN.csv`. Put into the report's folder, it is counted when the command is run
again. Until then, and beside it, the referees are the raters: quality by the aesthetic rating, fidelity by how well the
edges are found again. The base without control is ranked, too: the floor.

    controlkit reproduce table1 --opponents runs/opponents --out runs/table1

Cost: 0.8 minutes on one thread (an AMD EPYC with AVX-512 BF16) with four opponents.
Expected (20 sketches, the referees as raters; ranks of quality and fidelity, 1 to 7, and F1): PITI 3.05, 1.45 (0.24, of
half of the operations), Sketch-Guided Diffusion 4.10, 4.55 (0.69), at twice the strength 4.20, 5.50 (0.73), lite 4.25,
4.65 (0.67), ControlNet 3.85, 3.80 (0.64), canny as shipped 4.30, 6.50 (0.79), no control 4.25, 1.55 (0.26).
The paper, of five: PITI 1.10 and 1.02, Sketch-Guided Diffusion 3.21 and 2.31, at twice the strength 2.52 and 3.28, lite
3.93 and 4.09, ControlNet 4.22 and 4.28.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from controlkit.backbones import Backbone
from controlkit.errors import Invalid, one_line
from controlkit.files import mark_output
from controlkit.measure import Figure, ceiling_of, mean_figure, world_of
from controlkit.reproduce.conditions import used
from controlkit.reproduce.entrants import SHIPPED, Plan, Table, Trial, advice, entrant, pixels_of, write_report
from controlkit.reproduce.rows import SystemRow
from controlkit.reproduce.study import (
    ASPECTS,
    Answers,
    Key,
    Rank,
    Shown,
    name_of,
    rank_of,
    ranks_by_score,
    read_answers,
    write_study,
)

KIND = "canny"
NO_CONTROL = "no-control"
SYSTEMS: Mapping[str, tuple[str, float]] = {
    NO_CONTROL: (NO_CONTROL, 1.0),
    "piti": ("piti", 1.0),
    "sketch-guided": ("sketch-guided", 1.0),
    "sketch-guided-x2": ("sketch-guided", 2.0),
    "lite": ("lite", 1.0),
    "controlnet": ("controlnet", 1.0),
    SHIPPED: (SHIPPED, 1.0),
}
"""Each system's opponent, and the scale of its control: Sketch-Guided Diffusion's strength is 1.6 times that."""
PAPER = {
    "piti": ((1.10, 0.05), (1.02, 0.01)),
    "sketch-guided": ((3.21, 0.62), (2.31, 0.57)),
    "sketch-guided-x2": ((2.52, 0.44), (3.28, 0.72)),
    "lite": ((3.93, 0.59), (4.09, 0.46)),
    "controlnet": ((4.22, 0.43), (4.28, 0.45)),
}
"""The paper's average user ranks of quality and of fidelity, with their spreads."""
ORDER = tuple(SYSTEMS)
HEAD = (
    "system",
    "referees' ranks: quality, fidelity",
    "persons' ranks: quality, fidelity",
    "paper",
    "rating",
    "fidelity",
    "training",
)
STUDY = "study"


@dataclass(frozen=True)
class Row:
    """A system: its ranks by the referees and by persons, by aspect, with what the referees measured; or a note."""

    name: str
    title: str
    referees: Mapping[str, Rank] | None = None
    persons: Mapping[str, Rank] | None = None
    paper: tuple[tuple[float, float], tuple[float, float]] | None = None
    rating: Figure | None = None
    fidelity: Figure | None = None
    cost: str = ""
    note: str = ""

    def words(self) -> tuple[str, ...]:
        """The row's cells, as in ``HEAD``."""
        paper = ", ".join("{:.2f} ± {:.2f}".format(*one) for one in self.paper) if self.paper else "-"
        if self.fidelity is None:
            return self.title, self.note, "", paper, "", "", self.cost
        rating = f"{self.rating.mean:.2f}" if self.rating else "-"
        ranks = [_both(by) for by in (self.referees, self.persons)]
        return self.title, *ranks, paper, rating, f"{self.fidelity.mean:.3f}", self.cost


@dataclass(frozen=True)
class Table1(Table):
    """The whole table. ``floor`` and ``ceiling``: rating and fidelity of the base without control, and of the true
    pictures as the VAE gives them back."""

    rows: Sequence[Row]
    floor: Mapping[str, Figure]
    ceiling: Mapping[str, Figure]
    raters: int = 0
    """Persons whose answers are counted."""

    def notes(self) -> str:
        """The number of systems that are ranked, who ranked them, floor and ceiling."""
        ranked = sum(row.fidelity is not None for row in self.rows)
        people = f"{self.raters} persons" if self.raters else "no person yet (open the study's pages, see its folder)"
        ends = ("; ".join(f"{name} {figure}" for name, figure in one.items()) for one in (self.floor, self.ceiling))
        return (
            f"Ranks from 1, the worst, to {ranked}, the best, among the systems with weights and no control; the paper "
            "has five systems. The referees are raters that look at one thing each: quality is the aesthetic rating, "
            "fidelity the F1 of edges. The spread is over sketches; over raters with two or more persons, as in the "
            "paper. Ranked by: {}. Floor: {}. Ceiling: {}.".format(people, *ends)
        )


def make_table1(base: Backbone, plan: Plan, out: Path, on_row: Callable[[str], None] = lambda name: None) -> Table1:
    """Make the table and write it into a folder: ``table1.json``, ``.md`` and ``.png``, and the folder ``study``.

    ``on_row`` and errors: as with ``make_table2``; ``Invalid`` for answers in ``out`` that are not of this study.
    """
    mark_output(out, "reproduce table1")
    trial = Trial.of(KIND, base, plan)
    rows: list[Row] = []
    made: dict[str, list[np.ndarray]] = {}
    for name, (opponent, scale) in SYSTEMS.items():
        on_row(name)
        one = entrant(opponent, KIND, base, plan.opponents)
        title = one.title.replace("(seg)", f"({KIND})")
        title = title if scale == 1.0 else f"x{scale:g}: {title}"
        rows.append(Row(name, title, paper=PAPER.get(name), cost=one.cost, note=one.note))
        if one.make:
            asked = used(trial.evaluation, scale=scale)
            made[name] = pixels_of(one.make, asked.requests("controlled"))
    key = _write_study(out / STUDY, made, rows, trial)
    answers = _answers(out, key)
    judged = {name: _judged(pictures, trial) for name, pictures in made.items()}
    for i, row in enumerate(rows):
        if row.name in made:
            rows[i] = _ranked(row, judged, answers, key)
    ceiling = _means(_judged(ceiling_of(base)(trial.truth), trial))
    systems = [SystemRow(SYSTEMS[row.name][0], row.title, kind=KIND, note=row.note) for row in rows]
    table = Table1(
        rows,
        trial.facts(),
        advice(systems, plan.opponents),
        floor=_means(judged[NO_CONTROL]),
        ceiling=ceiling,
        raters=len(answers),
    )
    shown = {row.title: made[row.name] for row in rows if row.name in made}
    return write_report(out, "table1", table, HEAD, {"": {"sketch": trial.shown(), **shown}})


def _judged(pictures: Sequence[np.ndarray], trial: Trial) -> dict[str, np.ndarray]:
    """Each picture's score (N,) in each of ``ASPECTS`` that a referee knows."""
    scores = {"fidelity": trial.scores(pictures)}
    if world := world_of(trial.base):
        scores["quality"] = world.referee(trial.base.device.type).ratings(pictures)
    return scores


def _means(scores: Mapping[str, np.ndarray]) -> dict[str, Figure]:
    return {aspect: mean_figure(values) for aspect, values in scores.items()}


def _ranked(row: Row, judged: Mapping[str, Mapping[str, np.ndarray]], answers: Answers, key: Key) -> Row:
    """A row with its ranks by the referees, and by persons where there are answers."""
    at, own = list(judged).index(row.name), _means(judged[row.name])
    scores = {aspect: np.stack([one[aspect] for one in judged.values()]) for aspect in own}
    referees = {aspect: ranks_by_score(scores[aspect])[at] for aspect in ASPECTS if aspect in scores}
    persons = {aspect: rank_of(row.name, answers, key, aspect) for aspect in ASPECTS} if answers else None
    return replace(row, referees=referees, persons=persons, rating=own.get("quality"), fidelity=own["fidelity"])


def _write_study(folder: Path, made: Mapping[str, Sequence[np.ndarray]], rows: Sequence[Row], trial: Trial) -> Key:
    """Write the study's folder; returns its key."""
    one, costs = trial.evaluation, {row.name: row.cost for row in rows}
    key, pictures = dict[str, Shown](), dict[str, np.ndarray]()
    for system, results in made.items():
        settings = f"{trial.base.digest} {KIND} {one.steps} {one.guidance} {costs[system]}"
        for sketch, picture in enumerate(results):
            name = name_of(system, sketch, settings)
            key[name], pictures[name] = Shown(sketch, system), picture
    write_study(folder, key, pictures, trial.shown(len(one.pairs)), [pair.prompt for pair in one.pairs])
    return key


def _answers(out: Path, key: Key) -> Answers:
    """The answers in all files of a report's folder; ``Invalid`` where two are of one rater."""
    found: Answers = {}
    for path in sorted(out.glob("answers*.csv")):
        answers = read_answers(path, key)
        if twice := found.keys() & answers.keys():
            raise Invalid(f'{path}: the answers of rater "{one_line(min(twice))}" are in another file, too: keep one.')
        found |= answers
    return found


def _both(ranks: Mapping[str, Rank] | None) -> str:
    """The ranks of quality and fidelity in words."""
    return ", ".join(str(ranks[aspect]) if aspect in ranks else "-" for aspect in ASPECTS) if ranks else "-"
