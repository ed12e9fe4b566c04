"""Data sets as people have them: one set of pairs in every layout reads as the same tensors."""

import csv
import gzip
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from controlkit.annotators import annotator
from controlkit.data import (
    CirclePairs,
    FolderPairs,
    add_up,
    build_set,
    examine,
    hint_for_pair,
    make_fill50k,
    read_listing,
)
from controlkit.errors import UserError
from controlkit.files import mark_output

COUNT, SIDE = 3, 32


@pytest.fixture
def tutorial(tmp_path):
    """The tutorial set in its own layout, and its rows."""
    folder = tmp_path / "fill50k"
    list(make_fill50k(folder, COUNT, SIDE))
    return folder, [json.loads(line) for line in (folder / "prompt.json").read_text().splitlines()]


def copied(folder, name, source):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, folder / name)


def metadata(spelling, suffix):
    """The datasets library's folder of pictures, with these names of columns."""
    picture, hint, text = spelling

    def write(folder, tutorial, rows):
        entries = []
        for i, row in enumerate(rows):
            copied(folder / "train", f"a/{i}.png", tutorial / row["target"])
            copied(folder / "train", f"b/{i}.png", tutorial / row["source"])
            entries.append({picture: f"a/{i}.png", hint: f"b/{i}.png", text: row["prompt"]})
        listing = folder / "train" / f"metadata{suffix}"
        if suffix == ".csv":
            with listing.open("w", newline="") as file:
                writer = csv.DictWriter(file, entries[0])
                writer.writeheader()
                writer.writerows(entries)
        elif suffix == ".json":
            listing.write_text(json.dumps(entries))
        else:
            listing.write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    return write


def kohya(pictures, hints, suffix):
    def write(folder, tutorial, rows):
        for i, row in enumerate(rows):
            copied(folder / pictures, f"{i}.png", tutorial / row["target"])
            copied(folder / hints, f"{i}.png", tutorial / row["source"])
            (folder / pictures / f"{i}{suffix}").write_text(row["prompt"] + "\n")

    return write


def simpletuner(folder, tutorial, rows):
    kohya("pictures", "edges", ".txt")(folder, tutorial, rows)
    backends = [
        {"id": "a", "dataset_type": "image", "instance_data_dir": "pictures", "caption_strategy": "textfile",
         "conditioning_data": "b"},
        {"id": "b", "dataset_type": "conditioning", "instance_data_dir": "edges"},
        {"id": "text", "dataset_type": "text_embeds", "default": True},
    ]  # fmt: skip
    (folder / "multidatabackend.json").write_text(json.dumps(backends))


