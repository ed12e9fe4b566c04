import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from pydantic import BaseModel
from safetensors.torch import save_file

from controlkit.annotators import contract
from controlkit.cli.pictures import generate
from controlkit.cli.requests import IN_REQUEST, control_requests, split_control
from controlkit.controls import new_control
from controlkit.data import make_fill50k
from controlkit.errors import Invalid
from controlkit.files import OUTPUT, is_output
from controlkit.formats import SavedControl, load_control, save_control
from controlkit.images import HintSpec, read_picture, read_settings, write_png
from controlkit.sample import ControlRequest, Request
from controlkit.train import recipe


@pytest.fixture
def control(toy_base, tmp_path):
    save_control(
        tmp_path / "edges",
        SavedControl(new_control(toy_base), HintSpec("canny", resize="lines"), {"base": "toy"}),
        toy_base,
    )
    return tmp_path / "edges"


@pytest.fixture
def lora_file(toy_base, tmp_path):
    """A LoRA of one layer that one sees."""
    [(name, layer), *_] = [pair for pair in toy_base.unet.named_modules() if pair[0].endswith("attn2.to_v")]
    drawn = torch.Generator().manual_seed(0)
    low, high = (torch.randn(*sides, generator=drawn) for sides in ((2, layer.in_features), (layer.out_features, 2)))
    (tmp_path / "loras").mkdir()
    path = tmp_path / "loras" / "old style.safetensors"
    save_file({f"unet.{name}.lora_A.weight": low, f"unet.{name}.lora_B.weight": high}, path)
    return path


@pytest.fixture
def drawing(tmp_path):
    picture = np.full((48, 40, 3), 250, np.uint8)
    picture[10:30, 10:30] = (200, 20, 20)
    write_png(tmp_path / "drawing.png", picture)
    return tmp_path / "drawing.png"


def test_generate_writes_pictures_with_settings_hint_and_grid(run, toy_folder, control, drawing, tmp_path):
    out = tmp_path / "out"
    command = ["generate", "a red square", "--base", toy_folder, "--control", f"{control}={drawing}", "--out", out]
    code, _, err = run(*command, "--num-images", 2, "--steps", 2, "--seed", 5)
    assert code == 0, err
    assert is_output(out), "so that no data set takes it for a part of itself"
    assert sorted(p.name for p in out.glob("*.png")) == [
        "grid.png",
        "hint-0-edges.png",
        "picture-5.png",
        "picture-6.png",
    ]
    with Image.open(out / "picture-6.png") as picture:
        facts = json.loads(picture.text["controlkit"])
        assert picture.size == (32, 32)
    assert (facts["prompt"], facts["seed"], facts["steps"]) == ("a red square", 6, 2)
    assert (facts["width"], facts["height"], facts["base"], facts["dtype"]) == (32, 32, str(toy_folder), "fp32")
    written = {key: value for key, value in facts.items() if key in Request.model_fields}
    again = Request(**written)
    assert again.controls == (ControlRequest(name=str(control), images=drawing, hint_cfg_scale=1.0),)
    (tmp_path / "request.json").write_text(json.dumps(written | {"seed": 5}))
    repeat = ["generate", "--request", tmp_path / "request.json", "--base", toy_folder, "--out", tmp_path / "again"]
    code, _, err = run(*repeat, "--num", 2)
    assert code == 0, err
    assert (tmp_path / "again" / "picture-6.png").read_bytes() == (out / "picture-6.png").read_bytes()
    code, _, err = run(*repeat, "--steps", 3)
    assert code == 2 and "leave out steps" in err
    code, _, err = run("generate", "--request", out / "picture-5.png", "--base", toy_folder)
    assert code == 2 and "--like repeats it" in err
    (tmp_path / "request.json").write_text('{"steps": 0}')
    code, _, err = run(*repeat)
    assert code == 2 and "request.json" in err and '"steps" is 0' in err


def test_every_option_of_generate_is_the_request_s_or_stands_beside_it():
    """Or one given beside ``--request`` would be left unread without a word, and so in ``--like``."""
    beside = {
        "context",
        "request",
        "like",
        "prompts",
        "grid",
        "auto_prompt",
        "captioner",
        "out",
        "base",
        "num_images",
        "jobs",
        "workers",
        "lora",
        "lora_dir",
        "vae",
        "embedding",
        "follow",
        "preview",
        "taesd",
        "dtype",
        "memory",
        "device",
    }
    assert set(inspect.signature(generate).parameters) == {*IN_REQUEST} | beside and not {*IN_REQUEST} & beside


