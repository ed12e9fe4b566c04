"""What the guard lets through: Host, Origin, token and sizes."""

import base64

import pytest

from controlkit.errors import Invalid
from controlkit.serve.settings import Limits, Settings

pytest_plugins = "serving"

TOKEN = "a-long-token"


@pytest.mark.parametrize(
    "host", ["127.0.0.1:7860", "localhost:7860", "[::1]:7860", "LOCALHOST", "127.0.0.1", "localhost."]
)
def test_its_own_names_are_answered(client, host):
    assert client.get("/sdapi/v1/options", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "evil.example:7860", "", "localhost:x", "a@localhost", "localhost/x"],
)
def test_other_names_are_not_as_they_may_lead_here(client, host):
    assert client.get("/sdapi/v1/options", headers={"Host": host}).status_code == 421


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://127.0.0.1:7860"}, 200),
        ({"Origin": "http://localhost:3000"}, 200),  # which is allowed
        ({"Origin": "http://127.0.0.1:3000"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "none"}, 200),
    ],
)
def test_pages_of_other_sites_may_not_ask(guarded, headers, status):
    at = guarded(origins=("http://localhost:3000",))
    for method, path in (("GET", "/sdapi/v1/options"), ("POST", "/sdapi/v1/interrupt")):
        answer = at.request(method, path, headers=headers)
        assert answer.status_code == status
        allowed = headers.get("Origin") if "3000" in headers.get("Origin", "") and status == 200 else None
        assert answer.headers.get("access-control-allow-origin") == allowed


def test_a_page_that_is_allowed_may_ask_before_it_sends(guarded):
    at = guarded(origins=("http://localhost:3000",), token=TOKEN)
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    answer = at.options("/v1/generate", headers={"Origin": "http://localhost:3000", **asks})
    assert answer.status_code == 204 and answer.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert at.options("/v1/generate", headers={"Origin": "http://localhost:3001", **asks}).status_code == 403


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("", 401),
        (f"Bearer {TOKEN}", 200),
        (f"bearer {TOKEN}", 200),
        ("Bearer wrong", 401),
        (TOKEN, 401),
        ("Basic " + base64.b64encode(f"anybody:{TOKEN}".encode()).decode(), 200),
        ("Basic " + base64.b64encode(b"anybody:wrong").decode(), 401),
        ("Basic %%%", 401),
    ],
)
def test_the_token_is_asked_for_everywhere_but_for_health(guarded, given, status):
    at = guarded({"Authorization": given}, token=TOKEN)
    assert {
        at.get(path).status_code for path in ("/sdapi/v1/options", "/v1/models", "/metrics", "/openapi.json", "/")
    } == {status}
    assert at.get("/healthz").status_code == 200


def test_beyond_this_machine_a_token_is_needed():
    with pytest.raises(Invalid, match="lets other machines in: give a token"):
        Settings(None, host="0.0.0.0")
    assert not Settings(None, host="0.0.0.0", token=TOKEN).is_local
    assert Settings(None, host="127.0.0.2").is_local
    with pytest.raises(Invalid, match="8 to 200"):
        Settings(None, token="short")


def test_bodies_are_bounded_whatever_their_heads_say(guarded):
    at = guarded(limits=Limits(body=1000))
    assert at.post("/sdapi/v1/txt2img", content=b" " * 1001).status_code == 413
    chunks = (b" " * 100 for _ in range(20))
    assert at.post("/sdapi/v1/txt2img", content=chunks).status_code == 413
    assert at.post("/sdapi/v1/txt2img", content=b"{}", headers={"Content-Encoding": "gzip"}).status_code == 415
    assert at.post("/v1/images/edits", content=b"x" * 1001).status_code == 413
    assert at.get("/v1/models").status_code == 200


def test_all_bodies_together_are_bounded_too(guarded):
    at = guarded(limits=Limits(bodies=1000))
    assert [at.post("/v1/generate", content=b" " * size).status_code for size in (999, 1001, 999)] == [202, 503, 202]


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 200 + b"1" + b"}" * 200,
        b'{"a":1,"a":2}',
        b"\xff\xfe",
        b"{",
        b'{"steps": 1e999}',
        b"[]",
    ],
)
@pytest.mark.parametrize("path", ["/sdapi/v1/txt2img", "/v1/generate", "/v1/images/generations", "/controlnet/detect"])
def test_json_that_is_none_or_too_deep_is_refused(client, path, body):
    assert client.post(path, content=body).status_code in (400, 422)


def test_answers_have_headers_that_keep_browsers_careful(client):
    headers = client.get("/").headers
    assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
    assert "default-src 'none'" in headers["content-security-policy"] and headers["referrer-policy"] == "no-referrer"