def webdataset(folder, tutorial, rows):
    folder.mkdir()
    for shard, part in ((0, rows[:2]), (1, rows[2:])):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as archive:
            for i, row in enumerate(part):
                parts = {
                    "png": (tutorial / row["target"]).read_bytes(),
                    "conditioning_image.png": (tutorial / row["source"]).read_bytes(),
                    "txt": row["prompt"].encode(),
                }
                for name, data in parts.items():
                    member = tarfile.TarInfo(f"{shard}{i:04}.{name}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))


def huggingface(saved, names=("image", "conditioning_image", "text")):
    picture, hint, text = names

    def write(folder, tutorial, rows):
        datasets = pytest.importorskip("datasets")
        columns = {
            picture: [str(tutorial / row["target"]) for row in rows],
            hint: [str(tutorial / row["source"]) for row in rows],
            text: [row["prompt"] for row in rows],
        }
        if not saved:  # else the library puts pictures into the table
            for name in (picture, hint):
                columns[name] = [{"bytes": Path(path).read_bytes(), "path": Path(path).name} for path in columns[name]]
        table = datasets.Dataset.from_dict(columns)
        for name in (picture, hint):
            table = table.cast_column(name, datasets.Image())
        if saved:
            table.save_to_disk(folder)
        else:
            (folder / "data").mkdir(parents=True)
            table.to_parquet(folder / "data" / "train-00000-of-00001.parquet")

    return write


WRITERS = {
    "prompt.json": ("prompt.json", lambda folder, tutorial, rows: shutil.copytree(tutorial, folder)),
    "saved by datasets": ("huggingface", huggingface(saved=True)),
    "parquet": ("huggingface", huggingface(saved=False)),
    "ControlNet++": ("huggingface", huggingface(saved=False, names=("image", "control_canny", "text"))),
    "imagefolder": ("metadata", metadata(("file_name", "conditioning_image_file_name", "text"), ".jsonl")),
    "imagefolder, the other spelling": ("metadata", metadata(("image", "conditioning_image", "text"), ".jsonl")),
    "DiffSynth": ("metadata", metadata(("image", "controlnet_image", "prompt"), ".csv")),
    "DiffSynth, json": ("metadata", metadata(("image", "controlnet_image", "prompt"), ".json")),
    "kohya": ("paired", kohya("image_dir", "conditioning_data_dir", ".caption")),
    "ai-toolkit": ("paired", kohya("images", "control", ".txt")),
    "a kind of hint": ("paired", kohya("images", "canny", ".txt")),
    "hints within": ("paired", kohya(".", "control-images", ".txt")),
    "WebDataset": ("webdataset", webdataset),
    "SimpleTuner": ("simpletuner", simpletuner),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_set_is_the_same_pairs_in_every_layout(name, tutorial, tmp_path):
    layout, write = WRITERS[name]
    write(tmp_path / "set", *tutorial)
    listing = read_listing(tmp_path / "set")
    assert (listing.layout, listing.problems) == (layout, [])
    contract = annotator("canny").spec()
    read = FolderPairs(tmp_path / "set", SIDE)
    assert len(read) == COUNT
    for pair, drawn in zip(read, CirclePairs(SIDE, COUNT), strict=True):
        assert pair.prompt == drawn.prompt
        assert np.array_equal(pair.picture, drawn.picture) and np.array_equal(pair.hint, drawn.hint)
        tensors = [contract.tensor(hint_for_pair(one, contract), (SIDE, SIDE)) for one in (pair, drawn)]
        assert tensors[0].equal(tensors[1])


def test_a_plain_folder_of_pictures_gets_its_captions_beside_them_or_from_their_names(tutorial, tmp_path):
    folder = tmp_path / "set"
    for name in ("red_apple-01.png", "deep/blue car.JPG", "c.png"):
        copied(folder, name, tutorial[0] / "target/0.png")
    (folder / "c.txt").write_text("a circle,\n  in caption")
    pairs = FolderPairs(folder, SIDE)
    assert read_listing(folder).layout == "pictures"
    assert [pair.prompt for pair in pairs] == ["a circle, in caption", "blue car", "red apple"]
    assert all(pair.hint is None for pair in pairs), "hints are for an annotator to make"


def test_others_files_of_the_names_we_use_do_not_stand_in_the_way(tutorial, tmp_path):
    folder = tmp_path / "set"
    copied(folder, "a.png", tutorial[0] / "target/0.png")
    for content in ("[1]", "{}", "no json"):
        (folder / "built.json").write_text(content)
        (folder / "drawn.json").write_text(content)
        (folder / "metadata.json").write_text('{"licence": "CC0"}')
        assert read_listing(folder).layout == "pictures"


def test_one_of_several_captions_is_taken_and_always_the_same(tutorial, tmp_path):
    folder, rows = tutorial
    entries = [{"file_name": row["target"], "text": ["a", "b", "c"]} for row in rows * 20]
    (folder / "prompt.json").rename(folder / "metadata.jsonl")
    (folder / "drawn.json").unlink()
    (folder / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    prompts = [row.prompt for row in read_listing(folder).rows]
    assert set(prompts) == {"a", "b", "c"} and prompts == [row.prompt for row in read_listing(folder).rows]


@pytest.mark.parametrize(
    ("layout", "break_it", "kind", "words"),
    [
        ("prompt.json", lambda folder: (folder / "source/1.png").unlink(), "missing file", "source/1.png"),
        ("kohya", lambda folder: (folder / "conditioning_data_dir/1.png").unlink(), "missing hint", "1.png"),
        ("kohya", lambda folder: (folder / "image_dir/1.png").unlink(), "extra hint", "1.png"),
        ("kohya", lambda folder: (folder / "image_dir/1.caption").write_bytes(b"\xff\xfa"), "not UTF-8", "1.caption"),
        ("WebDataset", lambda folder: (folder / "00000.tar").write_bytes(b"rubbish" * 99), "unreadable file", "00000"),
        ("imagefolder", lambda folder: edit(folder / "train/metadata.jsonl", "a/0.png", "../../x.png"), "path escapes",
         "../../x.png"),
        ("SimpleTuner", lambda folder: (folder / "edges").rename(folder / "lines"), "missing folder", "edges"),
        ("ai-toolkit", lambda folder: shutil.copy(folder / "images/1.png", folder / "images/1.webp"), "two of a name",
         "1.webp"),
        ("WebDataset", lambda folder: pack(folder / "00000.tar"), "unreadable file", "00000"),
        ("imagefolder", lambda folder: edit(folder / "train/metadata.jsonl", "file_name", "fil_name"),
         "unreadable line", "line 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_listing_is_said_and_nothing_trains_on_it(
    layout, break_it, kind, words, tutorial, tmp_path
):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    WRITERS[layout][1](tmp_path / "set", *tutorial)
    break_it(tmp_path / "set")
    problem = read_listing(tmp_path / "set").problems[0]
    assert problem.kind == kind and words in problem.where and problem.fatal
    with pytest.raises(UserError, match="controlkit data doctor"):
        FolderPairs(tmp_path / "set", SIDE)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"images": 3, "control": 0}, "control is named as a folder of hints and has none"),
        ({"images": 3, "samples": 3, "control": 3}, "2 folders have pictures of the names in control"),
        ({"images": 3, "control": 3, "control_depth": 3}, "control, control_depth may all be hints"),
        ({"images": 3, "canny": 3, "depth": 3}, "canny, depth may all be hints"),
        ({"images": -3, "control": 3}, "no folder has pictures of the names in control"),
        ({"train/images": 3, "train/control": 3}, "train/control is named as a folder of hints: give the folder"),
        ({"control": 3}, "control is named as a folder of hints: give the folder"),
    ],
)
def test_hints_that_cannot_be_told_from_pictures_are_never_trained_on_as_pictures(more, words, tutorial, tmp_path):
    for name, count in more.items():
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(abs(count)):
            copied(tmp_path / "set" / name, f"{i if count > 0 else i + 100}.png", tutorial[0] / "target/0.png")
    listing = read_listing(tmp_path / "set")
    assert listing.rows == []
    [problem] = listing.problems
    assert problem.kind == "unclear folders" and problem.fatal and words in problem.words
    with pytest.raises(UserError, match="controlkit data doctor"):
        FolderPairs(tmp_path / "set", SIDE)


def test_arrays_in_a_folder_called_by_a_kind_of_hint_are_hints(tutorial, tmp_path):
    (tmp_path / "set" / "depth").mkdir(parents=True)
    for i in range(COUNT):
        copied(tmp_path / "set", f"images/{i}.png", tutorial[0] / "target/0.png")
        np.save(tmp_path / "set" / "depth" / f"{i}.npy", np.full((SIDE, SIDE), i, np.float32))
    listing = read_listing(tmp_path / "set")
    assert (listing.layout, [len(row.hints) for row in listing.rows]) == ("paired", [1] * COUNT)


def test_folders_of_pictures_whose_names_say_nothing_of_hints_are_pictures(tutorial, tmp_path):
    for name in ("cats/1.png", "dogs/7.png", "masks/of venice.png", "masks/1.png", "masks/2.png", "masks/3.png"):
        copied(tmp_path / "set", name, tutorial[0] / "target/0.png")
    assert read_listing(tmp_path / "set").layout == "pictures"
    shutil.rmtree(tmp_path / "set" / "dogs")
    listing = read_listing(tmp_path / "set")
    assert (listing.layout, len(listing.rows)) == ("pictures", 5), "of the names in masks few are in cats"


def test_a_folder_that_no_hint_belongs_to_is_left_alone_and_said(tutorial, tmp_path):
    kohya("images", "control", ".txt")(tmp_path / "set", *tutorial)
    copied(tmp_path / "set", "samples/old.png", tutorial[0] / "target/0.png")
    listing = read_listing(tmp_path / "set")
    assert (listing.layout, len(listing.rows)) == ("paired", COUNT)
    [problem] = listing.problems
    assert problem.kind == "other folder" and "samples" in problem.where and not problem.fatal


@pytest.mark.parametrize("name", ["prompt.json", "imagefolder"])
def test_pictures_that_a_listing_does_not_name_are_told(name, tutorial, tmp_path):
    WRITERS[name][1](tmp_path / "set", *tutorial)
    folder = tmp_path / "set" / ("train" if name == "imagefolder" else "")
    for i in range(2):
        copied(folder, f"more/{i}.png", tutorial[0] / "target/0.png")
    listing = read_listing(tmp_path / "set")
    [problem] = listing.problems
    assert len(listing.rows) == COUNT and problem.kind == "extra file" and not problem.fatal
    assert problem.where.endswith("more/0.png") and "and 1 more" in problem.words


def test_a_table_s_paths_are_read_within_its_folder_alone(tutorial, tmp_path):
    datasets = pytest.importorskip("datasets")
    picture = (tutorial[0] / tutorial[1][0]["target"]).read_bytes()
    folder = tmp_path / "datasets" / "set"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(picture)
    (tmp_path / "x.png").write_bytes(picture)
    rows = [{"bytes": None, "path": "a.png"}, {"bytes": picture, "path": "b.png"}]
    rows += [{"bytes": None, "path": path} for path in ("../../x.png", str(tmp_path / "x.png"))]
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"image": rows, "text": ["a", "b", "c", "d"]}, features)
    pytest.importorskip("pyarrow.parquet").write_table(table.data.table, folder / "train.parquet")
    listing = read_listing(folder)
    assert [row.prompt for row in listing.rows] == ["a", "b"]
    assert [row.picture.read() for row in listing.rows] == [picture] * 2
    assert [problem.kind for problem in listing.problems] == ["path escapes"] * 2
    assert all("`save_to_disk` of the datasets library" in problem.words for problem in listing.problems)


