"""Bases, loaded from the shipped weights, a diffusers folder, a single-file checkpoint or a model hub.

Only a hub's name may ask a network for anything; all else is read and configured from the disk alone.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from controlkit.backbones.noise import Prediction
from controlkit.backbones.parts import make_network, open_part, read_tokenizer
from controlkit.backbones.protocol import Backbone
from controlkit.backbones.rules import (
    channels_read,
    check_folder,
    check_signs,
    check_text,
    check_words,
    config_path,
    ddim_config,
    latent_space,
    read_settings,
)
from controlkit.backbones.text import TextTower
from controlkit.backbones.unet import UNetBase
from controlkit.backbones.unet_families import (
    FAMILIES,
    Family,
    clip_tokenizer,
    family_of_width,
    part_configs,
    scheduler_config,
)
from controlkit.errors import Invalid, Mismatch, NotFound, Unsupported, UserError, nearest, one_line
from controlkit.files import write_atomic
from controlkit.hub import meant_path, names_a_repository, shipped_names, shipped_path, snapshot
from controlkit.precision import weights_type
from controlkit.tensors import PICKLES, TensorFile, of_tensors, open_tensors

_PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
_HUB_FILES = ["model_index.json", "*/*.json", "*/*.txt", *(f"{part}/*.safetensors" for part in ("vae", "unet"))]
_HUB_FILES += ["text_encoder/*.safetensors", "text_encoder_2/*.safetensors"]
_FILES = (".safetensors", *PICKLES)
_HUB_LEFT = ["*.fp16.*", "*non_ema*", "safety_checker/*", "*flax*", "*openvino*"]
Before = dict[Tensor, Tensor]
"""Weights of a base, each the parameter itself, with what they were before something was merged into them."""


def load_base(
    source: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    prediction: Prediction | None = None,
    loras: Sequence[tuple[Path, float]] = (),
    embeddings: Sequence[Path] = (),
    vae: str | Path | None = None,
) -> UNetBase:
    """Load a base, frozen.

    Args:
        source: ``mini``; ``sd15``, ``sd21`` or ``sdxl``; a diffusers folder; a single ``.safetensors`` or ``.ckpt``
            file; or a hub's name (``owner/model``), taken from the local cache if it is there.
        dtype: of the weights; the VAE stays in float32 where float16 overflows it. ``auto`` is for making pictures:
            half precision where ``device`` is no slower with it (``precision.weights_type``). Training takes float32.
        prediction: ``eps`` or ``v``, where a single file's own signs of it mislead.
        loras: LoRA files with their weights, merged into the base; read by diffusers and peft. Or differences, as
            written by a run that trained its base, too.
        embeddings: textual inversions; each is written in a prompt as its file's name.
        vae: another VAE of the same anatomy in the place of the base's own: a diffusers folder, a file, a hub's name.

    Raises ``NotFound`` if there is no such base, file or package; ``Invalid`` for damaged or incomplete files;
    ``Unsupported`` for a model that is no text-to-image base of these families; ``Mismatch`` for a LoRA, difference,
    textual inversion or VAE of another base.
    """
    text = str(source)
    if dtype == "auto":
        dtype = weights_type(torch.device(device).type)
    shipped = [name for name in shipped_names() if _holds_base(shipped_path(name))]
    path = meant_path(source, [*shipped, *FAMILIES], _holds_base)
    if path is None:
        base = _from_folder(text, shipped_path(text) if text in shipped else _from_hub(FAMILIES[text].hub), dtype)
    elif path.is_file():
        base = _from_single_file(path, dtype, prediction)
    elif path.is_dir():
        base = _from_folder(path.name, path, dtype)
    elif _names_a_repository(text):
        base = _from_folder(text, _from_hub(text), dtype)
    else:
        raise NotFound(
            f'There is no base "{source}": expected a name, a diffusers pipeline folder (with a model_index.json), a '
            f".safetensors or .ckpt file, or a hub's owner/model; {nearest(text, ['mini', *FAMILIES])}"
        )
    if vae:
        base = _with_vae(base, vae, dtype)
    merge_loras(base, loras)
    for embedding in embeddings:
        add_words(base, embedding)
    return base.to(device)


def _names_a_repository(text: str) -> bool:
    """Whether this may be a hub's name: its names hold dots too (``owner/model-1.0``), so only files' endings count."""
    return names_a_repository(text) and not text.endswith(_FILES)


def _holds_base(path: Path) -> bool:
    return (path / "model_index.json").is_file()


def _from_hub(repository: str) -> Path:
    def is_whole(folder: Path) -> bool:
        return all(any((folder / part).glob("*.safetensors")) for part in ("vae", "text_encoder", "unet"))

    return snapshot(repository, "base", _HUB_FILES, _HUB_LEFT, is_whole)


def _vae_from_hub(repository: str) -> Path:
    def is_whole(folder: Path) -> bool:
        return any(folder.glob("*.safetensors")) or any(folder.glob("vae/*.safetensors"))

    files = ["config.json", "*.safetensors", "*.safetensors.index*.json", "vae/*.json", "vae/*.safetensors"]
    return snapshot(repository, "VAE", files, _HUB_LEFT, is_whole)


# --- a diffusers folder -------------------------------------------------------------------------------------------


def _from_folder(name: str, folder: Path, dtype: torch.dtype) -> UNetBase:
    kind, content, settings = check_folder(folder)
    second = ("tokenizer_2", "text_encoder_2") if "XL" in kind else ()
    for part in (*_PARTS, *second):
        if not (folder / part).is_dir():
            raise Invalid(f"{folder} lacks the folder {part}: expected a whole {kind} folder.")
        if part in settings and not config_path(folder, part).is_file():
            raise Invalid(f"{folder} lacks {config_path(folder, part)}: expected a whole {kind} folder.")
    # Here and not above: these imports take seconds, and --help must not.
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    def network(kind: Any, part: str, dtype: torch.dtype = dtype) -> Any:
        return make_network(kind, settings[part], open_part(folder, part), dtype)

    def tower(number: str, kind: Any) -> TextTower:
        tokenizer, encoder = read_tokenizer(folder, f"tokenizer{number}"), network(kind, f"text_encoder{number}")
        check_words(folder, tokenizer, encoder)
        return TextTower(tokenizer, encoder, penultimate=bool(second))

    try:
        scheduler = DDIMScheduler(**ddim_config(settings["scheduler"]))
        count = scheduler.config.num_train_timesteps
        if not (len(scheduler.alphas_cumprod) == count and scheduler.alphas_cumprod.isfinite().all()):
            raise ValueError(f"its scheduler's betas are no numbers, one for each of {count} timesteps")
        vae, unet = network(AutoencoderKL, "vae", torch.float32), network(UNet2DConditionModel, "unet")
        if unet.config.sample_size is None:
            raise ValueError("its unet has no sample_size")
        towers = [tower("", CLIPTextModel), *([tower("_2", CLIPTextModelWithProjection)] if second else [])]
    except UserError:
        raise
    except Exception as error:  # the libraries raise anything where a stranger's settings do not go together
        raise Invalid(f"{folder} is not a whole {kind} folder ({one_line(error)}).") from error
    zeros = bool(second) and bool(content.get("force_zeros_for_empty_prompt", True))
    check_text(folder, [tower.encoder for tower in towers], unet.config)
    latent_space(vae.config)
    return _assembled(name, vae, towers, unet, scheduler, zeros, dtype)


def _assembled(
    name: str, vae: Any, towers: list[TextTower], unet: Any, scheduler: Any, zeros_for_none: bool, dtype: torch.dtype
) -> UNetBase:
    overflows = dtype == torch.float16 and vae.config.force_upcast
    nn.Module.to(vae, torch.float32 if overflows else dtype)  # diffusers' own warns about other classes
    return UNetBase(name, vae, towers, unet, scheduler, zeros_for_none)


# --- a single file ------------------------------------------------------------------------------------------------

_UNET = "model.diffusion_model."
_WIDTH = f"{_UNET}input_blocks.{{}}.1.transformer_blocks.0.attn2.to_k.weight"
_LAST_NORM = f"{_UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_V_SPREAD = 0.09  # of that bias: above it the SD 2 checkpoint predicts v (ComfyUI's sign, supported_models.py)


def _from_single_file(path: Path, dtype: torch.dtype, prediction: Prediction | None) -> UNetBase:
    header = open_tensors(path)
    family = _family_of(header)
    check_signs(path, header.shapes, bool(family.pooled_width))
    family = replace(family, inpaints=channels_read(header.shapes) > 4)
    prediction = prediction or _prediction_of(header, family)
    if family.prediction == "v" and prediction == "eps":  # SD 2's eps checkpoints are its 512-pixel ones
        family = replace(family, latent_size=64)
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    wide, configs = len(family.towers) > 1, part_configs(family)

    def network(kind: Any, part: str, dtype: torch.dtype = dtype) -> Any:
        return make_network(kind, configs[part], held[part], dtype)

    def tower(part: str, row: tuple[Any, ...]) -> TextTower:
        encoder = network(CLIPTextModelWithProjection if row[-1] else CLIPTextModel, part)
        return TextTower(clip_tokenizer("<|endoftext|>" if row is FAMILIES["sd15"].towers[0] else "!"), encoder, wide)

    try:
        held = _parts_of(header, family)
        vae = network(AutoencoderKL, "vae", torch.float32 if family.vae_needs_float32 else dtype)
        unet = network(UNet2DConditionModel, "unet")
        towers = [tower(part, row) for part, row in zip(("text_encoder", "text_encoder_2"), family.towers)]  # noqa: B905
    except UserError:
        raise
    except Exception as error:  # what a part lacks, or has in another shape, surfaces as anything in its renaming
        raise Invalid(f"{path} is not a whole {family.name} checkpoint ({one_line(error)}).") from error
    scheduler = DDIMScheduler.from_config(scheduler_config(prediction, zero_snr="ztsnr" in header.shapes))
    return _assembled(path.stem, vae, towers, unet, scheduler, wide, dtype)


_OF_PARTS = re.compile(r"(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner\.embedders\.[01])\.")
_OF_VAE = re.compile(r"(first_stage_model\.|vae\.)?(encoder|decoder|quant_conv|post_quant_conv)\.")
_MOST_TENSORS = 4096  # SDXL has 2,600; the time to rename them grows with their square


def _read_named(header: TensorFile, names: re.Pattern[str], most: int = _MOST_TENSORS) -> dict[str, Tensor]:
    """The tensors whose names begin so; ``Invalid`` for more than ``most``."""
    found = [name for name in header.shapes if names.match(name)]
    if len(found) > most:
        raise Invalid(f"{header.path} has {len(found):,} tensors where expected are at most {most:,}: it is none.")
    return header.read(found, finite=most != _MOST_TENSORS)  # those of a whole base are many, and stay mapped


def _parts_of(header: TensorFile, family: Family) -> dict[str, TensorFile]:
    """The parts of a checkpoint in the original layout, each by the names that its network has in the libraries."""
    from diffusers.loaders import single_file_utils as original

    tensors, configs = _read_named(header, _OF_PARTS), part_configs(family)
    held = {
        "unet": original.convert_ldm_unet_checkpoint(tensors, configs["unet"]),
        "vae": original.convert_ldm_vae_checkpoint(tensors, configs["vae"]),
        "text_encoder": original.convert_ldm_clip_checkpoint(tensors),
    }
    last = list(configs)[-1]  # the tower that may be OpenCLIP's
    prefix = "conditioner.embedders.1.model." if last == "text_encoder_2" else "cond_stage_model.model."
    sized = SimpleNamespace(config=SimpleNamespace(hidden_size=configs[last]["hidden_size"]))
    held[last] = held.get(last, {}) | original.convert_open_clip_checkpoint(sized, tensors, prefix=prefix)
    return {part: _renamed(header, named) for part, named in held.items()}


def _renamed(header: TensorFile, named: Mapping[str, Tensor | None]) -> TensorFile:
    """The header of tensors that were read from a file, under other names; None is what it lacks."""
    return of_tensors(header.path, {name: tensor for name, tensor in named.items() if tensor is not None})


def _family_of(header: TensorFile) -> Family:
    # The first attention of SD sits in input block 1, of SDXL in 4.
    widths = [sum(header.shapes[_WIDTH.format(at)][-1:]) for at in (1, 4) if _WIDTH.format(at) in header.shapes]
    if not widths:
        raise Unsupported(
            f"{header.path} holds no {_UNET}* tensors: expected a Stable Diffusion checkpoint in its original layout. "
            "`controlkit inspect` says what a file is."
        )
    family = family_of_width(widths[0])
    if family is None:
        known = ", ".join(f"{row.text_width} ({row.name})" for row in FAMILIES.values())
        raise Unsupported(f"{header.path} reads prompts {widths[0]} wide, which no base known here does: {known}.")
    return family


def _prediction_of(header: TensorFile, family: Family) -> Prediction:
    """The file's prediction. Fine-tuners mark v by an empty tensor, and SD 2 shows it in a bias."""
    if "v_pred" in header.shapes:
        return "v"
    if family.prediction == "v" and _LAST_NORM in header.shapes:
        bias = header.read([_LAST_NORM])[_LAST_NORM].float()
        return "v" if bias.numel() and bias.std(correction=0) > _V_SPREAD else "eps"
    return family.prediction


