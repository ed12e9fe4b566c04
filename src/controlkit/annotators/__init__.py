"""Annotators: the table of kinds of hints, the functions that make them of pictures, and their contracts."""

from controlkit.annotators.hints import (
    annotate,
    annotate_all,
    contract,
    contract_from_json,
    grounds_of,
    is_empty,
    joined,
    light_lines,
    parts_of,
    white_on_black,
)
from controlkit.annotators.kinds import (
    HintKind,
    all_kinds,
    annotator,
    each,
    kind_of,
    kind_or_bare,
    names_of,
    register,
    union_types,
)

__all__ = [
    "HintKind",
    "all_kinds",
    "annotate",
    "annotate_all",
    "annotator",
    "contract",
    "contract_from_json",
    "each",
    "grounds_of",
    "is_empty",
    "joined",
    "kind_of",
    "kind_or_bare",
    "light_lines",
    "names_of",
    "parts_of",
    "register",
    "union_types",
    "white_on_black",
]
