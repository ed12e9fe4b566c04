"""The paper's tables and figures, made again at the size of any base, beside the paper's own numbers."""

from controlkit.reproduce.entrants import QUICK, Plan
from controlkit.reproduce.table2 import Table2, make_table2
from controlkit.reproduce.table3 import Table3, make_table3

__all__ = ["QUICK", "Plan", "Table2", "Table3", "make_table2", "make_table3"]
