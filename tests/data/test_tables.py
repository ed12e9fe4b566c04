"""Tables of strangers: what stands for more than it is, names other files or is of odd types is refused."""

import json
import os
import pickle
import struct
import time

import numpy as np
import pytest
from tests.limits import limited

from controlkit.data import read_listing
from controlkit.data.layouts.cells import Table
from controlkit.errors import Invalid, UserError
from controlkit.images import png_bytes

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
PICTURES = [png_bytes(np.full((8, 8, 3), shade, np.uint8)) for shade in range(40)]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def pictures(cells):
    return pa.array(cells, IMAGE)


def kept(folder, columns, **how):
    """A folder with a parquet file of these columns."""
    folder.mkdir(exist_ok=True)
    parquet.write_table(pa.table(columns), folder / "train.parquet", **how)
    return folder


def saved(folder, columns, options=None, **state):
    """A folder as the datasets library saves it."""
    folder.mkdir(exist_ok=True)
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    with pa.ipc.new_stream(folder / "data.arrow", table.schema, options=options) as writer:
        writer.write_table(table)
    facts = {"_data_files": [{"filename": "data.arrow"}], "_fingerprint": "0"} | state
    (folder / "state.json").write_text(json.dumps(facts))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def read(folder, growth=2**29):
    """All that a listing's pictures are, under a limit."""
    with limited(growth=growth):
        listing = read_listing(folder)
        contents = [row.picture.read() for row in listing.rows]
    return listing, contents


# --- right tables, whatever the order of reading --------------------------------------------------------------

WAYS = {
    "one group": {},
    "groups": {"row_group_size": 7},
    "small pages": {"data_page_size": 64, "write_batch_size": 3},
    "no dictionary": {"use_dictionary": False, "data_page_version": "2.0"},
    "zstd": {"compression": "zstd", "row_group_size": 13},
    "no statistics": {"write_statistics": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_cells_are_the_same_in_every_order_and_process(way, tmp_path):
    cells = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(PICTURES)]
    hints = PICTURES[::-1]
    texts = [None if i % 9 == 4 else f"a picture {i % 5}" for i in range(40)]
    columns = {"image": pictures(cells), "text": texts, "control_x": hints, "more": [["a", "b"], None] * 20}
    listing = read_listing(kept(tmp_path / "set", columns, **WAYS[way]))
    rows = pickle.loads(pickle.dumps(listing.rows))
    assert [row.prompt for row in listing.rows] == [text or "" for text in texts] and not listing.problems
    for i in [*range(40), *np.random.default_rng(0).permutation(40), *range(39, -1, -1)]:
        for row in (listing.rows[i], rows[i]):
            assert (row.picture.read(), row.hints[0].read()) == (PICTURES[i], hints[i])
    assert listing.rows[3].picture.name == f"{tmp_path / 'set'}, row 3, image", "by which a run knows its rows"
    said = read_listing(tmp_path / "set", {"caption": "more"}).rows
    assert {row.prompt for row in said} == {"a", "b", ""}


@pytest.mark.parametrize("way", ["statistics", "no statistics"])
def test_which_cells_have_bytes_is_known_with_statistics_and_without(way, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "b.png").write_bytes(PICTURES[1])
    cells = [
        {"bytes": PICTURES[0], "path": "b.png"},
        {"bytes": None, "path": "b.png"},
        None,
        {"bytes": None, "path": None},
    ]
    folder = kept(tmp_path / "set", {"image": pictures(cells)}, write_statistics=way == "statistics")
    again = saved(tmp_path / "saved", {"image": pictures(cells)})
    (again / "b.png").write_bytes(PICTURES[1])
    for place in (folder, again):
        listing, contents = read(place)
        assert contents == [PICTURES[0], PICTURES[1], b""]
        assert [(p.kind, "row 2" in p.where) for p in listing.problems] == [("missing file", True)]


def test_a_set_saved_in_splits_is_read_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    for name in ("test", "train"):
        saved(tmp_path / name, {"image": pictures([{"bytes": PICTURES[len(name)], "path": None}])})
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    (tmp_path / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert read(tmp_path)[1] == [PICTURES[5]] and not (tmp_path / "ran").exists()


# --- what stands for more than it is --------------------------------------------------------------------------


def test_a_value_that_is_counted_a_thousand_times_is_read_once_at_a_time(tmp_path, monkeypatch):
    """A file of a kilobyte whose cells are 200 MB together; a copy of them was written into the cache, once."""
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path / "cache"))
    cells = pictures([{"bytes": b"x" * 1_000_000, "path": None}] * 200)
    folder = kept(tmp_path / "set", {"image": cells, "text": ["a"] * 200}, compression="zstd")
    del cells
    assert (folder / "train.parquet").stat().st_size < 1200
    with limited(growth=2**28):
        listing = read_listing(folder)
        assert {len(row.picture.read()) for row in (*listing.rows[:20], listing.rows[-1])} == {1_000_000}
    assert not (tmp_path / "cache").exists()


