"""Pictures of jobs are made once, whatever happens in between, and are what an unbroken run makes."""

import json
import multiprocessing
import os
import pkgutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from controlkit import precision
from controlkit.backbones import load_base
from controlkit.controls import new_control
from controlkit.errors import Invalid, NotFound, Unsupported
from controlkit.files import SCRATCH, held, is_output
from controlkit.formats import SavedControl, save_control
from controlkit.images import HintSpec, read_picture, read_settings, write_png
from controlkit.sample import Request
from controlkit.sample.jobs import Job, read_jobs
from controlkit.sample.journal import JOURNAL, Finished, begin, written
from controlkit.sample.makers import JobMaker
from processes import SERVER, die_at

FACTS = {"base": "toy", "dtype": "fp32"}


def jobs_of(*rows):
    return [Job(row.pop("name"), f"line {i}", Request(steps=2, **row).to_json()) for i, row in enumerate(rows, 1)]


def seven(**changed):
    """Seven jobs; five are alike, and so are two."""
    rows = [{"name": f"{'abcdefg'[i]}", "prompt": f"a red apple {i}", "seed": i} for i in range(7)]
    for row in rows[1:3]:
        row["guidance"] = 1.0
    for name, values in changed.items():
        rows["abcdefg".index(name)] |= values
    return jobs_of(*rows)


def make(jobs, out, base, facts=FACTS, most=2):
    """Make what is left; the names of what was finished."""
    out.mkdir(exist_ok=True)
    with held(out):
        plan = begin(out, jobs, facts, most)
        maker = JobMaker(base)
        return [one.name for one in written(plan, maker.make(plan.groups)) if isinstance(one, Finished)]


def journal_of(out):
    lines = (out / JOURNAL).read_text().splitlines() if (out / JOURNAL).exists() else []
    return [json.loads(line) for line in lines]


def pictures_of(out):
    return {path.name: path.read_bytes() for path in out.glob("*.png")}


@pytest.fixture
def whole(toy_base, tmp_path):
    """The folder of an unbroken run of ``seven()``."""
    assert sorted(make(seven(), tmp_path / "whole", toy_base)) == [*"abcdefg"]
    return tmp_path / "whole"


def test_each_picture_has_its_request_and_a_line_in_the_journal(whole, toy_base):
    assert is_output(whole)
    lines = journal_of(whole)
    assert sorted(line["name"] for line in lines) == [*"abcdefg"] and all(line["seconds"] > 0 for line in lines)
    for job in seven():
        settings = read_settings(whole / f"{job.name}.png")
        asked = Request(**{key: value for key, value in settings.items() if key in Request.model_fields})
        size = (toy_base.size, toy_base.size)
        assert asked == job.request.model_copy(update={"size": size}) and settings["seal"]
        assert FACTS.items() | {("width", size[1]), ("height", size[0]), ("format", "float32")} <= settings.items()
        assert settings["threads"] == torch.get_num_threads()


def test_pictures_depend_on_nothing_made_beside_them_but_for_rounding(whole, toy_base, tmp_path):
    """The same batches give the same bits; other ones, or another order, differ by a level at most."""
    make(seven(), tmp_path / "again", toy_base)
    assert pictures_of(tmp_path / "again") == pictures_of(whole)
    make(seven()[::-1], tmp_path / "backwards", toy_base, most=3)
    make(seven(), tmp_path / "alone", toy_base, most=1)
    for other in ("backwards", "alone"):
        for path in whole.glob("*.png"):
            ours, theirs = (read_picture(folder / path.name).astype(int) for folder in (whole, tmp_path / other))
            assert abs(ours - theirs).max() <= 1


def test_what_is_finished_is_not_made_again(whole, toy_base):
    before = pictures_of(whole)
    assert make(seven(), whole, toy_base) == [] == make(seven()[2:], whole, toy_base)
    (whole / "c.png").unlink()
    assert make(seven(), whole, toy_base) == ["c"]
    assert make(seven(e={"seed": 50}), whole, toy_base) == ["e"]
    assert sorted(line["name"] for line in journal_of(whole)) == [*"abcdefg"]
    after = pictures_of(whole)
    assert {name for name in after if after[name] != before[name]} <= {"c.png", "e.png"} and after["e.png"] != before[
        "e.png"
    ]
    assert make(seven(), whole, toy_base) == ["e"], "back again"


