"""Table 3, Figure 8 and the comparison with earlier methods, at toy size."""

import json
import shutil

import pytest

from controlkit.data import ScenePairs
from controlkit.reproduce import Plan, compare, fig8, make_comparison, make_fig8, make_table3, table3
from controlkit.reproduce.table3 import Row

pytestmark = pytest.mark.usefixtures("untrained_shipped")


def test_table_3_has_each_systems_whole_report_or_why_there_is_none(toy_base, opponents, tmp_path):
    table = make_table3(toy_base, Plan(num=3, steps=1, opponents=opponents), tmp_path)
    rows = {row.name: row for row in table.rows}
    assert list(rows) == list(table3.ORDER)
    assert rows["piti"].report is None and rows["piti"].words()[1] == "no weights"
    for name in ("no-control", "lite", "shipped"):
        assert {"fidelity", "floor", "ceiling", "obedience"} <= rows[name].report.keys()
    plain = [rows[name].report["floor_no_control"] for name in ("no-control", "lite")]
    assert plain[0] == plain[1]  # the same pictures, made once
    assert "no referee here" in table.caption()  # which knows no toy
    assert "26.28, 0.17, 5.14" in (tmp_path / "table3.md").read_text()
    assert json.loads((tmp_path / "table3.json").read_text())["settings"]["pictures for FID"] > 0
    figure = {"mean": 1.234, "low": 1.0, "high": 2.0}
    judged = Row("x", "X", dict.fromkeys(("fid", "clip_score", "aesthetic", "obedience"), figure))
    assert judged.words()[1:5] == ("1.23", "1.23", "1.23", "1.23 [1.00, 2.00]")


def test_table_3_is_gathered_over_runs(toy_base, opponents, tmp_path):
    plan = Plan(num=2, steps=1, opponents=opponents)
    first = make_table3(toy_base, plan, tmp_path / "out")
    shutil.rmtree(opponents / "lite")
    second = make_table3(toy_base, plan, tmp_path / "out")
    kept = next(row for row in second.rows if row.name == "lite")
    assert "made before" in kept.words()[-1] and "Obedience: 0 is" in second.caption()
    assert kept.words()[:6] == next(row for row in first.rows if row.name == "lite").words()[:6]


def test_figure_8_has_four_prompts_and_the_floor_first(toy_base, opponents, tmp_path):
    figure = make_fig8(toy_base, Plan(num=2, steps=1, opponents=opponents), tmp_path)
    rows = {row.name: row for row in figure.rows}
    assert list(rows) == list(fig8.ORDER) and not rows["gaussian"].ours
    assert (
        list(rows["lite"].ours) == list(rows["no-control"].ours) == ["none", "insufficient", "conflicting", "perfect"]
    )
    assert "Ceiling" in (tmp_path / "fig8.md").read_text() and (tmp_path / "fig8.png").is_file()


def test_conflicting_prompts_are_anothers(toy_base):
    pairs = list(ScenePairs(toy_base.size, 10, count=3))
    prompts = [pair.prompt for pair in pairs]
    assert fig8.PROMPTS["conflicting"](pairs) == [prompts[1], prompts[2], prompts[0]]
    assert fig8.PROMPTS["none"](pairs) == [""] * 3 and fig8.PROMPTS["perfect"](pairs) == prompts


def test_the_comparison_has_both_strengths_and_a_floor_of_each_kind(toy_base, sketchy, tmp_path):
    found = make_comparison(toy_base, Plan(num=2, steps=2, opponents=sketchy), tmp_path)
    rows = {(row.name, row.kind, row.scale): row for row in found.rows}
    assert [f"{name}, {kind}" for name, kind, _ in rows] == compare.ORDER
    assert rows["no-control", "seg", 1.0].ours and rows["no-control", "canny", 1.0].ours
    assert rows["sketch-guided", "canny", 2.0].title.startswith("x2: ") and not rows["piti", "seg", 1.0].ours
    assert all(row.ceiling for row in found.rows if row.ours)
    assert {path.name for path in tmp_path.glob("*.png")} == {"fig-compare-seg.png", "fig-compare-canny.png"}
    assert "fig-compare" in str(*tmp_path.glob("*.md"))
    assert f"train controlnet --hint canny --out {sketchy}/controlnet-canny`" in found.advice
    assert f"train controlnet --out {sketchy}/controlnet`" in found.advice and "sketch-guided" not in found.advice
