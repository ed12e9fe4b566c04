"""Taming Transformers: a VQGAN, and a transformer that writes its tokens (Esser, Rombach and Ommer, CVPR 2021).

Two networks of diffusers and transformers. Not as there: no LPIPS in the reconstruction's loss, whose network has no
weights for these pictures, and so a weaker critic (``ADVERSARIAL``); and label patches go into the sequence as they
are, not by a second codebook, so that nothing of the map is lost. Prompts are not read.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from controlkit.backbones import Backbone
from controlkit.baselines.sampling import batches, hints_of, size_of
from controlkit.baselines.seam import Baseline, Material
from controlkit.errors import Unsupported
from controlkit.images import HintSpec, to_pictures
from controlkit.sample import Picture, Request
from controlkit.seeds import torch_rng

WIDTHS = (16, 32, 64, 128)
"""Channels of the VQGAN by level; each but the last halves the size, so a token stands for 8 x 8 pixels."""
STRIDE = 2 ** (len(WIDTHS) - 1)
CODES, CODE = 1024, 64
"""Vectors of the codebook, and their length."""
LAYERS, WIDTH, HEADS = 6, 192, 6
"""Of the transformer."""
PATCH = 2 * STRIDE
"""Pixels a side of a patch of the label map."""
TOP = 100
"""Tokens are drawn among so many, as there."""
KEPT, DEAD = 0.9, 0.05
"""A code's use fades by ``KEPT`` a step; below ``DEAD``, after some 30 steps without, it is drawn anew."""
ADVERSARIAL = 0.1
"""The share of the critic's loss relative to the reconstruction's, by the gradients of the last layer (equation 7).

There it is 0.8, beside a reconstruction's loss that LPIPS is part of. Without that 0.8 spoils the autoencoder: in 48
steps the absolute error of its pictures rises from 0.17 to 0.26, and with 0.1 it falls to 0.13.
"""


