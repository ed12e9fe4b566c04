"""Weights of words; A1111's expected values are those of its published examples."""

import pytest

from controlkit.errors import Invalid
from controlkit.prompts import a1111_pieces, comfy_pieces, without_loras


def weights(pieces):
    return [("BREAK" if piece.breaks else piece.text, round(piece.weight, 4)) for piece in pieces]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("[[less]]", [("less", 0.8264)]),
        ("a) b", [("a) b", 1.0)]),
        ("a:b", [("a:b", 1.0)]),
        ("", [("", 1.0)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
    ],
)
def test_a1111_multiplies(text, expected):
    assert weights(a1111_pieces(text)) == expected


def test_a_break_keeps_no_weight_and_is_no_part_of_a_word():
    found = weights(a1111_pieces("a BREAK (b BREAK c:2) BREAKFAST"))
    assert found == [("a", 1.0), ("BREAK", 1.0), ("b", 2.0), ("BREAK", 1.0), ("c", 2.0), (" BREAKFAST", 1.0)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a (b:1.5) c", [("a ", 1.0), ("b", 1.5), (" c", 1.0)]),
        ("((a))", [("a", 1.21)]),
        ("(a (b:1.2):0.5)", [("a ", 0.5), ("b", 1.2)]),
        ("((a) b:1.3)", [("a", 1.43), (" b", 1.3)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(gone:0)", [("gone", 0.0)]),
        ("(a", [("(a", 1.0)]),
        ("a)", [("a)", 1.0)]),
        (r"\(a\)", [("(a)", 1.0)]),
        ("[x]", [("[x]", 1.0)]),
    ],
)
def test_comfy_replaces_a_weight_that_is_written_and_knows_no_square_brackets(text, expected):
    assert weights(comfy_pieces(text)) == expected


@pytest.mark.parametrize("read", [a1111_pieces, comfy_pieces])
@pytest.mark.parametrize("text", ["(a:1e9)", "(a:99999)", "(" * 1000 + "a" + ")" * 1000])
def test_a_weight_beyond_reason_is_refused_or_a_word(read, text):
    if "e9" in text:  # no number of this grammar: letters
        assert weights(read(text)) == [("a:1e9", 1.1)]
        return
    with pytest.raises(Invalid, match="weight"):
        read(text)


def test_loras_are_taken_out_of_the_text():
    text, loras = without_loras("a cat <lora:pixel art:0.8> in a <lora:hat> <lyco:x:unet=0.5:1> <b>")
    assert loras == [("pixel art", 0.8), ("hat", 1.0), ("x", 0.5)]
    assert text.split() == ["a", "cat", "in", "a", "<b>"]
    with pytest.raises(Invalid, match=r"<lora:x:much>.*0\.8"):
        without_loras("<lora:x:much>")
