"""The paper's opponents, at the size of any base: each a maker of pictures that is trained and measured here."""

from controlkit.baselines.saved import About, Settings, load_baseline, read_about, save_baseline
from controlkit.baselines.seam import Baseline, Material
from controlkit.baselines.table import OPPONENTS, Opponent, opponent
from controlkit.baselines.training import Diverged, Learnt, material_of, train_baseline

__all__ = [
    "OPPONENTS",
    "About",
    "Baseline",
    "Diverged",
    "Learnt",
    "Material",
    "Opponent",
    "Settings",
    "load_baseline",
    "material_of",
    "opponent",
    "read_about",
    "save_baseline",
    "train_baseline",
]