def test_settings_of_a_control_are_its_own_and_others_serve_those_that_have_none():
    shared = {"scale": 0.7, "guess": False, "ready": False, "hint_cfg_scale": 1.5}
    first, second, union = control_requests(
        [
            "canny=a.png,scale=0.5,start=0.1,end=0.6,hint-cfg=2,annotator=canny,ready",
            "edges.pth=b.png",
            "u:depth=c.png",
        ],
        shared,
        "scribble",
    )
    assert first == ControlRequest(
        name="canny", images="a.png", scale=0.5, start=0.1, end=0.6, hint_cfg_scale=2, annotator="canny", ready=True
    )
    assert second == ControlRequest(
        name="edges.pth", images="b.png", scale=0.7, hint_cfg_scale=1.5, annotator="scribble"
    )
    assert union == ControlRequest(name="u", images={"depth": "c.png"}, scale=0.7, hint_cfg_scale=1.5)


def test_a_union_s_types_are_one_control_each_with_a_scale_of_its_own():
    given = ["u:canny=a.png,scale=0.5", "u:depth=b.png,guess", "canny=c.png,scale=0.9", "u:seg=e.png,scale=-1"]
    union, other = control_requests(given, {"scale": 0.7})
    pictures = {"canny": "a.png", "depth": "b.png", "seg": "e.png"}
    scales = {"canny": 0.5, "seg": -1}
    assert union == ControlRequest(name="u", images=pictures, scale=0.7, scales=scales, guess=True)
    assert other == ControlRequest(name="canny", images="c.png", scale=0.9)
    with pytest.raises(Invalid, match="was given twice"):
        control_requests([*given, "u:canny=d.png"], {})
    with pytest.raises(Invalid, match='two values of "end"'):
        control_requests(["u:canny=a.png,end=0.5", "u:depth=b.png,end=0.6"], {})


