"""What the tests of opponents share: a few scenes to learn from, and requests with their hints."""

import pytest

from controlkit.annotators import contract
from controlkit.baselines import Material, opponent
from controlkit.data import ScenePairs, build_cache
from controlkit.sample import ControlRequest, Request


@pytest.fixture(scope="session")
def material_for(toy_base, tmp_path_factory):
    """``material_for(kind)``: eight scenes with hints of a kind, for steps of two."""
    made = {}

    def make(kind):
        if kind not in made:
            pairs, spec = ScenePairs(toy_base.size, 10, count=8), contract(kind)
            [cached] = build_cache(toy_base, pairs, {"": spec}, tmp_path_factory.mktemp("pairs") / "pairs.safetensors")
            made[kind] = Material(toy_base, spec, pairs, cached, 2)
        return made[kind]

    return make


@pytest.fixture(scope="session")
def fresh(toy_base):
    """``fresh(name)``: an untrained opponent on the toy base, made anew each time."""
    return lambda name: opponent(name).new(toy_base)


@pytest.fixture(scope="session")
def requests_of(material_for):
    """``requests_of(kind, steps)``: two requests, each with a scene's hint; settings of the control by name."""

    def make(kind, steps=2, guidance=4.0, **control):
        material = material_for(kind)
        hints = [material.cached.hints[i].numpy() for i in range(2)]
        return [
            Request(
                prompt=material.pairs[i].prompt,
                seed=i,
                steps=steps,
                guidance=guidance,
                controls=(ControlRequest(name=kind, images=hint, ready=True, **control),),
            )
            for i, hint in enumerate(hints)
        ]

    return make