@pytest.mark.parametrize("name", ["/dev/zero", "x" * 300, "a\0b", "gone.png"])
def test_a_table_s_paths_that_name_no_file_are_told_and_never_opened(name, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(decode=False)})
    table = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": name}]}, features)
    pytest.importorskip("pyarrow.parquet").write_table(table.data.table, tmp_path / "train.parquet")
    [problem] = read_listing(tmp_path).problems
    assert problem.kind in ("missing file", "path escapes") and problem.fatal and len(str(problem)) < 500


def pack(path):
    path.write_bytes(gzip.compress(path.read_bytes()))


def edit(path, before, after):
    path.write_text(path.read_text().replace(before, after))


@pytest.mark.parametrize("name", ["imagefolder", "DiffSynth", "parquet"])
def test_columns_of_a_set_s_own_names_are_read_as_what_they_are_said_to_be(name, tutorial, tmp_path):
    folder, own = tmp_path / "set", {"image": "photo", "hint": "lines", "caption": "said"}
    if name == "parquet":
        huggingface(saved=False, names=tuple(own.values()))(folder, *tutorial)
    else:
        metadata(tuple(own.values()), ".csv" if name == "DiffSynth" else ".jsonl")(folder, *tutorial)
    for pair, drawn in zip(FolderPairs(folder, SIDE, columns=own), CirclePairs(SIDE, COUNT), strict=True):
        assert pair.prompt == drawn.prompt
        assert np.array_equal(pair.picture, drawn.picture) and np.array_equal(pair.hint, drawn.hint)
    with pytest.raises(UserError, match="no hint column 'line'"):
        read_listing(folder, own | {"hint": "line"})
    with pytest.raises(UserError, match='no "hints" to be named: did you mean "hint"'):
        read_listing(folder, {"hints": "lines"})
    with pytest.raises(UserError, match=r"is read as prompt\.json, which has no columns"):
        read_listing(tutorial[0], own)


