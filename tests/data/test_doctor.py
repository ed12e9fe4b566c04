"""The data doctor: each thing that can be wrong is named rightly, and decides whether training may start."""

import json

import numpy as np
import pytest
from PIL import Image

from controlkit.annotators import annotator
from controlkit.data import FolderPairs, add_up, doctor, examine, hint_for_pair, make_fill50k, read_listing, sheet_rows
from controlkit.errors import UserError
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
    Image.new("1", (doctor.MOST_PIXELS // 1000 + 1, 1000)).save(path)


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
    assert [(p.kind, p.fatal) for p in report.problems] == [(kind, fatal)]
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
    above, below = sheet_rows(report, SIDE)
    assert len(above) == 3 and all(set(np.unique(hint)) <= {0, 255} for hint in below)
    assert [p.kind for p in report.problems] == ["no captions"], "a number is no name"
