"""OpenAI's API, with hints and controls as further fields."""

import base64

import pytest
from standin import picture

from controlkit.serve.front import IGNORED

pytest_plugins = "serving"


@pytest.fixture
def seen(client, studio):
    return client, lambda: next(iter(studio.batches[-1].values()))


def generated(client, **body):
    answer = client.post("/v1/images/generations", json={"prompt": "a", "steps": 1} | body)
    return answer


def test_generations(seen, photo):
    at, order = seen
    answer = generated(at, model="gpt-image-1", n="2", size="100x64", quality="hd", seed=3, control="canny", hint=photo)
    assert answer.status_code == 200 and answer.headers[IGNORED] == "quality"
    assert [*answer.json()] == ["created", "data"] and len(answer.json()["data"]) == 2
    assert base64.b64decode(answer.json()["data"][0]["b64_json"])[:4] == b"\x89PNG"
    made = order()
    assert made.seeds == ((3, 0), (4, 0)) and made.request.size == (64, 96) and made.request.dialect == "plain"
    assert made.request.controls[0].name == "canny"
    [first, _] = generated(at, n=2, response_format="url", size="auto").json()["data"]
    assert at.get(first["url"]).content[:4] == b"\x89PNG" and order().request.size == (64, 64)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": None, "size": "big"}, "WIDTHxHEIGHT"),
        ({"size": "0x64"}, "WIDTHxHEIGHT"),
        ({"size": "99999x64"}, "sides of at most"),
        ({"n": 17}, "n is 17"),
        ({"response_format": "webp"}, "b64_json or url"),
        ({"control": "cany", "hint": picture()}, 'did you mean "canny"'),
        ({"control": "canny"}, "needs a picture"),
        ({"hint": picture()}, "no control"),
        ({"control": "canny", "hint": "https://example.com/a.png"}, "none is fetched"),
        ({"control": "union", "hint": picture()}, "is a Union"),
        ({"prompt": 3}, "expected a text"),
    ],
)
def test_errors_are_openais(client, body, words):
    answer = generated(client, **body)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


def files(**given):
    return {key: (f"{key}.png", base64.b64decode(value), "image/png") for key, value in given.items()}


def test_edits(seen, photo):
    at, order = seen
    form = {"prompt": "a", "model": "mini", "steps": "1", "strength": "0.5"}
    answer = at.post("/v1/images/edits", data=form, files=files(image=photo, mask=picture(alpha=0)))
    assert answer.status_code == 200, answer.text
    edit = order().request.edit
    assert edit.strength == 0.5 and edit.mask[0, 0, 0] == 255 and edit.mask[-1, 0, 0] == 0
    at.post("/v1/images/edits", data=form, files={"image[]": files(image=picture(alpha=0))["image"]})
    assert order().request.edit.mask[0, 0, 0] == 255, "where the picture itself is transparent"
    at.post("/v1/images/edits", data=form | {"control": "canny"}, files=files(image=photo, hint=photo))
    assert order().request.edit.mask is None and order().request.controls[0].name == "canny"


@pytest.mark.parametrize(
    ("form", "given", "words"),
    [
        ({"prompt": "a"}, {"mask": picture()}, "no image"),
        ({}, {"image": picture()}, "no prompt"),
        ({"prompt": "a"}, {"image": picture(), "musk": picture()}, 'did you mean "mask"'),
        ({"prompt": "a"}, {"image": base64.b64encode(b"no picture").decode()}, "cannot be read as a picture"),
    ],
)
def test_edits_that_are_refused(client, form, given, words):
    answer = client.post("/v1/images/edits", data=form, files=files(**given))
    assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary=x", "application/json"])
def test_damaged_forms(client, kind):
    answer = client.post("/v1/images/edits", content=b"--x\r\n\r\nnothing", headers={"Content-Type": kind})
    assert answer.status_code == 400, answer.text
