"""The flags of diffusers' ``train_controlnet.py`` and its neighbours for SDXL, SD 3 and Flux, read as a recipe.

Every flag of these scripts is known: it has a place in the recipe, or a reason why it is not needed, or is refused with
what to do instead. A flag left out has the script's default, not the recipe's, or a note says where it differs.
"""

import argparse
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_args

from controlkit.data import folder_of, read_listing, trained_count
from controlkit.errors import Invalid, NotFound, Unsupported, nearest
from controlkit.train.recipe import ScheduleName, TrackerName, usual_rate

PLACES = {
    "pretrained_model_name_or_path": "base",
    "pretrained_vae_model_name_or_path": "vae",
    "controlnet_model_name_or_path": "control.start_from",
    "train_data_dir": "data.source",
    "dataset_name": "data.source",
    "max_train_samples": "data.count",
    "max_train_steps": "steps",
    "learning_rate": "lr",
    "lr_scheduler": "schedule",
    "adam_weight_decay": "weight_decay",
    "adam_epsilon": "epsilon",
    "max_grad_norm": "max_grad_norm",
    "proportion_empty_prompts": "prompt_dropout",
    "gradient_checkpointing": "gradient_checkpointing",
    "gradient_accumulation_steps": "gradient_accumulation",
    "checkpointing_steps": "checkpoint_every",
    "resolution": "size",
    "seed": "seed",
    "annotator": "control.annotator",
    "tracker_project_name": "tracking.project",
    "validation_prompt": "evaluation.prompts",
    "validation_image": "evaluation.hints",
}
"""Where a flag's value goes in a recipe as it is. ``annotator`` is ours: what the hints are, or what makes them."""

NEEDLESS = {
    "allow_tf32": "networks are computed in the format that is fastest on this machine",
    "set_grads_to_none": "it is always so",
    "enable_xformers_memory_efficient_attention": "torch's own attention is used",
    "enable_npu_flash_attention": "torch's own attention is used",
    "dataloader_num_workers": "latents, text and hints are cached before the first step",
    "cache_dir": "the cache is in $CONTROLKIT_CACHE",
    "tokenizer_name": "the base brings its own",
    "num_validation_images": "four pictures are made of each --validation_image, and obedience is measured besides",
    "logging_dir": "the log is OUT/log.jsonl, and TensorBoard's files are in OUT/tensorboard",
    "upcast_vae": "a VAE that needs single precision is computed in it",
    "dataset_preprocess_batch_size": "latents, text and hints are cached in batches that fit",
    "enable_model_cpu_offload": "pictures are made by the networks that are loaded for training",
}
"""Flags that change nothing here, and why."""

_SD3, _FLUX = "train_controlnet_sd3.py", "train_controlnet_flux.py"
_NO_FLOW = "no base that is trained by flow matching can be used"
_NO_BLOCKS = "bases here are U-Nets, whose encoder is copied whole"
_ELSEWHERE = {
    "weighting_scheme": (f"{_SD3} and {_FLUX}", _NO_FLOW),
    "logit_mean": (f"{_SD3} and {_FLUX}", _NO_FLOW),
    "logit_std": (f"{_SD3} and {_FLUX}", _NO_FLOW),
    "mode_scale": (f"{_SD3} and {_FLUX}", _NO_FLOW),
    "precondition_outputs": (_SD3, _NO_FLOW),
    "max_sequence_length": (_SD3, "it is of the T5 text encoder, which no base here has"),
    "num_extra_conditioning_channels": (_SD3, "the channels of hints are counted: `--set control.channels=N`"),
    "num_double_layers": (_FLUX, _NO_BLOCKS),
    "num_single_layers": (_FLUX, _NO_BLOCKS),
    "guidance_scale": (_FLUX, "no base here has guidance embedded; of samples: `--set evaluation.guidance=N`"),
    "jsonl_for_train": (_FLUX, "data sets are folders: name the file metadata.jsonl, and give --train_data_dir"),
    "save_weight_dtype": (_FLUX, "controls are saved in float32; `controlkit convert --dtype` makes them smaller"),
}
"""Flags of other scripts that have no setting here -> the scripts, and why or what to do."""

_OTHER_WORDS = {
    "train_batch_size": "batch", "batch_size": "batch", "num_train_epochs": "steps", "epochs": "steps",
    "max_steps": "steps", "iterations": "steps", "rate": "lr", "image_size": "size", "output_dir": "--out",
    "mixed_precision": "precision", "dtype": "precision", "lr_warmup_steps": "warmup", "warmup_steps": "warmup",
    "checkpoints_total_limit": "keep", "report_to": "tracking.to", "validation_steps": "evaluation.every",
    "use_8bit_adam": "optimizer", "use_adafactor": "optimizer", "lr_num_cycles": "cycles", "lr_power": "power",
    "image_column": "data.columns", "caption_column": "data.columns", "conditioning_image_column": "data.columns",
    "budget": "max_minutes", "model": "base", "data": "data.source", "dataset": "data.source",
}  # fmt: skip
"""Other programs' words for a recipe's settings, beside ``PLACES``."""

