"""Where a base comes from: what is shipped, a diffusers folder, a single-file checkpoint, or a model hub.

Only a hub's name may ask a network for anything; everything else is read from disk and configured from what is there.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from controlkit.backbones.families import (
    FAMILIES,
    Family,
    Prediction,
    clip_tokenizer,
    family_of_width,
    pipeline_configs,
)
from controlkit.backbones.unet import PREDICTIONS, TextTower, UNetBase
from controlkit.errors import UserError, nearest
from controlkit.hub import shipped_names, where
from controlkit.tensors import PICKLES, TensorFile, open_tensors

_KINDS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
_HUB_FILES = ["model_index.json", "*/*.json", "*/*.txt", *(f"{part}/*.safetensors" for part in ("vae", "unet"))]
_HUB_FILES += ["text_encoder/*.safetensors", "text_encoder_2/*.safetensors"]
_HUB_LEFT = ["*.fp16.*", "*non_ema*", "safety_checker/*", "*flax*", "*openvino*"]


def load_base(
    source: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    prediction: Prediction | None = None,
    loras: Sequence[tuple[Path, float]] = (),
    embeddings: Sequence[Path] = (),
) -> UNetBase:
    """Load a base, frozen.

    Args:
        source: ``mini``; ``sd15``, ``sd21`` or ``sdxl``; a diffusers folder; a single ``.safetensors`` or ``.ckpt``
            file; or a hub's name (``owner/model``), taken from the local cache if it is there.
        dtype: of the weights; the VAE stays in float32 where float16 overflows it.
        prediction: ``eps`` or ``v``, where a single file's own signs of it mislead.
        loras: LoRA files with their weights, merged into the base; read by diffusers and peft.
        embeddings: textual inversions; each is written in a prompt as its file's name.
    """
    text, path = str(source), Path(source)
    if text in shipped_names() and (where(text) / "model_index.json").is_file():
        base = _from_folder(text, where(text), dtype)
    elif path.is_file():
        base = _from_single_file(path, dtype, prediction)
    elif path.is_dir():
        base = _from_folder(path.name, path, dtype)
    elif text in FAMILIES or (text.count("/") == 1 and not path.suffix and not text.startswith((".", "/", "~"))):
        base = _from_folder(text, _from_hub(FAMILIES[text].hub if text in FAMILIES else text), dtype)
    else:
        raise UserError(
            f'There is no base "{source}": expected a name, a diffusers pipeline folder (with a model_index.json), a '
            f".safetensors or .ckpt file, or a hub's owner/model; {nearest(text, ['mini', *FAMILIES])}"
        )
    if loras or embeddings:
        base = _with_additions(base, loras, embeddings)
    return base.to(device)


def _from_hub(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted: dict[str, Any] = {"allow_patterns": _HUB_FILES, "ignore_patterns": _HUB_LEFT}
    try:
        folder = Path(snapshot_download(repository, local_files_only=True, **wanted))
        if (folder / "model_index.json").is_file():
            return folder
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        return Path(snapshot_download(repository, **wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f'The base "{repository}" is neither in the local cache nor could be fetched from the hub ({reason}). '
            "Give a folder or a single .safetensors file instead, or fetch it once while there is a network."
        ) from error


# --- a diffusers folder -------------------------------------------------------------------------------------------


def _from_folder(name: str, folder: Path, dtype: torch.dtype) -> UNetBase:
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"{folder} is no base: expected a diffusers pipeline folder (with a model_index.json).")
    try:
        content = json.loads(index.read_text())
        kind = content["_class_name"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{index} cannot be read ({error!r}): expected a diffusers pipeline folder.") from error
    if kind not in _KINDS:
        raise UserError(f"{folder} holds a {kind}; expected a {' or a '.join(_KINDS)}.")
    second = ("tokenizer_2", "text_encoder_2") if kind == _KINDS[1] else ()
    for part in (*_PARTS, *second):
        if not (folder / part).is_dir():
            raise UserError(f"{folder} lacks the folder {part}: expected a whole {kind} folder.")
    # Here and not above: these imports take seconds, and --help must not.
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    only: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    try:
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32, **only)
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype, **only)
        encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype, **only)
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
        towers = [TextTower(tokenizer, encoder, penultimate=bool(second))]
        if second:
            wide = CLIPTextModelWithProjection.from_pretrained(folder, subfolder="text_encoder_2", dtype=dtype, **only)
            tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer_2", local_files_only=True)
            towers.append(TextTower(tokenizer, wide, penultimate=True))
        scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} is not a whole {kind} folder ({error}).") from error
    zeros = bool(second) and bool(content.get("force_zeros_for_empty_prompt", True))
    _check_parts(folder, vae, unet, scheduler)
    return _assembled(name, vae, towers, unet, scheduler, zeros, dtype)


def _check_parts(origin: Path, vae: Any, unet: Any, scheduler: Any) -> None:
    """Refuse a base that ControlKit cannot run."""
    if scheduler.config.prediction_type not in PREDICTIONS:
        raise UserError(
            f'{origin} predicts "{scheduler.config.prediction_type}"; expected one of {", ".join(PREDICTIONS)}.'
        )
    latents = vae.config.latent_channels
    if unet.config.in_channels != latents:
        raise UserError(
            f"{origin} reads {unet.config.in_channels} channels where its latents have {latents}: it is an "
            "inpainting or editing model. Expected a text-to-image base."
        )
    odd = [key for key in ("class_embed_type", "encoder_hid_dim_type", "num_class_embeds") if unet.config[key]]
    if odd or unet.config.addition_embed_type not in (None, "text_time"):
        raise UserError(f"{origin} is conditioned on more than prompts ({', '.join(odd) or 'added embeddings'}).")


def _assembled(
    name: str, vae: Any, towers: list[TextTower], unet: Any, scheduler: Any, zeros_for_none: bool, dtype: torch.dtype
) -> UNetBase:
    if dtype != torch.float16 or not vae.config.force_upcast:
        nn.Module.to(vae, dtype)  # diffusers' own warns of what does not concern this class
    return UNetBase(name, vae, towers, unet, scheduler, zeros_for_none)


# --- a single file ------------------------------------------------------------------------------------------------

_UNET = "model.diffusion_model."
_WIDTH = f"{_UNET}input_blocks.{{}}.1.transformer_blocks.0.attn2.to_k.weight"
_LAST_NORM = f"{_UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_V_SPREAD = 0.09  # of that bias: above it the SD 2 checkpoint predicts v (ComfyUI's sign, supported_models.py)


def _from_single_file(path: Path, dtype: torch.dtype, prediction: Prediction | None) -> UNetBase:
    header = open_tensors(path)
    family = _family_of(header)
    prediction = prediction or _prediction_of(header, family)
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    wide = len(family.towers) > 1
    pads = ["<|endoftext|>" if tower is FAMILIES["sd15"].towers[0] else "!" for tower in family.towers]
    tokenizers = [clip_tokenizer(pad) for pad in pads]
    given: dict[str, Any] = dict(zip(("tokenizer", "tokenizer_2"), tokenizers, strict=False))
    if not wide:
        given |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    with pipeline_configs(family, prediction, zero_snr="ztsnr" in header.shapes) as configs:
        kind = StableDiffusionXLPipeline if wide else StableDiffusionPipeline
        try:
            pipe = kind.from_single_file(
                str(path), config=str(configs), local_files_only=True, torch_dtype=torch.float32, **given
            )
        except Exception as error:  # missing parts surface as whatever diffusers stumbles over first
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path} is not a whole {family.title} checkpoint ({reason}).") from error
    towers = [TextTower(tokenizers[0], pipe.text_encoder.to(dtype), wide)]
    if wide:
        towers.append(TextTower(tokenizers[1], pipe.text_encoder_2.to(dtype), wide))
    _check_parts(path, pipe.vae, pipe.unet, pipe.scheduler)
    return _assembled(path.stem, pipe.vae, towers, pipe.unet.to(dtype), pipe.scheduler, wide, dtype)


def _family_of(header: TensorFile) -> Family:
    # The first attention of SD sits in input block 1, of SDXL in 4.
    widths = [header.shapes[_WIDTH.format(at)][-1] for at in (1, 4) if _WIDTH.format(at) in header.shapes]
    if not widths:
        wrong = " Its pickle may be a control's." if header.path.suffix in PICKLES else ""
        raise UserError(
            f"{header.path} holds no {_UNET}* tensors: expected a Stable Diffusion checkpoint in its original layout."
            f"{wrong} `controlkit inspect` says what a file is."
        )
    family = family_of_width(widths[0])
    if family is None:
        known = ", ".join(f"{row.text_width} ({row.title})" for row in FAMILIES.values())
        raise UserError(f"{header.path} reads prompts {widths[0]} wide, which no base known here does: {known}.")
    return family


def _prediction_of(header: TensorFile, family: Family) -> Prediction:
    """What the file predicts. It does not say; fine-tuners mark v by an empty tensor, and SD 2 shows it in a bias."""
    if "v_pred" in header.shapes:
        return "v"
    if family.prediction == "v" and _LAST_NORM in header.shapes:
        bias = header.read([_LAST_NORM])[_LAST_NORM].float()
        return "v" if bias.std(correction=0) > _V_SPREAD else "eps"
    return family.prediction


# --- LoRA and textual inversion -----------------------------------------------------------------------------------


def _with_additions(base: UNetBase, loras: Sequence[tuple[Path, float]], embeddings: Sequence[Path]) -> UNetBase:
    """The base with LoRAs merged into its weights and textual inversions among its words."""
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
    for path, weight in loras:
        tensors = open_tensors(path).read()
        try:
            pipe.load_lora_weights(tensors, adapter_name="lora")
            pipe.fuse_lora(lora_scale=weight)
            pipe.unload_lora_weights()
        except ImportError as error:
            raise UserError("LoRA files are read by peft. Install it with: pip install 'controlkit[lora]'") from error
        except (ValueError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f'{path} does not fit the base "{base.name}" as a LoRA ({reason}).') from error
    for path in embeddings:
        tensors = open_tensors(path).read()
        for key, tower in zip(("clip_l", "clip_g"), base.towers, strict=False):  # SDXL's; others hold one tensor
            vectors = tensors[key] if key in tensors else next(iter(tensors.values()))
            width = tower.encoder.get_input_embeddings().weight.shape[1]
            if vectors.shape[-1] != width:
                raise UserError(
                    f'{path} holds words {vectors.shape[-1]} wide; those of "{base.name}" are {width} wide: the '
                    "textual inversion is of another base."
                )
            word = {path.stem: vectors.reshape(-1, width)}
            pipe.load_textual_inversion(word, path.stem, tokenizer=tower.tokenizer, text_encoder=tower.encoder)
    return UNetBase(base.name, pipe.vae, base.towers, pipe.unet, base.scheduler, base.zeros_for_none)
