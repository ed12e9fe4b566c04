"""The checks of a verification: what was measured, what was expected, and whether that is so."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from controlkit.backbones import Backbone
from controlkit.errors import Unsupported, one_line
from controlkit.measure import FOUND, EvaluationPlan, ceiling_of, evaluate, meaningless, psnr
from controlkit.measure.obedience import obedience_in
from controlkit.sample import Maker, Picture
from controlkit.verify.peer import LIMITS, Peer, relative
from controlkit.verify.shots import Shot

State = Literal["passed", "failed", "not measured"]
ACTS = 0.01
"""How far, in relative L2, latents under a control lie from those without it, at least."""
SHARP = 20.0
"""The PSNR in dB of photographs out of a VAE that works, at least: those of Stable Diffusion have 25 and more."""
_PATH = re.compile(r"(?<![\w:/.~-])(?:~|[A-Za-z]:)?[\\/](?:[^\s\"'\\/]+[\\/])+([^\s\"'\\/]*)")


@dataclass(frozen=True)
class Check:
    """A check: its name, what came of it, what was measured, and what was expected."""

    name: str
    state: State
    measured: str
    expected: str

    @classmethod
    def of(cls, name: str, is_so: bool, measured: str, expected: str) -> "Check":
        """A check that was made."""
        return cls(name, "passed" if is_so else "failed", measured, expected)


def without_paths(text: object) -> str:
    """Words without the folders of this machine's paths in them: a report is given to others."""
    return _PATH.sub(lambda found: found[1] or "a folder", one_line(text))


@dataclass
class Compared:
    """A shot as it was made here: its picture, and its latents' distance from diffusers' (None: there are none)."""

    shot: Shot
    picture: Picture | None
    distance: float | None = None
    note: str = ""

    @property
    def pixels(self) -> np.ndarray | None:
        """The picture, uint8 (H, W, 3)."""
        return self.picture.pixels if self.picture else None

    @property
    def latents(self) -> Tensor:
        """The final latents (C, h, w)."""
        assert self.picture is not None and self.picture.latents is not None
        return self.picture.latents


@dataclass
class Comparison:
    """A base, a maker on it and diffusers' pipeline: makes shots, and checks of them."""

    base: Backbone
    make: Maker
    peer: Peer | None
    why_no_peer: str = ""
    compared: list[Compared] = field(default_factory=list)

    @property
    def limit(self) -> float:
        """The distance from diffusers that is expected at most."""
        return LIMITS.get(self.base.dtype, LIMITS[torch.bfloat16])

    def compare(self, shot: Shot) -> Check:
        """Make a shot here and by diffusers, and compare the latents."""
        name, expected = f"{shot.name}: latents are diffusers'", f"relative L2 at most {self.limit:g}"
        try:
            [picture] = self.make([shot.request])
        except (ValueError, RuntimeError) as error:  # a UserError, or what a library finds, as in ``guarded``
            self.compared.append(Compared(shot, None, note=without_paths(error)))
            return Check(name, "failed", without_paths(error), expected)
        self.compared.append(done := Compared(shot, picture))
        if self.peer is None or (shot.guesses and not self.peer.guesses):
            done.note = self.why_no_peer or "diffusers' pipeline has no guess mode for such controls"
            return Check(name, "not measured", done.note, expected)
        try:
            theirs = self.peer.latents(shot.request)
        except Exception as error:  # whatever diffusers raises is a finding
            done.note = f"diffusers: {without_paths(error)}"
            return Check(name, "failed", done.note, expected)
        done.distance = relative(done.latents[None], theirs)
        return Check.of(name, done.distance <= self.limit, f"{done.distance:.1e}", expected)

    def made(self, role: str) -> Compared | None:
        """The first shot of a role that was made."""
        return next((one for one in self.compared if one.shot.role == role and one.picture), None)

    def decoded(self) -> Check:
        """Compare the decoding of the same latents."""
        name, expected = "the VAE decodes as diffusers' pipeline does", f"relative L2 at most {self.limit:g}"
        one = next((one for one in self.compared if one.picture), None)
        if self.peer is None or one is None:
            return Check(name, "not measured", self.why_no_peer or "no picture was made", expected)
        with torch.no_grad(), self.base.inference():
            ours = self.base.decode_latents(one.latents[None].to(self.base.device))
        distance = relative(ours, self.peer.decode(one.latents[None]))
        return Check.of(name, distance <= self.limit, f"{distance:.1e}", expected)

    def again(self) -> Check:
        """Make the first shot once more."""
        is_exact = self.base.device.type == "cpu"
        expected = "equal to the bit" if is_exact else f"relative L2 at most {self.limit:g}"
        one = next((one for one in self.compared if one.picture), None)
        if one is None:
            return Check("the same request gives the same picture", "not measured", "no picture was made", expected)
        [second] = self.make([one.shot.request])
        assert second.latents is not None
        distance = relative(second.latents, one.latents)
        is_so = bool(torch.equal(second.latents, one.latents)) if is_exact else distance <= self.limit
        return Check.of("the same request gives the same picture", is_so, f"{distance:.1e}", expected)

    def silent(self) -> Check:
        """A control's scale of 0 is no control."""
        expected = f"relative L2 at most {self.limit / 10:g}"
        zero, plain = self.made("scale 0"), self.made("no control")
        if zero is None or plain is None:
            return Check("a scale of 0 is no control", "not measured", "no pictures were made", expected)
        distance = relative(zero.latents, plain.latents)
        return Check.of("a scale of 0 is no control", distance <= self.limit / 10, f"{distance:.1e}", expected)

    def acts(self) -> Check:
        """A control changes the picture, else all comparisons of it would say nothing."""
        expected = f"relative L2 to no control at least {ACTS:g}"
        full, plain = self.made("perfect"), self.made("no control")
        if full is None or plain is None:
            return Check("the control acts", "not measured", "no pictures were made", expected)
        distance = relative(full.latents, plain.latents)
        return Check.of("the control acts", distance >= ACTS, f"{distance:.2g}", expected)

    def reconstructs(self, pictures: Sequence[np.ndarray]) -> Check:
        """The VAE gives pictures back."""
        back = ceiling_of(self.base)(pictures)
        mean = float(np.mean([psnr(made, truth) for made, truth in zip(back, pictures, strict=True)]))
        name = f"the VAE gives {len(pictures)} pictures back"
        return Check.of(name, mean >= SHARP, f"PSNR {mean:.1f} dB", f"at least {SHARP:g} dB")


def measure_obedience(make: Maker, plan: EvaluationPlan, base: Backbone) -> tuple[Check, dict[str, Any]]:
    """The check that a control is obeyed, and ``evaluate``'s report, with floor and ceiling."""
    report = evaluate(make, plan, ceiling_of(base))
    measured, expected = obedience_in(report), f"the lower bound at least {FOUND}"
    name = f"the control is obeyed ({report['metric']}, {report['num']} pictures)"
    figures = f"obedience {measured.obedience}: fidelity {measured.fidelity} between {measured.floor} (floor)"
    figures += f" and {measured.ceiling} (ceiling)"
    if reason := meaningless(measured):
        return Check(name, "not measured", reason, expected), report
    return Check.of(name, measured.obedience.low >= FOUND, figures, expected), report


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check whose own errors fail it; what cannot be done here is not measured."""
    try:
        return check()
    except Unsupported as error:
        return Check(name, "not measured", without_paths(error), "that it can be measured")
    except (ValueError, RuntimeError) as error:
        return Check(name, "failed", without_paths(error), "no error")
