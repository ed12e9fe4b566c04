"""Rebuild the embedded base ``mini`` from nothing: pictures, VAE, text tower, referee, U-Net.

    python recipes/mini.py --out runs/mini --size 64 --budget 120          # minutes, on a CPU
    python recipes/mini.py --out runs/mini --size 256 --budget 25 --device cuda
    python recipes/mini.py --out /tmp/toy --toy                            # every stage in a minute, for CI

Run the same command again to go on after an interruption. Each stage gets a share of the budget, keeps its
state in ``OUT/state``, and finished stages are not run again. The result is ``OUT/mini`` (an ordinary
``StableDiffusionPipeline`` folder) and ``OUT/referee``; ``recipes/report.py`` measures them.
"""

import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from rich.console import Console
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from controlkit.backbones import UNetBase, load_base
from controlkit.hub import digest
from controlkit.mini import world
from controlkit.mini.scenes import load_scenes
from controlkit.mini.tower import WINDOW, ImageTextTower, train_tokenizer
from controlkit.precision import autocast, training_attention
from controlkit.sample import PLAIN_PROMPT as PLAIN
from controlkit.seeds import numpy_rng, torch_rng
from controlkit.train.optimizers import EMA, Optimizer

console = Console()


@dataclass(frozen=True)
class Size:
    """The settings that change with the picture size; everything else is the same recipe."""

    pixels: int
    vae_channels: tuple[int, ...]  # one entry a resolution: stride = 2 ** (len - 1)
    latent_channels: int
    vae_batch: int
    unet_channels: tuple[int, ...]
    unet_batch: int
    scenes: int  # drawn once
    views: int  # encodings of each picture that the U-Net learns from, on different grounds
    text: tuple[int, int]  # width and layers of the text transformer
    referee: tuple[int, ...]  # channels of the towers' ResNet
    referee_text: tuple[int, int]


SIZES = {
    "toy": Size(32, (8, 16, 16), 4, 4, (16, 32, 32), 4, 12, 1, (32, 1), (8, 16, 16, 32), (32, 1)),
    "64": Size(64, (24, 48, 96), 8, 16, (64, 128, 144), 48, 4000, 8, (192, 2), (48, 96, 160, 256), (128, 2)),
    "128": Size(128, (24, 48, 96, 128), 16, 16, (64, 128, 144), 48, 6000, 4, (192, 2), (48, 96, 160, 256), (128, 2)),
    "256": Size(256, (64, 128, 256, 256), 4, 32, (96, 160, 192), 64, 12000, 4, (192, 2), (48, 96, 160, 256), (128, 2)),
}
SHARES = {  # of the budget, by what --start gives: nothing, a base of another size, or one of this very shape
    "nothing": {"vae": 0.22, "tower": 0.04, "referee": 0.10, "unet": 0.64},
    "another": {"vae": 0.26, "referee": 0.07, "unet": 0.67},
    "same": {"unet": 1.0},
}
VOCABULARY = 2048
SHAPE_SHARE, SCENE_SHARE = 0.1, 0.25  # of the pictures in a batch
EVERYDAY_SHARE = 0.45  # of what the U-Net learns from; drawn like all others, everyday concepts would be 6%


