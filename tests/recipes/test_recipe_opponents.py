"""The recipe that trains the opponents, each at the best of its rates: trainings and figures by stand-ins."""

import importlib
import json
from pathlib import Path

import pytest
import typer

from controlkit.baselines import Diverged, opponent
from controlkit.baselines.saved import About, read_about, save_baseline
from controlkit.errors import Mismatch
from controlkit.reproduce.entrants import entrant
from controlkit.sample import Request

RATES = opponent("lite").rates


@pytest.fixture
def recipe(monkeypatch, toy_base):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "recipes")
    module = importlib.import_module("opponents")
    monkeypatch.setattr(module, "load_base", lambda name: toy_base)
    monkeypatch.setattr(module, "material_of", lambda *given: None)
    best_at(module, monkeypatch, RATES[1])
    return module


def best_at(module, monkeypatch, best):
    """Tries at a rate are the better the nearer that is to the best one."""

    def tried(base, name, folder, num):
        return {"rate": float(folder.name), "fidelity": -abs(float(folder.name) - best)}

    monkeypatch.setattr(module, "tried", tried)


def test_the_strength_of_guidance_by_the_hint_is_chosen_by_fidelity(recipe, monkeypatch, tmp_path, toy_base):
    row = opponent("piti")
    about = About(name="piti", hint="seg", base="toy", base_digest=toy_base.digest)
    save_baseline(tmp_path / "piti", row.new(toy_base), about)
    monkeypatch.setattr(
        recipe,
        "tried",
        lambda base, name, folder, num, strength: {"strength": strength, "fidelity": -abs(strength - 1.6)},
    )
    recipe.choose_strength(toy_base, row, tmp_path, 2)
    assert read_about(tmp_path / "piti") == about.model_copy(update={"strength": 1.5})
    assert [one["strength"] for one in json.loads((tmp_path / "strengths.json").read_text())["piti"]] == [
        *row.strengths
    ]
    seen = []
    monkeypatch.setattr(type(row.new(toy_base)), "make", lambda self, requests: seen.extend(requests) or [])
    one = entrant("piti", "seg", toy_base, tmp_path)
    one.make([Request(guidance=4.0)])
    assert seen[0].guidance == 1.5 and one.cost.endswith("guidance 1.5")


def trainings(recipe, monkeypatch, error, rates):
    """The rates that are trained whole; tries at ``rates`` raise."""
    whole = []

    def train(base, row, settings, folder, material):
        if folder.parent.name != row.folder:
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


@pytest.mark.parametrize(
    ("best", "further", "chosen"),
    [
        (RATES[1], [], RATES[1]),
        (RATES[2], [0.015], RATES[2]),
        (0.015, [0.015, 0.037], 0.015),
        (1.0, [0.015, 0.037], 0.037),
        (RATES[0], [0.0004], RATES[0]),
        (0.0, [0.0004, 0.00016], 0.00016),
    ],
)
def test_a_best_rate_at_an_end_has_one_tried_beyond_it_twice_at_most(
    recipe, monkeypatch, tmp_path, best, further, chosen
):
    whole = trainings(recipe, monkeypatch, Diverged("no number"), ())
    best_at(recipe, monkeypatch, best)
    recipe.main(tmp_path, ["lite"])
    assert whole == [chosen]
    tries = [one["rate"] for one in json.loads((tmp_path / "rates.json").read_text())["lite"]]
    assert tries == [*RATES, *further]


def test_nothing_is_tried_beyond_a_rate_that_was_too_high(recipe, monkeypatch, tmp_path):
    whole = trainings(recipe, monkeypatch, Diverged("no number"), (RATES[2], 0.0004))
    best_at(recipe, monkeypatch, RATES[1])
    recipe.main(tmp_path, ["lite"])
    best_at(recipe, monkeypatch, 0.0)
    recipe.main(tmp_path, ["lite"])
    assert whole == [RATES[1], RATES[0]]


def test_other_hints_have_a_folder_of_their_own(recipe, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(recipe, "train", lambda base, row, settings, folder, material: seen.append((row.hint, folder)))
    recipe.main(tmp_path, ["lite", "sketch-guided"], hint="canny")
    tries = [tmp_path / "rates" / "lite-canny" / f"{rate:g}" for rate in RATES]
    assert seen[:4] == [("canny", folder) for folder in [*tries, tmp_path / "lite-canny"]]
    assert seen[-1] == ("canny", tmp_path / "sketch-guided")
    assert json.loads((tmp_path / "rates.json").read_text()).keys() == {"lite-canny", "sketch-guided"}


def test_other_faults_and_no_rate_at_all_end_it(recipe, monkeypatch, tmp_path):
    whole = trainings(recipe, monkeypatch, Mismatch("another training"), RATES[:1])
    with pytest.raises(Mismatch):
        recipe.main(tmp_path, ["lite"])
    trainings(recipe, monkeypatch, Diverged("no number"), RATES)
    with pytest.raises(typer.BadParameter, match="none of its rates"):
        recipe.main(tmp_path, ["lite"])
    assert not whole
