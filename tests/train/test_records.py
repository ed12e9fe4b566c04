"""What evaluations show: whether control was found, what was best, when to stop."""

import pytest

from controlkit import train
from controlkit.train import EvaluationSummary, found_step, verdict
from controlkit.train.recipe import EvaluationRecipe


@pytest.mark.parametrize(
    ("lows", "found", "words"),
    [
        ([], None, "no control yet"),
        ([0.1, 0.2], None, "no control yet"),
        ([0.1, 0.3], None, "control perhaps found at step 200, if a second evaluation confirms it"),
        ([0.3, 0.2], None, "no control yet"),
        ([0.3, 0.2, 0.3], None, "control perhaps found at step 300, if a second evaluation confirms it"),
        ([0.1, 0.25, 0.25], 200, "control found at step 200"),
        ([0.3, 0.4, 0.1], 100, "control found at step 100"),
        ([0.3, 0.1, 0.3, 0.3, 0.3], 300, "control found at step 300"),
    ],
)
def test_control_is_found_at_the_first_of_two_successive_evaluations(lows, found, words):
    evaluations = [EvaluationSummary(100 * (i + 1), low, is_meaningful=True) for i, low in enumerate(lows)]
    assert found_step(evaluations) == found
    assert verdict(evaluations) == words


def test_obedience_that_does_not_count_finds_no_control():
    evaluations = [EvaluationSummary(100, 0.9, is_meaningful=False), EvaluationSummary(200, 0.9, is_meaningful=False)]
    assert found_step(evaluations) is None
    assert verdict(evaluations).startswith("it cannot be measured whether there is control")


def test_a_run_ends_where_it_got_where_it_should_or_no_longer_gets_better():
    seen = [EvaluationSummary(100 * i, mean - 0.1, counts, mean) for i, (mean, counts) in enumerate(
        [(0.9, False), (0.1, True), (0.4, True), (0.3, True), (0.4, True)], 1)]  # fmt: skip
    assert train.best_of(seen).step == 300 and train.best_of(seen[:1]) is None
    for patience, length in ((1, 4), (2, 5), (3, None)):
        recipe = EvaluationRecipe(patience=patience)
        assert next((n for n in range(6) if train.should_stop(recipe, seen[:n])), None) == length
    for target, length in ((0.0, 2), (0.29, 3), (0.35, None)):
        recipe = EvaluationRecipe(target=target)
        assert next((n for n in range(6) if train.should_stop(recipe, seen[:n])), None) == length
    assert not train.should_stop(EvaluationRecipe(), seen)
