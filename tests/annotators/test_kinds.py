"""The table of kinds of hints: a kind registered here works everywhere, and no other table names kinds."""

import ast
import importlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
from pydantic import Field

import controlkit
from controlkit.annotators import (
    HintKind,
    all_kinds,
    annotate,
    annotate_all,
    annotator,
    contract,
    each,
    kind_of,
    kind_or_bare,
    kinds,
    register,
)
from controlkit.annotators.regions import tile
from controlkit.controls import TYPES
from controlkit.data import (
    CirclePairs,
    Pair,
    build_cache,
    examine,
    hint_for_pair,
    mirrored,
    read_listing,
)
from controlkit.data.store import Store
from controlkit.errors import Invalid, NotFound, Unsupported
from controlkit.formats import load_control
from controlkit.images import read_picture, write_png
from controlkit.measure import metric_of
from controlkit.train import train_control
from controlkit.train.recipe import parse_recipe
from controlkit.train.setup import resolve, training_pairs

PLACES = ("annotators", "options", "kinds", "truths")  # in the help, until it is asked for
LEVEL = Annotated[float, Field(ge=0, le=255)]


@pytest.fixture
def calls():
    return []


@pytest.fixture
def toy(monkeypatch, calls):
    """A kind that nothing else knows: what is light at the left of its picture is red, at the right blue."""

    def ridges(pictures, device, *, level: LEVEL = 128.0):
        calls.append((len(pictures), device))
        return [ridge(picture, level) for picture in pictures]

    monkeypatch.setattr(kinds, "_KINDS", dict(kinds._KINDS))
    return register(
        HintKind(
            "ridge",
            ridges,
            aliases=("crest",),
            resize="nearest",
            metric="edge_f1",
            union_type=8,
            mirror=lambda flipped, spec: np.ascontiguousarray(flipped[..., ::-1]),
            folders=("ridge",),
        )
    )


def ridge(picture, level=128.0):
    light = np.where(picture.max(-1) > level, 255, 0).astype(np.uint8)
    hint, half = np.zeros_like(picture), picture.shape[1] // 2
    hint[:, :half, 0], hint[:, half:, 2] = light[:, :half], light[:, half:]
    return hint


@pytest.fixture
def pictures():
    return [pair.picture for pair in CirclePairs(32, 8)]


@pytest.fixture
def folder(tmp_path, pictures):
    for i, picture in enumerate(pictures):
        write_png(tmp_path / f"set/circle {i}.png", picture)
    return tmp_path / "set"


# --- a kind of one's own --------------------------------------------------------------------------------------------


def test_a_kind_of_one_s_own_annotates(toy, calls, pictures):
    assert np.array_equal(annotate(pictures[0], contract("ridge")), ridge(pictures[0]))
    assert np.array_equal(annotate(pictures[0], kind_of("crest").spec(level=40)), ridge(pictures[0], 40))
    assert contract("crest") == contract("ridge") and contract("ridge").resize == "nearest"
    calls.clear()
    made = annotate_all(pictures, contract("ridge+canny"), device="cuda")
    assert calls == [(8, "cuda")] and made[3].shape == (32, 32, 6), "all pictures at once, where it is told to"
    assert annotate(pictures[0], contract("ridge"), (16, 16)).shape == (16, 16, 3)


def test_a_kind_of_one_s_own_annotates_by_the_command_line(toy, run, folder, pictures, tmp_path):
    code, _, err = run("annotate", "ridge", folder / "circle 0.png", "--option", "level=40", "--out", tmp_path / "a")
    assert code == 0, err
    assert np.array_equal(read_picture(tmp_path / "a/circle 0.png"), ridge(pictures[0], 40))
    for option, words in (
        ("levle=40", 'ridge has no "levle": did you mean "level"?'),
        ("level=300", "\"level\" is '300'; expected less than or equal to 255"),
        ("level=high", "\"level\" is 'high'; expected a valid number"),
        ("level", "expected KEY=VALUE"),
    ):
        code, _, err = run("annotate", "ridge", folder / "circle 0.png", "--option", option)
        assert code == 2 and words in err


