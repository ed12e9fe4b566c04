"""Texts from outside, files written whole, folders marked as output."""

import codecs
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from controlkit.errors import Invalid, NotFound
from controlkit.files import (
    LONGEST_YAML,
    OUTPUT,
    SCRATCH,
    decode_text,
    inside,
    is_leftover,
    is_output,
    mark_output,
    parse_json,
    parse_yaml,
    parse_yaml_as_written,
    read_json,
    read_text,
    scratch_folder,
    sweep,
    write_atomic,
)
from limits import limited


def test_where_a_folder_is_no_file_is_written(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(Invalid, match="is a folder"):
        write_atomic(tmp_path / "a", b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


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


HOSTILE_JSON = {
    "brackets in great number": "[" * 100_000,
    "objects in objects": '{"a":' * 100_000,
    "brackets as deep as can be read": "[" * 900 + "]" * 900,
    "a list of lists that would take gigabytes": "[" + "[]," * 20_000_000 + "[]]",
    "objects that would take gigabytes": "[" + '{"a":0},' * 5_000_000 + "{}]",
    "a number of a million digits": '{"steps": ' + "1" * 1_000_000 + "}",
    "a number of four thousand digits": "[" + "1" * 4000 + "]",
    "a number too large for any": "[1e999]",
    "one that is written whole": "[" + "9" * 63 + "0" * 300 + ".0]",
    "no number": '{"a": NaN}',
    "infinity": "[-Infinity]",
    "half a letter": r'{"prompt": "\ud800"}',
    "half a letter as a key": r'{"\uDFFF": 1}',
    "a key of a million letters, twice": '{"' + '": 1, "'.join(["k" * 10**6] * 2) + '": 2}',
    "a long text that is not closed": '"' + "a" * 10**7,
}


@pytest.mark.parametrize("text", HOSTILE_JSON.values(), ids=HOSTILE_JSON)
def test_json_made_to_harm_is_refused_in_a_line(text):
    with limited(), pytest.raises(Invalid, match=r"settings\.json") as caught:
        parse_json(text, "settings.json")
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_json_that_is_large_and_right_is_read():
    with limited():
        keys = parse_json(
            "{" + ",".join(f'"k{i}": [{i}, 0.5, 1e99, 18446744073709551615]' for i in range(10**5)) + "}", "x"
        )
    assert len(keys) == 10**5 and keys["k7"] == [7, 0.5, 1e99, 2**64 - 1]
    assert parse_json(r'"\ud83d\ude00 \\ud800"', "x") == "\N{GRINNING FACE} \\ud800"
    assert parse_json('{"model_max_length": 1000000000000000019884624838656}', "x")["model_max_length"] == int(1e30)
    assert parse_json("[" * 60 + "]" * 60, "x") and parse_json('"e111, 1e1111"', "x") == "e111, 1e1111"
    loss, high = parse_json("[NaN, 1e999]", "a log", finite=False)
    assert loss != loss and high == float("inf")


def test_a_file_longer_than_its_kind_is_refused_unread(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # of zeros, and of no size on the disk
    with limited():
        for read in (read_text, read_json):
            with pytest.raises(Invalid, match=r"config\.json has more than"):
                read(path, 2**20)
    path.write_text("[1, 2]")
    assert read_json(path, 6) == [1, 2]
    with pytest.raises(Invalid, match="more than 5 bytes"):
        read_json(path, 5)


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/stdin", "/proc/self", "a\0b", "x" * 5000])
def test_what_is_no_file_of_text_is_refused(name, tmp_path):
    with limited(), pytest.raises((Invalid, NotFound)):
        read_text(tmp_path / name)


def test_links_that_lead_out_of_a_folder_are_named(tmp_path):
    folder = tmp_path / "base"
    (folder / "in").mkdir(parents=True)
    (folder / "in/a.txt").write_text("a")
    for name, target in (("near", "in/a.txt"), ("far", "/etc/passwd"), ("up", "../other"), ("round", "round")):
        (folder / name).symlink_to(target)
    (folder / "linked").symlink_to("/etc")
    assert inside(folder, folder / "near") == folder / "near" and inside(folder, folder / "in/a.txt")
    assert inside(folder, folder / "round")  # it is within, and there is no such file
    for name in ("far", "up", "linked/passwd", "../other", "in/../../other"):
        with pytest.raises(Invalid, match="leads out of its folder"):
            inside(folder, folder / name)


HOSTILE_YAML = {
    "many aliases": "a: &a [x]\nb: [" + "*a, " * 10_000 + "]",
    "lists in lists": "- " * 60_000,
    "brackets": "[" * (LONGEST_YAML - 1),
    "braces": "{" * (LONGEST_YAML - 1),
    "complex keys": "? " * 60_000,
    "a key that is a list": "? [a]\n: b",
    "a key that is a dictionary": "{{a: 1}: 2}",
    "quotes without an end": "'" + "''" * 60_000,
    "anchors": "&a " * 40_000,
    "bytes": "a: !!binary aGVsbG8=",
    "a set": "!!set {a, b}",
    "pairs": "!!omap [a: 1]",
    "an object": "!!python/object/apply:os.system [ls]",
    "a word as a truth": "!!bool maybe",
    "a number of many digits": "steps: " + "1" * 5000,
    "a number of many sixties": "steps: " + "1" + ":1" * 50_000,
    "a float of many sixties": "lr: " + "1" + ":1" * 5000 + ".5",
    "a hexadecimal of many digits": "steps: 0x" + "f" * 100_000,
    "half a letter": r'prompt: "\ud800"',
    "no letter": r'prompt: "\U00110000"',
    "the same key in other words": "{'a': 1, a: 2}",
    "ten megabytes": "a: 1\n" * 2_000_000,
    "one line of ten megabytes": "a: " + "b" * 10**7,
    "one key of a hundred thousand letters": "k" * 100_000 + ": 1\n" + "k" * 100_000 + ": 2",
}


@pytest.mark.parametrize("text", HOSTILE_YAML.values(), ids=HOSTILE_YAML)
def test_yaml_made_to_harm_is_refused_in_a_line(text):
    before = time.process_time()
    with limited(), pytest.raises(Invalid, match=r"run\.yaml") as caught:
        parse_yaml(text, "run.yaml")
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    assert time.process_time() - before < 8


def test_yaml_as_it_was_written():
    text = "a: 007\nyes: 2024-01-01\n1: [no, 1e-4, ~, 1.5]\n1.0: {on: off}\n"
    value, written = parse_yaml_as_written(text, "x")
    assert written == {"a": "007", "yes": "2024-01-01", "1": ["no", "1e-4", "~", "1.5"], "1.0": {"on": "off"}}
    assert value["a"] == 7 and value["1"] == [False, "1e-4", None, 1.5] and value["1.0"] == {"on": False}
    assert parse_yaml("", "x") is None and parse_yaml_as_written("# nothing", "x") == (None, None)


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
