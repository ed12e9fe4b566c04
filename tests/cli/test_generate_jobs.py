"""``generate --jobs``: many pictures by one command, which goes on after a stop."""

import json
import os
import signal

import numpy as np
import pytest

from controlkit.cli import stopping
from controlkit.cli.jobs import with_places
from controlkit.cli.pictures import KEYS
from controlkit.controls import new_control
from controlkit.formats import SavedControl, save_control
from controlkit.images import HintSpec, read_picture, read_settings, write_png
from controlkit.sample import Request, loop
from controlkit.sample.jobs import EACH
from controlkit.sample.journal import JOURNAL
from controlkit.sample.together import relayed


@pytest.fixture
def jobs(run, toy_folder, tmp_path):
    """``jobs(what, ...)``: run the command on a file, with lines of these values, or on a folder."""

    def call(what, *options):
        if isinstance(what, list):
            (tmp_path / "jobs.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in what))
            what = tmp_path / "jobs.jsonl"
        given = ("--base", toy_folder, "--device", "cpu", "--out", tmp_path / "out", "--steps", 2)
        return run("generate", "--jobs", what, *given, *options)

    return call


@pytest.fixture
def edges(toy_base, tmp_path):
    save_control(tmp_path / "edges", SavedControl(new_control(toy_base), HintSpec("canny")), toy_base)
    return tmp_path / "edges"


def test_a_file_of_jobs_is_made_line_by_line_and_only_once(jobs, tmp_path):
    rows = [{"prompt": "a red apple", "seed": i, "name": f"apple-{i}"} for i in range(3)] + [{"steps": 1}]
    code, out, err = jobs(rows, "--negative-prompt", "blue")
    assert code == 0, err
    *made, last = out.splitlines()
    assert [line.split()[0] for line in made] == ["apple-0.png", "apple-1.png", "apple-2.png", "00004.png"]
    assert all(line.split()[2] == "s" and line.endswith("pictures a minute") for line in made)
    assert last == f"4 pictures in {tmp_path / 'out'}"
    settings = read_settings(tmp_path / "out" / "apple-2.png")
    assert (settings["prompt"], settings["seed"], settings["steps"], settings["negative_prompt"]) == (
        "a red apple",
        2,
        2,
        "blue",
    )
    assert settings["base"] and settings["dtype"] == "fp32" and settings["format"] == "float32"
    code, out, _ = jobs([*rows, {"seed": 9}], "--negative-prompt", "blue")
    assert [line.split()[0] for line in out.splitlines()] == ["4", "00005.png", "5"]
    assert out.startswith(f"4 of 5 pictures are in {tmp_path / 'out'} already.")


def test_a_picture_of_a_job_is_that_of_its_settings_alone(jobs, run, toy_folder, edges, tmp_path):
    write_png(tmp_path / "photo.png", np.random.default_rng(0).integers(0, 256, (40, 32, 3), np.uint8))
    control = {"name": str(edges), "images": "photo.png", "scale": 0.7}
    assert jobs([{"prompt": "a cat", "seed": 3, "controls": [control], "name": "cat"}])[0] == 0
    command = ["generate", "a cat", "--control", f"{edges}={tmp_path / 'photo.png'},scale=0.7", "--seed", 3]
    assert run(*command, "--base", toy_folder, "--steps", 2, "--device", "cpu", "--out", tmp_path / "one")[0] == 0
    ours, theirs = tmp_path / "out" / "cat.png", tmp_path / "one" / "picture-3.png"
    assert np.array_equal(read_picture(ours), read_picture(theirs))
    assert read_settings(ours) == read_settings(theirs)


def test_each_picture_of_a_folder_goes_into_the_control(jobs, edges, tmp_path):
    for name in "ba":
        write_png(tmp_path / "in" / f"{name}.png", np.full((8, 8, 3), ord(name), np.uint8))
    (tmp_path / "in" / "b.txt").write_text("a blue bird")
    code, out, err = jobs(tmp_path / "in", "a cat", "--control", f"{edges},scale=0.5,guess", "--seed", 4)
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()] == ["a.png", "b.png", "2"]
    assert f'note: a and 1 more: the hint of "{edges}" is empty' in err
    for name, prompt in (("a", "a cat"), ("b", "a blue bird")):
        settings = read_settings(tmp_path / "out" / f"{name}.png")
        assert (settings["prompt"], settings["seed"]) == (prompt, 4)
        [control] = settings["controls"]
        assert control["images"] == {"": str(tmp_path / "in" / f"{name}.png")}
        assert (control["scale"], control["guess"]) == (0.5, True)


