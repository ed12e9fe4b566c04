"""Jobs as files and folders ask for them, and the groups that can be made together."""

import json
from itertools import groupby

import numpy as np
import pytest

from controlkit.errors import Invalid, NotFound
from controlkit.images import write_png
from controlkit.sample import ControlRequest, Request, jobs
from controlkit.sample.jobs import EACH, groups_of, likeness, read_jobs, with_sources

TEMPLATE = Request(prompt="a cat", steps=3, controls=(ControlRequest(name="canny", images="drawing.png", scale=0.5),))


@pytest.fixture
def lines(tmp_path):
    """``lines(values, ...)``: a file of jobs; texts stand in it as they are."""

    def write(*values):
        text = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in values)
        (tmp_path / "jobs.jsonl").write_text(text)
        return tmp_path / "jobs.jsonl"

    return write


@pytest.fixture
def photos(tmp_path):
    for name in ("b", "a"):
        write_png(tmp_path / "photos" / f"{name}.png", np.full((8, 8, 3), ord(name), np.uint8))
    return tmp_path / "photos"


def test_a_line_s_keys_go_before_the_template_s(lines):
    found = read_jobs(
        lines({"seed": 4}, "", {"name": "x.png", "steps": 7, "controls": []}, {"dialect": "comfy"}), TEMPLATE
    )
    assert [job.name for job in found] == ["00001", "x", "00004"], "by the line's number, where it has no name"
    first, second, third = (job.request for job in found)
    assert (first.prompt, first.steps, first.seed, first.controls[0].scale) == ("a cat", 3, 4, 0.5)
    assert (second.prompt, second.steps, second.controls) == ("a cat", 7, ())
    assert third.dialect == "comfy"


def test_a_whole_request_is_a_line(lines):
    request = Request(
        prompt="ein Apfel \u2028 rot", size=(32, 64), controls=[ControlRequest(name="x", images="/a.png")]
    )
    assert read_jobs(lines(request.to_json()), TEMPLATE)[0].request == request


