"""Families: several makers of one kind of hint, A1111's names and thresholds, sliders."""

import re

import numpy as np
import pytest

from controlkit.annotators import (
    all_kinds,
    annotate,
    annotator,
    contract,
    each,
    fits,
    kind_of,
    kinds,
    maker,
    makers_of,
    ready_maker,
    register,
    why_not,
    with_maker,
)
from controlkit.annotators.options import Slider, slider_of
from controlkit.controls import TYPES
from controlkit.errors import Invalid, Mismatch, NotFound, Unsupported
from controlkit.images import HintSpec
from controlkit.measure import metric_of

MADE = [kind.name for kind in all_kinds() if kind.is_made_here]
A1111 = (
    "canny", "mlsd", "invert", "threshold", "scribble_xdog", "lineart_standard", "shuffle", "tile_resample",
    "tile_colorfix", "tile_colorfix+sharp", "blur_gaussian", "recolor_luminance", "recolor_intensity", "inpaint_only",
    "inpaint_global_harmonious", "t2ia_color_grid", "invert (from white bg & black line)",
    "lineart_standard (from white bg & black line)",
)  # fmt: skip


A1111_NETWORKS = (
    "softedge_hed", "softedge_hedsafe", "softedge_pidinet", "softedge_pidisafe", "hed", "hed_safe", "pidinet",
    "pidinet_safe", "scribble_hed", "scribble_pidinet", "pidinet_scribble", "t2ia_sketch_pidi", "pidinet_sketch",
    "lineart_realistic", "lineart_coarse", "lineart_anime", "depth_midas", "depth_anything", "depth_anything_v2",
    "depth_zoe",
    "normal_bae", "normal_midas", "normal_map", "seg_ofade20k", "seg_ufade20k", "oneformer_ade20k", "segmentation",
    "openpose_face", "openpose_faceonly", "openpose_hand", "openpose_full", "dw_openpose_full", "mediapipe_face",
)  # fmt: skip


@pytest.fixture
def table(monkeypatch):
    """A table to add to."""
    monkeypatch.setattr(kinds, "_KINDS", dict(kinds._KINDS))


@pytest.fixture
def darkness(table):
    """A maker of depth that knows every picture: what is dark is near."""
    return register(maker("darkness", each(lambda picture, gain=1.0: 255 - picture), of="depth", aliases=("dark",)))


def test_a_maker_has_its_family_s_facts_and_its_own(table):
    made = maker("own_pose", each(lambda picture: picture), of="openpose", extra="x", aliases=("own",), version=3)
    pose = kind_of("pose")
    for same in ("resize", "ground", "mask_value", "lines", "metric", "mirror"):
        assert getattr(made, same) == getattr(pose, same)
    assert (made.family, made.contract_name, made.aliases, made.extra, made.version) == (
        "pose",
        "pose",
        ("own",),
        "x",
        3,
    )
    assert made.truth is None and not made.folders and made.union_type is None
    register(made)
    assert metric_of(contract("own")) is metric_of(contract("pose")) and "own_pose" not in TYPES
    with pytest.raises(NotFound, match="no hints named"):
        maker("other", each(lambda picture: picture), of="pse")


def test_makers_of_a_kind_begin_with_its_own_row(darkness):
    made = [kind.name for kind in makers_of("lineart")]
    assert made[:2] == ["lineart", "lineart_standard"] and made[-2:] == ["invert", "threshold"]
    assert [kind.name for kind in makers_of("lineart_standard")][:2] == ["lineart_standard", "lineart"]
    depths = [kind.name for kind in makers_of("depth")]
    assert (depths[0], depths[-1]) == ("mini_depth", "darkness") and not makers_of("never heard of")
    assert fits("darkness", "depth") and fits("mini_depth", "darkness") and fits("invert", "canny")
    assert not fits("canny", "scribble") and not fits("invert", "depth") and not fits("canny", "")


def test_a_kind_without_a_function_is_made_by_the_first_maker_that_is_ready(table):
    with pytest.raises(NotFound, match=r'no annotator "depth" .* mini_depth knows pictures of the embedded'):
        annotator("depth")
    for name, facts in (("deep", {"modules": ("no_such_module",), "extra": "x"}), ("deeper", {"lack": lambda: "No."})):
        lacking = register(maker(name, each(lambda picture: picture), of="depth", **facts))
        assert lacking.lacks() and ready_maker("depth") is None
        with pytest.raises(NotFound, match=r"pip install 'controlkit\[x\]'"):
            annotator("depth")
    with pytest.raises(Unsupported, match="No"):
        annotator("deeper").make([np.zeros((8, 8, 3), np.uint8)])
    ready = register(maker("dark", each(lambda picture: 255 - picture), of="depth", modules=("json",)))
    assert annotator("depth") is ready is ready_maker("depth") and not ready.lacks()
    assert annotator("mini_depth").own_world


def test_a_contract_s_hints_are_made_by_what_is_named_and_stay_its_own_in_all_else(darkness):
    spec = HintSpec("depth", channels=1, low=-1.0, colour_order="BGR")
    assert with_maker(spec).annotator == with_maker(spec, "dark").annotator == "darkness"
    made = with_maker(spec, "darkness", {"gain": 2})
    assert (made.channels, made.low, made.colour_order, made.options) == (1, -1.0, "BGR", {"gain": 2.0})
    assert with_maker(spec, "mini_depth").annotator == "mini_depth"
    with pytest.raises(
        Mismatch, match=r'to be of "depth", and canny makes those of "canny": .* mini_depth, .*darkness'
    ):
        with_maker(spec, "canny")
    with pytest.raises(Invalid, match='darkness has no "low"'):
        with_maker(spec, "darkness", {"low": 1})
    with pytest.raises(NotFound):
        with_maker(spec, "darknes")


