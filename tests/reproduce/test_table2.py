"""Table 2 at toy size: rows with and without weights, the paper's numbers, floor and ceiling; the command."""

import json

import pytest

from controlkit.annotators import contract
from controlkit.baselines import Settings, train_baseline
from controlkit.controls import new_control
from controlkit.formats import SavedControl
from controlkit.reproduce import Plan, entrants, make_table2, table2


@pytest.fixture
def _untrained_control(toy_base, monkeypatch):
    """A fresh control in place of the shipped one, which is another base's."""
    saved = SavedControl(new_control(toy_base).eval(), contract("seg"))
    monkeypatch.setattr(entrants, "load", lambda name, base: (saved, []))


@pytest.fixture
def opponents(toy_base, tmp_path):
    """A folder with one opponent, trained for a step."""
    settings = Settings(steps=1, batch=2, scenes=8)
    list(train_baseline("lite", toy_base, settings, tmp_path / "opponents" / "lite"))
    return tmp_path / "opponents"


@pytest.mark.usefixtures("_untrained_control")
def test_rows_without_weights_say_how_to_train_them_and_the_rest_is_measured(toy_base, opponents, tmp_path):
    seen = []
    table = make_table2(toy_base, Plan(num=3, steps=1, opponents=opponents), tmp_path / "out", seen.append)
    rows = {row.name: row for row in table.rows}
    assert [row.name for row in table.rows] == list(table2.ORDER) == [name for name in seen if name != "floor"]
    assert "controlkit baseline train piti" in rows["piti"].note and rows["piti"].ours is None
    assert rows["lite"].paper == (0.32, 0.12) and "1 steps" in rows["lite"].cost and not rows["lite"].note
    assert rows["truth"].ours.mean > rows["lite"].ours.mean
    assert rows["truth"].ours.mean >= table.ceiling.mean
    assert set(table.floor) == {"no control", "hints shuffled"} and rows["shipped"].paper is None
    told = json.loads((tmp_path / "out" / "table2.json").read_text())
    assert told["settings"]["scenes"] == 3 and told["rows"][0]["paper"] == [0.58, 0.1]
    text = (tmp_path / "out" / "table2.md").read_text()
    assert "| PITI (seg) | no weights given" in text and "0.26 ± 0.16" in text and "Floor: no control" in text
    assert (tmp_path / "out" / "table2.png").is_file()


@pytest.mark.usefixtures("_untrained_control")
def test_the_command_shows_the_table(run, toy_folder, tmp_path):
    given = ("--num", 2, "--steps", 1, "--base", toy_folder, "--device", "cpu")
    code, said, _ = run("reproduce", "table2", "--out", tmp_path / "out", *given)
    assert code == 0 and "0.58 ± 0.10" in said and "controlkit baseline train taming" in said
