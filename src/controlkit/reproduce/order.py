"""Whether systems come in the paper's order: sentences for a report, which also say where they do not."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from controlkit.reproduce.rows import Kept, SystemRow


@dataclass(frozen=True)
class Rank:
    """A system: the paper's figure, and ours with its 95% interval."""

    title: str
    paper: float
    mean: float
    low: float
    high: float

    def overlaps(self, other: "Rank") -> bool:
        """Whether the two intervals have a number in common, so that the two are not told apart."""
        return self.low <= other.high and other.low <= self.high


Read = Callable[[Mapping[str, Any]], tuple[float, Mapping[str, float]]]
"""(a row's facts) -> the paper's figure, and ours as a mapping with ``mean``, ``low`` and ``high``."""


def ranks(rows: Sequence[SystemRow], read: Read, leave_out: Sequence[str]) -> list[Rank]:
    """The systems of a report that both the paper and we have a figure of, but for those named ``leave_out``."""
    found = []
    for row in rows:
        facts = row.facts if isinstance(row, Kept) else asdict(row)
        with suppress(KeyError, TypeError, ValueError, IndexError):  # no figure, or a kept row that has been edited
            paper, ours = read(facts)
            if row.name not in leave_out:
                found.append(Rank(row.title, float(paper), *(float(ours[key]) for key in ("mean", "low", "high"))))
    return found


def order_words(what: str, systems: Sequence[Rank], higher_is_better: bool) -> str:
    """Sentences on the paper's order by a figure and on each pair that comes the other way; "" for fewer than two."""
    if len(systems) < 2:
        return ""
    sign = 1 if higher_is_better else -1
    theirs = sorted(systems, key=lambda one: -sign * one.paper)
    turned = [(one, other) for one, other in combinations(theirs, 2) if sign * other.mean > sign * one.mean]
    order = f"The paper's order by {what}, best first: {', '.join(one.title for one in theirs)}."
    if not turned:
        return f"{order} It holds here."
    pairs = [f"{other.title} before {one.title} ({other.mean:.2f}, {one.mean:.2f}{_apart(one, other)})"
             for one, other in turned]  # fmt: skip
    return f"{order} Here it does not hold: {'; '.join(pairs)}."


def _apart(one: Rank, other: Rank) -> str:
    return "; their intervals overlap" if one.overlaps(other) else ""