def to_batch(drawn: Sequence[tuple[np.ndarray, Any]]) -> tuple[Tensor, list[Any]]:
    """Pictures as one float tensor (B, 3, H, W) in [-1, 1], and their captions (or wordings)."""
    pixels = torch.from_numpy(np.stack([picture for picture, _ in drawn]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, [text for _, text in drawn]


Wordings = tuple[str, ...]


def words_for(wordings: Wordings, rng: np.random.Generator) -> str:
    """A caption of a picture: mostly the fullest, else another wording, or, rarely, ``PLAIN``.

    Of an emoji's one wording style or ground are sometimes left out, as people write.
    """
    chosen = rng.random()
    if chosen < 0.04:
        return PLAIN
    if len(wordings) > 1:
        return wordings[0] if chosen < 0.5 else wordings[rng.integers(1, len(wordings))]
    what, *rest = wordings[0].split(", ")
    if chosen < 0.25 and rest:
        return ", ".join([what, *(part for part in rest if rng.random() < 0.4)])
    return wordings[0]


class Pictures:
    """The world as batches: a mix of emoji, shapes and scenes, the same for (seed, step) on every machine."""

    def __init__(self, size: int, split: world.Split, seed: int = 0, scenes: int = 0) -> None:
        self.emoji = world.load_emoji(size)
        self.rows = world.rows(self.emoji, split)
        self.scenes = load_scenes(size, 0, scenes) if scenes else []
        self.seed = seed

    def alike(self, count: int, step: int) -> tuple[Tensor, list[str]]:
        """A batch of one kind, so that only the thing tells pictures apart: one style on one ground, or scenes."""
        rng = numpy_rng("alike", self.seed, step)
        if self.scenes and rng.random() < SCENE_SHARE:
            chosen = rng.choice(len(self.scenes), size=min(count, len(self.scenes)), replace=False)
            return to_batch([(self.scenes[i].picture, words_for(self.scenes[i].captions, rng)) for i in chosen])
        style = world.STYLES[rng.integers(len(world.STYLES))]
        rows = [row for row in self.rows if self.emoji.styles[row] == style]
        chosen = rng.choice(rows, size=min(count, len(rows)), replace=False)
        ground = list(world.GROUNDS)[rng.integers(len(world.GROUNDS))]
        return to_batch([world.draw_emoji(self.emoji, int(row), self.seed, step, ground) for row in chosen])

    def views(self, visit: int) -> Iterator[tuple[np.ndarray, Wordings]]:
        """Every emoji once, on the ground of this visit; shapes in their share; every other scene, in turn mirrored."""
        for row in self.rows:
            picture, text = world.draw_emoji(self.emoji, row, self.seed, visit)
            yield picture, (text,)
        count = round(len(self.rows) * SHAPE_SHARE)
        for i in range(count):
            picture, _, text = world.draw_shape(self.emoji.size, self.seed, visit * count + i)
            yield picture, (text,)
        for scene in self.scenes[visit % 2 :: 2]:
            yield scene.picture[:, ::-1] if visit // 2 % 2 else scene.picture, scene.captions

    def batch(self, count: int, step: int) -> tuple[Tensor, list[str]]:
        """``count`` pictures, float (count, 3, size, size) in [-1, 1], and their captions."""
        rng = numpy_rng("batch", self.seed, step)
        drawn = []
        for i in range(count):
            kind = rng.random()
            if kind < SHAPE_SHARE:
                picture, _, text = world.draw_shape(self.emoji.size, self.seed, step * count + i)
                wordings: Wordings = (text,)
            elif self.scenes and kind < SHAPE_SHARE + SCENE_SHARE:
                scene = self.scenes[rng.integers(len(self.scenes))]
                picture, wordings = scene.picture, scene.captions
            else:
                row = self.rows[rng.integers(len(self.rows))]
                picture, text = world.draw_emoji(self.emoji, row, self.seed, step)
                wordings = (text,)
            drawn.append((picture, words_for(wordings, rng)))
        return to_batch(drawn)


@dataclass
class Run:
    """Where the run lives and on what it runs; trains one module at a time against the clock."""

    out: Path
    device: str
    save_every: float = 60.0

    def train(
        self,
        name: str,
        module: nn.Module,
        loss_of: Callable[[int, float], tuple[Tensor, dict[str, float]]],
        minutes: float,
        lr: float,
        muon: bool = False,
    ) -> nn.Module:
        """Train ``module`` until ``minutes`` are used up, over all interruptions; leave it averaged (EMA).

        The learning rate warms up for 2% of the time, then falls along a cosine to zero. ``loss_of(step, progress)``
        returns the loss and figures to show.
        """
        state_path = self.out / "state" / f"{name}.pt"
        state_path.parent.mkdir(parents=True, exist_ok=True)
        params = [p for p in module.parameters() if p.requires_grad]
        optimizer = Optimizer(module, "muon" if muon else "adamw", betas=(0.9, 0.99))
        average = EMA(module, 0.999)
        step, used = 0, 0.0
        if state_path.exists():
            state = torch.load(state_path, map_location=self.device, weights_only=True)
            module.load_state_dict(state["module"])
            optimizer.restore(state["optimizer"])
            average.module.load_state_dict(state["ema"])
            step, used = state["step"], state["used"]
        budget = minutes * 60
        count = sum(p.numel() for p in params)
        console.print(f"[bold]{name}[/]: {count / 1e6:.2f}M parameters, {minutes:.1f} min, step {step}")
        module.train()
        started = saved = shown = time.perf_counter()
        before = used
        while used < budget:
            progress = used / budget
            rate = min(1.0, progress / 0.02 + 1e-3) * 0.5 * (1 + math.cos(math.pi * progress))
            with autocast(self.device), training_attention(self.device):
                loss, figures = loss_of(step, progress)
            loss.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step(lr * rate)
            step += 1
            average.update(module, step)
            now = time.perf_counter()
            used = before + now - started
            if now - shown > 15:
                shown = now
                text = " ".join(f"{k} {v:.4f}" for k, v in figures.items())
                console.print(f"  {name} {used / 60:5.1f}/{minutes:.1f} min step {step} loss {loss.item():.4f} {text}")
            if now - saved > self.save_every or used >= budget:
                saved = now
                state = {"module": module.state_dict(), "optimizer": optimizer.state()}
                state |= {"ema": average.module.state_dict(), "step": step, "used": used}
                torch.save(state, state_path.with_suffix(".tmp"))
                os.replace(state_path.with_suffix(".tmp"), state_path)
        module.load_state_dict(average.module.state_dict())
        return module.eval().requires_grad_(False)


def build_vae(size: Size) -> AutoencoderKL:
    """Stable Diffusion's autoencoder, smaller."""
    depth = len(size.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=size.vae_channels,
        layers_per_block=1,
        latent_channels=size.latent_channels,
        norm_num_groups=8,
        sample_size=size.pixels,
        mid_block_add_attention=False,
    )


@torch.no_grad()
def carry_vae(old: AutoencoderKL, new: AutoencoderKL) -> None:
    """Begin a VAE with another's layers nearest the pixels, where names (counted from the finest) and shapes agree."""
    shift = len(new.decoder.up_blocks) - len(old.decoder.up_blocks)

    def from_finest(name: str) -> str:
        head, found, rest = name.partition("decoder.up_blocks.")
        if not found:
            return name
        level, rest = rest.split(".", 1)
        return f"{head}{found}{int(level) + shift}.{rest}"

    known = {from_finest(name): value for name, value in old.state_dict().items() if "mid_block" not in name}
    for name, value in new.state_dict().items():
        if name in known and known[name].shape == value.shape:
            value.copy_(known[name])


def train_vae(run: Run, size: Size, pictures: Pictures, minutes: float, start: UNetBase | None = None) -> AutoencoderKL:
    """Squared error, an edge term (differences of neighbours) and a light pull towards a unit Gaussian.

    Small convolutions at full resolution are what costs, so three quarters of the time go to quarter crops.
    """
    vae = build_vae(size).to(run.device)
    if start is not None:
        carry_vae(start.vae, vae)

    def loss_of(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        x = pictures.batch(size.vae_batch, step)[0]
        if progress < 0.75:
            top, left = numpy_rng("crop", step).integers(size.pixels // 2 + 1, size=2)
            x = x[..., top : top + size.pixels // 2, left : left + size.pixels // 2]
        x = x.to(run.device).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample(torch_rng("posterior", step))).sample.float()
        error = F.mse_loss(y, x)
        edges = sum(F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return error + 0.05 * edges + 1e-4 * kl, {"psnr": 10 * math.log10(4 / error.item()), "kl": kl.item()}

    run.train("vae", vae, loss_of, minutes, lr=2e-3, muon=True)
    return vae


def tokens_of(tokenizer: CLIPTokenizer, texts: list[str], device: str) -> Tensor:
    """Token rows (B, WINDOW), padded and cut to the window."""
    rows = tokenizer(texts, padding="max_length", truncation=True, max_length=WINDOW, return_tensors="pt")
    return rows.input_ids.to(device)


def learn_tokenizer(run: Run, pictures: Pictures) -> CLIPTokenizer:
    """The tokenizer both towers share, learnt from one caption a picture and the shapes' wordings."""
    folder = run.out / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        emoji = pictures.emoji
        texts = [world.draw_emoji(emoji, row, 0)[1] for row in range(len(emoji))] + [PLAIN] * 50
        texts += [world.draw_shape(16, 0, i)[2] for i in range(2000)]
        texts += [text for scene in pictures.scenes for text in scene.captions]
        train_tokenizer(texts, VOCABULARY, folder)
    return CLIPTokenizer.from_pretrained(folder)


def train_tower(
    run: Run,
    name: str,
    size: Size,
    text_size: tuple[int, int],
    tokenizer: CLIPTokenizer,
    minutes: float,
    seed: int,
    start: Path | None = None,
) -> ImageTextTower:
    """Contrastive pairs, from nothing or on from the tower in ``start``.

    Every other batch is of one style on one ground, or of scenes alone, so that it has to tell things apart.
    """
    torch.manual_seed(seed)
    if start is not None:
        tower = ImageTextTower.load(start)
    else:
        width, layers = text_size
        marks = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        text = {"vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 4 * width} | marks
        text |= {"num_hidden_layers": layers, "num_attention_heads": width // 32, "max_position_embeddings": WINDOW}
        image = {"embedding_size": 32, "hidden_sizes": list(size.referee), "depths": [1] * 4, "layer_type": "basic"}
        # It looks at 64 pixels whatever the size: enough to tell what is drawn, at a quarter of the cost.
        tower = ImageTextTower({"pixels": min(size.pixels, 64), "space": 128, "text": text, "image": image})
    tower = tower.to(run.device).requires_grad_(True)
    view = Pictures(size.pixels, "base", seed, size.scenes)
    count = 8 if size.pixels < 64 else 96

    def loss_of(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        pixels, texts = (view.alike if step % 2 else view.batch)(count, step)
        loss = tower.contrast(pixels.to(run.device), tokens_of(tokenizer, texts, run.device))
        return loss, {"scale": tower.log_scale.exp().item()}

    run.train(name, tower, loss_of, minutes, lr=1e-3)
    return tower


def build_unet(size: Size) -> UNet2DConditionModel:
    """Stable Diffusion's U-Net, smaller. Attention sits in the middle and at the resolutions between.

    As in SDXL the finest resolution has none: it is what costs most there, and prompts name things, not pixels.
    """
    depth = len(size.unet_channels)
    attends = [0 < level < depth - 1 for level in range(depth)]
    return UNet2DConditionModel(
        sample_size=size.pixels // 2 ** (len(size.vae_channels) - 1),
        in_channels=size.latent_channels,
        out_channels=size.latent_channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        block_out_channels=size.unet_channels,
        layers_per_block=1,
        cross_attention_dim=size.text[0],
        attention_head_dim=tuple(max(c // 32, 1) for c in size.unet_channels),  # the number of heads, despite its name
        norm_num_groups=min(16, size.unet_channels[0]),
    )


@torch.no_grad()
def carry_unet(old: UNetBase, vae: AutoencoderKL, unet: UNet2DConditionModel, pictures: Pictures) -> None:
    """Begin a U-Net with another base's, of the same channels and latents of the same height and width.

    Latents of the two VAEs are matched by least squares over pictures (both see the same place of a picture at the same
    place of their latents), and the first and last convolution are taken through that match. Of one VAE there is
    nothing to match.
    """
    if vae is old.vae:
        unet.load_state_dict(old.unet.state_dict())
        return
    pixels = pictures.batch(256, -100)[0]
    small = F.interpolate(pixels, (old.size, old.size), mode="area")
    before = torch.cat([old.encode_moments(part).chunk(2, 1)[0] for part in small.split(32)])
    after = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(32)])
    x, y = (z.movedim(1, -1).flatten(0, -2).double() for z in (before, after))
    x, y = x * old.vae.config.scaling_factor, y * vae.config.scaling_factor
    to_old, to_new = (torch.linalg.lstsq(a, b).solution.T.float() for a, b in ((y, x), (x, y)))
    state = dict(old.unet.state_dict())
    state["conv_in.weight"] = torch.einsum("fcij,cn->fnij", state["conv_in.weight"], to_old)
    state["conv_out.weight"] = torch.einsum("nc,cfij->nfij", to_new, state["conv_out.weight"])
    state["conv_out.bias"] = to_new @ state["conv_out.bias"]
    unet.load_state_dict(state)


def same_latents(base: UNetBase, size: Size) -> bool:
    """Whether a base's VAE has this size's very shape, so that it stays as it is and the U-Net goes on."""
    config = base.vae.config
    shape = (base.size, tuple(config.block_out_channels), config.latent_channels)
    return shape == (size.pixels, size.vae_channels, size.latent_channels)


def build_schedule() -> DDIMScheduler:
    """Stable Diffusion's betas with zero terminal SNR and v-prediction, so that grounds keep their colour.

    With SD 1.5's own schedule the last step still shows the mean colour of the picture it came from, which
    sampling from pure noise cannot; on flat grounds the eye sees that first.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,  # not used by this spacing; stock pipelines warn at 0
    )


@torch.no_grad()
def encode_views(run: Run, size: Size, pictures: Pictures, vae: AutoencoderKL) -> tuple[np.ndarray, list[Wordings]]:
    """Latents (N, C, h, w), float16, of ``size.views`` views of every picture, and their captions; made once.

    Encoding anew at every step would take a fifth of the U-Net's time.
    """
    path = run.out / "state" / f"latents-{digest(vae.state_dict())}.npy"  # of another VAE's latents nothing is of use
    texts_path = path.with_suffix(".json")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        latents, texts = [], []
        for visit in range(size.views):
            views = pictures.views(visit)
            while drawn := list(itertools.islice(views, 64)):
                pixels, captions = to_batch(drawn)
                pixels = pixels.to(run.device).contiguous(memory_format=torch.channels_last)
                with autocast(run.device):
                    sample = vae.encode(pixels).latent_dist.sample(torch_rng("posterior", len(texts)))
                latents.append((sample.float() * vae.config.scaling_factor).half().cpu().numpy())
                texts += captions
        texts_path.write_text(json.dumps(texts))
        with path.with_suffix(".tmp").open("wb") as file:
            np.save(file, np.concatenate(latents))
        os.replace(path.with_suffix(".tmp"), path)
    return np.load(path), json.loads(texts_path.read_text())


def everyday_rows(texts: list[Wordings]) -> np.ndarray:
    """Which pictures, by their captions, show an everyday concept."""
    names = {world.caption(concept, "any", "any").split(", ")[0] for concept in world.everyday_concepts()}
    return np.array([row for row, wordings in enumerate(texts) if wordings[0].split(", ")[0] in names])


def choose_rows(rng: np.random.Generator, count: int, total: int, everyday: np.ndarray) -> np.ndarray:
    """``count`` of ``total`` pictures, everyday concepts in their share."""
    often = rng.random(count) < EVERYDAY_SHARE
    return np.where(often, rng.choice(everyday, size=count), rng.integers(total, size=count))


def choose_times(rng: np.random.Generator, count: int, evenly: bool) -> np.ndarray:
    """``count`` timesteps as shares of the schedule in [0, 1): of density 2t, towards noise, or evenly.

    One is drawn from each of ``count`` equal shares, so that the batch's loss varies less than with free draws.
    """
    drawn = (np.arange(count) + rng.random(count)) / count
    return drawn if evenly else np.sqrt(drawn)


class Conditioned(nn.Module):
    """The U-Net and the text tower it listens to, trained together as in latent diffusion (Rombach et al., 2022).

    The tower begins as contrastive training left it. Frozen, it would tell apart only what its own small picture
    tower could see.
    """

    def __init__(self, unet: UNet2DConditionModel, text: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text = unet, text


def train_unet(
    run: Run,
    size: Size,
    latents: np.ndarray,
    texts: list[Wordings],
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    minutes: float,
    begin: Callable[[UNet2DConditionModel], None] | None = None,
    evenly: bool = False,
) -> Conditioned:
    """The latent diffusion objective; one caption in ten is empty (classifier-free guidance).

    A network this small cannot keep some nine thousand pictures in mind: it learns the everyday ones oftener.

    The prompt decides what is drawn at high noise, so those timesteps come oftener (density 2t/T), unless they are to
    be drawn ``evenly``: where an earlier U-Net knows that already and the detail of new latents has to be learnt.
    """
    torch.manual_seed(1)
    unet = build_unet(size)
    if begin:
        begin(unet)
    model = Conditioned(unet, text_encoder.requires_grad_(True)).to(run.device)
    schedule = build_schedule()
    count = size.unet_batch
    everyday = everyday_rows(texts)
    start = digest(unet.state_dict())  # a run that goes on from another's weights draws anew

    def loss_of(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        rng = numpy_rng("unet", start, step)
        rows = choose_rows(rng, count, len(latents), everyday)
        prompts = ["" if rng.random() < 0.1 else words_for(tuple(texts[row]), rng) for row in rows]
        x = torch.from_numpy(latents[rows]).float().to(run.device)
        noise = torch.randn(x.shape, generator=torch_rng("unet", start, step)).to(run.device)
        steps = choose_times(rng, count, evenly) * schedule.config.num_train_timesteps
        t = torch.from_numpy(steps.astype(np.int64)).to(run.device)
        text = model.text(tokens_of(tokenizer, prompts, run.device)).last_hidden_state
        out = model.unet(schedule.add_noise(x, noise, t), t, text).sample
        return F.mse_loss(out.float(), schedule.get_velocity(x, noise, t)), {}

    run.train("unet", model, loss_of, minutes, lr=1e-3, muon=True)
    return model


@torch.no_grad()
def set_scale(vae: AutoencoderKL, size: Size, pictures: Pictures, device: str) -> None:
    """Scale latents to unit spread, as Stable Diffusion's 0.18215 does for its own VAE."""
    latents = [vae.encode(pictures.batch(32, -1 - i)[0].to(device)).latent_dist.sample() for i in range(8)]
    vae.register_to_config(scaling_factor=round(1 / torch.cat(latents).std().item(), 5))


def save_base(
    folder: Path, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> None:
    """The base as an ordinary diffusers folder, half precision."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16, silence_dtype_warnings=True).save_pretrained(folder)
    for path in folder.glob("*/config.json"):  # where a part was loaded from is nobody's business
        held = json.loads(path.read_text())
        held.pop("_name_or_path", None)
        path.write_text(json.dumps(held, indent=2) + "\n")
    # Readers that take the stored type as the wanted one would mix half and single precision otherwise.
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def main(
    out: Annotated[Path, typer.Option(help="Where the run lives; give the same folder to go on.")],
    size: Annotated[str, typer.Option(help="Picture size: 64, 128 or 256.")] = "64",
    budget: Annotated[float, typer.Option(help="Minutes for all stages together.")] = 120.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    start: Annotated[
        Path | None, typer.Option(help="What an earlier run of this recipe left: begin with its averaged weights.")
    ] = None,
    toy: Annotated[bool, typer.Option("--toy", help="Every stage at 32 pixels in under a minute.")] = False,
) -> None:
    """Rebuild the embedded base `mini` from nothing, in one resumable run."""
    chosen = SIZES["toy" if toy else size]
    run = Run(out, device)
    pictures = Pictures(chosen.pixels, "base", scenes=chosen.scenes)
    torch.manual_seed(0)
    begun = load_base(start / "mini") if start else None
    at_hand = "nothing" if begun is None else "same" if same_latents(begun, chosen) else "another"
    minutes = {name: share * (0.4 if toy else budget) for name, share in SHARES[at_hand].items()}
    if begun and at_hand == "same":
        vae = begun.vae.to(device)
    else:
        vae = train_vae(run, chosen, pictures, minutes["vae"], begun)
        set_scale(vae, chosen, pictures, device)
    if begun:  # words and their numbers go together
        tokenizer, text = begun.towers[0].tokenizer, begun.towers[0].encoder
    else:
        tokenizer = learn_tokenizer(run, pictures)
        text = train_tower(run, "tower", chosen, chosen.text, tokenizer, minutes["tower"], seed=2).text
    if start and at_hand == "same":
        shutil.copytree(start / "referee", out / "referee", dirs_exist_ok=True)
    else:
        earlier = start and start / "referee"
        words = chosen.referee_text
        referee = train_tower(run, "referee", chosen, words, tokenizer, minutes["referee"], seed=3, start=earlier)
        referee.save(out / "referee")
        tokenizer.save_pretrained(out / "referee")
    latents, texts = encode_views(run, chosen, pictures, vae)
    begin = partial(carry_unet, begun, vae, pictures=pictures) if begun else None
    model = train_unet(run, chosen, latents, texts, text, tokenizer, minutes["unet"], begin, at_hand == "another")
    save_base(out / "mini", vae, model.text, tokenizer, model.unet)
    console.print(f"[bold green]done[/]: {out / 'mini'}")


if __name__ == "__main__":
    typer.run(main)