# --- another VAE --------------------------------------------------------------------------------------------------


def _open_vae(path: Path, settings: Mapping[str, Any]) -> TensorFile:
    """A file of a VAE, or of a checkpoint with one, in diffusers' layout or the original one, by diffusers' names."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    header = open_tensors(path)
    if any(name.startswith("encoder.down_blocks.") for name in header.shapes):
        return header
    return _renamed(header, convert_ldm_vae_checkpoint(_read_named(header, _OF_VAE), settings))


def _with_vae(base: UNetBase, source: str | Path, dtype: torch.dtype) -> UNetBase:
    """The base with another VAE; a file's is taken to be configured as the base's own."""
    from diffusers import AutoencoderKL

    path = Path(source)
    try:
        if path.is_file():
            settings = {key: value for key, value in base.vae.config.items() if not key.startswith("_")}
            vae = make_network(AutoencoderKL, settings, _open_vae(path, settings), torch.float32)
        else:
            if not path.is_dir() and _names_a_repository(str(source)):
                path = _vae_from_hub(str(source))
            part = "vae" if (path / "vae").is_dir() else ""
            vae = make_network(AutoencoderKL, read_settings(path, "vae", part), open_part(path, part), torch.float32)
    except Unsupported:
        raise
    except Exception as error:  # as with a single file
        raise Invalid(
            f"{source} is no whole VAE ({one_line(error)}): expected a diffusers folder, a file in the original layout "
            "or a hub's name."
        ) from error
    read, made = base.vae.config, vae.config
    if (read.latent_channels, len(read.block_out_channels)) != (made.latent_channels, len(made.block_out_channels)):
        raise Mismatch(
            f'{source} makes latents of {made.latent_channels} channels in {len(made.block_out_channels)} levels; "'
            f'{base.name}" reads those of {read.latent_channels} in {len(read.block_out_channels)}.'
        )
    own, theirs = latent_space(read), latent_space(made)
    unsaid = made.get("_use_default_values", [])  # which a file leaves to the class
    vae.register_to_config(**{key: own[key] for key in own if key in unsaid})
    if differing := [key for key in own if key not in unsaid and theirs[key] != own[key]]:
        raise Mismatch(
            f'{source} makes latents for other bases than "{base.name}": its {differing[0]} is '
            f"{theirs[differing[0]]!s:.60}, expected {own[differing[0]]!s:.60}."
        )
    return _assembled(base.name, vae, list(base.towers), base.unet, base.scheduler, base.zeros_for_none, dtype)


# --- a base that was trained with a control -----------------------------------------------------------------------

_DIFFERENCE = "controlkit.difference"
"""In a file's metadata: the digest of the base it is a difference to."""


