"""Annotators: the table of kinds of hints, the functions that make them of pictures, and their contracts."""

from controlkit.annotators.elsewhere import why_not
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
    with_maker,
)
from controlkit.annotators.kinds import (
    HintKind,
    all_kinds,
    annotator,
    each,
    fits,
    kind_of,
    kind_or_bare,
    maker,
    makers_of,
    names_of,
    ready_maker,
    register,
    union_types,
)
from controlkit.annotators.networks import rows  # noqa: F401  # puts them into the table
from controlkit.annotators.options import Slider, Threshold

__all__ = [
    "HintKind",
    "Slider",
    "Threshold",
    "all_kinds",
    "annotate",
    "annotate_all",
    "annotator",
    "contract",
    "contract_from_json",
    "each",
    "fits",
    "grounds_of",
    "is_empty",
    "joined",
    "kind_of",
    "kind_or_bare",
    "light_lines",
    "maker",
    "makers_of",
    "names_of",
    "parts_of",
    "ready_maker",
    "register",
    "union_types",
    "white_on_black",
    "why_not",
    "with_maker",
]
