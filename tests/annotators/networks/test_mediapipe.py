"""People by MediaPipe's models: what is done between them, tried with models that answer what they are told."""

from pathlib import Path

import numpy as np
import pytest

from controlkit.annotators import annotator
from controlkit.annotators.networks import mediapipe, poses
from controlkit.annotators.networks.mediapipe import FACES, PALMS, POSES, Region, find_people
from controlkit.errors import UserError


def logit(share):
    return np.log(share / (1 - share))


@pytest.fixture
def models(monkeypatch):
    """Models that find nothing, unless a test says more: {model: function of the pixels}."""

    def empty(detector, values):
        count = len(detector.anchors)
        return lambda pixels: [np.zeros((count, values)), np.full((count, 1), -50.0)]

    answers = {
        "pose_detection": empty(POSES, 12),
        "palm_detection": empty(PALMS, 18),
        "face_detection": empty(FACES, 16),
        "pose": lambda pixels: [np.zeros(195), np.zeros(1), None, np.full((64, 64, 39), -50.0), None],
        "hand": lambda pixels: [np.zeros(63), np.zeros(1)],
        "face": lambda pixels: [np.zeros(1404), np.full((1, 1, 1), -50.0)],
    }
    monkeypatch.setattr(mediapipe, "_run", lambda model, pixels: answers[model](pixels))
    return answers


def detection(detector, *found):
    """An answer of a detector: (score, box (x, y, width, height), points), in shares, from the anchor nearest to it."""

    def answer(pixels):
        assert pixels.shape == (detector.side, detector.side, 3)
        values = 2 * (2 + len(found[0][2]))
        raw, logits = np.zeros((len(detector.anchors), values)), np.full((len(detector.anchors), 1), -50.0)
        for score, (x, y, *size), points in found:
            free = np.hypot(*(detector.anchors - (x, y)).T) + 10 * (logits[:, 0] > -50)
            near = free.argmin()
            at = [np.array((x, y)) - detector.anchors[near], size, *(np.array(points) - detector.anchors[near])]
            raw[near], logits[near] = np.concatenate(at) * detector.side, logit(score)
        return [raw, logits]

    return answer


def test_detectors_have_as_many_anchors_as_their_models_boxes():
    assert [len(detector.anchors) for detector in (POSES, PALMS, FACES)] == [2254, 2016, 896]
    assert np.allclose(POSES.anchors[:2], 0.5 * 8 / 224) and np.allclose(POSES.anchors[2], (1.5 * 8 / 224, 4 / 224))
    assert np.allclose(POSES.anchors[-1], 1 - 16 / 224)


@pytest.mark.parametrize("angle", [0, 0.5, np.pi / 2, -2.5])
def test_a_point_of_a_region_comes_back_to_its_place_in_the_picture(angle):
    picture = np.zeros((200, 300, 3), np.uint8)
    picture[118:123, 168:173] = 255
    region = Region(150, 110, 90, angle)
    cut = region.cut(picture, 64)[..., 0]
    y, x = np.argwhere(cut > 128).mean(0)
    assert np.allclose(region.back(np.array([[(x + 0.5) / 64, (y + 0.5) / 64]])), (170, 120), atol=0.8)


def test_a_large_region_is_the_mean_of_what_becomes_a_pixel():
    picture = np.zeros((512, 512, 3), np.uint8)
    picture[::2] = 255
    cut = Region(255.5, 255.5, 512).cut(picture, 64)
    assert abs(cut.astype(float) - 127.5).max() < 10


def test_turned_regions_have_their_end_above_their_start():
    start, end = np.array([100.0, 100.0]), np.array([140.0, 100.0])  # to the right: the region lies on its side
    region = Region(100, 100, 80, mediapipe._direction(start, end))
    assert np.allclose(region.back(np.array([[0.5, 0.0]])), (140, 100))
    moved = region.moved(down=-0.5, grown=2)
    assert (round(moved.x), round(moved.y), moved.side) == (140, 100, 160)


