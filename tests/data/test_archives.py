"""Tars of strangers: right ones as ``tarfile`` reads them, hostile ones in a sentence, and soon."""

import io
import os
import tarfile

import numpy as np
import pytest
from tests.limits import limited

from controlkit.data import read_listing
from controlkit.data.layouts.archives import _members
from controlkit.images import png_bytes

PICTURE = png_bytes(np.full((8, 8, 3), 99, np.uint8))


SIZE = b"%011o\0" % len(PICTURE)


def header(name="a.png", size=SIZE, kind=b"0", prefix=b""):
    """A header of ustar, its checksum right."""
    head = bytearray(512)
    head[:100] = name.encode("utf-8", "surrogateescape")[:100].ljust(100, b"\0")
    head[100:124], head[124:136] = b"0000644\0" + b"0000000\0" * 2, size.ljust(12, b"\0")
    head[156:157], head[257:265], head[345 : 345 + len(prefix)] = kind, b"ustar\x0000", prefix
    head[148:156] = b"%06o\0 " % (sum(head[:148]) + sum(head[156:]) + 8 * ord(" "))
    return bytes(head)


def filled(data):
    return data + bytes(-len(data) % 512)


MEMBER = header() + filled(PICTURE)
END = bytes(1024)


def further(kind, data, size=None):
    """A header that says more of the member behind it."""
    return header("x", b"%011o\0" % (len(data) if size is None else size), kind) + filled(data)


def listed(tmp_path, data, name="0.tar"):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_bytes(data)
    with limited():
        listing = read_listing(tmp_path / "set")
        for row in listing.rows:
            row.picture.read()
    return listing


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_right_tars_have_the_members_that_tarfile_finds(format):
    drawn = np.random.default_rng(format)
    parts = ["a", "画é", "b" * 60, "x" * 90, "..", ".", "\udcff"]
    for round_ in range(30):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
            for number in range(6):
                member = tarfile.TarInfo("/".join(drawn.choice(parts, drawn.integers(1, 4))) + f"/{number}.png")
                member.type = [*5 * [tarfile.REGTYPE], tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE][
                    drawn.integers(8)
                ]
                member.linkname = "q" * 150 * (member.type == tarfile.SYMTYPE and format != tarfile.USTAR_FORMAT)
                data = bytes(int(drawn.choice([0, 1, 511, 512, 513]))) if member.type == tarfile.REGTYPE else b""
                member.size = len(data)
                try:
                    archive.addfile(member, io.BytesIO(data))
                except ValueError:  # a name that ustar has no room for
                    continue
        buffer.seek(0)
        with tarfile.open(fileobj=buffer) as archive:
            theirs = [(m.name, m.type, m.offset_data, m.size) for m in archive]
        assert [(m.name, m.kind, m.offset, m.size) for m in _members(buffer)] == theirs, round_


@pytest.mark.parametrize("size", [b"\x80" + bytes(9) + len(PICTURE).to_bytes(2, "big"), b"%11o " % len(PICTURE)])
def test_sizes_in_bits_or_with_blanks_are_read(size, tmp_path):
    [row] = listed(tmp_path, header(size=size) + filled(PICTURE) + END).rows
    assert row.picture.read() == PICTURE


