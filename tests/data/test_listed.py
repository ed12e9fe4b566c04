"""Listings and captions of strangers: lines without end, columns without number, links out, in a sentence and soon."""

import csv
import json
import os

import numpy as np
import pytest
from test_archives import END, PICTURE, filled, header
from tests.limits import limited

from controlkit.data import read_listing
from controlkit.data.layouts import own_facts
from controlkit.data.layouts.rows import MOST_BYTES, MOST_PROBLEMS, MOST_TEXT
from controlkit.errors import UserError
from controlkit.images import write_png


@pytest.fixture
def photos(tmp_path):
    """Two pictures in a folder."""
    for name in ("a", "b"):
        write_png(tmp_path / "set" / f"{name}.png", np.full((8, 8, 3), ord(name), np.uint8))
    return tmp_path / "set"


def told(folder, growth=2**28):
    """The prompts of a listing and its fatal problems, each a sentence, under a limit."""
    with limited(growth=growth):
        listing = read_listing(folder)
    assert all(len(str(problem)) < 700 and "\0" not in str(problem) for problem in listing.problems)
    return [row.prompt for row in listing.rows], [problem for problem in listing.problems if problem.fatal]


LINE = {"file_name": "a.png", "text": "a hat"}


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "prompt.json"])
def test_a_line_without_an_end_is_not_read(name, photos):
    with (photos / name).open("w") as file:
        file.write("file_name,text\na.png,x\n" if name.endswith("csv") else json.dumps(LINE) + "\n")
        for _ in range(100):
            file.write('{"file_name": [' + "[]," * 300_000)
    _, problems = told(photos)
    assert f"a line of more than {MOST_TEXT:,} letters" in problems[-1].words or "no line of a table" in str(problems)


def test_one_value_of_a_list_is_not_larger_than_a_line(photos):
    with (photos / "metadata.json").open("w") as file:
        file.write(f'[{json.dumps(LINE)}, {{"file_name": [')
        for _ in range(20):
            file.write("[],{}," * 200_000)
    prompts, problems = told(photos)
    assert prompts == ["a hat"] and [problem.kind for problem in problems] == ["unreadable file"]


def test_a_long_list_is_read_an_entry_at_a_time_and_as_it_is(photos):
    entries = [LINE | {"text": f"{i} " + "é😀" * (i % 70), "b": [i, {"c": None}]} for i in range(4_000)]
    for indent in (None, 1):
        (photos / "metadata.json").write_text(json.dumps(entries, indent=indent, ensure_ascii=indent is None))
        prompts, problems = told(photos, 2**29)
        assert prompts == [entry["text"] for entry in entries] and not problems


@pytest.mark.parametrize(
    "text", ["[", "[1", '[{"file_name": "a.png"}', '[{"file_name": "a.png"},]', '[{"file_name": "a.png"}] {}', "[,]",
             '[{"file_name": "a.png"} {"file_name": "a.png"}]', "[" * 100_000, '[{"a": 1, "a": 2}]', "[1, 2, 3]"]
)  # fmt: skip
def test_a_list_that_is_none_is_told(text, photos):
    (photos / "metadata.json").write_text(text)
    prompts, problems = told(photos)
    assert problems and set(prompts) <= {""}


def test_a_listing_of_nothing_but_faults_is_not_read_to_its_end(photos):
    for name, line in (("metadata.jsonl", "1\n"), ("prompt.json", "{}\n"), ("metadata.json", "1,")):
        (photos / name).write_text(("[" if name == "metadata.json" else "") + line * 40_000)
        _, problems = told(photos)
        assert len(problems) == MOST_PROBLEMS + 1 and "it is not read further" in problems[-1].words
        (photos / name).unlink()


@pytest.mark.parametrize(
    "text",
    ["file_name," + "a," * 1_000_000 + "\n" + "a.png\n" * 100_000, "file_name,text\na.png," + "x" * 200_000 + "\n",
     'file_name,text\na.png,"' + "x\n" * 300_000, "file_name" + '"' * 200_000 + "\na.png", "file_name,text\n\ud83d",
     "file_name,file_name\n../a.png,/etc/passwd\n", "\0\n", "file_name,text\n" + "a.png\0,x\n" * 9]
)  # fmt: skip
def test_a_table_of_too_many_columns_or_letters_is_told(text, photos):
    limit = csv.field_size_limit()
    (photos / "metadata.csv").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert told(photos)[1] and csv.field_size_limit() == limit


VALUES = [[], {}, [[]], {"a": []}, [7], None, True, 1e300, 7, "\0", "a\0.png", "a.png\0", "\ud800", "\ud800.png",
          "x" * 5000, "/" * 5000, "a/" * 3000, "~root/x.png", "file:///etc/passwd", "https://a.b/c.png", "/dev/zero",
          "pipe.png", "/proc/self/mem", "C:\\a.png", "..", ".", "", " "]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:20])
def test_values_of_every_kind_are_a_file_inside_or_a_problem(value, photos):
    os.mkfifo(photos / "pipe.png")
    for name, keys in (("prompt.json", ("target", "source", "prompt")), ("metadata.jsonl", ("image", "hint", "text")),
                       ("metadata.json", ("image", "conditioning_image", "prompt"))):  # fmt: skip
        for key in keys:
            entry = dict(zip(keys, ("a.png", "b.png", "x"), strict=True)) | {key: value}
            text = json.dumps([entry] if name == "metadata.json" else entry)
            (photos / name).write_text(text)
            try:
                told(photos)
            except UserError as error:
                assert len(str(error)) < 700
        (photos / name).unlink()


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:20])
def test_settings_of_simpletuner_of_every_kind_are_told(value, photos):
    keys = (
        "id",
        "instance_data_dir",
        "dataset_type",
        "caption_strategy",
        "conditioning_data",
        "instance_prompt",
        "repeats",
    )
    for key in keys:
        backend = {"id": "a", "instance_data_dir": ".", key: value}
        for listed in ([backend], backend, [value], value):
            (photos / "multidatabackend.json").write_text(json.dumps(listed))
            try:
                told(photos)
            except UserError as error:
                assert len(str(error)) < 700