def test_a_name_that_is_given_comes_before_the_usual_ones(tutorial, tmp_path):
    folder, rows = tutorial
    (folder / "drawn.json").unlink()
    (folder / "prompt.json").unlink()
    entries = [{"file_name": row["target"], "text": "a", "prompt": "b", "control_x": row["source"]} for row in rows]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert {row.prompt for row in read_listing(folder).rows} == {"a"}
    assert {row.prompt for row in read_listing(folder, {"caption": "prompt"}).rows} == {"b"}


def test_captions_may_hold_commas_and_ends_of_lines_and_what_is_cut_by_a_comma_is_said(tutorial, tmp_path):
    folder, rows = tutorial
    (folder / "drawn.json").unlink()
    (folder / "prompt.json").unlink()
    said = ["red, and\nblue", "a\u2028b\u0085c", "plain"]
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *zip((row["target"] for row in rows), said, strict=True)])
    assert [row.prompt for row in read_listing(folder).rows] == said
    with (folder / "metadata.csv").open("a") as file:
        file.write(f"{rows[0]['target']},unquoted, and cut\n")
    [problem] = read_listing(folder).problems
    assert problem.fatal and "stands in quotes" in problem.words and "line 6" in problem.where
    (folder / "metadata.csv").write_text(f",file_name,text\n0,{rows[0]['target']},a\n")  # as pandas writes it
    assert [row.prompt for row in read_listing(folder).rows] == ["a"]
    assert not any(problem.fatal for problem in read_listing(folder).problems)
    (folder / "metadata.csv").unlink()
    entries = [{"file_name": row["target"], "text": words} for row, words in zip(rows, said, strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(one, ensure_ascii=False) for one in entries))
    assert [row.prompt for row in read_listing(folder).rows] == said


def test_of_a_table_s_splits_those_for_training_are_read_and_empty_cells_are_said(tutorial, tmp_path):
    datasets = pytest.importorskip("datasets")
    huggingface(saved=False)(tmp_path / "set", *tutorial)
    for name in ("test-00000-of-00001", "validation-00000-of-00001"):
        shutil.copy(tmp_path / "set/data/train-00000-of-00001.parquet", tmp_path / f"set/data/{name}.parquet")
    assert len(read_listing(tmp_path / "set").rows) == COUNT
    picture = {"bytes": (tutorial[0] / tutorial[1][0]["target"]).read_bytes(), "path": None}
    columns = {"image": [picture, picture], "conditioning_image": [picture, None], "text": ["a", "b"]}
    table = datasets.Dataset.from_dict(columns)
    for name in ("image", "conditioning_image"):
        table = table.cast_column(name, datasets.Image())
    (tmp_path / "bare" / "data").mkdir(parents=True)
    table.to_parquet(tmp_path / "bare/data/only-validation.parquet")
    listing = read_listing(tmp_path / "bare")
    [problem] = listing.problems
    assert len(listing.rows) == 1 and problem.fatal and "row 1" in problem.where


def test_what_of_a_backend_is_not_read_is_said(tutorial, tmp_path):
    simpletuner(tmp_path / "set", *tutorial)
    path = tmp_path / "set" / "multidatabackend.json"
    listed = json.loads(path.read_text())
    listed[0] |= {"repeats": 3}
    listed += [{"id": "far", "type": "aws"}, {"id": "words", "type": "local", "dataset_type": "text_embeds"}]
    path.write_text(json.dumps(listed))
    listing = read_listing(tmp_path / "set")
    assert len(listing.rows) == COUNT and not any(problem.fatal for problem in listing.problems)
    assert ["repeats is not read" in listing.problems[0].words, "left out" in listing.problems[1].words] == [True] * 2