def test_a_page_of_next_to_nothing_may_not_stand_for_many_megabytes(tmp_path):
    folder = kept(tmp_path / "set", {"image": [b"x" * 70_000_000, b"y"]}, compression="zstd", use_dictionary=False)
    listing = read_listing(folder)
    with limited(growth=2**26), pytest.raises(OSError, match=r"a page of .* bytes stands for 70,"):
        listing.rows[0].picture.read()
    listing = kept(tmp_path / "text", {"image": [b"x"] * 2, "text": ["x" * 70_000_000, "y"]}, compression="zstd")
    with limited(growth=2**26), pytest.raises(Invalid, match=r"cannot be read as a data set \(a page of"):
        read_listing(listing)


def test_many_pages_of_little_may_not_stand_for_gigabytes_together(tmp_path):
    texts = [f"{i}" + "x" * 2_000_000 for i in range(80)]
    folder = kept(tmp_path / "set", {"image": [b"x"] * 80, "text": texts}, compression="zstd", use_dictionary=False)
    del texts
    with limited(growth=2**28), pytest.raises(Invalid, match=r"a page of|a caption has"):
        read_listing(folder)


def test_rows_without_bytes_are_not_counted_out(tmp_path):
    folder = kept(
        tmp_path / "set", {"image": pa.nulls(3_000_000, pa.string()), "text": pa.nulls(3_000_000, pa.string())}
    )
    with limited(growth=2**27), pytest.raises(Invalid, match="says that it has 3,000,000 rows"):
        read_listing(folder)
    folder = saved(tmp_path / "saved", {"image": pa.nulls(3_000_000), "text": pa.nulls(3_000_000)})
    with limited(growth=2**27), pytest.raises(Invalid, match="more rows than a quarter of its bytes"):
        read_listing(folder)


def test_values_written_as_the_one_before_are_refused(tmp_path):
    how = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY", "image": "PLAIN"}}
    folder = kept(tmp_path / "set", {"image": [b"x"] * 60, "text": ["y" * 900_000] * 60}, **how)
    with limited(growth=2**26), pytest.raises(Invalid, match="write plain or dictionary pages"):
        read_listing(folder)


def test_captions_of_lists_are_not_written_out(tmp_path):
    counted = pa.DictionaryArray.from_arrays(np.zeros(90 * 900, np.int32), ["z" * 900_000])
    lists = pa.ListArray.from_arrays(np.arange(0, 91 * 900, 900, np.int32), counted)
    columns = {"image": [b"%0999d" % i for i in range(90)], "text": lists}
    folder = kept(tmp_path / "set", columns, compression="zstd", store_schema=False)
    with limited(growth=2**28):
        assert {len(row.prompt) for row in read_listing(folder).rows} == {900_000}


def test_buffers_that_would_be_decompressed_are_refused(tmp_path):
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    folder = saved(tmp_path / "set", {"image": [b"x" * 70_000_000], "text": ["a"]}, options)
    with limited(growth=2**26), pytest.raises(Invalid, match="it is compressed"):
        read_listing(folder)


