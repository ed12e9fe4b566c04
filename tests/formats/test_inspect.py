"""``inspect`` names what a file is from its names and shapes alone, at the released models' full sizes.

The files are whole headers over holes: their data takes no room on disk and is never read.
"""

import json
import struct

import pytest
import torch
from diffusers import T2IAdapter

from controlkit.backbones.unet_families import FAMILIES, unet_config
from controlkit.controls.xs import xs_settings
from controlkit.formats import describe
from controlkit.formats.configs import expected_shapes
from controlkit.formats.names import PREFIX, EncoderShape, controlnet_paths, rename


def write_holes(path, shapes, metadata=None):
    """A safetensors file of half-precision zeros: a header, and as long a hole as it asks for."""
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def controlnet(name, hint_channels=3, union=0):
    row = FAMILIES[name]
    left_out = ("sample_size", "out_channels", "up_block_types")
    config = {key: value for key, value in unet_config(row).items() if key not in left_out}
    config |= {"conditioning_embedding_out_channels": [16, 32, 96, 256], "conditioning_channels": hint_channels}
    if union:
        config |= {"num_control_type": union, "num_trans_channel": 320, "num_proj_channel": 320}
    return expected_shapes("union" if union else "controlnet", config)


def cldm(name, prefix=PREFIX, **options):
    shapes = controlnet(name, **options)
    table = rename(shapes, controlnet_paths(EncoderShape.of_diffusers(shapes)))
    return {prefix + table[key]: shape for key, shape in shapes.items()}


def control_lora(name, rank):
    """As Stability's are: products for every matrix and convolution of the encoder, all else whole."""
    found = {"lora_controlnet": (0,)}
    for key, shape in cldm(name, prefix="").items():
        own = key.startswith(("zero_convs", "input_hint_block", "middle_block_out"))
        if own or len(shape) < 2:
            found[key] = shape
        else:
            stem, kernel = key.removesuffix(".weight"), (1, 1) if len(shape) == 4 else ()
            found |= {f"{stem}.up": (shape[0], rank, *kernel), f"{stem}.down": (rank, *shape[1:])}
    return found


def adapter(channels, layers, factor, kind, hint_channels=3, original=False):
    with torch.device("meta"):
        network = T2IAdapter(hint_channels, channels, layers, factor, kind)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if not original:
        return shapes
    found = {}
    for name, shape in shapes.items():
        parts = name.removeprefix("adapter.").split(".")
        if parts[:1] == ["body"]:
            inner = int(parts[3]) if parts[2] == "resnets" else 0
            parts = ["body", str(layers * int(parts[1]) + inner), *parts[4 if parts[2] == "resnets" else 2 :]]
        found[".".join(parts)] = shape
    return found


def walker(name):
    """A ControlNet-XS a tenth as wide as the base, as diffusers makes them."""
    return expected_shapes("xs", xs_settings({"norm_num_groups": 32} | unet_config(FAMILIES[name]), 8))


