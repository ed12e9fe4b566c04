"""Preparing loads controls, reads or annotates their pictures, and checks everything before anything is sampled."""

import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from conftest import make, randomised
from controlkit.annotators import annotate, contract, white_on_black
from controlkit.controls import new_control, new_union
from controlkit.errors import Invalid, Mismatch, UserError
from controlkit.formats import SavedControl, save_control
from controlkit.images import HintSpec, fit, read_picture, stretch, write_png
from controlkit.sample import ControlRequest, Request, check_pictures, maker, picture_size, prepare


@pytest.fixture(scope="module")
def saved(toy_base):
    return SavedControl(new_control(toy_base), contract("canny"), hint_cfg_scale=2.5)


@pytest.fixture(scope="module")
def union(toy_base):
    return SavedControl(randomised(new_union(toy_base)), HintSpec(""))


@pytest.fixture
def drawing(tmp_path):
    """Dark on light."""
    picture = np.full((48, 40, 3), 250, np.uint8)
    picture[10:30, 10:30] = (200, 20, 20)
    write_png(tmp_path / "drawing.png", picture)
    return tmp_path / "drawing.png"


def prepared(base, saved, **control):
    [one] = prepare(base, [Request(controls=[ControlRequest(name="x", **control)])], {"x": saved})
    return one


def test_a_picture_is_annotated_alike_from_a_file_and_from_memory(toy_base, saved, drawing):
    pixels = read_picture(drawing)
    [by_file, in_memory] = (prepared(toy_base, saved, images=source).controls[0] for source in (drawing, pixels))
    assert np.array_equal(by_file.hints[""], annotate(pixels, saved.hint, (32, 32)))
    assert np.array_equal(by_file.hints[""], in_memory.hints[""])
    assert by_file == in_memory and by_file.specs == {"": saved.hint} and by_file.network is saved.branch


def test_a_drawing_in_a_file_is_inverted_and_an_array_is_taken_as_it_is(toy_base, saved, drawing):
    pixels = read_picture(drawing)
    [by_file, in_memory] = (
        prepared(toy_base, saved, images=source, ready=True).controls[0].hints[""] for source in (drawing, pixels)
    )
    assert np.array_equal(by_file, fit(white_on_black(pixels), (32, 32), "lines")) and by_file[0, 0, 0] < 10
    assert np.array_equal(in_memory, fit(pixels, (32, 32), "lines"))


def test_pictures_of_another_shape_come_to_the_size_as_asked(toy_base, saved):
    """A picture of 32 x 64, its left half white: two edges in the middle of it."""
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, :32] = 255
    crop, stretched, filled = (
        prepared(toy_base, saved, images=wide, resize=how).controls[0].hints[""] for how in ("crop", "stretch", "fill")
    )
    assert np.array_equal(crop, annotate(wide[:, 16:48], saved.hint))
    assert np.array_equal(stretched, annotate(stretch(wide, (32, 32)), saved.hint))
    assert np.array_equal(filled[8:24], annotate(stretch(wide, (16, 32)), saved.hint))
    assert filled[8:24].any() and not filled[:8].any() and not filled[24:].any(), "nothing is said around it"
    for name, ours in {"Just Resize": stretched, "Resize and Fill": filled, 1: crop, "pixel-perfect": crop}.items():
        assert np.array_equal(prepared(toy_base, saved, images=wide, resize=name).controls[0].hints[""], ours)
    lines = np.zeros((32, 64, 3), np.uint8)
    lines[:, 7] = 255
    ready = {"ready": True, "images": lines}
    found = [
        prepared(toy_base, saved, resize=how, **ready).controls[0].hints[""] for how in ("crop", "stretch", "fill")
    ]
    assert not found[0].any() and np.array_equal(found[1], stretch(lines, (32, 32), "lines"))
    assert np.array_equal(found[2][8:24], stretch(lines, (16, 32), "lines")) and not found[2][:8].any()


def test_a_picture_with_a_mask_means_the_same_from_a_file_and_from_memory(toy_base, saved, tmp_path):
    picture = np.full((32, 32, 4), 200, np.uint8)
    picture[:, :16, 3] = 0
    Image.fromarray(picture).save(tmp_path / "holed.png")
    for rule in (saved.hint, contract("inpaint")):
        control = replace(saved, hint=rule)
        [by_file, in_memory] = (
            prepared(toy_base, control, images=source).controls[0].hints[""]
            for source in (tmp_path / "holed.png", picture)
        )
        assert np.array_equal(by_file, in_memory)
        assert by_file.shape[-1] == (4 if rule.mask_value is not None else 3)


def clear(colour, alpha=255):
    """A stroke on a clear ground."""
    picture = np.full((32, 32, 4), (*colour, 0), np.uint8)
    picture[6:26, 14:18, 3] = alpha
    return picture


