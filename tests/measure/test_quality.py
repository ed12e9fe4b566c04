"""The quality of pictures: FID, the referee, and colours."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from controlkit.data import CirclePairs, Pair
from controlkit.errors import NotFound
from controlkit.measure import EMBEDDED, Figure, Quality, colours, fid, quality_kept, unjudgeable
from controlkit.mini.scenes import draw_scenes


def frechet(made, real):
    """The closed form, by numpy's eigenvalues."""
    shift = ((made.mean(0) - real.mean(0)) ** 2).sum()
    a, b = (np.cov(rows, rowvar=False) for rows in (made, real))
    return shift + np.trace(a) + np.trace(b) - 2 * np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()


@pytest.fixture(scope="module")
def features():
    """300 correlated features, and 200 of another distribution."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((2, 8, 8))
    return rng.standard_normal((300, 8)) @ mix[0], 0.3 + rng.standard_normal((200, 8)) @ mix[1]


def test_fid_is_the_frechet_distance(features):
    made, real = features
    figure = fid(*(torch.from_numpy(rows).float() for rows in features))
    assert figure.mean == pytest.approx(frechet(made, real), rel=1e-3)


def test_a_shift_of_the_features_adds_its_square_to_fid(features):
    real = torch.from_numpy(features[0])
    assert fid(real, real).mean == pytest.approx(0, abs=1e-6)
    assert fid(real + 0.5, real).mean == pytest.approx(8 * 0.25, rel=1e-6)


def test_fid_lies_in_its_interval_however_few_the_pictures():
    generator = torch.Generator().manual_seed(0)
    made, real = (torch.randn(count, 32, generator=generator) for count in (64, 256))
    figure = fid(1.1 * made, real)
    assert figure.low < figure.mean < figure.high


def test_the_referee_scores_a_picture_by_the_cosine_with_its_prompt(referee):
    pictures, prompts = [pair.picture for pair in CirclePairs(32, 3)], ["red circle", "gold circle", "a"]
    images, texts = referee.embed(pictures), [referee.clip_scores([pictures[0]], [p])[0] for p in prompts]
    assert torch.allclose(images.norm(dim=-1), torch.ones(3))
    scores = referee.clip_scores(pictures, prompts)
    assert scores.shape == (3,) and (abs(scores) <= 1).all()
    assert scores[0] == pytest.approx(texts[0], abs=1e-6) and len({*texts}) == 3


def test_the_referee_sees_pictures_of_any_size(referee):
    small, large = ([pair.picture for pair in CirclePairs(side, 2)] for side in (32, 64))
    assert referee.features(small).shape == referee.features(large).shape == (2, 16)


def test_the_referee_chooses_the_caption_that_fits(referee, monkeypatch):
    colours = {"red": 0, "green": 1, "blue": 2}
    space = torch.eye(3)
    rows_of = {name: referee.tokenizer(name).input_ids for name in colours}

    def embed_texts(tokens):
        found = [next(i for name, i in colours.items() if row[: len(rows_of[name])] == rows_of[name])
                 for row in tokens.tolist()]  # fmt: skip
        return space[found]

    tower = SimpleNamespace(
        config=referee.tower.config,
        embed_images=lambda pixels: space[pixels.mean((2, 3)).argmax(1)],
        embed_texts=embed_texts,
    )
    monkeypatch.setattr(referee, "tower", tower)
    pictures = [np.full((8, 8, 3), np.eye(3)[i] * 255, np.uint8) for i in range(3)]
    captions = [["blue", "red"], ["green", "red", "blue"], ["red", "green", "blue"]]
    assert referee.choose(pictures, captions).tolist() == [1, 0, 2]


def test_a_referee_without_a_head_rates_nothing(referee):
    pictures = [pair.picture for pair in CirclePairs(32, 4)]
    with pytest.raises(NotFound, match="no aesthetic head"):
        referee.ratings(pictures)
    assert set(Quality(referee, pictures).figures(pictures, ["a"] * 4)) == {"clip_score", "fid"}


@pytest.mark.parametrize(
    ("clip_score", "fid", "truth", "kept"),
    [
        (0.95, 110, 2.0, True),
        (0.94, 100, 2.0, False),
        (1.0, 111, 2.0, False),
        (1.2, 50, 2.0, True),
        (0.57, 100, 0.6, True),
        (0.56, 100, 0.6, False),
        (0.6, 111, 0.6, False),
    ],
)
def test_quality_is_kept_where_neither_figure_fell_below_the_lesser_of_truth_and_no_control(
    clip_score, fid, truth, kept
):
    def figures(*means):
        return {name: Figure(mean, mean, mean) for name, mean in zip(("clip_score", "fid"), means, strict=True)}

    assert quality_kept(figures(clip_score, fid), figures(1.0, 100), Figure(truth, truth, truth)) is kept


# --- what a referee may judge -------------------------------------------------------------------------------


def scribbles(num=16, side=64):
    """Drawings of a style that the embedded world does not have, with a person's captions."""
    things = ["violin", "lighthouse", "trilobite", "hammer", "obelisk", "quarter", "butterflyfish", "tractor"]
    drawn = []
    for i in range(num):
        rng = np.random.default_rng(i)
        picture = np.full((side, side, 3), 255, np.uint8)
        points = rng.integers(4, side - 4, (6, 1, 2)).astype(np.int32)
        cv2.polylines(picture, [points], bool(i % 2), (0, 0, 0), 2)
        drawn.append(Pair(picture, f"A {things[i % 8]} number {i}."))
    return drawn