WIDTHS = [320, 640, 1280, 1280]
OF_BASE = {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768)}
RUN = {
    "diffusers, SD 1.5": (lambda: controlnet("sd15"), ("diffusers", "sd15", 3, 361_279_120)),
    "diffusers, SD 1.5, five channels": (lambda: controlnet("sd15", 5), ("diffusers", "sd15", 5, 361_279_408)),
    "diffusers, SD 2.1": (lambda: controlnet("sd21"), ("diffusers", "sd21", 3, 364_228_240)),
    "diffusers, SDXL": (lambda: controlnet("sdxl"), ("diffusers", "sdxl", 3, 1_251_014_160)),
    "original, SD 1.5": (lambda: cldm("sd15"), ("cldm", "sd15", 3, 361_279_120)),
    "original, SD 1.5, in a whole checkpoint": (lambda: cldm("sd15") | OF_BASE, ("cldm", "sd15", 3, 361_279_120)),
    "original, SD 2.1, no prefix": (lambda: cldm("sd21", ""), ("cldm", "sd21", 3, 364_228_240)),
    "original, SDXL, no prefix": (lambda: cldm("sdxl", ""), ("cldm", "sdxl", 3, 1_251_014_160)),
    "a difference, SD 1.5": (
        lambda: cldm("sd15") | {"difference": (1,)},
        ("cldm-difference", "sd15", 3, 361_279_120),
    ),
    "Control-LoRA, SDXL, rank 128": (lambda: control_lora("sdxl", 128), ("control-lora", "sdxl", 3, None)),
    "Control-LoRA, SD 1.5, rank 256": (lambda: control_lora("sd15", 256), ("control-lora", "sd15", 3, None)),
    "Union, SDXL": (lambda: controlnet("sdxl", union=6), ("union", "sdxl", 3, None)),
    "Union ProMax, SDXL": (lambda: controlnet("sdxl", union=8), ("union", "sdxl", 3, None)),
    "ControlNet-XS, SD 1.5": (lambda: walker("sd15"), ("controlnet-xs", "sd15", 3, None)),
    "ControlNet-XS, SD 2.1": (lambda: walker("sd21"), ("controlnet-xs", "sd21", 3, None)),
    "ControlNet-XS, SDXL": (lambda: walker("sdxl"), ("controlnet-xs", "sdxl", 3, None)),
    "T2I-Adapter, diffusers": (lambda: adapter(WIDTHS, 2, 8, "full_adapter"), ("t2i-adapter", "sd15", 3, None)),
    "T2I-Adapter, original": (
        lambda: adapter(WIDTHS, 2, 8, "full_adapter", 1, original=True),
        ("t2i-adapter", "sd15", 1, None),
    ),
    "T2I-Adapter, light": (lambda: adapter(WIDTHS[:3], 4, 8, "light_adapter"), ("t2i-adapter", "sd15", 3, None)),
    "T2I-Adapter, SDXL": (lambda: adapter(WIDTHS, 2, 16, "full_adapter_xl"), ("t2i-adapter", "sdxl", 3, None)),
}
NAMED = {
    "ControlNet-XS": (
        {"control_to_base_for_conv_in.weight": (320, 16, 1, 1), "down_blocks.0.base_to_ctrl.0.weight": (16, 320, 1, 1)},
        "controlnet-xs",
    ),
    "LLLite": ({"lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight": (64, 640)}, "lllite"),
    "Flux": (
        {"controlnet_x_embedder.weight": (3072, 64), "controlnet_single_blocks.0.weight": (3072, 3072)},
        "flux",
    ),
    "Flux Union": ({"controlnet_mode_embedder.weight": (10, 3072), "controlnet_x_embedder.weight": (3072, 64)}, "flux"),
    "SD3": ({"pos_embed_input.proj.weight": (1536, 16, 2, 2), "controlnet_blocks.0.weight": (1536, 1536)}, "sd3"),
    "Qwen-Image": (
        {"controlnet_x_embedder.weight": (3072, 64), "transformer_blocks.0.img_mod.1.weight": (18432, 3072)},
        "qwen-image",
    ),
    "Z-Image": ({"control_layers.0.attention.to_q.weight": (3840, 3840)}, "z-image"),
    "Hunyuan-DiT": ({"after_proj_list.0.weight": (1408, 1408), "input_block.weight": (1408, 1408)}, "hunyuan-dit"),
    "a base": (OF_BASE, "base"),
    "an ordinary LoRA": (
        {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (8, 768)},
        "lora",
    ),
    "ControlNet-XS, original": (
        {
            "control_model.input_hint_block.0.weight": (16, 3, 3, 3),
            "control_model.enc_zero_convs_in.0.0.weight": (8, 8),
        },
        "controlnet-xs",
    ),
    "a transformer of Flux": ({"double_blocks.0.img_mod.lin.weight": (18432, 3072)}, "unknown"),
    "a transformer of Qwen-Image": ({"transformer_blocks.0.img_mod.1.weight": (18432, 3072)}, "unknown"),
    "a base of another family": (
        {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 512)},
        "other-base",
    ),
    "something else": ({"layers.0.weight": (4, 4)}, "unknown"),
}


