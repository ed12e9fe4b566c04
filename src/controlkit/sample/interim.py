"""Stand-in for ``sample.maker``, in terms of today's loop: to be deleted when that one is there."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from controlkit.backbones import Backbone
from controlkit.formats import SavedControl
from controlkit.sample import Control, Job, SamplingSettings, generate
from controlkit.sample.request import Picture, Request


def maker(
    base: Backbone,
    loaded: Mapping[str, SavedControl] = {},
    on_step: Callable[[int], None] = lambda pictures: None,
    batch: int = 16,
) -> Callable[[Sequence[Request]], Iterator[Picture]]:
    def make(requests: Sequence[Request]) -> Iterator[Picture]:
        if not requests:
            return
        first = requests[0]
        controls = []
        for one in first.controls:
            saved = loaded[one.name]
            control = Control.of(saved, one.scale, one.guess, one.hint_cfg_scale)
            controls.append(control)
        settings = SamplingSettings(first.steps, first.guidance, first.size)
        jobs = [
            Job(r.prompt, r.seed, tuple(c.images[""] for c in r.controls), r.negative_prompt)  # type: ignore[misc]
            for r in requests
        ]
        made = generate(base, jobs, controls, settings, batch, on_step)
        yield from (Picture(r, p.pixels, p.latents) for r, p in zip(requests, made, strict=True))

    return make
