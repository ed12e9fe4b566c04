"""Text towers: windows, weights of words, clip skip; by CLIP's own tokenizer and towers of two widths, drawn."""

import copy

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from controlkit.backbones.text import TextTower
from controlkit.backbones.unet_families import clip_tokenizer
from controlkit.errors import Invalid
from controlkit.prompts import Piece, Words
from controlkit.sample import Request, prepare

FACTS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    encoder = CLIPTextModel(CLIPTextConfig(**FACTS, vocab_size=49408)).eval()
    encoder.final_layer_norm.bias.data.uniform_()  # else all means are zero
    return TextTower(clip_tokenizer(), encoder)


@pytest.fixture(scope="module")
def wide_tower():
    torch.manual_seed(1)
    config = CLIPTextConfig(**FACTS, vocab_size=49408, projection_dim=24)
    return TextTower(clip_tokenizer(pad="!"), CLIPTextModelWithProjection(config).eval(), penultimate=True)


@torch.no_grad()
def vectors(tower, prompt):
    [(tokens, _)] = tower.encode([prompt])
    return tokens


def counted(tower, text, dialect):
    return [len(window) for window in tower.windows(Words.of(text, dialect))]


@pytest.mark.parametrize("dialect", ["plain", "a1111", "comfy"])
def test_words_of_weight_one_in_one_window_are_read_as_the_text_bit_for_bit(tower, wide_tower, dialect):
    for one in (tower, wide_tower):
        for text in ("", "a red apple, on teal"):
            assert torch.equal(vectors(one, Words.of(text, dialect)), vectors(one, text))


def test_two_windows_are_the_vectors_of_both(tower):
    first, second = " ".join(["cat"] * 75), "a dog"
    both = vectors(tower, Words.of(f"{first} {second}", "comfy"))
    assert torch.equal(vectors(tower, Words.of(f"{first} {second}")), vectors(tower, f"{first} {second}")), "plain: cut"
    assert both.shape == (2 * 77, 32)
    assert torch.allclose(both, torch.cat([vectors(tower, first), vectors(tower, second)]), atol=1e-6)


def test_the_projection_is_of_the_first_window(wide_tower):
    first = " ".join(["cat"] * 75)
    [(_, long), (_, short)] = wide_tower.encode([Words.of(f"{first} dog", "comfy"), first])
    assert torch.allclose(long, short, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "a1111", "comfy"),
    [
        ("cat " * 75, [75], [75]),
        ("cat " * 76, [75, 1], [75, 1]),
        ("cat " * 59 + ", " + "cat " * 20, [60, 20], [75, 5]),  # the comma is the 16th from the end
        ("cat " * 54 + ", " + "cat " * 25, [75, 5], [75, 5]),  # the 21st: too far
        ("cat " * 55 + ", " + "cat " * 24, [56, 24], [75, 5]),  # the 20th
        ("cat " * 75 + ", dog", [75, 2], [75, 2]),  # the comma itself does not fit
    ],
)
def test_a_full_window_ends_at_a_comma_among_its_last_twenty_tokens(tower, text, a1111, comfy):
    assert counted(tower, text, "a1111") == a1111
    assert counted(tower, text, "comfy") == comfy
    assert counted(tower, text, "plain") == comfy[:1]


def test_a_break_fills_its_window_up(tower):
    broken = vectors(tower, Words.of("a cat BREAK a dog", "a1111"))
    assert torch.allclose(broken, torch.cat([vectors(tower, "a cat"), vectors(tower, "a dog")]), atol=1e-6)
    assert counted(tower, "a cat BREAK", "a1111") == [2]
    assert counted(tower, "a cat BREAK a dog", "comfy") == [5]


def test_comfy_parts_no_short_words_of_one_weight(tower):
    assert counted(tower, "cat " * 73 + "(a big dog:1.2)", "comfy") == [73, 3]
    assert counted(tower, "cat " * 73 + "(a very big and old and red dog:1.2)", "comfy") == [75, 6]


