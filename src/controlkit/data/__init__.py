"""Training data: pairs of picture, prompt and hint, where they come from, and their cache."""

from controlkit.data.buckets import bucket_sizes, nearest_bucket, turn_at
from controlkit.data.build import TARGETS, build_set
from controlkit.data.cache import Cached, build_cache
from controlkit.data.captions import (
    CAPTIONER,
    Captioner,
    Captioning,
    Over,
    check_beside,
    load_captioner,
    unwritten,
    wanting,
    write_captions,
)
from controlkit.data.doctor import Finding, Report, add_up, examine, sheet_rows
from controlkit.data.drawn import FILL50K_SIZE, make_fill50k, make_scenes
from controlkit.data.layouts import LAYOUTS, folder_of, read_listing
from controlkit.data.layouts.rows import Listing, Problem, Row
from controlkit.data.mirror import mirrored
from controlkit.data.pairs import (
    SCENES_EVALUATED,
    CirclePairs,
    EmojiPairs,
    FolderPairs,
    Pair,
    ScenePairs,
    TypedPairs,
    evaluation_pairs,
    hint_for_pair,
    split_folder,
    trained_count,
)
from controlkit.data.store import Store, key_of, open_store, remembered

__all__ = [
    "CAPTIONER",
    "FILL50K_SIZE",
    "LAYOUTS",
    "SCENES_EVALUATED",
    "TARGETS",
    "Cached",
    "Captioner",
    "Captioning",
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
    "Store",
    "TypedPairs",
    "add_up",
    "bucket_sizes",
    "build_cache",
    "build_set",
    "check_beside",
    "evaluation_pairs",
    "examine",
    "folder_of",
    "hint_for_pair",
    "key_of",
    "load_captioner",
    "make_fill50k",
    "make_scenes",
    "mirrored",
    "nearest_bucket",
    "open_store",
    "read_listing",
    "remembered",
    "sheet_rows",
    "split_folder",
    "trained_count",
    "turn_at",
    "unwritten",
    "wanting",
    "write_captions",
]
