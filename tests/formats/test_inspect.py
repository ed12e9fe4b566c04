"""``inspect`` names what a file is from its names and shapes alone, at the released models' full sizes.

The files are whole headers over holes: their data takes no room on disk and is never read.
"""

import json
import struct
import subprocess
import sys

import pytest
import torch
from diffusers import T2IAdapter

from controlkit.backbones.unet_families import FAMILIES, unet_config
from controlkit.controls.xs import xs_settings
from controlkit.errors import Invalid, Unsupported
from controlkit.formats import describe
from controlkit.formats.names import PREFIX, EncoderShape, controlnet_paths, rename
from controlkit.formats.shapes import expected_shapes
from controlkit.formats.weights import read_weights


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
    "LLLite of Anima": (
        {
            "lllite_conditioning1.conv1.weight": (32, 3, 4, 4),
            "lllite_dit_blocks_0_self_attn_q_proj.down.weight": (64, 2048),
        },
        "lllite-anima",
    ),
    "Qwen-Image, blockwise": (
        {"controlnet_blocks.0.y_rms.weight": (3072,), "img_in.weight": (3072, 64)},
        "qwen-blockwise",
    ),
    "Z-Image, a patch": ({"control_all_x_embedder.2-1.weight": (3840, 132)}, "z-image"),
    "Sana": ({"caption_norm.weight": (2240,), "controlnet_blocks.0.weight": (2240, 2240)}, "sana"),
    "Cosmos": (
        {"control_blocks.0.before_proj_x.weight": (2048, 2048), "patch_embed.proj.weight": (2048, 68)},
        "cosmos",
    ),
    "PixArt": ({"controlnet.0.copied_block.attn.qkv.weight": (3456, 1152)}, "pixart"),
    "Kolors'": (
        {"encoder_hid_proj.weight": (2048, 4096), "controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)},
        "kolors",
    ),
    "SparseCtrl": (
        {
            "controlnet_cond_embedding.conv_in.weight": (16, 4, 3, 3),
            "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": (320,),
        },
        "sparsectrl",
    ),
    "BrushNet": (
        {"brushnet_down_blocks.0.weight": (320, 320, 1, 1), "conv_in_condition.weight": (320, 9, 3, 3)},
        "brushnet",
    ),
    "ControlNeXt": (
        {"mid_convs.0.0.weight": (128, 128, 3, 3), "down_res.0.conv1.weight": (64, 64, 3, 3)},
        "controlnext",
    ),
    "a T2I-Adapter of style": ({"style_embedding": (1, 8, 1024), "ln_post.weight": (1024,)}, "style-adapter"),
    "an IP-Adapter": (
        {"image_proj.proj.weight": (3072, 1024), "ip_adapter.1.to_k_ip.weight": (320, 768)},
        "ip-adapter",
    ),
    "Redux of Flux": ({"redux_up.weight": (12288, 1152), "redux_down.weight": (4096, 12288)}, "flux-redux"),
    "a motion module": ({"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": (320,)}, "motion"),
    "a VAE, original": (
        {"encoder.conv_in.weight": (128, 3, 3, 3), "decoder.conv_in.weight": (512, 4, 3, 3)},
        "vae",
    ),
    "a VAE of a checkpoint": (
        {f"first_stage_model.{side}.conv_in.weight": (128, 3, 3, 3) for side in ("encoder", "decoder")},
        "vae",
    ),
    "a textual inversion": ({"emb_params": (4, 768)}, "embedding"),
    "a textual inversion, diffusers": ({"<cat-toy>": (768,)}, "embedding"),
    "a textual inversion, a plain word": ({"cat-toy": (2, 1024)}, "embedding"),
    "a textual inversion of SDXL": ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "embedding"),
    "a text encoder": ({"text_model.encoder.layers.0.self_attn.q_proj.weight": (768, 768)}, "text-tower"),
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


BASES = {
    "LLLite": "sdxl",
    "LLLite of Anima": None,
    "a textual inversion": "sd15",
    "a textual inversion, a plain word": "sd21",
    "a textual inversion of SDXL": "sdxl",
    "a base": "sd15",
    "an IP-Adapter": None,
}


@pytest.mark.parametrize(("kind", "base"), BASES.items())
def test_a_base_is_named_where_shapes_or_names_show_it_and_by_its_one_name(kind, base, tmp_path):
    found = describe(write_holes(tmp_path / "mystery.safetensors", NAMED[kind][0]))
    assert found.base == base
    assert (f" for {base}," in found.sentence()) == (base is not None) and "Stable Diffusion 1" not in found.sentence()