def test_a_learnt_word_is_in_one_window(tower):
    tokenizer = clip_tokenizer()
    tokenizer.add_tokens(["sparkle9", "sparkle9_1", "sparkle9_2"])
    learnt = TextTower(tokenizer, tower.encoder)
    assert counted(learnt, "cat " * 72 + "sparkle9", "a1111") == [75]
    assert counted(learnt, "cat " * 73 + "sparkle9 sparkle9", "a1111") == [73, 6]
    assert counted(learnt, "cat " * 73 + "sparkle9", "comfy") == [73, 3]


def test_a1111_weights_vectors_and_brings_them_to_the_mean_they_had(tower):
    plain, weighted = vectors(tower, "a red cat"), vectors(tower, Words.of("a (red:1.5) cat", "a1111"))
    expected = plain.clone()
    expected[2] *= 1.5
    expected *= plain.mean() / expected.mean()
    assert torch.allclose(weighted, expected, rtol=1e-5)
    assert torch.allclose(weighted.mean(), plain.mean(), rtol=1e-4)


def test_a_mean_that_is_rounding_alone_is_not_brought_back(tower):
    encoder = copy.deepcopy(tower.encoder)
    encoder.final_layer_norm.bias.data.zero_()
    tower = TextTower(tower.tokenizer, encoder)
    for weight in (0.3, 1.4, 5):
        expected = vectors(tower, "a red cat")
        expected[2] *= weight
        assert torch.equal(vectors(tower, Words.of(f"a (red:{weight}) cat", "a1111")), expected)


def test_comfy_moves_vectors_away_from_those_of_no_words(tower):
    plain, empty = vectors(tower, "a red cat"), vectors(tower, "")
    expected = plain.clone()
    expected[2] = empty[2] + (plain[2] - empty[2]) * 1.5
    assert torch.allclose(vectors(tower, Words.of("a (red:1.5) cat", "comfy")), expected, atol=1e-6)


@torch.no_grad()
def test_clip_skip_is_counted_as_each_dialect_counts_it(tower, wide_tower):
    def read(one, dialect, skip):
        return vectors(one, Words((Piece("a cat"),), dialect, skip))

    hidden = tower.encoder(tower.tokenize(["a cat"]), output_hidden_states=True).hidden_states
    normed = [tower.encoder.final_layer_norm(layer)[0] for layer in hidden]
    for dialect, counts in {"plain": (0, 1, 2), "a1111": (1, 2, 3), "comfy": (-1, -2, -3)}.items():
        for left_out, skip in enumerate(counts):
            assert torch.allclose(read(tower, dialect, skip), normed[-1 - left_out], atol=1e-6)
    wide = wide_tower.encoder(wide_tower.tokenize(["a cat"]), output_hidden_states=True).hidden_states
    for dialect, skip, layer in [
        ("plain", 0, -2),
        ("plain", 1, -3),
        ("a1111", 1, -2),
        ("a1111", 2, -2),
        ("a1111", 3, -3),
        ("comfy", -1, -1),
        ("comfy", -3, -3),
    ]:
        assert torch.equal(read(wide_tower, dialect, skip), wide[layer][0])


def test_a_clip_skip_that_leaves_no_layer_is_refused(toy_base):
    layers = toy_base.towers[0].encoder.config.num_hidden_layers
    for dialect, skip in (("plain", layers), ("a1111", layers + 1), ("comfy", -layers - 1)):
        with pytest.raises(Invalid, match=f"leaves out {layers} layers of a text encoder that has {layers}"):
            prepare(toy_base, [Request(dialect=dialect, clip_skip=skip)])


def test_fewer_windows_are_repeated_and_attention_to_them_stays(toy_base):
    long = Words.of("red " * 60, "comfy")
    count = len(toy_base.towers[0].windows(long))
    text, alone = toy_base.encode_text(["a cat", long]), toy_base.encode_text(["a cat"])
    assert count > 1 and text.tokens.shape[1] == count * toy_base.window
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([300])
    x = x[:, : toy_base.latent_channels]
    with torch.no_grad():
        repeated, plain = toy_base.predict(x, t, text[:1]), toy_base.predict(x, t, alone)
    assert torch.allclose(repeated, plain, atol=1e-5) and plain.std() > 0.01
