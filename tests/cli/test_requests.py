"""Pictures repeated, with changes, and what a stranger's picture is asked for."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from controlkit import hub
from controlkit.cli import making
from controlkit.cli.requests import Loads, edit_of, hires_of, request_of
from controlkit.controls import new_control
from controlkit.errors import Invalid
from controlkit.formats import SavedControl, save_control
from controlkit.images import HintSpec, fit, read_picture, read_settings, write_png
from controlkit.sample import ControlRequest, EditRequest, HiresRequest, Request


@pytest.fixture
def edges(toy_base, drawn_joins, tmp_path):
    branch = new_control(toy_base)
    drawn_joins(branch)
    save_control(tmp_path / "edges", SavedControl(branch, HintSpec("canny", resize="lines"), {}), toy_base)
    return tmp_path / "edges"


@pytest.fixture
def drawing(tmp_path):
    picture = np.full((48, 40, 3), 250, np.uint8)
    picture[10:30, 10:30] = (200, 20, 20)
    write_png(tmp_path / "drawing.png", picture)
    return tmp_path / "drawing.png"


@pytest.fixture
def made(run, toy_folder, edges, drawing, tmp_path):
    """Two pictures of one batch, of a control that is seen."""
    command = ["generate", "a red square", "--base", toy_folder, "--control", f"{edges}={drawing},end=0.9"]
    code, _, err = run(*command, "--steps", 2, "--seed", 5, "--num-images", 2, "--out", tmp_path / "made")
    assert code == 0, err
    return tmp_path / "made" / "picture-6.png"


def saved_as(path, **texts):
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_a_picture_is_repeated_to_the_byte_whatever_it_was_made_beside(run, made, tmp_path):
    assert read_settings(made)["batch"] == 2
    code, _, err = run("generate", "--like", made, "--out", tmp_path / "again")
    assert code == 0 and "note" not in err, err
    assert (tmp_path / "again" / "picture-6.png").read_bytes() == made.read_bytes()
    assert len(list((tmp_path / "again").glob("picture*"))) == 1


@pytest.mark.slow
def test_a_picture_is_repeated_to_the_byte_in_a_new_process(tmp_path):
    command = [sys.executable, "-m", "controlkit", "generate"]
    asked = ["a red apple, 3d style", "--steps", "5", "--seed", "-1", "--num-images", "3"]
    subprocess.run([*command, *asked, "--out", tmp_path / "made"], check=True)
    for picture in (tmp_path / "made").glob("picture*.png"):
        subprocess.run([*command, "--like", picture, "--out", tmp_path / "again"], check=True)
        assert (tmp_path / "again" / picture.name).read_bytes() == picture.read_bytes()


def test_options_beside_a_picture_replace_their_part_and_no_other(run, made, tmp_path):
    changes = ["a blue square", "--scale", 0.25, "--seed", 9, "--dtype", "fp32"]
    assert run("generate", *changes, "--like", made, "--out", tmp_path / "again")[0] == 0
    before, after = read_settings(made), read_settings(tmp_path / "again" / "picture-9.png")
    assert {key for key in before if before[key] != after[key]} == {"prompt", "seed", "controls", "batch", "seal"}
    assert (after["prompt"], after["seed"], after["batch"]) == ("a blue square", 9, 1)
    [control] = after["controls"]
    assert control == before["controls"][0] | {"scale": 0.25} and control["end"] == 0.9
    one, other = (read_picture(path) for path in (made, tmp_path / "again" / "picture-9.png"))
    assert not np.array_equal(one, other)


def test_all_of_a_request_can_be_replaced():
    control = ControlRequest(name="u", images={"canny": "a.png", "depth": "b.png"}, scales={"depth": 2}, end=0.5)
    first = Request(prompt="x", size=(64, 32), controls=[control], dialect="a1111", clip_skip=2)
    assert request_of({}, first) == first
    [scaled] = request_of({"scale": 0.5, "hint_cfg": 2.0}, first).controls
    assert (scaled.scale, scaled.scales, scaled.hint_cfg_scale, scaled.end) == (0.5, {}, 2.0, 0.5)
    [other] = request_of({"control": ["canny=c.png"], "scale": 3.0}, first).controls
    assert (other.name, other.scale, other.end) == ("canny", 3.0, 1.0)
    assert request_of({"size": "8x16", "clip_skip": None}, first) == first.model_copy(
        update={"size": (16, 8), "clip_skip": None}
    )


def test_a_repeated_picture_is_made_on_its_threads(run, toy_folder, tmp_path, monkeypatch):
    used = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1])
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # they are left as they are
    command = ["--steps", 1, "--out", tmp_path]
    assert run("generate", "x", "--base", toy_folder, *command)[0] == 0
    like = ["generate", "--like", tmp_path / "picture-0.png", *command]
    used.append(1)
    code, _, err = run(*like)
    assert code == 0 and used == [2, 1, 2] and "note" not in err
    used.append(1)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    code, _, err = run(*like)
    assert code == 0 and used[-1] == 1 and "2 threads, more than there are" in err
    code, _, err = run(*like, "--seed", 3)
    assert code == 0 and "threads" not in err, "another picture is not exact to the bit"


def test_a_drawn_seed_is_said_and_written_down(run, toy_folder, tmp_path):
    seeds = []
    for name in "ab":
        command = ["generate", "x", "--base", toy_folder, "--steps", 1, "--seed", -1, "--num-images", 2]
        code, out, err = run(*command, "--out", tmp_path / name)
        assert code == 0, err
        written = sorted(read_settings(path)["seed"] for path in (tmp_path / name).glob("picture*"))
        assert f"seed {written[0]};" in out and written[1] == written[0] + 1
        seeds.append(written[0])
    assert seeds[0] != seeds[1]
    assert run("generate", "x", "--base", toy_folder, "--seed", -2)[0] == 2


def test_older_pictures_are_read_and_only_their_requests_are_trusted(run, toy_folder, edges, drawing, tmp_path):
    control = json.loads(ControlRequest(name=str(edges), images=drawing, hint_cfg_scale=1).to_json())
    asked = json.loads(Request(prompt="x", steps=1, seed=3, size=(32, 32), controls=[control]).to_json())
    facts = {"base": str(toy_folder), "vae": None, "lora": [], "embedding": [], "width": 32, "seal": hub.seal(asked)}
    old = saved_as(tmp_path / "old.png", parameters=json.dumps(asked | facts))
    code, _, err = run("generate", "--like", old, "--out", tmp_path / "out")
    assert code == 2 and f'asks for the base "{toy_folder}".' in err
    code, _, err = run("generate", "--like", old, "--base", toy_folder, "--out", tmp_path / "out")
    assert code == 0, err
    assert read_settings(tmp_path / "out" / "picture-3.png")["controls"] == asked["controls"]


def test_what_was_loaded_is_under_the_seal(run, made, tmp_path):
    settings = read_settings(made)
    for change in ({"base": "/other"}, {"lora": ["/other"]}, {"vae": "/other"}, {"embedding": ["/other"]}):
        other = saved_as(tmp_path / "other.png", controlkit=json.dumps(settings | change))
        code, _, err = run("generate", "--like", other, "--out", tmp_path / "out")
        assert code == 2 and '"/other"' in err and "--follow" in err
    other = saved_as(tmp_path / "other.png", controlkit=json.dumps(settings | {"seal": "", "batch": 16}))
    assert run("generate", "--like", other, "--follow", "--out", tmp_path / "out")[0] == 0
    assert read_settings(tmp_path / "out" / "picture-6.png")["batch"] == 1, "nobody else says how much is made"


@pytest.mark.parametrize(
    "facts", [{"lora": "a"}, {"lora": [1]}, {"base": 3}, {"vae": ["a"]}, {"embedding": ["a"] * 101}, {"base": "a\0b"}]
)
def test_facts_that_are_no_names_are_refused(facts):
    with pytest.raises(Invalid, match="expected a"):
        Loads.of(facts)


def test_a_picture_of_a1111_is_made_as_far_as_it_can_be(run, toy_folder, tmp_path):
    text = (
        "a (red:1.2) apple\nNegative prompt: fog\n"
        "Steps: 2, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5.5, Seed: 11, Size: 32x32, Model: dream, "
        'ControlNet 0: "Module: canny, Model: c, Weight: 1", Version: v1.10.1'
    )
    theirs = saved_as(tmp_path / "a1111.png", parameters=text)
    code, _, err = run("generate", "--like", theirs, "--base", toy_folder, "--steps", 1, "--out", tmp_path)
    assert code == 0, err
    assert '"dream", which --base' in err and "give them by --control" in err
    made = Request(**{k: v for k, v in read_settings(tmp_path / "picture-11.png").items() if k in Request.model_fields})
    assert made == Request(
        prompt="a (red:1.2) apple",
        negative_prompt="fog",
        dialect="a1111",
        scheduler="DPM++ 2M Karras",
        guidance=5.5,
        seed=11,
        size=(32, 32),
        steps=1,
    )


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({}, "holds no settings"),
        ({"parameters": "a cat"}, "no last line of settings"),
        ({"controlkit": "[]"}, "expected keys and values"),
        ({"controlkit": '{"steps": 0}'}, '"steps" is 0'),
        ({"parameters": "x\nSteps: many, Seed: 1, CFG scale: 2"}, "\"steps\" is 'many'"),
    ],
)
def test_a_picture_that_cannot_be_repeated_is_refused_in_a_sentence(texts, words, run, toy_folder, tmp_path):
    picture = saved_as(tmp_path / "p.png", **texts)
    code, _, err = run("generate", "--like", picture, "--base", toy_folder, "--out", tmp_path / "out")
    assert code == 2 and words in err and "p.png" in err and not (tmp_path / "out").exists()
    assert run("generate", "--like", tmp_path / "none.png")[0] == 2


def test_nothing_as_a_number_is_a_number(run, toy_folder, drawing, tmp_path):
    """A strength of 0 gives the picture back; 0 of an earlier picture's blur takes it away."""
    command = ["generate", "--base", toy_folder, "--init-image", drawing, "--steps", 1, "--size", "32x48"]
    assert run(*command, "--strength", 0, "--out", tmp_path / "a")[0] == 0
    assert np.array_equal(read_picture(tmp_path / "a" / "picture-0.png"), fit(read_picture(drawing), (48, 32)))
    first = EditRequest(image=drawing, blur=4, margin=8, strength=0.5, fill=True)
    options = {"mask_blur": 0, "margin": 0, "strength": 0.0, "fill": False}
    assert edit_of(options, first) == EditRequest(image=drawing, blur=0, margin=0, strength=0, fill=True)
    assert hires_of({"hires_strength": 0.0}, HiresRequest()) == HiresRequest(strength=0)
    assert edit_of({"fill": False}, None) is None and hires_of({"hires": None}, None) is None


def test_memory_is_that_of_jobs_too(toy_folder):
    base = making.loader(Loads(base=str(toy_folder), dtype="fp32"), "low")("cpu")
    assert base.placement.mode == "low"
    assert making.loader(Loads(base=str(toy_folder), dtype="fp32"), "auto")("cpu").placement.mode is None
