"""``controlkit serve``: what it refuses before anything is loaded, and a server in a process of its own."""

import sys

import pytest

from controlkit.files import held
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
    with held(tmp_path):
        code, _, err = run("serve", "--state", tmp_path)
    assert code == 2 and "being written by another process" in err


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
