"""Figure 12: controls on a base that somebody has tuned to a style, untouched.

The paper puts its ControlNets on Comic Diffusion and Protogen. Here the command tunes a copy of the base to a comic
style itself, for some minutes: few levels of colour and dark outlines, no word for it in the captions. The shipped
controls are then measured on the base as it was and on the tuned one; FID is to true pictures of each one's style.

    controlkit reproduce fig-transfer --out runs/fig-transfer

Cost: `--quick` 5.2 minutes of CPU time (one thread of an AMD EPYC, AVX2, beside other work), of which the tuning some
2.
Expected (32 scenes): obedience of canny 0.86 on the base and 0.74 on the tuned one (86%), of depth 0.96 and 0.87 (91%);
FID to comic pictures, without control, 32.0 before the tuning and 22.4 after it. The paper has pictures, no numbers.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from controlkit.backbones import Backbone
from controlkit.data import ScenePairs
from controlkit.errors import Invalid, one_line
from controlkit.files import inside, mark_output
from controlkit.formats import write_tensors
from controlkit.images import to_tensor
from controlkit.measure import Figure, fid
from controlkit.precision import autocast, training_attention
from controlkit.reproduce.conditions import HEAD, Bench, Conditions, Row, share_of, shipped
from controlkit.reproduce.entrants import Plan, Trial, pixels_of, write_report
from controlkit.seeds import numpy_rng, torch_rng
from controlkit.tensors import open_safetensors
from controlkit.train.optimizers import Optimizer

KINDS = ("canny", "depth")
BASE, TUNED = "base", "tuned"
ORDER = ("tuning", *(f"{where}, {kind}" for kind in KINDS for where in (BASE, TUNED)))
_LEVELS = 4
_STATE = "tuning.safetensors"
_EVERY = 25
"""Steps between checkpoints."""

__all__ = ["HEAD", "ORDER", "Tuning", "comic", "make_transfer", "tuned"]


@dataclass(frozen=True)
class Tuning:
    """The settings of the tuning: steps of AdamW at a rate that falls linearly to zero, on comic training scenes."""

    steps: int = 200
    batch: int = 8
    rate: float = 2e-4
    scenes: int = 256
    dropout: float = 0.1
    """The share of prompts replaced by the empty one."""


def comic(picture: np.ndarray) -> np.ndarray:
    """A picture, uint8 (H, W, 3), in a comic style: four levels of each colour, smooth, with dark outlines."""
    smooth = cv2.bilateralFilter(picture, 5, 60, 5)
    step = 255 / (_LEVELS - 1)
    flat = (np.round(smooth / step) * step).astype(np.uint8)
    lines = cv2.dilate(cv2.Canny(smooth, 60, 120), np.ones((2, 2), np.uint8))
    flat[lines > 0] = 16
    return flat


@dataclass(frozen=True)
class Transfer(Conditions):
    """The conditions; ``style``: FID of each base's pictures without control to true comic pictures; ``tuning``: the
    settings of the tuning, with its seconds and its last loss."""

    style: Mapping[str, Figure] | None = None
    tuning: Mapping[str, float] | None = None


def make_transfer(
    base: Backbone,
    plan: Plan,
    out: Path,
    on_row: Callable[[str], None] = lambda name: None,
    tuning: Tuning = Tuning(),
) -> Transfer:
    """Make the figure and write it into a folder: ``fig-transfer.json``, ``.md``, a ``.png`` of each kind of hints.

    ``on_row``: as with ``make_table2``. The tuned weights are kept in ``out``: run again, it goes on from there.
    ``Invalid`` where what is kept there cannot be read, or is of another base or tuning.
    """
    on_row("tuning")
    other, facts = tuned(base, tuning, out)
    rows: list[Row] = []
    sheets: dict[str, dict[str, Sequence[np.ndarray]]] = {}
    style: dict[str, Figure] = {}
    settings: dict[str, Any] = {}
    for kind in KINDS:
        trial = Trial.of(kind, base, plan)
        sheets[kind] = {"hint": trial.shown()}
        for name, one in ((BASE, trial), (TUNED, _in_style(trial, other))):
            on_row(f"{name}, {kind}")
            bench = Bench(one, shipped(one.base, kind))
            title = f"{kind} on {base.name}" if name == BASE else f"{kind} on {base.name}, tuned"
            rows.append(bench.row(f"{name}, {kind}", title, one.evaluation))
            free = pixels_of(bench.make, one.evaluation.requests("no_control"))
            sheets[kind] |= {f"{name}": bench.pictures(one.evaluation), f"{name}, no control": free}
            if bench.quality and kind == KINDS[0]:
                referee = bench.quality.referee
                style[name] = fid(referee.features(free), referee.features([comic(real) for real in trial.real]))
        settings = trial.facts()
    table = Transfer(rows, settings, "", finding=_finding(rows, style, facts), style=style, tuning=facts)
    return write_report(out, "fig-transfer", table, HEAD, sheets)


def _in_style(trial: Trial, other: Backbone) -> Trial:
    """The trial on the tuned base: the same hints and ceiling, and comic pictures for FID."""
    return Trial(other, trial.evaluation, [comic(real) for real in trial.real])


def tuned(base: Backbone, tuning: Tuning, folder: Path) -> tuple[Backbone, dict[str, float]]:
    """(a copy of the base that was tuned to the comic style, the settings with ``seconds`` and ``loss``).

    Weights and optimizer are kept in ``folder``, from which the tuning goes on; its draws are keyed by the step.
    """
    mark_output(folder, "reproduce fig-transfer")
    other = base.with_own_denoiser()
    learning = other.denoiser.train().requires_grad_(True)
    optimizer = Optimizer(learning)
    path = inside(folder, folder / _STATE)
    identity = {"base": base.digest, "tuning": repr(tuning)}
    at, seconds, loss = _restored(path, learning, optimizer, identity)
    material = _material(base, tuning) if at < tuning.steps else None
    while material and at < tuning.steps:
        began = time.perf_counter()
        drawn = _loss(other, material, tuning, at)
        drawn.backward()
        nn.utils.clip_grad_norm_(learning.parameters(), 1.0)
        optimizer.step(tuning.rate * (1 - at / tuning.steps))
        loss, at, seconds = drawn.item(), at + 1, seconds + time.perf_counter() - began
        if at % _EVERY == 0 or at == tuning.steps:
            held = {f"weights.{name}": value for name, value in learning.state_dict().items()}
            held |= {f"optimizer.{name}": value for name, value in optimizer.state().items()}
            write_tensors(path, held, {**identity, "step": str(at), "seconds": f"{seconds:.1f}", "loss": repr(loss)})
    learning.eval().requires_grad_(False)
    facts = {"steps": tuning.steps, "batch": tuning.batch, "rate": tuning.rate, "scenes": tuning.scenes}
    return other, facts | {"seconds": round(seconds, 1), "loss": round(loss, 4)}


def _restored(
    path: Path, learning: nn.Module, optimizer: Optimizer, identity: Mapping[str, str]
) -> tuple[int, float, float]:
    """(step, seconds, loss) of what is kept, put into the network and its optimizer; zeros where there is nothing."""
    if not path.is_file():
        return 0, 0.0, 0.0
    try:
        with open_safetensors(path) as file:
            facts = file.metadata() or {}
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if any(facts.get(key) != value for key, value in identity.items()):
            raise ValueError("it is of another base, or of other settings")
        parts = [
            {name.removeprefix(part): value for name, value in held.items() if name.startswith(part)}
            for part in ("weights.", "optimizer.")
        ]
        learning.load_state_dict(parts[0])
        optimizer.restore(parts[1])
        return int(facts["step"]), float(facts["seconds"]), float(facts["loss"])
    except (SafetensorError, OSError, KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise Invalid(f"{path} cannot be used ({one_line(error)}): delete it, and the tuning begins anew.") from error


def _material(base: Backbone, tuning: Tuning) -> tuple[Tensor, list[str]]:
    """Moments (N, 2C, h, w) of comic training scenes, and their prompts."""
    pairs = list(ScenePairs(base.size, tuning.scenes))
    with torch.no_grad(), autocast(base.device.type):
        pixels = to_tensor([comic(pair.picture) for pair in pairs])
        moments = torch.cat([base.encode_moments(part.to(base.device)).float() for part in pixels.split(32)])
    return moments, [pair.prompt for pair in pairs]


def _loss(other: Backbone, material: tuple[Tensor, list[str]], tuning: Tuning, step: int) -> Tensor:
    """The mean squared error of the prediction in a step, whose draws depend on its number alone."""
    moments, prompts = material
    rng, generator = numpy_rng("tuning", step), torch_rng("tuning", step)
    rows = rng.integers(len(moments), size=tuning.batch)
    told = ["" if rng.random() < tuning.dropout else prompts[row] for row in rows]
    shape, device = (tuning.batch, *other.latent_shape((other.size, other.size))), moments.device
    own, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    t = torch.randint(other.noise.count, (tuning.batch,), generator=generator).to(device)
    x = other.draw_latents(moments[torch.from_numpy(rows)], own)
    with torch.no_grad():
        text = other.encode_text(told)
    with autocast(device.type), training_attention(device.type):
        prediction = other.predict(other.noise.add(x, noise, t), t, text)
    return F.mse_loss(prediction.float(), other.noise.target(x, noise, t))


def _finding(rows: Sequence[Row], style: Mapping[str, Figure], facts: Mapping[str, float]) -> str:
    own = {row.name: row for row in rows}
    shares = ", ".join(f"{kind} {share_of(own[f'{TUNED}, {kind}'], own[f'{BASE}, {kind}'])}" for kind in KINDS)
    words = f"On the tuned base controls obey, as a share of that on their own: {shares}."
    if style:
        words += (
            f" FID to true comic pictures, without control: {style[BASE].mean:.1f} before the tuning, "
            f"{style[TUNED].mean:.1f} after it."
        )
    cost = f"{facts['steps']:.0f} steps of {facts['batch']:.0f} in {facts['seconds']:.0f} s"
    return f"{words} The tuning: {cost}."
