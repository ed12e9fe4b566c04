"""Controls on a tuned base: the style, the tuning that goes on from its file, and the figure."""

import numpy as np
import pytest
import torch

from controlkit.errors import Invalid
from controlkit.measure import EvaluationPlan
from controlkit.reproduce import Plan, make_transfer, transfer
from controlkit.reproduce.transfer import Tuning, comic, tuned

TINY = Tuning(steps=3, batch=2, scenes=8, rate=1e-3)


def weights(base):
    return torch.cat([value.flatten() for value in base.denoiser.state_dict().values()])


def test_a_comic_picture_has_few_colours_and_dark_lines_where_edges_are():
    picture = np.full((32, 32, 3), 100, np.uint8)
    picture[8:24, 8:24] = (220, 40, 90)
    drawn = comic(picture)
    assert drawn.shape == picture.shape and len(np.unique(drawn)) <= 5
    assert (drawn[2, 2] == 85).all() and drawn[16, 16].tolist() == [255, 0, 85]
    assert (drawn[8, 12:20] == 16).any() or (drawn[7, 12:20] == 16).any()


def test_a_tuning_goes_on_from_its_file_to_the_same_weights(toy_base, tmp_path, monkeypatch):
    before = weights(toy_base)
    whole, facts = tuned(toy_base, TINY, tmp_path / "whole")
    assert not torch.equal(weights(whole), before) and torch.equal(weights(toy_base), before)
    assert facts["steps"] == 3 and facts["loss"] > 0
    loss, calls = transfer._loss, []

    def broken(other, material, tuning, step):
        calls.append(step)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss(other, material, tuning, step)

    monkeypatch.setattr(transfer, "_loss", broken)
    monkeypatch.setattr(transfer, "_EVERY", 2)
    with pytest.raises(KeyboardInterrupt):
        tuned(toy_base, TINY, tmp_path / "part")
    part, _ = tuned(toy_base, TINY, tmp_path / "part")
    assert calls == [0, 1, 2, 2] and torch.equal(weights(part), weights(whole))
    again, _ = tuned(toy_base, TINY, tmp_path / "part")
    assert calls == [0, 1, 2, 2] and torch.equal(weights(again), weights(whole))


def test_another_tunings_file_is_refused(toy_base, tmp_path):
    tuned(toy_base, TINY, tmp_path)
    with pytest.raises(Invalid, match="other settings"):
        tuned(toy_base, Tuning(steps=4, batch=2, scenes=8), tmp_path)
    (tmp_path / "tuning.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(Invalid, match="begins anew"):
        tuned(toy_base, TINY, tmp_path)


@pytest.mark.usefixtures("untrained_shipped")
def test_the_figure_measures_each_base_by_pictures_of_its_own_style(toy_base, tmp_path, monkeypatch):
    truths = []
    evaluate = transfer.Bench.row

    def row(self, name, title, plan):
        assert isinstance(plan, EvaluationPlan)
        truths.append((name, plan.pairs[0].picture, plan.hints[0]))
        return evaluate(self, name, title, plan)

    monkeypatch.setattr(transfer.Bench, "row", row)
    table = make_transfer(toy_base, Plan(num=2, steps=1), tmp_path, tuning=TINY)
    assert [one.name for one in table.rows] == list(transfer.ORDER[1:])
    (_, plain, hint), (_, styled, same) = truths[:2]
    assert np.array_equal(comic(plain), styled) and np.array_equal(hint, same)
    assert "3 steps of 2" in table.caption() and (tmp_path / "fig-transfer-depth.png").is_file()
