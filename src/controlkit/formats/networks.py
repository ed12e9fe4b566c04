"""Networks as tensors and configurations of diffusers, and back: one row a kind of control.

A row says how the weights of a kind are written under diffusers' names, and how a network is built on a file's tensors
for a base. A body that no diffusers class has (ControlNet-lite, a base that is no U-Net) is written under our own
names, without a configuration.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from controlkit.backbones import Backbone, UNetEncoder
from controlkit.branch import ControlBranch, ControlNetwork, ControlSpec, HintEncoder
from controlkit.controls import KINDS, Adapter, UnionBranch, XSBranch
from controlkit.controls.adapter import feature_strides
from controlkit.controls.union import UnionShape, time_width
from controlkit.controls.xs import shape_of, xs_network
from controlkit.errors import Mismatch, Unsupported
from controlkit.formats.names import key_table
from controlkit.formats.weights import Weights
from controlkit.images import HintSpec

Written = tuple[dict[str, Tensor], dict[str, Any]]
"""(tensors by diffusers' names, the configuration of diffusers' class; empty where there is none)."""


def stored_spec(spec: ControlSpec) -> ControlSpec:
    """The spec of what is written: a body trained in low ranks is the copy that it amounts to."""
    return replace(spec, body="copy", rank=0) if spec.body == "lora" else spec


def network_weights(
    network: ControlNetwork, base: Backbone, hint: HintSpec
) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """(kind, tensors, configuration) of a network, to be written; ``Unsupported`` where its kind has no file."""
    if network.kind not in FILES:
        raise Unsupported(f"A {KINDS[network.kind].title} has no file of its own: write its parts.")
    tensors, config = FILES[network.kind].write(network, base, hint)
    return network.kind, {key: value.detach().cpu() for key, value in tensors.items()}, config


def stock_network(network: ControlNetwork, base: Backbone, hint: HintSpec) -> nn.Module:
    """A network as diffusers' own class has it; on a CPU its weights are the network's, not copies.

    Raises ``Unsupported`` where diffusers has none that computes the same.
    """
    kind, tensors, config = network_weights(network, base, hint)
    title = KINDS[kind].title
    if not config:
        raise Unsupported(f"diffusers has no network like this {title}.")
    if kind == "xs":
        raise Unsupported(f"diffusers runs a {title} on a copy of the base, whose norms have another epsilon.")
    with torch.device("meta"):
        own: nn.Module = KINDS[kind].network_class()(**config)
    own.load_state_dict(tensors, assign=True)
    return own.eval().requires_grad_(False)


def read_network(name: str | Path, weights: Weights, base: Backbone, spec: ControlSpec) -> ControlNetwork:
    """The network of a file's weights, for a base, in float32; ``name`` is the control's in messages.

    Raises ``Mismatch`` if it does not fit the base, ``Unsupported`` if the base has no place for a network of its kind.
    """
    return FILES[weights.kind].read(name, weights, base, spec)


# --- copies of the base's encoder, and bodies of our own --------------------------------------------------------


def _absent_joins(branch: ControlBranch) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the joins that diffusers has and this branch leaves out."""
    absent: dict[str, tuple[int, ...]] = {}
    for i, tap in enumerate(tap for tap in branch.taps if tap.site == "skip"):
        if tap.name not in branch.joins:
            absent[f"controlnet_down_blocks.{i}.weight"] = (tap.channels, tap.channels, 1, 1)
            absent[f"controlnet_down_blocks.{i}.bias"] = (tap.channels,)
    return absent


def _diffusers_config(own: Mapping[str, Any], branch: ControlBranch, hint: HintSpec) -> dict[str, Any]:
    """The configuration of a ``ControlNetModel`` with this branch's shapes, for a base of the configuration ``own``."""
    settings = inspect.signature(KINDS[branch.kind].network_class().__init__).parameters
    theirs = {name: own[name] for name in settings if name in own}
    convs = branch.hint_encoder.convs
    widths = [convs[0].out_channels] + [conv.out_channels for conv in convs[2:-1:2]]
    theirs |= {"conditioning_channels": convs[0].in_channels, "conditioning_embedding_out_channels": widths}
    theirs |= {"controlnet_conditioning_channel_order": hint.colour_order.lower()}
    return theirs | {"global_pool_conditions": branch.pools}


