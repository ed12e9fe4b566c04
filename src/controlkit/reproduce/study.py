"""A study in which persons rank results: pages with random orders, the files of answers, and average ranks."""

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from controlkit.errors import Invalid, one_line
from controlkit.files import inside, read_text, write_atomic
from controlkit.images import write_png
from controlkit.pages import Figure, Task, render_study
from controlkit.seeds import numpy_rng

ASPECTS = ("quality", "fidelity")
RATERS = 12
"""As many as in the paper; a page is written for each."""
_LONGEST = 2**20
"""Bytes of a file of answers."""
_COLUMNS = ("rater", "picture", *ASPECTS)
_WORDS = (
    "Each row has a sketch and pictures that were made of it. Rank the pictures of a row, 1 the worst: by quality, how "
    "good a picture is by itself, and by fidelity, how well it keeps to the sketch. No rank twice in a row. What you "
    "choose is kept in this browser. At the end save the answers, and put the file beside the study's folder."
)


@dataclass(frozen=True)
class Shown:
    """A picture of a study: which sketch it was made of, from 0, and by which system."""

    sketch: int
    system: str


Key = Mapping[str, Shown]
"""Pictures by the names that raters see, which say nothing."""
Answers = dict[str, dict[str, tuple[int, ...]]]
"""By rater, the ranks that each picture was given, by its name, in each of ``ASPECTS``."""


@dataclass(frozen=True)
class Rank:
    """An average rank, from 1, the worst, with its standard deviation over ``over``: raters, or sketches."""

    mean: float
    spread: float
    over: str
    count: int
    """How many raters, or sketches."""

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.spread:.2f}"


def name_of(system: str, sketch: int, settings: str) -> str:
    """A picture's name, 12 letters: the same each time for the same system, sketch and settings."""
    return hashlib.sha256(f"{settings}\n{system}\n{sketch}".encode()).hexdigest()[:12]


def write_study(
    folder: Path, key: Key, pictures: Mapping[str, np.ndarray], sketches: Sequence[np.ndarray], words: Sequence[str]
) -> None:
    """Write a study: its pictures, the key, and a page for each of ``RATERS`` raters, each with an order of its own.

    ``pictures``: by name, as in the key; ``sketches``: (H, W, 3), and the words below each.
    """
    for name, picture in pictures.items():
        write_png(folder / "pictures" / f"{name}.png", picture)
    for index, sketch in enumerate(sketches):
        write_png(folder / "pictures" / f"sketch-{index:03}.png", sketch)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerows([("picture", "sketch", "system"), *((name, one.sketch, one.system) for name, one in key.items())])
    write_atomic(folder / "key.csv", table.getvalue().encode())
    for rater in range(1, RATERS + 1):
        tasks = []
        for sketch in numpy_rng("study", rater).permutation(len(sketches)):
            own = sorted(name for name, one in key.items() if one.sketch == sketch)
            order = numpy_rng("study", rater, int(sketch)).permutation(len(own))
            hint = Figure(f"pictures/sketch-{sketch:03}.png", words[sketch])
            tasks.append(Task(hint, [Figure(f"pictures/{own[i]}.png", own[i]) for i in order]))
        page = render_study(f"{rater:02}", f"Study, rater {rater}", _WORDS, ASPECTS, tasks)
        write_atomic(folder / f"rater-{rater:02}.html", page.encode())


def read_answers(path: Path, key: Key) -> Answers:
    """The answers in a file that a study's page saved: by rater, the ranks of each picture in each of ``ASPECTS``.

    ``Invalid`` where it has other columns, names a picture that the key lacks, a rank that is none, or not every rank
    of a sketch once; raises as ``files.inside`` and ``files.read_text`` do, too.
    """
    size = Counter(one.sketch for one in key.values())
    rows = csv.reader(io.StringIO(read_text(inside(path.parent, path), _LONGEST)))
    found: Answers = {}
    try:
        if (head := next(rows, [])) != list(_COLUMNS):
            raise Invalid(f"{path} begins with {one_line(','.join(head))}; expected the columns {','.join(_COLUMNS)}.")
        for number, row in enumerate(rows, 2):
            if len(row) != len(_COLUMNS) or (name := row[1]) not in key:
                raise Invalid(
                    f"{path}, line {number}: expected a rater, a picture of this study (answers to one of other "
                    "settings do not count), and two ranks."
                )
            most = size[key[name].sketch]
            if any(rank not in map(str, range(1, most + 1)) for rank in row[2:]):
                raise Invalid(f"{path}, line {number}: a rank is a whole number from 1 to {most}.")
            own = found.setdefault(row[0], {})
            if name in own:
                raise Invalid(f"{path}, line {number}: this rater ranked the picture {name} before.")
            own[name] = tuple(map(int, row[2:]))
    except csv.Error as error:
        raise Invalid(f"{path} is no table of answers ({one_line(error)}).") from error
    for rater, ranks in found.items():
        _check_whole(path, rater, ranks, key, size)
    return found


def _check_whole(path: Path, rater: str, ranks: Mapping[str, Sequence[int]], key: Key, size: Mapping[int, int]) -> None:
    """Refuse answers in which a rank of a sketch is missing, or given twice."""
    for sketch, most in size.items():
        own = [values for name, values in ranks.items() if key[name].sketch == sketch]
        for at, aspect in enumerate(ASPECTS):
            if sorted(values[at] for values in own) != list(range(1, most + 1)):
                raise Invalid(
                    f'{path}: rater "{one_line(rater)}" did not give each of the ranks 1 to {most} once for sketch '
                    f"{sketch + 1}, {aspect}."
                )


def rank_of(system: str, answers: Answers, key: Key, aspect: str) -> Rank:
    """A system's average rank by persons: mean and spread of the raters' averages; of one rater, over sketches."""
    at = ASPECTS.index(aspect)
    own = [[ranks[name][at] for name in key if key[name].system == system] for ranks in answers.values()]
    if len(own) > 1:
        return _rank([float(np.mean(one)) for one in own], "raters")
    return _rank(own[0], "sketches")


def ranks_by_score(scores: np.ndarray) -> list[Rank]:
    """The average rank of each system by scores (systems, sketches), of which higher ones rank higher.

    Equal ones share the mean of their ranks.
    """
    below = (scores[:, None] > scores[None]).sum(1)
    equal = (scores[:, None] == scores[None]).sum(1)
    return [_rank(list(row), "sketches") for row in below + (equal + 1) / 2]


def _rank(values: Sequence[float], over: str) -> Rank:
    return Rank(float(np.mean(values)), float(np.std(values)), over, len(values))
