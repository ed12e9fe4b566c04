"""The flags of diffusers' ``train_controlnet.py`` and ``train_controlnet_sdxl.py``, read as a recipe, so that a command
people have goes on working.

Every flag of these scripts is known here: it has a place in the recipe, or a reason why it is not needed, or is refused
with what to do instead. What is left out has the script's default, not the recipe's, or a note says what is otherwise.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml

from controlkit.data.layouts import folder_of
from controlkit.errors import UserError, nearest
from controlkit.train.recipe import ScheduleName, TrackerName

PLACES = {
    "pretrained_model_name_or_path": "base",
    "pretrained_vae_model_name_or_path": "vae",
    "controlnet_model_name_or_path": "control.start_from",
    "train_data_dir": "data.source",
    "dataset_name": "data.source",
    "max_train_samples": "data.count",
    "max_train_steps": "steps",
    "learning_rate": "lr",
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
"""Where in a recipe a flag's value goes as it is. ``annotator`` is ours: what the hints are, or what makes them."""

WORKED_OUT = (
    "output_dir", "train_batch_size", "num_train_epochs", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles",
    "lr_power", "scale_lr", "validation_steps", "adam_beta1", "adam_beta2", "use_8bit_adam", "report_to",
    "mixed_precision", "checkpoints_total_limit", "image_column", "conditioning_image_column", "caption_column",
)  # fmt: skip
"""Flags of which something is computed."""

NEEDLESS = {
    "allow_tf32": "networks are computed in the format that pays on this machine, bfloat16 where there is a choice",
    "set_grads_to_none": "it is always so",
    "enable_xformers_memory_efficient_attention": "torch's own attention is used",
    "enable_npu_flash_attention": "torch's own attention is used",
    "dataloader_num_workers": "latents, text and hints are cached before the first step",
    "cache_dir": "the cache lies in $CONTROLKIT_CACHE",
    "tokenizer_name": "the base brings its own",
    "num_validation_images": "four pictures are made of each --validation_image, and obedience is measured besides",
    "logging_dir": "the log is OUT/log.jsonl, and TensorBoard's files are in OUT/tensorboard",
}
"""Flags that change nothing here, and why."""

FIXED: dict[str, tuple[Any, ...]] = {
    "push_to_hub": (False,),
    "hub_token": (None,),
    "hub_model_id": (None,),
    "revision": (None,),
    "variant": (None,),
    "dataset_config_name": (None,),
    "resume_from_checkpoint": ("latest",),
    "crops_coords_top_left_h": (0,),
    "crops_coords_top_left_w": (0,),
    "image_interpolation_mode": ("lanczos",),
}
"""Flags that may have these values alone. A run that is started again goes on from its newest checkpoint by itself."""

COLUMNS = {"image_column": "image", "conditioning_image_column": "hint", "caption_column": "caption"}
"""Flags that say what a column is called. Left out, or as the script has it, the usual names are looked for."""

OF_ONE_SCHEDULE = {"lr_num_cycles": ("cycles", "cosine_with_restarts"), "lr_power": ("power", "polynomial")}
"""Flags that one scheduler alone reads: the recipe's key, and which. Its ``constant`` does not read the warm-up."""

SWITCHES = ("gradient_checkpointing", "scale_lr", "allow_tf32", "set_grads_to_none", "use_8bit_adam", "push_to_hub",
            "enable_xformers_memory_efficient_attention", "enable_npu_flash_attention")  # fmt: skip
WHOLE = ("train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "lr_warmup_steps", "lr_num_cycles",
         "resolution", "max_train_steps", "max_train_samples", "validation_steps")  # fmt: skip
TEXT = ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "controlnet_model_name_or_path",
        "train_data_dir", "dataset_name", "output_dir", "annotator", "report_to", "tracker_project_name",
        "mixed_precision", "image_column", "conditioning_image_column", "caption_column",
        "resume_from_checkpoint", "image_interpolation_mode")  # fmt: skip
SEVERAL = ("validation_prompt", "validation_image")

_OWN = {"image_column": "image", "conditioning_image_column": "conditioning_image", "caption_column": "text"}

DEFAULTS: dict[str, Any] = {
    "train_batch_size": 4,
    "num_train_epochs": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-6,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "proportion_empty_prompts": 0.0,
    "checkpointing_steps": 500,
    "adam_weight_decay": 1e-2,
    "output_dir": "controlnet-model",
    "resolution": 512,
    "annotator": "",
    "report_to": "tensorboard",
    "tracker_project_name": "train_controlnet",
}
"""The script's own, where the recipe's differ or something is computed of them."""


@dataclass(frozen=True)
class Asked:
    """What a command line of flags asks for: a recipe's values, the run's folder, what to say."""

    recipe: dict[str, Any]
    out: Path
    notes: list[str] = field(default_factory=list)