def _write_branch(network: ControlNetwork, base: Backbone, hint: HintSpec) -> Written:
    """Joins that ``taps: mid`` leaves out are written as zeros, which act the same."""
    branch = cast("ControlBranch", network)
    table = key_table(branch)
    tensors = {table[key]: value for key, value in branch.weights().items()}
    if stored_spec(branch.spec).body != "copy" or base.network_config is None:
        return tensors, {}
    tensors |= {key: torch.zeros(shape) for key, shape in _absent_joins(branch).items()}
    return tensors, _diffusers_config(base.network_config, branch, hint)


def _write_union(network: ControlNetwork, base: Backbone, hint: HintSpec) -> Written:
    union = cast("UnionBranch", network)
    tensors, config = _write_branch(union, base, hint)
    shape = union.shape
    config |= {"num_control_type": shape.types, "num_trans_channel": shape.width, "num_trans_layer": shape.layers}
    config |= {"num_proj_channel": union.taps[0].channels, "num_trans_head": shape.heads}
    return tensors, config | {"addition_time_embed_dim": shape.code_width}


def _read_branch(name: str | Path, weights: Weights, base: Backbone, spec: ControlSpec) -> ControlNetwork:
    tensors = _copied(weights)
    channels, stride = _hint_shape(tensors, base)
    with torch.device("meta"):
        body = _body(weights, base) if spec.body == "copy" else base.conv_body()
        branch = ControlBranch(base.branch_taps, body, stride, channels, spec)
    return _filled(name, branch, tensors, base)


def _read_union(name: str | Path, weights: Weights, base: Backbone, spec: ControlSpec) -> ControlNetwork:
    tensors, config = _copied(weights), weights.config
    channels, stride = _hint_shape(tensors, base)
    types, width = tensors["task_embedding"].shape
    sizes = {"types": types, "heads": config["num_trans_head"], "layers": config["num_trans_layer"]}
    with torch.device("meta"):
        body = _body(weights, base)
        shape = UnionShape(width, config["addition_time_embed_dim"], time_width(body, base.name), **sizes)
        union = UnionBranch(base.branch_taps, body, stride, shape, channels, ControlSpec(pool=spec.pool))
    return _filled(name, union, tensors, base)


def _hint_shape(tensors: Mapping[str, Tensor], base: Backbone) -> tuple[int, int]:
    """(channels, pixels a place) of what the hint encoder in these tensors reads on this base."""
    channels = tensors["controlnet_cond_embedding.conv_in.weight"].shape[1]
    return channels, base.hint_shape(channels)[1]


def _copied(weights: Weights) -> dict[str, Tensor]:
    """The tensors in float32, as copies: a mapped file's are not aligned, which changes rounding."""
    return {key: tensor.to(torch.float32, copy=True) for key, tensor in weights.tensors.items()}


def _filled(name: str | Path, branch: ControlBranch, tensors: Mapping[str, Tensor], base: Backbone) -> ControlBranch:
    """The branch on these tensors; ``Mismatch`` if they are not all and only its own, in its shapes."""
    table, fault = key_table(branch), ""
    missing = [theirs for theirs in table.values() if theirs not in tensors]
    strange = sorted(tensors.keys() - set(table.values()) - _absent_joins(branch).keys())
    state = {ours: tensors[theirs] for ours, theirs in table.items() if theirs in tensors}
    expected = {key: value.shape for key, value in branch.state_dict().items()}
    misshapen = [key for key in state if state[key].shape != expected[key]]
    if missing:
        fault = f"it lacks {len(missing)} of the {len(table)} tensors this base's branch has, first {missing[0]}"
    elif strange:
        fault = f"its branch has no place for {len(strange)} of the file's tensors, first {strange[0]}"
    elif misshapen:
        came, wanted = (tuple(shape) for shape in (state[misshapen[0]].shape, expected[misshapen[0]]))
        fault = f"{table[misshapen[0]]} is {came} in the file, expected {wanted}"
    if fault:
        raise Mismatch(f'The control "{name}" does not fit the base "{base.name}": {fault}.')
    branch.load_state_dict(state, assign=True)
    return branch


