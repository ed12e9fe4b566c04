"""The table of what can be made again, by the names that the command line takes: one row says all there is to know."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from controlkit.reproduce import (
    auto,
    cfg,
    compare,
    compose,
    convergence,
    cost,
    depth,
    fig8,
    limits,
    scale,
    table1,
    table2,
    table3,
    transfer,
)
from controlkit.reproduce.entrants import QUICK, Table


@dataclass(frozen=True)
class Report:
    """A table or figure of the paper. ``make(base, plan, out, on_row)`` makes it and writes it into a folder."""

    title: str
    make: Callable[..., Table]
    rows: Sequence[str]
    """Names of its rows, as ``on_row`` is told them."""
    head: Sequence[str]
    num: int
    """Held-out pairs to measure on, where nothing else is said."""
    trains: bool = False
    """Whether it trains in its folder: then ``Plan.share`` is read, and it can be stopped to go on another time."""

    @property
    def quick(self) -> Mapping[str, Any]:
        """The plan's values with which it takes minutes."""
        return {"num": 8, "steps": 5, "share": 0.005} if self.trains else QUICK


REPORTS = {
    "table2": Report("Table 2", table2.make_table2, (*table2.ORDER, "floor"), table2.HEAD, 64),
    "table3": Report("Table 3", table3.make_table3, table3.ORDER, table3.HEAD, 64),
    "fig8": Report("Figure 8", fig8.make_fig8, fig8.ORDER, fig8.HEAD, 32),
    "fig-scale": Report("Figure 10", scale.make_scale, scale.ORDER, scale.HEAD, 32, trains=True),
    "fig-convergence": Report(
        "Figure 4", convergence.make_convergence, convergence.ORDER, convergence.HEAD, 16, trains=True
    ),
    "fig-depth": Report("Depth models", depth.make_depth, depth.ORDER, depth.HEAD, 192, trains=True),
    "fig-compare": Report("Earlier methods", compare.make_comparison, compare.ORDER, compare.HEAD, 32),
    "fig-cfg": Report("Figure 5", cfg.make_cfg, cfg.ORDER, cfg.HEAD, 32),
    "fig-compose": Report("Two controls at once", compose.make_compose, compose.ORDER, compose.HEAD, 32),
    "fig-limits": Report("A misread hint", limits.make_limits, limits.ORDER, limits.HEAD, 64),
    "table1": Report("Table 1", table1.make_table1, table1.ORDER, table1.HEAD, 20),
    "fig-auto": Report("Automatic prompts", auto.make_auto, auto.ORDER, auto.HEAD, 32),
    "cost": Report("Cost of training", cost.make_cost, cost.ORDER, cost.HEAD, 2),
    "fig-transfer": Report("Tuned bases", transfer.make_transfer, transfer.ORDER, transfer.HEAD, 32),
}