def test_a_backend_that_names_no_other_and_a_folder_that_shows_nothing_are_refused(tutorial, tmp_path):
    simpletuner(tmp_path / "set", *tutorial)
    edit(tmp_path / "set" / "multidatabackend.json", '"conditioning_data": "b"', '"conditioning_data": "bb"')
    with pytest.raises(UserError, match='did you mean "b"'):
        read_listing(tmp_path / "set")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="shows no layout known here"):
        read_listing(tmp_path / "empty")
    with pytest.raises(UserError, match="There is no folder"):
        read_listing(tmp_path / "nowhere")


# --- hints and pictures that lie in folders of any name -------------------------------------------------------


def laid(folder, *names, mode="RGB"):
    """A folder with a small picture of another colour at each of these paths."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (8, 8), (i * 20 % 255,) * len(mode)).save(folder / name, "PNG")
    return folder


def named_alike(*folders):
    return [f"{folder}/{i}.png" for folder in folders for i in range(3)]


PAIRS = {
    "image and condition": ("image", "condition"),
    "images and conditions": ("images", "conditions"),
    "target and source": ("target", "source"),
    "a word for hints that is not the first": ("train_images", "train_conditions"),
    "a kind's word in the plural": ("photos", "my-depths"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_folder_whose_name_says_that_it_holds_hints_is_one_of_hints(name, tmp_path):
    pictures, hints = PAIRS[name]
    listing = read_listing(laid(tmp_path / "set", *named_alike(pictures, hints)))
    assert listing.layout == "paired" and {problem.kind for problem in listing.problems} == {"no caption"}
    assert {row.picture.name.split("/")[-2] for row in listing.rows} == {pictures}
    assert {row.hints[0].name.split("/")[-2] for row in listing.rows} == {hints}


QUESTIONS = {
    "two folders whose names say nothing": named_alike("A", "B"),
    "two folders deeper down": named_alike("train/photos", "train/maps"),
    "pictures and a folder beside them": [*(f"{i}.png" for i in range(3)), *named_alike("b")],
    "folders of several each": named_alike("x/cats", "x/dogs", "y/cats", "y/dogs"),
    "both words for hints": named_alike("pose_a", "pose_b"),
    "one that lacks a few": [*named_alike("A", "B"), "A/3.png", "A/4.png"],
    "other endings, zeros and letters": [f"A/Shot_{i}.PNG" for i in range(3)] + [f"B/shot 0{i}.jpg" for i in range(3)],
    "words for hints in the names": [*(f"{i}.png" for i in range(3)), *(f"{i}_canny.png" for i in range(3))],
    "two files of each name in one folder": [f"{i}.{ending}" for i in range(3) for ending in ("jpg", "png")],
    "a folder for each pair": [f"{i}/{part}.png" for i in range(3) for part in ("photo", "lines")],
    "pictures that are not read": [*(f"A/{i}.heic" for i in range(3)), *named_alike("B")],
    "names that are words for hints": [f"{name}.png" for name in ("canny", "canny_canny", "a", "b")],
    "names without letters": [f"{name}.png" for name in ("%", "%_canny", "a", "b")],
    "one hint among others": ["a house.png", "a house sketch.png", *(f"{i}.png" for i in range(9))],
    "a kind of hint beside several folders": named_alike("images", "others", "canny"),
}  # fmt: skip


@pytest.mark.parametrize("name", QUESTIONS)
def test_folders_of_the_same_names_are_a_question_until_it_is_answered(name, tmp_path):
    folder = laid(tmp_path / "set", *QUESTIONS[name])
    [problem] = [problem for problem in read_listing(folder).problems if problem.fatal]
    assert problem.kind == "unclear folders" and "--column image=" in problem.words
    with pytest.raises(UserError, match=r"--column image=.*controlkit data doctor"):
        FolderPairs(folder, SIDE)
    every = FolderPairs(folder, SIDE, columns={"image": "."})
    assert len(every) == sum(not path.endswith("heic") for path in QUESTIONS[name]) and not every.hints


def test_an_odd_name_that_two_folders_of_many_pictures_share_is_no_question(tmp_path):
    folder = laid(tmp_path / "set", *(f"animals/{i}.png" for i in range(20)), "cats/cat.png", "cats/cartoon/cat.png")
    assert not read_listing(folder).problems and len(read_listing(folder).rows) == 22
    laid(folder, *(f"{part}/{name}.png" for part in ("cats", "cats/cartoon") for name in ("kitten", "lion")))
    assert [problem.kind for problem in read_listing(folder).problems] == ["unclear folders"]


def test_which_folder_holds_the_hints_can_be_said(tmp_path):
    folder = laid(tmp_path / "set", *named_alike("A", "B", "B_2", "deep/C", "deep/D"))
    for pictures, hints, count in (("A", "B", 2), ("B", "A", 1), ("deep/C", "deep/D", 1)):
        listing = read_listing(folder, {"image": pictures, "hint": hints})
        assert listing.layout == "paired" and [len(row.hints) for row in listing.rows] == [count] * 3
        assert all(f"/{pictures}/" in row.picture.name and f"/{hints}/" in row.hints[0].name for row in listing.rows)
    assert len(FolderPairs(folder, SIDE, columns={"image": "A"})) == 3
    for wrong, words in (({"image": "Z"}, "has no folder Z"), ({"caption": "A"}, "captions lie beside"),
                         ({"image": "A", "hint": "Z"}, "has no folder Z")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            read_listing(folder, wrong)


def packed(path, members):
    """A tar of these members: (name, bytes) each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path.parent


