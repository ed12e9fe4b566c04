"""The referee that reads truth off a picture: depth, normals, classes and body joints, from one small network.

Trained by ``recipes/referees.py`` on the scenes of ``controlkit.mini.scenes``, which know all of these exactly. An
``Observation`` follows the conventions of ``scenes.Scene`` and can take the place of a scene's truth. Nothing that
draws scenes is imported here.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from controlkit.images import to_tensor
from controlkit.mini.stored import Stored, resized
from controlkit.mini.truth import JOINTS, MIRRORED, Truth
from controlkit.precision import autocast

_FIGURE = {"skin", "hair", "shirt", "trousers", "shoes"}
_NECK = 1
_THRESHOLD = 0.3  # of a heatmap's peak, to be a joint
_FEWEST = 3  # joints that make a person

Maps = dict[str, Tensor]
"""Maps of pictures (B, 3, H, W), true or read: ``depth`` (B, 1, H, W), 1/m, 0 for sky; ``normals`` (B, 3,
H, W), zero for sky; ``labels``, int64 (B, H, W), or, read, their logits (B, classes, H, W); ``joints`` (B, 18, h, w),
heatmaps in [0, 1], or, read, their logits."""


@dataclass(frozen=True)
class Observation:
    """The maps read off a picture (H, W), in the conventions of ``scenes.Scene``.

    depth: float32 (H, W), metres along the view; infinite where the label says sky.
    normals: float32 (H, W, 3), unit, camera space (x right, y up, z towards the camera); zero where there is sky.
    labels: uint8 (H, W), indices into the observer's classes.
    keypoints: float32 (P, 18, 3), x and y in pixels (a pixel is 1 wide, the picture's corner is 0) and 1 where it was
        found, else 0, of each person's joints in OpenPose's order.
    """

    depth: np.ndarray
    normals: np.ndarray
    labels: np.ndarray
    keypoints: np.ndarray


class Observer(Stored):
    """An encoder and a decoder with skips (diffusers' residual blocks), four kinds of map from one last convolution.

    ``config``: ``pixels``, its side (a multiple of 16); ``widths``, channels at 1/2, 1/4, 1/8 and 1/16 of it;
    ``classes``, the labels' names, among them "sky".
    """

    def __init__(self, config: dict) -> None:
        super().__init__(config)
        widths = config["widths"]
        # Nothing runs at full resolution, where most of the time would go: pixels come in and maps go out in fours.
        self.conv_in = nn.Conv2d(12, widths[0], 3, padding=1)
        self.downs, self.lefts, self.rights, self.ups = (nn.ModuleList() for _ in range(4))
        for fine, coarse in itertools.pairwise(widths):
            self.downs.append(nn.Conv2d(fine, coarse, 3, stride=2, padding=1))
            self.lefts.append(_Block(coarse))
            self.ups.append(nn.Conv2d(coarse, fine, 1))
            # At the finest a whole block would take a quarter of all the time.
            self.rights.append(_Block(fine) if self.rights else nn.Conv2d(fine, fine, 3, padding=1))
        self.norm_out = nn.GroupNorm(8, widths[0])
        self.maps = [1, 3, len(config["classes"])]
        maps, joints = nn.Conv2d(widths[0], 4 * sum(self.maps), 1), nn.Conv2d(widths[0], JOINTS, 1)
        nn.init.constant_(joints.bias, -4.0)  # type: ignore[arg-type]  # joints are rare
        self.conv_out = nn.ModuleDict({"maps": maps, "joints": joints})

    def forward(self, pixels: Tensor) -> Maps:
        """``Maps`` as read off pictures (B, 3, H, W) in [-1, 1], of their size; joints at half the observer's side."""
        size = pixels.shape[-2:]
        x = self.conv_in(F.pixel_unshuffle(resized(pixels, self.config["pixels"]), 2))
        skips = []
        for down, left in zip(self.downs, self.lefts, strict=True):
            skips.append(x)
            x = left(down(x))
        for up, right in reversed(list(zip(self.ups, self.rights, strict=True))):
            x = right(F.interpolate(up(x), scale_factor=2.0) + skips.pop())
        with torch.autocast(x.device.type, enabled=False):  # in half precision neighbours of a peak would equal it
            x = F.silu(self.norm_out(x.float()))
            joints, maps = self.conv_out["joints"](x), F.pixel_shuffle(self.conv_out["maps"](x), 2)
        if maps.shape[-2:] != size:
            maps = F.interpolate(maps, size, mode="bilinear")
        depth, normals, labels = maps.split(self.maps, dim=1)
        return {"depth": F.softplus(depth - 2), "normals": normals, "labels": labels, "joints": joints}

    def loss(self, pixels: Tensor, truth: Maps) -> tuple[Tensor, dict[str, float]]:
        """The distance of maps read off pictures of its own side from ``maps_of`` them: a balanced sum, and its terms.

        Mean error of inverse depth (x 10), 1 - cosine of normals where there are any, cross-entropy of classes, and
        of heatmaps a cross-entropy per pixel that is joint.
        """
        read = self(pixels)
        solid = truth["normals"].square().sum(1) > 0.25
        length = read["normals"].square().sum(1).clamp(min=1e-12).sqrt()
        cosine = (read["normals"] * truth["normals"]).sum(1) / length
        joints = F.binary_cross_entropy_with_logits(read["joints"], truth["joints"], reduction="sum")
        terms = {
            "depth": 10 * F.l1_loss(read["depth"], truth["depth"]),
            "normals": (1 - cosine)[solid].mean(),
            "labels": F.cross_entropy(read["labels"], truth["labels"]),
            "joints": 0.1 * joints / (truth["joints"].sum() + len(pixels)),
        }
        return torch.stack(list(terms.values())).sum(), {name: term.item() for name, term in terms.items()}

    @torch.no_grad()
    def observe(self, pictures: Sequence[np.ndarray], batch: int = 32) -> list[Observation]:
        """Read the maps off pictures, uint8 (H, W, 3), of any sizes."""
        found = []
        device = self.conv_in.weight.device
        for start in range(0, len(pictures), batch):
            chunk = pictures[start : start + batch]
            pixels = torch.cat([resized(to_tensor([picture]), self.config["pixels"]) for picture in chunk])
            with autocast(device.type):
                read = self(pixels.to(device))
            read["joints"] = read["joints"].sigmoid()
            for i, picture in enumerate(chunk):
                found.append(self._observation({name: values[i].cpu() for name, values in read.items()}, picture.shape))
        return found

    def _observation(self, read: Maps, shape: Sequence[int]) -> Observation:
        height, width = shape[:2]
        depth, normals, logits = (
            F.interpolate(read[name][None], (height, width), mode="bilinear")[0].numpy()
            if read[name].shape[-2:] != (height, width)
            else read[name].numpy()
            for name in ("depth", "normals", "labels")
        )
        classes = self.config["classes"]
        labels = logits.argmax(0).astype(np.uint8)
        sky = labels == classes.index("sky")
        normals = normals / np.maximum(np.linalg.norm(normals, axis=0, keepdims=True), 1e-6)
        figure = np.isin(labels, [i for i, name in enumerate(classes) if name in _FIGURE])
        heat = read["joints"].numpy()
        return Observation(
            depth=np.where(sky, np.inf, 1 / np.maximum(depth[0], 1e-3)).astype(np.float32),
            normals=np.where(sky[..., None], 0, normals.transpose(1, 2, 0)).astype(np.float32),
            labels=labels,
            keypoints=persons(peaks(heat) * (width / heat.shape[2], height / heat.shape[1], 1, 1), figure),
        )


class _Block(ResnetBlock2D):
    """GroupNorm, SiLU and convolution, twice, with the input added; no timestep."""

    def __init__(self, channels: int) -> None:
        super().__init__(in_channels=channels, temb_channels=None, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, None)


# --- joints -------------------------------------------------------------------------------------------------------


def heatmaps(keypoints: Sequence[np.ndarray], size: int, side: int) -> Tensor:
    """Visible joints as Gaussians of 1/40 of the side, (B, 18, side, side) in [0, 1].

    Args:
        keypoints: of each picture (P, 18, 3): x and y in pixels, and whether visible.
        size: the pictures' side, in the same pixels.
        side: the heatmaps'.
    """
    heat = np.zeros((len(keypoints), JOINTS, side, side), np.float32)
    at = (np.arange(side) + 0.5) / side
    for i, people in enumerate(keypoints):
        for person in people:
            for joint, (x, y, visible) in enumerate(person):
                if visible:
                    across, down = (np.exp(-((at - z / size) ** 2) * (40**2 / 2)) for z in (x, y))
                    heat[i, joint] = np.maximum(heat[i, joint], down[:, None] * across)
    return torch.from_numpy(heat)


def peaks(heat: np.ndarray) -> np.ndarray:
    """Peaks of heatmaps (18, h, w) as rows (x, y, height, joint), x and y in their pixels, to fractions of one."""
    kernel = np.ones((5, 5), np.uint8)
    found = []
    for joint, values in enumerate(heat):
        logs = np.pad(np.log(np.maximum(values, 1e-6)), 1, mode="edge")
        for y, x in np.argwhere((values >= cv2.dilate(values, kernel)) & (values > _THRESHOLD)):
            around = logs[y : y + 3, x : x + 3]
            shifts = []
            for a, b, c in (around[1], around[:, 1]):  # the summit of the parabola through three logs: a Gaussian's own
                bend = 2 * b - a - c
                shifts.append(float(np.clip((c - a) / (2 * bend), -0.5, 0.5)) if bend > 0 else 0.0)
            found.append((x + 0.5 + shifts[0], y + 0.5 + shifts[1], values[y, x], joint))
    return np.array(found, np.float32).reshape(-1, 4)


def persons(found: np.ndarray, figure: np.ndarray) -> np.ndarray:
    """Joints put together to persons, (P, 18, 3): each joins the nearest neck, one on the same figure if there is one.

    Args:
        found: rows (x, y, height, joint), x and y in pixels.
        figure: bool (H, W), where figures are; its connected parts tell persons apart who stand apart.
    """
    height, width = figure.shape
    span = max(max(height, width) // 32, 1)  # joints lie on a figure's very edge, at times beyond it
    _, parts = cv2.connectedComponents(cv2.dilate(figure.astype(np.uint8), np.ones((2 * span + 1,) * 2, np.uint8)))
    x, y = (np.clip(found[:, k].astype(int), 0, side - 1) for k, side in ((0, width), (1, height)))
    part = parts[y, x]
    necks = np.flatnonzero(found[:, 3] == _NECK)
    if not len(necks):  # then every part is a person
        necks = np.array([np.flatnonzero(part == p)[0] for p in np.unique(part)], int)
    people = np.zeros((len(necks), JOINTS, 3), np.float32)
    for i in np.argsort(found[:, 2], kind="stable"):  # of two peaks of one joint the higher is kept
        away = np.hypot(*(found[necks, :2] - found[i, :2]).T)
        joint = int(found[i, 3])
        nearest = int((away + (part[necks] != part[i]) * (height + width)).argmin())
        people[nearest, joint] = (*found[i, :2], 1)
    return people[people[..., 2].sum(1) >= _FEWEST]


# --- truth --------------------------------------------------------------------------------------------------------


def maps_of(scenes: Sequence[Truth]) -> Maps:
    """The truth of scenes of one size, as ``Observer.loss`` takes it; heatmaps are of half the side."""
    size = len(scenes[0].depth)
    return {
        "depth": torch.from_numpy(np.stack([1 / scene.depth for scene in scenes]))[:, None],
        "normals": torch.from_numpy(np.stack([scene.normals for scene in scenes])).permute(0, 3, 1, 2).contiguous(),
        "labels": torch.from_numpy(np.stack([scene.labels for scene in scenes])).long(),
        "joints": heatmaps([scene.keypoints for scene in scenes], size, size // 2),
    }


def mirrored(maps: Maps, where: Tensor) -> Maps:
    """True ``Maps`` with left and right exchanged in the rows where ``where``, bool (B,), says so."""
    turned = {name: values.flip(-1) for name, values in maps.items()}
    turned["normals"] = turned["normals"] * torch.tensor([-1.0, 1.0, 1.0], device=where.device)[:, None, None]
    turned["joints"] = turned["joints"][:, list(MIRRORED)]
    return {
        name: torch.where(where.view(-1, *[1] * (values.ndim - 1)), turned[name], values)
        for name, values in maps.items()
    }