def save_difference(path: Path, before: Backbone, after: Backbone) -> None:
    """Write the difference that training made to a base's denoiser, by diffusers' names, without unchanged tensors."""
    own = before.denoiser.state_dict()
    changed = {
        name: (value - own[name]).cpu().contiguous()
        for name, value in after.denoiser.state_dict().items()
        if not torch.equal(value, own[name])
    }
    metadata = {"format": "pt", _DIFFERENCE: before.digest}
    write_atomic(path, lambda scratch: save_file(changed, scratch, metadata))


def _is_difference(path: Path) -> bool:
    return path.is_file() and _DIFFERENCE in open_tensors(path).metadata


def _add_difference(base: UNetBase, path: Path, weight: float, before: Before | None) -> None:
    """Add a difference to the base's U-Net; ``Mismatch`` if it is one to a base of another shape."""
    own = {**dict(base.unet.named_parameters()), **dict(base.unet.named_buffers())}
    tensors = open_tensors(path).read()
    strange = [name for name, value in tensors.items() if name not in own or own[name].shape != value.shape]
    if strange:
        raise Mismatch(f'{path} is no difference to the base "{base.name}", whose U-Net has no {strange[0]} like its.')
    with torch.no_grad():
        for name, value in tensors.items():
            _keep(own[name], before)
            own[name] += weight * value.to(own[name])


