"""Right files made wrong: bytes, and fields, nodes and members where a format has them, its checksums put right."""

import csv
import io
import json
import pickletools
import re
import sqlite3
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from hashlib import blake2b
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

OUTSIDE = "outside"
"""A folder beside the cases' folders, with files of each kind that no reader may open."""

SIZES = [0, 1, 2, 3, 7, 127, 128, 255, 256, 4097, 13376, 32767, 32768, 65500, 65535, 2**20, 2**24, 2**31 - 1, 2**31]
SIZES += [2**32 - 1, 2**32, 2**40, 2**48, 2**63 - 1, 2**63, 2**64 - 1]

ELSEWHERE = ("photo.png", "control.safetensors", "base", "set", "words.txt", "table.parquet", "config.json")
PATHS = [f"{up}{OUTSIDE}/{name}" for up in ("../", "../../", "../../../") for name in ELSEWHERE]
PATHS += ["/dev/zero", "/dev/stdin", "/proc/self/environ", "/etc/passwd", "/", "..", ".", "", "~", "~root/x", "a\0b"]
PATHS += [
    "owner/name",
    "https://127.0.0.1:9/x.png",
    "file:///etc/passwd",
    "hf://datasets/owner/name/x.parquet",
    "x" * 300,
]
PATHS += ["a/" * 2000, "\ud800", "CON", "*", "x\ny", "C:\\x"]

WORDS = [
    "\x1b]0;title\x07",
    "\x1b[2J\x1b[31mred",
    "[bold]x[/bold][link=file:///etc/passwd]y",
    "[/]",
    "\r\n",
    "‮right",
    "\u2028",
]
WORDS += [
    "{}",
    "%s%n",
    "{0.__class__}",
    "<script>alert(1)</script>",
    "a" * 100_000,
    "\t",
    "'\"",
    "float16",
    "cuda",
    "🤖" * 50,
]

