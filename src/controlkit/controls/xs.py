"""ControlNet-XS: a thin encoder that walks beside the base's, layer by layer (Zavadski et al., ECCV 2024, type B).

On diffusers' own ``ControlNetXSAdapter``. At each place the thin encoder's layer reads the base's feature before it and
its own feature is added to the base's after it, and once more in the decoder, where that place's skip arrives. All
additions go through zero convolutions.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from controlkit.backbones import Backbone
from controlkit.backbones.protocol import Layer, Stage
from controlkit.backbones.unet import run_layer, run_plain
from controlkit.branch import ControlNetwork, ControlSpec, HintEncoder, Tap
from controlkit.errors import Invalid, Unsupported

SLIM = 32
"""Channels at the finest level by default: a tenth of Stable Diffusion's, as the paper and diffusers have it."""
MOST = 0.5
"""The largest share of a small base's channels, by default."""
_LATENTS, _LAYERS = 4, 2
"""Channels of the latents, and layers a level, that diffusers' class is made for."""

# --- its network ------------------------------------------------------------------------------------------------


def xs_settings(
    own: Mapping[str, Any], stride: int, hint_channels: int = 3, size_ratio: float | None = None
) -> dict[str, Any]:
    """The configuration of a ``ControlNetXSAdapter`` for a base of the configuration ``own``.

    ``size_ratio``: its channels as a share of the base's, above 0 and at most 1; None: as ``SLIM`` and ``MOST`` say.
    Raises ``Invalid`` where that leaves an attention head less than one channel.
    """
    ratio = size_ratio or min(SLIM / own["block_out_channels"][0], MOST)
    channels = [int(ratio * width) for width in own["block_out_channels"]]
    heads = own["attention_head_dim"]
    heads = [heads] * len(channels) if isinstance(heads, int) else list(heads)
    if any(width < count for width, count in zip(channels, heads, strict=True)):
        least = max(map(_share, heads, own["block_out_channels"]))
        raise Invalid(
            f"A ControlNet-XS of size_ratio {ratio:g} would have {channels} channels for attention of {heads} heads: "
            f"expected at least one channel a head, size_ratio {least:.2g}."
        )
    return {
        "conditioning_channels": hint_channels,
        "conditioning_embedding_out_channels": HintEncoder.widths(stride),
        "num_attention_heads": own["attention_head_dim"],
        "block_out_channels": channels,
        "base_block_out_channels": list(own["block_out_channels"]),
        "cross_attention_dim": own["cross_attention_dim"],
        "down_block_types": list(own["down_block_types"]),
        "sample_size": own["sample_size"],
        "transformer_layers_per_block": own["transformer_layers_per_block"],
        "upcast_attention": own["upcast_attention"],
        "max_norm_num_groups": own["norm_num_groups"],
        "use_linear_projection": own["use_linear_projection"],
        **shape_of(own),
    }