def test_folders_of_the_same_names_in_tars_are_a_question_too(tutorial, tmp_path):
    data = (tutorial[0] / "target/0.png").read_bytes()
    one = packed(tmp_path / "one/0.tar", [(name, data) for name in named_alike("images", "lines")])
    two = packed(tmp_path / "two/images.tar", [(f"{i}.png", data) for i in range(3)])
    packed(two / "maps.tar", [(f"{i}.png", data) for i in range(3)])
    for folder in (one, two):
        assert [p.kind for p in read_listing(folder).problems if p.fatal] == ["unclear folders"]
        assert not read_listing(folder, {"image": "."}).problems
    apart = packed(tmp_path / "apart/0.tar", [(f"a/{i}.png", data) for i in range(9)])
    packed(apart / "1.tar", [(f"a/{i}.png", data) for i in range(9, 19)])
    assert not read_listing(apart).problems


def test_a_listing_that_names_hints_as_pictures_is_a_question_and_one_that_names_a_picture_twice_is_none(tmp_path):
    folder = laid(tmp_path / "set", *named_alike("A", "B"))
    names = [*named_alike("A"), *named_alike("A")]
    for listed, kinds in ((names, []), ([*names, *named_alike("B")], ["unclear folders"])):
        lines = (json.dumps({"file_name": name, "text": "x"}) + "\n" for name in listed)
        (folder / "metadata.jsonl").write_text("".join(lines))
        assert [p.kind for p in read_listing(folder).problems if p.fatal] == kinds
    assert not [p for p in read_listing(folder, {"image": "file_name"}).problems if p.fatal]


# --- what is no data ------------------------------------------------------------------------------------------


def left_out(folder, columns=None):
    return [problem for problem in read_listing(folder, columns).problems if problem.kind == "left out"]


def test_folders_that_were_written_here_are_left_out_and_named(tutorial, tmp_path):
    folder = laid(tmp_path / "set", "red apple.png", "blue car.png", "green hat.png")
    for name, command in (("run", "train"), ("deep/told", "data doctor"), ("made", "generate")):
        mark_output(folder / name, command)
        laid(folder / name, "samples/step-1.png", "sheet.png")
    list(make_fill50k(folder / "drawn", 3, SIDE))
    list(build_set(read_listing(folder), folder / "built", "paired", annotator("canny").spec()))
    assert len(FolderPairs(folder, SIDE)) == 3
    [problem] = left_out(folder)
    assert not problem.fatal and problem.where.endswith("set/built") and "and 4 more like it" in problem.words
    assert len(read_listing(folder / "drawn").rows) == len(read_listing(folder / "built").rows) == 3


@pytest.mark.parametrize(
    "name", [".ipynb_checkpoints/a-checkpoint.png", "._a.png", "__MACOSX/a.png", "b/.thumbnails/a.png", ".a.png.swp"]
)
def test_hidden_files_and_leftovers_are_left_out_of_every_layout(name, tutorial, tmp_path):
    data = (tutorial[0] / "target/0.png").read_bytes()
    for layout in ("ai-toolkit", "imagefolder", "prompt.json", "hints within"):
        folder = tmp_path / layout
        WRITERS[layout][1](folder, *tutorial)
        laid(folder, name)
        listing = read_listing(folder)
        assert len(listing.rows) == COUNT and [problem.kind for problem in listing.problems] == ["left out"]
        assert "hidden, or left by an operating system" in listing.problems[0].words
    shards = packed(tmp_path / "tar/0.tar", [("a.png", data), ("a.txt", b"x"), (name, data), (f"x/{name}", data)])
    (shards / "._0.tar").write_bytes(b"rubbish")
    assert len(read_listing(shards).rows) == 1 and "and 2 more like it" in left_out(shards)[0].words
    plain = laid(tmp_path / "plain", "Thumbs.db", "red hat.png", name)
    assert [row.prompt for row in read_listing(plain).rows] == ["red hat"]
    assert "and 1 more like it" in left_out(plain)[0].words


