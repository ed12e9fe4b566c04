"""The server on Ray Serve: its queue and workers in this process, and (slow) with two local replicas."""

import asyncio
import os
import queue
import signal
import socket
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import httpx
import pytest
import standin

from controlkit.cluster import ray_session
from controlkit.errors import NotFound, Unsupported
from controlkit.sample import Request
from controlkit.serve import replicas
from controlkit.serve.desk import Desk
from controlkit.serve.orders import Pictures
from controlkit.serve.settings import Settings


class Deployment:
    """In the place of Ray Serve's handle of the workers: calls go to whichever is free, in threads of this process."""

    def __init__(self, *workers):
        self.free, self.dying = queue.Queue(), 0
        """The next so many calls break off, as those of replicas that die."""
        for worker in workers:
            self.free.put(worker)
        self.begun = SimpleNamespace(remote=lambda: SimpleNamespace(result=workers[0].begun))
        self.carry_out = SimpleNamespace(remote=self.stream)

    def options(self, stream):
        return self

    def stream(self, orders):
        worker, loop = self.free.get(), asyncio.new_event_loop()
        found = worker.carry_out(orders)
        try:
            while True:
                yield loop.run_until_complete(anext(found))
                if self.dying:
                    self.dying -= 1
                    raise RuntimeError("the actor died")
        except StopAsyncIteration:
            pass
        finally:
            loop.run_until_complete(found.aclose())
            loop.close()
            self.free.put(worker)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """(a desk, the deployment of its two workers, their studios)."""
    monkeypatch.setattr(replicas, "_this_actor", lambda: None)
    state = tmp_path / "state"
    studios = [standin.StandIn(state / "pictures") for _ in range(2)]
    workers = Deployment(*(replicas.Worker(lambda studio=studio: studio, state) for studio in studios))
    desk = Desk(Settings(state), [partial(replicas._hire, workers, state)] * 2)
    desk.open()
    yield desk, workers, studios
    desk.close()


def order(seed=0, **values):
    return Pictures(request=Request(**{"steps": 2} | values), seeds=((seed, 0),))


def settled(desk, *jobs):
    while not all(desk.queue.get(job.id).has_ended for job in jobs):
        time.sleep(0.002)
    return [desk.queue.get(job.id) for job in jobs]


def test_replicas_take_from_one_queue(here):
    desk, _, studios = here
    for studio in studios:
        studio.pause = 0.01
    jobs = [desk.accept(order(i, size=(64, 64 + 16 * i)), "v1") for i in range(6)]
    assert {job.state for job in settled(desk, *jobs)} == {"done"} and all(studio.batches for studio in studios)


def test_a_job_is_given_up_by_the_replica_that_is_at_it(here):
    desk, _, studios = here
    for studio in studios:
        studio.pause = 0.01
    ours = desk.accept(order(1, steps=100).model_copy(update={"takes_parts": True}), "a1111")
    while not (at := desk.progress.get(ours.id)) or not at.step:
        time.sleep(0.002)
    desk.interrupt("a1111")
    [ended] = settled(desk, ours)
    assert ended.state == "done" and not ended.result["is_whole"] and at.step < 90
    while list((desk.queue.folder / "given-up").iterdir()):
        time.sleep(0.002)


def test_a_job_of_a_replica_that_dies_is_made_again(here):
    desk, workers, _ = here
    workers.dying = 1
    [job] = settled(desk, desk.accept(order(), "v1"))
    assert job.state == "done" and job.tries == 2 and desk.meters.deaths._value.get() == 1


def test_a_base_that_cannot_be_loaded_ends_the_start(tmp_path):
    def broken():
        raise NotFound("There is no such base.")

    workers = Deployment(replicas.Worker(broken, tmp_path))
    with pytest.raises(NotFound, match="no such base"):
        Desk(Settings(tmp_path), [partial(replicas._hire, workers, tmp_path)]).open()


def test_without_the_extra_it_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    monkeypatch.delattr("ray.serve", raising=False)
    with pytest.raises(Unsupported, match=r"pip install 'controlkit\[replicas\]'"):
        replicas.application(Settings(tmp_path), lambda device: None, "cpu", 1)


# --- on Ray itself --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """A client of the server, whose two workers are replicas."""
    serve = pytest.importorskip("ray.serve", reason="needs the extra replicas")
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(standin)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = Settings(tmp_path_factory.mktemp("ray") / "state", port=port)
    studio = partial(standin.open_slow, settings.state / "pictures")
    with ray_session(3):
        serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
        serve.run(replicas.deployed(settings, studio, 2, {"num_cpus": 1}, serve), name="test", route_prefix="/")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
        serve.shutdown()


def accepted(at, steps=4, **more):
    answer = at.post("/v1/generate", json={"steps": steps} | more)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def ended(at, *names):
    while True:
        jobs = [at.get(f"/v1/jobs/{name}").json() for name in names]
        if all(job["state"] in ("done", "failed", "cancelled") for job in jobs):
            return jobs
        time.sleep(0.02)


@pytest.mark.slow
def test_one_queue_serves_both_replicas(at):
    names = [accepted(at, size=[64, 64 + 32 * i]) for i in range(6)]
    jobs = ended(at, *names)
    assert {job["state"] for job in jobs} == {"done"} and len({job["notes"][0] for job in jobs}) == 2
    assert at.get(jobs[0]["pictures"][0]).content[:4] == b"\x89PNG"
    lines = at.get(f"/v1/jobs/{accepted(at)}/events").text
    assert "event: step" in lines and '"state": "done"' in lines


@pytest.mark.slow
def test_the_guard_is_the_same(at):
    assert at.get("/v1/models", headers={"Host": "evil.example"}).status_code == 421
    assert at.post("/v1/generate", json={"promt": "a"}).status_code == 422
    assert at.post("/v1/generate", content=b"[" * 100_000).status_code in (400, 422)


@pytest.mark.slow
def test_what_is_interrupted_or_cancelled_ends(at):
    answers = []
    body = {"steps": 150, "seed": 5}
    thread = threading.Thread(target=lambda: answers.append(at.post("/sdapi/v1/txt2img", json=body)))
    thread.start()
    while at.get("/sdapi/v1/progress").json()["state"]["sampling_step"] < 2:
        time.sleep(0.02)
    at.post("/sdapi/v1/interrupt")
    thread.join(5)
    assert answers[0].status_code == 200 and len(answers[0].json()["images"]) == 1
    name = accepted(at, 150)
    while at.get(f"/v1/jobs/{name}").json()["share"] == 0:
        time.sleep(0.02)
    assert at.post(f"/v1/jobs/{name}/cancel").json()["state"] == "cancelled"
    assert ended(at, accepted(at))[0]["state"] == "done"


@pytest.mark.slow
def test_a_replica_that_dies_is_replaced_and_its_job_made_again(at):
    [job] = ended(at, accepted(at))
    names = [accepted(at, 30, size=[64, 64 + 32 * i]) for i in range(2)]
    while not all(at.get(f"/v1/jobs/{name}").json()["share"] for name in names):
        time.sleep(0.02)
    os.kill(int(job["notes"][0]), signal.SIGKILL)
    jobs = ended(at, *names)
    assert {one["state"] for one in jobs} == {"done"}
    assert "controlkit_worker_deaths_total 1.0" in at.get("/metrics").text
