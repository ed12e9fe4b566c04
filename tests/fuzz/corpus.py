"""Small right files of every kind that is read, made by code: a folder for each, of which some files are mutated."""

import csv
import io
import json
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch
import yaml
from diffusers import T2IAdapter
from PIL import Image
from safetensors.torch import save_file

from controlkit.annotators import contract
from controlkit.annotators.people import Person, people_to_json
from controlkit.backbones import FAMILIES, Backbone, load_base, save_difference, unet_families
from controlkit.baselines import Material, Settings, train_baseline
from controlkit.branch import ControlSpec
from controlkit.controls import new_control, new_union
from controlkit.data import CirclePairs, build_cache, make_fill50k
from controlkit.data.store import Store, key_of
from controlkit.formats import WEIGHTS, SavedControl, WriteOptions, convert, save_control
from controlkit.images import HintSpec, write_png
from controlkit.reproduce.compare import HEAD, Comparison
from controlkit.reproduce.compare import Row as Compared
from controlkit.reproduce.entrants import write_report
from controlkit.reproduce.study import Shown
from controlkit.reproduce.trained import MEASURED
from controlkit.reproduce.transfer import Tuning, tuned
from controlkit.sample import ControlRequest, EditRequest, Request, infotext
from controlkit.sample.journal import JOURNAL
from controlkit.tensors import open_tensors
from controlkit.train import train_control
from controlkit.train.recipe import parse_recipe

sys.path.append(str(Path(__file__).parents[1] / "backbones"))
import test_load_base as stock  # the original layout, LoRAs and textual inversions, as its tests write them

KEYS = [key_of("a"), key_of("b")]
"""Of the entries in the shared store."""
LIKE = {"latents": ((4, 8, 8), torch.float32), "hint": ((8, 8, 3), torch.uint8)}
"""The shapes and types of each."""


@dataclass(frozen=True)
class Kind:
    """A kind of input: what makes right ones in a folder, which of their files are mutated, and who reads them.

    ``make(folder, toy)`` writes right samples into ``folder``, a folder each, or several; ``main``: what readers are
    given, by its path in a sample's folder; ``files``: patterns of the files that are mutated; ``share``: of all cases;
    ``is_linked``: whether its files may be links of the user's to anywhere.
    """

    name: str
    make: Callable[[Path, Path], None]
    main: str
    files: tuple[str, ...]
    readers: tuple[str, ...]
    share: int = 1
    is_linked: bool = False


ONE_STEP = Settings(steps=1, batch=1, scenes=8)
"""Of an opponent's training."""
SAME = {"steps": 1}
"""Settings of a report."""


def circles(base: Backbone, folder: Path) -> Material:
    """Two pairs for an opponent to learn from."""
    pairs, spec = CirclePairs(base.size, 2), contract("seg")
    [cached] = build_cache(base, pairs, {"": spec}, folder / "circles.safetensors")
    return Material(base, spec, pairs, cached, 1)


def _opponents(folder: Path, toy: Path) -> None:
    """A trained opponent, with the checkpoint and log of its training."""
    base = load_base(toy)
    list(train_baseline("lite", base, ONE_STEP, folder / "one" / "lite", material=circles(base, folder.parent)))


STUDY = {f"{system}{sketch}": Shown(sketch, system) for sketch in range(2) for system in "abc"}
"""The key of a study."""
TUNING = Tuning(steps=1, batch=1, scenes=8)


