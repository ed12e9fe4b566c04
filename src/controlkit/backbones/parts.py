"""The parts of a base in a diffusers folder: networks and tokenizers, made here of what was read and checked.

No library is given a path or a whole configuration, so none asks a hub for code, kernels or other files.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from controlkit.backbones.rules import read_config
from controlkit.errors import Invalid, NotFound
from controlkit.files import inside, read_text
from controlkit.tensors import TensorFile, open_tensors

_NAMES = tuple(
    re.compile(rf"(diffusion_pytorch_)?model{rest}")
    for rest in (
        r"\.safetensors",
        r"\.safetensors\.index\.json",
        r"\.\w+\.safetensors",
        r"\.safetensors\.index\.\w+\.json",
    )
)
"""Names of a part's weights, the best first: whole, in shards, of a variant, a variant's shards."""
_SPELLINGS = ((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0."))
"""Of attention in VAEs, in files of before 2023 and now."""
_LONGEST_WORDS, _MOST_WORDS, _LONGEST_WORD = 2**25, 2**18, 1000
"""Bytes of a list of words, words, and letters of one; CLIP has 49,408 words."""


def open_part(folder: Path, part: str) -> TensorFile:
    """The header of the weights of a part, in whichever variant is there; ``NotFound`` where there are none.

    Raises ``Invalid`` where they, or a shard of them, are a link out of the folder.
    """
    names = sorted(path.name for path in (folder / part).glob("*.*") if path.is_file())
    found = next((name for test in _NAMES for name in names if test.fullmatch(name)), None)
    if found is None:
        raise NotFound(f"{folder / part} holds no weights: expected a file of safetensors, as diffusers names it.")
    for name in names if found.endswith(".json") else [found]:  # an index names shards, of whatever names
        inside(folder, folder / part / name)
    return open_tensors(folder / part / found)


def make_network(kind: type[nn.Module], settings: Mapping[str, Any], header: TensorFile, dtype: torch.dtype) -> Any:
    """A network of a class of diffusers or transformers, of settings of ``rules.known_settings``, in ``dtype``.

    Its shapes are compared with the file's before anything is allocated. Raises ``ValueError`` where they differ or a
    tensor is absent, and whatever the class raises for settings that do not go together.
    """
    with torch.device("meta"):
        if kind.__module__.startswith("transformers."):
            from transformers import CLIPTextConfig

            module: Any = kind(CLIPTextConfig(**settings, attn_implementation="sdpa"))  # not one from a hub
        else:
            module = kind(**settings)
    expected = module.state_dict()
    stored = {_plain_name(name): name for name in header.shapes}
    places = {name: stored.get(_plain_name(name), "") for name in expected}
    for name, tensor in expected.items():
        shape = header.shapes.get(places[name])
        if shape != tuple(tensor.shape):
            came = f"has {name} of {shape}" if shape else f"lacks {name}"
            raise ValueError(f"{header.path.name} {came}; its configuration means {tuple(tensor.shape)}")
    tensors = header.read(places.values(), finite=False)  # a base's gigabytes stay on the disk until they are used
    module.load_state_dict({name: tensors[place].to(dtype) for name, place in places.items()}, assign=True)
    for part in module.modules():
        if isinstance(getattr(part, "position_ids", None), torch.Tensor):  # which no file has
            part.position_ids = torch.arange(part.position_ids.shape[-1])[None]
    return module.eval()


def _plain_name(name: str) -> str:
    """A tensor's name without what versions of the libraries differ in."""
    name = name.removeprefix("text_model.")
    for old, new in _SPELLINGS if ".attentions." in name else ():
        name = name.replace(old, new)
    return name


# --- tokenizers ---------------------------------------------------------------------------------------------------

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_KEPT = {
    "padding_side": ("right", "left"),
    "split_special_tokens": (False, True),
    "truncation_side": ("right", "left"),
}
"""Settings of a tokenizer beside its words and its longest prompt, and their values."""


