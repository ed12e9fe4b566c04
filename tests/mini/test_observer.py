"""The referees: the observer, the aesthetic head, and the recipe that trains them."""

import dataclasses
import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from controlkit.images import to_tensor
from controlkit.mini.aesthetic import DAMAGES, AestheticHead, damage
from controlkit.mini.observer import (
    MIRRORED,
    Observer,
    heatmaps,
    maps_of,
    mirrored,
    peaks,
    persons,
)
from controlkit.mini.scenes import CLASSES, draw_scene, draw_scenes, load_scenes
from controlkit.mini.tower import ImageTextTower
from controlkit.seeds import numpy_rng

CONFIG = {"pixels": 32, "widths": [8, 8, 16, 16], "classes": list(CLASSES)}
FIGURE = [CLASSES.index(name) for name in ("skin", "hair", "shirt", "trousers", "shoes")]


@pytest.fixture(scope="session")
def drawn():
    """Eight scenes at 64 pixels, figures among them."""
    scenes = list(draw_scenes(64, 5, range(8)))
    assert any(len(scene.keypoints) for scene in scenes)
    return scenes


@pytest.fixture
def observer():
    """An untrained one, 32 pixels wide, that sees every class somewhere."""
    torch.manual_seed(0)
    made = Observer(CONFIG).eval()
    with torch.no_grad():
        made.conv_out["maps"].weight.mul_(10)
    return made


@pytest.fixture
def referees(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "recipes")
    return importlib.import_module("referees")


