"""Checks of the server with real clients, under load, and while its processes are killed; prints a line for each.

    pip install 'controlkit[serve]' webuiapi sd-backend-client openai local-image-gen-security schemathesis
    python recipes/serve_checks.py clients bodies evaluation load kills restart

Each check starts a server of its own with `mini` on a free port; `replicas` needs the extra `replicas`.
"""

import argparse
import base64
import io
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

STEPS = 6
"""Sampling steps of the pictures that are only counted."""
OTHERS: tuple[dict[str, Any], ...] = (
    {},
    {"steps": STEPS + 2, "cfg_scale": 4},
    {"sampler_name": "Euler a"},
    {"steps": STEPS - 2, "sampler_name": "DPM++ 2M", "scheduler": "Karras"},
)
"""What clients ask for beside each other, which is made in shared passes."""


class Server:
    """A server in a process of its own, which can be ended and started again on the same folder."""

    def __init__(self, folder: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.folder, self.options = f"http://127.0.0.1:{self.port}", folder, options
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "controlkit", "serve", "--port", str(self.port), "--state", str(self.folder)]
        self.process = subprocess.Popen([*command, *self.options], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        print(self.process.stdout.readline().strip(), flush=True)
        while not self.answers():
            assert self.process.poll() is None, "the server has ended"
            time.sleep(0.1)

    def answers(self) -> bool:
        """Whether it is there."""
        try:
            return bool(self.get("/healthz"))
        except OSError:
            return False

    def end(self, sign: int = signal.SIGTERM) -> None:
        """End it by a signal, and wait for that."""
        assert self.process is not None
        self.process.send_signal(sign)
        self.process.wait(60)

    def worker(self) -> psutil.Process | None:
        """Its worker's process, if it has one now."""
        assert self.process is not None
        for child in psutil.Process(self.process.pid).children():
            if "spawn_main" in " ".join(child.cmdline()):
                return child
        return None

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: Any, timeout: float = 300) -> tuple[int, Any]:
        """(status, JSON) of a body sent to a path."""
        data = json.dumps(body).encode()
        asked = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(asked, timeout=timeout) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@contextmanager
def server(*options: str) -> Iterator[Server]:
    """A server of one check, on a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        one = Server(Path(folder) / "state", *options)
        one.start()
        try:
            yield one
        finally:
            if one.process and one.process.poll() is None:
                one.end()


def drawing(side: int = 128) -> Image.Image:
    """A picture to be read by controls: a disc and a bar."""
    y, x = np.mgrid[:side, :side] / side
    disc = (x - 0.5) ** 2 + (y - 0.45) ** 2 < 0.09
    pixels = np.where(disc[..., None], (200, 40, 40), (240, 240, 230)).astype(np.uint8)
    pixels[int(0.8 * side) : int(0.85 * side)] = (40, 60, 160)
    return Image.fromarray(pixels)


def encoded(image: Image.Image) -> str:
    """A picture as base64."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def say(check: str, words: str) -> None:
    """A line of a check's outcome."""
    print(f"{check}: {words}", flush=True)


# --- real clients ---------------------------------------------------------------------------------------------------


def clients() -> None:
    """Real clients, unmodified."""
    with server() as at:
        for check in (_webuiapi, _sd_backend_client, _openai, _sd_parsers, _npm_openai):
            check(at)
        _ligsp(at)


def _webuiapi(at: Server) -> None:
    import webuiapi

    api = webuiapi.WebUIApi(port=at.port, steps=STEPS)
    photo = drawing()
    names = api.controlnet_model_list()
    canny, scribble = (next(one for one in names if one.startswith(kind)) for kind in ("canny", "scribble"))
    units = [
        webuiapi.ControlNetUnit(image=photo, module="canny", model=canny, weight=0.8, threshold_a=100, threshold_b=200),
        webuiapi.ControlNetUnit(image=photo, module="scribble", model=scribble, guidance_end=0.6),
    ]
    api.util_wait_for_ready()
    made = api.txt2img(prompt="a red apple", seed=3, width=128, height=128, controlnet_units=units)
    assert len(made.images) == 3 and made.image.size == (128, 128), len(made.images)
    assert "ControlNet 1" in made.info["infotexts"][0], made.info
    changed = api.img2img(
        images=[photo], prompt="a red apple", width=128, height=128, controlnet_units=units, steps=STEPS
    )
    assert len(changed.images) == 3
    found = api.controlnet_detect(images=[photo, photo], module="canny", threshold_a=100, threshold_b=200)
    assert len(found.images) == 2 and np.asarray(found.images[0]).max() == 255
    assert api.controlnet_detect(images=[photo]).image.size == photo.size, "without a module the picture itself"
    assert api.controlnet_version() and "canny" in api.controlnet_module_list()
    waiting: list[Any] = []
    thread = threading.Thread(
        target=lambda: waiting.append(api.txt2img(prompt="slow", steps=150, width=128, height=128))
    )
    thread.start()
    while api.get_progress()["state"]["sampling_step"] < 3:
        time.sleep(0.05)
    seen = api.get_progress(), api.interrupt()
    thread.join(60)
    assert 0 < seen[0]["progress"] < 1 and seen[1] == {} and waiting[0].image.size == (128, 128)
    infos = api.png_info(made.image), api.get_options(), api.get_samplers(), api.get_memory(), api.get_scripts()
    assert infos[1]["sd_model_checkpoint"].startswith("mini")
    say("webuiapi", "txt2img and img2img with two units, detect, progress, interrupt, lists: as expected")