@pytest.mark.parametrize("length", [2**31 - 1, 2**40, 2**62, -1, 0])
def test_lengths_that_an_arrow_file_claims_are_not_believed(length, tmp_path):
    folder = saved(tmp_path / "set", {"image": [b"x" * 5000], "text": ["a"]})
    whole = (folder / "data.arrow").read_bytes()
    body = struct.pack("<q", next(n for n in range(5000, 6000, 8) if whole.count(struct.pack("<q", n))))
    for before, after in ((body, struct.pack("<q", length)), (struct.pack("<q", 5000), struct.pack("<q", length))):
        (folder / "data.arrow").write_bytes(whole.replace(before, after))
        try:
            _, contents = read(folder, 2**26)
            assert contents in ([b"x" * 5000], [b""])
        except (UserError, OSError) as error:
            assert len(str(error)) < 500


def test_a_table_of_thousands_of_columns_is_refused(tmp_path):
    folder = kept(tmp_path / "set", {"image": [b"x"]} | {f"c{i}": [1] for i in range(1200)})
    with limited(), pytest.raises(Invalid, match="it has 1,201 columns: more than 1,000") as error:
        read_listing(folder)
    assert len(str(error.value)) < 400
    list(kept(tmp_path / "few", {f"c{i}": [1] for i in range(900)}).iterdir())
    with pytest.raises(Invalid, match="none of image") as error:
        read_listing(tmp_path / "few")
    assert len(str(error.value)) < 600


# --- what is of odd types -------------------------------------------------------------------------------------


def nested(depth):
    kind = pa.string()
    for _ in range(depth):
        kind = pa.list_(kind)
    return kind


ODD = {
    "structs of other names": pa.array([{"name": "a"}]),
    "structs of other types": pa.array([{"bytes": 7, "path": "a"}]),
    "paths that are bytes": pa.array([{"bytes": b"x", "path": b"a"}]),
    "lists of pictures": pa.array([[b"x"]]),
    "lists in 90 levels": pa.nulls(1, nested(90)),
    "categories": pa.array(["a.png"]).dictionary_encode(),
    "numbers": pa.array([1.5]),
    "moments": pa.array([0], pa.timestamp("ns", "Nowhere/Else")),
    "nothing": pa.nulls(1),
    "maps": pa.array([[("a", b"x")]], pa.map_(pa.string(), pa.binary())),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("column", ["image", "text"])
def test_columns_of_odd_types_are_refused_or_read_in_a_sentence(odd, column, tmp_path):
    columns = {"image": pa.array([PICTURES[0]]), "text": pa.array(["a"])} | {column: ODD[odd]}
    for folder in (kept, saved):
        try:
            table = folder(tmp_path / folder.__name__, columns)
        except pa.ArrowException:  # a type that such files have not
            continue
        with limited():
            try:
                listing = read_listing(table)
                assert column == "text" and odd in ("categories", "numbers", "moments", "nothing")
                assert len(listing.rows) == 1
            except Invalid as error:
                assert f"in its column {column}: expected" in str(error) or "cannot be read" in str(error)
                assert len(str(error)) < 400


def test_files_of_a_table_have_one_type_of_column(tmp_path):
    kept(tmp_path / "set", {"image": [PICTURES[0]]})
    parquet.write_table(pa.table({"image": [7]}), tmp_path / "set" / "more.parquet")
    with pytest.raises(Invalid, match="has other columns image in other files"):
        read_listing(tmp_path / "set")


# --- what names other files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["/dev/zero", "/etc/passwd", "../x.png", "out.png", "round.png", "pipe.png", "under", "https://a.b/c.png",
             "\0", "deep/../../x.png"]
)  # fmt: skip
@pytest.mark.parametrize("column", ["paths", "structs"])
def test_paths_in_a_table_lead_to_files_of_its_folder_alone(name, column, tmp_path):
    folder = tmp_path / "set"
    (folder / "under").mkdir(parents=True)
    (tmp_path / "x.png").write_bytes(PICTURES[0])
    (folder / "in.png").write_bytes(PICTURES[1])
    (folder / "out.png").symlink_to(tmp_path / "x.png")
    (folder / "round.png").symlink_to("round.png")
    os.mkfifo(folder / "pipe.png")
    names = [name, "in.png"]
    cells = names if column == "paths" else pictures([{"bytes": None, "path": one} for one in names])
    listing, contents = read(kept(folder, {"image": cells}))
    assert contents == [PICTURES[1]]
    [problem] = [problem for problem in listing.problems if problem.fatal]
    assert problem.kind in ("path escapes", "missing file") and len(str(problem)) < 500


