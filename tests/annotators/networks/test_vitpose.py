"""ViTPose: its own way from boxes to points beside the library's, heat maps made by hand, and where boxes come from."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import transformers
from listed import noise

from controlkit.annotators import annotator
from controlkit.annotators.networks import detection, mediapipe, poses, vitpose
from controlkit.annotators.networks.vitpose import VITPOSE
from controlkit.annotators.networks.weights import PublicFile

BOXES = np.array([(10.0, 20.0, 70.0, 110.0), (60.0, 5.0, 150.0, 60.0)])  # left, top, right, bottom


def tiny(name, *settings):
    """A tiny network in the place of the public one."""
    public = next(one for one in VITPOSE if one.file.repository.endswith(f"/vitpose-{name}"))
    file = PublicFile("model.safetensors", f"x/tiny-{name}")
    return replace(public, file=file, settings=lambda: vitpose._vitpose(16, 2, 2, *settings))


TINY = [tiny("base-simple", 0, True), tiny("base"), tiny("plus-base", 4)]


@pytest.fixture
def saved(weights_folder):
    """``saved(model)``: the network, of random weights, saved where it is looked for."""

    def put(model):
        torch.manual_seed(2)
        network = transformers.VitPoseForPoseEstimation(model.settings()).eval()
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        network.save_pretrained(weights_folder / model.file.repository.rpartition("/")[2])
        return network

    return put


def told(model):
    """Further inputs of the library's network: the first data set, COCO, of those that ViTPose++ tells apart."""
    return {"dataset_index": torch.zeros(len(BOXES), dtype=torch.long)} if model.has_experts else {}