def _reports(folder: Path, toy: Path) -> None:
    """A report's folder: its rows and pictures, what was measured of a training, a rater's answers, a base's tuning."""
    out, row = folder / "one" / "report", Compared("lite", "Lite", 1.0, kind="seg", cost="1 step")
    pictures = {"hint": [_picture()] * 2, "Lite": [_picture()] * 2}
    write_report(out, "fig-compare", Comparison([row], SAME, ""), HEAD, {"seg": pictures})
    figure = {"mean": 0.5, "low": 0.4, "high": 0.6}
    figures = dict.fromkeys(("fidelity", "floor", "ceiling", "obedience"), figure)
    point = {"step": 1, "figures": figures, "is_meaningful": True, "quality_kept": None}
    (out / MEASURED).write_text(json.dumps({"settings": SAME, "measured": [point]}))
    tuned(load_base(toy), TUNING, out)
    lines = [f"me,{name},{1 + i % 3},{3 - i % 3}\n" for i, name in enumerate(STUDY)]
    (out / "answers.csv").write_text("rater,picture,quality,fidelity\n" + "".join(lines))


def _picture() -> np.ndarray:
    y, x = np.mgrid[:24, :24]
    picture = np.stack([10 * x, 10 * y, 5 * (x + y)], -1).astype(np.uint8)
    picture[6:18, 6:18] = (250, 20, 20)
    return picture


def _pictures(suffix: str, folder: Path, toy: Path) -> None:
    """A picture of each way of storing samples that the format has."""
    for mode in ("RGB", "L", "P", "RGBA", "I;16"):
        picture = Image.fromarray(_picture())
        picture = (
            Image.fromarray(_picture()[..., 0].astype(np.uint16) * 200) if mode == "I;16" else picture.convert(mode)
        )
        target = folder / mode.replace(";", "") / f"photo{suffix}"
        target.parent.mkdir(parents=True)
        options = {
            ".tiff": {"compression": "tiff_lzw"},
            ".gif": {"save_all": True, "append_images": [picture] * 2},
        }.get(suffix, {})
        try:
            picture.save(target, **options)
        except (OSError, ValueError, KeyError):  # not every format has every mode
            shutil.rmtree(target.parent)
    if suffix == ".png":
        request = Request(prompt="a red apple", negative_prompt="fog", scheduler="Euler a", size=(32, 32))
        write_png(folder / "RGB" / "photo.png", _picture(), json.loads(request.to_json()))
        facts = {"base": "mini", "lora": ["style"]}
        (folder / "A1111").mkdir()
        write_png(folder / "A1111" / "photo.png", _picture(), infotext=infotext.written(request, facts))


def _arrays(folder: Path, toy: Path) -> None:
    values = _picture()[..., 0]
    for name, array in {
        "grey": values,
        "colour": _picture(),
        "float": values / 255,
        "deep": values.astype(np.uint16),
        "mask": values > 99,
    }.items():
        (folder / name / "canny").mkdir(parents=True)
        write_png(folder / name / "images" / "0.png", _picture())
        np.save(folder / name / "canny" / "0.npy", array)


# --- weights --------------------------------------------------------------------------------------------------------


def _branch(base, body: str = "copy"):
    branch = new_union(base) if body == "union" else new_control(base, ControlSpec(body))
    generator = torch.Generator().manual_seed(0)
    for parameter in branch.requires_grad_(False).parameters():
        parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return branch


def _control_folders(folder: Path, toy: Path) -> None:
    base = load_base(toy)
    for body in ("copy", "conv", "xs", "adapter", "union"):
        hints = {"hints": {kind: contract(kind) for kind in base_types(body)}} if body == "union" else {}
        spec = HintSpec("") if body == "union" else contract("canny")
        trained = {"base": base.name, "base_digest": base.digest, "data": "fill50k", "recipe": {"size": 32}}
        save_control(folder / body / "control", SavedControl(_branch(base, body), spec, trained, **hints), base)


def base_types(body: str) -> tuple[str, ...]:
    """The types of hint of a Union that is made here."""
    return ("canny", "depth") if body == "union" else ()