STATES = {
    "a path up": {"_data_files": [{"filename": "../other/data.arrow"}]},
    "a path from the root": {"_data_files": [{"filename": "{other}"}]},
    "a link out": {"_data_files": [{"filename": "link.arrow"}]},
    "a device": {"_data_files": [{"filename": "/dev/zero"}]},
    "a pipe": {"_data_files": [{"filename": "pipe"}]},
    "no name": {"_data_files": [{}]},
    "a number": {"_data_files": [{"filename": 7}]},
    "a zero byte": {"_data_files": [{"filename": "a\0b"}]},
    "a long name": {"_data_files": [{"filename": "a" * 10_000}]},
    "no list": {"_data_files": 7},
    "nothing": {"_data_files": []},
    "one file many times": {"_data_files": [{"filename": "data.arrow"}] * 3000},
    "a text": {"_data_files": "data.arrow"},
    "a list": [1],
    "levels": "levels",
}


@pytest.mark.parametrize("name", STATES)
def test_what_a_saved_set_says_of_its_files_leads_nowhere_else(name, tmp_path):
    other = saved(tmp_path / "other", {"image": [PICTURES[0]]}) / "data.arrow"
    folder = saved(tmp_path / "set", {"image": [PICTURES[1]]})
    (folder / "link.arrow").symlink_to(other)
    os.mkfifo(folder / "pipe")
    said = json.dumps(STATES[name]).replace("{other}", str(other))
    (folder / "state.json").write_text("[" * 100_000 if name == "levels" else said)
    with limited(), pytest.raises(Invalid) as error:
        read_listing(folder)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("splits", [["../other"], ["/etc"], [], [7], "train", {"train": 1}, ["gone"], ["."], [".."]])
def test_splits_of_a_saved_set_lead_nowhere_else(splits, tmp_path):
    saved(tmp_path / "other", {"image": [PICTURES[0]]})
    folder = saved(tmp_path / "set", {"image": [PICTURES[1]]})
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    with limited():
        try:
            assert read(folder)[1] == [PICTURES[1]]
        except Invalid as error:
            assert len(str(error)) < 500


# --- what is damaged ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "dictionary", "arrow"])
def test_a_damaged_table_is_told_in_a_sentence(kind, tmp_path):
    cells = [{"bytes": data, "path": None} for data in PICTURES[:12]]
    columns = {"image": pictures(cells), "text": pa.array(["a", "b"] * 6), "hint": pa.array(PICTURES[:12])}
    if kind == "arrow":
        path = saved(tmp_path / "set", columns) / "data.arrow"
    else:
        how = {"use_dictionary": kind == "dictionary", "compression": "snappy", "row_group_size": 5}
        path = kept(tmp_path / "set", columns, **how) / "train.parquet"
    whole, drawn = path.read_bytes(), np.random.default_rng(0)
    started = time.process_time()
    for round_ in range(100):
        data = bytearray(whole)
        for place in drawn.integers(0, len(data), drawn.integers(1, 6)):
            data[place] = drawn.integers(256)
        if not round_ % 10:
            del data[drawn.integers(len(data)) :]
        path.unlink()  # a file that is mapped is not changed under its reader
        path.write_bytes(data)
        try:
            for row in read_listing(path.parent).rows:
                for held in (row.picture, *row.hints):
                    assert len(held.read()) < 10_000
        except (UserError, OSError) as error:
            assert len(str(error)) < 600
    assert time.process_time() - started < 60


def test_a_table_without_rows_has_none(tmp_path):
    folder = kept(tmp_path / "set", {"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())})
    assert read(folder)[0].rows == []
    assert len(Table([folder / "train.parquet"], "set")) == 0
