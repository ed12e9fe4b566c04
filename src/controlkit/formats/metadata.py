"""The texts that come with weights: metadata entries and configurations, read as a stranger's.

They are short, flat JSON objects or they are refused.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from controlkit.errors import Invalid, NotFound, one_line
from controlkit.tensors import TensorFile

WEIGHTS = "diffusion_pytorch_model.safetensors"
WEIGHTS_FILES = (WEIGHTS, "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin")
LONGEST_TEXT = 2**20
"""Letters of a metadata entry or a configuration that is read; a recipe has some 2**12."""
_DEEPEST = 32  # levels of nesting; more cannot be relied on to be written again
_COUNTS = (
    "attention_head_dim",
    "num_attention_heads",
    "norm_num_groups",
    "max_norm_num_groups",
    "num_trans_head",
    "addition_time_embed_dim",
    "downscale_factor",
)
"""Settings that are whole numbers from 1 on, or lists of them; None where they are not set."""


def weights_file(path: Path) -> Path:
    """The file of weights that a path means: itself, or the one in a diffusers folder or a training run.

    Raises ``NotFound`` for a folder that holds none.
    """
    if path.is_dir():
        for folder in (path, path / "control"):
            for name in WEIGHTS_FILES:
                if (folder / name).is_file():
                    return folder / name
        raise NotFound(f"{path} holds no weights: expected a diffusers folder with {WEIGHTS}, or a file.")
    return path


def text_beside(path: Path, longest: int = LONGEST_TEXT) -> str:
    """The text of a small file that lies beside weights; ``ValueError`` if it has more than ``longest`` bytes."""
    if path.stat().st_size > longest:
        raise ValueError(f"{path.name} has more than {longest:,} bytes")
    return path.read_text(encoding="utf-8", errors="replace")


def json_object(text: str) -> dict[str, Any]:
    """The object that a JSON text holds; ``ValueError`` if it holds none, is too long or nested too deep."""
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"more than {LONGEST_TEXT:,} letters")
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("nested without end") from None
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__}; expected keys and values")
    if not _shallow(found):
        raise ValueError("nested without end")
    return found


def _shallow(value: Any, levels: int = _DEEPEST) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_shallow(part, levels - 1) for part in inner)


def metadata_object(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """The object in a metadata entry, for describing a file: empty where the entry is absent or holds none."""
    try:
        return json_object(metadata.get(key, "{}"))
    except ValueError:
        return {}


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
    """The configuration kept with weights: in their metadata, or in the ``config.json`` of a diffusers folder.

    Raises ``Invalid`` if it cannot be read, or a setting that must be a positive whole number is none.
    """
    texts = [header.metadata.get("controlkit.config", "{}")]
    beside = header.path.with_name("config.json")
    config: dict[str, Any] = {}
    try:
        if header.path.name in WEIGHTS_FILES and beside.is_file():
            texts.append(text_beside(beside))
        for text in texts:
            config |= json_object(text)
        for key in _COUNTS:
            value = config.get(key)
            for count in value if isinstance(value, list) else [value]:
                if count is not None and not (type(count) is int and 0 < count <= 2**14):
                    raise ValueError(f"{key} is {count}")
    except (ValueError, OSError) as error:
        raise Invalid(f"The configuration of {header.path} cannot be read ({one_line(error)}).") from error
    return config
