"""Fixtures of the server's tests, as a plugin of pytest: desks whose workers are threads, and clients.

One application serves the tests of a module; those that need settings or workers of their own open a desk.
"""

import multiprocessing
import threading

import pytest
from fastapi.testclient import TestClient
from standin import HOST, PAUSE, StandIn, picture

from controlkit.serve.app import app_of
from controlkit.serve.desk import Desk
from controlkit.serve.guard import Guard
from controlkit.serve.settings import Settings
from controlkit.serve.worker import Hand, work


class _Mortal:
    """A worker's end of its pipe, which breaks when the worker is killed."""

    def __init__(self, pipe, dead):
        self.pipe, self.dead, self.poll = pipe, dead, pipe.poll

    def recv(self):
        while not self.pipe.poll(0.01):
            if self.dead.is_set():
                raise EOFError
        return self.pipe.recv()

    def send(self, message):
        if self.dead.is_set():
            raise BrokenPipeError
        self.pipe.send(message)


def _hires(studios, workers):
    """``Hire`` of each worker, with these studios in turn, the last more than once."""
    left = list(studios)

    def hire():
        ours, theirs = multiprocessing.Pipe()
        dead = threading.Event()
        studio = left.pop(0) if len(left) > 1 else left[0]

        def run():
            try:
                work(_Mortal(theirs, dead), lambda: studio)
            except SystemExit:  # a stand-in that dies
                pass
            finally:
                theirs.close()

        threading.Thread(target=run, daemon=True).start()
        return Hand(ours, dead.set)

    return [hire] * workers


@pytest.fixture
def desk_of(tmp_path):
    """``desk_of(studios, workers, **settings)``: an open desk with these workers, the last more than once."""
    desks = []

    def make(studios=None, workers=1, **settings):
        found = Settings(tmp_path / "state", **settings)
        desk = Desk(found, _hires(studios or [StandIn(tmp_path / "state" / "pictures")], workers))
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


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """(client, its desk, the stand-in that works for it), for all tests of a module."""
    folder = tmp_path_factory.mktemp("server") / "state"
    studio = StandIn(folder / "pictures")
    desk = Desk(Settings(folder), _hires([studio], 1))
    desk.open()
    with TestClient(app_of(desk), base_url=HOST, raise_server_exceptions=False) as client:
        yield client, desk, studio
    desk.close()


@pytest.fixture
def client(shared):
    return shared[0]


@pytest.fixture
def studio(shared):
    """The stand-in behind ``client``, as quick as ever when the test has ended."""
    yield shared[2]
    shared[2].pause = PAUSE


@pytest.fixture
def guarded(shared):
    """``guarded(headers, **settings)``: a client of the same application behind a guard with other settings."""
    client, desk, _ = shared

    def make(headers=None, **settings):
        guard = Guard(client.app.app, Settings(desk.settings.state, **settings))
        return TestClient(guard, base_url=HOST, headers=headers, raise_server_exceptions=False)

    return make


@pytest.fixture
def photo():
    return picture()