def test_groups_after_a_stop_are_those_of_all_jobs(whole):
    """Or pictures would be rounded otherwise than in an unbroken run."""
    for name in "defg":
        (whole / f"{name}.png").unlink()
    groups = [[job.name for job in group] for group in begin(whole, seven(), FACTS, 2).groups]
    assert groups == [["d"], ["e", "f"], ["g"]]


def test_another_base_or_dtype_makes_all_anew(whole, toy_base):
    assert len(make(seven(), whole, toy_base, FACTS | {"dtype": "bf16"})) == 7


def test_a_picture_that_changed_is_another_job_and_a_moved_one_is_not(toy_base, tmp_path):
    save_control(tmp_path / "edges", SavedControl(new_control(toy_base), HintSpec("canny")), toy_base)
    out = tmp_path / "out"
    for name in "ab":
        write_png(tmp_path / "in" / f"{name}.png", np.full((8, 8, 3), ord(name), np.uint8))
    row = {"steps": 1, "controls": [{"name": str(tmp_path / "edges"), "images": "a.png"}]}
    masked = {"steps": 1, "controls": [row["controls"][0] | {"region": "b.png"}]}

    def made(folder="in"):
        text = "\n".join(json.dumps(one) for one in (row, masked))
        (tmp_path / folder / "jobs.jsonl").write_text(text)
        return make(read_jobs(tmp_path / folder / "jobs.jsonl", Request()), out, toy_base)

    assert (made(), made()) == (["00001", "00002"], [])
    (tmp_path / "in").rename(tmp_path / "moved")
    assert made("moved") == []
    write_png(tmp_path / "moved" / "b.png", np.zeros((8, 8, 3), np.uint8))
    assert made("moved") == ["00002"]