@pytest.mark.parametrize("command", [["annotate"], ["data", "doctor"], ["data", "build"]], ids=" ".join)
def test_a_kind_of_one_s_own_stands_in_the_help(command, toy, run):
    code, out, _ = run(*command, "--help")
    assert code == 0 and "ridge" in out and "canny" in out and not any(f"{{{name}}}" in out for name in PLACES)
    assert bool(re.search(r"\bdepth\b", out)) == (command != ["annotate"]), "of annotate those alone that can be made"


def test_a_kind_of_one_s_own_is_shown_by_the_doctor(toy, run, folder, pictures, tmp_path):
    shown = [finding.shown for finding in examine(read_listing(folder), contract("ridge"))]
    assert all(np.array_equal(hint, ridge(picture)) for picture, hint in shown)
    code, out, _ = run("data", "doctor", folder, "--annotator", "ridge", "--out", tmp_path / "doctor")
    assert code == 0 and "may start" in out and (tmp_path / "doctor/sheet.png").is_file()


def test_a_kind_of_one_s_own_is_built_and_its_folder_is_known(toy, run, folder, pictures, tmp_path):
    code, _, err = run("data", "build", folder, "--annotator", "ridge", "--layout", "paired", "--out", tmp_path / "out")
    assert code == 0, err
    hints = tmp_path / "out/conditioning_data_dir"
    assert np.array_equal(read_picture(hints / "0.png"), ridge(pictures[0]))
    hints.rename(tmp_path / "out/ridge")
    listing = read_listing(tmp_path / "out")
    assert listing.layout == "paired" and all(row.hints for row in listing.rows) and len(listing.rows) == 8


def test_a_kind_of_one_s_own_trains_is_measured_and_saved(toy, toy_base, folder, tmp_path):
    recipe = parse_recipe({
        "data": {"source": str(folder), "flip": 0.5}, "control": {"annotator": "ridge", "options": {"level": 60}},
        "steps": 10, "batch": 2, "evaluation": {"every": 10, "num": 2, "steps": 1},
    })  # fmt: skip
    *_, last = train_control(recipe, tmp_path / "run", toy_base)
    assert last.step == 10 and last.evaluation.metric == "edge_f1"
    saved = load_control(tmp_path / "run", toy_base)
    assert saved.hint == toy.spec(level=60) and metric_of(saved.hint).name == "edge_f1"


def test_a_kind_of_one_s_own_is_mirrored_by_its_rule(toy, pictures):
    plain, own = Pair(pictures[0], "a circle"), Pair(pictures[0], "a circle", ridge(pictures[0]))
    hints = [hint_for_pair(mirrored(pair, contract("ridge")), contract("ridge")) for pair in (plain, own)]
    assert np.array_equal(*hints) and np.array_equal(hints[0], ridge(pictures[0][:, ::-1]))


def test_a_kind_of_one_s_own_may_be_a_union_s_type(toy):
    assert TYPES["ridge"] == TYPES["crest"] == 8 and list(TYPES)[-2:] == ["crest", "ridge"]


# --- what a cache may keep ------------------------------------------------------------------------------------------


def test_a_cache_makes_hints_at_once_and_anew_when_what_made_them_changes(toy, calls, toy_base, pictures, tmp_path):
    pairs, times = [Pair(picture, "") for picture in pictures], iter(range(9))
    with Store(tmp_path / "store") as store:

        def made(**changes):
            calls.clear()
            kinds._KINDS["ridge"] = replace(toy, **changes)
            build_cache(toy_base, pairs, {"": contract("ridge")}, tmp_path / str(next(times)), store=store)
            return calls[:]

        assert made() == [(8, "cpu")]
        assert made() == [] == made(metric="miou"), "how it is measured changes no hint"
        assert made(version=2) == [(8, "cpu")]
        assert made(weights=lambda: "abc") == [(8, "cpu")] and made(weights=lambda: "abc") == []
        assert made(weights=lambda: "abd") == [(8, "cpu")]