@pytest.mark.parametrize(
    ("text", "path", "settings"),
    [
        ("x=a,b.png", "a,b.png", {}),
        ("x=a,scale=1/b.png,ready", "a,scale=1/b.png", {"ready": True}),
        ("x=a=b,c=d.png,end=0.5,scale=2", "a=b,c=d.png", {"end": "0.5", "scale": "2"}),
        ("x=taken,scale=2", "taken,scale=2", {}),
    ],
)
def test_a_picture_s_path_may_hold_commas_and_equals_signs(text, path, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.png", "a=b,c=d.png", "taken,scale=2", "a,scale=1/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert split_control(text) == ("x", "", Path(path), settings)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("epoch=22-step=5335.ckpt", ""),
        ("lr=1e-4", ""),
        ("a=b=c.safetensors", "canny"),
        ("runs/x=1/control", ""),
        ("~/mine=1.safetensors", ""),
    ],
)
def test_a_control_s_path_may_hold_equals_signs(name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = Path(name.replace("~", str(tmp_path)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    text = f"{name}{f':{kind}' if kind else ''}=x.png,scale=0.5"
    assert split_control(text) == (name, kind, Path("x.png"), {"scale": "0.5"})
    assert split_control("canny=~/x=1.png") == ("canny", "", tmp_path / "x=1.png", {})
    assert split_control("owner/name-1.0:depth=x.png") == ("owner/name-1.0", "depth", Path("x.png"), {})


def test_a_home_folder_is_found_behind_an_equals_sign(run, toy_folder, drawing, control, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "toy").symlink_to(toy_folder)
    command = ["generate", "x", "--base=~/toy", "--control", "~/edges=~/drawing.png", "--steps", 1, "--out=~/made"]
    code, _, err = run(*command)
    assert code == 0 and (tmp_path / "made" / "picture-0.png").is_file(), err
    request = {"prompt": "x", "steps": 1, "controls": [{"name": "~/edges", "images": "~/drawing.png"}]}
    (tmp_path / "request.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(request).encode())
    code, _, err = run("generate", "--request=~/request.json", "--base", "~/toy", "--out", tmp_path / "again")
    assert code == 0, err
    both = [np.asarray(Image.open(tmp_path / name / "picture-0.png")) for name in ("made", "again")]
    assert np.array_equal(*both)


@pytest.mark.parametrize("place", ["prompt", "negative", "control", "picture", "request"])
def test_what_is_no_utf_8_is_refused_in_a_sentence(place, run, toy_folder, control, drawing, tmp_path):
    half = b"caf\xe9".decode(errors="surrogateescape")
    prompt = half if place == "prompt" else "x"
    more = {
        "prompt": [],
        "negative": ["--negative-prompt", half],
        "control": ["--control", f"{half}={drawing}"],
        "picture": ["--control", f"{control}={half}.png"],
        "request": ["--request", tmp_path / "request.json"],
    }[place]
    (tmp_path / "request.json").write_text('{"prompt": "cat \\ud83d"}')
    command = ["generate", *([] if place == "request" else [prompt]), "--base", toy_folder, "--out", tmp_path / "out"]
    code, _, err = run(*command, *more)
    assert code == 2 and "Traceback" not in err and "\n" not in err.strip() and "UTF-8" in err


def test_generate_tells_the_memory_it_takes_and_the_type_it_took(run, toy_folder, tmp_path):
    command = ["generate", "x", "--base", toy_folder, "--steps", 1, "--out", tmp_path]
    code, out, _ = run(*command, "--memory", "low")
    plan = out.splitlines()
    assert code == 0 and plan[0].startswith("memory low: at most 0.00 GiB of ")
    assert [line.split()[0] for line in plan[1:5]] == ["vae", "text_encoder", "unet", "beside"]
    code, out, _ = run(*command)
    assert code == 0 and len(out.splitlines()) == 1, "auto, and there is room"
    assert read_settings(tmp_path / "picture-0.png")["dtype"] == "fp32"
    for option in ("--memory", "--dtype"):
        code, _, err = run(*command, option, "lwo")
        assert code == 2 and f'{option} is "lwo"' in err and "auto" in err


def test_generate_without_a_prompt_uses_the_paper_s(run, toy_folder, tmp_path):
    for given, prompt in (([], "a high-quality, detailed, and professional image"), ([""], "")):
        assert run("generate", *given, "--base", toy_folder, "--steps", 1, "--out", tmp_path)[0] == 0
        with Image.open(tmp_path / "picture-0.png") as picture:
            assert json.loads(picture.text["controlkit"])["prompt"] == prompt


@pytest.mark.parametrize("dialect", ["plain", "a1111", "comfy"])
def test_the_end_of_a_long_prompt_is_read_or_cut_with_a_note(run, toy_folder, tmp_path, dialect):
    said = ""
    for last in ("zebra", "gold"):
        options = ("--dialect", dialect, "--base", toy_folder, "--steps", 1, "--out", tmp_path / last)
        code, _, err = run("generate", "apple " * 60 + last, *options)
        assert code == 0
        said += err
    same = np.array_equal(*(read_picture(tmp_path / last / "picture-0.png") for last in ("zebra", "gold")))
    assert same == (dialect == "plain") == ("cut off" in said and "zebra" in said)


def test_a_prompt_is_read_in_its_dialect_and_the_picture_says_so(run, toy_folder, tmp_path):
    made = {}
    for dialect, prompt in {"plain": "a (red:1.5) apple", "a1111": "a (red:1.5) apple", "comfy": "a red apple"}.items():
        options = ("--dialect", dialect, "--base", toy_folder, "--steps", 1, "--out", tmp_path / dialect)
        assert run("generate", prompt, *options)[0] == 0
        with Image.open(tmp_path / dialect / "picture-0.png") as picture:
            settings = json.loads(picture.text["controlkit"])
        assert (settings["dialect"], settings["prompt"]) == (dialect, prompt)
        made[dialect] = read_picture(tmp_path / dialect / "picture-0.png").tobytes()
    assert len({*made.values()}) == 3
    assert run("generate", "x", "--dialect", "a1112", "--base", toy_folder)[0] == 2


def test_a_lora_named_in_the_prompt_is_the_lora_that_is_given(run, toy_folder, lora_file, tmp_path):
    given = ("generate", "--base", toy_folder, "--steps", 2, "--seed", 3)
    assert run(*given, "a cat", "--lora", f"{lora_file}=0.8", "--out", tmp_path / "given")[0] == 0
    named = f"a cat <lora:{lora_file.stem}:0.8>"
    options = ("--dialect", "a1111", "--lora-dir", lora_file.parent)
    assert run(*given, named, *options, "--out", tmp_path / "named")[0] == 0
    plain = run(*given, "a cat", "--out", tmp_path / "plain")[0]
    one, other, without = (read_picture(tmp_path / name / "picture-3.png") for name in ("given", "named", "plain"))
    assert np.array_equal(one, other) and plain == 0 and not np.array_equal(one, without)
    code, _, err = run(*given, "a cat <lora:absent>", *options)
    assert code == 2 and "absent" in err and lora_file.stem in err


def test_a_given_hint_is_not_annotated(run, toy_folder, control, drawing, tmp_path):
    command = ["generate", "x", "--base", toy_folder, "--control", f"{control}={drawing}", "--steps", 1]
    run(*command, "--out", tmp_path / "a")
    run(*command, "--out", tmp_path / "b", "--hint-ready")
    hints = [np.asarray(Image.open(tmp_path / name / "hint-0-edges.png")) for name in "ab"]
    assert set(np.unique(hints[0])) <= {0, 255}
    assert not np.array_equal(hints[0], hints[1])
    assert hints[1][0, 0, 0] < 10, "dark lines on light paper become white on black"


def test_annotate_writes_a_hint_a_picture(run, drawing, tmp_path):
    code, out, _ = run("annotate", "canny", drawing, "--out", tmp_path / "hints")
    assert code == 0 and str(tmp_path / "hints" / "drawing.png") in out
    assert np.asarray(Image.open(tmp_path / "hints" / "drawing.png")).shape == (48, 40, 3)


def test_train_runs_a_recipe_and_says_what_came_of_it(run, toy_folder, toy_base, tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"base: {toy_folder}\ndata: {{source: fill50k, count: 8}}\nsteps: 2\nbatch: 2\n"
        "evaluation: {every: 2, num: 2, steps: 1}\n"
    )
    code, out, err = run("train", recipe, "--out", tmp_path / "run")
    assert code == 0, err
    assert "it cannot be measured whether there is control" in out
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert {"fidelity", "floor", "ceiling", "obedience"} <= set(lines[1])
    assert load_control(tmp_path / "run", toy_base).trained["step"] == 2


def test_bars_of_long_work_are_on_stderr_and_what_came_of_it_on_stdout(run, toy_folder, control, drawing, tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(f"base: {toy_folder}\ndata: {{source: fill50k, count: 4}}\nsteps: 1\nbatch: 2\n")
    base, out = ["--base", toy_folder], ["--out", tmp_path / "out"]
    for command, bar, words in (
        (["generate", "a", *base, *out, "--steps", 1], "generating", "1 picture in"),
        (["evaluate", control, *base, "--data", "fill50k", "--num", 2, "--steps", 1], "measuring", "obedience"),
        (["data", "make", "fill50k", "--count", 2, "--size", 32, "--out", tmp_path / "set"], "drawing", "2 pairs"),
        (["train", recipe, "--set", "evaluation.every=0", "--out", tmp_path / "run"], "training", "The control is in"),
    ):
        code, shown, err = run(*command)
        assert code == 0, err
        assert bar in err and bar not in shown and words in shown and shown.endswith("\n"), command


def test_train_takes_the_launcher_s_number_format_where_the_recipe_leaves_it_open(
    run, toy_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"base: {toy_folder}\ndata: {{source: fill50k, count: 4}}\nsteps: 1\nbatch: 2\nevaluation: {{every: 0}}\n"
    )
    for asked, given in (("bf16", []), ("fp32", ["--set", "precision=fp32"])):
        assert run("train", recipe, "--out", tmp_path / asked, *given)[0] == 0
        assert f"precision: {asked}" in (tmp_path / asked / "recipe.yaml").read_text()


def test_train_takes_the_flags_of_diffusers_script(run, toy_folder, toy_base, tmp_path):
    list(make_fill50k(tmp_path / "set", 6, 32))
    flags = ["--pretrained_model_name_or_path", toy_folder, "--train_data_dir", tmp_path / "set"]
    flags += ["--train_batch_size", 2, "--output_dir", tmp_path / "run"]
    flags += ["--resolution", 32, "--report_to", "tensorboard", "--allow_tf32"]
    code, out, err = run("train", *flags, "--set", "prompt_dropout=0.25")
    assert "note: 2 pairs are held out to measure on" in out
    assert code == 0 and "--allow_tf32 is not needed" in err and list((tmp_path / "run" / "tensorboard").iterdir())
    trained = load_control(tmp_path / "run", toy_base, "canny").trained
    assert trained["step"] == 2 and trained["recipe"]["prompt_dropout"] == 0.25, "an epoch of four pairs, two a step"
    code, _, err = run("train", "recipes/smoke.yaml", "--ouut", "x", "--out", tmp_path / "o")
    assert code == 2 and '"--ouut" is no option of train' in err
    assert run("train", "recipes/smoke.yaml")[0] == 2


@pytest.mark.parametrize(
    ("flag", "words"),
    [("--learning_rate=1e-4", "--set lr=1e-4; see"), ("--resolution", "--set size=...; see"),
     ("--max-train-steps", "--set steps=...; see"), ("--budget", "--set max_minutes=...; see")],
)  # fmt: skip
def test_a_flag_of_the_script_beside_a_recipe_hints_at_the_setting(flag, words, run, tmp_path):
    code, _, err = run("train", "recipes/smoke.yaml", flag, "--out", tmp_path / "o")
    assert code == 2 and f'"{flag}" is no option of train: beside a recipe it is {words} `controlkit' in err


def test_watch_shows_a_run_and_writes_its_page(run, tmp_path):
    (tmp_path / "recipe.yaml").write_text("steps: 4\n")
    (tmp_path / "log.jsonl").write_text('{"step": 2, "loss": 0.25, "seconds": 1.0}\n')
    code, out, _ = run("watch", tmp_path, "--once", "--html", tmp_path / "run.html")
    assert code == 0 and "step 2 of 4" in out and "<svg" in (tmp_path / "run.html").read_text()
    (tmp_path / "control").mkdir()
    assert run("watch", tmp_path)[0] == 0, "it ends with the run"


def test_fill50k_is_drawn(run, tmp_path):
    assert run("data", "make", "fill50k", "--count", 3, "--size", 32, "--out", tmp_path / "set")[0] == 0
    assert len((tmp_path / "set" / "prompt.json").read_text().splitlines()) == 3


def test_scenes_are_drawn_with_the_hints_asked_for(run, tmp_path):
    out = tmp_path / "set"
    assert run("data", "make", "scenes", "--count", 2, "--size", 32, "--hint", "seg", "--out", out)[0] == 0
    lines = [json.loads(line) for line in (out / "prompt.json").read_text().splitlines()]
    assert [line["source"] for line in lines] == ["seg/0.png", "seg/1.png"]
    code, _, err = run("data", "make", "scenes", "--count", 1, "--hint", "deph", "--out", tmp_path / "other")
    assert code == 2 and 'did you mean "depth"' in err


def test_columns_of_unusual_names_are_told_to_the_doctor_and_to_build(run, tmp_path):
    list(make_fill50k(tmp_path / "set", 3, 32))
    rows = [json.loads(line) for line in (tmp_path / "set" / "prompt.json").read_text().splitlines()]
    for name in ("prompt.json", "drawn.json"):
        (tmp_path / "set" / name).unlink()
    lines = [json.dumps({"photo": row["target"], "lines": row["source"], "said": row["prompt"]}) for row in rows]
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(lines))
    columns = [word for name in ("image=photo", "hint=lines", "caption=said") for word in ("--column", name)]
    code, out, _ = run("data", "doctor", tmp_path / "set", *columns, "--out", tmp_path / "doctor")
    assert code == 0 and "3 pairs (metadata), 3 with hints" in out and rows[0]["prompt"] in out
    assert run("data", "doctor", tmp_path / "set", "--out", tmp_path / "doctor")[0] == 1
    built = ["data", "build", tmp_path / "set", "--annotator", "canny", "--out", tmp_path / "out"]
    assert run(*built, *columns)[0] == 0 and len((tmp_path / "out" / "metadata.jsonl").read_text().splitlines()) == 3
    code, _, err = run("data", "doctor", tmp_path / "set", "--column", "photo")
    assert code == 2 and "expected KIND=NAME" in err


def test_the_doctor_says_whether_training_may_start(run, tmp_path):
    list(make_fill50k(tmp_path / "set", 3, 32))
    code, out, _ = run("data", "doctor", tmp_path / "set", "--annotator", "canny", "--out", tmp_path / "told")
    assert code == 0 and "Training may start" in out and "3 pairs (prompt.json)" in out
    assert {path.name for path in (tmp_path / "told").iterdir()} == {"sheet.png", "report.json", OUTPUT}
    (tmp_path / "set/source/1.png").write_bytes(b"")
    code, out, _ = run("data", "doctor", tmp_path / "set", "--out", tmp_path / "told")
    assert code == 1 and "may not start" in out and "source/1.png" in out


def test_the_doctor_shows_what_a_plain_folder_s_names_say(run, drawing, tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("red-apple_1", "IMG_7", "IMG_8"):
        (tmp_path / "set" / f"{name}.png").write_bytes(drawing.read_bytes())
    code, out, _ = run("data", "doctor", tmp_path / "set", "--out", tmp_path / "told")
    assert code == 0 and 'from the file\'s name: "red apple"' in out and "hints: none" in out


def settings_of(model, prefix=""):
    """A recipe's keys as a user writes them, such as ``evaluation.every``."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings_of(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_every_setting_of_a_recipe_is_in_the_table_of_docs_once_and_no_other():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    table = page.partition("## Settings")[2].partition("| key | meaning |")[2].partition("\n\n")[0]
    keys = [key for row in table.splitlines() if row for key in re.findall(r"`([\w.]+)`", row.split("|")[1])]
    assert sorted(keys) == sorted(settings_of(recipe.Recipe))


BAD = {
    "a missing picture": (["--control", "{control}=nowhere.png"], "nowhere.png"),
    "an unreadable picture": (["--control", "{control}={broken}"], "cannot be read"),
    "an unknown control": (["--control", "kanny={drawing}"], 'no control "kanny"'),
    "an unknown base": (["--base", "sd9"], 'no base "sd9"'),
    "a size that is no multiple": (["--size", "50x50"], "48x48"),
    "a size that is no size": (["--size", "big"], "WIDTHxHEIGHT"),
    "a control that is none, without a picture": (["--control", "cannny"], "NAME=IMAGE"),
    "a mask without a picture": (["--mask", "m.png"], "give it by --init-image"),
    "the strength of no second pass": (["--hires-strength", "0.5"], "give its factor by --hires"),
    "sides that are none": (["--init-image", "m.png", "--outpaint", "1,2"], "above,right,below,left"),
    "a picture to be changed that is not there": (["--init-image", "nowhere.png"], "nowhere.png"),
    "an unknown device": (["--device", "gpu"], "expected cpu, cuda or auto"),
    "more steps than the schedule has": (["--steps", "2000"], "1 to 1000 steps"),
    "a seed torch cannot take": (["--seed", "99999999999999999999"], '"seed" is 99999999999999999999; expected less'),
    "a seed whose next is none": (["--seed", str(2**64 - 1), "--num-images", "2"], "go beyond the largest"),
    "a scale that is not finite": (
        ["--control", "{control}={drawing},scale=nan"],
        "\"scale\" is 'nan'; expected a finite",
    ),
    "a scale for all that is not finite": (["--control", "{control}={drawing}", "--scale", "inf"], '"scale" is inf'),
    "a scale that leaves no picture": (["--control", "{control}={drawing}", "--scale", "1e38"], '"scale" is 1e+38'),
    "guidance that leaves no picture": (["--guidance", "1e38"], '"guidance" is 1e+38; expected less'),
    "guidance that is no number": (["--guidance", "nan"], '"guidance" is nan; expected a finite'),
    "a hint counted without end": (["--control", "{control}={drawing}", "--hint-cfg", "1e9"], '"hint_cfg_scale" is'),
    "a size beyond all memory": (["--size", "1000000x1000000"], "up to 16384"),
    "a LoRA's weight that is not finite": (["--lora", "{broken}x=nan"], "-100 to 100"),
    "a path with a name too long": (["--control", "{control}=" + "x" * 300], "File name too long"),
    "an unknown setting of a control": (["--control", "{control}={drawing},scael=2"], 'did you mean "scale"'),
    "a setting given twice": (["--control", "{control}={drawing},scale=2,scale=1"], '"scale" twice'),
    "a scale that is no number": (["--control", "{control}={drawing},scale=big"], "\"scale\" is 'big'"),
    "an end before its start": (["--control", "{control}={drawing},start=0.5,end=0.2"], "expected start <= end"),
    "a request that is not there": (["--request", "nowhere.json"], "no request at nowhere.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_and_exit_code_2(run, case, toy_folder, control, drawing, tmp_path):
    (tmp_path / "broken.png").write_bytes(drawing.read_bytes()[:60])
    arguments, expected = BAD[case]
    filled = [a.format(control=control, drawing=drawing, broken=tmp_path / "broken.png") for a in arguments]
    if "--base" not in filled:
        filled += ["--base", toy_folder]
    whole = [] if "--request" in filled else ["x", "--steps", 1]
    code, _, err = run("generate", *whole, *filled, "--out", tmp_path / "out")
    assert code == 2
    assert expected in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists(), "nothing half-written"


@pytest.mark.parametrize("command", ["generate", "annotate", "evaluate", "fill50k"])
def test_a_file_where_a_folder_should_be_and_the_reverse_are_refused(command, run, toy_folder, control, tmp_path):
    write_png(drawing := tmp_path / "drawing.png", np.zeros((32, 32, 3), np.uint8))
    (taken := tmp_path / "taken").write_text("mine")
    arguments = {
        "generate": ["generate", "x", "--base", toy_folder, "--steps", 1, "--out", taken],
        "annotate": ["annotate", "canny", drawing, "--out", taken],
        "evaluate": ["evaluate", control, "--base", toy_folder, "--json", tmp_path],
        "fill50k": ["data", "make", "fill50k", "--count", 1, "--out", taken],
    }[command]
    code, _, err = run(*arguments)
    assert code == 2 and "Traceback" not in err
    assert taken.read_text() == "mine"


def test_a_control_of_other_weights_is_run_with_a_note(run, toy_folder, toy_base, drawing, tmp_path):
    trained = {"base": "toy", "base_digest": "0123456789abcdef"}
    save_control(tmp_path / "old", SavedControl(new_control(toy_base), HintSpec("canny"), trained), toy_base)
    command = ["generate", "x", "--base", toy_folder, "--control", f"{tmp_path / 'old'}={drawing}", "--steps", 1]
    code, _, err = run(*command, "--out", tmp_path / "out")
    assert code == 0 and "0123456789abcdef" in err and toy_base.digest in err


def test_a_recipe_with_an_unknown_key_names_the_nearest(run, tmp_path):
    (tmp_path / "r.yaml").write_text("stepz: 3\n")
    code, _, err = run("train", tmp_path / "r.yaml", "--out", tmp_path / "run")
    assert code == 2 and '"stepz"' in err and 'did you mean "steps"' in err
    assert not (tmp_path / "run").exists()


def test_where_names_what_is_shipped_when_it_does_not_know(run):
    code, _, err = run("where", "cany")
    assert code == 2 and "cany" in err


# --- files of weights ---------------------------------------------------------------------------------------


def test_inspect_says_in_one_line_what_a_file_is_or_as_json(run, control):
    code, out, _ = run("inspect", control)
    assert code == 0 and out.count("\n") == 1
    assert out.startswith("A ControlNet in diffusers' layout for toy, hints of 3 channels")
    assert out.endswith("; runs.\n")
    found = json.loads(run("inspect", control, "--json")[1])
    assert list(found) == ["format", "base", "hint_channels", "parameters", "missing", "unexpected", "runs"]
    assert (found["format"], found["base"], found["runs"]) == ("diffusers", "toy", True)


def test_convert_goes_to_every_layout_and_back(run, toy_folder, control, tmp_path):
    targets = {"cldm": "a.safetensors", "control-lora": "b.safetensors", "union": "c", "diffusers": "d"}
    for to, name in targets.items():
        code, out, err = run("convert", control, tmp_path / name, "--to", to, "--base", toy_folder)
        assert code == 0 and f"{tmp_path / name}: A Control" in out, err
        found = json.loads(run("inspect", tmp_path / name, "--json")[1])
        assert (found["format"], found["missing"], found["runs"]) == (to, [], True)


def test_convert_attaches_a_fresh_branch_and_transfers_one(run, toy_folder, toy_base, control, tmp_path):
    assert run("convert", toy_folder, tmp_path / "fresh", "--to", "diffusers", "--attach")[0] == 0
    assert load_control(tmp_path / "fresh", toy_base, "canny").trained["base"] == "toy"
    both = ["--base", toy_folder, "--transfer-to", toy_folder]
    assert run("convert", control, tmp_path / "moved", "--to", "diffusers", *both)[0] == 0
    assert load_control(tmp_path / "moved", toy_base).trained["transferred_from"] == "toy"
    code, _, err = run("convert", toy_folder, tmp_path / "x", "--to", "diffusers", "--attach", "--rank", 4)
    assert code == 2 and "--attach makes a fresh branch" in err


def test_a_union_takes_a_picture_for_each_of_its_types(run, xl_folder, xl_base, drawing, tmp_path):
    save_control(tmp_path / "edges", SavedControl(new_control(xl_base), HintSpec("canny"), {}), xl_base)
    assert run("convert", tmp_path / "edges", tmp_path / "union", "--to", "union")[0] == 0
    command = ["generate", "x", "--base", xl_folder, "--steps", 1, "--out", tmp_path / "out"]
    union = tmp_path / "union"
    code, _, err = run(*command, "--control", f"{union}:canny={drawing}", "--control", f"{union}:depth={drawing}")
    assert code == 0, err
    names = sorted(p.name for p in (tmp_path / "out").glob("*.png"))
    assert names == ["grid.png", "hint-0-union-canny.png", "hint-1-union-depth.png", "picture-0.png"]
    edges, depth = (np.asarray(Image.open(tmp_path / "out" / name)) for name in names[1:3])
    assert set(np.unique(edges)) == {0, 255}, "of canny the edges are taken"
    assert {20, 200} <= set(np.unique(depth)), "a depth map is given, and no edges are taken of it"
    for given, message in ((f"{union}={drawing}", "of which type"), (f"{union}:cany={drawing}", 'no type "cany"')):
        code, _, err = run(*command, "--control", given)
        assert code == 2 and message in err
    code, _, err = run(*command, "--control", f"{tmp_path / 'edges'}:canny={drawing}")
    assert code == 2 and "is no Union" in err


@pytest.fixture
def shipped(union_folder, monkeypatch):
    """As if nothing were shipped but a Union of the toy base."""
    monkeypatch.setattr("controlkit.hub.SHIPPED", union_folder.parent)
    return union_folder


def test_a_shipped_union_s_types_are_found_by_their_own_names(run, shipped, toy_folder, toy_base, drawing, tmp_path):
    assert {run("where", name)[1].strip() for name in ("canny", "depth", "union")} == {str(shipped)}
    assert run("inspect", "depth")[1] == run("inspect", "union")[1] != ""
    assert run("convert", "canny", tmp_path / "edges", "--to", "diffusers")[0] == 0
    assert json.loads((tmp_path / "edges" / "config.json").read_text())["_class_name"] == "ControlNetModel"
    assert load_control(tmp_path / "edges", toy_base).hint == load_control("canny", toy_base).hint == contract("canny")
    command = ["generate", "x", "--base", toy_folder, "--steps", 2, "--control"]
    for i, name in enumerate(("depth", "union:depth", "canny")):
        assert run(*command, f"{name}={drawing}", "--hint-ready", "--out", tmp_path / str(i))[0] == 0
    pictures = [np.asarray(Image.open(tmp_path / str(i) / "picture-0.png")).astype(int) for i in range(3)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1 < np.abs(pictures[0] - pictures[2]).max()


def test_a_union_is_measured_by_its_types_and_their_names_are_not_written_over(
    run, shipped, toy_folder, control, tmp_path, monkeypatch
):
    code, _, err = run("evaluate", "union", "--base", toy_folder)
    assert code == 2 and "measure one of its types, as union:TYPE" in err
    monkeypatch.chdir(tmp_path)
    code, _, err = run("convert", control, "depth", "--to", "diffusers")
    assert code == 2 and "name of a shipped model" in err and not (tmp_path / "depth").exists()


def test_a_foreign_file_is_used_as_named_or_its_pictures_as_they_are(run, toy_folder, toy_base, drawing, tmp_path):
    stock = ControlNetModel.from_unet(toy_base.unet, conditioning_embedding_out_channels=(16, 32, 96))
    stock.save_pretrained(tmp_path / "theirs")
    command = ["generate", "x", "--base", toy_folder, "--control", f"{tmp_path / 'theirs'}={drawing}", "--steps", 1]
    code, _, err = run(*command, "--out", tmp_path / "a")
    assert code == 0 and "does not say what its hints are" in err
    code, _, err = run(*command, "--annotator", "canny", "--out", tmp_path / "b")
    assert code == 0 and "note:" not in err
    colours = [np.unique(np.asarray(Image.open(tmp_path / out / "hint-0-theirs.png"))) for out in "ab"]
    assert 20 in colours[0] and set(colours[1]) <= {0, 255}


def test_what_cannot_be_measured_is_said_before_any_sampling(run, xl_folder, xl_base, tmp_path):
    stock = ControlNetModel.from_unet(xl_base.unet, conditioning_embedding_out_channels=(16, 32, 96, 256))
    stock.save_pretrained(tmp_path / "theirs")
    code, _, err = run("evaluate", tmp_path / "theirs", "--base", xl_folder)
    assert code == 2 and "No annotator of these hints is named" in err
    assert run("convert", tmp_path / "theirs", tmp_path / "union", "--to", "union")[0] == 0
    code, _, err = run("evaluate", tmp_path / "union", "--base", xl_folder)
    assert code == 2 and "is a Union" in err


def test_an_inpainting_picture_is_masked_where_it_is_transparent(run, toy_folder, toy_base, tmp_path, monkeypatch):
    stock = ControlNetModel.from_unet(toy_base.unet, conditioning_embedding_out_channels=(16, 32, 96))
    stock.save_pretrained(tmp_path / "theirs")
    picture = np.full((40, 40, 4), 200, np.uint8)
    picture[:, :20, 3] = 0
    Image.fromarray(picture).save(tmp_path / "holed.png")
    read = []
    tensor = HintSpec.tensor
    monkeypatch.setattr(HintSpec, "tensor", lambda *args: read.append(tensor(*args)) or read[-1])
    command = ["generate", "x", "--base", toy_folder, "--control", f"{tmp_path / 'theirs'}={tmp_path / 'holed.png'}"]
    code, _, err = run(*command, "--annotator", "inpaint", "--steps", 1, "--out", tmp_path / "out")
    assert code == 0, err
    assert (read[0][..., :16] == -1).all() and (read[0][..., 16:] > 0.7).all()


def test_a_shipped_name_is_not_written_over_nor_shown_instead_of_what_was_written(run, control, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("convert", control, "canny", "--to", "diffusers")
    assert code == 2 and "name of a shipped model" in err
    assert not (tmp_path / "canny").exists()


def test_inspect_knows_a_pipeline_s_folder_for_a_base(run, xl_folder):
    code, out, _ = run("inspect", xl_folder)
    assert code == 0 and "base and no control" in out


def test_an_annotator_for_no_control_or_of_no_name_is_refused(run, toy_folder, control, drawing, tmp_path):
    command = ["generate", "x", "--base", toy_folder, "--steps", 1, "--out", tmp_path / "out", "--annotator"]
    code, _, err = run(*command, "canny")
    assert code == 2 and "none was given" in err
    code, _, err = run(*command, "cany", "--control", f"{control}={drawing}")
    assert code == 2 and 'did you mean "canny"' in err


def test_generate_imports_no_compiler(toy_folder, control, drawing, tmp_path):
    """torch's compiler and what belongs to it take longer to import than a small picture to be made."""
    command = [
        "generate",
        "x",
        "--base",
        toy_folder,
        "--control",
        f"{control}={drawing}",
        "--steps",
        1,
        "--out",
        tmp_path,
    ]
    code = (
        "import atexit, sys; sys.argv = ['controlkit', *sys.argv[1:]]; from controlkit.cli import main\n"
        "atexit.register(lambda: print(len(sys.modules), *sys.modules)); main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True, check=True)
    _, *modules = done.stdout.splitlines()[-1].split()
    count = sum(not name.startswith("scipy") for name in modules)  # diffusers' schedulers read it where it is there
    heavy = {"torch._dynamo", "torch._inductor", "peft", "bitsandbytes", "torchmetrics", "numba", "datasets"}
    assert not heavy & set(modules) and count < 3300, "see cli.shared.without_compiler"
    assert (tmp_path / "picture-0.png").is_file()


@pytest.mark.slow
def test_without_the_compiler_who_asks_for_it_gets_it():
    code = (
        "import sys; from controlkit.cli.shared import without_compiler\n"
        "with without_compiler():\n"
        "    import torch, diffusers.models.attention\n"
        "    assert sys.modules['torch._dynamo'].disable(len) is len\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "with without_compiler():\n"
        "    assert torch._dynamo.config.__name__ == 'torch._dynamo.config'\n"
        "compiled = torch.compile(lambda x: x + 1, backend='eager')\n"
        "assert compiled(torch.ones(2)).tolist() == [2, 2]"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
