"""The flags of diffusers' ``train_controlnet.py``, read as a recipe, so that a command people have goes on working.

Every flag of that script is known here: it has a place in the recipe, or a reason why it is not needed, or is refused
with what to do instead. What is left out has the script's default, not the recipe's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from controlkit.errors import UserError, nearest

PLACES = {
    "pretrained_model_name_or_path": "base",
    "controlnet_model_name_or_path": "control.start_from",
    "train_data_dir": "data.source",
    "dataset_name": "data.source",
    "max_train_samples": "data.count",
    "max_train_steps": "steps",
    "learning_rate": "lr",
    "adam_weight_decay": "weight_decay",
    "proportion_empty_prompts": "prompt_dropout",
    "gradient_checkpointing": "checkpointing",
    "gradient_accumulation_steps": "accumulate",
    "checkpointing_steps": "checkpoint_every",
    "checkpoints_total_limit": "keep",
    "seed": "seed",
    "annotator": "control.annotator",
}
"""Where in a recipe a flag's value goes as it is. ``annotator`` is ours: what the hints are, or what makes them."""

WORKED_OUT = (
    "output_dir", "train_batch_size", "num_train_epochs", "lr_scheduler", "lr_warmup_steps", "scale_lr", "resolution",
    "validation_steps",
)  # fmt: skip
"""Flags of which something is computed."""

NEEDLESS = {
    "resume_from_checkpoint": "a run goes on by itself when it is started again",
    "mixed_precision": "the number format is the one that pays on this machine",
    "allow_tf32": "the number format is the one that pays on this machine",
    "set_grads_to_none": "it is always so",
    "enable_xformers_memory_efficient_attention": "torch's own attention is used",
    "dataloader_num_workers": "latents, text and hints are cached before the first step",
    "cache_dir": "the cache lies in $CONTROLKIT_CACHE",
    "tokenizer_name": "the base brings its own",
    "validation_prompt": "obedience on held-out pairs is measured instead",
    "validation_image": "obedience on held-out pairs is measured instead",
    "num_validation_images": "obedience is measured on evaluation.num pairs",
    "report_to": "the log is OUT/log.jsonl",
    "logging_dir": "the log is OUT/log.jsonl",
    "tracker_project_name": "the log is OUT/log.jsonl",
    "lr_num_cycles": "of schedulers that are not offered",
    "lr_power": "of schedulers that are not offered",
}
"""Flags that change nothing here, and why."""

FIXED: dict[str, tuple[Any, ...]] = {
    "adam_beta1": (0.9,),
    "adam_beta2": (0.999,),
    "adam_epsilon": (1e-8,),
    "max_grad_norm": (1.0,),
    "use_8bit_adam": (False,),
    "push_to_hub": (False,),
    "hub_token": (None,),
    "hub_model_id": (None,),
    "revision": (None,),
    "variant": (None,),
    "dataset_config_name": (None,),
    "image_column": ("image", "file_name"),
    "conditioning_image_column": ("conditioning_image", "conditioning_image_file_name"),
    "caption_column": ("text", "prompt", "caption"),
}
"""Flags that may have these values alone."""

SWITCHES = ("gradient_checkpointing", "scale_lr", "allow_tf32", "set_grads_to_none", "use_8bit_adam", "push_to_hub",
            "enable_xformers_memory_efficient_attention")  # fmt: skip
WHOLE = ("train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "lr_warmup_steps", "resolution",
         "max_train_steps", "max_train_samples", "validation_steps")  # fmt: skip
TEXT = ("pretrained_model_name_or_path", "controlnet_model_name_or_path", "train_data_dir", "dataset_name",
        "output_dir", "annotator")  # fmt: skip
SEVERAL = ("validation_prompt", "validation_image")

DEFAULTS: dict[str, Any] = {
    "train_batch_size": 4,
    "num_train_epochs": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-6,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "proportion_empty_prompts": 0.0,
    "checkpointing_steps": 500,
    "adam_weight_decay": 1e-2,
    "output_dir": "controlnet-model",
    "resolution": 512,
    "annotator": "",
}
"""The script's own, where the recipe's differ or something is computed of them."""


@dataclass(frozen=True)
class Asked:
    """What a command line of flags asks for: a recipe's values, the run's folder, the picture size, what to say."""

    recipe: dict[str, Any]
    out: Path
    resolution: int
    notes: list[str] = field(default_factory=list)


def read_flags(arguments: Sequence[str], count_pairs: Callable[[Path], int]) -> Asked:
    """The recipe that flags ask for; ``count_pairs`` says how many pairs a folder has, where epochs are asked for."""
    given = _split(arguments)
    for name, allowed in FIXED.items():
        if name in given and given[name] not in allowed:
            words = " or ".join(str(value) for value in allowed if value is not None) or "nothing"
            raise UserError(f"--{name} is {given[name]}; training here takes {words}. Leave it out, or change that.")
    if "pretrained_model_name_or_path" not in given:
        raise UserError("--pretrained_model_name_or_path is missing: expected `mini`, a diffusers folder or a file.")
    if ("train_data_dir" in given) == ("dataset_name" in given):
        raise UserError("Expected one of --train_data_dir and --dataset_name, a folder with training data.")
    values = DEFAULTS | given
    recipe: dict[str, Any] = {"evaluation": {"every": 0}}
    for name, place in PLACES.items():
        if values.get(name) is not None:
            section, _, key = place.rpartition(".")
            (recipe.setdefault(section, {}) if section else recipe)[key] = values[name]
    source = Path(recipe["data"]["source"])
    if not source.is_dir():
        raise UserError(f"There is no folder {source}: data sets are read from folders, a hub's name is not.")
    recipe["batch"] = values["train_batch_size"] * values["gradient_accumulation_steps"]
    if "max_train_steps" not in given:
        pairs = min(count_pairs(source), given.get("max_train_samples", 2**62))
        recipe["steps"] = -(-pairs // recipe["batch"]) * values["num_train_epochs"]
    if values.get("scale_lr"):
        recipe["lr"] *= recipe["batch"]
    recipe |= _schedule(values["lr_scheduler"], values["lr_warmup_steps"], recipe["steps"])
    notes = [f"--{name} is not needed: {reason}" for name, reason in NEEDLESS.items() if name in given]
    if values["annotator"]:  # at least in the end: a run should say whether it worked
        recipe["evaluation"]["every"] = given.get("validation_steps", recipe["steps"])
    elif "validation_steps" in given:
        notes.append("nothing is measured on the way: --annotator says what the hints are, so that it can be")
    if not recipe["prompt_dropout"]:
        notes.append("no prompts are dropped, as in the script; the paper drops half: --proportion_empty_prompts 0.5")
    return Asked(recipe, Path(values["output_dir"]), values["resolution"], notes)


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
        elif name in SEVERAL and not equals:
            given[name] = []
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


def _schedule(name: str, warmup: int, steps: int) -> Mapping[str, int]:
    """Warm-up and cooldown of a scheduler by diffusers' name; its ``constant`` has no warm-up, whatever is asked."""
    schedules = {
        "constant": {"warmup": 0, "cooldown": 0},
        "constant_with_warmup": {"warmup": warmup, "cooldown": 0},
        "linear": {"warmup": warmup, "cooldown": max(steps - warmup, 0)},
    }
    if name not in schedules:
        raise UserError(f'--lr_scheduler is "{name}": {nearest(str(name), schedules)}')
    return schedules[name]
