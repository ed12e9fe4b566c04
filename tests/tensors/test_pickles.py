"""Torch pickles from strangers: one reading of each archive, nothing run or endless, and the numbers as stored."""

import io
import pickletools
import re
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from controlkit.errors import Invalid
from controlkit.tensors import open_tensors, pickles
from limits import limited

STATE = {"conv_in.weight": torch.arange(8.0).reshape(2, 4), "mid_block.norm1.bias": torch.ones(3)}
END, ENTRY, LOCAL = b"PK\5\6", b"PK\1\2", b"PK\3\4"


def saved(content=STATE, **options):
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def zipped(parts):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, data in parts:
            file.writestr(name, data)
    return stream.getvalue()


def parts_of(data):
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return [(name, file.read(name)) for name in file.namelist()]


def read(tmp_path, data):
    (tmp_path / "x.pth").write_bytes(data)
    with limited():
        return open_tensors(tmp_path / "x.pth").read()


def refused(tmp_path, data):
    with pytest.raises(Invalid) as error:
        read(tmp_path, data)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


def same(found, expected=STATE):
    return found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


# --- archives with two readings -----------------------------------------------------------------------------------

PLAIN = zipped(parts_of(saved()))
OTHER = zipped(parts_of(saved({"other": torch.zeros(4)})))


def put(data, place, form, *values):
    changed = bytearray(data)
    struct.pack_into(form, changed, place, *values)
    return bytes(changed)


def commented(data, comment):
    return put(data, len(data) - 2, "<H", len(comment)) + comment


def with_two_records(data, other, at=None):
    """The directory of one archive by the last record, that of another by the one in 64 bits, which others prefer.

    ``at``: where that one is said to be.
    """
    end, place = data[-22:], len(other)
    count, size, start = struct.unpack_from("<H2L", other, len(other) - 12)
    whole = other[:-22] + data[:-22]
    long = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
    at = len(whole) if at is None else at
    return whole + long + struct.pack("<4sLQL", b"PK\6\7", 0, at, 1) + put(end, 16, "<L", place)


def doubled(data):
    """The directory's first entry twice."""
    count, size, start = struct.unpack_from("<H2L", data, len(data) - 12)
    lengths = struct.unpack_from("<3H", data, start + 28)
    entry = data[start : start + 46 + sum(lengths)]
    end = struct.pack("<4s4H2LH", END, 0, 0, count + 1, count + 1, size + len(entry), start, 0)
    return data[:start] + entry + data[start:-22] + end


def renamed(data, old, new):
    """An entry's name in the directory alone."""
    at = data.index(old.encode(), data.index(ENTRY))
    return data[:at] + new.encode() + data[at + len(new) :]


def spaced(data):
    """Bytes that no entry holds, before the directory."""
    start = struct.unpack_from("<L", data, len(data) - 6)[0]
    return put(data[:start] + OTHER[:40] + data[start:], len(data) + 40 - 6, "<L", start + 40)