def _sharded(folder: Path, toy: Path) -> None:
    _control_folders(folder / "whole", toy)
    shutil.move(folder / "whole" / "copy", folder / "copy")
    shutil.rmtree(folder / "whole")
    path = folder / "copy" / "control" / WEIGHTS
    tensors, metadata, stem = (
        open_tensors(path).read(),
        open_tensors(path).metadata,
        WEIGHTS.removesuffix(".safetensors"),
    )
    path.unlink()
    weight_map = {}
    for i in range(2):
        part = dict(list(tensors.items())[i::2])
        save_file(part, path.with_name(f"{stem}-0000{i + 1}-of-00002.safetensors"), metadata)
        weight_map |= dict.fromkeys(part, f"{stem}-0000{i + 1}-of-00002.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    path.with_name(f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def _control_files(folder: Path, toy: Path) -> None:
    base = load_base(toy)
    _control_folders(folder / "made", toy)
    for layout in ("cldm", "control-lora"):
        (folder / layout).mkdir()
        convert(
            folder / "made" / "copy" / "control",
            folder / layout / "control.safetensors",
            layout,
            base=base,
            options=WriteOptions(rank=2),
        )
    taps = [tap for tap in base.taps if tap.site == "encoder"]
    facts = {"downscale_factor": taps[0].stride, "adapter_type": "full_adapter"}
    adapter = T2IAdapter(channels=[tap.channels for tap in taps], num_res_blocks=1, **facts)
    (folder / "adapter").mkdir()
    save_file(
        adapter.state_dict(), folder / "adapter" / "control.safetensors", {"controlkit.config": json.dumps(facts)}
    )
    for name in ("copy", "union", "xs"):
        (folder / name).mkdir()
        shutil.copyfile(folder / "made" / name / "control" / WEIGHTS, folder / name / "control.safetensors")
    shutil.rmtree(folder / "made")


def _cldm(folder: Path, toy: Path) -> Path:
    """A control in the original's layout, in the folder."""
    base = load_base(toy)
    save_control(folder / "from", SavedControl(_branch(base), contract("canny")), base)
    convert(folder / "from", folder / "control.safetensors", "cldm", base=base)
    shutil.rmtree(folder / "from")
    return folder / "control.safetensors"


def _pickled(suffix: str, zipped: bool, folder: Path, toy: Path) -> None:
    tensors = open_tensors(made := _cldm(folder, toy)).read()
    made.unlink()
    some = dict(list(tensors.items())[:12])
    nested = {"state_dict": some, "epoch": 3, "lr": [1e-5]}
    for name, held in {"whole": tensors, "some": some, "nested": nested}.items():
        (folder / name).mkdir()
        torch.save(held, folder / name / f"control{suffix}", _use_new_zipfile_serialization=zipped)


def _beside(folder: Path, toy: Path) -> None:
    """A file of weights with a YAML beside it, as the web UI's extension has them."""
    (folder / "cldm").mkdir()
    _cldm(folder / "cldm", toy)
    params = {"control_stage_config": {"params": {"hint_channels": 3}}}
    settings = {"model": {"target": "cldm.cldm.ControlLDM", "params": params}}
    (folder / "cldm" / "control.yaml").write_text(yaml.safe_dump(settings))


def narrow_families() -> None:
    """Make the table of families as narrow as the single file that is made here; in a process of its own."""
    clip = (32, 64, 3, 2, "quick_gelu", 0)
    whole = unet_families._vae_config
    unet_families._vae_config = lambda row: whole(row) | {"block_out_channels": [32, 32, 64, 64]}
    FAMILIES["sd15"] = replace(FAMILIES["sd15"], text_width=32, channels=(32, 64, 64, 64), towers=(clip,))


def _pipeline():
    return stock.make_pipeline("sd15", [stock.clip_tokenizer()])


def _single_files(folder: Path, toy: Path) -> None:
    tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in stock.original(_pipeline()).items()
    }
    for name, write in {
        "safe": lambda path: save_file(tensors, path),
        "pickle": lambda path: torch.save({"state_dict": tensors}, path),
    }.items():
        (folder / name).mkdir(parents=True)
        write(folder / name / "base.ckpt")
        if name == "safe":
            (folder / name / "base.ckpt").rename(folder / name / "base.safetensors")


