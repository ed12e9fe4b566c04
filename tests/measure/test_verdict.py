"""The verdict on a control, in words."""

import re

import numpy as np
import pytest

from controlkit.measure import Obedience, meaningless, obedience, verdict_on


def measured(got, floor=0.2, ceiling=0.9, metric="edge_f1") -> Obedience:
    """Obedience whose interval is its mean."""
    four = {"controlled": got, "no_control": floor, "shuffled": floor, "ceiling": ceiling}
    return obedience(**{name: np.full(9, value) for name, value in four.items()}, metric=metric)


NONE, WEAK, STRONG = measured(0.2), measured(0.3), measured(0.8)


@pytest.mark.parametrize(
    ("first", "second", "finding", "times"),
    [
        (STRONG, STRONG, "found", 1),
        (STRONG, WEAK, "not found", 1),
        (STRONG, measured(0.25, ceiling=0.3), "not found", 1),
        (STRONG, None, "not found", 1),
        (WEAK, STRONG, "not found", 0),
        (NONE, STRONG, "not found", 0),
        (measured(0.5, floor=0.8), STRONG, "cannot be measured", 0),
        (measured(0.5, ceiling=0.6), STRONG, "cannot be measured", 0),
    ],
)
def test_control_is_found_by_two_evaluations_and_the_second_is_made_where_it_decides(first, second, finding, times):
    calls = []
    verdict = verdict_on(first, None, lambda: calls.append(1) or second)
    assert (verdict.finding, len(calls)) == (finding, times)


@pytest.mark.parametrize(("kept", "words"), [(True, "kept"), (False, "fell"), (None, "not measured")])
def test_the_words_hold_the_figures_of_both_and_quality(kept, words):
    verdict = verdict_on(STRONG, kept, lambda: measured(0.76))
    assert str(verdict) == (
        f"Control found: obedience 0.857 [0.857, 0.857], and 0.800 [0.800, 0.800] with other seeds; quality {words}."
    )


@pytest.mark.parametrize(
    ("floor", "ceiling", "metric", "words"),
    [
        (0.1, 0.7, "edge_f1", "a ceiling under 0.8 .* use larger pictures"),
        (0.75, 0.9, "edge_f1", "too close together: .* Measure on more pictures"),
        (0.6, 0.7, "miou", "miou is 0.600 .*, 0.700 .* too close together"),
        (0.1, 0.09, "depth_rmse", "too close together"),
        (20, 22, "low_pass_psnr", "too close together"),
    ],
)
def test_obedience_that_means_nothing_has_a_reason_and_a_way_on(floor, ceiling, metric, words):
    assert re.search(words, meaningless(measured(floor, floor, ceiling, metric)))
    assert meaningless(STRONG) == meaningless(measured(0.1, 0.3, 0.1, "depth_rmse")) == ""
