"""Texts from outside, files written whole, folders marked as output."""

import codecs
import json

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
