"""Scenes: the same for their number, and everything said of them is true of the picture."""

import hashlib
import math
import re

import numpy as np
import pytest

from controlkit.mini import scenes as module
from controlkit.mini.scenes import (
    CLASSES,
    COLOURS,
    FLOORS,
    HELDOUT,
    MATERIALS,
    PALETTE,
    POSES,
    SKIES,
    SOLIDS,
    draw_scene,
    draw_scenes,
    load_scenes,
)

SIZE = 48
SKY, FLOOR = 0, 1
ARRAYS = ("picture", "depth", "normals", "labels", "instances", "edges", "lines", "keypoints")


@pytest.fixture(scope="module")
def many():
    """Scenes 0 to 39 of a seed."""
    return list(draw_scenes(SIZE, 0, range(40)))


@pytest.fixture(scope="module")
def said():
    """Captions and whether held out, of 300 scenes drawn as small as they go."""
    return [(scene.captions, scene.heldout) for scene in draw_scenes(4, 0, range(300))]


def equal(a, b):
    return a.captions == b.captions and all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ARRAYS)


# --- the same for their number ------------------------------------------------------------------------------


def test_a_scene_is_its_seed_s_and_its_number_s_whatever_was_drawn_before(many):
    assert all(equal(draw_scene(SIZE, 0, index), many[index]) for index in (7, 3, 7))
    assert not any(equal(draw_scene(SIZE, seed, 3), many[index]) for seed, index in ((0, 4), (1, 3)))


def test_scenes_drawn_by_several_threads_come_in_the_order_asked_for(many):
    order = [5, 2, 9, *range(20, 40), 0]
    assert all(equal(scene, many[index]) for scene, index in zip(draw_scenes(SIZE, 0, order), order, strict=True))


def test_the_truth_is_the_same_on_every_machine(many):
    total = hashlib.sha256()
    for scene in many[:4]:
        depth = np.where(np.isfinite(scene.depth), scene.depth, 0)
        for values in (scene.labels, scene.instances, (depth * 1000).round().astype(np.int32)):
            total.update(np.ascontiguousarray(values).tobytes())
    assert total.hexdigest()[:16] == "10f3a914109e1514"


def test_the_same_scene_twice_as_large_shows_the_same_things_at_the_same_places(many):
    for index in range(6):
        large, small = draw_scene(2 * SIZE, 0, index), many[index]
        assert large.captions == small.captions
        assert (large.labels[::2, ::2] == small.labels).mean() > 0.95
        ways = large.keypoints[..., :2] / 2 - small.keypoints[..., :2]
        assert np.abs(ways).max(initial=0) < 1e-3


# --- what is said of a pixel --------------------------------------------------------------------------------


def test_depth_normals_and_things_agree_on_what_is_sky_and_floor(many):
    for scene in many:
        sky = scene.labels == SKY
        assert np.array_equal(np.isinf(scene.depth), sky)
        lengths = np.linalg.norm(scene.normals, axis=-1)
        assert np.abs(lengths - ~sky).max() < 1e-5, "unit, or zero where there is sky"
        assert np.array_equal(scene.instances == 0, scene.labels <= FLOOR)
        assert scene.depth.min() > 0.4
    assert any((scene.labels == SKY).any() for scene in many)


def unprojected(scene, focal):
    """Points (H, W, 3) in camera space."""
    size = len(scene.depth)
    middle = (np.arange(size) + 0.5) / size - 0.5
    u, v = np.meshgrid(middle, -middle)
    return np.stack([u / focal, v / focal, -np.ones_like(u)], axis=-1) * scene.depth[..., None]


def drawn_with(seed, index, monkeypatch):
    """A scene, and what it does not tell: its things and its camera."""
    seen = []
    arranged = module._arranged
    with monkeypatch.context() as patch:
        patch.setattr(module, "_arranged", lambda rng: seen.append(arranged(rng)) or seen[-1])
        scene = draw_scene(96, seed, index)
    return scene, seen[0]