_COLUMNS = {
    "image_column": ("image", "image"),
    "conditioning_image_column": ("hint", "conditioning_image"),
    "caption_column": ("caption", "text"),
}
"""Flags that name a column -> the recipe's key, and the script's default, for which the usual names are tried."""

_ONE_SCHEDULE = {"lr_num_cycles": ("cycles", "cosine_with_restarts"), "lr_power": ("power", "polynomial")}
"""Flags that a single schedule reads -> the recipe's key, and that schedule."""

_DEFAULTS = {
    "train_batch_size": 4, "num_train_epochs": 1, "gradient_accumulation_steps": 1, "lr_warmup_steps": 500,
    "checkpointing_steps": 500, "resolution": 512, "proportion_empty_prompts": 0.0, "adam_beta1": 0.9,
    "adam_beta2": 0.999, "adam_weight_decay": 1e-2,
}  # fmt: skip
"""The scripts' defaults of numbers, where they differ from the recipe's or are not among its settings."""
_RATE = 5e-6
"""The scripts' learning rate, for Stable Diffusion."""

_FORMATS = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}


@dataclass(frozen=True)
class Asked:
    """A recipe's values, the run's folder, and notes for the user, from a command line of flags."""

    recipe: dict[str, Any]
    out: Path
    notes: list[str] = field(default_factory=list)


