"""Files people download are not trusted: each is read, or refused in one sentence; none runs, hangs or stays."""

import io
import json
import math
import os
import pickle
import struct
import time
import warnings
import zipfile
from collections import Counter, OrderedDict
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import pytest
import torch
from diffusers import T2IAdapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from controlkit.controls import new_control
from controlkit.errors import Mismatch, UserError
from controlkit.formats import WEIGHTS, SavedControl, WriteOptions, convert, describe, load_control, save_control
from controlkit.images import HintSpec
from controlkit.tensors import open_tensors
from limits import limited

pytestmark = pytest.mark.filterwarnings("ignore")  # a file's oddities may warn; what counts here is what comes of it
LAYOUTS = ("diffusers", "cldm", "cldm without prefix", "control-lora", "union", "t2i-adapter", "pickle")


@pytest.fixture(scope="module")
def layouts(toy_base, drawn_joins, tmp_path_factory):
    """One sound file of the toy base's in each layout, by name."""
    root = tmp_path_factory.mktemp("layouts")
    branch = drawn_joins(new_control(toy_base)).requires_grad_(False)
    for i, parameter in enumerate(branch.parameters()):
        parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    save_control(root / "control", SavedControl(branch, HintSpec("canny"), {"base": toy_base.name}), toy_base)
    files = {"diffusers": root / "control" / WEIGHTS}
    for layout in ("cldm", "control-lora", "union"):
        target = root / layout if layout == "union" else root / f"{layout}.safetensors"
        convert(root / "control", target, layout, base=toy_base, options=WriteOptions(rank=2))
        files[layout] = target / WEIGHTS if layout == "union" else target
    tensors = open_tensors(files["cldm"]).read()
    files["cldm without prefix"] = root / "bare.safetensors"
    save_file({name.removeprefix("control_model."): t for name, t in tensors.items()}, files["cldm without prefix"])
    taps = [tap for tap in toy_base.taps if tap.site == "encoder"]
    facts = {"downscale_factor": taps[0].stride, "adapter_type": "full_adapter_xl"}  # its features halve once
    adapter = T2IAdapter(channels=[*(tap.channels for tap in taps), taps[-1].channels], num_res_blocks=1, **facts)
    files["t2i-adapter"] = root / "adapter.safetensors"
    save_file(adapter.state_dict(), files["t2i-adapter"], {"controlkit.config": json.dumps(facts)})
    files["pickle"] = root / "control.pth"
    torch.save({"state_dict": tensors, "epoch": 3, "lr": [1e-5]}, files["pickle"])
    return {layout: files[layout] for layout in LAYOUTS}


READERS = {
    "describe": lambda path, base, target: describe(path),
    "load": lambda path, base, target: load_control(path, base),
    "convert": lambda path, base, target: convert(path, target, "cldm", base=base),
}


def outcomes(path, base):
    """What comes of a file by reader: None if it is read, else the sentence that refuses it.

    Fails where a reader raises anything else, says more than a sentence, or leaves a trace on the disk.
    """
    target = path.parent / "converted.safetensors"
    target.unlink(missing_ok=True)
    found = {}
    for name, read in READERS.items():
        before = {file: (file.read_bytes() if file.is_file() else None) for file in path.parent.rglob("*")}
        try:
            read(path, base, target)
            found[name] = None
        except UserError as error:
            found[name] = str(error)
            assert len(found[name]) < 600 and found[name].isprintable(), found[name]
        if name == "convert" and found[name] is None:
            assert target.stat().st_size
            target.unlink()
        assert {file: (file.read_bytes() if file.is_file() else None) for file in path.parent.rglob("*")} == before
    return found


def refused(path, base):
    """The sentences, for a file that no reader may read."""
    found = outcomes(path, base)
    assert None not in found.values(), found
    return set(found.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_sound_files_are_read(layouts, toy_base, tmp_path, layout):
    # Otherwise what is done to them below would be refused for nothing.
    path = tmp_path / layouts[layout].name
    path.write_bytes(layouts[layout].read_bytes())
    found = outcomes(path, toy_base)
    assert found["describe"] is None and found["load"] is None
    assert (found["convert"] is None) == (layout not in ("union", "t2i-adapter"))  # which have no such layout


# --- safetensors, taken apart and put together ------------------------------------------------------------------------

SIZES = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8}


@dataclass
class Parts:
    """A safetensors file as what it is made of; what is put together need not be sound."""

    tensors: dict
    metadata: dict

    @classmethod
    def of(cls, path):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
        metadata = header.pop("__metadata__", {})
        begin = {name: slice(*entry["data_offsets"]) for name, entry in header.items()}
        return cls({n: (e["dtype"], list(e["shape"]), body[begin[n]]) for n, e in header.items()}, metadata)

    def header(self):
        entries, at = {"__metadata__": self.metadata}, 0
        for name, (dtype, shape, data) in self.tensors.items():
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
            at += len(data)
        return entries

    def put(self, header=None):
        text = header if isinstance(header, bytes) else json.dumps(header or self.header()).encode()
        return struct.pack("<Q", len(text)) + text + b"".join(data for *_, data in self.tensors.values())

    def reshape(self, name, shape, dtype=None):
        """Another shape, with zeros for data if the old do not fill it; none if that would be very many."""
        dtype, count = dtype or self.tensors[name][0], math.prod(shape)
        data = self.tensors[name][2]
        if len(data) != count * SIZES[dtype] and count <= 2**20:
            data = bytes(count * SIZES[dtype])
        self.tensors[name] = (dtype, shape, data)


