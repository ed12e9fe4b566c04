"""DWPose: what is done before, between and after its two networks, with answers made by hand in their place."""

import hashlib

import numpy as np
import pytest

from controlkit.annotators import annotator
from controlkit.annotators.networks import dwpose, mediapipe, poses
from controlkit.errors import Invalid, NotFound

ANSWERS = 80 * 80 + 40 * 40 + 20 * 20


class Session:
    """Both networks: boxes of (score, left, top, right, bottom) in the pixels of the frame, then points in the cut."""

    def __init__(self, boxes=(), points=None):
        self.boxes, self.points, self.read = boxes, points, []

    def __call__(self, file, pixels):
        self.read.append(pixels)
        if file is dwpose.DETECTOR:
            assert pixels.shape == (dwpose._SIDE, dwpose._SIDE, 3)
            raw = np.zeros((1, ANSWERS, 85), np.float32)
            for number, (score, *box) in enumerate(self.boxes):
                level = number % 3  # of each stride in turn
                stride, first = (8, 16, 32)[level], (0, 6400, 8000)[level]
                across, (x0, y0, x1, y1) = dwpose._SIDE // stride, box
                x, y = (x0 + x1) / 2 / stride, (y0 + y1) / 2 / stride
                at = first + int(y) * across + int(x)
                raw[0, at, :6] = x - int(x), y - int(y), *np.log([(x1 - x0) / stride, (y1 - y0) / stride]), 0.95, score
                raw[0, at, 6] = 0.99  # and of another class
            return [raw]
        assert pixels.shape == (384, 288, 3)
        x, y = np.full((1, 133, 576), -1.0, np.float32), np.full((1, 133, 768), -1.0, np.float32)
        for point, (column, row, sure) in enumerate(self.points):
            x[0, point, round(2 * column)], y[0, point, round(2 * row)] = sure, 1.0
        return [x, y]


@pytest.fixture
def session(monkeypatch):
    """``session(boxes, points)`` puts answers in the networks' place."""

    def put(*given):
        made = Session(*given)
        monkeypatch.setattr(dwpose, "_run", made)
        return made

    return put


def test_boxes_are_in_the_picture_s_pixels_and_overlapping_ones_are_one(session):
    made = session(
        [(0.9, 100, 50, 200, 350), (0.8, 110, 60, 205, 350), (0.7, 400, 100, 500, 300), (0.2, 10, 10, 90, 90)]
    )
    picture = np.random.default_rng(0).integers(0, 256, (500, 1280, 3), np.uint8)
    found = dwpose.find_boxes(picture)  # twice as wide as the frame
    assert np.allclose(found, np.array([(100, 50, 200, 350), (400, 100, 500, 300)]) * 2, atol=0.1)
    framed = made.read[0]
    assert (framed[251:] == 114).all(), "grey below"
    assert abs(framed[100, 300, ::-1].astype(float) - picture[200:202, 600:602].mean((0, 1))).max() < 2, (
        "BGR, as it was"
    )


def test_points_are_read_in_the_box_grown_to_the_network_s_shape(session):
    points = np.random.default_rng(0).uniform((0, 0, 0.4), (287, 383, 0.9), (133, 3))
    points[:, :2] = (points[:, :2] * 2).round() / 2
    made = session((), points)
    picture = np.full((400, 400, 3), (200, 100, 50), np.uint8)
    found = dwpose.find_points(picture, np.array([100.0, 100.0, 160.0, 220.0]))
    # 60 by 120, a quarter more each: 75 by 150; three by four around it: 112.5 by 150.
    assert np.allclose(found[:, :2], points[:, :2] * 150 / 384 + (130 - 56.25, 160 - 75), atol=1e-3)
    assert np.allclose(found[:, 2], points[:, 2], atol=1e-6)
    expected = (np.array((200, 100, 50)) - dwpose._MEAN) / dwpose._SPREAD
    assert np.allclose(made.read[0][192, 144], expected, atol=1e-5), "RGB, as its mean is"


def test_the_133_points_become_body_hands_and_face(session):
    points = np.column_stack([np.arange(133.0) * 2, np.arange(133.0) * 2 + 50, np.full(133, 0.9)])
    points[[9, 6, 95, 30], 2] = (
        0.25  # left wrist, right shoulder and with it the neck, a point of a hand, one of the face
    )
    session([(0.9, 0, 0, 288 / 1.25, 384 / 1.25)], points)
    [person] = dwpose.find_people(np.zeros((640, 640, 3), np.uint8))
    offset = np.array((288, 384)) / 2 / 1.25 - (144, 192)
    at = points[:, :2] + offset
    order = [0, None, None, 8, 10, 5, 7, None, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]
    for joint, source in enumerate(order):
        expected = (0, 0, 0) if source is None else (*at[source], 1)
        assert np.allclose(person.body[joint], expected, atol=0.3), joint
    assert np.allclose(person.left_hand[5, :2], at[96], atol=0.3) and not person.left_hand[4].any()
    assert np.allclose(person.right_hand[20, :2], at[132], atol=0.3)
    assert (
        np.allclose(person.face[67, :2], at[90], atol=0.3) and not person.face[7].any() and not person.face[68:].any()
    )
    [person] = dwpose.find_people(np.zeros((640, 640, 3), np.uint8), hands=False, face=False)
    assert not (person.face.any() or person.left_hand.any() or person.right_hand.any())


def test_a_picture_without_people_is_an_empty_hint(session):
    session()
    [hint] = poses.dwpose_pose([np.full((40, 60, 3), 90, np.uint8)], "cpu")
    assert hint.shape == (40, 60, 3) and not hint.any()


# --- its files ----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _runtime(monkeypatch):
    """As where onnxruntime is installed."""
    monkeypatch.setattr(dwpose.importlib.util, "find_spec", lambda name: object())


def test_a_file_that_is_not_the_public_one_is_never_given_to_the_runtime(weights_folder):
    (weights_folder / "yolox_l.onnx").write_bytes(b"anything")
    with pytest.raises(Invalid, match="it is not the public yolox_l"):
        dwpose.DETECTOR.path()
    (weights_folder / "dw-ll_ucoco_384.onnx").write_bytes(b"anything")
    with pytest.raises(Invalid, match=hashlib.sha256(b"anything").hexdigest()):
        annotator("dw_openpose_full").digest()


def test_files_that_are_not_there_are_named(weights_folder):
    assert "hf download yzd-v/DWPose yolox_l.onnx" in dwpose.lack()
    (weights_folder / "yolox_l.onnx").touch()
    assert "dw-ll_ucoco_384.onnx" in dwpose.lack()
    with pytest.raises(NotFound, match="hf download yzd-v/DWPose dw-ll_ucoco"):
        dwpose.POINTS.path()


def test_openpose_is_dwpose_where_its_files_are_and_else_mediapipe_s(weights_folder, monkeypatch):
    assert poses._best() is mediapipe
    for file in (dwpose.DETECTOR, dwpose.POINTS):
        (weights_folder / file.name).touch()
    assert poses._best() is dwpose
    monkeypatch.setattr(dwpose.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'controlkit[onnx]'" in dwpose.lack() and poses._best() is mediapipe
