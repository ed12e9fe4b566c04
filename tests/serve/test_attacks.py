"""Paths, addresses, pickles, bombs and foreign names on every route that takes a picture or a name."""

import base64
import io
import pickle
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from standin import picture

from controlkit.images import png_bytes

pytest_plugins = "serving"


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("evil"),)


def bomb():
    """A PNG whose head says 60,000 x 60,000."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def array_of_objects():
    buffer = io.BytesIO()
    np.save(buffer, np.array([Evil()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


FILES = {
    "bomb": bomb(),
    "large": png_bytes(np.zeros((5000, 5000, 3), np.uint8)),
    "pickle": pickle.dumps(Evil()),
    "objects": array_of_objects(),
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "text": b"hello",
    "empty": b"",
    "half": png_bytes(np.zeros((64, 64, 3), np.uint8))[:60],
}
TEXTS = [
    "/etc/passwd", "/etc/hostname.png", "~/a.png", "../../a.png", "C:\\a.png", "file:///etc/passwd", "FILE:/etc/passwd",
    "http://127.0.0.1:{port}/a.png", " https://127.0.0.1:{port}/a.png", "ftp://127.0.0.1:{port}/a", "//127.0.0.1/a.png",
    "data:image/png;base64,", "data:text/plain,hello", "\x00", "a" * 5,
    *(base64.b64encode(data).decode() for data in FILES.values() if data),
]  # fmt: skip
"""Texts that are given where a picture should be."""
GOOD = picture()


def unit(**fields):
    return {"steps": 1, "alwayson_scripts": {"controlnet": {"args": [{"module": "canny", "model": "canny"} | fields]}}}


MASKED = {"model": "inpaint", "module": "none"}
PICTURES = {
    "txt2img image": ("/sdapi/v1/txt2img", lambda text: unit(image=text)),
    "txt2img pair": ("/sdapi/v1/txt2img", lambda text: unit(image={"image": GOOD, "mask": text}, **MASKED)),
    "txt2img region": ("/sdapi/v1/txt2img", lambda text: unit(image=GOOD, effective_region_mask=text)),
    "img2img": ("/sdapi/v1/img2img", lambda text: {"steps": 1, "init_images": [text]}),
    "img2img mask": ("/sdapi/v1/img2img", lambda text: {"steps": 1, "init_images": [GOOD], "mask": text}),
    "detect": ("/controlnet/detect", lambda text: {"controlnet_module": "canny", "controlnet_input_images": [text]}),
    "png-info": ("/sdapi/v1/png-info", lambda text: {"image": text}),
    "generations": ("/v1/images/generations", lambda text: {"prompt": "a", "control": "canny", "hint": text}),
    "generate": ("/v1/generate", lambda text: {"steps": 1, "controls": [{"name": "canny", "images": text}]}),
    "generate typed": ("/v1/generate", lambda text: {"controls": [{"name": "union", "images": {"canny": text}}]}),
    "generate region": ("/v1/generate", lambda text: {"controls": [{"name": "canny", "images": GOOD, "region": text}]}),
    "generate edit": ("/v1/generate", lambda text: {"edit": {"image": text}}),
    "generate mask": ("/v1/generate", lambda text: {"edit": {"image": GOOD, "mask": text}}),
    "annotate": ("/v1/annotate", lambda text: {"annotator": "canny", "image": text}),
}  # fmt: skip
NAMES = ["/etc/passwd", "../canny", "./canny", "owner/name", "runwayml/x", "canny/../depth", "canny\x00", "C:\\canny",
         "~/canny", "http://x/canny", "", "a" * 5000]  # fmt: skip
NAMED = {
    "model": ("/sdapi/v1/txt2img", lambda name: unit(image=GOOD, model=name or "x")),
    "module": ("/sdapi/v1/txt2img", lambda name: unit(image=GOOD, module=name or "x")),
    "sampler": ("/sdapi/v1/txt2img", lambda name: {"sampler_name": name or "x"}),
    "base": ("/sdapi/v1/txt2img", lambda name: {"override_settings": {"sd_model_checkpoint": name or "x"}}),
    "script": ("/sdapi/v1/txt2img", lambda name: {"alwayson_scripts": {name: {"args": []}}}),
    "detect": ("/controlnet/detect", lambda name: {"controlnet_module": name, "controlnet_input_images": [GOOD]}),
    "lora": ("/sdapi/v1/txt2img", lambda name: {"prompt": f"a <lora:{name or 'x'}:1>"}),
    "options": ("/sdapi/v1/options", lambda name: {"sd_model_checkpoint": name or "x"}),
    "control": ("/v1/images/generations", lambda name: {"prompt": "a", "control": name or "x", "hint": GOOD}),
    "generate": ("/v1/generate", lambda name: {"controls": [{"name": name, "images": GOOD}]}),
    "annotate": ("/v1/annotate", lambda name: {"annotator": name, "image": GOOD}),
    "evaluate": ("/v1/evaluate", lambda name: {"control": name}),
}  # fmt: skip


@pytest.fixture
def watched(client, monkeypatch, tmp_path):
    """The client, while no file is opened by name and no connection is made; and a port that waits for one."""
    monkeypatch.chdir(tmp_path)
    opened = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *args, **more: opened.append(path) or real(path, *args, **more))
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0)
        yield client, trap.getsockname()[1]
        with pytest.raises(BlockingIOError):
            trap.accept()
    assert not opened and not Path("evil").exists()


@pytest.mark.parametrize("place", PICTURES)
def test_pictures_that_are_none(watched, place):
    client, port = watched
    path, body = PICTURES[place]
    for text in TEXTS:
        answer = client.post(path, json=body(text.replace("{port}", str(port))))
        if place == "png-info" and answer.status_code == 200:  # no pixels are decoded for it
            continue
        assert answer.status_code in (400, 413, 422), (text[:60], answer.text)
        assert "root:" not in answer.text


@pytest.mark.parametrize("place", NAMED)
def test_names_that_are_none(watched, place):
    client, _ = watched
    path, body = NAMED[place]
    for name in NAMES:
        answer = client.post(path, json=body(name))
        assert answer.status_code in (400, 404, 422), (name[:60], answer.text)
        assert len(answer.text) < 5000


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("field", ["image", "mask", "hint"])
def test_files_of_forms(watched, name, field):
    client, _ = watched
    files = {"image": ("a.png", base64.b64decode(GOOD), "image/png")} | {
        field: ("../../a.png", FILES[name], "image/png")
    }
    answer = client.post("/v1/images/edits", data={"prompt": "a", "control": "canny"}, files=files)
    assert answer.status_code in (400, 413), answer.text
