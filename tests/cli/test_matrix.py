"""Matrices of settings, prompts of a file, and the sheet of them."""

import numpy as np
import pytest

from controlkit.cli.matrix import MOST, Axis, axes_of, changed, matrix
from controlkit.controls import new_control
from controlkit.errors import Invalid
from controlkit.formats import SavedControl, save_control
from controlkit.images import HintSpec, grid, read_picture, read_settings, write_png
from controlkit.sample import ControlRequest, Request

UNION = ControlRequest(name="all", images={"canny": "a.png", "depth": "b.png"}, scales={"depth": 2})
FIRST = Request(prompt="x", controls=[ControlRequest(name="runs/edges.pth", images="a.png"), UNION])


def axes(*given, prompts=None, num_images=1, first=FIRST):
    return axes_of(given, prompts, num_images, first)


def test_values_are_parted_as_in_a_table_s_file():
    texts = ['prompt="a cat, sitting",a dog', r"prompt=a cat\, sitting, a dog", 'prompt="say ""x""",(a\\(b\\):1.2)']
    for text, values in zip(texts, [*[("a cat, sitting", "a dog")] * 2, ('say "x"', "(a\\(b\\):1.2)")], strict=True):
        assert axes(text) == [Axis("prompt", values)]
    assert axes("scheduler=,Euler a") == [Axis("scheduler", ("", "Euler a"))]


@pytest.mark.parametrize("text", ["scale", "=1", "scale=", 'prompt="a', "prompt=a\nb"])
def test_what_is_no_key_with_values_is_refused(text):
    with pytest.raises(Invalid, match="expected KEY=VALUE"):
        axes(text)


def test_every_plain_setting_can_be_varied():
    for key, text, value in (
        ("prompt", "a, b", "a, b"),
        ("negative-prompt", "", None),
        ("dialect", "comfy", "comfy"),
        ("clip-skip", "3", 3),
        ("seed", "9", 9),
        ("size", "96x64", (64, 96)),
        ("steps", "7", 7),
        ("guidance", "1.5", 1.5),
        ("guidance_rescale", "0.5", 0.5),
        ("scheduler", "UniPC", "UniPC"),
    ):
        field = key.replace("-", "_")
        assert changed(FIRST, key, text) == FIRST.model_copy(update={field: value}), key


def test_settings_of_controls_are_all_of_them_or_one_s():
    both = changed(FIRST, "scale", "0.5")
    assert [(one.scale, one.scales) for one in both.controls] == [(0.5, {}), (0.5, {})]
    for name in ("runs/edges.pth", "edges"):
        one, other = changed(FIRST, f"{name}.end", "0.25").controls
        assert (one.end, other) == (0.25, UNION)
    for name in ("all", "all:depth"):
        assert changed(FIRST, f"{name}.scale", "3").controls[0] == FIRST.controls[0]
    assert changed(FIRST, "all.scale", "3").controls[1].scales == {}
    assert changed(FIRST, "all:canny.scale", "3").controls[1].scales == {"canny": 3, "depth": 2}
    assert changed(FIRST, "by-tap", "1/0.5").controls[0].by_tap == (1, 0.5)
    assert changed(FIRST, "cfg-weights", "true").controls[0].cfg_weights
    assert changed(FIRST, "hint-cfg", "").controls[0].hint_cfg_scale is None


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("sceduler", "DDIM", 'did you mean "scheduler"'),
        ("scael", "1", 'did you mean "scale"'),
        ("edegs.scale", "1", "Known: all, runs/edges.pth"),
        ("all:canny.end", "1", "scale and annotator each"),
        ("controls", "x", "has no key"),
        ("steps", "many", "\"steps\" is 'many'"),
        ("all.end", "2", "\"end\" is '2'"),
        ("size", "x", "expected WIDTHxHEIGHT"),
    ],
)
def test_a_key_or_a_value_that_does_not_fit_is_named(key, text, words):
    with pytest.raises(Invalid, match=r"--grid|--size|Request") as caught:
        changed(FIRST, key, text)
    assert words in str(caught.value)
    with pytest.raises(Invalid, match="there is none"):
        changed(Request(), "scale", "1")


