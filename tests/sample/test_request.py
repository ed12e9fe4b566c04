"""A request is a value: checked where it is made, equal to itself after a round trip through JSON."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from controlkit.errors import Invalid
from controlkit.images import png_bytes
from controlkit.sample import ControlRequest, Request

SHARES = st.floats(0, 1)
FACTORS = st.floats(-100, 100)
PIXELS = st.sampled_from(["uint8", "uint16", "float32"]).flatmap(
    lambda kind: arrays(kind, array_shapes(min_dims=3, max_dims=3, max_side=5))
)
PATHS = st.text(min_size=1).filter(lambda text: not text.startswith(("data:", "~")) and "\0" not in text).map(Path)


@st.composite
def controls(draw):
    start, end = sorted((draw(SHARES), draw(SHARES)))
    images = draw(st.dictionaries(st.sampled_from(["", "canny", "depth"]), PATHS | PIXELS))
    return ControlRequest(
        name=draw(st.text(min_size=1)),
        images=images,
        ready=draw(st.booleans()),
        annotator=draw(st.none() | st.text()),
        scale=draw(FACTORS),
        scales={kind: draw(FACTORS) for kind in images if kind},
        start=start,
        end=end,
        guess=draw(st.booleans()),
        hint_cfg_scale=draw(st.none() | st.floats(0, 100)),
    )


REQUESTS = st.builds(
    Request,
    prompt=st.text(),
    negative_prompt=st.none() | st.text(),
    seed=st.integers(0, 2**64 - 1),
    size=st.none() | st.tuples(st.integers(1, 4096), st.integers(1, 4096)),
    steps=st.integers(1, 1000),
    guidance=st.floats(0, 30),
    controls=st.lists(controls(), max_size=2).map(tuple),
)


@settings(deadline=None, max_examples=60)
@given(REQUESTS)
def test_a_request_is_the_same_after_json(request):
    again = Request.from_json(request.to_json())
    assert again == request and hash(again) == hash(request)
    assert again.to_json() == request.to_json()
    for one, other in zip(request.controls, again.controls, strict=True):
        for kind, source in one.images.items():
            found = other.images[kind]
            assert type(found) is type(source)
            if isinstance(source, np.ndarray):
                assert found.dtype == source.dtype and found.tobytes() == source.tobytes(), "to the bit, NaN too"


def test_pixels_in_memory_are_written_as_a_png_where_they_are_a_picture_and_else_as_an_array():
    picture = np.zeros((2, 3, 4), np.uint8)
    written = json.loads(ControlRequest(name="x", images={"a": picture, "b": picture[..., :1]}).to_json())["images"]
    assert written["a"].startswith("data:image/png;base64,") and written["b"].startswith(
        "data:application/x-npy;base64,"
    )


@pytest.mark.parametrize("opaque", [True, False])
def test_a_data_uri_of_somebody_else_s_keeps_a_mask_where_there_is_one(opaque):
    picture = np.full((4, 4, 3 if opaque else 4), 77, np.uint8)
    palette = png_bytes(picture[..., :3], colours=4) if opaque else png_bytes(picture)
    uri = f"data:image/png;base64,{base64.b64encode(palette).decode()}"
    [read] = ControlRequest(name="x", images=uri).images.values()
    assert np.array_equal(read, picture)


def test_requests_are_equal_where_their_pixels_are_and_nothing_can_be_written_into_them():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    one, same, other = (ControlRequest(name="x", images=p) for p in (pixels, pixels.copy(), pixels + 1))
    assert one == same and hash(one) == hash(same) and len({one, same, other}) == 2
    assert one != ControlRequest(name="x", images="x.png") and one != "x"
    with pytest.raises(ValueError, match="read-only"):
        one.images[""][0] = 0
    with pytest.raises(ValueError, match="frozen"):
        one.scale = 2.0


BAD = {
    "no step": ({"steps": 0}, '"steps" is 0; expected greater than or equal to 1'),
    "a word for a number": ({"guidance": "much"}, "\"guidance\" is 'much'; expected a valid number"),
    "no number": ({"guidance": float("nan")}, '"guidance" is nan; expected a finite number'),
    "a negative seed": ({"seed": -1}, '"seed" is -1'),
    "a size of one side": ({"size": [64]}, '"size.1" is missing'),
    "an unknown key": ({"stepz": 3}, 'no "stepz": did you mean "steps"?'),
    "an unknown key of a control": (
        {"controls": [{"name": "x", "scael": 1}]},
        'controls.0: ControlRequest has no "scael"',
    ),
    "a control without a name": ({"controls": [{"images": "x.png"}]}, 'controls.0: ControlRequest: "name" is missing'),
    "an end before its start": (
        {"controls": [{"name": "x", "start": 0.5, "end": 0.2}]},
        "start is 0.5 and end is 0.2; expected start <= end",
    ),
    "a share over one": ({"controls": [{"name": "x", "end": 1.5}]}, '"end" is 1.5'),
    "an infinite scale": ({"controls": [{"name": "x", "scale": float("inf")}]}, '"scale" is inf'),
    "a huge scale": (
        {"controls": [{"name": "x", "scale": -1e38}]},
        '"scale" is -1e+38; expected greater',
    ),
    "huge guidance": ({"guidance": 1e38}, '"guidance" is 1e+38; expected less than or equal to 1000'),
    "a seed too large for torch": ({"seed": 2**64}, f'"seed" is {2**64}; expected less than'),
    "a picture too large": ({"size": (64, 100_000)}, '"size.1" is 100000; expected less than or equal to 16384'),
    "half a character": ({"prompt": "cat \ud83d"}, "expected a text in UTF-8"),
    "half a character not wanted": ({"negative_prompt": "\udce9"}, "expected a text in UTF-8"),
    "a path with a zero byte": ({"controls": [{"name": "x", "images": "a\0b.png"}]}, "which has no zero bytes"),
    "a type's scale that is not finite": (
        {"controls": [{"name": "x", "images": {"canny": "a.png"}, "scales": {"canny": float("nan")}}]},
        '"scales.canny" is nan; expected a finite number',
    ),
    "a scale for a type without a picture": (
        {"controls": [{"name": "x", "images": {"canny": "a.png"}, "scales": {"depth": 1}}]},
        'scales names the type "depth"',
    ),
    "a scale by type where there is none": (
        {"controls": [{"name": "x", "images": "a.png", "scales": {"": 1}}]},
        'scales names the type ""',
    ),
    "a negative hint_cfg_scale": ({"controls": [{"name": "x", "hint_cfg_scale": -1}]}, '"hint_cfg_scale" is -1'),
    "doubles": (
        {"controls": [{"name": "x", "images": np.zeros((2, 2, 3))}]},
        "2 x 2 x 3 of float64; expected height x width x channels of uint8, uint16, float32",
    ),
    "no picture": ({"controls": [{"name": "x", "images": {"": 3}}]}, "3; expected a path, a data: URI or an array"),
    "no base64": ({"controls": [{"name": "x", "images": "data:image/png;base64,A*A"}]}, "base64 cannot be read"),
    "another code": ({"controls": [{"name": "x", "images": "data:image/png,abc"}]}, "not coded in base64"),
    "half a picture": (
        {"controls": [{"name": "x", "images": "data:image/png;base64,AAAA"}]},
        "cannot be read as a picture",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_by_key_value_and_expectation(case):
    values, sentence = BAD[case]
    with pytest.raises(Invalid, match=re.escape(sentence)) as caught:
        Request(**values)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "too many levels"),
        (b"\xff\x00", "no text in UTF-8"),
        ("[1]", "holds a list"),
        ('{"steps": 0}', '"steps" is 0'),
    ],
)
def test_what_is_no_request_is_refused(text, sentence):
    with pytest.raises(Invalid, match=sentence):
        Request.from_json(text)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_request_is_read_in_the_encodings_of_editors(encoding):
    request = Request(prompt="une pomme, \u00e9crite \U0001f34e")
    assert Request.from_json(request.to_json().encode(encoding)) == request
    assert Request.from_json("\ufeff" + request.to_json()) == request