# --- pickles, as torch lays them out ----------------------------------------------------------------------------------


class Calls:
    """Pickled, a call of a function; with ``state`` and ``items`` as a pickle gives them to what the call returns."""

    def __init__(self, function, *args, state=None, items=None):
        self.reduced = (function, args, state, None, None if items is None else iter(items))

    def __reduce__(self):
        return self.reduced


@dataclass
class Storage:
    """Pickled, what stands for the data of a tensor: a record's key, and how many numbers it is said to hold."""

    numel: int
    key: str = "0"


class TensorPickler(pickle.Pickler):
    """Writes what torch writes for a tensor, whatever it is said to be."""

    def persistent_id(self, value):
        if isinstance(value, Storage):
            return ("storage", torch.FloatStorage, value.key, "cpu", value.numel)
        return None


def claimed(shape, stride, numel, offset=0):
    return Calls(torch._utils._rebuild_tensor_v2, Storage(numel), offset, shape, stride, False, OrderedDict())


def code(content, protocol=2):
    stream = io.BytesIO()
    TensorPickler(stream, protocol).dump(content)
    return stream.getvalue()


def archive(path, content, data=bytes(64), compression=zipfile.ZIP_STORED):
    """A file as ``torch.save`` lays it out, of a pickle's own bytes and one record of data."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", content if isinstance(content, bytes) else code(content))
        file.writestr("archive/byteorder", b"little")
        file.writestr("archive/data/0", data)
        file.writestr("archive/version", b"3\n")
    return path


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"state_dict": t, "epoch": 7, "args": {"betas": (0.9, 0.99)}}])
@pytest.mark.parametrize("kind", [dict, OrderedDict, "module"])
def test_a_pickle_reads_as_the_safetensors_of_the_same_control(layouts, tmp_path, toy_base, wrap, kind):
    tensors = open_tensors(layouts["cldm"]).read()
    if kind == "module":  # parameters and OrderedDicts with an attribute, as a module's state_dict is saved
        held = OrderedDict((name, torch.nn.Parameter(tensor)) for name, tensor in tensors.items())
        held._metadata = OrderedDict({"": {"version": 1}})
    else:
        held = kind(tensors)
    torch.save(wrap(held), tmp_path / "control.pth")
    read = open_tensors(tmp_path / "control.pth").read()
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and not read[name].requires_grad for name, tensor in tensors.items())
    assert describe(tmp_path / "control.pth").names == describe(layouts["cldm"]).names
    assert outcomes(tmp_path / "control.pth", toy_base) == dict.fromkeys(READERS)
    ours, theirs = (load_control(f, toy_base).branch.state_dict() for f in (tmp_path / "control.pth", layouts["cldm"]))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_pickle_written_by_hand_here_is_read(tmp_path):
    # Otherwise the hostile ones below would be refused for their writing.
    archive(tmp_path / "x.pth", {"x": claimed((2, 8), (8, 1), 16)}, np.arange(16, dtype=np.float32).tobytes())
    assert torch.equal(open_tensors(tmp_path / "x.pth").read()["x"], torch.arange(16.0).reshape(2, 8))


LIGHTNING = b"\x80\x02}U\x01xcpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n)\x81s."
RUNS = {
    "system": (lambda proof: Calls(os.system, f"touch {proof}"), "posix.system"),
    "eval": (lambda proof: Calls(eval, f"open({str(proof)!r}, 'w')"), "eval"),
    "a file's opening": (lambda proof: Calls(open, str(proof), "w"), "open"),
    "getattr": (lambda proof: Calls(getattr, [], "append"), "getattr"),
    "a class": (lambda proof: Calls(pickle.Unpickler, 1), "Unpickler"),
    "memory": (lambda proof: Calls(bytearray, 10**13), "bytearray"),
    "memory of torch": (lambda proof: Calls(torch.Tensor, 10**6, 10**6), "torch.Tensor"),
    "a storage": (lambda proof: Calls(torch.UntypedStorage, 10**13), "UntypedStorage"),
    "a sparse tensor": (lambda proof: Calls(torch._utils._rebuild_sparse_tensor, 1), "_rebuild_sparse_tensor"),
    "a quantized tensor": (lambda proof: Calls(torch._utils._rebuild_qtensor, 1), "_rebuild_qtensor"),
    "a tensor with attributes": (lambda proof: Calls(torch._tensor._rebuild_from_type_v2, 1), "_rebuild_from_type_v2"),
    "a set": (lambda proof: Calls(set, [1]), "set"),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(("make", "named"), RUNS.values(), ids=RUNS)
def test_a_pickle_that_would_run_something_is_refused_by_its_name(toy_base, tmp_path, make, named, protocol):
    (tmp_path / "file").mkdir()
    proof = tmp_path / "proof"
    content = {"x": claimed((4,), (1,), 16), "y": make(proof)}
    path = archive(tmp_path / "file" / "x.pth", code(content, protocol))
    (sentence,) = refused(path, toy_base)
    assert named in sentence and "safetensors" in sentence
    assert not proof.exists()


def test_a_pickle_that_names_a_class_not_installed_is_refused_by_its_name(toy_base, tmp_path):
    (sentence,) = refused(archive(tmp_path / "x.ckpt", LIGHTNING), toy_base)
    assert "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint" in sentence


def test_no_loader_of_pickles_is_ever_asked(layouts, monkeypatch):
    """Neither torch's nor Python's: so it does not matter which torch is installed."""

    def asked(*args, **kwargs):
        raise AssertionError("a loader of pickles was asked")

    for module, name in [(torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")]:
        monkeypatch.setattr(module, name, asked)
    assert open_tensors(layouts["pickle"]).read()


def nested_pairs(levels):
    pair = ()
    for _ in range(levels):
        pair = (pair, pair)
    return pair


def changed(**attributes):
    return Calls(OrderedDict, state=attributes, items=[("x", claimed((4,), (1,), 16))])


SHARED = claimed((1000,), (1,), 1000)
STRANGE = {
    "a record shorter than it is said": {"x": claimed((10**9,), (1,), 10**9)},
    "a shape larger than its storage": {"x": claimed((10**9,), (1,), 16)},
    "one number as very many": {"x": claimed((10**12,), (0,), 16)},
    "more numbers than can be counted": {"x": claimed((2**62, 4), (0, 0), 16)},
    "an offset beyond its storage": {"x": claimed((4,), (1,), 16, offset=2**40)},
    "a negative size": {"x": claimed((-4,), (1,), 16)},
    "a negative stride": {"x": claimed((4,), (-1,), 16)},
    "a negative storage": {"x": claimed((4,), (1,), -16)},
    "many names for one tensor": {f"x{i}": SHARED for i in range(1000)},
    "no record": {"x": Calls(torch._utils._rebuild_tensor_v2, Storage(4, "9"), 0, (4,), (1,), False, OrderedDict())},
    "a tensor of nine dimensions": {"x": claimed((1,) * 9, (1,) * 9, 16)},
    "an endless key": Calls(OrderedDict, items=[(nested_pairs(80), 1)]),
    "an endless value": {"x": nested_pairs(80)},
    "keys that are tuples": {"x": {(1, 2): 3}},
    "a number without end": {2**300: 1},
    "an OrderedDict of a list": Calls(OrderedDict, [("x", 1)]),
    "a call of a string": b"\x80\x02U\x01x)R.",
    "a tensor built anew": {"x": Calls(torch._utils._rebuild_tensor_v2, Storage(16), 0, (4,), (1,), state=(1, 2))},
    "a list": [claimed((4,), (1,), 16)],
    "a tensor": claimed((4,), (1,), 16),
    "nothing": {},
    "numbers alone": {"x": 1.0},
    "keys that are numbers": {1: claimed((4,), (1,), 16)},
    "a name of many lines": {"x\n\x1b[31m": claimed((4,), (1,), 16)},
    "a name without end": {"x" * 10**6: claimed((4,), (1,), 16)},
    "ten thousand lists in each other": b"\x80\x02" + b"]" * 10**4 + b"a" * (10**4 - 1) + b".",
    "a stack that was never filled": b"\x80\x02R.",
    "a memory that was never filled": b"\x80\x02h\x05.",
    "no end": b"\x80\x02}",
    "noise": b"\x80\x02\xff\xfe\xfd",
}


@pytest.mark.parametrize("content", STRANGE.values(), ids=STRANGE)
def test_a_pickle_of_a_strange_content_is_refused_without_taking_memory(toy_base, tmp_path, content):
    path = archive(tmp_path / "x.pth", content, bytes(4000))
    with limited(cpu_seconds=10, growth=200 * 2**20):
        refused(path, toy_base)


@pytest.mark.parametrize(("length", "sentence"), [(2**21, "bytes beside the tensors"), (300_000, "500,000 steps")])
def test_a_pickle_that_would_keep_its_reader_busy_is_refused(tmp_path, length, sentence):
    with pytest.raises(UserError, match=sentence):
        open_tensors(archive(tmp_path / "x.pth", b"\x80\x02" + b"N0" * length + b"}."))


@pytest.mark.parametrize("method", ["items", "get", "keys", "__iter__"])
def test_a_pickle_cannot_put_its_own_in_the_place_of_a_dictionary_s_methods(tmp_path, method):
    archive(tmp_path / "x.pth", changed(**{method: OrderedDict}))
    assert open_tensors(tmp_path / "x.pth").shapes == {"x": (4,)}


def test_a_pickle_of_the_old_kind_is_refused(layouts, toy_base, tmp_path):
    path = tmp_path / "old.pth"
    torch.save(torch.load(layouts["pickle"]), path, _use_new_zipfile_serialization=False)
    (sentence,) = refused(path, toy_base)
    assert "before 2020" in sentence and "safetensors" in sentence


def test_a_compressed_archive_is_refused(layouts, toy_base, tmp_path):
    path = archive(tmp_path / "x.pth", {"x": claimed((4,), (1,), 16)}, bytes(2**24), zipfile.ZIP_DEFLATED)
    assert all("compressed" in sentence for sentence in refused(path, toy_base))


def test_an_archive_over_several_disks_is_refused(toy_base, tmp_path):
    path = archive(tmp_path / "x.pth", {"x": claimed((4,), (1,), 16)})
    with path.open("ab") as file:  # zipfile gives up on these with an error of its own
        file.write(
            struct.pack("<4sLQL", b"PK\6\7", 0, 0, 2) + struct.pack("<4s4H2LH", b"PK\5\6", *[0xFFFF] * 4, 0, 0, 0)
        )
    refused(path, toy_base)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99, 0.9999])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_truncated_file_is_refused(layouts, toy_base, tmp_path, layout, share):
    path = tmp_path / layouts[layout].name
    data = layouts[layout].read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert all("cannot be read" in sentence for sentence in refused(path, toy_base))


# --- safetensors ------------------------------------------------------------------------------------------------------


def with_entry(**changes):
    def damage(parts):
        header = parts.header()
        header[next(n for n in header if n.endswith("weight"))] |= changes
        return parts.put(header)

    return damage


def long_header(length):
    return lambda parts: struct.pack("<Q", length) + parts.put()[8:]


def with_tensor(name, shape=(1,), dtype="F32"):
    def damage(parts):
        parts.tensors[name] = (dtype, list(shape), bytes(math.prod(shape) * SIZES[dtype]))
        return parts.put()

    return damage


def with_metadata(value):
    return lambda parts: parts.put(parts.header() | {"__metadata__": value})


DAMAGED = {
    "empty": lambda parts: b"",
    "of seven bytes": lambda parts: b"\0" * 7,
    "of zeros": lambda parts: bytes(1000),
    "of noise": lambda parts: np.random.default_rng(0).bytes(1000),
    "a web page": lambda parts: b"<!DOCTYPE html><html><body>Please log in</body></html>",
    "a pointer to the file": lambda parts: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
    "with a header of 2**63 bytes": long_header(2**63),
    "with a header of 2**64 - 1 bytes": long_header(2**64 - 1),
    "with a header longer than any": long_header(2**24),
    "with a header longer than the file": long_header(2**22),
    "with a header that is no JSON": lambda parts: parts.put(b"{'x': 1}"),
    "with a header that is no object": lambda parts: parts.put(b"[1, 2]"),
    "with a header that is no text": lambda parts: parts.put(b"\xff" * 100),
    "with a header of brackets": lambda parts: parts.put(b"[" * 10**6),
    "with objects without end": lambda parts: parts.put(b'{"x":' * 10**6),
    "with overlapping tensors": with_entry(data_offsets=[0, 4]),
    "with negative offsets": with_entry(data_offsets=[-4, 0]),
    "with offsets backwards": with_entry(data_offsets=[8, 4]),
    "with an offset of a terabyte": with_entry(data_offsets=[0, 2**40]),
    "with a shape of a terabyte": with_entry(shape=[2**40], data_offsets=[0, 2**42]),
    "with a shape that overflows": with_entry(shape=[2**62, 2**62]),
    "with a shape that is negative": with_entry(shape=[-1, 4]),
    "with a shape that is text": with_entry(shape="4"),
    "with a shape without end": with_entry(shape=[1] * 10**5),
    "with a type that is none": with_entry(dtype="F7"),
    "with metadata that are numbers": with_metadata({"controlkit.hint": 1}),
    "with metadata that are a list": with_metadata(["x"]),
    "with bytes after the end": lambda parts: parts.put() + b"more",
    "with a name of many lines": with_tensor("x\ny\x1b[2J"),
    "with a name that turns the line round": with_tensor("x\u202egpj.exe"),
    "with a name without end": with_tensor("x." * 10**5),
    "with a tensor of nine dimensions": with_tensor("x", (1,) * 9),
    "with complex numbers": with_tensor("controlnet_mid_block.bias", (16,), "C64"),
}
INFINITE = {"NaN": math.nan, "infinity": math.inf, "minus infinity": -math.inf}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused(layouts, toy_base, tmp_path, damage):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damage(Parts.of(layouts["diffusers"])))
    found = outcomes(path, toy_base)
    assert found["load"] and found["convert"]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("value", INFINITE.values(), ids=INFINITE)
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_a_number_that_is_none_is_refused_with_the_tensor_s_name(layouts, toy_base, tmp_path, dtype, value, ending):
    kind = getattr(torch, dtype)
    if dtype == "float8_e4m3fn":
        value = math.nan  # it has no infinity
    path = tmp_path / f"control.{ending}"
    tensors = {name: tensor.to(kind) for name, tensor in open_tensors(layouts["cldm"]).read().items()}
    poisoned = tensors["control_model.middle_block_out.0.bias"].float()
    poisoned[-1] = value
    tensors["control_model.middle_block_out.0.bias"] = poisoned.to(kind)
    if ending == "pth":
        torch.save(tensors, path)
        if "float8" in dtype:  # whose pickles name a class that takes any memory: a limit, kept
            assert all("would run torch._utils._rebuild_tensor_v3" in sentence for sentence in refused(path, toy_base))
            return
    else:
        save_file(tensors, path)
    found = outcomes(path, toy_base)
    for reader in ("load", "convert"):
        assert "control_model.middle_block_out.0.bias holds NaN or infinity" in found[reader]


@pytest.mark.parametrize(
    "dtype", ["float64", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "int64", "bool"]
)
def test_weights_of_any_type_are_read_as_the_numbers_they_are(layouts, toy_base, tmp_path, dtype):
    path = tmp_path / "control.safetensors"
    tensors = {n: (3 * t).to(getattr(torch, dtype)) for n, t in open_tensors(layouts["diffusers"]).read().items()}
    save_file(tensors, path)
    assert outcomes(path, toy_base) == dict.fromkeys(READERS)
    loaded = load_control(path, toy_base).branch
    expected = tensors["controlnet_mid_block.weight"].float()
    assert expected.any() and torch.equal(loaded.joins["middle"].weight, expected)


def test_what_is_no_file_is_refused(toy_base, tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    (tmp_path / "nowhere.safetensors").symlink_to(tmp_path / "nothing")
    (tmp_path / "endless.safetensors").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name in ("folder", "loop", "nowhere", "endless", "pipe", "missing", "\0"):
        for reader, read in READERS.items():
            with pytest.raises(UserError) as raised:
                read(tmp_path / f"{name}.safetensors", toy_base, tmp_path / "out.safetensors")
            assert len(str(raised.value)) < 900, reader
    assert not (tmp_path / "out.safetensors").exists()


def test_a_link_to_a_file_is_the_file(layouts, toy_base, tmp_path):
    (tmp_path / "link.safetensors").symlink_to(layouts["diffusers"])
    assert outcomes(tmp_path / "link.safetensors", toy_base) == dict.fromkeys(READERS)


@pytest.mark.parametrize("made", ["control-lora", "cldm", "diffusers"])
def test_a_control_of_another_base_is_refused(layouts, deep_base, tmp_path, made):
    path = tmp_path / "other.safetensors"
    path.write_bytes(layouts[made].read_bytes())
    assert outcomes(path, deep_base)["load"]
    with pytest.raises(Mismatch):
        load_control(path, deep_base)


# --- hostile metadata -------------------------------------------------------------------------------------------------

KEYS = ("hint", "spec", "signature", "trained", "config")
TEXTS = {
    "nothing": "",
    "no JSON": '{"base": ',
    "lines and colours": "\n\x1b[31m{",
    "brackets without end": "[" * 10**5,
    "objects without end": '{"base":' * 10**5,
    "objects deep": '{"base":' * 500 + "1" + "}" * 500,
    "a long list": json.dumps(list(range(10**5))),
    "two million letters": json.dumps({"base": "x" * 2**21}),
    "a list": "[1, 2]",
    "a number": "7",
    "a number without end": "9" * 10**5,
    "null": "null",
    "text": '"toy"',
    "strange keys": json.dumps({"x\n" * 1000: 1}),
    "lists for values": json.dumps({key: ["x"] for key in ("body", "base", "annotator", "taps", "attention_head_dim")}),
    "nulls for values": json.dumps(dict.fromkeys(("body", "base", "annotator", "channels", "taps"))),
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("layout", ["diffusers", "t2i-adapter"])
def test_hostile_metadata_are_refused_and_never_more(layouts, toy_base, tmp_path, kind, layout):
    path = tmp_path / "hostile.safetensors"
    for key in KEYS:
        parts = Parts.of(layouts[layout])
        parts.metadata |= {f"controlkit.{key}": TEXTS[kind]}
        path.write_bytes(parts.put())
        found = outcomes(path, toy_base)
        if kind not in ("strange keys", "lists for values", "nulls for values"):  # which are objects, if odd ones
            assert f"controlkit.{key}" in found["load"] or "configuration" in found["load"]


WRONG = {
    "hint": [{"annotator": 3}, {"annotator": "canny", "channels": "3"}, {"annotator": "canny", "low": math.nan}]
    + [{"annotator": "canny", "options": [1]}, {"annotator": "canny", "resize": "x"}, {"annotator": "x\n" * 10**3}]
    + [{"annotator": "canny", "options": {"low": "1"}}, {"annotator": "canny", "high": 1e999}, {}, {"tone": 1}]
    + [{"annotator": "canny", "mask_value": -1.0}, {"annotator": "canny", "mark": "-1"}],
    "spec": [{"body": "x" * 10**4}, {"body": 1}, {"join": []}, {"bodies": "copy"}, {"body": "conv"}],
    "signature": [{"taps": 1}, {"taps": []}, {}],
    "config": [{key: value} for key in ("attention_head_dim", "norm_num_groups") for value in ("8", 0, -8, 1.5, 10**9)]
    + [{"attention_head_dim": [8, "8"]}, {"attention_head_dim": [[8]]}, {"num_attention_heads": True}]
    + [{"act_fn": "system"}, {"act_fn": []}],
}


@pytest.mark.parametrize("key", WRONG)
def test_metadata_of_wrong_types_are_refused(layouts, toy_base, tmp_path, key):
    path = tmp_path / "wrong.safetensors"
    for said in WRONG[key]:
        parts = Parts.of(layouts["diffusers"])
        parts.metadata |= {f"controlkit.{key}": json.dumps(said)}
        path.write_bytes(parts.put())
        assert outcomes(path, toy_base)["load"], said


@pytest.mark.parametrize("name", ["config.json", "control.yaml"])
@pytest.mark.parametrize("text", ["[" * 10**5, "x: " * 10**5, "{" * 100 + "\0", "&a [*a, *a]", " " * 2**21], ids=len)
def test_a_hostile_neighbour_of_a_file_is_refused_or_left(layouts, toy_base, tmp_path, name, text):
    path = tmp_path / (WEIGHTS if name == "config.json" else "control.safetensors")
    path.write_bytes(layouts["cldm without prefix"].read_bytes())
    (tmp_path / name).write_text(text)
    found = outcomes(path, toy_base)
    assert all("configuration" in said for said in found.values()) if name == "config.json" else not any(found.values())


# --- names and halves -------------------------------------------------------------------------------------------------

NUMBERS = ("99", "9999999999", "9" * 120, "٣", "-1", "01")
NUMBERED = (
    "down_blocks.{}.resnets.0.conv1.weight",
    "down_blocks.0.resnets.{}.conv1.weight",
    "controlnet_cond_embedding.blocks.{}.weight",
    "controlnet_down_blocks.{}.weight",
    "mid_block.attentions.0.transformer_blocks.{}.attn2.to_k.weight",
    "control_model.input_blocks.{}.0.op.weight",
    "control_model.input_hint_block.{}.weight",
    "adapter.body.{}.resnets.0.block1.weight",
    "body.{}.block1.weight",
    "transformer_layes.{}.ln_1.weight",
)


@pytest.mark.parametrize("layout", ["diffusers", "cldm", "t2i-adapter", "union"])
@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: ascii(number[:10]))
def test_no_number_in_a_name_is_counted_up_to(layouts, toy_base, tmp_path, layout, number):
    path = tmp_path / "numbers.safetensors"
    for pattern in NUMBERED:
        parts = Parts.of(layouts[layout])
        path.write_bytes(with_tensor(pattern.format(number), (16, 16))(parts))
        began = time.process_time()
        describe(path)
        assert time.process_time() - began < 5
    outcomes(path, toy_base)


@pytest.mark.parametrize(
    "pattern", ["x{}.weight", "down_blocks.{}.resnets.{}.conv1.weight", "." * 100 + "{}", "body.{}.x"]
)
def test_very_many_names_are_described_in_seconds(layouts, tmp_path, pattern):
    path = tmp_path / "many.safetensors"
    parts = Parts.of(layouts["diffusers"])
    parts.tensors |= {pattern.format(i, i): ("F32", [0], b"") for i in range(40_000)}
    path.write_bytes(parts.put())
    began = time.process_time()
    assert len(describe(path).unexpected) >= 40_000 - 100
    assert time.process_time() - began < 5


def test_a_small_file_cannot_ask_for_a_huge_network(layouts, toy_base, tmp_path):
    parts = Parts.of(layouts["diffusers"])
    for level in range(8):
        for name in [f"resnets.{i}.conv1.weight" for i in range(8)]:
            parts.tensors[f"down_blocks.{level}.{name}"] = ("F32", [16, 1, 1, 1], bytes(64))
        for block in range(32):
            parts.tensors[f"down_blocks.{level}.attentions.0.transformer_blocks.{block}.x"] = ("F32", [1], bytes(4))
    path = tmp_path / "huge.safetensors"
    path.write_bytes(parts.put())
    began = time.process_time()
    assert not describe(path).runs
    assert time.process_time() - began < 2


@pytest.mark.parametrize("half", [".up", ".down"])
@pytest.mark.parametrize("change", ["gone", "of another rank", "of one dimension"])
def test_half_a_pair_of_a_control_lora_is_refused(layouts, toy_base, tmp_path, half, change):
    parts = Parts.of(layouts["control-lora"])
    name = next(name for name in parts.tensors if name.endswith(half))
    if change == "gone":
        del parts.tensors[name]
    else:
        parts.reshape(name, [5, 5] if change == "of another rank" else [7])
    path = tmp_path / "half.safetensors"
    path.write_bytes(parts.put())
    found = outcomes(path, toy_base)
    assert "damaged or cut" in found["load"] and "damaged or cut" in found["convert"]


INSIDE = "control_model.input_blocks.0.0.extra"


@pytest.mark.parametrize("name", ["x", "conv_in.extra", "adapter.conv_in.extra", "difference", INSIDE])
@pytest.mark.parametrize("layout", ["diffusers", "union", "t2i-adapter"])
def test_a_tensor_too_many_is_refused_where_a_file_holds_a_network_alone(layouts, toy_base, tmp_path, layout, name):
    path = tmp_path / "more.safetensors"
    path.write_bytes(with_tensor(name)(Parts.of(layouts[layout])))
    found = outcomes(path, toy_base)
    described = describe(path)
    assert found["describe"] is None and described.unexpected == (name,) and not described.runs
    assert f"no place for 1 tensor, first {name}" in found["load"] and found["convert"] == found["load"]


@pytest.mark.parametrize("layout", ["cldm", "cldm without prefix", "control-lora"])
def test_a_tensor_too_many_is_refused_inside_a_network_and_left_out_beside_it(layouts, toy_base, tmp_path, layout):
    """Files in the original's names are cut from checkpoints, which hold more than one network."""
    path = tmp_path / "more.safetensors"
    sound = load_control(layouts[layout], toy_base).branch.state_dict()
    for name in ("x", "conv_in.extra", "adapter.conv_in.extra"):
        path.write_bytes(with_tensor(name)(Parts.of(layouts[layout])))
        assert outcomes(path, toy_base) == dict.fromkeys(READERS), name
        read = load_control(path, toy_base).branch.state_dict()
        assert all(torch.equal(read[key], value) for key, value in sound.items()), name
    path.write_bytes(with_tensor(INSIDE)(Parts.of(layouts[layout])))
    found = outcomes(path, toy_base)
    assert f"first {INSIDE}" in found["load"] and f"first {INSIDE}" in found["convert"]


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_file_of_three_gigabytes_is_described_without_reading_it(layouts, toy_base, tmp_path):
    parts = Parts.of(layouts["diffusers"])
    size = sum(len(data) for *_, data in parts.tensors.values())
    header = parts.header() | {"x": {"dtype": "F32", "shape": [3 * 2**28], "data_offsets": [size, size + 3 * 2**30]}}
    path = tmp_path / "large.safetensors"
    path.write_bytes(parts.put(header))
    os.truncate(path, path.stat().st_size + 3 * 2**30)  # a hole: nothing on the disk
    with limited(cpu_seconds=5, growth=200 * 2**20):
        assert describe(path).unexpected == ("x",)
        with pytest.raises(UserError, match="no place for 1 tensor, first x"):
            load_control(path, toy_base)


