"""Outlines of faces: colours and places of a mesh made by hand, and where faces are looked for."""

import numpy as np
import pytest

from controlkit.annotators import annotator
from controlkit.annotators.networks import facemesh, mediapipe
from controlkit.annotators.networks.facemesh import draw_meshes

LEFT_EYE, RIGHT_EYE, CHIN, FOREHEAD = 263, 33, 152, 10  # outer corners, and points of the face's outline


@pytest.fixture
def mesh():
    """A mesh whose points lie on a circle of radius 100 about (256, 256), in the order of their numbers."""
    turn = np.linspace(0, 2 * np.pi, 468, endpoint=False)
    return np.stack([256 + 100 * np.cos(turn), 256 + 100 * np.sin(turn)], -1)


def test_outlines_have_the_colours_that_the_control_was_trained_on(mesh):
    """RGB: the published table is in BGR, and turned after drawing."""
    drawn = draw_meshes([mesh], (512, 512))
    colours = {tuple(map(int, colour)) for colour in np.unique(drawn.reshape(-1, 3), axis=0)}
    assert colours == {
        (0, 0, 0), (10, 200, 10), (10, 200, 180), (10, 220, 180), (180, 200, 10), (180, 220, 10), (10, 180, 10),
        (250, 200, 10), (10, 200, 250),
    }  # fmt: skip


def test_eyes_and_their_pupils_are_on_their_sides(mesh):
    mesh[:] = (256, 20)  # all else in one place
    for eye, x in ((facemesh._LEFT_EYE, 350), (facemesh._RIGHT_EYE, 150)):
        points = sorted({point for chain in eye for point in chain})
        turn = np.linspace(0, 2 * np.pi, len(points), endpoint=False)
        mesh[points] = np.stack([x + 30 * np.cos(turn), 200 + 15 * np.sin(turn)], -1)
    drawn = draw_meshes([mesh], (512, 512))
    assert tuple(drawn[200, 350]) == (10, 200, 250) and tuple(drawn[200, 150]) == (250, 200, 10)
    pupil = np.argwhere((drawn == (10, 200, 250)).all(-1))
    assert np.ptp(pupil, axis=0).tolist() == [3, 3], "four pixels wide"
    left = np.argwhere((drawn == (10, 200, 180)).all(-1))
    assert (left[:, 1] > 310).all() and len(left) > 60


def test_lines_are_shares_of_the_short_side_and_points_beyond_are_left_out(mesh):
    small = draw_meshes([mesh / 4], (128, 128))
    large = draw_meshes([mesh], (512, 512))
    assert 0.2 < (small.any(-1).mean() / large.any(-1).mean()) < 3
    mesh[:, 0] -= 300
    assert not draw_meshes([mesh], (512, 512))[:, 60:].any() and draw_meshes([mesh], (512, 512)).any()
    assert not draw_meshes([mesh - 1000], (64, 64)).any()


def test_at_most_so_many_faces_are_found_and_each_once(monkeypatch, mesh):
    asked, small = [], (mesh - 256) / 4

    def faces(picture, window, least):
        asked.append((window.side, least))
        yield small + 100
        yield small + 103  # the same face again
        yield small + (300, 100)

    monkeypatch.setattr(mediapipe, "face_meshes", faces)
    picture = np.zeros((400, 400, 3), np.uint8)
    assert len(mediapipe.find_meshes(picture, 1)) == 1 and asked == [(400, 0.5)]
    found = mediapipe.find_meshes(picture, 9, 0.3)
    assert len(found) == 2 and asked[1:] == [(400, 0.3)] + [(200, 0.3)] * 9
    [hint] = facemesh.mediapipe_face([picture], "cpu", faces=2.0)
    assert hint[100, 125:].any() and hint[100, 250:].any()
    [hint] = facemesh.mediapipe_face([picture], "cpu")
    assert not hint[:, 200:].any()


def test_thresholds_are_a1111_s():
    assert annotator("mediapipe_face").of_thresholds(3, 0.7) == {"faces": 3, "sure": 0.7}
