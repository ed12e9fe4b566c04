"""Exact resume: a run interrupted anywhere ends as if it never was."""

import dataclasses
import errno
import itertools
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from tiny_runs import CANNY, UNION, assert_like, ended, equal, leftovers, log_of

from controlkit import precision, train
from controlkit.backbones import load_base
from controlkit.branch import ControlSpec
from controlkit.controls import new_control, new_union
from controlkit.controls.union import UnionBranch
from controlkit.data import make_fill50k
from controlkit.errors import UserError
from controlkit.formats import SavedControl, load_control, save_control
from controlkit.measure import Figure, Verdict, obedience
from controlkit.train import train_control
from controlkit.train.checkpoints import go_back
from controlkit.train.ending import next_command
from controlkit.train.recipe import Recipe, read_recipe
from processes import die_at


@pytest.fixture(scope="module")
def whole(tiny_recipe, toy_base, tmp_path_factory):
    """The tiny recipe's run, uninterrupted: its folder."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:  # module fixtures come before conftest's own patch
        patch.setattr(precision, "bf16_pays", lambda device_type: False)
        list(train_control(tiny_recipe(), out, toy_base))
    return out


@pytest.fixture
def stopped(whole, tmp_path):
    """The run as it was after step 5, its last checkpoint that of step 4."""
    out = tmp_path / "stopped"
    shutil.copytree(whole, out)
    for gone in ("control", "checkpoints/step-0000006", "samples/step-0000006.png"):
        shutil.rmtree(out / gone) if (out / gone).is_dir() else (out / gone).unlink()
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(lines[:5]))
    return out


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_run_stopped_and_run_again_ends_as_if_never_stopped(tiny_recipe, steps, whole, toy_base, tmp_path):
    list(itertools.islice(train_control(tiny_recipe(), tmp_path, toy_base), steps))
    again = [record.step for record in train_control(tiny_recipe(), tmp_path, toy_base)]
    assert again == list(range(2 * (steps // 2) + 1, 7)), "it goes on from the last checkpoint"
    assert_like(whole, tmp_path)


def test_a_finished_run_has_nothing_left_to_do(tiny_recipe, whole, toy_base, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    assert not list(train_control(tiny_recipe(), tmp_path / "run", toy_base))
    assert_like(whole, tmp_path / "run")


def test_an_xs_is_trained_measured_and_goes_on_to_the_bit(tiny_recipe, toy_base, tmp_path):
    recipe = tiny_recipe(control={"body": "xs"}, steps=4, ema=0.5)
    list(train_control(recipe, tmp_path / "whole", toy_base))
    list(itertools.islice(train_control(recipe, tmp_path / "stopped", toy_base), 3))
    list(train_control(recipe, tmp_path / "stopped", toy_base))
    assert_like(tmp_path / "whole", tmp_path / "stopped")
    trained = load_control(tmp_path / "whole", toy_base).branch
    assert trained.spec == ControlSpec(body="xs") and trained.network.mid_block.ctrl_to_base.weight.any()
    wider = {"body": "xs", "size_ratio": 0.75, "start_from": str(tmp_path / "whole")}
    with pytest.raises(UserError, match=r"another width: set control\.size_ratio"):
        next(train_control(tiny_recipe(control=wider), tmp_path / "wider", toy_base))


@pytest.mark.parametrize("body", ["copy", "xs"])
def test_a_control_of_sdxl_s_anatomy_is_trained_and_goes_on_where_it_stopped(tiny_recipe, body, xl_base, tmp_path):
    recipe = tiny_recipe(steps=4, evaluation={"every": 0}, control={"body": body})
    whole = list(train_control(recipe, tmp_path / "whole", xl_base))
    begun = train_control(recipe, tmp_path / "stopped", xl_base)
    for _ in range(2):
        next(begun)
    begun.close()
    rest = list(train_control(recipe, tmp_path / "stopped", xl_base))
    assert [record.loss for record in whole[2:]] == [record.loss for record in rest]
    assert load_control(tmp_path / "whole", xl_base).trained["step"] == 4


@pytest.mark.parametrize("source", ["scenes", "world"])
def test_a_union_is_trained_and_ends_the_same_whether_stopped_or_not(
    tiny_recipe, source, toy_base, fake_packages, tmp_path
):
    recipe = tiny_recipe(**UNION, steps=4, batch=4)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": source})})
    list(train_control(recipe, tmp_path / "whole", toy_base))
    list(itertools.islice(train_control(recipe, tmp_path / "stopped", toy_base), 3))
    list(train_control(recipe, tmp_path / "stopped", toy_base))
    assert_like(tmp_path / "whole", tmp_path / "stopped")
    saved = load_control(tmp_path / "whole", toy_base)
    assert type(saved.branch) is UnionBranch and saved.trained["data"] == source
    assert saved.hints == train.hint_specs(recipe.control) and list(saved.hints) == UNION["control"]["types"]
    assert saved.hints["inpaint"].mask_value == -1 and saved.hints["canny"].options == {"low": 100.0, "high": 200.0}
    fresh = new_union(toy_base).state_dict()
    changed = {key for key, value in saved.branch.state_dict().items() if not torch.equal(value, fresh[key])}
    assert "control_add_embedding.linear_2.weight" in changed and "joins.middle.weight" in changed
    assert not any(key.startswith("spatial_ch_projs") for key in changed), "types are told by their code alone"


def test_evaluations_before_an_interruption_still_count(tiny_recipe, toy_base, tmp_path, monkeypatch):
    figure = Figure(0.5, 0.4, 0.6)
    changed = {"obedience": figure, "floor": Figure(0.1, 0.1, 0.1), "ceiling": Figure(0.9, 0.9, 0.9)}
    monkeypatch.setattr(
        "controlkit.train.evaluation.obedience", lambda *scores: dataclasses.replace(obedience(*scores), **changed)
    )
    list(itertools.islice(train_control(tiny_recipe(), tmp_path, toy_base), 4))
    last = list(train_control(tiny_recipe(), tmp_path, toy_base))[-1]
    assert last.verdict == "control found at step 3"


@pytest.mark.parametrize("garbage", ['{"step": 5, "lo', "\0\0\0"])
def test_a_line_cut_short_is_dropped(tiny_recipe, garbage, whole, stopped, toy_base):
    log = stopped / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]) + garbage)
    list(train_control(tiny_recipe(), stopped, toy_base))
    assert_like(whole, stopped)


@pytest.mark.parametrize("number", [1, 3, 6, 8, 11])
def test_what_a_kill_leaves_half_written_is_removed(tiny_recipe, number, whole, stopped, toy_base, monkeypatch):
    """Each file and folder is renamed into its place; here the power goes just before the numbered one is."""
    rename, renames = os.replace, itertools.count(1)

    def last_rename(*names):
        if next(renames) == number:
            raise KeyboardInterrupt
        rename(*names)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", last_rename)
        for tidying in ("pathlib.Path.unlink", "shutil.rmtree"):
            patch.setattr(tidying, lambda *args, **kwargs: None)
        with pytest.raises(KeyboardInterrupt):
            list(train_control(tiny_recipe(), stopped, toy_base))
    assert leftovers(stopped)
    list(train_control(tiny_recipe(), stopped, toy_base))
    assert_like(whole, stopped)


def test_resuming_goes_back_to_the_run_s_thread_count(tiny_recipe, stopped, toy_base, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    next(train_control(tiny_recipe(), stopped, toy_base))
    assert asked == [1]


@pytest.mark.parametrize("gone", [None, "checkpoints"])
def test_resuming_goes_on_in_the_run_s_number_format(tiny_recipe, gone, whole, stopped, toy_base, monkeypatch):
    if gone:
        shutil.rmtree(stopped / gone)
    monkeypatch.setattr(precision, "_settled", {})
    monkeypatch.setattr(precision, "bf16_pays", lambda device_type: True)  # the probe changed its mind
    list(train_control(tiny_recipe(), stopped, toy_base))
    assert_like(whole, stopped)


def test_a_run_that_another_process_holds_is_left_alone(tiny_recipe, stopped, toy_base):
    before = (stopped / "log.jsonl").read_bytes()
    with FileLock(stopped / ".lock"), pytest.raises(UserError, match="Another process is training"):
        next(train_control(tiny_recipe(), stopped, toy_base))
    assert (stopped / "log.jsonl").read_bytes() == before


def test_an_unreadable_checkpoint_is_named(tiny_recipe, stopped, toy_base):
    (state := stopped / "checkpoints" / "step-0000004" / "state.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"Delete .*step-0000004 and run again"):
        next(train_control(tiny_recipe(), stopped, toy_base))
    assert state.read_bytes() == b"torn"


def test_the_neighbour_is_needed_at_the_start_only(tiny_recipe, toy_base, drawn_joins, tmp_path):
    save_control(tmp_path / "near", SavedControl(drawn_joins(new_control(toy_base)), CANNY), toy_base)
    recipe = tiny_recipe(control={"start_from": str(tmp_path / "near")})
    list(itertools.islice(train_control(recipe, tmp_path / "run", toy_base), 3))
    shutil.rmtree(tmp_path / "near")
    assert len(list(train_control(recipe, tmp_path / "run", toy_base))) == 4


def test_resuming_on_other_weights_of_the_base_is_refused(tiny_recipe, stopped, toy_base, toy_folder):
    other_base = load_base(toy_folder)
    other_base.unet.conv_out.weight.data *= 2
    with pytest.raises(UserError, match=rf"{toy_base.digest}, now {other_base.digest}"):
        next(train_control(tiny_recipe(), stopped, other_base))


LONG = {"steps": 15, "checkpoint_every": 3, "evaluation": {"every": 4, "num": 2, "steps": 1}}
CALLS = {  # what a process is killed at: a function of the run
    "encode": "controlkit.backbones.unet.UNetBase.encode_moments",
    "rename": "os.replace",
    "delete": "shutil.rmtree",
    "step": "controlkit.train.state.TrainState.step",
    "measure": "controlkit.train.heldout.HeldoutLoss.measure",
    "sample": "controlkit.train.evaluation.write_png",
    "log": "controlkit.train.run.Run._log_record",
    "keep": "controlkit.train.run.Run.keep",
    "state": "controlkit.train.checkpoints.write_tensors",
    "control": "controlkit.train.checkpoints.save_control",
    "finish": "controlkit.train.run.Run.finish",
}
KILLS = [  # one run, killed again and again: at which of a process's calls, before it or after it
    ("encode", 1, "before"), ("encode", 1, "after"), ("rename", 1, "before"), ("rename", 1, "after"),
    ("rename", 2, "before"), ("rename", 3, "before"), ("rename", 3, "after"), ("rename", 5, "after"),
    ("step", 1, "before"), ("step", 2, "after"), ("log", 3, "before"), ("keep", 1, "before"), ("control", 1, "after"),
    ("state", 1, "before"), ("state", 1, "after"), ("keep", 1, "after"), ("measure", 1, "before"), ("log", 1, "after"),
    ("sample", 1, "before"), ("sample", 1, "after"), ("delete", 1, "before"), ("keep", 2, "after"),
    ("step", 1, "after"), ("finish", 1, "before"),
]  # fmt: skip
FEWER_KILLS = [  # one for each kind of place
    ("encode", 1, "after"), ("rename", 1, "after"), ("rename", 2, "before"), ("step", 2, "after"), ("log", 3, "before"),
    ("control", 1, "after"), ("state", 1, "after"), ("measure", 1, "before"), ("sample", 1, "after"),
    ("delete", 1, "before"), ("keep", 2, "after"), ("finish", 1, "before"),
]  # fmt: skip


def _train_until(place, number, when, recipe, base, out):
    """The run in this process, which kills itself before or after its numbered call of a place."""
    die_at(CALLS[place], number, when)
    list(train_control(recipe, out, base))


def _train_and_be_killed(kills, recipe, base_folder, out, says):
    """The run in processes of its own, one after the other; says how each ended, and goes on when told."""
    precision.bf16_pays = lambda device_type: False
    torch.set_num_threads(1)
    base = load_base(base_folder)
    for kill in kills:
        if not (child := os.fork()):
            _train_until(*kill, recipe, base, out)
            os._exit(0)
        says.send((kill, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
        says.recv()


@pytest.mark.parametrize("kills", [FEWER_KILLS, pytest.param(KILLS, marks=pytest.mark.slow)], ids=len)
def test_a_run_killed_at_every_place_loses_nothing(kills, tiny_recipe, toy_folder, toy_base, tmp_path):
    recipe, out = tiny_recipe(**LONG), tmp_path / "run"
    list(train_control(recipe, tmp_path / "whole", toy_base))
    wanted = log_of(tmp_path / "whole")
    hears, says = multiprocessing.Pipe()
    arguments = (kills, recipe, toy_folder, out, says)
    process = multiprocessing.get_context("spawn").Process(target=_train_and_be_killed, args=arguments, daemon=True)
    process.start()
    says.close()
    for kill in kills:
        assert hears.recv() == (kill, -signal.SIGKILL), "it ended before it was killed"
        log = (out / "log.jsonl").read_text().splitlines(keepends=True) if (out / "log.jsonl").is_file() else []
        whole_lines = [json.loads(line) for line in log if line.endswith("\n")]
        assert [{k: v for k, v in line.items() if k != "seconds"} for line in whole_lines] == wanted[: len(whole_lines)]
        assert not (out / "control").exists(), f"{kill}: all its steps were made before"
        hears.send("go on")
    process.join()
    list(train_control(recipe, out, toy_base))
    assert_like(tmp_path / "whole", out)


def _full_disk(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["save_control", "write_tensors", "os.replace"])
def test_a_full_disk_costs_no_checkpoint_and_the_run_goes_on_later(
    tiny_recipe, call, whole, toy_base, tmp_path, monkeypatch
):
    run = train_control(tiny_recipe(), tmp_path, toy_base)
    list(itertools.islice(run, 3))
    with monkeypatch.context() as patch:
        patch.setattr(f"controlkit.train.checkpoints.{call}", _full_disk)
        with pytest.raises(UserError, match=r"step 4 .*No space left on device.*Kept: step-0000002.*go on"):
            list(run)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000002"]
    assert not leftovers(tmp_path)
    list(train_control(tiny_recipe(), tmp_path, toy_base))
    assert_like(whole, tmp_path)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"batch": 4}, "batch is 4 and was 2"),
        ({"seed": 3}, "seed is 3 and was 0"),
        ({"control": {"join": "gaussian"}}, "control.join is 'gaussian' and was 'zero'"),
        ({"data": {"count": 6}, "lr": 0.1}, "data.count is 6 and was 8"),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused_and_the_difference_named(
    tiny_recipe, change, key, whole, toy_base
):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=rf"another recipe: {key}\. Run with these as they were to go on.*start_from="):
        next(train_control(tiny_recipe(**change), whole, toy_base))
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_a_recipe_laid_out_otherwise_is_the_same_recipe(tiny_recipe, whole, toy_base, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "recipe.yaml"
    path.write_text(f"# my run\n{path.read_text()}")
    assert not list(train_control(tiny_recipe(), tmp_path / "run", toy_base))


def test_a_run_made_longer_is_the_longer_run_where_its_rate_knows_of_no_end(tiny_recipe, toy_base, tmp_path):
    whole, _ = ended(tiny_recipe(steps=4), tmp_path / "whole", toy_base)
    ended(tiny_recipe(steps=2), tmp_path / "run", toy_base)
    longer = tiny_recipe(steps=4, keep=None, checkpoint_every=1, evaluation={"patience": 3})
    went_on, log = ended(longer, tmp_path / "run", toy_base)
    assert equal(went_on, whole) and [line["step"] for line in log] == [1, 2, 3, 4]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) >= 3, "null keeps all"
    assert read_recipe(tmp_path / "run" / "recipe.yaml") == longer


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({"cooldown": 1}, {"cooldown": 1, "steps": 4}, "steps is 4 and was 2"),
        ({}, {"steps": 4, "schedule": "cosine"}, "schedule is 'cosine' and was 'constant'; steps is 4 and was 2"),
        ({"max_minutes": 1e-9}, {"max_minutes": 60}, "max_minutes is 60.0 and was 1e-09"),
        ({}, {"lr": 1e-4, "steps": 4}, "lr is 0.0001 and was 0.001; steps is 4 and was 2"),
    ],
)
def test_a_finished_or_budgeted_run_goes_on_with_other_rates_and_says_so(
    tiny_recipe, before, after, words, toy_base, tmp_path
):
    plain, said = {"steps": 2, "evaluation": {"every": 0}}, []
    made = len(list(train_control(tiny_recipe(**plain | before), tmp_path, toy_base)))
    first = (tmp_path / "recipe.yaml").read_bytes()
    recipe = tiny_recipe(**plain | after)
    records = list(train_control(recipe, tmp_path, toy_base, lambda name, total: said.append(name)))
    assert [record.step for record in records] == list(range(made + 1, recipe.steps + 1))
    [note] = [line for line in said if line.startswith("note: ")]
    mixed = "so no single recipe describes this run" if "max_minutes" not in words else ""
    assert f"{words}: from step {made} on" in note and mixed in note
    assert (tmp_path / f"recipe-to-step-{made:07d}.yaml").read_bytes() == first


def test_a_run_goes_on_from_a_checkpoint_of_one_s_choice(tiny_recipe, toy_base, tmp_path):
    recipe = tiny_recipe(keep=None, evaluation={"every": 2, "num": 2, "steps": 1})
    list(train_control(recipe, tmp_path / "whole", toy_base))
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    with pytest.raises(UserError, match=r"has no checkpoint of step 3: those it has are of steps 2, 4, 6"):
        go_back(tmp_path / "run", 3)
    go_back(tmp_path / "run", 2)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000002"]
    assert [record.step for record in train_control(recipe, tmp_path / "run", toy_base)] == [3, 4, 5, 6]
    assert_like(tmp_path / "whole", tmp_path / "run")
    go_back(tmp_path / "run", 6)
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(UserError, match="Another process is training"):
        go_back(tmp_path / "run", 2)
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 3
    with pytest.raises(UserError, match="those it has are of steps none"):
        go_back(tmp_path / "nowhere", 2)


def test_a_run_does_not_go_on_with_a_folder_that_has_changed(tiny_recipe, toy_base, tmp_path):
    """What is held out would be drawn anew, and be measured on after it was trained on."""
    list(make_fill50k(tmp_path / "set", 12, toy_base.size))
    recipe = tiny_recipe(data={"source": str(tmp_path / "set"), "count": None}, steps=3, checkpoint_every=1)
    next(run := train_control(recipe, tmp_path / "run", toy_base))
    run.close()
    listing = tmp_path / "set" / "prompt.json"
    lines = listing.read_text().splitlines()
    gone = Path(json.loads(lines[0])["target"]).name
    renamed = [*lines[:-1], json.dumps(json.loads(lines[-1]) | {"prompt": "another"})]
    for changed, words in ((lines[1:], f"gone or with another caption: .*{gone}"), (renamed, "new: .*another")):
        listing.write_text("\n".join(changed))
        with pytest.raises(UserError, match=rf"has other pictures or captions than when the run in .*{words}"):
            next(train_control(recipe, tmp_path / "run", toy_base))
    listing.write_text("\n".join(lines))
    assert [record.step for record in train_control(recipe, tmp_path / "run", toy_base)] == [2, 3]


@pytest.mark.parametrize(
    ("losses", "step", "kept"), [([0.9, 0.8], 2, False), ([0.8, 0.9], 2, True), ([0.9, 0.8], 4, True)]
)
def test_the_best_of_later_steps_goes_with_them(losses, step, kept, tmp_path):
    lines = [
        {"step": 2 * i, "loss": 1.0, "seconds": 1.0, "relative_loss": {"": [loss]}} for i, loss in enumerate(losses, 1)
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("best", "checkpoints/step-0000002", "checkpoints/step-0000004"):
        (tmp_path / name).mkdir(parents=True)
    go_back(tmp_path, step)
    assert (tmp_path / "best").exists() is kept
    command = next_command(tmp_path, Recipe(), "steps", Verdict("found", "why", False), 2, 4)
    assert command.split()[2] == str(tmp_path / "best" if kept else tmp_path), "what is there"


@pytest.mark.parametrize(
    ("begun", "noted"),
    [
        ({"threads": 1, "processes": 2}, "begun in 2 process(es) of 1 thread(s), going on in 1 of 1"),
        ({"threads": 512, "processes": 1}, "begun in 1 process(es) of 512 thread(s)"),
        ({"threads": 1, "processes": 1}, ""),
        ({"threads": 1}, ""),
    ],
)
def test_another_layout_uses_what_the_machine_has_and_says_that_it_is_not_exact(
    tiny_recipe, begun, noted, stopped, toy_base, monkeypatch
):
    path, said, asked = stopped / "machine.json", [], []
    held = json.loads(path.read_text())
    del held["processes"]
    path.write_text(json.dumps(held | begun))
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    next(train_control(tiny_recipe(), stopped, toy_base, lambda name, total: said.append(name)))
    notes = [line for line in said if "thread(s)" in line]
    assert asked == [] and bool(notes) is bool(noted) and all(noted in line for line in notes)
    assert all("not equal to the bit" in line for line in notes)
    now = json.loads(path.read_text())
    assert (now["threads"], now["processes"], now["format"]) == (1, 1, held["format"])