def read_flags(
    arguments: Sequence[str], count_pairs: Callable[[Path, Mapping[str, str]], int], processes: int = 1
) -> Asked:
    """The recipe that flags ask for.

    ``count_pairs``: how many pairs a folder has, with what its columns are called, where epochs are asked for.
    ``processes``: how many train together: the script's batch is each one's.
    """
    given = _split(arguments)
    for name, allowed in FIXED.items():
        if name in given and given[name] not in allowed:
            words = " or ".join(str(value) for value in allowed if value is not None) or "nothing"
            raise UserError(f"--{name} is {given[name]}; training here takes {words}. Leave it out, or change that.")
    if given.get("lr_scheduler", "constant") not in (schedules := get_args(ScheduleName)):
        raise UserError(
            f'--lr_scheduler is "{given["lr_scheduler"]}": {nearest(str(given["lr_scheduler"]), schedules)}'
        )
    if "pretrained_model_name_or_path" not in given:
        raise UserError("--pretrained_model_name_or_path is missing: expected `mini`, a diffusers folder or a file.")
    if ("train_data_dir" in given) == ("dataset_name" in given):
        raise UserError("Expected one of --train_data_dir and --dataset_name, a folder with training data.")
    values = DEFAULTS | given
    recipe: dict[str, Any] = {"evaluation": {}}
    for name, place in PLACES.items():
        if values.get(name) is not None:
            section, _, key = place.rpartition(".")
            (recipe.setdefault(section, {}) if section else recipe)[key] = values[name]
    source = folder_of(recipe["data"]["source"])
    if not source.is_dir():
        raise UserError(f"There is no folder {source}: expected one, or a hub's data set (owner/name).")
    columns = {kind: given[name] for name, kind in COLUMNS.items() if given.get(name, _OWN[name]) != _OWN[name]}
    recipe["data"]["columns"] = columns
    recipe["batch"] = values["train_batch_size"] * values["gradient_accumulation_steps"] * processes
    recipe["keep"] = given.get("checkpoints_total_limit")
    if "max_train_steps" not in given:
        pairs = min(count_pairs(source, columns), given.get("max_train_samples", 2**62))
        recipe["steps"] = -(-pairs // recipe["batch"]) * values["num_train_epochs"]
    if values.get("scale_lr"):
        recipe["lr"] *= recipe["batch"]
    recipe["betas"] = [values["adam_beta1"], values["adam_beta2"]]
    recipe["optimizer"] = "adamw8bit" if values.get("use_8bit_adam") else "adamw"
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # which is "no" where nobody asked for anything
    if "mixed_precision" in given or launched != "no":
        asked, formats = given.get("mixed_precision", launched), {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}
        if asked not in formats:
            raise UserError(f'--mixed_precision is "{asked}": {nearest(asked, formats)}')
        recipe["precision"] = formats[asked]
    recipe["tracking"]["to"] = _trackers(values["report_to"], needed="report_to" in given)
    notes = [f"--{name} is not needed: {reason}" for name, reason in NEEDLESS.items() if name in given]
    notes.append("a tenth of the pairs, 2 to 512, is held out to measure on; the script trains on all")
    if "precision" not in recipe:
        notes.append("numbers are bfloat16 where that is faster; the script's are float32: --mixed_precision no")
    recipe["schedule"] = values["lr_scheduler"]
    recipe["warmup"] = 0 if recipe["schedule"] == "constant" else values["lr_warmup_steps"]
    for name, (key, schedule) in OF_ONE_SCHEDULE.items():
        if name in given and recipe["schedule"] == schedule:
            recipe[key] = given[name]
        elif name in given:
            notes.append(f"--{name} is not needed: --lr_scheduler {schedule} alone reads it")
    # At least in the end: a run should say whether it worked.
    often = 100 if "validation_image" in given else recipe["steps"]
    recipe["evaluation"]["every"] = given.get("validation_steps", often)
    if not values["annotator"]:
        notes.append("--annotator, a flag of its own, says what the hints are, so that obedience can be measured")
    if processes > 1:
        notes.append(f"a batch of {recipe['batch']}: --train_batch_size is that of each of {processes} processes")
    if not recipe["prompt_dropout"]:
        notes.append("no prompts are dropped, as in the script; the paper drops half: --proportion_empty_prompts 0.5")
    return Asked(recipe, Path(values["output_dir"]), notes)


def _split(arguments: Sequence[str]) -> dict[str, Any]:
    """Flags and their values, as YAML reads them; switches are True."""
    known = [*PLACES, *WORKED_OUT, *NEEDLESS, *FIXED]
    given: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(f'"{word}" stands where a flag was expected, such as --train_data_dir.')
        name, equals, value = word[2:].partition("=")
        if name not in known:
            raise UserError(f"--{name} is no flag of train_controlnet.py: {nearest(name, known)}")
        if name in SWITCHES:
            given[name] = True
        elif name in SEVERAL:
            given[name] = [value] if equals else []
            while rest and not rest[0].startswith("--"):
                given[name].append(rest.pop(0))
        elif equals or (rest and not rest[0].startswith("--")):
            text = value if equals else rest.pop(0)
            given[name] = text if name in TEXT else _number(text)
            if name in WHOLE and not (isinstance(given[name], int) and given[name] >= 0):
                raise UserError(f"--{name} is {text}; expected a whole number.")
        else:
            raise UserError(f"--{name} has no value.")
    return given


def _number(text: str) -> Any:
    """A number where it is one (1e-5 too, which YAML takes for words), else as YAML has it."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return yaml.safe_load(text)


def _trackers(name: str, needed: bool) -> list[str]:
    """Trackers by diffusers' name for them; ``all`` is those that are installed, and so is one not ``needed``."""
    known = list(get_args(TrackerName))
    if not needed and not importlib.util.find_spec(name):
        return []
    if name in ("all", "none"):
        return [one for one in known if name == "all" and importlib.util.find_spec(one)]
    if name not in known:
        raise UserError(f'--report_to is "{name}": {nearest(name, [*known, "all", "none"])}')
    return [name]
