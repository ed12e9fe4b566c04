"""A base is the same base wherever it comes from: one file, a folder, a hub's cache; LoRAs and new words added exactly.

The single files are toys in the anatomy of the three families, written to the original layout by this file's own
mapping; stock diffusers pipelines say what they must compute.
"""

import json
import os
import pickle
import pickletools
import shutil
import sys
from dataclasses import replace
from functools import cache

import diffusers
import huggingface_hub
import pytest
import safetensors.torch
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from conftest import draw_inputs, relative, stock_inputs
from controlkit import precision
from controlkit.backbones import FAMILIES, load_base, unet_families
from controlkit.backbones.unet_families import clip_tokenizer, part_configs, unet_config
from controlkit.errors import UserError
from controlkit.formats import describe
from limits import limited

PROMPTS = ["a photo of a cat!", ""]
KINDS = ("sd15", "sd21", "sdxl")

# --- toys of three families, as stock pipelines -------------------------------------------------------------------


def make_tower(tokenizer, width, activation, projects=False, layers=3, heads=2, mlp=None):
    sizes = {"hidden_size": width, "intermediate_size": mlp or 2 * width, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "projection_dim": width, "vocab_size": len(tokenizer)}
    sizes |= {"max_position_embeddings": tokenizer.model_max_length}
    marks = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    kind = CLIPTextModelWithProjection if projects else CLIPTextModel
    return kind(CLIPTextConfig(hidden_act=activation, **sizes, **marks))


def make_vae(channels, scaling=0.18215):
    levels = len(channels)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=2,
        scaling_factor=scaling,
    )


def make_pipeline(kind, tokenizers):
    """A stock pipeline in a family's published anatomy, narrow, every weight random."""
    torch.manual_seed(0)
    xl = kind == "sdxl"
    anatomy = {
        "sd15": {"cross_attention_dim": 32, "attention_head_dim": 8, "sample_size": 64},
        "sd21": {
            "cross_attention_dim": 64,
            "attention_head_dim": (1, 2, 2, 2),
            "sample_size": 96,
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        "sdxl": {
            "cross_attention_dim": 96,
            "attention_head_dim": (1, 2, 2),
            "sample_size": 128,
            "use_linear_projection": True,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 3),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 64 + 6 * 256,
        },
    }[kind]
    parts = {
        "unet": UNet2DConditionModel(block_out_channels=(32, 64, 64) if xl else (32, 64, 64, 64), **anatomy),
        "vae": make_vae((32, 32, 64, 64), 0.13025 if xl else 0.18215),
        "text_encoder": make_tower(tokenizers[0], *((64, "gelu") if kind == "sd21" else (32, "quick_gelu"))),
        "tokenizer": tokenizers[0],
        "scheduler": DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            prediction_type="v_prediction" if kind == "sd21" else "epsilon",
        ),
    }
    if xl:
        parts |= {"text_encoder_2": make_tower(tokenizers[1], 64, "gelu", projects=True), "tokenizer_2": tokenizers[1]}
    for module in parts.values():
        if isinstance(module, torch.nn.Module):
            for parameter in module.eval().requires_grad_(False).parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)  # else biases and norms are all alike
    if kind == "sd21":
        wide = parts["unet"].up_blocks[3].attentions[2].transformer_blocks[0].norm1.bias
        wide.copy_(torch.linspace(-0.3, 0.3, 32))  # by which its predicting v is told
    return as_pipeline(parts)


def as_pipeline(parts):
    if "text_encoder_2" in parts:
        return StableDiffusionXLPipeline(**parts)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


@pytest.fixture(scope="module")
def stock():
    """``stock(kind)`` is the toy of a family as a stock pipeline with CLIP's words; not to be changed."""
    ordinary, odd = clip_tokenizer(), clip_tokenizer("!")
    tokenizers = {"sd15": [ordinary], "sd21": [odd], "sdxl": [ordinary, odd]}
    return cache(lambda kind: make_pipeline(kind, tokenizers[kind]))


@pytest.fixture(scope="module")
def small(toy_folder):
    """The same with few words, which load in no time."""
    tokenizer = CLIPTokenizer.from_pretrained(toy_folder / "tokenizer")
    return cache(lambda kind: make_pipeline(kind, [tokenizer, tokenizer]))


@pytest.fixture
def toy_families(monkeypatch):
    """The families' table, as narrow as the toys; the vocabulary stays CLIP's."""
    clip_l = (32, 64, 3, 2, "quick_gelu", 0)
    sizes = {
        "sd15": {"text_width": 32, "channels": (32, 64, 64, 64), "towers": (clip_l,)},
        "sd21": {
            "text_width": 64,
            "channels": (32, 64, 64, 64),
            "heads": (1, 2, 2, 2),
            "towers": ((64, 128, 3, 2, "gelu", 0),),
        },
        "sdxl": {
            "text_width": 96,
            "channels": (32, 64, 64),
            "transformers": (0, 2, 3),
            "heads": (1, 2, 2),
            "towers": (clip_l, (64, 128, 3, 2, "gelu", 64)),
            "pooled_width": 64,
        },
    }
    whole = unet_families._vae_config
    monkeypatch.setattr(unet_families, "_vae_config", lambda row: whole(row) | {"block_out_channels": [32, 32, 64, 64]})
    for name, narrow in sizes.items():
        monkeypatch.setitem(FAMILIES, name, replace(FAMILIES[name], **narrow))


# --- the original layout, from the anatomy of the networks --------------------------------------------------------

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}