def test_every_ending_that_is_read_is_a_picture_and_others_are_counted(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    formats = {
        "jfif": "JPEG",
        "avif": "AVIF",
        "gif": "GIF",
        "bmp": "BMP",
        "tif": "TIFF",
        "jp2": "JPEG2000",
        "JPE": "JPEG",
    }
    for ending, format in formats.items():
        if format in Image.SAVE:
            Image.new("RGB", (8, 8), "red").save(folder / f"a {ending} hat.{ending}", format)
    for name in ("a.heic", "b.heic", "clip.mp4", "notes", "a gif hat.txt"):
        (folder / name).write_bytes(b"x")
    listing = read_listing(folder)
    assert len(listing.rows) == len(FolderPairs(folder, 8)) == len([f for f in formats.values() if f in Image.SAVE])
    assert {pair.picture.shape for pair in FolderPairs(folder, 8)} == {(8, 8, 3)}
    [problem] = left_out(folder)
    assert "(2 of .heic, 1 of .mp4, 1 of no ending)" in problem.words and not problem.fatal


# --- links ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["prompt.json", "imagefolder", "ai-toolkit", "plain"])
def test_links_to_files_and_folders_are_followed_wherever_they_lead(layout, tutorial, tmp_path):
    if layout == "plain":
        folder = laid(tmp_path / "plain", *named_alike("here"))
    else:
        folder = tmp_path / "set"
        WRITERS[layout][1](folder, *tutorial)
    sound = [(row.picture.read(), row.prompt) for row in read_listing(folder).rows]
    first = next(path for path in sorted(folder.rglob("*.png")) if "source" not in path.parts)
    (tmp_path / "away").mkdir()
    shutil.move(first, tmp_path / "away" / "kept.png")
    first.symlink_to(tmp_path / "away" / "kept.png")
    shutil.move(first.parent, tmp_path / "away" / "moved")
    first.parent.symlink_to(tmp_path / "away" / "moved")
    listing = read_listing(folder)
    assert not listing.problems and [(row.picture.read(), row.prompt) for row in listing.rows] == sound
    assert len(FolderPairs(folder, SIDE)) == len(sound)


def test_links_that_lead_nowhere_or_round_in_a_circle_are_left_out_and_told(tmp_path):
    folder = laid(tmp_path / "set", "red hat.png", "sub/blue car.png", "sub/green tree.png")
    (folder / "round").symlink_to(folder)
    (folder / "sub" / "up").symlink_to(folder / "sub")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "self.png").symlink_to(folder / "self.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.png")
    assert [row.prompt for row in read_listing(folder).rows] == ["red hat", "blue car", "green tree"]
    told = {problem.words for problem in left_out(folder)}
    assert any("a link to a folder that is read already; and 1 more" in words for words in told)
    assert any("no file that can be read" in words and "and 3 more like it" in words for words in told)


# --- texts and names of other machines ------------------------------------------------------------------------

MARKS = {"UTF-8": b"\xef\xbb\xbf", "UTF-16, little": b"\xff\xfe", "UTF-16, big": b"\xfe\xff"}


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize(
    ("name", "listing"),
    [("prompt.json", "prompt.json"), ("imagefolder", "train/metadata.jsonl"), ("DiffSynth", "train/metadata.csv"),
     ("DiffSynth, json", "train/metadata.json"), ("SimpleTuner", "multidatabackend.json"),
     ("ai-toolkit", "images/0.txt"), ("kohya", "image_dir/0.caption")],
)  # fmt: skip
def test_a_byte_order_mark_changes_nothing(mark, name, listing, tutorial, tmp_path):
    WRITERS[name][1](tmp_path / "set", *tutorial)
    sound = [(row.picture.name, row.prompt) for row in read_listing(tmp_path / "set").rows]
    path, coding = tmp_path / "set" / listing, {2: "utf-16-le" if mark.endswith("little") else "utf-16-be", 3: "utf-8"}
    path.write_bytes(MARKS[mark] + path.read_text().encode(coding[len(MARKS[mark])]))
    read = read_listing(tmp_path / "set")
    assert [(row.picture.name, row.prompt) for row in read.rows] == sound and not read.problems


def test_a_byte_order_mark_in_a_tar_changes_nothing(tutorial, tmp_path):
    data = (tutorial[0] / "target/0.png").read_bytes()
    members = [
        ("a.png", data),
        ("a.txt", b"\xef\xbb\xbfa hat"),
        ("b.png", data),
        ("b.json", b'\xef\xbb\xbf{"text": "a car"}'),
    ]
    assert [row.prompt for row in read_listing(packed(tmp_path / "set/0.tar", members)).rows] == ["a hat", "a car"]


@pytest.mark.parametrize("parted", [";", "\t"])
def test_a_table_whose_fields_are_parted_by_other_marks_is_read(parted, tutorial, tmp_path):
    folder = laid(tmp_path / "set", "a.png", "b.png")
    (folder / "metadata.csv").write_text(
        f'file_name{parted}text\r\na.png{parted}"a hat, red"\r\nb.png{parted}a car\r\n'
    )
    assert [row.prompt for row in read_listing(folder).rows] == ["a hat, red", "a car"]


