"""Obedience and its intervals."""

from dataclasses import asdict

import numpy as np
import pytest

from controlkit.errors import UserError
from controlkit.measure import mean_figure, obedience


def rows(count, **spread):
    """Fidelity of ``count`` pictures under the four conditions, scattered about the paper-like means."""
    rng = np.random.default_rng(0)
    means = {"controlled": 0.6, "no_control": 0.2, "shuffled": 0.3, "ceiling": 0.9}
    return {name: mean + 0.05 * rng.standard_normal(count) for name, mean in means.items()} | spread


def test_obedience_is_zero_at_the_floor_and_one_at_the_ceiling():
    table = rows(20)
    assert obedience(**table | {"controlled": table["shuffled"]}).obedience.mean == pytest.approx(0)
    assert obedience(**table | {"controlled": table["ceiling"]}).obedience.mean == pytest.approx(1)
    got, top, floor = (table[name].mean() for name in ("controlled", "ceiling", "shuffled"))
    assert obedience(**table).obedience.mean == pytest.approx((got - floor) / (top - floor))


@pytest.mark.parametrize("better", ["no_control", "shuffled"])
def test_the_better_of_the_two_floors_counts(better):
    measured = obedience(**rows(20, **{better: np.full(20, 0.5)}))
    assert measured.floor.mean == pytest.approx(0.5)
    assert getattr(measured, f"floor_{better}").mean == pytest.approx(0.5)
    assert min(measured.floor_no_control.mean, measured.floor_shuffled.mean) < 0.4


@pytest.mark.parametrize("where", ["controlled", "no_control", "shuffled", "ceiling"])
def test_a_pair_that_says_nothing_is_left_out_of_every_condition(where):
    table = rows(20)
    silent = table | {where: np.where(np.arange(20) < 5, np.nan, table[where])}
    assert obedience(**silent) == obedience(**{name: values[5:] for name, values in table.items()})


def test_obedience_of_nothing_is_an_error_that_says_so():
    with pytest.raises(UserError, match="Nothing can be measured"):
        obedience(**rows(3, ceiling=np.full(3, np.nan)))


def test_intervals_hold_their_mean_and_shrink_with_the_number_of_pictures():
    few, many = (obedience(**rows(count)) for count in (16, 400))
    for figure in (*vars(few).values(), *vars(many).values()):
        assert figure == "edge_f1" or figure.low < figure.mean < figure.high
    widths = [measured.obedience.high - measured.obedience.low for measured in (few, many)]
    assert widths[1] == pytest.approx(widths[0] / 5, rel=0.4)  # as one over the root of the number


def test_the_bootstrap_is_paired():
    level = np.random.default_rng(1).random(30)  # some pictures are easier than others, whatever the condition
    figure = obedience(level + 0.2, level, level - 1, level + 0.4).obedience
    assert (figure.low, figure.mean, figure.high) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize(("ceiling", "floor", "counts"), [(0.9, 0.6, True), (0.9, 0.75, False), (0.7, 0.1, False)])
def test_obedience_counts_only_between_a_low_floor_and_a_high_ceiling(ceiling, floor, counts):
    assert obedience(**rows(9, ceiling=np.full(9, ceiling), shuffled=np.full(9, floor))).is_meaningful is counts


@pytest.mark.parametrize(
    ("metric", "ceiling", "floor", "counts"),
    [
        ("ms_ssim", 0.7, 0.4, True),  # only edges need a high ceiling
        ("miou", 0.9, 0.75, False),
        ("depth_rmse", 0.1, 0.2, True),
        ("depth_rmse", 0.1, 0.14, False),
        ("depth_rmse", 0.2, 0.1, False),
        ("low_pass_psnr", 24, 20, True),
        ("low_pass_psnr", 23, 20, False),
    ],
)
def test_each_metric_has_its_own_least_range(metric, ceiling, floor, counts):
    four = {name: np.full(9, floor) for name in ("controlled", "no_control", "shuffled")}
    assert obedience(**four, ceiling=np.full(9, ceiling), metric=metric).is_meaningful is counts


def test_obedience_by_an_error_is_zero_at_the_floor_and_one_at_the_ceiling():
    errors = {name: 1 - values for name, values in rows(20).items()}
    scores, figures = obedience(**rows(20)), obedience(**errors, metric="depth_rmse")
    assert figures.floor.mean == pytest.approx(min(errors[name].mean() for name in ("no_control", "shuffled")))
    for name, figure in vars(figures).items():
        if name == "obedience":
            assert (figure.low, figure.mean, figure.high) == pytest.approx(
                (scores.obedience.low, scores.obedience.mean, scores.obedience.high)
            )
        elif name != "metric":
            assert figure.low < figure.mean < figure.high
            assert figure.mean == pytest.approx(1 - getattr(scores, name).mean)
    assert obedience(**errors | {"controlled": errors["ceiling"]}, metric="depth_rmse").obedience.mean == 1
    assert obedience(**errors | {"controlled": errors["shuffled"]}, metric="depth_rmse").obedience.mean == 0


def test_a_mean_lies_in_its_interval_which_shrinks_with_the_number_of_values():
    values = np.random.default_rng(0).standard_normal(400)
    few, many = mean_figure(values[:16]), mean_figure(values)
    assert few.mean == values[:16].mean()
    assert few.low < few.mean < few.high
    assert many.high - many.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert asdict(mean_figure(np.full(5, 2.0))) == {"mean": 2, "low": 2, "high": 2}
