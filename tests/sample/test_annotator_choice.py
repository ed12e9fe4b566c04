"""A control's hints by any maker of its family."""

import numpy as np
import pytest

from conftest import randomised
from controlkit.annotators import annotate, contract, each, kinds, maker, register
from controlkit.controls import new_control, new_union
from controlkit.errors import Invalid, Mismatch
from controlkit.formats import SavedControl, load_control, save_control
from controlkit.images import HintSpec
from controlkit.sample import ControlRequest, HiresRequest, Request, prepare

PHOTO = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)


@pytest.fixture
def darkness(monkeypatch):
    """A maker of depth that knows every picture."""
    monkeypatch.setattr(kinds, "_KINDS", dict(kinds._KINDS))
    return register(maker("darkness", each(lambda picture, gain=1.0: 255 - picture), of="depth"))


@pytest.fixture(scope="module")
def saved(toy_base):
    return {name: SavedControl(new_control(toy_base), contract(name)) for name in ("lineart", "depth")}


def prepared(base, saved, asked="depth", request=None, **control):
    control = {"images": PHOTO} | control
    wanted = Request(controls=[ControlRequest(name=asked, **control)], **request or {})
    [one] = prepare(base, [wanted], saved)
    return one


def test_a_control_reads_hints_of_another_maker_of_its_family(toy_base, saved):
    one = prepared(toy_base, saved, "lineart", annotator="lineart_standard")
    assert np.array_equal(one.controls[0].hints[""], annotate(PHOTO, contract("lineart_standard")))
    assert one.controls[0].specs[""].annotator == "lineart" and one.annotators() == [{"": "lineart_standard"}]
    assert not np.array_equal(one.controls[0].hints[""], annotate(PHOTO, contract("lineart"))) and not one.notes
    own = prepared(toy_base, saved, "lineart", annotator="lineart", options={"contrast": 0.2})
    assert np.array_equal(own.controls[0].hints[""], annotate(PHOTO, kinds.kind_of("lineart").spec(contrast=0.2)))
    assert prepared(toy_base, saved, "lineart").annotators() == [{"": "lineart"}]


def test_another_family_is_refused_with_what_fits(toy_base, saved):
    with pytest.raises(Invalid, match='loaded with hints of "lineart", not canny'):
        prepared(toy_base, saved, "lineart", annotator="canny")
    with pytest.raises(Invalid, match='lineart_standard has no "low"'):
        prepared(toy_base, saved, "lineart", annotator="lineart_standard", options={"low": 1})


def test_where_nothing_makes_a_kind_the_first_ready_maker_does_and_a_note_says_so(toy_base, saved, darkness):
    one = prepared(toy_base, saved)
    assert np.array_equal(one.controls[0].hints[""], 255 - PHOTO) and one.annotators() == [{"": "darkness"}]
    assert 'the hint of "depth" was made by darkness' in one.notes[0] and "--hint-ready" in one.notes[0]
    ready = prepared(toy_base, saved, ready=True)
    assert np.array_equal(ready.controls[0].hints[""], PHOTO) and not ready.notes
    assert not prepared(toy_base, saved, annotator="darkness").notes


def test_where_no_maker_is_ready_the_picture_is_the_hint(toy_base, saved):
    assert np.array_equal(prepared(toy_base, saved).controls[0].hints[""], PHOTO)


def test_a_union_s_types_have_a_maker_each(toy_base, darkness):
    union = {"all": SavedControl(randomised(new_union(toy_base)), HintSpec(""))}
    images = {"lineart": PHOTO, "depth": PHOTO}
    one = prepared(toy_base, union, "all", images=images, annotators={"lineart": "lineart_standard"})
    assert one.annotators() == [{"lineart": "lineart_standard", "depth": "darkness"}]
    assert np.array_equal(one.controls[0].hints["lineart"], annotate(PHOTO, contract("lineart_standard")))
    with pytest.raises(Mismatch, match='to be of "depth", and canny'):
        prepared(toy_base, union, "all", images=images, annotators={"depth": "canny"})
    with pytest.raises(Invalid, match='annotators names the type "pose"'):
        ControlRequest(name="all", images=images, annotators={"pose": "mini_pose"})
    with pytest.raises(Invalid, match="options are of one annotator"):
        ControlRequest(name="all", images=images, options={"gain": 2})


def test_a_second_pass_is_annotated_by_the_maker_too(toy_base, saved):
    one = prepared(
        toy_base, saved, "lineart", {"hires": HiresRequest(factor=2)}, images={}, passes="second",
        annotator="lineart_standard",
    )  # fmt: skip
    control = one.second.controls[0].reading(PHOTO)
    assert np.array_equal(control.hints[""], annotate(PHOTO, contract("lineart_standard")))


def test_a_request_is_the_same_after_its_json(toy_base):
    asked = ControlRequest(name="a", images={"canny": "a.png"}, annotators={"canny": "invert"}, options={"low": 2})
    assert ControlRequest.from_json(asked.to_json()) == asked
    assert asked != asked.model_copy(update={"options": {"low": 3}}) and len({asked, asked.model_copy()}) == 1


def test_a_file_s_control_may_be_named_with_a_maker_of_its_family(toy_base, saved, tmp_path):
    save_control(tmp_path / "lines", saved["lineart"], toy_base)
    assert load_control(tmp_path / "lines", toy_base, "lineart_standard").hint == contract("lineart")
    with pytest.raises(Mismatch, match="made by lineart, not by canny"):
        load_control(tmp_path / "lines", toy_base, "canny")