def shuffled(pairs):
    return [Pair(one.picture, other.prompt) for one, other in zip(pairs, [*pairs[3:], *pairs[:3]], strict=True)]


CIRCLES = list(CirclePairs(64, 16))


@pytest.fixture(scope="module")
def shipped():
    return EMBEDDED.referee("cpu")


@pytest.mark.parametrize(
    "pairs",
    [
        scribbles(),
        shuffled(CIRCLES),
        [Pair(pair.picture, "a picture") for pair in CIRCLES],
        [Pair(CIRCLES[0].picture, pair.prompt) for pair in CIRCLES],
    ],
    ids=["a person's drawings", "others' captions", "one caption", "one picture"],
)
def test_a_referee_may_not_judge_pictures_whose_captions_it_cannot_tell(pairs, shipped):
    assert "50% is chance" in unjudgeable(shipped, pairs)


def test_a_referee_may_judge_the_pictures_of_its_world(shipped):
    scenes = [Pair(scene.picture, scene.captions[0]) for scene in draw_scenes(64, 5, range(12))]
    assert unjudgeable(shipped, CIRCLES) == unjudgeable(shipped, scenes) == ""
    assert "no referee" in unjudgeable(None, CIRCLES)


def test_preferences_are_shares_of_the_other_captions_and_ties_are_half(referee, monkeypatch):
    images, texts = np.eye(3, dtype=np.float32), np.float32([[1, 0, 0], [1, 1, 0], [0, 0, 1]])
    monkeypatch.setattr(referee, "embed", lambda pictures: torch.from_numpy(images))
    monkeypatch.setattr(referee.tower, "embed_texts", lambda tokens: torch.from_numpy(texts))
    assert referee.preferences([None] * 3, ["a"] * 3).tolist() == [0.75, 1.0, 1.0]


def flat(*colour):
    return np.full((8, 8, 3), colour, np.uint8)


def test_colours_are_means_contrast_and_saturation():
    assert colours(flat(255, 0, 51)).tolist() == pytest.approx([1, 0, 0.2, 0, 1])
    halves = np.concatenate([flat(0, 0, 0), flat(255, 255, 255)])
    assert colours(halves).tolist() == pytest.approx([0.5, 0.5, 0.5, 0.5, 0])
