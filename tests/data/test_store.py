"""The store: computed once on a machine, by what went in; safe between processes; what is damaged is made anew."""

import sqlite3
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import store_writer
import torch
from safetensors.torch import save
from store_writer import entries, write_many
from tests.limits import limited

from controlkit.annotators import all_kinds, annotator
from controlkit.data import CirclePairs, Pair, build_cache
from controlkit.data.cache import Cached
from controlkit.data.store import Store, _seal, key_of, remembered
from controlkit.train import train_control
from controlkit.train.recipe import parse_recipe

CANNY = {"": annotator("canny").spec()}


LIKE = {"value": ((8,), torch.float32)}


def values(store, keys):
    return [entry and entry["value"][0].item() for entry in store.get(list(keys), [LIKE] * len(keys))]


def test_an_entry_is_found_by_its_key_in_another_process_s_time(tmp_path):
    kept = entries(1200)
    with Store(tmp_path) as store:
        store.put(kept)
        store.put(
            {key_of("hints"): {"a": torch.zeros(100, 100), "b": torch.tensor([1], dtype=torch.uint16)}}, dense=False
        )
    with Store(tmp_path) as store:
        assert values(store, kept) == list(range(1200)), "more than one question may ask for"
        assert values(store, entries(2, 1199)) == [1199, None]
        like = {"a": ((100, 100), torch.float32), "b": ((1,), torch.uint16)}
        [entry] = store.get([key_of("hints")], [like])
        assert entry["a"].shape == (100, 100) and entry["b"].dtype == torch.uint16


def test_a_key_is_told_apart_by_every_part():
    picture = np.zeros((2, 3, 3), np.uint8)
    keys = [
        key_of("a", "bc"), key_of("ab", "c"), key_of("abc"), key_of("a", picture),
        key_of("a", picture.reshape(3, 2, 3)), key_of("a", picture.astype(np.uint16)),
        key_of("a", picture + np.uint8(1)), key_of("b", picture),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key_of("a", np.zeros((2, 6, 3), np.uint8)[:, ::2]) == key_of("a", picture), "whatever it is a view of"


def test_only_what_is_not_there_is_made(tmp_path):
    kept, asked = entries(4), []

    def make(absent):
        asked.append(absent)
        return [list(kept.values())[i] for i in absent]

    with Store(tmp_path) as store:
        store.put(dict(list(kept.items())[1:3]))
        for expected in ([0, 3], None):
            got = remembered(store, list(kept), [LIKE] * 4, make)
            assert [entry["value"][0] for entry in got] == [0, 1, 2, 3]
            assert asked == ([expected] if expected else [[0, 3]])
    assert [entry["value"][0] for entry in remembered(None, list(kept), [], make)] == [0, 1, 2, 3] and asked[-1] == [
        0,
        1,
        2,
        3,
    ]


def test_a_damaged_entry_is_as_good_as_absent_and_is_replaced(tmp_path):
    kept = entries(3)
    first, second, _ = kept
    with Store(tmp_path) as store:
        store.put(kept)
    with sqlite3.connect(tmp_path / "1.sqlite") as inside:
        inside.execute("UPDATE entries SET value = zeroblob(length(value)) WHERE key = ?", [first])
        inside.execute(
            "UPDATE entries SET value = (SELECT value FROM entries WHERE key = ?) WHERE key = ?", [first, second]
        )
    inside.close()
    with Store(tmp_path) as store:
        assert values(store, kept) == [None, None, 2]
        remembered(store, list(kept), [LIKE] * len(kept), lambda absent: [list(kept.values())[i] for i in absent])
        assert values(store, kept) == [0, 1, 2]


@pytest.mark.parametrize("harm", ["no database", "torn"])
def test_a_file_that_is_no_longer_a_database_is_left_for_a_new_one(harm, tmp_path):
    kept = entries(400)
    with Store(tmp_path) as store:
        store.put(kept)
    path = tmp_path / "1.sqlite"
    data = bytearray(path.read_bytes())
    data[:] = b"nonsense" * 1000 if harm == "no database" else data[:4096] + b"\xff" * (len(data) - 4096)
    path.write_bytes(data)
    with warnings.catch_warnings(), Store(tmp_path) as store, Store(tmp_path) as other:
        warnings.simplefilter("error")
        assert values(store, kept) == [None] * 400
        store.put(kept)
        assert values(store, kept) == values(other, kept) == list(range(400))
    assert [p.name for p in tmp_path.glob("*.sqlite")] == ["2.sqlite"]


def test_a_store_that_cannot_be_used_says_so_once_and_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    kept = entries(2)
    with pytest.warns(UserWarning, match="is not used .* computed anew") as said, Store(tmp_path / "file") as store:
        for _ in range(2):
            got = remembered(
                store, list(kept), [LIKE] * len(kept), lambda absent: [list(kept.values())[i] for i in absent]
            )
            assert len(got) == 2
    assert len(said) == 1


def test_several_processes_write_at_once_and_nothing_is_lost(tmp_path):
    other = subprocess.Popen([sys.executable, store_writer.__file__, tmp_path, "100"])
    while other.poll() is None:
        write_many(tmp_path, 0)
    assert other.returncode == 0
    with Store(tmp_path) as store:
        assert values(store, entries(300)) == list(range(300))


def foreign(folder, key, value):
    """Put bytes of anybody's into a store, sealed as they must be: the key is all that this takes."""
    with sqlite3.connect(folder / "1.sqlite") as inside:
        inside.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", [key, value, _seal(key, value)])
    inside.close()


RIGHT = torch.zeros(8)


def test_a_store_that_is_a_link_is_passed_over(tmp_path):
    (tmp_path / "mine").write_bytes(b"")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "1.sqlite").symlink_to(tmp_path / "mine")
    kept = entries(2)
    with Store(tmp_path / "store") as store:
        store.put(kept)
        assert values(store, kept) == [0, 1]
    assert (tmp_path / "mine").read_bytes() == b""


