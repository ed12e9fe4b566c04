"""The figures of the model card: VAE error, prompt adherence, FID, and the contact sheet of ``mini``.

    python recipes/report.py --out docs                      # the shipped base; needs npm once, for the pictures
    python recipes/report.py --base runs/mini/mini --referee runs/mini/referee --out runs/mini

Writes ``OUT/mini.json``, ``OUT/mini.png`` (12 concepts x 5 styles) and ``OUT/scenes.png`` (held-out scenes, and what
the base makes of their captions).
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import Progress

from controlkit.backbones import load_base
from controlkit.data import EmojiPairs
from controlkit.files import write_atomic
from controlkit.images import grid, write_png
from controlkit.measure import Referee, ceiling_of, fid, mean_figure, psnr
from controlkit.mini import world
from controlkit.mini.scenes import draw_scenes
from controlkit.sample import Request, maker
from controlkit.seeds import numpy_rng

CONCEPTS = (
    "red-apple",
    "cat-face",
    "dog-face",
    "rocket",
    "mushroom",
    "red-heart",
    "house",
    "tropical-fish",
    "grinning-face",
    "strawberry",
    "umbrella",
    "glowing-star",
)
SCENES_SEED, SCENES = 2**31, 10  # of scenes that nothing was trained on
CHOICES = 100  # captions the referee picks among, all of one style on one ground


def quiz(
    emoji: world.Emoji, count: int, split: world.Split, of: frozenset[str] | None = None
) -> tuple[list[int], list[str], list[list[str]]]:
    """``count`` questions: picture rows, grounds, and 100 captions each, of its style and ground, the right first.

    ``of``: the concepts that are asked for, all of the split's by default; the wrong captions are always of all.
    """
    rng = numpy_rng("quiz", split)
    rows = [row for row in world.rows(emoji, split) if of is None or emoji.concepts[row] in of]
    chosen = [int(row) for row in rng.choice(rows, size=count, replace=count > len(rows))]
    grounds = [list(world.GROUNDS)[rng.integers(len(world.GROUNDS))] for _ in chosen]
    captions = []
    for row, ground in zip(chosen, grounds, strict=True):
        style, concept = emoji.styles[row], emoji.concepts[row]
        others = sorted({c for c, s in zip(emoji.concepts, emoji.styles, strict=True) if s == style and c != concept})
        wrong = rng.choice(others, size=CHOICES - 1, replace=False)
        captions.append([world.caption(str(c), style, ground) for c in (concept, *wrong)])
    return chosen, grounds, captions


def main(
    out: Annotated[Path, typer.Option(help="Folder for mini.json and mini.png.")] = Path("docs"),
    base: Annotated[str, typer.Option(help="The base to report on.")] = "mini",
    referee: Annotated[Path | None, typer.Option(help="Its referee; the shipped one by default.")] = None,
    num: Annotated[int, typer.Option(help="Generated pictures to score.")] = 200,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 4.0,
) -> None:
    """Measure the embedded base and draw its contact sheet."""
    started = time.perf_counter()
    model, judge = load_base(base), Referee(referee)
    emoji = world.load_emoji(model.size)
    with Progress() as progress:
        scenes = list(draw_scenes(model.size, SCENES_SEED, range(SCENES)))
        count = 2 * num + len(CONCEPTS) * len(world.STYLES) + len(scenes)
        task = progress.add_task("generating", total=count * steps)

        def make(prompts: Sequence[str], seed: int | None = None) -> list[np.ndarray]:
            seeds = range(len(prompts)) if seed is None else [seed] * len(prompts)
            each = zip(prompts, seeds, strict=True)
            asked = [Request(prompt=prompt, seed=own, steps=steps, guidance=guidance) for prompt, own in each]
            return [picture.pixels for picture in maker(model, on_step=lambda n: progress.advance(task, n))(asked)]

        sheet = [
            make([world.caption(concept, style, ground) for style in world.STYLES], seed=0)
            for concept, ground in zip(CONCEPTS, world.GROUNDS, strict=True)
        ]
        staged = make([scene.captions[0] for scene in scenes])
        rows, grounds, captions = quiz(emoji, num, "base")
        made = make([texts[0] for texts in captions])
        everyday = quiz(emoji, num, "base", world.everyday_concepts())[2]
        known = make([texts[0] for texts in everyday])
    unseen = [pair.picture for pair in EmojiPairs(model.size, "heldout_pictures")]
    rebuilt = ceiling_of(model)(unseen)
    seen = [world.draw_emoji(emoji, row, 0, ground=ground)[0] for row, ground in zip(rows, grounds, strict=True)]
    held, held_grounds, held_captions = quiz(emoji, num, "heldout_pictures")
    fresh = [world.draw_emoji(emoji, row, 0, ground=g)[0] for row, g in zip(held, held_grounds, strict=True)]
    reference = judge.features(unseen)
    decibels = np.array([psnr(made, truth) for made, truth in zip(rebuilt, unseen, strict=True)])
    figures = {
        "vae_psnr_heldout": asdict(mean_figure(decibels)),
        "right_caption_generated": asdict(mean_figure((judge.choose(made, captions) == 0).astype(float))),
        "right_caption_generated_everyday": asdict(mean_figure((judge.choose(known, everyday) == 0).astype(float))),
        "right_caption_real_seen": asdict(mean_figure((judge.choose(seen, captions) == 0).astype(float))),
        "right_caption_real_heldout": asdict(mean_figure((judge.choose(fresh, held_captions) == 0).astype(float))),
        "clip_score_generated": asdict(mean_figure(judge.clip_scores(made, [texts[0] for texts in captions]))),
        "clip_score_real": asdict(mean_figure(judge.clip_scores(seen, [texts[0] for texts in captions]))),
        "fid_generated": asdict(fid(judge.features(made), reference)),
        "fid_vae_reconstruction": asdict(fid(judge.features(rebuilt[:num]), reference)),
        "num": num,
        "settings": {"steps": steps, "guidance": guidance, "size": None},
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_atomic(out / "mini.json", (json.dumps(figures, indent=2) + "\n").encode())
    turned = list(zip(*sheet, strict=True))  # styles down, concepts across
    write_png(out / "mini.png", grid(turned, [concept.replace("-", " ") for concept in CONCEPTS], cell=96), colours=256)
    both = [[scene.picture for scene in scenes], staged]
    labels = [scene.captions[-1] for scene in scenes]
    write_png(out / "scenes.png", grid(both, labels, cell=model.size), colours=256)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    typer.run(main)
