"""Captions for pictures that have none, by BLIP (Li et al., ICML 2022) through transformers.

By beam search, so that a picture has the same caption each time. What people wrote stays, unless asked otherwise.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from controlkit.data.blip import read_blip
from controlkit.data.layouts.folders import caption_file
from controlkit.data.layouts.rows import Listing, Row, json_lines
from controlkit.errors import Invalid, NotFound, Unsupported, UserError, one_line
from controlkit.files import write_atomic
from controlkit.images import decode_picture

_HUB_FILES = ("*config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "vocab.txt")
CAPTIONER = "Salesforce/blip-image-captioning-base"
Over = Literal["nothing", "names", "all"]
"""Captions that a captioner may replace: none, those that are only files' names, or all."""
_BATCH = 8
"""Pictures captioned together; always the same ones, so that a resumed run gives the captions of an unbroken one."""


@dataclass(frozen=True)
class Captioner:
    """A BLIP with its processor, and the name it was asked for by."""

    name: str
    model: Any
    processor: Any

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[np.ndarray]) -> list[str]:
        """A caption of each picture, uint8 (H, W, 3)."""
        pixels = self.processor(images=list(pictures), return_tensors="pt")["pixel_values"].to(self.model.device)
        tokens = self.model.generate(pixel_values=pixels, num_beams=3, do_sample=False, max_new_tokens=40)
        captions = self.processor.batch_decode(tokens[:, 1:], skip_special_tokens=True)  # the first opens each
        return [" ".join(words.split()) for words in captions]


@dataclass(frozen=True)
class Captioning:
    """Captions to be made while a set is built."""

    captioner: Captioner
    over: Over = "nothing"
    """Captions to be replaced, besides empty ones."""
    on_captions: Callable[[int], None] = lambda count: None
    """Called with the number of captions made since the last call."""


def load_captioner(name: str = CAPTIONER, device: str = "cpu") -> Captioner:
    """A BLIP from a folder that transformers saved, or by a hub's name: from the local cache if it is there.

    Weights are read from safetensors alone, and no code that comes with them is run. ``NotFound``, ``Invalid`` or
    ``Unsupported`` where there is none, or one that cannot be used.
    """
    reason: Exception
    try:
        return _load(name, device, local=True)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = error
    if not Path(name).is_dir():
        try:
            return _load(name, device, local=False)
        except UserError:
            raise
        except Exception as error:  # what a lost connection surfaces as depends on the client's HTTP library
            reason = error
        raise NotFound(
            f'The captioner "{name}" is no folder, is not in the local cache, and could not be fetched from the hub '
            f"({one_line(reason)}). Give the folder of a BLIP, or fetch it once while there is a network: "
            f"hf download {CAPTIONER}"
        ) from reason
    raise Invalid(
        f"{name} is no whole captioner ({one_line(reason)}): expected config.json, model.safetensors and the "
        "processor's files, as transformers saves a BLIP."
    ) from reason


def _load(name: str, device: str, local: bool) -> Captioner:
    from huggingface_hub import snapshot_download

    folder = Path(name)
    if not folder.is_dir():
        folder = Path(snapshot_download(name, local_files_only=local, allow_patterns=list(_HUB_FILES)))
        if local and not any(folder.glob("*.safetensors")):  # other programs fetch configurations alone
            raise ValueError("its weights are not in the local cache")
    try:
        model, processor = read_blip(folder, name)
    except (NotFound, Invalid) as error:
        raise ValueError(str(error)) from error
    return Captioner(name, model.to(device).eval(), processor)


def wanting(rows: Sequence[Row], over: Over = "nothing") -> list[int]:
    """The places of the rows that a captioner is to caption."""
    return [
        place for place, row in enumerate(rows) if not row.prompt or over == "all" or (over == "names" and row.named)
    ]


def write_captions(listing: Listing, captioner: Captioner, places: Sequence[int]) -> Iterator[int]:
    """Write a caption beside each picture at these places, as ``NAME.txt``; yields how many are written so far.

    ``Unsupported`` for a layout whose captions stand elsewhere.
    """
    _check_beside(listing)
    done = 0
    for chunk, captions in _captions(listing.rows, captioner, places):
        for place, caption in zip(chunk, captions, strict=True):
            write_atomic(Path(listing.rows[place].picture.name).with_suffix(".txt"), f"{caption}\n".encode())
        done += len(chunk)
        yield done


def _check_beside(listing: Listing) -> None:
    """``Unsupported`` unless the layout's captions lie beside its pictures."""
    if listing.layout not in ("pictures", "paired"):
        raise Unsupported(
            f"Captions of the layout {listing.layout} stand in its listing, not beside its pictures: "
            "`controlkit data build --captions blip` writes a set anew with captions where there are none."
        )


def unwritten(listing: Listing, over: Over) -> list[int]:
    """The places of the pictures that ``write_captions`` is to caption; an empty caption beside one was meant to be.

    ``Unsupported`` as there.
    """
    _check_beside(listing)
    pictures = [Path(row.picture.name) for row in listing.rows]
    return [place for place in wanting(listing.rows, over) if over == "all" or caption_file(pictures[place]) is None]


def captioned(listing: Listing, captioning: Captioning, journal: Path) -> Listing:
    """The listing with captions where they were missing; kept in ``journal``, from which the work resumes."""
    places = wanting(listing.rows, captioning.over)
    lines = _whole_lines(journal)
    whole = len(lines) if len(lines) == len(places) else len(lines) // _BATCH * _BATCH
    lines = lines[:whole]
    write_atomic(journal, json_lines(lines))  # without what was torn
    captioning.on_captions(whole)
    with journal.open("ab") as file:
        for chunk, captions in _captions(listing.rows, captioning.captioner, places[whole:]):
            new = [{"row": place, "text": text} for place, text in zip(chunk, captions, strict=True)]
            file.write(json_lines(new))
            file.flush()
            lines += new
            captioning.on_captions(len(chunk))
    rows = list(listing.rows)
    for line in lines:
        rows[line["row"]] = replace(rows[line["row"]], prompt=line["text"], named=False)
    return replace(listing, rows=rows)


def _captions(
    rows: Sequence[Row], captioner: Captioner, places: Sequence[int]
) -> Iterator[tuple[Sequence[int], list[str]]]:
    """The rows at these places, some at a time, with their captions."""
    for first in range(0, len(places), _BATCH):
        chunk = places[first : first + _BATCH]
        held = [rows[place].picture for place in chunk]
        yield chunk, captioner([decode_picture(one.read(), one.name) for one in held])


def _whole_lines(journal: Path) -> list[dict[str, Any]]:
    """The lines of a journal, up to one that was cut off by an interruption."""
    lines: list[dict[str, Any]] = []
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