def test_detections_of_one_thing_are_one_at_their_weighted_mean(models):
    boxes = [(0.9, (0.5, 0.5, 0.2, 0.2), [(0.5, 0.6)] * 4), (0.6, (0.53, 0.5, 0.2, 0.2), [(0.5, 0.6)] * 4)]
    far = (0.7, (0.2, 0.2, 0.2, 0.2), [(0.2, 0.3)] * 4)
    models["pose_detection"] = detection(POSES, *boxes, far, (0.4, (0.8, 0.8, 0.1, 0.1), [(0.8, 0.8)] * 4))
    found = POSES.find(np.zeros((50, 50, 3), np.uint8), Region(24.5, 24.5, 50))
    assert [round(score, 3) for score, _ in found] == [0.9, 0.7], "and what is not sure is none"
    assert np.allclose(found[0][1][:2].mean(0), ((0.9 * 0.5 + 0.6 * 0.53) / 1.5, 0.5), atol=1e-6)


def test_heat_moves_a_point_to_where_it_is_hot():
    heat = np.zeros((64, 64, 2))
    heat[20:22, 30:32, 0], heat[20, 30, 1] = 0.9, 0.2
    at = np.array([[29 / 64, 21 / 64], [29 / 64, 21 / 64]])
    moved = mediapipe._refined(at, heat)
    assert np.allclose(moved, [[30.5 / 64, 20.5 / 64], at[1]])


def standing(models, points, sure=1.0, score=0.9, calls=1):
    """A person: the detector finds hips and top ``calls`` times; the second model these points of a region."""
    found, nothing = (
        detection(POSES, (score, (0.5, 0.5, 0.2, 0.2), [(0.5, 0.5), (0.5, 0.3)] * 2)),
        models["pose_detection"],
    )
    turns = iter([found] * calls)
    models["pose_detection"] = lambda pixels: next(turns, nothing)(pixels)
    raw = np.zeros((39, 5))
    raw[:33, :2], raw[:33, 3] = points[:, :2] * 256, logit(points[:, 2])
    models["pose"] = lambda pixels: [raw.ravel(), np.full(1, sure), None, np.full((64, 64, 39), -50.0), None]


@pytest.fixture
def points():
    """Thirty-three points far apart, in the shares of a region, all of them seen."""
    y, x = np.divmod(np.arange(33), 6)
    return np.column_stack([0.2 + x / 10, 0.2 + y / 10, np.full(33, 0.99)])


def test_the_body_s_points_become_openpose_s_joints(models, points):
    points[13, 2] = 0.2  # the left elbow is hidden
    standing(models, points)
    [person] = find_people(np.zeros((100, 200, 3), np.uint8), hands=False, face=False)
    # The whole picture is a square of 200 about its middle: hips at its middle, the top 40 pixels above.
    region = Region(99.5, 49.5, 2 * 40 * 1.25)
    at = region.back(points[:, :2])
    assert np.allclose(person.body[0, :2], at[0], atol=0.01) and np.allclose(person.body[4, :2], at[16], atol=0.01)
    assert np.allclose(person.body[1, :2], at[11:13].mean(0), atol=0.01), "the neck between the shoulders"
    order = [0, None, 12, 14, 16, 11, None, 15, 24, 26, 28, 23, 25, 27, 5, 2, 8, 7]
    for joint, source in enumerate(order):
        assert source is None or np.allclose(person.body[joint, :2], at[source], atol=0.01), joint
    assert not person.body[6].any()
    assert not (person.face.any() or person.left_hand.any())


def test_joints_beyond_the_picture_are_not_seen(models, points):
    points[0, :2] = -0.6
    standing(models, points)
    [person] = find_people(np.zeros((100, 100, 3), np.uint8), hands=False, face=False)
    assert not person.body[0].any() and person.body[1].any()


def test_who_is_not_sure_is_nobody_and_who_is_found_again_is_one(models, points):
    picture, nothing = np.zeros((100, 100, 3), np.uint8), dict(models)
    assert find_people(picture) == []
    for case, people in (
        ({"sure": 0.4}, 0),
        ({}, 1),
        ({"calls": 10}, 10),  # in the whole and in nine windows, and it is never the same place
        ({"calls": 10, "score": 0.65}, 1),  # in windows it must be surer
    ):
        models.update(nothing)
        standing(models, points, **case)
        assert len(find_people(picture, hands=False, face=False)) == people, case


def test_a_body_found_twice_is_one(points):
    other = points.copy()
    other[25:, :2] += 0.3  # legs beyond the picture are guessed
    assert mediapipe._same(points, other)
    other[:, :2] += 0.1
    assert not mediapipe._same(points, other)


