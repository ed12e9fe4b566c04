"""The user study: pages in random order without names, answers read back, average ranks; Table 1."""

import csv
import re

import numpy as np
import pytest

from controlkit.errors import Invalid
from controlkit.reproduce import Plan, make_table1, study, table1
from controlkit.reproduce.study import Shown, rank_of, ranks_by_score, read_answers, write_study

KEY = {f"{system}{sketch}": Shown(sketch, system) for sketch in range(2) for system in "abc"}
HEAD = "rater,picture,quality,fidelity\n"


def answers(rater="1", **changes):
    """A rater's answers: a best in quality, c in fidelity; ``changes``: ranks by picture."""
    ranks = {name: {"a": "3,1", "b": "2,2", "c": "1,3"}[one.system] for name, one in KEY.items()} | changes
    return "".join(f"{rater},{name},{pair}\n" for name, pair in ranks.items())


def test_answers_that_lead_out_of_the_folder_are_refused(tmp_path):
    (tmp_path / "elsewhere.csv").write_text(HEAD + answers("x"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "answers.csv").symlink_to(tmp_path / "elsewhere.csv")
    with pytest.raises(Invalid, match="leads out of its folder"):
        read_answers(tmp_path / "out" / "answers.csv", KEY)


def test_answers_are_read_and_averaged(tmp_path):
    path = tmp_path / "answers.csv"
    path.write_text(HEAD + answers("x"))
    found = read_answers(path, KEY)
    assert found["x"]["a0"] == (3, 1)
    assert str(rank_of("a", found, KEY, "quality")) == "3.00 ± 0.00"
    path.write_text(HEAD + answers("x") + answers("y", a0="2,1", b0="3,2"))
    two = rank_of("a", read_answers(path, KEY), KEY, "quality")
    assert (two.mean, two.spread, two.over, two.count) == (2.75, 0.25, "raters", 2)  # averages 3 and 2.5
    one = rank_of("a", {"y": read_answers(path, KEY)["y"]}, KEY, "quality")
    assert (one.mean, one.spread, one.over) == (2.5, 0.5, "sketches")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n", "expected the columns"),
        (HEAD + "1,zz,1,1\n", "line 2: expected a rater, a picture of this study"),
        (HEAD + "1,a0,1\n", "and two ranks"),
        (HEAD + "1,a0,0,1\n", "from 1 to 3"),
        (HEAD + "1,a0,1,4\n", "from 1 to 3"),
        (HEAD + "1,a0,¹,1\n", "from 1 to 3"),
        (HEAD + "1,a0,1,1\n1,a0,2,2\n", "ranked the picture a0 before"),
        (HEAD + answers(a0="2,1"), "sketch 1, quality"),
        (HEAD + answers().rpartition("1,c1")[0], "sketch 2, quality"),
        (HEAD + '1,"' + "x" * 200_000 + '",1,1\n', "no table of answers"),
    ],
)
def test_answers_that_cannot_be_counted_are_refused(text, words, tmp_path):
    (tmp_path / "answers.csv").write_text(text)
    with pytest.raises(Invalid, match=words):
        read_answers(tmp_path / "answers.csv", KEY)


def test_higher_scores_rank_higher_and_equal_ones_share():
    found = ranks_by_score(np.array([[0.1, 0.5], [0.2, 0.5], [0.3, 0.1]]))
    assert [one.mean for one in found] == [(1 + 2.5) / 2, (2 + 2.5) / 2, (3 + 1) / 2]
    assert found[2].spread == 1.0


def test_each_rater_has_an_order_and_no_page_names_a_system(tmp_path):
    key = {f"{i:012x}": Shown(i // 3, ("first", "second", "third")[i % 3]) for i in range(6)}
    pictures = {name: np.full((4, 4, 3), i, np.uint8) for i, name in enumerate(key)}
    write_study(tmp_path, key, pictures, [np.zeros((4, 4, 3), np.uint8)] * 2, ["<b>", "two"])
    pages = sorted(tmp_path.glob("*.html"))
    assert len(pages) == study.RATERS
    orders = set()
    for page in pages:
        text = page.read_text()
        assert not re.search("first|second|third", text) and "&lt;b&gt;" in text and "<b>" not in text
        orders.add(tuple(shown := re.findall(r'data-picture="(\w+)"', text)))
        assert sorted(shown) == sorted(key)
        assert all((tmp_path / source).is_file() for source in re.findall(r'src="([^"]+)"', text))
    assert len(orders) > study.RATERS / 2
    with (tmp_path / "key.csv").open() as file:
        assert [row["system"] for row in csv.DictReader(file)][:3] == ["first", "second", "third"]


@pytest.mark.usefixtures("untrained_shipped")
def test_table_1_counts_the_answers_in_its_folder(toy_base, sketchy, tmp_path):
    out, plan = tmp_path / "out", Plan(num=2, steps=1, opponents=sketchy)
    table = make_table1(toy_base, plan, out)
    rows = {row.name: row for row in table.rows}
    assert list(rows) == list(table1.ORDER)
    ranked = [name for name, row in rows.items() if row.fidelity]
    assert ranked == ["no-control", "sketch-guided", "sketch-guided-x2", "shipped"]
    assert sum(rows[name].referees["fidelity"].mean for name in ranked) == pytest.approx(1 + 2 + 3 + 4)
    assert (
        rows["piti"].note
        and "--hint canny" in table.caption()
        and "3.21 ± 0.62, 2.31 ± 0.57" in str(table.rows[2].words())
    )
    assert table.floor["fidelity"] == rows["no-control"].fidelity and "no person yet" in table.caption()
    assert table.ceiling["fidelity"].mean not in (0, table.floor["fidelity"].mean)
    with (out / "study" / "key.csv").open() as file:
        key = list(csv.DictReader(file))
    ranks = "".join(
        f"me,{row['picture']},{1 + ranked.index(row['system'])},{4 - ranked.index(row['system'])}\n" for row in key
    )
    (out / "answers-01.csv").write_text(HEAD + ranks)
    again = {row.name: row for row in make_table1(toy_base, plan, out).rows}
    assert [again[name].persons["quality"].mean for name in ranked] == [1, 2, 3, 4]
    assert again["shipped"].words()[2] == "4.00 ± 0.00, 1.00 ± 0.00"
    (out / "answers-02.csv").write_text(HEAD + ranks)
    with pytest.raises(Invalid, match="in another file"):
        make_table1(toy_base, plan, out)
