"""Where the networks of a base are while pictures are made: on its device, or in the machine's memory until used."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Mode = Literal["fast", "balanced", "low"]
MODES: tuple[Mode, ...] = get_args(Mode)
"""Ways to place networks, each with less memory and more moving than the one before."""
Part = Literal["text", "denoiser", "vae"]
"""Parts of a base that are used one after the other: what reads prompts, what predicts (with the controls), the VAE."""
HOME = torch.device("cpu")
"""Where networks wait."""
_TILE = 512
"""Side in pixels of the tiles that the VAE works in where memory is low."""
_LAYERS = (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm, nn.Embedding)
"""Layers that are moved one by one: exactly these, as their subclasses' weights may be used without calling them."""


def parts_of_networks(networks: Mapping[str, nn.Module]) -> dict[Part, list[nn.Module]]:
    """A base's networks, by their names in a diffusers folder, as its three parts."""
    found: dict[Part, list[nn.Module]] = {"text": [], "denoiser": [], "vae": []}
    for name, network in networks.items():
        found["vae" if name == "vae" else "text" if name.startswith("text_encoder") else "denoiser"].append(network)
    return found


class Placement:
    """The networks of a base, and those of the controls that it is used with, placed as a mode says.

    - ``fast``: all of them stay on the device.
    - ``balanced``: one part at a time is there, the others wait in the machine's memory. The VAE works on one picture
      after the other, and in tiles on pictures larger than those it was trained on.
    - ``low``: of the denoiser and the controls one layer at a time is there (diffusers' group offloading), and the VAE
      works in tiles of 512 pixels.

    A mode can only be left for one with less memory. On a CPU nothing is moved; the VAE works as the mode says.
    """

    def __init__(self, networks: Mapping[str, nn.Module], device: torch.device) -> None:
        """Take the networks as they are; ``device``: where they compute. They are placed by ``take``."""
        self.device = device
        self.mode: Mode | None = None
        """None before the first ``take``: parts come to the device as they are used."""
        self.at_once: int | None = None
        """How many pictures fit into memory at once; None is any number."""
        self._parts = parts_of_networks(networks)
        self._base = list(self._parts["denoiser"])
        self._here: Part | None = None

    @property
    def moves(self) -> bool:
        """Whether networks are moved at all."""
        return self.device != HOME and self.mode != "fast"

    def take(self, mode: Mode) -> None:
        """Place the networks as a mode says; one with more memory than the present mode changes nothing."""
        if self.mode and MODES.index(mode) <= MODES.index(self.mode):
            return
        self.mode, self._here = mode, None
        for part in self._parts.values():
            for network in part:
                send(network, HOME if self.moves else self.device)
        for vae in self._parts["vae"]:
            work_in_parts(vae, mode)
        if self.moves and mode == "low":
            for network in self._parts["denoiser"]:
                send_layer_by_layer(network, self.device)

    def take_lower(self) -> Mode | None:
        """Place the networks with less memory than now; the new mode, or None where there is none with less."""
        below = MODES[MODES.index(self.mode or "balanced") + 1 :]
        if below:
            self.take(below[0])
        return below[0] if below else None

    def adopt(self, controls: Sequence[nn.Module]) -> None:
        """Place these controls with the denoiser, in the place of those adopted before."""
        known = self._parts["denoiser"]
        self._parts["denoiser"] = [*self._base, *controls]
        for control in controls:
            if any(control is one for one in known):
                continue
            if self.moves and self.mode == "low":
                send(control, HOME)
                send_layer_by_layer(control, self.device)
            else:
                send(control, HOME if self.moves and self._here != "denoiser" else self.device)

    def bring(self, part: Part) -> None:
        """Have a part on the device, and the others away, where they are moved."""
        if not self.moves or part == self._here:
            return
        if self._here and not self._by_layer(self._here):
            for network in self._parts[self._here]:
                send(network, HOME)
        if not self._by_layer(part):
            for network in self._parts[part]:
                send(network, self.device)
        self._here = part

    def _by_layer(self, part: Part) -> bool:
        return part == "denoiser" and self.mode == "low"


def send(network: nn.Module, device: torch.device) -> None:
    """Move a network's weights."""
    nn.Module.to(network, device)  # diffusers' own looks for hooks and warns


def _send_value(value: Tensor, device: torch.device) -> None:
    value.data = value.data.to(device)


def movable_layers(network: nn.Module) -> list[nn.Module]:
    """The layers of a network that can be moved by themselves: nearly all of its weights."""
    return [layer for layer in network.modules() if type(layer) in _LAYERS]


def send_layer_by_layer(network: nn.Module, device: torch.device) -> None:
    """Have each layer of a network come to the device when it is called, and leave afterwards.

    Weights that belong to no layer, and those of layers of other classes, stay there: they are few.
    """
    from diffusers.hooks import apply_group_offloading

    layers = movable_layers(network)
    for layer in layers:  # each by itself: bases call their layers directly, and not a whole network or block
        apply_group_offloading(layer, onload_device=device, offload_device=HOME, offload_type="leaf_level")
    moved = {id(value) for layer in layers for value in (*layer.parameters(), *layer.buffers())}
    for value in (*network.parameters(), *network.buffers()):
        if id(value) not in moved:
            _send_value(value, device)


def tile_of(vae: Any, mode: Mode) -> int:
    """The side in pixels of the tiles that a VAE works in under a mode; smaller pictures are worked on whole."""
    own = getattr(vae, "tile_sample_min_size", sys.maxsize)
    return min(own, _TILE) if mode == "low" else own if mode == "balanced" else sys.maxsize


def work_in_parts(vae: Any, mode: Mode) -> None:
    """Have a VAE work with no more memory than a mode has; without effect on one that knows no tiles."""
    if mode == "fast" or not hasattr(vae, "use_tiling"):
        return
    vae.enable_slicing()
    vae.enable_tiling()
    side = tile_of(vae, mode)
    vae.tile_latent_min_size = vae.tile_latent_min_size * side // vae.tile_sample_min_size
    vae.tile_sample_min_size = side