def test_folders_of_simpletuner_are_those_of_the_set(photos, tmp_path):
    write_png(tmp_path / "mine" / "c.png", np.zeros((8, 8, 3), np.uint8))
    for place in ("/", "..", "../mine", str(tmp_path / "mine"), "a/../../mine"):
        (photos / "multidatabackend.json").write_text(json.dumps([{"id": "a", "instance_data_dir": place}]))
        prompts, [problem] = told(photos)
        assert not prompts and "put a link to it there" in problem.words
    (photos / "linked").symlink_to(tmp_path / "mine")
    for place in ("linked", str(photos / "linked"), "./linked/"):
        (photos / "multidatabackend.json").write_text(json.dumps([{"id": "a", "instance_data_dir": place}]))
        assert told(photos) == (["c"], [])
    many = [{"id": i, "instance_data_dir": "." + "/." * (i % 9)} for i in range(1, 2000)]
    (photos / "multidatabackend.json").write_text(json.dumps(many))
    with limited(), pytest.raises(UserError, match="has 1,999 backends: expected at most 32"):
        read_listing(photos)


def test_thousands_of_hints_of_a_row_are_found_one_by_one(photos):
    """Not each by a look at all the others."""
    entry = LINE | {"hint": "b.png"} | {f"hint_{i}": "b.png" for i in range(2, 25_000)}
    (photos / "metadata.jsonl").write_text(json.dumps(entry))
    with limited():
        assert len(read_listing(photos).rows[0].hints) == 24_999


def test_many_folders_are_not_compared_each_with_each(tmp_path):
    shard = b"".join(header(f"{i}/{name}.png") + filled(PICTURE) for i in range(4000) for name in ("x", f"y{i}"))
    (tmp_path / "0.tar").write_bytes(shard + END)
    with limited(growth=2**29):
        assert len(read_listing(tmp_path).rows) == 8_000


# --- texts ----------------------------------------------------------------------------------------------------


def test_captions_that_are_links_are_read_from_inside_alone(photos, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("a key of mine")
    (photos / "words").mkdir()
    (photos / "words" / "b").write_text("a car")
    (photos / "b.txt").symlink_to("words/b")
    assert told(photos)[0] == ["a", "a car"]
    for target in (secret, "/etc/passwd", "../secret.txt"):
        (photos / "a.txt").unlink(missing_ok=True)
        (photos / "a.txt").symlink_to(target)
        prompts, [problem] = told(photos)
        assert prompts == ["", "a car"] and "is a link out of" in problem.words and "a.txt" in problem.where
    (photos / "a.txt").unlink()
    (tmp_path / "beside").symlink_to(photos)
    assert told(tmp_path / "beside") == (["a", "a car"], [])


@pytest.mark.parametrize(
    "name", ["metadata.jsonl", "metadata.csv", "metadata.json", "prompt.json", "multidatabackend.json"]
)
def test_listings_that_are_links_are_read_from_inside_alone(name, photos, tmp_path):
    (tmp_path / "other").write_text('[{"file_name": "a.png", "id": "a"}]')
    (photos / name).symlink_to(tmp_path / "other")
    with limited():
        try:
            prompts, problems = told(photos)
            assert not prompts and "is a link out of" in problems[0].words
        except UserError as error:
            assert "is a link out of" in str(error)


def test_what_a_hubs_cache_links_to_is_inside(photos, tmp_path):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (photos / "a.txt").write_text("a hat")
    for path in photos.iterdir():
        path.rename(blobs / f"blob {path.name}")
        (snapshot / path.name).symlink_to(blobs / f"blob {path.name}")
    assert told(snapshot) == (["a hat", "b"], [])


def test_texts_and_pictures_larger_than_any_are_not_read(photos):
    for name, size in (("a.txt", 2**33), ("b.png", 2**40), ("built.json", 2**33)):
        with (photos / name).open("r+b" if name == "b.png" else "wb") as file:
            file.truncate(size)  # sparse: it takes no room
    with limited(growth=2**26):
        listing = read_listing(photos)
        assert "more than" in listing.problems[0].words and own_facts(photos / "built.json") == {}
        with pytest.raises(OSError, match=f"more than {MOST_BYTES:,}"):
            listing.rows[1].picture.read()


def test_a_pipe_that_takes_the_place_of_a_picture_is_not_waited_for(photos):
    rows = read_listing(photos).rows
    (photos / "a.png").unlink()
    os.mkfifo(photos / "a.png")
    (photos / "b.png").unlink()
    (photos / "b.png").symlink_to("/dev/zero")
    for row in rows:
        with limited(growth=2**26), pytest.raises(OSError, match="no regular file"):
            row.picture.read()


def test_facts_of_a_set_are_read_from_its_own_folder(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "elsewhere.json").write_text('{"annotator": "canny"}')
    (tmp_path / "set" / "built.json").symlink_to(tmp_path / "elsewhere.json")
    assert own_facts(tmp_path / "set" / "built.json") == {}
    (tmp_path / "set" / "built.json").unlink()
    (tmp_path / "set" / "built.json").write_text('{"annotator": "canny"}')
    assert own_facts(tmp_path / "set" / "built.json") == {"annotator": "canny"}
