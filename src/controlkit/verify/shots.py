"""The pictures of the paper's figures in small: with a prompt and without, the four prompts of Figure 8, scales."""

from collections.abc import Sequence
from dataclasses import dataclass

from controlkit.data import Pair, hint_for_pair
from controlkit.images import HintSpec
from controlkit.sample import PLAIN_PROMPT, ControlRequest, Request

SCALES = (0.0, 0.5, 1.5)
"""Of a control, beside 1."""


@dataclass(frozen=True)
class Shot:
    """A picture to make: which pair's, in which role, and its request."""

    pair: int
    role: str
    """``no prompt``, ``guess mode``, ``insufficient``, ``conflicting``, ``perfect``, ``scale 0.5``, ``no control``."""
    request: Request

    @property
    def name(self) -> str:
        """Its name in a table of checks."""
        return f"picture {self.pair + 1}, {self.role}"

    @property
    def guesses(self) -> bool:
        """Whether it is made in guess mode, which not every pipeline has."""
        return any(one.guess for one in self.request.controls)


def shots_of(pairs: Sequence[Pair], count: int, spec: HintSpec | None, settings: Request) -> list[Shot]:
    """The shots of the first ``count`` pairs. ``settings``: steps, guidance and the first seed."""
    found = []
    for i, pair in enumerate(pairs[:count]):
        prompts = {
            "no prompt": "",
            "insufficient": PLAIN_PROMPT,
            "conflicting": pairs[(i + len(pairs) // 2) % len(pairs)].prompt,
            "perfect": pair.prompt,
        }
        own = settings.model_copy(update={"seed": settings.seed + i, "prompt": pair.prompt})
        if spec is None:
            found += [Shot(i, role, own.model_copy(update={"prompt": text})) for role, text in prompts.items()]
            continue
        control = ControlRequest(name="control", images=hint_for_pair(pair, spec), ready=True, hint_cfg_scale=1.0)
        under = own.model_copy(update={"controls": (control,)})
        found += [Shot(i, role, under.model_copy(update={"prompt": text})) for role, text in prompts.items()]
        guess = control.model_copy(update={"guess": True})
        found.append(Shot(i, "guess mode", under.model_copy(update={"prompt": "", "controls": (guess,)})))
        for scale in SCALES:
            scaled = control.model_copy(update={"scale": scale})
            found.append(Shot(i, f"scale {scale:g}", under.model_copy(update={"controls": (scaled,)})))
        found.append(Shot(i, "no control", own))
    return found