def test_the_last_key_makes_columns_and_the_product_of_the_others_rows():
    made = matrix(FIRST, axes("steps=3,4", "scale=0,1", "seed=7,8,9"))
    assert made.columns == ["seed 7", "seed 8", "seed 9"]
    assert made.labels == ["steps 3, scale 0", "steps 3, scale 1", "steps 4, scale 0", "steps 4, scale 1"]
    asked = [[(one.steps, one.controls[0].scale, one.seed) for one in row] for row in made.rows]
    assert asked == [[(a, b, c) for c in (7, 8, 9)] for a in (3, 4) for b in (0, 1)]
    assert len({*made.names()}) == 12 and made.names()[0] == "00-7"
    alone = matrix(FIRST, axes("seed=7,8"))
    assert (alone.names(), alone.labels, len(alone.rows)) == (["7", "8"], [], 1)


def test_prompts_of_a_file_are_rows_and_seeds_that_count_on_columns(tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffa cat, sitting\n\n  a dög  \n")
    made = matrix(FIRST, axes("steps=3", prompts=tmp_path / "p.txt", num_images=2))
    assert made.labels == ["a cat, sitting, steps 3", "a dög, steps 3"] and made.columns == ["seed 0", "seed 1"]
    assert [[one.prompt for one in row] for row in made.rows] == [["a cat, sitting"] * 2, ["a dög"] * 2]
    (tmp_path / "p.txt").write_text("\n\n")
    with pytest.raises(Invalid, match="holds no prompts"):
        axes(prompts=tmp_path / "p.txt")


def test_a_drawn_seed_is_one_for_all_pictures_of_its_column():
    made = matrix(FIRST, axes("steps=3,4", "seed=-1,-1"))
    first, second = made.rows
    assert [one.seed for one in first] == [one.seed for one in second] and first[0].seed != first[1].seed


def test_more_pictures_than_one_command_makes_are_refused_at_once():
    many = ",".join(map(str, range(101)))
    with pytest.raises(Invalid, match=r"10,201 pictures; expected at most 10,000"):
        axes(f"seed={many}", f"steps={many}")
    with pytest.raises(Invalid, match='"seed" is varied twice'):
        axes("seed=1,2", num_images=2)
    assert MOST == 10_000


def test_the_sheet_shows_every_picture_and_each_is_its_own_request(run, toy_base, toy_folder, tmp_path):
    save_control(tmp_path / "edges", SavedControl(new_control(toy_base), HintSpec("canny"), {}), toy_base)
    write_png(drawing := tmp_path / "a.png", np.eye(32, dtype=np.uint8)[..., None].repeat(3, 2) * 255)
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    command = ["generate", "--base", toy_folder, "--control", f"{tmp_path / 'edges'}={drawing}", "--steps", 1]
    grids = ["--prompts", tmp_path / "p.txt", "--grid", "edges.scale=0,1", "--grid", "guidance=1,4"]
    code, out, err = run(*command, *grids, "--out", tmp_path / "out")
    assert code == 0 and "8 pictures in" in out and "pictures a minute" in err, err
    paths = sorted((tmp_path / "out").glob("picture*"))
    assert [path.name for path in paths] == [f"picture-{i}-0.png" for i in range(8)]
    settings = [read_settings(path) for path in paths]
    asked = [(one["prompt"], one["controls"][0]["scale"], one["guidance"]) for one in settings]
    assert asked == [(prompt, scale, cfg) for prompt in ("a cat", "a dog") for scale in (0, 1) for cfg in (1, 4)]
    labels = [f"{prompt}, edges.scale {scale}" for prompt in ("a cat", "a dog") for scale in (0, 1)]
    pictures = [read_picture(path) for path in paths]
    sheet = grid([pictures[i : i + 2] for i in range(0, 8, 2)], ["guidance 1", "guidance 4"], row_labels=labels)
    assert np.array_equal(read_picture(tmp_path / "out" / "grid.png"), sheet)
    assert run("generate", "--like", paths[5], "--out", tmp_path / "again")[0] == 0
    assert np.array_equal(read_picture(tmp_path / "again" / "picture-0.png"), pictures[5])
