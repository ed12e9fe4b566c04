"""Networks of transformers: every name and shape of the public files, against a written listing."""

import hashlib
import math

import pytest
import torch
import transformers
from listed import KEYS, shape_of
from transformers.core_model_loading import revert_weight_conversion

from controlkit.annotators.networks import depth, detection, segmentation, vitpose

MODELS = {
    model.file.repository: model
    for models in (
        depth.ANYTHING_V2, depth.ANYTHING, depth.MIDAS, depth.ZOE, segmentation.ONEFORMER, segmentation.UPERNET,
        vitpose.VITPOSE, detection.RTDETR,
    )
    for model in models
}  # fmt: skip
BLIP = "Salesforce/blip-image-captioning-base"


def listings():
    """{repository: (class, (tensors, numbers, digest), {name: shape} of a few)}."""
    found, few = {}, {}
    for line in (KEYS / "transformers.txt").read_text().splitlines():
        if line.startswith("  "):
            name, shape = line.split()
            few[name] = shape_of(shape)
        elif not line.startswith("#"):
            repository, kind, tensors, numbers, digest = line.split()
            few = {}
            found[repository] = (kind, (int(tensors), int(numbers), digest), few)
    return found


LISTED = listings()


def shapes_in_a_file(kind, settings):
    """Names and shapes of a network's tensors as the library writes them into a file, without what nothing reads."""
    with torch.device("meta"):
        network = getattr(transformers, kind)(settings)
    state = revert_weight_conversion(network, network.state_dict())
    return {name: tuple(tensor.shape) for name, tensor in state.items() if ".swin.layernorm." not in name}


def summary(shapes):
    """How many tensors and numbers there are, and the digest of the sorted lines."""
    lines = sorted(f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in shapes.items())
    numbers = sum(math.prod(shape) for shape in shapes.values())
    return len(shapes), numbers, hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_every_network_of_the_library_is_listed():
    assert LISTED.keys() == {*MODELS, BLIP}


@pytest.mark.parametrize("repository", LISTED)
def test_names_and_shapes_are_the_public_file_s(repository):
    kind, whole, few = LISTED[repository]
    if "oneformer" in repository:
        pytest.importorskip("scipy")
    settings = transformers.BlipConfig() if repository == BLIP else MODELS[repository].settings()
    assert kind == "BlipForConditionalGeneration" or kind == MODELS[repository].kind
    shapes = shapes_in_a_file(kind, settings)
    assert {name: shapes.get(name) for name in few} == few
    assert summary(shapes) == whole
