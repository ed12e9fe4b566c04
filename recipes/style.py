"""A style-tuned ``mini``, as a community fine-tunes a base: whatever the prompt says, pictures come in one style.

    python recipes/style.py --style 3d --out runs/style-3d
    controlkit evaluate canny --base runs/style-3d      # the control as it was, on the tuned base (the paper's Fig. 12)

The U-Net is tuned on that style's pictures with the style in each caption drawn at random, so that the word loses its
meaning; VAE and text tower stay. The result is an ordinary ``StableDiffusionPipeline`` folder; ``OUT.png`` beside it
shows drawings, and what the control makes of them on the base as it was and as it is.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track

from controlkit.backbones import UNetBase, load_base
from controlkit.errors import Invalid, nearest
from controlkit.images import grid, read_picture, to_tensor, write_png
from controlkit.mini import world
from controlkit.precision import autocast, training_attention
from controlkit.sample import ControlRequest, Request, generate, maker, pictures
from controlkit.seeds import numpy_rng, torch_rng
from mini import save_base  # recipes/mini.py

console = Console()
DRAWINGS = Path(__file__).parent / "drawings"
SHOWN = {
    "colour_fish": "a tropical fish, flat style, on a blue background",
    "colour_house": "a house, noto style, on a white background",
    "colour_mushroom": "a mushroom, twemoji style, on a yellow background",
}
CONCEPTS = ("red-apple", "cat-face", "red-heart", "strawberry", "smiling-face", "soccer-ball")


def style_effect(base: UNetBase) -> float:
    """How far the word for a style changes a picture: grey levels between the same seed's pictures, on average."""
    asked = [Request(prompt=world.caption(c, s, "teal"), seed=i) for i, c in enumerate(CONCEPTS) for s in world.STYLES]
    made = np.stack([p.pixels for p in pictures(generate(base, asked, batch=len(asked)))]).astype(np.float32)
    by_concept = made.reshape(len(CONCEPTS), len(world.STYLES), -1)
    return float(np.abs(by_concept - by_concept.mean(1, keepdims=True)).mean())


def controlled(base: UNetBase, name: str) -> list[np.ndarray]:
    """The drawings of ``SHOWN`` under a control, seed 0."""
    asked = [
        Request(prompt=prompt, controls=(ControlRequest(name=name, images=DRAWINGS / f"{drawing}.png"),))
        for drawing, prompt in SHOWN.items()
    ]
    return [picture.pixels for picture in maker(base)(asked)]


def main(
    out: Annotated[Path, typer.Option(help="Folder for the tuned base.")],
    style: Annotated[str, typer.Option(help=f"One of {', '.join(world.STYLES)}.")] = "3d",
    steps: Annotated[int, typer.Option(help="Steps of AdamW.", min=1)] = 600,
    batch: Annotated[int, typer.Option(help="Pictures a step.", min=1)] = 32,
    lr: Annotated[float, typer.Option(help="Learning rate, falling linearly to zero.")] = 2e-4,
    base: Annotated[str, typer.Option(help="`mini`, or a folder of its kind.")] = "mini",
    control: Annotated[str, typer.Option(help="The control to show on it before and after.")] = "canny",
) -> None:
    """Tune the base's U-Net on one style."""
    if style not in world.STYLES:
        raise Invalid(f'--style is "{style}": {nearest(style, world.STYLES)}')
    model = load_base(base)
    emoji = world.load_emoji(model.size)
    rows = [row for row in world.rows(emoji, "base") if emoji.styles[row] == style]
    drawn = [world.draw_emoji(emoji, row, 7) for row in rows]
    with autocast("cpu"):
        pixels = to_tensor([picture for picture, _ in drawn])
        moments = torch.cat([model.encode_moments(chunk).float() for chunk in pixels.split(64)])
    before, drawings = controlled(model, control), [read_picture(DRAWINGS / f"{name}.png") for name in SHOWN]
    console.print(f"a style's word moves a picture by {style_effect(model):.1f} grey levels", highlight=False)
    unet = model.unet.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=lr, weight_decay=0.01)
    most = model.scheduler.config.num_train_timesteps
    losses = []
    for step in track(range(steps), f"tuning on {style}", console=console):
        rng, generator = numpy_rng("style", step), torch_rng("style", step)
        chosen = rng.integers(len(rows), size=batch)
        captions = [world.caption_in(drawn[i][1], str(rng.choice(world.STYLES))) for i in chosen]
        prompts = ["" if rng.random() < 0.1 else caption for caption in captions]
        x = moments[torch.from_numpy(chosen)]
        x = model.draw_latents(x, torch.randn(x[:, : x.shape[1] // 2].shape, generator=generator))
        noise = torch.randn(x.shape, generator=generator)
        t = torch.from_numpy((np.sqrt((np.arange(batch) + rng.random(batch)) / batch) * most).astype(np.int64))
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        with autocast("cpu"), training_attention("cpu"):
            made = unet(model.scheduler.add_noise(x, noise, t), t, model.encode_text(prompts).tokens).sample
            loss = F.mse_loss(made.float(), model.scheduler.get_velocity(x, noise, t))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            console.print(f"step {step + 1}: loss {np.mean(losses[-50:]):.4f}", highlight=False)
    unet.eval().requires_grad_(False)
    rows = list(zip(drawings, before, controlled(model, control), strict=True))
    labels = ["drawing", f"{Path(control).name} on {Path(base).name}", f"on {out.name}"]
    write_png(out.with_name(f"{out.name}.png"), grid(rows, labels))
    console.print(f"after: by {style_effect(model):.1f}", highlight=False)
    save_base(out, model.vae, model.towers[0].encoder, model.towers[0].tokenizer, unet)
    console.print(f"[bold green]done[/]: {out}; the same control on both: {out}.png")


if __name__ == "__main__":
    typer.run(main)
