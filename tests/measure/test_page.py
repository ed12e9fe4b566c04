"""The page on an evaluation: its figures, its pictures, and what it refuses."""

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from controlkit.annotators import contract
from controlkit.data import CirclePairs
from controlkit.errors import Invalid
from controlkit.measure import EvaluationPlan, Recorded, evaluate, evaluation_page, shown
from controlkit.sample import ControlRequest, Picture

PAIRS = list(CirclePairs(48, 4))


@pytest.fixture
def plan():
    return EvaluationPlan(ControlRequest(name="drawn", hint_cfg_scale=1.0), contract("canny"), PAIRS, steps=1)


@pytest.fixture
def make():
    """Draws the outline where it is told one, and black without."""

    def draw(requests):
        for one in requests:
            hint = one.controls[0].images[""] if one.controls else np.zeros((48, 48, 3), np.uint8)
            yield Picture(one, np.ascontiguousarray(hint))

    return Recorded(draw)


def pictures_in(page):
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
        for text in re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    ]


def test_the_page_shows_each_pair_in_all_ways_beside_its_figures(plan, make):
    report = evaluate(make, plan, list)
    page = evaluation_page(report | {"verdict": "Control found."}, plan, make.by_way(plan), list, "canny on circles")
    seen = pictures_in(page)
    assert len(seen) == 4 * 6, "hint, truth, the same out of the VAE, and three ways"
    truth, controlled, other, plain = (seen[i].astype(int) for i in (1, 3, 4, 5))
    assert abs(truth - PAIRS[0].picture).mean() < 8 and plain.max() < 8
    assert abs(controlled - plan.hints[0]).mean() < 12 and abs(other - plan.hints[2]).mean() < 12
    for name in ("fidelity", "floor", "ceiling", "obedience"):
        assert f"<td>{name}</td><td>{report[name]['mean']:.3f}</td>" in page
    assert "Control found." in page and "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize("lost", ["floor", "ceiling", "floor_shuffled"])
def test_no_result_is_shown_without_its_floor_and_ceiling(plan, make, lost):
    report = evaluate(make, plan, list)
    del report[lost]
    with pytest.raises(Invalid, match=f"no '{lost}' with its interval"):
        evaluation_page(report, plan, make.by_way(plan), list, "")


def test_what_was_made_is_not_made_again(plan, make):
    evaluate(make, plan, list)
    before = make.by_way(plan)
    evaluate(make, plan, list)
    assert len(make.calls) == 3 and make.by_way(plan)["controlled"][0] is before["controlled"][0]


def test_what_was_made_is_known_by_its_requests(plan, make):
    evaluate(make, replace(plan, first_seed=100), list)
    with pytest.raises(Invalid, match="not all made"):
        make.by_way(plan)


@pytest.mark.parametrize(("shape", "side"), [((300, 600, 3), (128, 256)), ((40, 20, 3), (40, 20))])
def test_pictures_are_scaled_down_to_fit_and_never_up(shape, side):
    [seen] = pictures_in(f'src="{shown(np.zeros(shape, np.uint8), "").source}"')
    assert seen.shape[:2] == side


def test_holes_are_grey():
    holed = np.zeros((8, 8, 4), np.uint8)
    [seen] = pictures_in(f'src="{shown(holed, "").source}"')
    assert abs(seen.astype(int) - 128).max() <= 2
