"""Networks placed on a device, or waiting in the machine's memory.

``cpu:0`` stands in for a GPU: it is another device than ``cpu``, where networks wait, and everything runs on it.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks import group_offloading
from torch import nn
from torch.overrides import TorchFunctionMode

from conftest import asked, draw_inputs, randomised
from controlkit.backbones import ActiveControl, load_base, placement
from controlkit.backbones.placement import HOME, MODES, Placement, parts_of_networks
from controlkit.branch import ControlSpec
from controlkit.controls import new_control, new_union
from controlkit.formats import SavedControl
from controlkit.images import HintSpec
from controlkit.sample import generate, pictures, prepare

GPU = torch.device("cpu:0")


@pytest.fixture
def base(toy_folder):
    """A base of one's own, as placing changes it."""
    return load_base(toy_folder)


@pytest.fixture
def there(monkeypatch):
    """The networks on the device, as they were sent: their ids."""
    found = set()
    real = placement.send

    def send(network, device):
        (found.discard if device == HOME else found.add)(id(network))
        real(network, device)

    monkeypatch.setattr(placement, "send", send)
    return found


def watched(modules, seen, there):
    """Note at each call of a layer which networks are there."""
    for module in modules:
        for layer in module.modules():
            if not list(layer.children()):
                layer.register_forward_pre_hook(lambda *given: seen.append(set(there)))


def ready(base, drawn_joins):
    """A request with one control, made ready."""
    saved = SavedControl(drawn_joins(new_control(base), base=base).eval(), HintSpec("canny"))
    request, loaded = asked([saved], [torch.zeros(32, 32, 3, dtype=torch.uint8).numpy()], steps=2)
    return prepare(base, [request], loaded), saved.branch


def test_each_part_is_on_the_device_while_it_works_and_alone(base, drawn_joins, there):
    prepared, control = ready(base, drawn_joins)
    parts = parts_of_networks(base.networks())
    parts["denoiser"] = [*parts["denoiser"], control]
    seen = {part: [] for part in parts}
    for part, networks in parts.items():
        watched(networks, seen[part], there)
    base.place("balanced", GPU)
    [picture] = pictures(generate(base, prepared))
    assert picture.pixels.shape == (32, 32, 3)
    for part, networks in parts.items():
        assert seen[part], f"{part} was used"
        assert all(one == {id(network) for network in networks} for one in seen[part]), part


def test_in_the_fast_mode_everything_is_there_from_the_start(base, drawn_joins, there):
    prepared, control = ready(base, drawn_joins)
    base.place("fast", GPU)
    everything = {id(network) for network in base.networks().values()}
    assert there == everything
    list(generate(base, prepared))
    assert there == everything | {id(control)}


def test_on_a_cpu_nothing_is_moved(base, drawn_joins, there):
    prepared, _ = ready(base, drawn_joins)
    for mode in MODES:
        base.place(mode)
        list(generate(base, prepared))
    assert not there and not base.placement.moves


def test_a_mode_makes_the_same_picture(base, drawn_joins):
    prepared, _ = ready(base, drawn_joins)
    made = []
    for mode in (None, *MODES):  # each with less memory than the one before
        if mode:
            base.place(mode, GPU)
        made += pictures(generate(base, prepared))
    assert base.placement.mode == "low"
    assert all((one.pixels == made[0].pixels).all() and one.latents.equal(made[0].latents) for one in made)


class OnlyThere(TorchFunctionMode):
    """Refuses to compute with weights that are not on the device."""

    def __init__(self, there):
        super().__init__()
        self.there, self.used = there, set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") == "torch.nn.functional" or func in (F.conv2d, F.linear, torch.matmul):
            weights = [one for one in (*args, *(kwargs or {}).values()) if isinstance(one, nn.Parameter)]
            assert all(id(one) in self.there for one in weights), f"{func.__name__} has weights that wait elsewhere"
            self.used |= {id(one) for one in weights}
        return func(*args, **(kwargs or {}))


