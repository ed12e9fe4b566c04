"""What a training run is asked for: the recipe's settings, read from YAML, every key checked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from controlkit.errors import UserError, nearest
from controlkit.train.optimizers import OptimizerName

ScheduleName = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]  # fmt: skip
POLYNOMIAL_END = 1e-7
"""The rate at which ``schedule: polynomial`` ends, as diffusers has it."""


FORMATS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Names of number formats as others have them -> torch's."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ControlRecipe(_Strict):
    """What is trained."""

    annotator: str = "canny"
    """Makes the hints, unless the source has its own; and measures obedience to them."""
    types: list[str] = []
    """Several types of hint at once: what is trained is a Union (instead of ``annotator``). One named twice comes twice
    as often."""
    options: dict[str, float] = {}
    """The annotator's options; the rest keep their defaults."""
    annotators: list[str] = []
    """Several hints at once, three channels of each in this order (instead of ``annotator``): made by annotators, or as
    many hints of the data's own. Obedience is measured to the first."""
    hints_as: Literal["channels", "branches"] = "channels"
    """What ``annotators`` become: channels of one control; or a branch each, trained together as they are composed in
    use (Section 3.4). Each is then a control by itself, in a folder of its annotator's name."""
    channels: int | None = Field(None, gt=0)
    """Channels of the hint where they are not three: 1 for grey, any number for arrays (``.npy``)."""
    low: float = 0.0
    """What the least of whole numbers in a hint, 0, is read as; floats are taken as they are."""
    high: float = 1.0
    """What the largest of their type is read as; floats must lie between the two."""
    body: Literal["copy", "conv", "lora", "xs", "adapter"] = "copy"
    """``copy``, the paper's; ``conv``, ControlNet-lite; ``lora``, the copy, of which differences of low rank are
    trained (a Control-LoRA; written as such, too); ``xs``, ControlNet-XS, a thin encoder that walks beside the base's;
    ``adapter``, a T2I-Adapter."""
    rank: int = Field(16, gt=0)
    """Of the differences that ``body: lora`` trains."""
    size_ratio: float | None = Field(None, gt=0, le=1)
    """The width of an ``xs`` body: its channels as a share of the base's. Unless told, 32 channels at the finest level
    (a tenth of Stable Diffusion's), at most half of a small base's."""
    join: Literal["zero", "gaussian"] = "zero"
    taps: Literal["all", "mid"] = "all"
    start_from: str | None = None
    """A neighbouring control to start from, by name or folder (the paper starts scribbles from Canny; its small-scale
    recipe trains ``taps: mid`` first and then reconnects: start from that control with ``taps: all``)."""
    hint_cfg_scale: float = Field(1.0, ge=0)
    """How many times guidance counts the hint, where the control is measured and, unless told, used: 1 as released, up
    to as often as the prompt (``sample.Control.hint_cfg_scale``)."""


class DataRecipe(_Strict):
    """On what."""

    source: str = "emoji"
    """``emoji`` (held-out concepts left out), ``scenes`` (what no control may see left out), ``world`` (both),
    ``fill50k`` (drawn on the fly), a folder in any of the layouts of ``data.layouts``, or a hub's data set
    (``owner/name``)."""
    columns: dict[str, str] = {}
    """What a folder's ``image``, ``hint`` or ``caption`` columns are called, where that is none of the usual names."""
    count: int | None = Field(None, gt=0)
    """Pictures to train on; all by default."""
    variants: int = Field(2, gt=0)
    """Grounds each emoji is seen on: as many pairs a picture. Other sources have one."""
    scenes: int = Field(6000, gt=0)
    """Scenes drawn, of which those without anything held out are used."""
    visits: int = Field(1, gt=0)
    """How often each scene comes, for a Union each time with another type of hint."""
    buckets: bool = False
    """Pictures of a folder in the sizes nearest to their own shapes (``data.bucket_sizes``), a batch of one size each,
    instead of cut square. What is measured on stays square, so that figures can be compared."""
    cache: bool = True
    """Latents, text embeddings and annotations are looked up in this machine's store, and kept there, so that another
    run on the same pictures computes none of them (``data.store``)."""
    flip: float = Field(0.0, ge=0, le=1)
    """Share of visits at which a pair is seen in a mirror: its picture, and its hint as it is of that picture (left and
    right limbs change colours, normals the sign of x). Pairs whose prompt tells left from right stay as they are."""