CONFUSED = {
    "an archive behind another": (OTHER + PLAIN, "lie side by side|does not end where"),
    "an archive in another's comment": (commented(PLAIN, OTHER), "does not end where"),
    "an end in the comment": (commented(PLAIN, PLAIN[-22:]), "does not end where|side by side"),
    "two records of the directory": (with_two_records(PLAIN, OTHER), "two records"),
    "a record beyond all files": (with_two_records(PLAIN, OTHER, 2**63), "two records"),
    "a record elsewhere": (with_two_records(PLAIN, OTHER, 30), "two records"),
    "one entry twice": (doubled(PLAIN), "side by side"),
    "two entries of one name": (None, "two have one name"),
    "another name in the directory": (renamed(PLAIN, "archive/version", "archive/verzion"), "another header"),
    "another size in the entry's header": (put(PLAIN, 22, "<L", 4), "other sizes"),
    "another checksum in the entry's header": (put(PLAIN, 14, "<L", 4), "other sizes"),
    "an entry beyond the file": (put(PLAIN, PLAIN.index(ENTRY) + 20, "<2L", 2**30, 2**30), "other sizes|overlap|cut"),
    "bytes that no entry holds": (spaced(PLAIN), "side by side|holds more"),
    "bytes behind the end": (PLAIN + b"\0", "no directory"),
    "bytes before the beginning": (put(PLAIN[:30] + PLAIN, 0, "<4s", LOCAL), "does not end|side by side"),
    "an encrypted entry": (put(PLAIN, PLAIN.index(ENTRY) + 8, "<H", 1), "side by side"),
    "fewer entries than there are": (put(PLAIN, len(PLAIN) - 14, "<2H", 1, 1), "does not end|holds more"),
    "more entries than there are": (put(PLAIN, len(PLAIN) - 14, "<2H", 999, 999), "cut|side by side"),
    "a directory without end": (put(PLAIN, len(PLAIN) - 10, "<2L", 2**31, 0), "does not end"),
    "an end alone": (LOCAL + bytes(40) + PLAIN[-22:], "does not end"),
    "a beginning alone": (LOCAL, "no directory|cut"),
    "two pickles": (zipped([*parts_of(saved()), ("other/data.pkl", b"\x80\x02}.")]), "several pickles"),
}


@pytest.mark.parametrize("name", CONFUSED)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_that_can_be_read_in_two_ways_is_refused(tmp_path, name):
    data, words = CONFUSED[name]
    if data is None:
        data = zipped([*parts_of(saved()), ("archive/data.pkl", b"\x80\x02}.")])
    assert re.search(words, refused(tmp_path, data))


def test_a_pickle_with_another_checksum_is_refused(tmp_path):
    assert "another checksum" in refused(tmp_path, saved().replace(b"conv_in.weight", b"conv_on.weight"))


def test_what_is_run_is_what_was_checked_even_if_the_file_changes_meanwhile(tmp_path, monkeypatch):
    path, data = tmp_path / "x.pth", saved()
    path.write_bytes(data)
    works = pickletools.genops

    def changed_under_it(code):
        path.write_bytes(
            data.replace(b"_rebuild_tensor_v2", b"_rebuild_qtensor_x")
        )  # into the very file that is mapped
        return works(code)

    monkeypatch.setattr(pickles.pickletools, "genops", changed_under_it)
    assert same(open_tensors(path).read())


def test_nothing_done_to_the_tensors_reaches_the_file(tmp_path):
    read(tmp_path, saved())["conv_in.weight"].zero_()
    assert same(open_tensors(tmp_path / "x.pth").read())


# --- pickles without end ------------------------------------------------------------------------------------------


def held(code, data=bytes(64)):
    return zipped([("archive/data.pkl", code), ("archive/byteorder", b"little"), ("archive/data/0", data)])


TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\n%s\nX\1\0\0\0%sX\3\0\0\0cpuJ%stQJ%s(%st(%st\x89}tR"
)


def tensor(kind="FloatStorage", key="0", count=16, offset=0, shape=(4,), stride=(1,)):
    numbers = [
        b"".join(b"\x8a\x09" + one.to_bytes(9, "little", signed=True) for one in many) for many in (shape, stride)
    ]
    place = [struct.pack("<i", one) for one in (count, offset)]
    return TENSOR % (kind.encode(), key.encode(), *place, *numbers)


def named(*values):
    """A dictionary of these values, as a pickle."""
    return b"\x80\x02}(" + b"".join(b"X\1\0\0\0" + bytes([97 + i]) + value for i, value in enumerate(values)) + b"u."


