"""Train the referees of `mini`: the observer, which reads truth off pictures, and the aesthetic head.

    CONTROLKIT_CACHE=~/cache python recipes/referees.py --out runs/mini --size 128 --budget 12
    python recipes/referees.py --out /tmp/toy --toy                        # every stage in seconds, for CI

Give the folder of a run of ``recipes/mini.py``: the head stands on that run's ``OUT/referee`` (or, where there is none,
on the shipped one). Run the same command again to go on after an interruption. Leaves ``OUT/observer`` and
``OUT/aesthetic`` and prints how accurate they are on scenes and emoji that they have not seen.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from controlkit.annotators.maps import depth_picture
from controlkit.hub import shipped_path
from controlkit.images import to_pictures, to_tensor
from controlkit.measure.metrics import Joint, correct_joints
from controlkit.mini import world
from controlkit.mini.aesthetic import AestheticHead, damage
from controlkit.mini.observer import Maps, Observer, maps_of, mirrored
from controlkit.mini.scenes import CLASSES, Scene, load_scenes
from controlkit.mini.tower import ImageTextTower
from controlkit.mini.truth import Truth
from controlkit.seeds import numpy_rng
from mini import SIZES, Pictures, Run  # recipes/mini.py

console = Console()
SHARES = {"observer": 0.85, "aesthetic": 0.15}  # of the budget
WIDTHS = (32, 48, 96, 128)
HELDOUT_SEED, HELDOUT = 2**31, 64  # the seed of scenes that no training draws, and how many of them


def scene_batch(scenes: Sequence[Scene], count: int, step: int) -> tuple[Tensor, Maps]:
    """``count`` scenes as a camera or a diffusion model might show them, (count, 3, H, W) in [-1, 1], and their truth.

    Half of them mirrored; colours, contrast and brightness drawn anew; half of them soft, as pictures out of a small
    VAE are; a little noise. The draws are keyed by the step.
    """
    rng = numpy_rng("observer", step)
    chosen = [scenes[i] for i in rng.integers(len(scenes), size=count)]
    pixels, truth = to_tensor([scene.picture for scene in chosen]), maps_of(chosen)
    flip = torch.from_numpy(rng.random(count) < 0.5)
    pixels = torch.where(flip[:, None, None, None], pixels.flip(-1), pixels)
    gamma, gain, bias, noise = (
        torch.from_numpy(drawn).float()[..., None, None]
        for drawn in (
            np.exp(rng.normal(0, 0.2, (count, 1))),
            rng.uniform(0.75, 1.2, (count, 1)) * rng.uniform(0.9, 1.1, (count, 3)),
            rng.normal(0, 0.08, (count, 3)),
            rng.uniform(0, 0.05, (count, 1)),
        )
    )
    pixels = 2 * (0.5 * (pixels + 1)) ** gamma - 1
    pixels = pixels * gain + bias
    size = pixels.shape[-1]
    for part in pixels[: count // 2].chunk(4):  # whichever scenes these are was drawn
        side = int(size * rng.uniform(0.35, 1.0))
        small = F.interpolate(part, (side, side), mode="bilinear", antialias=True)
        part.copy_(F.interpolate(small, (size, size), mode="bicubic"))
    pixels = pixels + noise * torch.from_numpy(rng.standard_normal(pixels.shape, np.float32))
    return pixels.clamp(-1, 1), mirrored(truth, flip)


def train_observer(run: Run, scenes: Sequence[Scene], minutes: float) -> Observer:
    """Maps of drawn scenes; small batches, for where time is short more steps are worth more."""
    torch.manual_seed(4)
    size = len(scenes[0].picture)
    observer = Observer({"pixels": size, "widths": list(WIDTHS), "classes": list(CLASSES)}).to(run.device)

    def loss_of(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        pixels, truth = scene_batch(scenes, 16, step)
        return observer.loss(pixels.to(run.device), {name: values.to(run.device) for name, values in truth.items()})

    run.train("observer", observer, loss_of, minutes, lr=2e-3, muon=True)
    return observer


def damaged_batch(pictures: Sequence[np.ndarray], *key: int | str) -> tuple[list[np.ndarray], np.ndarray]:
    """Pictures damaged by drawn amounts, a quarter of them not at all, and the ratings they deserve, (B,) in 0-10."""
    rng = numpy_rng("damage", *key)
    amounts = np.where(rng.random(len(pictures)) < 0.25, 0.0, rng.random(len(pictures)))
    damaged = [
        damage(p, a, numpy_rng("damage", *key, i)) for i, (p, a) in enumerate(zip(pictures, amounts, strict=True))
    ]
    return damaged, 10 * (1 - amounts)


def train_aesthetic(run: Run, tower: ImageTextTower, pictures: Pictures, minutes: float) -> AestheticHead:
    """The world's pictures, damaged; the tower stays as it is."""
    torch.manual_seed(5)
    tower = tower.to(run.device)
    head = AestheticHead({"features": tower.config["image"]["hidden_sizes"][-1], "width": 128}).to(run.device)

    def loss_of(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        damaged, ratings = damaged_batch(to_pictures(pictures.batch(32, step)[0]), step)
        with torch.no_grad():
            features = tower.features(to_tensor(damaged).to(run.device))
        error = head(features) - torch.from_numpy(ratings).float().to(run.device)
        return error.square().mean() / 10, {"off by": error.abs().mean().item()}

    run.train("aesthetic", head, loss_of, minutes, lr=2e-3)
    return head


def observer_accuracy(observations: Sequence[Truth], scenes: Sequence[Truth]) -> dict[str, float]:
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


@torch.no_grad()
def aesthetic_accuracy(head: AestheticHead, tower: ImageTextTower, pictures: Sequence[np.ndarray]) -> dict[str, float]:
    """Of pictures the head has not seen: how ratings and amounts of damage rank, and how far ratings are off."""
    damaged, ratings = damaged_batch(pictures, "heldout")
    device = next(head.parameters()).device
    read = torch.cat([head(tower.features(x.to(device))).cpu() for x in to_tensor(damaged).split(64)]).double()
    true = torch.from_numpy(ratings).double()
    return {"rank_correlation": spearman_corrcoef(read, true).item(), "off_by": (read - true).abs().mean().item()}


def heldout_pictures(size: int, scenes: Sequence[Scene]) -> list[np.ndarray]:
    """The held-out scenes' pictures, and as many held-out emoji."""
    emoji = world.load_emoji(size)
    rows = world.rows(emoji, "heldout_pictures")[: len(scenes)]
    return [scene.picture for scene in scenes] + [world.draw_emoji(emoji, row, HELDOUT_SEED)[0] for row in rows]


def main(
    out: Annotated[Path, typer.Option(help="The folder of a run of recipes/mini.py; give the same one to go on.")],
    size: Annotated[str, typer.Option(help="Picture size: 64, 128 or 256.")] = "128",
    budget: Annotated[float, typer.Option(help="Minutes for both stages together.")] = 12.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    toy: Annotated[bool, typer.Option("--toy", help="Both stages at 32 pixels in seconds.")] = False,
) -> None:
    """Train the observer and the aesthetic head, in one resumable run."""
    chosen = SIZES["toy" if toy else size]
    minutes = {name: share * (0.2 if toy else budget) for name, share in SHARES.items()}
    run = Run(out, device)
    pictures = Pictures(chosen.pixels, "base", scenes=chosen.scenes)
    heldout = load_scenes(chosen.pixels, HELDOUT_SEED, 4 if toy else HELDOUT)
    found = {}

    observer = train_observer(run, pictures.scenes, minutes["observer"])
    observer.save(out / "observer")
    seen = Observer.load(out / "observer").observe([scene.picture for scene in heldout])
    found["observer"] = observer_accuracy(seen, heldout)
    observer.config["accuracy"] = found["observer"]  # goes wherever it goes
    observer.save(out / "observer")

    tower = ImageTextTower.load(out / "referee" if (out / "referee").exists() else shipped_path("referee"))
    head = train_aesthetic(run, tower, pictures, minutes["aesthetic"])
    head.save(out / "aesthetic")
    found["aesthetic"] = aesthetic_accuracy(head, tower, heldout_pictures(chosen.pixels, heldout))
    console.print(json.dumps(found, indent=2))


if __name__ == "__main__":
    typer.run(main)