@pytest.fixture
def layers_there(monkeypatch):
    """(the weights on the device: their ids; how many layers were there at most at once; how often one came)."""
    there, counts = set(), {"now": 0, "most": 0, "comings": 0}
    group = group_offloading.ModuleGroup
    real = {name: getattr(group, name) for name in ("onload_", "offload_")}

    def weights(self):
        return {id(value) for module in self.modules for value in module.parameters()} | set(map(id, self.parameters))

    def onload(self):
        there.update(weights(self))
        counts["now"] += 1
        counts["comings"] += 1
        counts["most"] = max(counts["most"], counts["now"])
        real["onload_"](self)

    def offload(self):
        counts["now"] -= bool(weights(self) & there)
        there.difference_update(weights(self))
        real["offload_"](self)

    monkeypatch.setattr(group, "onload_", onload)
    monkeypatch.setattr(group, "offload_", offload)
    return there, counts


def new_of(kind, base):
    """A control of a kind, drawn at random."""
    if kind == "union":
        return randomised(new_union(base))
    torch.manual_seed(0)
    control = new_control(base, ControlSpec(kind, rank=2 if kind == "lora" else 0)).eval()
    for value in control.parameters():
        value.copy_(torch.randn(value.shape) / max(value[0].numel(), 1) ** 0.5)
    return control


@torch.no_grad()
@pytest.mark.parametrize("kind", ["copy", "conv", "lora", "xs", "adapter", "union"])
def test_layers_come_one_by_one_and_compute_the_same(kind, base, layers_there):
    there, counts = layers_there
    control = new_of(kind, base)
    x, t, text, hint = draw_inputs(base)
    hints = {"canny": hint} if control.hint_types else hint

    def predict():
        return base.predict(x, t, text, [ActiveControl(control, control.encode_hint(hints))])

    expected = predict()
    base.place("low", GPU)
    base.placement.adopt([control])
    base.bring("denoiser")
    networks = (base.unet, control)
    layers = [layer for one in networks for layer in one.modules() if type(layer) in placement._LAYERS]
    moved = {id(value) for layer in layers for value in layer.parameters()}
    there |= {id(value) for one in networks for value in one.parameters()} - moved  # these stay
    with OnlyThere(there) as only:
        found = predict()
    assert found.equal(expected)
    assert counts["most"] == 1 and counts["now"] == 0, "one layer at a time"
    assert counts["comings"] > 0.9 * len(layers) and len(only.used & moved) > 0.9 * len(moved)


@pytest.mark.parametrize("kind", ["copy", "conv", "lora", "xs", "adapter", "union"])
def test_weights_of_no_layer_are_on_the_device_from_the_start(kind, base, monkeypatch):
    with torch.no_grad():
        control = new_of(kind, base)
    taken, sent = [], set()
    monkeypatch.setattr(placement, "_send_value", lambda value, device: sent.add(id(value)))
    monkeypatch.setattr("diffusers.hooks.apply_group_offloading", lambda layer, **places: taken.append(layer))
    placement.send_layer_by_layer(control, GPU)
    moved = {id(value) for layer in taken for value in layer.parameters()}
    for name, value in control.named_parameters():
        assert (id(value) in sent) != (id(value) in moved), name
    if kind == "union":  # their weights are used without calling them
        assert {id(control.task_embedding), id(control.transformer_layes[0].attn.out_proj.weight)} <= sent
    large = sum(value.numel() for value in control.parameters() if id(value) in moved)
    assert kind in ("lora", "union") or large == sum(value.numel() for value in control.parameters())


def test_a_mode_is_only_left_for_one_with_less_memory(base):
    taken = Placement(base.networks(), GPU)
    taken.take("balanced")
    taken.take("fast")
    assert taken.mode == "balanced"
    assert taken.take_lower() == "low" and taken.take_lower() is None and taken.mode == "low"


def test_the_vae_works_in_parts_as_the_mode_says(base):
    vae = copy.deepcopy(base.vae)
    assert not vae.use_slicing and not vae.use_tiling
    placement.work_in_parts(vae, "fast")
    assert not vae.use_tiling
    vae.tile_sample_min_size, vae.tile_latent_min_size = 1024, 128
    placement.work_in_parts(vae, "balanced")
    assert vae.use_slicing and vae.use_tiling and vae.tile_sample_min_size == 1024
    placement.work_in_parts(vae, "low")
    assert (vae.tile_sample_min_size, vae.tile_latent_min_size) == (512, 64)


def test_controls_are_exchanged(base, there):
    first, second = (new_control(base) for _ in range(2))
    base.place("balanced", GPU)
    base.bring("denoiser")
    base.placement.adopt([first])
    assert there == {id(base.unet), id(first)}
    base.placement.adopt([second])
    base.bring("vae")
    base.bring("denoiser")
    assert {id(base.unet), id(second)} <= there