def _sd_backend_client(at: Server) -> None:
    from sd_backend_client import A1111Webservice, ControlNetUnit, DiffusionRequestBody, PreprocessorParams
    from sd_backend_client.api.detect import connect_to_backend

    api = connect_to_backend(at.url)
    assert isinstance(api, A1111Webservice), type(api)
    assert not api.progress_check().state.interrupted
    for list_ in (api.list_checkpoints, api.list_vaes, api.list_loras, api.list_samplers, api.list_schedulers,
                  api.list_upscalers, api.list_hypernetworks, api.get_controlnet_type_categories):  # fmt: skip
        list_()
    api.get_capabilities()
    canny = next(one for one in api.get_controlnet_preprocessors() if one.name == "canny")
    assert [one.key for one in canny.parameters][-2:] == ["threshold_a", "threshold_b"], canny.parameters
    model = next(one for one in api.list_controlnet_models() if "canny" in one.full_model_name)
    params = DiffusionRequestBody(prompt="a red apple", steps=STEPS, width=128, height=128, seed=3, batch_size=2)
    used = PreprocessorParams(typedef=canny, parameter_values={})
    params.controlnet_units = [ControlNetUnit(image=drawing(), preprocessor=used, model=model)]
    made = api.submit_txt2img(params).wait(120)
    assert made.images and made.images[0].size == (128, 128)
    seen = api.submit_preprocessor_preview(drawing(), canny).wait(120)
    assert np.asarray(seen.images[0]).max() == 255
    slow = api.submit_txt2img(DiffusionRequestBody(prompt="slow", steps=150, width=128, height=128))
    while not slow.poll().progress:
        time.sleep(0.1)
    assert slow.cancel()
    say("sd-backend-client", "found as A1111; lists, txt2img with a unit, preview, progress, cancel: as expected")


def _openai(at: Server) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{at.url}/v1", api_key="none")
    assert {one.id for one in client.models.list()} >= {"mini", "canny"}
    extra = {"seed": 3, "steps": STEPS, "control": "canny", "hint": encoded(drawing())}
    made = client.images.generate(model="mini", prompt="a red apple", n=2, size="128x128", extra_body=extra)
    assert made.data and len(made.data) == 2 and made.data[0].b64_json
    mask = Image.new("RGBA", (128, 128), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (32, 32, 96, 96))
    files = {"image": ("a.png", _png(drawing()), "image/png"), "mask": ("m.png", _png(mask), "image/png")}
    changed = client.images.edit(prompt="a star", model="mini", n=1, extra_body={"steps": STEPS}, **files)  # type: ignore[arg-type]
    assert changed.data and changed.data[0].b64_json
    kept = np.asarray(Image.open(io.BytesIO(base64.b64decode(changed.data[0].b64_json))))
    assert (kept[:20] == np.asarray(drawing())[:20]).all(), "outside the mask nothing changes"
    try:
        client.images.generate(prompt="x", size="1x1x1")  # type: ignore[call-overload]
        raise AssertionError("a wrong size passed")
    except openai.BadRequestError as error:
        assert "WIDTHxHEIGHT" in str(error)
    say("openai (Python)", "models, generation with a control, edit with a mask, error: as expected")


def _png(image: Image.Image) -> bytes:
    return base64.b64decode(encoded(image))


