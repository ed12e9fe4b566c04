"""A server without a process of its own: a stand-in for the worker, in a thread, and clients of the application.

Test modules import its fixtures by name.
"""

import base64
import multiprocessing
import threading
import time

import numpy as np
import pytest
from fastapi.testclient import TestClient

from controlkit.images import png_bytes, write_png
from controlkit.serve.app import app_of
from controlkit.serve.desk import Desk
from controlkit.serve.orders import Pictures
from controlkit.serve.settings import Settings
from controlkit.serve.worker import Hand, work

HOST = "http://127.0.0.1:7860"
FACTS = {
    "base": "mini",
    "digest": "0123456789abcdef",
    "size": 64,
    "multiple": 32,
    "most_steps": 1000,
    "samplers": {"DDIM": [], "Euler": ["Karras"], "Euler a": [], "DPM++ 2M": ["Karras", "Exponential"]},
    "controls": [
        {"name": "canny", "hash": "00112233", "annotator": "canny", "types": (), "is_guessed": False},
        {"name": "depth", "hash": "00112233", "annotator": "depth", "types": (), "is_guessed": False},
        {"name": "inpaint", "hash": "00112233", "annotator": "inpaint", "types": (), "is_guessed": False},
        {"name": "union", "hash": "44556677", "annotator": "", "types": ("canny", "depth"), "is_guessed": False},
    ],
    "sampler": "DDIM",
}


class StandIn:
    """In place of a studio: grey pictures of the seed's shade, with a step each few milliseconds."""

    def __init__(self, folder, script=None):
        self.folder, self.batches = folder, []
        self.script = script or (lambda orders: None)
        self.pause = 0.002

    def facts(self):
        return FACTS

    def carry_out(self, orders, tell):
        self.batches.append(orders)
        self.script(orders)
        steps = max((one.request.steps for one in orders.values() if isinstance(one, Pictures)), default=1)
        for step in range(steps):
            time.sleep(self.pause)
            preview = dict.fromkeys(orders, png_bytes(np.zeros((4, 4, 3), np.uint8)))
            if tell({"step": step + 1, "steps": steps, "share": (step + 1) / steps, "previews": preview}):
                return {name: self._made(name, one, False) for name, one in orders.items()}
        return {name: self._made(name, one, True) for name, one in orders.items()}

    def _made(self, name, order, whole):
        if not whole and not getattr(order, "takes_parts", False):
            return {"cancelled": True}
        seeds = order.seeds if isinstance(order, Pictures) else ((1, 0),)
        for i, (seed, _) in enumerate(seeds):
            write_png(self.folder / name / f"{i}.png", np.full((64, 64, 3), seed % 256, np.uint8), infotext="Steps: 1")
        hints = []
        if isinstance(order, Pictures) and order.shows_hints and order.request.controls:
            write_png(self.folder / name / "hint-0.png", np.zeros((64, 64, 3), np.uint8))
            hints = ["hint-0.png"]
        files = [f"{i}.png" for i in range(len(seeds))]
        told = {"pictures": files, "hints": hints, "texts": ["words"] * len(files), "notes": [], "is_whole": whole}
        return {"result": told | {"width": 64, "height": 64}}


class _Mortal:
    """A worker's end of its pipe, which breaks when the worker is killed."""

    def __init__(self, pipe, dead):
        self.pipe, self.dead = pipe, dead

    def recv(self):
        while not self.pipe.poll(0.01):
            if self.dead.is_set():
                raise EOFError
        return self.pipe.recv()

    def send(self, message):
        if self.dead.is_set():
            raise BrokenPipeError
        self.pipe.send(message)


@pytest.fixture
def desk_of(tmp_path):
    """``desk_of(studios, **settings)``: an open desk whose workers are these, one after another; the last stays."""
    desks = []

    def make(studios=None, **settings):
        found = Settings(tmp_path / "state", **settings)
        left = list(studios or [StandIn(tmp_path / "state" / "pictures")])

        def hire():
            ours, theirs = multiprocessing.Pipe()
            stop, dead = threading.Event(), threading.Event()
            studio = left.pop(0) if len(left) > 1 else left[0]

            def run():
                try:
                    work(_Mortal(theirs, dead), stop, lambda: studio)
                except SystemExit:  # a stand-in that dies
                    pass
                finally:
                    theirs.close()

            threading.Thread(target=run, daemon=True).start()
            return Hand(ours, stop, dead.set)

        desk = Desk(found, [hire])
        desk.open()
        desks.append(desk)
        return desk

    yield make
    for desk in desks:
        desk.close()


@pytest.fixture
def client_of():
    """``client_of(desk)``: a client of the desk's application."""
    opened = []

    def make(desk, **headers):
        client = TestClient(app_of(desk), base_url=HOST, headers=headers, raise_server_exceptions=False)
        opened.append(client.__enter__())
        return client

    yield make
    for client in opened:
        client.__exit__(None, None, None)


@pytest.fixture
def client(desk_of, client_of):
    return client_of(desk_of())


def picture(side=32, colour=(200, 40, 40), alpha=None):
    """A PNG in base64."""
    pixels = np.full((side, side, 3), colour, np.uint8)
    pixels[8:20, 8:20] = 255
    if alpha is not None:
        pixels = np.dstack([pixels, np.full((side, side), 255, np.uint8)])
        pixels[: side // 2, :, 3] = alpha
    return base64.b64encode(png_bytes(pixels)).decode()


@pytest.fixture
def photo():
    return picture()


def ended(client, name):
    """A job of ``/v1``, when it has ended."""
    for _ in range(500):
        job = client.get(f"/v1/jobs/{name}").json()
        if job["state"] in ("done", "failed", "cancelled"):
            return job
        time.sleep(0.01)
    raise AssertionError(job)
