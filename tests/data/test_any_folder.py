"""Data folders of every kind, drawn at random: the doctor and training agree, and hints are never taken for pictures.

A few are looked at each time; ``pytest -m slow tests/data/test_any_folder.py`` looks at thousands.
"""

import io
import json
import os
import shutil
import tarfile
import tempfile
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from controlkit.annotators import contract
from controlkit.backbones import TextEmbedding
from controlkit.cli import data as commands
from controlkit.data import add_up, build_cache, examine, read_listing
from controlkit.errors import UserError
from controlkit.files import OUTPUT
from controlkit.train import resolve
from controlkit.train.recipe import parse_recipe
from controlkit.train.setup import training_pairs

SIDE = 8
PARTS = [
    "a",
    "b",
    "1",
    "01",
    "2",
    "red",
    "hat",
    "Photo",
    "IMG_0001",
    "canny",
    "hint",
    "é",
    "ß",
    "画",
    "\udcff",
    "%",
    "'",
]
WORDS = st.lists(st.sampled_from(PARTS), min_size=1, max_size=3)
NAMES = st.tuples(WORDS, st.sampled_from([" ", "_", "-", ".", ""])).map(lambda drawn: drawn[1].join(drawn[0]))
FOLDERS = NAMES | st.sampled_from(
    ["images", "image", "A", "B", "train/x", "control", "conditions", "conditioning_2", "target", "source", "masks",
     "train_canny", "..x", "deep/er/still", "images.tar"]
)  # fmt: skip
ENDINGS = st.sampled_from(["png", "PNG", "jpg", "jfif", "webp", "gif", "bmp", "tif", "avif", "jp2"])
OTHER_ENDINGS = st.sampled_from(["heic", "npy", "svg", "exr", "jpg"])
CAPTIONS = st.sampled_from(["a red hat", "a cat", "", "é 画", "cat \ud83d", 'with, "marks"; and\n lines', "x " * 200])
CODINGS = st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16"])
OTHER_CODINGS = st.sampled_from(["latin-1", "cp037", "utf-32"])
MODES = st.sampled_from(["RGB", "RGB", "RGB", "L", "P", "RGBA", "LA", "I;16", "1", "F", "cut", "empty", "text", "wide"])
LINKS = st.sampled_from(["file", "folder", "gone", "round", "up", "device", "pipe", "copy"])
LAYOUTS = ["plain", "two", "two", "one", "metadata", "prompt", "tar", "tuner"]
JUNK = st.sampled_from(
    [".ipynb_checkpoints/a.png", "._a.png", "__MACOSX/a/b.png", "Thumbs.db", ".hidden", "notes.txt", "clip.mp4",
     "built.json", "drawn.json", "metadata.json", "run/samples/step-1.png", "empty/"]
)  # fmt: skip
RARE = st.integers(0, 15).map(lambda drawn: drawn == 11)  # small numbers are drawn more often


@dataclass
class Folder:
    """What is written: files by path, links by path, what was meant as a hint, and what is told to both."""

    files: dict = field(default_factory=dict)
    links: list = field(default_factory=list)
    columns: dict = field(default_factory=dict)
    annotator: str = "canny"


def pixels(kind, number, size=(SIDE, SIDE)):
    """A picture (bright) or a hint (dark), another for each number."""
    drawn = np.random.default_rng([kind == "hint", number]).integers(0, 90, (*size, 3))
    return (drawn if kind == "hint" else drawn + 160).astype(np.uint8)


def encoded(array, mode, ending):
    """A file's bytes; of some modes the file is broken."""
    if mode in ("cut", "empty", "text"):
        return {"cut": encoded(array, "RGB", "png")[:60], "empty": b"", "text": b"hello"}[mode]
    buffer = io.BytesIO()
    if ending == "npy":
        np.save(buffer, array)
        return buffer.getvalue()
    if mode == "wide":
        picture = Image.fromarray(np.concatenate([array, array], 1))
    elif mode in ("I;16", "F"):
        picture = Image.fromarray(array[..., 0].astype(np.uint16 if mode == "I;16" else np.float32) * 200)
    else:
        picture = Image.fromarray(array).convert(mode)
    format = {"jpg": "JPEG", "jfif": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}.get(ending.lower(), ending.upper())
    lossless = {"webp": {"lossless": True}}.get(ending.lower(), {})
    try:
        picture.save(buffer, format, **lossless)
    except (OSError, KeyError, ValueError):  # a mode that the format has not, or no such format
        buffer = io.BytesIO()
        picture.save(buffer, "TIFF" if mode == "F" else "PNG")
    return buffer.getvalue()


