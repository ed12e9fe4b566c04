"""The table of the paper's opponents: one row each says what it is, where it comes from, and how it is trained."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from controlkit.annotators import contract
from controlkit.backbones import Backbone
from controlkit.baselines.beside import DepthToImage, LatentDiffusion
from controlkit.baselines.controlled import Adapter, Controlled, NoControl
from controlkit.baselines.piti import Piti
from controlkit.baselines.seam import Baseline
from controlkit.baselines.sketch import SketchGuided
from controlkit.baselines.taming import Taming
from controlkit.branch import ControlSpec
from controlkit.errors import Invalid, nearest
from controlkit.images import HintSpec


@dataclass(frozen=True)
class Opponent:
    """A row: an opponent of the paper's, at the size of any base."""

    name: str
    title: str
    """Its name in the paper's tables."""
    words: str
    """A sentence on what it is here."""
    source: str
    """The publication."""
    build: Callable[[Backbone, HintSpec], Baseline]
    hint: str = "seg"
    """The kind of hints that it is compared on."""
    rates: tuple[float, float, float] = (1e-3, 2.5e-3, 6e-3)
    """Learning rates of Muon to choose from, lowest first."""
    pflop: float = 0.12
    """Operations of its training, in 1e15: equal for those that stand on the base. Those from nothing have three times
    as many, for a base's own training counts too; so has the depth model, which the paper compares as the larger."""
    batch: int = 16
    strengths: tuple[float, ...] = ()
    """Strengths of guidance to choose from, where that leads away from no hint; none where it is the request's, which
    leads away from no prompt."""

    @property
    def learns(self) -> bool:
        """Whether there is anything to train."""
        return self.build is not NoControl

    @property
    def folder(self) -> str:
        """The name of its folder among others': its own, with the kind of hints where that is not its own."""
        return self.name if self.hint == OPPONENTS[self.name].hint else f"{self.name}-{self.hint}"

    def new(self, base: Backbone, hint: str = "", seed: int = 0) -> Baseline:
        """A fresh one for hints of a kind, with weights drawn by ``seed``; raises where a base cannot have it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build(base, contract(hint or self.hint)).eval().requires_grad_(False)


_MORE = 0.36
_BY_HINT = (1.0, 1.5, 2.0, 3.0, 4.0)
_PAPER = "Zhang, Rao and Agrawala, ICCV 2023"


def _control(
    name: str, title: str, words: str, source: str, control: ControlSpec, kind: type[Controlled] = Controlled
) -> Opponent:
    return Opponent(name, title, words, source, partial(kind, control=control))


OPPONENTS = {
    row.name: row
    for row in (
        Opponent(
            "no-control",
            "Stable Diffusion",
            "The base without control.",
            "Rombach et al., CVPR 2022",
            NoControl,
        ),
        Opponent(
            "ldm-scratch",
            "LDM (seg)",
            "A denoiser of the base's shape from nothing, which reads the label map beside the latents, and no prompt.",
            "Rombach et al., CVPR 2022, Section 4.3.1",
            LatentDiffusion,
            pflop=_MORE,
            strengths=_BY_HINT,
        ),
        Opponent(
            "taming",
            "VQGAN (seg)",
            "A VQGAN and a transformer that writes its tokens one by one after those of the label map; no prompt.",
            "Esser, Rombach and Ommer, CVPR 2021",
            Taming,
            pflop=_MORE,
            rates=(3e-4, 1e-3, 3e-3),
        ),
        Opponent(
            "piti",
            "PITI (seg)",
            "The base told by an encoder of the label map in the place of its text, then tuned with it.",
            "Wang et al., 2022, arXiv 2205.12952",
            Piti,
            strengths=_BY_HINT,
        ),
        Opponent(
            "sketch-guided",
            "Sketch-Guided Diffusion",
            "The base, led by the gradient of how far the edges that a small network reads off its features are from "
            "the hint; its strength is 1.6 times the control's scale.",
            "Voynov, Aberman and Cohen-Or, 2022, arXiv 2211.13752",
            SketchGuided,
            hint="canny",
        ),
        Opponent(
            "depth2img",
            "SD 2 depth-to-image",
            "The whole base tuned, with depth as one more channel beside the latents.",
            "Stability AI, 2022, stable-diffusion-2-depth",
            DepthToImage,
            hint="depth",
            pflop=_MORE,
        ),
        _control(
            "lite",
            "ControlNet-lite",
            "The paper's ablation: each block of the copy is one convolution.",
            f"{_PAPER}, Figure 8c",
            ControlSpec(body="conv"),
        ),
        _control(
            "gaussian",
            "ControlNet without zero convolutions",
            "The paper's ablation: joins that begin with Gaussian weights.",
            f"{_PAPER}, Figure 8b",
            ControlSpec(join="gaussian"),
        ),
        _control(
            "controlnet", "ControlNet", "The paper's trainable copy with zero convolutions.", _PAPER, ControlSpec()
        ),
        _control(
            "t2i-adapter",
            "T2I-Adapter",
            "A small network that reads the hint alone and adds inside the base's encoder.",
            "Mou et al., 2023, arXiv 2302.08453",
            ControlSpec(body="adapter"),
            Adapter,
        ),
    )
}
"""By name."""


def opponent(name: str) -> Opponent:
    """The row of a name; ``Invalid`` where there is none."""
    if name not in OPPONENTS:
        raise Invalid(f'"{name}" is no opponent: {nearest(name, list(OPPONENTS))}')
    return OPPONENTS[name]