def _share(heads: int, channels: int) -> float:
    return -(-100 * heads // channels) / 100


def shape_of(own: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a base's configuration that diffusers' class takes for granted."""
    return {key: own[key] for key in ("in_channels", "layers_per_block")}


def xs_network(config: Mapping[str, Any]) -> Any:
    """diffusers' ``ControlNetXSAdapter`` of a configuration.

    Its class is made for Stable Diffusion's ``in_channels`` and ``layers_per_block``. Here they may differ: with one
    layer a level it has half the parts, by the same names. Raises ``Unsupported`` for other numbers of layers.
    """
    from diffusers import ControlNetXSAdapter
    from diffusers.models.controlnets.controlnet_xs import UpBlockControlNetXSAdapter, make_zero_conv

    latents, layers = config.get("in_channels", _LATENTS), config.get("layers_per_block", _LAYERS)
    if layers not in range(1, _LAYERS + 1):
        raise Unsupported(f"ControlNet-XS is for bases of one or two layers a level; this one has {layers}.")
    more = ("in_channels", "layers_per_block")
    network = ControlNetXSAdapter(**{key: value for key, value in config.items() if key not in more})
    if latents != _LATENTS:
        network.conv_in = nn.Conv2d(latents, network.conv_in.out_channels, 3, padding=1)
    if layers == _LAYERS:
        return network
    widths = [network.conv_in.out_channels]  # of the thin encoder's feature for each skip
    for block in network.down_blocks:
        block.resnets = block.resnets[:layers]
        widths += [block.resnets[0].out_channels] * layers
        if block.attentions is not None:
            block.attentions = block.attentions[:layers]
        for name in ("base_to_ctrl", "ctrl_to_base"):
            convs = list(getattr(block, name))
            setattr(block, name, nn.ModuleList(convs[:layers] + convs[_LAYERS:]))  # the last: the downsampler's
        if block.downsamplers is not None:
            widths.append(widths[-1])
    base = [*config["base_block_out_channels"], config["base_block_out_channels"][-1]]  # the middle's last
    ups = []
    for level in reversed(range(len(network.down_blocks))):
        arriving = [base[level + 1]] + [base[level]] * layers  # the decoder's channels where each skip arrives
        ups.append(UpBlockControlNetXSAdapter(nn.ModuleList(make_zero_conv(widths.pop(), c) for c in arriving)))
    network.up_connections = nn.ModuleList(ups)
    return network


# --- the branch -------------------------------------------------------------------------------------------------


def _stage(
    read: nn.Module, layer: Layer, write: nn.Module, own: Tensor, h: Tensor, embedding: Tensor, text: Any
) -> tuple[Tensor, Tensor]:
    own = layer(torch.cat([own, read(h)], 1), embedding, text)
    return own, write(own)


class XSBranch(ControlNetwork):
    """A ``ControlNetXSAdapter`` as a control. A ``Walker``: the base runs it beside its encoder.

    ``taps``: the base's skips and middle, in order; the walk has one place for each.
    """

    kind = "xs"
    walks = True

    def __init__(self, network: Any, taps: tuple[Tap, ...]) -> None:
        super().__init__()
        self.spec = ControlSpec(body="xs")
        self.network, self.taps = network, taps

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of which ``xs_network`` builds this one's network."""
        known = {key: value for key, value in self.network.config.items() if not key.startswith("_")}
        layers, latents = len(self.network.down_blocks[0].resnets), self.network.conv_in.in_channels
        if (latents, layers) != (_LATENTS, _LAYERS):  # else diffusers' class says it all
            known |= {"in_channels": latents, "layers_per_block": layers}
        return known

    def encode_hint(self, hint: Tensor) -> Tensor:
        """Features (B, C, h, w) of hints (B, channels, H, W) in their contract's range; they serve every step."""
        return self.network.controlnet_cond_embedding(hint)

    def shift(self, time: Tensor, embedding: nn.Module) -> Tensor | None:
        """The difference to the base's time embedding (B, D), where this one has learnt its own; else None.

        ``time``: the timesteps' sinusoids (B, S).  ``embedding``: the base's module. Only released controls have one.
        """
        if self.network.time_embedding is None:
            return None
        return self.network.config.time_embedding_mix**0.3 * (self.network.time_embedding(time) - embedding(time))

    def stages(self) -> list[Stage]:
        """One stage for each tap, in order: the first convolution, layers and downsamplers, the middle block.

        At the first, its own feature is the hint's, and the base's is the latents.
        """
        found: list[Stage] = [self._first]
        for block in self.network.down_blocks:
            layers: list[Layer] = [partial(run_layer, block, i) for i in range(len(block.resnets))]
            if block.downsamplers is not None:
                layers.append(partial(run_plain, block.downsamplers))
            triples = zip(block.base_to_ctrl, layers, block.ctrl_to_base, strict=True)
            found += [partial(_stage, read, layer, write) for read, layer, write in triples]
        middle = self.network.mid_block
        return [*found, partial(_stage, middle.base_to_ctrl, partial(_middle, middle.midblock), middle.ctrl_to_base)]

    def _first(self, own: Tensor, h: Tensor, embedding: Tensor, text: Any) -> tuple[Tensor, Tensor]:
        own = self.network.conv_in(h) + own
        return own, self.network.control_to_base_for_conv_in(own)

    def arriving(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        """The residuals (B, C, h, w) where skips arrive in the decoder, by skip, given its features at the skips."""
        convs = [conv for block in self.network.up_connections for conv in block.ctrl_to_base]
        skips = [tap for tap in self.taps if tap.site == "skip"]
        return {tap.name: conv(f) for tap, conv, f in zip(skips, reversed(convs), features, strict=True)}


def _middle(block: nn.Module, h: Tensor, embedding: Tensor, text: Any) -> Tensor:
    return block(h, embedding, encoder_hidden_states=text.tokens)


def new_xs(base: Backbone, spec: ControlSpec, hint_channels: int = 3, size_ratio: float | None = None) -> XSBranch:
    """A fresh ControlNet-XS for a base, silent until it is trained; ``size_ratio`` as ``xs_settings`` takes it.

    Raises ``Unsupported`` where the base is no U-Net, ``Invalid`` where it would be too thin.
    """
    if base.network_config is None:
        raise Unsupported(f'A ControlNet-XS walks beside a U-Net; "{base.name}" is none: train another body.')
    config = xs_settings(base.network_config, base.stride, hint_channels, size_ratio)
    return XSBranch(xs_network(config), base.branch_taps)
