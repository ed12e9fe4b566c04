"""The paper's tables and figures, made again at the size of any base, beside the paper's own numbers."""

from controlkit.reproduce.compare import Comparison, make_comparison
from controlkit.reproduce.entrants import QUICK, Plan
from controlkit.reproduce.fig8 import Figure8, make_fig8
from controlkit.reproduce.reports import REPORTS, Report
from controlkit.reproduce.table2 import Table2, make_table2
from controlkit.reproduce.table3 import Table3, make_table3

__all__ = [
    "QUICK",
    "REPORTS",
    "Comparison",
    "Figure8",
    "Plan",
    "Report",
    "Table2",
    "Table3",
    "make_comparison",
    "make_fig8",
    "make_table2",
    "make_table3",
]