class EvaluationRecipe(_Strict):
    """How often, and on how much, it is measured on held-out hints what came of the training: the loss relative to the
    base without control and, but for a Union, obedience."""

    every: int = Field(250, ge=0)
    """Steps between evaluations; 0 for none."""
    num: int = Field(16, ge=2)
    steps: int = Field(10, gt=0)
    guidance: float = 4.0
    prompts: list[str] = []
    hints: list[str] = []
    """Pictures of one's own that are looked at, too: files of hints, and a prompt for each, or one for all. Four are
    made of each, into ``OUT/samples/own-step-N.png``."""
    patience: int = Field(0, ge=0)
    """Evaluations in a row without a better obedience after which the run ends; 0 for never."""
    target: float | None = None
    """The run ends where the lower bound of obedience reaches this; on ``mini`` with the CLIP-score kept, too."""

    def own(self) -> list[tuple[str, str]]:
        """(prompt, file of a hint) of each that is looked at; of one of either with all of the other."""
        prompts = self.prompts or [""]
        most = max(len(prompts), len(self.hints)) if self.hints else 0
        return [(prompts[i % len(prompts)], self.hints[i % len(self.hints)]) for i in range(most)]

    @model_validator(mode="after")
    def _hints_for_prompts(self) -> "EvaluationRecipe":
        counts = {len(self.prompts), len(self.hints)}
        if (self.prompts and len(counts - {1}) > 1) or (self.prompts and not self.hints):
            raise ValueError(f"evaluation.prompts are {len(self.prompts)}, evaluation.hints {len(self.hints)}: as many")
        return self


TrackerName = Literal["tensorboard", "wandb", "trackio"]


class TrackingRecipe(_Strict):
    """Where figures and sheets of samples are sent besides the log; each is an extra of its name."""

    to: list[TrackerName] = []
    project: str = "controlkit"
    """The name runs stand under at ``wandb`` and ``trackio``; ``tensorboard`` writes to ``OUT/tensorboard``."""


