"""A BLIP from a folder that transformers saved: its settings within ranges, its words and its weights, and no more.

No library is given the folder, so that none asks a hub for code, kernels or other files.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from controlkit.backbones.parts import open_part
from controlkit.backbones.rules import known_settings, read_config
from controlkit.errors import Invalid, Unsupported
from controlkit.files import inside, read_text

_LONGEST_WORDS = 2**24
"""Bytes of the lists of words; BERT's has 30,524."""
_MARKS = ("cls_token", "mask_token", "pad_token", "sep_token", "unk_token")


def read_blip(folder: Path, name: str) -> tuple[Any, Any]:
    """(a BLIP that captions, in float32, its processor); ``name`` is its name in errors.

    Raises ``Unsupported`` for another kind of model, ``Invalid`` for settings out of range or weights that lack some,
    and ``ValueError`` for texts that are none.
    """
    from transformers import BlipConfig, BlipForConditionalGeneration

    config = read_config(folder, "config.json")
    kinds = config.get("architectures") or [BlipForConditionalGeneration.__name__]
    if "auto_map" in config:
        raise ValueError("it has code of its own, which is not run")
    if config.get("model_type") != "blip" or BlipForConditionalGeneration.__name__ not in kinds:
        raise Unsupported(
            f'"{name}" is a {str(kinds[0])[:60]} ({str(config.get("model_type"))[:60]}), no captioner: expected a '
            "BLIP such as Salesforce/blip-image-captioning-base."
        )
    parts = {}
    for part in ("text", "vision"):
        given = config.get(f"{part}_config") or {}
        if not isinstance(given, dict):
            raise ValueError(f"its {part}_config holds no settings")
        parts[f"{part}_config"] = known_settings(name, f"captioner's {part}", given)
    settings = BlipConfig(**parts)
    with torch.device("meta"):
        empty = BlipForConditionalGeneration(settings)
    header = open_part(folder, ".")
    tied = set(getattr(empty, "_tied_weights_keys", None) or ())
    for key, tensor in empty.state_dict().items():
        if header.shapes.get(key, tuple(tensor.shape) if key in tied else None) != tuple(tensor.shape):
            raise Invalid(f"it lacks weights, such as {key} of {tuple(tensor.shape)}")
    model: Any = BlipForConditionalGeneration.from_pretrained(
        None, config=settings, state_dict=header.read(), dtype=torch.float32
    )
    return model, _read_processor(folder, name)


def _read_processor(folder: Path, name: str) -> Any:
    """The processor, by the library from a folder written anew of what is known here."""
    from transformers import BlipProcessor

    held = "processor_config.json" if (folder / "processor_config.json").is_file() else "preprocessor_config.json"
    pictures = read_config(folder, held)
    pictures = pictures.get("image_processor", pictures) if held.startswith("processor") else pictures
    if not isinstance(pictures, dict):
        raise ValueError("its processor has no settings for pictures")
    size = pictures.get("size", 384)
    sides = [size.get("height"), size.get("width")] if isinstance(size, dict) else [size, size]
    kept = known_settings(name, "captioner's pictures", pictures | {"size": sides})
    kept["size"] = {"height": kept["size"][0], "width": kept["size"][1]}
    words = read_config(folder, "tokenizer_config.json")
    whole = folder / "tokenizer.json"
    if whole.is_file():
        model = read_config(folder, "tokenizer.json", _LONGEST_WORDS).get("model")
        listed = model.get("vocab") if isinstance(model, dict) else None
        if not isinstance(listed, dict) or sorted(map(str, listed.values())) != sorted(map(str, range(len(listed)))):
            raise ValueError("its tokenizer.json holds no words, numbered from 0")
        vocabulary = sorted(listed, key=lambda word: int(listed[word]))
    else:
        vocabulary = read_text(inside(folder, folder / "vocab.txt"), _LONGEST_WORDS).splitlines()
    if len(vocabulary) > 2**18 or max(map(len, vocabulary), default=0) > 1000:
        raise ValueError("its words are too many or too long")
    marks = {key: word for key in _MARKS if isinstance(word := words.get(key), str) and len(word) <= 1000}
    own = {"do_lower_case": words.get("do_lower_case") is not False, "tokenizer_class": "BertTokenizer"}
    with tempfile.TemporaryDirectory() as root:
        texts = {"preprocessor_config.json": kept | {"image_processor_type": "BlipImageProcessor"}}
        texts["tokenizer_config.json"] = marks | own
        for file, content in texts.items():
            Path(root, file).write_text(json.dumps(content))
        Path(root, "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
        return BlipProcessor.from_pretrained(root, local_files_only=True)