def text(said, coding):
    return said.encode(coding, "replace")


@st.composite
def folders(draw):
    """A folder of any layout, mostly sound, with a few things wrong."""
    folder, layout = Folder(), draw(st.sampled_from(LAYOUTS))
    stems = draw(st.lists(NAMES, min_size=1 if draw(RARE) else 3, max_size=6, unique=True))
    own, hints = draw(st.lists(FOLDERS, min_size=2, max_size=2, unique=True))
    own = draw(st.sampled_from([own, ""])).lstrip(".")  # of pictures that are hidden nothing is known
    coding = draw(OTHER_CODINGS if draw(RARE) else CODINGS)
    ending = draw(OTHER_ENDINGS if draw(RARE) else ENDINGS)
    hint_ending = draw(st.sampled_from(["png", "png", "bmp", "npy", "tif"]))
    marked = draw(st.sampled_from(["_canny", "-hint"] if layout == "one" else ["", "", "_canny"]))
    rows = []
    for number, stem in enumerate(stems):
        mode = draw(MODES) if draw(RARE) else "RGB"
        picture = f"{own}/{stem}.{draw(ENDINGS) if draw(RARE) else ending}".lstrip("/")
        folder.files[picture] = encoded(pixels("picture", number), mode, picture.rpartition(".")[2])
        place = own if layout == "one" else hints
        hint = f"{place}/{stem}{marked if layout in ('one', 'two') else ''}.{hint_ending}".lstrip("/")
        if layout != "plain" and not (number and draw(RARE)):
            hint_mode = draw(MODES) if draw(RARE) and hint_ending != "npy" else "RGB"
            folder.files[hint] = encoded(pixels("hint", number), hint_mode, hint_ending)
        rows.append((picture, hint, "left\0right" if draw(RARE) else draw(CAPTIONS)))
    if layout in ("plain", "two", "one"):
        for picture, _, said in rows:
            if draw(st.booleans()):
                folder.files[f"{picture.rpartition('.')[0]}.{draw(st.sampled_from(['txt', 'caption']))}"] = text(
                    said, coding
                )
    else:
        listed(draw, folder, layout, rows, coding, (own, hints))
    for junk in draw(st.lists(JUNK, max_size=2)):
        folder.files.setdefault(junk, encoded(pixels("hint", 99), "RGB", "png") if junk.endswith("png") else b"junk")
        if junk.startswith("run/"):
            folder.files[f"run/{OUTPUT}"] = b""
    folder.links = draw(st.lists(st.tuples(LINKS, st.integers(0, 9)), max_size=2)) if draw(st.booleans()) else []
    if draw(RARE):
        folder.annotator = draw(st.sampled_from(["depth", "seg", "inpaint", "canny+depth"]))
    if draw(RARE):
        folder.columns = draw(st.sampled_from([{"image": "."}, {"image": own or ".", "hint": hints}, {"hint": hints}]))
    return folder


def listed(draw, folder, layout, rows, coding, places):
    """The listing of a set: or its tars, in place of files."""
    windows, hinted = draw(st.booleans()), draw(st.booleans())
    spelled = [[name.replace("/", "\\") if windows else name for name in row[:2]] + [row[2]] for row in rows]
    if draw(RARE):
        spelled[0][0] = draw(st.sampled_from(["../a.png", "x" * 300, "a\0b", "", "/dev/zero", {"path": "a"}, 7]))
    if layout == "prompt":
        lines = [json.dumps({"target": a, "source": b, "prompt": c}) for a, b, c in spelled]
        folder.files["prompt.json"] = text("\n".join(lines), coding)
    elif layout == "metadata":
        suffix, mark = draw(st.sampled_from([("jsonl", ""), ("json", ""), ("csv", ","), ("csv", ";"), ("csv", "\t")]))
        entries = [{"file_name": a, "text": c} | ({"conditioning_image": b} if hinted else {}) for a, b, c in spelled]
        if not hinted and draw(RARE):
            entries += [{"file_name": b, "text": c} for _, b, c in spelled]
        said = {"jsonl": "\n".join(map(json.dumps, entries)), "json": json.dumps(entries)}.get(suffix)
        if said is None:
            quoted = [[f'"{value}"'.replace("\n", " ") for value in entry.values()] for entry in entries]
            said = "\n".join(mark.join(line) for line in [list(entries[0]), *quoted])
        folder.files[f"metadata.{suffix}"] = text(said, coding)
    elif layout == "tuner":
        backends = [{"id": "a", "instance_data_dir": places[0], "conditioning_data": "b"},
                    {"id": "b", "instance_data_dir": places[1], "dataset_type": "conditioning"}]  # fmt: skip
        if not hinted:
            del backends[0]["conditioning_data"], backends[1]["dataset_type"]
        folder.files["multidatabackend.json"] = text(json.dumps(backends), coding)
    else:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for picture, hint, said in rows:
                key = picture.rpartition(".")[0]
                names = {
                    picture: picture,
                    hint: f"{key}.conditioning_image.{hint.rpartition('.')[2]}" if hinted else hint,
                }
                members = {names[name]: folder.files.pop(name) for name in (picture, hint) if name in folder.files}
                for name, content in (members | {f"{key}.txt": text(said, coding)}).items():
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        folder.files["0.tar"] = buffer.getvalue()


