"""The paper's tables and figures, made again at the size of any base, beside the paper's own numbers."""

from controlkit.reproduce.auto import make_auto
from controlkit.reproduce.cfg import make_cfg
from controlkit.reproduce.compare import Comparison, make_comparison
from controlkit.reproduce.compose import make_compose
from controlkit.reproduce.convergence import Convergence, make_convergence
from controlkit.reproduce.cost import make_cost
from controlkit.reproduce.depth import Depth, make_depth
from controlkit.reproduce.entrants import QUICK, Plan
from controlkit.reproduce.fig8 import Figure8, make_fig8
from controlkit.reproduce.limits import make_limits
from controlkit.reproduce.reports import REPORTS, Report
from controlkit.reproduce.scale import Scale, make_scale
from controlkit.reproduce.table1 import make_table1
from controlkit.reproduce.table2 import Table2, make_table2
from controlkit.reproduce.table3 import Table3, make_table3
from controlkit.reproduce.transfer import make_transfer

__all__ = [
    "QUICK",
    "REPORTS",
    "Comparison",
    "Convergence",
    "Depth",
    "Figure8",
    "Plan",
    "Report",
    "Scale",
    "Table2",
    "Table3",
    "make_auto",
    "make_cfg",
    "make_comparison",
    "make_compose",
    "make_convergence",
    "make_cost",
    "make_depth",
    "make_fig8",
    "make_limits",
    "make_scale",
    "make_table1",
    "make_table2",
    "make_table3",
    "make_transfer",
]