def _vae_files(folder: Path, toy: Path) -> None:
    vae = stock.original_vae(load_base(toy).vae)
    for name, held, suffix in (
        ("bare", vae, ".safetensors"),
        ("prefixed", stock.prefixed("first_stage_model.", vae), ".safetensors"),
        ("pickle", vae, ".pt"),
    ):
        (folder / name).mkdir(parents=True)
        held = {key: tensor.contiguous() for key, tensor in held.items()}
        path = folder / name / f"vae{suffix}"
        save_file(held, path) if suffix == ".safetensors" else torch.save({"state_dict": held}, path)


def _loras(folder: Path, toy: Path) -> None:
    base = load_base(toy)
    pairs = stock.draw_pairs(base.unet, stock.layers_of(base.unet, stock.ATTENTION))
    other = load_base(toy)
    with torch.no_grad():
        next(iter(other.unet.parameters())).add_(1)
    for name in ("kohya", "diffusers", "difference"):
        (folder / name).mkdir(parents=True)
    save_file(stock.kohya("lora_unet", pairs, alpha=2), folder / "kohya" / "style.safetensors")
    save_file(stock.diffusers_style("unet", pairs), folder / "diffusers" / "style.safetensors")
    save_difference(folder / "difference" / "style.safetensors", base, other)


def _embeddings(folder: Path, toy: Path) -> None:
    vectors = stock.draw_words(2, load_base(toy).unet.config.cross_attention_dim)
    for name in ("safe", "pickle"):
        (folder / name).mkdir(parents=True)
    save_file({"<sparkle>": vectors}, folder / "safe" / "sparkle.safetensors")
    torch.save(
        {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "x", "step": 9},
        folder / "pickle" / "sparkle.pt",
    )


def _base(folder: Path, toy: Path) -> None:
    shutil.copytree(toy, folder / "toy" / "base")


# --- texts ----------------------------------------------------------------------------------------------------------

TINY = {"control": {"annotator": "canny"}, "steps": 2, "batch": 2, "lr": 1e-3, "checkpoint_every": 1}
TINY |= {"data": {"source": "fill50k", "count": 4}, "evaluation": {"every": 2, "num": 2, "steps": 1}}


def _recipes(folder: Path, toy: Path) -> None:
    rows = {
        "short": TINY,
        "whole": parse_recipe(TINY).model_dump(),
        "own": TINY | {"evaluation": {"hints": ["a.png"], "prompts": ["x"]}},
    }
    for name, values in rows.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "recipe.yaml").write_text(yaml.safe_dump(values | {"base": "mini"}))


def _requests(folder: Path, toy: Path) -> None:
    points = np.random.default_rng(0).uniform(0, 32, (70, 3)).round(1).astype(np.float32)
    person = Person(points[:18], points[:21], points[:21], points)
    _control_folders(folder / "made", toy)
    shutil.move(folder / "made" / "copy", folder / "file")
    shutil.rmtree(folder / "made")
    write_png(folder / "file" / "photo.png", _picture())
    asked = [
        ControlRequest(name="control", images=Path("photo.png"), scale=0.5),
        ControlRequest(name="control", images=_picture(), ready=True),
    ]
    edit = EditRequest(image=Path("photo.png"), mask=_picture(), outpaint=(0, 8, 0, 0), margin=4, strength=0.5)
    whole = Request(prompt="a cat", controls=asked, size=(32, 32), edit=edit, tile=32, variation=0.1).to_json()
    (folder / "file" / "request.json").write_text(whole)
    own = {"name": "a", "seed": 3, "controls": [{"name": "control", "images": "photo.png"}]}
    larger = {"hires": {"factor": 1.5, "steps": 3}, "seed": 4, "size": [32, 32]}
    (folder / "file" / "jobs.jsonl").write_text(f"{whole}\n{json.dumps(own)}\n{json.dumps(larger)}\n")
    (folder / "file" / "photo.txt").write_text("a cat")
    (folder / "file" / "poses.json").write_text(json.dumps(people_to_json([person, Person()], (32, 40))))
    lines = [{"name": name, "key": "0" * 32, "seconds": 1.5} for name in ("a", "00001")]
    (folder / "file" / JOURNAL).write_text("".join(f"{json.dumps(one)}\n" for one in lines))