class _Parser(argparse.ArgumentParser):
    """Raises ``Invalid`` where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        raise Invalid(f"{message.removeprefix('argument ')}.")


def parser() -> argparse.ArgumentParser:
    """Make the parser of the scripts' flags; defaults are the scripts'."""
    made = _Parser(allow_abbrev=False, add_help=False, argument_default=None)
    add = made.add_argument
    for name in ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "controlnet_model_name_or_path",
                 "train_data_dir", "dataset_name", "report_to", *_COLUMNS):  # fmt: skip
        add(f"--{name}")
    for name in ("max_train_steps", "max_train_samples", "validation_steps", "checkpoints_total_limit",
                 "lr_num_cycles"):  # fmt: skip
        add(f"--{name}", type=_whole)
    for name in ("adam_epsilon", "learning_rate", "max_grad_norm", "lr_power"):
        add(f"--{name}", type=_number)
    for name, default in _DEFAULTS.items():
        add(f"--{name}", type=_whole if isinstance(default, int) else _number, default=default)
    for name in ("gradient_checkpointing", "scale_lr", "use_8bit_adam", "use_adafactor"):
        add(f"--{name}", action="store_true")
    for name in ("validation_prompt", "validation_image"):
        add(f"--{name}", nargs="*")
    add("--seed", type=partial(_number, kind=int))
    add("--lr_scheduler", type=_one_of(get_args(ScheduleName)), default="constant")
    add("--mixed_precision", type=_one_of(_FORMATS))
    add("--output_dir", default="controlnet-model")
    add("--annotator", default="")
    add("--tracker_project_name", default="train_controlnet")
    for name in NEEDLESS:
        add(f"--{name}", nargs="?", const="")
    for name, allowed in (("hub_token", ""), ("hub_model_id", ""), ("revision", ""), ("variant", ""),
                          ("dataset_config_name", ""), ("push_to_hub", ""), ("resume_from_checkpoint", "latest"),
                          ("crops_coords_top_left_h", "0"), ("crops_coords_top_left_w", "0"),
                          ("image_interpolation_mode", "lanczos")):  # fmt: skip
        add(f"--{name}", nargs="?", const="true", type=partial(_only, allowed))  # runs resume by themselves
    return made


def read_flags(arguments: Sequence[str], processes: int = 1) -> Asked:
    """Read the recipe that flags ask for. ``processes``: how many train together: the script's batch is that of each.

    Raises ``Invalid`` for a flag or value that cannot be used, ``NotFound`` for a folder that is missing.
    """
    values, rest = parser().parse_known_args(arguments)
    _check(values, rest)
    given = vars(values)
    recipe: dict[str, Any] = {"evaluation": {}}
    for name, place in PLACES.items():
        if given[name] is not None:
            section, _, key = place.rpartition(".")
            (recipe.setdefault(section, {}) if section else recipe)[key] = given[name]
    source = folder_of(recipe["data"]["source"])
    if not source.is_dir():
        raise NotFound(f"There is no folder {source}: expected one, or a hub's data set (owner/name).")
    columns = {key: given[name] for name, (key, usual) in _COLUMNS.items() if given[name] not in (None, usual)}
    recipe["data"]["columns"] = columns
    recipe["batch"] = values.train_batch_size * values.gradient_accumulation_steps * processes
    recipe["keep"] = values.checkpoints_total_limit
    if values.max_train_steps is None:
        pairs = min(_pairs_in(source, columns), values.max_train_samples or 2**62)
        # A batch of 0 is refused where the recipe is read.
        recipe["steps"] = -(-pairs // max(recipe["batch"], 1)) * values.num_train_epochs
    if recipe["base"] != "mini" or values.scale_lr:
        recipe.setdefault("lr", _RATE)
    if values.scale_lr:
        recipe["lr"] *= recipe["batch"]
    if values.use_adafactor:
        recipe["optimizer"] = "adafactor"
    else:
        recipe["betas"] = [values.adam_beta1, values.adam_beta2]
        recipe["optimizer"] = "adamw8bit" if values.use_8bit_adam else "adamw"
    recipe["warmup"] = 0 if recipe["schedule"] == "constant" else values.lr_warmup_steps
    for name, (key, schedule) in _ONE_SCHEDULE.items():
        if given[name] is not None and recipe["schedule"] == schedule:
            recipe[key] = given[name]
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # "no" where nobody asked for anything
    if values.mixed_precision or launched != "no":
        recipe["precision"] = _FORMATS.get(values.mixed_precision or launched, "auto")
    recipe["tracking"]["to"] = _trackers(values.report_to)
    # At least at the end: a run should show whether it worked.
    often = recipe["steps"] if values.validation_image is None else 100
    recipe["evaluation"]["every"] = often if values.validation_steps is None else values.validation_steps
    return Asked(recipe, Path(values.output_dir), _notes(given, recipe, processes))


def key_of(word: str) -> str:
    """The recipe's key for another program's word, or ""."""
    word = word.lower().lstrip("-").replace("-", "_").replace("learningrate", "learning_rate")
    return PLACES.get(word) or _OTHER_WORDS.get(word, "")


def _pairs_in(folder: Path, columns: Mapping[str, str]) -> int:
    return trained_count(len(read_listing(folder, columns).rows))


def _check(values: argparse.Namespace, rest: Sequence[str]) -> None:
    """Refuse unknown flags, and a command line without a base or data."""
    if rest and not rest[0].startswith("--"):
        raise Invalid(f'"{rest[0]}" stands where a flag was expected, such as --train_data_dir.')
    if rest:
        name = rest[0][2:].partition("=")[0]
        if name in _ELSEWHERE:
            script, reason = _ELSEWHERE[name]
            raise Unsupported(
                f"--{name} is a flag of diffusers' {script}; there is no such setting here: {reason}. Leave it out."
            )
        raise Invalid(f"--{name} is no flag of train_controlnet.py: {nearest(name, vars(values))}")
    if values.pretrained_model_name_or_path is None:
        raise Invalid("--pretrained_model_name_or_path is missing: expected `mini`, a diffusers folder or a file.")
    if (values.train_data_dir is None) == (values.dataset_name is None):
        raise Invalid("Expected one of --train_data_dir and --dataset_name, a folder with training data.")


def _notes(given: Mapping[str, Any], recipe: Mapping[str, Any], processes: int) -> list[str]:
    """Sentences on flags that change nothing, and on what differs from the script."""
    notes = [f"--{name} is not needed: {reason}" for name, reason in NEEDLESS.items() if given[name] is not None]
    notes.append("a tenth of the pairs, 2 to 512, is held out to measure on; the script trains on all")
    if "precision" not in recipe:
        notes.append("numbers are bfloat16 where that is faster; the script's are float32: --mixed_precision no")
    for name, (_, schedule) in _ONE_SCHEDULE.items():
        if given[name] is not None and recipe["schedule"] != schedule:
            notes.append(f"--{name} is not needed: only --lr_scheduler {schedule} reads it")
    if "lr" not in recipe:
        usual = f"{usual_rate('mini', recipe['optimizer']):g}"
        notes.append(f"the script's rate of {_RATE:g} is for Stable Diffusion, mini's is {usual}: --learning_rate")
    if not given["annotator"]:
        notes.append("--annotator, a flag of its own, says what the hints are, so that obedience can be measured")
    if processes > 1:
        notes.append(f"a batch of {recipe['batch']}: --train_batch_size is that of each of {processes} processes")
    if not recipe["prompt_dropout"]:
        notes.append("no prompts are dropped, as in the script; the paper drops half: --proportion_empty_prompts 0.5")
    return notes


def _number(text: str, kind: type = float) -> Any:
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f'"{text}" was given; expected {wanted}') from None


def _whole(text: str) -> int:
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f'"{text}" was given; expected a whole number, 0 or more')


def _one_of(names: Sequence[str] | Mapping[str, str]) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text in names:
            return text
        raise argparse.ArgumentTypeError(f'"{text}" was given; {nearest(text, names).removesuffix(".")}')

    return check


def _only(allowed: str, text: str) -> str:
    if text == allowed:
        return text
    instead = f'give "{allowed}", or leave it out' if allowed else "leave it out"
    raise argparse.ArgumentTypeError(f'"{text}" was given, which training here cannot do; {instead}')


def _trackers(name: str | None) -> list[str]:
    """Trackers by diffusers' name; ``all`` are those installed. None: tensorboard, where it is installed."""
    known = list(get_args(TrackerName))
    if name is None:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    if name in ("all", "none"):
        return [one for one in known if name == "all" and importlib.util.find_spec(one)]
    if name not in known:
        raise Invalid(f'--report_to is "{name}": {nearest(name, [*known, "all", "none"])}')
    return [name]