def test_a_line_s_pictures_begin_at_its_file_and_the_template_s_where_we_are(lines, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    control = {"name": "runs/edges", "images": {"canny": "in/a.png", "depth": "/b.png"}, "region": "mask.png"}
    own, shared = read_jobs(lines({"controls": [control]}, {}), TEMPLATE)
    [used] = own.request.controls
    assert {str(path) for path in used.images.values()} == {str(tmp_path / "in" / "a.png"), "/b.png"}
    assert used.region == tmp_path / "mask.png"
    assert used.name == "runs/edges", "a control's name is no picture"
    assert str(shared.request.controls[0].images[""]) == "/drawing.png"


def test_pictures_in_a_line_come_out_as_they_went_in(lines):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
    asked = Request(controls=[ControlRequest(name="x", images=pixels, ready=True)])
    [job] = read_jobs(lines(asked.to_json()), TEMPLATE)
    assert np.array_equal(job.request.controls[0].images[""], pixels)


WRONG = {
    "no JSON": ("{", r"line 2: the line is no JSON"),
    "no keys": ([1], r"line 2: the line holds a list"),
    "a key that no request has": ({"sede": 1}, r'line 2: Request has no "sede": did you mean "seed"'),
    "a value out of range": ({"steps": 0}, r'line 2: Request: "steps" is 0'),
    "a name that is no text": ({"name": 3}, r'line 2: "name" is 3; expected a text'),
    "a path as a name": ({"name": "../a"}, r'line 2: the name "../a" is none'),
    "a hidden name": ({"name": ".a"}, r'line 2: the name ".a" is none'),
    "no name": ({"name": ""}, r'line 2: the name "" is none'),
    "a name with an end of line": ({"name": "a\nb"}, r'line 2: the name "a b" is none'),
    "a long name": ({"name": "ä" * 101}, r"line 2: the name .* is none"),
    "a name twice": ({"name": "A"}, r'line 2: the name "A" is that of .*line 1, too'),
    "a long line": (json.dumps({"prompt": "x" * 1000}), r"line 2: it has 1,014 letters; expected at most 1,000"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_line_is_named_by_its_number_and_the_others_are_counted(case, lines, monkeypatch):
    monkeypatch.setattr(jobs, "_LONGEST_LINE", 1000)
    line, words = WRONG[case]
    path = lines({"name": "a"}, line, {"steps": -1})
    with pytest.raises(Invalid, match=words) as error:
        read_jobs(path, Request())
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(f"Errors besides this one: 1, the next at {path}, line 3.")


def test_as_many_jobs_as_there_may_be(lines, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "_MOST_JOBS", 2)
    assert len(read_jobs(lines({}, {}), Request())) == 2
    for given in ((), ({}, {}, {})):
        with pytest.raises(Invalid, match=f"asks for {len(given)} pictures; expected 1 to 2"):
            read_jobs(lines(*given), Request())
    with pytest.raises(NotFound, match="There are no jobs at"):
        read_jobs(tmp_path / "nothing.jsonl", Request())


def test_each_picture_of_a_folder_goes_into_the_controls_that_have_none(photos):
    (photos / "b.txt").write_text("a  blue\nbird\n")
    for name in ("notes.md", ".hidden.png"):
        (photos / name).write_text("x")
    fixed = ControlRequest(name="depth", images="/fixed.png")
    union = ControlRequest(name="union", images={"canny": EACH, "pose": EACH}, scale=0.5)
    template = Request(prompt="a cat", controls=[ControlRequest(name="canny"), fixed, union])
    first, second = read_jobs(photos, template)
    assert (first.name, second.name) == ("a", "b")
    assert (first.request.prompt, second.request.prompt) == ("a cat", "a blue bird")
    given, kept, typed = first.request.controls
    assert dict(given.images) == {"": photos / "a.png"} and kept == fixed
    assert dict(typed.images) == dict.fromkeys(("canny", "pose"), photos / "a.png") and typed.scale == 0.5


def test_folders_that_ask_for_nothing_are_refused(photos, tmp_path):
    with pytest.raises(Invalid, match=r"No control takes the pictures.*Errors besides this one: 1"):
        read_jobs(photos, TEMPLATE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFound, match="There are no pictures in"):
        read_jobs(tmp_path / "empty", Request(controls=[ControlRequest(name="canny")]))
    write_png(photos / "a.webp.png", np.zeros((8, 8, 3), np.uint8))
    (photos / "a.jpg").write_bytes((photos / "a.png").read_bytes())
    with pytest.raises(Invalid, match=r'a\.png: the name "a" is that of .*a\.jpg, too'):
        read_jobs(photos, Request(controls=[ControlRequest(name="canny")]))


def test_a_prompt_beside_a_picture_is_no_link_out_of_the_folder(photos, tmp_path):
    (tmp_path / "secret").write_text("a secret")
    (photos / "a.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(Invalid, match=r"a\.png: .* leads out of its folder"):
        read_jobs(photos, Request(controls=[ControlRequest(name="canny")]))


def test_groups_are_all_jobs_once_alike_and_with_the_same_controls_in_a_row(lines):
    drawn = np.random.default_rng(0)
    rows = [
        {
            "prompt": f"picture {i}",
            "seed": i,
            "steps": int(drawn.integers(2, 4)),
            "controls": [{"name": "xy"[drawn.integers(2)], "images": f"{i}.png", "scale": float(drawn.integers(2))}],
        }
        for i in range(60)
    ]
    found = read_jobs(lines(*rows), Request())
    groups = groups_of(found, 5)
    assert sorted(job.name for group in groups for job in group) == [job.name for job in found]
    assert max(map(len, groups)) == 5

    def alike(job):
        [used] = job.request.controls
        return used.name, job.request.steps, used.scale

    shared = [{alike(job) for job in group} for group in groups]
    assert all(len(one) == 1 for one in shared)
    settings = [one for [one] in shared]
    assert len(list(groupby(settings))) == len(set(settings)) == 8, "alike ones are neighbours"
    assert len(list(groupby(name for name, *_ in settings))) == 2, "each control is loaded once"
    for one in set(settings):  # full as they can be, in the file's order
        names = [job.name for group in groups for job in group if alike(job) == one]
        assert names == sorted(names) and len([s for s in settings if s == one]) == -(-len(names) // 5)


@pytest.mark.parametrize("settings", [{"tile": 64}, {"hires": {"factor": 2}}, {"speed": "fast"}, {"size": [64, 32]}])
def test_likeness_tells_what_can_share_a_pass_through_the_base(settings, lines):
    rows = [{"seed": 1}, {"seed": 2, **settings}, {"seed": 3, "steps": 5}]
    first, apart, other = (likeness(job.request) for job in read_jobs(lines(*rows), Request()))
    assert first[:2] == other[:2] != apart[:2] and len({first, apart, other}) == 3


def test_every_picture_of_a_request_is_found(tmp_path):
    used = ControlRequest(name="x", images={"canny": "a.png", "depth": np.zeros((2, 2, 3), np.uint8)}, region="b.png")
    seen = []
    with_sources(Request(controls=[used, used]), seen.append)
    assert [str(one) for one in seen if not isinstance(one, np.ndarray)] == ["a.png", "b.png"] * 2 and len(seen) == 6
