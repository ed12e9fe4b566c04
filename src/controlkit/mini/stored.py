"""Small networks of the world, stored as a folder without anything to unpickle."""

import json
from pathlib import Path
from typing import Self

import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Stored(nn.Module):
    """A module made from a ``config`` (JSON)."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.config = config

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and half-precision ``model.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a module that was saved in ``folder``, float32, frozen."""
        module = cls(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        state = load_file(folder / "model.safetensors")
        module.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
        return module.eval().requires_grad_(False)


def resized(pixels: Tensor, side: int) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1], brought to (B, 3, side, side)."""
    if pixels.shape[-2:] == (side, side):
        return pixels
    return F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
