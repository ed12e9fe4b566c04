"""Every way in which files from outside come in: functions of the library, and commands by their own entry.

``READERS`` says of each which functions of the package it goes through; ``EXCUSED`` says why a function that takes a
path or bytes needs no reader. A function that is in neither fails a test, and so does a command's option.
"""

import base64
import contextlib
import importlib
import inspect
import io
import json
import os
import pkgutil
import re
import shutil
import sys
import tempfile
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import datasets
import numpy as np
from corpus import KEYS, LIKE, ONE_STEP, SAME, STUDY, TINY, TUNING, circles, narrow_families, run_recipe
from guards import SENTENCE, UncouthError

import controlkit
from controlkit import cli, sample
from controlkit.annotators import contract
from controlkit.annotators.people import draw_people, people_from_json
from controlkit.backbones import Backbone, load_base
from controlkit.backbones.taesd import load_taesd
from controlkit.baselines import load_baseline, train_baseline
from controlkit.baselines.curves import Curve
from controlkit.cli import making, shared
from controlkit.cli.matrix import axes_of
from controlkit.data import FolderPairs, build_set, make_fill50k, read_listing, sound_listing
from controlkit.data.store import Store
from controlkit.errors import Invalid, UserError
from controlkit.files import inside, read_text
from controlkit.formats import attach, describe, load_control
from controlkit.formats.metadata import weights_file
from controlkit.images import decode_hint, decode_picture, read_hint, read_picture, read_settings
from controlkit.reproduce.compare import HEAD
from controlkit.reproduce.compare import Row as Compared
from controlkit.reproduce.rows import Earlier
from controlkit.reproduce.study import read_answers
from controlkit.reproduce.trained import read_measured
from controlkit.reproduce.transfer import tuned
from controlkit.sample import ControlRequest, EditRequest, Picture, Request, Step, check_pictures, makers
from controlkit.sample.journal import JOURNAL
from controlkit.serve import incoming
from controlkit.serve.a1111 import A1111
from controlkit.serve.settings import Folders, Limits
from controlkit.serve.v1 import V1
from controlkit.tensors import open_tensors
from controlkit.train import read_ending, resolve, train_control, training_pairs
from controlkit.train.checkpoints import go_back
from controlkit.train.evaluation import own_hints
from controlkit.train.recipe import EvaluationRecipe, parse_recipe, read_recipe
from controlkit.train.watch import lines, page, read_run


@dataclass(frozen=True)
class Setting:
    """What readers are given besides a case: the worker's folder, and a right base."""

    folder: Path
    toy: Path
    base: Backbone

    @classmethod
    def of(cls, folder: Path, toy: Path) -> "Setting":
        """The setting of a worker: every folder that is written lies in its own; what only takes time is left out."""
        for name in ("tmp", "cache", "out"):
            (folder / name).mkdir(exist_ok=True)
        tempfile.tempdir = str(folder / "tmp")
        os.environ |= {"CONTROLKIT_CACHE": str(folder / "cache"), "TMPDIR": str(folder / "tmp"), "COLUMNS": "1000"}
        os.environ |= {"XDG_CACHE_HOME": str(folder / "cache")}
        shared.ready("cpu")
        datasets.disable_progress_bars()
        narrow_families()
        setting = cls(folder, toy, load_base(toy))
        for module in (making, cli.runs, cli.evaluating, cli.verify, cli.data, cli.weights):
            module.loaded_base = setting.loaded
        sample.generate = _black_pictures
        makers.generate = _no_batch
        sys.modules["controlkit.data"].load_captioner = lambda name, device: _Captioner()
        return setting

    def loaded(self, name: str, device: str, compiles: bool = False, **options: Any) -> Backbone:
        """The right base as it is in memory, where nothing is to be added to it."""
        options.pop("waits", None)
        if name == str(self.toy) and not any(value for key, value in options.items() if key != "dtype"):
            return self.base
        return load_base(name, device, **options)


class _Captioner:
    """In place of a BLIP."""

    name = "captioner"

    def __call__(self, pictures: Any) -> list[str]:
        return ["a picture"] * len(pictures)