# --- fuzzing ----------------------------------------------------------------------------------------------------------


def _pick(things, at):
    return list(things)[at % len(things)]


def rename(parts, a, b, c):
    name = _pick(parts.tensors, a)
    words = name.split(".")
    word = _pick([*NUMBERS, "", "x", "up", "down", "bias", "weight", *_pick(parts.tensors, b).split(".")], c)
    words[b % len(words)] = word
    move(parts, name, ".".join(words))


PREFIXES = ("control_model.", "adapter.", "model.diffusion_model.", "lora_unet_", "down_blocks.0.", "")


def swap_prefix(parts, a, b, c):
    old, new = _pick(PREFIXES, a), _pick(PREFIXES, b)
    parts.tensors = {new + name.removeprefix(old): entry for name, entry in parts.tensors.items()}


def move(parts, name, to):
    parts.tensors = {to if known == name else known: entry for known, entry in parts.tensors.items()}


def delete(parts, a, b, c):
    del parts.tensors[_pick(parts.tensors, a)]


def double(parts, a, b, c):
    parts.tensors[_pick(PREFIXES, b) + _pick(parts.tensors, a) + _pick(("", ".x", "2"), c)] = _pick(
        parts.tensors.values(), c
    )


def exchange(parts, a, b, c):
    one, other = _pick(parts.tensors, a), _pick(parts.tensors, b)
    parts.tensors[one], parts.tensors[other] = parts.tensors[other], parts.tensors[one]


