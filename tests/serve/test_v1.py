"""Our own API: requests of the library, and jobs that are watched and cancelled."""

import base64
import json
import re
import time

import numpy as np
import pytest
from standin import FACTS, StandIn, ended, picture

from controlkit.images import png_bytes
from controlkit.sample import ControlRequest, EditRequest, Request
from controlkit.serve.catalogue import Catalogue
from controlkit.serve.settings import Limits

pytest_plugins = "serving"


@pytest.fixture
def at(client):
    return client


def test_a_job_from_its_acceptance_to_its_pictures(at, studio, photo):
    body = {
        "prompt": "a",
        "steps": 2,
        "num_images": 2,
        "controls": [{"name": "canny", "images": {"": photo}, "scale": 0.5}],
    }
    answer = at.post("/v1/generate", json=body)
    assert answer.status_code == 202 and answer.json()["state"] in ("waiting", "running")
    job = ended(at, answer.json()["id"])
    assert job["state"] == "done" and len(job["pictures"]) == 2 and len(job["hints"]) == 1
    assert at.get(job["pictures"][1]).headers["content-type"] == "image/png"
    [order] = studio.batches[-1].values()
    assert order.request.controls[0].scale == 0.5 and order.request.controls[0].images[""].shape[2] == 3
    assert at.get("/v1/jobs").json()["jobs"][0]["id"] == job["id"]


def test_a_request_of_the_library_is_a_body(at, studio):
    request = Request(prompt="a", steps=1, seed=5, size=(64, 64), controls=(
        ControlRequest(name="canny", images=np.zeros((8, 8, 3), np.uint8), ready=True),))  # fmt: skip
    answer = at.post("/v1/generate", json=json.loads(request.to_json()) | {"wait": True})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["images"]) == 1
    assert next(iter(studio.batches[-1].values())).request == request


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"controls": [{"name": "canny", "images": {"": "/etc/hostname.png"}}]}, "Paths are never opened"),
        ({"controls": [{"name": "canny", "images": "~/a.png"}]}, "Paths are never opened"),
        ({"controls": [{"name": "canny", "images": ["a.png"]}]}, "is a list"),
        ({"controls": [{"name": "canny", "region": "/a.png"}]}, "Paths are never opened"),
        ({"controls": [{"name": "/etc/passwd", "images": picture()}]}, "no control"),
        ({"controls": [{"name": "owner/name", "images": picture()}]}, "no control"),
        ({"controls": ["canny"]}, "controls"),
        ({"edit": {"image": "file:///a.png"}}, "none is fetched"),
        ({"edit": {"image": picture(), "mask": "a.png"}}, "Paths are never opened"),
        ({"edit": "a.png"}, "edit"),
        ({"edit": {"image": picture(), "outpaint": [9000, 0, 0, 0]}}, "outpaint"),
        ({"promt": "a"}, 'did you mean "prompt"'),
        ({"steps": 10**9}, "at most 150"),
        ({"size": [64, 9000]}, "sides of at most"),
        ({"hires": {"factor": 8}, "size": [1024, 1024]}, "sides of at most"),
        ({"num_images": 0}, "num_images"),
        ({"controls": [{"name": "canny", "images": picture()}] * 9}, "at most 8"),
        ({"seed": 1.5}, "whole number"),
        ({"scheduler": "Eulr a"}, 'did you mean "Euler a"'),
        ({"scheduler": "DDIM Karras"}, "DDIM has no Karras"),
        ({"size": [100, 100]}, "such as [96, 96]"),
    ],
)
def test_bodies_that_are_refused(at, body, words):
    answer = at.post("/v1/generate", json=body)
    assert answer.status_code == 422 and words in answer.json()["error"]["message"], answer.text


def test_a_route_that_is_not_there_is_said_as_both_apis_say_it(at):
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("PUT", "/v1/generate", 405),
        ("GET", "/sdapi/v1/x", 404),
    ):
        answer = at.request(method, path)
        assert answer.status_code == status and answer.json()["detail"] in ("Not Found", "Method Not Allowed")
        assert f"There is no {method} {path}" in answer.json()["error"]["message"]
    assert "image is nothing" in at.post("/v1/annotate", json={"annotator": "canny"}).text