def test_a_hand_is_looked_for_where_the_body_says_and_turned_by_its_palm(models, points):
    points[[16, 18, 20], :2] = (0.5, 0.5), (0.56, 0.5), (0.56, 0.5)  # a right hand that points to the right
    points[15, 2] = 0.1  # the left wrist is hidden
    standing(models, points)
    seen = []

    def hand(pixels):
        seen.append(pixels)
        return [np.column_stack([np.full((21, 2), 112.0), np.zeros(21)]).ravel(), np.ones(1)]

    models["hand"] = hand
    picture = np.zeros((200, 200, 3), np.uint8)
    person = find_people(picture, face=False)[0]
    assert not person.left_hand.any() and (person.right_hand[:, 2] == 1).all()
    # Without a palm: from wrist to the middle finger is 6% of the region's 100, the hand's region 2.7 times twice that.
    region = Region(99.5 + 6, 99.5, 12, np.pi / 2).moved(-0.1, 2.7)
    assert np.allclose(person.right_hand[0, :2], (region.x, region.y), atol=0.05)
    palm = (0.9, (0.5, 0.5, 0.3, 0.2), [(0.5, 0.6), (0, 0), (0.5, 0.4), *[(0, 0)] * 4])
    models["palm_detection"] = detection(PALMS, palm)
    standing(models, points)
    person = find_people(picture, face=False)[0]
    side = region.side
    upright = Region(region.x, region.y, 0.3 * side).moved(-0.5, 2.6)
    assert np.allclose(person.right_hand[0, :2], (upright.x, upright.y), atol=0.05)


def test_a_face_is_the_mesh_at_the_places_of_300_w_with_its_pupils(models, points):
    points[:11, :2] = np.column_stack([np.linspace(0.45, 0.55, 11), np.full(11, 0.4)])
    standing(models, points)
    eyes = [(0.4, 0.45), (0.6, 0.45), (0.5, 0.5), (0.5, 0.6), (0.3, 0.5), (0.7, 0.5)]
    models["face_detection"] = detection(FACES, (0.9, (0.5, 0.5, 0.4, 0.4), eyes))
    mesh = np.random.default_rng(0).uniform(0, 192, (468, 3))
    models["face"] = lambda pixels: [mesh.ravel(), np.full((1, 1, 1), 9.0)]
    person = find_people(np.zeros((200, 200, 3), np.uint8), hands=False)[0]
    whole = Region(99.5, 99.5, 100).back(np.array([[0.5, 0.4]]))[0]
    face = Region(*whole, 30 * 0.4 * 1.5)
    at = face.back(mesh[:, :2] / 192)
    assert np.allclose(person.face[30, :2], at[4], atol=0.05), "the tip of the nose"
    assert np.allclose(person.face[69, :2], at[[362, 385, 387, 263, 373, 380]].mean(0), atol=0.05)


def test_rows_draw_the_parts_that_they_promise(monkeypatch):
    asked = []
    monkeypatch.setattr(mediapipe, "find_people", lambda picture, hands, face: asked.append((hands, face)) or [])
    monkeypatch.setattr(poses, "_best", lambda: mediapipe)
    for name in ("openpose_body", "openpose_hand", "openpose_face", "openpose_faceonly", "openpose_full"):
        kind = annotator(name)
        kind.function([np.zeros((8, 8, 3), np.uint8)], "cpu")
    assert asked == [(False, False), (True, False), (False, True), (False, True), (True, True)]
    assert annotator("openpose_faceonly").spec().options["body"] == 0


def test_without_litert_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'controlkit[mediapipe]'" in annotator("mediapipe_pose").lacks()
    with pytest.raises(UserError, match=r"pip install 'controlkit\[mediapipe\]'"):
        annotator("mediapipe_pose").make([np.zeros((8, 8, 3), np.uint8)])


@pytest.mark.slow
def test_the_models_find_the_face_and_shoulders_of_a_portrait():
    """Fetches 52 MB with npm, once. Grace Hopper, by James S. Davis (public domain), comes with matplotlib."""
    pytest.importorskip("ai_edge_litert")
    matplotlib = pytest.importorskip("matplotlib")
    from controlkit.images import read_picture

    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    [person] = find_people(read_picture(path))
    assert (person.face[:, 2] == 1).all() and not person.left_hand.any()
    assert np.allclose(person.body[[0, 1], :2], [(265, 232), (263, 412)], atol=15)
    assert 25 < person.face[45, 0] - person.face[36, 0] < 150, (
        "the outer corner of the left eye is right of the right's"
    )
