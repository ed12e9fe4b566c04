"""Truth as hint pictures: drawn as the conventions say, and read back."""

import numpy as np
import pytest

from controlkit.annotators.maps import (
    FACING,
    POSE_COLOURS,
    POSE_LIMBS,
    depth_picture,
    keypoints_of,
    label_picture,
    labels_of,
    normal_picture,
    normals_of,
    pose_picture,
)
from controlkit.errors import UserError

# --- depth --------------------------------------------------------------------------------------------------


def test_near_is_light_and_nothing_is_black():
    picture = depth_picture(np.array([[1.0, 2.0], [4.0, np.inf]]))
    assert picture.shape == (2, 2, 3) and picture.dtype == np.uint8
    assert picture[..., 0].tolist() == [[255, 85], [0, 0]], "inverse depths 1, 1/2, 1/4 stretched over 0 to 1"
    assert (picture == picture[..., :1]).all()


def test_depth_has_no_unit():
    depth = np.random.default_rng(0).uniform(1, 9, (8, 8))
    assert np.array_equal(depth_picture(depth), depth_picture(1000 * depth))


def test_a_single_distance_is_white_and_nothing_at_all_black():
    wall = np.full((4, 4), 3.0)
    wall[0] = np.inf
    assert (depth_picture(wall)[1:] == 255).all() and not depth_picture(wall)[0].any()
    assert not depth_picture(np.full((4, 4), np.inf)).any()


def test_depths_behind_the_camera_are_refused():
    with pytest.raises(UserError, match="not above 0"):
        depth_picture(np.array([[1.0, -1.0]]))


# --- normals ------------------------------------------------------------------------------------------------


def test_normals_have_the_colours_of_the_convention():
    normals = np.array([[(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0), (-1, 0, 0)]], float)
    wanted = [(255, 128, 128), (128, 255, 128), FACING, FACING, (0, 128, 128)]
    assert normal_picture(normals)[0].tolist() == [list(colour) for colour in wanted]


def test_normals_come_back_within_half_a_degree_and_of_length_one():
    normals = np.random.default_rng(0).standard_normal((32, 32, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    back = normals_of(normal_picture(normals))
    assert np.allclose(np.linalg.norm(back, axis=-1), 1, atol=1e-5)
    assert np.degrees(np.arccos((back * normals).sum(-1).clip(-1, 1))).max() < 0.5


# --- labels -------------------------------------------------------------------------------------------------

PALETTE = np.array([(120, 180, 230), (110, 100, 90), (230, 60, 60), (250, 170, 50), (20, 20, 20)], np.uint8)


def test_labels_come_back_even_if_the_colours_are_a_little_off():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, (32, 24))
    picture = label_picture(labels, PALETTE)
    assert picture.shape == (32, 24, 3) and picture.dtype == np.uint8
    assert np.array_equal(labels_of(picture, PALETTE), labels)
    assert np.array_equal(labels_of(picture + rng.integers(0, 6, picture.shape).astype(np.uint8), PALETTE), labels)


def test_a_label_without_a_colour_is_refused():
    with pytest.raises(UserError, match="run from 0 to 5: expected 0 to 4"):
        label_picture(np.array([[0, 5]]), PALETTE)


# --- poses --------------------------------------------------------------------------------------------------


def person(left=0.0, size=256):
    """Eighteen joints, all visible and far apart, of one who stands at the left."""
    x = [30, 30, 20, 12, 8, 40, 48, 52, 24, 22, 20, 36, 38, 40, 26, 34, 20, 40]
    y = [14, 24, 25, 36, 48, 25, 36, 48, 50, 68, 88, 50, 68, 88, 10, 10, 13, 13]
    return np.stack([left + np.array(x) * size / 100, np.array(y) * size / 100, np.ones(18)], 1)


@pytest.mark.parametrize("size", [64, 256, 512])
def test_keypoints_come_back_to_the_pixel(size):
    drawn = person(size=size)
    found = {joint: (x, y) for joint, x, y in keypoints_of(pose_picture(drawn[None], (size, size)))}
    assert set(found) == set(range(18))
    for joint, (x, y, _) in enumerate(drawn):
        assert np.hypot(found[joint][0] - x, found[joint][1] - y) <= 1.0


def test_two_people_have_each_joint_twice_and_nobody_has_none():
    found = keypoints_of(pose_picture(np.stack([person(), person(120)]), (256, 256)))
    assert [joint for joint, _, _ in found] == [joint for joint in range(18) for _ in range(2)]
    assert keypoints_of(pose_picture(np.zeros((0, 18, 3)), (64, 64))) == []


def test_what_is_not_visible_is_not_drawn_nor_are_its_limbs():
    hidden = person()
    hidden[4, 2] = 0  # the right wrist, at the end of one limb
    found = [joint for joint, _, _ in keypoints_of(pose_picture(hidden[None], (256, 256)))]
    assert found == [joint for joint in range(18) if joint != 4]
    limb = [round(0.6 * value) for value in POSE_COLOURS[POSE_LIMBS.index((3, 4))]]
    for picture, drawn in (
        (pose_picture(hidden[None], (256, 256)), False),
        (pose_picture(person()[None], (256, 256)), True),
    ):
        assert (picture == limb).all(-1).any() == drawn


def test_limbs_are_darkened_and_joints_lie_over_them_in_full_colour():
    picture = pose_picture(person()[None], (256, 256))
    colours = {tuple(map(int, colour)) for colour in np.unique(picture.reshape(-1, 3), axis=0)}
    limbs = {tuple(round(0.6 * value) for value in colour) for colour in POSE_COLOURS[:17]}
    assert colours == {(0, 0, 0), *POSE_COLOURS, *limbs}, "nothing is smoothed"
    for (x, y, _), colour in zip(person(), POSE_COLOURS, strict=True):
        assert tuple(picture[round(y), round(x)]) == colour


def test_a_large_picture_has_thicker_sticks():
    thickness = []
    for size in (64, 512):
        across = (pose_picture(person(size=size)[None], (size, size))[round(0.78 * size), : round(0.3 * size)] > 0).any(
            -1
        )
        thickness.append(across.sum())  # of the right shin
    assert thickness[0] <= 2 and thickness[1] == pytest.approx(512 / 64, abs=2)