CLEAR = {  # kind: colour of the stroke, of nothing, of the stroke in the hint
    "white lines": ("canny", (255, 255, 255), (0, 0, 0), (255, 255, 255)),
    "coloured lines": ("scribble", (255, 0, 0), (0, 0, 0), (255, 0, 0)),
    "dark lines": ("lineart", (0, 0, 0), (0, 0, 0), (255, 255, 255)),
    "a pose": ("pose", (0, 85, 255), (0, 0, 0), (0, 85, 255)),
    "a depth": ("depth", (90, 90, 90), (0, 0, 0), (90, 90, 90)),
    "normals": ("normal", (200, 100, 200), (128, 128, 255), (200, 100, 200)),
    "a photograph": ("tile", (90, 160, 30), (255, 255, 255), (90, 160, 30)),
    "of no name": ("", (255, 255, 255), (0, 0, 0), (255, 255, 255)),
}


@pytest.mark.parametrize("case", CLEAR)
def test_a_hint_on_a_clear_ground_gets_the_ground_of_its_kind(case, toy_base, saved, tmp_path):
    kind, colour, nothing, drawn = CLEAR[case]
    Image.fromarray(clear(colour)).save(tmp_path / "clear.png")
    control = replace(saved, hint=contract(kind) if kind else HintSpec(""))
    as_uri = Request.from_json(Request(controls=[ControlRequest(name="x", images=clear(colour))]).to_json())
    sources = [
        tmp_path / "clear.png",
        *([] if case == "dark lines" else [clear(colour), as_uri.controls[0].images[""]]),
    ]
    for source in sources:  # arrays in memory are not inverted
        one = prepared(toy_base, control, images=source, ready=True)
        hint = one.controls[0].hints[""]
        assert tuple(hint[0, 0]) == nothing and tuple(hint[16, 16]) == drawn and not one.notes
    if kind in ("pose", "depth", "normal", ""):  # what nothing here makes is the picture itself
        hint = prepared(toy_base, control, images=tmp_path / "clear.png").controls[0].hints[""]
        assert tuple(hint[0, 0]) == nothing and tuple(hint[16, 16]) == drawn


@pytest.mark.parametrize(
    ("kind", "picture", "ready"),
    [
        ("canny", np.zeros((32, 32, 4), np.uint8), True),
        ("pose", np.zeros((32, 32, 3), np.uint8), True),
        ("pose", clear((0, 0, 0)), True),  # black on nothing
        ("depth", np.full((32, 32, 1), 0.5, np.float32), True),
        ("canny", np.full((32, 32, 3), 200, np.uint8), False),  # a flat picture has no edges
    ],
)
def test_an_empty_hint_is_not_used_without_a_word(kind, picture, ready, toy_base, saved):
    one = prepared(toy_base, replace(saved, hint=contract(kind)), images=picture, ready=ready)
    assert any('hint of "x" is empty' in note for note in one.notes)


def test_a_flat_photograph_is_no_empty_hint(toy_base, saved):
    assert not prepared(toy_base, replace(saved, hint=contract("tile")), images=np.full((32, 32, 3), 9, np.uint8)).notes


def test_settings_are_the_request_s_and_what_it_leaves_open_is_filled_in(toy_base, saved, drawing):
    [one] = prepare(toy_base, [Request(controls=[ControlRequest(name="x", images=drawing)], steps=3)], {"x": saved})
    assert (one.settings.steps, one.settings.guidance, one.settings.size) == (3, 4.0, (32, 32))
    assert one.controls[0].hint_cfg_scale == 2.5, "as the control says"
    settled = one.settled()
    assert settled.size == (32, 32) and settled.controls[0].hint_cfg_scale == 2.5
    [again] = prepare(toy_base, [Request.from_json(settled.to_json())], {"x": saved})
    assert again.settled() == again.request == settled
    use = {"scale": 0.5, "start": 0.1, "end": 0.9, "guess": True, "hint_cfg_scale": 1.5}
    control = prepared(toy_base, saved, images=drawing, **use).controls[0]
    assert {name: getattr(control, name) for name in use} == use


def test_a_control_is_loaded_once_and_a_picture_is_annotated_once(toy_base, saved, drawing, tmp_path, monkeypatch):
    save_control(tmp_path / "edges", saved, toy_base)
    asked = ControlRequest(name=str(tmp_path / "edges"), images=drawing)
    loads, reads = [], []
    real_load, real_annotate = prepare.__globals__["load_control"], prepare.__globals__["annotate"]
    monkeypatch.setitem(prepare.__globals__, "load_control", lambda *a: loads.append(a) or real_load(*a))
    monkeypatch.setitem(prepare.__globals__, "annotate", lambda *a: reads.append(a) or real_annotate(*a))
    requests = [Request(seed=seed, controls=[asked]) for seed in range(3)] + [Request(size=(48, 48), controls=[asked])]
    found = prepare(toy_base, requests)
    assert len(loads) == 1 and len(reads) == 2, "once a size"
    assert found[0].is_like(found[2]) and not found[0].is_like(found[3])


