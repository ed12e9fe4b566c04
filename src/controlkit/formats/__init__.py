"""Weights on disk: every layout people have, recognised, read for a base, and written; one table of names both ways."""

from controlkit.formats.control import (
    SavedControl,
    control_path,
    load_control,
    named_path,
    save_control,
    shipped_controls,
    shipped_folder,
    write_tensors,
)
from controlkit.formats.convert import Converted, WriteOptions, attach, convert, save_control_lora
from controlkit.formats.describe import Description, describe
from controlkit.formats.metadata import WEIGHTS

__all__ = [
    "WEIGHTS",
    "Converted",
    "Description",
    "SavedControl",
    "WriteOptions",
    "attach",
    "control_path",
    "convert",
    "describe",
    "load_control",
    "named_path",
    "save_control",
    "save_control_lora",
    "shipped_controls",
    "shipped_folder",
    "write_tensors",
]
