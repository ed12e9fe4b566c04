"""``controlkit serve``: what it refuses before anything is loaded, and a server in a process of its own."""

import socket
import sys

import pytest

from controlkit.files import held
from controlkit.serve.running import bound_sockets
from controlkit.serve.settings import Settings
from recipes import serve_checks


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--host", "0.0.0.0"), "lets other machines in: give a token"),
        (("--token", "x"), "8 to 200"),
        (("--controls", "/nowhere"), "--controls is /nowhere; expected a folder"),
        (("--loras", "/nowhere"), "--loras is /nowhere; expected a folder"),
        (("--embeddings", "/nowhere"), "--embeddings is /nowhere; expected a folder"),
        (("--allow-origin", "localhost:3000"), "--allow-origin is"),
        (("--dtype", "fp8"), "--dtype is"),
        (("--port", "0"), "port"),
    ],
)
def test_what_is_refused_at_once(run, tmp_path, options, words):
    code, _, err = run("serve", "--state", tmp_path / "state", *options)
    assert code == 2 and words in err
    assert not (tmp_path / "state").exists()


def test_two_servers_do_not_share_a_folder(run, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with held(tmp_path):
        code, _, err = run("serve", "--state", tmp_path, "--port", str(port))
    assert code == 2 and "being written by another process" in err


@pytest.mark.parametrize("options", [(), ("--ray",)], ids=("processes", "ray"))
def test_a_port_in_use_is_named_before_a_base_is_loaded(run, tmp_path, options, monkeypatch):
    monkeypatch.setattr("controlkit.serve.replicas._ray_serve", lambda: None)  # its import takes seconds
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, _, err = run("serve", "--state", tmp_path / "state", "--port", str(port), *options)
    assert code == 2 and f"Another program listens on port {port} of 127.0.0.1" in err and "another --port" in err
    assert not (tmp_path / "state").exists()


def test_an_address_that_is_not_this_machine_s_is_named(run, tmp_path):
    options = ("--state", tmp_path / "state", "--token", "x" * 16, "--host", "192.0.2.1")
    code, _, err = run("serve", *options)
    assert code == 2 and "Port 7860 of 192.0.2.1 cannot be listened on (Cannot assign requested address)" in err


def test_a_name_of_two_addresses_is_listened_on_at_both(tmp_path):
    known = {one[4][0] for one in socket.getaddrinfo("localhost", None)}
    with bound_sockets(Settings(tmp_path, "localhost", port=0)) as sockets:
        assert {one.getsockname()[0] for one in sockets} <= known and sockets


def test_a_missing_extra_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    code, _, err = run("serve", "--state", tmp_path)
    assert code == 2 and "pip install 'controlkit[serve]'" in err


@pytest.mark.slow
def test_a_server_of_its_own(capsys):
    """Real pictures of ``mini``; a worker that is killed; a server that is killed with jobs queued."""
    with serve_checks.server() as at:
        hint = serve_checks.encoded(serve_checks.drawing())
        unit = {"module": "canny", "model": "canny", "image": hint}
        body = {"prompt": "a red apple", "steps": 2, "alwayson_scripts": {"controlnet": {"args": [unit]}}}
        status, made = at.post("/sdapi/v1/txt2img", body)
        assert status == 200 and len(made["images"]) == 2
        names = [at.post("/v1/generate", {"prompt": "a", "steps": 20, "seed": seed})[1]["id"] for seed in range(3)]
        at.worker().kill()
        assert "{'done': 3}" in serve_checks._ends(at, names)
    serve_checks.restart()
    assert "{'done': 12}" in capsys.readouterr().out