def unet_places(unet):
    """Module of diffusers -> module of the original: the U-Net's blocks numbered in the order they run."""
    places = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    for name, place in (("time_embedding", "time_embed"), ("add_embedding", "label_emb.0")):
        places |= {f"{name}.linear_1": f"{place}.0", f"{name}.linear_2": f"{place}.2"}

    def resnet(name, place):
        places.update({f"{name}.{ours}": f"{place}.{theirs}" for ours, theirs in RESNET.items()})

    at = 1
    for level, block in enumerate(unet.down_blocks):
        for i in range(len(block.resnets)):
            resnet(f"down_blocks.{level}.resnets.{i}", f"input_blocks.{at}.0")
            places[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{at}.1"
            at += 1
        if block.downsamplers is not None:
            places[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{at}.0.op"
            at += 1
    resnet("mid_block.resnets.0", "middle_block.0")
    resnet("mid_block.resnets.1", "middle_block.2")
    places["mid_block.attentions.0"] = "middle_block.1"
    at = 0
    for level, block in enumerate(unet.up_blocks):
        attends = getattr(block, "attentions", None) is not None
        for i in range(len(block.resnets)):
            resnet(f"up_blocks.{level}.resnets.{i}", f"output_blocks.{at}.0")
            places[f"up_blocks.{level}.attentions.{i}"] = f"output_blocks.{at}.1"
            at += 1
        places[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{at - 1}.{2 if attends else 1}.conv"
    return places


def vae_places(vae):
    places = {}
    levels = len(vae.config.block_out_channels)
    for half in ("encoder", "decoder"):
        places[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        places |= {f"{half}.mid_block.resnets.{i}": f"{half}.mid.block_{i + 1}" for i in range(2)}
        attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
        for ours, theirs in attention.items():
            places[f"{half}.mid_block.attentions.0.{ours}"] = f"{half}.mid.attn_1.{theirs}"
    for level in range(levels):
        mirrored = levels - 1 - level  # the original counts the decoder's levels from the finest
        places[f"encoder.down_blocks.{level}.downsamplers.0"] = f"encoder.down.{level}.downsample"
        places[f"decoder.up_blocks.{level}.upsamplers.0"] = f"decoder.up.{mirrored}.upsample"
        for i in range(3):
            places[f"encoder.down_blocks.{level}.resnets.{i}"] = f"encoder.down.{level}.block.{i}"
            places[f"decoder.up_blocks.{level}.resnets.{i}"] = f"decoder.up.{mirrored}.block.{i}"
    return places


def moved(tensors, places):
    """Tensors renamed by the longest module name that holds them."""
    renamed = {}
    for name, tensor in tensors.items():
        parents = [name[:at] for at, letter in enumerate(name) if letter == "." and name[:at] in places]
        renamed[places[parents[-1]] + name.removeprefix(parents[-1]) if parents else name] = tensor
    return renamed


def prefixed(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def plain_names(encoder):
    """A text tower's tensors without the ``text_model.`` that some releases of transformers put before them."""
    return {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}


def original_vae(vae):
    tensors = moved(vae.state_dict(), vae_places(vae))
    tensors = {name.replace("conv_shortcut", "nin_shortcut"): tensor for name, tensor in tensors.items()}
    linear = {name for name, tensor in tensors.items() if ".attn_1." in name and tensor.ndim == 2}
    return {name: tensor[:, :, None, None] if name in linear else tensor for name, tensor in tensors.items()}


def original_clip(encoder):
    return prefixed("transformer.text_model.", plain_names(encoder))


def original_open_clip(encoder):
    tensors = plain_names(encoder)
    places = {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final"}
    joined = {"positional_embedding": tensors.pop("embeddings.position_embedding.weight")}
    projection = tensors.pop("text_projection.weight", torch.eye(encoder.config.hidden_size))
    joined["text_projection"] = projection.T.contiguous()
    for i in range(encoder.config.num_hidden_layers):
        ours, theirs = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            rows = [tensors.pop(f"{ours}.self_attn.{one}_proj.{kind}") for one in "qkv"]
            joined[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(rows)
        places |= {f"{ours}.self_attn.out_proj": f"{theirs}.attn.out_proj"}
        places |= {f"{ours}.layer_norm{j}": f"{theirs}.ln_{j}" for j in (1, 2)}
        places |= {f"{ours}.mlp.fc1": f"{theirs}.mlp.c_fc", f"{ours}.mlp.fc2": f"{theirs}.mlp.c_proj"}
    return joined | moved(tensors, places) | {"logit_scale": torch.tensor(4.6)}


def original(pipe):
    """A pipeline's weights in the original layout, with the oddments that real checkpoints carry."""
    tensors = prefixed("model.diffusion_model.", moved(pipe.unet.state_dict(), unet_places(pipe.unet)))
    tensors |= prefixed("first_stage_model.", original_vae(pipe.vae))
    if isinstance(pipe, StableDiffusionXLPipeline):
        tensors |= prefixed("conditioner.embedders.0.", original_clip(pipe.text_encoder))
        tensors |= prefixed("conditioner.embedders.1.model.", original_open_clip(pipe.text_encoder_2))
    elif pipe.unet.config.use_linear_projection:
        tensors |= prefixed("cond_stage_model.model.", original_open_clip(pipe.text_encoder))
    else:
        tensors |= prefixed("cond_stage_model.", original_clip(pipe.text_encoder))
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors |= {"betas": torch.rand(1000), "model_ema.decay": torch.tensor(0.9999)}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def originals(stock):
    """``originals(kind)`` is a fresh dictionary of a toy's tensors in the original layout."""
    return lambda kind: original(stock(kind))


@pytest.fixture
def single_file(originals, tmp_path, toy_families):
    """``single_file(kind, **changes)`` writes a toy as one file; a change of None leaves the tensor out."""

    def write(kind, changes=None):
        tensors = {name: t for name, t in (originals(kind) | (changes or {})).items() if t is not None}
        save_file(tensors, tmp_path / f"{kind}.safetensors")
        return tmp_path / f"{kind}.safetensors"

    return write


# --- what "the same base" means -----------------------------------------------------------------------------------


def networks(base):
    return {"vae": base.vae, "unet": base.unet} | {f"tower {i}": t.encoder for i, t in enumerate(base.towers)}


def stock_networks(pipe):
    towers = [pipe.text_encoder, *([pipe.text_encoder_2] if hasattr(pipe, "text_encoder_2") else [])]
    return {"vae": pipe.vae, "unet": pipe.unet} | {f"tower {i}": tower for i, tower in enumerate(towers)}


def assert_same_weights(base, pipe):
    ours, theirs = networks(base), stock_networks(pipe)
    assert ours.keys() == theirs.keys()
    for part, module in theirs.items():
        loaded, saved = ours[part].state_dict(), module.state_dict()
        assert loaded.keys() == saved.keys()
        for name, tensor in saved.items():
            assert torch.equal(loaded[name], tensor.to(loaded[name].dtype)), f"{part}: {name}"


def stock_text(pipe, prompts):
    """The stock pipeline's prompt embeddings and, from SDXL, the pooled ones."""
    with torch.no_grad():
        if isinstance(pipe, StableDiffusionXLPipeline):
            tokens, _, pooled, _ = pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
            return tokens, pooled
        return pipe.encode_prompt(prompts, "cpu", 1, False)[0], None


def assert_same_text(base, pipe, prompts=PROMPTS):
    text = base.encode_text(prompts)
    tokens, pooled = stock_text(pipe, prompts)
    assert torch.equal(text.tokens, tokens)
    assert (text.pooled is None) == (pooled is None)
    if pooled is not None:
        assert torch.equal(text.pooled, pooled)


def assert_same_prediction(base, pipe):
    inputs = draw_inputs(base)
    rows, more = stock_inputs(inputs)
    with torch.no_grad():
        ours, theirs = base.decode_noise(base.encode_noise(*inputs[:3])), pipe.unet(*rows, **more).sample
    assert relative(ours, theirs) <= 1e-5  # where weights lie in memory decides the last bits


def refusal(*args, **options):
    """The sentence with which ``load_base`` refuses; one line, and not an essay."""
    with pytest.raises(UserError) as refused:
        load_base(*args, **options)
    sentence = str(refused.value)
    assert "\n" not in sentence
    assert len(sentence) < 700
    return sentence


# --- a single file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_is_the_pipeline_it_was_made_of(stock, single_file, kind):
    base, pipe = load_base(single_file(kind)), stock(kind)
    assert_same_weights(base, pipe)
    assert_same_text(base, pipe)
    assert_same_prediction(base, pipe)
    assert (base.name, base.noise.prediction) == (kind, "v" if kind == "sd21" else "eps")
    assert base.size == {"sd15": 512, "sd21": 768, "sdxl": 1024}[kind]
    assert [t.tokenizer.pad_token_id for t in base.towers] == {"sd15": [49407], "sd21": [0], "sdxl": [49407, 0]}[kind]
    assert base.unet.config.upcast_attention == pipe.unet.config.upcast_attention
    assert base.vae.config.scaling_factor == pipe.vae.config.scaling_factor
    for name in ("beta_start", "beta_end", "beta_schedule", "clip_sample", "rescale_betas_zero_snr"):
        assert base.scheduler.config[name] == pipe.scheduler.config[name]
    assert not any(p.requires_grad for module in networks(base).values() for p in module.parameters())


def test_a_pickled_checkpoint_is_read_like_a_single_file(stock, originals, toy_families, tmp_path):
    path = tmp_path / "old.ckpt"
    torch.save({"state_dict": originals("sd15"), "global_step": 840000}, path)
    base = load_base(path)
    assert_same_weights(base, stock("sd15"))
    assert_same_text(base, stock("sd15"))


class Malice:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("dump", [torch.save, lambda what, path: path.write_bytes(pickle.dumps(what, protocol=2))])
def test_a_checkpoint_that_would_run_code_is_refused_and_does_not(originals, toy_families, tmp_path, dump):
    path, mark = tmp_path / "bad.ckpt", tmp_path / "ran"
    dump({"state_dict": originals("sd15"), "callbacks": Malice(mark)}, path)
    sentence = refusal(path)
    assert "bad.ckpt" in sentence
    assert "safetensors" in sentence
    assert "posix.system" in sentence or dump is not torch.save
    assert not mark.exists()


@pytest.mark.parametrize("kept", [100, 0.999], ids=["in its header", "near the end"])
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_a_torn_file_is_refused(originals, toy_families, tmp_path, kept, ending):
    path = tmp_path / f"torn.{ending}"
    save = save_file if ending == "safetensors" else torch.save
    save(originals("sd15"), path)
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    assert "cannot be read" in refusal(path)


LACKING = {
    "its VAE": ("sd15", "first_stage_model."),
    "its text tower": ("sd15", "cond_stage_model."),
    "its second tower": ("sdxl", "conditioner.embedders.1."),
    "a layer of its second tower": ("sdxl", "conditioner.embedders.1.model.transformer.resblocks.2.mlp.c_fc.weight"),
    "a bias of its U-Net": ("sd21", "model.diffusion_model.middle_block.0.in_layers.2.bias"),
}


@pytest.mark.parametrize(("kind", "start"), LACKING.values(), ids=LACKING)
def test_a_file_that_lacks_something_is_refused(originals, single_file, kind, start):
    gone = {name: None for name in originals(kind) if name.startswith(start)}
    assert gone
    sentence = refusal(single_file(kind, gone))
    assert f"is not a whole {kind} checkpoint" in sentence


def test_a_file_of_an_inpainting_model_is_read_and_one_of_an_editing_model_is_refused(single_file):
    weight = torch.randn(32, 9, 3, 3)
    entry = "model.diffusion_model.input_blocks.0.0.weight"
    base = load_base(single_file("sd15", {entry: weight}))
    assert base.inpaints and torch.equal(base.unet.conv_in.weight, weight) and base.latent_channels == 4
    assert "editing" in refusal(single_file("sd15", {entry: weight[:, :8].contiguous()}))


def test_a_file_of_no_known_family_is_refused_with_its_width(single_file):
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    assert "48 wide" in refusal(single_file("sd15", {name: torch.randn(32, 48)}))


def test_a_file_without_a_unet_is_refused(originals, single_file):
    gone = {name: None for name in originals("sd15") if name.startswith("model.")}
    assert "holds no model.diffusion_model.* tensors" in refusal(single_file("sd15", gone))


LAST_NORM = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
SIGNS = {
    "a mark": ("sd15", {"v_pred": torch.empty(0)}, None, "v"),
    "a mark, as SD 2": ("sd21", {LAST_NORM: torch.linspace(-0.1, 0.1, 32), "v_pred": torch.empty(0)}, None, "v"),
    "a wide bias, as SD 2": ("sd21", {LAST_NORM: torch.linspace(-0.18, 0.18, 32)}, None, "v"),
    "a narrow bias, as SD 2": ("sd21", {LAST_NORM: torch.linspace(-0.1, 0.1, 32)}, None, "eps"),
    "a wide bias, as SD 1.5": ("sd15", {LAST_NORM: torch.linspace(-0.3, 0.3, 32)}, None, "eps"),
    "what the caller says": ("sd15", {}, "v", "v"),
    "the caller against a mark": ("sd15", {"v_pred": torch.empty(0)}, "eps", "eps"),
}


@pytest.mark.parametrize(("kind", "changes", "said", "expected"), SIGNS.values(), ids=SIGNS)
def test_what_a_file_predicts_is_told_from(single_file, kind, changes, said, expected):
    assert load_base(single_file(kind, changes), prediction=said).noise.prediction == expected


def test_a_file_marked_for_zero_terminal_snr_ends_in_pure_noise(single_file):
    base = load_base(single_file("sdxl", {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}))
    assert base.noise.prediction == "v"
    assert base.scheduler.alphas_cumprod[-1] < 1e-6


def test_an_sd2_file_that_predicts_noise_makes_pictures_of_512(single_file):
    base = load_base(single_file("sd21", {LAST_NORM: torch.linspace(-0.1, 0.1, 32)}))
    assert (base.noise.prediction, base.size) == ("eps", 512)


@pytest.mark.parametrize(("kind", "vae"), [("sd15", torch.float16), ("sdxl", torch.float32)])
def test_in_half_precision_only_a_vae_that_overflows_stays_whole(stock, single_file, kind, vae):
    base = load_base(single_file(kind), dtype=torch.float16)
    assert {part: {p.dtype for p in module.parameters()} for part, module in networks(base).items()} == {
        part: {vae if part == "vae" else torch.float16} for part in networks(base)
    }
    assert_same_weights(base, stock(kind))


@pytest.mark.parametrize(("pays", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_type_of_weights_may_be_left_to_the_machine(toy_folder, pays, expected, monkeypatch):
    monkeypatch.setattr(precision, "bf16_pays", lambda device: pays)
    base = load_base(toy_folder, dtype="auto")
    assert {p.dtype for module in networks(base).values() for p in module.parameters()} == {expected}
    assert load_base(toy_folder).dtype == torch.float32, "training wants whole weights"


# --- the tokenizer ------------------------------------------------------------------------------------------------

KNOWN = {  # as OpenAI's tokenizer has them
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "Hello  world!": [3306, 1002, 256],
    "a diagram": [320, 22697],
    "a photo of an astronaut riding a horse on mars": [320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496],
    "": [],
}


@pytest.mark.parametrize(("prompt", "ids"), KNOWN.items())
def test_the_tokenizer_is_clips(prompt, ids):
    assert clip_tokenizer()(prompt).input_ids == [49406, *ids, 49407]


def test_the_tokenizer_has_clips_vocabulary():
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49408
    assert tokenizer.model_max_length == 77
    assert sorted(tokenizer.get_vocab().values()) == list(range(49408))


@pytest.mark.parametrize("prompt", ["naïve café, 東京 ☃", "don't (masterpiece:1.2), best-quality; 3pm <3"])
def test_any_prompt_survives_its_tokens(prompt):
    tokenizer = clip_tokenizer()
    said = tokenizer.decode(tokenizer(prompt).input_ids, skip_special_tokens=True)
    assert "".join(said.split()) == "".join(prompt.split())


@pytest.mark.parametrize(("pad", "number"), [("<|endoftext|>", 49407), ("!", 0)])
def test_short_prompts_are_padded_as_their_tower_was_trained(pad, number):
    rows = clip_tokenizer(pad)("a cat", padding="max_length").input_ids
    assert rows == [49406, 320, 2368, 49407] + [number] * 73


# --- the families' table ------------------------------------------------------------------------------------------


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("kind", "unet", "control"),
    [
        ("sd15", 859_520_964, 361_279_120),
        ("sd21", 865_910_724, 364_228_240),
        ("sdxl", 2_567_463_684, 1_251_014_160),
    ],
)
def test_a_family_means_the_published_unet_and_controlnet(kind, unet, control):
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(unet_config(FAMILIES[kind]))
        assert (count(network), count(ControlNetModel.from_unet(network, load_weights_from_unet=False))) == (
            unet,
            control,
        )


@pytest.mark.parametrize(
    ("kind", "towers"), [("sd15", [123_060_480]), ("sd21", [340_387_840]), ("sdxl", [123_060_480, 694_659_840])]
)
def test_a_family_means_the_published_vae_and_towers(kind, towers):
    configs = part_configs(FAMILIES[kind])
    with torch.device("meta"):
        assert count(AutoencoderKL(**configs["vae"])) == 83_653_863
        kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        present = {part: kind for part, kind in kinds.items() if part in configs}
        assert [count(kind(CLIPTextConfig(**configs[part]))) for part, kind in present.items()] == towers


# --- another VAE --------------------------------------------------------------------------------------------------


@pytest.fixture
def vaes(folders, small, tmp_path):
    """Places of one VAE that is not the toy's: a pipeline, its VAE's folder, a checkpoint, a file of its own."""
    shutil.copytree(folders("sd15"), tmp_path / "other")
    vae = AutoencoderKL.from_pretrained(tmp_path / "other" / "vae")
    with torch.no_grad():
        for value in vae.parameters():
            value *= 1.5
    vae.save_pretrained(tmp_path / "other" / "vae")
    tensors = {name: tensor.contiguous() for name, tensor in original_vae(vae).items()}
    save_file(prefixed("first_stage_model.", tensors), tmp_path / "checkpoint.safetensors")
    save_file(tensors, tmp_path / "file.safetensors")
    places = ("other", "other/vae", "checkpoint.safetensors", "file.safetensors")
    return [tmp_path / place for place in places], vae.state_dict()


@pytest.mark.parametrize("place", range(4), ids=["pipeline", "folder", "checkpoint", "file"])
def test_another_vae_takes_the_place_of_the_base_s_own(place, vaes, folders):
    own = load_base(folders("sd15"))
    base = load_base(folders("sd15"), vae=vaes[0][place])
    state = base.vae.state_dict()
    assert state.keys() == vaes[1].keys() and all(torch.equal(state[name], value) for name, value in vaes[1].items())
    assert base.digest != own.digest and base.vae.config.scaling_factor == own.vae.config.scaling_factor


@pytest.mark.parametrize("variant", ["fp16", "bf16", "mine"])
def test_a_folder_that_holds_a_variant_alone_is_read(vaes, folders, tmp_path, variant):
    other = tmp_path / "other" / "vae" / "diffusion_pytorch_model.safetensors"
    other.rename(other.with_name(f"diffusion_pytorch_model.{variant}.safetensors"))
    base = load_base(folders("sd15"), vae=other.parent)
    assert all(torch.equal(base.vae.state_dict()[name], value) for name, value in vaes[1].items())
    assert load_base(tmp_path / "other").digest == base.digest


def test_what_is_no_vae_for_this_base_is_refused(vaes, folders, toy_folder, tmp_path):
    torn = dict(list(load_file(vaes[0][3]).items())[:-3])
    save_file(torn, tmp_path / "torn.safetensors")
    for source, words in (
        (tmp_path / "torn.safetensors", "is no whole VAE"),
        (tmp_path / "nowhere", "is no whole VAE"),
        (toy_folder, "makes latents of"),
    ):
        with pytest.raises(UserError, match=words):
            load_base(folders("sd15"), vae=source)


# --- a diffusers folder of SDXL -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(small, tmp_path_factory):
    """``folders(kind)`` is a toy as a diffusers folder, as the stock pipeline saves it; not to be touched."""
    root = tmp_path_factory.mktemp("folders")

    def saved(kind):
        if not (root / kind).is_dir():
            small(kind).save_pretrained(root / kind)
        return root / kind

    return saved


def with_index(folder, target, **changes):
    """A copy of a folder with another model_index.json."""
    shutil.copytree(folder, target)
    index = target / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))
    return target


def with_config(folder, target, part, leave=(), **changes):
    """A copy of a folder, one part's configuration changed."""
    shutil.copytree(folder, target)
    (path,) = [p for p in (target / part).glob("*config.json") if "tokenizer" not in p.name]
    config = {name: value for name, value in json.loads(path.read_text()).items() if name not in leave}
    path.write_text(json.dumps(config | changes))
    return target


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_the_pipeline_it_was_saved_from(small, folders, kind):
    base, pipe = load_base(folders(kind)), small(kind)
    assert_same_weights(base, pipe)
    assert_same_text(base, pipe)
    assert_same_prediction(base, pipe)
    assert base.noise.prediction == ("v" if kind == "sd21" else "eps")


@pytest.mark.parametrize("zeros", [True, False])
def test_no_prompt_and_an_empty_one_differ_where_the_stock_pipeline_says_so(small, folders, tmp_path, zeros):
    folder = with_index(folders("sdxl"), tmp_path / "base", force_zeros_for_empty_prompt=zeros)
    text = load_base(folder).encode_text(["a cat", None, ""])
    pipe = StableDiffusionXLPipeline(**small("sdxl").components, force_zeros_for_empty_prompt=zeros)
    with torch.no_grad():
        tokens, none, pooled, no_pool = pipe.encode_prompt("a cat", device="cpu", negative_prompt=None)
        _, empty, _, empty_pool = pipe.encode_prompt("a cat", device="cpu", negative_prompt="")
    # Rows of one batch and rows alone may differ in the last bits.
    assert relative(text.tokens, torch.cat([tokens, none, empty])) <= 1e-6
    assert relative(text.pooled, torch.cat([pooled, no_pool, empty_pool])) <= 1e-6
    assert (text.tokens[1].count_nonzero() == 0) == zeros
    assert text.tokens[2].count_nonzero() > 0


def test_the_sizes_are_those_of_the_stock_pipeline(small, folders):
    base = load_base(folders("sdxl"))
    pipe = small("sdxl")
    expected = pipe._get_add_time_ids((640, 896), (0, 0), (640, 896), torch.float32, 64)
    assert base.encode_text(PROMPTS, (640, 896)).sizes.tolist() == expected.repeat(2, 1).tolist()


@pytest.mark.parametrize(
    ("upcast", "dtype", "expected"),
    [
        (True, torch.float16, torch.float32),
        (False, torch.float16, torch.float16),
    ],
)
def test_a_folders_vae_stays_whole_where_half_precision_overflows_it(folders, tmp_path, upcast, dtype, expected):
    base = load_base(with_config(folders("sdxl"), tmp_path / "base", "vae", force_upcast=upcast), dtype=dtype)
    assert {p.dtype for p in base.vae.parameters()} == {expected}
    assert {p.dtype for p in base.unet.parameters()} == {dtype}
    assert {p.dtype for tower in base.towers for p in tower.encoder.parameters()} == {dtype}


def test_latents_are_never_clipped_though_a_scheduler_says_nothing_of_it(folders, tmp_path):
    folder = with_config(folders("sd15"), tmp_path / "base", "scheduler", leave=("clip_sample",))
    assert load_base(folder).scheduler.config.clip_sample is False


# --- a base that is not what it seems -----------------------------------------------------------------------------


def with_class(folder, target, part, name, **settings):
    """A copy of a folder, a part's class changed where both of its places name it."""
    with_config(folder, target, part, _class_name=name, **settings)
    index = target / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {part: ["diffusers", name]}))
    return target


SCHEDULERS = {
    "Playground v2.5": ("EDMDPMSolverMultistepScheduler", {"sigma_data": 0.5}, "EDMDPMSolverMultistepScheduler"),
    "a flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "FlowMatchEulerDiscreteScheduler"),
    "LCM": ("LCMScheduler", {}, "LCMScheduler"),
    "one of a stranger's": ("MyScheduler", {}, "MyScheduler"),
    "a flow by a setting": ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas True"),
    "continuous times": ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type continuous"),
    "own sigmas": ("EulerDiscreteScheduler", {"sigma_max": 120.0}, "sigma_max 120"),
    "other betas": ("DDPMScheduler", {"beta_schedule": "sigmoid"}, "beta_schedule sigmoid"),
    "pictures predicted": ("DDIMScheduler", {"prediction_type": "sample"}, "prediction_type sample"),
}


@pytest.mark.parametrize(("name", "settings", "words"), SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler_of_another_noise_is_refused_by_name(folders, tmp_path, name, settings, words):
    folder = with_class(folders("sd15"), tmp_path / "base", "scheduler", name, **settings)
    assert words in refusal(folder)
    with pytest.raises(UserError, match=words):  # inspect says no more than is so
        describe(folder)


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_a_scheduler_of_the_same_noise_is_followed_in_its_own_defaults(folders, tmp_path, name):
    leave = ("timestep_spacing", "set_alpha_to_one", "beta_start")
    folder = with_config(folders("sd15"), tmp_path / "base", "scheduler", leave, _class_name=name)
    own = getattr(diffusers, name)()
    made, stock = load_base(folder).scheduler, getattr(diffusers, name).from_pretrained(folder / "scheduler")
    assert made.config.timestep_spacing == own.config.timestep_spacing and made.config.clip_sample is False
    assert torch.equal(made.alphas_cumprod, stock.alphas_cumprod)


def test_zero_terminal_snr_of_a_folder_is_followed(folders, tmp_path):
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    base = load_base(with_class(folders("sd15"), tmp_path / "base", "scheduler", "EulerDiscreteScheduler", **settings))
    assert base.noise.prediction == "v" and base.scheduler.alphas_cumprod[-1] < 1e-6
    assert base.noise.sampler(4).timesteps.tolist() == [999, 749, 499, 249]


LATENTS = {
    "mean and spread, as Playground v2.5": {
        "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
        "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
        "scaling_factor": 0.5,
    },
    "a shift": {"shift_factor": 0.0609},
    "a spread alone": {"latents_std": [2.0, 1.0, 0.5, 1.0]},
}


@pytest.mark.parametrize("settings", LATENTS.values(), ids=LATENTS)
def test_a_vae_s_latents_have_the_range_that_its_configuration_says(small, folders, tmp_path, settings):
    base = load_base(with_config(folders("sdxl"), tmp_path / "base", "vae", **settings))
    vae, noise = small("sdxl").vae, torch.randn(2, 4, 8, 8)
    middle = torch.tensor(settings.get("latents_mean", settings.get("shift_factor", 0.0))).view(1, -1, 1, 1)
    spread = torch.tensor(settings.get("latents_std", 1.0)).view(1, -1, 1, 1)
    factor = settings.get("scaling_factor", vae.config.scaling_factor)
    with torch.no_grad():  # as StableDiffusionXLPipeline decodes, and StableDiffusionXLImg2ImgPipeline encodes
        decoded = vae.decode(noise * spread / factor + middle).sample.clamp(-1, 1)
        moments = vae.encode(decoded).latent_dist.parameters
        encoded = (moments.chunk(2, 1)[0] - middle) * factor / spread
        plain = vae.decode(noise / factor).sample.clamp(-1, 1)
    assert relative(base.decode_latents(noise), decoded) <= 1e-5 and relative(plain, decoded) > 0.001
    assert relative(base.mean_latents(base.encode_moments(decoded)), encoded) <= 1e-5


WRONG = {
    "too few means": ("vae", {"latents_mean": [1.0]}, "expected numbers, one a channel"),
    "a spread of words": ("vae", {"latents_std": ["a"] * 4}, "expected numbers, one a channel"),
    "a spread of zeros": ("vae", {"latents_std": [1.0, 0.0, 1.0, 1.0]}, "expected numbers, one a channel"),
    "one mean": ("vae", {"latents_mean": 3}, "expected numbers, one a channel"),
    "no factor": ("vae", {"scaling_factor": None}, "expected a number"),
    "a factor without end": ("vae", {"scaling_factor": float("inf")}, "expected a number"),
    "betas that are none": ("scheduler", {"beta_end": float("nan")}, "is not a whole"),
    "steps in words": ("scheduler", {"num_train_timesteps": "many"}, "is not a whole"),
    "channels in words": ("unet", {"block_out_channels": "many"}, "is not a whole"),
}


@pytest.mark.parametrize(("part", "settings", "words"), WRONG.values(), ids=WRONG)
def test_settings_that_are_no_such_numbers_are_refused(folders, tmp_path, part, settings, words):
    assert words in refusal(with_config(folders("sd15"), tmp_path / "base", part, **settings))


PARTS = {
    "a small decoder": ("vae", "AutoencoderTiny", "AutoencoderTiny as its vae"),
    "a deep compressor": ("vae", "AutoencoderDC", "AutoencoderDC as its vae"),
    "another text tower": ("text_encoder", "RobertaSeriesModelWithTransformation", "RobertaSeriesModel"),
    "a transformer": ("unet", "SD3Transformer2DModel", "SD3Transformer2DModel as its unet"),
}


@pytest.mark.parametrize(("part", "name", "words"), PARTS.values(), ids=PARTS)
def test_a_part_of_another_class_is_refused_by_name(folders, tmp_path, part, name, words):
    assert words in refusal(with_index(folders("sd15"), tmp_path / "base", **{part: ["diffusers", name]}))


UNETS = {
    "guidance as an input, as LCM": ({"time_cond_proj_dim": 16}, "time_cond_proj_dim 16"),
    "centred input": ({"center_input_sample": True}, "center_input_sample True"),
    "a function after the time": ({"time_embedding_act_fn": "silu"}, "time_embedding_act_fn silu"),
    "classes": ({"num_class_embeds": 5}, "num_class_embeds 5"),
    "no middle": ({"mid_block_type": None}, "mid_block_type None"),
    "attention to itself": (
        {"down_block_types": ("AttnDownBlock2D",) * 3 + ("DownBlock2D",)},
        "down_block_types AttnDownBlock2D",
    ),
    "a variance": ({"out_channels": 8}, "a prediction of 8 channels"),
    "other vectors of text": ({"cross_attention_dim": 48}, "of different bases"),
}


@pytest.mark.parametrize(("settings", "words"), UNETS.values(), ids=UNETS)
def test_a_unet_with_a_rule_that_is_not_followed_is_refused_by_name(small, folders, tmp_path, settings, words):
    shutil.copytree(folders("sd15"), tmp_path / "base")
    config = {name: value for name, value in small("sd15").unet.config.items() if not name.startswith("_")}
    UNet2DConditionModel(**config | settings).save_pretrained(tmp_path / "base" / "unet")
    assert words in refusal(tmp_path / "base")


def test_a_refiner_s_sizes_are_refused(small, folders, tmp_path):
    shutil.copytree(folders("sdxl"), tmp_path / "base")
    config = {name: value for name, value in small("sdxl").unet.config.items() if not name.startswith("_")}
    config |= {"projection_class_embeddings_input_dim": 64 + 5 * 256}
    UNet2DConditionModel(**config).save_pretrained(tmp_path / "base" / "unet")
    assert "as a refiner may have" in refusal(tmp_path / "base")


SIGNED = {
    "Playground v2.5": ("sdxl", {"edm_mean": torch.zeros(1, 4, 1, 1), "edm_std": torch.ones(1, 4, 1, 1)}, "Playground"),
    "CosXL": ("sdxl", {"edm_vpred.sigma_max": torch.tensor(120.0)}, "CosXL"),
    "LCM": ("sd15", {"model.diffusion_model.time_embed.cond_proj.weight": torch.ones(32, 8)}, "LCM"),
    "unCLIP": ("sd21", {"model.diffusion_model.label_emb.0.0.weight": torch.ones(128, 64)}, "unCLIP"),
}


@pytest.mark.parametrize(("kind", "changes", "words"), SIGNED.values(), ids=SIGNED)
def test_a_single_file_with_the_signs_of_other_rules_is_refused_by_name(single_file, kind, changes, words):
    assert words in refusal(single_file(kind, changes))


def test_a_vae_that_is_not_of_these_latents_is_refused_and_one_that_says_nothing_is_used(folders, tmp_path):
    """The anatomy of SD's and SDXL's VAE is one; the factor tells them apart."""
    other = with_config(folders("sd15"), tmp_path / "other", "vae", scaling_factor=0.13025)
    shifted = with_config(folders("sd15"), tmp_path / "shifted", "vae", shift_factor=0.5)
    silent = with_config(folders("sd15"), tmp_path / "silent", "vae", leave=("scaling_factor",))
    assert "its scaling_factor is 0.13025, expected 0.18215" in refusal(folders("sd15"), vae=other)
    assert "its shift_factor is 0.5" in refusal(folders("sd15"), vae=shifted)
    base = load_base(with_config(folders("sd15"), tmp_path / "base", "vae", scaling_factor=0.3), vae=silent)
    assert base.vae.config.scaling_factor == 0.3


@pytest.mark.parametrize("name", ["Img2Img", "Inpaint", "ControlNet", "ControlNetInpaint"])
def test_a_pipeline_s_folder_for_pictures_holds_a_whole_base(folders, tmp_path, name):
    for kind, words in (("sd15", "StableDiffusion"), ("sdxl", "StableDiffusionXL")):
        folder = with_index(folders(kind), tmp_path / kind, _class_name=f"{words}{name}Pipeline")
        assert load_base(folder).digest == load_base(folders(kind)).digest


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "StableDiffusionUpscalePipeline", "KolorsPipeline", None])
def test_a_pipeline_of_another_kind_is_refused_by_name(folders, tmp_path, name):
    assert f"holds a {name}" in refusal(with_index(folders("sd15"), tmp_path / "base", _class_name=name))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_in_a_folder_s_configurations_change_nothing(folders, tmp_path, encoding):
    shutil.copytree(folders("sdxl"), tmp_path / "base")
    for path in tmp_path.glob("base/**/*.json"):
        path.write_text(path.read_text(encoding="utf-8"), encoding=encoding)
    assert load_base(tmp_path / "base").digest == load_base(folders("sdxl")).digest


@pytest.mark.parametrize("text", ["[" * 5000, "[1]", "", '{"_class_name": 3'])
def test_a_folder_s_index_that_is_none_is_refused(folders, tmp_path, text):
    shutil.copytree(folders("sd15"), tmp_path / "base")
    (tmp_path / "base" / "model_index.json").write_text(text)
    assert "model_index.json" in refusal(tmp_path / "base")


def test_a_folder_of_an_inpainting_model_is_read_and_one_of_an_editing_model_is_refused(small, folders, tmp_path):
    shutil.copytree(folders("sd15"), tmp_path / "base")
    config = {name: value for name, value in small("sd15").unet.config.items() if not name.startswith("_")}
    UNet2DConditionModel(**config | {"in_channels": 9}).save_pretrained(tmp_path / "base" / "unet")
    assert load_base(tmp_path / "base").inpaints
    UNet2DConditionModel(**config | {"in_channels": 8}).save_pretrained(tmp_path / "base" / "unet")
    assert "editing" in refusal(tmp_path / "base")


def test_a_folder_whose_weights_lack_a_tensor_is_refused(folders, tmp_path):
    for part in ("unet", "vae", "text_encoder"):
        shutil.copytree(folders("sd15"), tmp_path / part)
        (path,) = (tmp_path / part / part).glob("*.safetensors")
        tensors = load_file(path)
        tensors.pop(sorted(tensors)[5])
        save_file(tensors, path, {"format": "pt"})
        assert "is not a whole" in refusal(tmp_path / part)


# --- a hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """``hub(cached=..., online=...)`` says what the hub's client answers with: a folder, or an error to raise.

    Returns the list of requests: (repository, from the cache only).
    """

    def answer(cached=None, online=None):
        asked = []

        def snapshot_download(repository, local_files_only=False, **options):
            asked.append((repository, local_files_only))
            assert "unet/*.safetensors" in options["allow_patterns"]
            found = (cached if local_files_only else online) or LocalEntryNotFoundError("nothing in the cache")
            if isinstance(found, Exception):
                raise found
            return str(found)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return asked

    return answer


NAMES = {
    "sd15": FAMILIES["sd15"].hub,
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "owner/model": "owner/model",
    "SG161222/Realistic_Vision_V5.1_noVAE": "SG161222/Realistic_Vision_V5.1_noVAE",
    "owner/model-1.0": "owner/model-1.0",
}


@pytest.mark.parametrize(("name", "repository"), NAMES.items())
def test_a_cached_name_is_loaded_and_no_network_asked(toy_folder, toy_base, hub, name, repository):
    asked = hub(cached=toy_folder)
    base = load_base(name)
    assert asked == [(repository, True)]
    assert (base.name, base.digest) == (name, toy_base.digest)


@pytest.mark.parametrize("error", [None, OSError("no route\nto host"), RuntimeError("connection refused")])
def test_a_name_that_is_nowhere_is_refused_in_one_sentence(hub, error):
    hub(online=error)
    sentence = refusal("owner/model")
    assert '"owner/model" is neither in the local cache nor could be fetched' in sentence


def test_a_cache_that_holds_configurations_alone_is_completed(toy_folder, toy_base, hub, tmp_path):
    shutil.copytree(toy_folder, tmp_path / "partial", ignore=shutil.ignore_patterns("*.safetensors"))
    asked = hub(cached=tmp_path / "partial", online=toy_folder)
    assert load_base("sd15").digest == toy_base.digest
    assert asked == [(FAMILIES["sd15"].hub, True), (FAMILIES["sd15"].hub, False)]


@pytest.mark.parametrize("name", ["./owner/model", "owner/missing.safetensors", "a/b/c", "owner/old.ckpt"])
def test_a_path_that_is_not_there_is_never_asked_of_a_hub(hub, name):
    asked = hub()
    assert "There is no base" in refusal(name)
    assert asked == []


# --- LoRA ---------------------------------------------------------------------------------------------------------

RANK = 3


def draw_pairs(module, names, seed=0, rank=RANK):
    """A LoRA's matrices (down, up) for some of a network's layers, by the layers' names."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name in names:
        out, into, *kernel = module.get_submodule(name).weight.shape
        down = torch.randn(rank, into, *kernel, generator=generator) / into
        pairs[name] = (down, torch.randn(out, rank, *[1] * len(kernel), generator=generator))
    return pairs


def layers_of(module, endings):
    return [name for name, _ in module.named_modules() if name.endswith(endings)]


def change(pair):
    down, up = pair
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def kohya(prefix, pairs, alpha):
    written = {}
    for name, (down, up) in pairs.items():
        layer = f"{prefix}_{name.replace('.', '_')}"
        written |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
        written[f"{layer}.alpha"] = torch.tensor(float(alpha))
    return written


def diffusers_style(prefix, pairs):
    written = {}
    for name, (down, up) in pairs.items():
        written |= {f"{prefix}.{name}.lora_A.weight": down, f"{prefix}.{name}.lora_B.weight": up}
    return written


ATTENTION = ("attn1.to_q", "attn2.to_k", "attn1.to_v", "attn2.to_out.0")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def assert_merged(merged, plain, changes):
    """Every weight of a network is the plain one, but for the layers named in ``changes``."""
    ours, theirs = merged.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    assert changes
    for name, weight in theirs.items():
        expected = weight + changes.get(name.removesuffix(".weight"), 0)
        assert (ours[name] - expected).abs().max() <= 1e-6, name
    for layer, moved_by in changes.items():
        assert moved_by.abs().max() > 1e-3, layer  # else merging nothing would pass


def test_a_kohya_lora_is_merged_exactly(toy_folder, toy_base, tmp_path):
    unet, text = toy_base.unet, toy_base.towers[0].encoder
    in_unet = draw_pairs(unet, layers_of(unet, (*ATTENTION, "proj_in")))
    in_text = draw_pairs(text, layers_of(text, (*TEXT_ATTENTION, "mlp.fc1")), seed=1)
    words = {f"text_model.{name.removeprefix('text_model.')}": pair for name, pair in in_text.items()}
    save_file(kohya("lora_unet", in_unet, alpha=2) | kohya("lora_te", words, alpha=2), tmp_path / "style.safetensors")
    before = toy_base.digest
    base = load_base(toy_folder, loras=[(tmp_path / "style.safetensors", 0.7)])
    factor = 0.7 * 2 / RANK
    assert_merged(base.unet, unet, {name: factor * change(pair) for name, pair in in_unet.items()})
    assert_merged(base.towers[0].encoder, text, {name: factor * change(pair) for name, pair in in_text.items()})
    assert not any(p.requires_grad for module in networks(base).values() for p in module.parameters())
    assert load_base(toy_folder).digest == before != base.digest


def test_every_layer_of_a_lora_has_its_own_rank_and_strength(toy_folder, toy_base, tmp_path):
    unet = toy_base.unet
    written, changes = {}, {}
    for i, ending in enumerate((*ATTENTION, "proj_in", "conv1")):
        for j, name in enumerate(layers_of(unet, ending)):
            rank, alpha = 1 + (i + j) % 3, (None, 0.5, 2, 3)[(i + 2 * j) % 4]
            pairs = draw_pairs(unet, [name], seed=10 * i + j, rank=rank)
            layer = kohya("lora_unet", pairs, alpha or 0)
            written |= layer if alpha else {key: value for key, value in layer.items() if "alpha" not in key}
            changes[name] = 0.7 * (alpha / rank if alpha else 1) * change(pairs[name])
    save_file(written, tmp_path / "mixed.safetensors")
    base = load_base(toy_folder, loras=[(tmp_path / "mixed.safetensors", 0.7)])
    assert_merged(base.unet, unet, changes)


def test_loras_of_diffusers_add_up(toy_folder, toy_base, tmp_path):
    unet = toy_base.unet
    first = draw_pairs(unet, layers_of(unet, ATTENTION))
    second = draw_pairs(unet, layers_of(unet, ("attn1.to_q", "ff.net.2")), seed=1)
    for name, pairs in (("first", first), ("second", second)):
        save_file(diffusers_style("unet", pairs), tmp_path / f"{name}.safetensors")
    loras = [(tmp_path / "first.safetensors", 0.5), (tmp_path / "second.safetensors", -1.25)]
    base = load_base(toy_folder, loras=loras)
    changes = {name: 0.5 * change(pair) for name, pair in first.items()}
    for name, pair in second.items():
        changes[name] = changes.get(name, 0) - 1.25 * change(pair)
    assert_merged(base.unet, unet, changes)


def test_a_lora_of_sdxl_reaches_the_unet_by_its_original_names_and_both_towers(small, folders, tmp_path):
    pipe = small("sdxl")
    in_unet = draw_pairs(pipe.unet, layers_of(pipe.unet, ATTENTION))
    places = unet_places(pipe.unet)
    named = {next(iter(moved({f"{name}.weight": 0}, places))).removesuffix(".weight"): p for name, p in in_unet.items()}
    written = kohya("lora_unet", named, alpha=RANK)
    towers = []
    for i, encoder in enumerate([pipe.text_encoder, pipe.text_encoder_2], 1):
        pairs = draw_pairs(encoder, layers_of(encoder, TEXT_ATTENTION), seed=i)
        words = {f"text_model.{name.removeprefix('text_model.')}": pair for name, pair in pairs.items()}
        written |= kohya(f"lora_te{i}", words, alpha=RANK)
        towers.append((encoder, {name: 0.5 * change(pair) for name, pair in pairs.items()}))
    save_file(written, tmp_path / "xl.safetensors")
    base = load_base(folders("sdxl"), loras=[(tmp_path / "xl.safetensors", 0.5)])
    assert_merged(base.unet, pipe.unet, {name: 0.5 * change(pair) for name, pair in in_unet.items()})
    for tower, (encoder, changes) in zip(base.towers, towers, strict=True):
        assert_merged(tower.encoder, encoder, changes)


def wrong_width(toy_base):
    pairs = draw_pairs(toy_base.unet, layers_of(toy_base.unet, ATTENTION))
    return diffusers_style("unet", {name: (torch.randn(RANK, 17), up) for name, (_, up) in pairs.items()})


def wrong_layers(toy_base):
    pair = (torch.randn(RANK, 8), torch.randn(8, RANK))
    return diffusers_style("unet", {"down_blocks.7.attentions.0.transformer_blocks.0.attn1.to_q": pair})


def wrong_network(toy_base):
    pair = (torch.randn(RANK, 8), torch.randn(8, RANK))
    return diffusers_style("transformer", {"single_transformer_blocks.0.attn.to_q": pair})


def some_wrong_layers(toy_base):
    pairs = draw_pairs(toy_base.unet, layers_of(toy_base.unet, ATTENTION))
    return diffusers_style("unet", pairs) | wrong_layers(toy_base)


def no_lora(toy_base):
    return {"weight": torch.randn(3, 3)}


@pytest.mark.parametrize("make", [wrong_width, wrong_layers, some_wrong_layers, wrong_network, no_lora])
def test_a_lora_of_another_base_is_refused(toy_folder, toy_base, tmp_path, make):
    save_file(make(toy_base), tmp_path / "other.safetensors")
    sentence = refusal(toy_folder, loras=[(tmp_path / "other.safetensors", 1.0)])
    assert "other.safetensors does not fit the base" in sentence


def test_without_peft_a_lora_is_refused_with_what_to_install(toy_folder, toy_base, tmp_path, monkeypatch):
    pairs = draw_pairs(toy_base.unet, layers_of(toy_base.unet, ATTENTION))
    save_file(diffusers_style("unet", pairs), tmp_path / "style.safetensors")
    monkeypatch.setitem(sys.modules, "peft.tuners.tuners_utils", None)
    assert "pip install 'controlkit[lora]'" in refusal(toy_folder, loras=[(tmp_path / "style.safetensors", 1.0)])


# --- textual inversion --------------------------------------------------------------------------------------------


def draw_words(number, width, seed=0):
    return 0.5 * torch.randn(number, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("layout", ["diffusers", "web UI"])
def test_a_new_word_reads_as_in_the_stock_pipeline(small, folders, tmp_path, number, layout):
    vectors = draw_words(number, 32)
    if layout == "diffusers":
        path = tmp_path / "EasySparkle.safetensors"
        save_file({"<sparkle>": vectors if number > 1 else vectors[0]}, path)
    else:
        path = tmp_path / "EasySparkle.pt"
        torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "x", "step": 9}, path)
    prompts = ["a red apple, EasySparkle, on teal", "EasySparkle EasySparkle", "gold"]
    base = load_base(folders("sd15"), embeddings=[path])
    pipe = StableDiffusionPipeline.from_pretrained(folders("sd15"))
    first = len(pipe.tokenizer)
    # The stock pipeline reads one vector only of a word with capitals.
    pipe.load_textual_inversion(vectors, token="easysparkle")
    stock_tokens, _ = stock_text(pipe, [prompt.lower() for prompt in prompts])
    assert torch.equal(base.encode_text(prompts).tokens, stock_tokens)
    rows = base.towers[0].tokenize(prompts)
    assert [(row >= first).sum().item() for row in rows] == [number, 2 * number, 0]
    assert torch.equal(base.towers[0].encoder.get_input_embeddings().weight[first:], vectors)
    assert not any(p.requires_grad for p in base.towers[0].encoder.parameters())


def test_a_new_word_of_sdxl_is_read_by_both_towers(folders, tmp_path):
    words = {"clip_g": draw_words(2, 64), "clip_l": draw_words(2, 32, seed=1)}
    save_file(words, tmp_path / "sparkle.safetensors")
    base = load_base(folders("sdxl"), embeddings=[tmp_path / "sparkle.safetensors"])
    pipe = StableDiffusionXLPipeline.from_pretrained(folders("sdxl"))
    pipe.load_textual_inversion(words["clip_l"], "sparkle", pipe.tokenizer, pipe.text_encoder)
    pipe.load_textual_inversion(words["clip_g"], "sparkle", pipe.tokenizer_2, pipe.text_encoder_2)
    assert_same_text(base, pipe, ["a sparkle apple", "sparkle"])
    plain = load_base(folders("sdxl")).encode_text(["sparkle"])
    assert relative(base.encode_text(["sparkle"]).pooled, plain.pooled) > 0.01


UNFIT_WORDS = {
    "too wide": ("sd15", {"<x>": draw_words(1, 48)}, "[48] wide where"),
    "of one tower": ("sdxl", {"<x>": draw_words(1, 32)}, "[32] wide where"),
    "of SDXL": ("sd15", {"clip_l": draw_words(1, 32), "clip_g": draw_words(1, 64)}, "[32, 64] wide where"),
    "none at all": ("sd15", {"step": torch.tensor(9)}, "[] wide where"),
}


@pytest.mark.parametrize(("kind", "words", "sentence"), UNFIT_WORDS.values(), ids=UNFIT_WORDS)
def test_words_of_another_base_are_refused(folders, tmp_path, kind, words, sentence):
    save_file(words, tmp_path / "unfit.safetensors")
    refused = refusal(folders(kind), embeddings=[tmp_path / "unfit.safetensors"])
    assert "unfit.safetensors" in refused
    assert sentence in refused


def test_a_new_word_that_the_base_knows_already_is_refused(folders, tmp_path):
    save_file({"<x>": draw_words(1, 32)}, tmp_path / "a.safetensors")
    assert "rename" in refusal(folders("sd15"), embeddings=[tmp_path / "a.safetensors"])


# --- weights from strangers ---------------------------------------------------------------------------------------


@pytest.fixture
def no_paths(monkeypatch):
    """Libraries that read files of weights themselves, and loaders of pickles, fail."""

    def asked(*args, **kwargs):
        raise AssertionError("a library was given a file")

    for kind in (diffusers.ModelMixin, CLIPTextModel, StableDiffusionPipeline):
        monkeypatch.setattr(kind, "from_pretrained", asked)
    for kind in (StableDiffusionPipeline, StableDiffusionXLPipeline, AutoencoderKL, UNet2DConditionModel):
        monkeypatch.setattr(kind, "from_single_file", asked)
    for module, name in [(torch, "load"), (pickle, "loads"), (pickle, "Unpickler"), (safetensors.torch, "load_file")]:
        monkeypatch.setattr(module, name, asked)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_a_file_is_what_it_holds_whatever_its_name_and_no_library_opens_it(
    stock, originals, toy_families, tmp_path, no_paths, kind, ending
):
    path, other = tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"
    save_file(originals(kind), path)
    torch.save({"state_dict": originals(kind)}, other)
    for file in (path, other):
        with limited():
            assert_same_weights(load_base(file), stock(kind))


def both(tensors, code):
    """A file of safetensors that a loader of pickles takes for one, which runs ``code``.

    Its first bytes say how long the header is, and that a string follows which covers the header's beginning; the rest
    is skipped in short strings, up to the first tensor's bytes.
    """
    tensors = {"code": torch.frombuffer(bytearray(code), dtype=torch.uint8), **tensors}
    entries, place = {}, 0
    for name, tensor in tensors.items():
        kind = "U8" if tensor.dtype == torch.uint8 else "F32"
        entries[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [place, place + tensor.nbytes]}
        place += tensor.nbytes
    begin = json.dumps(entries)[:-1] + ', "__metadata__": {"a": "'
    for length in range(len(begin) + 3, len(begin) + 99):
        blocks, last = divmod(91 + 255 * length - 2 - 35, 128)
        if 35 + last < 127 and 35 + last != ord("\\"):
            break
    text = begin.ljust(length - 3, ".") + ("U~" + "." * 126) * blocks + f"U{chr(35 + last)}{'.' * (32 + last)}" + '"}}'
    assert len(text) == ord("X") + 256 * length
    data = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    return b"X" + length.to_bytes(7, "little") + text.encode() + data


@pytest.mark.parametrize("ending", ["safetensors", "ckpt", "pt"])
def test_a_vae_that_is_also_a_pickle_is_read_as_the_one_that_was_checked(vaes, folders, tmp_path, no_paths, ending):
    ran, path = tmp_path / "ran", tmp_path / f"both.{ending}"
    code = f"cposix\nsystem\n(S'touch {ran}'\ntR.".encode()
    path.write_bytes(both(load_file(vaes[0][3]), code + bytes(-len(code) % 8)))
    assert [op.name for op, _, _ in pickletools.genops(path.read_bytes())][-2:] == ["REDUCE", "STOP"]
    base = load_base(folders("sd15"), vae=path)
    assert all(torch.equal(base.vae.state_dict()[name], value) for name, value in vaes[1].items())
    assert not ran.exists()


@pytest.mark.parametrize("name", ["vae.ckpt", "vae.pt", "vae.safetensors"])
def test_a_vae_passes_the_door_that_all_weights_pass(vaes, folders, tmp_path, no_paths, name):
    tensors, mark = load_file(vaes[0][3]), tmp_path / "ran"
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / name)
    base = load_base(folders("sd15"), vae=tmp_path / name)
    assert all(torch.equal(base.vae.state_dict()[name], value) for name, value in vaes[1].items())
    for thing, words in ((Malice(mark), "would run posix.system"), (Takes(), "builtin__.bytearray")):
        torch.save({"state_dict": tensors, "callbacks": thing}, tmp_path / name)
        with limited():
            assert words in refusal(folders("sd15"), vae=tmp_path / name)
    assert not mark.exists()


class Takes:
    def __reduce__(self):
        return bytearray, (2**31,)


def test_a_checkpoint_of_more_parts_than_any_has_is_refused_at_once(single_file):
    many = {f"model.diffusion_model.input_blocks.{i}.0.in_layers.0.weight": torch.ones(1) for i in range(20_000)}
    with limited():
        assert "tensors where expected are at most" in refusal(single_file("sd15", many))


SHAPES = {
    "no width": {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.tensor(32.0)},
    "a convolution of one number": {"first_stage_model.encoder.mid.attn_1.q.weight": torch.tensor(1.0)},
    "half a layer": {"first_stage_model.encoder.down.0.downsample.conv.bias": None},
    "a tower of one number": {"cond_stage_model.transformer.text_model.final_layer_norm.bias": torch.tensor(1.0)},
    "nothing in its U-Net": {"model.diffusion_model.out.2.weight": torch.ones(0, 2**40)},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_a_checkpoint_of_strange_shapes_is_refused(single_file, changes):
    with limited():
        refusal(single_file("sd15", changes))


def test_a_folder_s_pickles_are_not_opened(folders, tmp_path, no_paths):
    shutil.copytree(folders("sd15"), tmp_path / "base")
    for part in ("unet", "vae", "text_encoder"):
        [path] = (tmp_path / "base" / part).glob("*.safetensors")
        torch.save({"x": Takes()}, path.with_suffix(".bin"))
    load_base(tmp_path / "base")
    path.unlink()
    with limited():
        assert "safetensors" in refusal(tmp_path / "base")


STRANGE_LORAS = {
    "a rank of 2**40": lambda toy: diffusers_style("unet", {"conv_in": (torch.ones(2**40, 0), torch.ones(0, 2**40))}),
    "many layers": lambda toy: {f"unet.down_blocks.{i}.lora_A.weight": torch.ones(1, 1) for i in range(30_000)},
    "dots": lambda toy: {f"unet.{'.' * 200}.lora_A.weight": torch.ones(2, 2)},
    "numbers": lambda toy: {"unet.lora_A.weight": torch.tensor(3.0), "unet.lora_B.weight": torch.tensor(3.0)},
    "one half": lambda toy: {"unet.conv_in.lora_A.weight": torch.ones(4, 4, 3, 3)},
    "of nowhere": lambda toy: {"lora_unet_.lora_down.weight": torch.ones(4, 4), "lora_unet_.alpha": torch.ones(0)},
    "an alpha alone": lambda toy: {"lora_unet_conv_in.alpha": torch.ones(3)},
    "DoRA's": lambda toy: diffusers_style("unet", {"conv_in": (torch.ones(1, 4, 3, 3), torch.ones(8, 1, 1, 1))})
    | {"unet.conv_in.lora_magnitude_vector": torch.ones(3)},
}  # fmt: skip


@pytest.mark.parametrize("make", STRANGE_LORAS.values(), ids=STRANGE_LORAS)
def test_a_strange_lora_is_refused_at_once(toy_folder, toy_base, tmp_path, make):
    save_file(make(toy_base), tmp_path / "other.safetensors")
    with limited():
        refusal(toy_folder, loras=[(tmp_path / "other.safetensors", 1.0)])


STRANGE_WORDS = {
    "one number": {"clip_l": torch.tensor(1.0), "clip_g": torch.tensor(1.0)},
    "more than any prompt has": {"<x>": torch.zeros(20_000, 32)},
    "no words": {"<x>": torch.zeros(0, 32)},
}


@pytest.mark.parametrize("words", STRANGE_WORDS.values(), ids=STRANGE_WORDS)
def test_strange_words_are_refused_at_once(folders, tmp_path, words):
    save_file(words, tmp_path / "odd.safetensors")
    with limited():
        refusal(folders("sd15"), embeddings=[tmp_path / "odd.safetensors"])


# --- at full size -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_single_file_of_sd15_at_full_size_is_the_pipeline_it_was_made_of(tmp_path):
    if pytest.importorskip("psutil").virtual_memory().available < 10 * 2**30:
        pytest.skip("takes 10 GB of memory")
    with torch.device("meta"):
        parts = {
            "unet": UNet2DConditionModel(cross_attention_dim=768),
            "vae": make_vae((128, 256, 512, 512)),
            "text_encoder": make_tower(clip_tokenizer(), 768, "quick_gelu", layers=12, heads=12, mlp=3072),
        }
    generator = torch.Generator().manual_seed(0)
    for name, module in parts.items():
        parts[name] = module.half().to_empty(device="cpu").eval().requires_grad_(False)
        for parameter in module.parameters():
            parameter.normal_(std=0.02, generator=generator)
    pipe = as_pipeline(parts | {"tokenizer": clip_tokenizer(), "scheduler": DDIMScheduler()})
    path = tmp_path / "full.safetensors"
    try:
        save_file(original(pipe), path)
        assert_same_weights(load_base(path, dtype=torch.float16), pipe)
    finally:
        path.unlink(missing_ok=True)


def test_a_folder_that_holds_half_precision_files_alone_is_read(xl_folder, tmp_path):
    shutil.copytree(xl_folder, tmp_path / "half")
    for path in list((tmp_path / "half").rglob("*.safetensors")):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    assert load_base(tmp_path / "half").digest == load_base(xl_folder).digest
