"""The memory that making pictures takes: an estimate by part before, a measurement after.

Weights are counted. What is held beside them is counted, too, on a copy of the networks that has shapes and no values:
it goes through each part's work once, and nothing is computed.
"""

import copy
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from controlkit.backbones.placement import HOME, MODES, Mode, Part, movable_layers, parts_of_networks, tile_of
from controlkit.backbones.protocol import ActiveControl, Backbone
from controlkit.branch import ControlNetwork

Hints = Mapping[str, int]
"""Channels of a control's hints by type, or under ""."""


@dataclass(frozen=True)
class Work:
    """The work that an estimate is of: one batch of pictures, all alike."""

    size: tuple[int, int]
    """(height, width) in pixels."""
    controls: Sequence[tuple[ControlNetwork, Hints]] = ()
    rows: int = 2
    """Predictions a picture in one step: 2 with guidance, 1 without."""
    pictures: int = 1


@dataclass(frozen=True)
class Estimate:
    """Bytes that a device holds while pictures are made. ``free``: bytes that it has for them, weights included."""

    mode: Mode
    weights: Mapping[str, int]
    """Of each network or control, by name, wherever it waits."""
    held: Mapping[Part, int]
    """The most beside the weights, while that part works."""
    resident: Mapping[Part, int]
    """Weights on the device while that part works."""
    free: int
    pictures: int = 1

    @property
    def peak(self) -> int:
        """The most bytes at once."""
        return max(self.held[part] + self.resident[part] for part in self.held)

    @property
    def fits(self) -> bool:
        """Whether the device has that much, and a tenth more for what libraries take."""
        return 1.1 * self.peak <= self.free

    def lines(self) -> list[str]:
        """Describe it for the user: weights by network, the most beside them, and the sum."""
        most = max(self.held, key=lambda part: self.held[part] + self.resident[part])
        rows = {**self.weights, f"beside weights, {_WORK[most]}": self.held[most]}
        width = max(map(len, rows))
        together = sum(self.weights.values()) == self.resident[most]
        there = "" if together else f"; of the weights {_gib(self.resident[most])} at a time"
        count = f"{self.pictures} pictures at once, " if self.pictures > 1 else ""
        few = "" if self.fits else " That may not fit."
        return [
            f"memory {self.mode}: {count}at most {_gib(self.peak)} of {_gib(self.free)}{there}.{few}",
            *(f"  {name:<{width}}  {_gib(size):>9}" for name, size in rows.items()),
        ]


_WORK: dict[Part, str] = {"text": "prompts are read", "denoiser": "in a step", "vae": "pictures are decoded"}


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def bytes_of(modules: Iterable[nn.Module]) -> int:
    """The bytes of networks' weights."""
    return sum(value.numel() * value.element_size() for m in modules for value in m.state_dict().values())


class Meter:
    """The most memory held on a device since the meter was made, or reset.

    On a GPU: bytes that torch allocated. On a CPU: the growth of the process, and the base's weights, which were there
    before.
    """

    def __init__(self, base: Backbone) -> None:
        self._device = base.device
        self._held = bytes_of(base.networks().values())
        self.reset()
        if self._device.type != "cuda":
            self._held -= psutil.Process().memory_info().rss

    def reset(self) -> None:
        """Measure from now on."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:  # on Linux only; elsewhere the memory that loading needed may count too
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """The most bytes held."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return self._held + high_water()

    def free(self) -> int:
        """Bytes that are free now."""
        return _unused(self._device)


def high_water() -> int:
    """The largest resident size of this process in bytes, since it began or the mark was reset.

    On Linux not ``getrusage``'s, which begins with that of the process that started this one.
    """
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        for line in lines:
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _unused(device: torch.device) -> int:
    """Bytes of a device's memory that are free now."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def is_roomy(base: Backbone, work: Work) -> bool:
    """Whether memory is so ample that no estimate is needed: weights, and 8 KiB a pixel, are a quarter of it.

    That is more than any base here takes, in float32. An estimate takes seconds, as long as a small picture.
    """
    controls = [network for network, _ in work.controls]
    pixels = work.size[0] * work.size[1] * work.rows * work.pictures
    needed = bytes_of([*base.networks().values(), *controls]) + 8192 * pixels
    return 4 * needed < free_bytes(base, controls)


def free_bytes(base: Backbone, controls: Sequence[nn.Module] = ()) -> int:
    """The bytes that the base's device has for pictures: those that are free, and those of weights that it holds."""
    networks = [*base.networks().values(), *controls]
    if base.device.type == "cuda":
        there = [value for m in networks for value in m.state_dict().values() if value.is_cuda]
        return _unused(base.device) + sum(value.numel() * value.element_size() for value in there)
    return _unused(base.device) + bytes_of(networks)