def test_without_a_name_hints_are_made_as_the_contract_says():
    spec = kind_of("canny").spec(low=10)
    assert with_maker(spec) is spec and with_maker(spec, "canny") == spec
    assert with_maker(spec, "canny", {"high": 50}).options == {"low": 10, "high": 50}
    for unknown in (HintSpec(""), HintSpec("mine"), contract("canny+depth")):
        assert with_maker(unknown) == unknown
    assert with_maker(contract("depth")) == contract("depth"), "nothing that knows every picture makes depth"


def test_hints_of_a_maker_may_be_a_contract(darkness):
    picture = np.full((8, 8, 3), 55, np.uint8)
    assert (annotate(picture, contract("darkness")) == 200).all()
    assert contract("darkness").annotator == "darkness" and contract("tile_colorfix+sharp").annotator == "tile_colorfix"


# --- A1111's names, sliders -----------------------------------------------------------------------------------------


def test_modules_of_a1111_are_names_here():
    assert all(annotator(name).is_made_here for name in A1111)
    assert all(kind_of(name).is_made_here for name in A1111_NETWORKS), "whether their weights are here or not"


NOT_HERE = (
    "reference_only", "reference_adain", "reference_adain+attn", "revision_clipvision", "revision_ignore_prompt",
    "clip_vision", "t2ia_style_clipvision", "ip-adapter_clip_sd15", "ip-adapter_clip_sdxl_plus_vith", "ip-adapter-auto",
    "ip-adapter_face_id_plus", "ip-adapter_pulid", "instant_id_face_embedding", "instant_id_face_keypoints",
    "facexlib", "inpaint_only+lama", "depth_leres", "depth_leres++", "depth_hand_refiner", "normal_dsine",
    "softedge_teed", "te_hed", "softedge_anyline", "lineart_anime_denoise", "densepose", "densepose_parula",
    "animal_openpose", "seg_ofcoco", "oneformer_coco", "seg_anime_face", "anime_face_segment", "mobile_sam",
)  # fmt: skip


@pytest.mark.parametrize("name", NOT_HERE)
def test_modules_that_nothing_here_stands_for_say_why_and_what_to_use(name):
    for find in (annotator, kind_of):
        with pytest.raises(Unsupported, match=f'"{re.escape(name)}" (makes no hint|is not made here|fills the hole)'):
            find(name)
    known = {one for kind in all_kinds() for one in (kind.name, *kind.aliases)}
    _, _, advice = why_not(name).rpartition(": use ")
    named = re.findall(r"\w+", advice.partition(", in ")[0]) if ": use " in why_not(name) else []
    assert set(named) - {"or"} <= known, "what it says to use is there"


def test_no_reason_hides_an_annotator_or_the_nearest_name():
    assert not [one for kind in all_kinds() for one in (kind.name, *kind.aliases) if why_not(one)]
    for near, name in (("depth_anything_v3", "depth_anything_v2"), ("softedge_hd", "softedge")):
        with pytest.raises(NotFound, match=f'did you mean "{name}'):
            annotator(near)


def test_thresholds_of_a1111_are_options_in_its_units():
    assert kind_of("canny").of_thresholds(50, 60) == {"low": 50, "high": 60}
    assert kind_of("canny").of_thresholds(-1, None) == kind_of("canny").of_thresholds() == {"low": 100, "high": 200}
    assert kind_of("scribble_xdog").of_thresholds(32)["contrast"] == pytest.approx(16 / 255)
    assert kind_of("blur_gaussian").of_thresholds(4.5)["width"] == pytest.approx(4.5 / 512)
    assert kind_of("tile_resample").of_thresholds(2, 7) == {"shrink": 2}
    assert kind_of("mlsd").of_thresholds(1.5, 3) == kind_of("mlsd").checked({}), "ours has other options"
    with pytest.raises(Invalid, match='"low" is 1000000'):
        kind_of("canny").of_thresholds(1e6)


@pytest.mark.parametrize("name", MADE)
def test_every_threshold_can_be_set_anywhere_in_its_range_and_defaults_are_the_options_own(name):
    kind = kind_of(name)
    for place, one in enumerate(kind.thresholds):
        for value in (one.least, one.value, one.most):
            kind.of_thresholds(*[-1] * place, value)
    defaults = kind.of_thresholds(*[-1] * len(kind.thresholds))
    assert defaults == pytest.approx(kind.checked({})), "left alone, both give the same hints"


@pytest.mark.parametrize("name", MADE)
def test_every_slider_shows_values_that_the_option_takes(name):
    kind = annotator(name)
    assert [slider["name"] for slider in kind.sliders] == list(kind.options.model_fields)
    for slider in kind.sliders:
        assert slider["min"] <= slider["value"] <= slider["max"] and 0 < slider["step"] <= slider["max"] - slider["min"]
        for value in (slider["min"], slider["max"]):
            other = {"least": 0.01, "most": 0.99} if name == "inpaint" else {}
            assert kind.checked(other | {slider["name"]: value})


def test_a_slider_s_step_is_a_round_share_of_its_range():
    def shown(low, high, default):
        from typing import Annotated

        from pydantic import Field

        from controlkit.annotators.options import options_of

        def function(picture, x: Annotated[float, Field(gt=low, le=high)] = default):
            return picture

        return slider_of("x", options_of("one", function).model_fields["x"])

    assert shown(0, 1, 0.5) == {"name": "x", "value": 0.5, "min": 0.01, "max": 1.0, "step": 0.01}
    assert shown(0, 300, 100.0)["step"] == 2 and shown(0, 1, 0.003)["step"] == 0.002
    assert Slider(0, 255).step == 1
