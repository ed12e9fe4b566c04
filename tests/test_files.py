"""Texts from outside, files written whole, folders marked as output."""

import codecs
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from controlkit.errors import Invalid, NotFound
from controlkit.files import (
    OUTPUT,
    SCRATCH,
    decode_text,
    is_leftover,
    is_output,
    mark_output,
    parse_json,
    parse_yaml,
    read_text,
    scratch_folder,
    sweep,
    write_atomic,
)


@pytest.mark.parametrize(
    "data",
    ["a café".encode(), codecs.BOM_UTF8 + "a café".encode(), "a café".encode("utf-16"),
     codecs.BOM_UTF16_BE + "a café".encode("utf-16-be")],
)  # fmt: skip
def test_one_text_whatever_its_byte_order_mark(data, tmp_path):
    (tmp_path / "a.txt").write_bytes(data)
    assert read_text(tmp_path / "a.txt") == "a café"


@pytest.mark.parametrize("data", ["a café".encode("latin-1"), b"a\0b", codecs.BOM_UTF16_LE + b"\x00"])
def test_what_is_no_text_is_named(data):
    with pytest.raises(Invalid, match=r"notes\.txt"):
        decode_text(data, "notes.txt")


def test_a_text_that_is_not_there(tmp_path):
    with pytest.raises(NotFound, match="nothing"):
        read_text(tmp_path / "nothing")


def test_json_with_a_byte_order_mark():
    assert parse_json(codecs.BOM_UTF8 + b'{"a": 1}', "x") == {"a": 1}
    assert parse_json('\ufeff{"a": 1}', "x") == {"a": 1}


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '[{"b": {"steps": 2, "lr": 1, "steps": 2}}]'])
def test_json_with_a_key_twice_is_refused(text):
    with pytest.raises(Invalid, match=r'settings\.json.*the key "(a|steps)" is given twice'):
        parse_json(text, "settings.json")


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"a" 1}', b"\xff{}"])
def test_json_that_is_none(text):
    with pytest.raises(Invalid, match=r"settings\.json") as caught:
        parse_json(text, "settings.json")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: 1\na: 2\n", '"a" is given twice'),
     ("x: {b: 1, b: 2}", '"b" is given twice'),
     ("a: &k 1\nb: *k\n", "alias"),
     ("a: {<<: {b: 1}}", "merge"),
     ("[" * 50_000, ""),
     ("a: [1, 2", ""),
     ("a: 2024-13-45\n", "")],
)  # fmt: skip
def test_yaml_that_is_refused(text, words):
    with pytest.raises(Invalid, match=r"run\.yaml") as caught:
        parse_yaml(text, "run.yaml")
    assert words in str(caught.value) and len(str(caught.value)) < 400


def test_yaml_that_doubles_is_refused_at_once():
    lines = ["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 30)]
    with pytest.raises(Invalid):
        parse_yaml("\n".join(lines), "run.yaml")


def test_plain_yaml():
    assert parse_yaml("\ufeffa: {b: 1}\nc: [x, y]\n", "x") == {"a": {"b": 1}, "c": ["x", "y"]}


def test_folders_that_we_write_are_marked_and_those_of_others_are_not(tmp_path):
    mark_output(tmp_path / "run", "train")
    assert is_output(tmp_path / "run") and "train" in (tmp_path / "run" / OUTPUT).read_text()
    (tmp_path / "run" / "a.png").touch()
    mark_output(tmp_path / "run", "train")  # again, with files of its own
    assert is_output(tmp_path / "run")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    mark_output(tmp_path / "photos", "generate")
    assert not is_output(tmp_path / "photos")


def test_leftovers():
    assert all(map(is_leftover, ["._x.png", ".ipynb_checkpoints", "__MACOSX", "Thumbs.db", f"{SCRATCH}1", ".DS_Store"]))
    assert not any(map(is_leftover, ["x.png", "thumbs", "a.b.png", "macosx"]))


def test_a_file_is_whole_or_not_there(tmp_path):
    def half(path):
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write_atomic(tmp_path / "a", half)
    assert not list(tmp_path.iterdir())
    write_atomic(tmp_path / "a", json.dumps([1]).encode())
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


# --- what a killed process leaves ---------------------------------------------------------------------------------

WRITES = """
import sys, time
from pathlib import Path
from controlkit import files
def half(path):
    path.write_bytes(b"half")
    print("begun", flush=True)
    time.sleep(60)
files.write_atomic(Path(sys.argv[1]), half)
"""


@pytest.fixture
def writing(tmp_path):
    """Another process that has written half of ``a``."""
    with subprocess.Popen([sys.executable, "-c", WRITES, tmp_path / "a"], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"begun\n"
        yield process
        process.kill()


def test_what_a_killed_process_left_half_written_is_gone_with_the_next_file(tmp_path, writing):
    assert [path.name.startswith(SCRATCH) for path in tmp_path.iterdir()] == [True]
    writing.send_signal(signal.SIGKILL)
    writing.wait()
    assert [path.name.startswith(SCRATCH) for path in tmp_path.iterdir()] == [True]
    write_atomic(tmp_path / "b", b"whole")
    assert list(tmp_path.iterdir()) == [tmp_path / "b"]


@pytest.mark.parametrize("clean", [sweep, lambda folder: write_atomic(folder / "b", b"whole")], ids=["sweep", "write"])
def test_what_another_process_still_writes_stays(tmp_path, writing, clean):
    clean(tmp_path)
    assert len(list(tmp_path.glob(f"{SCRATCH}*/a"))) == 1


def test_what_another_thread_writes_stays(tmp_path):
    with scratch_folder(tmp_path / "in") as scratch:
        thread = threading.Thread(target=sweep, args=[tmp_path])
        thread.start()
        thread.join()
        assert scratch.is_dir()
    assert not list((tmp_path / "in").iterdir())


def test_sweeping_follows_no_link_waits_for_no_pipe_and_reads_names_alone(tmp_path):
    out, given = tmp_path / "out", tmp_path / "given"
    for folder in (out / "deep" / f"{SCRATCH}{'0' * 32}" / "b", given):
        folder.mkdir(parents=True)
    (given / "kept").touch()
    (out / f"{SCRATCH}link").symlink_to(given)
    (out / f"{SCRATCH}file").touch()
    (out / "writing-mine").touch()
    os.mkfifo(out / f"{SCRATCH}pipe")
    sweep(out)
    assert sorted(path.name for path in out.rglob("*")) == ["deep", "writing-mine"]
    assert (given / "kept").exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError, SystemExit])
def test_what_is_interrupted_leaves_nothing(tmp_path, stop):
    def half(path):
        path.write_bytes(b"half")
        raise stop

    with pytest.raises(stop):
        write_atomic(tmp_path / "a", half)
    assert not list(tmp_path.iterdir())