ENDLESS = {
    "two gigabytes at once": named(b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R"),
    "a number of a million digits": named(b"\x8b" + struct.pack("<i", 2**20) + b"\1" * 2**20),
    "a number of 72 bits": named(b"\x8a\x09" + b"\1" * 9),
    "a number in letters": named(b"I" + b"9" * 100_000 + b"\n"),
    "a float in letters": named(b"F" + b"9" * 100_000 + b"\n"),
    "a string longer than the file": named(b"X\xff\xff\xff\x7fab"),
    "bytes longer than any file": named(b"\x8e" + b"\xff" * 7 + b"\x7fab"),
    "an array of bytes": named(b"\x96" + bytes(8)),
    "lists in lists": b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
    "tuples in tuples": b"\x80\x02)" + b"\x85" * 100_000 + b".",
    "dictionaries in dictionaries": b"\x80\x02" + b"}K\1" * 20_000 + b"}" + b"s" * 20_000 + b".",
    "each tuple twice in the next, as a key": b"\x80\x02})" + b"2\x86" * 5000 + b"K\1s.",
    "each tuple twice in the next, of a memory": b"\x80\x02})q\0" + b"h\0h\0\x86q\0" * 5000 + b"K\1s.",
    "marks alone": b"\x80\x02" + b"(" * 100_000 + b".",
    "a list that holds itself, as a key": b"\x80\x02}]q\0h\0aK\1s.",
    "memory far out": b"\x80\x02}r\xff\xff\xff\xffj\xff\xff\xff\xff0" + b"K\1" * 10 + b".",
    "no step of a pickle": b"\x80\x02\xff.",
    "two values": b"\x80\x02}}.",
}
WRONG = {
    "a tensor of a tensor": named(b"ctorch._utils\n_rebuild_tensor_v2\n(" + tensor() + b"K\0K\4\x85K\1\x85\x89}tR"),
    "one storage as two kinds of numbers": named(tensor(), tensor("IntStorage")),
    "one storage of two lengths": named(tensor(), tensor(count=8)),
    "a storage of nothing known": named(tensor("QInt8Storage")),
    "a storage that no entry holds": named(tensor(key="7")),
    "a storage of more than its entry": named(tensor(count=17)),
    "a storage of less than nothing": named(tensor(count=-1)),
    "a size below zero": named(tensor(shape=(-1,))),
    "a step backwards": named(tensor(stride=(-1,), offset=8)),
    "a step of no width": named(tensor(shape=(1000,), stride=(0,))),
    "a place before its storage": named(tensor(offset=-1)),
    "a place beyond its storage": named(tensor(offset=13)),
    "sizes whose product has no end": named(tensor(shape=(2**47, 2**47, 2**47), stride=(0, 0, 0))),
    "a size of 72 bits": named(tensor(shape=(2**70,))),
    "more steps than sizes": named(tensor(stride=(1, 1))),
    "nine dimensions": named(tensor(shape=(1,) * 9, stride=(1,) * 9)),
    "a parameter of none": named(b"ctorch._utils\n_rebuild_parameter\nN\x89}\x87R"),
    "a tensor without a place": named(b"ctorch._utils\n_rebuild_tensor_v2\n)R"),
    "a state for a tensor": named(tensor() + b"}b"),
    "a list filled like a dictionary": named(b"]K\1K\1s"),
}


@pytest.mark.parametrize("code", (ENDLESS | WRONG).values(), ids=ENDLESS | WRONG)
def test_a_pickle_of_no_weights_is_refused_at_once(tmp_path, code):
    refused(tmp_path, held(code))


def test_the_pickles_above_would_be_read_were_they_right(tmp_path):
    numbers = torch.arange(16.0)
    found = read(
        tmp_path, held(named(tensor(), tensor(offset=12), tensor(shape=(2, 2), stride=(1, 4))), numbers.numpy())
    )
    assert same(found, {"a": numbers[:4], "b": numbers[12:], "c": torch.tensor([[0.0, 4.0], [1.0, 5.0]])})


NO_TENSORS = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed": lambda: torch.eye(3).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "of no numbers": lambda: torch.ones(3, device="meta"),
    "negated": lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
    "conjugate": lambda: torch.ones(3, dtype=torch.complex64).conj(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", NO_TENSORS.values(), ids=NO_TENSORS)
def test_tensors_that_are_no_plain_numbers_are_refused(tmp_path, make):
    refused(tmp_path, saved({**STATE, "x": make()}))


def test_many_names_of_one_tensor_are_read_up_to_a_few_times_the_file(tmp_path):
    shared = torch.arange(1000.0)
    assert same(read(tmp_path, saved({"a": shared, "b": shared})), {"a": shared, "b": shared})
    assert "many times what the file holds" in refused(tmp_path, saved({f"n{i}": shared for i in range(500)}))


# --- right files --------------------------------------------------------------------------------------------------

KINDS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8]
KINDS += [torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_numbers_of_each_kind_are_as_they_were_saved(tmp_path, dtype):
    numbers = (torch.arange(24) % 5).to(dtype)
    made = {
        "a": numbers,
        "b": numbers.view(4, 6).T,
        "c": numbers[3:],
        "d": numbers[0],
        "e": numbers[:0],
        "f": numbers[::2],
    }
    found = read(tmp_path, saved(made))
    assert same(found, made) and {one.dtype for one in found.values()} == {dtype}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_each_protocol_of_pickles_is_read(tmp_path, protocol):
    made = OrderedDict((name, torch.nn.Parameter(value)) for name, value in STATE.items())
    assert same(read(tmp_path, saved({"state_dict": made, "epoch": 3, "best": -1.5}, pickle_protocol=protocol)))


@pytest.mark.parametrize("order", ["little", "big"])
def test_a_file_of_either_byte_order_is_read_as_the_same_numbers(tmp_path, order):
    numbers = torch.arange(16.0)
    data = numbers.numpy().astype(">f4" if order == "big" else "<f4").tobytes()
    parts = dict(parts_of(held(named(tensor(shape=(16,))), data)))
    assert same(read(tmp_path, zipped((parts | {"archive/byteorder": order.encode()}).items())), {"a": numbers})
    parts["archive/byteorder"] = b"none"
    assert "byte order" in refused(tmp_path, zipped(parts.items()))


@pytest.mark.parametrize("shift", range(4))
def test_numbers_that_begin_anywhere_in_the_file_are_read(tmp_path, shift):
    """Packed anew by other programs, entries do not begin where their numbers could be mapped."""
    parts = parts_of(saved())
    assert same(read(tmp_path, zipped([("archive/" + "x" * (1 + shift), b""), *parts])))


def test_numbers_that_were_on_a_gpu_are_read_as_they_are(tmp_path):
    parts = [(name, data.replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:0")) for name, data in parts_of(saved())]
    assert same(read(tmp_path, zipped(parts)))


def test_an_archive_written_as_a_stream_is_read(tmp_path):
    """Its headers come before their sizes are known, as torch writes them, too."""

    class Stream(io.RawIOBase):
        def __init__(self):
            self.data = b""

        def writable(self):
            return True

        def write(self, more):
            self.data += bytes(more)
            return len(more)

    stream = Stream()
    with zipfile.ZipFile(stream, "w") as file:
        for name, data in parts_of(saved()):
            file.writestr(name, data)
    assert same(read(tmp_path, stream.data))


def test_numbers_are_mapped_and_not_copied(tmp_path):
    made = {f"w{i}": torch.full((2**20,), float(i)) for i in range(8)}
    (tmp_path / "x.pth").write_bytes(saved(made))
    found = open_tensors(tmp_path / "x.pth").read()
    if sys.platform == "linux":
        maps = Path("/proc/self/smaps").read_text().split("VmFlags")
        [lines] = [one for one in maps if str(tmp_path / "x.pth") in one]
        assert int(lines.split("Anonymous:")[1].split()[0]) < 100  # kB of 32 MB
    assert same(found, made)
