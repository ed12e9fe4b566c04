"""HTML pages of pictures and curves, from jinja2 templates (``page.html``) that escape whatever they are given.

A page loads nothing but pictures: those in it, and files beside it. None runs a script but the study's
(``study.html``), which has to save what its reader answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from controlkit.errors import printable

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Figure:
    """A picture: its address (a file beside the page, or a ``data:`` URI) and its label."""

    source: str
    label: str


@dataclass(frozen=True)
class Chart:
    """A line over steps, drawn as SVG. ``points`` are (step, value); ``band`` is (step, low, high) around the line.

    ``scale``: the ends that the axis has at least, of a measure whose values mean something by themselves. ``marks``:
    values to draw a line across at, with a word each.
    """

    title: str
    points: Points
    band: Sequence[tuple[float, float, float]] = ()
    wide: bool = False
    scale: tuple[float, ...] = ()
    marks: Sequence[tuple[float, str]] = ()

    @property
    def box(self) -> tuple[int, int, int, int, int]:
        """Width and height, and the margins left, above and below, in the SVG's units."""
        return (720, 200, 44, 20, 18) if self.wide else (240, 120, 40, 20, 16)

    @property
    def value(self) -> float:
        """The last value."""
        return self.points[-1][1]

    @property
    def last(self) -> float:
        """The last step, at least 1."""
        return max(self.points[-1][0], 1)

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the greatest value of line, band, scale and marks, never equal."""
        values = [*self.scale, *(y for y, _ in self.marks), *(y for _, y in self.points)]
        values += [y for _, *ends in self.band for y in ends]
        return min(values), max(max(values), min(values) + 1e-3)

    @property
    def ticks(self) -> list[float]:
        """Values to write at the axis: the scale's, and the limits where they lie clearly beyond it."""
        low, high = self.limits
        near = 0.12 * (high - low)
        beyond = [end for end in (low, high) if all(abs(end - value) > near for value in self.scale)]
        return [*self.scale, *beyond]

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where step ``x`` and value ``y`` lie in the SVG."""
        width, height, left, top, foot = self.box
        low, high = self.limits
        return left + x / self.last * (width - left - 8), top + (high - y) / (high - low) * (height - top - foot)

    def path(self, points: Points) -> str:
        """The places of ``points`` as SVG's ``points`` attribute."""
        return " ".join("{:.1f},{:.1f}".format(*self.place(x, y)) for x, y in points)

    @property
    def outline(self) -> str:
        """The band's outline: its lower end forwards and its upper end back."""
        return self.path([(x, low) for x, low, _ in self.band] + [(x, high) for x, _, high in reversed(self.band)])


@dataclass(frozen=True)
class Table:
    """A table of words: a row of headings, and rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it: rows of pictures (None is a gap), charts, a picture as wide as the page,
    and a paragraph."""

    title: str
    rows: Sequence[Sequence[Figure | None]] = ()
    charts: Sequence[Chart] = ()
    sheet: Figure | None = None
    text: str = ""


@dataclass(frozen=True)
class Task:
    """A row of a study: a hint with words below it, and results in the order shown; a result's label is its name in the
    answers, and not shown."""

    hint: Figure
    results: Sequence[Figure]


@cache
def _template(name: str = "page.html") -> Template:
    environment = Environment(
        loader=PackageLoader("controlkit", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else printable(value, None),  # then it is escaped
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def render(title: str, heading: str, body: Sequence[str | Table | Section], refresh: float | None = None) -> str:
    """A whole HTML page: ``heading``, then paragraphs (strings), tables and sections in the order given.

    ``refresh``: seconds after which a browser loads the page again; None for a page that does not change.
    """
    return _template().render(title=title, heading=heading, body=body, refresh=refresh)


def render_study(rater: str, heading: str, words: str, aspects: Sequence[str], tasks: Sequence[Task]) -> str:
    """A whole HTML page on which a person ranks results, and saves the ranks as ``answers-RATER.csv``.

    ``aspects``: in each of which the results of a row are ranked, from 1, the worst. Columns of the file: ``rater``,
    ``picture``, and the aspects; only a full set of answers is saved.
    """
    values = {"title": heading, "heading": heading, "words": words, "rater": rater, "aspects": aspects, "tasks": tasks}
    return _template("study.html").render(**values)