FOREIGN = {
    "another shape": zlib.compress(save({"value": torch.zeros(9)})),
    "another type": zlib.compress(save({"value": torch.zeros(8, dtype=torch.int32)})),
    "another name": zlib.compress(save({"valve": RIGHT})),
    "one more": zlib.compress(save({"value": RIGHT, "more": torch.ones(8)})),
    "none": zlib.compress(save({})),
    "no tensors": zlib.compress(b"rubbish" * 9),
    "not compressed": save({"value": RIGHT}),
    "cut": zlib.compress(save({"value": RIGHT}))[:-9],
    "a header of gigabytes": zlib.compress(b"\xff" * 7 + b"\x0f" + bytes(64)),
    "a text": "text",
    "nothing": None,
    "a number": 7,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_an_entry_that_is_not_what_was_asked_for_is_as_good_as_absent(name, tmp_path):
    [key] = kept = entries(1)
    with Store(tmp_path) as store:
        store.put(kept)
        value = FOREIGN[name]
        if isinstance(value, bytes):
            foreign(tmp_path, key, value)
        else:
            with sqlite3.connect(tmp_path / "1.sqlite") as inside:
                inside.execute("UPDATE entries SET value = ?", [value])
            inside.close()
        with limited(growth=2**26):
            assert values(store, kept) == [None]
            remembered(store, [key], [LIKE], lambda absent: [kept[key]])
            assert values(store, kept) == [0]


def test_an_entry_that_inflates_to_gigabytes_is_not_inflated(tmp_path):
    packer, mega = zlib.compressobj(1), bytes(2**20)
    value = b"".join(packer.compress(mega) for _ in range(48)) + packer.flush()
    [key] = kept = entries(1)
    with Store(tmp_path) as store:
        store.put(kept)
        for long in (value, save({"value": RIGHT}) + bytes(2**26)):  # the second is not even fetched
            foreign(tmp_path, key, long)
            with limited(growth=2**24):
                assert values(store, kept) == [None]


# --- what a run takes from it -------------------------------------------------------------------------------


@pytest.fixture
def counted(toy_base, monkeypatch):
    """What was encoded and annotated, counted."""
    counts = {"pictures": 0, "prompts": 0, "hints": 0}

    def watch(owner, name, kind, number):
        function = getattr(owner, name)

        def counting(*args, **kwargs):
            counts[kind] += number(*args)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    from controlkit.data import hints

    watch(toy_base, "encode_moments", "pictures", lambda pictures: len(pictures))
    watch(toy_base, "encode_text", "prompts", lambda prompts, size=None: len(prompts))
    watch(hints, "annotate_all", "hints", lambda pictures, contract: len(pictures))
    return counts


def plain(count):
    return [Pair(pair.picture, f"number {i % 3}") for i, pair in enumerate(CirclePairs(32, count))]


def test_a_second_run_on_the_same_pictures_computes_nothing(toy_base, counted, tmp_path):
    pairs = plain(6)
    with Store(tmp_path / "store") as store:
        [first] = build_cache(toy_base, pairs[:4], CANNY, tmp_path / "a", store=store)
        assert counted == {"pictures": 4, "prompts": 4, "hints": 4}
        [second] = build_cache(toy_base, pairs[::-1], CANNY, tmp_path / "b", store=store)
        assert counted == {"pictures": 6, "prompts": 4, "hints": 6}, "in any order, the new ones alone"
        [third] = build_cache(toy_base, pairs[:4], CANNY, tmp_path / "c", store=store)
        assert counted == {"pictures": 6, "prompts": 4, "hints": 6}
    for name in ("moments", "hints", "prompt_rows"):
        assert torch.equal(getattr(first, name), getattr(third, name)), name
    assert torch.equal(first.text.tokens, third.text.tokens) and len(Cached.read(tmp_path / "c")[0]) == 4
    assert torch.equal(second.hints.flip(0)[:4], first.hints)


def test_other_pixels_options_or_weights_are_other_entries(toy_base, counted, tmp_path, monkeypatch):
    pairs = plain(2)
    with Store(tmp_path / "store") as store:

        def build(name, pairs=pairs, contracts=CANNY):
            before = dict(counted)
            [cached] = build_cache(toy_base, pairs, contracts, tmp_path / name, store=store)
            return cached, {kind: counted[kind] - before[kind] for kind in counted}

        build("a")
        turned = [Pair(np.ascontiguousarray(pair.picture[::-1]), pair.prompt) for pair in pairs]
        assert build("b", turned)[1] == {"pictures": 2, "prompts": 0, "hints": 2}
        low = {"": annotator("canny").spec(low=10.0)}
        assert build("c", contracts=low)[1] == {"pictures": 0, "prompts": 0, "hints": 2}
        weight = toy_base.vae.encoder.conv_in.weight
        monkeypatch.setattr(weight, "data", weight.data * 2)
        assert build("d")[1] == {"pictures": 2, "prompts": 0, "hints": 0}
        weight = next(toy_base.towers[0].encoder.parameters())
        monkeypatch.setattr(weight, "data", weight.data * 2)
        assert build("e")[1] == {"pictures": 0, "prompts": 3, "hints": 0}
        monkeypatch.setattr("cv2.__version__", "another")
        assert build("f")[1] == {"pictures": 0, "prompts": 0, "hints": 2}, "another OpenCV, another hint"


def test_an_annotator_gives_the_same_hint_each_time():
    picture = CirclePairs(64, 1)[0].picture
    for kind in all_kinds():
        if kind.is_made_here and not kind.lack:  # its weights lie here
            assert np.array_equal(kind.make([picture]), kind.make([picture])), kind.name


def test_a_run_takes_from_the_store_and_keeps_what_it_began_with(toy_base, counted, tmp_path):
    recipe = parse_recipe({
        "data": {"source": "fill50k", "count": 4}, "steps": 2, "batch": 2, "checkpoint_every": 1,
        "evaluation": {"every": 2, "num": 2, "steps": 1},
    })  # fmt: skip
    first = [record.loss for record in train_control(recipe, tmp_path / "a", toy_base)]
    again = dict(counted)
    second = [record.loss for record in train_control(recipe, tmp_path / "b", toy_base)]
    assert counted["pictures"] == again["pictures"] + 2, "the two whose reconstruction is the ceiling"
    assert first == second