@pytest.mark.parametrize("listing", ["prompt.json", "metadata.jsonl", "metadata.csv"])
def test_backslashes_of_listings_made_on_windows_part_folders(listing, tmp_path):
    folder = laid(tmp_path / "set", *named_alike("a/b", "c"))
    entries = [{"target": f"a\\b\\{i}.png", "source": f"c\\{i}.png", "prompt": "x"} for i in range(3)]
    if listing != "prompt.json":
        entries = [{"file_name": e["target"], "conditioning_image": e["source"], "text": "x"} for e in entries]
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    if listing.endswith("csv"):
        text = "\n".join(["file_name,conditioning_image,text", *(",".join(entry.values()) for entry in entries)])
    (folder / listing).write_text(text)
    read = read_listing(folder)
    assert not read.problems and [len(row.hints) for row in read.rows] == [1] * 3


def test_backslashes_of_a_list_of_backends_part_folders(tutorial, tmp_path):
    simpletuner(tmp_path / "set", *tutorial)
    path = tmp_path / "set" / "multidatabackend.json"
    listed = json.loads(path.read_text())
    for one in listed[:2]:
        (path.parent / "deep").mkdir(exist_ok=True)
        (path.parent / one["instance_data_dir"]).rename(path.parent / "deep" / one["instance_data_dir"])
        one["instance_data_dir"] = f"deep\\{one['instance_data_dir']}"
    path.write_text(json.dumps(listed))
    read = read_listing(tmp_path / "set")
    assert not [p for p in read.problems if p.fatal] and [len(row.hints) for row in read.rows] == [1] * COUNT


LONG = "x" * 300 + ".png"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a\0b.png", "missing file"), (LONG, "missing file"), ("a/" * 3000 + "b.png", "missing file"),
     ("C:\\data\\a.png", "missing file"), ("..\\..\\a.png", "path escapes"), ("a/../../set/../b.png", "path escapes"),
     ({"path": "a.png", "bytes": None}, "unreadable line"), (["a.png"], "unreadable line"), (7, "unreadable line")],
)  # fmt: skip
def test_what_names_no_file_in_a_listing_is_named_in_a_line(name, kind, tmp_path):
    folder = laid(tmp_path / "set", "a.png", "b.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name}))
    [problem] = [problem for problem in read_listing(folder).problems if problem.fatal]
    assert problem.kind == kind and len(str(problem)) < 600 and "\0" not in str(problem)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "conditioning_image": name}))
    [problem] = [problem for problem in read_listing(folder).problems if problem.fatal]
    assert problem.kind in (kind, "missing file") and len(str(problem)) < 600


def test_columns_of_bytes_and_of_structs_of_a_table_are_pictures(tutorial, tmp_path):
    """As other libraries write them, without the datasets library's notes on what they are."""
    pytest.importorskip("datasets")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    data = (tutorial[0] / "target/0.png").read_bytes()
    for name, column in (("structs", [{"bytes": data, "path": None}] * 3), ("bytes", [data] * 3)):
        (tmp_path / name).mkdir()
        parquet.write_table(pyarrow.table({"image": column, "text": ["a", "b", "c"]}), tmp_path / name / "a.parquet")
        assert [row.picture.read() for row in read_listing(tmp_path / name).rows] == [data] * 3
    (tmp_path / "other").mkdir()
    parquet.write_table(pyarrow.table({"image": [{"name": "a"}], "text": ["a"]}), tmp_path / "other" / "a.parquet")
    with pytest.raises(UserError, match="in its column image: expected pictures, or paths"):
        read_listing(tmp_path / "other")
    (tmp_path / "other" / "a.parquet").write_bytes(b"PAR1 rubbish")
    with pytest.raises(UserError, match="cannot be read as a data set"):
        read_listing(tmp_path / "other")


@pytest.mark.parametrize("caption", [{"en": "a hat"}, [{"en": "a hat"}], [["a hat"]], float("nan"), None])
def test_a_caption_that_is_no_text_is_none_and_counted(caption, tmp_path):
    folder = laid(tmp_path / "set", "a.png", "b.png")
    lines = [{"file_name": "a.png", "text": caption}, {"file_name": "b.png", "text": 7}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    listing = read_listing(folder)
    assert [row.prompt for row in listing.rows] == ["", "7"]
    report = add_up(listing, examine(listing))
    [note] = [problem for problem in report.problems if problem.kind == "no caption"]
    assert note.words == "1 of 2 pictures have none"


def test_half_a_letter_in_a_caption_is_left_out_of_it_and_told(tmp_path):
    folder = laid(tmp_path / "set", *named_alike("a", "b"))
    lines = [{"target": f"a/{i}.png", "source": f"b/{i}.png", "prompt": f"cat \ud83d {i}"} for i in range(3)]
    listed = [
        {"file_name": line["target"], "hint": line["source"], "text": [line["prompt"], "\udc00 cat  "]}
        for line in lines
    ]
    for listing, entries in (("prompt.json", lines), ("metadata.jsonl", listed)):
        (folder / "prompt.json").unlink(missing_ok=True)
        (folder / listing).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        read = read_listing(folder)
        assert {problem.kind for problem in read.problems} == {"half a letter"}
        assert all("cat " in row.prompt and row.prompt.isascii() for row in read.rows)
        FolderPairs(folder, 8).mix()
