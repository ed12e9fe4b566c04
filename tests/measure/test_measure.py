"""Fidelity, obedience, FID and the report: against numbers worked out another way."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from controlkit.annotators import all_kinds, annotate, annotator, contract
from controlkit.annotators.lines import canny
from controlkit.annotators.maps import depth_picture, label_picture, normal_picture, pose_picture
from controlkit.controls import new_control
from controlkit.data import CirclePairs
from controlkit.errors import UserError
from controlkit.measure import (
    METRICS,
    Referee,
    ceiling_pictures,
    depth_rmse,
    edge_f1,
    evaluate,
    fid,
    fidelity,
    inpaint_distance,
    low_pass_psnr,
    mean_figure,
    metric_of,
    miou,
    ms_ssim,
    normal_angle,
    obedience,
    pck,
    three_ways,
)
from controlkit.mini.tower import ImageTextTower
from controlkit.sample import Control, SamplingSettings

# --- edges --------------------------------------------------------------------------------------------------


def column(at, side=64):
    """A line map with one vertical line."""
    lines = np.zeros((side, side), np.uint8)
    lines[:, at] = 255
    return lines


def test_equal_lines_score_one():
    assert edge_f1(column(20), column(20)) == 1.0


@pytest.mark.parametrize(("side", "reach"), [(64, 1), (256, 2), (512, 5)])
def test_the_tolerance_is_a_share_of_the_diagonal_and_at_least_a_pixel(side, reach):
    assert edge_f1(column(20, side), column(20 + reach, side)) == 1.0
    assert edge_f1(column(20, side), column(21 + reach, side)) == 0.0


def test_the_tolerance_is_a_disc_and_not_a_square():
    a, b = np.zeros((2, 64, 64), np.uint8)
    a[10, 10] = b[11, 11] = 255  # 1.4 pixels apart
    assert edge_f1(a, b) == 0.0


def test_f1_is_the_harmonic_mean_of_precision_and_recall():
    half = column(20).copy()
    half[32:] = 0
    too_much = column(20) | column(40) | column(50)
    assert edge_f1(half, column(20)) == pytest.approx(2 * 1 * (33 / 64) / (1 + 33 / 64))  # one pixel of tolerance
    assert edge_f1(too_much, column(20)) == pytest.approx(2 * (1 / 3) / (1 + 1 / 3))
    assert edge_f1(column(20), too_much) == edge_f1(too_much, column(20))


def test_emptiness_on_one_side_is_failure_and_on_both_says_nothing():
    empty = np.zeros((64, 64), np.uint8)
    assert edge_f1(empty, column(3)) == edge_f1(column(3), empty) == 0.0
    assert np.isnan(edge_f1(empty, empty))


def test_fidelity_annotates_the_picture_as_the_contract_says():
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, 32:] = 40  # fainter than 100/200 sees
    faint = annotator("canny").spec(low=10, high=20)
    hint = canny(picture, 10, 20)
    assert fidelity([picture, picture], [hint, np.zeros_like(hint)], faint).tolist() == [1.0, 0.0]
    assert fidelity([picture], [hint], annotator("canny").spec()).tolist() == [0.0]


# --- the other conditions -----------------------------------------------------------------------------------

PALETTE = np.array([(120, 180, 230), (110, 100, 90), (230, 60, 60), (20, 20, 20)], np.uint8)


def labels_iou(found, wanted):
    return miou(found, wanted, PALETTE)


def truths(kind, side=64):
    """Two different hints of a kind, each a picture of a ball somewhere, or of somebody."""
    y, x = np.mgrid[:side, :side] / side
    hints = []
    for cy, cx, radius in ((0.4, 0.35, 0.25), (0.65, 0.6, 0.2)):
        ball = np.hypot(y - cy, x - cx) < radius
        u, v = (x - cx) / radius, (cy - y) / radius
        up = np.sqrt((1 - u**2 - v**2).clip(0))
        if kind == "depth":
            hints.append(depth_picture(np.where(ball, 3 - radius * up, 6 - 2 * y)))
        elif kind == "normal":
            hints.append(normal_picture(np.stack([u, v, up], -1) * ball[..., None]))
        elif kind == "seg":
            hints.append(label_picture(np.where(ball, 2, np.where(y > 0.5, 1, 0)), PALETTE))
        elif kind == "pose":
            angle = np.linspace(0, 2 * np.pi, 18, endpoint=False)
            at = [side * (cx + radius * np.cos(angle)), side * (cy + radius * np.sin(angle)), np.ones(18)]
            hints.append(pose_picture(np.stack(at, -1)[None], (side, side)))
        else:
            shade = np.stack([230 - 100 * ball - 40 * y, 200 - 60 * y - 80 * ball, 90 + 60 * x * ball], -1)
            hints.append(annotate(shade.astype(np.uint8), annotator(kind).spec()))
    return hints


def best(name):
    return {"low_pass_psnr": 60.0}.get(name, 1.0 if METRICS[name].higher_is_better else 0.0)


CONDITIONS = ["canny", "scribble", "softedge", "lineart", "depth", "normal", "seg", "pose", "tile"]


@pytest.mark.parametrize("kind", CONDITIONS)
def test_what_is_wanted_scores_best_and_another_s_hint_worse(kind):
    metric = metric_of(contract(kind))
    function = labels_iou if kind == "seg" else metric.function
    own, other = truths(kind)
    assert function(own, own) == pytest.approx(best(metric.name), abs=1e-3)
    sign = 1 if metric.higher_is_better else -1
    assert sign * function(other, own) < sign * best(metric.name) - 0.02


@pytest.mark.parametrize("kind", [kind for kind in CONDITIONS if kind != "scribble"])
def test_a_growing_damage_never_scores_better(kind):
    metric = metric_of(contract(kind))
    function = labels_iou if kind == "seg" else metric.function
    own, other = truths(kind)
    scores = []
    for rows in (0, 16, 32, 48, 64):  # from the top on, another's hint
        damaged = own.copy()
        damaged[:rows] = other[:rows]
        scores.append(function(damaged, own) * (1 if metric.higher_is_better else -1))
    assert (np.diff(scores) <= 1e-6).all() and scores[0] > scores[-1]


def test_where_nothing_is_wanted_nothing_is_said():
    black, facing = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), (128, 128, 255), np.uint8)
    assert np.isnan([ms_ssim(black, black), depth_rmse(black, black), pck(truths("pose")[0], black)]).all()
    assert np.isnan(normal_angle(truths("normal")[0], facing))
    assert np.isnan(inpaint_distance(facing, np.zeros((64, 64, 4), np.uint8))), "all is hole"
    assert ms_ssim(black, truths("softedge")[0]) < 0.9 and pck(black, truths("pose")[0]) == 0
    assert depth_rmse(black, truths("depth")[0]) > 0.1 and normal_angle(facing, truths("normal")[0]) > 10


def test_ms_ssim_works_on_small_maps_and_says_when_they_are_too_small():
    small = truths("softedge", 44)
    assert 0 < ms_ssim(*small) < 1
    with pytest.raises(UserError, match="at least 44 pixels"):
        ms_ssim(small[0][:40], small[1][:40])


def test_ms_ssim_is_that_of_three_scales():
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    a, b = (torch.from_numpy(hint[..., 0] / np.float32(255))[None, None] for hint in truths("softedge"))
    weights = np.array([0.0448, 0.2856, 0.3001]) / (0.0448 + 0.2856 + 0.3001)
    terms = []
    for _ in range(3):
        whole, contrast = ssim(a, b, data_range=1.0, return_contrast_sensitivity=True)
        terms.append(float(contrast))
        a, b = (torch.nn.functional.avg_pool2d(m, 2) for m in (a, b))
    terms[-1] = float(whole)
    assert ms_ssim(*truths("softedge")) == pytest.approx(np.prod(np.maximum(terms, 0) ** weights), abs=1e-4)


def test_the_errors_are_in_their_units():
    grey = np.full((64, 64, 3), 51, np.uint8)
    assert depth_rmse(grey, np.zeros_like(grey)) == pytest.approx(0.2)
    assert low_pass_psnr(grey, np.zeros_like(grey)) == pytest.approx(-20 * np.log10(0.2), abs=1e-4)
    tilted = normal_picture(np.broadcast_to([np.sin(0.5), 0, np.cos(0.5)], (8, 8, 3)))
    more = normal_picture(np.broadcast_to([np.sin(0.8), 0, np.cos(0.8)], (8, 8, 3)))
    assert normal_angle(more, tilted) == pytest.approx(np.degrees(0.3), abs=0.5)


def test_normals_count_only_where_something_is_wanted():
    own = truths("normal")[0]
    elsewhere = own.copy()
    elsewhere[(own == (128, 128, 255)).all(-1)] = (255, 128, 128)
    assert normal_angle(elsewhere, own) == normal_angle(own, own)


def test_miou_is_the_mean_over_classes_in_either():
    wanted, found = np.zeros((4, 4), int), np.zeros((4, 4), int)
    wanted[:2], found[:1] = 1, 1
    found[3] = 2
    shares = [1 / 3, 1 / 2, 0]  # of class 0 one row of three, of 1 one of two, 2 is not there
    assert labels_iou(*(label_picture(m, PALETTE) for m in (found, wanted))) == pytest.approx(np.mean(shares))


def test_labels_have_the_scenes_palette_by_default():
    from controlkit.mini import scenes

    labels = np.arange(len(scenes.PALETTE)).repeat(2).reshape(-1, 2)
    assert miou(*[label_picture(labels, scenes.PALETTE)] * 2) == 1
    assert miou(label_picture(0 * labels, scenes.PALETTE), label_picture(labels, scenes.PALETTE)) < 0.1


@pytest.mark.parametrize(("off", "right"), [(0, 1), (4, 1), (9, 0)])
def test_a_joint_is_right_within_a_tenth_of_the_person(off, right):
    joints = np.zeros((1, 18, 3))
    joints[0, [0, 10]] = (60, 20, 1), (60, 80, 1)  # nose and ankle, 60 apart
    moved = joints.copy()
    moved[..., 0] += off
    assert pck(*(pose_picture(j, (128, 128)) for j in (moved, joints))) == right


def test_a_joint_in_another_s_place_is_wrong():
    joints = np.zeros((1, 18, 3))
    joints[0, [4, 7]] = (30, 60, 1), (90, 60, 1)  # both wrists
    swapped = joints.copy()
    swapped[0, [4, 7]] = joints[0, [7, 4]]
    assert pck(*(pose_picture(j, (128, 128)) for j in (swapped, joints))) == 0


@pytest.fixture
def holed():
    """(a smooth picture, the same with a hole)."""
    y, x = np.mgrid[:64, :64]
    picture = np.stack([60 + x, 60 + y, 120 + 0 * x], -1).astype(np.uint8)
    hint = np.dstack([picture, np.full((64, 64), 255, np.uint8)])
    hint[20:40, 20:40] = 0
    return picture, hint


def test_a_picture_fills_its_hole_well_if_it_keeps_the_rest_and_goes_on_from_it(holed):
    picture, hint = holed
    assert inpaint_distance(picture, hint) < 0.01
    inside, outside, middle = picture.copy(), picture.copy(), picture.copy()
    inside[20:40, 20:40] += 51
    outside[:10] += 51
    middle[25:35, 25:35] = 0
    assert inpaint_distance(inside, hint) == pytest.approx(0.2, abs=0.01), "a step across the seam"
    share = 640 / (4096 - 400)
    assert inpaint_distance(outside, hint) == pytest.approx(0.2 * share + inpaint_distance(picture, hint))
    assert inpaint_distance(middle, hint) == inpaint_distance(picture, hint), "what fills it is free"


def test_a_picture_without_a_hole_is_measured_whole(holed):
    assert inpaint_distance(holed[0] + np.uint8(51), holed[0]) == pytest.approx(0.2)


def test_an_output_for_inpainting_is_looked_at_as_it_is_and_a_tile_s_low_passed(holed):
    picture, hint = holed
    rough = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    rule = annotator("inpaint").spec()
    assert fidelity([picture, rough], [hint, hint], rule).tolist() == [
        inpaint_distance(picture, hint),
        inpaint_distance(rough, hint),
    ]
    finer = annotator("tile").spec(shrink=4)
    noisy = picture + np.random.default_rng(0).integers(0, 20, picture.shape, np.uint8)
    small = annotate(picture, finer)
    assert fidelity([picture, noisy], [small, small], finer).tolist() == [
        60.0,
        low_pass_psnr(annotate(noisy, finer), small),
    ]


def test_what_nothing_here_finds_needs_a_look():
    own, other = truths("depth")
    seen = {0: own, 1: other}
    pictures = [np.full((64, 64, 3), i, np.uint8) for i in seen]
    with pytest.raises(UserError, match='Nothing here finds "hed" in a picture: give a `look`'):
        fidelity(pictures, [own, own], contract("hed"))
    scores = fidelity(pictures, [own, own], contract("depth"), look=lambda picture: seen[int(picture[0, 0, 0])])
    assert scores.tolist() == [0.0, depth_rmse(other, own)]


def test_hints_that_prescribe_nothing_have_no_metric():
    assert metric_of(contract("hed")) is METRICS["ms_ssim"]
    assert {kind.metric for kind in all_kinds()} - {""} == set(METRICS)
    with pytest.raises(UserError, match='hints named "shuffle" is not measured'):
        metric_of(contract("shuffle"))


# --- obedience ----------------------------------------------------------------------------------------------


def rows(count, **spread):
    """Fidelity of ``count`` pictures under the four conditions, scattered about the paper-like means."""
    rng = np.random.default_rng(0)
    means = {"controlled": 0.6, "no_control": 0.2, "shuffled": 0.3, "ceiling": 0.9}
    return {name: mean + 0.05 * rng.standard_normal(count) for name, mean in means.items()} | spread


def test_obedience_is_zero_at_the_floor_and_one_at_the_ceiling():
    table = rows(20)
    assert obedience(**table | {"controlled": table["shuffled"]}).obedience.mean == pytest.approx(0)
    assert obedience(**table | {"controlled": table["ceiling"]}).obedience.mean == pytest.approx(1)
    got, top, floor = (table[name].mean() for name in ("controlled", "ceiling", "shuffled"))
    assert obedience(**table).obedience.mean == pytest.approx((got - floor) / (top - floor))


@pytest.mark.parametrize("better", ["no_control", "shuffled"])
def test_the_better_of_the_two_floors_counts(better):
    measured = obedience(**rows(20, **{better: np.full(20, 0.5)}))
    assert measured.floor.mean == pytest.approx(0.5)
    assert getattr(measured, f"floor_{better}").mean == pytest.approx(0.5)
    assert min(measured.floor_no_control.mean, measured.floor_shuffled.mean) < 0.4


@pytest.mark.parametrize("where", ["controlled", "no_control", "shuffled", "ceiling"])
def test_a_pair_that_says_nothing_is_left_out_of_every_condition(where):
    table = rows(20)
    silent = table | {where: np.where(np.arange(20) < 5, np.nan, table[where])}
    assert obedience(**silent) == obedience(**{name: values[5:] for name, values in table.items()})


def test_obedience_of_nothing_is_an_error_that_says_so():
    with pytest.raises(UserError, match="Nothing can be measured"):
        obedience(**rows(3, ceiling=np.full(3, np.nan)))


def test_intervals_hold_their_mean_and_shrink_with_the_number_of_pictures():
    few, many = (obedience(**rows(count)) for count in (16, 400))
    for figure in (*vars(few).values(), *vars(many).values()):
        assert figure == "edge_f1" or figure.low < figure.mean < figure.high
    widths = [measured.obedience.high - measured.obedience.low for measured in (few, many)]
    assert widths[1] == pytest.approx(widths[0] / 5, rel=0.4)  # as one over the root of the number


def test_the_bootstrap_is_paired():
    level = np.random.default_rng(1).random(30)  # some pictures are easier than others, whatever the condition
    figure = obedience(level + 0.2, level, level - 1, level + 0.4).obedience
    assert (figure.low, figure.mean, figure.high) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize(("ceiling", "floor", "counts"), [(0.9, 0.6, True), (0.9, 0.75, False), (0.7, 0.1, False)])
def test_obedience_counts_only_between_a_low_floor_and_a_high_ceiling(ceiling, floor, counts):
    assert obedience(**rows(9, ceiling=np.full(9, ceiling), shuffled=np.full(9, floor))).is_meaningful is counts


@pytest.mark.parametrize(
    ("metric", "ceiling", "floor", "counts"),
    [
        ("ms_ssim", 0.7, 0.4, True),  # only edges need a high ceiling
        ("miou", 0.9, 0.75, False),
        ("depth_rmse", 0.1, 0.2, True),
        ("depth_rmse", 0.1, 0.14, False),
        ("depth_rmse", 0.2, 0.1, False),
        ("low_pass_psnr", 24, 20, True),
        ("low_pass_psnr", 23, 20, False),
    ],
)
def test_each_metric_has_its_own_least_range(metric, ceiling, floor, counts):
    four = {name: np.full(9, floor) for name in ("controlled", "no_control", "shuffled")}
    assert obedience(**four, ceiling=np.full(9, ceiling), metric=metric).is_meaningful is counts


def test_obedience_by_an_error_is_zero_at_the_floor_and_one_at_the_ceiling():
    errors = {name: 1 - values for name, values in rows(20).items()}
    scores, figures = obedience(**rows(20)), obedience(**errors, metric="depth_rmse")
    assert figures.floor.mean == pytest.approx(min(errors[name].mean() for name in ("no_control", "shuffled")))
    for name, figure in vars(figures).items():
        if name == "obedience":
            assert (figure.low, figure.mean, figure.high) == pytest.approx(
                (scores.obedience.low, scores.obedience.mean, scores.obedience.high)
            )
        elif name != "metric":
            assert figure.low < figure.mean < figure.high
            assert figure.mean == pytest.approx(1 - getattr(scores, name).mean)
    assert obedience(**errors | {"controlled": errors["ceiling"]}, metric="depth_rmse").obedience.mean == 1
    assert obedience(**errors | {"controlled": errors["shuffled"]}, metric="depth_rmse").obedience.mean == 0


# --- quality ------------------------------------------------------------------------------------------------


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
    figure = fid(*(torch.from_numpy(rows).float() for rows in features), resamples=2)
    assert figure.mean == pytest.approx(frechet(made, real), rel=1e-3)


def test_a_shift_of_the_features_adds_its_square_to_fid(features):
    real = torch.from_numpy(features[0])
    assert fid(real, real, resamples=2).mean == pytest.approx(0, abs=1e-6)
    assert fid(real + 0.5, real, resamples=2).mean == pytest.approx(8 * 0.25, rel=1e-6)


def test_fid_lies_in_its_interval_however_few_the_pictures():
    generator = torch.Generator().manual_seed(0)
    made, real = (torch.randn(count, 32, generator=generator) for count in (64, 256))
    figure = fid(1.1 * made, real, resamples=20)
    assert figure.low < figure.mean < figure.high


def test_a_mean_lies_in_its_interval_which_shrinks_with_the_number_of_values():
    values = np.random.default_rng(0).standard_normal(400)
    few, many = mean_figure(values[:16]), mean_figure(values)
    assert few.mean == values[:16].mean()
    assert few.low < few.mean < few.high
    assert many.high - many.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert asdict(mean_figure(np.full(5, 2.0))) == {"mean": 2, "low": 2, "high": 2}


@pytest.fixture(scope="module")
def referee(toy_base, tmp_path_factory):
    """A referee with random weights, in the form the recipe saves."""
    folder = tmp_path_factory.mktemp("referee")
    tokens = toy_base.towers[0].tokenizer
    text = {name: getattr(tokens, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text |= {"vocab_size": len(tokens), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 1, "max_position_embeddings": toy_base.window}
    image = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    torch.manual_seed(0)
    ImageTextTower({"pixels": 32, "space": 8, "text": text, "image": image}).save(folder)
    tokens.save_pretrained(folder)
    return Referee(folder)


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


# --- the whole report ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(toy_base, drawn_joins):
    return Control(drawn_joins(new_control(toy_base)).eval(), annotator("canny").spec())


def test_the_ceiling_is_the_vae_s_reconstruction_whatever_the_batch(toy_base):
    truths = [pair.picture for pair in CirclePairs(32, 3)]
    whole, halves = ceiling_pictures(toy_base, truths), ceiling_pictures(toy_base, truths, batch=2)
    assert [picture.shape for picture in whole] == [(32, 32, 3)] * 3
    assert np.abs(np.stack(whole).astype(int) - np.stack(halves)).max() <= 1
    assert not np.array_equal(whole[0], whole[1])


def test_the_three_ways_share_seeds_and_prompts_and_differ_in_hints_alone(toy_base, drawn):
    truths = list(CirclePairs(32, 4))
    hints = [truth.hint for truth in truths]
    made = three_ways(toy_base, drawn, truths, hints, SamplingSettings(1))
    assert set(made) == {"controlled", "no_control", "shuffled"}
    again = three_ways(
        toy_base, drawn, truths, [*hints[2:], *hints[:2]], SamplingSettings(1), wanted=("controlled", "shuffled")
    )
    assert np.array_equal(again["shuffled"], made["controlled"]), "nobody keeps his own hint: a rotation by half"
    assert not np.array_equal(made["controlled"], made["no_control"])
    assert "no_control" not in again


def test_evaluation_reports_every_figure_with_its_interval(toy_base, drawn, referee):
    advanced = []
    real = [pair.picture for pair in CirclePairs(32, 6, first=100)]
    truths = list(CirclePairs(32, 4))
    report = evaluate(toy_base, drawn, truths, real, SamplingSettings(2), referee, on_step=advanced.append)
    figures = {"fidelity", "floor", "floor_no_control", "floor_shuffled", "ceiling", "obedience"}
    figures |= {"clip_score", "clip_score_no_control", "fid", "fid_no_control"}
    assert {name for name, value in report.items() if isinstance(value, dict)} == figures | {"settings"}
    for name in figures:
        assert set(report[name]) == {"mean", "low", "high"}
        assert np.isfinite([*report[name].values()]).all()
    assert report["floor"]["mean"] == max(report["floor_no_control"]["mean"], report["floor_shuffled"]["mean"])
    assert (report["metric"], report["num"]) == ("edge_f1", 4)
    assert report["settings"] == {
        "steps": 2, "guidance": 4.0, "size": None, "scale": 1.0, "hint_cfg": 1.0, "seeds": "0-3", "base": "toy",
        "base_digest": toy_base.digest, "format": "float32",
    }  # fmt: skip
    assert report["seconds"] > 0 and json.loads(json.dumps(report)) == report
    assert sum(advanced) == 3 * 4 * 2, "three ways, four pictures, two steps"