# --- LoRA and textual inversion -----------------------------------------------------------------------------------

_MOST_OF_LORA = 2**14  # SDXL's have some 5,000
_LORA_LAYER = re.compile(r"^(.*?)[._]?(lora_A|lora[._]down|down)(\.default)?\.weight$")  # its matrix that reads


def _of_one_strength(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA's matrices with each layer's strength, alpha / rank, in its second one, and all of one rank.

    diffusers loses strengths of their own of attention layers, and ranks of their own change the strength there.
    """
    found = dict(tensors)
    layers = {name: match for name in tensors if (match := _LORA_LAYER.match(name)) and tensors[name].ndim >= 2}
    most = max((len(tensors[name]) for name in layers), default=0)
    for name, match in layers.items():
        writes = match[2].replace("lora_A", "lora_B").replace("down", "up")
        other = f"{name[: match.start(2)]}{writes}{name[match.end(2) :]}"
        down, up, rank = tensors[name], tensors.get(other), len(tensors[name])
        if up is None or up.ndim < 2 or up.shape[1] != rank:
            continue  # the libraries refuse it
        alpha = found.pop(f"{match[1]}.alpha", None)
        strength = 1.0 if alpha is None else float(alpha) / rank
        found[name] = torch.cat([down, down.new_zeros(most - rank, *down.shape[1:])])
        found[other] = torch.cat([up * strength, up.new_zeros(len(up), most - rank, *up.shape[2:])], 1)
    return found


def merge_loras(base: Backbone, loras: Sequence[tuple[Path, float]], before: Before | None = None) -> None:
    """Merge LoRAs and differences into the base's weights.

    Args:
        loras: files with their weights.
        before: takes each weight, the tensor itself, with what it was before the first change: then one that does not
            fit leaves the base as it was, and ``restore`` does so later.

    Raises ``Mismatch`` for a file that does not fit, ``NotFound`` without peft, ``Unsupported`` for other bases.
    """
    if not isinstance(base, UNetBase):
        raise Unsupported(f'The base "{base.name}" takes no LoRAs.')
    try:
        differences = [one for one in loras if _is_difference(one[0])]
        for path, weight in differences:
            _add_difference(base, path, weight, before)
        if low_rank := [one for one in loras if one not in differences]:
            _merge_low_rank(base, low_rank, before)
    except Exception:
        restore(before or {})
        raise


def _keep(weight: Tensor, before: Before | None) -> None:
    if before is not None and weight not in before:
        before[weight] = weight.detach().clone()


@torch.no_grad()
def restore(before: Before) -> None:
    """Give weights back what they were before, to the bit."""
    for weight, value in before.items():
        weight.copy_(value)
    before.clear()


def _merge_low_rank(base: UNetBase, loras: Sequence[tuple[Path, float]], before: Before | None) -> None:
    """Merge LoRAs into the base's weights, by diffusers and peft; as ``merge_loras``."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise NotFound("LoRA files are read by peft. Install it with: pip install 'controlkit[lora]'") from error
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    first, *more = base.towers
    parts = {"vae": base.vae, "unet": base.unet, "scheduler": base.scheduler}
    parts |= {"text_encoder": first.encoder, "tokenizer": first.tokenizer}
    if more:
        pipe = StableDiffusionXLPipeline(**parts, text_encoder_2=more[0].encoder, tokenizer_2=more[0].tokenizer)
    else:
        pipe = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    networks = [base.unet, *(tower.encoder for tower in base.towers)]
    for path, weight in loras:
        tensors = _read_named(open_tensors(path), re.compile(""), _MOST_OF_LORA)
        layers = sum(bool(_LORA_LAYER.match(name)) for name in tensors)
        try:
            if not layers or not all(tensor.numel() for tensor in tensors.values()):
                raise ValueError("it holds no low-rank matrices, or empty ones")
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)  # peft's, for strengths of layers that are not there
                pipe.load_lora_weights(_of_one_strength(tensors), adapter_name="lora")
            placed = sum(isinstance(module, BaseTunerLayer) for network in networks for module in network.modules())
            if placed < layers:  # diffusers leaves out what it finds no place for, with a warning
                raise ValueError(f"{layers - placed} of its {layers} layers have no place there")
            for module in (one for network in networks for one in network.modules()):
                if isinstance(module, BaseTunerLayer):
                    _keep(cast("Tensor", module.get_base_layer().weight), before)
            pipe.fuse_lora(lora_scale=weight)
            pipe.unload_lora_weights()
        except Exception as error:  # the libraries raise anything for names and shapes that do not go together
            pipe.unload_lora_weights()
            raise Mismatch(f'{path} does not fit the base "{base.name}" as a LoRA ({one_line(error)}).') from error