def test_normals_are_those_of_the_surface_that_the_depth_describes(monkeypatch):
    angles = []
    for index in range(8):
        scene, (_, camera) = drawn_with(0, index, monkeypatch)
        points = unprojected(scene, camera.focal)
        points[scene.labels == SKY] = 0
        across, down = points[1:-1, 2:] - points[1:-1, :-2], points[2:, 1:-1] - points[:-2, 1:-1]
        normals = np.cross(down, across)
        inner = np.ones(normals.shape[:2], bool)
        for dy in (0, 1, 2):
            for dx in (0, 1, 2):  # all about it is the same thing and nearly as turned
                part = (slice(dy, dy + 94), slice(dx, dx + 94))
                inner &= scene.instances[part] == scene.instances[1:-1, 1:-1]
                inner &= scene.labels[part] == scene.labels[1:-1, 1:-1]
                inner &= (scene.normals[part] * scene.normals[1:-1, 1:-1]).sum(-1) > 0.97
        inner &= scene.labels[1:-1, 1:-1] != SKY
        with np.errstate(invalid="ignore"):
            normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
            cosines = (normals * scene.normals[1:-1, 1:-1]).sum(-1)[inner]
        assert len(cosines) > 1000
        angles.append(np.degrees(np.arccos(cosines.clip(-1, 1))))
    angles = np.concatenate(angles)
    assert np.quantile(angles, 0.95) < 3 and np.median(angles) < 0.5, (np.quantile(angles, 0.95), np.median(angles))


def test_the_depth_of_a_ball_is_where_a_ray_meets_it(monkeypatch):
    seen = 0
    for index in range(16):
        scene, (things, camera) = drawn_with(3, index, monkeypatch)
        for number, thing in enumerate(things, 1):
            if thing.parts[0].label != CLASSES.index("ball"):
                continue
            (ball,) = thing.parts
            centre = (ball.centre + (thing.at[0], 0, thing.at[1]) - camera.place) @ camera.turn
            own = scene.instances == number
            rays = unprojected(scene, camera.focal)[own] / scene.depth[own, None]
            a, b, c = (rays**2).sum(-1), rays @ centre, centre @ centre - ball.size[0] ** 2
            t = (b - np.sqrt(np.maximum(b * b - a * c, 0))) / a
            assert np.abs(t - scene.depth[own]).max(initial=0) < 1e-3
            seen += len(t)
    assert seen > 500


# --- edges, lines, joints -----------------------------------------------------------------------------------


def near(mask, by):
    """Pixels within ``by`` of a set one, in each direction."""
    grown = mask.copy()
    for dy in range(-by, by + 1):
        for dx in range(-by, by + 1):
            grown |= np.roll(mask, (dy, dx), (0, 1))
    return grown


def test_edges_are_where_labels_things_depth_or_normals_change_and_borders_are_all_edges(many):
    for scene in many:
        changes = np.zeros_like(scene.edges)
        borders = np.zeros_like(scene.edges)
        inverse = 1 / scene.depth
        for axis in (0, 1):
            a, b = (np.moveaxis(m, axis, 0) for m in (changes, borders))
            for values in (scene.labels, scene.instances):
                differ = np.moveaxis(values, axis, 0)[1:] != np.moveaxis(values, axis, 0)[:-1]
                a[:-1] |= differ
                b[:-1] |= differ
            n, d = np.moveaxis(scene.normals, axis, 0), np.moveaxis(inverse, axis, 0)
            a[:-1] |= (n[1:] * n[:-1]).sum(-1) < math.cos(math.radians(39))
            a[:-1] |= np.abs(d[1:] - d[:-1]) > 0.055 * np.maximum(d[1:], d[:-1])
        assert not (scene.edges & ~changes).any() and not (borders & ~scene.edges).any()


def test_a_straight_line_lies_on_edges(many):
    lines = 0
    for scene in many:
        grown = near(scene.edges, 2)
        for x0, y0, x1, y1 in scene.lines:
            share = np.linspace(0, 1, 40)
            x, y = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
            x, y = (np.clip(np.floor(v).astype(int), 0, SIZE - 1) for v in (x, y))
            assert grown[y, x].mean() > 0.7, (x0, y0, x1, y1)
            assert math.hypot(x1 - x0, y1 - y0) >= SIZE / 20 - 1e-3
            lines += 1
    assert lines > len(many), "boxes, cylinders, cones and the horizon have some"


def test_a_box_in_sight_has_straight_lines_and_a_lone_ball_none_but_the_horizon(many):
    for scene in many:
        shown = set(np.unique(scene.labels))
        if (scene.labels == CLASSES.index("box")).sum() > 150:
            assert len(scene.lines) >= 3
        if not shown & {CLASSES.index(name) for name in ("box", "cylinder", "cone")}:
            assert (scene.lines[:, 1] == scene.lines[:, 3]).all()


