"""How a run ends: why, with which verdict, and what to type next; and a run that diverges."""

import dataclasses
import itertools
import json
import shlex

import pytest
from tiny_runs import UNION, log_of

from controlkit.data import make_fill50k
from controlkit.errors import Invalid, UserError
from controlkit.measure import Figure, Verdict, obedience
from controlkit.train import Record, objective, read_ending, train_control
from controlkit.train.ending import ENDING, Ending, next_command, why_ended
from controlkit.train.evaluation import Evaluator
from controlkit.train.heldout import HeldoutLoss
from controlkit.train.recipe import parse_recipe, read_recipe
from controlkit.train.records import divergence
from controlkit.train.schedule import Clock


@pytest.fixture
def measured(monkeypatch):
    """``measured(low, ...)``: the lower bounds that evaluations find, one after the other."""

    def find(*lows):
        left = iter(lows)
        around = {"floor": Figure(0.1, 0.1, 0.1), "ceiling": Figure(0.9, 0.9, 0.9)}

        def told(*scores):
            low = next(left)
            return dataclasses.replace(obedience(*scores), obedience=Figure(low + 0.1, low, low + 0.2), **around)

        monkeypatch.setattr("controlkit.train.evaluation.obedience", told)
        return left

    return find


@pytest.mark.parametrize(
    ("lows", "finding", "words"),
    [
        ([0.0, 0.1], "not found", "the lower bound has to be at least 0.25"),
        ([0.0, 0.5, 0.4], "found", "obedience 0.600 [0.500, 0.700], and 0.500 [0.400, 0.600] with other seeds"),
        ([0.5, 0.5, 0.1], "not found", "in both"),
    ],
)
def test_a_run_ends_with_a_verdict_on_what_it_ends_with(
    tiny_recipe, lows, finding, words, toy_base, measured, tmp_path, monkeypatch
):
    left, seeds, made = measured(*lows), [], Evaluator.__init__

    def noted(evaluator, base, frozen, plan, *more):
        seeds.append(plan.first_seed)
        made(evaluator, base, frozen, plan, *more)

    monkeypatch.setattr(Evaluator, "__init__", noted)
    list(train_control(tiny_recipe(), tmp_path, toy_base))
    ending = read_ending(tmp_path)
    assert seeds == ([0, 2] if len(lows) == 3 else [0]), "a second evaluation has other seeds"
    assert (ending.step, ending.reason, ending.verdict.finding) == (6, "steps", finding)
    assert words in ending.verdict.why and ending.verdict.quality_kept is None
    assert ending.lines()[0] == "Ended after all 6 steps." and "quality not measured" in ending.lines()[1]
    assert next(left, None) is None, "a second evaluation where the first found control, and not otherwise"
    asked = {"found": ["controlkit", "generate"], "not found": ["controlkit", "train"]}[finding]
    assert shlex.split(ending.next)[:2] == asked
    assert not list(train_control(tiny_recipe(), tmp_path, toy_base)) and read_ending(tmp_path) == ending


def test_a_verdict_is_the_same_where_the_run_was_killed_before_it(tiny_recipe, toy_base, tmp_path):
    list(train_control(tiny_recipe(), tmp_path, toy_base))
    ending = read_ending(tmp_path)
    assert ending.verdict.finding == "cannot be measured" and "ceiling" in ending.verdict.why
    (tmp_path / "ending.json").unlink()
    assert not list(train_control(tiny_recipe(), tmp_path, toy_base)) and read_ending(tmp_path) == ending


@pytest.mark.parametrize("minutes", [1e-9, 3 / 60])
def test_a_run_that_its_budget_ends_is_measured_and_told_how_to_go_on(
    tiny_recipe, minutes, toy_base, measured, tmp_path, monkeypatch
):
    measured(0.1, 0.1)
    now = itertools.count()
    recipe = tiny_recipe(max_minutes=minutes, evaluation={"every": 100, "num": 2, "steps": 1})
    with monkeypatch.context() as patch:
        patch.setattr(Clock, "_seconds", property(lambda clock: float(next(now)) / 2))
        records = list(train_control(recipe, tmp_path, toy_base))
    last = len(records)
    assert (last == 1 if minutes < 1e-3 else 1 < last < 6) and records[-1].evaluation, "measured on what it ends with"
    ending = read_ending(tmp_path)
    assert (ending.reason, ending.step, ending.verdict.finding) == ("max_minutes", last, "not found")
    assert ending.why == f"Ended at step {last} of 6: max_minutes is {minutes:g}."
    words = shlex.split(ending.next)
    assert words[:4] == ["controlkit", "train", str(tmp_path / "recipe.yaml"), "--set"]
    assert read_recipe(tmp_path / "recipe.yaml", [words[4]]).max_minutes == pytest.approx(2 * minutes), "a limit still"
    longer = read_recipe(tmp_path / "recipe.yaml", ["max_minutes=10"])
    assert [record.step for record in train_control(longer, tmp_path, toy_base)] == list(range(last + 1, 7))
    assert read_ending(tmp_path).reason == "steps"