def reshape(parts, a, b, c):
    name = _pick(parts.tensors, a)
    shape = list(parts.tensors[name][1]) or [1]
    at, factor = b % len(shape), _pick((0, 2, 3, 2**20, 2**62), b)
    ways = (shape[::-1], shape[1:], [*shape, 1], [1, *shape], shape[:at] + [shape[at] * factor] + shape[at + 1 :])
    parts.reshape(name, _pick(ways, c))


def retype(parts, a, b, c):
    name = _pick(parts.tensors, a)
    parts.reshape(name, parts.tensors[name][1], _pick(SIZES, b))


def poison(parts, a, b, c):
    name = _pick(parts.tensors, a)
    dtype, shape, data = parts.tensors[name]
    at = b % (len(data) + 1)
    parts.tensors[name] = (dtype, shape, (data[:at] + b"\xff" * 8 + data[at + 8 :])[: len(data)])


def describe_falsely(parts, a, b, c):
    said = _pick(list(TEXTS.values()) + [json.dumps(value) for values in WRONG.values() for value in values], b)
    parts.metadata[f"controlkit.{_pick(KEYS, a)}"] = said


EDITS = (rename, swap_prefix, delete, double, exchange, reshape, retype, poison, describe_falsely)


def flip(data, a, b):
    at = a % max(len(data), 1)
    return data[:at] + bytes([data[at] ^ (1 << b % 8)]) + data[at + 1 :] if data else data


