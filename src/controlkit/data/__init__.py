"""Training data: pairs of picture, prompt and hint, where they come from, and their cache."""

from controlkit.data.buckets import bucket_sizes, turn_at
from controlkit.data.build import build_set
from controlkit.data.cache import Cached, build_cache
from controlkit.data.captions import (
    Captioning,
    Over,
    load_captioner,
    unwritten,
    wanting,
    write_captions,
)
from controlkit.data.doctor import Finding, Report, add_up, examine, sheet_rows
from controlkit.data.drawn import make_fill50k, make_scenes
from controlkit.data.hints import HintFile, hint_files, kept_hints, write_hints
from controlkit.data.layouts import folder_of, read_listing, sound_listing
from controlkit.data.layouts.rows import Listing
from controlkit.data.mirror import mirrored
from controlkit.data.pairs import (
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
from controlkit.data.store import open_store

__all__ = [
    "Cached",
    "Captioning",
    "CirclePairs",
    "EmojiPairs",
    "Finding",
    "FolderPairs",
    "HintFile",
    "Listing",
    "Over",
    "Pair",
    "Report",
    "ScenePairs",
    "TypedPairs",
    "add_up",
    "bucket_sizes",
    "build_cache",
    "build_set",
    "evaluation_pairs",
    "examine",
    "folder_of",
    "hint_files",
    "hint_for_pair",
    "kept_hints",
    "load_captioner",
    "make_fill50k",
    "make_scenes",
    "mirrored",
    "open_store",
    "read_listing",
    "sheet_rows",
    "sound_listing",
    "split_folder",
    "trained_count",
    "turn_at",
    "unwritten",
    "wanting",
    "write_captions",
    "write_hints",
]