def test_a_target_and_patience_are_told_as_reasons(tiny_recipe, toy_base, measured, tmp_path):
    measured(0.1, 0.6, 0.6)
    recipe = tiny_recipe(steps=9, evaluation={"every": 2, "num": 2, "steps": 1, "target": 0.5})
    list(train_control(recipe, tmp_path / "target", toy_base))
    ending = read_ending(tmp_path / "target")
    assert (ending.reason, ending.step, ending.verdict.finding) == ("target", 4, "found")
    assert "reached the target, 0.5" in ending.why
    measured(0.2, 0.1, 0.1)
    recipe = tiny_recipe(steps=9, evaluation={"every": 2, "num": 2, "steps": 1, "patience": 2})
    list(train_control(recipe, tmp_path / "patience", toy_base))
    ending = read_ending(tmp_path / "patience")
    assert (ending.reason, ending.step) == ("patience", 6) and "no better than that of step 2" in ending.why


def test_what_cannot_be_measured_is_told_with_the_reason_and_what_to_do(tiny_recipe, toy_base, tmp_path):
    list(make_fill50k(tmp_path / "set", 24, toy_base.size))
    cases = {
        "none": (tiny_recipe(evaluation={"every": 0}), "evaluation.every is 0", ["evaluate", "none"]),
        "union": (tiny_recipe(**UNION | {"steps": 2, "batch": 4}), "evaluation.every is 0",
                  ["evaluate", "union:canny"]),
        "ted": (tiny_recipe(control={"annotator": "ted"}, data={"source": str(tmp_path / "set")}, steps=2),
                "Nothing here finds", ["watch", "ted"]),
    }  # fmt: skip
    for name, (recipe, words, command) in cases.items():
        list(train_control(recipe, tmp_path / name, toy_base))
        ending = read_ending(tmp_path / name)
        assert ending.verdict.finding == "cannot be measured" and words in ending.verdict.why
        told = shlex.split(ending.next)
        assert told[1] == command[0] and told[2] == str(tmp_path / command[1])
    assert "of that without control" in ending.verdict.why


def test_while_a_run_goes_on_it_has_no_ending(tiny_recipe, toy_base, tmp_path):
    list(train_control(tiny_recipe(steps=2), tmp_path, toy_base))
    assert read_ending(tmp_path).reason == "steps"
    run = train_control(tiny_recipe(steps=4), tmp_path, toy_base)
    next(run)
    assert read_ending(tmp_path) is None
    run.close()


@pytest.mark.parametrize("reason", ["steps", "max_minutes", "target", "patience", "interruption"])
@pytest.mark.parametrize("finding", ["found", "not found", "cannot be measured"])
@pytest.mark.parametrize("kept", [True, False, None])
def test_every_ending_has_words_and_a_command_and_is_read_as_it_was_written(reason, finding, kept, tmp_path):
    recipe = parse_recipe({"base": "some base", "max_minutes": 2, "evaluation": {"target": 0.5}})
    out = tmp_path / "a run"
    verdict = Verdict(finding, "why", kept)
    command = next_command(out, recipe, reason, verdict, 100, 200)
    words = shlex.split(command)
    assert words[0] == "controlkit" and any(word.startswith(str(out)) for word in words)
    if words[1] in ("generate", "evaluate"):
        assert words[-2:] == ["--base", "some base"]
    ending = Ending(200, reason, why_ended(reason, 200, recipe, 100), verdict, command)
    ending.write(out)
    assert read_ending(out) == ending and len(ending.lines()) == 3 and all(ending.lines())


HEALTHY = [0.3] * 20