def _npm_openai(at: Server) -> None:
    """Needs Node, and openai from npm in the folder of NODE_MODULES."""
    folder = os.environ.get("NODE_MODULES")
    if not folder:
        say("openai (npm)", "left out: set NODE_MODULES to a folder where npm installed openai")
        return
    script = f"""
import OpenAI, {{ toFile }} from "openai";
import fs from "fs";
const client = new OpenAI({{ baseURL: "{at.url}/v1", apiKey: "none" }});
const made = await client.images.generate({{ model: "mini", prompt: "a red apple", size: "128x128", steps: {STEPS} }});
fs.writeFileSync("made.png", Buffer.from(made.data[0].b64_json, "base64"));
const image = await toFile(fs.createReadStream("made.png"), null, {{ type: "image/png" }});
const changed = await client.images.edit({{ model: "mini", image, prompt: "a star", size: "128x128" }});
console.log(made.data.length, changed.data[0].b64_json.length > 1000);
"""
    place = Path(folder).parent / "check.mjs"
    place.write_text(script)
    done = subprocess.run(["node", place.name], cwd=place.parent, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "1 true", done.stderr[-2000:]
    say("openai (npm)", "generation and edit: as expected")


def _sd_parsers(at: Server) -> None:
    from sd_parsers import ParserManager

    status, made = at.post("/sdapi/v1/txt2img", {"prompt": "a (red:1.2) apple", "steps": STEPS, "seed": 5})
    assert status == 200
    found = ParserManager().parse(Image.open(io.BytesIO(base64.b64decode(made["images"][0]))))
    assert found is not None and found.samplers[0].parameters["seed"] == "5", found
    say("sd-parsers", f"{found.generator}, {found.samplers[0].name}, seed 5")


def _ligsp(at: Server) -> None:
    from controlkit.hub import SHIPPED

    command = [sys.executable, "-m", "ligsp", "check", at.url, "--models", str(SHIPPED), "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = Counter(result["status"] for target in json.loads(done.stdout)["targets"] for result in target["results"])
    say("ligsp", ", ".join(f"{count} {status}" for status, count in sorted(found.items())))
    if found.keys() - {"pass", "info"}:
        print(done.stdout)


# --- bodies as programs send them -----------------------------------------------------------------------------------


def bodies() -> None:
    """Recorded bodies of programs that cannot be installed here."""
    from serve_bodies import programs

    with server() as at:
        for program, calls in programs(encoded(drawing()), STEPS).items():
            for method, path, body in calls:
                status = at.post(path, body)[0] if method == "POST" else (at.get(path) is not None and 200)
                assert status == 200, (program, path, status)
            say(program, f"{len(calls)} calls answered with 200")


# --- load -----------------------------------------------------------------------------------------------------------


def load(clients: int = 64, seconds: float = 60.0) -> None:
    """Many clients at once: errors, memory, order, and throughput beside one at a time."""
    with server() as at:
        body = {"prompt": "a red apple", "steps": STEPS, "width": 128, "height": 128}
        for other in OTHERS:
            at.post("/sdapi/v1/txt2img", {**body, **other})
        alone = _rate(at, body, 1, seconds / 3)[0]
        _rate(at, body, clients // 2, 1)  # batches are full: from here on memory must not grow
        assert at.process is not None
        processes = [psutil.Process(at.process.pid), at.worker()]
        before = [one.memory_info().rss >> 20 for one in processes if one]
        rate, waits, failed = _rate(at, body, clients, seconds)
        after = [one.memory_info().rss >> 20 for one in processes if one]
        say("load", f"{clients} clients, {seconds:.0f} s: {rate:.2f} pictures a second, one at a time {alone:.2f} "
            f"({rate / alone:.2f} times); {failed} errors; waits {min(waits):.1f} to {max(waits):.1f} s, "
            f"median {statistics.median(waits):.1f}; {_passed_over(at)} batches begun before an older job; "
            f"memory of server and worker {before} -> {after} MB")  # fmt: skip


def _rate(at: Server, body: Any, clients: int, seconds: float) -> tuple[float, list[float], int]:
    """(pictures a second, what each waited, errors) of clients that ask again as soon as they have an answer."""
    waits, failed, began = list[float](), 0, time.perf_counter()

    def ask(number: int) -> None:
        nonlocal failed
        while time.perf_counter() - began < seconds:
            start = time.perf_counter()
            asked = {**body, **OTHERS[number % len(OTHERS)], "seed": number}
            status, _ = at.post("/sdapi/v1/txt2img", asked, timeout=600)
            waits.append(time.perf_counter() - start)
            failed += status != 200

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, range(clients)))
    return len(waits) / (time.perf_counter() - began), waits, failed


def _passed_over(at: Server) -> int:
    """How many of the last batches began while a job waited that was older than all of theirs."""
    batches = list[list[Any]]()
    for job in sorted((one for one in at.get("/v1/jobs")["jobs"] if one["begun"]), key=lambda one: one["begun"]):
        if not batches or job["begun"] - batches[-1][-1]["begun"] > 0.1:
            batches.append([])
        batches[-1].append(job)
    oldest = [min(job["accepted"] for job in batch) for batch in batches]
    return sum(min(oldest[i:]) < one for i, one in enumerate(oldest))


# --- killed ---------------------------------------------------------------------------------------------------------


def kills(times: int = 10) -> None:
    """The worker killed under load: each accepted job ends with a picture or a clear error."""
    with server() as at:
        names, stop = list[str](), threading.Event()

        def ask() -> None:
            while not stop.is_set():
                asked = {"prompt": "a red apple", "steps": 10 - len(names) % 3, "guidance": 3 + len(names) % 2}
                status, told = at.post("/v1/generate", asked | {"size": [128, 128]})
                if status == 202:
                    names.append(told["id"])
                time.sleep(1)

        thread = threading.Thread(target=ask)
        thread.start()
        killed = 0
        while killed < times:
            time.sleep(1.5)
            worker = at.worker()
            if worker and _is_at_work(at):
                worker.kill()
                killed += 1
        stop.set()
        thread.join()
        say("kills", f"worker killed {killed} times; {len(names)} jobs: {_ends(at, names)}")


def _is_at_work(at: Server) -> bool:
    """Whether a worker is there and makes something."""
    try:
        return bool(at.get("/healthz")["running"])
    except urllib.error.HTTPError:  # 503: the next worker is on its way
        return False


def restart() -> None:
    """kill -9 of the server with jobs queued: after a restart each accepted job ends."""
    with server() as at:
        asked = {"prompt": "a red apple", "size": [128, 128]}
        names = [
            at.post("/v1/generate", {**asked, "seed": i, "steps": 18 + i % 3, "guidance": 3 + i % 2})[1]["id"]
            for i in range(12)
        ]
        time.sleep(1)
        at.end(signal.SIGKILL)
        at.start()
        say("restart", f"kill -9 with {len(names)} jobs: {_ends(at, names)}")


def evaluation() -> None:
    """A control measured by request, small: the figures of its report."""
    with server() as at:
        name = at.post("/v1/evaluate", {"control": "depth", "num": 4, "steps": 4})[1]["id"]
        ended = _ends(at, [name], shows=False)
        report = at.get(f"/v1/jobs/{name}")["report"]
        figures = {key: round(report[key]["mean"], 3) for key in ("fidelity", "floor", "ceiling", "obedience")}
        say("evaluation", f"{ended}, {report['metric']}: {figures}, {report['seconds']:.0f} s")


def _ends(at: Server, names: list[str], shows: bool = True) -> str:
    """How jobs ended, when all have; sentences of errors once each. ``shows``: whether they leave pictures."""
    found = list[dict[str, Any]]()
    for name in names:
        while (job := at.get(f"/v1/jobs/{name}"))["state"] not in ("done", "failed", "cancelled"):
            time.sleep(0.2)
        if job["state"] == "done" and shows:
            with urllib.request.urlopen(at.url + job["pictures"][0]) as answer:
                Image.open(answer).load()
        found.append(job)
    counts = Counter(job["state"] for job in found)
    words = {job["error"]["message"] for job in found if "error" in job}
    return f"{dict(counts)}{' '.join(sorted(words))}"


def replicas() -> None:
    """The clients against a server on Ray Serve with two workers, ended by Ctrl-C."""
    with server("--ray", "--workers", "2") as at:
        for check in (_webuiapi, _sd_backend_client, _openai):
            check(at)
        at.end(signal.SIGINT)
        assert at.process is not None
        say("replicas", f"ended by Ctrl-C, exit code {at.process.returncode}")


def openapi() -> None:
    """schemathesis on our OpenAPI: no answer of 500 and above."""
    with server() as at:
        command = ["schemathesis", "run", f"{at.url}/openapi.json", "--checks", "not_a_server_error"]
        more = ["--max-examples", "40", "--request-timeout", "120", "--seed", "1", "--workers", "2"]
        done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
        print(done.stdout[-3000:])
        cases = re.findall(r"(\d+) generated", done.stdout)
        say("schemathesis", f"exit code {done.returncode}, {cases} cases")


CHECKS: dict[str, Callable[[], None]] = {
    one.__name__: one for one in (clients, bodies, evaluation, load, kills, restart, openapi, replicas)
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", choices=CHECKS, default=list(CHECKS))
    for name in parser.parse_args().checks:
        CHECKS[name]()
