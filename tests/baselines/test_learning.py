"""The loop that trains opponents: exact resume, stages, cost, the curve; and the commands."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from controlkit.baselines import Diverged, Settings, controlled, load_baseline, opponent, read_about, train_baseline
from controlkit.baselines.curves import Curve, write_curve
from controlkit.errors import Invalid, Mismatch
from controlkit.formats import WEIGHTS

SETTINGS = Settings(steps=4, batch=2, rate=1e-3, scenes=8, checkpoint_every=2)


def trained(base, material, out, name="piti", settings=SETTINGS, **more):
    return list(train_baseline(name, base, settings, out, material=material, **more))


@pytest.fixture(scope="module")
def whole_of(toy_base, material_for, tmp_path_factory):
    """``whole_of(name, kind)``: the folder of a training that was not interrupted, and its records."""
    made = {}

    def make(name, kind="seg"):
        if name not in made:
            out = tmp_path_factory.mktemp(name)
            made[name] = out, trained(toy_base, material_for(kind), out, name)
        return made[name]

    return make


def same(a, b):
    a, b = (load_file(one / WEIGHTS) for one in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def log_of(out):
    lines = (out / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.mark.parametrize(("name", "stop"), [("piti", 2), ("sketch-guided", 3)])
def test_an_interrupted_training_ends_as_a_whole_one_bit_for_bit(
    toy_base, material_for, whole_of, tmp_path, name, stop
):
    kind = "canny" if name == "sketch-guided" else "seg"
    material, (whole, _), cut = material_for(kind), whole_of(name, kind), tmp_path
    made = []
    for record in train_baseline(name, toy_base, SETTINGS, cut, material=material, stopping=lambda: len(made) == stop):
        made.append(record)
    assert len(made) == stop and not (cut / WEIGHTS).exists()
    rest = trained(toy_base, material, cut, name)
    assert [one.step for one in rest] == list(range(stop + 1, 5))
    assert same(whole, cut) and log_of(whole) == log_of(cut)
    assert read_about(whole).flops == read_about(cut).flops > 0
    seen = [value for key, value in load_file(whole / WEIGHTS).items() if key.endswith("num_batches_tracked")]
    assert all(value == 4 for value in seen)  # the step in which operations are counted is not seen


def test_a_killed_training_goes_on_from_its_last_checkpoint(toy_base, material_for, whole_of, tmp_path):
    (whole, _), killed = whole_of("lite"), tmp_path
    running = train_baseline("lite", toy_base, SETTINGS, killed, material=material_for("seg"))
    for _ in range(3):
        next(running)
    running.close()
    assert len(log_of(killed)) == 3
    assert trained(toy_base, material_for("seg"), killed, "lite")[0].step == 3  # after the checkpoint of step 2
    assert same(whole, killed) and log_of(whole) == log_of(killed)


def test_stages_rates_and_cost_are_in_the_records(toy_base, whole_of):
    out, records = whole_of("piti")
    assert [one.stage for one in records] == ["encoder"] * 2 + ["all"] * 2
    assert records[0].flops < records[-1].flops  # gradients of the denoiser's weights, too
    assert records[-1].rate < records[0].rate == 1e-3
    about = read_about(out)
    assert about.step == 4 and about.flops == sum(one.flops for one in records) and about.seconds > 0
    assert about.parameters == sum(p.numel() for p in load_baseline(out, toy_base)[0].parameters())


def test_a_training_that_has_ended_has_nothing_left_to_do_or_goes_on(toy_base, material_for, tmp_path):
    trained(toy_base, material_for("seg"), tmp_path, "lite")
    assert trained(toy_base, material_for("seg"), tmp_path, "lite") == []
    longer = SETTINGS.model_copy(update={"steps": 5})
    assert [one.step for one in trained(toy_base, material_for("seg"), tmp_path, "lite", longer)] == [5]
    assert read_about(tmp_path).step == 5


def test_operations_that_are_spent_end_the_training_and_its_stages(toy_base, material_for, tmp_path):
    [first, *_] = trained(
        toy_base, material_for("seg"), tmp_path / "first", settings=SETTINGS.model_copy(update={"steps": 1})
    )
    budget = SETTINGS.model_copy(update={"steps": 100, "pflop": 4 * first.flops / 1e15})
    records = trained(toy_base, material_for("seg"), tmp_path / "budget", settings=budget)
    spent = sum(one.flops for one in records)
    assert 4 * first.flops <= spent < 4 * first.flops + records[-1].flops
    assert {one.stage for one in records} == {"encoder", "all"} and records[-1].rate < 1e-3


def test_time_that_runs_out_ends_the_training(toy_base, material_for, tmp_path):
    settings = SETTINGS.model_copy(update={"minutes": 1e-6})
    assert trained(toy_base, material_for("seg"), tmp_path, settings=settings) == []
    load_baseline(tmp_path, toy_base)  # whole, if untrained


def test_a_folder_of_another_training_is_refused_and_a_longer_one_goes_on(toy_base, material_for, tmp_path):
    running = train_baseline("lite", toy_base, SETTINGS, tmp_path, material=material_for("seg"))
    for _ in range(3):
        next(running)
    running.close()
    with pytest.raises(Mismatch, match=r"rate is 0\.01 and was 0\.001"):
        trained(toy_base, material_for("seg"), tmp_path, "lite", SETTINGS.model_copy(update={"rate": 0.01}))
    with pytest.raises(Mismatch, match="name is 'gaussian'"):
        trained(toy_base, material_for("seg"), tmp_path, "gaussian")
    longer = SETTINGS.model_copy(update={"steps": 5})
    assert [one.step for one in trained(toy_base, material_for("seg"), tmp_path, "lite", longer)] == [3, 4, 5]


def test_a_damaged_checkpoint_and_a_loss_that_is_no_number_are_named(toy_base, material_for, tmp_path, monkeypatch):
    running = train_baseline("lite", toy_base, SETTINGS, tmp_path, material=material_for("seg"))
    for _ in range(2):
        next(running)
    running.close()
    (tmp_path / "state.safetensors").write_bytes(b"nothing")
    with pytest.raises(Invalid, match="delete it"):
        trained(toy_base, material_for("seg"), tmp_path, "lite")
    monkeypatch.setattr(controlled, "objective", lambda *given: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(Diverged, match="no number"):
        trained(toy_base, material_for("seg"), tmp_path / "wild", "lite")


def test_the_curve_is_thinned_and_drawn(whole_of, tmp_path):
    shutil.copytree(whole_of("piti")[0], tmp_path, dirs_exist_ok=True)
    write_curve(tmp_path)
    facts = json.loads((tmp_path / "curve.json").read_text())
    assert [step for step, _ in facts["curve"]["encoder"]] == [1, 2]
    assert facts["name"] == "piti" and facts["flops"] > 0
    page = (tmp_path / "curve.html").read_text()
    assert "PITI" in page and "loss, all" in page and "PFLOP" in page
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    many = "".join(json.dumps(line | {"step": step, "loss": float(step)}) + "\n" for step in range(1, 1001))
    (tmp_path / "log.jsonl").write_text(many)
    points = Curve.of(tmp_path).stages["encoder"]
    assert len(points) == 200 and points[0] == (5, 3.0) and points[-1] == (1000, 998.0)


def test_the_command_trains_prints_the_cost_and_lists(run, toy_folder, tmp_path):
    out = tmp_path / "lite"
    given = ("--base", toy_folder, "--steps", 2, "--batch", 2, "--scenes", 8, "--device", "cpu")
    code, said, _ = run("baseline", "train", "lite", "--out", out, "--rate", "high", *given)
    assert code == 0 and "2 steps" in said and "PFLOP" in said
    assert read_about(out).settings.rate == opponent("lite").rates[-1] and (out / "curve.html").is_file()
    code, _, err = run("baseline", "train", "lite", "--out", tmp_path / "x", "--rate", "fast", *given)
    assert code == 2 and f"low ({opponent('lite').rates[0]:g})" in err
    code, said, _ = run("baseline", "train", "no-control", "--out", tmp_path / "none", *given)
    assert code == 0 and "nothing to train" in said
    code, said, _ = run("baseline", "list")
    assert code == 0 and "PITI" in said and "sketch-guided" in said
