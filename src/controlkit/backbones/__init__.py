"""Base models as backbones: frozen, never modified, and described by their taps."""

from controlkit.backbones.load import load_base, save_difference
from controlkit.backbones.noise import Diffusion, Flow, NoiseProcess, Prediction, Sampler
from controlkit.backbones.protocol import ActiveControl, Backbone, TextEmbedding, Walker
from controlkit.backbones.unet import UNetBase, UNetEncoder, recomputed
from controlkit.backbones.unet_families import FAMILIES, Family

__all__ = [
    "FAMILIES",
    "ActiveControl",
    "Backbone",
    "Diffusion",
    "Family",
    "Flow",
    "NoiseProcess",
    "Prediction",
    "Sampler",
    "TextEmbedding",
    "UNetBase",
    "UNetEncoder",
    "Walker",
    "load_base",
    "recomputed",
    "save_difference",
]