def test_what_its_author_should_know_is_returned(toy_base, saved, drawing, tmp_path):
    old = replace(saved, trained={"base": "toy", "base_digest": "0123456789abcdef"}, hint=HintSpec(""))
    save_control(tmp_path / "old", old, toy_base)
    asked = ControlRequest(name=str(tmp_path / "old"), images=drawing)
    [one, plain] = prepare(toy_base, [Request(controls=[asked]), Request()])
    unnamed, other = one.notes
    assert "does not say what its hints are" in unnamed
    assert "0123456789abcdef" in other and toy_base.digest in other
    assert plain.notes == ()


def test_a_union_s_hints_come_by_type_and_a_type_of_it_as_a_control_does(toy_base, union, drawing):
    control = prepared(toy_base, union, images={"canny": drawing, "depth": drawing}).controls[0]
    assert set(np.unique(control.hints["canny"])) == {0, 255} and {20, 200} <= set(np.unique(control.hints["depth"]))
    assert control.specs == {kind: union.contract_of(kind) for kind in ("canny", "depth")}
    assert {kind: one.shape for kind, one in control.pictures().items()} == dict.fromkeys(control.specs, (32, 32, 3))
    hints = {kind: control.hints[kind] for kind in ("canny", "depth")}
    both, one = (make(toy_base, [union], [given], steps=2).pixels for given in (hints, {"canny": hints["canny"]}))
    assert not np.array_equal(both, one)


def test_a_maker_takes_controls_in_memory(toy_base, saved, drawing):
    advanced = []
    make_pictures = maker(toy_base, {"x": saved}, on_step=advanced.append)
    requests = [Request(seed=s, steps=2, controls=[ControlRequest(name="x", images=drawing)]) for s in range(3)]
    assert [one.request for one in make_pictures(requests)] == requests and advanced == [3, 3]


def test_the_size_is_the_bases_own_unless_one_is_given(toy_base):
    assert picture_size(toy_base, None) == (32, 32)
    assert picture_size(toy_base, (16, 64)) == (16, 64)


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ((60, 33), "got 33x60. The nearest is 32x64."),
        ((32, 8), "got 8x32. The nearest is 16x32."),
        ((0, 32), "got 32x0. The nearest is 32x16."),
        ((-16, 32), "got 32x-16. The nearest is 32x16."),
    ],
)
def test_a_size_that_the_base_cannot_make_is_refused_with_the_nearest(toy_base, size, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        picture_size(toy_base, size)


FLOATS = np.full((32, 32, 3), 2.0, np.float32)
BAD = {
    "too many steps": ({"steps": 2000}, None, Invalid, "takes 1 to 1000 steps"),
    "a size that is no multiple": ({"size": (50, 50)}, None, Invalid, "The nearest is 48x48"),
    "no picture": ({}, {}, Invalid, "needs a picture"),
    "a missing file": ({}, {"images": "nowhere.png"}, UserError, "no picture at nowhere.png"),
    "a missing hint": ({}, {"images": "nowhere.npy", "ready": True}, UserError, "no hint at nowhere.npy"),
    "an array that is not ready": ({}, {"images": "hint.npy"}, Invalid, "arrays are hints already"),
    "an array in memory that is not ready": (
        {},
        {"images": FLOATS},
        Invalid,
        "is no picture: if it is a hint, set ready",
    ),
    "values out of range": ({}, {"images": FLOATS, "ready": True}, Invalid, "has values from 2 to 2"),
    "types for a control that has none": ({}, {"images": {"canny": FLOATS}}, Mismatch, "is no Union and has no types"),
    "an annotator beside types": (
        {},
        {"images": {"canny": FLOATS}, "annotator": "canny"},
        Invalid,
        "leave out annotator",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_made_is_refused_before_anything_is(case, toy_base, saved):
    settings, control, kind, sentence = BAD[case]
    controls = [] if control is None else [ControlRequest(name="x", **control)]
    with pytest.raises(kind, match=sentence):
        prepare(toy_base, [Request(controls=controls, **settings)], {"x": saved})


def test_a_union_wants_types_and_knows_its_own(toy_base, union, drawing):
    with pytest.raises(Invalid, match="of which type"):
        prepared(toy_base, union, images=drawing)
    with pytest.raises(UserError, match='no type "cany"'):
        prepared(toy_base, union, images={"cany": drawing})


def test_pictures_and_annotators_are_checked_without_a_base(drawing):
    check_pictures(ControlRequest(name="x", images=drawing, annotator="canny"))
    for wrong in ({"images": "nowhere.png"}, {"images": drawing, "annotator": "cany"}, {"images": "hint.npy"}):
        with pytest.raises(UserError):
            check_pictures(ControlRequest(name="x", **wrong))


def test_a_note_quotes_the_end_of_a_long_prompt_in_part(toy_base):
    [one] = prepare(toy_base, [Request(prompt="apple " * 3000)])
    assert "cut off" in one.notes[0] and len(one.notes[0]) < 500