class Recipe(_Strict):
    """A control's training run. Unknown keys are refused, with the nearest known one."""

    base: str = "mini"
    vae: str | None = None
    """Another VAE than the base's own: a diffusers folder, a file or a hub's name."""
    size: int | None = Field(None, gt=0)
    """The side of the pictures trained on, in pixels; the base's own by default."""
    control: ControlRecipe = ControlRecipe()
    data: DataRecipe = DataRecipe()
    steps: int = Field(3000, gt=0)
    max_minutes: float | None = Field(None, gt=0)
    """Minutes after which the run ends, with the last step that fits, where ``steps`` have not ended it before: of wall
    clock, from caching on, evaluations and the time before interruptions included. What a kill undid is not counted.
    The rate then comes down in time (``train.learning_rate``): a cooldown of a fifth of the steps is one of a fifth of
    the budget. How many steps fit differs from time to time, and so does what comes of them: not for exact repeats."""
    batch: int = Field(32, gt=0)
    noises_per_pair: int = Field(1, gt=0)
    """Rows of a batch that share a pair, each with noise, timestep and prompt dropout of its own: a hint is read once
    for all of them. Reading hints is what costs most on a small base."""
    gradient_accumulation: int = Field(1, gt=0)
    """Parts a batch is computed in, one after the other, where memory is short: the gradients are the whole batch's."""
    gradient_checkpointing: bool = False
    """Compute features of branch and decoder anew in the backward pass instead of keeping them: less memory, slower."""
    optimizer: OptimizerName = "adamw"
    """``muon``: Muon for weight matrices, AdamW for the rest; ``adamw8bit``, ``adafactor``: less memory; ``prodigy``:
    finds the rate itself (set ``lr: 1``). What each does: ``optimizers.Optimizer``."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """How much AdamW and Prodigy keep of the means of gradients and of their squares."""
    epsilon: float = Field(1e-8, gt=0)
    """What AdamW and Prodigy add to the root of the squares' mean."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this L2 norm, over all weights, where theirs is larger."""
    lr: float = Field(1e-5, gt=0)
    """The rate at its highest (the paper: AdamW's, 1e-5 for SD, constant throughout)."""
    schedule: ScheduleName = "constant"
    """How the rate goes on after ``warmup``: as it is, but for a ``cooldown``; or as diffusers has it."""
    warmup: int = Field(0, ge=0)
    """Steps at the start over which the rate rises linearly."""
    cooldown: int = Field(0, ge=0)
    """Steps at the end over which it falls linearly, nearly to zero; of ``schedule: constant``."""
    cycles: int = Field(1, gt=0)
    """How often ``schedule: cosine_with_restarts`` comes down."""
    power: float = Field(1.0, gt=0)
    """Of what remains of the steps, with ``schedule: polynomial``, which ends at a rate of 1e-7."""
    weight_decay: float = Field(0.01, ge=0)
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of an average of the weights over steps, which is then what is measured and saved; 0 for none."""
    unfreeze_after: int | None = Field(None, gt=0)
    """Steps after which the base's U-Net learns, too, at the same rate (the paper's large-scale training, which unlocks
    after 50,000 and more). It is a copy that does: what it learnt is written into the control's folder as a difference,
    ``base-difference.safetensors``, which ``--lora`` merges into the base again."""
    prompt_dropout: float = Field(0.5, ge=0, le=1)
    """Share of prompts replaced by the empty one, drawn anew each step (Section 3.3)."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """What the networks are computed in; weights that learn stay in fp32. ``auto``: bf16 where it is the faster, else
    fp32. With ``fp16`` the loss is scaled, and steps whose gradients overflow are left out."""
    compile: bool = False
    """Compile the denoiser (torch.compile): faster steps, after a minute or two."""
    seed: int = 0
    checkpoint_every: int = Field(500, gt=0)
    keep: int | None = Field(2, gt=0)
    """Checkpoints kept; null for all."""
    evaluation: EvaluationRecipe = EvaluationRecipe()
    tracking: TrackingRecipe = TrackingRecipe()

    @model_validator(mode="after")
    def _together(self) -> "Recipe":
        if self.batch % (self.noises_per_pair * self.gradient_accumulation):
            raise ValueError(
                f"a batch of {self.batch} rows cannot be shared out in {self.draws} draws of each pair and "
                f"{self.gradient_accumulation} equal parts"
            )
        if self.unfreeze_after and self.ema:
            raise ValueError(
                "ema averages a control's weights alone, and with unfreeze_after the base's change beside them"
            )
        return self

    @model_validator(mode="after")
    def _nothing_unread(self) -> "Recipe":
        several = self.control.annotators
        for key, read, reason in (
            ("betas", self.optimizer != "adafactor", "adafactor has none"),
            ("epsilon", self.optimizer != "adafactor", "adafactor has its own"),
            ("cooldown", self.schedule == "constant", "it is of schedule: constant"),
            ("cycles", self.schedule == "cosine_with_restarts", "they are of schedule: cosine_with_restarts"),
            ("power", self.schedule == "polynomial", "it is of schedule: polynomial"),
            ("control.rank", self.control.body == "lora", "it is of control.body: lora"),
            ("control.annotator", not (several and self.control.annotator), "control.annotators stands in its place"),
            ("data.variants", self.data.source in ("emoji", "world"), "it is of data.source: emoji or world"),
            ("data.scenes", self.data.source in ("scenes", "world"), "it is of data.source: scenes or world"),
            ("data.visits", self.data.source in ("scenes", "world"), "it is of data.source: scenes or world"),
            ("evaluation.patience", self.evaluation.every > 0, "evaluation.every is 0"),
            ("evaluation.target", self.evaluation.every > 0, "evaluation.every is 0"),
            ("evaluation.hints", self.evaluation.every > 0, "evaluation.every is 0"),
            ("evaluation.hints", not self.control.types, "of a Union no pictures are made while it trains"),
        ):
            *section, name = key.split(".")
            holder = getattr(self, section[0]) if section else self
            if not read and getattr(holder, name) != type(holder).model_fields[name].default:
                raise ValueError(f'"{key}" is set, and nothing reads it: {reason}')
        if self.schedule == "polynomial" and self.lr <= POLYNOMIAL_END:
            raise ValueError(f"schedule: polynomial ends at a rate of {POLYNOMIAL_END}, and lr is {self.lr}")
        return self

    @model_validator(mode="after")
    def _a_body_s_own_settings(self) -> "Recipe":
        control = self.control
        if control.body != "xs" and control.size_ratio is not None:
            raise ValueError(f"control.size_ratio is the width of body xs; body {control.body} has the base's own")
        whole = {"xs": "joins every layer", "adapter": "adds inside the base's encoder"}
        for name in ("join", "taps"):
            word, plain = getattr(control, name), ControlRecipe.model_fields[name].default
            if control.body in whole and word != plain:
                reason = f"with body {control.body}, which {whole[control.body]}, only {plain}"
                raise ValueError(f"control.{name} is {word}; {reason}")
        return self

    @model_validator(mode="after")
    def _a_branch_for_each_hint(self) -> "Recipe":
        control, names = self.control, self.control.annotators
        if control.hints_as == "channels":
            return self
        if len(set(names)) < max(len(names), 2):
            raise ValueError(f"control.hints_as is branches: control.annotators names two or more; it is {names}")
        if unfit := [name for name in names if name in ("", ".", "..") or {"/", "\\"} & set(name)]:
            raise ValueError(f'control.hints_as is branches: "{unfit[0]}" cannot be the name of a branch\'s folder')
        if control.body in ("xs", "adapter"):
            raise ValueError(f"control.hints_as is branches: of body copy, conv or lora, and not {control.body}")
        if control.channels:
            raise ValueError("control.hints_as is branches: each hint has three channels; leave out control.channels")
        return self


def _known_keys(model: type[BaseModel], path: Sequence[Any]) -> list[str]:
    for part in path:
        annotation = model.model_fields[str(part)].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        model = annotation
    return list(model.model_fields)


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file; ``UserError`` names a wrong key or value and the nearest right one.

    ``changes``: values to put in place of the file's, such as ``data.source=scenes``.
    """
    if not path.is_file():
        raise UserError(f"There is no recipe at {path}: expected a YAML file such as recipes/smoke.yaml.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; expected keys and values, such as `steps: 1000`.")
    for change in changes:
        put(content, change)
    return parse_recipe(content, str(path))


def put(content: dict[str, Any], change: str) -> None:
    """Put KEY=VALUE, the key's parts joined by dots and the value as YAML has it, into a recipe's values."""
    name, equals, text = change.partition("=")
    *path, key = name.strip().split(".")
    if not (equals and key and all(path)):
        raise UserError(f'"{change}" changes nothing: expected KEY=VALUE, such as steps=500 or data.source=scenes.')
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f'"{change}": the value is not YAML ({error}).') from error
    for part in path:
        inner = content.setdefault(part, {})
        if not isinstance(inner, dict):
            raise UserError(f'"{change}": {part} is {inner!r} and has no {key}.')
        content = inner
    content[key] = value


def parse_recipe(content: dict[str, Any], origin: str = "The recipe") -> Recipe:
    """A recipe from plain values; ``origin`` names them in errors."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # of several keys together
            raise UserError(f"{origin}: {first['ctx']['error']}.") from None
        *path, key = first["loc"]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise UserError(
                f'{origin} has an unknown key "{name}": {nearest(str(key), _known_keys(Recipe, path))}'
            ) from None
        raise UserError(
            f'{origin}: "{name}" is {first["input"]!r}; {first["msg"][0].lower()}{first["msg"][1:]}.'
        ) from None