def test_a_visible_joint_lies_on_its_figure(many):
    people, exact = 0, []
    for scene in many:
        assert scene.keypoints.shape[1:] == (18, 3) and set(np.unique(scene.keypoints[..., 2])) <= {0, 1}
        assert len(scene.keypoints) == scene.captions[0].count("person in")
        for number, person in enumerate(scene.keypoints, 1):  # figures come before solids
            x, y = person[person[:, 2] > 0, :2].astype(int).T
            assert near(scene.instances == number, 2)[y, x].all(), "or just beside it, where it is thin"
            exact += (scene.instances[y, x] == number).tolist()
            people += 1
    assert people > 8 and np.mean(exact) > 0.9


def test_a_figure_s_right_is_its_own_and_not_the_viewer_s(many):
    facing = [p for scene in many for p in scene.keypoints if p[0, 2] and p[14, 2] and p[15, 2]]
    assert facing and all(person[14, 0] < person[15, 0] for person in facing), "the right eye is at the viewer's left"


# --- captions -----------------------------------------------------------------------------------------------


def test_a_caption_names_every_thing_that_is_seen(many):
    for scene in many:
        for wording in scene.captions:
            said_ = wording.replace("sphere", "ball").replace("torus", "ring")
            for label in set(np.unique(scene.labels)) & set(map(CLASSES.index, SOLIDS)):
                assert CLASSES[label] in said_
            assert said_.count("person in a") == len(scene.keypoints)
        assert len(set(scene.captions)) >= 3 + (" and " in scene.captions[0])


def test_a_thing_has_the_colour_that_the_caption_says():
    for index in range(40):
        scene = draw_scene(32, 5, index)
        found = re.fullmatch(rf"an? ({'|'.join(COLOURS)}) ({'|'.join(SOLIDS)}), on .*", scene.captions[0])
        if not found or found[1] in ("white", "black"):
            continue
        mean = scene.picture[scene.instances == 1].mean(0)
        mean, hues = mean / mean.sum(), {name: np.array(rgb) / sum(rgb) for name, rgb in COLOURS.items()}
        ranked = sorted(hues, key=lambda name: float(((hues[name] - mean) ** 2).sum()))
        assert found[1] in ranked[:4], (found[0], ranked)


def test_a_scene_is_held_out_exactly_if_its_caption_says_something_held_out(said):
    for captions, heldout in said:
        plain = re.sub(rf"\b({'|'.join(filter(None, MATERIALS))}) ", "", captions[0])
        assert heldout == any(re.search(rf"\b{words}\b", plain) for words in HELDOUT), captions[0]
    share = np.mean([heldout for _, heldout in said])
    assert 0.1 < share < 0.5


def test_everything_there_is_occurs(many, said):
    text = " | ".join(captions[1] for captions, _ in said)
    for words in (COLOURS, filter(None, MATERIALS), SOLIDS, POSES):
        assert all(re.search(rf"\b{word}\b", text) for word in words)
    assert all(f"{name} floor" in text for name in FLOORS) and all(f"{name} sky" in text for name in SKIES)
    assert set(np.unique([scene.labels for scene in many])) == set(range(len(CLASSES)))
    assert len(np.unique(PALETTE, axis=0)) == len(CLASSES), "each class has its own colour"


# --- kept ---------------------------------------------------------------------------------------------------


def test_scenes_are_drawn_once_and_read_back_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path))
    first = load_scenes(32, 2, 5)
    assert len(list((tmp_path / "world").iterdir())) == 1

    def draw(*args):
        raise AssertionError("drawn again")

    drawn = list(draw_scenes(32, 2, range(5)))
    monkeypatch.setattr(module, "draw_scenes", draw)
    assert all(equal(a, b) for a, b in zip(first, load_scenes(32, 2, 5), strict=True))
    for kept, scene in zip(first, drawn, strict=True):
        assert kept.captions == scene.captions and kept.heldout == scene.heldout
        for name in ("picture", "labels", "instances", "edges", "lines", "keypoints"):
            assert np.array_equal(getattr(kept, name), getattr(scene, name)), name
            assert getattr(kept, name).dtype == getattr(scene, name).dtype, name
        assert np.abs(kept.normals - scene.normals).max() <= 0.5 / 127 + 1e-6
        assert np.array_equal(kept.depth, scene.depth.astype(np.float16).astype(np.float32))
    with pytest.raises(AssertionError, match="drawn again"):
        load_scenes(32, 2, 6)