def _black_pictures(base: Any, prepared: Any, *_: Any, **__: Any) -> Any:
    """Black pictures, in place of sampling."""
    for one in prepared:
        yield Picture(one.request, np.zeros((8, 8, 3), np.uint8))


def _no_batch(base: Any, prepared: Any, batch: int) -> Any:
    """As ``_black_pictures``, for jobs."""
    yield Step(1, 1, range(len(prepared)), len(prepared), list)
    for one in prepared:
        yield Picture(one.request, np.zeros((8, 8, 3), np.uint8))


@dataclass(frozen=True)
class Reader:
    """A way in: ``read(path, setting)``; ``every``: which share of cases it reads, one in so many, as it is slow.
    ``follows``: whether what it reads is the user's word on which files are meant: requests and recipes name them.

    ``covers``: the functions of the package that take what comes from outside, and commands' options as
    ``command option``.
    """

    read: Callable[[Path, Setting], object]
    covers: tuple[str, ...]
    every: int = 1
    follows: bool = False


def command(*arguments: object) -> None:
    """Run a command as a shell would.

    ``Invalid`` where it says that it refuses something, ``UncouthError`` where it writes what no terminal should show.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    before, sys.argv = sys.argv, ["controlkit", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as stopped:
        code = stopped.code or 0
    finally:
        sys.argv = before
    for line in (out.getvalue() + err.getvalue()).split("\n"):
        strange = sorted({letter for letter in line if not letter.isprintable()})
        if strange or (len(line) > 4 * SENTENCE and "inspect" not in arguments):
            raise UncouthError(str(arguments[0]), f"{strange} in {line[:300]!r} ({len(line)} letters)")
    if code == 2:
        raise Invalid((err.getvalue().strip() or "no word").splitlines()[-1])
    if code not in (0, 1):
        raise UncouthError(str(arguments[0]), f"exit code {code}")


def _uri(path: Path) -> str:
    kind = "application/x-npy" if path.suffix == ".npy" else "image/png"
    return f"data:{kind};base64," + base64.b64encode(path.read_bytes()).decode()


def _request_picture(path: Path, setting: Setting) -> None:
    check_pictures(ControlRequest(name="x", images=path, annotator="canny", ready=path.suffix == ".npy"))
    if path.is_file() and not path.is_symlink():
        Request.from_json(json.dumps({"controls": [{"name": "x", "images": _uri(path)}]}))


def _posted_picture(path: Path, setting: Setting) -> None:
    if path.is_file() and not path.is_symlink():
        incoming.picture(base64.b64encode(path.read_bytes()).decode(), "image", Limits(), None)


def _posted_body(path: Path, setting: Setting) -> None:
    """Through each dialect that has bodies in JSON."""
    control = {"name": "canny", "hash": "0", "annotator": "canny", "types": ()}
    facts = {"base": "toy", "digest": "0", "size": 32, "multiple": 32, "most_steps": 1000}
    facts |= {"samplers": {"DDIM": []}, "controls": [control]}
    settings = SimpleNamespace(folders=Folders())
    desk = cast(Any, SimpleNamespace(facts=facts, limits=Limits(), settings=settings))
    data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
    faults = []
    for read in (V1(desk)._read_generate, lambda data: A1111(desk)._read_generate(data, False)):
        try:
            read(data)
        except UserError as error:
            faults.append(error)
    if faults:
        raise faults[0]


def _picture(path: Path, setting: Setting) -> None:
    if path.is_file() and not path.is_symlink():
        data = path.read_bytes()
        with contextlib.suppress(ValueError):  # a UserError, that the next reader raises again
            decode_picture(data, "photo", None)
    read_picture(path)


def _hint(path: Path, setting: Setting) -> None:
    read_hint(path)
    decode_hint(path.read_bytes(), "hint")


def _request(path: Path, setting: Setting) -> None:
    if path.is_file():
        Request.from_json(path.read_bytes())


def _jobs(path: Path, setting: Setting, jobs: Path, *options: object) -> None:
    """Jobs, in a folder with a journal that lies beside them."""
    if jobs.is_symlink() and jobs.is_file():  # which is followed, as the user names the file
        return
    out = setting.folder / "out" / "jobs"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    if (journal := path.with_name(JOURNAL)).is_file() and not journal.is_symlink():
        shutil.copyfile(journal, out / JOURNAL)
    command("generate", "--jobs", jobs, "--base", setting.toy, "--device", "cpu", "--out", out, *options)


def _folder(path: Path) -> Path:
    """The data set that a picture alone, or a folder, is."""
    return path.parents[1] if path.suffix == ".npy" else path.parent if path.suffix else path


def _doctor(path: Path, setting: Setting) -> None:
    command(
        "data",
        "doctor",
        _folder(path),
        "--base",
        setting.toy,
        "--annotator",
        "canny",
        "--out",
        setting.folder / "out" / "doctor",
    )


def _train(path: Path, setting: Setting) -> None:
    _write_recipe(setting, data={"source": str(_folder(path))})
    command("train", setting.folder / "out" / "recipe.yaml", "--out", setting.folder / "out" / "run", "--device", "cpu")


def _write_recipe(setting: Setting, **changes: Any) -> None:
    values = TINY | {"base": str(setting.toy), "steps": 1, "evaluation": {"every": 0}} | changes
    (setting.folder / "out" / "recipe.yaml").write_text(json.dumps(values))
    import shutil

    shutil.rmtree(setting.folder / "out" / "run", ignore_errors=True)


def _pairs(path: Path, setting: Setting) -> None:
    recipe = parse_recipe(TINY | {"base": str(setting.toy), "data": {"source": str(_folder(path))}})
    for pairs in training_pairs(resolve(recipe).data, setting.base):
        for pair in pairs:
            assert pair.prompt is not None
        if isinstance(pairs, FolderPairs):
            pairs.digest()


def _generate(path: Path, setting: Setting, *options: object) -> None:
    command(
        "generate",
        "x",
        "--base",
        setting.toy,
        "--steps",
        1,
        "--device",
        "cpu",
        "--out",
        setting.folder / "out" / "made",
        *options,
    )


def _like(path: Path, setting: Setting) -> None:
    """Repeat a picture, its base and size replaced: a mutated size may be one that takes minutes."""
    out = setting.folder / "out" / "made"
    command("generate", "--like", path, "--base", setting.toy, "--steps", 1, "--device", "cpu", "--out", out)


def _photo(setting: Setting) -> Path:
    photo = setting.folder / "out" / "right.png"
    if not photo.is_file():
        from controlkit.images import write_png

        write_png(photo, np.tile(np.arange(24, dtype=np.uint8)[:, None, None] * 10, (1, 24, 3)))
    return photo


def _recipe(path: Path, setting: Setting) -> None:
    resolve(read_recipe(path, ["batch=1"]))


def _train_recipe(path: Path, setting: Setting) -> None:
    """Start what a recipe describes, up to its data: whatever it costs is what it asks for."""
    recipe = read_recipe(path)
    if recipe.base == "mini" and recipe.data.source == "fill50k":
        training_pairs(resolve(recipe).data, setting.base)
        own_hints(recipe.evaluation, contract("canny"))


def _watch(path: Path, setting: Setting) -> None:
    command("watch", path, "--once", "--html", setting.folder / "out" / "run.html")


def _watch_lines(path: Path, setting: Setting) -> None:
    run = read_run(path)
    lines(run)
    page(run)


def _resume(path: Path, setting: Setting) -> None:
    list(train_control(run_recipe(setting.toy), path, setting.base))


def _start_from(path: Path, setting: Setting) -> None:
    _write_recipe(
        setting, control={"annotator": "canny", "start_from": str(path)}, data={"source": "fill50k", "count": 2}
    )
    command("train", setting.folder / "out" / "recipe.yaml", "--out", setting.folder / "out" / "run", "--device", "cpu")


def _go_on(path: Path, setting: Setting) -> None:
    """Go on with the training of an opponent, which lacks a step."""
    list(train_baseline("lite", setting.base, ONE_STEP, path, material=circles(setting.base, setting.folder / "out")))


def _earlier(path: Path, setting: Setting) -> None:
    """Keep the row and the pictures of a report that is there already."""
    earlier = Earlier.read(path, "fig-compare", HEAD, SAME)
    rows = earlier.filled([Compared("lite", "Lite", 1.0, kind="seg", note="no weights")])
    [print(*row.words()) for row in rows]
    earlier.columns("seg", {"hint": [np.zeros((24, 24, 3), np.uint8)] * 2}, rows)


def _store(path: Path, setting: Setting) -> None:
    with Store(path) as store:
        for entry in store.get(KEYS, [LIKE] * len(KEYS)):
            assert entry is None or {name: (tuple(one.shape), one.dtype) for name, one in entry.items()} == LIKE
        store.put({b"c" * 32: {"latents": setting.base.unet.conv_in.bias.detach().clone()}})


def _build(path: Path, setting: Setting) -> None:
    target = Path(tempfile.mkdtemp()) / "built"
    command("data", "build", _folder(path), "--annotator", "canny", "--out", target, "--captions", "blip")


def _build_on(path: Path, setting: Setting) -> None:
    make_fill50k(setting.folder / "out" / "from", 2, 32)
    list(make_fill50k(setting.folder / "out" / "from", 2, 32))
    list(build_set(sound_listing(setting.folder / "out" / "from"), path, "metadata", contract("canny")))


def _convert(path: Path, setting: Setting) -> None:
    target = Path(tempfile.mkdtemp()) / "converted.safetensors"
    command("convert", path, target, "--to", "cldm", "--base", setting.toy)
    left = [one.name for one in target.parent.iterdir() if one != target]
    assert not left, f"left behind: {left}"


_SETS = (
    "data.layouts.read_listing",
    "data.layouts.sound_listing",
    "data.layouts.own_facts",
    "data.layouts.tree.tree_of",
    "data.layouts.rows.open_regular",
    "data.layouts.rows.read_regular",
)
_WEIGHTS = (
    "tensors.reader.open_tensors",
    "tensors.reader.open_safetensors",
    "tensors.pickles.read_pickle",
    "tensors.archive.open_archive",
    "formats.metadata.json_object",
)

_OPPONENTS = ("reproduce opponents",)

READERS: dict[str, Reader] = {
    "picture": Reader(
        _picture,
        (
            "images.read_picture",
            "images.decode_picture",
            "decoding.pictures.open_picture",
            "decoding.pictures.open_array",
            "decoding.pictures.read_bytes",
        ),
    ),
    "hint": Reader(
        _hint, ("images.read_hint", "images.decode_hint", "decoding.arrays.array_of", "decoding.arrays.is_array")
    ),
    "posted picture": Reader(_posted_picture, ("serve.incoming.decoded",)),
    "posted body": Reader(_posted_body, ("serve.incoming.fields_of",)),
    "request's picture": Reader(_request_picture, ("sample.request._Checked.from_json",)),
    "picture to be changed": Reader(
        lambda path, setting: check_pictures(EditRequest(image=path, mask=path)),
        ("sample.canvas.read_source", "sample.canvas.light_of", "generate init_image", "generate mask"),
        2,
    ),
    "request's PNG": Reader(
        lambda path, setting: (read_settings(path), _like(path, setting)),
        (
            "images.read_settings",
            "images.read_texts",
            "images.settings_in",
            "decoding.pictures.settings_texts",
            "generate like",
        ),
        2,
    ),
    "own hints": Reader(
        lambda path, setting: own_hints(EvaluationRecipe(hints=[str(path)], prompts=["x"]), contract("canny")), ()
    ),
    "annotate": Reader(
        lambda path, setting: command("annotate", "canny", path, "--out", setting.folder / "out" / "hints"),
        ("annotate images", "data.hints.hint_files"),
    ),
    "doctor": Reader(
        _doctor, ("decoding.pictures.sides_of", "data doctor path", "data doctor column", "data doctor base"), 3
    ),
    "tensors": Reader(lambda path, setting: open_tensors(weights_file(path)).read(), _WEIGHTS),
    "describe": Reader(
        lambda path, setting: describe(path).sentence(),
        ("formats.describe.describe", "formats.metadata.weights_in", "formats.metadata.weights_file"),
    ),
    "control": Reader(
        lambda path, setting: load_control(path, setting.base),
        (
            "formats.control.load_control",
            "formats.control.read_control",
            "formats.control.named_path",
            "formats.control.control_path",
            "formats.weights.read_weights",
        ),
        2,
    ),
    "inspect": Reader(
        lambda path, setting: (command("inspect", path), command("inspect", path, "--json")), ("inspect file",), 2
    ),
    "convert": Reader(_convert, ("convert source", "convert base", "convert transfer_to"), 4),
    "attach": Reader(
        lambda path, setting: attach(load_base(path), Path(tempfile.mkdtemp()) / "fresh", "diffusers"), (), 8
    ),
    "evaluate": Reader(
        lambda path, setting: command(
            "evaluate", path, "--base", setting.toy, "--num", 2, "--steps", 1, "--data", "fill50k", "--device", "cpu"
        ),
        ("evaluate control", "evaluate base", "evaluate data", "evaluate column"),
        10,
    ),
    "verify": Reader(
        lambda path, setting: command(
            "verify",
            setting.toy,
            path,
            "--num",
            0,
            "--shown",
            1,
            "--steps",
            1,
            "--data",
            "fill50k",
            "--hint",
            "canny",
            "--device",
            "cpu",
            "--out",
            setting.folder / "out" / "verified",
        ),
        ("verify base", "verify control", "verify data", "evaluate silent"),
        20,
    ),
    "generate --control": Reader(
        lambda path, setting: _generate(path, setting, "--control", f"{path}={_photo(setting)}"),
        ("generate control",),
        4,
    ),
    "generate --request": Reader(
        lambda path, setting: command(
            "generate",
            "--request",
            path,
            "--base",
            setting.toy,
            "--device",
            "cpu",
            "--out",
            setting.folder / "out" / "made",
        ),
        ("generate request",),
        2,
        True,
    ),
    "generate --taesd": Reader(
        lambda path, setting: load_taesd(
            path, cast(Backbone, SimpleNamespace(name="toy", latent_channels=4, stride=8))
        ),
        ("backbones.taesd.load_taesd", "generate taesd"),
    ),
    "generate --prompts": Reader(
        lambda path, setting: [
            axes_of([], one, 1, Request())
            for one in _folder(path).glob("images/*.txt")
            if not one.is_symlink()  # which is followed, as the user names the file
        ],
        ("generate prompts",),
    ),
    "jobs": Reader(
        lambda path, setting: _jobs(path, setting, path.with_name("jobs.jsonl")),
        ("generate jobs", "sample.jobs.read_jobs", "sample.journal.begin"),
        2,
        True,
    ),
    "jobs of a folder": Reader(
        lambda path, setting: _jobs(path, setting, path.parent, "--control", path.parent / "control"), (), 2
    ),
    "generate --vae": Reader(
        lambda path, setting: _generate(path, setting, "--vae", path), ("generate vae", "evaluate vae", "verify vae"), 4
    ),
    "generate --lora": Reader(
        lambda path, setting: _generate(path, setting, "--lora", f"{path}=0.5"), ("generate lora", "evaluate lora"), 4
    ),
    "generate --embedding": Reader(
        lambda path, setting: _generate(path, setting, "--embedding", path), ("generate embedding",), 4
    ),
    "request": Reader(_request, ("sample.request._Checked.from_json",)),
    "single file": Reader(lambda path, setting: load_base(path), ("backbones.load.load_base", "generate base"), 2),
    "vae": Reader(lambda path, setting: load_base(setting.toy, vae=path), (), 2),
    "lora": Reader(lambda path, setting: load_base(setting.toy, loras=[(path, 0.5)]), ()),
    "embedding": Reader(lambda path, setting: load_base(setting.toy, embeddings=[path]), ()),
    "base": Reader(
        lambda path, setting: load_base(path),
        (
            "backbones.rules.check_folder",
            "backbones.rules.config_path",
            "backbones.rules.read_config",
            "backbones.rules.read_settings",
            "backbones.parts.open_part",
            "backbones.parts.read_tokenizer",
        ),
    ),
    "recipe": Reader(_recipe, ("train.recipe.read_recipe", "train recipe"), 1, True),
    "train recipe": Reader(_train_recipe, (), 2, True),
    "poses": Reader(
        lambda path, setting: draw_people(
            *people_from_json(read_text(inside(path.parent, path.with_name("poses.json")), 2**20))
        ),
        (),
    ),
    "listing": Reader(lambda path, setting: read_listing(_folder(path)), _SETS),
    "training pairs": Reader(_pairs, ("data.pairs.split_folder",), 3),
    "train": Reader(_train, (), 12),
    "build": Reader(_build, ("data build path", "data build column"), 3),
    "caption": Reader(
        lambda path, setting: command("data", "caption", _folder(path), "--replace", "all"),
        ("data caption path", "data caption column"),
        4,
    ),
    "draw on": Reader(
        lambda path, setting: list(make_fill50k(path, 2, 32)), ("data.drawn.make_fill50k", "data make fill50k out")
    ),
    "build on": Reader(_build_on, ("data build out",)),
    "watch": Reader(_watch, ("watch run",)),
    "watch lines": Reader(_watch_lines, ("train.watch.read_run",)),
    "ending": Reader(lambda path, setting: read_ending(path), ("train.ending.read_ending",)),
    "resume": Reader(
        _resume,
        (
            "train out",
            "train.run.train_control",
            "train.checkpoints.load_checkpoint",
            "train.checkpoints.read_facts",
            "train.records.read_log",
            "train.checkpoints.cut_log",
            "train.checkpoints.check_folder",
            "train.checkpoints.begin_folder",
            "train.checkpoints.keep_format",
            "data.cache.Cached.read",
            "tensors.writer.read_filled",
        ),
        6,
    ),
    "from step": Reader(
        lambda path, setting: go_back(path, 1), ("train.checkpoints.go_back", "train.checkpoints.checkpoints_in"), 4
    ),
    "start from": Reader(_start_from, (), 12),
    "store": Reader(_store, ("data.store.Store.get",)),
    "opponent": Reader(
        lambda path, setting: (load_baseline(path, setting.base), Curve.of(path).page()),
        ("baselines.saved.load_baseline", "baselines.saved.read_about", "baselines.curves.Curve.of", *_OPPONENTS),
        2,
    ),
    "opponent's training": Reader(_go_on, ("baselines.training.train_baseline", "baseline train out"), 4),
    "earlier report": Reader(_earlier, ("reproduce.rows.Earlier.read", "reproduce.rows.read_strip")),
    "measured": Reader(lambda path, setting: read_measured(path, SAME), ("reproduce.trained.read_measured",)),
    "answers": Reader(
        lambda path, setting: read_answers(path / "answers.csv", STUDY), ("reproduce.study.read_answers",)
    ),
    "tuning": Reader(
        lambda path, setting: tuned(setting.base, TUNING, path),
        ("reproduce.transfer.tuned", "reproduce.transfer.make_transfer"),
        4,
    ),
}
"""Each way in, by its name."""

_WRITES = "writes; what it is given comes from here"
_INNER = "is called by a reader in the list with what that has read"
EXCUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "backbones.load.save_difference",
            "baselines.curves.write_curve",
            "baselines.saved.save_baseline",
            "baselines.saved.write_about",
            "data.drawn.make_scenes",
            "data.store.Store.put",
            "files.mark_output",
            "files.scratch_folder",
            "files.sweep",
            "files.write_atomic",
            "formats.control.save_control",
            "formats.control.write_folder",
            "formats.control.write_tensors",
            "formats.convert.save_control_lora",
            "formats.convert.write",
            "images.write_png",
            "mini.stored.Stored.save",
            "mini.tower.train_tokenizer",
            "train.checkpoints.save_checkpoint",
            "train.ending.Ending.write",
            "train.ending.next_command",
            "train.ending.train_command",
            "train.trackers._Hosted.send",
            "train.trackers._TensorBoard.send",
            "train.trackers.tracked",
            "reproduce.auto.make_auto",
            "reproduce.cfg.make_cfg",
            "reproduce.compare.make_comparison",
            "reproduce.convergence.make_convergence",
            "reproduce.depth.make_depth",
            "reproduce.entrants.write_report",
            "verify.page.write_verification",
            "reproduce.fig8.make_fig8",
            "reproduce.rows.strip_path",
            "reproduce.rows.write_strip",
            "reproduce.scale.make_scale",
            "reproduce.compose.make_compose",
            "reproduce.cost.make_cost",
            "reproduce.limits.make_limits",
            "reproduce.study.write_study",
            "reproduce.table1.make_table1",
            "reproduce.table2.make_table2",
            "reproduce.table3.make_table3",
            "reproduce.trained.Examiner.follow",
            "reproduce.trained.pictures_at",
            "reproduce.trained.run_folder",
        ),
        _WRITES,
    ),
    **dict.fromkeys(
        (
            "baselines.saved.put",
            "reproduce.entrants.advice",
            "reproduce.entrants.entrant",
            "reproduce.entrants.training",
            "reproduce.trained.cost_of",
            "reproduce.trained.shown_at",
            "baselines.training.material_of",
            "data.build.build_set",
            "data.layouts.rows.is_within",
            "data.layouts.rows.parts_of_text",
            "decoding.boxes.avif",
            "decoding.boxes.codestream",
            "decoding.heads.head_of",
            "decoding.heads.orientation",
            "files.encoding_of",
            "files.held",
            "files.inside",
            "files.read_bytes",
            "files.read_json",
            "hub.is_shipped",
            "tensors.reader.of_tensors",
            "data.cache.build_cache",
            "data.captions.captioned",
            "data.layouts.folders.by_name",
            "data.layouts.folders.caption_beside",
            "data.layouts.folders.caption_file",
            "data.layouts.folders.namesakes",
            "data.layouts.folders.paired",
            "data.layouts.folders.words_of",
            "data.layouts.rows.file_at",
            "data.layouts.rows.inside",
            "data.layouts.rows.is_there",
            "data.layouts.rows.text_of",
            "data.layouts.tree.Tree.leave_out",
            "data.layouts.tree.Tree.under",
            "data.store.key_of",
            "data.store.remembered",
            "data.workers.parallel_map",
            "files.decode_text",
            "files.home_path",
            "files.is_output",
            "files.parse_json",
            "files.read_text",
            "formats.control.spec_of_weights",
            "formats.control.type_of",
            "formats.convert.attach",
            "formats.convert.convert",
            "formats.metadata.metadata_entry",
            "formats.networks.read_network",
            "hub.meant_path",
            "tensors.pickles.unreadable",
            "train.checkpoints.sole_owner",
            "train.ranks.Ranks.check_shared",
            "train.run.prepare",
        ),
        _INNER,
    ),
    **dict.fromkeys(
        ("serve.studio.controls_for", "serve.studio.old_hash"),
        "reads a folder of one's own by describe and metadata_entry, which are in the list",
    ),
    **dict.fromkeys(
        ("backbones.load.add_words", "backbones.load.merge_loras"), "is a part of load_base, by the readers of LoRAs"
    ),
    **dict.fromkeys(
        (
            "serve.loras.add_embeddings",
            "serve.loras.check_loras",
            "serve.loras.told_loras",
            "serve.loras.weights_in",
        ),
        "looks names up in a folder of one's own; its files are read by merge_loras and add_words",
    ),
    "serve.front.as_base64": _WRITES,
    "serve.worker.opened": "gives the folders to controls_for and serve.loras",
    **dict.fromkeys(
        (
            "hub.Package.check",
            "hub.Package.command",
            "hub.Package.unpack",
            "hub.Wheel.check",
            "hub.Wheel.command",
            "hub.Wheel.unpack",
        ),
        "packages of the registries, each known by its digest before anything in it is read",
    ),
    **dict.fromkeys(
        (
            "annotators.networks.weights.check_shapes",
            "annotators.networks.weights.file_digest",
            "annotators.networks.weights.file_state",
            "annotators.networks.weights.network_of",
        ),
        "annotators' weights, which go through ``tensors.open_tensors``",
    ),
    "data.blip.read_blip": "a captioner, whose folder goes through the doors of a base's folder",
    "mini.stored.Stored.load": "reads what is shipped in the package alone",
}
"""Functions that take a path or bytes, and why no reader is theirs."""
EXCUSED_OPTIONS: dict[str, str] = {
    **dict.fromkeys(
        (
            "annotate annotator",
            "annotate device",
            "annotate option",
            "annotate size",
            "baseline train base",
            "baseline train device",
            "baseline train hint",
            "baseline train name",
            "baseline train rate",
            "bench sample device",
            "bench sample size",
            "convert annotator",
            "convert dtype",
            "convert prefix",
            "convert to",
            "data build annotator",
            "data build captions",
            "data build device",
            "data build layout",
            "data build replace",
            "data build size",
            "data caption device",
            "data caption replace",
            "data doctor annotator",
            "data make scenes hint",
            "evaluate annotator",
            "evaluate device",
            "evaluate referee",
            "evaluate protocol",
            "verify device",
            "verify dtype",
            "verify hint",
            "generate annotator",
            "generate grid",
            "generate device",
            "generate dialect",
            "generate lora_dir",
            "generate scheduler",
            "generate dtype",
            "generate guider",
            "generate memory",
            "generate outpaint",
            "generate resize",
            "generate negative_prompt",
            "generate prompt",
            "generate size",
            "generate speed",
            "serve allow_origin",
            "serve device",
            "serve dtype",
            "serve host",
            "serve memory",
            "serve token",
            "reproduce base",
            "reproduce device",
            "reproduce name",
            "train changes",
            "train device",
            "where name",
        ),
        "a word of the user's own",
    ),
    **dict.fromkeys(
        (
            "annotate out",
            "bench sample report",
            "convert target",
            "data doctor out",
            "data make scenes out",
            "evaluate json_file",
            "evaluate report_file",
            "verify out",
            "generate out",
            "serve state",
            "reproduce out",
            "watch html",
        ),
        "a place to write",
    ),
    "data build captioner": "a model of the transformers library, read by that alone: not promised (docs/safety.md)",
    "data caption captioner": "as data build's",
    "generate captioner": "as data build's",
    **dict.fromkeys(("serve base", "serve lora", "serve vae"), "read as generate's"),
    "serve controls": "read by controls_for",
    **dict.fromkeys(("serve embeddings", "serve loras"), "looked through by serve.loras.weights_in"),
}
"""Options of commands that take text or a path, and why no reader is theirs."""


def taking_files() -> set[str]:
    """The package's public functions that take a path or bytes, by their names below ``controlkit``."""
    found = set()
    for module in pkgutil.walk_packages(controlkit.__path__, "controlkit."):
        if ".cli" in module.name or module.name.endswith("__main__"):
            continue
        held = vars(importlib.import_module(module.name))
        classes = [one for one in held.values() if isinstance(one, type) and one.__module__ == module.name]
        for owner, values in (("", held), *((f"{one.__qualname__}.", vars(one)) for one in classes)):
            for name, value in values.items():
                function = getattr(value, "__func__", value)
                if (
                    not inspect.isfunction(inspect.unwrap(function))
                    or function.__module__ != module.name
                    or name.startswith("_")
                ):
                    continue
                notes = {key: str(note) for key, note in function.__annotations__.items() if key != "return"}
                if any(re.search(r"\b(Path|bytes)\b", re.sub(r"Callable\[.*", "", note)) for note in notes.values()):
                    found.add(f"{module.name.removeprefix('controlkit.')}.{owner}{name}")
    return found


def options_for_files() -> set[str]:
    """The options and arguments of all commands that take text or a path, as ``command option``."""
    found, groups = set(), [("", cli.app)]
    while groups:
        prefix, group = groups.pop()
        for inner in group.registered_groups:
            groups.append((f"{prefix}{inner.name} " if inner.name else prefix, inner.typer_instance))
        for one in group.registered_commands:
            notes = typing.get_type_hints(one.callback)
            named = [option for option, note in notes.items() if re.search(r"\b(Path|str)\b", str(note))]
            found |= {f"{prefix}{one.name or one.callback.__name__} {option}" for option in named if option != "return"}
    return found
