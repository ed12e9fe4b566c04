"""Ctrl-C and SIGTERM: the first saves a checkpoint, the second ends at once."""

import errno
import os
import shlex
import signal
import time
from contextlib import contextmanager

import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import TINY
from controlkit.cli import stopping
from controlkit.formats import WEIGHTS
from controlkit.train import run as run_module
from controlkit.train.state import TrainState

RECIPE = TINY | {"steps": 5, "checkpoint_every": 100, "evaluation": {"every": 0}}


@contextmanager
def signalled(number, *steps):
    """That signal comes in each of these steps."""
    step = TrainState.step

    def struck(state, rate, place):
        if place in steps:
            os.kill(os.getpid(), number)
        step(state, rate, place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainState, "step", struck)
        yield


@pytest.fixture
def train(run, toy_folder, tmp_path):
    """Train the tiny recipe by the command line in a folder."""
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"base": str(toy_folder)} | RECIPE))
    return lambda out, *more: run("train", tmp_path / "r.yaml", "--out", tmp_path / out, "--device", "cpu", *more)


@pytest.fixture
def closed_terminals():
    """``closed_terminals(answer)``: what a closed terminal does to a process; as it was before afterwards."""
    before = signal.getsignal(signal.SIGHUP)
    yield lambda answer: signal.signal(signal.SIGHUP, answer)
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_a_checkpoint_and_the_same_command_goes_on(
    number, code, train, tmp_path, monkeypatch, closed_terminals
):
    closed_terminals(signal.SIG_DFL)
    before, written = signal.getsignal(number), []
    monkeypatch.setattr(stopping.os, "write", lambda file, words: written.append((file, words)))
    with signalled(number, 3):
        found, out, _ = train("run")
    assert found == code and "Stopped at step 3 of 5; run again to go on." in out and "The control is in" not in out
    assert written == [(2, b"\nstopping after this step; again, to end at once\n")]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000003"]
    assert signal.getsignal(number) is before
    assert shlex.split(out.splitlines()[-1])[:3] == ["Next:", "controlkit", "train"]
    assert train("run")[0] == 0
    if number == signal.SIGINT:  # once is enough
        assert train("whole")[0] == 0
        whole, went_on = (load_file(tmp_path / name / "control" / WEIGHTS) for name in ("whole", "run"))
        assert all(torch.equal(went_on[name], value) for name, value in whole.items())


def test_nohup_is_heeded(closed_terminals):
    closed_terminals(signal.SIG_IGN)
    with stopping.Stopping("stopping", "stopped") as asked:
        os.kill(os.getpid(), signal.SIGHUP)
    assert not asked.is_asked()


def test_a_terminal_that_takes_no_words_any_more_stops_a_run_all_the_same(monkeypatch, closed_terminals):
    closed_terminals(signal.SIG_DFL)

    def closed(file, words):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, stopping.Stopping("stopping", "stopped") as asked:
        patch.setattr(stopping.os, "write", closed)
        os.kill(os.getpid(), signal.SIGHUP)
    assert asked.is_asked() and asked.code == 129


@pytest.mark.parametrize("apart", [True, False])
def test_a_second_signal_ends_at_once_unless_a_launcher_only_passes_the_first_on(apart, train, tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "_ECHO", -1.0 if apart else 60.0)
    step = TrainState.step

    def twice(state, rate, place):
        if place == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        step(state, rate, place)

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "step", twice)
        found, out, said = train("run")
    kept = tmp_path / "run" / "checkpoints"
    assert found == 130 and (kept / "step-0000003").exists() is not apart
    assert ("stopped: run again to go on" in said) is apart and ("Stopped at step 3" in out) is not apart
    assert train("run")[0] == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_is_stopped_while_the_base_loads_ends_at_once_and_says_so(number, code, train, tmp_path, monkeypatch):
    def struck(*given, **more):
        os.kill(os.getpid(), number)
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr("controlkit.cli.runs.loaded_base", struck)
        found, out, said = train("run")
    assert (found, out) == (code, "") and said == "note: stopped: run again to go on\n"
    assert not (tmp_path / "run").exists() and train("run")[0] == 0


def test_what_is_stopped_before_the_first_step_says_so(train, tmp_path, monkeypatch):
    build = run_module.build_cache

    def struck(*given, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        return build(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "build_cache", struck)
        found, out, said = train("run")
    assert (found, out.count("Next:")) == (143, 0) and "stopped: run again to go on" in said
    assert train("run")[0] == 0
