"""The texts that come with weights: metadata entries and configurations, read as a stranger's.

They are short, flat JSON objects or they are refused.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from controlkit.backbones.rules import known_settings
from controlkit.errors import Invalid, NotFound, one_line
from controlkit.files import inside, is_leftover, parse_json, read_bytes
from controlkit.tensors import PICKLES, TensorFile

WEIGHTS = "diffusion_pytorch_model.safetensors"
_NAMES = tuple(
    re.compile(rf"diffusion_pytorch_model{rest}")
    for rest in (
        r"\.safetensors",
        r"\.safetensors\.index\.json",
        r"\.\w+\.safetensors",
        r"\.safetensors\.index\.\w+\.json",
        r"\.bin",
        r"\.bin\.index\.json",
        r"\.\w+\.bin",
    )
)
"""The names that diffusers gives to weights in a folder, the best first: whole, in shards, of a variant, as pickles."""
_SHARD = re.compile(r"-\d+-of-\d+\.")
LONGEST_TEXT = 2**20
"""Letters of a metadata entry or a configuration that is read; a recipe has some 2**12."""
_DEEPEST = 32  # levels of nesting; more cannot be relied on to be written again
_CLASSES = ("ControlNetModel", "ControlNetUnionModel", "ControlNetXSAdapter", "T2IAdapter")


def weights_in(folder: Path) -> Path | None:
    """The file of weights in a diffusers folder: by diffusers' names, else the only one; None where there is none.

    Raises ``Invalid`` where several files of other names are there.
    """
    names = sorted(path.name for path in folder.glob("*") if path.is_file() and not is_leftover(path.name))
    for test in _NAMES:
        if found := [name for name in names if test.fullmatch(name)]:
            return folder / found[0]
    others = [name for name in names if name.endswith((".safetensors", *PICKLES)) and not _SHARD.search(name)]
    if "config.json" not in names:  # no control's folder: a person's files, or a run's
        return folder / others[0] if len(names) == len(others) == 1 else None
    if len(others) > 1:
        raise Invalid(f"{folder} holds {len(others)} files of weights: name one of {', '.join(others[:9])}.")
    return folder / others[0] if others else None


def weights_file(path: Path) -> Path:
    """The file of weights that a path means: itself, or the one in a diffusers folder or a training run.

    Raises ``NotFound`` for a folder that holds none, ``Invalid`` for one whose weights are a link out of it.
    """
    if not path.is_dir():
        return path
    if found := weights_in(path) or weights_in(path / "control"):
        return inside(found.parent, found)
    raise NotFound(f"{path} holds no weights: expected a diffusers folder with {WEIGHTS}, or a file.")


def json_object(text: str | bytes, name: str = "the text") -> dict[str, Any]:
    """The object that a JSON text holds; ``Invalid`` if it holds none, is too long or nested too deep."""
    if len(text) > LONGEST_TEXT:
        raise Invalid(f"{name} has more than {LONGEST_TEXT:,} letters")
    found = parse_json(text, name)
    if not isinstance(found, dict):
        raise Invalid(f"{name} holds a {type(found).__name__}; expected keys and values")
    if not _shallow(found):
        raise Invalid(f"{name} is nested without end")
    return found


def _shallow(value: Any, levels: int = _DEEPEST) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_shallow(part, levels - 1) for part in inner)


def metadata_entry(
    metadata: Mapping[str, str], path: str | Path, key: str, parse: Callable[[str], Any], default: Any
) -> Any:
    """A metadata entry through ``parse``, which raises ``ValueError`` for a bad one; ``default`` if it is absent.

    Raises ``Invalid`` for a bad entry; ``path`` names the file in the message.
    """
    try:
        return parse(metadata[key]) if key in metadata else default
    except ValueError as error:
        raise Invalid(f'{path} has a "{one_line(key)}" that cannot be read ({one_line(error)}).') from error


def stored_config(header: TensorFile) -> dict[str, Any]:
    """The configuration kept with weights: in their metadata, or in the ``config.json`` beside them.

    Raises ``Invalid`` if it cannot be read, a number of it is out of range, or another entry of
    ours in the metadata is no object.
    """
    for key in header.metadata:
        if key.startswith("controlkit."):
            metadata_entry(header.metadata, header.path, key, json_object, {})
    config = json_object(header.metadata.get("controlkit.config", "{}"))
    try:
        config |= _config_beside(header.path)
        known_settings(header.path.name, "control", config)
    except (ValueError, OSError) as error:
        raise Invalid(f"The configuration of {header.path} cannot be read ({one_line(error)}).") from error
    return config


def _config_beside(path: Path) -> dict[str, Any]:
    """The configuration beside a file of weights, if it is one's of its folder and not a stranger's."""
    suffix = path.stem.removeprefix("diffusion_pytorch_model") if path.stem.startswith("diffusion_") else ""
    for beside in (path.with_name(f"config{suffix}.json"), path.with_name("config.json")):
        if beside.is_file():
            config = json_object(read_bytes(inside(path.parent, beside), LONGEST_TEXT), beside.name)
            if path.name.startswith("diffusion_pytorch_model") or config.get("_class_name") in _CLASSES:
                return config
    return {}