def test_a_changed_job_is_not_taken_for_finished_when_it_is_changed_back_after_a_kill(whole, toy_base, monkeypatch):
    """Its file is of the other request by then, whatever the journal said once."""
    real = pkgutil.resolve_name("controlkit.sample.journal.write_png")

    def dying(*given, **more):
        real(*given, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("controlkit.sample.journal.write_png", dying)
        make(seven(a={"seed": 9}), whole, toy_base)
    assert make(seven(), whole, toy_base) == ["a"]


def test_a_torn_line_is_made_again_and_a_line_of_anything_else_is_refused(whole, toy_base):
    text = (whole / JOURNAL).read_text()
    (whole / JOURNAL).write_text(text[:-9])
    assert len(make(seven(), whole, toy_base)) == 1 and len(journal_of(whole)) == 7
    for line, words in (("[]\n", r"line 8, is none of a journal: delete"), ("x\n", r"line 8, is no JSON")):
        (whole / JOURNAL).write_text(text + line)
        with pytest.raises(Invalid, match=words):
            make(seven(), whole, toy_base)


def test_files_that_no_job_made_and_that_jobs_read_are_not_written_over(toy_base, tmp_path):
    write_png(tmp_path / "b.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(Invalid, match=r"line 2: .*b\.png is there, and no job made it"):
        make(seven(), tmp_path, toy_base)
    read = {"controls": [{"name": "canny", "images": {"": tmp_path / "b.png"}}]}
    with pytest.raises(Invalid, match=r"line 2: the picture would be written over .*b\.png, which it is made of"):
        make(seven(b=read), tmp_path, toy_base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.png"]


def test_all_that_needs_no_base_is_looked_at_first(tmp_path):
    def control(**given):
        return {"controls": [{"name": "canny", "images": {"": "/nowhere.png"}} | given]}

    (tmp_path / "text.png").write_text("no picture")
    wrong = {
        "There is no picture at /nowhere.png": control(),
        "text.png cannot be read as a picture": control(images={"": tmp_path / "text.png"}),
        'no kind of hint called "cany"|did you mean "canny"': control(
            annotator="cany", images={"": tmp_path / "text.png"}
        ),
        "There is no .*edges": control(name="nowhere/edges.pth", images={"": tmp_path / "text.png"}),
        "names the LoRA": {"prompt": "<lora:x>", "dialect": "a1111"},
    }
    for words, row in wrong.items():
        with pytest.raises((Invalid, NotFound), match=words) as error:
            begin(tmp_path / "out", seven(b=row), FACTS)
        assert str(error.value).startswith("line 2: ")
    assert not (tmp_path / "out").exists()


def test_two_processes_do_not_write_one_folder(whole, toy_base):
    with held(whole), pytest.raises(Unsupported, match="is being written by another process"):
        make(seven(), whole, toy_base)


def test_closing_between_steps_keeps_what_is_finished(whole, toy_base, tmp_path):
    out, steps = tmp_path / "out", 0
    plan = begin(out, seven(), FACTS, 2)
    records = written(plan, JobMaker(toy_base).make(plan.groups))
    for record in records:
        steps += hasattr(record, "step")
        if steps == 4:
            records.close()
    assert [line["name"] for line in journal_of(out)] == ["a", "d"] and len(pictures_of(out)) == 2
    assert len(make(seven(), out, toy_base)) == 5
    assert pictures_of(out) == pictures_of(whole)


KILLS = [
    ("controlkit.sample.journal.mark_output", 1, "after"),
    ("controlkit.sample.journal.write_atomic", 1, "after"),
    ("controlkit.backbones.unet.UNetBase.predict", 2, "before"),
    ("controlkit.backbones.unet.UNetBase.decode_latents", 1, "after"),
    ("controlkit.files.os.replace", 4, "before"),  # the second picture, whole beside its place
    ("controlkit.sample.journal.write_png", 2, "after"),
    ("controlkit.sample.journal.os.fsync", 4, "before"),  # the journal's, after its beginning and two pictures
    ("controlkit.backbones.unet.UNetBase.predict", 3, "after"),
    ("controlkit.sample.journal.write_png", 1, "before"),
    ("controlkit.sample.journal.embedded", 3, "before"),
]  # fmt: skip
"""Calls before or after which the process ends, one run after the other."""


def _make_until(place, number, when, base, out):
    """The jobs in this process, which kills itself before or after its numbered call of a place."""
    die_at(place, number, when)
    make(seven(), out, base)


def _make_and_be_killed(kills, base_folder, out, says):
    """The jobs in processes of their own, one after the other; says how each ended, and goes on when told."""
    precision.bf16_pays = lambda device_type: False
    torch.set_num_threads(1)
    base = load_base(base_folder)
    for kill in kills:
        if not (child := os.fork()):
            _make_until(*kill, base, out)
            os._exit(0)
        says.send((kill, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
        says.recv()


def test_a_process_killed_at_every_place_loses_nothing_and_makes_nothing_twice(whole, toy_folder, toy_base, tmp_path):
    out, finished = tmp_path / "out", {}
    hears, says = multiprocessing.Pipe()
    arguments = (KILLS, toy_folder, out, says)
    process = SERVER.Process(target=_make_and_be_killed, args=arguments, daemon=True)
    process.start()
    says.close()
    for kill in KILLS:
        assert hears.recv() == (kill, -signal.SIGKILL), "it ended before it was killed"
        there = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
        assert finished.items() <= there.items(), f"{kill}: a picture that was finished was made again"
        names = [line["name"] for line in journal_of(out)]
        assert len(names) == len(set(names))
        assert len(there) <= len(names) + 2, f"{kill}: more than one group was in flight"
        finished = {out / f"{name}.png": there[out / f"{name}.png"] for name in names}
        hears.send("go on")
    process.join()
    assert 0 < len(finished) < 7
    assert len(make(seven(), out, toy_base)) == 7 - len(finished)
    assert pictures_of(out) == pictures_of(whole) and not list(Path(out).rglob(f"{SCRATCH}*"))
