"""Base models as backbones: frozen, never modified, and described by their taps."""

from controlkit.backbones.families import FAMILIES, Family
from controlkit.backbones.load import load_base, save_difference
from controlkit.backbones.unet import Part, Text, UNetBase, UNetEncoder, recomputed
from controlkit.backbones.xs import XSBranch

__all__ = [
    "FAMILIES",
    "Family",
    "Part",
    "Text",
    "UNetBase",
    "UNetEncoder",
    "XSBranch",
    "load_base",
    "recomputed",
    "save_difference",
]