class Critic(nn.Sequential):
    """A patch discriminator (Isola et al., 2017): scores (B, 1, h, w) of pictures (B, 3, H, W), high for real ones."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        before = 3
        for width in (32, 64, 128):
            layers += [nn.Conv2d(before, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            before = width
        super().__init__(*layers, nn.Conv2d(before, 1, 3, padding=1))


def _quarter(pixels: Tensor, seed: int, step: int) -> Tensor:
    """A quarter of pictures (B, 3, H, W), drawn by step: a stage on these has four times as many steps for its cost."""
    height, width = (side // 2 for side in pixels.shape[-2:])
    top, left = (
        int(torch.randint(side + 1, (), generator=torch_rng("quarter", seed, step, place)))
        for place, side in enumerate((height, width))
    )
    return pixels[..., top : top + height, left : left + width]


class Taming(Baseline):
    """The VQGAN with its critic, and the transformer."""

    stages: ClassVar[Mapping[str, float]] = {"autoencoder": 0.3, "vqgan": 0.2, "transformer": 0.5}

    def __init__(self, base: Backbone, spec: HintSpec) -> None:
        from diffusers import VQModel
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__(base, spec)
        levels = len(WIDTHS)
        vq = VQModel(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=WIDTHS,
            latent_channels=CODE,
            num_vq_embeddings=CODES,
            norm_num_groups=16,
        )
        vq.register_buffer("used", torch.zeros(CODES))
        self.gan = nn.ModuleDict({"vq": vq, "critic": Critic()})
        self.grid = base.size // STRIDE
        places = (base.size // PATCH) ** 2 + self.grid**2
        quiet = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        marks = dict.fromkeys(("bos_token_id", "eos_token_id"), None)
        shape = {"n_positions": places, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
        config = GPT2Config(vocab_size=CODES, tie_word_embeddings=False, **shape, **quiet, **marks)
        self.writer = nn.ModuleDict(
            {"labels": nn.Conv2d(spec.channels, WIDTH, PATCH, stride=PATCH), "transformer": GPT2LMHeadModel(config)}
        )
        self.to(base.device)

    @property
    def vq(self) -> Any:
        """The autoencoder with its codebook."""
        return self.gan["vq"]

    def learning(self, stage: str) -> nn.Module:
        """The autoencoder; the same with its critic; the transformer."""
        return {"autoencoder": self.vq, "vqgan": self.gan, "transformer": self.writer}[stage]

    def loss(self, material: Material, step: int, stage: str) -> Tensor:
        """The loss of a stage: of the reconstruction, with the critic's; or the negative log-likelihood of tokens."""
        pixels = material.pictures(step)
        if stage == "autoencoder":
            pixels = _quarter(pixels, material.seed, step)
        if stage in ("autoencoder", "vqgan"):
            return self.reconstruction(pixels, stage == "vqgan", torch_rng("codes", material.seed, step))
        tokens = self.tokens(pixels)
        logits = self.logits(material.drawn(step).hints[""], tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())

    def reconstruction(self, pixels: Tensor, judged: bool, rng: torch.Generator) -> Tensor:
        """The absolute error of pictures (B, 3, H, W) as they come back, and the codebook's loss; ``judged``: with the
        critic's opinion of them, and the critic's own hinge loss. ``rng``: draws codes anew (``revive``)."""
        latents = self.vq.encode(pixels).latents
        if self.vq.training:
            self.revive(latents, rng)
        made = self.vq.decode(latents)
        error = (made.sample - pixels).abs().mean()
        loss = error + made.commit_loss.mean()
        if not judged:
            return loss
        critic = self.gan["critic"]
        fixed = {name: value.detach() for name, value in critic.named_parameters()}
        opinion = -functional_call(critic, fixed, (made.sample,)).mean()
        last = self.vq.decoder.conv_out.weight
        slopes = [torch.autograd.grad(one, last, retain_graph=True)[0].norm() for one in (error, opinion)]
        weight = (ADVERSARIAL * slopes[0] / (slopes[1] + 1e-6)).clamp(max=1e4).detach()
        hinge = F.relu(1 - critic(pixels)).mean() + F.relu(1 + critic(made.sample.detach())).mean()
        return loss + weight * opinion + 0.5 * hinge

    @torch.no_grad()
    def revive(self, latents: Tensor, rng: torch.Generator) -> None:
        """Draw codes that no latents (B, C, h, w) have been near for some steps anew, from these.

        Or else a few codes stand for everything, and the transformer has nothing to learn. The first step draws nearly
        all.
        """
        codes, rows = self.vq.quantize.embedding.weight, latents.movedim(1, -1).flatten(0, -2).float()
        near = torch.cdist(rows, codes.float()).argmin(1)
        self.vq.used.mul_(KEPT)[near] = 1.0
        dead = self.vq.used < DEAD
        chosen = torch.randint(len(rows), (int(dead.sum()),), generator=rng).to(rows.device)
        codes[dead] = rows[chosen].to(codes)
        self.vq.used[dead] = 1.0

    @torch.no_grad()
    def tokens(self, pixels: Tensor) -> Tensor:
        """The codes (B, h x w) of pictures (B, 3, H, W), row by row."""
        _, _, (_, _, found) = self.vq.quantize(self.vq.encode(pixels).latents)
        return found.view(len(pixels), -1)

    @torch.no_grad()
    def picture(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Pictures (B, 3, *size) in [-1, 1] of codes (B, h x w)."""
        shape = (len(tokens), size[0] // STRIDE, size[1] // STRIDE, CODE)
        codes = self.vq.quantize.get_codebook_entry(tokens.flatten(), shape)
        return self.vq.decode(codes, force_not_quantize=True).sample.clamp(-1, 1)

    def logits(self, hints: Tensor, tokens: Tensor) -> Tensor:
        """Scores (B, n + 1, codes) of the token after the label map, and after each of n tokens (B, n)."""
        writer: Any = self.writer["transformer"]
        labels = self.labels(hints)
        rows = torch.cat([labels, writer.transformer.wte(tokens)], 1)
        return writer(inputs_embeds=rows, use_cache=False).logits[:, labels.shape[1] - 1 :]

    def labels(self, hints: Tensor) -> Tensor:
        """The label map (B, channels, H, W) as the beginning of a sequence, (B, patches, width)."""
        return self.writer["labels"](hints).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def written(self, hints: Tensor, seeds: Sequence[int]) -> Tensor:
        """Codes (B, h x w) drawn one by one after label maps (B, channels, H, W), each row by its own seed."""
        writer: Any = self.writer["transformer"]
        drawn_from = [torch.Generator().manual_seed(seed) for seed in seeds]
        count = hints.shape[-2] * hints.shape[-1] // STRIDE**2
        step = writer(inputs_embeds=self.labels(hints), use_cache=True)
        tokens: list[Tensor] = []
        while True:
            scores, codes = step.logits[:, -1].float().topk(min(TOP, CODES))
            picks = [
                torch.multinomial(row.softmax(-1).cpu(), 1, generator=rng)
                for row, rng in zip(scores, drawn_from, strict=True)
            ]
            tokens.append(codes.gather(1, torch.stack(picks).to(codes.device)))
            if len(tokens) == count:
                return torch.cat(tokens, 1)
            step = writer(input_ids=tokens[-1], past_key_values=step.past_key_values, use_cache=True)

    def make(self, requests: Sequence[Request]) -> list[Picture]:
        """Pictures of tokens drawn by the requests' seeds; steps, guidance and prompts are not read."""
        made: list[Picture] = []
        for asked, alike in batches(self.base, requests):
            size = size_of(alike[0])
            if size != (self.base.size, self.base.size):
                raise Unsupported(
                    f"This transformer writes pictures of {self.base.size} pixels a side: leave out size."
                )
            hints = hints_of(self.base, asked, self.spec, size)
            tokens = self.written(hints, [request.seed for request in asked])
            shown = zip(asked, to_pictures(self.picture(tokens, size)), strict=True)
            made += [Picture(request, pixels) for request, pixels in shown]
        return made
