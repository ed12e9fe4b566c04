"""Fixtures of the server's tests, as a plugin of pytest: a desk whose workers are threads, and clients."""

import multiprocessing
import threading

import pytest
from fastapi.testclient import TestClient
from standin import HOST, StandIn, picture

from controlkit.serve.app import app_of
from controlkit.serve.desk import Desk
from controlkit.serve.settings import Settings
from controlkit.serve.worker import Hand, work


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
    """``desk_of(studios, workers, **settings)``: an open desk with these workers, the last more than once."""
    desks = []

    def make(studios=None, workers=1, **settings):
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

        desk = Desk(found, [hire] * workers)
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


@pytest.fixture
def photo():
    return picture()
