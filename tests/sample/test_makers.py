"""Jobs made on one base, and by several workers, of which one dies."""

import json
import os
import signal
import sys

import numpy as np
import pytest
import torch

from controlkit.backbones import load_base
from controlkit.controls import new_control
from controlkit.errors import Invalid, UserError
from controlkit.files import held
from controlkit.formats import SavedControl, save_control
from controlkit.images import HintSpec, read_picture, write_png
from controlkit.sample import ControlRequest, Request, makers
from controlkit.sample.jobs import Job, groups_of
from controlkit.sample.journal import JOURNAL, Finished, Made, begin, written
from controlkit.sample.makers import JobMaker, hired

PHOTO = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)


@pytest.fixture
def edges(toy_base, tmp_path):
    save_control(tmp_path / "edges", SavedControl(new_control(toy_base), HintSpec("canny")), toy_base)
    return str(tmp_path / "edges")


def job(name, **values):
    return Job(name, f"the line of {name}", Request(**{"steps": 2} | values).to_json())


def test_a_control_is_loaded_once_for_all_groups_that_follow_each_other(edges, toy_base, monkeypatch):
    loads, real = [], makers.load
    monkeypatch.setattr(makers, "load", lambda *given: loads.append(given[0]) or real(*given))

    def jobs(count, **values):
        used = [ControlRequest(name=edges, images=PHOTO, annotator="canny", **values)]
        return [job(f"{count}{i}", steps=count, controls=used) for i in range(2)]

    maker = JobMaker(toy_base)
    groups = [jobs(1), [job("plain")], jobs(2), jobs(3, scale=0.5)]
    made = [one.name for one in maker.make(groups) if isinstance(one, Made)]
    assert made == ["10", "11", "plain", "20", "21", "30", "31"]
    assert loads == [edges, edges], "once before the group without a control, which frees it, and once after"


def test_steps_come_before_their_pictures_and_each_group_ends_with_none(toy_base):
    groups = [[job("a"), job("b", prompt="x")], [job("c", steps=1)]]
    kinds = [type(one).__name__ for one in JobMaker(toy_base).make(groups)]
    assert kinds == ["Step", "Step", "Made", "Made", "NoneType", "Step", "Made", "NoneType"]


def test_seconds_are_a_share_of_the_batch_s_and_batches_are_timed_apart(toy_base, monkeypatch):
    clock = iter([0.0, 10.0, 16.0])
    monkeypatch.setattr(makers.time, "perf_counter", lambda: next(clock))
    group = [job("a"), job("b"), job("c", size=(32, 48))]
    made = [one for one in JobMaker(toy_base).make([group]) if isinstance(one, Made)]
    assert [(one.name, one.seconds) for one in made] == [("a", 5.0), ("b", 5.0), ("c", 6.0)]


def test_where_memory_ran_out_the_groups_after_it_are_no_larger(toy_base, monkeypatch):
    real, tried = type(toy_base).decode_latents, []

    def small(self, latents):
        tried.append(len(latents))
        if len(latents) > 2:
            raise torch.OutOfMemoryError("no room")
        return real(self, latents)

    monkeypatch.setattr(type(toy_base), "decode_latents", small)
    groups = groups_of([job(f"{i}") for i in range(8)], 4)
    assert sum(isinstance(one, Made) for one in JobMaker(toy_base).make(groups)) == 8
    assert tried == [4, 2, 2, 2, 2], "found out once"


def test_all_jobs_are_checked_and_those_with_errors_are_named(edges, toy_base):
    used = ControlRequest(name=edges, images=np.zeros((8, 8, 3), np.uint8))
    jobs = [job("a", controls=[used]), job("b", size=(33, 32)), job("c", steps=10**6), job("d", prompt="word " * 200)]
    notes = []
    with pytest.raises(Invalid, match=r"^the line of b: .* sides that 16 divides.* 1, the next at the line of c\.$"):
        for one in JobMaker(toy_base).check([[one] for one in jobs]):
            notes.append(one)
    said = [one for one in notes if one is not None]
    assert len(notes) - len(said) == 4 and [name for _, name in said] == ["a", "d"]
    assert "is empty" in said[0][0] and "cut off" in said[1][0]


