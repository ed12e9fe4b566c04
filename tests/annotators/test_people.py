"""People as points: drawn as OpenPose draws them, written and read as its JSON."""

import json

import cv2
import numpy as np
import pytest

from controlkit.annotators.maps import pose_picture
from controlkit.annotators.people import (
    POSE_COLOURS,
    POSE_LIMBS,
    Person,
    draw_people,
    people_from_json,
    people_to_json,
    unseen,
)
from controlkit.errors import Invalid


def scattered(count, size=512, seed=0):
    """Points far apart, all seen."""
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.uniform(20, size - 20, (count, 2)), np.ones(count)]).astype(np.float32)


def someone(seed=0):
    return Person(*(scattered(count, seed=seed + k) for k, count in enumerate((18, 21, 21, 70))))


# --- drawing ------------------------------------------------------------------------------------------------


def test_bodies_are_drawn_as_the_released_annotator_draws_them_at_512():
    """Its rules, written down again: ellipses half as long as the limb and 4 wide, discs of radius 4 over them."""
    joints, expected = scattered(18).round(), np.zeros((512, 512, 3), np.uint8)
    for number, (a, b) in enumerate(POSE_LIMBS):
        (xa, ya, _), (xb, yb, _) = joints[a], joints[b]
        length, angle = np.hypot(xa - xb, ya - yb), np.degrees(np.arctan2(ya - yb, xa - xb))
        middle = (int((xa + xb) / 2), int((ya + yb) / 2))
        ellipse = cv2.ellipse2Poly(middle, (int(length / 2), 4), int(angle), 0, 360, 1)
        cv2.fillConvexPoly(expected, ellipse, [int(0.6 * value) for value in POSE_COLOURS[number]])
    for (x, y, _), colour in zip(joints, POSE_COLOURS, strict=True):
        cv2.circle(expected, (int(x), int(y)), 4, colour, -1)
    assert np.array_equal(draw_people([Person(joints)], (512, 512)), expected)


def test_small_bodies_are_drawn_as_the_shipped_controls_learned_them():
    """Lines 1/64 and discs 1/80 of the short side, as before ellipses were drawn."""
    for size in (64, 128):
        joints, expected = scattered(18, size).round(), np.zeros((size, size, 3), np.uint8)
        at = [(int(x), int(y)) for x, y, _ in joints]
        for number, (a, b) in enumerate(POSE_LIMBS):
            colour = [round(0.6 * value) for value in POSE_COLOURS[number]]
            cv2.line(expected, at[a], at[b], colour, round(size / 64))
        for point, colour in zip(at, POSE_COLOURS, strict=True):
            cv2.circle(expected, point, round(size / 80), colour, -1)
        assert np.array_equal(pose_picture(joints[None], (size, size)), expected)


def test_hands_are_blue_discs_on_fingers_of_all_hues_and_faces_white_discs():
    person = someone()
    hands = draw_people([Person(right_hand=person.right_hand)], (512, 512))
    for x, y, _ in person.right_hand:
        assert tuple(hands[round(float(y)), round(float(x))]) == (0, 0, 255)
    assert len(np.unique(hands.reshape(-1, 3), axis=0)) == 1 + 20 + 1, "black, the hues of 20 bones, the discs"
    face = draw_people([person], (512, 512), body=False, hands=False)
    assert set(np.unique(face)) == {0, 255} and (face.min(-1) == face.max(-1)).all()
    assert all(face[round(float(y)), round(float(x))].all() for x, y, _ in person.face)


def test_only_what_is_asked_for_and_seen_is_drawn():
    person = someone()
    assert not draw_people([person], (64, 64), body=False, hands=False, face=False).any()
    assert not draw_people([Person()], (64, 64)).any()
    person.left_hand[:, 2] = 0.04
    only = Person(left_hand=person.left_hand, right_hand=person.right_hand)
    assert np.array_equal(
        draw_people([only], (512, 512)), draw_people([Person(right_hand=only.right_hand)], (512, 512))
    )


def test_points_far_outside_are_not_drawn():
    body = unseen(18)
    body[:2] = (10, 10, 1), (1e9, -1e9, 1)
    picture = draw_people([Person(body)], (64, 64))
    assert picture[10, 10].any() and picture.any(-1).sum() < 16


# --- JSON ---------------------------------------------------------------------------------------------------


def test_people_come_back_from_json():
    people = [someone(), Person(body=scattered(18, seed=9))]
    people[0].body[4] = 0
    text = json.dumps(people_to_json(people, (512, 640)))
    back, size = people_from_json(text)
    assert size == (512, 640) and len(back) == 2
    for before, after in zip(people, back, strict=True):
        for part in ("body", "left_hand", "right_hand", "face"):
            assert np.allclose(getattr(before, part), getattr(after, part), atol=0.006)
    assert people_to_json(people, (9, 9))["people"][1]["face_keypoints_2d"] is None


def test_a_body_of_25_points_is_read_without_the_middle_of_the_hips():
    points = scattered(25)
    entry = {"pose_keypoints_2d": points.ravel().tolist()}
    [person], _ = people_from_json({"people": [entry], "canvas_width": 512, "canvas_height": 512})
    assert np.array_equal(person.body[:8], points[:8]) and np.array_equal(person.body[8:], points[9:19])


def test_shares_of_the_sides_are_read_as_pixels():
    points = scattered(18) / np.float32((512, 512, 1))
    entry = {"pose_keypoints_2d": points.ravel().tolist(), "face_keypoints_2d": (points[0].tolist() * 68)}
    [person], _ = people_from_json({"people": [entry], "canvas_width": 1000, "canvas_height": 500})
    assert np.allclose(person.body[:, 0], points[:, 0] * 1000) and np.allclose(person.body[:, 1], points[:, 1] * 500)
    assert (person.face[:68, 2] == 1).all() and not person.face[68:].any(), "a face without pupils"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"people": [], "canvas_width": 9}, "canvas_height"),
        ({"people": [], "canvas_width": 9, "canvas_height": 10**6}, "canvas_height"),
        ({"people": [{}] * 101, "canvas_width": 9, "canvas_height": 9}, "people"),
        ({"people": [{"pose_keypoints_2d": [1.0] * 53}], "canvas_width": 9, "canvas_height": 9}, "expected 54"),
        ({"people": [{"pose_keypoints_2d": [1e9] * 54}], "canvas_width": 9, "canvas_height": 9}, "pose_keypoints_2d"),
        ({"people": [{"pose_keypoints_2d": "x"}], "canvas_width": 9, "canvas_height": 9}, "pose_keypoints_2d"),
        ([], "OpenPose's JSON"),
        ("[" * 100, "OpenPose's JSON"),
        ('{"people": NaN}', "OpenPose's JSON"),
    ],
)
def test_other_json_is_refused_in_one_sentence(value, words):
    with pytest.raises(Invalid, match=words):
        people_from_json(value)