@pytest.mark.parametrize("model", TINY, ids=lambda model: model.file.repository)
def test_points_are_the_library_s_own(model, saved):
    pytest.importorskip("scipy")
    from transformers.models.vitpose.image_processing_pil_vitpose import VitPoseImageProcessorPil

    picture, network, processor = cv2.GaussianBlur(noise(120, 160), (0, 0), 2), saved(model), VitPoseImageProcessorPil()
    coco = [[(x0, y0, x1 - x0, y1 - y0) for x0, y0, x1, y1 in BOXES]]
    pixels = processor(picture, boxes=coco, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        outputs = network(pixels.float(), **told(model))
    [theirs] = processor.post_process_pose_estimation(outputs, boxes=coco)
    cuts = [vitpose._cut(picture, box) for box in BOXES]
    far = abs(cuts[0] / 255.0 - (pixels[0].numpy().transpose(1, 2, 0) * processor.image_std + processor.image_mean))
    assert far[30:-30, 30:-30].max() < 0.02, "cut out as the library does"
    for heat, own in zip(vitpose._heat(cuts, "cpu", model), outputs.heatmaps.numpy(), strict=True):
        assert np.corrcoef(heat.transpose(2, 0, 1).ravel(), own.ravel())[0, 1] > 0.99
    for heat, box, own in zip(outputs.heatmaps.numpy(), BOXES, theirs, strict=True):
        found, expected = vitpose.points_of(heat.transpose(1, 2, 0), box), own["keypoints"].numpy()
        apart = abs(found[:, :2] - expected)[found[:, 2] > 0]
        near, place = (apart < 0.01).all(-1), vitpose._frame(box)[1] / (47, 63)
        assert near.mean() > 0.7
        assert ((apart[~near] / place).max(-1) > 1).all(), "where the library's point flies away, ours stays"


def test_experts_are_told_that_coco_s_points_are_wanted(saved):
    model, cut = TINY[-1], noise(256, 192)
    network, (mean, spread) = saved(model), vitpose.IMAGENET
    pixels = (torch.from_numpy(cut / 255.0) - torch.tensor(mean)) / torch.tensor(spread)
    batch = pixels.permute(2, 0, 1)[None].float()
    with torch.no_grad():
        maps = [network(batch, dataset_index=torch.tensor([which])).heatmaps[0] for which in (0, 1)]
    [heat] = vitpose._heat([cut], "cpu", model)
    assert np.allclose(heat.transpose(2, 0, 1), maps[0], atol=1e-3) and abs(maps[0] - maps[1]).max() > 0.1


def heat_at(places):
    """Heat maps (64, 48, 17) with a soft spot at each (x, y), in places of the map."""
    y, x = np.mgrid[:64, :48]
    spots = [np.exp(-((x - at) ** 2 + (y - down) ** 2) / (2 * 2**2)) for at, down in places]
    return np.stack(spots, -1).astype(np.float32)


PLACES = np.random.default_rng(5).uniform((4, 4), (43, 59), (17, 2))


def test_points_of_heat_maps_made_by_hand_are_where_the_heat_is():
    box = np.array((100.0, 50.0, 160.0, 290.0))  # 60 by 240: read as 180 by 240, a quarter more
    found = vitpose.points_of(heat_at(PLACES), box)
    size = np.array((180, 240)) * 1.25
    expected = (130, 170) - size / 2 + PLACES * size / (47, 63)
    assert np.allclose(found[:, :2], expected, atol=0.05), "to a fiftieth of a place"
    assert (found[:, 2] > 0.8).all()
    assert not vitpose.points_of(np.zeros((64, 48, 17), np.float32), box).any()
    flat = np.full((64, 48, 17), 0.5, np.float32)
    assert np.isfinite(vitpose.points_of(flat, box)).all(), "where no top is, nothing flies away"


def test_a_cut_has_the_ends_of_its_box_at_its_first_and_last_pixels():
    picture, box = np.zeros((400, 400, 3), np.uint8), np.array((100.0, 100.0, 220.0, 260.0))
    corner, size = vitpose._frame(box)
    assert np.allclose(corner, (85, 80)) and np.allclose(size, (150, 200))
    cv2.circle(picture, (85 + 75, 80 + 50), 4, (255, 255, 255), -1)
    light = np.argwhere(vitpose._cut(picture, box)[..., 0] > 128).mean(0)
    assert np.allclose(light, (255 / 4, 191 / 2), atol=0.5)


@pytest.fixture
def maps(monkeypatch):
    """``maps(boxes of each picture, heat maps)`` puts answers in the networks' place."""

    def put(boxes, heat):
        given = iter(boxes)
        monkeypatch.setattr(vitpose, "find_boxes", lambda picture, device: next(given))
        monkeypatch.setattr(vitpose, "_heat", lambda cuts, device, model: heat)

    return put


def test_coco_s_points_become_openpose_s_joints_and_each_picture_has_its_people(maps):
    boxes = [np.zeros((0, 4)), BOXES[:1], BOXES]
    heat = [heat_at(PLACES), heat_at(PLACES[::-1]), 0.2 * heat_at(PLACES)]
    heat[0][..., [6, 9]] *= 0.2  # the right shoulder, and with it the neck; the left wrist
    maps(boxes, heat)
    people = vitpose.find_people([np.zeros((400, 400, 3), np.uint8)] * 3, "cpu")
    assert [len(some) for some in people] == [0, 1, 1], "nothing is sure in the last box"
    at = vitpose.points_of(heat[0], BOXES[0])
    order = [0, None, None, 8, 10, 5, 7, None, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]
    for joint, source in enumerate(order):
        inside = source is not None and (at[source, :2] >= 0).all()
        expected = (*at[source, :2], 1) if inside else (0, 0, 0)
        assert np.allclose(people[1][0].body[joint], expected, atol=1e-3), joint
    assert not (people[1][0].face.any() or people[1][0].left_hand.any())
    maps(boxes[1:2], [heat_at(PLACES)])
    [hint] = poses.vitpose_pose([np.zeros((400, 400, 3), np.uint8)], "cpu")
    assert hint.shape == (400, 400, 3) and hint.any()


def test_boxes_are_rt_detr_s_else_mediapipe_s_else_the_whole_picture(weights_folder, monkeypatch):
    (weights_folder / "vitpose-base-simple").mkdir()
    (weights_folder / "vitpose-base-simple" / "model.safetensors").touch()
    digests, picture = [], np.zeros((30, 40, 3), np.uint8)
    monkeypatch.setattr(mediapipe, "lack", lambda: "No.")
    assert vitpose.find_boxes(picture, "cpu").tolist() == [[0, 0, 40, 30]]
    digests.append(vitpose.weights())
    monkeypatch.setattr(mediapipe, "lack", lambda: "")
    monkeypatch.setattr(mediapipe, "_bodies", lambda picture: [np.array([(10, 10, 1), (20, 30, 1)])])
    assert vitpose.find_boxes(picture, "cpu").tolist() == [[9, 8, 21, 30]], "a tenth more, in the picture"
    monkeypatch.setattr(mediapipe, "_bodies", lambda picture: [])
    assert vitpose.find_boxes(picture, "cpu").shape == (0, 4)
    digests.append(vitpose.weights())
    (weights_folder / "rtdetr_r18vd_coco_o365").mkdir()
    (weights_folder / "rtdetr_r18vd_coco_o365" / "model.safetensors").touch()
    monkeypatch.setattr(detection, "find_boxes", lambda picture, device: BOXES)
    assert vitpose.find_boxes(picture, "cpu") is BOXES
    digests.append(vitpose.weights())
    assert len(set(digests)) == 3, "hints of other boxes are other hints"


def test_without_a_file_the_smallest_network_s_command_is_named(weights_folder):
    assert "hf download usyd-community/vitpose-base-simple model.safetensors" in annotator("vitpose").lacks()
