"""Base models as backbones: frozen, never modified, and described by their taps."""

from controlkit.backbones.families import FAMILIES, Family
from controlkit.backbones.load import load_base, save_difference
from controlkit.backbones.unet import Text, UNetBase, UNetEncoder, recomputed

__all__ = ["FAMILIES", "Family", "Text", "UNetBase", "UNetEncoder", "load_base", "recomputed", "save_difference"]
