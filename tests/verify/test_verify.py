"""A verification on random weights: what must agree with diffusers does, and what random weights cannot do is said."""

import getpass
import json

import numpy as np
import pytest

from controlkit.annotators import contract
from controlkit.branch import ControlSpec
from controlkit.controls import new_control
from controlkit.data import CirclePairs
from controlkit.errors import Unsupported
from controlkit.formats import SavedControl, save_control
from controlkit.images import write_png
from controlkit.measure import ceiling_of, shown
from controlkit.verify import VerifyPlan, kind_in_name, photographs, verify
from controlkit.verify.album import PHOTOGRAPHS
from controlkit.verify.checks import Check, without_paths
from controlkit.verify.page import page_of
from controlkit.verify.peer import Peer

PLAN = VerifyPlan("fill50k", num=2, shown=1, steps=1, guidance=4.0)
PROMPTS = ["no prompt", "insufficient", "conflicting", "perfect"]
ROLES = [*PROMPTS, "guess mode", "scale 0", "scale 0.5", "scale 1.5", "no control"]


def states(done):
    return {check.name: check.state for check in done.checks}


@pytest.fixture(scope="module")
def saved(toy_base, drawn_joins):
    return SavedControl(drawn_joins(new_control(toy_base)).eval(), contract("canny"))


@pytest.fixture(scope="module")
def done(toy_base, saved):
    return verify(toy_base, saved, PLAN)


def test_each_picture_of_the_figures_is_diffusers_to_rounding(done):
    found = states(done)
    for role in ROLES:
        assert found[f"picture 1, {role}: latents are diffusers'"] == "passed"
    assert all(one.distance < 1e-4 for one in done.compared if one.distance is not None)
    others = ("the VAE decodes as diffusers' pipeline does", "the same request gives the same picture")
    assert all(found[name] == "passed" for name in (*others, "a scale of 0 is no control", "the control acts"))


def test_random_weights_fail_by_what_they_cannot_do(done):
    failed = {check.name for check in done.failed}
    assert failed == {"the VAE gives 2 pictures back"}
    [last] = [check for check in done.checks if check.name.startswith("the control is obeyed")]
    assert last.state == "not measured" and "ceiling" in last.measured
    assert {"floor", "ceiling", "obedience"} <= done.report.keys()


def test_the_page_shows_the_truth_as_the_vae_gives_it_back(toy_base, done):
    page, pairs = page_of(done), list(done.subject.pairs)[: PLAN.num]
    back = ceiling_of(toy_base)([pair.picture for pair in pairs])
    for one, pair in zip(back, pairs, strict=True):
        assert shown(one, "").source in page and not np.array_equal(one, pair.picture)


def test_another_control_s_picture_is_not_taken_for_the_same(toy_base, saved, drawn_joins, monkeypatch):
    other = SavedControl(drawn_joins(new_control(toy_base), 9).eval(), contract("canny"))
    monkeypatch.setattr("controlkit.verify.run.Peer", lambda base, control: Peer(base, other))
    found = states(verify(toy_base, saved, VerifyPlan("fill50k", num=0, shown=1, steps=1)))
    assert found["picture 1, perfect: latents are diffusers'"] == "failed"
    assert found["picture 1, scale 0: latents are diffusers'"] == "passed"


def test_a_control_that_does_nothing_is_found_out(toy_base):
    saved = SavedControl(new_control(toy_base).eval(), contract("canny"))
    found = states(verify(toy_base, saved, VerifyPlan("fill50k", num=0, shown=1, steps=1)))
    assert found["the control acts"] == "failed"
    assert found["picture 1, perfect: latents are diffusers'"] == "passed"


def test_a_base_alone_is_compared_under_the_four_prompts(xl_base):
    done = verify(xl_base, None, VerifyPlan("fill50k", shown=1, steps=1))
    compared = [one for one in done.compared if one.distance is not None]
    assert [one.shot.role for one in compared] == PROMPTS and all(one.distance < 1e-4 for one in compared)
    assert len({one.pixels.tobytes() for one in compared}) == 4
    assert json.loads(done.to_json())["control"] is None


@pytest.mark.parametrize(("body", "words"), [("conv", "diffusers has no network"), ("xs", "another epsilon")])
def test_where_diffusers_has_no_such_network_nothing_is_compared(toy_base, body, words):
    saved = SavedControl(new_control(toy_base, ControlSpec(body=body)).eval(), contract("canny"))
    done = verify(toy_base, saved, VerifyPlan("fill50k", num=0, shown=1, steps=1))
    [check] = [one for one in done.checks if "perfect" in one.name]
    assert check.state == "not measured" and words in check.measured


@pytest.mark.parametrize("body", ["copy", "conv", "lora", "xs", "adapter"])
def test_every_kind_of_control_is_verified_or_it_is_said_why_not(toy_base, body):
    spec = ControlSpec(body=body, rank=4 * (body == "lora"))
    saved = SavedControl(new_control(toy_base, spec).eval(), contract("canny"))
    done = verify(toy_base, saved, VerifyPlan("fill50k", num=0, shown=1, steps=1))
    assert {one.state for one in done.checks if "latents are diffusers'" in one.name} <= {"passed", "not measured"}