_MOST_VECTORS = 75  # of a textual inversion: the words of a prompt


def add_words(base: Backbone, path: Path) -> tuple[int, int]:
    """Add a textual inversion to the towers' words: the file's name, and for every further vector ``name_1`` on.

    Returns how many vectors it has, and their width in all towers together.

    Not by diffusers, whose tokens lose their capitals and with them all vectors but the first. Raises ``Mismatch`` for
    one of another base, ``Invalid`` where the base knows the word already.
    """
    if not isinstance(base, UNetBase):
        raise Unsupported(f'The base "{base.name}" takes no textual inversions.')
    from transformers import AddedToken

    tensors = open_tensors(path).read()
    keyed = "clip_l" in tensors and "clip_g" in tensors  # SDXL's hold one tensor a tower, the others one in all
    found = [tensors["clip_l"], tensors["clip_g"]] if keyed else [t for t in tensors.values() if t.ndim]
    widths = [tower.encoder.get_input_embeddings().weight.shape[1] for tower in base.towers]
    wide = [sum(vectors.shape[-1:]) for vectors in found]
    if wide != widths:
        raise Mismatch(
            f'{path} holds words {wide[:9]} wide where "{base.name}" reads {widths}: '
            "it is no textual inversion, or one of another base."
        )
    added = []
    for tower, vectors in zip(base.towers, found, strict=True):
        rows = vectors.reshape(-1, vectors.shape[-1])
        if not 0 < len(rows) <= _MOST_VECTORS:
            raise Invalid(
                f"{path} holds a word of {len(rows):,} vectors: expected at most {_MOST_VECTORS}, a prompt's."
            )
        words = [path.stem, *(f"{path.stem}_{i}" for i in range(1, len(rows)))]
        if known := set(words) & tower.tokenizer.get_vocab().keys():
            raise Invalid(f'{path} would be written as "{min(known)}", a word the base knows already: rename the file.')
        added.append((tower, words, rows))
    for tower, words, rows in added:
        tower.tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
        tower.encoder.resize_token_embeddings(len(tower.tokenizer), mean_resizing=False)
        weight = tower.encoder.get_input_embeddings().weight
        with torch.no_grad():
            weight[tower.tokenizer.convert_tokens_to_ids(words)] = rows.to(weight.dtype)
    return len(rows), sum(widths)