def _body(weights: Weights, base: Backbone) -> nn.Module:
    """The body of the file's network, on the meta device: the base's encoder, or a slimmer one with the same taps."""
    copied = base.empty_encoder()
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    is_whole = all(shapes.get(name) == tensor.shape for name, tensor in copied.state_dict().items())
    if is_whole or not weights.config:  # without one: a body that no diffusers class has
        return copied
    network = KINDS[weights.kind].network_class()(**weights.config)
    features = [network.conv_in.out_channels]
    for block in network.down_blocks:
        features += [resnet.out_channels for resnet in block.resnets]
        features += [features[-1]] if block.downsamplers is not None else []
    if [*features, features[-1]] != [tap.channels for tap in base.branch_taps]:
        return copied  # of another base altogether: the error then names the first tensor that does not fit
    return UNetEncoder(network)


# --- other networks ---------------------------------------------------------------------------------------------


def _write_walker(network: ControlNetwork, base: Backbone, hint: HintSpec) -> Written:
    walker = cast("XSBranch", network)
    order = {"conditioning_channel_order": hint.colour_order.lower()}
    return walker.network.state_dict(), walker.config | order


def _read_walker(name: str | Path, weights: Weights, base: Backbone, spec: ControlSpec) -> ControlNetwork:
    own = base.network_config
    if own is None:
        raise Unsupported(f'The ControlNet-XS "{name}" walks beside a U-Net; "{base.name}" is none.')
    wanted = {"base_block_out_channels": list(own["block_out_channels"]), **shape_of(own)}
    wanted["conditioning_embedding_out_channels"] = HintEncoder.widths(base.stride)
    for key, value in wanted.items():
        if weights.config[key] != value:
            raise Mismatch(
                f'The ControlNet-XS "{name}" does not fit the base "{base.name}": its {key} is {weights.config[key]}, '
                f"expected {value}."
            )
    with torch.device("meta"):
        network = xs_network(weights.config)
    network.load_state_dict(_copied(weights), assign=True)
    return XSBranch(network, base.branch_taps)


def _write_adapter(network: ControlNetwork, base: Backbone, hint: HintSpec) -> Written:
    adapter = cast("Adapter", network).network
    return adapter.state_dict(), {key: value for key, value in adapter.config.items() if key[0] != "_"}


def _read_adapter(name: str | Path, weights: Weights, base: Backbone, spec: ControlSpec) -> ControlNetwork:
    with torch.device("meta"):
        network: nn.Module = KINDS[weights.kind].network_class()(**weights.config)
    network.load_state_dict(_copied(weights), assign=True)
    adapter = Adapter(network, base.taps)
    kind = weights.config["adapter_type"]
    channels = list(weights.config["channels"])
    channels = channels + channels[-1:] if kind == "light_adapter" else channels
    wanted = [tap.channels for tap in adapter.taps]
    strides = feature_strides(kind, weights.config["downscale_factor"], len(channels))
    taken = [tap.stride for tap in adapter.taps]
    if (channels, strides) != (wanted, taken):
        raise Mismatch(
            f'The T2I-Adapter "{name}" does not fit the base "{base.name}": its features have {channels} channels, at '
            f"1/{strides} of the picture; the base takes {wanted}, at 1/{taken}."
        )
    return adapter


@dataclass(frozen=True)
class NetworkFile:
    """The two functions for files of one kind: one writes a network, one reads it for a base."""

    write: Callable[[ControlNetwork, Backbone, HintSpec], Written]
    read: Callable[[str | Path, Weights, Backbone, ControlSpec], ControlNetwork]


FILES = {
    "controlnet": NetworkFile(_write_branch, _read_branch),
    "union": NetworkFile(_write_union, _read_union),
    "xs": NetworkFile(_write_walker, _read_walker),
    "adapter": NetworkFile(_write_adapter, _read_adapter),
}
"""``ControlNetwork.kind`` -> its files."""