NUMBERS = [0, -1, 1, 2, 1e-320, 0.5, -0.0, 10**5, 10**6, 10**9, 2 * 10**8, 2**31, 2**53, 2**63, 2**64, 1e300, 10**400]
RAW = [
    "[" * 100_000,
    '{"a":' * 50_000,
    "[" * 500 + "]" * 500,
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    "9" * 5000,
    "1" * 100_000,
]
RAW += [
    '"\\ud800"',
    '"\\u0000"',
    "tru",
    "0x10",
    "'x'",
    '{"a":1,"a":2}',
    "[" + "0," * 20_000 + "0]",
    "\x00",
    "//",
    '"\\x"',
]
RAW_YAML = [
    "*a",
    "&a [*a]",
    "&a {<<: *a}",
    "!!python/object/apply:os.system ['touch /tmp/x']",
    "!!python/name:os.system",
]
RAW_YAML += [
    "!!binary aGk=",
    "!!set {a, b}",
    "2001-99-99",
    "190:20:30:40",
    "0b1",
    "? [a, b]",
    "!!float x",
    "!!int ''",
    "{[a]: 1}",
]
RAW_YAML += [
    "&a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\nd: [*c,*c,*c,*c,*c]"
]
MERGES = "\n".join(["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 40))])

KEYS = {  # that libraries obey, with what a stranger might want of them
    "attn_implementation": "owner/kernel",
    "_attn_implementation": "owner/kernel",
    "auto_map": {"AutoModel": "x--y.Z"},
    "quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"},
    "_class_name": "os.system",
    "trust_remote_code": True,
    "base_model_name_or_path": "../../outside/base",
    "peft_type": "LORA",
    "num_train_timesteps": 2 * 10**8,
    "block_out_channels": [8] * 3000,
    "layers_per_block": 10**6,
    "num_hidden_layers": 10**6,
    "vocab_size": 2**31,
    "hidden_size": 2**20,
    "num_attention_heads": 0,
    "sample_size": 10**9,
    "norm_num_groups": 0,
    "transformer_layers_per_block": 10**6,
    "cross_attention_dim": 2**30,
    "trained_betas": [float("nan")] * 10,
    "weight_map": {"x": "../../outside/control.safetensors"},
    "_data_files": [{"filename": "../../outside/set.arrow"}],
    "_name_or_path": "../../outside/base",
    "dtype": "os",
    "torch_dtype": "float99",
    "_commit_hash": "x",
    "_use_default_values": 3,
    "act_fn": "os.system",
    "width": 10**5,
    "radius": 10**9,
    "low": float("nan"),
    "high": -1,
    "data": "owner/dataset",
    "recipe": {"size": 4096},
    "base": "owner/base",
    "conditioning_data": "x",
    "instance_data_dir": "../../outside/set",
    "url": "https://127.0.0.1:9/x",
    "file_name": "../../outside/photo.png",
    "image": "/dev/zero",
    "steps": 10**12,
}


def mutated(name: str, data: bytes, draw: Random) -> bytes:
    """A file's bytes changed once, or twice: by its format, where it has one that is known here, else as bytes."""
    change = _by_format(name, data) if draw.random() < 0.7 else None
    try:
        made = change(data, draw) if change else changed_bytes(data, draw)
    except Exception:  # what is no right file any more, as the library that reads it here says
        made = changed_bytes(data, draw)
    return changed_bytes(made, draw) if draw.random() < 0.2 else made


def _by_format(name: str, data: bytes) -> Callable[[bytes, Random], bytes] | None:
    suffix = Path(name).suffix.lower()
    for mark, change in _BY_MARK.items():
        if data.startswith(mark):
            return change
    if data[4:8] in (b"ftyp", b"jP  "):
        return _changed_fields(_boxes)
    if data[257:262] == b"ustar":
        return changed_tar
    return _BY_SUFFIX.get(suffix)


# --- bytes ------------------------------------------------------------------------------------------------------------


def changed_bytes(data: bytes, draw: Random) -> bytes:
    """Bytes flipped, cut, moved, repeated, or overwritten by numbers that lengths are not; most often near an end."""
    if not data:
        return draw.randbytes(draw.randint(1, 64))
    way = draw.randrange(9)
    at, span = _place(len(data), draw), min(draw.choice((1, 2, 4, 8, 16, 64, 512)), len(data))
    if way == 0:
        out = bytearray(data)
        for _ in range(draw.choice((1, 1, 2, 8, 64))):
            out[_place(len(data), draw)] ^= 1 << draw.randrange(8)
        return bytes(out)
    if way == 1:
        return data[:at]
    if way == 2:
        return data[:at] + data[at + span :]
    if way == 3:
        times = draw.choice((2, 3, 100, 10_000))
        if b"\n" in data[at : at + span]:  # a listing takes as long as the pictures it names, which is no fault
            times = min(times, 1000)
        return data[:at] + data[at : at + span] * times + data[at + span :]
    if way == 4:
        other = _place(len(data), draw)
        return data[:at] + data[other : other + span] + data[at + span :]
    if way == 5:
        return data[:at] + draw.randbytes(span) + data[at + span :]
    if way == 6:
        return (
            data[:at]
            + draw.choice((b"\0", b"\xff", b"[", b"(", b"{", b"\n", b'"', b"9")) * draw.choice((1, 64, 70_000))
            + data[at:]
        )
    if way == 7:
        return data[:at] + draw.choice([*WORDS, *PATHS]).encode("utf-8", "surrogatepass") + data[at:]
    size = draw.choice((1, 2, 4, 8))
    return data[:at] + _number(size, draw.choice(("little", "big")), draw) + data[at + size :]


def _place(length: int, draw: Random) -> int:
    """A place in so many bytes: in the first or last hundred as often as anywhere."""
    way = draw.random()
    near = draw.randrange(min(length, 128))
    return near if way < 0.35 else length - 1 - near if way < 0.5 else draw.randrange(length)


def _number(size: int, order: Any, draw: Random, old: int = 0) -> bytes:
    value = draw.choice([*SIZES, old + 1, old - 1, 2 * old, 1000 * old, old ^ 1 << draw.randrange(8 * size)])
    return (value % (1 << 8 * size)).to_bytes(size, order)


# --- fields: numbers at known places --------------------------------------------------------------------------------

Fields = list[tuple[int, int, str]]
"""(place, bytes, byte order) of each number."""


def _changed_fields(fields: Callable[[bytes], Fields], mend: Callable[[bytes], bytes] = bytes) -> Callable:
    def change(data: bytes, draw: Random) -> bytes:
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            at, size, order = draw.choice(fields(data))
            data = (
                data[:at] + _number(size, order, draw, int.from_bytes(data[at : at + size], order)) + data[at + size :]
            )
        return mend(data)

    return change


def _jpeg(data: bytes) -> Fields:
    at, found = 2, []
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        found += [(at + 1, 1, "big"), (at + 2, 2, "big")]
        found += [(at + 4 + i, 1 + i % 2, "big") for i in range(min(length, 12))]
        at += 2 + length
    return found


def _riff(data: bytes) -> Fields:
    at, found = 12, [(4, 4, "little")]
    while at + 8 <= len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        found += [(at + 4, 4, "little"), *((at + 8 + i, 3, "little") for i in range(0, min(length, 15), 3))]
        at += 8 + length + length % 2
    return found


def _bmp(data: bytes) -> Fields:
    return [(at, 4, "little") for at in (2, 10, 14, 18, 22, 30, 34, 38, 42, 46, 50)] + [
        (26, 2, "little"),
        (28, 2, "little"),
    ]


def _gif(data: bytes) -> Fields:
    found = [(6, 2, "little"), (8, 2, "little"), (10, 1, "little"), (11, 1, "little"), (12, 1, "little")]
    for at in [at for at, byte in enumerate(data) if byte in (0x2C, 0x21)][:40]:
        found += [(at + i, 2, "little") for i in (1, 3, 5, 7) if at + i + 2 <= len(data)]
    return found


def _tiff(data: bytes) -> Fields:
    order = "little" if data.startswith(b"II") else "big"
    at, found = int.from_bytes(data[4:8], order), [(4, 4, order)]
    count = int.from_bytes(data[at : at + 2], order)
    found.append((at, 2, order))
    for i in range(min(count, 40)):
        entry = at + 2 + 12 * i
        found += [(entry, 2, order), (entry + 2, 2, order), (entry + 4, 4, order), (entry + 8, 4, order)]
    return [*found, (at + 2 + 12 * count, 4, order)]


_NESTED = {b"meta": 4, b"iprp": 0, b"ipco": 0, b"iinf": 6, b"moov": 0, b"jp2h": 0}


def _boxes(data: bytes, start: int = 0, end: int | None = None) -> Fields:
    at, end, found = start, end or len(data), []
    while at + 8 <= end:
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        found.append((at, 4, "big"))
        length = min(length or end - at, end - at)
        if kind in _NESTED:
            found += _boxes(data, at + 8 + _NESTED[kind], at + length)
        else:
            found += [(at + 8 + i, 4, "big") for i in range(0, min(length - 8, 40), 4)]
        at += max(length, 8)
    codestream = data.find(b"\xff\x4f\xff\x51")  # of JPEG 2000: its sizes stand in no box
    return found + ([(codestream + 4 + i, 4, "big") for i in range(2, 40, 4)] if codestream > 0 and not start else [])


def changed_png(data: bytes, draw: Random) -> bytes:
    """Chunks of a PNG changed, doubled, left out or put in, each with a right sum."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append([data[at + 4 : at + 8], data[at + 8 : at + 8 + length]])
        at += 12 + length
    one, way = draw.choice(chunks[:1] * 2 + chunks), draw.randrange(6)
    lengths: dict[int, int] = {}
    if way == 0:
        one[1] = changed_bytes(one[1], draw)
    elif way == 1:
        place = draw.choice((0, 4))
        chunks[0][1] = chunks[0][1][:place] + _number(4, "big", draw) + chunks[0][1][place + 4 :]
    elif way == 2:
        place = draw.randrange(8, 13)
        chunks[0][1] = (
            chunks[0][1][:place] + bytes([draw.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))]) + chunks[0][1][place + 1 :]
        )
    elif way == 3:
        chunks.insert(draw.randrange(len(chunks)), [*draw.choice(_png_chunks())])
    elif way == 4:
        chunks.insert(draw.randrange(len(chunks) + 1), [*draw.choice(chunks)])
    else:
        lengths[draw.randrange(len(chunks))] = draw.choice(SIZES) % 2**32
    out = data[:8]
    for i, (kind, body) in enumerate(chunks):
        out += lengths.get(i, len(body)).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    return out


@cache
def _png_chunks() -> list[tuple[bytes, bytes]]:
    bomb = zlib.compress(bytes(64 * 2**20), 9)
    texts = [(b"zTXt", b"parameters\0\0" + bomb), (b"iCCP", b"x\0\0" + bomb), (b"iTXt", b"parameters\0\1\0\0\0" + bomb)]
    settings = [
        (b"tEXt", b"parameters\0" + raw.encode("latin-1", "replace"))
        for raw in (RAW[0], '{"prompt": 3}', '{"a": ' + "9" * 5000)
    ]
    frames = [
        (b"acTL", struct.pack(">II", 2**31 - 1, 0)),
        (b"fcTL", struct.pack(">IIIIIHHBB", 0, 2**30, 2**30, 0, 0, 0, 0, 9, 9)),
    ]
    return (
        texts
        + settings
        + frames
        + [(b"eXIf", b"MM\0*\0\0\0\x08" + b"\xff" * 40), (b"PLTE", bytes(3 * 256)), (b"tRNS", b"\0" * 300)]
    )


# --- arrays, tensors, archives --------------------------------------------------------------------------------------

NPY = [
    "'|O'",
    "'<f8'",
    "'>u2'",
    "'<M8[ns]'",
    "'V100000'",
    "[('a','<f4')]",
    "'<U1000000'",
    "(" * 300 + ")" * 300,
    "'f4',",
    "None",
    "1",
]
SHAPES = [
    "(-1, 8)",
    "(2**40, 8)",
    "(99999999999, 9999999)",
    "()",
    "(8,)",
    "(1,) * 100",
    "(0, 8)",
    "(True, 8)",
    "[8, 8]",
    "(8, 8",
    "(8.0, 8)",
]


def changed_npy(data: bytes, draw: Random) -> bytes:
    """Another type or shape in an array's header, whose length is right; or a header that is no value."""
    length = int.from_bytes(data[8:10], "little")
    text = data[10 : 10 + length].decode("latin-1")
    kind, shape = re.search(r"'descr': ([^:]*),", text), re.search(r"'shape': (\([^)]*\))", text)
    way = draw.randrange(4)
    if way == 0 and kind:
        text = text.replace(kind[1], draw.choice(NPY))
    elif way == 1 and shape:
        text = text.replace(shape[1], draw.choice([*SHAPES, f"({draw.choice(SIZES)}, {draw.choice(SIZES)}, 3)"]))
    elif way == 2:
        text = changed_bytes(text.encode("latin-1"), draw).decode("latin-1")
    else:
        text = draw.choice(
            (
                "(" * 3000,
                "[" * 60_000,
                "{'descr':" * 90,
                "-" * 50_000 + "1",
                "9" * 9000,
                "\0",
                "",
                "'" * 9,
                "{**{}}",
                "\n" * 50,
            )
        )
    head = text.encode("latin-1", "replace")
    wide = len(head) > 65535
    return (
        data[:6]
        + (b"\2\0" if wide else data[6:8])
        + len(head).to_bytes(4 if wide else 2, "little")
        + head
        + data[10 + length :]
    )


def changed_safetensors(data: bytes, draw: Random) -> bytes:
    """The header's JSON changed at a node, its length right; or the length alone."""
    length = int.from_bytes(data[:8], "little")
    if draw.random() < 0.1:
        return _number(8, "little", draw, length) + data[8:]
    header = data[8 : 8 + length]
    if draw.random() < 0.35:  # the configuration and the contract that stand as texts in the header
        values = json.loads(header)
        held = values.get("__metadata__") or {}
        key = draw.choice(sorted(held) or ["format"])
        try:
            held[key] = changed_json(held[key].encode(), draw).decode("utf-8", "replace")
        except (ValueError, KeyError):
            held[key] = draw.choice(WORDS)
        header = json.dumps(values | {"__metadata__": held}).encode()
    else:
        header = changed_json(header, draw)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


_STRANGE = [
    b"cos\nsystem\nX\x06\x00\x00\x00touch x\x85R0",
    b"cposix\nsystem\n(S'touch x'\ntR0",
    b"cbuiltins\neval\nX\x01\x00\x00\x001\x85R0",
    b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R0",
    b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R0",
    b"c_codecs\nencode\nX\x01\x00\x00\x00xX\x06\x00\x00\x00latin1\x86R0",
    b"ccollections\nOrderedDict\n)R0",
    b"ctorch._utils\n_rebuild_tensor_v2\n)R0",
    b"ctorch\nfloat32\n0",
    b"(" * 100_000,
    b"]" * 100_000 + b"a" * 99_999 + b"0",
    b"\x8b\xff\xff\xff\x7f",
    b"\x8d" + b"\xff" * 8,
    b"\x8e" + b"\0\0\0\0\1\0\0\0",
    b"\x95" + b"\xff" * 8,
    b"r\xff\xff\xff\x7f",
    b"j\xff\xff\xff\x7f",
    b"]q\x00h\x00a0",
    b"}q\x00h\x00h\x00s0",
    b"Q",
    b"I" + b"9" * 5000 + b"\n0",
    b"F1e999\n0",
    b"X\x04\x00\x00\x00\x1b[2J0",
]


def changed_pickle(data: bytes, draw: Random) -> bytes:
    """Opcodes of a pickle (or of those that follow each other in a file) left out, doubled, changed, or put in."""
    places = [at for _, _, at in pickletools.genops(io.BytesIO(data))]
    if draw.random() < 0.3 and data[places[-1] + 1 :].startswith(b"\x80"):  # one that comes later
        return data[: places[-1] + 1] + changed_pickle(data[places[-1] + 1 :], draw)
    i = draw.randrange(len(places) - 1)
    here, following, way = places[i], places[i + 1], draw.randrange(5)
    if way == 0:
        return data[:here] + data[following:]
    if way == 1:
        return data[:following] + data[here:following] * draw.choice((1, 2, 1000)) + data[following:]
    if way == 2:
        return data[:here] + changed_bytes(data[here:following], draw) + data[following:]
    return data[:here] + draw.choice(_STRANGE) + data[here:]


def changed_zip(data: bytes, draw: Random) -> bytes:
    """Numbers of a zip's directories changed; or a member changed, doubled or put in, with right sums."""
    way = draw.randrange(5)
    if way < 2:
        return _changed_fields(_zip_fields)(data, draw)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    one = draw.randrange(len(members))
    pickles = [i for i, (name, _) in enumerate(members) if name.endswith(".pkl")]
    if way == 2 and pickles:
        members[pickles[0]] = (members[pickles[0]][0], changed_pickle(members[pickles[0]][1], draw))
    elif way == 3:
        members[one] = (members[one][0], draw.choice((b"", changed_bytes(members[one][1], draw), bytes(100_000))))
    else:
        name = draw.choice(
            (
                members[one][0],
                "../../x",
                "/etc/x",
                f"{members[one][0]}/",
                "x\0y",
                "constants.pkl",
                "code/x.py",
                ".format_version",
            )
        )
        members.insert(draw.randrange(len(members)), (name, draw.choice((members[one][1], b"9", draw.randbytes(99)))))
    buffer = io.BytesIO()
    with zipfile.ZipFile(
        buffer, "w", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    ) as archive:
        for name, body in members:
            archive.writestr(zipfile.ZipInfo(name), body)
    made = buffer.getvalue()
    if draw.random() < 0.25:  # two archives in one file, for readers that look from either end
        return draw.choice((made + data, data + made, data[:-22] + made, made[:-1]))
    return made


def _zip_fields(data: bytes) -> Fields:
    found = []
    for mark, offsets in (
        (b"PK\1\2", (8, 10, 16, 20, 24, 28, 30, 32, 34, 38, 42)),
        (b"PK\3\4", (6, 8, 14, 18, 22, 26, 28)),
        (b"PK\5\6", (4, 6, 8, 10, 12, 16, 20)),
    ):
        for at in [hit.start() for hit in re.finditer(re.escape(mark), data)][-40:]:
            found += [
                (at + offset, 4 if offset in (14, 16, 18, 20, 24, 38, 42, 12) else 2, "little") for offset in offsets
            ]
    return [(at, size, order) for at, size, order in found if at + size <= len(data)]


_TAR = {
    "mode": (100, 8),
    "uid": (108, 8),
    "gid": (116, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "type": (156, 1),
    "name": (0, 100),
}
_TAR |= {"link": (157, 100), "magic": (257, 8), "major": (329, 8), "prefix": (345, 155)}
_TAR_SIZES = [
    b"\x80" + b"\0" * 10 + b"\1",
    b"\xff" * 12,
    b"\xff" + b"\0" * 11,
    b"77777777777\0",
    b"-0000000777\0",
    b"\x80" + b"\xff" * 11,
]
_TAR_SIZES += [b"00000000000\0", b"            ", b"xxxxxxxxxxx\0", b"\xff" * 11 + b"\0", b"\x80\0\0\0\0\0\0\1\0\0\0\0"]


def _with_sum(block: bytes) -> bytes:
    total = sum(block[:148]) + 8 * 32 + sum(block[156:512])
    return block[:148] + b"%06o\0 " % total + block[156:]


def changed_tar(data: bytes, draw: Random) -> bytes:
    """A header's field changed, or a header put in (long names, pax, links, devices), each with a right sum."""
    heads = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    at = draw.choice(heads)
    field = draw.choice([*_TAR, "size", "size", "type"])
    place, size = _TAR[field]
    values = {
        "size": _TAR_SIZES,
        "type": [bytes([kind]) for kind in b"0123456789xgLKSVX\0\xff"],
        "name": [name.encode("utf-8", "surrogatepass")[:100].ljust(100, b"\0") for name in PATHS],
    }.get(field, [draw.randbytes(size), b"\xff" * size, b"\0" * size, b"7" * size])
    block = bytearray(data[at : at + 512])
    block[place : place + size] = draw.choice(values)[:size]
    if draw.random() < 0.6:
        return data[:at] + _with_sum(bytes(block)) + data[at + 512 :]
    lines = [
        b"30 mtime=1e999\n",
        b"13 size=-99\n",
        b"20 size=99999999999999\n",
        b"0 a=b\n",
        b"99999999999999999999 a=b\n",
        b"-5 x=y\n",
    ]
    lines += [
        b"9" * 5000 + b" a=b\n",
        b"22 GNU.sparse.map=0,9\n",
        b"19 GNU.sparse.size=-1\n",
        b"21 path=../../x.png\n\0\0",
        b"a" * 100_000,
    ]
    body = draw.choice(lines) * draw.choice((1, 1, 2000))
    head = bytearray(data[at : at + 512])
    head[156:157] = bytes([draw.choice(b"xgLKSX")])
    head[124:136] = draw.choice((b"%011o\0" % len(body), *_TAR_SIZES))
    return data[:at] + _with_sum(bytes(head)) + body + bytes(-len(body) % 512) + data[at:]


# --- texts ----------------------------------------------------------------------------------------------------------


def _nodes(value: Any, path: tuple = ()) -> list[tuple]:
    """The way to each node of a value, the whole one first."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(one for key, part in inner for one in _nodes(part, (*path, key)))]


def _changed_node(value: Any, draw: Random, raw: list[str]) -> tuple[Any, str]:
    """The value with a node replaced, left out, renamed or put in; and the text that its mark stands for."""
    nodes = _nodes(value)
    path = draw.choice(nodes[1:] or nodes) if draw.random() < 0.95 else ()
    new: Any = draw.choice(
        [
            draw.choice(PATHS),
            draw.choice(PATHS),
            draw.choice(NUMBERS),
            draw.choice(NUMBERS),
            draw.choice(WORDS),
            None,
            True,
            False,
            [],
            {},
            [[]],
            [None] * 3,
            {"": ""},
            "@raw",
            "@raw",
        ]
    )
    text = draw.choice(raw)
    if not path:
        return new, text
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    way = draw.random()
    if isinstance(holder, dict) and way < 0.2:
        key = draw.choice([*KEYS])
        holder[key] = KEYS[key]
    elif isinstance(holder, dict) and way < 0.3:
        holder[draw.choice([*WORDS, *PATHS, "__proto__"])] = holder.pop(path[-1])
    elif way < 0.4:
        del holder[path[-1]]
    elif isinstance(holder, list) and way < 0.5:
        holder.insert(path[-1], new)
    elif isinstance(old := holder[path[-1]], int | float) and way < 0.75:
        holder[path[-1]] = draw.choice([-old, old + 1, old * 10**6, old / 3, str(old), [old], draw.choice(NUMBERS)])
    else:
        holder[path[-1]] = new
    return value, text


def changed_json(data: bytes, draw: Random) -> bytes:
    """A JSON text with another node somewhere."""
    value, raw = _changed_node(json.loads(data), draw, RAW)
    text = json.dumps(value, ensure_ascii=draw.random() < 0.8).replace('"@raw"', raw)
    return text.encode(draw.choice(("utf-8",) * 8 + ("utf-16", "utf-8-sig")), "surrogatepass")


def changed_lines(data: bytes, draw: Random) -> bytes:
    """One line of a text of JSON lines changed, or doubled, or left out."""
    lines = data.splitlines()
    at, way = draw.randrange(len(lines)), draw.random()
    if way < 0.8:
        lines[at] = changed_json(lines[at], draw)
    elif way < 0.9:
        lines.insert(at, draw.choice((b"", b"[]", b"null", b"3", lines[at], b"\xff", RAW[0].encode())))
    else:
        del lines[at]
    return b"\n".join(lines) + b"\n"


def changed_json_or_lines(data: bytes, draw: Random) -> bytes:
    """A JSON text, or one of JSON lines, changed."""
    try:
        json.loads(data)
    except ValueError:
        return changed_lines(data, draw)
    return changed_json(data, draw)


def changed_yaml(data: bytes, draw: Random) -> bytes:
    """A YAML text with another node somewhere, or with aliases, merges, tags, or brackets in it."""
    import yaml

    if draw.random() < 0.25:
        lines = data.decode().splitlines()
        more = [
            MERGES,
            *(f"data: {one}" for one in RAW_YAML),
            f"a: {'[' * 5000}",
            "- " * 5000 + "x",
            "? " * 5000,
            "%YAML 9.9\n---",
            "--- x\n--- y",
            "a: |9\n b",
            "\t- x",
        ]
        lines.insert(draw.randrange(len(lines) + 1), draw.choice(more))
        return "\n".join(lines).encode()
    value, raw = _changed_node(yaml.safe_load(data), draw, RAW + RAW_YAML * 2)
    return json.dumps(value).replace('"@raw"', raw).encode("utf-8", "surrogatepass")


def changed_csv(data: bytes, draw: Random) -> bytes:
    """A field of a csv changed, or a quote left open."""
    rows = list(csv.reader(io.StringIO(data.decode())))
    row = draw.choice(rows)
    row[draw.randrange(len(row))] = draw.choice([*PATHS, *WORDS, "9" * 5000, "x" * 200_000, "", "nan"])
    if draw.random() < 0.2:
        row.extend(["x"] * draw.choice((1, 5000)))
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    text = buffer.getvalue()
    if draw.random() < 0.2:
        at = draw.randrange(len(text))
        text = text[:at] + draw.choice(('"', "\0", '"' * 999, "\r", ";", "\x1a")) + text[at:]
    return text.encode("utf-8", "surrogatepass")


def changed_text(data: bytes, draw: Random) -> bytes:
    """A plain text with strange words in it."""
    at = draw.randrange(len(data) + 1)
    strange = draw.choice([*WORDS, *PATHS, "x" * 10**6, "\n" * 10**5]).encode("utf-8", "surrogatepass")
    return draw.choice((data[:at] + strange + data[at:], strange, b"\xff\xfe" + strange, b"\xff" + strange))


# --- tables and the store -------------------------------------------------------------------------------------------


def changed_table(data: bytes, draw: Random) -> bytes:
    """A parquet or an arrow file written anew with another cell, or with other words in its schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    stream = not data.startswith(b"PAR1")
    table = pa.ipc.open_stream(data).read_all() if stream else pq.read_table(pa.BufferReader(data))
    names, rows = table.column_names, table.to_pylist()
    way = draw.random()
    if way < 0.4:
        held = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        key = draw.choice(sorted(held) or ["huggingface"])
        held[key] = changed_json(held.get(key, "{}").encode(), draw).decode("utf-8", "replace")
        table = table.replace_schema_metadata(held)
    else:
        row, name = draw.choice(rows), draw.choice(names)
        if isinstance(row[name], dict):
            inner = draw.choice(sorted(row[name]))
            old = row[name][inner]
            row[name][inner] = (
                changed_bytes(old, draw)
                if isinstance(old, bytes) and draw.random() < 0.5
                else draw.choice((None, draw.choice(PATHS)))
            )
            if inner == "bytes" and not isinstance(row[name][inner], bytes):
                row[name][inner] = None
            row[name]["path"] = draw.choice([row[name].get("path"), *PATHS])
            row[name] = {
                key: value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
                for key, value in row[name].items()
            }
        else:
            row[name] = draw.choice([*PATHS, *WORDS]).encode("utf-8", "replace").decode()
        rows = rows * draw.choice((1, 1, 1, 300)) if way > 0.9 else rows
        table = pa.Table.from_pylist(rows, table.schema)
    out = pa.BufferOutputStream()
    if stream:
        with pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, out, compression=draw.choice(("snappy", "zstd", "gzip", "none")))
    return out.getvalue().to_pybytes()


@cache
def _bomb() -> bytes:
    return zlib.compress(bytes(1500 * 2**20), 9)


def changed_store(data: bytes, draw: Random) -> bytes:
    """A store with another entry, whose seal is right; or with other tables."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "1.sqlite")
        path.write_bytes(data)
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA journal_mode = DELETE")
        rows = connection.execute("SELECT key, value FROM entries").fetchall()
        key, value = draw.choice(rows)
        way = draw.random()
        if way < 0.6:
            value = zlib.compress(mutated("x.safetensors", zlib.decompress(value), draw), 1)
        elif way < 0.65:
            value = _bomb()
        elif way < 0.8:
            value = changed_bytes(value, draw)
        else:
            connection.execute(
                draw.choice(
                    (
                        "DROP TABLE entries",
                        "CREATE TRIGGER t AFTER INSERT ON entries BEGIN SELECT 1; END",
                        "ALTER TABLE entries RENAME value TO v",
                        "UPDATE entries SET value = 3",
                        "UPDATE entries SET seal = NULL",
                        "UPDATE entries SET key = 'x'",
                    )
                )
            )
        if way < 0.8:
            seal = blake2b(value, key=key, digest_size=16).digest()
            connection.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", (key, value, seal))
        connection.commit()
        connection.close()
        return path.read_bytes()


_BY_MARK: dict[bytes, Callable[[bytes, Random], bytes]] = {
    b"\x89PNG": changed_png,
    b"\xff\xd8\xff": _changed_fields(_jpeg),
    b"RIFF": _changed_fields(_riff),
    b"BM": _changed_fields(_bmp),
    b"GIF8": _changed_fields(_gif),
    b"II*\0": _changed_fields(_tiff),
    b"MM\0*": _changed_fields(_tiff),
    b"\x93NUMPY": changed_npy,
    b"PK\3\4": changed_zip,
    b"\x80\x02": changed_pickle,
    b"PAR1": changed_table,
    b"SQLite": changed_store,
}
_BY_SUFFIX: dict[str, Callable[[bytes, Random], bytes]] = {
    ".safetensors": changed_safetensors,
    ".json": changed_json_or_lines,
    ".jsonl": changed_lines,
    ".yaml": changed_yaml,
    ".csv": changed_csv,
    ".txt": changed_text,
    ".caption": changed_text,
    ".arrow": changed_table,
    ".tar": changed_tar,
}
