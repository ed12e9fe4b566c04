"""The accuracy of an observer: what it reads off pictures of scenes, compared with what is known of them."""

from collections.abc import Sequence

import numpy as np

from controlkit.annotators.maps import depth_picture
from controlkit.measure.metrics import Joint, correct_joints
from controlkit.mini.truth import Truth


def score(observations: Sequence[Truth], scenes: Sequence[Truth]) -> dict[str, float]:
    """How well pictures of scenes were read; the figures that accompany every use of an observer.

    depth_rmse: of inverse depth stretched to [0, 1] over each picture, mean over pictures.
    normal_degrees: the mean angle between normals where the scene has any; one not read counts as 90 degrees.
    miou: intersection over union of each class in all pictures together, mean over the classes that the scenes have.
    pck: the share of visible joints that were found, by ``correct_joints`` of each person; nan where none is visible.
    """
    errors, angles, joints = [], [], []
    most = 1 + max(int(t.labels.max()) for t in [*scenes, *observations])
    confusion = np.zeros((most, most), np.int64)  # true, read
    for seen, true in zip(observations, scenes, strict=True):
        light, target = (depth_picture(t.depth)[..., 0] / 255.0 for t in (seen, true))
        errors.append(float(np.sqrt(((light - target) ** 2).mean())))
        solid = true.normals.any(-1)
        # The same angle as the arc cosine's, but exact where normals agree.
        a, b = seen.normals[solid].astype(np.float64), true.normals[solid].astype(np.float64)
        angles.append(np.degrees(np.arctan2(np.linalg.norm(np.cross(a, b), axis=-1), (a * b).sum(-1))))
        angles[-1][~a.any(-1)] = 90.0
        confusion += np.bincount(
            true.labels.astype(np.int64).ravel() * most + seen.labels.ravel(), minlength=most**2
        ).reshape(most, most)
        for person in true.keypoints:
            if wanted := _visible([person]):
                joints += correct_joints(_visible(seen.keypoints), wanted, min(true.labels.shape))
    hits, union = np.diag(confusion), confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    there = confusion.sum(1) > 0
    return {
        "depth_rmse": float(np.mean(errors)),
        "normal_degrees": float(np.concatenate(angles).mean()),
        "miou": float((hits[there] / union[there]).mean()),
        "pck": float(np.mean(joints)) if joints else float("nan"),
    }


def _visible(people: Sequence[np.ndarray] | np.ndarray) -> list[Joint]:
    return [(joint, x, y) for person in people for joint, (x, y, seen) in enumerate(person) if seen > 0]
