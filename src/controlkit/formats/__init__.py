"""Weights on disk: every layout people have, recognised, read for a base, and written; one table of names both ways."""

from controlkit.formats.control import (
    SavedControl,
    control_path,
    load_control,
    save_control,
    shipped_controls,
    shipped_folder,
    write_tensors,
)
from controlkit.formats.convert import Converted, attach, convert, save_control_lora
from controlkit.formats.describe import WEIGHTS, Description, describe

__all__ = [
    "WEIGHTS",
    "Converted",
    "Description",
    "SavedControl",
    "attach",
    "control_path",
    "convert",
    "describe",
    "load_control",
    "save_control",
    "save_control_lora",
    "shipped_controls",
    "shipped_folder",
    "write_tensors",
]