def read_back(scene):
    """A scene's joints through heatmaps of half its side, and back."""
    size = len(scene.labels)
    heat = heatmaps([scene.keypoints], size, size // 2)[0].numpy()
    return persons(peaks(heat) * (2, 2, 1, 1), np.isin(scene.labels, FIGURE))


def test_the_shipped_size_stays_under_a_million_parameters():
    widths = {"pixels": 128, "widths": [32, 48, 96, 128]}
    assert sum(p.numel() for p in Observer(CONFIG | widths).parameters()) <= 1_000_000


def test_an_observation_keeps_to_a_scene_s_conventions_at_the_picture_s_own_size(observer, drawn):
    narrow = drawn[0].picture[:, :40]
    whole, part = observer.observe([drawn[0].picture, narrow])
    for seen, (height, width) in ((whole, (64, 64)), (part, (64, 40))):
        assert (seen.depth.shape, seen.depth.dtype) == ((height, width), np.float32)
        assert (seen.normals.shape, seen.normals.dtype) == ((height, width, 3), np.float32)
        assert (seen.labels.shape, seen.labels.dtype) == ((height, width), np.uint8)
        assert seen.keypoints.shape[1:] == (18, 3) and seen.keypoints.dtype == np.float32
        assert seen.labels.max() < len(CLASSES)
        sky = seen.labels == CLASSES.index("sky")
        assert sky.any() and not sky.all(), "both are looked at below"
        assert np.isinf(seen.depth[sky]).all() and np.isfinite(seen.depth[~sky]).all() and (seen.depth > 0).all()
        assert not seen.normals[sky].any()
        assert np.allclose(np.linalg.norm(seen.normals[~sky], axis=-1), 1, atol=1e-5)


def test_pictures_are_read_alike_whatever_the_batch(observer, drawn):
    pictures = [scene.picture for scene in drawn]
    for one, other in zip(observer.observe(pictures), observer.observe(pictures, batch=3), strict=True):
        assert np.allclose(one.normals, other.normals, atol=1e-4) and (one.labels == other.labels).mean() > 0.999


def test_what_is_saved_comes_back_rounded_to_half_precision_and_frozen(observer, drawn, tmp_path):
    observer.half().float()
    head = AestheticHead({"features": 8, "width": 4}).half().float()
    observer.save(tmp_path / "observer")
    head.save(tmp_path / "aesthetic")
    again, rating = Observer.load(tmp_path / "observer"), AestheticHead.load(tmp_path / "aesthetic")
    pixels, features = to_tensor([drawn[0].picture]), torch.randn(3, 8)
    assert all(torch.equal(a, b) for a, b in zip(observer(pixels).values(), again(pixels).values(), strict=True))
    assert torch.equal(head(features), rating(features)) and rating(features).shape == (3,)
    assert {path.name for path in tmp_path.rglob("*.*")} == {"config.json", "model.safetensors"}
    for module in (again, rating):
        assert not module.training and not any(p.requires_grad or p.dtype != torch.float32 for p in module.parameters())


def test_the_truth_scores_perfectly_and_any_error_shows(drawn, referees):
    score = referees.observer_accuracy
    perfect = score(drawn, drawn)
    assert perfect == pytest.approx({"depth_rmse": 0, "normal_degrees": 0, "miou": 1, "pck": 1}, abs=1e-6)
    turn = np.array([[math.cos(0.2), math.sin(0.2), 0], [-math.sin(0.2), math.cos(0.2), 0], [0, 0, 1]], np.float32)
    for field, change, figure, better in (
        ("depth", lambda d: d**2, "depth_rmse", min),
        ("normals", lambda n: n @ turn, "normal_degrees", min),
        ("labels", lambda x: np.where(x == 1, 0, x).astype(np.uint8), "miou", max),
        ("keypoints", lambda k: k + np.float32([20, 0, 0]), "pck", max),
    ):
        wrong = score([dataclasses.replace(s, **{field: change(getattr(s, field))}) for s in drawn], drawn)
        assert better(wrong[figure], perfect[figure]) == perfect[figure] != pytest.approx(wrong[figure], abs=1e-3)
        assert {k: v for k, v in wrong.items() if k != figure} == {k: v for k, v in perfect.items() if k != figure}


def test_normals_off_by_a_known_angle_score_that_angle_and_unread_ones_a_right_one(drawn, referees):
    score = referees.observer_accuracy
    scene = drawn[0]
    flat = np.where(scene.normals.any(-1, keepdims=True), np.float32([0, 0, 1]), 0).astype(np.float32)
    tilted = (flat @ np.array([[1, 0, 0], [0, 1, 0], [math.sin(0.3), 0, math.cos(0.3)]])).astype(np.float32)
    true = dataclasses.replace(scene, normals=flat)
    for seen, angle in ((tilted, math.degrees(0.3)), (np.zeros_like(flat), 90.0)):
        assert score([dataclasses.replace(scene, normals=seen)], [true])["normal_degrees"] == pytest.approx(
            angle, abs=1e-3
        )


def test_joints_come_back_from_heatmaps_where_they_were():
    scene = draw_scene(128, 7, 3)
    found = read_back(scene)
    assert found.shape == (1, 18, 3)
    true = scene.keypoints[0]
    assert (found[0, :, 2] == true[:, 2]).all(), "what is hidden is not found"
    visible = true[:, 2] > 0
    assert np.abs(found[0, visible, :2] - true[visible, :2]).max() < 0.5, "pixels"


def test_two_figures_are_two_persons_each_with_their_own_joints():
    scene = draw_scene(128, 7, 51)
    assert len(scene.keypoints) == 2 and scene.keypoints[:, 1, 2].all(), "both necks can be seen"
    found = read_back(scene)
    assert len(found) == 2
    true = scene.keypoints[np.argsort(scene.keypoints[:, 1, 0])]
    found = found[np.argsort(found[:, 1, 0])]
    shared = (found[..., 2] > 0) & (true[..., 2] > 0)
    assert shared.sum() >= 0.9 * (true[..., 2] > 0).sum()
    assert np.abs(found[shared][:, :2] - true[shared][:, :2]).max() < 1, "no joint is the other's"


def test_a_picture_without_figures_has_no_persons():
    assert persons(np.zeros((0, 4), np.float32), np.zeros((8, 8), bool)).shape == (0, 18, 3)


def test_a_mirror_exchanges_left_and_right_where_it_is_asked(drawn):
    scenes = [scene for scene in drawn if len(scene.keypoints)][:2] * 2
    true = maps_of(scenes)
    turned = mirrored(true, torch.tensor([True, True, False, False]))
    for name, values in true.items():
        assert torch.equal(turned[name][2:], values[2:]) and not torch.equal(turned[name][:2], values[:2])
    # The same scenes with each joint where its opposite is seen in a mirror.
    reflected = []
    for scene in scenes[:2]:
        keypoints = scene.keypoints[:, MIRRORED].copy()
        keypoints[..., 0] = 64 - keypoints[..., 0]
        reflected.append(
            dataclasses.replace(
                scene,
                depth=scene.depth[:, ::-1],
                labels=scene.labels[:, ::-1],
                normals=scene.normals[:, ::-1] * np.float32([-1, 1, 1]),
                keypoints=keypoints,
            )
        )
    for name, values in maps_of(reflected).items():
        assert torch.allclose(turned[name][:2], values, atol=1e-5), name
    assert [MIRRORED[MIRRORED[joint]] for joint in range(18)] == list(range(18))
    rightmost = [
        2,
        3,
        4,
        8,
        9,
        10,
        14,
        16,
    ]  # OpenPose's order: right shoulder, elbow, wrist, hip, knee, ankle, eye, ear
    assert sorted(MIRRORED[joint] for joint in rightmost) == [5, 6, 7, 11, 12, 13, 15, 17]


def test_the_loss_is_small_for_the_truth_alone(observer, drawn):
    true = maps_of(drawn)
    logits = torch.nn.functional.one_hot(true["labels"], len(CLASSES)).permute(0, 3, 1, 2) * 20.0
    read = {"depth": true["depth"], "normals": 3 * true["normals"], "labels": logits}
    read["joints"] = torch.logit(true["joints"], eps=1e-6)
    observer.forward = lambda pixels: read
    _, terms = observer.loss(to_tensor([scene.picture for scene in drawn]), true)
    assert max(terms["depth"], terms["normals"], terms["labels"]) < 1e-3
    for name in ("depth", "normals", "labels", "joints"):
        kept, read[name] = read[name], read[name].roll(9, -1)
        assert observer.loss(torch.zeros(8, 3, 64, 64), true)[1][name] > 1.5 * terms[name] + 0.01, name
        read[name] = kept


def test_training_lowers_every_term_of_the_loss(drawn):
    torch.manual_seed(0)
    observer = Observer(CONFIG | {"pixels": 64})
    optimizer = torch.optim.AdamW(observer.parameters(), lr=1e-2)
    pixels, true = to_tensor([scene.picture for scene in drawn]), maps_of(drawn)
    seen = []
    for _ in range(40):
        loss, terms = observer.loss(pixels, true)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(terms)
    assert all(seen[-1][name] < 0.8 * seen[0][name] for name in terms), (seen[0], seen[-1])


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_grows_with_its_amount_and_is_the_same_for_the_same_key(kind, drawn):
    def away(amount):
        errors = []
        for i, scene in enumerate(drawn):
            picture = scene.picture.copy()
            first, again = (damage(picture, amount, numpy_rng("test", i), [kind]) for _ in range(2))
            assert np.array_equal(first, again) and first.dtype == np.uint8 and first.shape == picture.shape
            assert np.array_equal(picture, scene.picture), "what is given stays as it is"
            errors.append(np.abs(first.astype(float) - picture).mean())
        return np.mean(errors)

    amounts = [away(amount) for amount in (0, 0.2, 0.5, 1)]
    assert amounts[0] == 0 and all(np.diff(amounts) > 0.3), amounts


def test_damage_differs_by_key_in_kind(drawn):
    made = {damage(drawn[0].picture, 0.5, numpy_rng("test", i)).tobytes() for i in range(20)}
    assert len(made) > len(DAMAGES), "kinds, pairs of them, and draws within a kind"


def test_a_training_batch_is_the_same_for_its_step_and_its_truth_is_turned_with_it(referees, drawn):
    pixels, true = referees.scene_batch(drawn, 6, 3)
    again = referees.scene_batch(drawn, 6, 3)
    assert torch.equal(pixels, again[0]) and all(torch.equal(true[name], again[1][name]) for name in true)
    assert not torch.equal(pixels, referees.scene_batch(drawn, 6, 4)[0])
    assert pixels.shape == (6, 3, 64, 64) and pixels.abs().max() <= 1
    # Each row shows one of the scenes or its mirror image, and says so in picture and truth alike.
    plain, facing = to_tensor([scene.picture for scene in drawn]), maps_of(drawn)["labels"]
    turned = []
    for row, labels in zip(pixels, true["labels"], strict=True):
        which, flip = next(
            (i, flip)
            for i in range(8)
            for flip in (False, True)
            if torch.equal(facing[i].flip(-1) if flip else facing[i], labels)
        )
        views = [plain[which].flip(-1) if side else plain[which] for side in (False, True)]
        likeness = [torch.corrcoef(torch.stack([view.flatten(), row.flatten()]))[0, 1] for view in views]
        assert int(likeness[1] > likeness[0]) == flip
        turned.append(flip)
    assert len(set(turned)) == 2, "both kinds are looked at"


def test_the_recipe_trains_both_referees_and_leaves_folders_that_load(
    referees, fake_packages, tmp_path, capsys, monkeypatch
):
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 1, "max_position_embeddings": 32}
    image = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "layer_type": "basic"}
    tower = ImageTextTower({"pixels": 32, "space": 8, "text": text, "image": image})
    tower.save(tmp_path / "referee")
    steps = {}
    train = referees.Run.train

    def counted(run, name, module, loss_of, *rest, **more):
        steps[name] = 0

        def counting(step, progress):
            steps[name] += 1
            return loss_of(step, progress)

        return train(run, name, module, counting, *rest, **more)

    monkeypatch.setattr(referees.Run, "train", counted)
    monkeypatch.setattr(referees, "SHARES", dict.fromkeys(referees.SHARES, 1 / 60 / 0.2))
    referees.main(tmp_path, toy=True)
    assert steps.keys() == {"observer", "aesthetic"} and all(steps.values())
    shown = capsys.readouterr().out
    figures = json.loads(shown[shown.index("{") :])
    assert figures["observer"].keys() == {"depth_rmse", "normal_degrees", "miou", "pck"}
    assert -1 <= figures["aesthetic"]["rank_correlation"] <= 1

    scenes = load_scenes(32, referees.HELDOUT_SEED, 4)  # as the recipe reads them, rounded by the cache
    seen = Observer.load(tmp_path / "observer").observe([scene.picture for scene in scenes])
    assert referees.observer_accuracy(seen, scenes) == pytest.approx(figures["observer"], nan_ok=True)
    head = AestheticHead.load(tmp_path / "aesthetic")
    rating = head(tower.eval().features(to_tensor([scenes[0].picture])))
    assert rating.shape == (1,) and 0 <= rating.item() <= 10

    kept = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    referees.main(tmp_path, toy=True)
    assert not any(steps.values()), "finished stages are not trained again"
    assert {path: path.read_bytes() for path in kept} == kept