def test_controls_without_a_picture_have_a_place_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    cases = {
        "canny": f"canny={EACH}",
        "canny,scale=0.8,guess": f"canny={EACH},scale=0.8,guess",
        "u.pth:depth,end=0.5": f"u.pth:depth={EACH},end=0.5",
        "a=b,mode=prompt": f"a=b={EACH},mode=prompt",
        "canny=a.png,scale=0.8": "canny=a.png,scale=0.8",
        "x=a,b.png": "x=a,b.png",
    }
    assert with_places(list(cases), KEYS) == list(cases.values())


def test_nothing_is_loaded_or_made_before_all_lines_are_right(jobs, tmp_path, monkeypatch):
    monkeypatch.setattr("controlkit.cli.making.loaded_base", lambda *given, **more: pytest.fail("the base is loaded"))
    lines = [{}, {"controls": [{"name": "canny", "images": "nowhere.png"}]}, {"sede": 1}]
    code, _, err = jobs(lines)
    assert (code, err.count("\n")) == (2, 1) and 'line 3: Request has no "sede": did you mean "seed"?' in err
    code, _, err = jobs(lines[:2])
    assert code == 2 and f"line 2: There is no picture at {tmp_path / 'nowhere.png'}" in err
    assert not list((tmp_path / "out").iterdir())


def test_what_only_the_base_knows_is_said_before_the_first_picture(jobs, tmp_path):
    code, out, err = jobs([{}, {"size": [32, 33]}])
    assert (code, out) == (2, "") and "line 2: The base" in err
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--num-images", 2], "--num-images without it alone"),
        (["--jobs", "nowhere.jsonl"], "There are no jobs at nowhere.jsonl"),
    ],
)
def test_what_does_not_go_with_jobs_is_said(options, words, jobs, tmp_path):
    code, _, err = jobs([{}], *options)
    assert code == 2 and words in err and not (tmp_path / "out").exists()


def test_the_folder_that_is_read_is_not_written(jobs, edges, tmp_path):
    write_png(tmp_path / "in" / "a.png", np.zeros((8, 8, 3), np.uint8))
    code, _, err = jobs(tmp_path / "in", "--control", edges, "--out", tmp_path / "edges" / ".." / "in")
    assert code == 2 and "--out is the folder of --jobs" in err


def test_a_request_s_file_is_a_template_for_jobs(run, toy_folder, tmp_path):
    (tmp_path / "request.json").write_text(Request(prompt="a cat", steps=1, seed=5).to_json())
    (tmp_path / "jobs.jsonl").write_text('{"seed": 6}')
    given = ("--request", tmp_path / "request.json", "--jobs", tmp_path / "jobs.jsonl", "--out", tmp_path / "out")
    assert run("generate", *given, "--base", toy_folder, "--device", "cpu")[0] == 0
    settings = read_settings(tmp_path / "out" / "00001.png")
    assert (settings["prompt"], settings["steps"], settings["seed"]) == ("a cat", 1, 6)


def test_workers_are_of_jobs_alone(run, toy_folder):
    code, _, err = run("generate", "x", "--base", toy_folder, "--workers", 2)
    assert code == 2 and "--workers goes with --jobs alone" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_between_two_steps_and_the_same_command_goes_on(number, code, jobs, tmp_path, monkeypatch):
    rows = [{"seed": i, "steps": 2 + i, "size": [32, 32 + 16 * i]} for i in range(3)]
    real, steps = loop.denoising, []

    def counted(done):
        steps.append(done.step)
        if len(steps) == 3:  # the first of the second picture
            os.kill(os.getpid(), number)
        return done

    def struck(*given, **more):
        return relayed(real(*given, **more), counted)

    written = []
    with monkeypatch.context() as patch:
        patch.setattr(loop, "denoising", struck)
        patch.setattr(stopping.os, "write", lambda file, words: written.append(words))
        found, out, err = jobs(rows)
    assert (found, len(steps)) == (code, 3) and written == [b"\nstopping after this step; again, to end at once\n"]
    assert out.startswith("00001.png") and "note: stopped with 1 of 3 pictures made: run again to go on" in err
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["00001.png"]
    assert len((tmp_path / "out" / JOURNAL).read_text().splitlines()) == 1
    found, out, _ = jobs(rows)
    assert found == 0 and [line.split()[0] for line in out.splitlines()] == ["1", "00002.png", "00003.png", "3"]


def test_what_is_stopped_while_the_base_loads_says_so(jobs, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("controlkit.cli.making.loaded_base", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
        assert jobs([{}])[::2] == (130, "note: stopped: run again to go on\n")
    assert jobs([{}])[0] == 0
