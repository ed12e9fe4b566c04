"""The one template of HTML pages."""

import re

import pytest

from controlkit.pages import Chart, Figure, Section, Table, render

SCRIPT = '<script>alert("1")</script>'


def test_whatever_a_page_is_given_is_text_and_no_markup():
    chart = Chart(SCRIPT, [(0, 1.0), (10, 2.0)], wide=True)
    picture = Figure(SCRIPT, SCRIPT)
    section = Section(SCRIPT, [[picture, None]], [chart, chart], picture, SCRIPT)
    page = render(SCRIPT, SCRIPT, [SCRIPT, Table([SCRIPT], [[SCRIPT]]), section])
    assert "<script" not in page
    # title, heading, paragraph, 2 in the table, heading, 3 of the figure, 2 a chart, 2 of the sheet, text
    assert page.count("&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt;") == 16


def test_a_page_holds_its_parts_in_order():
    parts = ["first", Table(["name"], [["second"]]), Section("third", [[Figure("a.png", "fourth")]], text="fifth")]
    page = render("title", "heading", parts)
    words = ["<title>title<", "<h1>heading<", "<p>first<", "<th>name<", "<td>second<", "<h2>third<", 'src="a.png"']
    places = [page.index(word) for word in [*words, "<figcaption>fourth<", "<p>fifth<"]]
    assert places == sorted(places)


@pytest.mark.parametrize("wide", [False, True])
def test_a_chart_s_line_and_band_stay_in_its_box(wide):
    band = [(0, -1.0, 3.0), (50, 0.0, 1.0)]
    chart = Chart("loss", [(0, 1.0), (50, 0.5)], band, wide)
    width, height, left, top, foot = chart.box
    assert chart.limits == (-1.0, 3.0) and chart.value == 0.5 and chart.last == 50
    assert chart.place(0, 3.0) == (left, top) and chart.place(50, -1.0) == (width - 8, height - foot)
    assert len(re.findall(r"[\d.]+,[\d.]+", chart.outline)) == 4


@pytest.mark.parametrize(
    ("values", "ticks", "limits"),
    [
        ([0.4, 0.6], [0, 1], (0, 1)),
        ([-0.02, 0.5], [0, 1], (-0.02, 1)),
        ([0.4, 1.6], [0, 1, 1.6], (0, 1.6)),
        ([-2, 0.5], [0, 1, -2], (-2, 1)),
    ],
)
def test_a_measure_s_scale_is_always_shown_and_what_lies_clearly_beyond_it(values, ticks, limits):
    chart = Chart("obedience", list(enumerate(values)), scale=(0, 1), marks=[(0.25, "found")])
    assert (chart.ticks, chart.limits) == (ticks, limits)
    page = render("", "", [Section("", charts=[chart])])
    assert ">found</text>" in page and page.count("<line") == len(ticks) + 1


@pytest.mark.parametrize(("refresh", "times"), [(None, 0), (0.2, 1), (5, 1)])
def test_a_page_is_loaded_again_where_it_changes(refresh, times):
    assert render("", "", [], refresh).count('http-equiv="refresh"') == times
    assert 'content="0"' not in render("", "", [], refresh)


def test_a_chart_of_one_value_has_a_height():
    chart = Chart("loss", [(0, 2.0)])
    low, high = chart.limits
    assert low < high and chart.last == 1
