"""Base models as backbones: frozen, never modified, and described by their taps."""

from controlkit.backbones.unet import UNetBase, load_base

__all__ = ["UNetBase", "load_base"]