@pytest.mark.parametrize(
    ("record", "losses", "words"),
    [
        (Record(20, 0.3, 1.0, relative={"": [0.9, 1.0, 1.1, 1.0]}, residuals={"middle": 4.0}), HEALTHY, ""),
        (Record(20, 0.3, 1.0, relative={"": [2.6] * 4}), HEALTHY, "loss relative to no control is 2.6"),
        (Record(20, 0.3, 1.0, relative={"canny": [1.0] * 4, "depth": [9.0] * 4}), HEALTHY, "control (depth) is 9"),
        (Record(20, 0.3, 1.0, relative={"": [float("nan")] * 4}), HEALTHY, "is nan"),
        (Record(20, 0.3, 1.0, residuals={"skip_0": 0.5, "middle": 1e18}), HEALTHY, "residual at middle is 1e"),
        (Record(20, 0.3, 1.0, residuals={"skip_0": float("inf")}), HEALTHY, "residual at skip_0 is inf"),
        (Record(20, 9.0, 1.0), [0.3] * 12 + [9.0] * 8, "loss of the last 8 steps is 9, and that of the first was 0.3"),
        (Record(9, 9.0, 1.0), [0.3] * 8 + [9.0], ""),
        (Record(20, 0.9, 1.0), [0.02] * 12 + [0.9] * 8, ""),
        (Record(20, 1.4, 1.0), [0.1] * 12 + [1.4] * 8, "loss of the last 8 steps is 1.4"),
        (Record(20, 5.0, 1.0), [4.0] * 12 + [5.0] * 8, ""),
    ],
)  # fmt: skip
def test_divergence_is_seen_and_nothing_else_is_taken_for_it(record, losses, words):
    found = divergence(record, losses)
    assert words in found and bool(words) == bool(found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"measure": {"": [2.6] * 4}}, "the loss relative to no control is 2.6"),
        ({"measure": {"": [float("nan")] * 4}}, "the loss relative to no control is nan"),
        ({"residuals": {"middle": 1e18}}, "the residual at middle is 1e"),
    ],
)
def test_a_run_that_diverges_ends_at_once_and_goes_on_with_a_lower_rate(
    tiny_recipe, change, words, toy_base, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        for name, value in change.items():
            patch.setattr(HeldoutLoss, name, lambda loss, branch, value=value: value)
        with pytest.raises(UserError, match=rf"Diverged at step 3: {words}.*rate is too high: it is 0\.001"):
            list(train_control(tiny_recipe(), tmp_path, toy_base))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000002"]
    assert not (tmp_path / "best").exists() and not (tmp_path / "control").exists()
    assert "NaN" not in (tmp_path / "log.jsonl").read_text() and len(log_of(tmp_path)) == 2
    ending = read_ending(tmp_path)
    assert (ending.step, ending.reason, ending.verdict) == (2, "divergence", None) and "from step 2 on" in ending.why
    change = next(word for word in shlex.split(ending.next) if word.startswith("lr="))
    lower = read_recipe(tmp_path / "recipe.yaml", [change])
    assert lower.lr == pytest.approx(1e-4)
    assert [record.step for record in train_control(lower, tmp_path, toy_base)] == [3, 4, 5, 6]


def test_a_loss_that_explodes_is_named_between_evaluations(tiny_recipe, toy_base, tmp_path, monkeypatch):
    recipe = tiny_recipe(steps=40, batch=2, evaluation={"every": 0}, checkpoint_every=4)
    run = train_control(recipe, tmp_path, toy_base)
    list(itertools.islice(run, 10))
    monkeypatch.setattr("controlkit.train.gradients.objective", lambda *args: 30 * objective(*args))
    with pytest.raises(UserError, match=r"Diverged at step 1[678]: the loss.*from step 1[26] on.*--from-step"):
        list(run)


def test_the_ending_in_the_folder_is_plain(tiny_recipe, toy_base, tmp_path):
    list(train_control(tiny_recipe(steps=1), tmp_path, toy_base))
    held = json.loads((tmp_path / "ending.json").read_text())
    assert set(held) == {"step", "reason", "why", "verdict", "next", "words"}


ENDED = {"step": 1, "reason": "steps", "why": "All steps.", "verdict": None, "next": "controlkit"}
LONG = "af Ended " * 400


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"words": [], "verdict": null, "colour": 1}',
        '{"words": [], "verdict": {"x": 1}}',
        *(json.dumps(ENDED | {key: LONG}) for key in ("why", "next")),
        json.dumps(
            {"step": 1, "reason": "steps", "why": "w", "next": "n", "verdict": {"finding": "found", "why": LONG}}
        ),
    ],
)
def test_a_damaged_ending_is_named(text, tmp_path):
    (tmp_path / ENDING).write_text(text)
    with pytest.raises(Invalid, match=r"ending\.json"):
        read_ending(tmp_path)