def read_tokenizer(folder: Path, part: str) -> Any:
    """CLIP's tokenizer with the words, merges and settings of a part of a folder, as transformers saves it.

    Raises ``Invalid`` for texts that are no tokenizer's, and whatever the class raises for words that do not go
    together.
    """
    from transformers import CLIPTokenizer

    def texts(name: str, most: int = _LONGEST_WORDS) -> dict[str, Any]:
        return read_config(folder, f"{part}/{name}", most) if (folder / part / name).is_file() else {}

    config, whole = texts("tokenizer_config.json"), texts("tokenizer.json")
    origin = f"{folder / part}"
    if whole:
        model: dict[str, Any] = whole["model"] if isinstance(whole.get("model"), dict) else {}
        vocabulary, pairs = model.get("vocab"), model.get("merges")
    else:
        vocabulary, lines = texts("vocab.json"), read_text(inside(folder, folder / part / "merges.txt"), _LONGEST_WORDS)
        pairs = [line for line in lines.split("\n") if line and not line.startswith("#version")]
    merges = _checked_merges(origin, vocabulary, pairs)
    added, named = _added_words(origin, config, whole, texts)
    settings = {key: config[key] for key, known in _KEPT.items() if config.get(key, object()) in known}
    window = config.get("model_max_length")
    if type(window) is not int or not 2 < window <= 4096:
        raise Invalid(f"{origin} has a model_max_length of {window!s:.40}; expected a whole number, CLIP's 77.")
    return CLIPTokenizer(vocabulary, merges, model_max_length=window, added_tokens_decoder=added, **named, **settings)


def _checked_merges(origin: str, vocabulary: Any, pairs: Any) -> list[tuple[str, str]]:
    """The pairs of words that merge; ``Invalid`` for what are none, or for a vocabulary that is no words' numbers."""
    fits = isinstance(vocabulary, dict) and isinstance(pairs, list)
    if not fits or not 0 < len(vocabulary) <= _MOST_WORDS or len(pairs) > _MOST_WORDS:
        raise Invalid(f"{origin} holds no list of at most {_MOST_WORDS:,} words and of pairs of them that merge.")
    if not all(len(word) <= _LONGEST_WORD and _is_number(number) for word, number in vocabulary.items()):
        raise Invalid(f"{origin} has a word that is longer than {_LONGEST_WORD} letters, or without a number.")
    merges: Any = [tuple(pair.split(" ") if isinstance(pair, str) else pair or ()) for pair in pairs]
    if not all(len(pair) == 2 and all(isinstance(word, str) for word in pair) for pair in merges):
        raise Invalid(f"{origin} has merges that are no pairs of words.")
    return merges


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value < 4 * _MOST_WORDS


def _added_words(
    origin: str, config: Mapping[str, Any], whole: Mapping[str, Any], texts: Any
) -> tuple[dict[int, Any], dict[str, Any]]:
    """(words beside the vocabulary by number, those that mark beginning, end, the unknown and padding).

    Found where transformers finds them: in the configuration, or else in the files beside it.
    """
    from transformers import AddedToken

    def word(value: Any, **more: Any) -> Any:
        if isinstance(value, str) and 0 < len(value) <= _LONGEST_WORD:
            return AddedToken(value, **more) if more else value
        content = value.get("content") if isinstance(value, dict) else None
        if not (isinstance(content, str) and 0 < len(content) <= _LONGEST_WORD):
            raise Invalid(f"{origin} has {value!s:.60} in the place of a word.")
        return AddedToken(content, **{key: bool(value[key]) for key in _FLAGS if key in value} | more)

    named = {key: config[key] for key in _NAMED if config.get(key) is not None}
    beside = config.get("added_tokens_decoder")
    if beside is None:
        special = texts("special_tokens_map.json")
        named |= {key: special[key] for key in _NAMED if special.get(key) is not None}
        marks = {one if isinstance(one, str) else str(one)[:99] for one in named.values()}
        listed = [
            (number, word(text, normalized=text not in marks, special=text in marks))
            for text, number in texts("added_tokens.json").items()
        ]
        entries = whole.get("added_tokens") or []
        listed += [(one.get("id"), word(one)) for one in entries if isinstance(one, dict)]
    else:
        special = {}
        pairs = beside.items() if isinstance(beside, dict) else [("none", None)]
        listed = [(int(number) if number.isdecimal() and len(number) < 9 else None, word(one)) for number, one in pairs]
    if len(listed) > 10_000 or not all(_is_number(number) for number, _ in listed):
        raise Invalid(f"{origin} has added words without a number, or more than 10,000.")
    added = dict(listed)
    known = {str(one): one for one in added.values()}
    made = {
        key: word(one, **({"special": True} if isinstance(one, dict) and special else {})) for key, one in named.items()
    }
    return added, {key: known.get(str(one), one) for key, one in made.items()}