# --- the command ------------------------------------------------------------------------------------------------


def test_the_command_writes_a_page_and_json_that_name_nobody(run, toy_folder, toy_base, drawn_joins, tmp_path):
    saved = SavedControl(drawn_joins(new_control(toy_base)).eval(), contract("canny"))
    save_control(tmp_path / "secret-name", saved, toy_base)
    out = tmp_path / "out"
    code, said, _ = run("verify", toy_folder, tmp_path / "secret-name", "--out", out, "--data", "fill50k",
                        "--num", 2, "--shown", 1, "--steps", 1, "--device", "cpu")  # fmt: skip
    assert code == 1 and "failed" in said
    page, facts = (out / "verify.html").read_text(), json.loads((out / "verify.json").read_text())
    for text in (page, json.dumps(facts)):
        for secret in (str(tmp_path), str(toy_folder), "secret-name", f'"{getpass.getuser()}"'):
            assert secret not in text
    assert facts["control"]["hints"]["annotator"] == "canny" and facts["versions"]["diffusers"]
    assert {one["state"] for one in facts["checks"]} == {"passed", "failed", "not measured"}
    assert page.count("<img") >= 2 * 7 and "<script" not in page
    assert "latents are diffusers" in page


def test_a_control_that_does_not_say_its_hints_is_taken_by_its_name_or_refused(
    run, toy_folder, toy_base, drawn_joins, tmp_path
):
    saved = SavedControl(drawn_joins(new_control(toy_base)).eval(), contract("canny").made_by(contract("canny")))
    for name in ("control_v11p_toy_canny", "thing"):
        save_control(tmp_path / name, SavedControl(saved.branch, type(saved.hint)("")), toy_base)
    options = ("--out", tmp_path / "out", "--num", 0, "--shown", 1, "--steps", 1, "--data", "fill50k")
    code, said, _ = run("verify", toy_folder, tmp_path / "control_v11p_toy_canny", *options)
    assert code == 1 and "taken for canny" in said
    code, _, err = run("verify", toy_folder, tmp_path / "thing", *options)
    assert code == 2 and "--hint canny" in err


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("control_v11p_sd15_canny.pth", "canny"),
        ("/home/x/canny/control_v11f1p_sd15_depth.safetensors", "depth"),
        ("lllyasviel/sd-controlnet-hed", "hed"),
        ("control_v11p_sd15s2_lineart_anime.pth", "lineart_anime"),
        ("lllyasviel/control_v11p_sd15_openpose", "pose"),
        ("thing.safetensors", ""),
    ],
)
def test_the_kind_of_hints_is_read_off_a_file_s_name(name, kind):
    assert kind_in_name(name) == kind


# --- photographs ------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder like scikit-image's, with two of the photographs."""
    (tmp_path / "data").mkdir()
    for i, one in enumerate(PHOTOGRAPHS[:2]):
        write_png(tmp_path / "data" / one.file, np.full((40, 60, 3), 100 * (i + 1), np.uint8))
    monkeypatch.setattr("controlkit.verify.album.folder", lambda: tmp_path / "data")


def test_photographs_are_squares_with_captions(package):
    pairs = photographs(32, 12)
    assert [pair.picture.shape for pair in pairs] == [(32, 32, 3)] * 2
    assert [pair.prompt for pair in pairs] == [one.caption for one in PHOTOGRAPHS[:2]]
    assert [int(pair.picture[0, 0, 0]) for pair in pairs] == [100, 200]


def test_without_the_package_drawn_circles_stand_for_photographs(toy_base, monkeypatch):
    monkeypatch.setattr("controlkit.verify.album._PACKAGE", "no_such_package")
    with pytest.raises(Unsupported, match=r"controlkit\[photographs\]"):
        photographs(32, 2)
    done = verify(toy_base, None, VerifyPlan(shown=1, steps=1))
    assert done.subject.source == "fill50k" and "Drawn circles were taken" in done.subject.note
    assert np.array_equal(done.subject.pairs[0].picture.shape, CirclePairs(toy_base.size, 1)[0].picture.shape)


# --- words ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/anna/models/x.safetensors is damaged", "x.safetensors is damaged"),
        ('There is no file at "C:\\Users\\anna\\x.pt".', 'There is no file at "x.pt".'),
        ("~/models/x.pt", "x.pt"),
        ("see https://example.org/a/b and 1/2, a/b", "see https://example.org/a/b and 1/2, a/b"),
    ],
)
def test_paths_are_shortened_to_names(text, left):
    assert without_paths(text) == left


def test_a_check_says_what_was_expected():
    assert Check.of("a", False, "2", "1") == Check("a", "failed", "2", "1")
