"""diffusers' own pipeline for a base and a control: the same requests from the same noise, on the same weights."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from controlkit.backbones import Backbone
from controlkit.backbones.stock import stock_decode, stock_pipeline
from controlkit.controls import KINDS
from controlkit.controls.union import TYPES
from controlkit.errors import Unsupported
from controlkit.formats import SavedControl
from controlkit.formats.networks import stock_network
from controlkit.sample import Request, hint_of, picture_size

LIMITS = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""The relative L2 distance between our latents and diffusers' that is expected at most, by the type of the weights.

Sums in another order differ in the last bits, and twenty steps with guidance multiply that. At toy size, and on
``mini``, float32 comes to 1e-6 to 1e-5 (``tests/backbones/test_peers.py``); large bases are given room."""


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The L2 norm of the difference of two tensors, over that of the second."""
    ours, theirs = ours.detach().float().cpu(), theirs.detach().float().cpu()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


class Peer:
    """The pipeline. Raises ``Unsupported`` where diffusers has none for this base and this kind of control."""

    def __init__(self, base: Any, control: SavedControl | None) -> None:
        self.base: Backbone = base
        self.control = control
        self._kind = control.branch.kind if control else ""
        network: Any = None
        if control:
            written = getattr(control.branch, "union", control.branch)  # of a Union's type, the Union
            network = stock_network(written, base, control.hint).to(base.device, base.dtype)
        try:
            self._pipeline = stock_pipeline(base, network)
        except KeyError:
            title = KINDS[self._kind].title if control else "base"
            raise Unsupported(f"diffusers has no pipeline for a {title} on a base of this family.") from None

    @property
    def guesses(self) -> bool:
        """Whether the pipeline has a guess mode."""
        return self._kind in ("controlnet", "union type")

    def latents(self, request: Request) -> Tensor:
        """The final latents (1, C, h, w) of a request with at most one control, whose hint is ready."""
        height, width = picture_size(self.base, request.size)
        noise = torch.randn(
            1, *self.base.latent_shape((height, width)), generator=torch.Generator().manual_seed(request.seed)
        )
        made: Tensor = self._pipeline(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            height=height,
            width=width,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            latents=noise.to(self.base.device, self.base.dtype),
            output_type="latent",
            **self._controls(request, (height, width)),
        ).images
        return made

    def _controls(self, request: Request, size: tuple[int, int]) -> dict[str, Any]:
        """The pipeline's arguments for the control; one that is not asked for has a scale of 0."""
        if self.control is None:
            return {}
        spec, asked = self.control.hint, request.controls[0] if request.controls else None
        empty = np.zeros((*size, spec.channels), np.uint8)
        hint = spec.tensor(hint_of(asked, spec, size) if asked else empty, size).to(self.base.device, self.base.dtype)
        scale = asked.scale if asked else 0.0
        if self._kind == "adapter":
            return {"image": hint, "adapter_conditioning_scale": scale}
        found = {"controlnet_conditioning_scale": scale, "guess_mode": asked.guess if asked else False}
        if self._kind == "union type":
            return found | {"control_image": [hint], "control_mode": [TYPES[str(self.control.branch.hint_type)]]}
        return found | {"image": hint}

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (1, 3, H, W) in [-1, 1] of latents, as the pipeline decodes them."""
        vae = self._pipeline.vae
        return stock_decode(self._pipeline, latents.to(vae.device, vae.dtype)).clamp(-1, 1)
