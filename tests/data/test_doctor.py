"""The data doctor: each thing that can be wrong is named rightly, and decides whether training may start."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from controlkit.annotators import annotator, contract
from controlkit.data import FolderPairs, add_up, examine, hint_for_pair, make_fill50k, read_listing, sheet_rows
from controlkit.decoding import MOST_PIXELS
from controlkit.errors import UserError
from controlkit.images import HintSpec, write_png
from controlkit.train import resolve, train_control
from controlkit.train.recipe import ControlRecipe, Recipe
from controlkit.train.setup import training_pairs

SIDE = 32


@pytest.fixture
def tutorial(tmp_path):
    """Three sound pairs."""
    list(make_fill50k(tmp_path / "set", 3, SIDE))
    return tmp_path / "set"


def report_of(folder, contract=None):
    listing = read_listing(folder)
    return add_up(listing, examine(listing, contract), contract)


def as_16_bit(path):
    Image.fromarray(np.linspace(0, 40_000, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)).save(path)


def ramp(width, height, colours=("black", "white")):
    """From one colour to another."""
    grey = Image.linear_gradient("L").resize((width, height))
    return Image.composite(*(Image.new("RGB", grey.size, colour) for colour in reversed(colours)), grey)


def as_mode(mode, suffix):
    def write(path):
        with Image.open(path) as opened:
            picture = opened.convert(mode)
        picture.save(path, suffix)

    return write


def huge(path):
    Image.new("1", (MOST_PIXELS // 1000 + 1, 1000)).save(path)


def cut(path):
    path.write_bytes(path.read_bytes()[:60])


BROKEN = {  # what is done to target/1.png or source/1.png: kind, fatal, change
    "corrupt": ("target", cut, "unreadable picture", True),
    "zero bytes": ("target", lambda path: path.write_bytes(b""), "empty file", True),
    "no picture": ("source", lambda path: path.write_bytes(b"hello"), "unreadable picture", True),
    "huge": ("target", huge, "huge picture", True),
    "missing": ("source", lambda path: path.unlink(), "missing file", True),
    "another shape": ("source", lambda path: ramp(64, 32).save(path), "sizes differ", True),
    "another size": ("source", lambda path: ramp(64, 64).save(path), "sizes differ", False),
    "16 bits": ("target", as_16_bit, "16 bits", False),
    "another kind": ("source", as_16_bit, "kinds differ", True),
    "palette": ("source", as_mode("P", "PNG"), "palette", False),
    "CMYK": ("target", as_mode("CMYK", "JPEG"), "CMYK", False),
    "32 bits": ("source", lambda path: Image.fromarray(np.zeros((SIDE, SIDE), np.float32)).save(path, "TIFF"),
                "unreadable picture", True),
    "black": ("source", lambda path: Image.new("RGB", (SIDE, SIDE)).save(path), "empty hint", False),
    "white all over": ("source", lambda path: Image.new("RGB", (SIDE, SIDE), "white").save(path), "empty hint", False),
    "clear all over": ("source", lambda path: Image.new("RGBA", (SIDE, SIDE)).save(path), "empty hint", False),
    "coloured": ("source", lambda path: ramp(SIDE, SIDE, ("black", "red")).save(path), "colours in a hint", False),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_one_broken_picture_is_named_with_its_kind_and_its_file(name, tutorial):
    place, change, kind, fatal = BROKEN[name]
    sound = report_of(tutorial, annotator("canny").spec())
    assert sound.problems == [] and sound.may_train
    change(tutorial / place / "1.png")
    report = report_of(tutorial, annotator("canny").spec())
    assert [(p.kind, p.fatal) for p in report.problems if p.kind != "transparency"] == [(kind, fatal)]
    assert f"{place}/1.png" in report.problems[0].where or kind == "kinds differ"
    assert report.may_train is not fatal


def test_a_report_counts_pairs_sizes_captions_and_hints(tutorial):
    report = report_of(tutorial, annotator("canny").spec())
    facts = report.to_json()
    assert (facts["layout"], facts["rows"], facts["with_hints"], facts["may_train"]) == ("prompt.json", 3, 3, True)
    assert facts["picture_sizes"] == {"32x32": 3}
    assert 4 <= facts["caption_words"]["least"] <= facts["caption_words"]["most"] <= 9
    assert 0.01 < facts["hint_mean_grey"] < 0.4
    assert json.loads(json.dumps(facts)) == facts
    assert [len(row) for row in sheet_rows(report)] == [3, 3]


def test_the_same_picture_twice_is_a_note(tutorial):
    (tutorial / "target/2.png").write_bytes((tutorial / "target/0.png").read_bytes())
    report = report_of(tutorial)
    assert [(p.kind, p.fatal) for p in report.problems] == [("duplicate", False)]
    assert "target/2.png" in report.problems[0].where and "target/0.png" in report.problems[0].words


def test_pictures_without_a_caption_among_others_are_counted(tutorial):
    text = (tutorial / "prompt.json").read_text().splitlines()
    text[1] = json.dumps(json.loads(text[1]) | {"prompt": ""})
    (tutorial / "prompt.json").write_text("\n".join(text))
    (problem,) = report_of(tutorial).problems
    assert (problem.kind, problem.fatal, problem.words) == ("no caption", False, "1 of 3 pictures have none")


def test_dark_lines_on_light_are_refused_for_an_annotator_of_light_ones(tutorial):
    for path in (tutorial / "source").glob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    report = report_of(tutorial, annotator("canny").spec())
    assert [p.kind for p in report.problems] == ["hints inverted"] and not report.may_train
    assert report_of(tutorial).may_train, "nobody said what the hints are"


ALONE = [name for name, (*_, fatal) in BROKEN.items() if fatal and name != "another kind"]
"""What is wrong with a pair by itself; beside others the cache refuses it."""


@pytest.mark.parametrize("name", ALONE)
def test_what_the_doctor_refuses_is_not_trained_on_unsaid(name, tutorial):
    place, change, _, _ = BROKEN[name]
    contract = annotator("canny").spec()
    change(tutorial / place / "1.png")
    with pytest.raises(UserError, match=r"1\.png|A hint|controlkit data doctor"):
        [hint_for_pair(pair, contract) for pair in FolderPairs(tutorial, SIDE)]


def test_a_run_does_not_begin_with_lines_the_wrong_way_round(tutorial, toy_base, tmp_path):
    for path in (tutorial / "source").glob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    recipe = Recipe(base="toy", control={"annotator": "canny"}, data={"source": str(tutorial)})
    with pytest.raises(UserError, match=r"inverted: their mean grey is 0.9.: canny is light lines on black"):
        next(train_control(recipe, tmp_path / "run", toy_base))
    assert not (tmp_path / "run").exists()
    training_pairs(resolve(recipe.model_copy(update={"control": ControlRecipe(annotator="")})).data, toy_base)


def test_hints_that_training_will_make_are_on_the_sheet(tutorial):
    for name in ("prompt.json", "drawn.json"):
        (tutorial / name).unlink()
    for path in (tutorial / "source").glob("*.png"):
        path.unlink()
    report = report_of(tutorial, annotator("canny").spec())
    assert report.layout == "pictures" and report.hints == 0 and report.may_train
    assert [len(row) for row in sheet_rows(report)] == [3, 3]
    assert all(set(np.unique(hint)) <= {0, 255} for _, hint in report.shown)
    assert [p.kind for p in report.problems] == ["no captions"], "a number is no name"


# --- what appears at the size trained at ----------------------------------------------------------------------


def notes_at(folder, size, contract=None, unread=lambda prompt: ""):
    listing = read_listing(folder)
    report = add_up(listing, examine(listing, contract, size=size), contract, unread)
    assert report.may_train
    return report, {(problem.kind, problem.where.rpartition("/")[2]): problem.words for problem in report.problems}


def test_pictures_that_are_enlarged_much_are_noted_and_the_share_cut_away_is_told(tmp_path):
    for name, size in {"small": (20, 20), "just": (22, 40), "wide": (128, 64), "tall": (32, 96)}.items():
        write_png(tmp_path / f"a {name} hat.png", np.full((*size[::-1], 3), len(name) * sum(size) % 250, np.uint8))
    report, notes = notes_at(tmp_path, 32)
    assert list(notes) == [("enlarged", "a small hat.png")] and "enlarged 1.6 times to 32 pixels" in str(notes)
    assert report.to_json()["cropped_away"] == {
        "mean": pytest.approx((0.45 + 0.5 + 2 / 3) / 4, abs=1e-3),
        "most": 0.6667,
    }
    assert notes_at(tmp_path, 16)[1] == {} and len(notes_at(tmp_path, 200)[1]) == 4
    assert report_of(tmp_path).to_json()["cropped_away"] is None, "nobody said what size"


def test_duplicates_and_empty_hints_that_only_appear_at_the_size_trained_at_are_noted(tutorial):
    first = np.asarray(Image.open(tutorial / "target/0.png"))
    write_png(tutorial / "target/2.png", np.kron(first, np.ones((2, 2, 1), np.uint8)))  # the same at half its size
    dot = np.zeros((128, 128, 3), np.uint8)
    dot[2, 2] = 40
    write_png(tutorial / "source/1.png", dot)
    soft, canny = HintSpec("canny", resize="area"), annotator("canny").spec()
    _, notes = notes_at(tutorial, 8, soft)
    assert {kind for kind, _ in notes} == {"duplicate", "empty hint", "sizes differ"}
    assert "at the size trained at the very picture" in notes["duplicate", "2.png"]
    assert "once it has 8 pixels" in notes["empty hint", "1.png"]
    assert {kind for kind, _ in notes_at(tutorial, 8, canny)[1]} == {"duplicate", "sizes differ"}, "lines do not fade"
    assert {problem.kind for problem in report_of(tutorial, canny).problems} == {"sizes differ"}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_noted_and_opaque_pictures_of_such_a_mode_are_not(mode, tutorial):
    clear = Image.new("RGBA", (SIDE, SIDE), (200, 10, 10, 255))
    clear.convert(mode).save(tutorial / "target/1.png")
    assert not [p for p in report_of(tutorial).problems if p.kind == "transparency"]
    clear.putpixel((3, 3), (0, 0, 0, 0))
    saved = clear.quantize(8) if mode == "P" else clear.convert(mode)
    saved.save(tutorial / "target/1.png")
    [note] = [p for p in report_of(tutorial).problems if p.kind == "transparency"]
    assert not note.fatal and note.words == "is transparent in places: laid on white"


def test_captions_longer_than_the_text_tower_reads_are_noted_with_what_is_not_read(tutorial, toy_base):
    lines = [json.loads(line) for line in (tutorial / "prompt.json").read_text().splitlines()]
    lines[1]["prompt"] = "a red apple " * 30 + "and the end"
    lines[2]["prompt"] = "é" * 500
    (tutorial / "prompt.json").write_text("\n".join(map(json.dumps, lines)))
    _, notes = notes_at(tutorial, 32, unread=toy_base.cut_words)
    assert set(notes) == {("long caption", "1.png"), ("long caption", "2.png")}
    assert re.search('not its last [67][0-9] words, from "(a |red |apple )+', notes["long caption", "1.png"])
    assert all(len(words) < 300 for words in notes.values())


def test_the_doctor_refuses_what_training_refuses_for_the_set_as_a_whole(tutorial, toy_base):
    """Too few pairs, and hints that nothing makes: each was passed, and refused when the run began."""
    lines = (tutorial / "prompt.json").read_text().splitlines()
    (tutorial / "prompt.json").write_text("\n".join(lines[:2]))
    few = report_of(tutorial, annotator("canny").spec())
    assert [p.kind for p in few.problems if p.fatal] == ["too few"] and not few.may_train
    for name in ("prompt.json", "drawn.json"):
        (tutorial / name).unlink()
    shutil.rmtree(tutorial / "source")
    bare = report_of(tutorial, contract("depth"))
    assert "no hints" in [p.kind for p in bare.problems if p.fatal]
    recipe = Recipe(
        base="toy", control={"annotator": "depth"}, data={"source": str(tutorial), "columns": {"image": "."}}
    )
    with pytest.raises(UserError, match='nothing here makes hints of "depth"'):
        training_pairs(resolve(recipe).data, toy_base)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["--low", "nan"], "--low"), (["--high", "nan"], "--high"), (["--high", "inf"], "inf is no finite number"),
        (["--low", "1"], "--low is 1 and --high 1; expected --low below --high"), (["--high", "-2"], "--low below"),
    ],
)  # fmt: skip
def test_the_range_that_hints_are_held_against_is_one(values, words, run, tutorial, tmp_path):
    code, out, said = run("data", "doctor", tutorial, "--annotator", "depth", "--out", tmp_path / "told", *values)
    assert (code, out) == (2, "") and words in said and not (tmp_path / "told").exists()


def test_lists_that_are_cut_say_how_many_more_there_are(run, tmp_path):
    for i in range(8):
        write_png(tmp_path / "set" / f"a hat {'abcdefgh'[i]}.png", np.full((40 + i, 40, 3), 9 * i, np.uint8))
    (tmp_path / "set" / "a.mp4").write_bytes(b"")
    (tmp_path / "set" / "b.mp4").write_bytes(b"")
    code, out, _ = run("data", "doctor", tmp_path / "set", "--out", tmp_path / "told", "--size", 96)
    assert code == 0 and ", and 3 more sizes" in out and "(2 of .mp4)" in out and "cut away to make squares: " in out
    assert "note: enlarged, 8 times; the first: " in out
    facts = json.loads((tmp_path / "told" / "report.json").read_text())
    assert sum(problem["kind"] == "enlarged" for problem in facts["problems"]) == 8, "all of them are in the report"