def insert(data, a, b):
    return (
        data[: a % (len(data) + 1)]
        + _pick((b"\0", b"9", b'"', b"}", b"[", b"(", b"t", b"h\1", b"\xff" * 9), b)
        + data[a % (len(data) + 1) :]
    )


def cut(data, a, b):
    at = a % (len(data) + 1)
    return data[:at] + data[at + 1 + b % 16 :]


def repeat(data, a, b):
    at = a % (len(data) + 1)
    return data[: at + b % 64] + data[at:]


SCRATCHES = (flip, insert, cut, repeat)
numbers = st.integers(0, 2**24)
edits = st.lists(st.tuples(st.sampled_from(EDITS), numbers, numbers, numbers), max_size=3)
# Where the bytes are scratched: the header (of a pickle: its code), or anywhere.
scratches = st.lists(st.tuples(st.sampled_from(SCRATCHES), numbers, numbers, st.booleans()), max_size=2)

TORCH = {"F64": "float64", "I64": "int64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8"}


def as_pickle(path, parts):
    """What of the parts torch can save, as a pickle."""
    tensors = {}
    for name, (dtype, shape, data) in parts.tensors.items():
        if dtype in TORCH and data and len(data) == math.prod(shape) * SIZES[dtype]:
            tensors[name] = torch.frombuffer(bytearray(data), dtype=getattr(torch, TORCH[dtype])).reshape(shape)
    torch.save({"state_dict": tensors, "epoch": 3}, path)