# --- data sets ------------------------------------------------------------------------------------------------------

COUNT = 3


def _rows() -> Iterator[tuple[str, np.ndarray, np.ndarray, str]]:
    """(name, picture, hint, caption) of each pair."""
    for i in range(COUNT):
        hint = np.zeros((24, 24, 3), np.uint8)
        hint[4 + i : 20, 6:8] = 255
        yield f"{i}", np.roll(_picture(), 3 * i, 0), hint, f"a red square, number {i}"


def _listed(folder: Path, picture: str, hint: str) -> list[str]:
    for name, pixels, lines, _ in _rows():
        write_png(folder / picture / f"{name}.png", pixels)
        write_png(folder / hint / f"{name}.png", lines)
    return [caption for *_, caption in _rows()]


def _metadata(suffix: str, folder: Path, toy: Path) -> None:
    words = _listed(folder / "plain" / "set", "a", "b")
    lines = [
        {"file_name": f"a/{i}.png", "conditioning_image": f"b/{i}.png", "text": text} for i, text in enumerate(words)
    ]
    with (folder / "plain" / "set" / f"metadata{suffix}").open("w", newline="") as file:
        if suffix == ".csv":
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            writer.writerows(lines)
        else:
            file.write("".join(json.dumps(line) + "\n" for line in lines))


def _prompt_json(folder: Path, toy: Path) -> None:
    words = _listed(folder / "plain" / "set", "target", "source")
    lines = [{"source": f"source/{i}.png", "target": f"target/{i}.png", "prompt": text} for i, text in enumerate(words)]
    (folder / "plain" / "set" / "prompt.json").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _simpletuner(folder: Path, toy: Path) -> None:
    words = _listed(folder / "plain" / "set", "pictures", "edges")
    for i, text in enumerate(words):
        (folder / "plain" / "set" / "pictures" / f"{i}.txt").write_text(text)
    first = {
        "id": "a",
        "dataset_type": "image",
        "instance_data_dir": "pictures",
        "caption_strategy": "textfile",
        "conditioning_data": "b",
    }
    backends = [first, {"id": "b", "dataset_type": "conditioning", "instance_data_dir": "edges"}]
    (folder / "plain" / "set" / "multidatabackend.json").write_text(json.dumps(backends))


def _captions(folder: Path, toy: Path) -> None:
    for name, suffix in (("txt", ".txt"), ("caption", ".caption")):
        words = _listed(folder / name, "images", "canny")
        for i, text in enumerate(words):
            (folder / name / "images" / f"{i}{suffix}").write_text(text)