def test_events_tell_of_each_step_until_the_end(at, studio):
    studio.pause = 0.005
    job = at.post("/v1/generate", json={"steps": 30}).json()["id"]
    lines = at.get(f"/v1/jobs/{job}/events").text.split("\n\n")
    kinds = [one.split("\n")[0].removeprefix("event: ") for one in lines if one]
    assert {"state", "step", "preview"} <= {*kinds} and kinds.count("step") > 3
    last = json.loads(lines[-2].split("data: ")[1])
    assert kinds[-1] == "state" and last["state"] == "done" and last["pictures"]


def test_cancel(at, studio):
    studio.pause, before = 0.02, len(studio.batches)
    job = at.post("/v1/generate", json={"steps": 150}).json()["id"]
    while len(studio.batches) == before:
        time.sleep(0.002)
    assert at.post(f"/v1/jobs/{job}/cancel").json()["state"] == "cancelled"
    assert at.post(f"/v1/jobs/{job}/cancel").json()["state"] == "cancelled"
    assert at.post("/v1/jobs/none/cancel").status_code == 404


def test_annotate_and_evaluate(at, studio, photo):
    body = {"annotator": "canny", "image": photo, "options": {"low": 50}, "side": 16, "wait": True}
    answer = at.post("/v1/annotate", json=body)
    assert answer.status_code == 200 and base64.b64decode(answer.json()["images"][0])[:4] == b"\x89PNG"
    [order] = studio.batches[-1].values()
    assert order.options["low"] == 50 and order.side == 16
    assert "canny has no" in at.post("/v1/annotate", json=body | {"options": {"lo": 1}}).text
    assert at.post("/v1/annotate", json=body | {"annotator": "cany"}).status_code == 404
    strip = base64.b64encode(png_bytes(np.zeros((1, 2000, 3), np.uint8))).decode()
    words = at.post("/v1/annotate", json=body | {"image": strip}).json()["error"]["message"]
    assert words == "side is 16; expected at most 8 for a picture of 2000x1, or its hint is too long."
    answer = at.post("/v1/evaluate", json={"control": "canny", "num": 4})
    assert answer.status_code == 202 and ended(at, answer.json()["id"])["kind"] == "evaluate"
    assert "num" in at.post("/v1/evaluate", json={"control": "canny", "num": 1}).text


@pytest.mark.parametrize("name", ["../jobs.sqlite", "..%2Fjobs.sqlite", "%2e%2e/jobs.sqlite", "1.png", "0.png/../../x"])
def test_files_are_those_of_the_job_alone(at, name):
    job = at.post("/v1/generate", json={"steps": 1}).json()["id"]
    ended(at, job)
    assert at.get(f"/v1/jobs/{job}/files/{name}").status_code == 404


def test_a_full_queue_says_when_to_ask_again(desk_of, client_of, tmp_path):
    studio = StandIn(tmp_path / "state" / "pictures")
    studio.pause = 0.02
    at = client_of(desk_of([studio], limits=Limits(waiting=1)))
    answers = [at.post("/v1/generate", json={"steps": 20 + i}) for i in range(4)]
    assert {one.status_code for one in answers} == {202, 503} and answers[-1].headers["retry-after"] == "5"


def test_models_annotators_health_and_metrics(at):
    models = at.get("/v1/models").json()
    assert models["object"] == "list" and {one["id"] for one in models["data"]} == {
        "mini",
        "canny",
        "depth",
        "inpaint",
        "union",
    }
    canny = next(one for one in at.get("/v1/annotators").json()["annotators"] if one["name"] == "canny")
    assert {one["name"] for one in canny["options"]} == {"low", "high"}
    assert at.get("/healthz").json() == {"status": "ok", "waiting": 0, "running": 0}

    def made():
        text = at.get("/metrics").text
        assert 'controlkit_jobs{state="waiting"} 0' in text
        found = re.search(r'controlkit_jobs_ended_total\{api="v1",state="done"\} (\d+)', text)
        return int(found[1]) if found else 0

    before = made()
    at.post("/v1/generate", json={"steps": 1, "wait": True})
    assert made() == before + 1


def test_every_route_is_in_the_schema_with_its_body(at):
    schema = at.get("/openapi.json").json()
    assert len(schema["paths"]) > 50
    body = schema["paths"]["/v1/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {*Request.model_fields} <= {*body}


def test_a_picture_s_own_shape_counts_where_sizes_are_bounded():
    wide = EditRequest(image=np.zeros((32, 32, 3), np.uint8), outpaint=(0, 96, 0, 0))
    assert Catalogue(FACTS).size_of(Request(edit=wide)) == (64, 128)
    assert Catalogue(FACTS).size_of(Request(edit=wide, size=(32, 64))) == (32, 64)