def test_a_control_that_two_annotators_serve_is_loaded_for_each(toy_base, tmp_path):
    save_control(tmp_path / "bare", SavedControl(new_control(toy_base), HintSpec("")), toy_base)
    used = [ControlRequest(name=str(tmp_path / "bare"), images=PHOTO, annotator=kind) for kind in ("canny", "lineart")]
    maker = JobMaker(toy_base)
    assert [one for one in maker.check([[job("a", controls=used)]]) if one] == []
    [prepared] = maker._prepared([job("a", controls=used)])
    assert [control.specs[""].annotator for control in prepared.controls] == ["canny", "lineart"]


def test_an_alias_of_an_annotator_is_its_name(edges, toy_base, tmp_path):
    save_control(tmp_path / "pose", SavedControl(new_control(toy_base), HintSpec("pose")), toy_base)
    used = ControlRequest(name=str(tmp_path / "pose"), images=PHOTO, ready=True, annotator="openpose")
    [prepared] = JobMaker(toy_base)._prepared([job("a", controls=[used])])
    assert prepared.controls[0].specs[""].annotator == "pose"


def test_a_picture_that_is_none_is_an_error_with_its_job(toy_base, monkeypatch):
    real = type(toy_base).decode_latents
    monkeypatch.setattr(type(toy_base), "decode_latents", lambda self, latents: real(self, latents) * float("nan"))
    with pytest.raises(Invalid, match=r"^the line of a \(or a picture made together with it\): .* not finite"):
        list(JobMaker(toy_base).make([[job("a"), job("b")]]))


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(UserError, match=r"2 workers need Ray.*pip install 'controlkit\[scale\]'"),
        hired(None, "cpu", 2),
    ):
        pass


@pytest.mark.slow  # Ray's start takes as long as fifty other tests
def test_workers_make_all_pictures_once_though_one_dies_in_the_middle(toy_folder, toy_base, edges, tmp_path):
    """And what their work raises is raised here; all in one test, as Ray takes its time to start."""
    pytest.importorskip("ray")
    write_png(tmp_path / "photo.png", PHOTO)
    used = [ControlRequest(name="edges", images=tmp_path / "photo.png", scale=0.5)]
    jobs = [job(f"{i}", seed=i, prompt=f"a red apple {i}", controls=used if i % 2 else []) for i in range(12)]
    died, begun = tmp_path / "died", tmp_path / "begun"

    def load(device):
        """The base; whoever is the first to decode a second batch dies of it."""
        base = load_base(toy_folder, device)
        with begun.open("a") as file:
            file.write(f"{os.getpid()}\n")
        real, calls = type(base).decode_latents, []

        def decode(self, latents):
            calls.append(len(latents))
            if len(calls) == 2 and not died.exists():
                died.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, latents)

        type(base).decode_latents = decode
        return base

    out = tmp_path / "out"
    out.mkdir()
    with pytest.MonkeyPatch.context() as patch, held(out):
        patch.chdir(tmp_path)  # where the control lies
        plan = begin(out, jobs, {"base": "toy"}, most=2)
        assert len(plan.groups) == 6
        with hired(load, "cpu", 2) as crew:
            with pytest.raises(Invalid, match=r"the line of x: .* sides that 16 divides"):
                list(crew.check([[job("x", size=(33, 32))]]))
            notes = [one for one in crew.check(plan.groups) if one]
            finished = [one.name for one in written(plan, crew.make(plan.groups)) if isinstance(one, Finished)]
    killed, pids = int(died.read_text()), [int(line) for line in begun.read_text().split()]
    assert killed in pids and len(pids) == 3 and os.getpid() not in pids
    assert notes == []
    assert sorted(finished) == sorted(one.name for one in jobs)
    lines = [json.loads(line)["name"] for line in (out / JOURNAL).read_text().splitlines()]
    assert lines == finished
    maker = JobMaker(toy_base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        alone = {one.name: one.pixels for one in maker.make(plan.groups) if isinstance(one, Made)}
    for name, pixels in alone.items():
        assert abs(read_picture(out / f"{name}.png").astype(int) - pixels.astype(int)).max() <= 1
