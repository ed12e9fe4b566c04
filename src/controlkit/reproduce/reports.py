"""The table of what can be made again, by the names that the command line takes: one row says all there is to know."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from controlkit.reproduce import compare, fig8, table2, table3
from controlkit.reproduce.entrants import Table


@dataclass(frozen=True)
class Report:
    """A table or figure of the paper. ``make(base, plan, out, on_row)`` makes it and writes it into a folder."""

    title: str
    make: Callable[..., Table]
    rows: Sequence[str]
    """Names of its rows, as ``on_row`` is told them."""
    head: Sequence[str]
    num: int
    """Held-out scenes to measure on, where nothing else is said."""


REPORTS = {
    "table2": Report("Table 2", table2.make_table2, (*table2.ORDER, "floor"), table2.HEAD, 64),
    "table3": Report("Table 3", table3.make_table3, table3.ORDER, table3.HEAD, 64),
    "fig8": Report("Figure 8", fig8.make_fig8, fig8.ORDER, fig8.HEAD, 32),
    "fig-compare": Report("Earlier methods", compare.make_comparison, compare.ORDER, compare.HEAD, 32),
}