def scratch_code(path, scratch, a, b):
    """Scratch a pickle's code and pack it again, with the checksums of what it now is."""
    with zipfile.ZipFile(path) as file:
        records = {entry.filename: file.read(entry) for entry in file.infolist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in records.items():
            file.writestr(name, scratch(data, a, b) if name.endswith("data.pkl") else data)


def mutated(layouts, folder, layout, edits, scratches):
    """A file of a layout after a few edits of its parts and a few of its bytes."""
    parts = Parts.of(layouts["cldm" if layout == "pickle" else layout])
    for edit, *places in edits:
        if parts.tensors:
            edit(parts, *places)
    path = folder / ("fuzzed.pth" if layout == "pickle" else "fuzzed.safetensors")
    if layout == "pickle":
        as_pickle(path, parts)
    else:
        path.write_bytes(parts.put())
    for scratch, a, b, anywhere in sorted(scratches, key=lambda one: one[-1]):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        if anywhere:
            path.write_bytes(scratch(data, a, b))
        elif layout == "pickle":
            scratch_code(path, scratch, a, b)
        else:  # its length still told, so that what is inside it is read
            header = scratch(data[8 : 8 + length], a, b)
            path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    return path


def fuzz(layouts, base, folder, examples):
    """How often each reader read and refused, over that many mutated files."""
    counts = Counter()

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=timedelta(seconds=5),  # one that takes longer has hung
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(LAYOUTS), edits, scratches)
    def read(layout, edits, scratches):
        with warnings.catch_warnings(action="ignore"):
            found = outcomes(mutated(layouts, folder, layout, edits, scratches), base)
        counts.update((layout, reader, "refused" if said else "read") for reader, said in found.items())

    read()
    return counts


def test_mutated_files_are_read_or_refused(layouts, toy_base, tmp_path):
    counts = fuzz(layouts, toy_base, tmp_path, 150)
    for reader in READERS:
        done = {end: sum(counts[layout, reader, end] for layout in LAYOUTS) for end in ("read", "refused")}
        assert min(done.values()) >= 5, counts  # both ways are tried, or it tests little; one in twelve is read


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thousands_of_mutated_files_are_read_or_refused(layouts, toy_base, tmp_path):
    began = time.monotonic()
    counts = fuzz(layouts, toy_base, tmp_path, 5000)
    print(f"\n{'layout':<22}" + "".join(f"{f'{reader}: read':>16}{'refused':>10}" for reader in READERS))
    for layout in (*LAYOUTS, "all"):
        row = [
            sum(counts[one, reader, end] for one in (LAYOUTS if layout == "all" else [layout]))
            for reader in READERS
            for end in ("read", "refused")
        ]
        print(f"{layout:<22}" + "".join(f"{count:>{width}}" for count, width in zip(row, (16, 10) * 3, strict=True)))
    print(f"{time.monotonic() - began:.0f} s")
    assert sum(counts.values()) >= 5000 * len(READERS)