def written(folder, root):
    """Write it below ``root``; a path that cannot be is left out."""
    place = root / "set"
    place.mkdir()
    for name, content in folder.files.items():
        path = place / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir() if name.endswith("/") else path.write_bytes(content)
        except OSError:
            continue
    files = sorted(path for path in place.rglob("*") if path.is_file() and not path.is_symlink())
    for number, (kind, drawn) in enumerate(folder.links):
        path, new = files[drawn % len(files)], f"{number} link.png"
        if kind == "file":
            shutil.move(path, root / new)
            path.symlink_to(root / new)
            files.remove(path)
        elif kind == "folder" and path.parent != place and not path.parent.is_symlink():
            shutil.move(path.parent, root / f"{number} folder")
            path.parent.symlink_to(root / f"{number} folder")
            break
        elif kind == "pipe":
            os.mkfifo(place / new)
        else:
            leads = {"gone": root / "gone", "round": place, "up": Path(".."), "device": Path("/dev/zero"), "copy": path}
            (path.parent / new).symlink_to(leads.get(kind, path.parent))
        if not files:
            break
    return place


class Untrained:
    """A base that computes nothing."""

    size, multiple, window, device = SIDE, SIDE, 77, torch.device("cpu")

    def autocast(self):
        return nullcontext()

    def encode_moments(self, batch):
        return torch.zeros(len(batch), 8, 1, 1)

    def encode_text(self, prompts):
        assert all(prompt.encode() or True for prompt in prompts)
        return TextEmbedding(torch.zeros(len(prompts), 1, 1))


def told(place, folder):
    """The doctor's word: whether training may start."""
    try:
        listing = read_listing(place, folder.columns)
    except UserError as error:
        return False, str(error)
    rule = contract(folder.annotator)
    report = add_up(listing, examine(listing, rule, size=SIDE), rule)
    json.dumps(report.to_json()).encode()
    with redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")):  # as strict as a terminal
        commands._say_report(Path("set"), listing, report, folder.annotator)
    return report.may_train, "; ".join(str(problem) for problem in report.problems if problem.fatal)


def trained_on(place, folder, scratch):
    """The pictures that training reads to its cache."""
    names = folder.annotator.split("+")
    control = {"annotators": names} if len(names) > 1 else {"annotator": folder.annotator}
    recipe = {"control": control, "data": {"source": str(place), "columns": folder.columns}}
    plan = resolve(parse_recipe(recipe))
    try:
        sources = training_pairs(plan.data, Untrained())
        for number, pairs in enumerate(sources):
            build_cache(Untrained(), pairs, plan.data.specs, scratch / str(number))
        return [pair.picture for pairs in sources for pair in pairs], ""
    except UserError as error:
        return None, str(error)


def hold(folder):
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        place = written(folder, root)
        may, reason = told(place, folder)
        pictures, refusal = trained_on(place, folder, root)
        assert may is (pictures is not None), f"the doctor: {may} ({reason}); training: {refusal or 'begins'}"
        if folder.columns.get("image") != ".":  # which says that all are pictures
            hints = {pixels("hint", number).tobytes() for number in (*range(6), 99)}
            assert not hints & {picture.tobytes() for picture in pictures or ()}, "a hint was taken for a picture"
        return may


QUICK = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=80, derandomize=True, **QUICK)
@given(folders())
def test_the_doctor_and_training_agree_on_folders_of_every_kind(folder):
    hold(folder)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(5))
def test_the_doctor_and_training_agree_on_thousands_of_folders(part):
    passed = []

    @settings(max_examples=500, **QUICK)
    @given(folders())
    def look(folder):
        passed.append(hold(folder))

    look()
    assert len(passed) >= 500 and 0.1 < np.mean(passed) < 0.9, "both words are given often"
    print(f"{len(passed)} folders, {np.mean(passed):.0%} fit to train on")
