"""Training data: pairs of picture, prompt and hint, where they come from, and their cache."""

from controlkit.data.build import TARGETS, build_set
from controlkit.data.cache import Cached, build_cache
from controlkit.data.captions import (
    CAPTIONER,
    Captioner,
    Over,
    check_beside,
    load_captioner,
    unwritten,
    wanting,
    write_captions,
)
from controlkit.data.doctor import Finding, Report, add_up, examine, sheet_rows
from controlkit.data.drawn import FILL50K_SIZE, make_fill50k, make_scenes
from controlkit.data.layouts import LAYOUTS, Listing, Problem, Row, read_listing
from controlkit.data.pairs import (
    SCENES_EVALUATED,
    TRUTHS,
    CirclePairs,
    EmojiPairs,
    FolderPairs,
    Pair,
    ScenePairs,
    TypedPairs,
    evaluation_pairs,
    hint_of,
    split_folder,
    trained_count,
)

__all__ = [
    "CAPTIONER",
    "FILL50K_SIZE",
    "LAYOUTS",
    "SCENES_EVALUATED",
    "TARGETS",
    "TRUTHS",
    "Cached",
    "Captioner",
    "CirclePairs",
    "EmojiPairs",
    "Finding",
    "FolderPairs",
    "Listing",
    "Over",
    "Pair",
    "Problem",
    "Report",
    "Row",
    "ScenePairs",
    "TypedPairs",
    "add_up",
    "build_cache",
    "build_set",
    "check_beside",
    "evaluation_pairs",
    "examine",
    "hint_of",
    "load_captioner",
    "make_fill50k",
    "make_scenes",
    "read_listing",
    "sheet_rows",
    "split_folder",
    "trained_count",
    "unwritten",
    "wanting",
    "write_captions",
]
