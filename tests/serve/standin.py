"""A stand-in for a worker's studio, and what tests of the server send and wait for."""

import base64
import os
import time

import numpy as np

from controlkit.images import png_bytes, write_png
from controlkit.serve.orders import Pictures

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
    "embeddings": {"loaded": {}, "skipped": {}},
}
PAUSE = 0.001
"""Seconds of a step."""


class StandIn:
    """In place of a studio: grey pictures of the seed's shade, with a step each few milliseconds."""

    def __init__(self, folder, script=None):
        self.folder, self.batches = folder, []
        self.script = script or (lambda orders: None)
        self.pause = PAUSE

    def facts(self):
        return FACTS

    def carry_out(self, orders, tell):
        self.batches.append(orders)
        self.script(orders)
        steps = max((one.request.steps for one in orders.values() if isinstance(one, Pictures)), default=1)
        found = {}
        for step in range(steps):
            time.sleep(self.pause)
            left = [name for name in orders if name not in found]
            shares = dict.fromkeys(left, (step + 1) / steps)
            preview = dict.fromkeys(left, png_bytes(np.zeros((4, 4, 3), np.uint8)))
            given_up = tell({"step": step + 1, "steps": steps, "shares": shares, "previews": preview})
            for name in [one for one in left if one in given_up]:
                found[name] = self._made(name, orders[name], False)
                tell({"ended": {name: found[name]}})
            if len(found) == len(orders):
                break
        return found | {name: self._made(name, one, True) for name, one in orders.items() if name not in found}

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


def picture(side=32, colour=(200, 40, 40), alpha=None):
    """A PNG in base64."""
    pixels = np.full((side, side, 3), colour, np.uint8)
    pixels[8:20, 8:20] = 255
    if alpha is not None:
        pixels = np.dstack([pixels, np.full((side, side), 255, np.uint8)])
        pixels[: side // 2, :, 3] = alpha
    return base64.b64encode(png_bytes(pixels)).decode()


def ended(client, name):
    """A job of ``/v1``, when it has ended."""
    for _ in range(500):
        job = client.get(f"/v1/jobs/{name}").json()
        if job["state"] in ("done", "failed", "cancelled"):
            return job
        time.sleep(0.01)
    raise AssertionError(job)


class Signing(StandIn):
    """A stand-in that notes, beside each job's pictures, which process made them."""

    def _made(self, name, order, whole):
        found = super()._made(name, order, whole)
        if "result" in found:
            found["result"]["notes"] = [str(os.getpid())]
        return found


def open_slow(folder):
    """A studio of a replica, whose jobs take long enough to be seen on their way."""
    studio = Signing(folder)
    studio.pause = 0.05
    return studio