def test_the_digest_is_of_the_file_the_function_is_written_in(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    digests = []
    for number in range(2):
        name = f"own_annotator_{number}"
        (tmp_path / f"{name}.py").write_text(f"def make(picture, width: float = 1.0):\n    return picture * {number}\n")
        function = importlib.import_module(name).make
        digests.append([HintKind("own", each(function)).digest(), HintKind("own", each(function)).digest()])
    assert digests[0][0] == digests[0][1] != digests[1][0]
    assert kind_of("canny").digest() != kind_of("lineart").digest()


# --- rows and names -------------------------------------------------------------------------------------------------


def test_a_missing_extra_is_named_with_the_command_that_installs_it(pictures):
    def deep(pictures, device):
        import no_such_network  # noqa: F401

    with pytest.raises(Unsupported, match=r"deep needs the extra annotators .*pip install 'controlkit\[annotators\]'"):
        HintKind("deep", deep, extra="annotators").make(pictures)
    with pytest.raises(ModuleNotFoundError):
        HintKind("deep", deep).make(pictures)
    with pytest.raises(Unsupported, match='Nothing here makes hints of "depth"'):
        kind_of("depth").make(pictures)


def test_a_name_is_registered_once_and_resolves_by_its_aliases(toy):
    for name in ("canny", "openpose", "crest", "", "canny+depth"):
        with pytest.raises(Invalid, match="name of its own"):
            register(HintKind(name))
    assert kind_of("openpose") is kind_of("pose") and contract("openpose").annotator == "pose"
    assert kind_or_bare("never heard of") == HintKind("never heard of") and kind_of("").name == ""
    with pytest.raises(NotFound, match='no hints named "depht": did you mean "depth"'):
        kind_of("depht")


def test_options_have_ranges_and_defaults():
    fields = {(kind.name, key): value for kind in all_kinds() for key, value in kind.options.model_fields.items()}
    assert len(fields) == 56 and all(field.metadata for field in fields.values()), "each a range"
    for name, key, value in (
        ("canny", "low", -1),
        ("mlsd", "width", 0),
        ("tile", "shrink", 0.5),
        ("inpaint", "most", 1),
    ):
        with pytest.raises(Invalid, match=f'{name}: "{key}" is {value}; expected'):
            annotator(name).spec(**{key: value})
    with pytest.raises(Invalid, match="expected a finite number"):
        annotator("canny").spec(low=float("nan"))
    with pytest.raises(Invalid, match='depth has no "scale": Known: none'):
        kind_of("depth").spec(scale=1)


@pytest.mark.parametrize("command", ["doctor", "build"])
def test_the_doctor_and_build_make_the_tiles_that_training_makes(command, run, folder, pictures, tmp_path, toy_base):
    recipe = parse_recipe({"data": {"source": str(folder)}, "control": {"annotator": "tile"}, "steps": 1})
    plan = resolve(recipe).data
    [spec], (pairs, _) = plan.specs.values(), training_pairs(plan, toy_base)
    assert np.array_equal(hint_for_pair(pairs[0], spec), tile(pairs[0].picture, 8.0)) and contract("tile") == spec
    if command == "doctor":
        assert run("data", "doctor", folder, "--annotator", "tile", "--out", tmp_path / "out")[0] == 0
        sheet = read_picture(tmp_path / "out/sheet.png")
        assert np.abs(np.diff(sheet[136:264, 4:132].astype(int), axis=1)).max() < 60, "no outline is left"
        made = next(examine(read_listing(folder), contract("tile"))).shown[1]
    else:
        assert run("data", "build", folder, "--annotator", "tile", "--out", tmp_path / "out")[0] == 0
        made = read_picture(tmp_path / "out/conditioning_images/0.png")
    assert np.array_equal(made, tile(pictures[0], 8.0)) and not np.array_equal(made, pictures[0])


def test_no_other_module_has_a_table_of_kinds():
    names = {name for kind in all_kinds() for name in (kind.name, *kind.aliases)}
    root = Path(controlkit.__file__).parent
    names_of = ("annotators/kinds.py", "annotators/networks/rows.py", "serve/catalogue.py", "measure/protocol.py")
    tables = [root / name for name in names_of]
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = getattr(node, "elts", None) or getattr(node, "keys", None) or ()
            listed = {part.value for part in parts if isinstance(part, ast.Constant)} & names
            known = path in tables or path.parent.name in ("baselines", "reproduce")  # each experiment names its hints
            assert len(listed) < 2 or known, f"{path}, line {node.lineno}: {listed}"
