"""The embedded world's referees as annotators: of its scenes they make hints that are near the truth."""

import numpy as np
import pytest

from controlkit.annotators import annotate, annotate_all, contract, kind_of
from controlkit.measure.metrics import METRICS
from controlkit.mini.scenes import draw_scene

KINDS = ("depth", "normal", "seg", "pose")
SEED = 2**31 - 5  # of scenes that nothing was trained on


@pytest.fixture(scope="module")
def scenes():
    """Two scenes with a figure."""
    drawn = (draw_scene(128, SEED, index) for index in range(100))
    people = (scene for scene in drawn if len(scene.keypoints))
    return [scene for scene, _ in zip(people, range(2), strict=False)]


@pytest.mark.parametrize("name", KINDS)
def test_a_hint_of_a_scene_is_nearer_to_its_truth_than_to_another_s(name, scenes):
    kind = kind_of(name)
    metric = METRICS[kind.metric]
    made = annotate_all([scene.picture for scene in scenes], contract(f"mini_{name}"))
    truths = [kind.truth(scene) for scene in scenes]
    own, other = (np.mean([metric.function(made[i], truths[i - step]) for i in (0, 1)]) for step in (0, 1))
    assert own > 1.5 * other if metric.higher_is_better else own < 0.5 * other


def test_a_hint_is_the_same_alone_and_among_others(scenes):
    together = annotate_all([scene.picture for scene in scenes], contract("mini_depth"))
    alone = annotate(scenes[1].picture, contract("mini_depth"))
    assert abs(together[1].astype(int) - alone).max() <= 1


def test_what_a_cache_may_keep_depends_on_the_weights(monkeypatch):
    from controlkit.annotators import kinds, world

    before = kind_of("mini_depth").digest()
    assert len(world.weights()) == 64
    monkeypatch.setitem(kinds._KINDS, "mini_depth", kinds.replace(kind_of("mini_depth"), weights=lambda: "others"))
    assert kind_of("mini_depth").digest() != before != kind_of("mini_seg").digest()
