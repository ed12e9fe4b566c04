"""Table 2 at toy size: rows with and without weights, the paper's numbers, floor and ceiling; the command."""

import json
import shutil

import pytest

from controlkit.formats import WEIGHTS
from controlkit.images import read_picture
from controlkit.reproduce import Plan, make_table2, table2

pytestmark = pytest.mark.usefixtures("untrained_shipped")


def test_rows_without_weights_say_how_to_train_them_and_the_rest_is_measured(toy_base, opponents, tmp_path):
    seen = []
    table = make_table2(toy_base, Plan(num=3, steps=1, opponents=opponents), tmp_path, seen.append)
    rows = {row.name: row for row in table.rows}
    assert [row.name for row in table.rows] == list(table2.ORDER) == [name for name in seen if name != "floor"]
    assert rows["piti"].note == "no weights" and rows["piti"].ours is None
    assert "controlkit baseline train piti" in table.caption() and "baseline train lite" not in table.caption()
    assert rows["lite"].paper == (0.32, 0.12) and "1 steps" in rows["lite"].cost and not rows["lite"].note
    assert rows["truth"].ours.mean > rows["lite"].ours.mean and rows["truth"].ours.mean >= table.ceiling.mean
    assert set(table.floor) == {"no control", "hints shuffled"} and rows["shipped"].paper is None
    told = json.loads((tmp_path / "table2.json").read_text())
    assert told["settings"]["scenes"] == 3 and told["rows"][0]["paper"] == [0.58, 0.1]
    text = (tmp_path / "table2.md").read_text()
    assert "| PITI (seg) | no weights |" in text and "0.26 ± 0.16" in text and "Floor: no control" in text
    assert read_picture(tmp_path / "table2.png").shape[1] > 4 * toy_base.size  # maps, truth, lite, shipped


def test_an_opponent_that_is_being_trained_leaves_the_others_their_rows(toy_base, opponents, tmp_path):
    shutil.copytree(opponents / "lite", opponents / "controlnet")
    about = json.loads((opponents / "lite" / "baseline.json").read_text())
    (opponents / "controlnet" / "baseline.json").write_text(json.dumps(about | {"name": "controlnet"}))
    (opponents / "controlnet" / WEIGHTS).unlink()
    table = make_table2(toy_base, Plan(num=2, steps=1, opponents=opponents), tmp_path)
    rows = {row.name: row for row in table.rows}
    assert rows["controlnet"].note == "training has not ended" and rows["lite"].ours
    assert f"baseline train controlnet --out {opponents}/controlnet`" in table.advice


def test_the_command_shows_the_table(run, toy_folder, tmp_path):
    given = ("--num", 2, "--steps", 1, "--base", toy_folder, "--device", "cpu")
    code, said, _ = run("reproduce", "table2", "--out", tmp_path, *given)
    assert code == 0 and "0.58 ± 0.10" in said and "controlkit baseline train taming" in said


def test_another_name_is_refused_with_those_that_are_known(run, tmp_path):
    code, _, err = run("reproduce", "table22", "--out", tmp_path / "out")
    assert code == 2 and 'did you mean "table2"' in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "option", "words"),
    [
        ("table2", ("--quick", "--num", 4), "--quick chooses --num itself"),
        ("fig-scale", ("--quick", "--share", 0.5), "--quick chooses --share itself"),
        ("table2", ("--share", 0.5), "trains nothing"),
    ],
)
def test_options_that_would_not_be_read_are_refused(run, tmp_path, name, option, words):
    code, _, err = run("reproduce", name, "--out", tmp_path / "out", *option)
    assert code == 2 and words in err and not (tmp_path / "out").exists()
