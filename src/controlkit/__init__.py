"""ControlKit trains, runs and measures spatial control for text-to-image diffusion (ControlNet, ICCV 2023).

The names below are the public surface; they load on first use, so that importing the package takes no time.

    base = controlkit.load_base("mini")
    control = controlkit.load_control("canny", base)
"""

import importlib
import os
from typing import Any

# Torch lays large tensors on a CPU into huge pages, where Linux leaves that choice to programs. Each step frees and
# takes gigabytes, and 4 KB at a time the system needs longer for it than the arithmetic that follows.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_HOMES = {
    "ControlBranch": "branch",
    "ControlSpec": "branch",
    "ControlledBlock": "branch",
    "Tap": "branch",
    "zero_conv": "branch",
    "Backbone": "backbones",
    "TextEmbedding": "backbones",
    "load_base": "backbones",
    "UnionBranch": "controls",
    "Adapter": "controls",
    "HintSpec": "images",
    "read_picture": "images",
    "annotate": "annotators",
    "annotator": "annotators",
    "Description": "formats",
    "SavedControl": "formats",
    "attach": "formats",
    "convert": "formats",
    "describe": "formats",
    "load_control": "formats",
    "save_control": "formats",
    "ControlRequest": "sample",
    "Picture": "sample",
    "Prepared": "sample",
    "Request": "sample",
    "Step": "sample",
    "generate": "sample",
    "maker": "sample",
    "pictures": "sample",
    "prepare": "sample",
    "Pair": "data",
    "EvaluationPlan": "measure",
    "ceiling_of": "measure",
    "evaluate": "measure",
    "evaluate_base": "measure",
    "obedience": "measure",
    "Recipe": "train.recipe",
    "Record": "train",
    "read_recipe": "train.recipe",
    "train_control": "train",
    "UserError": "errors",
    "shipped_path": "hub",
}

__version__ = "0.1.0"
__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