HOSTILE = {
    "a negative size in bits": header(size=b"\xff" * 12) + MEMBER,
    "a negative size in letters": header(size=b"-0000001000") + MEMBER,
    "a size of all that is": header(size=b"\x80" + b"\xff" * 11) + MEMBER,
    "a size beyond the file": header(size=b"77777777777\0") + MEMBER,
    "a size that is no number": header(size=b"0x10") + MEMBER,
    "a negative pax length": further(b"x", b"-19 path=b.png\n" * 9) + MEMBER,
    "a pax length of nothing": further(b"x", b"0 path=b.png\n") + MEMBER,
    "a pax length beyond its end": further(b"x", b"99999 path=b.png\n") + MEMBER,
    "a pax length of many digits": further(b"x", b"9" * 9999 + b" path=b.png\n") + MEMBER,
    "pax digits without an end": further(b"x", b"1" * 900_000) + MEMBER,
    "a pax size below nothing": further(b"x", b"13 size=-512\n") + MEMBER,
    "a pax record without a value": further(b"x", b"8 path\n\n") + MEMBER,
    "a pax header of a gigabyte": further(b"x", b"", 2**30) + MEMBER,
    "a pax header larger than names are": further(b"x", b"%d comment=" % 2**21 + bytes(2**21)) + MEMBER,
    "one size for all members": further(b"g", b"12 size=512\n") + MEMBER,
    "a pax name with a zero byte": further(b"x", b"14 path=a\0.png"[:13] + b"\n") + MEMBER,
    "a long name longer than the file": further(b"L", b"x", 2**40) + MEMBER,
    "a sparse member of GNU": header(kind=b"S") + filled(PICTURE) + MEMBER,
    "a sparse member in pax": further(b"x", b"22 GNU.sparse.major=1\n") + MEMBER,
    "a wrong checksum": MEMBER.replace(b"0000644", b"0000755") + MEMBER,
    "a checksum that is no number": MEMBER[:148] + b"xyzxyz\0 " + MEMBER[156:],
    "cut in a header": MEMBER + MEMBER[:300],
    "cut in a member": MEMBER[:-500],
    "no header": b"rubbish" * 99,
    "nothing": b"",
    "zeros": bytes(10240),
    "gzip": b"\x1f\x8b\x08" + bytes(600),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_tar_as_the_standard_has_it_is_told_in_a_sentence(name, tmp_path):
    fatal = [problem for problem in listed(tmp_path, HOSTILE[name]).problems if problem.fatal]
    assert fatal[0].kind == "unreadable file" and "is no whole tar file" in fatal[0].words
    assert len(str(fatal[0])) < 400


def test_headers_that_only_announce_others_end_soon(tmp_path):
    """``tarfile`` calls itself for each of them."""
    listing = listed(tmp_path, (further(b"L", b"b.png\0") + further(b"K", b"c\0")) * 4_000 + MEMBER + END)
    assert [row.picture.name.rpartition(":")[2] for row in listing.rows] == ["b.png"]


def test_many_pax_records_take_time_by_their_number(tmp_path):
    record = b"30 comment=" + b"x" * 18 + b"\n"
    listing = listed(tmp_path, (further(b"x", record * 10_000) + MEMBER) * 5 + END)
    assert len(listing.rows) == 1 and listing.rows[0].picture.read() == PICTURE


@pytest.mark.parametrize(
    "name",
    ["/etc/a.png", "../../a.png", "a/../../../b.png", "C:\\a.png", "a\n\x1b[2J.png", "\udcff\udcfe.png", "con.png"],
)
def test_names_of_members_lead_nowhere(name, tmp_path, monkeypatch):
    opened = []
    listing = listed(tmp_path, header(name) + filled(PICTURE) + END)
    monkeypatch.setattr(os, "open", lambda path, *_, real=os.open: opened.append(str(path)) or real(path, *_))
    assert [row.picture.read() for row in listing.rows] in ([PICTURE], [])  # what begins with a dot is left out
    assert set(opened) <= {str(tmp_path / "set" / "0.tar")}
    assert {path.name for path in tmp_path.rglob("*")} == {"set", "0.tar"}, "nothing is unpacked"


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"6", b"V"])
def test_links_devices_and_pipes_in_tars_are_left_out_and_told(kind, tmp_path):
    listing = listed(tmp_path, MEMBER + header("zero.png", b"00000000000\0", kind) + END)
    assert len(listing.rows) == 1 and "not read" in listing.problems[0].words


def test_a_member_larger_than_any_picture_is_not_read(tmp_path):
    (tmp_path / "set").mkdir()
    with (tmp_path / "set" / "0.tar").open("wb") as file:  # sparse: it takes no room
        size = 2**33 - 1
        for name in ("a.png", "a.txt"):
            file.write(header(name, b"%011o\0" % size))
            file.seek(size + 1, 1)
        file.write(END)
    with limited(growth=2**28):
        listing = read_listing(tmp_path / "set")
        with pytest.raises(OSError, match="more than"):
            listing.rows[0].picture.read()
    assert [problem.kind for problem in listing.problems] == ["unreadable caption"]