def estimate(base: Backbone, work: Work, mode: Mode) -> Estimate:
    """Estimate the memory that a batch takes under a mode."""
    return _Trial(base, work).estimate(mode)


def fastest(base: Backbone, work: Work, modes: Sequence[Mode] = MODES) -> Estimate:
    """The estimate of the first of these modes that fits; of the last where none does."""
    trial = _Trial(base, work)
    found = (trial.estimate(mode) for mode in modes)
    return next(one for one in found if one.fits or one.mode == modes[-1])


def fitting(base: Backbone, work: Work, mode: Mode, most: int) -> Estimate:
    """The estimate of as many pictures at once, up to ``most``, as fit under a mode; of one where not even that does.

    Known from one picture and two, as what is held grows linearly.
    """
    one = estimate(base, work, mode)
    if most <= 1 or not one.fits:
        return one
    two = estimate(base, replace(work, pictures=2), mode)
    for count in range(most, 1, -1):
        held = {part: one.held[part] + (count - 1) * max(two.held[part] - one.held[part], 0) for part in one.held}
        found = Estimate(mode, one.weights, held, one.resident, one.free, count)
        if found.fits:
            return found
    return one


class _Trial:
    """A base and controls without values, on which the parts' work is tried; each result is kept."""

    def __init__(self, base: Backbone, work: Work) -> None:
        self._base, self._work = base, work
        self._held: dict[object, int] = {}

    def estimate(self, mode: Mode) -> Estimate:
        """Estimate the memory under a mode."""
        base, controls = self._base, [network for network, _ in self._work.controls]
        parts = parts_of_networks(base.networks())
        parts["denoiser"] = [*parts["denoiser"], *controls]
        names = [f"control {i}" if len(controls) > 1 else "control" for i, _ in enumerate(controls, 1)]
        weights = {name: bytes_of([network]) for name, network in base.networks().items()}
        weights |= {name: bytes_of([one]) for name, one in zip(names, controls, strict=True)}
        resident = {part: bytes_of(networks) for part, networks in parts.items()}
        if base.device == HOME or mode == "fast":
            resident = dict.fromkeys(resident, sum(resident.values()))
        elif mode == "low":
            resident["denoiser"] = _with_one_layer(parts["denoiser"])
        held = {part: self._most(part, mode) for part in resident}
        return Estimate(mode, weights, held, resident, free_bytes(base, controls), self._work.pictures)

    def _most(self, part: Part, mode: Mode) -> int:
        """The most bytes beside the weights while a part works; tiles are estimated from one of them."""
        work, beside = self._work, 0
        if part == "vae" and mode != "fast":
            height, width = work.size
            tile = min(tile_of(vae, mode) for vae in parts_of_networks(self._base.networks())["vae"])
            work = replace(work, size=(min(height, tile), min(width, tile)), pictures=1)
            if work != self._work:  # all pictures, once whole and once in tiles that overlap by a quarter
                beside = 3 * self._work.pictures * 3 * height * width * self._base.dtype.itemsize
        key = (part, work.size, work.pictures)
        if key not in self._held:
            base, controls = shapes_only(self._base, [network for network, _ in work.controls])
            tried = {"text": _read_prompts, "denoiser": _predict, "vae": _decode}[part]
            with torch.no_grad(), self._base.autocast(), _WithoutScores(), Held(reorders=True) as held:
                tried(base, controls, work)
            self._held[key] = max(held.after)
        return self._held[key] + beside


def shapes_only(base: Backbone, controls: Sequence[nn.Module] = ()) -> tuple[Backbone, list[nn.Module]]:
    """A copy of a base and of controls whose weights have shapes and no values (torch's ``meta`` device)."""
    return _copied(base, controls, lambda value: torch.empty_like(value, device="meta"))