def _tars(folder: Path, toy: Path) -> None:
    for name, form in (("ustar", tarfile.USTAR_FORMAT), ("pax", tarfile.PAX_FORMAT), ("gnu", tarfile.GNU_FORMAT)):
        (folder / name).mkdir(parents=True)
        with tarfile.open(folder / name / "00000.tar", "w", format=form) as archive:
            for row, pixels, lines, text in _rows():
                stem = row if form == tarfile.USTAR_FORMAT else f"{'x' * 110}é{row}"
                for suffix, array in (("png", pixels), ("conditioning_image.png", lines), ("txt", None)):
                    data = text.encode() if array is None else _png(array)
                    member = tarfile.TarInfo(f"{stem}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _table(saved: bool, folder: Path, toy: Path) -> None:
    import datasets

    rows = list(_rows())
    pictures = {"image": [{"bytes": _png(row[1]), "path": None} for row in rows], "text": [row[3] for row in rows]}
    pictures["conditioning_image"] = [{"bytes": _png(row[2]), "path": f"{row[0]}.png"} for row in rows]
    table = datasets.Dataset.from_dict(pictures)
    for name in ("image", "conditioning_image"):
        table = table.cast_column(name, datasets.Image())
    if saved:
        table.save_to_disk(folder / "plain" / "set")
    else:
        (folder / "plain" / "set" / "data").mkdir(parents=True)
        table.to_parquet(folder / "plain" / "set" / "data" / "train-00000-of-00001.parquet")


def _own_sets(folder: Path, toy: Path) -> None:
    """Sets that this program wrote, or is writing: a drawn one and a built one, each to be gone on with."""
    from controlkit.data import build_set, sound_listing

    list(make_fill50k(folder / "drawn" / "set", 2, 32))
    shutil.copytree(folder / "drawn" / "set", folder / "built" / "from")
    listing = sound_listing(folder / "built" / "from")
    list(build_set(listing, folder / "built" / "set", "metadata", contract("canny")))
    (folder / "built" / "set" / "captions.jsonl").write_text('{"row": 0, "caption": "a ring"}\n')
    shutil.rmtree(folder / "built" / "from")


# --- runs and the store ---------------------------------------------------------------------------------------------


def run_recipe(toy: Path):
    """The recipe of the run that is made here."""
    return parse_recipe(TINY | {"base": str(toy)})


def _runs(folder: Path, toy: Path) -> None:
    run = folder / "ended" / "run"
    list(train_control(run_recipe(toy), run, load_base(toy)))
    shutil.copytree(run, folder / "half" / "run")
    half = folder / "half" / "run"
    (half / "ending.json").unlink()
    shutil.rmtree(half / "control")
    shutil.rmtree(sorted((half / "checkpoints").iterdir())[-1])


def _store(folder: Path, toy: Path) -> None:
    (folder / "sealed").mkdir(parents=True)
    with Store(folder / "sealed" / "store") as store:
        store.put(
            {key: {"latents": torch.ones(4, 8, 8), "hint": torch.zeros(8, 8, 3, dtype=torch.uint8)} for key in KEYS}
        )


# --- the table ------------------------------------------------------------------------------------------------------

_PICTURE = ("picture", "hint", "posted picture", "request's picture", "picture to be changed", "annotate", "doctor")
_CONTROL = ("tensors", "describe", "control", "inspect", "convert", "generate --control", "evaluate", "verify")
_SET = ("listing", "doctor", "build", "training pairs", "train")

_OPPONENT = ("opponent", "opponent's training")
KINDS = [
    *(
        Kind(
            suffix[1:],
            partial(_pictures, suffix),
            f"photo{suffix}",
            (f"photo{suffix}",),
            (*_PICTURE, *(["request's PNG"] if suffix == ".png" else [])),
        )
        for suffix in (".png", ".jpg", ".webp", ".bmp", ".tiff", ".gif", ".avif", ".jp2")
    ),
    Kind(
        "npy",
        _arrays,
        "canny/0.npy",
        ("canny/0.npy",),
        ("hint", "request's picture", "picture to be changed", "own hints", "doctor"),
        2,
    ),
    Kind("control folder", _control_folders, "control", ("control/*",), _CONTROL),
    Kind("index.json", _sharded, "control", ("control/*.json",), _CONTROL),
    Kind("safetensors", _control_files, "control.safetensors", ("*",), _CONTROL, 2),
    Kind("pth", partial(_pickled, ".pth", True), "control.pth", ("*",), _CONTROL, 2),
    Kind(
        "old ckpt",
        partial(_pickled, ".ckpt", False),
        "control.ckpt",
        ("*",),
        ("tensors", "describe", "control", "inspect"),
    ),
    Kind("yaml beside", _beside, "control.safetensors", ("*.yaml",), _CONTROL),
    Kind("single file", _single_files, "base.*", ("*",), ("tensors", "describe", "inspect", "single file")),
    Kind("vae file", _vae_files, "vae.*", ("*",), ("tensors", "describe", "vae", "generate --vae", "generate --taesd")),
    Kind("lora", _loras, "style.safetensors", ("*",), ("lora", "generate --lora")),
    Kind("embedding", _embeddings, "sparkle.*", ("*",), ("embedding", "generate --embedding")),
    Kind("base folder", _base, "base", ("base/*.json", "base/*/*.json", "base/*/*.txt"), ("base", "vae", "attach")),
    Kind("base weights", _base, "base", ("base/*/*.safetensors",), ("base", "vae")),
    Kind("recipe", _recipes, "recipe.yaml", ("*",), ("recipe", "train recipe"), 2),
    Kind(
        "request",
        _requests,
        "request.json",
        ("request.json", "jobs.jsonl", "photo.txt", "poses.json", JOURNAL),
        ("request", "posted body", "generate --request", "jobs", "jobs of a folder", "poses"),
    ),
    Kind("metadata.jsonl", partial(_metadata, ".jsonl"), "set", ("set/metadata.jsonl",), _SET),
    Kind("metadata.csv", partial(_metadata, ".csv"), "set", ("set/metadata.csv",), _SET),
    Kind("prompt.json", _prompt_json, "set", ("set/prompt.json",), _SET),
    Kind("backends", _simpletuner, "set", ("set/multidatabackend.json",), _SET),
    Kind("captions", _captions, ".", ("images/*.txt", "images/*.caption"), (*_SET, "caption", "generate --prompts")),
    Kind("tar", _tars, ".", ("*.tar",), _SET, 2, True),
    Kind("parquet", partial(_table, False), "set", ("set/data/*",), _SET, is_linked=True),
    Kind("saved set", partial(_table, True), "set", ("set/*",), _SET, is_linked=True),
    Kind("own sets", _own_sets, "set", ("set/*.json", "set/*.jsonl"), ("listing", "doctor", "draw on", "build on")),
    Kind(
        "run",
        _runs,
        "run",
        ("run/*", "run/checkpoints/*/*", "run/control/*"),
        ("watch", "watch lines", "ending", "resume", "from step", "evaluate", "control", "start from"),
        2,
    ),
    Kind("store", _store, "store", ("store/*.sqlite",), ("store",), is_linked=True),
    Kind("opponent", _opponents, "lite", ("lite/*.json", "lite/*.jsonl", "lite/*.safetensors"), _OPPONENT),
    Kind(
        "report",
        _reports,
        "report",
        ("report/*.json", "report/*/*.png", "report/*.csv", "report/*.safetensors"),
        ("earlier report", "measured", "answers", "tuning"),
    ),
]


def write_elsewhere(folder: Path, toy: Path) -> None:
    """The files outside every case's folder, which no reader may open: one of each kind that paths can lead to."""
    write_png(folder / "photo.png", _picture())
    (folder / "words.txt").write_text("a secret")
    (folder / "config.json").write_text("{}")
    save_file({"x": torch.ones(2)}, folder / "control.safetensors")
    shutil.copytree(toy, folder / "base")
    _prompt_json(folder / "made", toy)
    shutil.move(folder / "made" / "plain" / "set", folder / "set")
    _table(False, folder / "made", toy)
    shutil.move(next((folder / "made").rglob("*.parquet")), folder / "table.parquet")
    shutil.rmtree(folder / "made")


def samples_of(kind: Kind, folder: Path, toy: Path) -> list[Path]:
    """The folders of a kind's right samples, made on the first call."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        kind.make(folder, toy)
    return sorted(folder.iterdir())


def place_case(sample: Path, target: Path) -> None:
    """A copy of a right sample; large files are linked, which nothing here writes in place."""
    shutil.copytree(sample, target, copy_function=_linked)


def _linked(source: str, target: str) -> None:
    if Path(source).stat().st_size > 2**18:
        Path(target).hardlink_to(source)
    else:
        shutil.copyfile(source, target)


def rng(seed: int, kind: str, number: int) -> Random:
    """The draws of one case, which no other case changes."""
    return Random(f"{seed}/{kind}/{number}")
