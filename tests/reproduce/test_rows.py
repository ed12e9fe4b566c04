"""Reports gathered over several runs: rows of systems whose weights are gone are kept, under equal settings alone."""

import json
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest

from controlkit.errors import Invalid
from controlkit.images import read_picture
from controlkit.reproduce import Plan, make_table2
from controlkit.reproduce.entrants import Table, write_report
from controlkit.reproduce.rows import Earlier, Kept, SystemRow

HEAD = ("system", "ours", "training")
SETTINGS = {"base": "toy (abc)", "steps": 4, "seconds": 10}


@dataclass(frozen=True)
class Row(SystemRow):
    ours: float = 0.0

    def words(self):
        return self.title, self.note or f"{self.ours:.2f}", self.cost


def picture(value):
    return np.full((8, 8, 3), value, np.uint8)


def table(lite=0.5, piti=0.25, settings=SETTINGS):
    """A table of two systems; None: it has no weights now."""
    rows = [
        Row(name, name.title(), ours=value or 0.0, cost="9 steps", note="" if value else "no weights")
        for name, value in (("lite", lite), ("piti", piti))
    ]
    return Table(rows, settings, "train piti" if not piti else "")


def written(out, one, **pictures):
    columns = {name.title(): [picture(value), picture(value + 1)] for name, value in pictures.items()}
    return write_report(out, "report", one, HEAD, {"": {"hint": [picture(0)] * 2, **columns}})


def test_a_row_without_weights_keeps_what_an_earlier_run_made_of_it(tmp_path):
    written(tmp_path, table(), lite=10, piti=20)
    before = read_picture(tmp_path / "report.png")
    again = written(tmp_path, table(lite=0.75, piti=None, settings=SETTINGS | {"seconds": 99}), lite=10)
    assert [row.words()[1] for row in again.rows] == ["0.75", "0.25"] and "made before" in again.caption()
    assert again.rows[1].words()[2].startswith("9 steps; made before, 20") and again.advice == ""
    assert np.array_equal(read_picture(tmp_path / "report.png"), before)  # the pictures that are gone are on it
    assert "0.25 | 9 steps; made before" in (tmp_path / "report.md").read_text()
    third = written(tmp_path, table(lite=None, piti=None))  # and once more: all of it is kept, and said once
    assert [row.words()[1] for row in third.rows] == ["0.75", "0.25"]
    assert third.rows[1].words() == again.rows[1].words()
    assert np.array_equal(read_picture(tmp_path / "report.png"), before)
    assert written(tmp_path, table(piti=0.9), lite=1, piti=2).rows[1].words()[1] == "0.90"  # weights again


def test_rows_of_other_settings_are_put_aside_and_a_sentence_says_so(tmp_path):
    written(tmp_path, table(), lite=10, piti=20)
    other = written(tmp_path, table(piti=None, settings=SETTINGS | {"steps": 8}), lite=10)
    assert other.rows[1].words()[1] == "no weights" and other.advice == "train piti"
    assert "other settings (steps 4, now 8)" in other.caption()
    assert json.loads((tmp_path / "report-earlier.json").read_text())["rows"][1]["ours"] == 0.25


@pytest.mark.parametrize(
    "change",
    [{"format": 0}, {"head": ["system"]}, {"rows": [{}]}, {"rows": [{"name": "x", "title": "X", "cells": ["x"]}]}],
)
def test_a_report_of_another_form_is_put_aside(tmp_path, change):
    written(tmp_path, table(), lite=10, piti=20)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    earlier = Earlier.read(tmp_path, "report", HEAD, SETTINGS)
    assert not earlier.rows and "report-earlier.json" in earlier.why_not and not path.exists()


def test_nothing_outside_the_folder_is_read(tmp_path):
    written(tmp_path / "other", table(), lite=10, piti=20)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").symlink_to(tmp_path / "other" / "report.json")
    with pytest.raises(Invalid, match="leads out"):
        Earlier.read(tmp_path / "out", "report", HEAD, SETTINGS)


def test_pictures_that_are_gone_leave_their_column_out(tmp_path):
    written(tmp_path, table(), lite=10, piti=20)
    shutil.rmtree(tmp_path / "report-rows")
    again = written(tmp_path, table(piti=None), lite=10)
    assert isinstance(again.rows[1], Kept)
    assert read_picture(tmp_path / "report.png").shape[1] == 2 * 132 + 4


@pytest.mark.usefixtures("untrained_shipped")
def test_a_table_of_the_paper_is_gathered(toy_base, opponents, tmp_path):
    plan = Plan(num=2, steps=1, opponents=opponents)
    first = make_table2(toy_base, plan, tmp_path / "out")
    shutil.rmtree(opponents / "lite")
    second = make_table2(toy_base, plan, tmp_path / "out")
    rows = [{row.name: row for row in one.rows} for one in (first, second)]
    assert rows[1]["lite"].words()[:4] == rows[0]["lite"].words()[:4] and "made before" in rows[1]["lite"].words()[4]
    assert "train piti" in second.advice and "train lite" not in second.advice
    others = make_table2(toy_base, replace(plan, guidance=2.0), tmp_path / "out")
    assert {row.name: row for row in others.rows}["lite"].note == "no weights" and "guidance" in others.gathered
    held = json.loads((tmp_path / "out" / "table2.json").read_text())
    assert {"date", "controlkit", "torch", "cpu", "threads"} <= held["made"].keys()
    assert held["settings"]["seeds"] == "0-1" and held["settings"]["seconds"] >= 0
    assert toy_base.digest in held["settings"]["base"]
