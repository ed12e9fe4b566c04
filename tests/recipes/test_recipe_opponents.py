"""The recipe that trains the opponents, each at the best of its rates: trainings and figures by stand-ins."""

import importlib
import json
from pathlib import Path

import pytest
import typer

from controlkit.baselines import Diverged, opponent
from controlkit.errors import Mismatch

RATES = opponent("lite").rates


@pytest.fixture
def recipe(monkeypatch, toy_base):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "recipes")
    module = importlib.import_module("opponents")
    monkeypatch.setattr(module, "load_base", lambda name: toy_base)
    monkeypatch.setattr(module, "material_of", lambda *given: None)
    monkeypatch.setattr(module, "tried", lambda base, name, folder, num: {"rate": float(folder.name), "fidelity": 0.5})
    return module


def trainings(recipe, monkeypatch, error, rates):
    """The rates that are trained whole; tries at ``rates`` raise."""
    whole = []

    def train(base, name, settings, folder, material):
        if folder.parent.name != name:
            whole.append(settings.rate)
        elif settings.rate in rates:
            raise error

    monkeypatch.setattr(recipe, "train", train)
    return whole


def test_a_rate_at_which_the_loss_is_no_number_is_left_out(recipe, monkeypatch, tmp_path):
    whole = trainings(recipe, monkeypatch, Diverged("no number"), RATES[:1])
    recipe.main(tmp_path, ["lite"])
    assert whole == [RATES[1]]
    assert [one["rate"] for one in json.loads((tmp_path / "rates.json").read_text())["lite"]] == [*RATES[1:]]


def test_other_faults_and_no_rate_at_all_end_it(recipe, monkeypatch, tmp_path):
    whole = trainings(recipe, monkeypatch, Mismatch("another training"), RATES[:1])
    with pytest.raises(Mismatch):
        recipe.main(tmp_path, ["lite"])
    trainings(recipe, monkeypatch, Diverged("no number"), RATES)
    with pytest.raises(typer.BadParameter, match="none of its rates"):
        recipe.main(tmp_path, ["lite"])
    assert not whole