USES = {
    "a VAE, original": "--vae",
    "a textual inversion": "--embedding",
    "an ordinary LoRA": "--lora",
    "a base": "--base",
}


@pytest.mark.parametrize(("kind", "option"), USES.items())
def test_what_is_no_control_is_told_where_it_can_be_used(kind, option, tmp_path):
    assert f"give it as {option}" in describe(write_holes(tmp_path / "a.safetensors", NAMED[kind][0])).sentence()


STRANGE = {
    "with a variance": ("sdxl", {"conv_out.weight": (8, 320, 3, 3), "conv_out.bias": (8,)}),
    "with classes": ("sd15", {"class_embedding.weight": (10, 1280)}),
    "with another's layers": ("sd21", {"mid_block.motion_modules_0.norm.weight": (1280,)}),
}


@pytest.mark.parametrize(("family", "more"), STRANGE.values(), ids=STRANGE)
def test_a_network_with_tensors_of_another_does_not_run_here_as_nowhere_else(family, more, tmp_path):
    path = write_holes(tmp_path / "a.safetensors", controlnet(family) | more)
    found = describe(path)
    assert (found.runs, set(found.unexpected)) == (False, set(more)) and found.sentence().endswith("; does not run.")
    with pytest.raises(Invalid, match="has tensors of another network"):
        read_weights(path)


def test_a_file_of_another_family_s_rules_is_refused_as_a_base_by_name(tmp_path):
    entry = "model.diffusion_model.input_blocks.0.0.weight"
    for more, words in (({"edm_mean": (1, 4, 1, 1)}, "Playground"), ({entry: (320, 8, 3, 3)}, "editing")):
        with pytest.raises(Unsupported, match=words):
            describe(write_holes(tmp_path / "a.safetensors", OF_BASE | more))


FOLDERS = {
    "shards": ["diffusion_pytorch_model-00001-of-00001.safetensors", "diffusion_pytorch_model.safetensors.index.json"],
    "a variant": ["diffusion_pytorch_model.bf16.safetensors"],
    "another name": ["diffusion_pytorch_model_promax.safetensors"],
    "a name of one's own": ["my_control.safetensors"],
}


@pytest.mark.parametrize("names", FOLDERS.values(), ids=FOLDERS)
@pytest.mark.parametrize("has_config", [True, False])
def test_a_folder_s_weights_are_found_by_any_name(names, has_config, tmp_path):
    shapes = controlnet("sd15")
    write_holes(tmp_path / names[0], shapes)
    for index in names[1:]:
        (tmp_path / index).write_text(json.dumps({"weight_map": dict.fromkeys(shapes, names[0])}))
    if has_config:
        config = {"_class_name": "ControlNetModel", "global_pool_conditions": True}
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8-sig")
    found = describe(tmp_path)
    assert found.runs and found.base == "sd15"
    assert found.config.get("global_pool_conditions", False) == has_config


@pytest.mark.parametrize("variants", [["fp16", "bf16"], ["non_ema", "fp16"], ["fp16"]])
def test_of_several_variants_one_is_read_and_no_stranger_s_file_beside_them(variants, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    write_holes(tmp_path / "other.safetensors", controlnet("sd21"))
    for name in variants:
        write_holes(tmp_path / f"diffusion_pytorch_model.{name}.safetensors", controlnet("sd15"))
    assert describe(tmp_path).base == "sd15"


def test_a_folder_of_several_files_of_weights_is_a_question(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in ("a.safetensors", "b.safetensors"):
        write_holes(tmp_path / name, controlnet("sd15"))
    with pytest.raises(Invalid, match=r"2 files of weights: name one of a.safetensors, b.safetensors"):
        describe(tmp_path)


def test_a_stranger_s_configuration_beside_a_file_says_nothing(tmp_path):
    path = write_holes(tmp_path / "control.safetensors", controlnet("sd15"))
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "attention_head_dim": 5}')
    assert describe(path).config["attention_head_dim"] == [8] * 4


def test_inspecting_a_control_imports_neither_diffusers_nor_transformers_nor_a_compiler():
    """Seconds of start-up, for a header. Held by names, as seconds depend on the machine."""
    heavy = {"diffusers", "transformers", "torch._dynamo", "torch._inductor", "sympy", "huggingface_hub", "pandas"}
    code = (
        "import sys; from controlkit.cli import main\n"
        "sys.argv = ['controlkit', 'inspect', 'canny']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, imported = done.stdout.strip().splitlines()[0], done.stdout.strip().splitlines()[-1]
    assert "ControlNet-Union" in said and imported == "[]"


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