def narrowed(base: Backbone, dtype: torch.dtype) -> Backbone:
    """The same locked base with its denoiser's matrices and convolutions in half precision, all else shared.

    Under autocast to that format its results are the same to the bit, as autocast casts just these for each operation.
    ``Backbone.digest`` stays that of the whole weights.
    """
    _ = base.digest  # kept from now on, and copied
    layers = [layer for layer in base.denoiser.modules() if type(layer) in (nn.Conv2d, nn.Linear)]
    matrices = {id(value) for layer in layers for value in layer.parameters()}
    return _copied(base, (), lambda value: value.detach().to(dtype) if id(value) in matrices else value)[0]


def _copied(
    base: Backbone, controls: Sequence[nn.Module], other: Callable[[Tensor], Tensor]
) -> tuple[Backbone, list[nn.Module]]:
    """A copy of a base and of controls, not placed, that has ``other(value)`` in the place of each locked weight."""
    memo: dict[int, Any] = {id(base.placement): None} if base.placement else {}
    for module in [*base.networks().values(), *controls]:
        memo |= {id(value): other(value) for value in module.buffers()}
        memo |= {id(value): nn.Parameter(other(value), requires_grad=False) for value in module.parameters()}
    return copy.deepcopy((base, list(controls)), memo)


def _read_prompts(base: Backbone, controls: Sequence[Any], work: Work) -> None:
    base.encode_text([""] * (work.rows * work.pictures), work.size)


def _predict(base: Backbone, controls: Sequence[Any], work: Work) -> None:
    """One step: hints read, residuals, prediction; with the latents and the guided prediction beside it."""
    count, (height, width) = work.rows * work.pictures, work.size
    zeros = partial(torch.zeros, device="meta", dtype=base.dtype)
    text = base.encode_text([""] * count, work.size)
    active = []
    for network, (_, hints) in zip(controls, work.controls, strict=True):
        shown = {
            kind: base.hint_input(zeros(work.pictures, channels, height, width)) for kind, channels in hints.items()
        }
        features = network.encode_hint(shown if network.hint_types else shown[""])
        rows = tree_map(lambda one: one.repeat(work.rows, *[1] * (one.dim() - 1)), features)
        active.append(ActiveControl(network, rows))
    latents = torch.zeros(work.pictures, *base.latent_shape(work.size), device="meta")
    read = latents.repeat(work.rows, 1, 1, 1).to(base.dtype)
    times = torch.zeros(count, device="meta", dtype=torch.long)
    base.predict(read, times, text, active).float()


def _decode(base: Backbone, controls: Sequence[Any], work: Work) -> None:
    latents = torch.zeros(work.pictures, *base.latent_shape(work.size), device="meta")
    base.decode_latents(latents)


def _with_one_layer(networks: Sequence[nn.Module]) -> int:
    """Bytes of the largest layer that is moved by itself, and of all weights that are not."""
    layers = [bytes_of([layer]) for network in networks for layer in movable_layers(network)]
    return bytes_of(networks) - sum(layers) + max(layers, default=0)


class _WithoutScores(TorchFunctionMode):
    """Attention without its table of scores, which the kernels of all devices never hold as a whole."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, value = ((*args, *(kwargs or {}).values())[i] for i in (0, 2))
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


class Held(TorchDispatchMode):
    """Counts the bytes of storages made within it and not yet freed, after every operation, the backward pass's too.

    ``reorders``: convolutions count what their kernels hold meanwhile, input, weights and output in their own layout.
    """

    def __init__(self, reorders: bool = False) -> None:
        super().__init__()
        self.after: list[int] = []
        self._reorders = reorders
        self._now = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._see((args, kwargs), made_here=False)
        out = func(*args, **kwargs)
        self._see(out, made_here=True)
        within = 0
        if self._reorders and func is torch.ops.aten.convolution.default:
            within = sum(one.numel() * one.element_size() for one in (args[0], args[1], out))
        self.after.append(self._now + within)
        return out

    def _see(self, values: Any, made_here: bool) -> None:
        for value in tree_leaves(values):
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            if storage._cdata not in self._seen:
                size = storage.nbytes() if made_here else 0
                self._seen.add(storage._cdata)
                self._now += size
                weakref.finalize(storage, self._free, storage._cdata, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._now -= size
