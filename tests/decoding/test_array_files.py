"""Arrays from strangers: a head that is read without evaluating it, and values that are all there."""

import io

import numpy as np
import pytest
from hostile import array, array_head, npy

from controlkit.decoding import is_array, open_array
from controlkit.errors import Invalid
from limits import limited

FILL = bytes(4096)
DAMAGED = {
    "text cut": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (4,\n", FILL),
    "brackets": npy("(" * 9000, FILL),
    "signs": npy("-" * 9000 + "1", FILL),
    "spaces": npy("{" + " " * 9900 + "!", FILL),
    "commas": npy(array_head("(4" + "," * 9000 + "!)"), FILL),
    "long head": npy(array_head() + " " * 10_001, FILL),
    "endless head": npy(array_head(), FILL, version=2, length=2**32 - 1),
    "no head": b"\x93NUMPY",
    "cut head": npy(array_head(), FILL)[:40],
    "version": npy(array_head(), FILL, version=9),
    "code": npy("__import__('os').system('true')", FILL),
    "negative": npy(array_head("(-4, 4)"), FILL),
    "floats": npy(array_head("(4.0, 4)"), FILL),
    "truth": npy(array_head("(True, 4)"), FILL),
    "huge": npy(array_head("(1000000, 1000000)", "'<f8'"), FILL),
    "overflow": npy(array_head("(4294967296, 4294967296, 4294967296)"), FILL),
    "digits": npy(array_head("(" + "9" * 5000 + ", 4)"), FILL),
    "underlined": npy(array_head("(6__4, 4)"), FILL),
    "one byte short": npy(array_head("(64, 64)"), FILL[:-1]),
    "objects": npy(array_head("(4, 4)", "'|O'"), FILL),
    "records": npy(array_head("(4, 4)", "[('a', '<f4'), ('b', '<f4')]"), FILL),
    "many records": npy(array_head("(4, 4)", "'u1,u2,(99999999,)f8'"), FILL),
    "texts": npy(array_head("(1, 1)", "'<U100'"), FILL),
    "times": npy(array_head("(4, 4)", "'<M8[ns]'"), FILL),
    "void": npy(array_head("(4, 4)", "'|V8'"), FILL),
    "no type": npy(array_head("(4, 4)", "'<f9'"), FILL),
    "keys twice": npy("{'descr': '|u1', 'descr': '|u1', 'shape': (4, 4), }", FILL),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_array_is_refused_in_one_sentence(name):
    with limited(2, 1 << 24), pytest.raises(Invalid, match=r"^x.npy cannot be read as an array \(its?") as caught:
        open_array(DAMAGED[name], "x.npy")
    assert len(str(caught.value)) < 300 and str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("shape", "kind", "words"),
    [("(4,)", "'|u1'", "has the shape 4:"), ("()", "'|u1'", "has the shape :"), ("(0, 4)", "'|u1'", "shape 0 x 4"),
     ("(1, 2, 2, 1)", "'|u1'", "shape 1 x 2 x 2 x 1"), ("(4, 4)", "'<c8'", "of complex64"),
     ("(4, 4)", "'<i2'", "of int16"),     ("(0, 999999999999)", "'<f8'", "shape 0 x")],
)  # fmt: skip
def test_an_array_that_is_no_hint_is_told_from_a_damaged_one(shape, kind, words):
    with pytest.raises(Invalid, match=f"x.npy .*{words}"):
        open_array(npy(array_head(shape, kind), FILL), "x.npy")


@pytest.mark.parametrize("kind", ["|u1", "<u2", ">u2", "<f2", "<f4", ">f4", "<f8", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_right_arrays_are_read_as_numpy_reads_them(kind, order):
    values = (np.random.default_rng(3).random((5, 4, 2)) * 200).astype(kind)
    data = array(np.asarray(values, order=order))
    assert is_array(data)
    expected = np.load(io.BytesIO(data)).astype("f4" if "f" in kind else "u2" if "u2" in kind else "u1")
    read = open_array(data, "x")
    assert np.array_equal(read, expected * (255 if kind == "?" else 1)) and read.flags.writeable
    assert read.dtype == expected.dtype
    assert open_array(array(values[..., 0]), "x").shape == (5, 4, 1)


def test_heads_of_other_writers_are_read():
    for head in (
        "{'shape': (2, 3), 'fortran_order': False, 'descr': '|u1'}",
        '{"descr": "|u1", "fortran_order": False, "shape": (2L, 3L)}',
        "{ 'descr' : '<u1' ,'fortran_order':False,\n'shape':( 2,3, ) , }",
    ):
        for version in (1, 2):
            assert open_array(npy(head, bytes(range(6)), version), "x")[..., 0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_floats_beyond_float32_warn_nobody():
    assert np.isinf(open_array(array(np.array([[1e300]])), "x")).all()


def test_whatever_is_changed_in_a_head_ends_in_an_array_or_a_sentence():
    rng, data = np.random.default_rng(5), array(np.ones((4, 5, 3), np.float32))
    with limited():
        for _ in range(2000):
            changed = bytearray(data)
            for at in rng.integers(6, 120, size=rng.integers(1, 4)):
                changed[at] = rng.integers(256)
            try:
                assert open_array(bytes(changed), "x").ndim == 3
            except Invalid as error:
                assert str(error).startswith("x ")
