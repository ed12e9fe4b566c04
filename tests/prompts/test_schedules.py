"""Words that change between steps, as A1111 reads them: the expected values are those of its published examples."""

import time

import pytest

from controlkit.prompts import Span, composed, schedule


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("test", [(10, "test")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3]", [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("a [{b|d{:.5] c", [(5, "a  c"), (10, "a {b|d{ c")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        ("[in front::0.6]", [(6, "in front"), (10, "")]),
    ],
)
def test_published_examples_of_editing(text, expected):
    assert schedule(text, Span(10)) == expected


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        ("[a|(b:1.1)]", ["a", "(b:1.1)"]),
        ("[fe|]male", ["female", "male"]),
        ("[fe|||]male", ["female", "male", "male", "male"]),
    ],
)
def test_published_examples_of_words_in_turns(text, turns):
    words = [words for end, words in schedule(text, Span(10)) for _ in range(end)]
    by_step = [next(words for end, words in schedule(text, Span(10)) if step <= end) for step in range(1, 11)]
    assert words and by_step == [turns[i % len(turns)] for i in range(10)]


def test_the_documented_landscape_changes_at_its_four_steps():
    text = (
        "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75][ in foreground::0.6]"
        "[ in background:0.25] [shoddy:masterful:0.5]"
    )
    assert schedule(text, Span(100)) == [
        (25, "fantasy landscape with a mountain and an oak in foreground shoddy"),
        (50, "fantasy landscape with a lake and an oak in foreground in background shoddy"),
        (60, "fantasy landscape with a lake and an oak in foreground in background masterful"),
        (75, "fantasy landscape with a lake and an oak in background masterful"),
        (100, "fantasy landscape with a lake and a christmas tree in background masterful"),
    ]


def test_in_the_second_pass_shares_count_from_one_and_steps_go_on():
    second = Span(10, before=10, passes=1)
    assert schedule("a [b:.5] c", second) == [(10, "a b c")]
    assert schedule("a [b:1.5] c", second) == [(5, "a  c"), (10, "a b c")]
    assert schedule("a [b:13] c", second) == [(3, "a  c"), (10, "a b c")]


def test_and_parts_prompts_with_weights_and_no_word_that_holds_it():
    assert composed("a cat :1.2 AND a dog AND a penguin :2.2") == [("a cat", 1.2), ("a dog", 1.0), ("a penguin", 2.2)]
    assert composed("a SANDCASTLE") == [("a SANDCASTLE", 1.0)]
    assert composed("(a:1.2)") == [("(a:1.2)", 1.0)]


@pytest.mark.parametrize("text", ["[" * 2000, "([" * 1000, "[a|" * 1000, "[" * 500 + "]" * 500, "[a:b:0.5" * 500])
def test_brackets_without_end_take_no_time_without_end(text):
    start = time.process_time()
    [(_, words), *_] = schedule(text, Span(10))
    assert time.process_time() - start < 5 and words