@pytest.mark.parametrize("kind", RUN)
def test_what_runs_is_named_with_base_channels_and_size(kind, tmp_path):
    make, (layout, base, channels, parameters) = RUN[kind]
    found = describe(write_holes(tmp_path / "mystery.safetensors", make()))
    assert (found.format, found.base, found.hint_channels) == (layout, base, channels)
    assert (found.missing, found.unexpected, found.runs) == ((), (), True)
    assert parameters in (None, found.parameters)
    assert "\n" not in found.sentence() and found.sentence().endswith("; runs.")


@pytest.mark.parametrize("kind", NAMED)
def test_what_does_not_run_is_named_and_said_not_to(kind, tmp_path):
    shapes, layout = NAMED[kind]
    found = describe(write_holes(tmp_path / "mystery.safetensors", shapes))
    assert (found.format, found.runs) == (layout, False)
    assert "\n" not in found.sentence()


def test_the_file_s_name_says_nothing(tmp_path):
    path = write_holes(tmp_path / "control_v11p_sd15_canny.safetensors", cldm("sd21"))
    assert describe(path).base == "sd21"


def test_what_is_missing_misshapen_or_too_much_is_named(tmp_path):
    shapes = cldm("sd15", "")
    del shapes["middle_block_out.0.bias"]
    shapes["zero_convs.3.0.weight"] = (320, 640, 1, 1)
    shapes["stowaway.weight"] = (1,)
    found = describe(write_holes(tmp_path / "a.safetensors", shapes))
    assert set(found.missing) == {"controlnet_mid_block.bias", "controlnet_down_blocks.3.weight"}
    assert found.unexpected == ("stowaway.weight",) and not found.runs
    assert (
        "controlnet_down_blocks.3.weight is (320, 640, 1, 1) in the file, expected (320, 320, 1, 1)" in found.sentence()
    )


def test_an_sd21_file_is_not_read_with_an_sd15_configuration(tmp_path):
    """What loaders take from a fixed configuration for every original file: heads, projections, prompt width."""
    found = describe(write_holes(tmp_path / "a.safetensors", cldm("sd21", "")))
    assert found.config["attention_head_dim"] == [5, 10, 20, 20]
    assert found.config["use_linear_projection"] and found.config["upcast_attention"]
    assert found.config["cross_attention_dim"] == 1024
    assert describe(write_holes(tmp_path / "b.safetensors", cldm("sd15", ""))).config["attention_head_dim"] == [8] * 4


@pytest.mark.parametrize("make", [lambda: controlnet("sd15"), lambda: walker("sd15")], ids=["ControlNet", "XS"])
def test_a_mistake_of_our_own_is_raised_and_not_taken_for_a_damaged_file(make, tmp_path, monkeypatch):
    path = write_holes(tmp_path / "a.safetensors", make())

    def mistaken(names):
        raise KeyError("ours")

    monkeypatch.setattr(EncoderShape, "of_diffusers", mistaken)
    with pytest.raises(KeyError, match="ours"):
        describe(path)


@pytest.mark.parametrize("make", [lambda: controlnet("sd15"), lambda: walker("sd15")], ids=["ControlNet", "XS"])
def test_shapes_that_no_network_has_are_described_as_one_that_does_not_run(make, tmp_path):
    for name, shape in [
        ("down_blocks.0.resnets.0.conv1.weight", ()),
        ("down_blocks.0.resnets.0.conv1.weight", None),
        ("controlnet_cond_embedding.conv_in.weight", (16,)),
        ("conv_in.weight", (2**20, 4, 3, 3)),
        ("down_blocks.1.resnets.0.conv1.weight", (2**15, 320, 3, 3)),
        ("down_blocks.99.resnets.0.conv1.weight", (1,)),
    ]:
        shapes = {**make(), name: shape}
        found = describe(write_holes(tmp_path / "a.safetensors", {n: s for n, s in shapes.items() if s is not None}))
        assert not found.runs and found.format in ("diffusers", "controlnet-xs"), name
