"""The cost of a step: counted on a toy, where it can be worked out, and at full size without weights."""

import copy
import json

import pytest
import torch
from torch import nn

from controlkit.reproduce import Plan, cost, make_cost


class Line:
    """One linear layer of 3 x 5 weights, of four rows, as the steps that are counted."""

    def __init__(self):
        self.layer = nn.Linear(3, 5, bias=False)
        self.learning = {"line": self.layer, "locked": None}

    def held(self, name):
        return [self.layer]

    def loss(self, name):
        with torch.set_grad_enabled(name == "line"):
            return (self.layer(torch.ones(4, 3)) ** 2).sum()


def test_what_is_counted_can_be_worked_out():
    flops, held = cost._counted(Line(), "line")
    assert flops == 2 * (2 * 4 * 3 * 5)  # forward, and the weights' gradient
    assert (held.weights, held.gradients, held.moments) == (60, 60, 120)
    assert held.activations == 4 * (4 * 3 + 4 * 5)  # the layer's input, and its output for the square
    flops, held = cost._counted(Line(), "locked")
    assert flops == 2 * 4 * 3 * 5 and held.total == held.weights == 60


def test_the_table_has_steps_in_turns_and_full_size_beside_the_papers(toy_base, monkeypatch, tmp_path):
    full = copy.copy(toy_base)
    full.name = "full"
    monkeypatch.setattr(cost, "random_base", lambda name, dtype, device: full)
    seen = []
    table = make_cost(toy_base, Plan(num=2, steps=1), tmp_path, seen.append)
    assert seen == list(cost.ORDER)
    rows = {(row.name, row.base): row for row in table.rows}
    whole, branch = (rows[name, toy_base.name] for name in (cost.TUNED, cost.BRANCH))
    assert whole.shares == {"flops": 1.0, "held": 1.0, "seconds": 1.0}
    assert branch.trained < whole.trained and branch.held.gradients < whole.held.gradients
    assert branch.held.weights > whole.held.weights == rows[cost.FLOOR, toy_base.name].held.total
    assert rows[cost.BRANCH, "full"].seconds is None and branch.seconds > 0
    assert "+23%" in branch.words()[-1] and "paper" in table.caption()
    assert len(json.loads((tmp_path / "cost.json").read_text())["rows"]) == 6
    assert all(not one.requires_grad for one in toy_base.denoiser.parameters())  # the base is as it was


@pytest.mark.slow
def test_full_size_is_counted_without_weights(toy_base, tmp_path):
    table = make_cost(toy_base, Plan(num=2, steps=1), tmp_path)
    trained = {row.name: row.trained for row in table.rows if row.base == cost.FULL_SIZE}
    assert trained[cost.BRANCH] == 361_279_120 and trained[cost.TUNED] == 859_520_964
